// runtime.h: the state of a launch, shared by scheduler.cpp, collectives.cpp and copies.cpp. Kernels do not
// see it.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "context.h"
#include "language.h"
#include "sanitizers.h"

// The place in the kernel that called the runtime; runtime.py turns it into file and line. Only right in
// functions that the kernel calls directly.
#define CALLER __builtin_return_address(0)

namespace host {

struct Fiber;
struct Block;
struct Cluster;

struct Queue {  // linked through Fiber::next, so that waiting allocates nothing
    Fiber* first = nullptr;
    Fiber* last = nullptr;

    void push(Fiber* fiber);
    void wake_all();
};

struct Barrier {
    unsigned arrived = 0;
    unsigned expected = 0;
    unsigned phase = 0;
    char tokens[2] = {};  // one per parity of the phase
    Queue waiting;

    const void* token(unsigned of_phase) const { return &tokens[of_phase % 2]; }
};

// Lanes of a warp that meet in a collective. The last to come does the work for all.
using Collective = void (*)(void* const* operands, unsigned lanes);
struct Rendezvous {
    unsigned mask = 0;  // 0: this slot is free
    unsigned arrived = 0;
    Collective work = nullptr;
    const char* name = nullptr;
    void* operands[32];
    Fiber* fibers[32];
};

struct WarpBarrier {  // what ThreadSanitizer must know of __syncwarp with one mask
    unsigned phase = 0;
    char tokens[2] = {};
};

struct Warp {
    unsigned live = 0;             // lanes that exist and have not exited
    unsigned open = 0;             // rendezvous in use
    std::deque<Rendezvous> slots;  // free ones among them; a deque, since fibers point to their rendezvous
    std::map<unsigned, WarpBarrier> barriers;  // by mask
};

// A store made on behalf of a thread, some time after it was issued.
struct Copy {
    void* to = nullptr;
    unsigned bytes = 0;
    Mbarrier* bar = nullptr;  // counts them
    unsigned char value[16];
};

struct Fiber : Thread {
    Context context;
    Strand strand;
    unsigned char* stack = nullptr;
    Fiber* next = nullptr;

    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned rank = 0;  // within the block
    unsigned lane = 0;

    // Where it is, for the report of a deadlock.
    const char* doing = "is ready";
    const void* site = nullptr;
    unsigned number = 0;
    const Barrier* barrier = nullptr;
    const Rendezvous* rendezvous = nullptr;
    const Mbarrier* mbarrier = nullptr;

    // What it saw at its last polls, to notice that nothing moves any more: a loop may look at several words in turn.
    struct Poll {
        const void* address = nullptr;
        uint64_t value = 0;
    } polls[32];
    unsigned last_poll = 0;
    unsigned preempted_since_poll = 0;

    bool cluster_arrived = false;
    unsigned cluster_phase = 0;
    char issued = 0;  // token: what the thread did before it issued a store
    Strand engine;    // makes the stores that an mbarrier counts

    void end_strands(const void* token) {
        for (Strand* ending : {&strand, &engine}) {
            ending->end(token);
        }
    }
};

struct Block {
    Cluster* cluster = nullptr;
    unsigned index = 0;  // in the grid, x fastest
    unsigned rank = 0;   // in the cluster
    unsigned live = 0;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    Barrier barriers[16];  // 0 is __syncthreads
    std::vector<Warp> warps;
    char exits = 0;  // token: what the threads did that have exited

    bool holds(const void* address, size_t bytes) const {
        const auto* byte = static_cast<const unsigned char*>(address);
        return byte >= shared && byte + bytes <= shared + shared_bytes;
    }
};

// A place on the device where one cluster runs at a time.
struct Cluster {
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    Barrier barrier;
    unsigned live = 0;
};

// ---- scheduler.cpp ----

Fiber* self();
bool seeded();  // false for seed 0, the first-in first-out schedule
uint64_t random_number();
void made_progress();
Block& peer(unsigned rank);  // a block of this cluster that has not exited; fails otherwise
void wake(Fiber* fiber);
void park();  // runs others until someone wakes this fiber

// ---- collectives.cpp ----

void leave_warp(Fiber* fiber);

// ---- copies.cpp ----

void reset_copies();
bool complete_a_copy(bool any);  // false: none is in flight
void check_no_copy_into(const Block& block);
std::string describe_mbarrier(const Mbarrier* bar);

}  // namespace host
