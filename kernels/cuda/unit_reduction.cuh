// unit_reduction.cuh: means over the units of a batch row, for the group of blocks that shares them.
//
// The group meets once for each level of them (kernels/codegen/reductions.py) within an instant: sums by half warps, by block
// through shared memory, and at the scope of the group's exchange by group, in a fixed order.
#pragma once

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
                    for (Watchdog watchdog; got[f].w != stamp; watchdog.turn())
                        got[f] = ld_relaxed_gpu(at + block * WORDS + word);
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
