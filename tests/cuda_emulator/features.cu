// features.cu: one small kernel per feature of the hardware. features.py says what each must compute; the
// same checks run on the host and on a GPU, so that the host is held to what the GPU does.

// ---- One warp ---------------------------------------------------------------------------------------------

// Raw fragments in, raw fragments out, one product per block: features.py knows which element is where.
extern "C" __global__ void mma_bf16(const unsigned* a,  // [blocks, 32 lanes, 4]
                                    const unsigned* b,  // [blocks, 32, 2]
                                    const float* c,     // [blocks, 32, 4]
                                    float* d) {         // [blocks, 32, 4]
    const unsigned lane = blockIdx.x * 32 + threadIdx.x;
    mma_m16n8k16_bf16(d + 4 * lane, a + 4 * lane, b + 2 * lane, c + 4 * lane);
}
EXPORT(mma_bf16)

extern "C" __global__ void mma_f16(const unsigned* a, const unsigned* b, const float* c, float* d) {
    const unsigned lane = blockIdx.x * 32 + threadIdx.x;
    mma_m16n8k16_f16(d + 4 * lane, a + 4 * lane, b + 2 * lane, c + 4 * lane);
}
EXPORT(mma_f16)

extern "C" __global__ void mma_tf32(const unsigned* a, const unsigned* b, const float* c, float* d) {
    const unsigned lane = blockIdx.x * 32 + threadIdx.x;
    mma_m16n8k8_tf32(d + 4 * lane, a + 4 * lane, b + 2 * lane, c + 4 * lane);
}
EXPORT(mma_tf32)

// Loads the same four 8 x 8 matrices in both ways.
extern "C" __global__ void ldmatrix(const uint4* matrices,  // [32 rows of 8 16-bit numbers]
                                    unsigned* fragments) {  // [2, 32 lanes, 4]
    SHARED(uint4[32], rows);
    const unsigned lane = threadIdx.x;
    rows[lane] = matrices[lane];
    __syncwarp();
    unsigned* mine = fragments + 4 * lane;
    ldmatrix_x2(mine, &rows[lane % 16]);
    ldmatrix_x4(mine + 128, &rows[lane]);
}
EXPORT(ldmatrix)

extern "C" __global__ void shuffles(const int* x,  // [64]
                                    int* y) {      // [13, 64]
    const unsigned all = 0xffffffffu;
    const unsigned thread = threadIdx.x;
    const int v = x[thread];
    y[0 * 64 + thread] = __shfl_sync(all, v, int(thread * 5) % 32);
    y[1 * 64 + thread] = __shfl_xor_sync(all, v, 9);
    y[2 * 64 + thread] = __shfl_down_sync(all, v, 3);
    y[3 * 64 + thread] = __shfl_up_sync(all, v, 3, 8);
    y[4 * 64 + thread] = int(__ballot_sync(all, v & 1));
    y[5 * 64 + thread] = __any_sync(all, v == x[7]);
    y[6 * 64 + thread] = __all_sync(all, v > x[7]);
    y[7 * 64 + thread] = __reduce_add_sync(all, v);
    y[8 * 64 + thread] = __reduce_min_sync(all, v);
    y[9 * 64 + thread] = int(__reduce_max_sync(all, unsigned(v)));
    y[10 * 64 + thread] = int(__reduce_xor_sync(all, unsigned(v)));
    if (thread % 32 < 16) {
        y[11 * 64 + thread] = __shfl_xor_sync(0x0000ffffu, v, 1);
    } else {
        y[11 * 64 + thread] = __shfl_xor_sync(0xffff0000u, v, 2);
    }
    double wide = v * 0.5;
    for (int offset = 16; offset; offset /= 2) {
        wide += __shfl_xor_sync(all, wide, offset);
    }
    y[12 * 64 + thread] = int(2 * wide);
}
EXPORT(shuffles)

// The lanes of a warp exchange through shared memory.
extern "C" __global__ void warp_exchange(const float* x,  // [32]
                                         float* y,        // [32]
                                         int rounds) {
    SHARED(float[32], slot);
    float v = x[threadIdx.x];
    for (int i = 0; i < rounds; ++i) {
        slot[threadIdx.x] = v;
        __syncwarp();
        v = slot[(threadIdx.x + 1) % 32] + 1;
        __syncwarp();
    }
    y[threadIdx.x] = v;
}
EXPORT(warp_exchange)

// ---- Numbers ----------------------------------------------------------------------------------------------

extern "C" __global__ void numbers(const float* x,  // [n]
                                   unsigned* y,     // [5, n]
                                   int n) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) {
        return;
    }
    y[0 * n + i] = __float_as_uint(to_float(from_float<__nv_bfloat16>(x[i])));
    y[1 * n + i] = __float_as_uint(to_float(from_float<__half>(x[i])));
    y[2 * n + i] = to_tf32(x[i]);
    y[3 * n + in_register(i)] = __float_as_uint(tanh_approx(x[i]));
    y[4 * n + i] = __float_as_uint(from_float<float>(to_float(x[i])));
}
EXPORT(numbers)

// ---- One block --------------------------------------------------------------------------------------------

// A sum over the block by shuffles, shared memory and atomics.
extern "C" __global__ void block_sum(const float* x,     // [blocks, 128]
                                     float* sum,         // [1], accumulated
                                     unsigned* count) {  // [1], accumulated
    SHARED(float[4], parts);
    DYNAMIC_SHARED(float, total);
    float v = x[blockIdx.x * 128 + threadIdx.x];
    for (int offset = 16; offset; offset /= 2) {
        v += __shfl_down_sync(0xffffffffu, v, unsigned(offset));
    }
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = v;
    }
    __syncthreads();
    if (threadIdx.x == 127) {
        total[0] = parts[0] + parts[1] + parts[2] + parts[3];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(sum, total[0]);
    }
    atomicAdd(count, 1u);
}
EXPORT(block_sum)

// Each half of the block exchanges by a barrier of its own, as often as it likes.
extern "C" __global__ void named_barriers(float* y,  // [2, 64]
                                          int rounds) {
    SHARED(float[2][64], slots);
    const int half = int(threadIdx.x) / 64, thread = int(threadIdx.x) % 64;
    float v = float(threadIdx.x);
    for (int i = 0; i < rounds * (half + 1); ++i) {
        slots[half][thread] = v;
        named_barrier_sync(unsigned(1 + half), 64);
        v = slots[half][63 - thread] + 1;
        named_barrier_sync(unsigned(1 + half), 64);
    }
    y[threadIdx.x] = v;
}
EXPORT(named_barriers)

// ---- The grid ---------------------------------------------------------------------------------------------

// Each word of 16 bytes carries three numbers and the round they belong to: no other flag, no barrier between
// blocks. A slot of round i is written again in round i + 2, which its writer only reaches when all have read
// round i.
extern "C" __global__ void flag_in_data(uint4* slots,  // [2, blocks, 32], zero
                                        unsigned* y,   // [blocks, 32]
                                        int rounds) {
    const unsigned lane = threadIdx.x;
    const unsigned blocks = gridDim.x;
    unsigned v = blockIdx.x * 32 + lane;
    for (int i = 0; i < rounds; ++i) {
        uint4* round = slots + unsigned(i % 2) * blocks * 32;
        const unsigned stamp = unsigned(i + 1);
        prefetch_l2(round);
        st_relaxed_gpu(&round[blockIdx.x * 32 + lane], make_uint4(v, v * v, v + stamp, stamp));
        for (unsigned block = 0; block < blocks; ++block) {
            uint4 word;
            do {
                word = ld_relaxed_gpu(&round[block * 32 + (lane + 1) % 32]);
            } while (word.w != stamp);
            v += word.y == word.x * word.x && word.z == word.x + stamp ? word.x : 0xdead0000u;
        }
        __syncwarp();
    }
    y[blockIdx.x * 32 + lane] = v;
}
EXPORT(flag_in_data)

// The same down a chain of blocks, in words of 8 bytes that are written once: no block waits for its consumers.
extern "C" __global__ void handed_down(uint2* words,  // [blocks, rounds, 32], zero
                                       unsigned* y,   // [blocks, 32]
                                       int rounds) {
    const unsigned lane = threadIdx.x, rank = blockIdx.x;
    unsigned sum = 0;
    for (int i = 0; i < rounds; ++i) {
        const unsigned stamp = unsigned(i + 1);
        uint2 got = make_uint2(rank * 32 + lane, stamp);
        if (rank > 0) {
            do {
                got = ld_relaxed_gpu(&words[((rank - 1) * rounds + i) * 32 + (lane + 1) % 32]);
            } while (got.y != stamp);
        }
        sum += got.x * stamp;
        st_relaxed_gpu(&words[(rank * rounds + i) * 32 + lane], make_uint2(got.x + 1, stamp));
    }
    y[rank * 32 + lane] = sum;
}
EXPORT(handed_down)

#if HOPPER
// ---- Clusters ---------------------------------------------------------------------------------------------

// The exchange of a persistent kernel: every round, each block stores its values into all blocks of its cluster, in
// words of 4 and 16 bytes, and waits until all have landed. There are two buffers: a block that is a round ahead has
// what all others stored after they had read the round before.
extern "C" __global__ void async_stores(unsigned* y,  // [blocks, 32]
                                        int peers, int rounds) {
    SHARED(uint4[2][16][16], quads);
    SHARED(unsigned[2][16][16], words);
    SHARED(Mbarrier[2], received);
    const unsigned lane = threadIdx.x, me = blockIdx.x % unsigned(peers);
    if (lane == 0) {
        mbarrier_init(&received[0], 1);
        mbarrier_init(&received[1], 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    unsigned v = blockIdx.x * 32 + lane;
    for (int i = 0; i < rounds; ++i) {
        const int buffer = i % 2;
        if (lane == 0) {
            mbarrier_arrive_expect_tx(&received[buffer], unsigned(peers) * 16 * (16 + 4));  // stores may land before
        }
        for (unsigned rank = 0; rank < unsigned(peers); ++rank) {
            if (lane < 16) {
                st_async(&quads[buffer][me][lane], make_uint4(v, v + 1, v + 2, v + 3), &received[buffer], rank);
            } else {
                st_async(&words[buffer][me][lane - 16], v, &received[buffer], rank);
            }
        }
        mbarrier_wait_cluster(&received[buffer], unsigned(i / 2) % 2);
        for (int rank = 0; rank < peers; ++rank) {
            const uint4 quad = quads[buffer][rank][lane % 16];
            v += quad.x + quad.y + quad.z + quad.w + words[buffer][rank][lane % 16];
        }
    }
    y[blockIdx.x * 32 + lane] = v;
}
EXPORT(async_stores)
#endif
