// device.cuh: the hardware in one file.
//
// Every PTX instruction of the package stands here, behind a function with a plain C++ signature; `asm`
// appears nowhere else. Each function has two bodies side by side:
//
//     PTX(...)       what NVRTC compiles for the GPU;
//     EMULATED(...)  what g++ compiles for the tests, where a CUDA thread is a fiber on the CPU (tests/cuda_emulator).
//
// One signature for both makes it impossible to have one without the other. A function with neither is
// written in terms of those that have. The host side is chosen by GPU_RNN_ON_HOST, which
// tests/cuda_emulator/language.h defines: the tests include it in front of this file, so nothing here names the tests.
//
// Rules for kernels: no inline asm; shared memory only through SHARED and DYNAMIC_SHARED; threads of
// different blocks talk only through the acquire, release and relaxed accesses below, never through
// `volatile` or __threadfence(), which neither the host runtime nor ThreadSanitizer can follow. Functions
// that stand below the line "Hopper and later" do not exist for older architectures: use them behind `#if
// HOPPER`.
//
// Pointers named `shared` are generic pointers into this block's shared memory.
#pragma once

#if GPU_RNN_ON_HOST
#define PTX(...)
#define EMULATED(...) __VA_ARGS__
#define HOPPER 1
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PTX(...) __VA_ARGS__
#define EMULATED(...)
#define HOPPER (__CUDA_ARCH__ >= 900)
#define SMEM(pointer) static_cast<unsigned>(__cvta_generic_to_shared(pointer))  // the 32-bit shared address
#endif

#define DEVICE __device__ __forceinline__

// A number or an address that stays in a register: a compiler that saves registers computes it anew at every use.
DEVICE int in_register(int x) {
    PTX(asm volatile("" : "+r"(x)));
    EMULATED();
    return x;
}
DEVICE long long in_register(long long x) {
    PTX(asm volatile("" : "+l"(x)));
    EMULATED();
    return x;
}
template <class T>
DEVICE T* in_register(T* global) {
    PTX(asm volatile("" : "+l"(global)));
    EMULATED();
    return global;
}

// ---- Kernels and shared memory ----------------------------------------------------------------------------

// EXPORT(kernel) after a kernel's definition gives Python a way to launch it on the host.
// SHARED(float[4][16], tile); declares static shared memory, 16-byte aligned. DYNAMIC_SHARED(float, arena);
// declares `float* arena`, the shared memory requested at launch, 128-byte aligned.
#if GPU_RNN_ON_HOST
#define EXPORT(kernel) HOST_ENTRY(kernel)
#define SHARED(T, name) auto& name = host::shared_variable<T>(__COUNTER__)
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(host::shared_dynamic())
#else
template <class Any>
struct SharedType {
    using type = Any;  // lets a macro declare `float[4][16] tile`
};
#define EXPORT(kernel)
#define SHARED(T, name) __shared__ __align__(16) SharedType<T>::type name
#define DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

// ---- Numbers ----------------------------------------------------------------------------------------------

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// from_float<SCALAR>(x) rounds to nearest even.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Rounds to tf32, to nearest and ties away from zero: an operand of mma_m16n8k8_tf32.
DEVICE unsigned to_tf32(float x) {
    unsigned rounded;
    PTX(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x)));
    EMULATED(rounded = host::round_to_tf32(x));
    return rounded;
}

// One instruction, absolute error about 5e-4 near 1 (PTX ISA: relative error 2^-11). The emulation's is as large.
DEVICE float tanh_approx(float x) {
    float y;
    PTX(asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)));
    EMULATED(y = __uint_as_float(host::round_to_tf32(tanhf(x))));
    return y;
}

// ---- Global memory shared between blocks ------------------------------------------------------------------

// Relaxed accesses order nothing else, but are never torn, never kept in a register or in L1: a stamp travels in
// the same word as the data it announces. They use .b64 and .b128, because PTX treats .v4.u32 as four separate
// accesses. Use all that is loaded: of a word that is used in part ptxas loads those parts one by one, torn.
DEVICE uint2 ld_relaxed_gpu(const uint2* address) {
    uint2 value;
    PTX(unsigned long long whole;
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(whole) : "l"(address) : "memory");
        value = make_uint2(static_cast<unsigned>(whole), static_cast<unsigned>(whole >> 32)));
    EMULATED(value = host::load_relaxed(address));
    return value;
}
DEVICE void st_relaxed_gpu(uint2* address, uint2 value) {
    PTX(const unsigned long long whole = value.x | static_cast<unsigned long long>(value.y) << 32;
        asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(whole) : "memory"));
    EMULATED(host::store_relaxed(address, value));
}
DEVICE uint4 ld_relaxed_gpu(const uint4* address) {
    uint4 value;
    PTX(unsigned long long low; unsigned long long high; asm volatile(
            "{\n.reg .b128 q;\nld.relaxed.gpu.global.b128 q, [%2];\nmov.b128 {%0, %1}, q;\n}" : "=l"(low),
            "=l"(high) : "l"(address) : "memory");
        value = make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32),
                           static_cast<unsigned>(high), static_cast<unsigned>(high >> 32)));
    EMULATED(value = host::load_relaxed(address));
    return value;
}
DEVICE void st_relaxed_gpu(uint4* address, uint4 value) {
    PTX(const unsigned long long low = value.x | static_cast<unsigned long long>(value.y) << 32;
        const unsigned long long high = value.z | static_cast<unsigned long long>(value.w) << 32;
        asm volatile(
            "{\n.reg .b128 q;\nmov.b128 q, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], q;\n}" ::"l"(address),
            "l"(low), "l"(high) : "memory"));
    EMULATED(host::store_relaxed(address, value));
}

// Brings the 128-byte line into L2 ahead of its use.
DEVICE void prefetch_l2(const void* address) {
    PTX(asm volatile("prefetch.global.L2 [%0];" ::"l"(address)));
    EMULATED(static_cast<void>(address));
}

// ---- The watchdog of spins --------------------------------------------------------------------------------

DEVICE unsigned globaltimer_lo() {  // nanoseconds
    unsigned now;
    PTX(asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now)));
    EMULATED(now = 0);  // where time stands still; the scheduler finds those that wait for ever
    return now;
}
DEVICE void trap() {
    PTX(asm volatile("trap;"));
    EMULATED(host::fail("trap"));
}
// Compiled with -DWATCHDOG, a wait of over two seconds ends the kernel with a trap: a hang costs one launch. One Watchdog
// for each wait; `turn` is called in each turn of its loop, and looks at the clock in few of them.
struct Watchdog {
#ifdef WATCHDOG
    unsigned turns = 0, began = 0;

    DEVICE void turn() {
        if (++turns % 256 != 0) return;
        const unsigned now = globaltimer_lo();
        if (turns == 256) began = now;
        if (static_cast<int>(now - began) > 2000000000) trap();  // not where the clock went back a little
    }
#else
    DEVICE void turn() {}
#endif
};

// ---- Barriers within a block ------------------------------------------------------------------------------

// Barriers 1 to 15 (0 is __syncthreads). Of `threads` threads, a multiple of 32. Whole warps call it together.
DEVICE void named_barrier_sync(unsigned id, unsigned threads) {
    PTX(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
    EMULATED(host::named_barrier_sync(id, threads));
}

// ---- Matmuls: the whole warp calls these ----------------------------------------------------------

// d = a b + c, a [16, 16] row-major, b [16, 8] column-major. In PTX ISA terms, with group = lane / 4 and
// pair = 2 * (lane % 4):
//   a[i] holds a[group + 8 * (i % 2)][pair + 8 * (i / 2) + {0, 1}]
//   b[i] holds b[pair + 8 * i + {0, 1}][group]
//   d[i] is d[group + 8 * (i / 2)][pair + i % 2], and c alike.
DEVICE void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2], const float c[4]) {
    PTX(
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
                     "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                     "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
    EMULATED(host::mma_m16n8k16_bf16(d, a, b, c));
}
DEVICE void mma_m16n8k16_f16(float d[4], const unsigned a[4], const unsigned b[2], const float c[4]) {
    PTX(
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
                     "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                     "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
    EMULATED(host::mma_m16n8k16_f16(d, a, b, c));
}
// a [16, 8], b [8, 8], both tf32 in 32-bit registers, with t = lane % 4:
//   a[i] is a[group + 8 * (i % 2)][t + 4 * (i / 2)];  b[i] is b[t + 4 * i][group];  c and d as above.
DEVICE void mma_m16n8k8_tf32(float d[4], const unsigned a[4], const unsigned b[2], const float c[4]) {
    PTX(
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
                     "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                     "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
    EMULATED(host::mma_m16n8k8_tf32(d, a, b, c));
}

// Loads 8 x 8 matrices of 16-bit numbers. Lane 8 * m + r gives the address of row r (16 bytes, aligned) of
// matrix m; register m of lane l then holds elements [l / 4][2 * (l % 4) + {0, 1}] of matrix m.
DEVICE void ldmatrix_x2(unsigned r[2], const void* shared) {
    PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                     "=r"(r[1]) : "r"(SMEM(shared)) : "memory"));
    EMULATED(host::ldmatrix(r, shared, 2));
}
DEVICE void ldmatrix_x4(unsigned r[4], const void* shared) {
    PTX(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                     "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(SMEM(shared)) : "memory"));
    EMULATED(host::ldmatrix(r, shared, 4));
}

// ==== Hopper and later =====================================================================================
#if HOPPER

// ---- Clusters ---------------------------------------------------------------------------------------------

// A barrier of all threads of the cluster in two halves: what is written before arriving is seen after
// waiting. Every thread alternates arrive and wait. The blocks have started then, and none exits before all arrive.
DEVICE void cluster_arrive() {
    PTX(asm volatile("barrier.cluster.arrive.release;" :: : "memory"));
    EMULATED(host::cluster_arrive());
}
DEVICE void cluster_wait() {
    PTX(asm volatile("barrier.cluster.wait.acquire;" :: : "memory"));
    EMULATED(host::cluster_wait());
}
DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// ---- Barriers in shared memory that count arrivals and bytes ----------------------------------------------

// A phase ends when `count` arrivals have come and all expected bytes have landed. The n-th phase (from 0)
// has parity n % 2, and mbarrier_wait_cluster(bar, parity) returns when the phase of that parity has ended. One
// thread initializes, fences, and a barrier (of the cluster, if peers arrive or store) tells the others.
struct alignas(8) Mbarrier {
    unsigned long long state;
};

DEVICE void mbarrier_init(Mbarrier* shared, unsigned count) {
    PTX(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SMEM(shared)), "r"(count) : "memory"));
    EMULATED(host::mbarrier_init(shared, count));
}
DEVICE void fence_mbarrier_init() {
    PTX(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
    EMULATED(host::fence_mbarrier_init());
}
// Announces `bytes` to the current phase, then arrives.
DEVICE void mbarrier_arrive_expect_tx(Mbarrier* shared, unsigned bytes) {
    PTX(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(SMEM(shared)),
                     "r"(bytes) : "memory"));
    EMULATED(host::mbarrier_arrive_expect_tx(shared, bytes));
}
// True when the phase has ended; may return false after a while, so call it in a loop, as mbarrier_wait_cluster does. Sees
// what other blocks of the cluster did before they arrived or stored.
DEVICE bool mbarrier_try_wait_cluster(Mbarrier* shared, unsigned parity) {
    unsigned done;
    PTX(asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(SMEM(shared)),
        "r"(parity) : "memory"));
    EMULATED(done = host::mbarrier_try_wait(shared, parity));
    return done != 0;
}
DEVICE void mbarrier_wait_cluster(Mbarrier* shared, unsigned parity) {
    for (Watchdog watchdog; !mbarrier_try_wait_cluster(shared, parity);) watchdog.turn();
}

// ---- Asynchronous stores ----------------------------------------------------------------------------------

// Stores `value` where block `rank` has what this block has at `shared`, and counts its bytes at that block's
// `bar`. The address is aligned to the size of the value.
DEVICE void st_async(unsigned* shared, unsigned value, Mbarrier* bar, unsigned rank) {
    PTX(asm volatile(
        "{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 bar, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %1, [bar];\n}" ::"r"(SMEM(shared)),
        "r"(value), "r"(SMEM(bar)), "r"(rank) : "memory"));
    EMULATED(host::st_async(shared, &value, sizeof value, bar, rank));
}
DEVICE void st_async(uint4* shared, uint4 value, Mbarrier* bar, unsigned rank) {
    PTX(asm volatile(
        "{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %6;\n"
        "mapa.shared::cluster.u32 bar, %5, %6;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%1, %2, %3, %4}, [bar];\n"
        "}" ::"r"(SMEM(shared)),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(SMEM(bar)), "r"(rank) : "memory"));
    EMULATED(host::st_async(shared, &value, sizeof value, bar, rank));
}

#endif  // HOPPER
