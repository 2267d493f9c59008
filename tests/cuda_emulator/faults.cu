// faults.cu: kernels that are wrong on purpose. test_cuda_emulator.py says how the runtime or a sanitizer must
// notice.

extern "C" __global__ void half_a_barrier(float* y) {  // [64]
    if (threadIdx.x < 32) {
        named_barrier_sync(3, 64);
    } else if (threadIdx.x < 60) {
        __syncwarp(0xffffffffu);
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1;
}
EXPORT(half_a_barrier)

extern "C" __global__ void nobody_sets_the_flag(const uint2* flag) {  // [1], zero
    if (threadIdx.x < 32) {
        while (ld_relaxed_gpu(flag).x == 0) {
        }
    }
    __syncthreads();
}
EXPORT(nobody_sets_the_flag)

extern "C" __global__ void endless_loop(float* y) {  // [1]
    float x = y[0];
    while (x != 1.0f) {
        x = x * 0.5f + 0.25f > 7.0f ? 1.0f : x;
    }
    y[0] = x;
}
EXPORT(endless_loop)

extern "C" __global__ void waits_for_bytes() {
    SHARED(unsigned[32], tile);
    SHARED(Mbarrier, full);
    if (threadIdx.x == 0) {
        mbarrier_init(&full, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect_tx(&full, 64);
    }
    if (threadIdx.x < 12) {
        st_async(&tile[threadIdx.x], 1, &full, 0);
    }
    mbarrier_wait_cluster(&full, 0);
}
EXPORT(waits_for_bytes)

// All blocks wait for all others.
extern "C" __global__ void needs_all_blocks(uint2* here) {  // [blocks], zero
    if (threadIdx.x == 0) {
        st_relaxed_gpu(&here[blockIdx.x], make_uint2(1, 1));
        for (unsigned block = 0; block < gridDim.x; ++block) {
            while (ld_relaxed_gpu(&here[block]).x == 0) {
            }
        }
    }
    __syncthreads();
}
EXPORT(needs_all_blocks)

extern "C" __global__ void reads_shared_memory(float* y) {  // [2, 32]
    SHARED(float[32], fixed);
    DYNAMIC_SHARED(float, requested);
    y[threadIdx.x] = fixed[threadIdx.x];
    y[32 + threadIdx.x] = requested[threadIdx.x];
}
EXPORT(reads_shared_memory)

// Needs more stack than a fiber has.
extern "C" __global__ void large_frame(float* y) {  // [64]
    float large[20 << 10];
    for (int i = 0; i < 20 << 10; ++i) {
        large[i] = y[i % 64];
    }
    __syncthreads();
    y[threadIdx.x] = large[int(y[0]) % (20 << 10)];
}
EXPORT(large_frame)

// 0 and 1 wild addresses, 2 division by zero, 3 a trap, and misuse of the hardware.
extern "C" __global__ void fault(int kind, float* y) {
    SHARED(float[64], tile);
    SHARED(Mbarrier, bar);
    unsigned registers[4];
    switch (kind) {
        case 0: y[1ll << 44] = 1; break;
        case 1: *reinterpret_cast<float*>(8) = 1; break;
        case 2: y[0] = float(7 / int(blockIdx.x)); break;
        case 3: trap(); break;
        case 4: named_barrier_sync(1, 40); break;
        case 5: named_barrier_sync(1, threadIdx.x < 32 ? 64 : 32); break;
        case 6: cluster_wait(); break;
        case 7:
            cluster_arrive();
            cluster_arrive();
            break;
        case 8: mbarrier_arrive_expect_tx(&bar, 4); break;
        case 9:
            if (threadIdx.x == 0) {
                mbarrier_init(&bar, 1);
                mbarrier_arrive_expect_tx(&bar, 4);
                mbarrier_arrive_expect_tx(&bar, 4);
            }
            break;
        case 10: ldmatrix_x2(registers, tile + 1); break;
        case 11: ldmatrix_x2(registers, y); break;
        case 12: st_async(reinterpret_cast<uint4*>(tile + 1), make_uint4(0, 0, 0, 0), &bar, 0); break;
        case 13: st_async(reinterpret_cast<unsigned*>(tile), 0, &bar, 5); break;
        case 14: y[0] = __shfl_sync(threadIdx.x % 32 < 8 ? 0xffu : 0xffffff00u, 1.0f, 9); break;
        case 15: y[0] = __shfl_sync(0x1u, 1.0f, 0); break;
        case 16:
            if (threadIdx.x == 63) {
                mbarrier_init(&bar, 1);
                mbarrier_arrive_expect_tx(&bar, 64);
                st_async(reinterpret_cast<unsigned*>(tile), 0, &bar, 0);
            }
            break;
        case 17:
            if (threadIdx.x % 32 > 3) {
                ldmatrix_x2(registers, tile);
            }
            break;
    }
}
EXPORT(fault)

// For the sanitizers: the values come out right, or are not looked at.
extern "C" __global__ void overrun(int kind, float* y) {  // [64]
    SHARED(float[32], left);
    SHARED(float[32], right);
    DYNAMIC_SHARED(float, requested);
    left[threadIdx.x % 32] = right[threadIdx.x % 32] = requested[threadIdx.x % 32] = 0;
    switch (kind) {
        case 0: y[threadIdx.x] = left[threadIdx.x]; break;
        case 1: y[threadIdx.x] = requested[threadIdx.x]; break;
        case 2: y[threadIdx.x + 1] = 1; break;
        case 3: *reinterpret_cast<float4*>(y + 1) = make_float4(1, 2, 3, 4); break;
        case 4: y[0] = float(1 << (threadIdx.x + 1)); break;
    }
}
EXPORT(overrun)
