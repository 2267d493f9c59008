// persistent.cu: a whole sequence in one launch, the recurrent weights held on the chip for all its instants.
//
// At every instant the recurrent layer multiplies one matrix, always the same, with a few columns. Here a group of
// BLOCKS blocks shares that matrix: each block owns U = 16 * UNIT_TILES hidden units, holds the rows that make them,
// in registers first and shared memory then, and keeps their state in registers. What the instant needs from the
// others, the new h of all units, is exchanged at the smallest scale that holds the weights:
//
//     SCOPE 0, block     BLOCKS = 1: a barrier of the block is all it takes
//     SCOPE 1, cluster   through distributed shared memory: 16-byte stores that count their bytes at the receiver's
//                        mbarrier, so that a block waits for data and nothing else (sm_90 and later)
//     SCOPE 2, grid      through L2: 16-byte words of 12 bytes of data and a stamp, the number of the publication. A
//                        word is read until its stamp is the awaited one: data and notice come in one trip, where a
//                        flag behind the data costs a fence and two more
//
// The batch is cut into tiles of NB rows; each tile has a group of its own, and groups never wait for each other. So
// DIRECTIONS sequences, the two of a bidirectional layer, go side by side in one launch: each has arrays and groups of
// its own, which take turns in the grid, and what they compute is bit for bit what a launch for each would. The
// product is mma with the weights as the stationary 16-row operand and the batch on its narrow side, so that one row
// pays for 8, not for 16; where float is to be IEEE's it is fused multiply-adds, and one row pays for 2. It serves both
// directions of time:
//
//     forward     out[g][unit] = sum over units p of R[g][unit][p] h[p]           G row sets, 1 exchanged value a unit
//     backward    out[unit]    = sum over g, p of R[g][p][unit] da[g][p]          1 row set, G exchanged values a unit
//
// so both hold the same number of fragments and are one loop: await, multiply, reduce, the cell's mathematics, publish;
// what only later readers want is stored after that. Warps that share a unit tile split the sum (K_SPLITS); their parts
// meet in shared memory, and there every thread takes its elements (unit, batch row), for which it alone keeps the
// state. Nothing is atomic: two runs are bitwise equal. In the grid the operand may come in pieces, one after the other
// through the same shared memory: backward's is G times as large as forward's.
//
// Where the page takes means over all units of a batch row, the group meets within an instant (unit_reduction.cuh).
//
// Launches can't deadlock each other, on however many streams: a block waits only for blocks of its own group, and
// those are resident with it or none of them is. A block alone waits for nobody. The hardware starts the blocks of a
// cluster together. In the grid the cooperative launch starts all blocks or, until there is room, none. And no two
// launches share what they wait on: mbarriers are the block's own, the exchange is the caller's, for one launch only.
//
// LAYERS of a stack go side by side, too, as a wavefront (SCOPE 2). All but the first hold the rows of their input
// weights as well, and use them while what they wait for is under way.
//
//     forward     layer l is at instant t while the one below is at t + 1 or later. Only the first has its input part
//                 made beforehand. The others have a second Residence, `below`, that receives what the layer below
//                 publishes, words, stamps and all, and multiplies it.
//     backward    layer l is at instant t while the one above is at t - 2 or earlier, and multiplies the gates'
//                 gradients that it has received from its own blocks a second time, for the gradient of its inputs.
//                 That isn't everyone's affair: a block hands it to the block with the same units in the layer below, a
//                 word of 8 bytes for each element, and there the thread that has this element takes it. Only the
//                 inputs of the first layer have theirs from a product after the launch.
//
// Where a block alone has a whole layer, it exchanges nothing for itself: only what goes to the other layer is sent.
// Layers in clusters aren't offered: that would take clusters that are all resident at once, with a second kind of
// exchange between them, and by the planner's constants it would save at most 0.45 us a step, of 1.2 to 2.4 for LSTMs
// of 128 to 512 units.
//
// Nobody is held up by who reads him, and so nothing can deadlock: what goes to another layer has a place of its own
// for every instant, and a block waits for what came before in its own layer and for the one layer that it takes from,
// which never waits for it. All layers are resident, or none. A sequence that is too long for so many places takes
// several launches, one after the other in time; what goes on from one to the next is what goes from call to call, so
// that forward h is rounded to SCALAR there.
//
// Not the obvious: one launch and one product per step (stepwise.cu) reads R from L2 at every step and pays for two
// launches. Limits: H <= U * BLOCKS; SCALAR is __half, __nv_bfloat16, or float, then multiplied as TF32 or IEEE's.
//
// Read before it: persistent_params.cuh, what the launch plan fixes; matmul_tile.cuh; unit_reduction.cuh, means over units; persistent_block.cuh, what
// a block holds and how a group exchanges.

// ---- The elements and their places ----------------------------------------------------------------------------------

// The elements of a thread: which hidden unit and which batch row.
struct Element {
    int unit, row;        // within the block and the group
    long long hidden, b;  // in the layer
    bool real;            // inside H and B; the others compute on zeros, even NaN, store nothing and publish zeros

    DEVICE Element(int k, int first_row, int B, int H) {
        unit = threadIdx.x % U, row = threadIdx.x / U + k * ROWS_APART;
        hidden = blockIdx.x % BLOCKS * U + unit;
        b = first_row + static_cast<long long>(tile()) * NB + row;
        real = held() && hidden < H && b < B;
    }
    DEVICE bool held() const { return WHOLE || row < NB; }
};

// Which of a thread's elements are real, a bit each, in a register: comparing with B and H takes ten instructions.
DEVICE int real_ones(int first_row, int B, int H) {
    int found = 0;
    for (int k = 0; k < OWN; ++k) found |= Element(k, first_row, B, H).real << k;
    return in_register(found);
}

// Where a thread's first element lies in an array over instants, and how far it is to its next ones and to the next
// instant. Going on is an addition; a multiplication of 64 bits takes five instructions, in every gate.
template <class T>
struct Along {
    T* at;
    long long step;
    int pitch;  // to the thread's next element

    DEVICE T* of(int k) const { return at + k * pitch; }
    DEVICE void go() { at += step; }
};

// Where the elements of an instant lie in memory. Boundary t lies between the instants t - 1 and t: going forward an
// instant leads from t to t + 1, in reverse from t + 1 to t.
struct Instants {
    long long T, B, H;
    int states;
    bool reverse;

    DEVICE long long nth(long long n) const { return reverse ? T - 1 - n : n; }
    DEVICE long long before(long long t) const { return reverse ? t + 1 : t; }
    DEVICE long long after(long long t) const { return reverse ? t : t + 1; }
    DEVICE long long initial(const Element& e) const { return e.b * H + e.hidden; }             // in [B, H]
    DEVICE long long h(long long t, const Element& e) const { return t * B * H + initial(e); }  // in [T, B, H]
    DEVICE long long row(long long t, const Element& e, int N, int n) const {                   // in [T, B, N, H]
        return ((t * B + e.b) * N + n) * H + e.hidden;
    }
    DEVICE long long other(long long boundary, int s, const Element& e) const {  // in [boundaries, S-1, B, H]
        return (boundary * (states - 1) + s - 1) * B * H + initial(e);
    }
};

#if !BACKWARD

// ---- Forward -------------------------------------------------------------------------------------------------------

struct Given {             // of one direction or layer
    const SCALAR* xg;      // [T, B, G, H] input part, b_ih included; of no use to layers above the first
    const SCALAR* weights; // [G, H, H] recurrent
    const SCALAR* b_hh;    // [G, H] or null
    const SCALAR* h0;      // [B, H]
    float* others;         // [T+1, S-1, B, H] the other states, the first boundary given, the rest written;
                           // where nothing is saved, [1, S-1, B, H] in place
    SCALAR* saved;         // [T, B, K, H] written; it may be xg where K = G
    SCALAR* y;             // [T, B, H] written
    const float* units;    // see Extra
    const unsigned char* flags;
    const unsigned long long* seed;
    const SCALAR* weights_below;  // [G, H, H] of the input; of layers above the first, and so is
    const SCALAR* b_ih;           // [G, H] or null
    long long reverse;
};
struct Members {
    Given of[MEMBERS];
};

// ABOVE: a layer that takes its input from the one below.
template <bool ABOVE>
DEVICE void forward(const Given& given, uint4* exchange, long long T, int B, int H, int rows, int first_row, int save) {
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
    DYNAMIC_SHARED(unsigned char, arena);
    Residence home(arena, exchange, group(), T, B - first_row, given.weights, H);
#if LAYERS > 1
    const SCALAR* weights_below = ABOVE ? given.weights_below : nullptr;
    Residence below(arena + Residence::BYTES, exchange, group() - ABOVE, T, B - first_row, weights_below, H);
    float bias_below[OWN][G];
    static_assert(!Cell::OPERAND, "what is published is h, which the layer above is to see");
#endif

    const Instants at{T, B, H, S, given.reverse != 0};
    const Extra extra{given.units, given.flags, given.seed, B, H, rows};
    float state[OWN][S], bias[OWN][G], kept[OWN][K > 0 ? K : 1], more[OWN][EXTRA_OR_1];
    unsigned bits[OWN];  // flags of the instant after the coming one
    SCALAR x[OWN][G];  // of the coming instant, fetched while this one's h is under way
    const Element mine(0, first_row, B, H);
    const long long way = given.reverse != 0 ? -1 : 1;
    const auto cells_apart = static_cast<long long>(B) * H;
    Along<const SCALAR> xs{given.xg + at.row(at.nth(0), mine, G, 0), way * G * cells_apart, ROWS_APART * G * H};
    Along<SCALAR> ys{given.y + at.h(at.nth(0), mine), way * cells_apart, ROWS_APART * H};
    Along<SCALAR> kepts{given.saved + at.row(at.nth(0), mine, K, 0), way * K * cells_apart, ROWS_APART * K * H};
    Along<float> boundaries{given.others + at.other(at.after(at.nth(0)), 1, mine), way * (S - 1) * cells_apart, ROWS_APART * H};
    // A time step may be shorter than the way to memory, so what the one after the coming one needs goes to L2 meanwhile:
    // 16 units lie side by side, and each of their first threads asks for one gate of theirs.
    Along<const SCALAR> later{xs.at + xs.step + mine.unit % 16 * (H - 1LL), xs.step, xs.pitch};
    const int reals = real_ones(first_row, B, H);
    auto real = [&](int k) { return (reals >> k & 1) != 0; };
    auto fetch = [&](long long n) {
        const bool ahead = mine.unit % 16 < G && n + 1 < T;
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            if (!real(k)) continue;
            const Element e(k, first_row, B, H);
#pragma unroll
            for (int g = 0; g < G; ++g) x[k][g] = xs.of(k)[g * H];
            if (ahead) prefetch_l2(later.of(k));
            if (n + 1 < T) bits[k] = extra.bits(at.nth(n + 1), e.b);
            extra.uniforms_of(more[k], at.nth(n), e.b, e.hidden);
        }
        xs.go(), later.go();
    };
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        state[k][0] = e.real ? to_float(given.h0[at.initial(e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s)
            state[k][s] = e.real ? given.others[at.other(save ? at.before(at.nth(0)) : 0, s, e)] : 0.0f;
#pragma unroll
        for (int g = 0; g < G; ++g)
            bias[k][g] = e.real && given.b_hh != nullptr ? to_float(given.b_hh[g * H + e.hidden]) : 0.0f;
#pragma unroll
        for (int g = 0; g < G; ++g) x[k][g] = from_float<SCALAR>(0.0f);
#if LAYERS > 1
        for (int g = 0; ABOVE && g < G; ++g)
            bias_below[k][g] = e.real && given.b_ih != nullptr ? to_float(given.b_ih[g * H + e.hidden]) : 0.0f;
#endif
        for (int i = 0; i < EXTRA; ++i) more[k][i] = 0;
        bits[k] = 0;
        if (e.real) {
            extra.of_unit(more[k], e.b, e.hidden);
            extra.flags_of(more[k], extra.bits(at.nth(0), e.b));
        }
        float seen = state[k][0];
        Cell::operand(&seen, more[k]);
        if (e.held()) home.put(0, 0, e.row, e.unit, seen);
    }
    home.publish(0);
    if (!ABOVE) fetch(0);

    auto take = [&](const Element& e, int k, float in[G], float recurrent[G]) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
#if LAYERS > 1
            in[g] = ABOVE ? below.sum(g, e.row, e.unit) + bias_below[k][g] : to_float(x[k][g]);
#else
            in[g] = to_float(x[k][g]);
#endif
            recurrent[g] = home.sum(g, e.row, e.unit) + bias[k][g];
        }
    };
    for (long long n = 0; n < T; ++n) {
#if LAYERS > 1
        if (ABOVE) below.multiply_all(n + 1);  // while h is under way
#endif
        home.multiply_all(n);
        float means[OWN][Levels::MEANS_OR_1];
#pragma unroll
        for (int level = 0; level < Levels::COUNT; ++level) {
            const int first = Levels::before(level), last = Levels::before(level + 1);
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                const Element e(k, first_row, B, H);
                float in[G], recurrent[G], values[Levels::MEANS_OR_1];
                if (real(k)) {
                    take(e, k, in, recurrent);
                    Cell::step_level(level, in, recurrent, state[k], more[k], means[k], values);
                }
                for (int m = first; m < last; ++m) means[k][m] = real(k) ? values[m - first] : 0.0f;
            }
            home.meeting.take(n * Levels::COUNT + level, means, first, last, H);
        }
        float in[OWN][G], recurrent[OWN][G], seen[OWN];  // all are read before anything is written: several at a time
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (e.held()) take(e, k, in[k], recurrent[k]);
        }
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.held()) continue;
            Cell::step(in[k], recurrent[k], state[k], kept[k], more[k], means[k]);
            extra.flags_of(more[k], bits[k]);
            seen[k] = state[k][0];
            Cell::operand(&seen[k], more[k]);
        }
        if (STACK || n + 1 < T) {
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                const Element e(k, first_row, B, H);
                if (e.held()) home.put(n + 1, 0, e.row, e.unit, real(k) ? seen[k] : 0.0f);
            }
        }
        if (STACK || n + 1 < T) home.publish(n + 1);
        if (!ABOVE && n + 1 < T) fetch(n + 1);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {  // the others don't wait for this
            const Element e(k, first_row, B, H);
            if (!real(k)) continue;
            *ys.of(k) = from_float<SCALAR>(state[k][0]);
            if (!save) continue;
#pragma unroll
            for (int j = 0; j < K; ++j) kepts.of(k)[j * H] = from_float<SCALAR>(kept[k][j]);
#pragma unroll
            for (int s = 1; s < S; ++s) boundaries.of(k)[(s - 1) * cells_apart] = state[k][s];
        }
        ys.go(), kepts.go(), boundaries.go();
    }
    if (save) return;
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        if (!e.real) continue;
#pragma unroll
        for (int s = 1; s < S; ++s) given.others[at.other(0, s, e)] = state[k][s];
    }
}

extern "C" __global__ void RESIDENT_KERNEL resident_forward(
    long long T, int B, int H, int rows,
    int first_row,    // batch row of the first group: what isn't resident at once takes several launches
    int save,         // whether saved and others are kept
    const __grid_constant__ Members members,
    uint4* exchange) {  // GRID: [groups, 2 or T + 1 publications and two meetings], zero; else null
    if (member() == 0)  // both directions have code of their own, in which addresses are constants and no registers
        forward<false>(members.of[0], exchange, T, B, H, rows, first_row, save);
    else
        forward<STACK>(members.of[STACK ? member() : MEMBERS - 1], exchange, T, B, H, rows, first_row, save);
}
EXPORT(resident_forward)

#else

// ---- Backward ------------------------------------------------------------------------------------------------------

struct Given {               // of one direction or layer
    const SCALAR* dy;        // [T, B, H]; null for zero
    float* dh;               // [B, H] gradient of the last h, overwritten with that of the first
    float* dothers;          // [S-1, B, H] the same for the other states
    const SCALAR* weights;   // [G, H, H] recurrent
    const SCALAR* y;         // [T, B, H]
    const SCALAR* h0;        // [B, H]
    const float* others;     // [T+1, S-1, B, H]
    const SCALAR* saved;     // [T, B, K, H]
    SCALAR* dxg;             // [T, B, G, H] written
    SCALAR* dhg;             // [T, B, G, H] written; null where a cell's two parts have one gradient
    const SCALAR* dhistory;  // [T, S-1, B, H] gradients of the other states after every instant; null for zero
    float* dunits;           // [LEARNED, B, H] added to
    const float* units;      // see Extra
    const unsigned char* flags;
    const unsigned long long* seed;
    const SCALAR* weights_below;  // [G, H, H] of the input; of layers above the first
    long long reverse;
};
struct Members {
    Given of[MEMBERS];
};

// The gradients of a layer's inputs on their way to the layer below. Each element is one thread's own in either layer.
struct Handed {
    uint2* words;  // [T][BLOCKS][NB][U] of the group that takes them: the number and its stamp

    DEVICE Handed(uint4* exchange, long long T, int taker) {
        const long long groups = gridDim.x / BLOCKS, before = (LAYERS - 1) * tile() + taker;  // the last takes nothing
        words = reinterpret_cast<uint2*>(exchange + groups * Residence::group_words(T)) + before * T * BLOCKS * NB * U;
    }
    DEVICE uint2* of(long long turn, const Element& e) const {
        return words + ((turn * BLOCKS + blockIdx.x % BLOCKS) * NB + e.row) * U + e.unit;
    }
    DEVICE static unsigned stamp(long long turn) { return static_cast<unsigned>(turn + 1); }
};

// HANDS: a layer that gives the gradient of its inputs to the one below.
template <bool HANDS>
DEVICE void backward(const Given& given, uint4* exchange, long long T, int B, int H, int rows, int first_row) {
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K, LEARNED = Cell::LEARNED;
    DYNAMIC_SHARED(unsigned char, arena);
    Residence home(arena, exchange, group(), T, B - first_row, given.weights, H);
#if LAYERS > 1
    float* parts_below = reinterpret_cast<float*>(arena + Residence::BYTES);
    Rows below{reinterpret_cast<uint4*>(arena + Residence::BYTES + Residence::PARTS), {}};
    if (HANDS) below.template load<Residence::PARTS>(
        parts_below, given.weights_below, true, H, home.rank, home.warp, home.lane);
    const bool takes = ONLY != PRODUCT && member() + 1 < LAYERS;
    const Handed from_above(exchange, T, member()), to_below(exchange, T, member() - 1);
    uint2 handed[OWN];
    auto hand_down = [&](long long turn) {
        if (!HANDS) return;
        home.multiply_again(turn, below, parts_below);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.real || ONLY == PRODUCT) continue;
            const float dx = Residence::sum_of(parts_below, 0, e.row, e.unit);
            st_relaxed_gpu(to_below.of(turn, e), make_uint2(__float_as_uint(dx), Handed::stamp(turn)));
        }
    };
#endif

    const Instants at{T, B, H, S, given.reverse != 0};
    float asked[OWN][S];  // gradient of the states after the instant; of h without what y and the weights ask
    const Extra extra{given.units, given.flags, given.seed, B, H, rows};
    float after[OWN][S], before[OWN][S], more[OWN][EXTRA_OR_1], sums[OWN][LEARNED > 0 ? LEARNED : 1];
    unsigned bits[OWN];
    SCALAR shown[OWN], earlier[OWN], kept[OWN][K > 0 ? K : 1];  // as stored: a conversion would wait for them
    const Element mine(0, first_row, B, H);
    const long long latest = at.nth(T - 1), way = given.reverse != 0 ? 1 : -1;
    const auto cells_apart = static_cast<long long>(B) * H;
    Along<const SCALAR> dys{given.dy + at.h(latest, mine), way * cells_apart, ROWS_APART * H};
    Along<const SCALAR> ys{given.y + at.h(latest, mine) + way * cells_apart, way * cells_apart, ROWS_APART * H};
    Along<const SCALAR> kepts{given.saved + at.row(latest, mine, K, 0), way * K * cells_apart, ROWS_APART * K * H};
    Along<const float> cells{
        given.others + at.other(at.before(latest), 1, mine), way * (S - 1) * cells_apart, ROWS_APART * H};
    Along<SCALAR> dxgs{given.dxg + at.row(latest, mine, G, 0), way * G * cells_apart, ROWS_APART * G * H};
    Along<SCALAR> dhgs{given.dhg + at.row(latest, mine, G, 0), way * G * cells_apart, ROWS_APART * G * H};
    const int reals = real_ones(first_row, B, H);
    auto real = [&](int k) { return (reals >> k & 1) != 0; };
    // How much further the states before a time step lie in `others` than those after it in a history of as many steps.
    const long long states_before = (given.reverse != 0 ? S - 1 : 0) * cells_apart;
    auto fetch = [&](long long n) {  // what the instant needs from memory, while the others' gradients are under way
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            if (!real(k)) continue;
            const Element e(k, first_row, B, H);
            if (given.dy != nullptr) shown[k] = *dys.of(k);
#if LAYERS > 1
            if (takes) handed[k] = ld_relaxed_gpu(from_above.of(T - 1 - n, e));
#endif
            earlier[k] = n > 0 ? *ys.of(k) : given.h0[at.initial(e)];
#pragma unroll
            for (int j = 0; j < K; ++j) kept[k][j] = kepts.of(k)[j * H];
#pragma unroll
            for (int s = 1; s < S; ++s) before[k][s] = cells.of(k)[(s - 1) * cells_apart];
            bits[k] = extra.bits(at.nth(n), e.b);
            if (given.dhistory == nullptr) continue;
            const SCALAR* history = given.dhistory + (cells.of(k) - given.others - states_before);
#pragma unroll
            for (int s = 1; s < S; ++s) asked[k][s] += to_float(history[(s - 1) * cells_apart]);
        }
        dys.go(), ys.go(), kepts.go(), cells.go();
    };
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        const long long t = at.nth(T - 1);
        asked[k][0] = e.real ? given.dh[at.initial(e)] : 0.0f;
        after[k][0] = e.real ? to_float(given.y[at.h(t, e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s) {
            asked[k][s] = e.real ? given.dothers[at.other(0, s, e)] : 0.0f;
            after[k][s] = e.real ? given.others[at.other(at.after(t), s, e)] : 0.0f;
        }
        shown[k] = earlier[k] = from_float<SCALAR>(0.0f);  // and where nothing is fetched they stay so
#pragma unroll
        for (int j = 0; j < K; ++j) kept[k][j] = from_float<SCALAR>(0.0f);
#pragma unroll
        for (int s = 1; s < S; ++s) before[k][s] = 0.0f;
        for (int i = 0; i < EXTRA; ++i) more[k][i] = 0;
        bits[k] = 0;
        if (e.real) extra.of_unit(more[k], e.b, e.hidden);
        for (int i = 0; i < LEARNED; ++i) sums[k][i] = e.real ? given.dunits[(i * at.B + e.b) * H + e.hidden] : 0.0f;
    }

    for (long long turn = 0; turn <= T; ++turn) {  // the last one only finishes the gradient of h0
        const long long n = T - 1 - turn;
        if (n >= 0) fetch(n);
#if LAYERS > 1
        if (!Residence::ALONE && turn > 1) hand_down(turn - 2);  // while the gradients before are under way
#endif
        if (turn > 0) home.multiply_all(turn - 1);
#if LAYERS > 1
        if (Residence::ALONE && turn > 0) hand_down(turn - 1);  // before the block's own are in their place
#endif
        float dx[OWN][G], da[OWN][G], means[OWN][Levels::MEANS_OR_1];
        auto arrive = [&](const Element& e, int k) {
            float parts[LEARNED > 0 ? LEARNED : 1];
            if (turn > 0) {
                float back = home.sum(0, e.row, e.unit);
                if (Cell::OPERAND) {  // the flags are still those of the instant that saw this h
                    Cell::operand_grad(&back, parts, more[k]);
                    for (int i = 0; i < LEARNED; ++i) sums[k][i] += parts[i];
                }
                asked[k][0] += back;
            }
            if (n < 0) return;
            extra.flags_of(more[k], bits[k]);
            if (real(k)) extra.uniforms_of(more[k], at.nth(n), e.b, e.hidden);
#if LAYERS > 1
            if (real(k) && takes) {
                for (Watchdog watchdog; handed[k].y != Handed::stamp(turn); watchdog.turn())
                    handed[k] = ld_relaxed_gpu(from_above.of(turn, e));
                asked[k][0] += __uint_as_float(handed[k].x);
            }
#endif
            asked[k][0] += to_float(shown[k]);
            before[k][0] = to_float(earlier[k]);
        };
        auto take = [&](int k, float from_step[K > 0 ? K : 1]) {
#pragma unroll
            for (int j = 0; j < K; ++j) from_step[j] = to_float(kept[k][j]);
        };
        if (Levels::COUNT > 0) {
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                const Element e(k, first_row, B, H);
                if (e.held()) arrive(e, k);
            }
        }
#pragma unroll
        for (int level = 0; level < Levels::COUNT; ++level) {
            if (n < 0) break;
            const int first = Levels::before(level), last = Levels::before(level + 1);
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                const Element e(k, first_row, B, H);
                float from_step[K > 0 ? K : 1], values[Levels::MEANS_OR_1];
                take(k, from_step);
                Cell::grad_level(level, asked[k], after[k], before[k], from_step, more[k], means[k], values);
                for (int m = first; m < last; ++m) means[k][m] = real(k) ? values[m - first] : 0.0f;
            }
            home.meeting.take(turn * Levels::COUNT + level, means, first, last, H);
        }
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (!e.held()) continue;
            if (Levels::COUNT == 0) arrive(e, k);
            if (n < 0) continue;
            float from_step[K > 0 ? K : 1], dbefore[S], parts[LEARNED > 0 ? LEARNED : 1];
            take(k, from_step);
            Cell::grad(asked[k], after[k], before[k], from_step, dx[k], da[k], dbefore, parts, more[k], means[k]);
            for (int i = 0; i < LEARNED; ++i) sums[k][i] += parts[i];
#pragma unroll
            for (int s = 0; s < S; ++s) {
                asked[k][s] = dbefore[s];
                after[k][s] = before[k][s];
            }
#pragma unroll
            for (int g = 0; g < G; ++g) home.put(turn, g, e.row, e.unit, real(k) ? da[k][g] : 0.0f);
#pragma unroll
            for (int n = 0; n < Values::COUNT_APART; ++n)
                home.put(turn, G + n, e.row, e.unit, real(k) ? dx[k][Values::apart(n)] : 0.0f);
        }
        if (n < 0) break;
        home.publish(turn);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {  // the others don't wait for this
            const Element e(k, first_row, B, H);
            if (!real(k)) continue;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                dxgs.of(k)[g * H] = from_float<SCALAR>(dx[k][g]);
                if (given.dhg != nullptr) dhgs.of(k)[g * H] = from_float<SCALAR>(da[k][g]);
            }
        }
        dxgs.go(), dhgs.go();
    }
#if LAYERS > 1
    if (!Residence::ALONE) hand_down(T - 1);
#endif
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        if (!e.real) continue;
        for (int j = 0; j < LEARNED; ++j) given.dunits[(j * at.B + e.b) * H + e.hidden] = sums[k][j];
        given.dh[at.initial(e)] = asked[k][0];
#pragma unroll
        for (int s = 1; s < S; ++s) given.dothers[at.other(0, s, e)] = asked[k][s];
    }
}

extern "C" __global__ void RESIDENT_KERNEL resident_backward(
    long long T, int B, int H, int rows,
    int first_row,  // batch row of the first group
    const __grid_constant__ Members members,
    uint4* exchange) {  // GRID: [groups, two publications and two meetings], then what layers hand down; zero; else null
    if (member() == 0)
        backward<false>(members.of[0], exchange, T, B, H, rows, first_row);
    else
        backward<STACK>(members.of[STACK ? member() : MEMBERS - 1], exchange, T, B, H, rows, first_row);
}
EXPORT(resident_backward)

#endif
