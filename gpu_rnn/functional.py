"""The layers as functions of arrays: `rnn`, `lstm`, `gru` on NumPy, torch and CuPy arrays alike, and `vjp`.

One layer, one direction, time-major. Here arguments are checked; what computes is chosen by `dispatch`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from gpu_rnn.kernels import cells

from . import arrays, dispatch
from .problem import Problem, Weights

NONLINEARITIES = ("tanh", "relu")


class ShapeError(ValueError, RuntimeError):
    """An array doesn't fit the others. torch.nn raises the one or the other for this, so it is caught as both."""


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
    if arrays.library(x) == "torch":
        from .autograd import differentiated, tracked

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


def checked(
    name: str, x: Any, weights: Weights, initial: dict[str, Any], reverse: bool, training: bool
) -> tuple[Problem, tuple]:
    """Every array fits, or an error that repeats the shapes. -> the problem, and the states with zeros filled in."""
    cell = cells.get(name)
    given = {"x": x, **weights._asdict(), **initial}
    given = {label: array for label, array in given.items() if array is not None}
    for label in ("x", "w_ih", "w_hh"):
        if label not in given:
            raise TypeError(f"{label} is None; {name} needs it")
    kinds = {label: (arrays.library(a), arrays.dtype(a), arrays.device(a)) for label, a in given.items()}
    for label, kind in kinds.items():
        if kind != kinds["x"]:
            raise TypeError(f"{label} is {' '.join(kind)}, but x is {' '.join(kinds['x'])}; all must be alike")
    library, dtype, device = kinds["x"]
    if dtype not in arrays.DTYPES:
        raise TypeError(f"x is {dtype}; there are {', '.join(arrays.DTYPES)}")

    for label, rank in {"x": 3, "w_ih": 2, "w_hh": 2, "w_hr": 2}.items():
        if label in given and len(given[label].shape) != rank:
            raise ShapeError(f"{label} has shape {shape(given[label])}; expected {rank} dimensions")
    T, B, I = x.shape
    G, H = cell.G, hidden_size(cell, weights)
    P = H if weights.w_hr is None else weights.w_hr.shape[0]
    out = "H" if weights.w_hr is None else "P"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": ("[T, B, I]", (T, B, I)),
        "w_ih": (f"[{G}*H, I]", (G * H, I)),
        "w_hh": (f"[{G}*H, {out}]", (G * H, P)),
        "b_ih": (f"[{G}*H]", (G * H,)),
        "b_hh": (f"[{G}*H]", (G * H,)),
        "w_hr": ("[P, H]", (P, H)),
    }
    h, *others = initial
    expected |= {h: (f"[B, {out}]", (B, P)), **dict.fromkeys(others, ("[B, H]", (B, H)))}
    for label, array in given.items():
        symbols, sizes = expected[label]
        if tuple(array.shape) != sizes:
            raise ShapeError(
                f"{label} has shape {shape(array)}; expected {symbols} = {list(sizes)}, "
                f"with x {shape(x)}, w_ih {shape(weights.w_ih)}, w_hh {shape(weights.w_hh)}"
            )
    if T == 0:
        raise ShapeError(f"the sequence is empty: x has shape {shape(x)}, and T must be larger than 0")
    if weights.w_hr is not None and not 0 < P < H:
        raise ShapeError(f"w_hr has shape {shape(weights.w_hr)}; a projection needs 0 < P < H")
    state = tuple(
        arrays.zeros(expected[label][1], like=x) if array is None else array for label, array in initial.items()
    )
    where = device.partition(":")[0]
    projected = None if weights.w_hr is None else P
    return Problem(cell, T, B, I, H, projected, dtype, where, library, training, reverse), state


def hidden_size(cell: cells.Cell, weights: Weights) -> int:
    rows = weights.w_hh.shape[0]
    if rows == 0 or rows % cell.G:
        raise ShapeError(
            f"w_hh has shape {shape(weights.w_hh)}; a {cell.name} has {cell.G} gates ({', '.join(cell.gates)}), "
            f"so its rows are a positive multiple of {cell.G}"
        )
    return rows // cell.G


def shape(array: Any) -> str:
    return str(list(array.shape))
