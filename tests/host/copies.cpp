// copies.cpp: asynchronous copies and the barriers in shared memory that count them.
//
// A copy may be made at any moment between its issue and the moment somebody has waited for it, and a kernel
// must be right for all of them. Copies waited for in groups (cp.async) are made at once or at the wait, as
// the seed decides; those counted by an mbarrier (bulk copies, st.async) at a random switch. With seed 0 all
// are late.
//
// For ThreadSanitizer a copy belongs to a strand of its own, the engine of the thread that issued it: ordered
// after the issue, and before nothing until somebody waits.
#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "runtime.h"

namespace host {

namespace {

// Not memcpy: the sanitizers would take it for an access by the running thread.
void move_bytes(const Copy& copy) {
    auto* to = static_cast<unsigned char*>(copy.to);
    const auto* from = copy.from ? static_cast<const unsigned char*>(copy.from) : copy.value;
    for (unsigned i = 0; i < copy.bytes; ++i) {
        to[i] = from[i];
        asm volatile("" ::: "memory");  // keeps g++ from making a memcpy of the loop
    }
    for (unsigned i = 0; i < copy.zeros; ++i) {
        to[copy.bytes + i] = 0;
        asm volatile("" ::: "memory");
    }
}

bool aligned(const void* address, unsigned to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

// ---- Copies in groups ----

// The engine publishes what it has done so far as the group's; so it needs no more than it has acquired
// before.
void commit(CopyGroups& groups, const void* site) {
    const unsigned group = groups.committed++;
    groups.engine.perform(launch_token(), site,
                          [&] { release(&groups.tokens[group % sizeof groups.tokens]); });
}

void wait_for_groups(CopyGroups& groups, unsigned left) {
    if (groups.committed <= left) {
        return;
    }
    const unsigned last = groups.committed - left - 1;
    const Unseen unseen;
    const auto is_due = [&](const Copy& copy) { return copy.group <= last; };
    for (const Copy& copy : groups.late) {
        if (is_due(copy)) {
            move_bytes(copy);
        }
    }
    groups.late.erase(std::remove_if(groups.late.begin(), groups.late.end(), is_due), groups.late.end());
    acquire(&groups.tokens[last % sizeof groups.tokens]);
}

void issue(CopyGroups& groups, Copy copy) {
    copy.group = groups.committed;
    if (seeded() && random_number() % 2) {
        move_bytes(copy);
    } else {
        const Unseen unseen;
        groups.late.push_back(copy);
    }
}

}  // namespace

void cp_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes) {
    Fiber* me = self();
    if (!aligned(shared, bytes) || !aligned(global, bytes)) {
        fail("cp.async: an address is not a multiple of %u", bytes);
    }
    if (source_bytes > bytes) {
        fail("cp.async: %u source bytes for a copy of %u", source_bytes, bytes);
    }
    if (!me->block->holds(shared, bytes)) {
        fail("cp.async: the destination is not in this block's shared memory");
    }
    release(&me->issued);
    me->copies.engine.perform(&me->issued, CALLER, [&] {
        note_read(global, source_bytes);
        note_write(shared, bytes);
    });
    Copy copy;
    copy.to = shared;
    copy.from = global;
    copy.bytes = source_bytes;
    copy.zeros = bytes - source_bytes;
    issue(me->copies, copy);
}

void cp_async_commit() { commit(self()->copies, CALLER); }
void cp_async_wait(unsigned groups_left) { wait_for_groups(self()->copies, groups_left); }

void leave_with_copies(Fiber* fiber) {  // they land even so
    for (CopyGroups* groups : {&fiber->copies, &fiber->bulk_copies}) {
        for (const Copy& copy : groups->late) {
            move_bytes(copy);
        }
        const Unseen unseen;
        groups->late = {};
    }
}

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

// One token per phase and scope. A waiter of cluster scope sees all; one of block scope only its own block's
// doings.
enum class Scope { block, cluster };
const void* token(const Mbarrier* bar, unsigned phase, Scope scope) {
    return reinterpret_cast<const char*>(bar) + 2 * phase + (scope == Scope::cluster);
}

void publish(const Mbarrier* bar, unsigned phase, bool within_block) {
    if (within_block) {
        release(token(bar, phase, Scope::block));
    }
    release(token(bar, phase, Scope::cluster));
}

void end_phase_if_complete(Mbarrier* bar) {
    State& state = state_of(bar);
    if (state.pending || state.bytes) {
        return;
    }
    state.phase ^= 1;
    state.pending = state.expected;
    made_progress();
    const auto found = waiting.find(bar);
    if (found != waiting.end()) {
        found->second.wake_all();
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

void arrive(Mbarrier* bar, bool within_block) {
    State& state = state_of(bar);
    if (state.pending == 0) {
        fail("mbarrier: more arrivals in a phase than it was initialized for (%u)", unsigned(state.expected));
    }
    publish(bar, state.phase, within_block);
    --state.pending;
    end_phase_if_complete(bar);
    maybe_preempt();
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

void mbarrier_arrive(Mbarrier* bar) {
    own(bar, "mbarrier_arrive");
    note_read(bar, sizeof(State));
    arrive(bar, true);
}

void mbarrier_arrive_expect_tx(Mbarrier* bar, unsigned bytes) {
    own(bar, "mbarrier_arrive_expect_tx").bytes += bytes;
    note_read(bar, sizeof(State));
    arrive(bar, true);
}

void mbarrier_expect_tx(Mbarrier* bar, unsigned bytes) {
    State& state = own(bar, "mbarrier_expect_tx");
    note_read(bar, sizeof(State));
    state.bytes += bytes;
    end_phase_if_complete(bar);
}

void mbarrier_arrive_cluster(Mbarrier* bar, unsigned rank) {
    Mbarrier* remote = in_peer(bar, rank, sizeof(State), "mbarrier_arrive_cluster");
    check_initialized(remote, "mbarrier_arrive_cluster");
    note_read(remote, sizeof(State));
    arrive(remote, &peer(rank) == self()->block);
}

// PTX lets try_wait suspend the thread until the phase ends: here it always does, so it never returns false.
bool mbarrier_try_wait(Mbarrier* bar, unsigned parity, bool cluster_scope) {
    Fiber* me = self();
    State& state = own(bar, "mbarrier_wait");
    note_read(bar, sizeof(State));
    if (state.phase == (parity & 1)) {
        me->doing = cluster_scope ? "waits at mbarrier_wait_cluster" : "waits at mbarrier_wait";
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
    acquire(token(bar, parity & 1, Scope::block));
    if (cluster_scope) {
        acquire(token(bar, parity & 1, Scope::cluster));
    }
    return true;
}

std::string describe_mbarrier(const Mbarrier* bar) {
    const State& state = *reinterpret_cast<const State*>(bar);
    char text[128];
    snprintf(text, sizeof text, "phase of parity %u lacks %u of %u arrivals and %d bytes",
             unsigned(state.phase), unsigned(state.pending), unsigned(state.expected), int(state.bytes));
    return text;
}

// ---- Copies counted by an mbarrier ------------------------------------------------------------------------

namespace {

void launch_copy(const Copy& copy) {
    {
        const Unseen unseen;
        in_flight.push_back(copy);
    }
    maybe_preempt();
}

void check_bulk(const void* to, const void* from, unsigned bytes, const char* what) {
    if (bytes == 0 || bytes % 16 || !aligned(to, 16) || !aligned(from, 16)) {
        fail("%s: the size or an address is not a multiple of 16", what);
    }
}

void check_own_shared(const void* shared, unsigned bytes, const char* what) {
    if (!self()->block->holds(shared, bytes)) {
        fail("%s: not in this block's shared memory", what);
    }
}

// What ThreadSanitizer must know of a copy counted by `bar`. Shared memory is read in the async proxy: after
// what has passed fence_proxy_async(), which may be less than what the issuing thread knows.
void note_counted_copy(const Copy& copy, bool within_block, const void* site) {
    Fiber* me = self();
    if (copy.from && me->block->holds(copy.from, copy.bytes)) {
        me->proxy.perform(launch_token(), site, [&] {
            acquire(&me->block->proxy_fence);
            note_read(copy.from, copy.bytes);
            publish(copy.bar, state_of(copy.bar).phase, within_block);
        });
    }
    note_read(copy.bar, sizeof(State));
    release(&me->issued);
    me->engine.perform(&me->issued, site, [&] {
        if (copy.from && !me->block->holds(copy.from, copy.bytes)) {
            note_read(copy.from, copy.bytes);
        }
        note_write(copy.to, copy.bytes);
        publish(copy.bar, state_of(copy.bar).phase, within_block);
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
    note_counted_copy(copy, &peer(rank) == self()->block, CALLER);
    launch_copy(copy);
}

void bulk_copy_to_shared(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
    check_bulk(shared, global, bytes, "bulk_copy_to_shared");
    check_own_shared(shared, bytes, "bulk_copy_to_shared");
    own(bar, "bulk_copy_to_shared");
    Copy copy;
    copy.to = shared;
    copy.from = global;
    copy.bytes = bytes;
    copy.bar = bar;
    note_counted_copy(copy, true, CALLER);
    launch_copy(copy);
}

void bulk_copy_to_cluster(void* to, const void* shared, unsigned bytes, Mbarrier* bar, unsigned rank) {
    check_bulk(to, shared, bytes, "bulk_copy_to_cluster");
    check_own_shared(shared, bytes, "bulk_copy_to_cluster");
    Copy copy;
    copy.to = in_peer(to, rank, bytes, "bulk_copy_to_cluster");
    copy.from = shared;
    copy.bytes = bytes;
    copy.bar = in_peer(bar, rank, sizeof(State), "bulk_copy_to_cluster");
    check_initialized(copy.bar, "bulk_copy_to_cluster");
    note_counted_copy(copy, &peer(rank) == self()->block, CALLER);
    launch_copy(copy);
}

void fence_proxy_async() { release(&self()->block->proxy_fence); }

void bulk_copy_to_global(void* global, const void* shared, unsigned bytes) {
    Fiber* me = self();
    check_bulk(global, shared, bytes, "bulk_copy_to_global");
    check_own_shared(shared, bytes, "bulk_copy_to_global");
    me->bulk_copies.engine.perform(launch_token(), CALLER, [&] {
        acquire(&me->block->proxy_fence);
        note_read(shared, bytes);
        note_write(global, bytes);
    });
    Copy copy;
    copy.to = global;
    copy.from = shared;
    copy.bytes = bytes;
    issue(me->bulk_copies, copy);
}

void bulk_commit() { commit(self()->bulk_copies, CALLER); }
void bulk_wait(unsigned groups_left) { wait_for_groups(self()->bulk_copies, groups_left); }

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
        if (block.holds(copy.to, copy.bytes) || (copy.from && block.holds(copy.from, copy.bytes))) {
            fail("the block exits while a copy to or from its shared memory is in flight");
        }
    }
}

}  // namespace host
