"""The functions a cell's page may use, beside ``+ - * /``.

Each works on NumPy arrays (the oracle runs a page as it stands) and on `trace.Symbol` (the compiled NumPy
backend). Triton compiles the same page with `kernels/triton/mathematics.py` in the place of this module, and the
CUDA twins have them in `kernels/cuda/mathematics.cuh`: a new function is added to all three.
"""

import numpy as np

from .trace import Symbol

__all__ = ["exp", "log", "maximum", "positive", "relu", "sigmoid", "tanh"]


def sigmoid(a):
    """1 / (1 + exp(-a)), written with tanh: exact at both ends, and it can't overflow."""
    return a.apply("sigmoid") if isinstance(a, Symbol) else 0.5 * np.tanh(0.5 * a) + 0.5


def tanh(a):
    """(exp(a) - exp(-a)) / (exp(a) + exp(-a))."""
    return a.apply("tanh") if isinstance(a, Symbol) else np.tanh(a)


def relu(a):
    """max(a, 0); NaN stays NaN."""
    return maximum(a, 0.0)


def positive(a):
    """1 where a > 0, else 0: the derivative of relu, in terms of its input or its output."""
    return a.apply("positive") if isinstance(a, Symbol) else np.greater(a, 0).astype(np.asarray(a).dtype)


def exp(a):
    return a.apply("exp") if isinstance(a, Symbol) else np.exp(a)


def log(a):
    return a.apply("log") if isinstance(a, Symbol) else np.log(a)


def maximum(a, b):
    """The larger of the two; NaN wins. At most one of them may be a plain number."""
    if isinstance(a, Symbol):
        return a.apply("maximum", b)
    return b.apply("maximum", a) if isinstance(b, Symbol) else np.maximum(a, b)
