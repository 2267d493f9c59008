"""The functions' manners: what they give back, and what they say to bad input."""

import re

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import ShapeError

from .conftest import sequence_arrays

X, W_IH, W_HH, BIAS = np.ones((5, 3, 4)), np.ones((24, 4)), np.ones((24, 6)), np.ones(24)  # T 5, B 3, I 4, H 6

BAD = {
    "rank of x": ({"x": np.ones((5, 4))}, ShapeError, "x has shape [5, 4]; expected 3 dimensions"),
    "rank of w_ih": ({"w_ih": np.ones(24)}, ShapeError, "w_ih has shape [24]; expected 2 dimensions"),
    "input size": ({"w_ih": np.ones((24, 5))}, ShapeError, "w_ih has shape [24, 5]; expected [4*H, I] = [24, 4]"),
    "rows of w_hh": ({"w_hh": np.ones((25, 6))}, ShapeError, "w_hh has shape [25, 6]; a lstm has 4 gates"),
    "columns of w_hh": ({"w_hh": np.ones((24, 7))}, ShapeError, "w_hh has shape [24, 7]; expected [4*H, H] = [24, 6]"),
    "no hidden units": ({"w_hh": np.ones((0, 0))}, ShapeError, "w_hh has shape [0, 0]"),
    "bias": ({"b_hh": np.ones(6)}, ShapeError, "b_hh has shape [6]; expected [4*H] = [24]"),
    "h0": ({"h0": np.ones((2, 6))}, ShapeError, "h0 has shape [2, 6]; expected [B, H] = [3, 6], with x [5, 3, 4]"),
    "c0": ({"c0": np.ones((1, 3, 6))}, ShapeError, "c0 has shape [1, 3, 6]; expected [B, H] = [3, 6]"),
    "no time": ({"x": np.ones((0, 3, 4))}, ShapeError, "the sequence is empty: x has shape [0, 3, 4]"),
    "projection too wide": ({"w_hr": np.ones((6, 6))}, ShapeError, "w_hr has shape [6, 6]; a projection"),
    "mixed dtypes": ({"w_hh": W_HH.astype("f")}, TypeError, "w_hh is numpy float32 cpu, but x is numpy float64 cpu"),
    "mixed kinds": ({"h0": torch.ones(3, 6)}, TypeError, "h0 is torch float32 cpu, but x is numpy float64 cpu"),
    "integers": (dict(zip(("x", "w_ih", "w_hh"), (a.astype(int) for a in (X, W_IH, W_HH)))), TypeError, "x is int64"),
    "lists": ({"x": [[1.0]]}, TypeError, "expected a NumPy, torch or CuPy array, got list"),
    "no weights": ({"w_hh": None}, TypeError, "w_hh is None, but lstm needs it"),
    "unknown backend": ({"backend": "cudnn"}, ValueError, "unknown backend 'cudnn'; there are cuda, triton, native"),
    "half NumPy": (
        {k: v.astype(np.float16) for k, v in (("x", X), ("w_ih", W_IH), ("w_hh", W_HH))},
        gpu_rnn.BackendError, "numpy: takes NumPy arrays of float32 or float64, not float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_shapes(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        gpu_rnn.lstm(**{"x": X, "w_ih": W_IH, "w_hh": W_HH} | changes)


def test_a_shape_error_is_what_torch_users_catch():
    assert issubclass(ShapeError, ValueError)
    assert issubclass(ShapeError, RuntimeError)


def test_mixed_devices_are_refused():
    meta = torch.ones(24, 6, device="meta")
    with pytest.raises(TypeError, match="w_hh is torch float32 meta, but x is torch float32 cpu"):
        gpu_rnn.lstm(torch.ones(5, 3, 4), torch.ones(24, 4), meta)


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="unknown nonlinearity 'gelu'; there are 'tanh' and 'relu'"):
        gpu_rnn.rnn(X, W_IH, W_HH, nonlinearity="gelu")


def test_vjp_returns_a_gradient_for_each_argument(rng):
    x, weights, (h0, c0) = sequence_arrays(rng, "lstm", 3, 2, 4, 5)
    (y, (hT, cT)), pullback = gpu_rnn.vjp(gpu_rnn.lstm, x, weights.w_ih, weights.w_hh, b_ih=weights.b_ih, c0=c0)
    gradients = pullback((y, (None, cT)))
    assert set(gradients) == {"x", "w_ih", "w_hh", "b_ih", "c0"}
    inputs = {"x": x, "c0": c0, **weights._asdict()}
    assert all(gradient.shape == inputs[key].shape for key, gradient in gradients.items())
    again = pullback((y, (None, cT)))
    assert all(np.array_equal(gradients[key], again[key]) for key in gradients), "bitwise the same"


def test_vjp_of_torch_tensors_is_autograd(rng):
    x, weights, state = sequence_arrays(rng, "gru", 3, 2, 4, 5)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], *state)]
    (y, hT), pullback = gpu_rnn.vjp(gpu_rnn.gru, *tensors[:5], h0=tensors[5])
    assert not y.requires_grad
    gradients = pullback((torch.ones_like(y), torch.ones_like(hT)))
    y, hT = gpu_rnn.gru(*tensors[:5], h0=tensors[5])
    (y.sum() + hT.sum()).backward()
    for name, tensor in zip(("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0"), tensors):
        torch.testing.assert_close(gradients[name], tensor.grad, rtol=1e-13, atol=1e-13)


def test_vjp_names_what_is_wrong(rng):
    (y, _), pullback = gpu_rnn.vjp(gpu_rnn.lstm, X, W_IH, W_HH, BIAS)
    with pytest.raises(ShapeError, match=re.escape("gradient of y [5, 3, 6] has shape [3, 6]")):
        pullback((y[0], (None, None)))
    with pytest.raises(ShapeError, match=re.escape("2 states (hT, cT), but 1 gradients were given")):
        pullback((y, y[0]))
    with pytest.raises(TypeError, match="gradient of y is numpy float32 cpu, but y is numpy float64 cpu"):
        pullback((y.astype("f"), (None, None)))
    with pytest.raises(TypeError, match="a gradient for each output; got ndarray"):
        pullback(y)
    with pytest.raises(TypeError, match="vjp differentiates"):
        gpu_rnn.vjp(np.tanh, X)


def test_reverse_is_time_turned_round(rng):
    x, weights, (h0, c0) = sequence_arrays(rng, "lstm", 6, 2, 4, 5)
    y, last = gpu_rnn.lstm(x, *weights[:4], h0=h0, c0=c0, reverse=True)
    flipped, flipped_last = gpu_rnn.lstm(x[::-1], *weights[:4], h0=h0, c0=c0)
    np.testing.assert_allclose(y, flipped[::-1], rtol=1e-13)
    np.testing.assert_allclose(last[1], flipped_last[1], rtol=1e-13)
    np.testing.assert_array_equal(y[0], last[0])
