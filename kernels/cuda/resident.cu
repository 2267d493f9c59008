// resident.cu: a whole sequence in one launch, the recurrent weights held on the chip for all its instants.
//
// At every instant the recurrent layer multiplies one matrix, always the same, with a few columns. Here a group of
// BLOCKS blocks shares that matrix: each block owns U = 16 * UNIT_TILES hidden units, holds the rows that make them,
// in registers first and shared memory then, and keeps their state in registers. What the instant needs from the
// others, the new h of all units, is exchanged at the smallest scale that holds the weights:
//
//     SCOPE 0, block     BLOCKS = 1: a barrier of the block is all it takes
//     SCOPE 1, cluster   through distributed shared memory: 16-byte stores that count their bytes at the receiver's
//                        mbarrier, so that a block waits for data and nothing else (sm_90 and later)
//     SCOPE 2, grid      through L2: a slice, then a flag with release; every block of the group must be resident,
//                        which the cooperative launch guarantees
//
// The batch is cut into tiles of NB = 8 * BATCH_TILES rows; each tile has a group of its own, and groups never wait
// for each other. The product is mma with the weights as the stationary 16-row operand and the batch on its narrow
// side, so that one row pays for 8, not for 16. It serves both directions of time:
//
//     forward     out[g][unit] = sum over units p of R[g][unit][p] h[p]           G row sets, 1 exchanged value a unit
//     backward    out[unit]    = sum over g, p of R[g][p][unit] da[g][p]          1 row set, G exchanged values a unit
//
// so both hold the same number of fragments and are one loop: await, multiply, reduce, the cell's mathematics, publish.
// Warps that share a unit tile split the sum (K_SPLITS); their parts meet in shared memory, and there every thread
// takes its elements (unit, batch row), for which it alone keeps the state. Nothing is atomic: two runs are bitwise equal.
//
// Not the obvious: one launch and one product per step (stepwise.cu) reads R from L2 at every step and pays for two
// launches. Limits: H <= U * BLOCKS; SCALAR is __half, __nv_bfloat16, or float, then multiplied as TF32.
//
// Compiled with -D: SCALAR SCOPE BLOCKS UNIT_TILES K_SPLITS K_REGISTERS K_SHARED BATCH_TILES SHARED_FORWARD
// SHARED_BACKWARD, all from the launch plan; a warp's k tiles are K_REGISTERS + K_SHARED (backward G times as many).

#define BLOCK 0
#define CLUSTER 1
#define GRID 2

constexpr int WARPS = UNIT_TILES * K_SPLITS;
constexpr int THREADS = 32 * WARPS;
constexpr int U = 16 * UNIT_TILES;    // hidden units of a block
constexpr int NB = 8 * BATCH_TILES;   // batch rows of a group
constexpr int OWN = (U * NB + THREADS - 1) / THREADS;  // elements of a thread
constexpr int PITCH = U + 4;          // of a row of partial sums: the four lanes of a column hit different banks
constexpr int K_STEP = 32 / sizeof(SCALAR);            // k tile: 16 halves or 8 floats, 32 bytes either way

#if SCOPE == CLUSTER && !GPU_RNN_ON_HOST
#define RESIDENT_KERNEL __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define RESIDENT_KERNEL __launch_bounds__(THREADS, 1)
#endif

// ---- The operands of mma, by storage type -------------------------------------------------------------------------

DEVICE __half encoded(float x, __half) { return from_float<__half>(x); }
DEVICE __nv_bfloat16 encoded(float x, __nv_bfloat16) { return from_float<__nv_bfloat16>(x); }
DEVICE float encoded(float x, float) { return __uint_as_float(to_tf32(x)); }

DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __half) {
    mma_m16n8k16_f16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __nv_bfloat16) {
    mma_m16n8k16_bf16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], float) {
    mma_m16n8k8_tf32(sums, a, b, sums);
}

// One lane's part of the 16 x K_STEP fragment whose corner is (0, 0) of `element(row, k)`.
template <class Element>
DEVICE void fragment(unsigned a[4], Element element, int lane, __half) {
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[i] = pack_f16(element(row, k), element(row, k + 1));
    }
}
template <class Element>
DEVICE void fragment(unsigned a[4], Element element, int lane, __nv_bfloat16) {
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[i] = pack_bf16(element(row, k), element(row, k + 1));
    }
}
template <class Element>
DEVICE void fragment(unsigned a[4], Element element, int lane, float) {
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(element(lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4));
}

// ---- What a block holds, and how it exchanges ----------------------------------------------------------------------

// ROWS row sets, VALUES exchanged values a unit, and of each warp's k tiles IN_REGISTERS and IN_SHARED.
template <int ROWS, int VALUES, int IN_REGISTERS, int IN_SHARED>
struct Residence {
    static constexpr int TILES = IN_REGISTERS + IN_SHARED;
    static constexpr int SLICE = VALUES * U * sizeof(SCALAR);            // bytes a block publishes per batch row
    static constexpr int WIDTH = K_SPLITS * TILES * 32;                  // bytes of an operand row that are multiplied
    static constexpr int ROW = WIDTH + 16;                               // its pitch: ldmatrix without bank conflicts
    static constexpr int OPERAND = NB * ROW;
    static constexpr int PARTS = K_SPLITS * ROWS * NB * PITCH * 4;
    static constexpr int WEIGHTS = WARPS * ROWS * IN_SHARED * 512;
    static constexpr int OPERANDS = SCOPE == CLUSTER ? 2 : 1;            // peers of a cluster store ahead of the reader
    static constexpr int BYTES = OPERANDS * OPERAND + PARTS + WEIGHTS + 16;
    static constexpr int CHAINS = ROWS * BATCH_TILES >= 4 ? 1 : 4;       // independent sums, to hide mma's latency
    static_assert(BLOCKS * SLICE <= WIDTH, "the warps' k tiles cover what all blocks publish");

    unsigned char* operand;  // [OPERANDS][NB][ROW]: the one multiplied, and in a cluster the one being received
    float* parts;            // [K_SPLITS][ROWS][NB][PITCH]
    uint4* weights;          // [WARPS][ROWS][IN_SHARED][32]
    unsigned held[ROWS][IN_REGISTERS > 0 ? IN_REGISTERS : 1][4];
    int warp, lane, rank;
#if SCOPE == CLUSTER
    Mbarrier* received;      // [2], one for each operand
#elif SCOPE == GRID
    unsigned char* exchange; // of this group: two of [NB][BLOCKS * SLICE]
    unsigned* flags;         // of this group: [BLOCKS], how often each block has published
#endif

    DEVICE Residence(unsigned char* arena, unsigned char* exchanges, unsigned* all_flags)
        : operand(arena),
          parts(reinterpret_cast<float*>(arena + OPERANDS * OPERAND)),
          weights(reinterpret_cast<uint4*>(arena + OPERANDS * OPERAND + PARTS)),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          rank(blockIdx.x % BLOCKS) {
        for (int i = threadIdx.x; i < OPERANDS * OPERAND / 16; i += THREADS)
            reinterpret_cast<uint4*>(operand)[i] = make_uint4(0, 0, 0, 0);  // what nobody publishes stays zero
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(arena + OPERANDS * OPERAND + PARTS + WEIGHTS);
        if (threadIdx.x == 0) {
            mbarrier_init(&received[0], 1);
            mbarrier_init(&received[1], 1);
            fence_mbarrier_init();
        }
        cluster_sync();  // barriers are ready and operands zero before a peer stores
#else
        __syncthreads();  // operands are zero before anyone fills them
#endif
#if SCOPE == GRID
        exchange = exchanges + static_cast<long long>(blockIdx.x / BLOCKS) * 2 * NB * BLOCKS * SLICE;
        flags = all_flags + blockIdx.x / BLOCKS * BLOCKS;
#endif
    }

    // Take this warp's fragments, as resident_pack laid them out.
    DEVICE void load(const uint4* packed) {
        packed += (static_cast<long long>(rank) * WARPS + warp) * ROWS * TILES * 32 + lane;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int j = 0; j < IN_REGISTERS; ++j) {
                const uint4 a = packed[(r * TILES + j) * 32];
                held[r][j][0] = a.x, held[r][j][1] = a.y, held[r][j][2] = a.z, held[r][j][3] = a.w;
            }
            for (int j = 0; j < IN_SHARED; ++j)  // read back by this very lane
                weights[((warp * ROWS + r) * IN_SHARED + j) * 32 + lane] = packed[(r * TILES + IN_REGISTERS + j) * 32];
        }
    }

    // Multiply with operand `which`; the sums are then in `parts`, one for each K split, for `sum` to add.
    DEVICE void multiply_all(int which) {
        float sums[CHAINS][ROWS][BATCH_TILES][4] = {};
        const unsigned char* tile = operand + which % OPERANDS * OPERAND + lane % 8 * ROW + warp % K_SPLITS * TILES * 32;
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            unsigned b[BATCH_TILES][4];  // the columns of two k tiles
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
                const unsigned char* rows = tile + n * 8 * ROW + j * 32;
                if (j + 1 < TILES)
                    ldmatrix_x4(b[n], rows + lane / 8 * 16);
                else
                    ldmatrix_x2(b[n], rows + lane / 8 % 2 * 16);
            }
#pragma unroll
            for (int next = 0; next < 2 && j + next < TILES; ++next) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    unsigned a[4];
                    take(a, r, j + next);
#pragma unroll
                    for (int n = 0; n < BATCH_TILES; ++n)
                        multiply(sums[(j + next) % CHAINS][r][n], a, &b[n][2 * next], SCALAR());
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float sum = sums[0][r][n][i];
                    for (int chain = 1; chain < CHAINS; ++chain) sum += sums[chain][r][n][i];
                    const int unit = warp / K_SPLITS * 16 + lane / 4 + i / 2 * 8, row = n * 8 + lane % 4 * 2 + i % 2;
                    parts[((warp % K_SPLITS * ROWS + r) * NB + row) * PITCH + unit] = sum;
                }
            }
        }
        __syncthreads();  // all parts are there
    }

    DEVICE void take(unsigned a[4], int r, int j) const {
        if (j < IN_REGISTERS) {
            for (int i = 0; i < 4; ++i) a[i] = held[r][j < IN_REGISTERS ? j : 0][i];
        } else {
            const uint4 w = weights[((warp * ROWS + r) * IN_SHARED + j - IN_REGISTERS) * 32 + lane];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        }
    }

    DEVICE float sum(int r, int row, int unit) const {
        float total = 0;
#pragma unroll
        for (int split = 0; split < K_SPLITS; ++split) total += parts[((split * ROWS + r) * NB + row) * PITCH + unit];
        return total;
    }

    // This thread's value for everyone, in the operand that is multiplied next.
    DEVICE void put(int which, int value, int row, int unit, float x) {
        SCALAR* slice = reinterpret_cast<SCALAR*>(operand + which % OPERANDS * OPERAND + row * ROW + rank * SLICE);
        slice[value * U + unit] = encoded(x, SCALAR());
    }

    // All threads have put: give the block's slice to the others. `published` counts the calls before this one.
    DEVICE void publish(int which, long long published) {
        __syncthreads();  // the slice is complete, and the parts have been read
#if SCOPE == CLUSTER
        if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[which], (BLOCKS - 1) * NB * SLICE);
        for (int i = threadIdx.x; i < (BLOCKS - 1) * NB * (SLICE / 16); i += THREADS) {
            const int peer = i / (NB * (SLICE / 16)), at = i % (NB * (SLICE / 16));
            uint4* mine = reinterpret_cast<uint4*>(operand + which % OPERANDS * OPERAND + at / (SLICE / 16) * ROW + rank * SLICE);
            mine += at % (SLICE / 16);
            st_async(mine, *mine, &received[which], (rank + 1 + peer) % BLOCKS);  // not all at one peer at a time
        }
#elif SCOPE == GRID
        for (int i = threadIdx.x; i < NB * (SLICE / 16); i += THREADS) {
            const int row = i / (SLICE / 16), at = i % (SLICE / 16) * 16 + rank * SLICE;
            *reinterpret_cast<uint4*>(exchange + (which * NB + row) * BLOCKS * SLICE + at) =
                *reinterpret_cast<const uint4*>(operand + which % OPERANDS * OPERAND + row * ROW + at);
        }
        __syncthreads();  // the whole slice is written before one thread says so
        if (threadIdx.x == 0) st_release_gpu(&flags[rank], static_cast<unsigned>(published + 1));
#endif
    }

    // Wait until operand `which` is complete. `published` as when it was published.
    DEVICE void await(int which, long long published) {
#if SCOPE == CLUSTER
        mbarrier_wait_cluster(&received[which], published / 2 % 2);
#elif SCOPE == GRID
        for (int peer = threadIdx.x; peer < BLOCKS; peer += THREADS) {
            while (static_cast<int>(ld_acquire_gpu(&flags[peer]) - static_cast<unsigned>(published + 1)) < 0) {
            }
        }
        __syncthreads();  // every peer has published
        for (int i = threadIdx.x; i < NB * BLOCKS * (SLICE / 16); i += THREADS) {
            const int row = i / (BLOCKS * (SLICE / 16)), at = i % (BLOCKS * (SLICE / 16)) * 16;
            if (at / SLICE != rank)
                cp_async_16(operand + which % OPERANDS * OPERAND + row * ROW + at,
                            exchange + (which * NB + row) * BLOCKS * SLICE + at);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // every thread's copies have landed
#endif
    }
};

// The elements of a thread: which hidden unit and which batch row.
struct Element {
    int unit, row;        // within the block and the group
    long long hidden, b;  // in the layer
    bool real;            // inside H and B; the others compute on zeros and store nothing

    DEVICE Element(int k, int first_row, int B, int H) {
        const int at = threadIdx.x + k * THREADS;
        unit = at % U, row = at / U;
        hidden = blockIdx.x % BLOCKS * U + unit;
        b = first_row + static_cast<long long>(blockIdx.x / BLOCKS) * NB + row;
        real = row < NB && hidden < H && b < B;
    }
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

// ---- The weights, in the order in which the lanes hold them ---------------------------------------------------------

// packed[rank][warp][row set][k tile][lane]: one lane's part of an mma fragment, for either direction of time. A launch
// of its own: the weights are read once, all loads of the resident kernels are 16 bytes and coalesced.
template <int ROWS, int VALUES, int TILES, class Weight>
DEVICE void pack(uint4* packed, int H, Weight weight) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= BLOCKS * WARPS * ROWS * TILES * 32) return;
    const int lane = index % 32, j = index / 32 % TILES, r = index / 32 / TILES % ROWS;
    const int warp = index / 32 / TILES / ROWS % WARPS, rank = index / 32 / TILES / ROWS / WARPS;
    const int unit0 = rank * U + warp / K_SPLITS * 16, column0 = (warp % K_SPLITS * TILES + j) * K_STEP;
    unsigned a[4];
    auto element = [&](int row, int k) {  // operand columns run over blocks, values, units of the block
        const int column = column0 + k, within = column % (VALUES * U);
        const int from = column / (VALUES * U) * U + within % U;
        return unit0 + row < H && from < H ? weight(r, unit0 + row, within / U, from) : 0.0f;
    };
    fragment(a, element, lane, SCALAR());
    packed[index] = make_uint4(a[0], a[1], a[2], a[3]);
}

extern "C" __global__ void __launch_bounds__(128) resident_pack(
    const SCALAR* R,  // [G, H, H]
    uint4* packed,    // [BLOCKS, WARPS, row sets, k tiles, 32] written
    int H,
    int backward) {
    constexpr int G = Cell::G, TILES = K_REGISTERS + K_SHARED;
    if (backward)
        pack<1, G, G * TILES>(packed, H, [&](int, int unit, int g, int from) {
            return to_float(R[(static_cast<long long>(g) * H + from) * H + unit]);
        });
    else
        pack<G, 1, TILES>(packed, H, [&](int g, int unit, int, int from) {
            return to_float(R[(static_cast<long long>(g) * H + unit) * H + from]);
        });
}
EXPORT(resident_pack)

// ---- Forward -------------------------------------------------------------------------------------------------------

extern "C" __global__ void RESIDENT_KERNEL resident_forward(
    const SCALAR* xg,         // [T, B, G, H] input part, b_ih included
    const uint4* weights,     // from resident_pack
    const SCALAR* b_hh,       // [G, H] or null
    const SCALAR* h0,         // [B, H]
    float* others,            // [T+1, S-1, B, H] the other states, the first boundary given, the rest written;
                              // where nothing is saved, [1, S-1, B, H] in place
    SCALAR* saved,            // [T, B, K, H] written; it may be xg where K = G
    SCALAR* y,                // [T, B, H] written
    unsigned char* exchange,  // GRID: [groups, 2, NB, BLOCKS * U] SCALARs of scratch; else null
    unsigned* flags,          // GRID: [groups, BLOCKS], zero; else null
    long long T, int B, int H, int reverse,
    int save,                 // whether saved and others are kept
    int first_row) {          // batch row of the first group: what isn't resident at once takes several launches
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
    using Home = Residence<G, 1, K_REGISTERS, K_SHARED>;
    static_assert(Home::BYTES == SHARED_FORWARD, "the launch plan asks for this much shared memory");
    DYNAMIC_SHARED(unsigned char, arena);
    Home home(arena, exchange, flags);
    home.load(weights);

    const Instants at{T, B, H, S, reverse != 0};
    float state[OWN][S], bias[OWN][G];
    SCALAR x[OWN][G];  // of the coming instant, fetched while this one's h is under way
    auto fetch = [&](long long t) {
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
#pragma unroll
            for (int g = 0; g < G; ++g) x[k][g] = e.real ? xg[at.row(t, e, G, g)] : from_float<SCALAR>(0.0f);
        }
    };
    for (int i = threadIdx.x; i < NB * BLOCKS * U; i += THREADS) {  // every block loads all of h0
        const int row = i / (BLOCKS * U), unit = i % (BLOCKS * U);
        const long long b = first_row + static_cast<long long>(blockIdx.x / BLOCKS) * NB + row;
        const float h = unit < H && b < B ? to_float(h0[b * H + unit]) : 0.0f;
        reinterpret_cast<SCALAR*>(home.operand + row * Home::ROW)[unit] = encoded(h, SCALAR());
    }
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        state[k][0] = e.real ? to_float(h0[at.initial(e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s)
            state[k][s] = e.real ? others[at.other(save ? at.before(at.nth(0)) : 0, s, e)] : 0.0f;
#pragma unroll
        for (int g = 0; g < G; ++g) bias[k][g] = e.real && b_hh != nullptr ? to_float(b_hh[g * H + e.hidden]) : 0.0f;
    }
    fetch(at.nth(0));
    __syncthreads();  // h0 is there

    for (long long n = 0; n < T; ++n) {
        const long long t = at.nth(n);
        if (n > 0) home.await(n % 2, n - 1);
        home.multiply_all(n % 2);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (e.row >= NB) continue;
            float in[G], recurrent[G], kept[K > 0 ? K : 1];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                in[g] = to_float(x[k][g]);
                recurrent[g] = home.sum(g, e.row, e.unit) + bias[k][g];
            }
            Cell::step(in, recurrent, state[k], kept);
            if (n + 1 < T) home.put((n + 1) % 2, 0, e.row, e.unit, state[k][0]);
            if (!e.real) continue;
            y[at.h(t, e)] = from_float<SCALAR>(state[k][0]);
            if (!save) continue;
#pragma unroll
            for (int j = 0; j < K; ++j) saved[at.row(t, e, K, j)] = from_float<SCALAR>(kept[j]);
#pragma unroll
            for (int s = 1; s < S; ++s) others[at.other(at.after(t), s, e)] = state[k][s];
        }
        if (n + 1 == T) break;
        home.publish((n + 1) % 2, n);
        fetch(at.nth(n + 1));
    }
    if (save) return;
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        if (!e.real) continue;
#pragma unroll
        for (int s = 1; s < S; ++s) others[at.other(0, s, e)] = state[k][s];
    }
}
EXPORT(resident_forward)

// ---- Backward ------------------------------------------------------------------------------------------------------

extern "C" __global__ void RESIDENT_KERNEL resident_backward(
    const SCALAR* dy,         // [T, B, H]
    float* dh,                // [B, H] gradient of the last h, overwritten with that of the first
    float* dothers,           // [S-1, B, H] the same for the other states
    const uint4* weights,     // from resident_pack
    const SCALAR* y,          // [T, B, H]
    const SCALAR* h0,         // [B, H]
    const float* others,      // [T+1, S-1, B, H]
    const SCALAR* saved,      // [T, B, K, H]
    SCALAR* dxg,              // [T, B, G, H] written
    SCALAR* dhg,              // [T, B, G, H] written; null where a cell's two parts have one gradient
    unsigned char* exchange,  // GRID: [groups, 2, NB, BLOCKS * G * U] SCALARs of scratch; else null
    unsigned* flags,          // GRID: [groups, BLOCKS], zero; else null
    long long T, int B, int H, int reverse,
    int first_row) {          // batch row of the first group
    constexpr int G = Cell::G, S = Cell::S, K = Cell::K;
    using Home = Residence<1, G, G * K_REGISTERS, G * K_SHARED>;
    static_assert(Home::BYTES == SHARED_BACKWARD, "the launch plan asks for this much shared memory");
    DYNAMIC_SHARED(unsigned char, arena);
    Home home(arena, exchange, flags);
    home.load(weights);

    const Instants at{T, B, H, S, reverse != 0};
    float asked[OWN][S];  // gradient of the states after the instant; of h without what y and the weights ask
    float after[OWN][S], before[OWN][S], kept[OWN][K > 0 ? K : 1], shown[OWN];
    auto fetch = [&](long long n) {  // what the instant needs from memory, while the others' gradients are under way
        const long long t = at.nth(n);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            shown[k] = e.real ? to_float(dy[at.h(t, e)]) : 0.0f;
#pragma unroll
            for (int j = 0; j < K; ++j) kept[k][j] = e.real ? to_float(saved[at.row(t, e, K, j)]) : 0.0f;
            before[k][0] = !e.real ? 0.0f : to_float(n > 0 ? y[at.h(at.nth(n - 1), e)] : h0[at.initial(e)]);
#pragma unroll
            for (int s = 1; s < S; ++s) before[k][s] = e.real ? others[at.other(at.before(t), s, e)] : 0.0f;
        }
    };
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        const long long t = at.nth(T - 1);
        asked[k][0] = e.real ? dh[at.initial(e)] : 0.0f;
        after[k][0] = e.real ? to_float(y[at.h(t, e)]) : 0.0f;
#pragma unroll
        for (int s = 1; s < S; ++s) {
            asked[k][s] = e.real ? dothers[at.other(0, s, e)] : 0.0f;
            after[k][s] = e.real ? others[at.other(at.after(t), s, e)] : 0.0f;
        }
    }

    for (long long turn = 0; turn <= T; ++turn) {  // the last one only finishes the gradient of h0
        const long long n = T - 1 - turn;
        if (n >= 0) fetch(n);
        if (turn > 0) {
            home.await(turn % 2, turn - 1);
            home.multiply_all(turn % 2);
        }
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (e.row >= NB) continue;
            if (turn > 0) asked[k][0] += home.sum(0, e.row, e.unit);
            if (n < 0) continue;
            asked[k][0] += shown[k];
            float dx[G], da[G], dbefore[S];
            Cell::grad(asked[k], after[k], before[k], kept[k], dx, da, dbefore);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                asked[k][s] = dbefore[s];
                after[k][s] = before[k][s];
            }
#pragma unroll
            for (int g = 0; g < G; ++g) {
                home.put((turn + 1) % 2, g, e.row, e.unit, da[g]);
                if (!e.real) continue;
                dxg[at.row(at.nth(n), e, G, g)] = from_float<SCALAR>(dx[g]);
                if (dhg != nullptr) dhg[at.row(at.nth(n), e, G, g)] = from_float<SCALAR>(da[g]);
            }
        }
        if (n >= 0) home.publish((turn + 1) % 2, turn);
    }
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
        const Element e(k, first_row, B, H);
        if (!e.real) continue;
        dh[at.initial(e)] = asked[k][0];
#pragma unroll
        for (int s = 1; s < S; ++s) dothers[at.other(0, s, e)] = asked[k][s];
    }
}
EXPORT(resident_backward)
