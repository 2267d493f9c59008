"""The layers as functions of arrays: `rnn`, `lstm`, `gru` on NumPy, torch and CuPy arrays alike, and `vjp`.

Arrays of other libraries that speak DLPack and the array API, JAX's for one, go in and come out as they are.

One layer, one direction, time-major. Here arguments are checked; what computes is chosen by `dispatch`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells

from . import arrays, dispatch
from .arguments import ShapeError, checked, shape
from .compat import require
from .problem import Weights

NONLINEARITIES = ("tanh", "relu")


def lstm(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, h0=None, c0=None, reverse=False, backend=None
) -> tuple[Any, tuple[Any, Any]]:
    """Long short-term memory over a whole sequence.

    At every instant, with a = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh cut into i, f, g, o (torch's order):

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),    h_t = sigmoid(o) tanh(c_t),    then h_t <- w_hr h_t if given

    (Hochreiter & Schmidhuber 1997, Gers et al. 2000; projection: Sak et al. 2014; as torch.nn.LSTM and cuDNN.)

    Args:
        x: [T, B, I] input. float64, float32, or on a GPU and for torch also float16, bfloat16; as all other arrays.
        w_ih: [4*H, I] input weights.
        w_hh: [4*H, P] recurrent weights; P = H without `w_hr`.
        b_ih, b_hh: [4*H] biases, or None.
        w_hr: [P, H] projection of the output, P < H, or None.
        h0: [B, P] first output, c0: [B, H] first cell state; zeros when None.
        reverse: run from the last instant to the first; outputs stay at their instants.
        backend: "numpy", "triton" or "cuda" insists on one; None or "auto" takes $GPU_RNN_BACKEND or the fastest.

    Returns:
        y [T, B, P] every h_t, and (hT [B, P], cT [B, H]) after the last instant; of the kind of x. For torch tensors
        they are differentiable.

    Raises:
        ShapeError: shapes that don't fit, or T = 0. TypeError: mixed or unknown kinds of array, dtypes or devices.
        BackendError: a backend was insisted on that can't run this; the message has every reason.
    """
    weights, state = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), {"h0": h0, "c0": c0}
    y, (hT, cT) = sequence("lstm", x, weights, state, reverse, backend)
    return y, (hT, cT)


def gru(x, w_ih, w_hh, b_ih=None, b_hh=None, *, h0=None, reverse=False, backend=None) -> tuple[Any, Any]:
    """Gated recurrent unit over a whole sequence, with the reset gate after the recurrent product.

    At every instant, with x = w_ih x_t + b_ih and h = w_hh h_{t-1} + b_hh, each cut into r, z, n (torch's order):

        h_t = (1 - z) n + z h_{t-1},    r = sigmoid(x_r + h_r),    z = sigmoid(x_z + h_z),    n = tanh(x_n + r h_n)

    (Cho et al. 2014; this form: cuDNN and torch.nn.GRU.)

    Args:
        x: [T, B, I] input. w_ih: [3*H, I]. w_hh: [3*H, H]. b_ih, b_hh: [3*H] or None. h0: [B, H] or None for zeros.
        reverse, backend: as for `lstm`.

    Returns:
        y [T, B, H] every h_t, and hT [B, H] after the last instant. Raises as `lstm`.
    """
    y, (hT,) = sequence("gru", x, Weights(w_ih, w_hh, b_ih, b_hh), {"h0": h0}, reverse, backend)
    return y, hT


def rnn(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, nonlinearity="tanh", h0=None, reverse=False, backend=None
) -> tuple[Any, Any]:
    """Elman's recurrent network over a whole sequence: h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh) (Elman 1990).

    Args:
        x: [T, B, I] input. w_ih: [H, I]. w_hh: [H, H]. b_ih, b_hh: [H] or None. h0: [B, H] or None for zeros.
        nonlinearity: f, "tanh" or "relu".
        reverse, backend: as for `lstm`.

    Returns:
        y [T, B, H] every h_t, and hT [B, H] after the last instant. Raises as `lstm`, and ValueError for another f.
    """
    y, (hT,) = sequence(elman(nonlinearity), x, Weights(w_ih, w_hh, b_ih, b_hh), {"h0": h0}, reverse, backend)
    return y, hT


def elman(nonlinearity: str) -> str:
    """The name of the cell's page."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; there are 'tanh' and 'relu'")
    return f"rnn_{nonlinearity}"


def vjp(function: Callable, *args, **kwargs) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """Run `lstm`, `gru` or `rnn` and keep what its gradient needs: for those who bring their own autograd, or none.

        (y, (hT, cT)), pullback = gpu_rnn.vjp(gpu_rnn.lstm, x, w_ih, w_hh, b_ih, b_hh, h0=h0, c0=c0)
        gradients = pullback((dy, (dhT, dcT)))        # {"x": ..., "w_ih": ..., "h0": ..., ...}

    `pullback` takes gradients in the structure of the outputs, any of them None for zero, as often as one likes, and
    gives one for every array that the function was given, by argument name and in its shape.
    """
    if function not in (lstm, gru, rnn):
        raise TypeError(f"vjp differentiates gpu_rnn.lstm, gpu_rnn.gru and gpu_rnn.rnn, not {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if foreign(given["x"]):
        outputs, lent_pullback = vjp(function, *map(lent, bound.args), **{k: lent(a) for k, a in bound.kwargs.items()})
        return returned(outputs, like=given["x"]), lambda d: returned(lent_pullback(lent(d)), like=given["x"])
    name = elman(given["nonlinearity"]) if function is rnn else function.__name__
    weights = Weights(*(given.get(field) for field in Weights._fields))
    initial = {letter + "0": given[letter + "0"] for letter in cells.get(name).states}
    problem, state = checked(name, given["x"], weights, initial, given["reverse"], training=True)
    chosen = dispatch.choose(problem, given["backend"])
    x, cell = given["x"], problem.cell
    y, last, tape = chosen.forward(cell, x, weights, state, reverse=problem.reverse, save=True)
    needs = {name for name in ("x", *Weights._fields) if given.get(name) is not None}

    def pullback(doutputs: Any) -> dict[str, Any]:
        dy, dlast = doutputs
        dlast = dlast if isinstance(dlast, (tuple, list)) else (dlast,)
        if len(dlast) != cell.S:
            raise ShapeError(f"{function.__name__} has {cell.S} final states, but {len(dlast)} gradients were given")
        names = ["y", *(letter + "T" for letter in cell.states)]
        filled = []
        for label, output, gradient in zip(names, (y, *last), (dy, *dlast), strict=True):
            if gradient is None:
                gradient = arrays.zeros(tuple(output.shape), like=output)
            elif tuple(gradient.shape) != tuple(output.shape):
                raise ShapeError(f"the gradient of {label} {shape(output)} has shape {shape(gradient)}")
            filled.append(gradient)
        dy, *dlast = filled
        gradients = chosen.backward(
            cell, x, weights, state, y, tape, dy, tuple(dlast), reverse=problem.reverse, needs=needs
        )
        states = zip(initial, gradients.pop("state"), strict=True)
        return gradients | {label: gradient for label, gradient in states if initial[label] is not None}

    return (y, tuple(last) if cell.S > 1 else last[0]), pullback


# ---- the way down ---------------------------------------------------------------------------------------------------


def sequence(
    name: str, x: Any, weights: Weights, initial: dict[str, Any], reverse: bool, backend: str | None
) -> tuple[Any, tuple]:
    """Check, choose, run. `initial` has one entry per state of the cell, None for zeros. -> y, states after."""
    if foreign(x):
        given = Weights(*map(lent, weights)), {label: lent(state) for label, state in initial.items()}
        return returned(sequence(name, lent(x), *given, reverse, backend), like=x)
    if arrays.library(x) == "torch":
        from .autograd import captured, capturing, differentiated, tracked

        if capturing():
            return captured(name, x, weights, initial, reverse, backend)
        training = tracked(x, *weights, *initial.values())
        problem, state = checked(name, x, weights, initial, reverse, training)
        chosen = dispatch.choose(problem, backend)
        if training:
            return differentiated(chosen, problem, x, weights, state)
    else:
        problem, state = checked(name, x, weights, initial, reverse, training=False)
        chosen = dispatch.choose(problem, backend)
    y, last, _ = chosen.forward(problem.cell, x, weights, state, reverse=reverse, save=False)
    return y, last


# ---- other libraries' arrays ----------------------------------------------------------------------------------------
# By the protocol of DLPack, nothing is copied: NumPy looks at what is on the CPU, torch at what is on a GPU.

CPU = 1  # DLPack's kDLCPU
KNOWN = ("numpy", "torch", "cupy")


def foreign(x: Any) -> bool:
    root = type(x).__module__.partition(".")[0]
    return root not in KNOWN and hasattr(x, "__dlpack__") and hasattr(x, "__array_namespace__")


def lent(given: Any) -> Any:
    """Foreign arrays, and those in tuples, as NumPy's or torch's; all else as it is."""
    if isinstance(given, (tuple, list)):
        return tuple(map(lent, given))
    if not foreign(given):
        return given
    on_cpu = given.__dlpack_device__()[0] == CPU
    return (np if on_cpu else require("torch", "an array on a GPU")).from_dlpack(given)


def returned(results: Any, like: Any) -> Any:
    """Arrays, and those in tuples and dicts, as the library's of `like`."""
    if isinstance(results, tuple):
        return tuple(returned(result, like) for result in results)
    if isinstance(results, dict):
        return {label: returned(result, like) for label, result in results.items()}
    return like.__array_namespace__().from_dlpack(results)
