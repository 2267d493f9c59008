"""What a call can ask for around its cells, in the functions: NumPy and torch alike, derivatives, `vjp`, and errors."""

import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn
from gpu_rnn import ShapeError
from gpu_rnn.core.arrays import int64_scalar

from .conftest import sequence_arrays

T, B, I, H = 5, 3, 2, 3
NAMES = ("rnn_tanh", "rnn_relu", "gru", "lstm", "projected")
every_function = pytest.mark.parametrize("name", NAMES)
ARRAYS = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h0", "c0"]
CASES = {
    "reset": ["reset"],
    "reset_state": ["reset", "reset_state"],
    "each row's own reset_state": ["reset", "reset_states"],
    "lengths": ["lengths"],
    "left_padding": ["left_padding", "reverse"],
    "zoneout": ["zoneout"],
    "the mean": ["zoneout", "eval"],
    "dropout": ["recurrent_dropout"],
    "states": ["return_states"],
    "everything": [
        "reset", "reset_states", "lengths", "left_padding", "zoneout", "recurrent_dropout", "return_states", "reverse",
    ],
}  # fmt: skip
VARIANTS = {
    "peephole": ["peephole"],
    "coupled": ["coupled"],
    "cell_clip": ["cell_clip"],
    "all variants": ["peephole", "coupled", "cell_clip", "reset", "reset_state", "zoneout", "return_states"],
}


def drawn(rng, name, case):
    """The function, and all its arguments by name, as NumPy arrays in float64."""
    pieces_of_case, P = CASES.get(case) or VARIANTS[case], 2 if name == "projected" else None
    kind = {"projected": "lstm", "before": "gru"}.get(name, name)
    x, weights, state = sequence_arrays(rng, kind, T, B, I, H, P)
    kwargs = {"x": x, **weights._asdict(), **dict(zip(("h0", "c0"), state))}
    kwargs = {label: array for label, array in kwargs.items() if array is not None}
    many, sizes = kind == "lstm", [array.shape[1] for array in state]
    pieces = {
        "reset": {"reset": rng.random((T, B)) < 0.4},
        "reset_state": {"reset_state": [rng.standard_normal(size) for size in sizes]},
        "reset_states": {"reset_state": [rng.standard_normal((B, size)) for size in sizes]},
        "lengths": {"lengths": np.array([4, 0, 5])},
        "left_padding": {"left_padding": np.array([1, 2, 0])},
        "zoneout": {"zoneout": (0.0, 0.4) if P else (0.3, 0.4)[: len(sizes)], "seed": 7},
        "recurrent_dropout": {"recurrent_dropout": 0.3, "seed": 7},
        "eval": {"training": False},
        "return_states": {"return_states": True},
        "reverse": {"reverse": True},
        "peephole": {"peephole": rng.standard_normal((2 if "coupled" in pieces_of_case else 3) * H)},
        "cell_clip": {"cell_clip": 0.3},
        "coupled": {"coupled": True},
    }
    for piece in pieces_of_case:
        kwargs |= pieces[piece]
    if "reset_state" in kwargs:
        kwargs["reset_state"] = tuple(kwargs["reset_state"]) if many else kwargs["reset_state"][0]
    if name == "before":
        kwargs["reset_after"] = False
    if "coupled" in pieces_of_case:
        kwargs |= {label: kwargs[label][: 3 * H] for label in ("w_ih", "w_hh", "b_ih", "b_hh")}
    function = gpu_rnn.rnn if kind.startswith("rnn") else getattr(gpu_rnn, kind)
    return function, kwargs | ({"nonlinearity": "relu"} if kind == "rnn_relu" else {})


def every_one():
    before = [("before", case) for case in ("reset_state", "the mean", "everything")]
    return [
        *((name, case) for name in NAMES for case in CASES),
        *((n, c) for n in NAMES[3:] for c in VARIANTS),
        *before,
    ]


def tensors(kwargs, *, grad=True):
    def tensor(array):
        made = torch.from_numpy(array)
        return made.requires_grad_() if grad and made.is_floating_point() else made

    return {
        label: tree_map(lambda v: tensor(v) if isinstance(v, np.ndarray) else v, value)
        for label, value in kwargs.items()
    }


def arrays(results):
    return [leaf if isinstance(leaf, np.ndarray) else leaf.detach().numpy() for leaf in tree_leaves(results)]


# ---- libraries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), every_one())
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_numpy_arrays_and_tensors_give_the_same_bits(rng, name, case, dtype):
    """Masks of a seed included."""
    function, kwargs = drawn(rng, name, case)
    kwargs = tree_map(lambda v: v.astype(dtype) if isinstance(v, np.ndarray) and v.dtype == float else v, kwargs)
    ours, theirs = function(**kwargs), function(**tensors(kwargs, grad=False))
    assert all(isinstance(leaf, np.ndarray) and leaf.dtype == dtype for leaf in tree_leaves(ours))
    for a, b in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 3, np.int64(9)])
def test_a_seed_is_a_number_or_an_array(rng, seed):
    function, kwargs = drawn(rng, "lstm", "zoneout")
    runs = [function(**kwargs | {"seed": s})[0] for s in (seed, np.array([seed], "int64"), int(seed) ^ 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@every_function
def test_keywords_that_do_nothing_change_nothing(rng, name):
    function, kwargs = drawn(rng, name, "states")
    nothing = {
        "reset": np.zeros((T, B), bool), "lengths": np.full(B, T), "left_padding": np.zeros(B, int), "zoneout": 0,
        "recurrent_dropout": 0, "training": True,
    }  # fmt: skip
    for a, b in zip(arrays(function(**kwargs)), arrays(function(**kwargs, **nothing)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_functions_compile():
    function, kwargs = drawn(np.random.default_rng(1), "lstm", "everything")
    kwargs = tensors(kwargs | {"peephole": np.ones(3 * H)})
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(**kwargs)
    torch.testing.assert_close(actual, function(**kwargs), rtol=0, atol=0)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "case"), every_one())
def test_first_and_second_derivatives_are_the_numerical_ones(rng, name, case):
    function, kwargs = drawn(rng, name, case)
    kwargs = tensors(kwargs)
    learned = [label for label, value in kwargs.items() if any(t.requires_grad for t in floats(value))]
    kwargs["x"].data[:, 0] += 0.01  # away from a rectifier's kink

    def run(*values):
        rest = iter(values)
        changed = {label: tree_map(lambda _: next(rest), kwargs[label]) for label in learned}
        return tuple(tree_leaves(function(**kwargs | changed)))

    values = [leaf for label in learned for leaf in tree_leaves(kwargs[label])]
    assert gradcheck(run, values, fast_mode=True)
    assert gradgradcheck(run, values, fast_mode=True)


def floats(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(("name", "case"), every_one())
def test_vjp_is_torchs_gradient(rng, name, case):
    """On NumPy arrays and on tensors; those of whole tuples have the structure of what was given."""
    function, kwargs = drawn(rng, name, case)
    outputs, pullback = gpu_rnn.vjp(function, **kwargs)
    doutputs = tree_map(lambda output: rng.standard_normal(output.shape), outputs)
    actual = pullback(doutputs)

    leaves = tensors(kwargs)
    theirs = function(**leaves)
    arriving = [torch.from_numpy(d) for d in tree_leaves(doutputs)]
    torch.autograd.backward(tree_leaves(theirs), arriving)
    for a, b in zip(arrays(outputs), arrays(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = {label: tree_map(lambda t: t.grad, leaves[label]) for label in leaves if floats_learned(leaves[label])}
    assert actual.keys() == expected.keys()
    for label, gradient in expected.items():
        assert isinstance(actual[label], tuple) == isinstance(gradient, tuple)
        for a, b in zip(tree_leaves(actual[label]), tree_leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=label)

    lent, lent_pullback = gpu_rnn.vjp(function, **leaves)
    assert not any(output.requires_grad for output in tree_leaves(lent))
    for a, b in zip(
        tree_leaves(lent_pullback(tree_map(torch.from_numpy, doutputs))), tree_leaves(actual), strict=True
    ):  # the same order: that of the dict
        np.testing.assert_array_equal(a.numpy(), b)


def floats_learned(value):
    return any(leaf.requires_grad for leaf in floats(value))


def test_vjp_takes_none_for_zero(rng):
    function, kwargs = drawn(rng, "lstm", "everything")
    (y, (hT, cT), (h, c)), pullback = gpu_rnn.vjp(function, **kwargs)
    zeros = [np.zeros_like(array) for array in (y, hT, cT, h, c)]
    expected = pullback((y, (zeros[1], zeros[2]), (zeros[3], c)))
    for some in ((y, None, (None, c)), (None, (None, None), (y, c)), (y, [None, None], [None, c])):
        for a, b in zip(tree_leaves(pullback(some)), tree_leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)
    assert not any(gradient.any() for gradient in tree_leaves(pullback((None, None, None))))


def test_nan_in_padding_reaches_no_gradient_of_vjp(rng):
    function, kwargs = drawn(rng, "lstm", "lengths")
    results = []
    for fill in (0.0, np.nan):
        x, dy = kwargs["x"].copy(), np.ones((T, B, H))
        x[4:, 0], x[:, 1], dy[4:, 0], dy[:, 1] = fill, fill, fill, fill
        (y, last), pullback = gpu_rnn.vjp(function, **kwargs | {"x": x})
        results.append([y, *last, *pullback((dy, last)).values()])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


# ---- errors ---------------------------------------------------------------------------------------------------------

LSTM = {"x": np.ones((5, 3, 4)), "w_ih": np.ones((24, 4)), "w_hh": np.ones((24, 6))}  # T 5, B 3, I 4, H 6
GRU = {"x": np.ones((5, 3, 4)), "w_ih": np.ones((18, 4)), "w_hh": np.ones((18, 6))}
RESET = np.ones((5, 3), bool)
BAD = {
    "reset": (LSTM, {"reset": RESET.T}, ShapeError, "reset has shape [3, 5]; expected [5, 3], with x [5, 3, 4]"),
    "reset of torch": (LSTM, {"reset": torch.ones(5, 3)}, TypeError, "reset is torch float32 cpu; with this x it must"),
    "a list": (LSTM, {"lengths": [1, 2, 3]}, TypeError, "got list"),
    "reset of numbers": (GRU, {"reset": np.ones((5, 3))}, TypeError, "reset is numpy float64 cpu; with this x it must"),
    "lengths of fractions": (GRU, {"lengths": np.ones(3)}, TypeError, "lengths is numpy float64 cpu; with this x it m"),
    "a mask for lengths": (GRU, {"lengths": RESET[0]}, TypeError, "lengths is numpy bool cpu; with this x it must be"),
    "lengths": (LSTM, {"lengths": np.ones(2, int)}, ShapeError, "lengths has shape [2]; expected [3], with x [5, 3"),
    "left_padding": (GRU, {"left_padding": np.ones((3, 1), int)}, ShapeError, "left_padding has shape [3, 1]"),
    "no reset": (GRU, {"reset_state": np.ones(6)}, ValueError, "reset_state is given, but reset, which"),
    "half a reset_state": (
        LSTM, {"reset": RESET, "reset_state": np.ones(6)}, ValueError,
        "reset_state has 1 arrays, but lstm has 2 states (h, c)",
    ),
    "reset_state of two": (GRU, {"reset": RESET, "reset_state": (np.ones(6),) * 2}, ValueError, "gru has 1 state (h)"),
    "size of reset_state": (
        LSTM, {"reset": RESET, "reset_state": (np.ones(6), np.ones((2, 6)))}, ShapeError,
        "reset_state c has shape [2, 6]; expected [3, 6] or [6] or [1, 6], with x [5, 3, 4]",
    ),
    "dtype of reset_state": (
        GRU, {"reset": RESET, "reset_state": np.ones(6, "f")}, TypeError, "reset_state h is numpy float32 cpu"
    ),
    "zoneout of three": (LSTM, {"zoneout": (0.1, 0.1, 0.1)}, ValueError, "0.1), but lstm has 2 states (h, c)"),
    "zoneout of a GRU": (GRU, {"zoneout": (0.1, 0.1)}, ValueError, "(0.1, 0.1), but gru has 1 state (h)"),
    "zoneout": (GRU, {"zoneout": 1.5, "seed": 1}, ValueError, "zoneout must be a number in [0, 1], a probability; got"),
    "a list of zoneout": (LSTM, {"zoneout": [0.1, 0.1]}, ValueError, "zoneout must be a number in [0, 1]"),
    "zoneout of h projected": (
        LSTM | {"w_hh": np.ones((24, 2)), "w_hr": np.ones((2, 6))}, {"zoneout": 0.1, "seed": 1}, ValueError,
        "projected from H = 6 to P = 2; pass (0, p)",
    ),
    "no seed": (GRU, {"zoneout": 0.1}, ValueError, "zoneout draws random masks and needs seed="),
    "no seed for dropout": (GRU, {"recurrent_dropout": 0.1}, ValueError, "recurrent dropout draws random masks"),
    "dropout": (GRU, {"recurrent_dropout": -0.1}, ValueError, "recurrent_dropout must be a number in [0, 1]"),
    "seed": (GRU, {"zoneout": 0.1, "seed": np.ones(2, "int64")}, ShapeError, "seed has shape [2]; expected [1], with"),
    "dtype of seed": (GRU, {"zoneout": 0.1, "seed": np.ones(1)}, TypeError, "seed is numpy float64 cpu; with this x"),
    "kind of seed": (GRU, {"zoneout": 0.1, "seed": 1.5}, TypeError, "seed must be an int, or an int64 array"),
    "size of seed": (GRU, {"zoneout": 0.1, "seed": 2**64}, ValueError, "seed must be an int of 64 bits, got 184467440"),
    "peephole": (LSTM, {"peephole": np.ones(24)}, ShapeError, "peephole has shape [24]; expected [18], with x [5"),
    "dtype of peephole": (LSTM, {"peephole": np.ones(18, "f")}, TypeError, "peephole is numpy float32 cpu; with"),
    "peephole of a GRU": (GRU, {"peephole": np.ones(18)}, TypeError, "unexpected keyword argument 'peephole'; there"),
    "coupled": (LSTM | {"w_hh": np.ones((25, 6))}, {"coupled": True}, ShapeError, "has 3 gates (i, g, o)"),
    "cell_clip": (LSTM, {"cell_clip": -1.0}, ValueError, "cell_clip must be a number larger than 0, got -1.0"),
    "unknown": (LSTM, {"zonout": 0.1}, TypeError, "unexpected keyword argument 'zonout'; there are reset, reset_state"),
    "rank of x": (LSTM | {"x": np.ones((5, 4))}, {"training": False}, ShapeError, "x has shape [5, 4]; expected 3 dim"),
    "a list of x": (LSTM | {"x": [[1.0]]}, {"training": False}, TypeError, "expected a NumPy, torch or CuPy array"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_shapes(case):
    kwargs, changes, error, message = BAD[case]
    function = gpu_rnn.lstm if len(kwargs["w_ih"]) == 24 else gpu_rnn.gru
    for call in (function, lambda **all: gpu_rnn.vjp(function, **all)):
        with pytest.raises(error, match=re.escape(message)):
            call(**kwargs | changes)


def test_vjp_names_a_gradient_that_does_not_fit():
    (y, last, (h, c)), pullback = gpu_rnn.vjp(gpu_rnn.lstm, **LSTM, return_states=True)
    with pytest.raises(ShapeError, match=re.escape("the gradient of c [5, 3, 6] has shape [3, 6]")):
        pullback((y, last, (None, c[0])))
    with pytest.raises(ShapeError, match="there are 3 outputs, but 2 gradients were given"):
        pullback((y, last))
    with pytest.raises(ShapeError, match=re.escape("there are 2 states (h, c), but 1 gradients were given")):
        pullback((y, last, h))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_a_seed_does_not_come_from_the_host():
    """A copy from there waits for the GPU, and no CUDA graph captures it."""
    like = torch.zeros(2)
    for value in (5, -(2**63), 2**63 - 1):
        with Recorder() as recorder:
            seed = int64_scalar(value, like=like)
        assert recorder.names == ["aten.full.default"]
        assert (seed.tolist(), seed.dtype) == ([value], torch.int64)
        of_numpy = int64_scalar(value, like=np.zeros(2))
        assert (of_numpy.tolist(), of_numpy.dtype) == ([value], np.int64)
