// stepwise.cu: everything of one time step but its matmul, forward and backward, for any cell, size and dtype.
//
// A recurrent layer that reads its weights anew at every time step: a library's matmul gives the recurrent projection
// of the gates, and one of these kernels does the rest in one pass over memory: bias, gates, states, what is saved for
// the gradient; and the mirror of that. gpu_rnn/backends/per_step.py has the time loop.
//
// A thread owns VEC hidden units side by side, of one batch row after another; a block has x over units and y over
// rows. A cell without such a reduction has no shared memory, no barrier and no atomic: two runs are bitwise equal.
// VEC is 16 bytes of `real`, where H is a multiple of that and all arrays are aligned: states, histories and
// products then move as 128 bits. Wider packs of half precision would leave too few threads in the small batches that
// this serves.
//
// Where the cell takes means, a block owns whole rows, with as many turns as it takes, and goes through them once for
// each level of means and once more for the cell. What a time step needs is then read again, from the nearest cache: in
// registers it would limit H. The sums are added up in a fixed order. VEC is half of that, as such a cell has more
// values at hand.
//
// Why nothing faster: weights on-chip (persistent.cu), or the matmul fused with this, need sizes that fit. Limits: none
// but memory; offsets are 64 bits.
//
// The auxiliary inputs of a cell are explained in cell_inputs.cuh.
//
// Compiled with -D: SCALAR (stored), PRODUCT (what the matmuls give: SCALAR, or float for half precision), REAL
// (computed in), VEC. A time step t is an index into [T, ...]; state index t lies between the time steps t-1 and t.

using scalar = SCALAR;
using product = PRODUCT;

constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
constexpr int K_OR_1 = K > 0 ? K : 1;  // an array has an element
constexpr int TRAINABLE = Cell::TRAINABLE, TRAINABLE_OR_1 = TRAINABLE > 0 ? TRAINABLE : 1;
constexpr int STEP_MEANS = Cell::STEP_MEANS > 0 ? Cell::STEP_MEANS : 1;
constexpr int GRAD_MEANS = Cell::GRAD_MEANS > 0 ? Cell::GRAD_MEANS : 1;
constexpr bool REDUCES = Cell::STEP_LEVELS + Cell::GRAD_LEVELS > 0;
constexpr int THREADS = REDUCES ? 256 : 128;  // of a block, at most
// Blocks that a multiprocessor has at least, which caps a thread's registers at 255, for float at 128: without a cap ptxas
// aims for more blocks, and spills.
constexpr int BLOCKS = REDUCES ? 1 : sizeof(real) == 8 ? 2 : 4;

// ---- A thread's units ----------------------------------------------------------------------------------------------

// VEC neighbours, loaded and stored at once.
template <class T>
struct alignas(sizeof(T) * VEC) Pack {
    T unit[VEC];
};

// A word of as many bytes: its store is one instruction, where the compiler splits some stores of a Pack.
template <int BYTES> struct Word;
template <> struct Word<16> { using type = uint4; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<2> { using type = unsigned short; };

// values[:][n] = from[:VEC]
template <class T, int N>
DEVICE void load(real (&values)[VEC][N], int n, const T* from) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
    for (int u = 0; u < VEC; ++u) values[u][n] = to_real(pack.unit[u]);
}

// values[:][n] += from[:VEC]
template <class T, int N>
DEVICE void add(real (&values)[VEC][N], int n, const T* from) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
    for (int u = 0; u < VEC; ++u) values[u][n] += to_real(pack.unit[u]);
}

// to[:VEC] = values[:][n]
template <class T, int N>
DEVICE void store(T* to, const real (&values)[VEC][N], int n) {
    Pack<T> pack;
    for (int u = 0; u < VEC; ++u) pack.unit[u] = from_real<T>(values[u][n]);
    using Whole = typename Word<sizeof pack>::type;
    __stwb(reinterpret_cast<Whole*>(to), *reinterpret_cast<const Whole*>(&pack));
}

DEVICE long long first_unit() { return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; }
DEVICE long long first_row() { return static_cast<long long>(blockIdx.y) * blockDim.y + threadIdx.y; }
DEVICE long long rows_apart() { return static_cast<long long>(gridDim.y) * blockDim.y; }

// Go through the units of this thread: one pack, or those that it has of a row that is the block's.
template <class Body>
DEVICE void for_each_unit(long long H, Body body) {
    if constexpr (REDUCES) {
#pragma unroll 1
        for (long long unit = threadIdx.x * VEC; unit < H; unit += blockDim.x * VEC) body(unit);
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
DEVICE void reduce_over_units(real (&means)[MEANS], long long units, long long H, bool& parity, int means_before(int),
                              Values values_of) {
#pragma unroll
    for (int level = 0; level < LEVELS; ++level) {
        const int first = means_before(level), last = means_before(level + 1);
        for (int n = first; n < last; ++n) means[n] = 0;
        for_each_unit(units, [&](long long unit) {
            real values[VEC][MEANS];
            values_of(level, unit, values);
            for (int u = 0; u < VEC; ++u)
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
    const scalar* Wx,         // [T, B, G, H] input projection, b_ih included
    const product* Rh,        // [B, G, H] recurrent projection of this time step
    const scalar* b_hh,       // [G, H] or null
    real* h,                  // [B, H] h as the cell takes it, overwritten
    real* cell_states,        // [T+1 or 1, S-1, B, H] all states but h: `state_out` written; it may be `state_in`
    scalar* saved,            // [T, B, K, H] written, or null; it may be Wx where K = G
    scalar* y,                // [T, B, H] written
    scalar* recurrent_input,  // [B, H] input of the next recurrent matmul, written; null where that is y
    const real* units, const unsigned char* flags, const unsigned long long* seed,  // see AuxInputs
    long long B, long long H, long long rows, long long t, long long state_in, long long state_out,
    long long t_next) {  // the time step computed after t, or -1
    const AuxInputs aux_inputs{units, flags, seed, B, H, rows};
    struct StepInputs {
        real x[VEC][G], r[VEC][G], state[VEC][S];
    };
    auto load_inputs = [&](StepInputs& v, long long b, long long unit) {
        const long long row = t * B + b;
        for (int g = 0; g < G; ++g) {
            load(v.x, g, Wx + (row * G + g) * H + unit);
            load(v.r, g, Rh + (b * G + g) * H + unit);
            if (b_hh != nullptr) add(v.r, g, b_hh + g * H + unit);
        }
        load(v.state, 0, h + b * H + unit);
        for (int s = 1; s < S; ++s) load(v.state, s, cell_states + ((state_in * (S - 1) + s - 1) * B + b) * H + unit);
    };
    auto load_aux = [&](real aux[AUX_OR_1], long long b, long long unit) {
        aux_inputs.of_unit(aux, b, unit);
        aux_inputs.flags_of(aux, aux_inputs.bits(t, b));
        aux_inputs.uniforms_of(aux, t, b, unit);
    };
    bool parity = false;
    if (!REDUCES && first_unit() >= H) return;
#pragma unroll 1  // rarely more than one turn
    for (long long b = first_row(); has_row(b, B); b += rows_apart()) {
        real means[STEP_MEANS];
        const auto of_level = [&](int level, long long unit, real (&values)[VEC][STEP_MEANS]) {
            StepInputs v;
            load_inputs(v, b, unit);
#pragma unroll
            for (int u = 0; u < VEC; ++u) {
                real aux[AUX_OR_1];
                load_aux(aux, b, unit + u);
                Cell::step_level(level, v.x[u], v.r[u], v.state[u], aux, means, values[u]);
            }
        };
        reduce_over_units<Cell::STEP_LEVELS>(means, b < B ? H : 0, H, parity, Cell::step_before, of_level);
        for_each_unit(b < B ? H : 0, [&](long long unit) {
            const long long row = t * B + b;
            StepInputs v;
            real to_save[VEC][K_OR_1];
            load_inputs(v, b, unit);
#pragma unroll
            for (int u = 0; u < VEC; ++u) {
                real aux[AUX_OR_1];
                load_aux(aux, b, unit + u);
                Cell::step(v.x[u], v.r[u], v.state[u], to_save[u], aux, means);
            }

            store(y + row * H + unit, v.state, 0);
            store(h + b * H + unit, v.state, 0);
            for (int s = 1; s < S; ++s)
                store(cell_states + ((state_out * (S - 1) + s - 1) * B + b) * H + unit, v.state, s);
            if (saved != nullptr)
                for (int k = 0; k < K; ++k) store(saved + (row * K + k) * H + unit, to_save, k);
            if constexpr (Cell::RECURRENT_INPUT != 0) {
                if (recurrent_input == nullptr || t_next < 0) return;
#pragma unroll
                for (int u = 0; u < VEC; ++u) {
                    real aux_next[AUX_OR_1];  // of `aux` above, these would take too many registers
                    aux_inputs.of_unit(aux_next, b, unit + u);
                    aux_inputs.flags_of(aux_next, aux_inputs.bits(t_next, b));
                    Cell::recurrent_input(v.state[u], aux_next);
                }
                store(recurrent_input + b * H + unit, v.state, 0);
            }
        });
    }
}
EXPORT(stepwise_forward)

// ---- Backward ------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) stepwise_backward(
    const scalar* dy,            // [T, B, H] or null
    const product* dh_recurrent,  // [B, H] gradient of h through the recurrent weights
    real* dh_direct,             // [B, H] gradient of h past the weights, overwritten
    real* dcell_states,          // [S-1, B, H] gradients of the cell states, overwritten
    const scalar* y,             // [T, B, H]
    const scalar* h0,            // [B, H]
    const real* cell_states,     // [T+1, S-1, B, H]
    const scalar* saved,         // [T, B, K, H]
    scalar* dWx,                 // [T, B, G, H] written
    scalar* dRh,                 // [T, B, G, H] written, or null where it equals dWx
    const scalar* dhistory,      // [T, S-1, B, H] gradients of the cell states after each time step, or null for zero
    real* dunits,                // [TRAINABLE, B, H] added to
    const real* units, const unsigned char* flags, const unsigned long long* seed,  // see AuxInputs
    long long B, long long H, long long rows, long long t,
    long long t_prev,    // the time step computed before t; -1: none, and h was h0
    long long state_in, long long state_out,
    long long t_next) {  // the one after t, whose matmul gave `dh_recurrent`, or -1
    const AuxInputs aux_inputs{units, flags, seed, B, H, rows};
    struct GradInputs {
        real dnew[VEC][S], next[VEC][S], prev[VEC][S], saved[VEC][K_OR_1];
        real aux[VEC][AUX_OR_1], sums[VEC][TRAINABLE_OR_1];
    };
    auto load_inputs = [&](GradInputs& v, long long b, long long unit) {
        const long long row = t * B + b;
        for (int u = 0; u < VEC; ++u) aux_inputs.of_unit(v.aux[u], b, unit + u);
        for (int n = 0; n < TRAINABLE; ++n) load(v.sums, n, dunits + (n * B + b) * H + unit);
        load(v.dnew, 0, dh_recurrent + b * H + unit);
        if (Cell::RECURRENT_INPUT && t_next >= 0) {
#pragma unroll
            for (int u = 0; u < VEC; ++u) {
                real parts[TRAINABLE_OR_1];
                aux_inputs.flags_of(v.aux[u], aux_inputs.bits(t_next, b));
                Cell::recurrent_input_grad(v.dnew[u], parts, v.aux[u]);
                for (int n = 0; n < TRAINABLE; ++n) v.sums[u][n] += parts[n];
            }
        }
        add(v.dnew, 0, dh_direct + b * H + unit);
        if (dy != nullptr) add(v.dnew, 0, dy + row * H + unit);
        load(v.next, 0, y + row * H + unit);
        load(v.prev, 0, (t_prev < 0 ? h0 : y + t_prev * B * H) + b * H + unit);
        for (int s = 1; s < S; ++s) {
            load(v.dnew, s, dcell_states + ((s - 1) * B + b) * H + unit);
            if (dhistory != nullptr) add(v.dnew, s, dhistory + ((t * (S - 1) + s - 1) * B + b) * H + unit);
            load(v.next, s, cell_states + ((state_out * (S - 1) + s - 1) * B + b) * H + unit);
            load(v.prev, s, cell_states + ((state_in * (S - 1) + s - 1) * B + b) * H + unit);
        }
        for (int k = 0; k < K; ++k) load(v.saved, k, saved + (row * K + k) * H + unit);
    };
    auto load_aux = [&](real aux[AUX_OR_1], long long b, long long unit) {
        aux_inputs.flags_of(aux, aux_inputs.bits(t, b));
        aux_inputs.uniforms_of(aux, t, b, unit);
    };
    bool parity = false;
    if (!REDUCES && first_unit() >= H) return;
#pragma unroll 1  // rarely more than one turn
    for (long long b = first_row(); has_row(b, B); b += rows_apart()) {
        real means[GRAD_MEANS];
        const auto of_level = [&](int level, long long unit, real (&values)[VEC][GRAD_MEANS]) {
            GradInputs v;
            load_inputs(v, b, unit);
#pragma unroll
            for (int u = 0; u < VEC; ++u) {
                load_aux(v.aux[u], b, unit + u);
                Cell::grad_level(
                    level, v.dnew[u], v.next[u], v.prev[u], v.saved[u], v.aux[u], means, values[u]);
            }
        };
        reduce_over_units<Cell::GRAD_LEVELS>(means, b < B ? H : 0, H, parity, Cell::grad_before, of_level);
        for_each_unit(b < B ? H : 0, [&](long long unit) {
            const long long row = t * B + b;
            GradInputs v;
            load_inputs(v, b, unit);
            real dx[VEC][G], dr[VEC][G], dprev[VEC][S];
#pragma unroll
            for (int u = 0; u < VEC; ++u) {
                real parts[TRAINABLE_OR_1];
                load_aux(v.aux[u], b, unit + u);
                Cell::grad(v.dnew[u], v.next[u], v.prev[u], v.saved[u], dx[u], dr[u], dprev[u], parts,
                           v.aux[u], means);
                for (int n = 0; n < TRAINABLE; ++n) v.sums[u][n] += parts[n];
            }

            for (int n = 0; n < TRAINABLE; ++n) store(dunits + (n * B + b) * H + unit, v.sums, n);
            store(dh_direct + b * H + unit, dprev, 0);
            for (int s = 1; s < S; ++s) store(dcell_states + ((s - 1) * B + b) * H + unit, dprev, s);
            for (int g = 0; g < G; ++g) store(dWx + (row * G + g) * H + unit, dx, g);
            if (dRh == nullptr) return;
            for (int g = 0; g < G; ++g) store(dRh + (row * G + g) * H + unit, dr, g);
        });
    }
}
EXPORT(stepwise_backward)
