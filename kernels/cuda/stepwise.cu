// stepwise.cu: everything of one time step but its matrix product, forward and backward, for any cell, size and dtype.
//
// A recurrent layer that reads its weights anew at every time step: a library's product gives the recurrent projection
// of the gates, and one of these kernels does the rest in one pass over memory: bias, gates, states, what is saved for
// the gradient; and the mirror of that. gpu_rnn/backends/per_step.py has the time loop.
//
// A thread owns UNITS hidden units side by side, of one batch row after another; a block has x over units and y over
// rows. A cell without such a reduction has no shared memory, no barrier and no atomic: two runs are bitwise equal.
// UNITS is 16 bytes of `real`, where H is a multiple of that and all arrays are aligned: states, histories and
// products then move as 128 bits. Wider packs of half precision would leave too few threads in the small batches that
// this serves.
//
// Where the cell takes means, a block owns whole rows, with as many turns as it takes, and goes through them once for
// each level of means and once more for the cell. What a time step needs is then read again, from the nearest cache: in
// registers it would limit H. The sums are added up in a fixed order. UNITS is half of that, as such a cell has more
// values at hand.
//
// Why nothing faster: weights on-chip (persistent.cu), or the matmul fused with this, need sizes that fit. Limits: none
// but memory; offsets are 64 bits.
//
// What a cell takes beside gates and states, `extra`, is explained in cell_inputs.cuh.
//
// Compiled with -D: SCALAR (stored), PRODUCT (what the matrix products give: SCALAR, or float for half precision), REAL
// (computed in), UNITS. A time step t is an index into [T, ...]; boundary t lies between the time steps t-1 and t.

using scalar = SCALAR;
using product = PRODUCT;

constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
constexpr int K_OR_1 = K > 0 ? K : 1;  // an array has an element
constexpr int LEARNED = Cell::LEARNED, LEARNED_OR_1 = LEARNED > 0 ? LEARNED : 1;
constexpr int STEP_MEANS = Cell::STEP_MEANS > 0 ? Cell::STEP_MEANS : 1;
constexpr int GRAD_MEANS = Cell::GRAD_MEANS > 0 ? Cell::GRAD_MEANS : 1;
constexpr bool REDUCES = Cell::STEP_LEVELS + Cell::GRAD_LEVELS > 0;
constexpr int THREADS = REDUCES ? 256 : 128;  // of a block, at most
// Blocks that a multiprocessor has at least, which caps a thread's registers at 255, for float at 128: without a cap ptxas
// aims for more blocks, and spills.
constexpr int BLOCKS = REDUCES ? 1 : sizeof(real) == 8 ? 2 : 4;

// ---- A thread's units ----------------------------------------------------------------------------------------------

// UNITS neighbours, loaded and stored at once.
template <class T>
struct alignas(sizeof(T) * UNITS) Pack {
    T unit[UNITS];
};

// A word of as many bytes: its store is one instruction, where the compiler splits some stores of a Pack.
template <int BYTES> struct Word;
template <> struct Word<16> { using type = uint4; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<2> { using type = unsigned short; };

// values[:][n] = from[:UNITS]
template <class T, int N>
DEVICE void load(real (&values)[UNITS][N], int n, const T* from) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
    for (int u = 0; u < UNITS; ++u) values[u][n] = to_real(pack.unit[u]);
}

// values[:][n] += from[:UNITS]
template <class T, int N>
DEVICE void add(real (&values)[UNITS][N], int n, const T* from) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
    for (int u = 0; u < UNITS; ++u) values[u][n] += to_real(pack.unit[u]);
}

// to[:UNITS] = values[:][n]
template <class T, int N>
DEVICE void store(T* to, const real (&values)[UNITS][N], int n) {
    Pack<T> pack;
    for (int u = 0; u < UNITS; ++u) pack.unit[u] = from_real<T>(values[u][n]);
    using Whole = typename Word<sizeof pack>::type;
    __stwb(reinterpret_cast<Whole*>(to), *reinterpret_cast<const Whole*>(&pack));
}

DEVICE long long first_unit() { return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * UNITS; }
DEVICE long long first_row() { return static_cast<long long>(blockIdx.y) * blockDim.y + threadIdx.y; }
DEVICE long long rows_apart() { return static_cast<long long>(gridDim.y) * blockDim.y; }

// Go through the units of this thread: one pack, or those that it has of a row that is the block's.
template <class Body>
DEVICE void for_each_unit(long long H, Body body) {
    if constexpr (REDUCES) {
#pragma unroll 1
        for (long long unit = threadIdx.x * UNITS; unit < H; unit += blockDim.x * UNITS) body(unit);
    } else {
        body(first_unit());
    }
}

// Make means [first, last) of the sums of each thread's own units, over the H units of each of the block's rows; all
// threads take part. Calls alternate between two places: one is read before the one after the next is written.
DEVICE void block_mean(real* means, int first, int last, long long H, bool parity) {
    using Parts = real[2][STEP_MEANS > GRAD_MEANS ? STEP_MEANS : GRAD_MEANS][THREADS / 32];
    SHARED(Parts, parts);
    const int across = min(32u, blockDim.x), warps = blockDim.x / 32, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int n = first; n < last; ++n)
        for (int lanes = across / 2; lanes > 0; lanes /= 2) means[n] += __shfl_xor_sync(~0u, means[n], lanes);
    if (warps > 1) {  // to a row
        if (thread % 32 == 0)
            for (int n = first; n < last; ++n) parts[parity][n][thread / 32] = means[n];
        __syncthreads();
        for (int n = first; n < last; ++n) {
            means[n] = 0;
            for (int warp = 0; warp < warps; ++warp) means[n] += parts[parity][n][threadIdx.y * warps + warp];
        }
    }
    for (int n = first; n < last; ++n) means[n] /= H;
}

// Make all means over the units of this block's row, level after level. units: H, or 0 where there is no row.
// values_of(level, unit, values) gives those of the level, of a thread's units from `unit` on.
template <int LEVELS, int MEANS, class Values>
DEVICE void reduce_over_units(real (&means)[MEANS], long long units, long long H, bool& parity, int before(int),
                              Values values_of) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        const int first = before(level), last = before(level + 1);
        for (int n = first; n < last; ++n) means[n] = 0;
        for_each_unit(units, [&](long long unit) {
            real values[UNITS][MEANS];
            values_of(level, unit, values);
            for (int u = 0; u < UNITS; ++u)
                for (int n = first; n < last; ++n) means[n] += values[u][n - first];
        });
        block_mean(means, first, last, H, parity);
        parity = !parity;
    }
}

// Whether there is a batch row left for this thread, or, where rows are a block's, for the block.
DEVICE bool has_row(long long b, long long B) { return (REDUCES ? b - threadIdx.y : b) < B; }

// ---- Forward -------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) stepwise_forward(
    const scalar* xg,    // [T, B, G, H] input projection, b_ih included
    const product* hg,   // [B, G, H] recurrent projection of this time step
    const scalar* b_hh,  // [G, H] or null
    real* h,             // [B, H] h as the cell sees it, overwritten
    real* others,        // [boundaries, S-1, B, H] the other states: `after` written; it may be `before`
    scalar* saved,       // [T, B, K, H] written, or null; it may be xg where K = G
    scalar* y,           // [T, B, H] written
    scalar* operand,     // [B, H] what the next time step's product sees, written; null where that is y
    const real* units, const unsigned char* flags, const unsigned long long* seed,  // see Extra
    long long B, long long H, long long rows, long long t, long long before, long long after,
    long long following) {  // the time step computed after t, or -1
    const Extra extra{units, flags, seed, B, H, rows};
    struct Given {
        real x[UNITS][G], r[UNITS][G], state[UNITS][S];
    };
    auto take = [&](Given& its, long long b, long long unit) {
        const long long row = t * B + b;
        for (int g = 0; g < G; ++g) {
            load(its.x, g, xg + (row * G + g) * H + unit);
            load(its.r, g, hg + (b * G + g) * H + unit);
            if (b_hh != nullptr) add(its.r, g, b_hh + g * H + unit);
        }
        load(its.state, 0, h + b * H + unit);
        for (int s = 1; s < S; ++s) load(its.state, s, others + ((before * (S - 1) + s - 1) * B + b) * H + unit);
    };
    auto take_more = [&](real more[EXTRA_OR_1], long long b, long long unit) {
        extra.of_unit(more, b, unit);
        extra.flags_of(more, extra.bits(t, b));
        extra.uniforms_of(more, t, b, unit);
    };
    bool parity = false;
    if (!REDUCES && first_unit() >= H) return;
#pragma unroll 1  // rarely more than one turn
    for (long long b = first_row(); has_row(b, B); b += rows_apart()) {
        real means[STEP_MEANS];
        const auto of_level = [&](int level, long long unit, real (&values)[UNITS][STEP_MEANS]) {
            Given its;
            take(its, b, unit);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                real more[EXTRA_OR_1];
                take_more(more, b, unit + u);
                Cell::step_level(level, its.x[u], its.r[u], its.state[u], more, means, values[u]);
            }
        };
        reduce_over_units<Cell::STEP_LEVELS>(means, b < B ? H : 0, H, parity, Cell::step_before, of_level);
        for_each_unit(b < B ? H : 0, [&](long long unit) {
            const long long row = t * B + b;
            Given its;
            real kept[UNITS][K_OR_1];
            take(its, b, unit);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                real more[EXTRA_OR_1];
                take_more(more, b, unit + u);
                Cell::step(its.x[u], its.r[u], its.state[u], kept[u], more, means);
            }

            store(y + row * H + unit, its.state, 0);
            store(h + b * H + unit, its.state, 0);
            for (int s = 1; s < S; ++s) store(others + ((after * (S - 1) + s - 1) * B + b) * H + unit, its.state, s);
            if (saved != nullptr)
                for (int k = 0; k < K; ++k) store(saved + (row * K + k) * H + unit, kept, k);
            if constexpr (Cell::OPERAND != 0) {
                if (operand == nullptr || following < 0) return;
#pragma unroll
                for (int u = 0; u < UNITS; ++u) {
                    real again[EXTRA_OR_1];  // kept from above, these would take too many registers
                    extra.of_unit(again, b, unit + u);
                    extra.flags_of(again, extra.bits(following, b));
                    Cell::operand(its.state[u], again);
                }
                store(operand + b * H + unit, its.state, 0);
            }
        });
    }
}
EXPORT(stepwise_forward)

// ---- Backward ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) stepwise_backward(
    const scalar* dy,      // [T, B, H] or null
    const product* back,   // [B, H] what came back to this h through the recurrent weights
    real* dh,              // [B, H] and past them, overwritten
    real* dothers,         // [S-1, B, H] gradients of the other states, overwritten
    const scalar* y,       // [T, B, H]
    const scalar* h0,      // [B, H]
    const real* others,    // [T+1, S-1, B, H] at the boundaries
    const scalar* saved,   // [T, B, K, H]
    scalar* dxg,           // [T, B, G, H] written
    scalar* dhg,           // [T, B, G, H] written, or null where it equals dxg
    const scalar* dhistory,  // [T, S-1, B, H] gradients of the other states after each time step, or null for zero
    real* dunits,          // [LEARNED, B, H] added to
    const real* units, const unsigned char* flags, const unsigned long long* seed,  // see Extra
    long long B, long long H, long long rows, long long t,
    long long previous,    // the time step computed before t; -1: none, and h was h0
    long long before, long long after,
    long long following) {  // the one after t, whose product gave `back`, or -1
    const Extra extra{units, flags, seed, B, H, rows};
    struct Given {
        real dnew[UNITS][S], next[UNITS][S], last[UNITS][S], kept[UNITS][K_OR_1];
        real more[UNITS][EXTRA_OR_1], sums[UNITS][LEARNED_OR_1];
    };
    auto take = [&](Given& its, long long b, long long unit) {
        const long long row = t * B + b;
        for (int u = 0; u < UNITS; ++u) extra.of_unit(its.more[u], b, unit + u);
        for (int n = 0; n < LEARNED; ++n) load(its.sums, n, dunits + (n * B + b) * H + unit);
        load(its.dnew, 0, back + b * H + unit);
        if (Cell::OPERAND && following >= 0) {
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                real parts[LEARNED_OR_1];
                extra.flags_of(its.more[u], extra.bits(following, b));
                Cell::operand_grad(its.dnew[u], parts, its.more[u]);
                for (int n = 0; n < LEARNED; ++n) its.sums[u][n] += parts[n];
            }
        }
        add(its.dnew, 0, dh + b * H + unit);
        if (dy != nullptr) add(its.dnew, 0, dy + row * H + unit);
        load(its.next, 0, y + row * H + unit);
        load(its.last, 0, (previous < 0 ? h0 : y + previous * B * H) + b * H + unit);
        for (int s = 1; s < S; ++s) {
            load(its.dnew, s, dothers + ((s - 1) * B + b) * H + unit);
            if (dhistory != nullptr) add(its.dnew, s, dhistory + ((t * (S - 1) + s - 1) * B + b) * H + unit);
            load(its.next, s, others + ((after * (S - 1) + s - 1) * B + b) * H + unit);
            load(its.last, s, others + ((before * (S - 1) + s - 1) * B + b) * H + unit);
        }
        for (int k = 0; k < K; ++k) load(its.kept, k, saved + (row * K + k) * H + unit);
    };
    auto take_more = [&](real more[EXTRA_OR_1], long long b, long long unit) {
        extra.flags_of(more, extra.bits(t, b));
        extra.uniforms_of(more, t, b, unit);
    };
    bool parity = false;
    if (!REDUCES && first_unit() >= H) return;
#pragma unroll 1  // rarely more than one turn
    for (long long b = first_row(); has_row(b, B); b += rows_apart()) {
        real means[GRAD_MEANS];
        const auto of_level = [&](int level, long long unit, real (&values)[UNITS][GRAD_MEANS]) {
            Given its;
            take(its, b, unit);
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                take_more(its.more[u], b, unit + u);
                Cell::grad_level(
                    level, its.dnew[u], its.next[u], its.last[u], its.kept[u], its.more[u], means, values[u]);
            }
        };
        reduce_over_units<Cell::GRAD_LEVELS>(means, b < B ? H : 0, H, parity, Cell::grad_before, of_level);
        for_each_unit(b < B ? H : 0, [&](long long unit) {
            const long long row = t * B + b;
            Given its;
            take(its, b, unit);
            real dx[UNITS][G], dr[UNITS][G], dlast[UNITS][S];
#pragma unroll
            for (int u = 0; u < UNITS; ++u) {
                real parts[LEARNED_OR_1];
                take_more(its.more[u], b, unit + u);
                Cell::grad(its.dnew[u], its.next[u], its.last[u], its.kept[u], dx[u], dr[u], dlast[u], parts,
                           its.more[u], means);
                for (int n = 0; n < LEARNED; ++n) its.sums[u][n] += parts[n];
            }

            for (int n = 0; n < LEARNED; ++n) store(dunits + (n * B + b) * H + unit, its.sums, n);
            store(dh + b * H + unit, dlast, 0);
            for (int s = 1; s < S; ++s) store(dothers + ((s - 1) * B + b) * H + unit, dlast, s);
            for (int g = 0; g < G; ++g) store(dxg + (row * G + g) * H + unit, dx, g);
            if (dhg == nullptr) return;
            for (int g = 0; g < G; ++g) store(dhg + (row * G + g) * H + unit, dr, g);
        });
    }
}
EXPORT(stepwise_backward)
