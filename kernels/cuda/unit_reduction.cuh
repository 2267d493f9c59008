// unit_reduction.cuh: means over the hidden units of a batch row, across the blocks of a group.
//
// A time step has one cross-block reduction for each level of means (kernels/codegen/reductions.py): sums by half
// warps, by block through shared memory, and by group at the scope of its exchange, in a fixed order.
#pragma once

// The levels of the cell's means, in one direction of time.
struct Levels {
    static constexpr int COUNT = BACKWARD ? Cell::GRAD_LEVELS : Cell::STEP_LEVELS;
    static constexpr int MEANS = BACKWARD ? Cell::GRAD_MEANS : Cell::STEP_MEANS, MEANS_OR_1 = MEANS > 0 ? MEANS : 1;
    DEVICE static constexpr int means_before(int level) {
        return BACKWARD ? Cell::grad_before(level) : Cell::step_before(level);
    }
    DEVICE static constexpr int max_means() {  // of a level, at most
        int most = 0;
        for (int level = 0; level < COUNT; ++level) most = max_of(most, means_before(level + 1) - means_before(level));
        return most;
    }
    DEVICE static constexpr int max_of(int a, int b) { return a > b ? a : b; }
};

struct UnitReduction {
    static constexpr int MAX_MEANS = Levels::max_means(), SUMS = MAX_MEANS * BATCH_ROWS;  // of a level
    static constexpr int WORDS = (SUMS + 2) / 3;                                          // GRID: of a block
    static constexpr int SEGMENTS = BLOCKS < 16 ? BLOCKS : 16;  // GRID: of the group, each added up by other threads
    static constexpr int LOCAL_FLOATS = 2 * SUMS * UNIT_TILES;
    static constexpr int SHARED_FLOATS = SCOPE == CLUSTER ? 2 * SUMS * BLOCKS
                                         : SCOPE == GRID  ? SEGMENTS * WORDS * 3
                                                          : 0;
    static constexpr int BARRIERS = SCOPE == CLUSTER ? 16 : 0;  // bytes
    static constexpr int BYTES = MAX_MEANS > 0 ? ((LOCAL_FLOATS + SHARED_FLOATS) * 4 + BARRIERS + 15) / 16 * 16 : 0;
    static constexpr int EXCHANGE_WORDS = SCOPE == GRID ? 2 * BLOCKS * WORDS : 0;  // words of a group

    float* local;   // [2][MAX_MEANS][BATCH_ROWS][UNIT_TILES] sums of the block
    float* shared;  // CLUSTER: [2][MAX_MEANS][BATCH_ROWS][BLOCKS] sums of the blocks; GRID: [SEGMENTS][WORDS][3]
#if SCOPE == CLUSTER
    Mbarrier* received;  // [2]
#elif SCOPE == GRID
    uint4* exchange;  // of this group: two of [BLOCKS][WORDS]
#endif

    DEVICE UnitReduction(unsigned char* arena, uint4* exchanges)
        : local(reinterpret_cast<float*>(arena)), shared(local + LOCAL_FLOATS) {
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(arena + BYTES - BARRIERS);
        if (MAX_MEANS > 0 && threadIdx.x == 0) {
            mbarrier_init(&received[0], 1);
            mbarrier_init(&received[1], 1);
        }
#elif SCOPE == GRID
        exchange = exchanges;
#endif
    }

    // Replace each element's own values `first` to `last` by their means. e is the number of the reduction, from 0. Two
    // successive reductions have memory of their own: a block starts the one after the next when all have sent to the
    // one between, so after all have read the first.
    DEVICE void mean(long long e, float (&means)[ELEMENTS][Levels::MEANS_OR_1], int first, int last, int H) {
        float* mine = local + e % 2 * SUMS * UNIT_TILES;
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const int unit = unit_of(threadIdx.x), row = row_of(threadIdx.x) + k * ROW_STRIDE;
            for (int n = first; n < last; ++n) {
                float sum = means[k][n];
                for (int lanes = 8; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
                if (row < BATCH_ROWS && unit % 16 == 0)
                    mine[((n - first) * BATCH_ROWS + row) * UNIT_TILES + unit / 16] = sum;
            }
        }
        __syncthreads();  // the half warps' sums are stored
        auto block_sum = [&](int i) {
            float sum = 0;
            for (int tile = 0; tile < UNIT_TILES; ++tile) sum += mine[i * UNIT_TILES + tile];
            return sum;
        };
        if (PROFILE_ONLY != PRODUCT) {
#if SCOPE == CLUSTER
            const int count = (last - first) * BATCH_ROWS, rank = blockIdx.x % BLOCKS;
            float* theirs = shared + e % 2 * SUMS * BLOCKS;
            if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[e % 2], count * BLOCKS * 4);
            for (int i = threadIdx.x; i < count * BLOCKS; i += THREADS)
                st_async(reinterpret_cast<unsigned*>(theirs + i / BLOCKS * BLOCKS + rank),
                         __float_as_uint(block_sum(i / BLOCKS)), &received[e % 2], i % BLOCKS);
            mbarrier_wait_cluster(&received[e % 2], e / 2 % 2);
#elif SCOPE == GRID
            const unsigned flag = static_cast<unsigned>(e + 1);
            const int count = (last - first) * BATCH_ROWS, rank = blockIdx.x % BLOCKS;
            const int words = (count + 2) / 3;
            uint4* at = exchange + e % 2 * BLOCKS * WORDS;
            for (int i = threadIdx.x; i < words; i += THREADS) {
                unsigned three[3];
                for (int j = 0; j < 3; ++j) three[j] = __float_as_uint(3 * i + j < count ? block_sum(3 * i + j) : 0.0f);
                st_relaxed_gpu(at + rank * WORDS + i, make_uint4(three[0], three[1], three[2], flag));
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
                    for (Watchdog watchdog; got[f].w != flag; watchdog.turn())
                        got[f] = ld_relaxed_gpu(at + block * WORDS + word);
                    sums[0] += __uint_as_float(got[f].x);
                    sums[1] += __uint_as_float(got[f].y);
                    sums[2] += __uint_as_float(got[f].z);
                }
                for (int j = 0; j < 3; ++j) shared[(segment * WORDS + word) * 3 + j] = sums[j];
            }
            __syncthreads();  // the segments' sums are stored
#endif
        }
        auto group_sum = [&](int i) {
            float sum = 0;
#if SCOPE == CLUSTER
            for (int block = 0; block < BLOCKS; ++block) sum += shared[(e % 2 * SUMS + i) * BLOCKS + block];
#elif SCOPE == GRID
            for (int segment = 0; segment < SEGMENTS; ++segment) sum += shared[segment * WORDS * 3 + i];
#else
            sum = block_sum(i);
#endif
            return sum;
        };
#pragma unroll
        for (int k = 0; k < ELEMENTS; ++k) {
            const int row = row_of(threadIdx.x) + k * ROW_STRIDE;
            for (int n = first; n < last; ++n)
                means[k][n] = row < BATCH_ROWS ? group_sum((n - first) * BATCH_ROWS + row) / H : 0.0f;
        }
    }
};
