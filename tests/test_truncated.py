"""`tbptt` against its definition: a loop over time with torch.nn, restarted at every window from a stored state."""

import re

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import gpu_rnn

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
I, H, B = 2, 4, 3
WINDOWS = pytest.mark.parametrize(
    ("T", "k1", "k2"), [(9, 3, 3), (8, 2, 5), (7, 3, 4), (9, 1, 3), (6, 2, 20), (5, 9, 9)]
)
KINDS = pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])


def made(kind, home=gpu_rnn, **arguments):
    torch.manual_seed(3)
    return getattr(home, kind)(I, H, 2, dtype=torch.float64, **arguments)


def sequence(T):
    return torch.randn(T, B, I, dtype=torch.float64, generator=torch.Generator().manual_seed(T)).requires_grad_()


def detached(hx):
    return tree_map(torch.Tensor.detach, hx)


def by_definition(layer, x, k1, k2, loss):
    """The gradients of the parameters and of x: every k1 time steps, the losses of these through the last k2 alone."""
    states, hx = [], None
    for t in range(len(x)):  # by the weights of now, which don't change here
        states.append(hx)
        hx = detached(layer(x[t : t + 1], hx)[1])
    total = 0
    for first in range(0, len(x), k1):
        end = min(first + k1, len(x))
        start = max(end - k2, 0)
        hx = states[start]
        for t in range(start, end):
            y, hx = layer(x[t : t + 1], hx)
            if t >= first:
                total = total + loss(y, t)
    return torch.autograd.grad(total, [x, *layer.parameters()])


def loss(y, first):
    """Of outputs from time step `first` on; no two time steps weigh the same."""
    weights = torch.arange(first + 1, first + 1 + len(y), dtype=y.dtype)[:, None, None]
    return (weights * y.sin()).sum()


@KINDS
@WINDOWS
def test_gradients_are_those_of_the_definition(kind, T, k1, k2):
    x = sequence(T)
    expected = by_definition(made(kind, nn), x, k1, k2, loss)
    for home in (gpu_rnn, nn):
        layer, gradients_of_windows, first = made(kind, home), [], 0
        for y, _ in gpu_rnn.tbptt(layer, x, k1, k2):
            assert len(y) == min(k1, T - first)
            gradients = torch.autograd.grad(loss(y, first), [x, *layer.parameters()])
            gradients_of_windows.append(gradients)
            first += len(y)
            assert not gradients[0][: max(first - k2, 0)].any(), "nothing reaches further back"
            assert gradients[0][max(first - k2, 0)].any()
        assert first == T
        torch.testing.assert_close([sum(parts) for parts in zip(*gradients_of_windows)], list(expected), **CLOSE)


@KINDS
@WINDOWS
@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_and_states_are_the_whole_sequences(kind, T, k1, k2, batch_first):
    """With everything that a call takes."""
    layer, x = made(kind, batch_first=batch_first), sequence(T)
    torch.manual_seed(1)
    count = 2 if kind == "LSTM" else 1
    hx, resets = (tuple(torch.randn(*size, dtype=torch.float64) for _ in range(count)) for size in ((2, B, H), (2, H)))
    hx, resets = (tensors if count > 1 else tensors[0] for tensors in (hx, resets))
    reset = torch.rand(T, B) < 0.3
    if batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    call_options = {
        "reset": reset,
        "reset_state": resets,
        "lengths": torch.tensor([T, 3, 0]),
        "left_padding": torch.tensor([1, 0, 2]),
    }
    expected, last = layer(x, hx, **call_options)
    windows = list(gpu_rnn.tbptt(layer, x, k1, k2, hx, **call_options))
    torch.testing.assert_close(torch.cat([y for y, _ in windows], 1 if batch_first else 0), expected, **CLOSE)
    torch.testing.assert_close(windows[-1][1], last, **CLOSE)


def test_a_single_sequence():
    layer, x = made("LSTM", batch_first=True), sequence(7)[:, 0]
    actual = torch.cat([y for y, _ in gpu_rnn.tbptt(layer, x, 2, 3)])
    torch.testing.assert_close(actual, layer(x)[0], **CLOSE)


def test_weights_may_change_between_windows():
    """The past is computed again by the weights of now, from the state that was put aside."""
    layer, x, first = made("GRU"), sequence(8), 0
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    stored = [None]
    for y, hx in gpu_rnn.tbptt(layer, x, 2, 4):
        start = max(first + 2 - 4, 0)
        again, after = layer(x[start : first + 2], stored[-1])
        torch.testing.assert_close((y, hx), (again[-2:], after), **CLOSE)
        if first + 4 - 4 > start:  # the next window starts two time steps later
            stored.append(detached(layer(x[start : start + 2], stored[-1])[1]))
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
        first += 2
    assert first == 8


def test_the_first_states_learn_from_windows_that_start_there():
    layer, x = made("GRU"), sequence(6)
    h0 = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    reached = []
    for y, _ in gpu_rnn.tbptt(layer, x, 2, 4, h0):
        (gradient,) = torch.autograd.grad(y.sum(), h0, allow_unused=True)
        reached.append(gradient is not None)
    assert reached == [True, True, False]


BAD = {
    "k1 over k2": ("GRU", {}, 3, 2, ValueError, "0 < k1 <= k2, got k1=3 and k2=2"),
    "no k1": ("GRU", {}, 0, 2, ValueError, "got k1=0 and k2=2"),
    "half a time step": ("GRU", {}, 1.5, 2, ValueError, "got k1=1.5 and k2=2"),
    "two directions": ("LSTM", {"bidirectional": True}, 1, 2, ValueError, "for a bidirectional layer: LSTM(2, 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_at_the_call(case):
    kind, arguments, k1, k2, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        gpu_rnn.tbptt(made(kind, **arguments), sequence(4), k1, k2)


def test_what_does_not_fit_is_named_at_the_call():
    with pytest.raises(gpu_rnn.ShapeError, match=re.escape("x has shape [0, 3, 2]")):
        gpu_rnn.tbptt(made("GRU"), sequence(0), 1, 2)
    with pytest.raises(TypeError, match="a layer, not a cell: GRUCell"):
        gpu_rnn.tbptt(gpu_rnn.GRUCell(2, 4), sequence(4), 1, 2)
    with pytest.raises(
        gpu_rnn.ShapeError, match=re.escape("reset has shape [3, 4]; expected [4, 3], with x [4, 3, 2]")
    ):
        gpu_rnn.tbptt(made("GRU"), sequence(4), 1, 2, reset=torch.zeros(3, 4))
