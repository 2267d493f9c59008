"""Recurrent layers as functions of arrays: `rnn`, `lstm`, `gru` on NumPy, torch and CuPy arrays alike, and `vjp`.

Arrays of other libraries that speak DLPack and the array API, JAX's for one, go in and come out as they are.

One layer, one direction, time-major. Here keywords are checked; `validation` checks arrays, `dispatch` chooses what
computes.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any, NoReturn, TypedDict, Unpack

import numpy as np

from gpu_rnn.kernels import cells

from .backends import dispatch
from .backends.call_cache import CachedCall, lookup
from .core import arrays
from .core.flat_runs import FlatRuns
from .core.optional_imports import require
from .core.problem import Grads, Modifiers, Options, Run, Weights, with_zeros
from .core.validation import (
    ShapeError,
    as_count,
    check_flags,
    check_words,
    describe_value,
    first_states,
    shape,
    validate,
    zero_states,
)
from .modifiers.apply import NO_MODIFIERS, apply

FLAGS = ("training", "return_states", "coupled", "reset_after")
NONLINEARITIES = ("tanh", "relu")
PROJECTED = "gru+projected"
NORMALIZED_STEP_EXACT = (
    "step_exact=True projects the inputs step by step, but layer_norm normalizes the projection of all steps at once"
)


class ModifierKeywords(TypedDict, total=False):
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
    num_heads: N blocks on the diagonal of w_hh, which is [G*H, H/N] then: for each unit its row of the block of its
        head. The H units of a gate are those of head 0, of head 1 and so on; nothing goes from one head to another
        within the layer. N must divide H. Not with w_hr.
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
    num_heads: int


class GRUKeywords(ModifierKeywords, total=False):
    """Keywords of `gru`, in addition to those of every function.

    layer_norm: two gains [3*H], of the input and of the recurrent projection, which are normalized: over all units of r
        and z together, and over those of n (Ba, Kiros & Hinton 2016).
    layer_norm_over: "units", all of them, or "head": those of each head by themselves. With num_heads > 1 it must be
        "head", since heads don't see each other.
    reset_after: True applies the reset gate after the recurrent matmul (cuDNN, torch); False before it (Cho et al.
        2014): n = tanh(x_n + w_hn (r h_{t-1}) + b_hn), which takes two matmuls per time step.
    recurrent_dropout_on: "h" drops h before the recurrent matmul; "candidate" drops the candidate, n or tanh(g):
        recurrent dropout without memory loss (Semeniuta et al. 2016).
    """

    layer_norm: Any
    layer_norm_over: str
    reset_after: bool
    recurrent_dropout_on: str


class LSTMKeywords(ModifierKeywords, total=False):
    """Keywords of `lstm`, in addition to those of every function.

    peephole: [3*H] weights of the cell state in the gates i, f, o (Gers & Schmidhuber 2000); coupled, [2*H].
    coupled: whether f = 1 - i (CIFG; Greff et al. 2017); then the gates are i, g, o and G = 3.
    recurrent_dropout_on: as for `gru`.
    cell_clip: bound of the cell state, applied before it is used (Sak et al. 2014).
    layer_norm: gains [4*H] of the input and of the recurrent projection, gain and bias [H] of the cell state in the
        output, the bias or None; all three are normalized, over all gates and units (Ba, Kiros & Hinton 2016).
    layer_norm_over: as for `gru`.
    """

    peephole: Any
    coupled: bool
    cell_clip: float | None
    recurrent_dropout_on: str
    layer_norm: Any
    layer_norm_over: str


def lstm(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, h0=None, c0=None, reverse=False, backend=None, precision=None,
    recompute=False, step_exact=False, **modifiers: Unpack[LSTMKeywords],
) -> tuple[Any, ...]:  # fmt: skip
    """Compute a long short-term memory over a whole sequence.

    At every time step, with a = w_ih x_t + b_ih + w_hh h_{t-1} + b_hh cut into i, f, g, o (torch's order):

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),    h_t = sigmoid(o) tanh(c_t),    then h_t <- w_hr h_t if given

    (Hochreiter & Schmidhuber 1997, Gers et al. 2000; projection: Sak et al. 2014; as torch.nn.LSTM and cuDNN.)

    Args:
        x: [T, B, I] input. float64, float32, or on a GPU and for torch also float16, bfloat16; as all other arrays.
        w_ih: [4*H, I] input weights. None: x is the input projection w_ih x_t itself, [T, B, 4*H], looked up or
            computed before; b_ih is added all the same. x is never written to.
        w_hh: [4*H, P] recurrent weights; P = H without `w_hr`. With num_heads=N [4*H, H/N].
        b_ih, b_hh: [4*H] biases, or None.
        w_hr: [P, H] projection of the output, P < H, or None.
        h0: [B, P] first output, c0: [B, H] first cell state; zeros when None.
        reverse: run from the last time step to the first; outputs stay at their time steps.
        backend: "numpy", "native", "triton" or "cuda" selects one; None or "auto" takes $GPU_RNN_BACKEND or the first
            that supports the call: "native" for arrays on a CPU, whose cells are compiled once, and "numpy" without a
            C++ compiler; "cuda", else "triton" for those on a GPU.
        precision: of float32 matmuls on a GPU, forward and backward: "tf32" rounds their inputs to TF32, "ieee"
            doesn't. None follows torch.backends.cudnn.rnn.fp32_precision, as torch.nn does, for torch tensors, and is
            "ieee" for others. It has no effect on other dtypes or on a CPU.
        recompute: True saves no activations (activation checkpointing): backward first runs forward once more, and the
            gradients are the same bit for bit (Chen et al. 2016, with one checkpoint per layer).
        step_exact: True makes the results, bit for bit, equal to those of one call per time step with the states passed
            on; the input projection is then one matmul per time step. Not with `layer_norm`.
        modifiers: modifiers and variants: `LSTMKeywords`.

    Returns:
        y [T, B, P] every h_t, and (hT [B, P], cT [B, H]) after the last time step; with return_states also (y, c
        [T, B, H]), the states after every time step. Arrays of the library of x; torch tensors are differentiable.

    Raises:
        ShapeError: shapes that don't fit, or T = 0. TypeError: mixed or unknown kinds of array, dtypes or devices.
        BackendError: the requested backend does not support this call; the message lists every reason.
        ValueError: an unknown backend or precision, or "tf32" for float64.
    """
    options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    return unpack_states(run("lstm", x, weights, (h0, c0), *parse_keywords(options, modifiers, LSTMKeywords)), 2)


def gru(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, h0=None, s0=None, reverse=False, backend=None, precision=None,
    recompute=False, step_exact=False, **modifiers: Unpack[GRUKeywords],
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
        reverse, backend, precision, recompute, step_exact: as for `lstm`. modifiers: `GRUKeywords`.

    Returns:
        y [T, B, P] every h_t, and hT [B, P] after the last time step, or with w_hr (hT, sT [B, H]); with return_states
        also those after every time step. Raises as `lstm`.
    """
    options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
    weights, name = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), cell_name(gru, {"w_hr": w_hr, "s0": s0})
    state = (h0,) if w_hr is None else (h0, s0)
    return unpack_states(run(name, x, weights, state, *parse_keywords(options, modifiers, GRUKeywords)), len(state))


def rnn(
    x, w_ih, w_hh, b_ih=None, b_hh=None, *, w_hr=None, nonlinearity="tanh", h0=None, reverse=False, backend=None,
    precision=None, recompute=False, step_exact=False, **modifiers: Unpack[ModifierKeywords],
) -> tuple[Any, ...]:  # fmt: skip
    """Compute Elman's recurrent network over a whole sequence: h_t = f(w_ih x_t + b_ih + w_hh h_{t-1} + b_hh) (Elman
    1990).

    Args:
        x: [T, B, I] input, or [T, B, H] where w_ih is None. w_ih: [H, I] or None, as for `lstm`. w_hh: [H, P],
        P = H without w_hr. b_ih, b_hh: [H] or None. h0: [B, P] or None for zeros.
        w_hr: [P, H] projects h_t, as for `lstm`, or None.
        nonlinearity: f, "tanh" or "relu".
        reverse, backend, precision, recompute, step_exact: as for `lstm`. modifiers: `ModifierKeywords`.

    Returns:
        y [T, B, P] every h_t, and hT [B, P] after the last time step; y again with return_states. Raises as `lstm`, and
        ValueError for another f.
    """
    options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
    weights, name = Weights(w_ih, w_hh, b_ih, b_hh, w_hr), rnn_cell_name(nonlinearity)
    return unpack_states(run(name, x, weights, (h0,), *parse_keywords(options, modifiers, ModifierKeywords)), 1)


KEYWORDS: dict[Callable, type] = {}  # of what vjp takes


def add_function(function: Callable, keywords: type, name: str) -> None:
    """Have vjp take a function, and torch.jit.script refuse it."""
    KEYWORDS[function] = keywords
    function.__prepare_scriptable__ = partial(refuse_script, name, "call")  # type: ignore[attr-defined]


def refuse_script(name: str, what: str) -> NoReturn:
    """Tell what to do instead: torch.jit.script calls `__prepare_scriptable__` of whatever it is to compile."""
    raise NotImplementedError(
        f"torch.jit.script compiles Python, but gpu_rnn.{name} calls kernels that aren't Python. "
        f"Record the {what} by torch.jit.trace, and script what is around the traced one; or use torch.export"
    )


for _function, _keywords in ((lstm, LSTMKeywords), (gru, GRUKeywords), (rnn, ModifierKeywords)):
    add_function(_function, _keywords, _function.__name__)


def parse_keywords(options: Options, keywords: Any, known: type) -> tuple[Options, Modifiers]:
    """Check a caller's keywords, and sort them into options and modifiers."""
    reverse, recompute, step_exact = options.reverse, options.recompute, options.step_exact
    check_flags(reverse=reverse, recompute=recompute, step_exact=step_exact)
    check_words(backend=options.backend, precision=options.precision)
    if not type(reverse) is type(recompute) is type(step_exact) is bool:  # np.bool_, which no C++ or operator takes
        options = options._replace(reverse=bool(reverse), recompute=bool(recompute), step_exact=bool(step_exact))
    if not keywords:
        return options, NO_MODIFIERS
    values = dict(keywords)
    if unknown := values.keys() - known.__annotations__.keys():
        names = ", ".join(known.__annotations__)
        raise TypeError(f"got an unexpected keyword argument {sorted(unknown)[0]!r}; there are {names}")
    check_flags(**{name: values[name] for name in FLAGS if name in values})
    seed = values.get("seed")
    if isinstance(seed, bool) or not (seed is None or isinstance(seed, Integral) or hasattr(seed, "dtype")):
        raise TypeError(f"seed must be an int, or an int64 array [1] where x is; got {describe_value(seed)}")
    if options.step_exact and values.get("layer_norm") is not None:
        raise ValueError(NORMALIZED_STEP_EXACT)
    heads = as_count("num_heads", values.pop("num_heads", 1))
    options = options._replace(history=values.pop("return_states", False), heads=heads)
    return options, Modifiers(**values)


def unpack_states(results: tuple, S: int) -> tuple[Any, ...]:
    """y, and groups with one array per state as that array or as a tuple."""
    y, *groups = results
    return y, *[tuple(group) if S > 1 else group[0] for group in groups]


def cell_name(function: Callable, args: Mapping[str, Any]) -> str:
    """The name of the cell that a function's arguments select."""
    if function is rnn:
        return rnn_cell_name(args["nonlinearity"])
    if function is gru and args["w_hr"] is not None:
        return PROJECTED
    if function is gru and args["s0"] is not None:
        raise TypeError("s0 is given, but w_hr is None: a GRU has a state of its own only where h is projected")
    return function.__name__


def rnn_cell_name(nonlinearity: str) -> str:
    """The name of the cell of `rnn`."""
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
    values = bound.arguments
    if is_dlpack_array(values["x"]):
        keywords = {label: from_dlpack(value) for label, value in bound.kwargs.items()}
        outputs, pullback_borrowed = vjp(function, *map(from_dlpack, bound.args), **keywords)
        results = to_library_of(outputs, like=values["x"])
        return results, lambda d: to_library_of(pullback_borrowed(from_dlpack(d)), like=values["x"])
    if arrays.library(values["x"], "x") == "torch":
        from .autograd.custom_ops import refuse_if_observed

        refuse_if_observed("gpu_rnn.vjp", "use torch.func.vjp, or torch.autograd.grad, of the function itself")
    name = cell_name(function, values)
    weights = Weights(*(values.get(field) for field in Weights._fields))
    cell = cells.get(name)
    initial = {label: values[label] for label in first_states(cell)}
    options = Options(**{field: values[field] for field in Options._fields if field in values})
    options, modifiers = parse_keywords(options, values["modifiers"], KEYWORDS[function])
    modified = apply(name, values["x"], weights, modifiers, options.reverse, options.heads)
    call_run = Run(modified.x, modified.weights, (*initial.values(),), options.reverse)
    call = make_call(modified.name, call_run, options, training=not options.recompute)
    runs = with_zeros([call_run], call.zeros, partial(arrays.zeros, like=call_run.x))
    (result,) = call.backend.forward(call.problem, runs)
    outputs = modified.unpack(result.y, (*result.last, *result.history), cell.S, options.history)
    # layer_norm takes weights out of a run; what is labelled is what the caller gave
    present = {"x": True} | modified.weights._asdict()
    needs = {label for label, array in present.items() if array is not None and values.get(label) is not None}
    needs |= {"units"} if modified.sources else set()

    def pullback(doutputs: Any) -> dict[str, Any]:
        if not isinstance(doutputs, (tuple, list)):
            raise TypeError(f"expected a tuple, a gradient for each output; got {type(doutputs).__name__}")
        if len(doutputs) != len(outputs):
            raise ShapeError(f"there are {len(outputs)} outputs, but {len(doutputs)} gradients were given")
        labels: tuple[Any, ...] = "y", [letter + "T" for letter in cell.states], [*cell.states]
        dy, *rest = map(check_output_grad, labels, outputs, doutputs)
        dlast, dstates = rest[0], rest[1] if options.history else [0.0]
        dy, *dhistory = map(modified.mask_outputs, [dy + dstates[0], *dstates[1:]])  # y is h: both gradients add up
        saved = (result.y, *result.saved) if result.saved else ()
        grads = Grads(dy, tuple(dlast), tuple(dhistory))
        (gradients,) = dispatch.backward(call.backend, call.problem, runs, [saved], [grads], [needs])
        states = zip(initial, gradients.pop("state"), strict=True)
        return modified.vjp(gradients) | {label: dstate for label, dstate in states if initial[label] is not None}

    return unpack_states(outputs, cell.S), pullback


def check_output_grad(label: str | list[str], output: Any, gradient: Any) -> Any:
    """The gradient of an output, or those of several in a list, with zeros for None; or an error."""
    if isinstance(label, list):
        gradients = gradient if isinstance(gradient, (tuple, list)) else [gradient]
        if gradient is None:
            gradients = [None] * len(label)
        if len(gradients) != len(label):
            states = ", ".join(label)
            raise ShapeError(f"there are {len(label)} states ({states}), but {len(gradients)} gradients were given")
        return [*map(check_output_grad, label, output, gradients)]
    if gradient is None:
        return arrays.zeros(tuple(output.shape), like=output)
    actual, expected = (" ".join((arrays.library(a), arrays.dtype(a), arrays.device(a))) for a in (gradient, output))
    if actual != expected:
        raise TypeError(f"the gradient of {label} is {actual}, but {label} is {expected}")
    if tuple(gradient.shape) != tuple(output.shape):
        raise ShapeError(f"the gradient of {label} {shape(output)} has shape {shape(gradient)}")
    return gradient


# ---- One call -------------------------------------------------------------------------------------------------------


def run(
    name: str, x: Any, weights: Weights, state: tuple, options: Options, modifiers: Modifiers = NO_MODIFIERS
) -> tuple[Any, ...]:
    """Check, choose, run. `state` has an entry for each of the cell's, None for zeros.

    -> y, the states after; with a history also the states after every time step
    """
    if modifiers is NO_MODIFIERS and type(x) is np.ndarray:
        return run_arrays(name, Run(x, weights, state, options.reverse), options, "numpy")
    if is_dlpack_array(x):
        args = from_dlpack(x), Weights(*map(from_dlpack, weights)), tuple(map(from_dlpack, state))
        return to_library_of(run(name, *args, options, Modifiers(*map(from_dlpack, modifiers))), like=x)
    library = arrays.library(x, "x")
    if library == "torch":
        from .autograd import eager  # first: torch.compile then knows what it needn't look into
    modified = apply(name, x, weights, modifiers, options.reverse, options.heads)
    single = Run(modified.x, modified.weights, state, options.reverse)
    if library == "torch":
        ((y, after),) = eager.run(modified.name, [single], options)
    else:
        y, after = run_arrays(modified.name, single, options, library)
    return modified.unpack(y, after, len(state), options.history)


def run_arrays(name: str, run: Run, options: Options, library: str) -> tuple[Any, tuple]:
    """Run NumPy or CuPy arrays -> y, the states after, then their history."""
    tensors = run.x, *run.weights, *run.state
    call = lookup((name, options), library, tensors, make_call, name, run, options)
    assert call is not None
    runs = with_zeros([run], call.zeros, partial(arrays.zeros, like=run.x))
    ((y, last, history, _),) = call.backend.forward(call.problem, runs)
    return y, last + history


def make_call(name: str, run: Run, options: Options, training: bool = False) -> CachedCall:
    """Check that everything fits, and choose."""
    problem = validate(name, [run], options, training)
    backend = dispatch.choose(problem, options.backend)
    return CachedCall(backend, problem, FlatRuns.of([run]), zero_states(problem, [run]))


# ---- other libraries' arrays ----------------------------------------------------------------------------------------
# By the protocol of DLPack, nothing is copied: NumPy looks at what is on the CPU, torch at what is on a GPU.

CPU = 1  # DLPack's kDLCPU
KNOWN = ("numpy", "torch", "cupy")


def is_dlpack_array(x: Any) -> bool:
    root = type(x).__module__.partition(".")[0]
    return root not in KNOWN and hasattr(x, "__dlpack_device__") and hasattr(x, "__array_namespace__")


def from_dlpack(value: Any) -> Any:
    """Other libraries' arrays, and those in tuples, as NumPy's or torch's; all else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(map(from_dlpack, value))
    if not is_dlpack_array(value):
        return value
    on_cpu = value.__dlpack_device__()[0] == CPU
    return (np if on_cpu else require("torch", "an array on a GPU")).from_dlpack(value)


def to_library_of(results: Any, like: Any) -> Any:
    """Arrays, and those in tuples and dicts, as the library's of `like`."""
    if isinstance(results, tuple):
        return tuple(to_library_of(result, like) for result in results)
    if isinstance(results, dict):
        return {label: to_library_of(result, like) for label, result in results.items()}
    return like.__array_namespace__().from_dlpack(results)
