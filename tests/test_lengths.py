"""lengths and left_padding outside of [0, T]: an error that names them on a CPU, clamped elsewhere."""

import re

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import ShapeError
from gpu_rnn.modifiers import apply

T, B, I, H = 5, 3, 2, 4
BAD = {"longer": [T + 1, 2, 0], "negative": [-1, 2, 0]}
RIGHT = {"lengths": [1, T, 0], "left_padding": [0, 3, 0]}
every_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
every_name = pytest.mark.parametrize("name", ["lengths", "left_padding"])
every_dtype = pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])


def message(name, bad):
    return re.escape(f"{name} is {bad}; expected integers in [0, T] = [0, {T}], with x [{T}, {B}, {I}]")


@every_bad
@every_name
@every_dtype
@pytest.mark.parametrize("batch_first", [False, True])
def test_of_a_layer(bad, name, dtype, batch_first):
    layer = gpu_rnn.GRU(I, H, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    with pytest.raises(ShapeError, match=message(name, bad)):
        layer(x, **{name: torch.tensor(bad, dtype=dtype)})


@every_bad
@every_name
@pytest.mark.parametrize("library", [np.array, torch.tensor])
def test_of_a_function(bad, name, library):
    x, w_ih, w_hh = (library(np.ones(sizes)) for sizes in ((T, B, I), (3 * H, I), (3 * H, H)))
    with pytest.raises(ShapeError, match=message(name, bad)):
        gpu_rnn.gru(x, w_ih, w_hh, **{name: library(bad)})
    with pytest.raises(ShapeError, match=message(name, bad)):
        gpu_rnn.vjp(gpu_rnn.gru, x, w_ih, w_hh, **{name: library(bad)})


@pytest.mark.parametrize("length", [-1, T + 1])
def test_of_a_single_sequence(length):
    with pytest.raises(ShapeError, match=f"lengths is \\[{length}\\]; expected integers in"):
        gpu_rnn.LSTM(I, H)(torch.randn(T, I), lengths=torch.tensor(length))


@every_bad
@every_name
@pytest.mark.parametrize("batch_first", [False, True])
def test_of_tbptt(bad, name, batch_first):
    """Of the whole sequence, not of a window; where each is shorter than a length before it."""
    layer = gpu_rnn.GRU(I, H, batch_first=batch_first)
    x = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    with pytest.raises(ShapeError, match=re.escape(f"{name} is {bad}; expected integers in [0, T] = [0, {T}]")):
        gpu_rnn.tbptt(layer, x, 2, 3, **{name: torch.tensor(bad)})
    right = {
        "lengths": torch.tensor([1, 5, 0], dtype=torch.uint8),
        "left_padding": torch.tensor([0, 3, 0], dtype=torch.uint8),
    }
    windows = [y for y, _ in gpu_rnn.tbptt(layer, x, 2, 3, **right)]
    torch.testing.assert_close(torch.cat(windows, 1 if batch_first else 0), layer(x, **right)[0])
    with pytest.raises(TypeError, match="lengths is torch float32 cpu"):
        gpu_rnn.tbptt(layer, x, 2, 3, lengths=torch.ones(B))


@every_name
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(name, backend):
    """One graph, with the check in it."""
    layer = gpu_rnn.GRU(I, H)
    compiled = torch.compile(lambda x, n: layer(x, **{name: n})[0], backend=backend, fullgraph=True)
    x, right = torch.randn(T, B, I), torch.tensor([2, T, 0])
    torch.testing.assert_close(compiled(x, right), layer(x, **{name: right})[0])
    for bad in BAD.values():
        with pytest.raises(RuntimeError, match=rf"{name} must be in \[0, T\]"):
            compiled(x, torch.tensor(bad))


def test_transformed():
    """By torch.func, also where the lengths are mapped over, and with shapes alone."""
    layer = gpu_rnn.GRU(I, H)
    x, lengths = torch.randn(2, T, B, I), torch.tensor([[2, T, 0], [1, 1, 3]])
    y = torch.func.vmap(lambda x, n: layer(x, lengths=n)[0])(x, lengths)
    torch.testing.assert_close(y, torch.stack([layer(x[k], lengths=lengths[k])[0] for k in range(2)]))
    on_meta = gpu_rnn.GRU(I, H, device="meta")
    assert on_meta(x[0].to("meta"), lengths=lengths[0].to("meta"))[0].shape == (T, B, H)


@every_dtype
def test_without_a_look_they_are_clamped(dtype, monkeypatch):
    """As on a GPU."""
    layer = gpu_rnn.LSTM(I, H, bidirectional=True)
    x = torch.randn(T, B, I)
    right = layer(x, lengths=torch.tensor([T, 0, 2]), left_padding=torch.tensor([0, 0, T]))
    monkeypatch.setattr(apply, "check_bound", lambda *_: None)
    actual = layer(
        x, lengths=torch.tensor([T + 2, -3, 2], dtype=dtype), left_padding=torch.tensor([-9, -1, T + 9], dtype=dtype)
    )
    torch.testing.assert_close(actual, right, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_they_are_clamped(backend, compiled):
    layer = gpu_rnn.LSTM(I, H, bidirectional=True, backend=backend, device="cuda")
    x = torch.randn(T, B, I, device="cuda")
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    right = call(x, lengths=torch.tensor([T, 0, 2]).cuda(), left_padding=torch.tensor([0, 0, T]).cuda())
    actual = call(x, lengths=torch.tensor([T + 2, -3, 2]).cuda(), left_padding=torch.tensor([-9, -1, T + 9]).cuda())
    torch.testing.assert_close(actual, right, rtol=0, atol=0)
