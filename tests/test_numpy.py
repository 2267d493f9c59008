"""The NumPy backend, the fallback: equal to torch.nn in float64, and a good citizen with its arguments."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import numpy as backend
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells

from . import calls
from .conftest import sequence_arrays

TORCH = {
    "rnn_tanh": (torch.nn.RNN, {}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
    "gru": (torch.nn.GRU, {}),
    "lstm": (torch.nn.LSTM, {}),
}
EVERY = pytest.mark.parametrize("name", cells.NAMES)
FUNCTIONS = [
    ("lstm", gpu_rnn.lstm, {}),
    ("gru", gpu_rnn.gru, {}),
    ("rnn_tanh", gpu_rnn.rnn, {}),
    ("rnn_relu", gpu_rnn.rnn, {"nonlinearity": "relu"}),
]
NEEDS = {"x", *Weights._fields}


def torch_module(name, weights):
    """torch.nn's layer with these weights, in float64."""
    kind, options = TORCH[name]
    G = cells.get(name).G
    P = {} if weights.w_hr is None else {"proj_size": weights.w_hr.shape[0]}
    module = kind(
        weights.w_ih.shape[1], weights.w_ih.shape[0] // G, bias=weights.b_ih is not None, **options, **P
    ).double()
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), (w for w in weights if w is not None), strict=True):
            parameter.copy_(torch.from_numpy(array))
    return module


def torch_run(name, x, weights, state, dy, dlast, reverse):
    """-> y, last, gradients by torch.nn and its autograd; reverse by flipping time."""
    module = torch_module(name, weights)
    x, *state = (torch.from_numpy(a).requires_grad_() for a in (x, *state))
    hx = tuple(s[None] for s in state)
    y, last = module(x.flip(0) if reverse else x, hx if len(hx) > 1 else hx[0])
    y, last = (y.flip(0) if reverse else y), (last if len(hx) > 1 else (last,))
    loss = (y * torch.from_numpy(dy)).sum() + sum((a[0] * torch.from_numpy(d)).sum() for a, d in zip(last, dlast))
    loss.backward()
    names = [field for field, w in zip(Weights._fields, weights) if w is not None]
    gradients = {n: p.grad.numpy() for n, p in zip(names, module.parameters(), strict=True)}
    gradients |= {"x": x.grad.numpy(), "state": tuple(s.grad.numpy() for s in state)}
    return y.detach().numpy(), tuple(a[0].detach().numpy() for a in last), gradients


def close(ours, exact, what):
    np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-12, err_msg=what)


@EVERY
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("T", "B", "I", "H"), [(1, 1, 1, 1), (7, 3, 5, 4), (5, 1, 2, 6), (150, 2, 3, 8), (2, 70, 1, 3)]
)
def test_equals_torch_with_all_gradients(name, reverse, bias, T, B, I, H, rng):
    compare_with_torch(name, reverse, bias, T, B, I, H, None, rng)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "B", "I", "H", "P"), [(1, 1, 1, 2, 1), (6, 3, 5, 4, 2), (5, 1, 2, 6, 5)])
def test_equals_torch_with_projection(reverse, T, B, I, H, P, rng):
    compare_with_torch("lstm", reverse, True, T, B, I, H, P, rng)


def compare_with_torch(name, reverse, bias, T, B, I, H, P, rng):
    cell = cells.get(name)
    x, weights, state = sequence_arrays(rng, name, T, B, I, H, P)
    if not bias:
        weights = weights._replace(b_ih=None, b_hh=None)
    dy, dlast = rng.standard_normal((T, B, P or H)), tuple(rng.standard_normal(s.shape) for s in state)
    exact_y, exact_last, exact = torch_run(name, x, weights, state, dy, dlast, reverse)
    y, last, saved = calls.forward(backend.forward, cell, x, weights, state, reverse=reverse, save=True)
    close(y, exact_y, "y")
    for letter, ours, theirs in zip(cell.states, last, exact_last, strict=True):
        close(ours, theirs, f"{letter}T")
    needs = NEEDS - {field for field, w in zip(Weights._fields, weights) if w is None}
    for attempt in ("once", "twice over the same saved activations"):
        ours = calls.backward(
            backend.backward, cell, x, weights, state, y, saved, dy, dlast, reverse=reverse, needs=needs
        )
        for key, gradient in exact.items():
            if key == "state":
                for letter, a, b in zip(cell.states, ours["state"], gradient, strict=True):
                    close(a, b, f"d{letter}0 {attempt}")
            else:
                close(ours[key], gradient, f"d{key} {attempt}")
                assert min(ours[key].strides) >= 0, "torch takes no negative strides"
    unsaved, unsaved_last, _ = calls.forward(backend.forward, cell, x, weights, state, reverse=reverse, save=False)
    assert np.array_equal(unsaved, y), "inference and training agree bit for bit"
    assert all(map(np.array_equal, unsaved_last, last))


@EVERY
@pytest.mark.parametrize("B", [4, 64], ids=["by tanh", "by exp"])
def test_float32_is_as_good_as_torch(name, B, rng):
    x, weights, state = sequence_arrays(rng, name, 40, B, 8, 16, dtype=np.float32)
    cell = cells.get(name)
    y, last, _ = calls.forward(backend.forward, cell, x, weights, state, reverse=False, save=False)
    assert y.dtype == np.float32
    wide = [a.astype(np.float64) for a in (x, *state)]
    exact, _, _ = calls.forward(
        backend.forward, cell, wide[0], Weights(*(None if w is None else w.astype(np.float64) for w in weights)),
        tuple(wide[1:]),
    )  # fmt: skip
    module = torch_module(name, weights).float()
    theirs = module(torch.from_numpy(x), tuple(torch.from_numpy(s)[None] for s in state) if cell.S > 1 else
                    torch.from_numpy(state[0])[None])[0].detach().numpy()  # fmt: skip
    assert np.abs(y - exact).max() <= 2 * np.abs(theirs - exact).max() + 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_zero_states_are_the_default(name, function, options, rng):
    x, weights, state = sequence_arrays(rng, name, 3, 2, 4, 5)
    zero = {letter + "0": np.zeros_like(s) for letter, s in zip(cells.get(name).states, state)}
    assert np.array_equal(function(x, *weights[:4], **options)[0], function(x, *weights[:4], **zero, **options)[0])


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_arguments_may_be_strided_expanded_read_only_and_stay_untouched(name, function, options, rng):
    T, B, I, H = 4, 3, 5, 6
    x, weights, state = sequence_arrays(rng, name, T, B, I, H)
    letters = [letter + "0" for letter in cells.get(name).states]
    plain = function(x, *weights[:4], **dict(zip(letters, state)), **options)

    strided = np.asfortranarray(x)[::1]
    transposed = [np.asfortranarray(w) for w in weights[:4]]
    wide = [np.repeat(s, 2, axis=1)[:, ::2] for s in state]
    for array in (strided, *transposed, *wide):
        array.flags.writeable = False
    (y, last), pullback = gpu_rnn.vjp(function, strided, *transposed, **dict(zip(letters, wide)), **options)
    np.testing.assert_allclose(y, plain[0], rtol=1e-13)
    dy = np.broadcast_to(rng.standard_normal((1, 1, H)), y.shape)  # strides of zero
    nothing = [None] * len(state)
    _, contiguous = gpu_rnn.vjp(function, x, *weights[:4], **dict(zip(letters, state)), **options)
    expected = contiguous((dy.copy(), nothing))
    for key, gradient in pullback((dy, nothing)).items():
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-12, err_msg=key)

    expanded = np.broadcast_to(x[:, :1], x.shape)
    y, _ = function(expanded, *weights[:4], **options)
    np.testing.assert_array_equal(y, function(expanded.copy(), *weights[:4], **options)[0])


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_an_empty_batch_gives_empty_results(name, function, options, rng):
    x, weights, state = sequence_arrays(rng, name, 4, 0, 3, 5)
    (y, last), pullback = gpu_rnn.vjp(function, x, *weights[:4], **options)
    assert y.shape == (4, 0, 5)
    gradients = pullback((y, None if len(state) == 1 else (None, None)))
    assert gradients["x"].shape == x.shape
    assert not gradients["w_hh"].any()
    assert gradients["w_hh"].shape == weights.w_hh.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_torch_tensors_give_torch_tensors(dtype, rng):
    x, weights, state = sequence_arrays(rng, "lstm", 5, 2, 3, 4)
    tensors = [torch.from_numpy(a).to(dtype).requires_grad_() for a in (x, *weights[:4], *state)]
    *args, h0, c0 = tensors
    y, (hT, cT) = gpu_rnn.lstm(*args, h0=h0, c0=c0)
    assert y.dtype == hT.dtype == cT.dtype == dtype
    (y.float().sum() + cT.float().sum()).backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    ye, (_, ce) = gpu_rnn.lstm(*exact[:5], h0=exact[5], c0=exact[6])
    (ye.sum() + ce.sum()).backward()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), ye, rtol=8 * unit, atol=8 * unit)
    for tensor, e in zip(tensors, exact):
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(tensor.grad.double(), e.grad, rtol=16 * unit, atol=16 * unit)


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_gradcheck(name, function, options, rng):
    x, weights, state = sequence_arrays(rng, name, 4, 2, 3, 3)
    letters = [letter + "0" for letter in cells.get(name).states]
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], *state)]

    def run(*tensors):
        y, last = function(*tensors[:5], **dict(zip(letters, tensors[5:])), **options)
        return (y, *last) if isinstance(last, tuple) else (y, last)

    assert torch.autograd.gradcheck(run, tensors)


def test_long_sums_keep_their_precision(rng):
    """Bias gradients are sums over T B rows: in float32 a plain sum of 65536 is wrong by a hundred units."""
    T, B, H = 1024, 64, 4
    dy = rng.standard_normal((T, B, H)).astype(np.float32)
    x, (w_ih, _, b_ih, b_hh, *_), _ = sequence_arrays(rng, "rnn_relu", T, B, 1, H, dtype=np.float32)
    weights = np.zeros_like(w_ih), np.zeros((H, H), np.float32), np.ones_like(b_ih), np.zeros_like(b_hh)  # h = 1
    (y, hT), pullback = gpu_rnn.vjp(gpu_rnn.rnn, x, *weights, nonlinearity="relu")
    actual = pullback((dy, None))["b_ih"]
    exact = dy.astype(np.float64).sum((0, 1))
    unit = np.spacing(np.abs(exact).max().astype(np.float32))
    assert np.abs(actual - exact).max() <= 16 * unit
    assert np.abs(dy.reshape(T * B, H).sum(0) - exact).max() > 16 * unit


@EVERY
def test_results_are_the_callers_own(name, rng):
    """Arrays are kept from call to call; nothing that was given away changes with the next call, in any thread."""
    cell, T = cells.get(name), 40
    cases = [sequence_arrays(rng, name, T, 2, 3, 5) for _ in range(8)]

    def run(k):
        x, weights, state = cases[k]
        y, last, saved = calls.forward(backend.forward, cell, x, weights, state, reverse=False, save=True)
        return y, *last, *saved

    first = [run(k) for k in range(8)]
    copies = [[array.copy() for array in results] for results in first]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(run, list(range(8)) * 8))
    for results in (first, *(again[k : k + 8] for k in range(0, 64, 8))):
        for arrays, copied in zip(results, copies, strict=True):
            assert all(map(np.array_equal, arrays, copied))


def test_gradients_are_those_requested(rng):
    x, weights, state = sequence_arrays(rng, "gru", 3, 2, 4, 5)
    args = [torch.from_numpy(a) for a in (x, *weights[:4])]
    args[2].requires_grad_()
    y, hT = gpu_rnn.gru(*args, h0=torch.from_numpy(state[0]))
    y.sum().backward()
    assert args[2].grad is not None
    assert all(a.grad is None for k, a in enumerate(args) if k != 2)
    with torch.no_grad():
        assert not gpu_rnn.gru(*args)[0].requires_grad


def test_a_modified_input_is_noticed(rng):
    x, weights, _ = sequence_arrays(rng, "gru", 3, 2, 4, 5)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4])]
    y, _ = gpu_rnn.gru(*tensors)
    with torch.no_grad():
        tensors[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("B", [1, 512], ids=["by tanh", "by exp"])
def test_extreme_values_stay_finite(B):
    """Saturated gates, as after a bad step of training: no overflow, no NaN, and none invented or lost."""
    x = np.array([0.0, 1e4, -1e4, 1e30, -1e30], np.float32).reshape(5, 1, 1).repeat(B, 1)
    for name, function, options in FUNCTIONS:
        G = cells.get(name).G
        w, r = np.ones((G * 2, 1), np.float32), np.ones((G * 2, 2), np.float32)
        with np.errstate(over="raise", under="raise", invalid="raise"):
            y, _ = function(x, w, r, **options) if name != "rnn_relu" else (x, None)
        assert np.isfinite(y).all()
        y, _ = function(np.full_like(x, np.nan), w, r, **options)
        assert np.isnan(y).all(), name


@pytest.mark.parametrize("B", [1, 8, 64])
def test_products_by_blocks_of_rows(B, monkeypatch, rng):
    """As where there is AVX-512, of one time step and of several."""
    monkeypatch.setattr(backend, "has_avx512", lambda: True)
    monkeypatch.setattr(backend, "num_blocks", backend.num_blocks.__wrapped__)
    M, z = rng.standard_normal((1536, 512)), rng.standard_normal((3, 512, B))
    assert (backend.num_blocks(*M.shape, B) > 1) is (B > 1)
    one, several = np.empty((1536, B)), np.empty((3, 1536, B))
    backend.matmul_fn(M, B)(z[0], one)
    backend.batched_matmul_fn(M, B)(z, several)
    np.testing.assert_allclose(several, M @ z, rtol=0, atol=1e-11)
    np.testing.assert_allclose(one, several[0], rtol=0, atol=1e-11)
