"""The functions of `kernels/mathematics.py` for Triton, on float32 and float64 tiles.

Finite and right at every argument, NaN stays NaN. In float32 on a GPU within a few ulp, except that below 2^-126 the
exponential is 0, and that its relative error grows as |a| 2^-24, which sigmoid and tanh only show where they are tiny
or don't change any more. Written in the few instructions that a GPU has for this: Triton's own float32 exp and division
take 5 and 8, most of them for denormal numbers, and recurrent layers do little else between two matmuls.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NEAR_0 = tl.constexpr(0.3)  # up to here tanh's fraction is exact in float64, and from here 1 - exp(-2 |a|) nearly is


@triton.jit
def exp(a):
    return tl.exp(a) if a.dtype == tl.float64 else tl.exp2(a * LOG2_E)


@triton.jit
def log(a):
    return tl.log(a)


@triton.jit
def reciprocal(a):
    """1 / a for 1 <= a < 2^100: the square of the fast root, and one step of Newton's."""
    if a.dtype == tl.float64:
        return 1.0 / a
    root = tl.rsqrt(a)
    r = root * root
    return r + r * (1.0 - a * r)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)) = exp(a) / (1 + exp(a)), whichever has the exponential that is at most 1."""
    e = exp(-tl.abs(a))
    return tl.where(a < 0, e, 1.0) * reciprocal(1.0 + e)


@triton.jit
def tanh(a):
    """(1 - exp(-2a)) / (1 + exp(-2a)); near 0 Lambert's a / (1 + a^2 / (3 + a^2 / (5 + ...))), down to the 13."""
    z = a * a
    e = exp(-2.0 * tl.abs(a))
    near = tl.abs(a) < NEAR_0
    over = tl.where(near, a * (135135.0 + z * (17325.0 + z * (378.0 + z))), tl.where(a < 0, e - 1.0, 1.0 - e))
    under = tl.where(near, 135135.0 + z * (62370.0 + z * (3150.0 + z * 28.0)), 1.0 + e)
    return over * reciprocal(under)


@triton.jit
def rsqrt(a):
    """1 / sqrt(a)."""
    return 1.0 / tl.sqrt(a) if a.dtype == tl.float64 else tl.rsqrt(a)


@triton.jit
def tile(value, like):
    """A scalar or a column as a tile."""
    return value + tl.zeros_like(like)


@triton.jit
def mean(a, inside, H):
    """The part of a mean over H units that the columns `inside` have: [rows, 1]."""
    return tl.sum(tl.where(inside, a, 0.0), 1, keep_dims=True) / H


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(a):
    return maximum(a, 0.0)


@triton.jit
def positive(a):
    return tl.where(a <= 0, 0.0, 1.0).to(a.dtype)  # 1 for NaN


@triton.jit
def where(condition, a, b):
    return tl.where(condition > 0, a, b)
