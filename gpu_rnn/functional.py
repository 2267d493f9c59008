"""Recurrent layers as functions of arrays: `rnn`, `lstm`, `gru` on NumPy, torch and CuPy arrays alike, and `vjp`.

Arrays of other libraries that speak DLPack and the array API, JAX's for one, go in and come out as they are.

One layer, one direction, time-major. Here arguments are checked; what computes is chosen by `dispatch`.
"""

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from operator import attrgetter
from typing import Any, TypedDict, Unpack

import numpy as np

from gpu_rnn.kernels import cells

from .backends import dispatch
from .backends.call_cache import Plan, planned
from .backends.dispatch import prepared
from .core import arrays
from .core.optional_imports import require
from .core.problem import Around, Options, Weights
from .core.validation import ShapeError, check_flags, check_words, first_states, shape, told
from .modifiers.apply import PLAIN, apply

LOOK = attrgetter("__class__", "shape", "dtype")
FLAGS = ("training", "return_states", "coupled", "reset_after")
NONLINEARITIES = ("tanh", "relu")
PROJECTED = "gru+projected"
NORMALIZED_STEP_EXACT = (
    "step_exact=True projects the inputs step by step, but layer_norm normalizes the projection of all steps at once"
)


class AroundKeywords(TypedDict, total=False):
    """Keywords of every function: modifiers of its cell. docs/modifiers.md has the equations, pictures and sources.

    reset: [T, B] bool. Where true, x[t] is the first of an episode of its sequence: nothing of x[:t] reaches y[t:], or
        in reverse nothing of x[t:] reaches y[:t], and no gradient crosses.
    reset_state: states that enter an episode instead of the states of the one before, with reverse=True of the one
        after: one array, for the LSTM a tuple of two: [B, .], or [.] for the whole batch; zeros when None.
    lengths: [B] integers in [0, T], on the device of x, in any order. Time steps from there on leave the states as they
        are and have outputs 0 and gradients 0; in reverse the sequence starts at its end. On a CPU a number outside is
        a ShapeError, and a RuntimeError within torch.compile; on a GPU, which no call waits for, it is clamped.
    left_padding: [B] integers in [0, T]; the time steps before are padding, too. Sequence b is x[left_padding[b]:, b].
    zoneout: probability of keeping a state from the time step before, one per state or one for all (Krueger et al.
        2017).
    recurrent_dropout: variational (locked) dropout: probability of a zero in h before the recurrent matmul, one mask
        for the whole sequence (Gal & Ghahramani 2016); other values are scaled by 1 / (1 - p).
    seed: of these masks, an int or an int64 array [1] on the device of x. The same seed gives the same masks, on every
        backend.
    training: False replaces zoneout by its expectation and disables dropout.
    return_states: whether to return every state after every time step, too.
    """

    reset: Any
    reset_state: Any
    lengths: Any
    left_padding: Any
    zoneout: float | tuple[float, ...]
    recurrent_dropout: float
    seed: Any
    training: bool
    return_states: bool


class GRUKeywords(AroundKeywords, total=False):
    """Keywords of `gru`, in addition to those of every function.

    layer_norm: two gains [3*H], of the input and of the recurrent projection, which are normalized: over all units of r
        and z together, and over those of n (Ba, Kiros & Hinton 2016).
    reset_after: True applies the reset gate after the recurrent matmul (cuDNN, torch); False before it (Cho et al.
        2014): n = tanh(x_n + w_hn (r h_{t-1}) + b_hn), which takes two matmuls per time step.
    recurrent_dropout_on: "h" drops h before the recurrent matmul; "candidate" drops the candidate, n or tanh(g):
        recurrent dropout without memory loss (Semeniuta et al. 2016).
    """

    layer_norm: Any
    reset_after: bool
    recurrent_dropout_on: str


class LSTMKeywords(AroundKeywords, total=False):
    """Keywords of `lstm`, in addition to those of every function.

    peephole: [3*H] weights of the cell state in the gates i, f, o (Gers & Schmidhuber 2000); coupled, [2*H].
    coupled: whether f = 1 - i (CIFG; Greff et al. 2017); then the gates are i, g, o and G = 3.
    recurrent_dropout_on: as for `gru`.
    cell_clip: bound of the cell state, applied before it is used (Sak et al. 2014).
    layer_norm: gains [4*H] of the input and of the recurrent projection, gain and bias [H] of the cell state in the
        output, the bias or None; all three are normalized, over all gates and units (Ba, Kiros & Hinton 2016).
    """

    peephole: Any
    coupled: bool
    cell_clip: float | None
    recurrent_dropout_on: str
    layer_norm: Any


def lstm(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, h0=None, c0=None, reverse=False, backend=None, precision=None,
    recompute=False, step_exact=False, **around: Unpack[LSTMKeywords],
) -> tuple[Any, ...]:  # fmt: skip
    """Compute a long short-term memory over a whole sequence.

    At every time step, with a = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh cut into i, f, g, o (torch's order):

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),    h_t = sigmoid(o) tanh(c_t),    then h_t <- w_hr h_t if given

    (Hochreiter & Schmidhuber 1997, Gers et al. 2000; projection: Sak et al. 2014; as torch.nn.LSTM and cuDNN.)

    Args:
        x: [T, B, I] input. float64, float32, or on a GPU and for torch also float16, bfloat16; as all other arrays.
        w_ih: [4*H, I] input weights. None: x is the input projection w_ih x_t itself, [T, B, 4*H], looked up or
            computed before; b_ih is added all the same. x is never written to.
        w_hh: [4*H, P] recurrent weights; P = H without `w_hr`.
        b_ih, b_hh: [4*H] biases, or None.
        w_hr: [P, H] projection of the output, P < H, or None.
        h0: [B, P] first output, c0: [B, H] first cell state; zeros when None.
        reverse: run from the last time step to the first; outputs stay at their time steps.
        backend: "numpy", "native", "triton" or "cuda" selects one; None or "auto" takes $GPU_RNN_BACKEND or the first
            that supports the call.
        precision: of float32 matmuls on a GPU, forward and backward: "tf32" rounds their inputs to TF32, "ieee"
            doesn't. None follows torch.backends.cudnn.rnn.fp32_precision, as torch.nn does, for torch tensors, and is
            "ieee" for others. It has no effect on other dtypes or on a CPU.
        recompute: True saves no activations (activation checkpointing): backward first runs forward once more, and the
            gradients are the same bit for bit (Chen et al. 2016, with one checkpoint per layer).
        step_exact: True makes the results, bit for bit, equal to those of one call per time step with the states passed
            on; the input projection is then one matmul per time step. Not with `layer_norm`.
        around: modifiers and variants: `LSTMKeywords`.

    Returns:
        y [T, B, P] every h_t, and (hT [B, P], cT [B, H]) after the last time step; with return_states also (y, c
        [T, B, H]), the states after every time step. Arrays of the library of x; torch tensors are differentiable.

    Raises:
        ShapeError: shapes that don't fit, or T = 0. TypeError: mixed or unknown kinds of array, dtypes or devices.
        BackendError: the requested backend does not support this call; the message lists every reason.
        ValueError: an unknown backend or precision, or "tf32" for float64.
    """
    weights, options = (
        Weights(w_ih, w_hh, b_ih, b_hh, w_hr),
        Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact),
    )
    return structured(sequence("lstm", x, weights, (h0, c0), *wanted(options, around, LSTMKeywords)), 2)


def gru(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, h0=None, s0=None, reverse=False, backend=None, precision=None,
    recompute=False, step_exact=False, **around: Unpack[GRUKeywords],
) -> tuple[Any, ...]:  # fmt: skip
    """Compute a gated recurrent unit over a whole sequence, by default with its reset gate after the recurrent matmul.

    At every time step, with x = w_ih x_t + b_ih and h = w_hh h_{t-1} + b_hh, each cut into r, z, n (torch's order):

        h_t = (1 - z) n + z h_{t-1},    r = sigmoid(x_r + h_r),    z = sigmoid(x_z + h_z),    n = tanh(x_n + r h_n)

    (Cho et al. 2014; this form: cuDNN and torch.nn.GRU.) With reset_after=False n = tanh(x_n + w_hn (r h_{t-1}) + b_hn)
    (the form of their version 1; Keras's reset_after=False, ONNX's linear_before_reset=0).

    Args:
        x: [T, B, I] input, or [T, B, 3*H] where w_ih is None. w_ih: [3*H, I] or None, as for `lstm`.
        w_hh: [3*H, P], P = H without w_hr. b_ih, b_hh: [3*H] or None. h0: [B, P] or None for zeros.
        w_hr: [P, H] projection of the output, P < H, or None. With it the cell has a second state s, as the LSTM has c:
            s_t = (1 - z) n + z s_{t-1}, h_t = w_hr s_t. s0: [B, H] or None for zeros.
        reverse, backend, precision, recompute, step_exact: as for `lstm`. around: `GRUKeywords`.

    Returns:
        y [T, B, P] every h_t, and hT [B, P] after the last time step, or with w_hr (hT, sT [B, H]); with return_states
        also those after every time step. Raises as `lstm`.
    """
    options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
    weights, name = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), named(gru, {"w_hr": w_hr, "s0": s0})
    state = (h0,) if w_hr is None else (h0, s0)
    return structured(sequence(name, x, weights, state, *wanted(options, around, GRUKeywords)), len(state))


def rnn(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, nonlinearity="tanh", h0=None, reverse=False, backend=None,
    precision=None, recompute=False, step_exact=False, **around: Unpack[AroundKeywords],
) -> tuple[Any, ...]:  # fmt: skip
    """Compute Elman's recurrent network over a whole sequence: h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh) (Elman
    1990).

    Args:
        x: [T, B, I] input, or [T, B, H] where w_ih is None. w_ih: [H, I] or None, as for `lstm`. w_hh: [H, P],
        P = H without w_hr. b_ih, b_hh: [H] or None. h0: [B, P] or None for zeros.
        w_hr: [P, H] projects h_t, as for `lstm`, or None.
        nonlinearity: f, "tanh" or "relu".
        reverse, backend, precision, recompute, step_exact: as for `lstm`. around: `AroundKeywords`.

    Returns:
        y [T, B, P] every h_t, and hT [B, P] after the last time step; y again with return_states. Raises as `lstm`, and
        ValueError for another f.
    """
    options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    return structured(sequence(elman(nonlinearity), x, weights, (h0,), *wanted(options, around, AroundKeywords)), 1)


KEYWORDS: dict[Callable, type] = {lstm: LSTMKeywords, gru: GRUKeywords, rnn: AroundKeywords}  # of what vjp takes


def wanted(options: Options, keywords: Any, known: type) -> tuple[Options, Around]:
    """What a caller's keywords ask for."""
    check_flags(reverse=options.reverse, recompute=options.recompute, step_exact=options.step_exact)
    check_words(backend=options.backend, precision=options.precision)
    if not keywords:
        return options, PLAIN
    given = dict(keywords)
    if unknown := given.keys() - known.__annotations__.keys():
        names = ", ".join(known.__annotations__)
        raise TypeError(f"got an unexpected keyword argument {sorted(unknown)[0]!r}; there are {names}")
    check_flags(**{name: given[name] for name in FLAGS if name in given})
    seed = given.get("seed")
    if isinstance(seed, bool) or not (seed is None or isinstance(seed, Integral) or hasattr(seed, "dtype")):
        raise TypeError(f"seed must be an int, or an int64 array [1] where x is; got {told(seed)}")
    if options.step_exact and given.get("layer_norm") is not None:
        raise ValueError(NORMALIZED_STEP_EXACT)
    return options._replace(history=given.pop("return_states", False)), Around(**given)


def structured(results: tuple, S: int) -> tuple[Any, ...]:
    """y, and everything that there is one of per state as one or as a tuple."""
    y, *groups = results
    return y, *[tuple(group) if S > 1 else group[0] for group in groups]


def named(function: Callable, given: Mapping[str, Any]) -> str:
    """The name of the page that a function's arguments ask for."""
    if function is rnn:
        return elman(given["nonlinearity"])
    if function is gru and given["w_hr"] is not None:
        return PROJECTED
    if function is gru and given["s0"] is not None:
        raise TypeError("s0 is given, but w_hr is None: a GRU has a state of its own only where h is projected")
    return function.__name__


def elman(nonlinearity: str) -> str:
    """The name of the cell's page."""
    if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}; there are 'tanh' and 'relu'")
    return f"rnn_{nonlinearity}"


def vjp(function: Callable, *args, **kwargs) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """Run `lstm`, `gru`, `rnn` or a cell's `function` and return its pullback, for use with another autograd or none.

        (y, (hT, cT)), pullback = gpu_rnn.vjp(gpu_rnn.lstm, x, w_ih, w_hh, b_ih, b_hh, h0=h0, c0=c0)
        gradients = pullback((dy, (dhT, dcT)))        # {"x": ..., "w_ih": ..., "h0": ..., ...}

    `pullback` takes gradients in the structure of the outputs, any of them None for zero, as often as one likes, and
    gives one for every array that the function was given, by argument name and in its shape; for `reset_state` a tuple,
    if that is one, and for `layer_norm`. Masks, positions and seeds (reset, lengths, left_padding, seed) have none. The
    arguments and y are kept and not copied: leave them unchanged until the last pullback.
    """
    if function not in KEYWORDS:
        raise TypeError(f"vjp differentiates gpu_rnn.lstm, gru, rnn and what gpu_rnn.cell makes, not {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if foreign(given["x"]):
        outputs, lent_pullback = vjp(function, *map(lent, bound.args), **{k: lent(a) for k, a in bound.kwargs.items()})
        return returned(outputs, like=given["x"]), lambda d: returned(lent_pullback(lent(d)), like=given["x"])
    if arrays.library(given["x"], "x") == "torch":
        from .autograd.custom_ops import refuse_watched

        refuse_watched("gpu_rnn.vjp", "use torch.func.vjp, or torch.autograd.grad, of the function itself")
    name = named(function, given)
    weights = Weights(*(given.get(field) for field in Weights._fields))
    cell = cells.get(name)
    initial = {label: given[label] for label in first_states(cell)}
    options = Options(**{field: given[field] for field in Options._fields if field in given})
    options, around = wanted(options, given["around"], KEYWORDS[function])
    applied = apply(name, given["x"], weights, around, options.reverse)
    called = applied.x, applied.weights
    backend, problem, state = prepared(applied.name, *called, (*initial.values(),), options, not options.recompute)
    y, after, tape = dispatch.forward(backend, problem, *called, state)
    results = applied.results(y, after, cell.S, options.history)
    there = {"x": True} | applied.weights._asdict()  # normalized, a call has fewer than it was given
    needs = {label for label, array in there.items() if array is not None and given.get(label) is not None}
    needs |= {"units"} if applied.parts else set()

    def pullback(doutputs: Any) -> dict[str, Any]:
        if not isinstance(doutputs, (tuple, list)):
            raise TypeError(f"expected a tuple, a gradient for each output; got {type(doutputs).__name__}")
        if len(doutputs) != len(results):
            raise ShapeError(f"there are {len(results)} outputs, but {len(doutputs)} gradients were given")
        labels: tuple[Any, ...] = "y", [letter + "T" for letter in cell.states], [*cell.states]
        dy, *rest = map(of_output, labels, results, doutputs)
        dlast, dstates = (*rest, [0.0])[:2]
        dy, *dhistory = map(applied.shown, [dy + dstates[0], *dstates[1:]])
        gradients = dispatch.backward(backend, problem, *called, state, y, tape, dy, (*dlast, *dhistory), needs)
        states = zip(initial, gradients.pop("state"), strict=True)
        return applied.pulled(gradients) | {label: dstate for label, dstate in states if initial[label] is not None}

    return structured(results, cell.S), pullback


def of_output(label: str | list[str], output: Any, gradient: Any) -> Any:
    """The gradient of an output, or those of several in a list, with zeros for None; or an error."""
    if isinstance(label, list):
        given = gradient if isinstance(gradient, (tuple, list)) else [gradient]
        if gradient is None:
            given = [None] * len(label)
        if len(given) != len(label):
            states = ", ".join(label)
            raise ShapeError(f"there are {len(label)} states ({states}), but {len(given)} gradients were given")
        return [*map(of_output, label, output, given)]
    if gradient is None:
        return arrays.zeros(tuple(output.shape), like=output)
    found, wanted = (" ".join((arrays.library(a), arrays.dtype(a), arrays.device(a))) for a in (gradient, output))
    if found != wanted:
        raise TypeError(f"the gradient of {label} is {found}, but {label} is {wanted}")
    if tuple(gradient.shape) != tuple(output.shape):
        raise ShapeError(f"the gradient of {label} {shape(output)} has shape {shape(gradient)}")
    return gradient


# ---- the way down ---------------------------------------------------------------------------------------------------


def sequence(
    name: str, x: Any, weights: Weights, state: tuple, options: Options, around: Around = PLAIN
) -> tuple[Any, ...]:
    """Check, choose, run. `state` has an entry for each of the cell's, None for zeros.

    -> y, the states after; with a history also the states after every instant
    """
    if around is PLAIN and type(x) is np.ndarray:
        plan = planned((name, options), LOOK, (x, *weights, *state), Plan.of, name, x, weights, state, options)
        if plan is not None:
            return dispatch.forward(plan.backend, plan.problem, x, weights, plan.filled(x, state))[:2]
    if foreign(x):
        given = (lent(x), Weights(*map(lent, weights)), tuple(map(lent, state)))
        return returned(sequence(name, *given, options, Around(*map(lent, around))), like=x)
    tensors = arrays.library(x, "x") == "torch"
    if tensors:
        from .autograd import eager  # first: torch.compile then knows what it needn't look into
    applied = apply(name, x, weights, around, options.reverse)
    if tensors:
        y, after = eager.sequence(applied.name, applied.x, applied.weights, state, options)
    else:
        backend, problem, filled = prepared(applied.name, applied.x, applied.weights, state, options, training=False)
        y, after, _ = dispatch.forward(backend, problem, applied.x, applied.weights, filled)
    return applied.results(y, after, len(state), options.history)


# ---- other libraries' arrays ----------------------------------------------------------------------------------------
# By the protocol of DLPack, nothing is copied: NumPy looks at what is on the CPU, torch at what is on a GPU.

CPU = 1  # DLPack's kDLCPU
KNOWN = ("numpy", "torch", "cupy")


def foreign(x: Any) -> bool:
    root = type(x).__module__.partition(".")[0]
    return root not in KNOWN and hasattr(x, "__dlpack_device__") and hasattr(x, "__array_namespace__")


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
