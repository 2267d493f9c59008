"""The whole backend without a GPU: public functions and autograd above it, Triton's interpreter below."""

from functools import partial

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import triton as backend
from gpu_rnn.core.problem import Problem, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.triton import config as plans

from .. import calls, judge, sequences

FUNCTIONS = {
    "lstm": gpu_rnn.lstm,
    "gru": gpu_rnn.gru,
    "rnn_tanh": partial(gpu_rnn.rnn, nonlinearity="tanh"),
    "rnn_relu": partial(gpu_rnn.rnn, nonlinearity="relu"),
}
SIZES = [(1, 1, 1, 1), (4, 2, 3, 3), (1, 17, 5, 16), (4, 1, 2, 20), (4, 17, 3, 33)]  # T, B, I, H
EVERY = pytest.mark.parametrize("name", cells.NAMES)
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
STORED = pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])


@pytest.fixture(params=["stepwise", "sequence"])
def how(request, monkeypatch):
    """Which kernels run."""
    if request.param == "stepwise":
        monkeypatch.setattr(plans, "sequence", lambda *args, **kwargs: (None, "told so"))
    return request.param


def guarded(array):
    """The same values, between NaN that must not be read."""
    n = array.numel()
    buffer = torch.full((n + 128,), float("nan"), dtype=array.dtype)
    buffer[64 : 64 + n] = array.flatten()
    return buffer[64 : 64 + n].view(array.shape)


def differentiate(case):
    """Every result by name, through the public function and autograd."""
    tracked = case.mapped(lambda array: guarded(array).requires_grad_())
    weights = {name: w for name, w in tracked.weights._asdict().items() if w is not None}
    initial = {f"{letter}0": array for letter, array in zip(case.cell.states, tracked.state, strict=True)}
    y, last = FUNCTIONS[case.cell.name](tracked.x, **weights, **initial, reverse=case.reverse, backend="triton")
    last = last if isinstance(last, tuple) else (last,)
    torch.autograd.backward((y, *last), (case.dy, *case.dlast))
    results = {"y": y} | {f"{letter}T": array for letter, array in zip(case.cell.states, last, strict=True)}
    return results | {f"d{name}": array.grad for name, array in ({"x": tracked.x} | weights | initial).items()}


@EVERY
@STORED
@BOTH_WAYS
def test_every_result_is_as_good_as_torchs(name, dtype, reverse, how):
    for size in SIZES:
        case = sequences.draw(name, dtype, *size, reverse=reverse)
        T, B, I, H = size
        problem = Problem(case.cell, T, B, I, H, dtype=dtype, library="torch", training=True, reverse=reverse)
        assert ("per-step" if how == "stepwise" else "persistent kernel") in backend.plan(problem)
        sequences.check(case, differentiate(case))


@EVERY
def test_float64(name):
    case = sequences.draw(name, "float64", 3, 2, 3, 5)
    sequences.check(case, differentiate(case))


@STORED
@BOTH_WAYS
def test_projection(dtype, reverse):
    case = sequences.draw("lstm", dtype, 3, 2, 4, 9, 5, reverse=reverse)
    sequences.check(case, differentiate(case))


@EVERY
def test_inference_and_training_agree_and_backward_is_repeatable(name, how):
    for bias, reverse in ((False, False), (True, True)):
        case = sequences.draw(name, "bfloat16", 3, 2, 3, 20, reverse=reverse, bias=bias)
        sequences.check(case, case.run(backend.forward, backend.backward))


def test_gradients_are_those_requested():
    case = sequences.draw("gru", "float32", 2, 2, 3, 4)
    inputs = (case.cell, case.x, case.weights, case.state)
    y, _, saved = calls.forward(backend.forward, *inputs, reverse=False, save=True)
    for needs in (set(), {"x"}, {"w_hh", "b_ih"}):
        gradients = calls.backward(backend.backward, *inputs, y, saved, case.dy, case.dlast, reverse=False, needs=needs)
        assert gradients.keys() == needs | {"state"}


def divide_step(x, h, state):
    q = x[0] + h[0]
    return (q / state[1], state[1]), (q,)


def divide_grad(dnew, new, state, saved):
    dq = dnew[0] / state[1]
    return (dq,), (dq,), (0.0, dnew[1] - dq * new[0])


def divide(x, r, state):
    """The same, as the judge has its cells."""
    new, (q,) = divide_step(x, r, state)
    return new, lambda *dnew: divide_grad(dnew, new, state, (q,))


def test_a_cell_that_has_no_value_where_there_is_no_unit(how, monkeypatch):
    """0 / 0 in the padding of a tile, which must not reach the units through the products."""
    monkeypatch.setitem(judge.STEPS, "divide", divide)
    cell = cells.Cell("divide", "a", "hn", divide_step, divide_grad, 1, (False,))
    case = sequences.draw("lstm", "float32", 4, 2, 3, 5)._replace(cell=cell)
    weights = Weights(*(None if w is None else guarded(w[:5]) for w in case.weights))
    case = case._replace(weights=weights, state=(case.state[0], case.state[1].sign() * 2))
    ours = case.run(backend.forward, backend.backward)
    for name, exact in sequences.exact(case).items():
        np.testing.assert_allclose(sequences.wide(ours[name]), exact, rtol=1e-5, atol=1e-5, err_msg=name)
