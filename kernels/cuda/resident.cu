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
// Where the page takes means over all units of a batch row (kernels/levels.py), the group meets once for each level of
// them within an instant: sums by half warps, by block through shared memory, and at the same scope by group, in a fixed
// order.
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
// which never waits for it. All layers are resident, or none.
//
// Not the obvious: one launch and one product per step (stepwise.cu) reads R from L2 at every step and pays for two
// launches. Limits: H <= U * BLOCKS; SCALAR is __half, __nv_bfloat16, or float, then multiplied as TF32 or IEEE's.
//
// Compiled with -D: BACKWARD SCALAR IEEE SCOPE BLOCKS UNIT_TILES K_SPLITS K_REGISTERS K_SHARED BATCH_TILES PIECES
// DIRECTIONS LAYERS SHARED_BYTES, all from the launch plan, one for each direction of time; a warp's k tiles are
// K_REGISTERS + K_SHARED, backward for each gate.
// For benchmarks alone: -DONLY=EXCHANGE leaves the products out, -DONLY=PRODUCT sends and awaits nothing.

#define BLOCK 0
#define CLUSTER 1
#define GRID 2

#define EXCHANGE 1
#define PRODUCT 2
#ifndef ONLY
#define ONLY 0
#endif

constexpr int WARPS = UNIT_TILES * K_SPLITS;
constexpr int THREADS = 32 * WARPS;
constexpr int U = 16 * UNIT_TILES;                     // hidden units of a block
constexpr int NB = (IEEE ? 2 : 8) * BATCH_TILES;       // batch rows of a group
constexpr int OWN = (U * NB + THREADS - 1) / THREADS;  // elements of a thread
constexpr int PITCH = U + 4;                           // of a row of partial sums: few lanes hit the same bank
constexpr int MEMBERS = DIRECTIONS * LAYERS;           // of a launch; one of the two is 1
constexpr bool STACK = LAYERS > 1;
constexpr bool STACK_BACK = STACK && BACKWARD;
constexpr int K_STEP = 32 / sizeof(SCALAR);            // k tile: 16 halves or 8 floats, 32 bytes either way

#if SCOPE == CLUSTER && !GPU_RNN_ON_HOST
#define RESIDENT_KERNEL __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define RESIDENT_KERNEL __launch_bounds__(THREADS, 1)
#endif

// Groups take turns: one for each direction or layer, then the next tile of the batch.
DEVICE int group() { return blockIdx.x / BLOCKS; }
DEVICE int member() { return group() % MEMBERS; }
DEVICE int tile() { return group() / MEMBERS; }

// ---- The operands of the product, by storage type -------------------------------------------------------------------

DEVICE __half encoded(float x, __half) { return from_float<__half>(x); }
DEVICE __nv_bfloat16 encoded(float x, __nv_bfloat16) { return from_float<__nv_bfloat16>(x); }
DEVICE float encoded(float x, float) { return IEEE ? x : __uint_as_float(to_tf32(x)); }

// One lane's part of the 16 x K_STEP fragment whose corner is (0, 0) of `element(row, k)`, as mma wants it.
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

// The same for fused multiply-adds. A lane has 1 row and 4 k of a fragment, or 2 and 2, so that few lanes share a row
// and have to add up, and yet an operand that is read from shared memory is used more than once.
template <int LANE_ROWS, class Element>
DEVICE void ieee_fragment(unsigned a[4], Element element, int lane) {
    constexpr int LANES = 16 / LANE_ROWS;  // with the same k
    for (int i = 0; i < 4; ++i) {
        const int row = lane % LANES + i % LANE_ROWS * 8, k = lane / LANES * (4 / LANE_ROWS) + i / LANE_ROWS;
        a[i] = __float_as_uint(element(row, k));
    }
}

// ---- The product ----------------------------------------------------------------------------------------------------

#if IEEE

template <int ROWS>
struct Sums {
    static constexpr int LANE_ROWS = ROWS > 1 ? 1 : 2;
    struct alignas(16 / LANE_ROWS) Operand {
        float k[4 / LANE_ROWS];
    };
    float sums[ROWS][LANE_ROWS][NB] = {};  // over this lane's k

    // Add k tiles `first` to `last`. Batch rows of the operand are ROW bytes apart, `tile` is where the tiles begin;
    // take(a, r, j) gives this lane's part of fragment j of row set r.
    template <int ROW, class Take>
    DEVICE void add(const unsigned char* tile, int first, int last, int lane, Take take) {
        tile += lane / (16 / LANE_ROWS) * sizeof(Operand);
#pragma unroll
        for (int j = first; j < last; ++j, tile += 32) {
            unsigned a[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) take(a[r], r, j);
#pragma unroll
            for (int n = 0; n < NB; ++n) {
                const Operand b = *reinterpret_cast<const Operand*>(tile + n * ROW);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& sum = sums[r][i % LANE_ROWS][n];
                        sum = fmaf(__uint_as_float(a[r][i]), b.k[i / LANE_ROWS], sum);
                    }
                }
            }
        }
    }

    // Lanes that differ in one bit add up two sums that both have: the one with the bit gets the second.
    DEVICE static float folded(float first, float second, int lane, int bit) {
        const bool upper = (lane & bit) != 0;
        return (upper ? second : first) + __shfl_xor_sync(~0u, upper ? first : second, bit);
    }

    // Give what this lane is to write: give(r, row of the fragment, batch row, sum).
    template <class Give>
    DEVICE void finish(int lane, Give give) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int n = 0; n < NB; n += 2) {
                float sum[LANE_ROWS];
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i) sum[i] = folded(sums[r][i][n], sums[r][i][n + 1], lane, 16);
                if (LANE_ROWS == 2) sum[0] = folded(sum[0], sum[LANE_ROWS - 1], lane, 8);
                give(r, lane % 16, n + lane / 16, sum[0]);
            }
        }
    }
};

#else

DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __half) {
    mma_m16n8k16_f16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __nv_bfloat16) {
    mma_m16n8k16_bf16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], float) {
    mma_m16n8k8_tf32(sums, a, b, sums);
}

template <int ROWS>
struct Sums {
    static constexpr int CHAINS = ROWS * BATCH_TILES > 2 ? 1 : 4 / (ROWS * BATCH_TILES);  // to hide mma's latency
    float sums[CHAINS][ROWS][BATCH_TILES][4] = {};

    // Add k tiles `first` to `last`. Batch rows of the operand are ROW bytes apart, `tile` is where the tiles begin;
    // take(a, r, j) gives this lane's part of fragment j of row set r.
    template <int ROW, class Take>
    DEVICE void add(const unsigned char* tile, int first, int last, int lane, Take take) {
        tile += lane % 8 * ROW;
#pragma unroll
        for (int j = first; j < last; j += 2, tile += 64) {
            unsigned b[BATCH_TILES][4];  // the columns of two k tiles
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
                if (j + 1 < last)
                    ldmatrix_x4(b[n], tile + n * 8 * ROW + lane / 8 * 16);
                else
                    ldmatrix_x2(b[n], tile + n * 8 * ROW + lane / 8 % 2 * 16);
            }
#pragma unroll
            for (int next = 0; next < 2 && j + next < last; ++next) {
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
    }

    // Give what this lane is to write: give(r, row of the fragment, batch row, sum).
    template <class Give>
    DEVICE void finish(int lane, Give give) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float sum = sums[0][r][n][i];
                    for (int chain = 1; chain < CHAINS; ++chain) sum += sums[chain][r][n][i];
                    give(r, lane / 4 + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2, sum);
                }
            }
        }
    }
};

#endif

// ---- Means over the units of a batch row --------------------------------------------------------------------------

// The levels of a page's means, in one direction of time.
struct Levels {
    static constexpr int COUNT = BACKWARD ? Cell::GRAD_LEVELS : Cell::STEP_LEVELS;
    static constexpr int MEANS = BACKWARD ? Cell::GRAD_MEANS : Cell::STEP_MEANS, MEANS_OR_1 = MEANS > 0 ? MEANS : 1;
    DEVICE static constexpr int before(int level) {
        return BACKWARD ? Cell::grad_before(level) : Cell::step_before(level);
    }
    DEVICE static constexpr int width() {  // of the widest
        int most = 0;
        for (int level = 0; level < COUNT; ++level) most = max_of(most, before(level + 1) - before(level));
        return most;
    }
    DEVICE static constexpr int max_of(int a, int b) { return a > b ? a : b; }
};

struct Meeting {
    static constexpr int WIDTH = Levels::width(), SUMS = WIDTH * NB;     // of a level: means, rows of them
    static constexpr int WORDS = (SUMS + 2) / 3;                         // GRID: stamped words of a block
    static constexpr int SEGMENTS = BLOCKS < 16 ? BLOCKS : 16;           // GRID: parts of the group added up by threads
    static constexpr int LOCAL = 2 * SUMS * UNIT_TILES;                  // floats
    static constexpr int SHARED = SCOPE == CLUSTER ? 2 * SUMS * BLOCKS : SCOPE == GRID ? SEGMENTS * WORDS * 3 : 0;
    static constexpr int BARRIERS = SCOPE == CLUSTER ? 16 : 0;           // bytes
    static constexpr int BYTES = WIDTH > 0 ? ((LOCAL + SHARED) * 4 + BARRIERS + 15) / 16 * 16 : 0;
    static constexpr int EXCHANGED = SCOPE == GRID ? 2 * BLOCKS * WORDS : 0;  // words of a group

    float* local;   // [2][WIDTH][NB][UNIT_TILES] sums of the block
    float* shared;  // CLUSTER: [2][WIDTH][NB][BLOCKS] sums of the blocks; GRID: [SEGMENTS][WORDS][3] sums of several
#if SCOPE == CLUSTER
    Mbarrier* received;  // [2]
#elif SCOPE == GRID
    uint4* exchange;     // of this group: two of [BLOCKS][WORDS]
#endif

    DEVICE Meeting(unsigned char* arena, uint4* exchanges)
        : local(reinterpret_cast<float*>(arena)), shared(local + LOCAL) {
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(arena + BYTES - BARRIERS);
        if (WIDTH > 0 && threadIdx.x == 0) {
            mbarrier_init(&received[0], 1);
            mbarrier_init(&received[1], 1);
        }
#elif SCOPE == GRID
        exchange = exchanges;
#endif
    }

    // Means `first` to `last`, from each element's own values in their places. e is the meeting's number, from 0. Two
    // meetings in a row have places of their own: what one leaves has been read by all before the one after the next
    // comes, as everyone has to be seen at the one between.
    DEVICE void take(long long e, float (&means)[OWN][Levels::MEANS_OR_1], int first, int last, int H) {
        float* mine = local + e % 2 * SUMS * UNIT_TILES;
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int at = threadIdx.x + k * THREADS, unit = at % U, row = at / U;
            for (int n = first; n < last; ++n) {
                float sum = means[k][n];
                for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
                if (row < NB && unit % 16 == 0) mine[((n - first) * NB + row) * UNIT_TILES + unit / 16] = sum;
            }
        }
        __syncthreads();  // the half warps' sums are there
        auto of_block = [&](int i) {
            float sum = 0;
            for (int tile = 0; tile < UNIT_TILES; ++tile) sum += mine[i * UNIT_TILES + tile];
            return sum;
        };
        if (ONLY != PRODUCT) {
#if SCOPE == CLUSTER
            const int count = (last - first) * NB, rank = blockIdx.x % BLOCKS;
            float* theirs = shared + e % 2 * SUMS * BLOCKS;
            if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[e % 2], count * BLOCKS * 4);
            for (int i = threadIdx.x; i < count * BLOCKS; i += THREADS)
                st_async(reinterpret_cast<unsigned*>(theirs + i / BLOCKS * BLOCKS + rank),
                         __float_as_uint(of_block(i / BLOCKS)), &received[e % 2], i % BLOCKS);
            mbarrier_wait_cluster(&received[e % 2], e / 2 % 2);
#elif SCOPE == GRID
            const unsigned stamp = static_cast<unsigned>(e + 1);
            const int count = (last - first) * NB, rank = blockIdx.x % BLOCKS;
            const int words = (count + 2) / 3;
            uint4* at = exchange + e % 2 * BLOCKS * WORDS;
            for (int i = threadIdx.x; i < words; i += THREADS) {
                unsigned three[3];
                for (int j = 0; j < 3; ++j) three[j] = __float_as_uint(3 * i + j < count ? of_block(3 * i + j) : 0.0f);
                st_relaxed_gpu(at + rank * WORDS + i, make_uint4(three[0], three[1], three[2], stamp));
            }
            constexpr int IN_FLIGHT = (BLOCKS + SEGMENTS - 1) / SEGMENTS;
            for (int i = threadIdx.x; i < words * SEGMENTS; i += THREADS) {
                const int word = i % words, segment = i / words;
                uint4 got[IN_FLIGHT];
#pragma unroll
                for (int f = 0; f < IN_FLIGHT; ++f)
                    if (segment + f * SEGMENTS < BLOCKS)
                        got[f] = ld_relaxed_gpu(at + (segment + f * SEGMENTS) * WORDS + word);
                float sums[3] = {0, 0, 0};
#pragma unroll
                for (int f = 0; f < IN_FLIGHT; ++f) {
                    const int block = segment + f * SEGMENTS;
                    if (block >= BLOCKS) break;
                    while (got[f].w != stamp) got[f] = ld_relaxed_gpu(at + block * WORDS + word);
                    sums[0] += __uint_as_float(got[f].x);
                    sums[1] += __uint_as_float(got[f].y);
                    sums[2] += __uint_as_float(got[f].z);
                }
                for (int j = 0; j < 3; ++j) shared[(segment * WORDS + word) * 3 + j] = sums[j];
            }
            __syncthreads();  // the segments' sums are there
#endif
        }
        auto of_group = [&](int i) {
            float sum = 0;
#if SCOPE == CLUSTER
            for (int block = 0; block < BLOCKS; ++block) sum += shared[(e % 2 * SUMS + i) * BLOCKS + block];
#elif SCOPE == GRID
            for (int segment = 0; segment < SEGMENTS; ++segment) sum += shared[segment * WORDS * 3 + i];
#else
            sum = of_block(i);
#endif
            return sum;
        };
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const int row = (threadIdx.x + k * THREADS) / U;
            for (int n = first; n < last; ++n) means[k][n] = row < NB ? of_group((n - first) * NB + row) / H : 0.0f;
        }
    }
};

// ---- What a block holds, and how it exchanges ----------------------------------------------------------------------

// The values of a unit that a group exchanges. Backward they are the gradients of the gates' recurrent parts. In a
// stack both matrices multiply them: where an input part has a gradient of its own, that follows behind the others.
struct Values {
    static constexpr int COUNT_APART = STACK_BACK ? Cell::COUNT_SEPARATE : 0;
    static constexpr int COUNT = BACKWARD ? Cell::G + COUNT_APART : 1;

    // The gate whose rows of the recurrent or the input weights meet a value; -1: none of theirs.
    DEVICE static int gate(int value, bool of_input) {
        if (value < Cell::G) return of_input && (Cell::SEPARATE >> value & 1) != 0 ? -1 : value;
        return of_input ? apart(value - Cell::G) : -1;
    }
    DEVICE static constexpr int apart(int n) {  // the n-th gate with two gradients
        for (int gate = 0; gate < Cell::G; ++gate)
            if ((Cell::SEPARATE >> gate & 1) != 0 && n-- == 0) return gate;
        return -1;
    }
};

// What a warp has of a matrix: k tiles in registers first, in shared memory then.
struct Rows {
    static constexpr int SETS = BACKWARD ? 1 : Cell::G;
    static constexpr int IN_REGISTERS = Values::COUNT * K_REGISTERS;
    static constexpr int IN_SHARED = Values::COUNT * K_SHARED;
    static constexpr int TILES = IN_REGISTERS + IN_SHARED;
    static constexpr int BYTES = WARPS * SETS * IN_SHARED * 512;  // of the block, in shared memory

    uint4* shared;  // [WARPS][SETS][IN_SHARED][32]
    unsigned held[SETS][IN_REGISTERS > 0 ? IN_REGISTERS : 1][4];

    // This warp's fragments, as resident_pack laid them out.
    DEVICE void load(const uint4* packed, int rank, int warp, int lane) {
        packed += (static_cast<long long>(rank) * WARPS + warp) * SETS * TILES * 32 + lane;
        shared += warp * SETS * IN_SHARED * 32 + lane;  // read back by this very lane
#pragma unroll
        for (int r = 0; r < SETS; ++r) {
#pragma unroll
            for (int j = 0; j < IN_REGISTERS; ++j) {
                const uint4 a = packed[(r * TILES + j) * 32];
                held[r][j][0] = a.x, held[r][j][1] = a.y, held[r][j][2] = a.z, held[r][j][3] = a.w;
            }
            for (int j = 0; j < IN_SHARED; ++j)
                shared[(r * IN_SHARED + j) * 32] = packed[(r * TILES + IN_REGISTERS + j) * 32];
        }
    }

    DEVICE void take(unsigned a[4], int r, int j) const {
        if (j < IN_REGISTERS) {
            for (int i = 0; i < 4; ++i) a[i] = held[r][j < IN_REGISTERS ? j : 0][i];
        } else {
            const uint4 w = shared[(r * IN_SHARED + j - IN_REGISTERS) * 32];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        }
    }
};

struct Residence {  // for one direction of time
    static constexpr int ROWS = Rows::SETS, VALUES = Values::COUNT, TILES = Rows::TILES;
    static constexpr int PIECE = (TILES + PIECES - 1) / PIECES;          // k tiles of a warp in one piece
    static constexpr int SLICE = VALUES * U * sizeof(SCALAR);            // bytes a block publishes per batch row
    static constexpr int ROW = K_SPLITS * PIECE * 32 + 16;               // operand's pitch: ldmatrix without conflicts
    static constexpr int OPERAND = NB * ROW;
    static constexpr int PARTS = K_SPLITS * ROWS * NB * PITCH * 4;
    static constexpr int OPERANDS = SCOPE == CLUSTER ? 2 : 1;            // peers of a cluster store ahead of the reader
    static constexpr int TRIPLES = (NB + 2) / 3;                         // a stamped word has 4 bytes of 3 batch rows
    static constexpr long long PUBLICATION = TRIPLES * BLOCKS * (SLICE / 4);  // words
    static constexpr int STAGED = SCOPE == GRID ? TRIPLES * 3 * SLICE : 0;
    static constexpr int BYTES = OPERANDS * OPERAND + STAGED + PARTS + Rows::BYTES + 16 + Meeting::BYTES;
    static constexpr int BESIDE = !STACK ? 0 : BACKWARD ? PARTS + Rows::BYTES : BYTES;  // for the input weights
    static_assert(BYTES + BESIDE == SHARED_BYTES, "the launch plan asks for this much shared memory");
    static_assert(!STACK || Levels::COUNT == 0, "units of a stack don't meet");
    static_assert(BLOCKS * SLICE <= K_SPLITS * TILES * 32, "the warps' k tiles cover what all blocks publish");
    static_assert((PIECES - 1) * PIECE < TILES, "no piece is empty");
    static_assert(SCOPE == GRID || PIECES == 1, "what peers store at any time is there as a whole");
    static_assert(!(STACK_BACK || BLOCKS == 1) || PIECES == 1, "what is multiplied twice, or made here, is whole");

    unsigned char* operand;  // [OPERANDS][NB][ROW]: the one multiplied, and in a cluster the one being received
    unsigned char* staged;   // GRID: [TRIPLES * 3][SLICE], the block's own values, to be published
    float* parts;            // [K_SPLITS][ROWS][NB][PITCH]
    Rows weights;
    int warp, lane, rank;
    int rows;                // of the batch that this group has: the others aren't exchanged
    Meeting meeting;
#if SCOPE == CLUSTER
    Mbarrier* received;      // [2], one for each operand
#elif SCOPE == GRID
    uint4* exchange;         // of a group: two of [TRIPLES][BLOCKS * SLICE / 4], or one for each publication
#endif

    static constexpr bool KEEPS = STACK && !BACKWARD;  // its publications, for another layer
    static constexpr bool ALONE = BLOCKS == 1;         // what the block makes itself goes straight into its operand
    static constexpr bool SENDS = SCOPE == GRID && (!ALONE || KEEPS);

    bool waits;  // for what others publish

    DEVICE static long long group_words(long long T) { return (KEEPS ? T + 1 : 2) * PUBLICATION + Meeting::EXCHANGED; }

    // `from`: the group whose publications are received; its own, or that of the layer below.
    DEVICE Residence(unsigned char* arena, uint4* exchanges, int from, long long T, int rows_left)
        : operand(arena),
          staged(operand + OPERANDS * OPERAND),
          parts(reinterpret_cast<float*>(staged + STAGED)),
          weights{reinterpret_cast<uint4*>(staged + STAGED + PARTS), {}},
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          rank(blockIdx.x % BLOCKS),
          rows(max(0, min(NB, rows_left - tile() * NB))),
          waits(!ALONE || from != group()),
          meeting(staged + STAGED + PARTS + Rows::BYTES + 16,
                  exchanges + from * group_words(T) + group_words(T) - Meeting::EXCHANGED) {
        for (int i = threadIdx.x; i < (OPERANDS * OPERAND + STAGED) / 16; i += THREADS)
            reinterpret_cast<uint4*>(operand)[i] = make_uint4(0, 0, 0, 0);  // what nobody publishes stays zero
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(staged + STAGED + PARTS + Rows::BYTES);
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
        exchange = exchanges + from * group_words(T);
#endif
    }

    DEVICE void load(const uint4* packed) { weights.load(packed, rank, warp, lane); }

    // In the following n is the number of a publication, from 0.

    // Multiply with what has been published. The sums are then in `parts`, one for each K split, for `sum` to add.
    DEVICE void multiply_all(long long n) {
        Sums<ROWS> sums;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            const int first = piece * PIECE, last = min(first + PIECE, TILES);
            if (piece > 0) team_sync();  // the one before it has been multiplied
            await(n, first, last);
            multiply(n, first, last, weights, sums);
        }
        lay_out(sums, parts);
    }

    // Once more, by another matrix, what `multiply_all` has multiplied. The sums are then in `others`, likewise.
    DEVICE void multiply_again(long long n, const Rows& matrix, float* others) const {
        Sums<ROWS> sums;
        multiply(n, 0, TILES, matrix, sums);
        lay_out(sums, others);
    }

    DEVICE void multiply(long long n, int first, int last, const Rows& matrix, Sums<ROWS>& sums) const {
        if (ONLY == EXCHANGE) return;
        const unsigned char* tile = operand + n % OPERANDS * OPERAND + warp % K_SPLITS * PIECE * 32;
        sums.template add<ROW>(tile, first, last, lane, [&](unsigned a[4], int r, int j) { matrix.take(a, r, j); });
    }

    DEVICE void lay_out(const Sums<ROWS>& sums, float* to) const {
        sums.finish(lane, [&](int r, int row, int column, float sum) {
            to[((warp % K_SPLITS * ROWS + r) * NB + column) * PITCH + warp / K_SPLITS * 16 + row] = sum;
        });
        __syncthreads();  // all parts are there, and the operand has been multiplied
    }

    DEVICE float sum(int r, int row, int unit) const { return sum_of(parts, r, row, unit); }
    DEVICE static float sum_of(const float* from, int r, int row, int unit) {
        float total = 0;
#pragma unroll
        for (int split = 0; split < K_SPLITS; ++split) total += from[((split * ROWS + r) * NB + row) * PITCH + unit];
        return total;
    }

    // This thread's value for everyone, to be published.
    DEVICE void put(long long n, int value, int row, int unit, float x) {
        const SCALAR stored = encoded(x, SCALAR());
        if (SENDS) reinterpret_cast<SCALAR*>(staged + row * SLICE)[value * U + unit] = stored;
        if (SCOPE == GRID && !ALONE) return;
        unsigned char* slice = operand + n % OPERANDS * OPERAND + row * ROW + rank * SLICE;
        reinterpret_cast<SCALAR*>(slice)[value * U + unit] = stored;
    }

    // All threads have put: give the block's slice to the others.
    DEVICE void publish(long long n) {
        __syncthreads();  // the slice is complete, and the parts have been read
        if (ONLY == PRODUCT) return;
#if SCOPE == CLUSTER
        if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[n % 2], (BLOCKS - 1) * rows * SLICE);
        unsigned char* slice = operand + n % OPERANDS * OPERAND + rank * SLICE;
        for (int peer = warp; peer < BLOCKS - 1; peer += WARPS) {
            for (int i = lane; i < rows * (SLICE / 16); i += 32) {
                uint4* mine = reinterpret_cast<uint4*>(slice + i / (SLICE / 16) * ROW) + i % (SLICE / 16);
                st_async(mine, *mine, &received[n % 2], (rank + 1 + peer) % BLOCKS);  // not all at one peer at a time
            }
        }
#elif SCOPE == GRID
        if (!SENDS) return;
        constexpr int WORDS = SLICE / 4;
        uint4* to = exchange + place(n) * PUBLICATION + rank * WORDS;
        for (int i = threadIdx.x; i < (rows + 2) / 3 * WORDS; i += THREADS) {
            const unsigned* three = reinterpret_cast<const unsigned*>(staged) + i / WORDS * 3 * WORDS + i % WORDS;
            st_relaxed_gpu(to + i / WORDS * BLOCKS * WORDS + i % WORDS,
                           make_uint4(three[0], three[WORDS], three[2 * WORDS], stamp(n)));
        }
#endif
    }

    // Wait until the k tiles `first` to `last` are there.
    DEVICE void await(long long n, int first, int last) {
        if (ONLY == PRODUCT || !waits) return;
#if SCOPE == CLUSTER
        mbarrier_wait_cluster(&received[n % 2], n / 2 % 2);
#elif SCOPE == GRID
        // The warps that multiply the same columns receive them: nobody waits for what he doesn't multiply. A word is
        // overwritten two publications later, if at all. No fence is needed for that: its owner stores it after it has
        // seen all of the publication between, which every block stores after it has seen all of this one.
        constexpr int IN_FLIGHT = 8, TEAM = 32 * UNIT_TILES;
        const int split = warp % K_SPLITS, count = (last - first) * 8, words = (rows + 2) / 3 * count;
        const uint4* source = exchange + place(n) * PUBLICATION;
        auto column = [&](int i) { return (split * TILES + first) * 8 + i % count; };  // 4 bytes of a batch row
        auto word = [&](int i) { return source + i / count * BLOCKS * (SLICE / 4) + column(i); };
        for (int begin = warp / K_SPLITS * 32 + lane; begin < words; begin += IN_FLIGHT * TEAM) {
            uint4 got[IN_FLIGHT];
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; ++f) {
                const int i = begin + f * TEAM;
                got[f] = make_uint4(0, 0, 0, stamp(n));  // of columns that nobody publishes
                if (i < words && column(i) < BLOCKS * (SLICE / 4)) got[f] = ld_relaxed_gpu(word(i));
            }
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; ++f) {
                const int i = begin + f * TEAM;
                if (i >= words) break;
                while (got[f].w != stamp(n)) got[f] = ld_relaxed_gpu(word(i));
                unsigned char* to = operand + i / count * 3 * ROW + split * PIECE * 32 + i % count * 4;
                const unsigned data[3] = {got[f].x, got[f].y, got[f].z};
#pragma unroll
                for (int row = 0; row < 3; ++row)
                    if (i / count * 3 + row < NB) *reinterpret_cast<unsigned*>(to + row * ROW) = data[row];
            }
        }
        team_sync();  // every thread's words are there
#endif
    }

    DEVICE static long long place(long long n) { return KEEPS ? n : n % 2; }
    DEVICE static unsigned stamp(long long n) { return static_cast<unsigned>(n + 1); }

    // The warps that multiply the same columns wait for each other.
    DEVICE void team_sync() {
        if (UNIT_TILES == 1)
            __syncwarp();
        else
            named_barrier_sync(1 + warp % K_SPLITS, 32 * UNIT_TILES);
    }
};

// The elements of a thread: which hidden unit and which batch row.
struct Element {
    int unit, row;        // within the block and the group
    long long hidden, b;  // in the layer
    bool real;            // inside H and B; the others compute on zeros, even NaN, store nothing and publish zeros

    DEVICE Element(int k, int first_row, int B, int H) {
        const int at = threadIdx.x + k * THREADS;
        unit = at % U, row = at / U;
        hidden = blockIdx.x % BLOCKS * U + unit;
        b = first_row + static_cast<long long>(tile()) * NB + row;
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

// One lane's part of a fragment after the other. A launch of its own: the weights are read once, all loads of the
// resident kernels are 16 bytes and coalesced.
extern "C" __global__ void __launch_bounds__(128) resident_pack(
    const SCALAR* R,  // [G, H, H] recurrent weights, or input weights of a layer above the first
    uint4* packed,    // [BLOCKS, WARPS, row sets, k tiles, 32] written
    int H, int of_input) {
    constexpr int ROWS = Residence::ROWS, VALUES = Residence::VALUES, TILES = Residence::TILES;
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= BLOCKS * WARPS * ROWS * TILES * 32) return;
    const int lane = index % 32, j = index / 32 % TILES, r = index / 32 / TILES % ROWS;
    const int warp = index / 32 / TILES / ROWS % WARPS, rank = index / 32 / TILES / ROWS / WARPS;
    const int unit0 = rank * U + warp / K_SPLITS * 16, column0 = (warp % K_SPLITS * TILES + j) * K_STEP;
    auto element = [&](int row, int k) {  // operand columns run over blocks, values, units of the block
        const int column = column0 + k, within = column % (VALUES * U);
        const int unit = unit0 + row, other = column / (VALUES * U) * U + within % U;
        const int gate = BACKWARD ? Values::gate(within / U, of_input != 0) : r;
        if (unit >= H || other >= H || gate < 0) return 0.0f;
        const long long from = BACKWARD ? other : unit, to = BACKWARD ? unit : other;
        return to_float(R[(gate * static_cast<long long>(H) + from) * H + to]);
    };
    unsigned a[4];
#if IEEE
    ieee_fragment<Sums<ROWS>::LANE_ROWS>(a, element, lane);
#else
    fragment(a, element, lane, SCALAR());
#endif
    packed[index] = make_uint4(a[0], a[1], a[2], a[3]);
}
EXPORT(resident_pack)

#if !BACKWARD

// ---- Forward -------------------------------------------------------------------------------------------------------

struct Given {             // of one direction or layer
    const SCALAR* xg;      // [T, B, G, H] input part, b_ih included; of no use to layers above the first
    const uint4* weights;  // from resident_pack
    const SCALAR* b_hh;    // [G, H] or null
    const SCALAR* h0;      // [B, H]
    float* others;         // [T+1, S-1, B, H] the other states, the first boundary given, the rest written;
                           // where nothing is saved, [1, S-1, B, H] in place
    SCALAR* saved;         // [T, B, K, H] written; it may be xg where K = G
    SCALAR* y;             // [T, B, H] written
    const float* units;    // see Extra
    const unsigned char* flags;
    const unsigned long long* seed;
    const uint4* weights_below;  // of the input, from resident_pack; of layers above the first, and so is
    const SCALAR* b_ih;          // [G, H] or null
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
    Residence home(arena, exchange, group(), T, B - first_row);
    home.load(given.weights);
#if LAYERS > 1
    Residence below(arena + Residence::BYTES, exchange, group() - ABOVE, T, B - first_row);
    float bias_below[OWN][G];
    if (ABOVE) below.load(given.weights_below);
    static_assert(!Cell::OPERAND, "what is published is h, which the layer above is to see");
#endif

    const Instants at{T, B, H, S, given.reverse != 0};
    const Extra extra{given.units, given.flags, given.seed, B, H, rows};
    float state[OWN][S], bias[OWN][G], kept[OWN][K > 0 ? K : 1], more[OWN][EXTRA_OR_1];
    unsigned bits[OWN];  // flags of the instant after the coming one
    SCALAR x[OWN][G];  // of the coming instant, fetched while this one's h is under way
    auto fetch = [&](long long n) {
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                x[k][g] = e.real ? given.xg[at.row(at.nth(n), e, G, g)] : from_float<SCALAR>(0.0f);
                if (e.real && e.unit % 16 == 0 && n + 1 < T)  // a step may be shorter than the way to memory
                    prefetch_l2(&given.xg[at.row(at.nth(n + 1), e, G, g)]);
            }
            if (!e.real) continue;
            if (n + 1 < T) bits[k] = extra.bits(at.nth(n + 1), e.b);
            extra.uniforms_of(more[k], at.nth(n), e.b, e.hidden);
        }
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
        if (e.row < NB) home.put(0, 0, e.row, e.unit, seen);
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
                if (e.real) {
                    take(e, k, in, recurrent);
                    Cell::step_level(level, in, recurrent, state[k], more[k], means[k], values);
                }
                for (int m = first; m < last; ++m) means[k][m] = e.real ? values[m - first] : 0.0f;
            }
            home.meeting.take(n * Levels::COUNT + level, means, first, last, H);
        }
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (e.row >= NB) continue;
            float in[G], recurrent[G];
            take(e, k, in, recurrent);
            Cell::step(in, recurrent, state[k], kept[k], more[k], means[k]);
            extra.flags_of(more[k], bits[k]);
            float seen = state[k][0];
            Cell::operand(&seen, more[k]);
            if (STACK || n + 1 < T) home.put(n + 1, 0, e.row, e.unit, e.real ? seen : 0.0f);
        }
        if (STACK || n + 1 < T) home.publish(n + 1);
        if (!ABOVE && n + 1 < T) fetch(n + 1);
        const long long t = at.nth(n);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {  // the others don't wait for this
            const Element e(k, first_row, B, H);
            if (!e.real) continue;
            given.y[at.h(t, e)] = from_float<SCALAR>(state[k][0]);
            if (!save) continue;
#pragma unroll
            for (int j = 0; j < K; ++j) given.saved[at.row(t, e, K, j)] = from_float<SCALAR>(kept[k][j]);
#pragma unroll
            for (int s = 1; s < S; ++s) given.others[at.other(at.after(t), s, e)] = state[k][s];
        }
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
    const __grid_constant__ Members members,
    uint4* exchange,  // GRID: [groups, 2 or T + 1 publications and two meetings], zero; else null
    long long T, int B, int H, int rows,
    int first_row,    // batch row of the first group: what isn't resident at once takes several launches
    int save) {       // whether saved and others are kept
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
    const uint4* weights;    // from resident_pack
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
    const uint4* weights_below;  // of the input, from resident_pack; of layers above the first
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
    Residence home(arena, exchange, group(), T, B - first_row);
    home.load(given.weights);
#if LAYERS > 1
    float* parts_below = reinterpret_cast<float*>(arena + Residence::BYTES);
    Rows below{reinterpret_cast<uint4*>(arena + Residence::BYTES + Residence::PARTS), {}};
    if (HANDS) below.load(given.weights_below, home.rank, home.warp, home.lane);
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
    auto fetch = [&](long long n) {  // what the instant needs from memory, while the others' gradients are under way
        const long long t = at.nth(n);
        const SCALAR zero = from_float<SCALAR>(0.0f);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            shown[k] = e.real && given.dy != nullptr ? given.dy[at.h(t, e)] : zero;
#if LAYERS > 1
            if (e.real && takes) handed[k] = ld_relaxed_gpu(from_above.of(T - 1 - n, e));
#endif
            earlier[k] = !e.real ? zero : n > 0 ? given.y[at.h(at.nth(n - 1), e)] : given.h0[at.initial(e)];
#pragma unroll
            for (int j = 0; j < K; ++j) kept[k][j] = e.real ? given.saved[at.row(t, e, K, j)] : zero;
#pragma unroll
            for (int s = 1; s < S; ++s) before[k][s] = e.real ? given.others[at.other(at.before(t), s, e)] : 0.0f;
            if (!e.real) continue;
            bits[k] = extra.bits(t, e.b);
            if (given.dhistory == nullptr) continue;
#pragma unroll
            for (int s = 1; s < S; ++s) asked[k][s] += to_float(given.dhistory[at.other(t, s, e)]);
        }
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
            if (e.real) extra.uniforms_of(more[k], at.nth(n), e.b, e.hidden);
#if LAYERS > 1
            if (e.real && takes) {
                while (handed[k].y != Handed::stamp(turn)) handed[k] = ld_relaxed_gpu(from_above.of(turn, e));
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
                if (e.row < NB) arrive(e, k);
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
                for (int m = first; m < last; ++m) means[k][m] = e.real ? values[m - first] : 0.0f;
            }
            home.meeting.take(turn * Levels::COUNT + level, means, first, last, H);
        }
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            const Element e(k, first_row, B, H);
            if (e.row >= NB) continue;
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
            for (int g = 0; g < G; ++g) home.put(turn, g, e.row, e.unit, e.real ? da[k][g] : 0.0f);
#pragma unroll
            for (int n = 0; n < Values::COUNT_APART; ++n)
                home.put(turn, G + n, e.row, e.unit, e.real ? dx[k][Values::apart(n)] : 0.0f);
        }
        if (n < 0) break;
        home.publish(turn);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {  // the others don't wait for this
            const Element e(k, first_row, B, H);
            if (!e.real) continue;
#pragma unroll
            for (int g = 0; g < G; ++g) {
                given.dxg[at.row(at.nth(n), e, G, g)] = from_float<SCALAR>(dx[k][g]);
                if (given.dhg != nullptr) given.dhg[at.row(at.nth(n), e, G, g)] = from_float<SCALAR>(da[k][g]);
            }
        }
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
    const __grid_constant__ Members members,
    uint4* exchange,  // GRID: [groups, two publications and two meetings], then what layers hand down, zero; else null
    long long T, int B, int H, int rows,
    int first_row) {  // batch row of the first group
    if (member() == 0)
        backward<false>(members.of[0], exchange, T, B, H, rows, first_row);
    else
        backward<STACK>(members.of[STACK ? member() : MEMBERS - 1], exchange, T, B, H, rows, first_row);
}
EXPORT(resident_backward)

#endif
