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

// Loads the same four 8 x 8 matrices in all six ways.
extern "C" __global__ void ldmatrix(const uint4* matrices,  // [32 rows of 8 16-bit numbers]
                                    unsigned* fragments) {  // [6, 32 lanes, 4]
    SHARED(uint4[32], rows);
    const unsigned lane = threadIdx.x;
    rows[lane] = matrices[lane];
    __syncwarp();
    unsigned* mine = fragments + 4 * lane;
    ldmatrix_x1(mine, &rows[lane % 8]);
    ldmatrix_x2(mine + 128, &rows[lane % 16]);
    ldmatrix_x4(mine + 256, &rows[lane]);
    ldmatrix_x1_trans(mine + 384, &rows[lane % 8]);
    ldmatrix_x2_trans(mine + 512, &rows[lane % 16]);
    ldmatrix_x4_trans(mine + 640, &rows[lane]);
}
EXPORT(ldmatrix)

extern "C" __global__ void movmatrix(const unsigned* fragment,  // [32]
                                     unsigned* transposed) {    // [32]
    transposed[threadIdx.x] = movmatrix_trans(fragment[threadIdx.x]);
}
EXPORT(movmatrix)

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
                                   unsigned* y,     // [8, n]
                                   int n) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) {
        return;
    }
    const float2 f16 = unpack_f16(pack_f16(x[i], -x[i]));
    const float2 bf16 = unpack_bf16(pack_bf16(x[i], -x[i]));
    y[0 * n + i] = pack_bf16(x[i], -x[i]);
    y[1 * n + i] = pack_f16(x[i], -x[i]);
    y[2 * n + i] = to_tf32(x[i]);
    y[3 * n + i] = __float_as_uint(to_float(from_float<__nv_bfloat16>(x[i])) - bf16.x);
    y[4 * n + i] = __float_as_uint(to_float(from_float<__half>(x[i])) - f16.x);
    y[5 * n + i] = __float_as_uint(tanh_approx(x[i]));
    y[6 * n + i] = __float_as_uint(exp2_approx(x[i]));
    y[7 * n + i] = __float_as_uint(from_float<float>(to_float(x[i])) + (bf16.x + bf16.y) + (f16.x + f16.y));
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

// Two warps produce, two consume, through one buffer: barrier 1 says full, barrier 2 says empty.
extern "C" __global__ void named_barriers(float* y,  // [64]
                                          int rounds) {
    SHARED(float[64], buffer);
    const int thread = int(threadIdx.x) % 64;
    if (threadIdx.x < 64) {
        for (int i = 0; i < rounds; ++i) {
            if (i > 0) {
                named_barrier_sync(2, 128);
            }
            buffer[thread] = float(i * 100 + thread);
            named_barrier_arrive(1, 128);
        }
    } else {
        float sum = 0;
        for (int i = 0; i < rounds; ++i) {
            named_barrier_sync(1, 128);
            sum += buffer[63 - thread];
            if (i + 1 < rounds) {
                named_barrier_arrive(2, 128);
            }
        }
        y[thread] = sum;
    }
}
EXPORT(named_barriers)

// Tiles stream through two buffers; the next is on its way while this one is summed up.
extern "C" __global__ void cp_async(const float* x,  // [tiles, 128, 4]
                                    float* y,        // [128]
                                    int tiles) {
    SHARED(float[2][128 * 4], buffers);
    const int thread = int(threadIdx.x);
    float sum = 0;
    for (int tile = -1; tile < tiles; ++tile) {
        if (tile + 1 < tiles) {
            float* to = &buffers[(tile + 1) % 2][thread * 4];
            cp_async_16(to, x + ((tile + 1) * 128 + thread) * 4);
        }
        cp_async_commit();
        if (tile >= 0) {
            cp_async_wait<1>();
            __syncthreads();
            sum += buffers[tile % 2][(thread * 4 + 5) % 512];
            __syncthreads();
        }
    }
    y[thread] = sum;
}
EXPORT(cp_async)

// The smaller sizes, and the zeros beyond a ragged edge of n numbers.
extern "C" __global__ void cp_async_sizes(const float* x,  // [n], aligned to 16 bytes
                                          float* y,        // [3, 128]
                                          int n) {
    SHARED(float[3][128], tiles);
    const int thread = int(threadIdx.x);
    cp_async_4(&tiles[0][thread], x + thread);
    if (thread < 64) {
        cp_async_8(&tiles[1][2 * thread], x + 2 * thread);
    }
    if (thread < 32) {
        const int left = max(0, min(4, n - 4 * thread));
        cp_async_16_zfill(&tiles[2][4 * thread], left ? x + 4 * thread : x, unsigned(left) * 4);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 3; ++i) {
        y[i * 128 + thread] = tiles[i][127 - thread];
    }
}
EXPORT(cp_async_sizes)

// ---- The grid ---------------------------------------------------------------------------------------------

// Each round, every block reads what its right neighbour wrote in the round before.
extern "C" __global__ void grid_exchange(float* x,            // [2, blocks, 64]; [0] is the input
                                         unsigned* arrivals,  // [1], zero
                                         int rounds) {
    const unsigned size = gridDim.x * 64;
    const unsigned own = blockIdx.x * 64 + threadIdx.x;
    const unsigned from = (blockIdx.x + 1) % gridDim.x * 64 + 63 - threadIdx.x;
    for (int i = 0; i < rounds; ++i) {
        const float* before = x + i % 2 * size;
        float* after = x + (i + 1) % 2 * size;
        __stcg(&after[own], __ldcg(&before[from]) + 1.0f);
        grid_barrier(arrivals, gridDim.x * unsigned(i + 1));
    }
}
EXPORT(grid_exchange)

// A ring of blocks hands a message on, each block when its flag says so.
extern "C" __global__ void flags(unsigned* message,  // [blocks + 1, 32]; [0] is the input
                                 unsigned* ready,    // [blocks + 1]; [0] is 1, the others 0
                                 unsigned* order) {  // [1], zero
    const unsigned block = blockIdx.x;
    if (threadIdx.x == 0) {
        while (ld_acquire_gpu(&ready[block]) == 0) {
        }
        if (atom_add_acq_rel_gpu(order, 1) != block) {
            __trap();
        }
    }
    __syncthreads();
    message[(block + 1) * 32 + threadIdx.x] = message[block * 32 + threadIdx.x] + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        st_release_gpu(&ready[block + 1], 1);
    }
}
EXPORT(flags)

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

// The same down a chain of blocks, in words of 8 bytes that are written once: nobody waits for who reads him.
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

// One word that the blocks count up in turn.
extern "C" __global__ void relaxed_words(unsigned* turn,  // [1], zero
                                         unsigned* y) {   // [blocks]
    unsigned seen;
    do {
        seen = ld_relaxed_gpu(turn);
    } while (seen != blockIdx.x);
    y[blockIdx.x] = seen;
    st_relaxed_gpu(turn, seen + 1);
}
EXPORT(relaxed_words)

#if HOPPER
// ---- Clusters ---------------------------------------------------------------------------------------------

// Each block publishes its row and reads that of every peer.
extern "C" __global__ void cluster_exchange(float* y) {  // [blocks, 64]
    SHARED(float[64], row);
    row[threadIdx.x] = float(blockIdx.x * 64 + threadIdx.x);
    cluster_sync();
    float sum = 1000.0f * float(cluster_rank());
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
        sum += map_shared_rank(row, rank)[63 - threadIdx.x];
    }
    y[blockIdx.x * 64 + threadIdx.x] = sum;
    cluster_sync();  // no block exits while a peer reads its row
}
EXPORT(cluster_exchange)

// The two halves of the barrier, with work of one's own in between. The first time it only says that all have
// started.
extern "C" __global__ void cluster_split(float* y,  // [blocks, 64]
                                         int rounds) {
    SHARED(float[64], row);
    const unsigned right = (cluster_rank() + 1) % cluster_size();
    cluster_arrive_relaxed();
    cluster_wait();
    const float* neighbour = map_shared_rank(row, right);
    float v = float(blockIdx.x * 64 + threadIdx.x);
    for (int i = 0; i < rounds; ++i) {
        row[threadIdx.x] = v;
        cluster_arrive();
        float own = 0;
        for (int k = 0; k < 4; ++k) {
            own += float(k);
        }
        cluster_wait();
        v = neighbour[(threadIdx.x + 1) % 64] + own;
        cluster_arrive();
        cluster_wait();
    }
    y[blockIdx.x * 64 + threadIdx.x] = v;
}
EXPORT(cluster_split)

// The exchange of a resident kernel: every round, each block stores its values into all peers, in words of 4,
// 8 and 16 bytes; a block waits until all have landed, reads them, and tells the peers that its buffer is
// free again.
extern "C" __global__ void async_stores(unsigned* y,  // [blocks, 32]
                                        int rounds) {
    SHARED(uint4[16][8], quads);
    SHARED(uint2[16][8], pairs);
    SHARED(unsigned[16][8], words);
    SHARED(Mbarrier, full);
    SHARED(Mbarrier, empty);
    const unsigned lane = threadIdx.x;
    const unsigned peers = cluster_size();
    const unsigned me = cluster_rank();
    if (lane == 0) {
        mbarrier_init(&full, 1);
        mbarrier_init(&empty, peers);
        fence_mbarrier_init();
    }
    cluster_sync();
    unsigned v = blockIdx.x * 32 + lane;
    for (int i = 0; i < rounds; ++i) {
        const unsigned parity = unsigned(i) % 2;
        if (lane == 0) {
            mbarrier_arrive_expect_tx(&full, peers * 8 * (16 + 8 + 4));  // stores may land before, or after
        }
        for (unsigned rank = 0; rank < peers; ++rank) {
            if (lane < 8) {
                st_async(&quads[me][lane], make_uint4(v, v + 1, v + 2, v + 3), &full, rank);
            } else if (lane < 16) {
                st_async(&pairs[me][lane - 8], make_uint2(v, v + 1), &full, rank);
            } else if (lane < 24) {
                st_async(&words[me][lane - 16], v, &full, rank);
            }
        }
        mbarrier_wait_cluster(&full, parity);
        for (unsigned rank = 0; rank < peers; ++rank) {
            const uint4 quad = quads[rank][lane % 8];
            const uint2 pair = pairs[rank][lane % 8];
            v += quad.x + quad.y + quad.z + quad.w + pair.x + pair.y + words[rank][lane % 8];
        }
        __syncwarp();
        if (lane < peers) {
            mbarrier_arrive_cluster(&empty, lane);
        }
        mbarrier_wait_cluster(&empty, parity);  // in the end: no peer will touch this block again
    }
    y[blockIdx.x * 32 + lane] = v;
}
EXPORT(async_stores)

// The same with bulk copies from the block's own shared memory, which pass through the async proxy.
extern "C" __global__ void bulk_to_cluster(float* y,  // [blocks, 64]
                                           int rounds) {
    SHARED(float[64], outgoing);
    SHARED(float[16][64], incoming);
    SHARED(Mbarrier, full);
    const unsigned thread = threadIdx.x;
    const unsigned peers = cluster_size();
    if (thread == 0) {
        mbarrier_init(&full, 1);
        fence_mbarrier_init();
    }
    cluster_sync();
    float v = float(blockIdx.x * 64 + thread);
    for (int i = 0; i < rounds; ++i) {
        outgoing[63 - thread] = v;
        fence_proxy_async();
        __syncthreads();
        if (thread == 0) {
            mbarrier_arrive_expect_tx(&full, peers * 256);
            for (unsigned rank = 0; rank < peers; ++rank) {
                bulk_copy_to_cluster(incoming[cluster_rank()], outgoing, 256, &full, rank);
            }
        }
        mbarrier_wait_cluster(&full, unsigned(i) % 2);
        for (unsigned rank = 0; rank < peers; ++rank) {
            v += 0.125f * incoming[rank][thread];
        }
        cluster_sync();
    }
    y[blockIdx.x * 64 + thread] = v;
}
EXPORT(bulk_to_cluster)

// A pipeline of two stages: one thread loads tiles, the others use them and say when a stage is empty. The
// sums leave by a bulk copy, too.
extern "C" __global__ void bulk_copies(const float* x,  // [tiles, 512]
                                       float* y,        // [128]
                                       int tiles) {
    SHARED(float[2][512], stages);
    SHARED(float[128], sums);
    SHARED(Mbarrier[2], full);
    SHARED(Mbarrier[2], empty);
    const int thread = int(threadIdx.x);
    if (thread == 0) {
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(&full[stage], 1);
            mbarrier_init(&empty[stage], 128);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (thread >= 128) {
        for (int i = 0; thread == 128 && i < tiles; ++i) {
            const int stage = i % 2;
            if (i >= 2) {
                mbarrier_wait(&empty[stage], unsigned(i / 2 - 1) % 2);
            }
            mbarrier_expect_tx(&full[stage], 1024);
            mbarrier_arrive_expect_tx(&full[stage], 1024);
            bulk_copy_to_shared(stages[stage], x + i * 512, 1024, &full[stage]);
            bulk_copy_to_shared(stages[stage] + 256, x + i * 512 + 256, 1024, &full[stage]);
        }
        return;
    }
    float sum = 0;
    for (int i = 0; i < tiles; ++i) {
        mbarrier_wait(&full[i % 2], unsigned(i / 2) % 2);
        for (int j = thread; j < 512; j += 128) {
            sum += stages[i % 2][j];
        }
        mbarrier_arrive(&empty[i % 2]);
    }
    sums[thread] = sum;
    fence_proxy_async();
    named_barrier_sync(1, 128);
    if (thread == 0) {
        bulk_copy_to_global(y, sums, 512);
        bulk_commit();
        bulk_wait_read<0>();
        sums[0] = -1;  // read already: too late to spoil it
    }
}
EXPORT(bulk_copies)
#endif
