"""A cell's C++ struct (cell_struct.cu), and CUDA's functions, against NumPy's, on whatever runs a
launch: the emulator or a GPU."""

from pathlib import Path

import numpy as np

from gpu_rnn.core import arrays
from gpu_rnn.kernels import cells, mathematics
from gpu_rnn.kernels.cuda.launch import C_TYPES, Launch, unit

SOURCE = Path(__file__).with_name("cell_struct.cu")
ROWS = 200
FUNCTIONS = ("sigmoid", "tanh", "exp", "log", "relu", "positive")


def run(ready, name, kernel, dtype, *operands, n):
    """`given`: arrays [n, ...] of what runs the launch, which works on them in place."""
    made = unit(SOURCE, cells.get(name), {"REAL": C_TYPES[dtype]})
    ready(Launch(made, kernel, (-(-n // 64), 1, 1), (64, 1, 1), (*map(arrays.pointer, operands), n)))()


def check_cell(ready, to_device, from_device, name, dtype):
    """step and grad, value by value, on random rows of every size."""
    cell, rng = cells.get(name), np.random.default_rng(3)

    def draw(width):
        return (rng.standard_normal((ROWS, width)) * rng.choice([0.1, 1, 10], (ROWS, 1))).astype(dtype)

    def blank(width):
        return np.full((ROWS, width), np.nan, dtype)

    def launched(kernel, *operands):
        operands = [to_device(array) for array in operands]
        run(ready, name, kernel, dtype, *operands, n=ROWS)
        return [from_device(array) for array in operands]

    x, h, state = draw(cell.G), draw(cell.G), draw(cell.S)
    _, _, new, saved = launched("twin_step", x, h, state, blank(cell.K))
    exact_new, exact_saved = cell.step(*map(columns, (x, h, state)))
    close(new, exact_new, dtype, f"{name}: states")
    close(saved, exact_saved, dtype, f"{name}: saved")

    dnew = draw(cell.S)
    *_, dx, dh, dbefore = launched("twin_grad", dnew, new, state, saved, blank(cell.G), blank(cell.G), blank(cell.S))
    exact = cell.grad(*map(columns, (dnew, new, state, saved)))
    for what, ours, theirs in zip(("x", "h", "state"), (dx, dh, dbefore), exact, strict=True):
        close(ours, theirs, dtype, f"{name}: gradient of {what}")


def columns(array):
    """[n, width] -> a tuple of float64 [n], as a definition takes them."""
    return tuple(array.T.astype(np.float64))


def close(ours, exact, dtype, what):
    for column, value in enumerate(exact):
        error, limit = np.abs(ours[:, column] - value).max(), 8 * np.finfo(dtype).eps * np.abs(value).max()
        assert error <= limit, f"{what}, column {column}: error {error:.3g}, allowed {limit:.3g}"


def check_functions(ready, to_device, from_device, dtype):
    """To a few ulp everywhere, infinities and NaN included."""
    rng = np.random.default_rng(4)
    special = [
        0.0,
        1e-30,
        -1e-30,
        44.5,
        -44.5,
        88.0,
        -88.0,
        89.0,
        -89.0,
        100.0,
        -100.0,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        np.nan,
    ]
    a = np.concatenate([special, rng.standard_normal(3000), rng.uniform(-100, 100, 3000), rng.uniform(-1, 1, 3000)])
    a = a.astype(dtype)
    operands = to_device(a), to_device(np.full((len(FUNCTIONS), a.size), np.nan, dtype))
    run(ready, "lstm", "functions", dtype, *operands, n=a.size)
    for name, ours in zip(FUNCTIONS, from_device(operands[1]), strict=True):
        with np.errstate(all="ignore"):
            exact = exact_functions(name, a.astype(np.float64))
            rounded = exact.astype(dtype)
        assert np.array_equal(np.isnan(ours), np.isnan(rounded)), f"{name}: NaN where the definition has it"
        finite = np.isfinite(rounded)
        assert np.array_equal(ours[~finite], rounded[~finite], equal_nan=True), f"{name}: infinite where it should be"
        eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
        error = np.abs(ours[finite] - exact[finite]) / (eps * np.maximum(np.abs(exact[finite]), 2 * tiny / eps))
        assert error.max() <= 4, f"{name}({a[finite][error.argmax()]}): {error.max():.1f} ulp"


def exact_functions(name, a):
    if name == "sigmoid":  # the definition's form is exact in absolute terms only
        return 1 / (1 + np.exp(-a))
    return getattr(mathematics, name)(a)
