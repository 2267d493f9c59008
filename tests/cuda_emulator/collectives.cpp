// collectives.cpp: what the lanes of a warp do together: shuffles, votes, reductions, __syncwarp, mma,
// ldmatrix.
//
// Lanes meet by mask and kind of operation; the last lane to come computes the result of all. None of these
// orders memory, except __syncwarp.
#include "runtime.h"

namespace host {

namespace {

// Rows and columns of fragments follow the PTX ISA, section "Matrix Fragments for mma.m16n8k16" and its
// siblings: lane = 4 * group + thread in group.
struct Lane {
    explicit Lane(int lane) : group(lane / 4), in_group(lane % 4) {}
    int group, in_group;
};

unsigned awaited(const Rendezvous& rendezvous, const Warp& warp) { return rendezvous.mask & warp.live; }

// The rendezvous is full: does the work and lets all lanes but the running one go on.
void complete(Warp& warp, Rendezvous& rendezvous) {
    const Rendezvous completed = rendezvous;
    rendezvous.mask = 0;
    --warp.open;
    completed.work(completed.operands, completed.arrived);
    for (int lane = 0; lane < 32; ++lane) {
        if (completed.arrived >> lane & 1 && completed.fibers[lane] != self()) {
            wake(completed.fibers[lane]);
        }
    }
}

Rendezvous& find_rendezvous(Warp& warp, unsigned mask, Collective work, const char* name) {
    Rendezvous* free_slot = nullptr;
    unsigned unseen = warp.open;
    for (Rendezvous& rendezvous : warp.slots) {
        if (rendezvous.mask == 0) {
            free_slot = free_slot ? free_slot : &rendezvous;
            if (unseen == 0) {
                break;
            }
        } else {
            if (rendezvous.mask == mask && rendezvous.work == work) {
                return rendezvous;
            }
            --unseen;
        }
    }
    if (!free_slot) {
        const Unseen unseen;
        free_slot = &warp.slots.emplace_back();
    }
    ++warp.open;
    free_slot->mask = mask;
    free_slot->arrived = 0;
    free_slot->work = work;
    free_slot->name = name;
    return *free_slot;
}

void join_collective(unsigned mask, Collective work, void* operands, const char* name, const void* site) {
    Fiber* me = self();
    Warp& warp = *me->warp;
    if (!(mask >> me->lane & 1)) {
        fail("%s: mask %08x leaves out the calling lane %u", name, mask, me->lane);
    }
    Rendezvous& rendezvous = find_rendezvous(warp, mask, work, name);
    rendezvous.arrived |= 1u << me->lane;
    rendezvous.operands[me->lane] = operands;
    rendezvous.fibers[me->lane] = me;
    if (rendezvous.arrived == awaited(rendezvous, warp)) {
        complete(warp, rendezvous);
        maybe_preempt();
        return;
    }
    me->doing = "waits in";
    me->site = site;
    me->rendezvous = &rendezvous;
    park();
}

// mma and ldmatrix need all 32 lanes.
void meet_whole_warp(Collective work, void* operands, const char* name, const void* site) {
    if (self()->warp->live != ~0u) {
        fail("%s: needs a whole warp, but some lanes do not exist or have exited", name);
    }
    join_collective(~0u, work, operands, name, site);
}

template <class Operands>
Operands& of_lane(void* const* operands, int lane) {
    return *static_cast<Operands*>(operands[lane]);
}

}  // namespace

void leave_warp(Fiber* fiber) {
    Warp& warp = *fiber->warp;
    warp.live &= ~(1u << fiber->lane);
    for (Rendezvous& rendezvous : warp.slots) {
        if (rendezvous.mask && rendezvous.arrived == awaited(rendezvous, warp)) {
            complete(warp, rendezvous);
        }
    }
}

// ---- Shuffles, votes, reductions --------------------------------------------------------------------------

namespace {

WarpBarrier& barrier_of(Warp& warp, unsigned mask) {
    const Unseen unseen;
    return warp.barriers[mask];
}

void end_phase(void* const* all, unsigned lanes) { ++of_lane<WarpBarrier>(all, __builtin_ctz(lanes)).phase; }

}  // namespace

void warp_barrier(unsigned mask) {
    WarpBarrier& barrier = barrier_of(*self()->warp, mask);
    const char* token = &barrier.tokens[barrier.phase % 2];
    release(token);
    join_collective(mask, end_phase, &barrier, "__syncwarp", CALLER);
    acquire(token);
}

namespace {

struct ShuffleOperands {
    uint64_t value, result;
    Shuffle kind;
    int argument, width;
};

int source_lane(const ShuffleOperands& operands, int lane) {
    const int segment = lane / operands.width * operands.width;
    const int own = lane - segment;
    int source = own;
    switch (operands.kind) {
        case Shuffle::index: source = operands.argument & (operands.width - 1); break;
        case Shuffle::exclusive_or: source = own ^ operands.argument; break;
        case Shuffle::down: source = own + operands.argument; break;
        case Shuffle::up: source = own - operands.argument; break;
    }
    const bool outside = source < 0 || source >= operands.width;
    return segment + (outside ? own : source);
}

void shuffle_lanes(void* const* all, unsigned lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes >> lane & 1) {
            auto& mine = of_lane<ShuffleOperands>(all, lane);
            const int source = source_lane(mine, lane);
            if (!(lanes >> source & 1)) {
                fail("shuffle: lane %d reads lane %d, which takes no part", lane, source);
            }
            mine.result = of_lane<ShuffleOperands>(all, source).value;
        }
    }
}

struct VoteOperands {
    bool predicate;
    unsigned result;
};

void count_votes(void* const* all, unsigned lanes) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes >> lane & 1 && of_lane<VoteOperands>(all, lane).predicate) {
            votes |= 1u << lane;
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes >> lane & 1) {
            of_lane<VoteOperands>(all, lane).result = votes;
        }
    }
}

struct ReduceOperands {
    unsigned value, result;
    Reduce kind;
    bool is_signed;
};

unsigned combine(unsigned a, unsigned b, Reduce kind, bool is_signed) {
    const bool b_is_less = is_signed ? int(b) < int(a) : b < a;
    switch (kind) {
        case Reduce::add: return a + b;
        case Reduce::minimum: return b_is_less ? b : a;
        case Reduce::maximum: return b_is_less ? a : b;
        case Reduce::bit_xor: return a ^ b;
    }
    __builtin_unreachable();
}

void reduce_lanes(void* const* all, unsigned lanes) {
    const int first = __builtin_ctz(lanes);
    unsigned result = of_lane<ReduceOperands>(all, first).value;
    for (int lane = first + 1; lane < 32; ++lane) {
        if (lanes >> lane & 1) {
            const auto& operands = of_lane<ReduceOperands>(all, lane);
            result = combine(result, operands.value, operands.kind, operands.is_signed);
        }
    }
    for (int lane = first; lane < 32; ++lane) {
        if (lanes >> lane & 1) {
            of_lane<ReduceOperands>(all, lane).result = result;
        }
    }
}

}  // namespace

uint64_t shuffle(unsigned mask, uint64_t value, Shuffle kind, int argument, int width) {
    ShuffleOperands operands{value, 0, kind, argument, width};
    join_collective(mask, shuffle_lanes, &operands, "a shuffle", CALLER);
    return operands.result;
}

unsigned ballot(unsigned mask, bool predicate) {
    VoteOperands operands{predicate, 0};
    join_collective(mask, count_votes, &operands, "a vote", CALLER);
    return operands.result;
}

unsigned reduce(unsigned mask, unsigned value, Reduce kind, bool is_signed) {
    ReduceOperands operands{value, 0, kind, is_signed};
    join_collective(mask, reduce_lanes, &operands, "a reduction", CALLER);
    return operands.result;
}

// ---- Matrix products --------------------------------------------------------------------------------------

namespace {

struct MmaOperands {
    float d[4], c[4];
    unsigned a[4], b[2];
};

// D = A B + C with A [16, depth] and B [depth, 8], from matrices gathered off the lanes. Sums in double: the
// order of a tensor core's sum is not documented, and this is the value that it approximates.
template <int depth>
void multiply(void* const* all, const float (&a)[16][depth], const float (&b)[depth][8]) {
    double d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operands = of_lane<MmaOperands>(all, lane);
        const Lane at(lane);
        for (int i = 0; i < 4; ++i) {
            d[at.group + 8 * (i / 2)][2 * at.in_group + i % 2] = operands.c[i];
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < depth; ++k) {
            for (int column = 0; column < 8; ++column) {
                d[row][column] += double(a[row][k]) * double(b[k][column]);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto& operands = of_lane<MmaOperands>(all, lane);
        const Lane at(lane);
        for (int i = 0; i < 4; ++i) {
            operands.d[i] = float(d[at.group + 8 * (i / 2)][2 * at.in_group + i % 2]);
        }
    }
}

float half_bits_to_float(unsigned short bits) { return __half2float({bits}); }
float bfloat16_bits_to_float(unsigned short bits) { return __bfloat162float({bits}); }

template <float (*decode)(unsigned short)>
void multiply_16bit(void* const* all, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operands = of_lane<MmaOperands>(all, lane);
        const Lane at(lane);
        for (int half = 0; half < 2; ++half) {
            const int pair = 2 * at.in_group + half;
            for (int i = 0; i < 4; ++i) {
                const auto bits = static_cast<unsigned short>(operands.a[i] >> (16 * half));
                a[at.group + 8 * (i % 2)][pair + 8 * (i / 2)] = decode(bits);
            }
            for (int i = 0; i < 2; ++i) {
                const auto bits = static_cast<unsigned short>(operands.b[i] >> (16 * half));
                b[pair + 8 * i][at.group] = decode(bits);
            }
        }
    }
    multiply(all, a, b);
}

void multiply_tf32(void* const* all, unsigned) {
    // The hardware ignores the low 13 bits.
    const auto decode = [](unsigned bits) { return bit_cast<float>(bits & 0xffffe000u); };
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& operands = of_lane<MmaOperands>(all, lane);
        const Lane at(lane);
        for (int i = 0; i < 4; ++i) {
            a[at.group + 8 * (i % 2)][at.in_group + 4 * (i / 2)] = decode(operands.a[i]);
        }
        for (int i = 0; i < 2; ++i) {
            b[at.in_group + 4 * i][at.group] = decode(operands.b[i]);
        }
    }
    multiply(all, a, b);
}

void mma(float* d, const unsigned* a, const unsigned* b, const float* c, Collective work, const void* site) {
    MmaOperands operands;
    std::memcpy(operands.a, a, sizeof operands.a);
    std::memcpy(operands.b, b, sizeof operands.b);
    std::memcpy(operands.c, c, sizeof operands.c);
    meet_whole_warp(work, &operands, "mma", site);
    std::memcpy(d, operands.d, sizeof operands.d);
}

}  // namespace

void mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b, const float* c) {
    mma(d, a, b, c, multiply_16bit<bfloat16_bits_to_float>, CALLER);
}
void mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b, const float* c) {
    mma(d, a, b, c, multiply_16bit<half_bits_to_float>, CALLER);
}
void mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b, const float* c) {
    mma(d, a, b, c, multiply_tf32, CALLER);
}

// ---- Moving 8 x 8 matrices --------------------------------------------------------------------------------

namespace {

struct LoadOperands {
    const unsigned short* row;
    int matrices;
    const unsigned short* elements[4][2];  // where the two halves of each register come from
};

void find_elements(void* const* all, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = of_lane<LoadOperands>(all, lane);
        const Lane at(lane);
        for (int matrix = 0; matrix < mine.matrices; ++matrix) {
            for (int half = 0; half < 2; ++half) {
                const int pair = 2 * at.in_group + half;
                mine.elements[matrix][half] = &of_lane<LoadOperands>(all, 8 * matrix + at.group).row[pair];
            }
        }
    }
}

}  // namespace

void ldmatrix(unsigned* registers, const void* row, int matrices) {
    const Fiber* me = self();
    LoadOperands operands{static_cast<const unsigned short*>(row), matrices, {}};
    if (int(me->lane) < 8 * matrices) {  // the addresses of further lanes are not used
        if (reinterpret_cast<uintptr_t>(row) % 16) {
            fail("ldmatrix: the address of a row is not a multiple of 16");
        }
        if (!me->block->holds(row, 16)) {
            fail("ldmatrix: the address of a row is not in this block's shared memory");
        }
    }
    meet_whole_warp(find_elements, &operands, "ldmatrix", CALLER);
    // Each lane reads for itself, from rows that others point to.
    for (int matrix = 0; matrix < matrices; ++matrix) {
        const auto& [low, high] = operands.elements[matrix];
        note_read(low, sizeof *low);
        note_read(high, sizeof *high);
        registers[matrix] = pack(*low, *high);
    }
}

}  // namespace host
