"""What layers say to bad input, before anything runs; and input that is odd but good."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import gpu_rnn
from gpu_rnn import ShapeError

from .test_layers import CELLS, LAYERS, flat

ones = torch.ones
LSTM, GRU = gpu_rnn.LSTM(3, 4, 2, bidirectional=True), gpu_rnn.GRU(3, 4, batch_first=True)
PROJECTED, CELL, LSTM_CELL = gpu_rnn.LSTM(3, 4, proj_size=2), gpu_rnn.GRUCell(3, 4), gpu_rnn.LSTMCell(3, 4)


def pack(rows, *sizes):
    return PackedSequence(ones(rows, 3), torch.tensor(sizes, dtype=torch.int64))


SHAPES = {  # a ShapeError: layer, input, hx, what the message contains
    "rank": (LSTM, ones(2, 5, 2, 3), None, "[2, 5, 2, 3]; expected [T, B, I] or [T, I] with I = input_size = 3"),
    "rank 1": (LSTM, ones(3), None, "input has shape [3]; expected [T, B, I]"),
    "size": (GRU, ones(2, 5, 4), None, "GRU: input has shape [2, 5, 4]; expected [B, T, I] or [T, I]"),
    "no time": (LSTM, ones(0, 2, 3), None, "input has shape [0, 2, 3], [T, B, I], and T must be"),
    "no time, batch first": (GRU, ones(2, 0, 3), None, "input has shape [2, 0, 3], [B, T, I]"),
    "no time, single": (GRU, ones(0, 3), None, "input has shape [0, 3], [T, I]"),
    "no time, no batch": (LSTM, ones(0, 0, 3), None, "input has shape [0, 0, 3]"),
    "layers of h0": (
        LSTM, ones(5, 2, 3), (ones(2, 2, 4), ones(4, 2, 4)),
        "h0 has shape [2, 2, 4]; expected [L*D, B, H] = [4, 2, 4], with input [5, 2, 3]",
    ),
    "batch of c0": (LSTM, ones(5, 2, 3), (ones(4, 2, 4), ones(4, 1, 4)), "c0 has shape [4, 1, 4]; expected"),
    "batch of h0": (GRU, ones(2, 5, 3), ones(1, 5, 4), "expected [L*D, B, H] = [1, 2, 4], with input [2, 5, 3]"),
    "h0 unbatched": (GRU, ones(2, 5, 3), ones(1, 4), "h0 has shape [1, 4]; expected [L*D, B, H]"),
    "h0 batched": (GRU, ones(5, 3), ones(1, 1, 4), "h0 has shape [1, 1, 4]; expected [L*D, H] = [1, 4]"),
    "projected h0": (PROJECTED, ones(5, 2, 3), (ones(1, 2, 4),) * 2, "h0 has shape [1, 2, 4]; expected [L*D, B, P]"),
    "projected c0": (PROJECTED, ones(5, 2, 3), (ones(1, 2, 2),) * 2, "c0 has shape [1, 2, 2]; expected [L*D, B, H]"),
    "cell, rank": (CELL, ones(1, 2, 3), None, "GRUCell: input has shape [1, 2, 3]; expected [B, I] or [I]"),
    "cell, size": (CELL, ones(2, 4), None, "GRUCell: input has shape [2, 4]"),
    "cell, hx": (CELL, ones(2, 3), ones(1, 4), "[1, 4]; expected [B, H] = [2, 4], with input [2, 3]"),
    "cell, hx batched": (CELL, ones(3), ones(1, 4), "h0 has shape [1, 4]; expected [H] = [4]"),
    "packed sum": (GRU, pack(5, 2, 2), None, "data has shape [5, 3] and batch_sizes [2, 2]"),
    "packed growing": (GRU, pack(5, 2, 3), None, "data has shape [5, 3] and batch_sizes [2, 3]"),
    "packed zero": (GRU, pack(5, 3, 2, 0), None, "data has shape [5, 3] and batch_sizes [3, 2, 0]"),
    "packed negative": (GRU, pack(5, 6, -1), None, "data has shape [5, 3] and batch_sizes [6, -1]"),
    "packed nothing": (GRU, pack(0), None, "data has shape [0, 3] and batch_sizes []"),
    "packed size": (gpu_rnn.GRU(4, 4), pack(5, 3, 2), None, "input has shape [5, 3]; expected [N, I]"),
    "packed hx": (GRU, pack(5, 3, 2), ones(1, 2, 4), "[1, 2, 4]; expected [L*D, B, H] = [1, 3, 4]"),
}  # fmt: skip
TYPES = {  # a TypeError
    "not a tensor": (LSTM, [[1.0]], None, "LSTM takes a torch tensor, got list"),
    "dtype": (LSTM, ones(5, 2, 3).double(), None, "w_ih is torch float32 cpu, but x is torch float64 cpu"),
    "integers": (LSTM, ones(5, 2, 3).long(), None, "x is torch int64 cpu"),
    "device": (LSTM, ones(5, 2, 3, device="meta"), None, "w_ih is torch float32 cpu, but x is torch float32 meta"),
    "dtype of h0": (GRU, ones(2, 5, 3), ones(1, 2, 4).double(), "h0 is torch float64 cpu, but x is torch float32"),
    "device of h0": (GRU, ones(2, 5, 3), ones(1, 2, 4, device="meta"), "h0 is torch float32 meta, but x is"),
    "dtype of c0": (LSTM, ones(5, 2, 3), (ones(4, 2, 4), ones(4, 2, 4).half()), "c0 is torch float16 cpu"),
    "hx of an LSTM": (LSTM, ones(5, 2, 3), ones(4, 2, 4), "the tensors (h0, c0); got a tensor [4, 2, 4]"),
    "half an hx": (LSTM, ones(5, 2, 3), (ones(4, 2, 4),), "(h0, c0); got a tuple of a tensor [4, 2, 4]"),
    "hx with None": (LSTM, ones(5, 2, 3), [ones(4, 2, 4), None], "got a list of a tensor [4, 2, 4], NoneType"),
    "hx of a GRU": (GRU, ones(2, 5, 3), (ones(1, 2, 4),) * 2, "hx must be the tensors (h0); got a tuple of"),
    "cell, no c": (LSTM_CELL, ones(2, 3), ones(2, 4), "(h0, c0); got a tensor [2, 4]"),
    "cell, dtype": (CELL, ones(2, 3).double(), None, "w_ih is torch float32 cpu, but x is torch float64"),
    "cell, packed": (CELL, pack(5, 3, 2), None, "GRUCell takes a torch tensor, got PackedSequence"),
    "packed, dtype of c0": (LSTM, pack(5, 3, 2), (ones(4, 3, 4), ones(4, 3, 4).double()), "c0 is torch float64"),
}


@pytest.mark.parametrize("case", [*SHAPES, *TYPES])
def test_bad_input_is_named_before_anything_runs(case, monkeypatch):
    layer, input, hx, message = (SHAPES | TYPES)[case]
    monkeypatch.setattr("gpu_rnn.autograd.functions.forward", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ShapeError if case in SHAPES else TypeError, match=re.escape(message)):
        layer(input, hx)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_sequence_raises_what_torch_raises(kind):
    for package in (nn, gpu_rnn):
        with pytest.raises(RuntimeError, match=r"(?i)sequence.*larger than 0"):
            getattr(package, kind)(3, 4)(ones(0, 2, 3))


WRONG = {  # arguments, error, what the message contains; for layers
    "no hidden": ({"hidden_size": 0}, ValueError, "hidden_size must be larger than 0, got 0"),
    "negative hidden": ({"hidden_size": -4}, ValueError, "hidden_size must be larger than 0, got -4"),
    "fractional hidden": ({"hidden_size": 4.0}, TypeError, "hidden_size must be an int, got 4.0"),
    "no input": ({"input_size": 0}, ValueError, "input_size must be larger than 0, got 0"),
    "no layers": ({"num_layers": 0}, ValueError, "num_layers must be larger than 0, got 0"),
    "half a layer": ({"num_layers": 1.5}, TypeError, "num_layers must be an int, got 1.5"),
    "dropout over 1": ({"dropout": 1.5}, ValueError, "dropout must be a number in [0, 1], the probability"),
    "negative dropout": ({"dropout": -0.1}, ValueError, "got -0.1"),
    "boolean dropout": ({"dropout": True}, ValueError, "got True"),
    "textual dropout": ({"dropout": "0.5"}, ValueError, "got '0.5'"),
    "NaN dropout": ({"dropout": float("nan")}, ValueError, "got nan"),
    "bias": ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
    "textual size": ({"input_size": "3"}, TypeError, "input_size must be an int, got '3'"),
    "fraction of NumPy": ({"hidden_size": np.float64(4)}, TypeError, "hidden_size must be an int, got "),
    "batch_first": ({"batch_first": "yes"}, TypeError, "batch_first must be a bool, got 'yes'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_as_torch_refuses_them(kind, case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        getattr(gpu_rnn, kind)(**{"input_size": 3, "hidden_size": 4} | arguments)
    with pytest.raises((TypeError, ValueError)):
        getattr(nn, kind)(**{"input_size": 3, "hidden_size": 4} | arguments)


@pytest.mark.parametrize("proj_size", [4, 5, -1])
def test_wrong_projection(proj_size):
    with pytest.raises(ValueError, match=f"got proj_size={proj_size} with hidden_size=4"):
        gpu_rnn.LSTM(3, 4, proj_size=proj_size)


@pytest.mark.parametrize("proj_size", ["2", 2.0, None, True])
def test_a_projection_is_an_int(proj_size):
    for kind in LAYERS:
        with pytest.raises(TypeError, match=f"proj_size must be an int, got {proj_size!r}"):
            getattr(gpu_rnn, kind)(3, 4, proj_size=proj_size)


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_sizes(whole):
    """As of torch.nn's cells, whose parameters and numbers are the same; and of everything that takes a number."""
    x = torch.randn(5, 2, 3)
    for kind in CELLS:
        theirs, ours = (getattr(home, kind)(whole(3), whole(4)) for home in (nn, gpu_rnn))
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))
        assert repr(ours) == repr(theirs)
    for kind in LAYERS:
        theirs = getattr(nn, kind)(3, 4, 2, bidirectional=True)
        ours = getattr(gpu_rnn, kind)(whole(3), whole(4), num_layers=whole(2), bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        assert repr(ours) == repr(theirs)
    theirs, ours = nn.LSTM(3, 4, proj_size=2), gpu_rnn.LSTM(whole(3), whole(4), proj_size=whole(2))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    y = torch.cat([y for y, _ in gpu_rnn.tbptt(ours, x, whole(2), whole(3))])
    torch.testing.assert_close(y, theirs(x)[0])
    listen = gpu_rnn.stream(ours, whole(2))
    torch.testing.assert_close(torch.stack([listen(step).clone() for step in x]), theirs(x)[0])
    explained = gpu_rnn.explain("gru", T=whole(5), B=whole(2), I=whole(3), H=whole(4), device="cpu")
    assert str(explained) == str(gpu_rnn.explain("gru", T=5, B=2, I=3, H=4, device="cpu"))


@pytest.mark.parametrize("kind", CELLS)
def test_wrong_sizes_of_cells(kind):
    with pytest.raises(ValueError, match="hidden_size must be larger than 0, got 0"):
        getattr(gpu_rnn, kind)(3, 0)


@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_unknown_nonlinearity(kind):
    with pytest.raises(ValueError, match="unknown nonlinearity 'gelu'; there are 'tanh' and 'relu'"):
        getattr(gpu_rnn, kind)(3, 4, nonlinearity="gelu")


@pytest.mark.parametrize("kind", LAYERS)
def test_no_rows_give_nothing_and_zero_gradients(kind):
    layer = getattr(gpu_rnn, kind)(3, 4, 2, bidirectional=True)
    y, last = layer(ones(5, 0, 3))
    assert y.shape == (5, 0, 8)
    assert {state.shape for state in flat(last)} == {(4, 0, 4)}
    y.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("change", ["shape", "dtype", "data"])
def test_what_fitted_before_is_checked_again(change):
    layer, x = gpu_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    layer(x)
    if change == "shape":
        layer.weight_hh_l0 = nn.Parameter(torch.randn(16, 5))
    elif change == "dtype":
        layer.weight_hh_l0 = nn.Parameter(torch.randn(16, 4, dtype=torch.float64))
    else:
        layer.weight_hh_l0.data = torch.randn(12, 4)
    with pytest.raises((gpu_rnn.ShapeError, TypeError), match=r"w_(hh|ih)"):
        layer(x)
