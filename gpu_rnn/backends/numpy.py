"""NumPy: the oracle and the fallback. float64 and float32; torch's halves are computed in float32.

The page's operations come as a `Program` of calls on preallocated rows; here are the products and the time loop.
Arrays per gate and instant have the logical shape [G, T, B, H], gates in the order of `Layout`. Per gate they are one
matrix [T*B, H], so that projections and weight gradients are one product per gate for all instants together.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.program import Layout, grad_program, layout, natural, step_program

from ..arrays import HALVES, from_numpy, library, to_numpy
from ..arrays import dtype as dtype_of
from ..problem import Problem, Weights

NAME = "numpy"
FSDP = "torch.distributed.fsdp"
CHUNK_BYTES = 1 << 18  # the input part of so many instants is computed at once: it is still in cache when it is read
CHUNK_ROWS = 64  # but of as many as a product needs to run at full speed
FEW = 4  # instants that don't repay arranging the weights
SUM_ROWS = 128  # that are added one after the other
PRODUCT = 1 << 19  # multiply-adds below which OpenBLAS reads its operands where they lie, twice as fast in this range
LEAST_COLUMNS, LEAST_ROWS = 64, 8  # of a block: less and its edges cost more than the blocks gain


def reasons(problem: Problem) -> list[str]:
    why = []
    if problem.device != "cpu":
        why.append(f"the arrays are on {problem.device}; NumPy computes on the CPU and nothing is moved silently")
    if problem.library == "cupy":
        why.append("CuPy arrays are on a GPU")
    if problem.library == "numpy" and problem.dtype not in ("float32", "float64"):
        why.append(f"{problem.dtype} NumPy arrays are not computed; give float32 or float64")
    return why


def plan(problem: Problem) -> str:
    width = "float64" if problem.dtype == "float64" else "float32"
    calls = len(step_program(problem.cell, arranged(problem.cell, problem.T)).calls)
    return f"{width}; one product and {calls} elementwise calls per step, input projection by chunks"


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, save: bool
) -> tuple[Any, tuple, tuple]:
    y, last, tape = run_forward(cell, to_numpy(x), *numpied(weights, state), reverse=reverse, save=save)
    tape = tuple(from_numpy(array, like=x, keep_dtype=True) for array in tape)
    return from_numpy(y, like=x), tuple(from_numpy(array, like=x) for array in last), tape


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    y, dy, tape, dlast = to_numpy(y), to_numpy(dy), tuple(map(to_numpy, tape)), tuple(map(to_numpy, dlast))
    gradients = run_backward(
        cell, to_numpy(x), *numpied(weights, state), y, tape, dy, dlast, reverse=reverse, needs=needs
    )
    dstate = tuple(from_numpy(array, like=x) for array in gradients.pop("state"))
    return {name: from_numpy(array, like=x) for name, array in gradients.items()} | {"state": dstate}


def numpied(weights: Weights, state: tuple) -> tuple[Weights, tuple]:
    return Weights(*(None if w is None else lent(w) for w in weights)), tuple(map(to_numpy, state))


def lent(weight: Any) -> np.ndarray:
    """As `to_numpy`. FSDP frees its weights' memory between uses, and torch's `numpy()` would forbid that for good."""
    if FSDP in sys.modules and library(weight) == "torch" and dtype_of(weight) not in HALVES:
        return np.from_dlpack(weight.detach())
    return to_numpy(weight)


def run_forward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, *, reverse: bool, save: bool
) -> tuple[np.ndarray, tuple, tuple]:
    T, B, _ = x.shape
    H, P = sizes(cell, weights)
    order = arranged(cell, T)
    program = step_program(cell, order)
    W = by_gate(weights.w_ih, order.inputs, order.scale).swapaxes(1, 2)  # [G, I, H]
    R = by_gate(weights.w_hh, order.recurrent, order.scale)  # [G, H, P]
    b_x, b_h = biases(cell, order, weights, H, x.dtype)
    hg = np.empty((cell.G, B, H), x.dtype)
    recur = recurrent_product(R, hg, copy=T > FEW)
    run = program.bind(B, H, x.dtype, h=hg, b=b_h)

    y = np.empty((T, B, P), x.dtype)
    kept = T if save else 2  # instants of everything but y; without a tape, this one and the one before
    shown = y if weights.w_hr is None else np.empty((kept, B, H), x.dtype)  # h before its projection
    others = [np.empty((kept, B, H), x.dtype) for _ in state[1:]]
    saved = instants(cell.K, kept, B, H, x.dtype)

    before = list(state)
    for chunk in chunks(T, B, cell.G * H * x.itemsize, reverse):
        first = min(chunk)
        xg = instants(cell.G, len(chunk), B, H, x.dtype)
        project(x[first : first + len(chunk)], W, b_x, xg)
        for t in chunk:
            recur(before[0])
            after = [shown[t % len(shown)], *(other[t % kept] for other in others)]
            run(xg[:, t - first], *before, *after, saved[:, t % kept])
            if weights.w_hr is not None:
                after[0] = np.matmul(after[0], weights.w_hr.T, out=y[t])
            before = after
    tape = (saved, *others, *([] if shown is y else [shown])) if save else ()
    return y, tuple(array.copy() for array in before), tape


def run_backward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, y: np.ndarray, tape: tuple,
    dy: np.ndarray, dlast: tuple, *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    T, B, _ = x.shape
    H, P = sizes(cell, weights)
    order, program = layout(cell), grad_program(cell)
    n = len(order.separate)
    saved, *others = tape
    shown = y if weights.w_hr is None else others.pop()
    R = np.ascontiguousarray(by_gate(weights.w_hh, order.recurrent))  # [G, H, P]
    run = program.bind(B, H, x.dtype)

    d = instants(cell.G + n, T, B, H, x.dtype)
    dshown = np.empty((T, B, P), x.dtype) if weights.w_hr is not None else None  # gradient of y, h's future included
    dh = np.array(dlast[0])  # [B, P] what the later instants ask of h
    spread = transposed_product(R, dh)
    dafter = [np.empty((B, H), x.dtype), *(np.array(gradient) for gradient in dlast[1:])]
    dbefore = [np.zeros((B, H), x.dtype) for _ in state]

    for t in range(T) if reverse else range(T - 1, -1, -1):
        if dshown is None:
            np.add(dy[t], dh, dafter[0])
        else:
            np.matmul(np.add(dy[t], dh, dshown[t]), weights.w_hr, out=dafter[0])
        previous = t + 1 if reverse else t - 1
        before = [array[previous] for array in (y, *others)] if 0 <= previous < T else state
        after = [array[t] for array in (shown, *others)]
        run(*dafter, *after, *before, saved[:, t], d[:, t], *dbefore)
        spread(d[n:, t])
        if "e0" in program.written:
            np.add(dh, dbefore[0], dh)
        dafter[1:], dbefore[1:] = dbefore[1:], dafter[1:]

    dx, dr = d[: cell.G].reshape(cell.G, T * B, H), d[n:].reshape(cell.G, T * B, H)
    gradients: dict[str, Any] = {"state": (dh, *dafter[1:])}
    if "x" in needs:
        gradients["x"] = gathered(dx, by_gate(weights.w_ih, order.inputs)).reshape(x.shape)
    if "w_ih" in needs:
        gradients["w_ih"] = in_gate_order(np.matmul(dx.swapaxes(1, 2), x.reshape(T * B, x.shape[2])), order.inputs)
    if "w_hh" in needs:
        gradients["w_hh"] = in_gate_order(recurrent_gradient(d[n:], y, state[0], reverse), order.recurrent)
    if "b_ih" in needs:
        gradients["b_ih"] = in_gate_order(total(dx), order.inputs)
    if "b_hh" in needs:
        gradients["b_hh"] = in_gate_order(total(dr), order.recurrent)
    if "w_hr" in needs and dshown is not None:
        gradients["w_hr"] = dshown.reshape(T * B, P).T @ shown.reshape(T * B, H)
    return gradients


# ---- arrangement ----------------------------------------------------------------------------------------------------


def arranged(cell: Cell, T: int) -> Layout:
    """The order of the gates going forward."""
    return layout(cell) if T > FEW else natural(cell)


def sizes(cell: Cell, weights: Weights) -> tuple[int, int]:
    return weights.w_hh.shape[0] // cell.G, weights.w_hh.shape[1]


def by_gate(w: np.ndarray, gates: Sequence[int], scale: Sequence[float] | None = None) -> np.ndarray:
    """[G*H, N] in torch's order -> [G, H, N] in the order of `gates`, times their scale; a view if it can be."""
    stacked = w.reshape(len(gates), len(w) // len(gates), w.shape[1])
    if scale is not None and set(scale) != {1.0}:
        return stacked[list(gates)] * np.array([scale[g] for g in gates], w.dtype)[:, None, None]
    return stacked if list(gates) == sorted(gates) else stacked[list(gates)]


def in_gate_order(stacked: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G, H, ...] in the order of `gates` -> [G*H, ...] in torch's."""
    ordered = np.empty_like(stacked)
    ordered[list(gates)] = stacked
    return ordered.reshape(stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])


def biases(cell: Cell, order: Layout, weights: Weights, H: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """-> [G, 1, H] to add to the input part, as much as can be; [n, 1, H] to add to h of the separate gates."""
    zero = np.zeros(cell.G * H, dtype)
    b_ih = zero if weights.b_ih is None else weights.b_ih
    b_hh = (zero if weights.b_hh is None else weights.b_hh).reshape(cell.G, 1, H)
    b_x = b_ih.reshape(cell.G, 1, H).copy()
    shared = [g for g in range(cell.G) if g not in order.separate]
    b_x[shared] += b_hh[shared]
    b_x *= np.array(order.scale, dtype)[:, None, None]
    return b_x[list(order.inputs)], b_hh[list(order.separate)]


def instants(rows: int, T: int, B: int, H: int, dtype: np.dtype) -> np.ndarray:
    """Empty [rows, T, B, H]. With one batch row, an instant is contiguous, as a matrix-vector product wants it."""
    return np.empty((T, rows, B, H), dtype).swapaxes(0, 1) if B == 1 else np.empty((rows, T, B, H), dtype)


def chunks(T: int, B: int, row_bytes: int, reverse: bool) -> Iterator[range]:
    """The instants in the order of computation, cut into runs whose input part stays in cache."""
    length = max(-(-CHUNK_ROWS // max(B, 1)), CHUNK_BYTES // max(B * row_bytes, 1))
    for start in range(0, T, length):
        stop = min(start + length, T)
        yield range(T - 1 - start, T - 1 - stop, -1) if reverse else range(start, stop)


# ---- products -------------------------------------------------------------------------------------------------------


def blocks(rows: int, inner: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the blocks that a product is cut into: small enough for OpenBLAS to leave packing out."""
    r, c = rows, columns
    while r * inner * c > PRODUCT and c % 2 == 0 and c > LEAST_COLUMNS:
        c //= 2
    while r * inner * c > PRODUCT and r % 2 == 0 and r > LEAST_ROWS:
        r //= 2
    return (r, c) if r * inner * c <= PRODUCT else (rows, columns)


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> Callable[[np.ndarray], Any]:
    """a [.., N, K] -> a @ b [.., K, M] into out [.., N, M]: a function for arrays shaped as `a`, cut into blocks.

    The blocks are strided views, so NumPy's one call hands them to BLAS as they lie.
    """
    (N, K), M = a.shape[-2:], b.shape[-1]
    r, c = blocks(N, K, M)
    if (r, c) == (N, M) or not out.size:
        return lambda a: np.matmul(a, b, out)
    pieces = b.reshape(*b.shape[:-1], M // c, c)[..., None, :, :, :].swapaxes(-2, -3)  # [.., 1, M/c, K, c]
    places = out.reshape(*out.shape[:-2], N // r, r, M // c, c).swapaxes(-2, -3)  # [.., N/r, M/c, r, c]
    return lambda a: np.matmul(a.reshape(*a.shape[:-2], N // r, 1, r, K), pieces, places)


def project(x: np.ndarray, W: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The input part of several instants, x [n, B, I] @ W [G, I, H] + bias, into out [G, n, B, H]."""
    G, n, B, H = out.shape
    rows, flat = x.reshape(n * B, x.shape[2]), out.reshape(G, n * B, H)
    product(rows, W, flat)(rows)
    np.add(flat, bias, flat)


def recurrent_product(R: np.ndarray, out: np.ndarray, *, copy: bool) -> Callable[[np.ndarray], Any]:
    """h [B, P] -> R h of all gates, into out [G, B, H]; for one batch row a single matrix-vector product."""
    G, B, H = out.shape
    if B == 1:
        rows, vector = R.reshape(G * H, R.shape[2]), out.reshape(G * H)
        return lambda h: np.dot(rows, h[0], vector)
    columns = R.swapaxes(1, 2)
    if not copy:
        return lambda h: np.matmul(h, columns, out)
    return product(np.empty((B, R.shape[2]), R.dtype), np.ascontiguousarray(columns), out)


def transposed_product(R: np.ndarray, out: np.ndarray) -> Callable[[np.ndarray], Any]:
    """Gate gradients [G, B, H] -> sum over gates of R^T da, into out [B, P]."""
    (G, H, P), B = R.shape, len(out)
    if B == 1:
        rows, vector = R.reshape(G * H, P), out.reshape(P)
        return lambda da: np.dot(da.reshape(G * H), rows, vector)
    parts = np.empty((G, B, P), out.dtype)
    multiply = product(np.empty((G, B, H), R.dtype), R, parts)

    def spread(da: np.ndarray) -> None:
        multiply(da)
        np.add.reduce(parts, 0, out=out)

    return spread


def gathered(d: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Sum over gates of d [G, N, H] @ W [G, H, I], a block of rows at a time -> [N, I]."""
    G, N, _ = d.shape
    out = np.empty((N, W.shape[2]), d.dtype)
    block = max(CHUNK_ROWS, CHUNK_BYTES // max(G * W.shape[2] * d.itemsize, 1))
    for start in range(0, N, block):
        np.add.reduce(np.matmul(d[:, start : start + block], W), 0, out=out[start : start + block])
    return out


def total(d: np.ndarray) -> np.ndarray:
    """Sum of [G, N, H] over N -> [G, H]; of blocks first, because the error of a plain sum grows with its length."""
    G, N, H = d.shape
    whole = N // SUM_ROWS * SUM_ROWS
    parts = np.einsum("gbnh->gbh", d[:, :whole].reshape(G, N // SUM_ROWS, SUM_ROWS, H))
    return parts.sum(1) + d[:, whole:].sum(1)


def recurrent_gradient(da: np.ndarray, y: np.ndarray, h0: np.ndarray, reverse: bool) -> np.ndarray:
    """da [G, T, B, H] and the h each instant saw -> [G, H, P]; h0 stands before the first one."""
    G, T, B, H = da.shape
    first, rest, seen = (T - 1, slice(None, -1), slice(1, None)) if reverse else (0, slice(1, None), slice(None, -1))
    gradient = np.matmul(da[:, first].swapaxes(1, 2), h0)
    if T > 1:
        later = da[:, rest].reshape(G, (T - 1) * B, H).swapaxes(1, 2)
        gradient += np.matmul(later, y[seen].reshape((T - 1) * B, y.shape[2]))
    return gradient
