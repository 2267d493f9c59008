"""A cell definition compiled by Triton against the same in NumPy, value by value."""

import numpy as np
import pytest
import torch
import triton
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gpu_rnn.kernels import cells
from gpu_rnn.kernels import mathematics as numpy_mathematics
from gpu_rnn.kernels.triton import mathematics
from gpu_rnn.kernels.triton.cell_functions import compile_cell
from gpu_rnn.kernels.triton.tiles import load_tiles, store_tiles

SPECIAL = np.array([0.0, -0.0, 1, -1, np.nan])  # with infinities an almost closed gate isn't like a closed one
LARGE = np.append(SPECIAL, [1e-30, -1e-30, 0.3, -0.3, 30, -30, 100, -100, 1e30, -1e30])
EXTREME = np.append(LARGE, [np.inf, -np.inf])
BOTH = pytest.mark.parametrize("dtype", ["float32", "float64"])
EVERY = pytest.mark.parametrize("name", cells.NAMES)


@triton.jit
def apply_kernel(a, out, n, FUNCTION: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, FUNCTION(tl.load(a + at, mask=at < n, other=0.0).to(REAL)), mask=at < n)


def applied(name, values):
    out = torch.empty(len(values), dtype=torch.from_numpy(values).dtype)
    real = getattr(tl, str(values.dtype))
    grid = (triton.cdiv(len(values), 4096),)
    apply_kernel[grid](torch.from_numpy(values), out, len(values), getattr(mathematics, name), real, 4096)
    return out.numpy()


def ulps(ours, exact):
    """How far apart, in units of the last place of the larger of |exact| and the smallest normal number."""
    spacing = np.spacing(np.maximum(np.abs(exact.astype(ours.dtype)), np.finfo(ours.dtype).tiny))
    return np.abs(ours.astype(exact.dtype) - exact) / spacing


FUNCTIONS = pytest.mark.parametrize("name", ["sigmoid", "tanh", "exp", "log", "relu", "positive"])


@FUNCTIONS
@BOTH
def test_extremes_are_as_numpy_has_them(name, dtype):
    values = EXTREME.astype(dtype)
    exact = getattr(numpy_mathematics, name)(values)
    ours = applied(name, values)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact))
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=np.finfo(dtype).eps)


@BOTH
@pytest.mark.parametrize(("slip", "limit"), [(0, 4), (2.0**-22, 7), (-(2.0**-22), 7)], ids=["exact", "high", "low"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_a_few_ulp(name, dtype, slip, limit, monkeypatch):
    """Also with a float32 2^a and 1/sqrt(a) that are as wrong as the GPU's fast ones may be."""
    if dtype == "float64" and slip:
        pytest.skip("the GPU has none in float64")
    for operation, exact in (("create_exp2", np.exp2), ("create_rsqrt", lambda a: 1 / np.sqrt(a))):
        monkeypatch.setattr(InterpreterBuilder, operation, slipped(exact, slip))
    values = np.concatenate([np.linspace(-3, 100, 9001), np.geomspace(1e-30, 1, 3000), -np.geomspace(1e-30, 3, 3000)])
    values = values.astype(dtype)
    wide = values.astype(np.longdouble)
    exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    assert ulps(applied(name, values), exact).max() <= limit


def slipped(function, slip):
    def operation(self, argument):
        return TensorHandle((function(argument.data) * (1 + slip)).astype(argument.data.dtype), argument.dtype.scalar)

    return operation


@triton.jit
def maximum_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, mathematics.maximum(tl.load(a + at), tl.load(b + at)))


def test_maximum_keeps_nan():
    values = np.float32([1, -2, np.nan, 3, np.nan, np.inf, -np.inf, 0])
    others = np.roll(values, 1)
    out = torch.empty(8)
    maximum_kernel[(1,)](torch.from_numpy(values), torch.from_numpy(others), out, 8)
    np.testing.assert_array_equal(out.numpy(), np.maximum(values, others))


@triton.jit
def step_kernel(
    x, h, state,  # [G, n], [G, n], [S, n]
    new, saved,  # [S, n], [K, n], written
    n, STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    results = STEP(
        load_tiles(x, n, at, at < n, REAL, G),
        load_tiles(h, n, at, at < n, REAL, G),
        load_tiles(state, n, at, at < n, REAL, S),
        (),
        (),
    )
    store_tiles(new, n, at, at < n, results[0], 0, S)
    store_tiles(saved, n, at, at < n, results[1], 0, K)


@triton.jit
def grad_kernel(
    dnew, new, state, saved,  # [S, n], [S, n], [S, n], [K, n]
    dx, dh, dstate,  # [G, n], [G, n], [S, n], written
    n, GRAD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    results = GRAD(
        load_tiles(dnew, n, at, at < n, REAL, S),
        load_tiles(new, n, at, at < n, REAL, S),
        load_tiles(state, n, at, at < n, REAL, S),
        load_tiles(saved, n, at, at < n, REAL, K),
        (),
        (),
    )
    store_tiles(dx, n, at, at < n, results[0], 0, G)
    store_tiles(dh, n, at, at < n, results[1], 0, G)
    store_tiles(dstate, n, at, at < n, results[2], 0, S)


@EVERY
@BOTH
def test_step_and_grad(name, dtype):
    cell = cells.get(name)
    (G, S, K), rng = (cell.G, cell.S, cell.K), np.random.default_rng(5)

    def drawn(rows, special):
        ordinary = rng.standard_normal((rows, 200))
        return np.concatenate([ordinary, rng.choice(special, (rows, 100))], axis=1).astype(dtype)

    def run(kernel, function, inputs, sizes):
        outputs = [torch.empty(rows, 300, dtype=getattr(torch, dtype)) for rows in sizes]
        kernel[(1,)](*map(torch.from_numpy, inputs), *outputs, 300, function, G, S, K, getattr(tl, dtype), 512)
        return [output.numpy() for output in outputs]

    x, h, state, dnew = drawn(G, EXTREME), drawn(G, LARGE), drawn(S, SPECIAL), drawn(S, SPECIAL)
    exact = [np.stack(rows) if rows else np.empty((0, 300)) for rows in cell.step(x, h, state)]
    ours = run(step_kernel, compile_cell(cell).step, (x, h, state), (S, K))
    new, saved = (array.astype(dtype) for array in exact)
    exact += [np.stack([np.broadcast_to(row, 300) for row in rows]) for rows in cell.grad(dnew, new, state, saved)]
    ours += run(grad_kernel, compile_cell(cell).grad, (dnew, new, state, saved), (G, G, S))
    few = 16 * np.finfo(dtype).eps
    for actual, expected in zip(ours, exact, strict=True):
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        np.testing.assert_allclose(actual, expected, rtol=few, atol=few)
