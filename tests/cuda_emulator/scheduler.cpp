// scheduler.cpp: fibers, schedules, barriers, launches, and the report of a launch that cannot end.
//
// All threads of the resident blocks live as fibers on one OS thread. The schedule is a function of the seed:
//   seed 0       first in, first out, no preemption;
//   other seeds  one of three styles (uniform, eager, unfair; see Schedule), preempting at random basic
//   blocks.
// A launch ends when all threads have exited, when one fails, when none can run (deadlock), or when all keep
// polling memory that no thread changes (livelock).
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>
#include <execinfo.h>
#include <map>
#include <sys/mman.h>

#include "runtime.h"

namespace host {

Thread* running;
dim3 block_dim, grid_dim;
int without = -1;

namespace {

constexpr size_t static_shared_limit = 48 << 10;       // per block, as on every architecture
constexpr size_t shared_limit = 227 << 10;             // static and dynamic together, on sm_90 and sm_100
constexpr unsigned char nan_byte = 0xff;               // four or two of them are a NaN in every float type
constexpr uint64_t basic_block_limit = 1'000'000'000;  // for loops that never poll: some seconds

// ---- Which fiber runs next ----

class Schedule {
  public:
    void reset(uint64_t new_seed, size_t capacity, unsigned blocks, unsigned warps_per_block) {
        seed = new_seed;
        state = seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
        ring.assign(capacity, nullptr);
        head = count = 0;
        style = seed ? Style(seed % 3) : Style::uniform;
        slow_block = random() % blocks;
        slow_warp = blocks == 1 || random() % 2 ? int(random() % warps_per_block) : -1;
    }
    uint64_t random() {  // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state;
    }
    bool is_seeded() const { return seed != 0; }
    bool empty() const { return count == 0; }
    void add(Fiber* fiber) { at(count++) = fiber; }
    Fiber* take() {
        if (seed) {
            std::swap(at(0), at(choose()));
        }
        Fiber* fiber = at(0);
        head = head + 1 == ring.size() ? 0 : head + 1;
        --count;
        return fiber;
    }

  private:
    // uniform: every ready fiber is as likely as any other.
    // eager:   mostly the fiber that became ready last, so that some run far ahead of others.
    // unfair:  one warp, or one block, gets a small share and lags behind.
    enum class Style { uniform, eager, unfair };

    size_t choose() {
        size_t index = random() % count;
        if (style == Style::eager && random() % 8) {
            index = count - 1;
        } else if (style == Style::unfair && is_slow(at(index)) && random() % 16) {
            index = random() % count;
        }
        return index;
    }
    bool is_slow(const Fiber* fiber) const {
        const bool warp_is_slow = slow_warp < 0 || fiber->rank / 32 == unsigned(slow_warp);
        return fiber->block->index == slow_block && warp_is_slow;
    }
    Fiber*& at(size_t index) {
        index += head;
        return ring[index < ring.size() ? index : index - ring.size()];
    }

    uint64_t seed = 0, state = 0;
    Style style = Style::uniform;
    unsigned slow_block = 0;
    int slow_warp = -1;
    std::vector<Fiber*> ring;
    size_t head = 0, count = 0;
};

// ---- The launch in progress ----

class Memory {  // zero pages that cost nothing until touched
  public:
    bool allocate(size_t new_bytes) {
        bytes = new_bytes;
        void* mapped =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        start = mapped == MAP_FAILED ? nullptr : static_cast<unsigned char*>(mapped);
        return start != nullptr;
    }
    void free() {
        if (start) {
            allow_access(start, bytes);
            munmap(start, bytes);
        }
        start = nullptr;
    }
    unsigned char* start = nullptr;
    size_t bytes = 0;
};

struct Launch {
    Plan plan;
    void (*kernel)(void*);
    void* context;
    unsigned threads;  // per block
    unsigned blocks_in_cluster;
    std::vector<unsigned> order;  // in which the clusters of the grid start
    size_t started;               // of those
    std::vector<Cluster> clusters;
    Cluster* ended;      // just now
    size_t arena_bytes;  // of shared memory of a block: static, then dynamic
    struct Range {
        size_t offset, bytes;
    };
    std::vector<Range> static_variables;
    std::vector<size_t> static_offsets;  // by variable; SIZE_MAX: not seen yet
    size_t static_bytes;                 // in use
    unsigned live;

    uint64_t switches;
    uint64_t basic_blocks;
    uint64_t idle_polls;  // in a row, that saw what the same thread had seen before

    bool failed;
    bool in_kernel;  // a fiber runs, not the scheduler
    char token;      // what was written before the launch
    char end_token;  // what its threads did
};

Launch launch_state;
Launch& now = launch_state;
Schedule schedule;
Fiber main_fiber;  // the caller of launch()
std::string error;
unsigned countdown;  // basic blocks to the next preemption
unsigned countdown_from;

void switch_to(Fiber* to) {
    Fiber* from = self();
    ++now.switches;
    if (to == from) {
        return;
    }
    now.in_kernel = to != &main_fiber;
    running = to;
    to->strand.switch_to();
#if HOST_ASAN
    void* fake_stack;
    const size_t bytes = to == &main_fiber ? main_fiber.number : stack_bytes;
    __sanitizer_start_switch_fiber(&fake_stack, to->stack, bytes);
#endif
    from->context.switch_to(to->context);
#if HOST_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Return addresses as text: those of the calls before them, relative to the library. runtime.py makes files
// and lines of the first that lies in the kernel.
std::string places(const void* const* addresses, int count) {
    Dl_info library;
    dladdr(reinterpret_cast<void*>(&launch), &library);
    std::string text = " <";
    for (int i = 0; i < count; ++i) {
        const auto offset =
            static_cast<const char*>(addresses[i]) - 1 - static_cast<const char*>(library.dli_fbase);
        char number[24];
        snprintf(number, sizeof number, i ? ",%llx" : "%llx", static_cast<unsigned long long>(offset));
        text += number;
    }
    return text + ">";
}

uint64_t idle_poll_limit() { return 256ull * now.live + 10000; }

// Runs another fiber. The caller has put itself where it will be found again, or nowhere if it is done.
void run_another() {
    const bool chance = (schedule.is_seeded() ? schedule.random() : now.switches) % 8 == 0;
    if (schedule.empty() || chance) {
        complete_a_copy(schedule.is_seeded());
    }
    while (schedule.empty() && complete_a_copy(schedule.is_seeded())) {
    }
    const bool endless = now.switches > now.plan.max_switches || now.idle_polls > idle_poll_limit();
    Fiber* next = schedule.empty() || endless ? &main_fiber : schedule.take();
    if (next != &main_fiber && next->context.overflowed(next->stack)) {
        fail("another thread of this launch has overflowed its stack of %zu bytes", stack_bytes);
    }
    switch_to(next);
}

void yield() {
    schedule.add(self());
    run_another();
}

// Not memcpy, which ThreadSanitizer would take for an unprotected read of the kernel's.
uint64_t peek(const void* address, unsigned bytes) {
    if (bytes == 4) {
        return *static_cast<const uint32_t*>(address);
    }
    const auto* words = static_cast<const uint64_t*>(address);
    return bytes == 8 ? words[0] : words[0] + words[1] * 0x9E3779B97F4A7C15ull;
}

unsigned next_countdown() {
    if (!now.plan.preempt_permille) {
        return countdown_from = 1u << 30;  // only to notice an endless loop
    }
    const unsigned mean = 1000 / now.plan.preempt_permille;
    return countdown_from = 1 + unsigned(schedule.random() % (2 * mean));
}

void count_down_ended() {
    now.basic_blocks += countdown_from;
    countdown = next_countdown();
    Fiber* me = self();
    if (now.basic_blocks > basic_block_limit) {
        fail("livelock: %llu basic blocks and no end", static_cast<unsigned long long>(now.basic_blocks));
    }
    if (!now.plan.preempt_permille) {
        return;
    }
    if (++me->preempted_since_poll >= 3) {  // it computes, it does not poll
        made_progress();
    }
    yield();
}

}  // namespace

Fiber* self() { return static_cast<Fiber*>(running); }
bool seeded() { return schedule.is_seeded(); }
uint64_t random_number() { return schedule.random(); }
void made_progress() { now.idle_polls = 0; }

void wake(Fiber* fiber) {
    fiber->doing = "is ready";
    fiber->barrier = nullptr;
    fiber->rendezvous = nullptr;
    fiber->mbarrier = nullptr;
    made_progress();
    schedule.add(fiber);
}

void park() { run_another(); }

void Queue::push(Fiber* fiber) {
    fiber->next = nullptr;
    (first ? last->next : first) = fiber;
    last = fiber;
}

void Queue::wake_all() {
    for (Fiber* fiber = first; fiber;) {
        Fiber* next = fiber->next;
        wake(fiber);
        fiber = next;
    }
    first = last = nullptr;
}

void maybe_preempt() {
    if (now.plan.preempt_permille && schedule.random() % 1000 < 4 * now.plan.preempt_permille) {
        self()->doing = "is ready";
        yield();
    }
}

void poll(const void* address, unsigned bytes) {
    Fiber* me = self();
    me->site = CALLER;
    me->doing = "polls memory";
    me->preempted_since_poll = 0;
    yield();
    const uint64_t value = peek(address, bytes);
    auto* seen = std::find_if(std::begin(me->polls), std::end(me->polls), [&](auto& poll) { return poll.address == address; });
    const bool idle = seen != std::end(me->polls) && seen->value == value;
    if (seen == std::end(me->polls)) seen = &me->polls[++me->last_poll % std::size(me->polls)];
    *seen = {address, value};
    now.idle_polls = idle ? now.idle_polls + 1 : 0;
}

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char who[160];
    const dim3& block = running->block_index;
    const dim3& thread = running->thread_index;
    snprintf(who, sizeof who, "block (%u,%u,%u) thread (%u,%u,%u): ", block.x, block.y, block.z, thread.x,
             thread.y, thread.z);
    void* frames[16];
    const int depth = backtrace(frames, 16);
    {
        const Unseen unseen;
        error = std::string(who) + text + places(frames, depth);
    }
    now.failed = true;
    for (;;) {
        switch_to(&main_fiber);
    }
}

// ---- Barriers ---------------------------------------------------------------------------------------------

namespace {

void complete(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.phase;
    made_progress();
    barrier.waiting.wake_all();
}

unsigned arrive(Barrier& barrier, unsigned expected) {
    const unsigned phase = barrier.phase;
    release(barrier.token(phase));
    barrier.expected = expected;
    if (++barrier.arrived >= expected) {
        complete(barrier);
    }
    return phase;
}

void wait(Barrier& barrier, unsigned phase, const char* name, const void* site) {
    Fiber* me = self();
    if (barrier.phase == phase) {
        me->doing = name;
        me->site = site;
        me->barrier = &barrier;
        barrier.waiting.push(me);
        park();
    } else {
        maybe_preempt();
    }
    acquire(barrier.token(phase));
}

// A thread has exited: the barrier no longer expects it.
void leave(Barrier& barrier, unsigned expected) {
    barrier.expected = expected;
    if (barrier.arrived && barrier.arrived >= expected) {
        complete(barrier);
    }
}

Barrier& named_barrier(unsigned id, unsigned threads) {
    if (id == 0 || id > 15) {
        fail("named barrier %u: there are barriers 1 to 15", id);
    }
    if (threads == 0 || threads % 32) {
        fail("named barrier %u: %u threads is not a positive multiple of 32", id, threads);
    }
    Barrier& barrier = self()->block->barriers[id];
    if (barrier.arrived && barrier.expected != threads) {
        fail("named barrier %u: called with %u threads, by others with %u", id, threads, barrier.expected);
    }
    self()->number = id;
    return barrier;
}

}  // namespace

void block_barrier() {
    Block& block = *self()->block;
    const unsigned phase = arrive(block.barriers[0], block.live);
    wait(block.barriers[0], phase, "waits at __syncthreads", CALLER);
}

void named_barrier_sync(unsigned id, unsigned threads) {
    Barrier& barrier = named_barrier(id, threads);
    wait(barrier, arrive(barrier, threads), "waits at named barrier", CALLER);
}

void cluster_arrive() {
    Fiber* me = self();
    if (me->cluster_arrived) {
        fail("cluster_arrive: twice without cluster_wait");
    }
    me->cluster_arrived = true;
    me->cluster_phase = arrive(me->block->cluster->barrier, me->block->cluster->live);
    maybe_preempt();
}

void cluster_wait() {
    Fiber* me = self();
    if (!me->cluster_arrived) {
        fail("cluster_wait: without cluster_arrive");
    }
    me->cluster_arrived = false;
    wait(me->block->cluster->barrier, me->cluster_phase, "waits at the cluster barrier", CALLER);
}

// ---- Shared memory ----------------------------------------------------------------------------------------

namespace {

// Not memset, which ThreadSanitizer would take for a write by the running thread.
void make_nan(unsigned char* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
        memory[i] = nan_byte;
        asm volatile("" ::: "memory");
    }
}

// Gives a variable, seen for the first time in this launch, its place in all blocks.
size_t place_static(size_t bytes, size_t alignment) {
    const size_t gap = 16;  // forbidden under AddressSanitizer: an overrun must not reach the next variable
    const size_t offset = (now.static_bytes + gap + alignment - 1) / alignment * alignment;
    if (offset + bytes > static_shared_limit) {
        fail("more than 48 KiB of static shared memory");
    }
    const size_t gaps = 1024;  // these are not the kernel's
    if (offset + bytes + now.plan.shared_bytes > shared_limit + gaps) {
        fail("more than 227 KiB of static and dynamic shared memory");
    }
    const Unseen unseen;
    now.static_variables.push_back({offset, bytes});
    now.static_bytes = offset + bytes;
    for (Cluster& cluster : now.clusters) {
        for (Block& block : cluster.blocks) {
            if (block.live) {
                allow_access(block.shared + offset, bytes);
                make_nan(block.shared + offset, bytes);
            }
        }
    }
    return offset;
}

}  // namespace

void* shared_static(int id, size_t bytes, size_t alignment) {
    if (size_t(id) >= now.static_offsets.size()) {
        const Unseen unseen;
        now.static_offsets.resize(id + 1, SIZE_MAX);
    }
    if (now.static_offsets[id] == SIZE_MAX) {
        now.static_offsets[id] = place_static(bytes, alignment);
    }
    return self()->block->shared + now.static_offsets[id];
}

unsigned char* shared_dynamic() { return self()->block->shared + static_shared_limit; }

Block& peer(unsigned rank) {
    if (rank >= now.blocks_in_cluster) {
        fail("no block %u in a cluster of %u", rank, now.blocks_in_cluster);
    }
    Block& block = self()->block->cluster->blocks[rank];
    if (block.live == 0) {
        fail("uses the shared memory of block %u of the cluster, which has exited", rank);
    }
    return block;
}

// ---- Threads: birth and exit ------------------------------------------------------------------------------

namespace {

void end_block(Block& block) {
    check_no_copy_into(block);
    // A block that still reads this one's shared memory gets NaN, and ThreadSanitizer sees a race with its exit.
    allow_access(block.shared, block.shared_bytes);
    note_write(block.shared, now.static_bytes);
    note_write(block.shared + static_shared_limit, now.plan.shared_bytes);
    make_nan(block.shared, now.static_bytes);
    make_nan(block.shared + static_shared_limit, now.plan.shared_bytes);
    forbid_access(block.shared, block.shared_bytes);
}

void exit_thread() {
    Fiber* me = self();
    Block& block = *me->block;
    Cluster& cluster = *block.cluster;
    me->doing = "has exited";
    --block.live;
    --cluster.live;
    --now.live;
    made_progress();
    leave_warp(me);
    release(&block.exits);
    leave(block.barriers[0], block.live);
    leave(cluster.barrier, cluster.live);
    if (block.live == 0) {
        acquire(&block.exits);
        end_block(block);
    }
    if (cluster.live == 0) {
        now.ended = &cluster;
        switch_to(&main_fiber);  // which starts the next cluster instead of this one
    }
    for (;;) {
        run_another();
    }
}

void fiber_main() {
#if HOST_ASAN
    const void* caller_stack;
    size_t caller_bytes;
    __sanitizer_finish_switch_fiber(nullptr, &caller_stack, &caller_bytes);
    if (!main_fiber.stack) {  // the first fiber is entered from main
        main_fiber.stack = static_cast<unsigned char*>(const_cast<void*>(caller_stack));
        main_fiber.number = unsigned(caller_bytes);
    }
#endif
    acquire(&now.token);
    now.kernel(now.context);
    exit_thread();
}

unsigned volume(const unsigned size[3]) { return size[0] * size[1] * size[2]; }

dim3 position(unsigned index, const unsigned size[3]) {
    return {index % size[0], index / size[0] % size[1], index / size[0] / size[1]};
}

// The launch comes after all that the threads did, even if they never came to their end.
void end_strands(Cluster& cluster) {
    for (Fiber& fiber : cluster.fibers) {
        fiber.end_strands(&now.end_token);
    }
    acquire(&now.end_token);
}

// Begins the next cluster of the grid in `cluster`, whose memory is given.
void start_cluster(Cluster& cluster, unsigned char* stacks, unsigned char* shared) {
    const Plan& plan = now.plan;
    const unsigned clusters_in_grid[3] = {plan.grid[0] / plan.cluster[0], plan.grid[1] / plan.cluster[1],
                                          plan.grid[2] / plan.cluster[2]};
    const dim3 corner = position(now.order[now.started++], clusters_in_grid);
    const unsigned blocks = now.blocks_in_cluster;

    end_strands(cluster);
    const Unseen unseen;
    cluster.fibers.clear();
    cluster.blocks.assign(blocks, {});
    cluster.fibers.resize(size_t(blocks) * now.threads);
    cluster.barrier = {};
    cluster.live = blocks * now.threads;
    now.live += cluster.live;

    for (unsigned rank = 0; rank < blocks; ++rank) {
        Block& block = cluster.blocks[rank];
        const dim3 within = position(rank, plan.cluster);
        const dim3 index = {corner.x * plan.cluster[0] + within.x, corner.y * plan.cluster[1] + within.y,
                            corner.z * plan.cluster[2] + within.z};
        block.cluster = &cluster;
        block.index = index.x + plan.grid[0] * (index.y + plan.grid[1] * index.z);
        block.rank = rank;
        block.live = now.threads;
        block.warps.resize((now.threads + 31) / 32);
        block.shared = shared + now.arena_bytes * rank;
        block.shared_bytes = static_shared_limit + plan.shared_bytes;
        forbid_access(block.shared, now.arena_bytes);
        for (const Launch::Range& variable : now.static_variables) {
            allow_access(block.shared + variable.offset, variable.bytes);
        }
        allow_access(block.shared + static_shared_limit, plan.shared_bytes);
        make_nan(block.shared, now.static_bytes);
        make_nan(block.shared + static_shared_limit, plan.shared_bytes);

        for (unsigned thread = 0; thread < now.threads; ++thread) {
            Fiber& fiber = cluster.fibers[size_t(rank) * now.threads + thread];
            fiber.thread_index = position(thread, plan.block);
            fiber.block_index = index;
            fiber.block = &block;
            fiber.warp = &block.warps[thread / 32];
            fiber.rank = thread;
            fiber.lane = thread % 32;
            fiber.warp->live |= 1u << fiber.lane;
            fiber.stack = stacks + (size_t(rank) * now.threads + thread) * stack_bytes;
            fiber.strand.start();
            fiber.context.prepare(fiber.stack, stack_bytes, fiber_main);
            schedule.add(&fiber);
        }
    }
    release(&now.token);
}

}  // namespace

// ---- Reports ----------------------------------------------------------------------------------------------

namespace {

std::string ranges(const std::vector<unsigned>& sorted) {
    std::string text;
    for (size_t first = 0; first < sorted.size();) {
        size_t last = first;
        while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) {
            ++last;
        }
        text += (text.empty() ? "" : ",") + std::to_string(sorted[first]);
        if (last > first) {
            text += "-" + std::to_string(sorted[last]);
        }
        first = last + 1;
    }
    return text;
}

std::string describe_wait(const Fiber& fiber) {
    std::string text = fiber.doing;
    if (const Barrier* barrier = fiber.barrier) {
        if (fiber.barrier >= fiber.block->barriers + 1 && fiber.barrier < fiber.block->barriers + 16) {
            text += " " + std::to_string(fiber.number);
        }
        text +=
            ", " + std::to_string(barrier->arrived) + " of " + std::to_string(barrier->expected) + " arrived";
    } else if (const Rendezvous* rendezvous = fiber.rendezvous) {
        char masks[96];
        snprintf(masks, sizeof masks, " %s, lanes %08x of %08x arrived", rendezvous->name, rendezvous->arrived,
                 rendezvous->mask);
        text += masks;
    } else if (fiber.mbarrier) {
        text += ", " + describe_mbarrier(fiber.mbarrier);
    }
    return fiber.site ? text + places(&fiber.site, 1) : text;
}

// One line for all threads and blocks that wait alike.
std::string where_everyone_waits() {
    using Key = std::pair<std::string, std::string>;  // what, threads
    std::map<Key, std::vector<unsigned>> blocks_by_wait;
    for (Cluster& cluster : now.clusters) {
        for (Block& block : cluster.blocks) {
            std::map<std::string, std::vector<unsigned>> threads_by_wait;
            const Fiber* fibers = &cluster.fibers[size_t(block.rank) * now.threads];
            for (unsigned thread = 0; thread < now.threads; ++thread) {
                threads_by_wait[describe_wait(fibers[thread])].push_back(thread);
            }
            for (auto& [what, threads] : threads_by_wait) {
                blocks_by_wait[{what, ranges(threads)}].push_back(block.index);
            }
        }
    }
    std::string text;
    for (auto& [key, blocks] : blocks_by_wait) {
        std::sort(blocks.begin(), blocks.end());
        text += "\n  block " + ranges(blocks) + " thread " + key.second + ": " + key.first;
    }
    if (now.started < now.order.size()) {
        const size_t waiting = (now.order.size() - now.started) * now.blocks_in_cluster;
        text += "\n  " + std::to_string(waiting) + " of " + std::to_string(volume(now.plan.grid)) +
                " blocks have not started: the device holds " +
                std::to_string(now.clusters.size() * now.blocks_in_cluster) + " at once";
    }
    return text;
}

void report_unfinished() {
    if (now.switches > now.plan.max_switches) {
        error = "livelock: more than " + std::to_string(now.plan.max_switches) + " switches";
    } else if (now.idle_polls > idle_poll_limit()) {
        error = "livelock: all threads wait, and those that poll memory see it unchanged";
    } else {
        error = "deadlock: no thread can run";
    }
    const Unseen unseen;
    error += where_everyone_waits();
}

// A wrong address becomes an error of the launch instead of the end of the process.
void on_signal(int signal, siginfo_t* info, void*) {
    if (!now.in_kernel) {
        std::signal(signal, SIG_DFL);
        return;
    }
    const char* what = signal == SIGFPE ? "division by zero" : "invalid address";
    const auto* address = static_cast<const unsigned char*>(info->si_addr);
    const bool overflow = signal != SIGFPE && address < self()->stack && address > self()->stack - (1 << 20);
    fail("%s %p,", overflow ? "stack overflow at" : what, info->si_addr);
}

class SignalHandlers {
  public:
    SignalHandlers() {
#if !HOST_TSAN && !HOST_ASAN  // which report these themselves
        stack_t alternate = {};
        alternate.ss_sp = memory;
        alternate.ss_size = sizeof memory;
        sigaltstack(&alternate, &old_stack);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; ++i) {
            sigaction(signals[i], &action, &old_actions[i]);
        }
#endif
    }
    ~SignalHandlers() {
#if !HOST_TSAN && !HOST_ASAN
        for (int i = 0; i < 3; ++i) {
            sigaction(signals[i], &old_actions[i], nullptr);
        }
        old_stack.ss_flags &= ~SS_ONSTACK;
        sigaltstack(&old_stack, nullptr);
#endif
    }

  private:
    static constexpr int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
    stack_t old_stack;
    struct sigaction old_actions[3];
    alignas(16) unsigned char memory[64 << 10];
};

bool refuse(const char* why) {
    error = why;
    return false;
}

bool plan_is_valid(const Plan& plan) {
    for (int axis = 0; axis < 3; ++axis) {
        if (!plan.grid[axis] || !plan.block[axis] || !plan.cluster[axis]) {
            return refuse("a size of the grid, block or cluster is zero");
        }
        if (plan.grid[axis] % plan.cluster[axis]) {
            return refuse("the grid is not a whole number of clusters");
        }
    }
    if (volume(plan.block) > 1024) {
        return refuse("more than 1024 threads in a block");
    }
    if (volume(plan.cluster) > 16) {
        return refuse("more than 16 blocks in a cluster");
    }
    if (plan.shared_bytes > shared_limit) {
        return refuse("more than 227 KiB of dynamic shared memory");
    }
    if (plan.resident_blocks < volume(plan.cluster)) {
        return refuse("the device cannot hold one cluster");
    }
    return true;
}

void run_all_clusters(const std::vector<unsigned char*>& stacks, const std::vector<unsigned char*>& arenas) {
    for (size_t slot = 0; slot < now.clusters.size(); ++slot) {
        start_cluster(now.clusters[slot], stacks[slot], arenas[slot]);
    }
    while (now.live) {
        now.ended = nullptr;
        run_another();  // returns when a cluster has ended, a thread has failed, or none can run
        if (now.failed) {
            return;
        }
        if (!now.ended) {
            report_unfinished();
            now.failed = true;
            return;
        }
        if (now.started < now.order.size()) {
            const size_t slot = size_t(now.ended - now.clusters.data());
            start_cluster(*now.ended, stacks[slot], arenas[slot]);
        }
    }
}

}  // namespace

int launch(void (*kernel)(void*), void* context, const Plan& plan) {
    error.clear();
    if (!plan_is_valid(plan)) {
        return 1;
    }
    now = {};
    now.plan = plan;
    now.kernel = kernel;
    now.context = context;
    now.threads = volume(plan.block);
    now.blocks_in_cluster = volume(plan.cluster);
    now.arena_bytes = static_shared_limit + (plan.shared_bytes + 127) / 128 * 128 + 128;
    without = plan.without;
    grid_dim = {plan.grid[0], plan.grid[1], plan.grid[2]};
    block_dim = {plan.block[0], plan.block[1], plan.block[2]};

    const size_t clusters = volume(plan.grid) / now.blocks_in_cluster;
    const size_t slots = std::min<size_t>(clusters, plan.resident_blocks / now.blocks_in_cluster);
    const size_t fibers_per_slot = size_t(now.blocks_in_cluster) * now.threads;
    schedule.reset(plan.seed, slots * fibers_per_slot, volume(plan.grid), (now.threads + 31) / 32);
    reset_copies();
    now.order.resize(clusters);
    for (size_t i = 0; i < clusters; ++i) {
        now.order[i] = unsigned(i);
        if (plan.seed) {  // CUDA promises no order
            std::swap(now.order[i], now.order[schedule.random() % (i + 1)]);
        }
    }
    now.clusters.resize(slots);
    countdown = next_countdown();

    Memory stacks, arenas;
    if (!stacks.allocate(slots * fibers_per_slot * stack_bytes) ||
        !arenas.allocate(slots * now.blocks_in_cluster * now.arena_bytes)) {
        stacks.free();
        return !refuse("out of memory for the threads");
    }
    std::vector<unsigned char*> stack_of, arena_of;
    for (size_t slot = 0; slot < slots; ++slot) {
        stack_of.push_back(stacks.start + slot * fibers_per_slot * stack_bytes);
        arena_of.push_back(arenas.start + slot * now.blocks_in_cluster * now.arena_bytes);
    }
    main_fiber = {};
    main_fiber.strand.be_current_thread();
    Strand::launcher = &main_fiber.strand;
    running = &main_fiber;
    {
        SignalHandlers handlers;
        run_all_clusters(stack_of, arena_of);
    }
    running = nullptr;
    for (Cluster& cluster : now.clusters) {
        end_strands(cluster);
    }
    const Unseen unseen;
    now.clusters.clear();
    stacks.free();
    arenas.free();
    return now.failed;
}

}  // namespace host

// ---- What Python calls, besides the kernels ---------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) const char* host_error() { return host::error.c_str(); }
extern "C" __attribute__((visibility("default"))) uint64_t host_switches() { return host::now.switches; }

// g++ -fsanitize-coverage=trace-pc calls this at every basic block of a kernel.
extern "C" void __sanitizer_cov_trace_pc() {
    if (--host::countdown == 0) {
        host::countdown = 1u << 30;
        if (host::now.in_kernel) {
            host::count_down_ended();
        }
    }
}
