"""NumPy: the fallback. float64 and float32; torch's halves are computed in float32.

The page's operations come as a `Program` of calls on preallocated rows; here are the products and the time loop.
Inside, an instant is feature-major, [H, B] for each gate and state: so the weights are multiplied as they lie, and the
gates are contiguous blocks of their product. What comes and goes is transposed, and turned round if `reverse`, by
chunks of instants.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from gpu_rnn.kernels.autodiff import OPERATIONS
from gpu_rnn.kernels.cells import Cell, operand_grad_graph, operand_graph
from gpu_rnn.kernels.codegen.numpy import GateLayout, gradient, layout, step_program, torch_layout, with_exp_sigmoid
from gpu_rnn.kernels.codegen.schedule import Program
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.philox import uniforms

from ..core.arrays import HALVES, from_numpy, to_numpy
from ..core.arrays import dtype as dtype_of
from ..core.cell_inputs import Extra
from ..core.problem import Memory, Problem, Weights

NAME = "numpy"
LAYERED = True  # states may come as those of one layer, [1, B, .], and then leave so
SIZES, KEPT_BYTES = 16, 1 << 23  # of problems whose arrays are kept for the next call, and of each one's arrays
CHUNK, CHUNK_BYTES = 32, 1 << 22  # instants forward whose views are made once, for all chunks; their input part
CHUNK_BACK, CHUNK_ROWS = 64, 512  # the same backward, and times batch rows: a product needs them to run at full speed
LONG = 128  # instants that repay a transposed copy of the recurrent weights
WIDE, NARROW, SMALL = 32, 8, 1 << 16  # batch rows from which a product per instant pays: of any weights, of so few
EXP = 1 << 10  # values of a row for which it repays more calls to take sigmoids by exp; float64 has no fast exp
TOGETHER = 1 << 13  # values of a row backward that are computed at once
PRODUCT = 10**6  # multiply-adds up to which OpenBLAS, given AVX-512, reads its operands where they lie: twice as fast
LEAST_ROWS = 16  # of the blocks that a product is cut into: of smaller ones it takes too many
AS_EVER = nullcontext()


def reasons(problem: Problem) -> list[str]:
    why = []
    if problem.device != "cpu":
        why.append(problem.elsewhere)
    if problem.library == "cupy":
        why.append("takes no CuPy arrays, which are on a GPU")
    if problem.library == "numpy" and problem.dtype not in ("float32", "float64"):
        why.append(f"takes NumPy arrays of float32 or float64, not {problem.dtype}")
    return why


def plan(problem: Problem) -> str:
    width = "float64" if problem.dtype == "float64" else "float32"
    columns = (problem.I or 0) + (problem.P or problem.H)
    order = arranged(problem.cell, problem.T, problem.B, problem.H, columns, np.dtype(width), problem.step_exact)
    calls = len(step_program(problem.cell, order).calls)
    chunks = "one GEMM per time step" if problem.step_exact else "one GEMM per chunk of time steps"
    projection = problem.projection or f"input projection: {chunks}"
    ways = "forward and backward" if problem.training else "forward"
    return f"{projection}\n{ways}: {width}, one recurrent matmul and {calls} elementwise NumPy calls per time step"


def method(problem: Problem, backward: bool, stacked: bool = False) -> str:
    return NAME


def memory(problem: Problem) -> Memory:
    """With the arrays that are kept for the next call, as if there were none yet."""
    cell, T, B, H, r = problem.cell, problem.T, problem.B, problem.H, problem.real_itemsize
    P, G, halves = problem.P or H, cell.G, problem.itemsize == 2
    inputs, columns, dtype = (problem.I or 0), problem.I or G * H, np.dtype("float64" if r == 8 else "float32")
    y, x, save = problem.output_elements * r, problem.input_elements * r, problem.training or problem.history
    history = T * (cell.S - 1) * B * H * problem.itemsize if problem.history else 0
    given = x + (problem.weight_elements + problem.state_elements) * r if halves else 0  # in float32
    stored = y // 2 if halves else 0

    shelf = shelf_forward(cell, T, B, inputs, G * H, P, dtype, problem.step_exact)
    instants = shelf.lend()
    n = len(instants.views)
    entering = n * B * G * H if inputs and not instants.wide and n > 1 and B > 1 else 0  # the product for a chunk
    entering += n * B * columns if problem.reverse and n > 1 else 0
    weights = G * H * (inputs + P) if instants.scaled else 0
    shelf.take_back(instants)
    record = ((T + 1) * (cell.K + cell.S - 1) + (T if problem.P else 0)) * H * B * r if save else 0
    program = step_program(cell, arranged(cell, T, B, H, inputs + P, dtype, problem.step_exact))
    forward = instants.bytes + (temporaries(program, H, B) + entering + weights) * r
    forward += y + record + problem.state_elements * r + history + given + stored
    if not problem.training:
        return Memory(0, forward, 0)

    n = min(T, CHUNK_BACK, max(CHUNK_ROWS // max(B, 1), 1))
    order, found, shelf = layout(cell), gradient(cell), shelf_of(InstantsBack, cell, n, B, H, P, dtype)
    back = shelf.lend()
    shelf.take_back(back)
    turned = [list(gates) != sorted(gates) for gates in (order.inputs, order.recurrent)]  # what is no view then
    copies = G * H * (inputs * turned[0] + P * (turned[1] + (T >= LONG)))
    base = back.bytes + x + (temporaries(found.grad, H, B) + copies + cell.learned * H * B) * r
    base += (T + 1) * B * P * r * (1 if cell.operand is None else 2) + (n * B * P * r if problem.P else 0)
    base += 2 * problem.state_elements * r + given + (y if halves else 0)
    together = max(1, TOGETHER // max(H * B, 1)) * temporaries(found.coefficients, H, B)
    in_order = G * H * (inputs + P + 2) + (problem.input_elements if problem.reverse else 0)
    turning = 0 if inputs else n * B * G * H  # a chunk of x's gradient, which is that of its input part
    transient = max(together, G * H * max(inputs, P) if n < T else 0, in_order, turning) * r
    return Memory(y - stored + record, forward, base + problem.weight_elements * r + transient)


def temporaries(program: Program, H: int, B: int) -> int:
    """Elements of what a bound program has for itself."""
    return (program.rows * H + program.shared) * B


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, tf32: bool = False, save: bool,
    step_exact: bool = False,
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    if isinstance(x, np.ndarray):
        return run_forward(cell, x, weights, state, reverse, save, step_exact)
    y, last, tape = run_forward(cell, to_numpy(x), *numpied(weights, state), reverse, save, step_exact)
    after = tuple([from_numpy(array.reshape(before.shape), like=x) for array, before in zip(last, state)])
    return from_numpy(y, like=x), after, tuple([from_numpy(array, like=x, keep_dtype=True) for array in tape])


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    y, dy, (tape, dhistory) = to_numpy(y), to_numpy(dy), (tuple(map(to_numpy, a)) for a in (tape, dhistory))
    dlast = tuple(map(by_row, dlast))
    gradients = run_backward(
        cell, to_numpy(x), *numpied(weights, state), y, tape, dy, dlast, dhistory, reverse=reverse, needs=needs
    )
    found = zip(gradients.pop("state"), state, strict=True)
    dstate = tuple(from_numpy(array.reshape(given.shape), like=x) for array, given in found)
    return {name: from_numpy(array, like=x) for name, array in gradients.items()} | {"state": dstate}


def history(cell: Cell, tape: tuple, *, reverse: bool, like: Any) -> tuple:
    """The other states after every instant, each [T, B, H], in the dtype of `like`."""
    (after,) = in_order(reverse, to_numpy(tape[0])[1:])
    return tuple(from_numpy(after[:, cell.K + k].swapaxes(1, 2).copy(), like=like) for k in range(cell.S - 1))


def factors(x: Any, weights: Weights) -> tuple[Any, Weights]:
    """NumPy's, whose arrays they may be: so its products don't depend on that."""
    return to_numpy(x), numpied(weights, ())[0]


def warmup(problem: Problem) -> tuple[str, ...]:
    return ()  # there is nothing to compile


def numpied(weights: Weights, state: tuple) -> tuple[Weights, tuple]:
    borrowed = lent if distributed() else to_numpy
    return Weights(*[None if w is None else borrowed(w) for w in weights]), tuple([by_row(each) for each in state])


def by_row(state: Any) -> np.ndarray:
    """[B, .] or [1, B, .] -> [B, .]"""
    array = to_numpy(state)
    return array if array.ndim == 2 else array.reshape(array.shape[1:])


def distributed() -> bool:
    """Whether weights may be FSDP's, which frees their memory between uses; torch's `numpy()` forbids that for good."""
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_available() and torch.is_initialized()


def lent(weight: Any) -> np.ndarray:
    """As `to_numpy`, and the weight stays as it was."""
    return to_numpy(weight) if dtype_of(weight) in HALVES else np.from_dlpack(weight.detach())


def run_forward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, reverse: bool, save: bool, step_exact: bool
) -> tuple[np.ndarray, tuple, tuple]:
    """The tape is the record of `Instants` for all instants, in the order of computation; with a projection also h
    before it, [T, H, B]."""
    (T, B, I), (rows, P) = x.shape, weights.w_hh.shape
    shelf = shelf_forward(cell, T, B, 0 if weights.w_ih is None else I, rows, P, x.dtype, step_exact)
    instants = shelf.lend()
    W, recur = instants.take(weights, state)
    h, hg, record, shown, run = instants.h, instants.hg, instants.record, instants.shown, instants.run
    n, projected, masked = len(instants.views), weights.w_hr is not None, cell.operand is not None
    more: Any = More(cell, weights, T, reverse) if projected or cell.E else None

    y = np.empty((T, B, P), x.dtype)
    tape = [np.empty((T + 1, *record.shape[1:]), x.dtype)] if save else []
    if save and projected:
        tape.append(np.empty((T, *shown.shape[1:]), x.dtype))
    x, out = in_order(reverse, x, y)
    for first in range(0, T, n):
        if first:
            h[0], record[0, cell.K :] = h[n], record[n, cell.K :]
        m = min(n, T - first)
        now = slice(first, first + m)
        instants.project(W, x[now])
        if more:
            more.fetch(first, instants.m[:m])
        with quiet(instants.order):
            for k, (seen, rows) in enumerate(instants.views[:m]):
                if masked:
                    seen = more.operand(instants.m[k], seen)
                recur(seen, hg)
                run(*rows)
                if projected:
                    np.dot(weights.w_hr, shown[k], h[k + 1])
                    more.hold(instants.m[k], h[k], h[k + 1])
        out[now] = instants.y[:m]
        for kept_for_gradient, array in zip(tape, (record, shown)):
            kept_for_gradient[now] = array[:m]
    if save:
        tape[0][T] = record[m]
    last = (out[-1].copy(), *[after.copy() for after in instants.others[m]])
    shelf.take_back(instants)
    return y, last, tuple(tape)


def run_backward(
    cell: Cell, x: np.ndarray, weights: Weights, state: tuple, y: np.ndarray, tape: tuple,
    dy: np.ndarray, dlast: tuple, dhistory: tuple = (), *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    (T, B, _), (H, P) = y.shape, sizes(cell, weights)
    G, order, found = cell.G, layout(cell), gradient(cell)
    separate, projected = len(order.separate), weights.w_hr is not None
    n = min(T, CHUNK_BACK, max(CHUNK_ROWS // max(B, 1), 1))
    shelf = shelf_of(InstantsBack, cell, n, B, H, P, x.dtype)
    back = shelf.lend()
    W = None if weights.w_ih is None else by_gate(weights.w_ih, order.inputs).reshape(G * H, -1)
    R = np.ascontiguousarray(by_gate(weights.w_hh, order.recurrent)).reshape(G * H, P)
    spread = product(R.T if T < LONG else np.ascontiguousarray(R.T), B)
    dunits, more = np.zeros((cell.learned, H, B), x.dtype), More(cell, weights, T, reverse)
    dh, dshown, run = dlast[0].T.copy(), back.dshown, back.run  # dh: what the later instants ask of h
    past = found.asked[0]  # the row of what they ask past the weights

    x, y, dy, *histories = in_order(reverse, x, y, dy, *dhistory)
    record, *shown = tape
    dx = np.empty((T, B, G * H if W is None else W.shape[1]), x.dtype)
    h = np.concatenate((state[0][None], y))
    seen = h if cell.operand is None else np.empty_like(h)  # by the recurrent weights

    sums: dict[str, Any] = dict.fromkeys(needs, 0)
    asks = [initial.T for initial in dlast[1:]]
    for first in reversed(range(0, T, n)):
        m = min(n, T - first)
        now = slice(first, first + m)
        back.take(h[first : first + m + 1], dy[now])
        if cell.E:
            more.fetch(first, back.m[:m])
        for k in range(m) if cell.operand is not None else ():
            seen[first + k] = more.operand(back.m[k], back.h[k]).T
        back.prepare(record[first : first + m + 1], *(array[now] for array in shown))
        for asked, ask in zip(back.asked, asks):
            asked[m] = ask
        dhs = np.empty((P, m, B) if projected else 0, x.dtype)  # of y, h's future included
        for k in reversed(range(m)):
            arriving, asked, d, past_weights, rows = back.views[k]
            for ask, of_history in zip(asked, histories):
                ask += of_history[first + k].T
            if projected:
                np.add(arriving, dh, dh)
                held = more.held(back.m[k], dh)
                dhs[:, k] = dh
                np.dot(weights.w_hr.T, dh, dshown)
            else:
                np.add(arriving, dh, dshown)
            run(*rows)
            spread(d, dh)
            if cell.E:
                dunits += back.g
                more.operand_back(back.m[k], dh, dunits)
            if projected:
                dh += held
            elif past is not None:
                np.add(dh, past_weights, dh)
        asks = [asked[0].copy() for asked in back.asked]

        ds = back.together(m)
        inputs, recurrent = ds[:G].reshape(G * H, m * B), ds[separate:].reshape(G * H, m * B)
        if "x" in needs and W is not None:
            np.dot(inputs.T, W, dx[now].reshape(m * B, dx.shape[2]))
        elif "x" in needs:
            dx[now] = in_gate_order(inputs, order.inputs).T.reshape(m, B, G * H)
        if "w_ih" in needs:
            sums["w_ih"] += np.dot(inputs, x[now].reshape(m * B, x.shape[2]))
        if "w_hh" in needs:
            sums["w_hh"] += np.dot(recurrent, seen[now].reshape(m * B, P))
        if "b_ih" in needs:
            sums["b_ih"] += inputs.sum(1)
        if "b_hh" in needs:
            sums["b_hh"] += recurrent.sum(1)
        if projected and "w_hr" in needs:
            sums["w_hr"] += np.dot(dhs.reshape(P, m * B), shown[0][now].swapaxes(1, 2).reshape(m * B, H))
    shelf.take_back(back)
    if "x" in needs:
        sums["x"] = dx[::-1].copy() if reverse else dx
    gates = {"w_ih": order.inputs, "b_ih": order.inputs, "w_hh": order.recurrent, "b_hh": order.recurrent}
    gradients = {name: in_gate_order(array, gates[name]) if name in gates else array for name, array in sums.items()}
    if "units" in needs:
        gradients["units"] = more.of_units(dunits)
    return gradients | {"state": (dh.T.copy(), *(asked.T.copy() for asked in asks))}


# ---- arrangement ----------------------------------------------------------------------------------------------------


def sizes(cell: Cell, weights: Weights) -> tuple[int, int]:
    return weights.w_hh.shape[0] // cell.G, weights.w_hh.shape[1]


def arranged(
    cell: Cell, T: float, B: int, H: int, columns: int, dtype: np.dtype, step_exact: bool = False
) -> GateLayout:
    """The order of the gates going forward: torch's where the instants don't repay a copy of so many weights a gate.

    step_exact: it may not depend on T.
    """
    repaid = (T - 4) * (B + 8) * 256
    order = torch_layout(cell) if repaid < H * columns and not step_exact else layout(cell)
    return with_exp_sigmoid(order) if dtype == np.float32 and H * B >= EXP else order


def quiet(order: GateLayout) -> AbstractContextManager:
    """A sigmoid is right where exp overflows."""
    return np.errstate(over="ignore", under="ignore") if order.sigmoid == "exp" else AS_EVER


def by_gate(w: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G*H, ...] in torch's order -> [G, H, ...] in the order of `gates`; a view if it can be."""
    stacked = w.reshape(len(gates), len(w) // len(gates), *w.shape[1:])
    return stacked if list(gates) == sorted(gates) else stacked[list(gates)]


def scaled(w: np.ndarray, gates: Sequence[int], scale: Sequence[float]) -> np.ndarray:
    """[G*H, ...] in torch's order -> the same in the order of `gates`, times their scale."""
    stacked = w.reshape(len(gates), len(w) // len(gates), *w.shape[1:])
    out = np.empty(stacked.shape, w.dtype)
    for row, g in zip(out, gates):
        np.multiply(stacked[g], scale[g], row)
    return out.reshape(w.shape)


def in_gate_order(rows: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G*H, ...] in the order of `gates` -> the same in torch's."""
    ordered = np.empty((len(gates), len(rows) // len(gates), *rows.shape[1:]), rows.dtype)
    ordered[list(gates)] = rows.reshape(ordered.shape)
    return ordered.reshape(rows.shape)


def in_order(reverse: bool, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The first instant to be computed first."""
    return tuple(array[::-1] for array in arrays) if reverse else arrays


# ---- forward --------------------------------------------------------------------------------------------------------


class Kept:
    """Arrays and views that take longer to make than a small step: a `Shelf` keeps them for the next call."""

    bytes = 0

    def rows(self, *shape: int, dtype: np.dtype) -> np.ndarray:
        self.bytes += dtype.itemsize * math.prod(shape)
        return np.zeros(shape, dtype)


class Shelf:
    """Arrays of a kind and size that nobody uses now: a call takes some and puts them back, in whichever thread."""

    def __init__(self, kind: Callable[..., Any], *size: Any):
        self.new = partial(kind, *size)
        self.idle: list[Any] = []

    def lend(self) -> Any:
        try:
            return self.idle.pop()
        except IndexError:
            return self.new()

    def take_back(self, arrays: Kept) -> None:
        if arrays.bytes <= KEPT_BYTES:
            self.idle.append(arrays)


shelf_of = lru_cache(SIZES)(Shelf)


@lru_cache(SIZES)
def shelf_forward(cell: Cell, T: int, B: int, I: int, rows: int, P: int, dtype: np.dtype, step_exact: bool) -> Shelf:
    """Of the `Instants` on which a sequence goes forward. rows: G*H. I is 0 where x is the input part already."""
    n = min(T, CHUNK, 1 + CHUNK_BYTES // max(rows * B * dtype.itemsize, 1))
    wide, H = step_exact or B >= WIDE or (B >= NARROW and rows * I <= SMALL), rows // cell.G
    return shelf_of(Instants, cell, arranged(cell, T, B, H, I + P, dtype, step_exact), n, wide, B, I, H, P, dtype)


class Instants(Kept):
    """The arrays of n instants going forward. wide: the input part is made by a product for each."""

    def __init__(
        self, cell: Cell, order: GateLayout, n: int, wide: bool, B: int, I: int, H: int, P: int, dtype: np.dtype
    ):  # fmt: skip
        G, rows = cell.G, partial(self.rows, dtype=dtype)
        self.order, self.scaled, self.wide = order, replace(order, sigmoid="tanh") != torch_layout(cell), wide
        self.zero = np.zeros(G * H, dtype)
        self.xg = rows(n, G * H, B)  # the input part of all gates
        self.h, self.hg = rows(n + 1, P, B), rows(G * H, B)
        self.m = rows(n, cell.E, H, B)
        self.b_x, self.b_h = rows(G * H, B), rows(len(order.separate), H, B)
        self.separate = [(b, slice(g * H, (g + 1) * H)) for b, g in zip(self.b_h, order.separate)]
        self.record = rows(n + 1, cell.K + cell.S - 1, H, B)  # what is saved, and the other states before
        self.others = [[state.T for state in states] for states in self.record[:, cell.K :]]  # as they come and go ...
        self.first, self.y = [self.h[0].T, *self.others[0]], self.h[1:].swapaxes(1, 2)  # ... and these do
        self.shown = self.h[1:] if P == H else rows(n, H, B)  # h before its projection
        own = self.h if P == H else np.zeros((n + 1, H, B), dtype)  # a cell with a projection can't look at its own h
        look, self.run = step_program(cell, order).bind((H, B), dtype, h=self.hg.reshape(G, H, B), b=self.b_h)
        changing = [self.xg.reshape(n, G, H, B), *([self.m] if cell.E else []), own, self.shown]
        self.views = list(zip(self.h, map(look, *changing, self.record, self.record[1:])))
        self.one = self.xg[0]

    def take(self, weights: Weights, state: tuple) -> tuple[Any, Callable[[np.ndarray, np.ndarray], Any]]:
        """-> the input weights for `project`, or None, and a function that computes the recurrent part of all gates
        from h."""
        for place, initial in zip(self.first, state):
            np.copyto(place, initial)
        w_ih, w_hh, b_ih, b_hh = weights[:4]
        bias = (self.zero if b_ih is None else b_ih) + (self.zero if b_hh is None else b_hh)
        for b, gate in self.separate:
            b[...], bias[gate] = 0 if b_hh is None else b_hh[gate, None], 0 if b_ih is None else b_ih[gate]
        if self.scaled:
            bias = scaled(bias, self.order.inputs, self.order.scale)
            w_ih = None if w_ih is None else scaled(w_ih, self.order.inputs, self.order.scale)
            w_hh = scaled(w_hh, self.order.recurrent, self.order.scale)
        np.copyto(self.b_x, bias[:, None])
        recur = product(np.ascontiguousarray(w_hh), self.hg.shape[1])
        return None if w_ih is None else np.ascontiguousarray(w_ih), recur

    def project(self, W: np.ndarray | None, x: np.ndarray) -> None:
        """The input part of all gates for the m instants x [m, B, I], or of x [m, B, G*H] where there is no W."""
        (m, B, I), xg = x.shape, self.xg[: len(x)]
        if W is None:
            H, inputs = self.b_h.shape[1], self.order.inputs
            gates, rows = x.reshape(m, B, len(inputs), H), xg.reshape(m, len(inputs), H, B)
            for row, g in enumerate(inputs):
                np.multiply(gates[:, :, g].swapaxes(1, 2), self.order.scale[g], rows[:, row])
        elif m == 1:
            xg = self.one
            product(W, B)(np.ascontiguousarray(x[0]).T, xg)
        elif self.wide:
            products(W, B)(np.ascontiguousarray(x).swapaxes(1, 2), xg)
        elif B == 1:
            np.dot(x.reshape(m, I), W.T, xg.reshape(m, len(W)))
        else:
            together = np.dot(W, x.reshape(m * B, I).T).reshape(len(W), m, B)
            np.add(together.swapaxes(0, 1), self.b_x, xg)
            return
        np.add(xg, self.b_x, xg)


def steps(cell: Cell, weights: Weights, B: int) -> tuple[np.ndarray, np.ndarray, list, Callable[[], None]]:
    """One layer that goes on instant by instant, on arrays that stay, without flags or random numbers.

    -> x [I, B] and y [P, B], the states, [., B] each and zero; and what goes from x and the states to y and the states,
    and allocates nothing
    """
    weights, _ = numpied(weights, ())
    I, (H, P), w_hr = weights.w_ih.shape[1], sizes(cell, weights), weights.w_hr
    S, cell, n = cell.S, cell.run, 1 if cell.phases is None else 2
    dtype = weights.w_ih.dtype
    instants = Instants(cell, arranged(cell, math.inf, B, H, I + P, dtype), n, True, B, I, H, P, dtype)
    phases = None if n == 1 else np.repeat(np.arange(n, dtype=np.uint8)[:, None], B, 1)  # its one flag
    more = More(cell, weights._replace(flags=phases), n, False)
    more.fetch(0, instants.m)
    W, recur = instants.take(weights, tuple(np.zeros((B, P if k == 0 else H)) for k in range(cell.S)))
    x, xg, hg, y, shown = np.zeros((1, B, I), dtype), instants.xg[:1], instants.hg, instants.h[n], instants.shown[-1]
    enter, columns, run, bias = products(W, B), x.swapaxes(1, 2), instants.run, instants.b_x
    moves = [(instants.h[0], y), *zip(*([state.T for state in instants.others[k]] for k in (0, n)))][:S]

    def step() -> None:
        enter(columns, xg)
        np.add(xg, bias, xg)
        if n > 1:
            np.copyto(instants.xg[1:], xg)
        with quiet(instants.order):
            for seen, rows in instants.views:
                recur(seen, hg)
                run(*rows)
        if w_hr is not None:
            np.dot(w_hr, shown, y)
        for before, after in moves:
            np.copyto(before, after)

    return columns[0], y, [before for before, _ in moves], step


class InstantsBack(Kept):
    """The arrays of n instants going back."""

    def __init__(self, cell: Cell, n: int, B: int, H: int, P: int, dtype: np.dtype):
        rows, found, self.projected = partial(self.rows, dtype=dtype), gradient(cell), P != H
        self.row, self.coefficients = (H, B), found.coefficients
        self.gates = gates = cell.G + len(layout(cell).separate)
        self.h, self.dy = rows(n + 1, P, B), rows(n, P, B)
        self.m = rows(n, cell.E, H, B)
        self.own = rows(n, H, B) if self.projected else self.h[:-1]  # unseen by a cell with a projection
        self.c, self.g, self.dshown = rows(n, found.rows, H, B), rows(cell.learned, H, B), rows(H, B)
        self.d, self.ds = rows(n + 1, gates + found.width, H, B), rows(gates * H * n * B)
        self.silent = [rows(n + 1, H, B) for row in found.asked[1:] if row is None]
        silent = iter(self.silent)
        self.asked = [next(silent) if row is None else self.d[:, row] for row in found.asked[1:]]
        fixed = {"q0": self.dshown} | ({"g": self.g} if cell.learned else {})
        look, self.run = found.grad.bind(self.row, dtype, **fixed)
        past = self.d if found.asked[0] is None else self.d[:, found.asked[0]]
        recurrent = self.d[:, gates - cell.G : gates].reshape(n + 1, cell.G * H, B)
        asked = list(zip(*(array[1:] for array in self.asked))) or [()] * n
        views = (look(*q, c, d) for q, c, d in zip(asked, self.c, self.d))
        self.views = list(zip(self.dy, asked, recurrent, past, views))

    def take(self, h: np.ndarray, dy: np.ndarray) -> None:
        """Of m instants: h [m+1, B, P], dy [m, B, P]."""
        self.h[: len(h)], self.dy[: len(dy)] = h.swapaxes(1, 2), dy.swapaxes(1, 2)
        for array in self.silent:
            array[...] = 0

    def prepare(self, record: np.ndarray, shown: np.ndarray | None = None) -> None:
        """All of m instants that doesn't depend on later ones, from what the tape has of them: record [m+1, ., H, B],
        shown [m, H, B] where h is projected. By so many at once that they stay in the cache."""
        (H, B), m = self.row, len(record) - 1
        shown = self.h[1:] if shown is None else shown
        some = max(1, TOGETHER // max(H * B, 1))
        for first in range(0, m, some):
            now = slice(first, min(first + some, m))
            after = slice(now.start + 1, now.stop + 1)
            given = {"n": shown[now], "s": self.own[now], "v": record[now], "r": record[after]}
            given |= {"m": self.m[now]} if self.m.shape[1] else {}
            self.coefficients.execute_batched(self.row, self.c.dtype, **given, c=self.c[now])

    def together(self, m: int) -> np.ndarray:
        """The gradients of all gates, [G+n, H, m, B]."""
        H, B = self.row
        ds = self.ds[: self.gates * H * m * B].reshape(self.gates, H, m, B)
        np.copyto(ds, self.d[:m, : self.gates].transpose(1, 2, 0, 3))
        return ds


class More:
    """What a cell's page takes beside gates and states, as rows of m [E, H, B]; does nothing for a cell without."""

    def __init__(self, cell: Cell, weights: Weights, T: int, reverse: bool):
        self.cell, self.extra = cell, Extra.of(weights)
        self.units = weights.units.swapaxes(1, 2) if cell.units else None
        self.at = range(T)[::-1] if reverse else range(T)

    def fetch(self, first: int, m: np.ndarray) -> None:
        """What belongs to the instants from `first` on, m [n, E, H, B]: of many at once, as far as the cache goes."""
        cell, (n, _, H, B), row = self.cell, m.shape, len(self.cell.units)
        if cell.units:
            m[:, :row] = self.units
        some = max(1, TOGETHER // max(H * B, 1))
        for start in range(0, n, some) if cell.flags or cell.uniforms else ():
            now = m[start : start + some]
            t = np.array(self.at[first + start : first + start + len(now)])
            for j in range(len(cell.flags)):
                now[:, row + j] = (self.extra.flags[t] >> j & 1)[:, None]
            if cell.uniforms:
                drawn = uniforms(self.extra.seed, t[:, None, None], np.arange(B), np.arange(H)[:, None], cell.uniforms)
                for j, uniform in enumerate(drawn, row + len(cell.flags)):
                    now[:, j] = uniform

    def operand(self, m: np.ndarray, h: np.ndarray) -> np.ndarray:
        """h [P, B] -> what the recurrent weights see of it."""
        ((seen,),) = operand_graph(self.cell).run(OPERATIONS, h=[h], extra=list(m[:, : len(h)]))
        return seen

    def operand_back(self, m: np.ndarray, dh: np.ndarray, dunits: np.ndarray) -> None:
        """The gradient of that, in place; those of values per unit are added to dunits."""
        if self.cell.operand is not None:
            P = len(dh)
            (found,), parts = operand_grad_graph(self.cell).run(OPERATIONS, dnew=[dh], extra=list(m[:, :P]))
            for total, part in zip(dunits, parts):
                total[:P] += part
            dh[...] = found

    def hold(self, m: np.ndarray, before: np.ndarray, h: np.ndarray) -> None:
        """Where the page holds its states, a projected h stays what it was before."""
        if HOLD in self.cell.flags:
            np.copyto(h, before, where=m[self.holding, : len(h)] > 0)

    def held(self, m: np.ndarray, dh: np.ndarray) -> Any:
        """The gradient of that: what goes to the h before, taken from dh."""
        if HOLD not in self.cell.flags:
            return 0
        held = np.where(m[self.holding, : len(dh)] > 0, dh, 0)
        dh -= held
        return held

    @property
    def holding(self) -> int:
        return len(self.cell.units) + self.cell.flags.index(HOLD)

    def of_units(self, dunits: np.ndarray) -> np.ndarray:
        """[learned, H, B] -> [N, R, H]."""
        N, R, H = self.extra.units.shape
        found = np.zeros((N, R, H), dunits.dtype)
        found[: len(dunits)] = dunits.sum(2)[:, None] if R == 1 else dunits.swapaxes(1, 2)
        return found


# ---- products -------------------------------------------------------------------------------------------------------


def product(M: np.ndarray, B: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    """M [N, K] -> a function of z [K, B] and out [N, B] that computes M z into out, by blocks of rows."""
    return M.dot if blocks(*M.shape, B) == 1 else products(M, B)


def products(M: np.ndarray, B: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    """The same for z [..., K, B] and out [..., N, B], of many instants at once."""
    N, K = M.shape
    count = blocks(N, K, B)
    if count == 1:
        return partial(np.matmul, M)
    pieces = M.reshape(count, N // count, K)
    cut = count, N // count, B
    return lambda z, out: np.matmul(pieces, z[..., None, :, :], out.reshape(*out.shape[:-2], *cut))


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
