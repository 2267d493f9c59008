// language.h: CUDA C++ as a kernel sees it, for g++ -std=c++20. Included in front of every kernel source.
//
// First the entry points of the runtime that the emulations in device.cuh call (namespace host), then the
// language: launch variables, barriers, shuffles, atomics, 16-bit floats, intrinsics. Only what kernels may
// use is here: volatile tricks, __threadfence() and cooperative groups are left out on purpose (see
// device.cuh).
//
// A thread is a fiber, and fibers switch only inside the runtime: at barriers and collectives, at atomics and
// polls, and, for a preempting schedule, at any basic block (g++ calls __sanitizer_cov_trace_pc there). The
// inline functions below that touch memory do so in one basic block, so they are atomic; they stand here and
// not in the runtime so that ThreadSanitizer instruments them as what they are. All are __forceinline__, so
// that the runtime is called from the kernel itself: its return address is the place that an error message
// names.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define GPU_RNN_ON_HOST 1
#define __CUDA_ARCH__ 900  // the emulations cover Hopper

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- Types ------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define HOST_VECTOR(scalar, prefix)                                                                     \
    struct alignas(sizeof(scalar) * 2) prefix##2 { scalar x, y; };                                      \
    struct alignas(sizeof(scalar) * 4 > 16 ? 16 : sizeof(scalar) * 4) prefix##4 { scalar x, y, z, w; }; \
    __forceinline__ prefix##2 make_##prefix##2(scalar x, scalar y) { return {x, y}; }                   \
    __forceinline__ prefix##4 make_##prefix##4(scalar x, scalar y, scalar z, scalar w) {                \
        return {x, y, z, w};                                                                            \
    }
HOST_VECTOR(float, float)
HOST_VECTOR(double, double)
HOST_VECTOR(int, int)
HOST_VECTOR(unsigned, uint)
#undef HOST_VECTOR

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

struct Mbarrier;  // defined in device.cuh: 8 bytes that the runtime alone reads

// ---- The runtime behind the emulations --------------------------------------------------------------------

namespace host {

// What a kernel may know of its own thread. The runtime's Fiber continues this.
struct Thread {
    dim3 thread_index, block_index;
};
extern Thread* running;
extern dim3 block_dim, grid_dim;
extern int without;  // the barrier that mutate.switchable removes in this launch; -1: none

// scheduler.cpp
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void maybe_preempt();                            // a good moment to switch, if the schedule wants to
void poll(const void* address, unsigned bytes);  // others run before this thread looks at the address
void block_barrier();
void named_barrier_sync(unsigned id, unsigned threads);
void cluster_arrive();
void cluster_wait();
void* shared_static(int id, size_t bytes, size_t alignment);  // the same offset in every block
unsigned char* shared_dynamic();

// collectives.cpp
enum class Shuffle { index, exclusive_or, down, up };
uint64_t shuffle(unsigned mask, uint64_t value, Shuffle kind, int argument, int width);
unsigned ballot(unsigned mask, bool predicate);
enum class Reduce { add, minimum, maximum, bit_xor };
unsigned reduce(unsigned mask, unsigned value, Reduce kind, bool is_signed);
void warp_barrier(unsigned mask);
void mma_m16n8k16_bf16(float* d, const unsigned* a, const unsigned* b, const float* c);
void mma_m16n8k16_f16(float* d, const unsigned* a, const unsigned* b, const float* c);
void mma_m16n8k8_tf32(float* d, const unsigned* a, const unsigned* b, const float* c);
void ldmatrix(unsigned* registers, const void* row, int matrices);

// copies.cpp
void mbarrier_init(Mbarrier* bar, unsigned count);
void fence_mbarrier_init();
void mbarrier_arrive_expect_tx(Mbarrier* bar, unsigned bytes);
bool mbarrier_try_wait(Mbarrier* bar, unsigned parity);
void st_async(void* shared, const void* value, unsigned bytes, Mbarrier* bar, unsigned rank);

// ---- Small emulations that need no runtime ----

template <class To, class From>
__forceinline__ To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T>
__forceinline__ T& shared_variable(int id) {
    return *static_cast<T*>(shared_static(id, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)));
}
__forceinline__ unsigned pack(uint16_t low, uint16_t high) { return low | unsigned(high) << 16; }

__forceinline__ unsigned round_to_tf32(float x) {
    const auto bits = bit_cast<unsigned>(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    // Half a unit in the last place more, and cut: ties go away from zero.
    return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

__forceinline__ uint2 load_relaxed(const uint2* address) {
    poll(address, sizeof *address);
    const uint64_t whole = __atomic_load_n(reinterpret_cast<const uint64_t*>(address), __ATOMIC_RELAXED);
    return {unsigned(whole), unsigned(whole >> 32)};
}
__forceinline__ uint4 load_relaxed(const uint4* address) {
    poll(address, sizeof *address);
    const auto* halves = reinterpret_cast<const uint64_t*>(address);
    const uint64_t low = __atomic_load_n(halves, __ATOMIC_RELAXED);
    const uint64_t high = __atomic_load_n(halves + 1, __ATOMIC_RELAXED);
    return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
}
__forceinline__ void store_relaxed(uint2* address, uint2 value) {
    maybe_preempt();
    __atomic_store_n(reinterpret_cast<uint64_t*>(address), value.x | uint64_t(value.y) << 32, __ATOMIC_RELAXED);
}
__forceinline__ void store_relaxed(uint4* address, uint4 value) {
    maybe_preempt();
    auto* halves = reinterpret_cast<uint64_t*>(address);
    __atomic_store_n(halves, value.x | uint64_t(value.y) << 32, __ATOMIC_RELAXED);
    __atomic_store_n(halves + 1, value.z | uint64_t(value.w) << 32, __ATOMIC_RELAXED);
}

// ---- Launch ----

// Describes one kernel parameter to Python: p pointer, f floating, i signed, u unsigned, s anything else by
// value.
struct Parameter {
    char kind;
    unsigned bytes;
};
template <class T>
constexpr Parameter describe() {
    if constexpr (std::is_pointer_v<T>)
        return {'p', sizeof(T)};
    else if constexpr (std::is_floating_point_v<T>)
        return {'f', sizeof(T)};
    else if constexpr (std::is_integral_v<T>)
        return {std::is_signed_v<T> ? 'i' : 'u', sizeof(T)};
    else
        return {'s', sizeof(T)};
}

struct Plan {  // runtime.py has the same fields
    unsigned grid[3], block[3], cluster[3];
    unsigned resident_blocks;  // how many blocks the device holds at once
    uint64_t shared_bytes;
    uint64_t seed;
    uint64_t max_switches;
    unsigned preempt_permille;  // how many of 1000 basic blocks end in a switch
    int without;                // a barrier to leave out, or -1
};
int launch(void (*kernel)(void* context), void* context, const Plan& plan);

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void** arguments;  // as for cuLaunchKernel: the address of each

    static void run(void* context) {
        const auto* call = static_cast<Call*>(context);
        call->apply(std::index_sequence_for<Parameters...>{});
    }
    template <size_t... index>
    void apply(std::index_sequence<index...>) const {
        kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[index])...);
    }
};
template <class... Parameters>
int launch_kernel(void (*kernel)(Parameters...), void** arguments, const Plan& plan) {
    Call<Parameters...> call{kernel, arguments};
    return launch(Call<Parameters...>::run, &call, plan);
}
template <class... Parameters>
unsigned describe_kernel(void (*)(Parameters...), Parameter* described) {
    const Parameter all[] = {describe<std::remove_cv_t<Parameters>>()..., {}};
    std::memcpy(described, all, sizeof...(Parameters) * sizeof(Parameter));
    return sizeof...(Parameters);
}

}  // namespace host

#define HOST_ENTRY(kernel)                                                                             \
    extern "C" __attribute__((visibility("default"))) int host_launch_##kernel(const host::Plan* plan, \
                                                                               void** arguments) {     \
        return host::launch_kernel(kernel, arguments, *plan);                                          \
    }                                                                                                  \
    extern "C" __attribute__((visibility("default"))) unsigned host_describe_##kernel(                 \
        host::Parameter* out) {                                                                        \
        return host::describe_kernel(kernel, out);                                                     \
    }

// ---- The language -----------------------------------------------------------------------------------------

#define threadIdx (host::running->thread_index)
#define blockIdx (host::running->block_index)
#define blockDim (host::block_dim)
#define gridDim (host::grid_dim)

__forceinline__ void __syncthreads() { host::block_barrier(); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { host::warp_barrier(mask); }
[[noreturn]] __forceinline__ void __trap() { host::fail("__trap()"); }

// ---- 16-bit floats ----

__forceinline__ float __bfloat162float(__nv_bfloat16 x) {
    return host::bit_cast<float>(uint32_t(x.bits) << 16);
}
__forceinline__ __nv_bfloat16 __float2bfloat16_rn(float x) {
    const auto bits = host::bit_cast<uint32_t>(x);
    const uint32_t to_even = 0x7fff + (bits >> 16 & 1);
    return {uint16_t(x != x ? 0x7fff : (bits + to_even) >> 16)};
}
__forceinline__ float __half2float(__half x) { return float(host::bit_cast<_Float16>(x.bits)); }
__forceinline__ __half __float2half_rn(float x) {
    return {x != x ? uint16_t(0x7fff) : host::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

// ---- Intrinsics ----

__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ unsigned __float_as_uint(float x) { return host::bit_cast<unsigned>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return host::bit_cast<float>(x); }
__forceinline__ int min(int a, int b) { return b < a ? b : a; }
__forceinline__ int max(int a, int b) { return a < b ? b : a; }
__forceinline__ unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
__forceinline__ unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }

// Loads and stores with a cache hint: the hint matters to speed alone. None of them may be polled in a loop.
#define HOST_LOAD(name)                  \
    template <class T>                   \
    __forceinline__ T name(const T* p) { \
        return *p;                       \
    }
#define HOST_STORE(name)                                             \
    template <class T>                                               \
    __forceinline__ void name(T* p, std::type_identity_t<T> value) { \
        *p = value;                                                  \
    }
HOST_LOAD(__ldg)
HOST_LOAD(__ldcg)
HOST_LOAD(__ldca)
HOST_LOAD(__ldcs)
HOST_LOAD(__ldlu)
HOST_STORE(__stcg)
HOST_STORE(__stcs)
HOST_STORE(__stwb)
HOST_STORE(__stwt)
#undef HOST_LOAD
#undef HOST_STORE

// ---- Atomics: relaxed, as in CUDA. Each is a poll, so that a loop around one lets other threads run. ----

namespace host {
template <class T, class Update>
__forceinline__ T read_modify_write(T* address, Update update) {
    using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    static_assert(sizeof(T) == sizeof(Word));
    poll(address, sizeof *address);
    auto* word = reinterpret_cast<Word*>(address);
    Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &before, bit_cast<Word>(T(update(bit_cast<T>(before)))), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return bit_cast<T>(before);
}
}  // namespace host

#define HOST_ATOMIC(name, result)                                                  \
    template <class T>                                                             \
    __forceinline__ T name(T* address, std::type_identity_t<T> value) {            \
        return host::read_modify_write(address, [=](T before) { return result; }); \
    }
HOST_ATOMIC(atomicAdd, before + value)
HOST_ATOMIC(atomicSub, before - value)
HOST_ATOMIC(atomicMin, value < before ? value : before)
HOST_ATOMIC(atomicMax, before < value ? value : before)
HOST_ATOMIC(atomicAnd, before& value)
HOST_ATOMIC(atomicOr, before | value)
HOST_ATOMIC(atomicXor, before ^ value)
HOST_ATOMIC(atomicExch, (static_cast<void>(before), value))
#undef HOST_ATOMIC
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return host::read_modify_write(address, [=](T before) { return before == expected ? value : before; });
}

// ---- Warp shuffles and votes ----

namespace host {
template <class T>
__forceinline__ T shuffle_value(unsigned mask, T value, Shuffle kind, int argument, int width) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    word = shuffle(mask, word, kind, argument, width);
    std::memcpy(&value, &word, sizeof value);
    return value;
}
}  // namespace host

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return host::shuffle_value(mask, value, host::Shuffle::index, lane, width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return host::shuffle_value(mask, value, host::Shuffle::exclusive_or, lanes, width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return host::shuffle_value(mask, value, host::Shuffle::down, int(by), width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return host::shuffle_value(mask, value, host::Shuffle::up, int(by), width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) { return host::ballot(mask, predicate); }
__forceinline__ int __any_sync(unsigned mask, int predicate) { return host::ballot(mask, predicate) != 0; }
__forceinline__ int __all_sync(unsigned mask, int predicate) { return host::ballot(mask, !predicate) == 0; }

__forceinline__ unsigned __reduce_add_sync(unsigned mask, unsigned v) {
    return host::reduce(mask, v, host::Reduce::add, false);
}
__forceinline__ unsigned __reduce_min_sync(unsigned mask, unsigned v) {
    return host::reduce(mask, v, host::Reduce::minimum, false);
}
__forceinline__ unsigned __reduce_max_sync(unsigned mask, unsigned v) {
    return host::reduce(mask, v, host::Reduce::maximum, false);
}
__forceinline__ int __reduce_add_sync(unsigned mask, int v) {
    return int(host::reduce(mask, unsigned(v), host::Reduce::add, true));
}
__forceinline__ int __reduce_min_sync(unsigned mask, int v) {
    return int(host::reduce(mask, unsigned(v), host::Reduce::minimum, true));
}
__forceinline__ int __reduce_max_sync(unsigned mask, int v) {
    return int(host::reduce(mask, unsigned(v), host::Reduce::maximum, true));
}
__forceinline__ unsigned __reduce_xor_sync(unsigned mask, unsigned v) {
    return host::reduce(mask, v, host::Reduce::bit_xor, false);
}
