"""The functions that a cell definition may use, in addition to ``+ - * /``.

Each takes NumPy arrays, with hidden units on the last axis, or `trace.Symbolic` values, of which the graph is made.
Triton has them in `kernels/triton/mathematics.py` and CUDA in `kernels/cuda/mathematics.cuh`. A new operation is added
to `trace.ARITY`, to all three files, and to `autodiff.VJP_RULES`.
"""

from functools import reduce
from operator import add

import numpy as np

from .trace import Symbolic

__all__ = [
    "center", "exp", "log", "log_sigmoid", "maximum", "mean", "minimum", "positive", "recurrent", "relu",
    "rms_normalize", "rsqrt", "sigmoid", "tanh", "where",
]  # fmt: skip
EPSILON = 1e-5  # of a variance, as torch.nn.LayerNorm has it
RECURRENT_MATMUL = "recurrent"  # an operation of no kernel: `two_pass` splits the cell there


def sigmoid(a):
    """1 / (1 + exp(-a)), written with tanh: exact at both ends, and it can't overflow."""
    return a.apply("sigmoid") if isinstance(a, Symbolic) else 0.5 * np.tanh(0.5 * a) + 0.5


def tanh(a):
    """(exp(a) - exp(-a)) / (exp(a) + exp(-a))."""
    return a.apply("tanh") if isinstance(a, Symbolic) else np.tanh(a)


def relu(a):
    """max(a, 0); NaN stays NaN."""
    return maximum(a, 0.0)


def positive(a):
    """1 where a > 0, else 0: the derivative of relu, in terms of its input or its output. As in torch 1 for NaN."""
    return a.apply("positive") if isinstance(a, Symbolic) else 1 - np.less_equal(a, 0).astype(np.asarray(a).dtype)


def exp(a):
    return a.apply("exp") if isinstance(a, Symbolic) else np.exp(a)


def log(a):
    return a.apply("log") if isinstance(a, Symbolic) else np.log(a)


def rsqrt(a):
    """1 / sqrt(a)."""
    return a.apply("rsqrt") if isinstance(a, Symbolic) else 1 / np.sqrt(a)


def mean(a):
    """Return the mean over all hidden units of a batch row: the only reduction in a cell."""
    if isinstance(a, Symbolic):
        return a.apply("mean")
    return np.mean(a, -1, keepdims=True) if np.ndim(a) else a


def center(a):
    """Subtract the mean over the units."""
    return a - mean(a)


def rms_normalize(*values):
    """Divide values, whose mean over all of them and all units must be zero, by their standard deviation -> a tuple."""
    squares = reduce(add, (a * a for a in values))
    r = rsqrt(mean(squares * (1 / len(values)) if len(values) > 1 else squares) + EPSILON)
    return tuple(a * r for a in values)


def log_sigmoid(a):
    """log(sigmoid(a)) = min(a, 0) + log(sigmoid(|a|)), which nothing overflows in; right to an ulp of 1."""
    m = minimum(a, 0.0)
    return m + log(sigmoid(a - 2 * m))


def recurrent(gate, value):
    """Return row block `gate` of w_hh value + b_hh: as h[gate], of a value of the cell's own instead of h_{t-1}."""
    if not isinstance(value, Symbolic):
        raise TypeError(f"recurrent() takes a traced value of a cell definition, got {type(value).__name__}")
    return value.apply(RECURRENT_MATMUL, gate)


def maximum(a, b):
    """The larger of the two; NaN wins. At most one of them may be a plain number.

    Gradient: that of the result goes to the larger, half to each of two that are equal, all of it to both where the
    result is NaN, as in torch.maximum; but none to what equals a number, as to torch.relu at 0.
    """
    if isinstance(a, Symbolic):
        return a.apply("maximum", b)
    return b.apply("maximum", a) if isinstance(b, Symbolic) else np.maximum(a, b)


def minimum(a, b):
    """The smaller of the two; NaN wins."""
    return -maximum(-a, -b)


def where(condition, a, b):
    """a where condition > 0, else b; the other one may be anything, NaN included."""
    if isinstance(condition, Symbolic):
        return condition.apply("where", a, b)
    if isinstance(a, Symbolic) or isinstance(b, Symbolic):
        return a if condition > 0 else b
    return np.where(np.greater(condition, 0), a, b)
