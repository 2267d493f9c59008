"""step_exact=True: a sequence is, bit for bit, what its time steps one at a time are."""

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.autograd import functions

I, H = 7, 21
LAYERS = [
    ("LSTM", {"num_layers": 2, "peephole": True}), ("LSTM", {"proj_size": 9}), ("GRU", {"num_layers": 2}),
    ("GRU", {"reset_after": False, "zoneout": 0.2}), ("RNN", {"nonlinearity": "relu"}),
]  # fmt: skip


def by_steps(layer, x):
    hx, outputs = None, []
    for now in x:
        y, hx = layer.step(now, hx)
        outputs.append(y)
    return torch.stack(outputs), hx


def leaves(hx):
    return hx if isinstance(hx, tuple) else (hx,)


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 21), (40, 1, 37), (9, 5, 64)], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_steps_are_the_sequence(kind, options, dtype, T, B, H, grad):
    layer = getattr(gpu_rnn, kind)(I, H, **options, dtype=dtype, step_exact=True).eval()
    x = torch.randn(T, B, I, dtype=dtype)
    with torch.set_grad_enabled(grad):
        y, last = layer(x)
        again, hx = by_steps(layer, x)
    assert y.requires_grad == grad
    assert torch.equal(again, y)
    assert all(map(torch.equal, leaves(hx), leaves(last)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_rollout_with_resets_is_its_training(kind):
    layer, x, first = getattr(gpu_rnn, kind)(I, H, step_exact=True), torch.randn(20, 3, I), torch.rand(20, 3) < 0.2
    hx, acted = None, []
    with torch.no_grad():
        for now, begins in zip(x, first):
            y, hx = layer(now[None], hx, reset=begins[None])
            acted.append(y[0])
    y, _ = layer(x, reset=first)
    assert torch.equal(torch.stack(acted), y)


def test_a_captured_sequence_too(monkeypatch):
    recorded, forward = [], functions.forward

    def recording(backend, problem, runs):
        recorded.append(problem.step_exact)
        return forward(backend, problem, runs)

    layer, x = gpu_rnn.LSTM(I, H, step_exact=True), torch.randn(12, 3, I)
    monkeypatch.setattr(functions, "forward", recording)
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert recorded == [True]
    assert torch.equal(y, by_steps(layer, x)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_a_layer_without(recompute):
    torch.manual_seed(0)
    layer, x = gpu_rnn.LSTM(I, H, dtype=torch.float64), torch.randn(9, 3, I, dtype=torch.float64)
    results = []
    for layer.step_exact, layer.recompute in ((False, False), (True, recompute)):
        results.append(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_functions_and_arrays():
    rng = np.random.default_rng(0)
    x, w_ih, w_hh, b = (rng.standard_normal(shape).astype("f") for shape in ((15, 2, I), (3 * H, I), (3 * H, H), 3 * H))
    y, last = gpu_rnn.gru(x, w_ih, w_hh, b, b, step_exact=True)
    h = np.zeros((2, H), "f")
    for now, expected in zip(x, y):
        _, h = gpu_rnn.gru(now[None], w_ih, w_hh, b, b, h0=h, step_exact=True)
        np.testing.assert_array_equal(h, expected)
    np.testing.assert_array_equal(h, last)
    (again, _), pullback = gpu_rnn.vjp(gpu_rnn.gru, x, w_ih, w_hh, b, b, step_exact=True)
    np.testing.assert_array_equal(again, y)
    assert pullback((y, None))["w_ih"].shape == w_ih.shape


def test_where_it_can_not_be_it_says_so():
    with pytest.raises(ValueError, match="layer_norm normalizes the projection of all steps at once"):
        gpu_rnn.LSTM(I, H, layer_norm=True, step_exact=True)
    x, w_ih, w_hh, gain = (torch.randn(shape) for shape in ((3, 2, I), (3 * H, I), (3 * H, H), 3 * H))
    with pytest.raises(ValueError, match="layer_norm normalizes the projection of all steps at once"):
        gpu_rnn.gru(x, w_ih, w_hh, layer_norm=(gain, gain), step_exact=True)


def test_it_is_shown():
    layer = gpu_rnn.GRU(I, H, step_exact=True, backend="numpy")  # which multiplies otherwise for it, as native doesn't
    assert "step_exact=True" in repr(layer)
    assert "input projection: one GEMM per time step" in str(gpu_rnn.explain(layer, torch.randn(5, 2, I)))
