"""NumPy: the oracle and the fallback. float64 and float32; torch's halves are computed in float32.

The page's operations come as a `Program` of calls on preallocated rows; here are the products and the time loop.
Inside, an instant is feature-major, [H, B] for each gate and state: so the weights are multiplied as they lie, and the
gates are contiguous blocks of their product. What comes and goes is transposed, and turned round if `reverse`, by
chunks of instants.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gpu_rnn.kernels.cells import Cell, operand_grad_graph, operand_graph
from gpu_rnn.kernels.derive import OPERATIONS
from gpu_rnn.kernels.program import Layout, grad_program, layout, natural, step_program
from gpu_rnn.kernels.weave import HOLD

from ..arrays import HALVES, from_numpy, to_numpy
from ..arrays import dtype as dtype_of
from ..extra import Extra
from ..problem import Problem, Weights

NAME = "numpy"
SIZES, KEPT_BYTES = 16, 1 << 20  # of problems whose arrays are kept for the next call, and of each one's arrays
CHUNK, CHUNK_BYTES = 32, 1 << 22  # instants forward whose views are made once, for all chunks; their input part
CHUNK_ROWS = 512  # instants times batch rows backward that a product needs to run at full speed
WIDE = 32  # batch rows that make a product of one instant run at full speed
PRODUCT = 10**6  # multiply-adds up to which OpenBLAS, given AVX-512, reads its operands where they lie: twice as fast
LEAST_ROWS = 16  # of the blocks that a product is cut into: of smaller ones it takes too many


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
    order = arranged(problem.cell, problem.T, problem.B, problem.H * ((problem.I or 0) + (problem.P or problem.H)))
    calls = len(step_program(problem.cell, order).calls)
    before = "x is the input part already" if problem.I is None else "input projection by chunks"
    return f"{width}; one product and {calls} elementwise calls per step, {before}"


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, tf32: bool = False, save: bool
) -> tuple[Any, tuple, tuple]:
    if isinstance(x, np.ndarray):
        return run_forward(cell, x, weights, state, reverse=reverse, save=save)
    y, last, tape = run_forward(cell, to_numpy(x), *numpied(weights, state), reverse=reverse, save=save)
    tape = tuple(from_numpy(array, like=x, keep_dtype=True) for array in tape)
    return from_numpy(y, like=x), tuple(from_numpy(array, like=x) for array in last), tape


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    y, dy, (tape, dlast, dhistory) = (
        to_numpy(y),
        to_numpy(dy),
        (tuple(map(to_numpy, a)) for a in (tape, dlast, dhistory)),
    )
    gradients = run_backward(
        cell, to_numpy(x), *numpied(weights, state), y, tape, dy, dlast, dhistory, reverse=reverse, needs=needs
    )
    dstate = tuple(from_numpy(array, like=x) for array in gradients.pop("state"))
    return {name: from_numpy(array, like=x) for name, array in gradients.items()} | {"state": dstate}


def history(cell: Cell, tape: tuple, *, reverse: bool, like: Any) -> tuple:
    """The other states after every instant, each [T, B, H], in the dtype of `like`."""
    return tuple(from_numpy(to_numpy(array).copy(), like=like) for array in tape[1 : cell.S])


def warmup(problem: Problem) -> tuple[str, ...]:
    return ()  # there is nothing to compile


def numpied(weights: Weights, state: tuple) -> tuple[Weights, tuple]:
    borrowed = lent if distributed() else to_numpy
    return Weights(*(None if w is None else borrowed(w) for w in weights)), tuple(map(to_numpy, state))


def distributed() -> bool:
    """Whether weights may be FSDP's, which frees their memory between uses; torch's `numpy()` forbids that for good."""
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_available() and torch.is_initialized()


def lent(weight: Any) -> np.ndarray:
    """As `to_numpy`, and the weight stays as it was."""
    return to_numpy(weight) if dtype_of(weight) in HALVES else np.from_dlpack(weight.detach())


def run_forward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, *, reverse: bool, save: bool
) -> tuple[np.ndarray, tuple, tuple]:
    T, B, _ = x.shape
    (H, P), I = sizes(cell, weights), 0 if weights.w_ih is None else weights.w_ih.shape[1]
    n = min(T, CHUNK, 1 + CHUNK_BYTES // max(cell.G * H * B * x.itemsize, 1))
    size = cell, arranged(cell, T, B, H * (I + P)), n, B, I, H, P, x.dtype
    idle = kept(*size)
    try:
        instants = idle.pop()
    except IndexError:
        instants = Instants(*size)
    W, recur = instants.take(weights, state)
    h, run, v = instants.h, instants.run, instants.v
    more = More(cell, weights, T, reverse, instants.m)

    y = np.empty((T, B, P), x.dtype)
    tape = (
        [np.empty((T, *v.shape), x.dtype), *(np.empty((T, H, B), x.dtype) for _ in instants.recorded)] if save else []
    )
    x, out, *records = in_order(reverse, x, y, *tape)
    for first in range(0, T, n):
        m = min(n, T - first)
        now = slice(first, first + m)
        instants.project(W, x[now])
        for k, (seen, rows) in enumerate(instants.views[:m]):
            recur(more.operand(first + k, seen) if cell.E else seen)
            run(*rows)
            if save:
                records[0][first + k] = v
            if weights.w_hr is not None:
                np.dot(weights.w_hr, instants.shown[k], h[k + 1])
                more.hold(h[k], h[k + 1])
        out[now] = h[1 : m + 1].swapaxes(1, 2)
        for record, array in zip(records[1:], instants.recorded):
            record[now] = array[:m]
        for array in instants.states:
            array[0] = array[m]
    last = tuple(array[0].T.copy() for array in instants.states)
    if instants.bytes <= KEPT_BYTES:
        idle.append(instants)
    return y, last, turned(*tape)


def run_backward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, y: np.ndarray, tape: tuple,
    dy: np.ndarray, dlast: tuple, dhistory: tuple = (), *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    T, B, I = x.shape
    H, P = sizes(cell, weights)
    G, order, program = cell.G, layout(cell), grad_program(cell)
    n = len(order.separate)
    W = None if weights.w_ih is None else by_gate(weights.w_ih, order.inputs).reshape(G * H, I)
    R = np.ascontiguousarray(by_gate(weights.w_hh, order.recurrent)).reshape(G * H, P)
    v, d = np.empty((cell.K, H, B), x.dtype), np.empty((G + n, H, B), x.dtype)
    g, dunits = np.zeros((2, cell.learned, H, B), x.dtype)
    more = More(cell, weights, T, reverse, np.empty((cell.E, H, B), x.dtype))
    run = program.bind((H, B), x.dtype, v=v, d=d, **more.fixed(g=g))
    dh, *asked = (gradient.T.copy() for gradient in dlast)  # what the later instants ask of the states
    dshown, e0, *asking = (np.zeros((H, B), x.dtype) for _ in range(1 + cell.S))
    spread, dr = product(R.T, dh), d[n:].reshape(G * H, B)

    x, y, dy, saved, *others = in_order(reverse, x, y, dy, *turned(*tape))
    dhistory = in_order(reverse, *dhistory)
    dx = np.empty(x.shape, x.dtype)
    h = np.concatenate((state[0][None], y))
    seen = h if cell.operand is None else np.empty_like(h)  # by the recurrent weights
    shown = None if weights.w_hr is None else others.pop()
    before = [[initial.T, *array[:-1]] for initial, array in zip(state[1:], others)]

    sums: dict[str, Any] = dict.fromkeys(needs, 0)
    length = max(CHUNK_ROWS // max(B, 1), 1)
    for first in reversed(range(0, T, length)):
        now = slice(first, min(first + length, T))
        m = now.stop - first
        rows = by_feature(h[first : now.stop + 1])
        after = rows[1:] if shown is None else shown[now]
        own = rows if shown is None else np.zeros((m, H, B), x.dtype)  # unseen by a cell with a projection
        states_of = zip(after, *(array[now] for array in others), own, *(array[now] for array in before))
        instants = list(zip(by_feature(dy[now]), saved[now], states_of))
        ds = np.empty((G + n, H, m, B), x.dtype)
        dhs = np.empty((P, m, B), x.dtype)  # of y, h's future included: only a projection needs it
        for k in reversed(range(m)):
            arriving, recorded, states = instants[k]
            if cell.E:
                seen[first + k] = more.operand(first + k, h[first + k].T).T
            for gradient, of_history in zip(asked, dhistory):
                gradient += of_history[first + k].T
            held = None
            if shown is None:
                np.add(arriving, dh, dshown)
            else:
                np.add(arriving, dh, dh)
                held = more.held(dh)
                dhs[:, k] = dh
                np.dot(weights.w_hr.T, dh, dshown)
            np.copyto(v, recorded)
            run(dshown, *asked, *states, e0, *asking)
            ds[:, :, k] = d
            spread(dr)
            if cell.E:
                dunits += g
                more.operand_back(dh, dunits)
            if held is not None:
                dh += held
            if shown is None and "e0" in program.written:
                np.add(dh, e0, dh)
            asked, asking = asking, asked

        inputs, recurrent = ds[:G].reshape(G * H, m * B), ds[n:].reshape(G * H, m * B)
        if "x" in needs and W is not None:
            np.dot(inputs.T, W, dx[now].reshape(m * B, I))
        elif "x" in needs:
            dx[now] = in_gate_order(inputs, order.inputs).T.reshape(m, B, I)
        if "w_ih" in needs:
            sums["w_ih"] += np.dot(inputs, x[now].reshape(m * B, I))
        if "w_hh" in needs:
            sums["w_hh"] += np.dot(recurrent, seen[now].reshape(m * B, P))
        if "b_ih" in needs:
            sums["b_ih"] += inputs.sum(1)
        if "b_hh" in needs:
            sums["b_hh"] += recurrent.sum(1)
        if shown is not None and "w_hr" in needs:
            sums["w_hr"] += np.dot(dhs.reshape(P, m * B), shown[now].swapaxes(1, 2).reshape(m * B, H))
    if "x" in needs:
        sums["x"] = dx[::-1].copy() if reverse else dx
    gates = {"w_ih": order.inputs, "b_ih": order.inputs, "w_hh": order.recurrent, "b_hh": order.recurrent}
    gradients = {name: in_gate_order(array, gates[name]) if name in gates else array for name, array in sums.items()}
    if "units" in needs:
        gradients["units"] = more.of_units(dunits)
    return gradients | {"state": (dh.T.copy(), *(gradient.T.copy() for gradient in asked))}


# ---- arrangement ----------------------------------------------------------------------------------------------------


def sizes(cell: Cell, weights: Weights) -> tuple[int, int]:
    return weights.w_hh.shape[0] // cell.G, weights.w_hh.shape[1]


def arranged(cell: Cell, T: int, B: int, weights: int) -> Layout:
    """The order of the gates going forward: torch's where the instants don't repay a copy of so many weights a gate."""
    repaid = (T - 4) * (B + 8) * 256
    return natural(cell) if repaid < weights else layout(cell)


def by_gate(w: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G*H, ...] in torch's order -> [G, H, ...] in the order of `gates`; a view if it can be."""
    stacked = w.reshape(len(gates), len(w) // len(gates), *w.shape[1:])
    return stacked if list(gates) == sorted(gates) else stacked[list(gates)]


def scaled(w: np.ndarray, gates: Sequence[int], scale: Sequence[float]) -> np.ndarray:
    """[G*H, ...] in torch's order -> the same in the order of `gates`, times their scale."""
    stacked = by_gate(w, range(len(gates)))
    out = np.empty(stacked.shape, w.dtype)
    for row, g in zip(out, gates):
        np.multiply(stacked[g], scale[g], row)
    return out.reshape(w.shape)


def in_gate_order(rows: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G*H, ...] in the order of `gates` -> the same in torch's."""
    ordered = np.empty((len(gates), len(rows) // len(gates), *rows.shape[1:]), rows.dtype)
    ordered[list(gates)] = rows.reshape(ordered.shape)
    return ordered.reshape(rows.shape)


def by_feature(array: np.ndarray) -> np.ndarray:
    """[T, B, H] -> [T, H, B]"""
    return np.ascontiguousarray(array.swapaxes(1, 2))


def in_order(reverse: bool, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The first instant to be computed first."""
    return tuple(array[::-1] for array in arrays) if reverse else arrays


def turned(*tape: np.ndarray) -> tuple[np.ndarray, ...]:
    """saved [T, K, H, B] <-> [K, T, B, H], and all the others [T, H, B] <-> [T, B, H]; views."""
    return tuple(array.transpose(1, 0, 3, 2) if array.ndim == 4 else array.swapaxes(1, 2) for array in tape)


# ---- forward --------------------------------------------------------------------------------------------------------


class Instants:
    """The arrays of n instants going forward, and their views: to make them takes longer than a small step."""

    def __init__(self, cell: Cell, order: Layout, n: int, B: int, I: int, H: int, P: int, dtype: np.dtype):
        def rows(*shape: int) -> np.ndarray:
            self.bytes += dtype.itemsize * math.prod(shape)
            return np.empty(shape, dtype)

        G, self.order, self.scaled, self.bytes = cell.G, order, order != natural(cell), 0
        self.zero = np.zeros(G * H, dtype)
        self.x, self.xg = rows(n, I, B), rows(n, G * H, B)  # what comes in, and the input part of all gates
        self.h, self.hg = rows(n + 1, P, B), rows(G * H, B)
        self.m = rows(cell.E, H, B)
        self.v, self.b_x, self.b_h = rows(cell.K, H, B), rows(G * H, B), rows(len(order.separate), H, B)
        others = [rows(n + 1, H, B) for _ in cell.states[1:]]
        self.states, after = [self.h, *others], [array[1:] for array in others]
        self.shown = self.h[1:] if P == H else rows(n, H, B)  # h before its projection
        self.recorded = after if P == H else [*after, self.shown]  # for the gradient, beside v
        fixed = {"h": self.hg.reshape(G, H, B), "b": self.b_h, "v": self.v} | ({"m": self.m} if cell.E else {})
        self.run = step_program(cell, order).bind((H, B), dtype, **fixed)
        own = self.h if P == H else np.zeros((n + 1, H, B), dtype)  # a cell with a projection can't look at its own h
        self.views = list(zip(self.h, zip(self.xg.reshape(n, G, H, B), own, *others, self.shown, *after)))

    def take(self, weights: Weights, state: tuple) -> tuple[Any, Callable[[np.ndarray], Any]]:
        """-> the input weights for `project`, or None, and a function that computes the recurrent part of all gates
        from h."""
        for array, initial in zip(self.states, state):
            array[0] = initial.T
        w_ih, w_hh = weights.w_ih, np.ascontiguousarray(weights.w_hh)
        b_ih, b_hh = (self.zero if b is None else b for b in (weights.b_ih, weights.b_hh))
        bias, H = b_ih + b_hh, self.b_h.shape[1]
        for row, g in enumerate(self.order.separate):
            gate = slice(g * H, (g + 1) * H)
            self.b_h[row], bias[gate] = b_hh[gate, None], b_ih[gate]
        if self.scaled:
            bias = scaled(bias, self.order.inputs, self.order.scale)
            w_ih = None if w_ih is None else scaled(w_ih, self.order.inputs, self.order.scale)
            w_hh = scaled(w_hh, self.order.recurrent, self.order.scale)
        self.b_x[...] = bias[:, None]
        return None if w_ih is None else np.ascontiguousarray(w_ih), product(w_hh, self.hg)

    def project(self, W: np.ndarray | None, x: np.ndarray) -> None:
        """The input part of all gates for the m instants x [m, B, I], or of x [m, B, G*H] where there is no W."""
        (m, B, I), xg = x.shape, self.xg[: len(x)]
        if W is None:
            H, inputs = self.b_h.shape[1], self.order.inputs
            gates, rows = x.reshape(m, B, len(inputs), H), xg.reshape(m, len(inputs), H, B)
            for row, g in enumerate(inputs):
                np.multiply(gates[:, :, g].swapaxes(1, 2), self.order.scale[g], rows[:, row])
            np.add(xg, self.b_x, xg)
        elif B == 1:
            np.dot(x.reshape(m, I), W.T, xg.reshape(m, len(W)))
            np.add(xg, self.b_x, xg)
        elif B < WIDE:
            together = np.dot(W, x.reshape(m * B, I).T).reshape(len(W), m, B)
            np.add(together.swapaxes(0, 1), self.b_x, xg)
        else:
            self.x[:m] = x.swapaxes(1, 2)
            product(W, xg)(self.x[:m])
            np.add(xg, self.b_x, xg)


def steps(cell: Cell, weights: Weights, B: int) -> tuple[np.ndarray, np.ndarray, list, Callable[[], None]]:
    """One layer that goes on instant by instant, on arrays that stay, without flags or random numbers.

    -> x [I, B] and y [P, B], the states, [., B] each and zero; and what goes from x and the states to y and the states,
    and allocates nothing
    """
    weights, _ = numpied(weights, ())
    I, (H, P), w_hr = weights.w_ih.shape[1], sizes(cell, weights), weights.w_hr
    instants = Instants(cell, layout(cell), 1, B, I, H, P, weights.w_ih.dtype)
    More(cell, weights, 1, False, instants.m)
    W, recur = instants.take(weights, tuple(np.zeros((B, P if k == 0 else H)) for k in range(cell.S)))
    x, xg, y, shown = instants.x[0], instants.xg[0], instants.h[1], instants.shown[0]
    enter, run, bias, ((seen, rows),) = product(W, xg), instants.run, instants.b_x, instants.views[:1]
    moves = [(array[0], array[1]) for array in instants.states]

    def step() -> None:
        enter(x)
        np.add(xg, bias, xg)
        recur(seen)
        run(*rows)
        if w_hr is not None:
            np.dot(w_hr, shown, y)
        for before, after in moves:
            np.copyto(before, after)

    return x, y, [before for before, _ in moves], step


class More:
    """What a cell's page takes beside gates and states, as rows of m [E, H, B]; does nothing for a cell without."""

    def __init__(self, cell: Cell, weights: Weights, T: int, reverse: bool, m: np.ndarray):
        self.cell, self.extra, self.m, self.last = cell, Extra.of(weights), m, T - 1 if reverse else None
        if cell.units:
            m[: len(cell.units)] = weights.units.swapaxes(1, 2)

    def fixed(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Those that there are and m, for a program."""
        return {name: array for name, array in (arrays | {"m": self.m}).items() if len(array)}

    def operand(self, k: int, h: np.ndarray) -> np.ndarray:
        """Fetch what belongs to the k-th instant. h [P, B] -> what the recurrent weights see of it."""
        cell, (_, H, B) = self.cell, self.m.shape
        t, row = k if self.last is None else self.last - k, len(cell.units)
        for j in range(len(cell.flags)):
            self.m[row + j] = self.extra.flags[t] >> j & 1
        for j, uniform in enumerate(self.extra.drawn(cell, t, B, H), row + len(cell.flags)):
            self.m[j] = uniform.T
        if cell.operand is None:
            return h
        ((seen,),) = operand_graph(cell).run(OPERATIONS, h=[h], extra=list(self.m[:, : len(h)]))
        return seen

    def operand_back(self, dh: np.ndarray, dunits: np.ndarray) -> None:
        """The gradient of that, in place; those of values per unit are added to dunits."""
        if self.cell.operand is not None:
            P = len(dh)
            (found,), parts = operand_grad_graph(self.cell).run(OPERATIONS, dnew=[dh], extra=list(self.m[:, :P]))
            for total, part in zip(dunits, parts):
                total[:P] += part
            dh[...] = found

    def hold(self, before: np.ndarray, h: np.ndarray) -> None:
        """Where the page holds its states, a projected h stays what it was before."""
        if HOLD in self.cell.flags:
            np.copyto(h, before, where=self.m[self.holding, : len(h)] > 0)

    def held(self, dh: np.ndarray) -> np.ndarray | None:
        """The gradient of that: what goes to the h before, taken from dh."""
        if HOLD not in self.cell.flags:
            return None
        held = np.where(self.m[self.holding, : len(dh)] > 0, dh, 0)
        dh -= held
        return held

    @property
    def holding(self) -> int:
        return len(self.cell.units) + self.cell.flags.index(HOLD)

    def of_units(self, dunits: np.ndarray) -> np.ndarray:
        """[learned, H, B] -> [N, R, H]."""
        N, R, H = self.extra.units.shape
        found = np.zeros((N, R, H), dunits.dtype)
        found[: len(dunits)] = dunits.swapaxes(1, 2) if R > 1 else dunits.sum(2)[:, None]
        return found


@lru_cache(SIZES)
def kept(*size: Any) -> list[Instants]:
    """Those that nobody uses now: a call takes one out and puts it back, in whichever thread."""
    return []


# ---- products -------------------------------------------------------------------------------------------------------


def product(M: np.ndarray, out: np.ndarray) -> Callable[[np.ndarray], Any]:
    """M [N, K] -> a function of z [.., K, B] that computes M z into out [.., N, B], by blocks of rows."""
    (N, K), B = M.shape, out.shape[-1]
    count = blocks(N, K, B)
    if count == 1:
        return (lambda z: M.dot(z, out)) if out.ndim == 2 else (lambda z: np.matmul(M, z, out))
    pieces, places = M.reshape(count, N // count, K), out.reshape(*out.shape[:-2], count, N // count, B)
    return lambda z: np.matmul(pieces, z[..., None, :, :], places)


@cache
def blocks(N: int, K: int, B: int) -> int:
    """How many blocks of rows make up a product; 1 for none, and for a matrix with a vector."""
    work, count = N * K * B, 1
    if not has_avx512():
        return 1
    while work > count * PRODUCT and N % (2 * count) == 0:
        count *= 2
    return 1 if B == 1 or work > count * PRODUCT or N // count < LEAST_ROWS else count


@cache
def has_avx512() -> bool:
    """Whether NumPy found it here; an old NumPy doesn't say. Asked, not timed, so that every run adds in one order."""
    introspect = getattr(np.lib, "introspect", None)
    if introspect is None:
        return False
    (of_tanh,) = introspect.opt_func_info("^tanh$", "^float32$").values() or [{}]
    return any(name in found["current"] for found in of_tanh.values() for name in ("X86_V4", "AVX512"))
