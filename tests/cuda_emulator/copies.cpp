// copies.cpp: asynchronous stores to other blocks and the barriers in shared memory that count them.
//
// A store may be made at any moment between its issue and the moment a wait for it ends, and a kernel
// must be right for all of them: it is made at a random switch, with seed 0 as late as can be.
//
// For ThreadSanitizer it belongs to a strand of its own, the engine of the thread that issued it: ordered
// after the issue, and before nothing until a wait.
#include <cstdio>
#include <unordered_map>

#include "runtime.h"

namespace host {

namespace {

// Not memcpy: the sanitizers would take it for an access by the running thread.
void move_bytes(const Copy& copy) {
    auto* to = static_cast<unsigned char*>(copy.to);
    for (unsigned i = 0; i < copy.bytes; ++i) {
        to[i] = copy.value[i];
        asm volatile("" ::: "memory");  // keeps g++ from making a memcpy of the loop
    }
}

bool aligned(const void* address, unsigned to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

}  // namespace

// ---- mbarriers --------------------------------------------------------------------------------------------

namespace {

// The runtime's own layout of the 8 bytes. Shared memory starts as 0xff, which has `never_initialized` below.
struct State {
    uint64_t phase : 1;
    uint64_t expected : 20;
    uint64_t pending : 20;
    int64_t bytes : 23;
};
static_assert(sizeof(State) == 8);
constexpr unsigned never_initialized = (1 << 20) - 1;

std::unordered_map<const Mbarrier*, Queue> waiting;
std::vector<Copy> in_flight;

State& state_of(Mbarrier* bar) { return *reinterpret_cast<State*>(bar); }

// One token per phase.
const void* token(const Mbarrier* bar, unsigned phase) { return reinterpret_cast<const char*>(bar) + phase; }

void end_phase_if_complete(Mbarrier* bar) {
    State& state = state_of(bar);
    if (state.pending || state.bytes) {
        return;
    }
    state.phase ^= 1;
    state.pending = state.expected;
    made_progress();
    const auto entry = waiting.find(bar);
    if (entry != waiting.end()) {
        entry->second.wake_all();
    }
}

void check_initialized(Mbarrier* bar, const char* what) {
    if (!aligned(bar, 8)) {
        fail("%s: the address of the mbarrier is not a multiple of 8", what);
    }
    if (state_of(bar).expected == never_initialized) {
        fail("%s: the mbarrier is not initialized", what);
    }
}

State& own(Mbarrier* bar, const char* what) {
    if (!self()->block->holds(bar, sizeof(State))) {
        fail("%s: the mbarrier is not in this block's shared memory", what);
    }
    check_initialized(bar, what);
    return state_of(bar);
}

template <class T>
T* in_peer(T* shared, unsigned rank, unsigned bytes, const char* what) {
    const Block& block = *self()->block;
    if (!block.holds(shared, bytes)) {
        fail("%s: not an address in this block's shared memory", what);
    }
    const auto offset = reinterpret_cast<unsigned char*>(shared) - block.shared;
    return reinterpret_cast<T*>(peer(rank).shared + offset);
}

}  // namespace

void mbarrier_init(Mbarrier* bar, unsigned count) {
    if (!self()->block->holds(bar, sizeof(State)) || !aligned(bar, 8)) {
        fail("mbarrier_init: needs 8 aligned bytes of this block's shared memory");
    }
    if (count == 0 || count >= never_initialized) {
        fail("mbarrier_init: a count of %u", count);
    }
    note_write(bar, sizeof(State));
    State& state = state_of(bar);
    state.phase = 0;
    state.expected = count;
    state.pending = count;
    state.bytes = 0;
    const Unseen unseen;
    waiting.erase(bar);
}

// ThreadSanitizer sees the initialization as an ordinary write, which a barrier orders.
void fence_mbarrier_init() {}

void mbarrier_arrive_expect_tx(Mbarrier* bar, unsigned bytes) {
    State& state = own(bar, "mbarrier_arrive_expect_tx");
    note_read(bar, sizeof(State));
    if (state.pending == 0) {
        fail("mbarrier: more arrivals in a phase than it was initialized for (%u)", unsigned(state.expected));
    }
    state.bytes += bytes;
    release(token(bar, state.phase));
    --state.pending;
    end_phase_if_complete(bar);
    maybe_preempt();
}

// PTX lets try_wait suspend the thread until the phase ends: here it always does, so it never returns false.
bool mbarrier_try_wait(Mbarrier* bar, unsigned parity) {
    Fiber* me = self();
    State& state = own(bar, "mbarrier_wait_cluster");
    note_read(bar, sizeof(State));
    if (state.phase == (parity & 1)) {
        me->doing = "waits at mbarrier_wait_cluster";
        me->site = CALLER;
        me->mbarrier = bar;
        {
            const Unseen unseen;
            waiting[bar].push(me);
        }
        park();
    } else {
        maybe_preempt();
    }
    acquire(token(bar, parity & 1));
    return true;
}

std::string describe_mbarrier(const Mbarrier* bar) {
    const State& state = *reinterpret_cast<const State*>(bar);
    char text[128];
    snprintf(text, sizeof text, "phase of parity %u lacks %u of %u arrivals and %d bytes",
             unsigned(state.phase), unsigned(state.pending), unsigned(state.expected), int(state.bytes));
    return text;
}

// ---- Stores counted by an mbarrier ------------------------------------------------------------------------

namespace {

void launch_copy(const Copy& copy) {
    {
        const Unseen unseen;
        in_flight.push_back(copy);
    }
    maybe_preempt();
}

// What ThreadSanitizer must know of a store.
void note_copy(const Copy& copy, const void* site) {
    Fiber* me = self();
    note_read(copy.bar, sizeof(State));
    release(&me->issued);
    me->engine.perform(&me->issued, site, [&] {
        note_write(copy.to, copy.bytes);
        release(token(copy.bar, state_of(copy.bar).phase));
    });
}

void make_copy(const Copy& copy) {
    move_bytes(copy);
    state_of(copy.bar).bytes -= copy.bytes;
    end_phase_if_complete(copy.bar);
}

}  // namespace

void st_async(void* shared, const void* value, unsigned bytes, Mbarrier* bar, unsigned rank) {
    if (!aligned(shared, bytes)) {
        fail("st_async: the address is not a multiple of %u", bytes);
    }
    Copy copy;
    copy.to = in_peer(shared, rank, bytes, "st_async");
    copy.bytes = bytes;
    copy.bar = in_peer(bar, rank, sizeof(State), "st_async");
    std::memcpy(copy.value, value, bytes);
    check_initialized(copy.bar, "st_async");
    note_copy(copy, CALLER);
    launch_copy(copy);
}

void reset_copies() {
    in_flight.clear();
    waiting.clear();
}

bool complete_a_copy(bool any) {
    if (in_flight.empty()) {
        return false;
    }
    const Unseen unseen;
    const size_t index = any ? random_number() % in_flight.size() : 0;
    const Copy copy = in_flight[index];
    if (any) {
        in_flight[index] = in_flight.back();
        in_flight.pop_back();
    } else {
        in_flight.erase(in_flight.begin());
    }
    make_copy(copy);
    return true;
}

void check_no_copy_into(const Block& block) {
    for (const Copy& copy : in_flight) {
        if (block.holds(copy.to, copy.bytes)) {
            fail("the block exits while a store to its shared memory is in flight");
        }
    }
}

}  // namespace host
