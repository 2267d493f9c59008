// persistent.cu: a whole sequence in one launch, with the recurrent weights on-chip for all its time steps.
//
// At every time step the recurrent layer multiplies the same matrix by a few columns. Here a group of BLOCKS blocks
// shares that matrix: each block owns BLOCK_UNITS = 16 * UNIT_TILES hidden units, holds their rows, in registers first
// and then in shared memory, and keeps their state in registers. What a time step needs from the other blocks, the new
// h of all units, is exchanged at the smallest scope that holds the weights:
//
//     SCOPE 0, block     BLOCKS = 1: a barrier of the block suffices
//     SCOPE 1, cluster   through distributed shared memory: 16-byte stores that count their bytes at the receiver's
//                        mbarrier, so that a block waits for data and nothing else (sm_90 and later)
//     SCOPE 2, grid      through L2: 16-byte words of 12 bytes of data and a flag, the sequence number of the exchange
//                        round, as in NCCL's LL protocol and the Lamport timestamps of Sparse Persistent RNNs. A word
//                        is loaded until its flag is the expected one: data and flag come in one round trip, where a
//                        flag behind the data costs a fence and two more
//
// The batch is cut into tiles of BATCH_ROWS rows; each tile has a group of its own, and groups never wait for each
// other. So DIRECTIONS instances, the directions and heads of a layer, run in one launch: each has arrays and groups of
// its own, which alternate in the grid, and computes bit for bit what a launch of its own would. The matmul is mma with
// the weights as the stationary 16-row operand and the batch on its narrow side, so that one row costs as much as 8,
// not 16; IEEE float32 is fused multiply-adds, and one row costs as much as 2. It serves both directions of time:
//
//     forward     out[g][unit] = sum over units p of R[g][unit][p] h[p]           G gate sets, 1 exchanged value a unit
//     backward    out[unit]    = sum over g, p of R[g][p][unit] da[g][p]          1 gate set, G exchanged values a unit
//
// so both hold the same number of fragments and are one loop: receive, multiply, reduce, apply the cell, send; what
// only later kernels read is stored after that. Warps that share a unit tile split the sum (K_SPLITS); the partial sums
// are added up through shared memory by the thread that owns the element (unit, batch row) and keeps its state. There
// are no atomics: two runs are bitwise equal. In the grid the operand may come in chunks, one after the other through
// the same shared memory: backward's is G times as large as forward's.
//
// Where the cell takes means over all units of a batch row, the group reduces within a time step (unit_reduction.cuh).
//
// Launches can't deadlock each other, on any number of streams: a block waits only for blocks of its own group, and
// these are co-resident with it or none of them is. A single block waits for none. The hardware starts the blocks of a
// cluster together. In the grid the cooperative launch starts all blocks or, until there is room, none. And no two
// launches share what they wait on: mbarriers are the block's own, the exchange buffer is for one launch only.
//
// LAYERS of a stack run as a wavefront (SCOPE 2). All but the first hold the rows of their input weights as well, and
// multiply by them while the exchange is under way.
//
//     forward     layer l is at time step t while the one below is at t + 1 or later. Only the first has its input
//                 projection computed beforehand. The others have a second PersistentBlock, `input`, that receives what
//                 the layer below sends, the same words, and multiplies it.
//     backward    layer l is at time step t while the one above is at t - 2 or earlier, and multiplies the gate
//                 gradients that it has received from its own blocks a second time, for the gradient of its inputs. A
//                 block sends that to the block with the same units in the layer below, a word of 8 bytes for each
//                 element, where the thread that owns the element loads it. Only the inputs of the first layer have
//                 their gradient from a GEMM after the launch.
//
// Where a single block has a whole layer, only what the other layer needs is sent. Layers in clusters aren't offered:
// all clusters would have to be co-resident, with a second kind of exchange between them, and by the cost model it
// would save at most 0.45 us a time step, of 1.2 to 2.4 for LSTMs of 128 to 512 units.
//
// A producer never waits for its consumers, and so nothing can deadlock: what goes to another layer has memory of its
// own for every time step, and a block waits for earlier rounds of its own layer and for the one layer that it takes
// from, which never waits for it. All layers are co-resident, or none. A sequence too long for so much memory takes
// several launches, one after the other in time; these hand on what calls hand on, so that forward h is rounded to
// SCALAR there.
//
// Why not the simpler way: one launch and one GEMM per time step (stepwise.cu) reads R from L2 every time and pays for
// two launches. Limits: H <= BLOCK_UNITS * BLOCKS; SCALAR is __half, __nv_bfloat16, or float, multiplied as TF32 or
// IEEE's.
//
// Read before it: persistent_params.cuh, the configuration; matmul_tile.cuh; unit_reduction.cuh; persistent_block.cuh,
// the weights of a block and the exchange of a group.

// ---- Elements and their addresses ----------------------------------------------------------------------------------

// The elements of a thread: which hidden unit and which batch row.
struct Element {
    int unit, row;        // within the block and the group
    long long hidden, b;  // in the layer
    bool valid;           // inside H and B; others compute on zeros, even NaN, store nothing and send zeros

    DEVICE Element(int k, int first_row, int B, int H) : Element(k, first_row, B, H, threadIdx.x, blockIdx.x) {}
    DEVICE Element(int k, int first_row, int B, int H, unsigned thread, unsigned block) {
        unit = unit_of(thread), row = row_of(thread) + k * ROW_STRIDE;
        hidden = block % BLOCKS * BLOCK_UNITS + unit;
        b = first_row + static_cast<long long>(block / BLOCKS / INSTANCES) * BATCH_ROWS + row;
        valid = in_tile() && hidden < H && b < B;
    }
    DEVICE bool in_tile() const { return FULL_THREADS || row < BATCH_ROWS; }
};

// An element after the time loop, computed anew: kept through the loop, some configurations would have to spill it.
DEVICE Element element_anew(int k, int first_row, int B, int H) {
    const int thread = in_register(int(threadIdx.x)), block = in_register(int(blockIdx.x));
    return Element(k, in_register(first_row), in_register(B), in_register(H), thread, block);
}

// Which of a thread's elements are valid, a bit each, in a register: comparing with B and H takes ten instructions.
DEVICE int valid_elements(int first_row, int B, int H) {
    int bits = 0;
    for (int k = 0; k < ELEMENTS; ++k) bits |= Element(k, first_row, B, H).valid << k;
    return in_register(bits);
}

// The address of a thread's first element in an array over time steps, the pitch to its next elements and the step to
// the next time step. To advance is an addition; a multiplication of 64 bits takes five instructions, for every gate.
template <class T>
struct Cursor {
    T* pointer;
    long long step;
    int pitch;  // to the thread's next element

    DEVICE T* of(int k) const { return pointer + k * pitch; }
    DEVICE void advance() { pointer += step; }
};

// Offsets of a time step's elements. States have T + 1 indices: time step t goes from index t to t + 1, in reverse from
// t + 1 to t.
struct TimeIndex {
    long long T, B, H;
    int states;
    bool reverse;

    DEVICE long long nth(long long n) const { return reverse ? T - 1 - n : n; }
    DEVICE long long state_in(long long t) const { return reverse ? t + 1 : t; }
    DEVICE long long state_out(long long t) const { return reverse ? t : t + 1; }
    DEVICE long long initial(const Element& e) const { return e.b * H + e.hidden; }             // in [B, H]
    DEVICE long long h(long long t, const Element& e) const { return t * B * H + initial(e); }  // in [T, B, H]
    DEVICE long long row(long long t, const Element& e, int N, int n) const {                   // in [T, B, N, H]
        return ((t * B + e.b) * N + n) * H + e.hidden;
    }
    DEVICE long long cell_state(long long index, int s, const Element& e) const {  // in [indices, S-1, B, H]
        return (index * (states - 1) + s - 1) * B * H + initial(e);
    }
};

#if !BACKWARD

// ---- Forward -------------------------------------------------------------------------------------------------------

struct Params {             // of one instance
    const SCALAR* Wx;       // [T, B, G, H] input projection, b_ih included; of the first layer
    const SCALAR* weights;  // [G, H, H] recurrent
    const SCALAR* b_hh;     // [G, H] or null
    const SCALAR* h0;       // [B, H]
    float* cell_states;     // [T+1, S-1, B, H] all states but h: the initial ones read, the rest written;
                            // if not `save`, [1, S-1, B, H], overwritten
    SCALAR* saved;          // [T, B, K, H] written; it may be Wx where K = G
    SCALAR* y;              // [T, B, H] written
    const float* units;     // see AuxInputs
    const unsigned char* flags;
    const unsigned long long* seed;
    const SCALAR* input_weights;  // [G, H, H]; of layers above the first, as b_ih
    const SCALAR* b_ih;           // [G, H] or null
    long long reverse;
};
struct KernelParams {
    Params of[INSTANCES];
};

// HAS_LOWER_LAYER: the instance is a layer that takes its input from the one below.
template <bool HAS_LOWER_LAYER>
DEVICE void forward(const Params& p, uint4* exchange, long long T, int B, int H, int rows, int first_row, int save) {
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
    DYNAMIC_SHARED(unsigned char, arena);
    PersistentBlock recurrent(arena, exchange, group(), T, B - first_row, p.weights, H);
#if LAYERS > 1
    const SCALAR* input_weights = HAS_LOWER_LAYER ? p.input_weights : nullptr;
    PersistentBlock input(arena + PersistentBlock::BYTES, exchange, group() - HAS_LOWER_LAYER, T, B - first_row,
                          input_weights, H);
    float input_bias[ELEMENTS][G];
    static_assert(!Cell::RECURRENT_INPUT, "what is sent is h, the input of the layer above");
#endif

    const TimeIndex index{T, B, H, S, p.reverse != 0};
    const AuxInputs aux_inputs{p.units, p.flags, p.seed, B, H, rows};
    float state[ELEMENTS][S], bias[ELEMENTS][G], saved[ELEMENTS][K > 0 ? K : 1], aux[ELEMENTS][AUX_OR_1];
    unsigned flag_bits[ELEMENTS];  // flags of the time step after the next
    SCALAR x[ELEMENTS][G];         // of the next time step, loaded during the exchange of this one
    const Element mine(0, first_row, B, H);
    const auto state_stride = static_cast<long long>(B) * H,
               row_step = kept(p.reverse != 0 ? -state_stride : state_stride);
    Cursor<const SCALAR> Wx_at{p.Wx + index.row(index.nth(0), mine, G, 0), G * row_step, ROW_STRIDE * G * H};
    Cursor<SCALAR> y_at{p.y + index.h(index.nth(0), mine), row_step, ROW_STRIDE * H};
    Cursor<SCALAR> saved_at{p.saved + index.row(index.nth(0), mine, K, 0), K * row_step, ROW_STRIDE * K * H};
    Cursor<float> cell_states_at{p.cell_states + index.cell_state(index.state_out(index.nth(0)), 1, mine),
                                 (S - 1) * row_step, ROW_STRIDE * H};
    // A time step may be shorter than the latency of memory, so the inputs of the one after the next are prefetched to
    // L2: 16 units are contiguous, and each of their first threads prefetches one gate of theirs.
    Cursor<const SCALAR> Wx_later{Wx_at.pointer + Wx_at.step + mine.unit % 16 * (H - 1LL), Wx_at.step, Wx_at.pitch};
    const int valid_bits = valid_elements(first_row, B, H);
    auto valid = [&](int k) { return (valid_bits >> k & 1) != 0; };
    auto fetch = [&](long long n) {
        const bool ahead = mine.unit % 16 < G && n + 1 < T;
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            if (!valid(k)) continue;
            const Element e(k, first_row, B, H);
#pragma unroll
            for (int g = 0; g < G; ++g) x[k][g] = Wx_at.of(k)[g * H];
            if (ahead) prefetch_l2(Wx_later.of(k));
            if (n + 1 < T) flag_bits[k] = aux_inputs.bits(index.nth(n + 1), e.b);
            aux_inputs.uniforms_of(aux[k], index.nth(n), e.b, e.hidden);
        }
        Wx_at.advance(), Wx_later.advance();
    };
#pragma unroll
    for (int k = 0; k < ELEMENTS; ++k) {
        const Element e(k, first_row, B, H);
        state[k][0] = e.valid ? to_float(p.h0[index.initial(e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s)
            state[k][s] =
                e.valid ? p.cell_states[index.cell_state(save ? index.state_in(index.nth(0)) : 0, s, e)] : 0.0f;
#pragma unroll
        for (int g = 0; g < G; ++g)
            bias[k][g] = e.valid && p.b_hh != nullptr ? to_float(p.b_hh[g * H + e.hidden]) : 0.0f;
#pragma unroll
        for (int g = 0; g < G; ++g) x[k][g] = from_float<SCALAR>(0.0f);
#if LAYERS > 1
        for (int g = 0; HAS_LOWER_LAYER && g < G; ++g)
            input_bias[k][g] = e.valid && p.b_ih != nullptr ? to_float(p.b_ih[g * H + e.hidden]) : 0.0f;
#endif
        for (int i = 0; i < AUX; ++i) aux[k][i] = 0;
        flag_bits[k] = 0;
        if (e.valid) {
            aux_inputs.of_unit(aux[k], e.b, e.hidden);
            aux_inputs.flags_of(aux[k], aux_inputs.bits(index.nth(0), e.b));
        }
        float h_in = state[k][0];
        Cell::recurrent_input(&h_in, aux[k]);
        if (e.in_tile()) recurrent.stage(0, 0, k, h_in);
    }
    recurrent.send(0);
    if (!HAS_LOWER_LAYER) fetch(0);

    auto load_gates = [&](int k, float Wx[G], float Rh[G]) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
#if LAYERS > 1
            Wx[g] = HAS_LOWER_LAYER ? input.split_k_sum(g, k) + input_bias[k][g] : to_float(x[k][g]);
#else
            Wx[g] = to_float(x[k][g]);
#endif
            Rh[g] = recurrent.split_k_sum(g, k) + bias[k][g];
        }
    };
    for (long long n = 0; n < T; ++n) {
#if LAYERS > 1
        if (HAS_LOWER_LAYER) input.receive_and_multiply(n + 1);  // during the exchange of h
#endif
        recurrent.receive_and_multiply(n);
        float means[ELEMENTS][Levels::MEANS_OR_1];
#pragma unroll
        for (int level = 0; level < Levels::COUNT; ++level) {
            const int first = Levels::means_before(level), last = Levels::means_before(level + 1);
#pragma unroll
            for (int k = 0; k < ELEMENTS; ++k) {
                float Wx[G], Rh[G], values[Levels::MEANS_OR_1];
                if (valid(k)) {
                    load_gates(k, Wx, Rh);
                    Cell::step_level(level, Wx, Rh, state[k], aux[k], means[k], values);
                }
                for (int m = first; m < last; ++m) means[k][m] = valid(k) ? values[m - first] : 0.0f;
            }
            recurrent.unit_reduction.mean(n * Levels::COUNT + level, means, first, last, H);
        }
        float Wx[ELEMENTS][G], Rh[ELEMENTS][G], h_in[ELEMENTS];  // all loads before all stores: several in flight
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const Element e(k, first_row, B, H);
            if (e.in_tile()) load_gates(k, Wx[k], Rh[k]);
        }
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.in_tile()) continue;
            Cell::step(Wx[k], Rh[k], state[k], saved[k], aux[k], means[k]);
            aux_inputs.flags_of(aux[k], flag_bits[k]);
            h_in[k] = state[k][0];
            Cell::recurrent_input(&h_in[k], aux[k]);
        }
        if (WAVEFRONT || n + 1 < T) {
#pragma unroll
            for (int k = 0; k < ELEMENTS; ++k) {
                const Element e(k, first_row, B, H);
                if (e.in_tile()) recurrent.stage(n + 1, 0, k, valid(k) ? h_in[k] : 0.0f);
            }
        }
        if (WAVEFRONT || n + 1 < T) recurrent.send(n + 1);
        if (!HAS_LOWER_LAYER && n + 1 < T) fetch(n + 1);
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {  // after `send`: no block waits for this
            const Element e(k, first_row, B, H);
            if (!valid(k)) continue;
            *y_at.of(k) = from_float<SCALAR>(state[k][0]);
            if (!save) continue;
#pragma unroll
            for (int j = 0; j < K; ++j) saved_at.of(k)[j * H] = from_float<SCALAR>(saved[k][j]);
#pragma unroll
            for (int s = 1; s < S; ++s) cell_states_at.of(k)[(s - 1) * state_stride] = state[k][s];
        }
        y_at.advance(), saved_at.advance(), cell_states_at.advance();
    }
    if (save) return;
    const TimeIndex end{T, in_register(B), in_register(H), S, false};
#pragma unroll
    for (int k = 0; k < ELEMENTS; ++k) {
        const Element e = element_anew(k, first_row, B, H);
        if (!valid(k)) continue;
#pragma unroll
        for (int s = 1; s < S; ++s) p.cell_states[end.cell_state(0, s, e)] = state[k][s];
    }
}

extern "C" __global__ void PERSISTENT_KERNEL
persistent_forward(long long T, int B, int H, int rows,
                   int first_row,  // batch row of the first group: groups that aren't co-resident take several launches
                   int save,       // whether saved and cell_states are written
                   const __grid_constant__ KernelParams params,
                   uint4* exchange) {  // GRID: [groups, 2 or T + 1 rounds and 2 reductions], zeroed; else null
#if DIRECTIONS > 2
    forward<false>(params.of[instance()], exchange, T, B, H, rows, first_row, save);
#else
    if (instance() == 0)  // code of its own for each of two instances: addresses are constants, not registers
        forward<false>(params.of[0], exchange, T, B, H, rows, first_row, save);
    else
        forward<WAVEFRONT>(params.of[WAVEFRONT ? instance() : INSTANCES - 1], exchange, T, B, H, rows, first_row, save);
#endif
}
EXPORT(persistent_forward)

#else

// ---- Backward ------------------------------------------------------------------------------------------------------

struct Params {                // of one instance
    const SCALAR* dy;          // [T, B, H]; null for zero
    float* dh;                 // [B, H] gradient of the last h, overwritten with that of the first
    float* dcell_states;       // [S-1, B, H] of the other states, likewise
    const SCALAR* weights;     // [G, H, H] recurrent
    const SCALAR* y;           // [T, B, H]
    const SCALAR* h0;          // [B, H]
    const float* cell_states;  // [T+1, S-1, B, H]
    const SCALAR* saved;       // [T, B, K, H]
    SCALAR* dWx;               // [T, B, G, H] written
    SCALAR* dRh;               // [T, B, G, H] written; null where it equals dWx
    const SCALAR* dhistory;    // [T, S-1, B, H] gradients of the other states after every time step; null for zero
    float* dunits;             // [TRAINABLE, B, H] added to
    const float* units;        // see AuxInputs
    const unsigned char* flags;
    const unsigned long long* seed;
    const SCALAR* input_weights;  // [G, H, H]; of layers above the first
    long long reverse;
};
struct KernelParams {
    Params of[INSTANCES];
};

// Carries the gradient of a layer's inputs to the layer below. In both layers an element is owned by one thread.
struct LayerGradChannel {
    uint2* words;  // [T][BLOCKS][BATCH_ROWS][BLOCK_UNITS] of the receiving group: value and flag

    DEVICE LayerGradChannel(uint4* exchange, long long T, int taker) {
        const long long groups = gridDim.x / BLOCKS,
                        before = (LAYERS - 1) * batch_tile() + taker;  // the last layer receives nothing
        words = reinterpret_cast<uint2*>(exchange + groups * PersistentBlock::group_words(T)) +
                before * T * BLOCKS * BATCH_ROWS * BLOCK_UNITS;
    }
    DEVICE uint2* of(long long round, const Element& e) const {
        return words + ((round * BLOCKS + blockIdx.x % BLOCKS) * BATCH_ROWS + e.row) * BLOCK_UNITS + e.unit;
    }
    DEVICE static unsigned flag(long long round) { return static_cast<unsigned>(round + 1); }
};

// SENDS_DX: the instance is a layer that sends the gradient of its inputs to the one below.
template <bool SENDS_DX>
DEVICE void backward(const Params& p, uint4* exchange, long long T, int B, int H, int rows, int first_row) {
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K, TRAINABLE = Cell::TRAINABLE;
    DYNAMIC_SHARED(unsigned char, arena);
    PersistentBlock recurrent(arena, exchange, group(), T, B - first_row, p.weights, H);
#if LAYERS > 1
    float* input_partial_sums = reinterpret_cast<float*>(arena + PersistentBlock::BYTES);
    WeightTile input_tile{reinterpret_cast<uint4*>(arena + PersistentBlock::BYTES + PersistentBlock::SUMS_BYTES), {}};
    if (SENDS_DX)
        input_tile.template load<PersistentBlock::SUMS_BYTES>(input_partial_sums, p.input_weights, true, H,
                                                              recurrent.rank, recurrent.warp, recurrent.lane);
    const bool receives_dx = PROFILE_ONLY != PRODUCT && instance() + 1 < LAYERS;
    const LayerGradChannel dx_in(exchange, T, instance()), dx_out(exchange, T, instance() - 1);
    uint2 received_dx[ELEMENTS];
    auto send_dx = [&](long long round) {
        if (!SENDS_DX) return;
        recurrent.multiply_by(round, input_tile, input_partial_sums);
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.valid || PROFILE_ONLY == PRODUCT) continue;
            const float dx = recurrent.add_partial_sums(input_partial_sums, 0, k);
            st_relaxed_gpu(dx_out.of(round, e), make_uint2(__float_as_uint(dx), LayerGradChannel::flag(round)));
        }
    };
#endif

    const TimeIndex index{T, B, H, S, p.reverse != 0};
    float dstate[ELEMENTS][S];  // of the states after the time step; accumulate_incoming_grad completes that of h
    const AuxInputs aux_inputs{p.units, p.flags, p.seed, B, H, rows};
    float state_next[ELEMENTS][S], state_prev[ELEMENTS][S], aux[ELEMENTS][AUX_OR_1],
        sums[ELEMENTS][TRAINABLE > 0 ? TRAINABLE : 1];
    unsigned flag_bits[ELEMENTS];
    SCALAR dy[ELEMENTS], h_prev[ELEMENTS],
        saved[ELEMENTS][K > 0 ? K : 1];  // as stored: a conversion would wait for the load
    const Element mine(0, first_row, B, H);
    const long long latest = index.nth(T - 1);
    const auto state_stride = static_cast<long long>(B) * H,
               row_step = kept(p.reverse != 0 ? state_stride : -state_stride);
    Cursor<const SCALAR> dy_at{p.dy + index.h(latest, mine), row_step, ROW_STRIDE * H};
    Cursor<const SCALAR> y_at{p.y + index.h(latest, mine) + row_step, row_step, ROW_STRIDE * H};
    Cursor<const SCALAR> saved_at{p.saved + index.row(latest, mine, K, 0), K * row_step, ROW_STRIDE * K * H};
    Cursor<const float> cell_states_at{p.cell_states + index.cell_state(index.state_in(latest), 1, mine),
                                       (S - 1) * row_step, ROW_STRIDE * H};
    Cursor<SCALAR> dWx_at{p.dWx + index.row(latest, mine, G, 0), G * row_step, ROW_STRIDE * G * H};
    Cursor<SCALAR> dRh_at{p.dRh + index.row(latest, mine, G, 0), G * row_step, ROW_STRIDE * G * H};
    const int valid_bits = valid_elements(first_row, B, H);
    auto valid = [&](int k) { return (valid_bits >> k & 1) != 0; };
    // Offset of the states before a time step in cell_states, from those after it in dhistory.
    const long long states_before = (p.reverse != 0 ? S - 1 : 0) * state_stride;
    auto fetch = [&](long long n) {  // load the time step's inputs, during the exchange of the one before
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            if (!valid(k)) continue;
            const Element e(k, first_row, B, H);
            if (p.dy != nullptr) dy[k] = *dy_at.of(k);
#if LAYERS > 1
            if (receives_dx) received_dx[k] = ld_relaxed_gpu(dx_in.of(T - 1 - n, e));
#endif
            h_prev[k] = n > 0 ? *y_at.of(k) : p.h0[index.initial(e)];
#pragma unroll
            for (int j = 0; j < K; ++j) saved[k][j] = saved_at.of(k)[j * H];
#pragma unroll
            for (int s = 1; s < S; ++s) state_prev[k][s] = cell_states_at.of(k)[(s - 1) * state_stride];
            flag_bits[k] = aux_inputs.bits(index.nth(n), e.b);
            if (p.dhistory == nullptr) continue;
            const SCALAR* history = p.dhistory + (cell_states_at.of(k) - p.cell_states - states_before);
#pragma unroll
            for (int s = 1; s < S; ++s) dstate[k][s] += to_float(history[(s - 1) * state_stride]);
        }
        dy_at.advance(), y_at.advance(), saved_at.advance(), cell_states_at.advance();
    };
#pragma unroll
    for (int k = 0; k < ELEMENTS; ++k) {
        const Element e(k, first_row, B, H);
        const long long t = index.nth(T - 1);
        dstate[k][0] = e.valid ? p.dh[index.initial(e)] : 0.0f;
        state_next[k][0] = e.valid ? to_float(p.y[index.h(t, e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s) {
            dstate[k][s] = e.valid ? p.dcell_states[index.cell_state(0, s, e)] : 0.0f;
            state_next[k][s] = e.valid ? p.cell_states[index.cell_state(index.state_out(t), s, e)] : 0.0f;
        }
        dy[k] = h_prev[k] = from_float<SCALAR>(0.0f);  // stays so where nothing is loaded
#pragma unroll
        for (int j = 0; j < K; ++j) saved[k][j] = from_float<SCALAR>(0.0f);
#pragma unroll
        for (int s = 1; s < S; ++s) state_prev[k][s] = 0.0f;
        for (int i = 0; i < AUX; ++i) aux[k][i] = 0;
        flag_bits[k] = 0;
        if (e.valid) aux_inputs.of_unit(aux[k], e.b, e.hidden);
        for (int i = 0; i < TRAINABLE; ++i) sums[k][i] = e.valid ? p.dunits[(i * index.B + e.b) * H + e.hidden] : 0.0f;
    }

    for (long long round = 0; round <= T; ++round) {  // the last only completes the gradient of h0
        const long long n = T - 1 - round;
        if (n >= 0) fetch(n);
#if LAYERS > 1
        if (!PersistentBlock::SINGLE_BLOCK && round > 1) send_dx(round - 2);  // during the exchange
#endif
        if (round > 0) recurrent.receive_and_multiply(round - 1);
#if LAYERS > 1
        // before the block stages its next gradients there
        if (PersistentBlock::SINGLE_BLOCK && round > 0) send_dx(round - 1);
#endif
        float dx[ELEMENTS][G], da[ELEMENTS][G], means[ELEMENTS][Levels::MEANS_OR_1];
        auto accumulate_incoming_grad = [&](const Element& e, int k) {
            float partials[TRAINABLE > 0 ? TRAINABLE : 1];
            if (round > 0) {
                float back = recurrent.split_k_sum(0, k);
                if (Cell::RECURRENT_INPUT) {  // the flags are still those of the time step that read this h
                    Cell::recurrent_input_grad(&back, partials, aux[k]);
                    for (int i = 0; i < TRAINABLE; ++i) sums[k][i] += partials[i];
                }
                dstate[k][0] += back;
            }
            if (n < 0) return;
            aux_inputs.flags_of(aux[k], flag_bits[k]);
            if (valid(k)) aux_inputs.uniforms_of(aux[k], index.nth(n), e.b, e.hidden);
#if LAYERS > 1
            if (valid(k) && receives_dx) {
                for (Watchdog watchdog; received_dx[k].y != LayerGradChannel::flag(round); watchdog.turn())
                    received_dx[k] = ld_relaxed_gpu(dx_in.of(round, e));
                dstate[k][0] += __uint_as_float(received_dx[k].x);
            }
#endif
            dstate[k][0] += to_float(dy[k]);
            state_prev[k][0] = to_float(h_prev[k]);
        };
        auto load_saved = [&](int k, float from_step[K > 0 ? K : 1]) {
#pragma unroll
            for (int j = 0; j < K; ++j) from_step[j] = to_float(saved[k][j]);
        };
        if (Levels::COUNT > 0) {
#pragma unroll
            for (int k = 0; k < ELEMENTS; ++k) {
                const Element e(k, first_row, B, H);
                if (e.in_tile()) accumulate_incoming_grad(e, k);
            }
        }
#pragma unroll
        for (int level = 0; level < Levels::COUNT; ++level) {
            if (n < 0) break;
            const int first = Levels::means_before(level), last = Levels::means_before(level + 1);
#pragma unroll
            for (int k = 0; k < ELEMENTS; ++k) {
                const Element e(k, first_row, B, H);
                float from_step[K > 0 ? K : 1], values[Levels::MEANS_OR_1];
                load_saved(k, from_step);
                Cell::grad_level(level, dstate[k], state_next[k], state_prev[k], from_step, aux[k], means[k], values);
                for (int m = first; m < last; ++m) means[k][m] = valid(k) ? values[m - first] : 0.0f;
            }
            recurrent.unit_reduction.mean(round * Levels::COUNT + level, means, first, last, H);
        }
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.in_tile()) continue;
            if (Levels::COUNT == 0) accumulate_incoming_grad(e, k);
            if (n < 0) continue;
            float from_step[K > 0 ? K : 1], dbefore[S], partials[TRAINABLE > 0 ? TRAINABLE : 1];
            load_saved(k, from_step);
            Cell::grad(dstate[k], state_next[k], state_prev[k], from_step, dx[k], da[k], dbefore, partials, aux[k],
                       means[k]);
            for (int i = 0; i < TRAINABLE; ++i) sums[k][i] += partials[i];
#pragma unroll
            for (int s = 0; s < S; ++s) {
                dstate[k][s] = dbefore[s];
                state_next[k][s] = state_prev[k][s];
            }
#pragma unroll
            for (int g = 0; g < G; ++g) recurrent.stage(round, g, k, valid(k) ? da[k][g] : 0.0f);
#pragma unroll
            for (int i = 0; i < Values::COUNT_SEPARATE; ++i)
                recurrent.stage(round, G + i, k, valid(k) ? dx[k][Values::separate_gate(i)] : 0.0f);
        }
        if (n < 0) break;
        recurrent.send(round);
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {  // after `send`: no block waits for this
            const Element e(k, first_row, B, H);
            if (!valid(k)) continue;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                dWx_at.of(k)[g * H] = from_float<SCALAR>(dx[k][g]);
                if (p.dRh != nullptr) dRh_at.of(k)[g * H] = from_float<SCALAR>(da[k][g]);
            }
        }
        dWx_at.advance(), dRh_at.advance();
    }
#if LAYERS > 1
    if (!PersistentBlock::SINGLE_BLOCK) send_dx(T - 1);
#endif
    const TimeIndex end{T, in_register(B), in_register(H), S, false};
#pragma unroll
    for (int k = 0; k < ELEMENTS; ++k) {
        const Element e = element_anew(k, first_row, B, H);
        if (!valid(k)) continue;
        for (int j = 0; j < TRAINABLE; ++j) p.dunits[(j * end.B + e.b) * H + e.hidden] = sums[k][j];
        p.dh[end.initial(e)] = dstate[k][0];
#pragma unroll
        for (int s = 1; s < S; ++s) p.dcell_states[end.cell_state(0, s, e)] = dstate[k][s];
    }
}

extern "C" __global__ void PERSISTENT_KERNEL persistent_backward(
    long long T, int B, int H, int rows,
    int first_row,  // batch row of the first group
    const __grid_constant__ KernelParams params,
    uint4* exchange) {  // GRID: [groups, 2 rounds and 2 reductions], then the LayerGradChannels; zeroed; else null
#if DIRECTIONS > 2
    backward<false>(params.of[instance()], exchange, T, B, H, rows, first_row);
#else
    if (instance() == 0)
        backward<false>(params.of[0], exchange, T, B, H, rows, first_row);
    else
        backward<WAVEFRONT>(params.of[WAVEFRONT ? instance() : INSTANCES - 1], exchange, T, B, H, rows, first_row);
#endif
}
EXPORT(persistent_backward)

#endif
