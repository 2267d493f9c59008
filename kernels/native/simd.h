// simd.h: vectors of `scalar` as wide as the CPU's registers, and the functions of a cell on them.
//
// Compiled with -D: SCALAR (float or double), VECTOR_BYTES, REGISTERS (kernels/native/isa.py says which). A lane is a
// hidden unit. No operation adds up lanes, and multiplications are fused with additions only where `fma` says so
// (-ffp-contract=off), so a value is the same bits whatever tile, batch or thread it is computed in.
//
// exp, sigmoid, tanh, log and rsqrt are right to 4 ulp for all finite arguments, denormal results included; infinities
// give the limits and NaN stays NaN. Their polynomials are Taylor series on intervals so short that these suffice.
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
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
typedef scalar unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(scalar)), may_alias));

// ---- What each instruction set has a word for -----------------------------------------------------------------------

#if VECTOR_BYTES == 64
DEVICE vec all(float a) { return (vec)_mm512_set1_ps(a); }
DEVICE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
DEVICE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
DEVICE __m512 square_root(__m512 a) { return _mm512_sqrt_ps(a); }
DEVICE __m512d square_root(__m512d a) { return _mm512_sqrt_pd(a); }
DEVICE vec all(double a) { return (vec)_mm512_set1_pd(a); }
#elif VECTOR_BYTES == 32
DEVICE vec all(float a) { return (vec)_mm256_set1_ps(a); }
DEVICE vec all(double a) { return (vec)_mm256_set1_pd(a); }
DEVICE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
DEVICE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
DEVICE __m256 square_root(__m256 a) { return _mm256_sqrt_ps(a); }
DEVICE __m256d square_root(__m256d a) { return _mm256_sqrt_pd(a); }
#elif defined(__ARM_NEON)
DEVICE vec all(float a) { return (vec)vdupq_n_f32(a); }
DEVICE vec all(double a) { return (vec)vdupq_n_f64(a); }
DEVICE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
DEVICE float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
DEVICE float32x4_t square_root(float32x4_t a) { return vsqrtq_f32(a); }
DEVICE float64x2_t square_root(float64x2_t a) { return vsqrtq_f64(a); }
#else
DEVICE vec all(scalar a) { return vec{} + a; }
DEVICE vec fma(vec a, vec b, vec c) { return a * b + c; }
DEVICE vec square_root(vec a) {
    for (int i = 0; i < V; ++i) a[i] = DOUBLE ? __builtin_sqrt(a[i]) : __builtin_sqrtf(a[i]);
    return a;
}
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

struct real {
    vec v;
    real() = default;
    DEVICE real(vec a) : v(a) {}
    DEVICE real(double a) : v(all(static_cast<scalar>(a))) {}
};
DEVICE real operator+(real a, real b) { return a.v + b.v; }
DEVICE real operator-(real a, real b) { return a.v - b.v; }
DEVICE real operator*(real a, real b) { return a.v * b.v; }
DEVICE real operator/(real a, real b) { return a.v / b.v; }
DEVICE real operator-(real a) { return -a.v; }

// a where condition > 0, else b.
DEVICE real where(real condition, real a, real b) { return condition.v > all(scalar(0)) ? a.v : b.v; }

// The larger of the two; NaN wins.
DEVICE real maximum(real a, real b) { return ((a.v > b.v) | (a.v != a.v)) ? a.v : b.v; }

// 1 where a > 0, else 0.
DEVICE real positive(real a) { return a.v > all(scalar(0)) ? all(scalar(1)) : vec{}; }

constexpr int MANTISSA = DOUBLE ? 52 : 23, BIAS = DOUBLE ? 1023 : 127;
constexpr scalar LOG2_E = 1.44269504088896340736;
// ln 2 in two parts, the first with so few bits that n times it is exact.
constexpr scalar LN2_HIGH = DOUBLE ? 6.93147180369123816490e-01 : 0.693359375;
constexpr scalar LN2_LOW = DOUBLE ? 1.90821492927058770002e-10 : -2.121944400546905827679e-4;

DEVICE vec power_of_2(ints n) { return (vec)((n + BIAS) << MANTISSA); }

// x = n ln 2 + r with |r| <= ln 2 / 2, for |n| < 2^(MANTISSA - 1); -> e^r - 1, right relative to itself.
DEVICE vec exp_minus_1_of_rest(vec x, ints& n) {
    const vec magic = all(scalar(1.5) * (Index(1) << MANTISSA));  // added, it leaves whole numbers, in the lowest bits
    const vec shifted = fma(x, all(LOG2_E), magic);
    const vec whole = shifted - magic;
    n = (ints)shifted - (ints)magic;
    const vec r = fma(whole, all(-LN2_LOW), fma(whole, all(-LN2_HIGH), x));
    double factorial = 1;  // a constant of the compiler's, as the whole loop is
    constexpr int TERMS = DOUBLE ? 13 : 7;
    for (int k = 2; k <= TERMS; ++k) factorial *= k;
    vec p = all(scalar(1 / factorial));
#pragma GCC unroll 16
    for (int k = TERMS; k > 2; --k) {
        factorial /= k;
        p = fma(p, r, all(scalar(1 / factorial)));
    }
    return fma(p, r * r, r);
}

DEVICE real exp(real a) {
    const vec low = all(scalar(DOUBLE ? -746 : -104)), high = all(scalar(DOUBLE ? 710 : 89));  // 0 and inf from there
    vec x = a.v < low ? low : a.v;
    x = x > high ? high : x;
    ints n;
    const vec p = exp_minus_1_of_rest(x, n) + all(scalar(1));
    const ints half = n >> 1;  // 2^n itself may be out of range where the result is not
    return p * power_of_2(half) * power_of_2(n - half);
}

DEVICE ints sign_bits() { return (ints){} + (integer(1) << (8 * sizeof(scalar) - 1)); }

DEVICE real magnitude(real a) { return (vec)((ints)a.v & ~sign_bits()); }

// By e^-|a|, which can't overflow, and so that small results keep their digits.
DEVICE real sigmoid(real a) {
    const vec one = all(scalar(1)), e = exp(-magnitude(a)).v;
    return (a.v < vec{} ? e : one) / (one + e);
}

// e / (e + 2) with e = e^(2 |a|) - 1, which keeps its digits near 0; and the sign of a.
DEVICE real tanh(real a) {
    const vec most = all(scalar(DOUBLE ? 20 : 10));  // tanh is 1 from there on
    const vec x = magnitude(a).v;
    ints n;
    const vec limited = x > most ? most : x;
    const vec rest = exp_minus_1_of_rest(limited + limited, n), p = power_of_2(n);
    const vec e = fma(p, rest, p - all(scalar(1))), result = e / (e + all(scalar(2)));
    return (vec)((ints)result | ((ints)a.v & sign_bits()));
}

// a = 2^n (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); log(1 + f) by the series of atanh(f / (2 + f)).
DEVICE real log(real a) {
    const vec one = all(scalar(1)), zero = {}, infinity = all(scalar(__builtin_inf()));
    const vec smallest = power_of_2((ints){} + (1 - BIAS));
    const ints denormal = a.v < smallest;
    const vec x = denormal ? a.v * power_of_2((ints){} + MANTISSA + 2) : a.v;
    const integer root = DOUBLE ? integer(0x3FE6A09E667F3BCD) : integer(0x3F3504F3);  // the bits of sqrt(1/2)
    const ints bits = (ints)x - root;
    ints n = bits >> MANTISSA;
    const vec f = (vec)(bits - (n << MANTISSA) + root) - one;
    n -= denormal & (MANTISSA + 2);
    const vec s = f / (all(scalar(2)) + f), z = s * s, half = all(scalar(0.5)) * f * f;
    constexpr int TERMS = DOUBLE ? 11 : 5;
    vec p = all(scalar(2.0 / (2 * TERMS + 1)));
#pragma GCC unroll 16
    for (int k = TERMS - 1; k > 0; --k) p = fma(p, z, all(scalar(2.0 / (2 * k + 1))));
    vec whole;
    for (int i = 0; i < V; ++i) whole[i] = static_cast<scalar>(n[i]);
    const vec found = whole * all(LN2_HIGH) - ((half - (s * (half + p * z) + whole * all(LN2_LOW))) - f);
    const vec limits = a.v == zero ? -infinity : (a.v < zero) | (a.v != a.v) ? all(scalar(__builtin_nan(""))) : a.v;
    return (a.v > zero) & (a.v < infinity) ? found : limits;
}

// 1 / sqrt(a).
DEVICE real rsqrt(real a) { return all(scalar(1)) / (vec)square_root(a.v); }
