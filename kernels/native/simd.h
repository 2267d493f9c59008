// simd.h: vectors of `scalar` as wide as the CPU's registers, and the functions of a cell on them.
//
// Compiled with -D: SCALAR (float or double), VECTOR_BYTES, REGISTERS (kernels/native/isa.py says which). A lane is a
// hidden unit. No operation adds up lanes, and multiplications are fused with additions only where `fma` says so
// (-ffp-contract=off), so a value is the same bits whatever tile, batch or thread it is computed in.
//
// exp, sigmoid, tanh, log and rsqrt are right to 4 ulp for all finite arguments, denormal results included; infinities
// give the limits and NaN stays NaN. Their polynomials are Taylor series on intervals so short that these suffice.
#include <stdint.h>
#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__clang__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#define DEVICE __attribute__((always_inline)) inline

typedef SCALAR scalar;
typedef int64_t Index;
constexpr int V = VECTOR_BYTES / sizeof(scalar);
constexpr bool DOUBLE = sizeof(scalar) == 8;

template <int BYTES> struct Integer;
template <> struct Integer<4> { typedef int32_t type; };
template <> struct Integer<8> { typedef int64_t type; };
typedef Integer<sizeof(scalar)>::type integer;
typedef scalar vec __attribute__((vector_size(VECTOR_BYTES)));
typedef integer ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t words __attribute__((vector_size(VECTOR_BYTES)));
constexpr int WORDS = VECTOR_BYTES / 8;
typedef scalar unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(scalar))));

// ---- What each instruction set has a word for -----------------------------------------------------------------------

// Fused multiply-addition a * b + c, the square root, and the larger or smaller one of a limit and what may be NaN, which
// stays; and the products, of 64 bits, of the lower halves of words. GCC's are builtins: to parse <immintrin.h> would take as
// long as to compile the rest of a cell.

DEVICE vec all(scalar a) { return a - vec{}; }  // which is a, -0 too: one load that fills all lanes

#if VECTOR_BYTES == 64 && defined(__clang__)
DEVICE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
DEVICE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
DEVICE __m512 square_root(__m512 a) { return _mm512_sqrt_ps(a); }
DEVICE __m512d square_root(__m512d a) { return _mm512_sqrt_pd(a); }
DEVICE __m512 at_least(__m512 limit, __m512 a) { return _mm512_max_ps(limit, a); }
DEVICE __m512d at_least(__m512d limit, __m512d a) { return _mm512_max_pd(limit, a); }
DEVICE __m512 at_most(__m512 limit, __m512 a) { return _mm512_min_ps(limit, a); }
DEVICE __m512d at_most(__m512d limit, __m512d a) { return _mm512_min_pd(limit, a); }
DEVICE words product(words a, words b) { return (words)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif VECTOR_BYTES == 64
constexpr int ROUND = 4;  // as the thread's setting says, to nearest
typedef float floats __attribute__((vector_size(64)));
typedef double doubles __attribute__((vector_size(64)));
DEVICE floats fma(floats a, floats b, floats c) { return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, ROUND); }
DEVICE doubles fma(doubles a, doubles b, doubles c) { return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, ROUND); }
DEVICE floats square_root(floats a) { return __builtin_ia32_sqrtps512_mask(a, a, -1, ROUND); }
DEVICE doubles square_root(doubles a) { return __builtin_ia32_sqrtpd512_mask(a, a, -1, ROUND); }
DEVICE floats at_least(floats limit, floats a) { return __builtin_ia32_maxps512_mask(limit, a, a, -1, ROUND); }
DEVICE doubles at_least(doubles limit, doubles a) { return __builtin_ia32_maxpd512_mask(limit, a, a, -1, ROUND); }
DEVICE floats at_most(floats limit, floats a) { return __builtin_ia32_minps512_mask(limit, a, a, -1, ROUND); }
DEVICE doubles at_most(doubles limit, doubles a) { return __builtin_ia32_minpd512_mask(limit, a, a, -1, ROUND); }
typedef int halves __attribute__((vector_size(64)));
DEVICE words product(words a, words b) { return (words)__builtin_ia32_pmuludq512_mask((halves)a, (halves)b, {}, -1); }
#elif VECTOR_BYTES == 32 && defined(__clang__)
DEVICE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
DEVICE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
DEVICE __m256 square_root(__m256 a) { return _mm256_sqrt_ps(a); }
DEVICE __m256d square_root(__m256d a) { return _mm256_sqrt_pd(a); }
DEVICE __m256 at_least(__m256 limit, __m256 a) { return _mm256_max_ps(limit, a); }
DEVICE __m256d at_least(__m256d limit, __m256d a) { return _mm256_max_pd(limit, a); }
DEVICE __m256 at_most(__m256 limit, __m256 a) { return _mm256_min_ps(limit, a); }
DEVICE __m256d at_most(__m256d limit, __m256d a) { return _mm256_min_pd(limit, a); }
DEVICE words product(words a, words b) { return (words)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif VECTOR_BYTES == 32
typedef float floats __attribute__((vector_size(32)));
typedef double doubles __attribute__((vector_size(32)));
DEVICE floats fma(floats a, floats b, floats c) { return __builtin_ia32_vfmaddps256(a, b, c); }
DEVICE doubles fma(doubles a, doubles b, doubles c) { return __builtin_ia32_vfmaddpd256(a, b, c); }
DEVICE floats square_root(floats a) { return __builtin_ia32_sqrtps256(a); }
DEVICE doubles square_root(doubles a) { return __builtin_ia32_sqrtpd256(a); }
DEVICE floats at_least(floats limit, floats a) { return __builtin_ia32_maxps256(limit, a); }
DEVICE doubles at_least(doubles limit, doubles a) { return __builtin_ia32_maxpd256(limit, a); }
DEVICE floats at_most(floats limit, floats a) { return __builtin_ia32_minps256(limit, a); }
DEVICE doubles at_most(doubles limit, doubles a) { return __builtin_ia32_minpd256(limit, a); }
typedef int halves __attribute__((vector_size(32)));
DEVICE words product(words a, words b) { return (words)__builtin_ia32_pmuludq256((halves)a, (halves)b); }
#elif defined(__ARM_NEON)
DEVICE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
DEVICE float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
DEVICE float32x4_t square_root(float32x4_t a) { return vsqrtq_f32(a); }
DEVICE float64x2_t square_root(float64x2_t a) { return vsqrtq_f64(a); }
DEVICE vec at_least(vec limit, vec a) { return a < limit ? limit : a; }
DEVICE vec at_most(vec limit, vec a) { return a > limit ? limit : a; }
DEVICE words product(words a, words b) { return (words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b)); }
#else
DEVICE vec fma(vec a, vec b, vec c) { return a * b + c; }
DEVICE vec square_root(vec a) {
    for (int i = 0; i < V; ++i) a[i] = DOUBLE ? __builtin_sqrt(a[i]) : __builtin_sqrtf(a[i]);
    return a;
}
DEVICE vec at_least(vec limit, vec a) { return a < limit ? limit : a; }
DEVICE vec at_most(vec limit, vec a) { return a > limit ? limit : a; }
DEVICE words product(words a, words b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif

DEVICE vec load(const scalar* from) { return *reinterpret_cast<const unaligned*>(from); }
DEVICE void store(scalar* to, vec a) { *reinterpret_cast<unaligned*>(to) = a; }

// The first `lanes` of a vector: the last units of a row that V doesn't divide. The others are zero.
DEVICE vec load(const scalar* from, int lanes) {
    if (__builtin_expect(lanes == V, 1)) return load(from);
    vec a = {};
    for (int i = 0; i < lanes; ++i) a[i] = from[i];
    return a;
}
DEVICE void store(scalar* to, vec a, int lanes) {
    if (__builtin_expect(lanes == V, 1)) return store(to, a);
    for (int i = 0; i < lanes; ++i) to[i] = a[i];
}

// ---- What a cell computes with -------------------------------------------------------------------------------------

// A value of PAIR vectors, each of a block of units. A cell's functions are chains of dependent operations, of which a
// CPU can look through a few dozen; so the next block's operation comes right after this one's.
constexpr int PAIR = 2;

struct real {
    vec v[PAIR];
    real() = default;
    DEVICE real(double a) {
        v[0] = v[1] = all(static_cast<scalar>(a));
    }
};

struct integers {  // lanes as integers of the same width
    ints v[PAIR];
};

// One operation on all vectors of its operands.
template <class Result, class Operation, class... Operands>
DEVICE Result each(Operation operation, const Operands&... operands) {
    Result result;  // without a loop, which would be unrolled too late for values to stay in registers
    result.v[0] = operation(operands.v[0]...);
    result.v[1] = operation(operands.v[1]...);
    return result;
}

DEVICE real operator+(const real& a, const real& b) { return each<real>([](vec x, vec y) { return x + y; }, a, b); }
DEVICE real operator-(const real& a, const real& b) { return each<real>([](vec x, vec y) { return x - y; }, a, b); }
DEVICE real operator*(const real& a, const real& b) { return each<real>([](vec x, vec y) { return x * y; }, a, b); }
DEVICE real operator/(const real& a, const real& b) { return each<real>([](vec x, vec y) { return x / y; }, a, b); }
DEVICE real operator-(const real& a) { return each<real>([](vec x) { return -x; }, a); }
DEVICE real fma(const real& a, const real& b, const real& c) {
    return each<real>([](vec x, vec y, vec z) { return fma(x, y, z); }, a, b, c);
}

// a where condition > 0, else b.
DEVICE real where(const real& condition, const real& a, const real& b) {
    return each<real>([](vec c, vec x, vec y) { return c > vec{} ? x : y; }, condition, a, b);
}

// The larger of the two; NaN wins.
DEVICE real maximum(const real& a, const real& b) {
    return each<real>([](vec x, vec y) { return (x > y) | (x != x) ? x : y; }, a, b);
}

// 1 where a > 0 or NaN, else 0.
DEVICE real positive(const real& a) {
    return each<real>([](vec x) { return x <= vec{} ? vec{} : all(scalar(1)); }, a);
}

DEVICE real rsqrt(const real& a) {
    return 1.0 / each<real>([](vec x) { return (vec)square_root(x); }, a);
}

// ---- exp and what is made of it ------------------------------------------------------------------------------------

constexpr int MANTISSA = DOUBLE ? 52 : 23, BIAS = DOUBLE ? 1023 : 127;
constexpr double LOG2_E = 1.44269504088896340736;
// ln 2 in two parts, the first with so few bits that n times it is exact.
constexpr double LN2_HIGH = DOUBLE ? 6.93147180369123816490e-01 : 0.693359375;
constexpr double LN2_LOW = DOUBLE ? 1.90821492927058770002e-10 : -2.121944400546905827679e-4;
constexpr double EXP_IS_0 = DOUBLE ? -746 : -104, EXP_IS_INFINITE = DOUBLE ? 710 : 89;

struct Taylor {  // of e^x
    double coefficient[14] = {1};
    constexpr Taylor() {
        for (int k = 1; k < 14; ++k) coefficient[k] = coefficient[k - 1] / k;
    }
};
constexpr Taylor EXP;

DEVICE ints sign_bits() { return (ints){} + (integer(1) << (8 * sizeof(scalar) - 1)); }
DEVICE real magnitude(const real& a) { return each<real>([](vec x) { return (vec)((ints)x & ~sign_bits()); }, a); }
DEVICE real at_least(double limit, const real& a) {
    return each<real>([=](vec x) { return (vec)at_least(all(scalar(limit)), x); }, a);
}
DEVICE real at_most(double limit, const real& a) {
    return each<real>([=](vec x) { return (vec)at_most(all(scalar(limit)), x); }, a);
}

// a = n ln 2 + r with |r| <= ln 2 / 2, for |n| < 2^(MANTISSA - 1); -> e^r - 1, right relative to itself. n comes in the
// lowest bits of a number.
DEVICE real exp_minus_1_of_rest(const real& a, real& n) {
    const real magic = 1.5 * (Index(1) << MANTISSA);  // added, it leaves whole numbers
    n = fma(a, LOG2_E, magic);
    const real k = n - magic, r = fma(k, -LN2_LOW, fma(k, -LN2_HIGH, a)), square = r * r;
    constexpr int TERMS = DOUBLE ? 13 : 7;
    const double* c = EXP.coefficient;
    real p = fma(c[TERMS], r, c[TERMS - 1]);
#pragma GCC unroll 16
    for (int i = TERMS - 3; i > 1; i -= 2) p = fma(p, square, fma(c[i + 1], r, c[i]));  // by pairs: a shorter chain
    return fma(p, square, r);
}

// 2^(n + k), n as above: it goes to the exponent's bits, and what stands above it falls off.
DEVICE real power_of_2(const real& n, int k) {
    return each<real>([=](vec x) { return (vec)(((ints)x << MANTISSA) + (integer(BIAS + k) << MANTISSA)); }, n);
}

constexpr int UP = MANTISSA + 3;  // 2^(n + UP) is not denormal where e^a is
constexpr double DOWN = 1.0 / (Index(1) << UP);

DEVICE real exp(const real& a) {
    real n;
    const real p = exp_minus_1_of_rest(at_most(EXP_IS_INFINITE, at_least(EXP_IS_0, a)), n) + 1.0;
    return where(a, p * power_of_2(n, -2) * 4.0, p * power_of_2(n, UP) * DOWN);  // 2^n may be infinite where e^a isn't
}

// By e = e^-|a|, which can't overflow, and so that small results keep their digits.
DEVICE real sigmoid(const real& a) {
    real n;
    const real negative = each<real>([](vec x) { return (vec)((ints)x | sign_bits()); }, a);
    const real p = exp_minus_1_of_rest(at_least(EXP_IS_0, negative), n) + 1.0, e = p * power_of_2(n, UP) * DOWN;
    return each<real>([](vec x, vec y) { return (ints)x < 0 ? y : all(scalar(1)); }, a, e) / (1.0 + e);
}

// e / (e + 2) with e = e^(2 |a|) - 1, which keeps its digits near 0; and the sign of a.
DEVICE real tanh(const real& a) {
    real n;
    const real x = at_most(DOUBLE ? 20 : 10, magnitude(a));  // it is 1 from there on
    const real rest = exp_minus_1_of_rest(x + x, n), p = power_of_2(n, 0);
    const real e = fma(p, rest, p - 1.0);
    return each<real>([](vec x, vec y) { return (vec)((ints)x | ((ints)y & sign_bits())); }, e / (e + 2.0), a);
}

// The cell's name for it on the way forward, where CUDA has a faster one.
DEVICE real forward_tanh(const real& a) { return tanh(a); }

// a = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) by the series of atanh(f / (2 + f)).
DEVICE real log(const real& a) {
    constexpr integer ROOT = DOUBLE ? integer(0x3FE6A09E667F3BCD) : integer(0x3F3504F3);  // the bits of sqrt(1/2)
    constexpr int MORE = MANTISSA + 2;                                                    // of what is denormal
    constexpr double SMALLEST = DOUBLE ? 2.2250738585072014e-308 : 1.1754943508222875e-38;
    constexpr double INFINITE = __builtin_inf();
    const real scaled = each<real>([](vec x) { return x < all(scalar(SMALLEST)) ? x * all(scalar(Index(1) << MORE)) : x; }, a);
    const integers bits = each<integers>([](vec x) { return (ints)x - ROOT; }, scaled);
    const integers n = each<integers>([](ints i) { return i >> MANTISSA; }, bits);
    const real f = each<real>([](ints i, ints k) { return (vec)(i - (k << MANTISSA) + ROOT); }, bits, n) - 1.0;
    const real k = each<real>([](ints i, vec x) {
        const ints corrected = i - ((x < all(scalar(SMALLEST))) & MORE);
        vec number;
        for (int j = 0; j < V; ++j) number[j] = static_cast<scalar>(corrected[j]);
        return number;
    }, n, a);
    const real s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    constexpr int TERMS = DOUBLE ? 11 : 5;
    real p = 2.0 / (2 * TERMS + 1);
#pragma GCC unroll 16
    for (int i = TERMS - 1; i > 0; --i) p = fma(p, z, 2.0 / (2 * i + 1));
    const real log_value = k * LN2_HIGH - ((half - (s * (half + p * z) + k * LN2_LOW)) - f);
    return each<real>([](vec x, vec y) {
        const vec limit = x == vec{} ? all(scalar(-INFINITE)) : (x < vec{}) | (x != x) ? all(scalar(__builtin_nan(""))) : x;
        return (x > vec{}) & (x < all(scalar(INFINITE))) ? y : limit;
    }, a, log_value);
}
