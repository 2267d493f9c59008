// mathematics.cuh: the functions of a cell besides + - * /, as kernels/mathematics.py has them.
//
// tanh, exp and log are CUDA's own, for float and for double. For float they take 7 to 25 instructions, are right to 2
// units in the last place, and have no slow path: infinities and large numbers give what they should, NaN stays NaN.
// The faster tanh.approx (device.cuh) is right to 5e-4 only: see `forward_tanh`.
#pragma once

#if GPU_RNN_ON_HOST
using std::exp, std::log, std::tanh;  // the overloads for float
#endif

#ifndef REAL
#define REAL float  // what is computed in: float, or double where double is stored
#endif
using real = REAL;

// ---- In and out of storage ---------------------------------------------------------------------------------------

template <class T>
DEVICE real to_real(T x) {
    return to_float(x);
}
template <>
DEVICE real to_real(double x) {
    return static_cast<real>(x);
}

// Rounds to nearest even.
template <class T>
DEVICE T from_real(real x) {
    return from_float<T>(x);
}
template <>
DEVICE double from_real(real x) {
    return x;
}

// ---- Functions ---------------------------------------------------------------------------------------------------

DEVICE float reciprocal(float a) { return __fdividef(1.0f, a); }  // one instruction, 1 ulp; 0 for a > 2^126
DEVICE double reciprocal(double a) { return 1 / a; }

// exp overflows to infinity for a < -88, and the result is 0, as it should be.
DEVICE real sigmoid(real a) { return reciprocal(1 + exp(-a)); }

// tanh on the way forward: one instruction where results are stored as bfloat16, whose rounding is four times as large
// as its error of 2^-11. A gradient shows it where tanh is near 1, as 1 - tanh^2, so it isn't for the way back.
template <class Stored>
DEVICE real tanh_for(real a, Stored) {
    return tanh(a);
}
DEVICE float tanh_for(float a, __nv_bfloat16) { return tanh_approx(a); }
#ifdef SCALAR
DEVICE real forward_tanh(real a) { return tanh_for(a, SCALAR()); }
#else
DEVICE real forward_tanh(real a) { return tanh(a); }
#endif

#if GPU_RNN_ON_HOST
DEVICE real rsqrt(real a) { return 1 / std::sqrt(a); }
#endif  // CUDA's own has 2 ulp for float and 1 for double

// The larger of the two; NaN wins.
DEVICE real maximum(real a, real b) { return a > b || a != a ? a : b; }

DEVICE real relu(real a) { return maximum(a, 0); }

// 1 where a > 0 or NaN, else 0: the derivative of relu, in terms of its input or its output.
DEVICE real positive(real a) { return a <= 0 ? 0 : 1; }

// a where condition > 0, else b.
DEVICE real where(real condition, real a, real b) { return condition > 0 ? a : b; }
