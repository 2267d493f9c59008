"""NumPy: the fallback. float64 and float32; half precision of torch is computed in float32.

A cell's operations come as a `Program` of calls on preallocated rows; here are the matmuls and the time loop. Inside, a
time step is feature-major, [H, B] for each gate and state: so the weights are multiplied without a transpose, and the
gates are contiguous blocks of the result. Inputs and outputs are transposed, and reversed if `reverse`, by chunks of
time steps.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from gpu_rnn.kernels.autodiff import OPERATIONS
from gpu_rnn.kernels.cells import Cell, recurrent_input_grad_graph, recurrent_input_graph
from gpu_rnn.kernels.codegen.numpy import GateLayout, gradient, layout, step_program, torch_layout, with_exp_sigmoid
from gpu_rnn.kernels.codegen.schedule import Program
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.philox import uniforms

from ..core.arrays import HALF_DTYPES
from ..core.arrays import dtype as dtype_of
from ..core.cell_inputs import AuxInputs
from ..core.problem import Grads, Memory, Problem, Result, Run, Weights
from .protocol import Needs, backward_in_turn, forward_in_turn
from .protocol import never_fuses_layers as fuses_layers  # noqa: F401

NAME = "numpy"
RUNS_HEADS = REPEATS_INPUTS = False
POOLS, MAX_POOLED_BYTES = 16, 1 << 23  # problems whose workspaces are pooled for the next call; bytes of each of these
CHUNK, CHUNK_BYTES = 32, 1 << 22  # time steps forward whose views are made once, for all chunks; their input projection
CHUNK_BACKWARD, CHUNK_ROWS = 64, 512  # the same backward; and times batch size, rows of a matmul at full speed
MIN_STEPS_FOR_TRANSPOSED_R = 128  # time steps that repay a transposed copy of the recurrent weights
# Batch sizes from which an input matmul per time step pays: with any weights, with so few
MIN_BATCH_FOR_STEP_GEMM, MIN_BATCH_FOR_SMALL_STEP_GEMM, SMALL_WEIGHTS = 32, 8, 1 << 16
MIN_ROW_FOR_EXP_SIGMOID = 1 << 10  # values that repay more calls for sigmoids by exp; float64 has no fast exp
BACKWARD_BLOCK = 1 << 13  # values of a row backward that are computed at once
MAX_UNBLOCKED_FLOPS = 10**6  # multiply-adds up to which OpenBLAS, given AVX-512, reads its operands in place: 2x faster
MIN_GEMM_ROWS = 16  # of the blocks that a matmul is split into: of smaller ones it takes too many
NO_CONTEXT = nullcontext()


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
    order = choose_layout(problem.cell, problem.T, problem.B, problem.H, columns, np.dtype(width), problem.step_exact)
    calls = len(step_program(problem.cell, order).calls)
    chunks = "one GEMM per time step" if problem.step_exact else "one GEMM per chunk of time steps"
    projection = problem.projection or f"input projection: {chunks}"
    ways = "forward and backward" if problem.training else "forward"
    return f"{projection}\n{ways}: {width}, one recurrent matmul and {calls} elementwise NumPy calls per time step"


def method(problem: Problem, backward: bool) -> str:
    return NAME


def memory(problem: Problem) -> Memory:
    """With the workspace that is pooled for the next call, as if there were none yet."""
    cell, T, B, H, r = problem.cell, problem.T, problem.B, problem.H, problem.real_itemsize
    P, G, half = problem.P or H, cell.G, problem.itemsize == 2
    inputs, columns, dtype = (problem.I or 0), problem.I or G * H, np.dtype("float64" if r == 8 else "float32")
    y, x, save = problem.output_elements * r, problem.input_elements * r, problem.saves
    history = T * (cell.S - 1) * B * H * problem.itemsize if problem.history else 0
    copies = x + (problem.weight_elements + problem.state_elements) * r if half else 0  # in float32
    stored = y // 2 if half else 0

    pool = forward_pool(cell, T, B, inputs, H, P, dtype, problem.step_exact)
    workspace = pool.acquire()
    n = len(workspace.views)
    entering = n * B * G * H if inputs and not workspace.step_gemm and n > 1 and B > 1 else 0  # the GEMM of a chunk
    entering += n * B * columns if problem.reverse and n > 1 else 0
    weights = G * H * (inputs + P) if workspace.scaled else 0
    pool.release(workspace)
    record = ((T + 1) * (cell.K + cell.S - 1) + (T if problem.P else 0)) * H * B * r if save else 0
    program = step_program(cell, choose_layout(cell, T, B, H, inputs + P, dtype, problem.step_exact))
    forward = workspace.bytes + (temporaries(program, H, B) + entering + weights) * r
    forward += y + record + problem.state_elements * r + history + copies + stored
    if not problem.training:
        return Memory(0, forward, 0)

    n = backward_chunk(T, B)
    order, program_back, pool = layout(cell), gradient(cell), pool_for(BackwardWorkspace, cell, n, B, H, P, dtype)
    back = pool.acquire()
    pool.release(back)
    turned = [list(gates) != sorted(gates) for gates in (order.inputs, order.recurrent)]  # what is no view then
    turned_rows = G * H * (inputs * turned[0] + P * (turned[1] + (T >= MIN_STEPS_FOR_TRANSPOSED_R)))
    base = back.bytes + x + (temporaries(program_back.grad, H, B) + turned_rows + cell.num_trainable * H * B) * r
    base += (T + 1) * B * P * r * (1 if cell.recurrent_input is None else 2) + (n * B * P * r if problem.P else 0)
    base += 2 * problem.state_elements * r + copies + (y if half else 0)
    blocks = max(1, BACKWARD_BLOCK // max(H * B, 1)) * temporaries(program_back.coefficients, H, B)
    in_order = G * H * (inputs + P + 2) + (problem.input_elements if problem.reverse else 0)
    turning = 0 if inputs else n * B * G * H  # a chunk of x's gradient, which is that of its input projection
    transient = max(blocks, G * H * max(inputs, P) if n < T else 0, in_order, turning) * r
    return Memory(y - stored + record, forward, base + problem.weight_elements * r + transient)


def temporaries(program: Program, H: int, B: int) -> int:
    """Elements of what a bound program has for itself."""
    return (program.rows * H + program.shared) * B


def forward(problem: Problem, runs: Sequence[Run]) -> list[Result]:
    if len(runs) > 1:
        return forward_in_turn(forward, problem, runs)
    (run,) = runs
    x, weights, state, reverse = run
    if isinstance(x, np.ndarray):
        return [run_forward(problem, run)]
    result = run_forward(problem, Run(to_numpy(x), *to_numpy_weights(weights, state), reverse))
    last = [from_numpy(array.reshape(initial.shape), like=x) for array, initial in zip(result.last, state)]
    history = [from_numpy(array, like=x) for array in result.history]
    saved = [from_numpy(array, like=x, keep_dtype=True) for array in result.saved]
    return [Result(from_numpy(result.y, like=x), tuple(last), tuple(history), tuple(saved))]


def backward(
    problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads], needs: Sequence[Needs]
) -> list[dict[str, Any]]:
    if len(runs) > 1:
        return backward_in_turn(backward, problem, runs, saved, grads, needs)
    ((x, weights, state, reverse),), (grad,), (names,) = runs, grads, needs
    numpy_grads = Grads(to_numpy(grad.y), tuple(map(as_matrix, grad.last)), tuple(map(to_numpy, grad.history)))
    run = Run(to_numpy(x), *to_numpy_weights(weights, state), reverse)
    gradients = run_backward(problem, run, tuple(map(to_numpy, saved[0])), numpy_grads, names)
    pairs = zip(gradients.pop("state"), state, strict=True)
    dstate = tuple([from_numpy(array.reshape(initial.shape), like=x) for array, initial in pairs])
    return [{name: from_numpy(array, like=x) for name, array in gradients.items()} | {"state": dstate}]


def gemm_operands(x: Any, weights: Weights) -> tuple[Any, Weights]:
    """NumPy's, whichever library the arrays are of: so its results don't depend on that."""
    return to_numpy(x), to_numpy_weights(weights, ())[0]


def saved_shapes(problem: Problem) -> list[tuple[tuple, str]]:
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    shapes: list[tuple] = [(T + 1, cell.K + cell.S - 1, H, B)]
    real = "float64" if problem.dtype == "float64" else "float32"
    return [(shape, real) for shape in (shapes if problem.P is None else [*shapes, (T, H, B)])]


def warmup(problem: Problem) -> tuple[str, ...]:
    return ()  # there is nothing to compile


def to_numpy(array: Any) -> np.ndarray:
    """A CPU array as NumPy's, without a copy where its dtype allows; half precision becomes float32."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach()
    return (array.float() if array.dtype.itemsize == 2 else array).numpy()


def from_numpy(array: np.ndarray, like: Any, keep_dtype: bool = False) -> Any:
    """A NumPy array as one of the library of `like`, and of its dtype unless `keep_dtype`."""
    if isinstance(like, np.ndarray):
        return array
    tensor = sys.modules["torch"].from_numpy(array)
    return tensor if keep_dtype or tensor.dtype == like.dtype else tensor.to(like.dtype)


def to_numpy_weights(weights: Weights, state: Sequence[Any]) -> tuple[Weights, list]:
    borrow = borrow_numpy if is_distributed() else to_numpy
    return Weights(*[None if w is None else borrow(w) for w in weights]), [as_matrix(array) for array in state]


def as_matrix(state: Any) -> np.ndarray:
    """[B, .] or [1, B, .] -> [B, .]"""
    array = to_numpy(state)
    return array if array.ndim == 2 else array.reshape(array.shape[1:])


def is_distributed() -> bool:
    """Whether weights may be FSDP's, which frees their memory between uses; torch's `numpy()` forbids that for good."""
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_available() and torch.is_initialized()


def borrow_numpy(weight: Any) -> np.ndarray:
    """As `to_numpy`, and the memory of the weight can still be freed."""
    return to_numpy(weight) if dtype_of(weight) in HALF_DTYPES else np.from_dlpack(weight.detach())


def run_forward(problem: Problem, run: Run) -> Result:
    """Saved is `ForwardWorkspace.record` of all time steps, in the order of computation; with a projection also h
    before it, [T, H, B]."""
    x, weights, state, reverse = run
    cell, T, B, P, step_exact, save = problem.cell, problem.T, problem.B, problem.P, problem.step_exact, problem.saves
    pool = forward_pool(cell, T, B, problem.I or 0, problem.H, P or problem.H, x.dtype, step_exact)
    workspace = pool.acquire()
    W, recur = workspace.load(weights, state)
    h, Rh, record, unprojected = workspace.h, workspace.Rh, workspace.record, workspace.unprojected
    n, K, dropped = len(workspace.views), cell.K, cell.recurrent_input is not None
    aux: Any = Aux(cell, weights, T, reverse) if P is not None or workspace.aux.shape[1] else None

    y = np.empty((T, B, P or problem.H), x.dtype)
    saved = [np.empty((T + 1, *record.shape[1:]), x.dtype)] if save else []
    if save and P is not None:
        saved.append(np.empty((T, *unprojected.shape[1:]), x.dtype))
    x, out = flip_if(reverse, x, y)
    for first in range(0, T, n):
        if first:
            h[0], record[0, K:] = h[n], record[n, K:]
        m = min(n, T - first)
        chunk = slice(first, first + m)
        workspace.project(W, x[chunk])
        if aux:
            aux.load(first, workspace.aux[:m])
        with ignore_fp_overflow(workspace.layout):
            for k, (h_in, views) in enumerate(workspace.views[:m]):
                if dropped:
                    h_in = aux.recurrent_input(workspace.aux[k], h_in)
                recur(h_in, Rh)
                workspace.run(*views)
                if P is not None:
                    np.dot(weights.w_hr, unprojected[k], h[k + 1])
                    aux.apply_mask(workspace.aux[k], h[k], h[k + 1])
        out[chunk] = workspace.y[:m]
        for target, source in zip(saved, (record, unprojected)):
            target[chunk] = source[:m]
    if save:
        saved[0][T] = record[m]
    last = (out[-1].copy(), *[after.copy() for after in workspace.cell_states[m]])
    pool.release(workspace)
    history: tuple = ()
    if problem.history:
        (after,) = flip_if(reverse, saved[0][1:])
        history = tuple([after[:, K + k].swapaxes(1, 2).copy() for k in range(cell.S - 1)])
    return Result(y, last, history, tuple(saved) if problem.training else ())


def run_backward(problem: Problem, run: Run, saved: tuple, grads: Grads, needs: Needs) -> dict[str, Any]:
    x, weights, state, reverse = run
    y, record, *unprojected = saved
    cell, (T, B, P), H = problem.cell, y.shape, problem.H
    G, order, program = cell.G, layout(cell), gradient(cell)
    separate, projected = len(order.separate), weights.w_hr is not None
    n = backward_chunk(T, B)
    pool = pool_for(BackwardWorkspace, cell, n, B, H, P, x.dtype)
    workspace = pool.acquire()
    W = None if weights.w_ih is None else by_gate(weights.w_ih, order.inputs).reshape(G * H, -1)
    R = np.ascontiguousarray(by_gate(weights.w_hh, order.recurrent)).reshape(G * H, P)
    times_R = matmul_fn(R.T if T < MIN_STEPS_FOR_TRANSPOSED_R else np.ascontiguousarray(R.T), B)
    dunits, aux = np.zeros((cell.num_trainable, H, B), x.dtype), Aux(cell, weights, T, reverse)
    dh, dh_unprojected, run_step = grads.last[0].T.copy(), workspace.dh_unprojected, workspace.run  # dh: of later steps
    direct_row = program.state_grad_rows[0]  # of the gradient of h past the weights, if there is one

    x, y, dy, *dhistory = flip_if(reverse, x, y, grads.y, *grads.history)
    dx = np.empty((T, B, G * H if W is None else W.shape[1]), x.dtype)
    h = np.concatenate((state[0][None], y))
    h_in = h if cell.recurrent_input is None else np.empty_like(h)  # the inputs of the recurrent matmuls

    sums: dict[str, Any] = dict.fromkeys(needs, 0)
    dlast = [d_last.T for d_last in grads.last[1:]]
    for first in reversed(range(0, T, n)):
        m = min(n, T - first)
        chunk = slice(first, first + m)
        workspace.load(h[first : first + m + 1], dy[chunk])
        if cell.E:
            aux.load(first, workspace.aux[:m])
        for k in range(m) if cell.recurrent_input is not None else ():
            h_in[first + k] = aux.recurrent_input(workspace.aux[k], workspace.h[k]).T
        workspace.compute_coefficients(record[first : first + m + 1], *(array[chunk] for array in unprojected))
        for states, d_last in zip(workspace.state_grads, dlast):
            states[m] = d_last
        dhs = np.empty((P, m, B) if projected else 0, x.dtype)  # of y, with what comes from later time steps
        for k in reversed(range(m)):
            dy_k, state_grads, d, direct_grad, views = workspace.views[k]
            for d_state, of_history in zip(state_grads, dhistory):
                d_state += of_history[first + k].T
            if projected:
                np.add(dy_k, dh, dh)
                passthrough = aux.split_masked_grad(workspace.aux[k], dh)
                dhs[:, k] = dh
                np.dot(weights.w_hr.T, dh, dh_unprojected)
            else:
                np.add(dy_k, dh, dh_unprojected)
            run_step(*views)
            times_R(d, dh)
            if cell.E:
                dunits += workspace.dunits
                aux.recurrent_input_grad(workspace.aux[k], dh, dunits)
            if projected:
                dh += passthrough
            elif direct_row is not None:
                np.add(dh, direct_grad, dh)
        dlast = [states[0].copy() for states in workspace.state_grads]

        ds = workspace.gather_gate_grads(m)
        inputs, recurrent = ds[:G].reshape(G * H, m * B), ds[separate:].reshape(G * H, m * B)
        if "x" in needs and W is not None:
            np.dot(inputs.T, W, dx[chunk].reshape(m * B, dx.shape[2]))
        elif "x" in needs:
            dx[chunk] = in_torch_order(inputs, order.inputs).T.reshape(m, B, G * H)
        if "w_ih" in needs:
            sums["w_ih"] += np.dot(inputs, x[chunk].reshape(m * B, x.shape[2]))
        if "w_hh" in needs:
            sums["w_hh"] += np.dot(recurrent, h_in[chunk].reshape(m * B, P))
        if "b_ih" in needs:
            sums["b_ih"] += inputs.sum(1)
        if "b_hh" in needs:
            sums["b_hh"] += recurrent.sum(1)
        if projected and "w_hr" in needs:
            sums["w_hr"] += np.dot(dhs.reshape(P, m * B), unprojected[0][chunk].swapaxes(1, 2).reshape(m * B, H))
    pool.release(workspace)
    if "x" in needs:
        sums["x"] = dx[::-1].copy() if reverse else dx
    gates = {"w_ih": order.inputs, "b_ih": order.inputs, "w_hh": order.recurrent, "b_hh": order.recurrent}
    gradients = {name: in_torch_order(array, gates[name]) if name in gates else array for name, array in sums.items()}
    if "units" in needs:
        gradients["units"] = aux.per_unit_grad(dunits)
    return gradients | {"state": (dh.T.copy(), *(d_last.T.copy() for d_last in dlast))}


# ---- Layout --------------------------------------------------------------------------------------------------------


def backward_chunk(T: int, B: int) -> int:
    return min(T, CHUNK_BACKWARD, max(CHUNK_ROWS // max(B, 1), 1))


def choose_layout(
    cell: Cell, T: float, B: int, H: int, columns: int, dtype: np.dtype, step_exact: bool = False
) -> GateLayout:
    """The order of the gates forward: torch's where the time steps don't repay a copy of so many weights per gate.

    step_exact: it may not depend on T.
    """
    repaid = (T - 4) * (B + 8) * 256
    order = torch_layout(cell) if repaid < H * columns and not step_exact else layout(cell)
    return with_exp_sigmoid(order) if dtype == np.float32 and H * B >= MIN_ROW_FOR_EXP_SIGMOID else order


def ignore_fp_overflow(order: GateLayout) -> AbstractContextManager:
    """By exp a sigmoid is right where that overflows."""
    return np.errstate(over="ignore", under="ignore") if order.sigmoid == "exp" else NO_CONTEXT


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


def in_torch_order(rows: np.ndarray, gates: Sequence[int]) -> np.ndarray:
    """[G*H, ...] in the order of `gates` -> the same in torch's."""
    ordered = np.empty((len(gates), len(rows) // len(gates), *rows.shape[1:]), rows.dtype)
    ordered[list(gates)] = rows.reshape(ordered.shape)
    return ordered.reshape(rows.shape)


def flip_if(reverse: bool, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays by time step in the order of computation."""
    return tuple(array[::-1] for array in arrays) if reverse else arrays


# ---- forward --------------------------------------------------------------------------------------------------------


class Workspace:
    """Arrays and views that take longer to make than a small time step: a `WorkspacePool` keeps them for later."""

    bytes = 0

    def rows(self, *shape: int, dtype: np.dtype) -> np.ndarray:
        self.bytes += dtype.itemsize * math.prod(shape)
        return np.zeros(shape, dtype)


class WorkspacePool:
    """Workspaces of a kind and size that are free: a call acquires one and releases it, in any thread."""

    def __init__(self, kind: Callable[..., Any], *size: Any):
        self.new = partial(kind, *size)
        self.free: list[Any] = []

    def acquire(self) -> Any:
        try:
            return self.free.pop()
        except IndexError:
            return self.new()

    def release(self, workspace: Workspace) -> None:
        if workspace.bytes <= MAX_POOLED_BYTES:
            self.free.append(workspace)


pool_for = lru_cache(POOLS)(WorkspacePool)


@lru_cache(POOLS)
def forward_pool(
    cell: Cell, T: int, B: int, I: int, H: int, P: int, dtype: np.dtype, step_exact: bool
) -> WorkspacePool:
    """The pool of `ForwardWorkspace`s for a sequence. I is 0 where x is the input projection."""
    rows = cell.G * H
    n = min(T, CHUNK, 1 + CHUNK_BYTES // max(rows * B * dtype.itemsize, 1))
    small = B >= MIN_BATCH_FOR_SMALL_STEP_GEMM and rows * I <= SMALL_WEIGHTS
    step_gemm = step_exact or B >= MIN_BATCH_FOR_STEP_GEMM or small
    order = choose_layout(cell, T, B, H, I + P, dtype, step_exact)
    return pool_for(ForwardWorkspace, cell, order, n, step_gemm, B, I, H, P, dtype)


class ForwardWorkspace(Workspace):
    """The arrays of n time steps forward. step_gemm: the input projection is one matmul per time step."""

    def __init__(
        self, cell: Cell, order: GateLayout, n: int, step_gemm: bool, B: int, I: int, H: int, P: int, dtype: np.dtype
    ):  # fmt: skip
        G, rows = cell.G, partial(self.rows, dtype=dtype)
        self.layout, self.scaled = order, replace(order, sigmoid="tanh") != torch_layout(cell)
        self.step_gemm, self.zero = step_gemm, np.zeros(G * H, dtype)
        self.Wx = rows(n, G * H, B)  # the input projection of all gates
        self.h, self.Rh = rows(n + 1, P, B), rows(G * H, B)
        self.aux = rows(n, cell.E, H, B)
        self.b_x, self.b_h = rows(G * H, B), rows(len(order.separate), H, B)
        self.separate = [(b, slice(g * H, (g + 1) * H)) for b, g in zip(self.b_h, order.separate)]
        self.record = rows(n + 1, cell.K + cell.S - 1, H, B)  # saved activations, and the cell states before
        self.cell_states = [[state.T for state in states] for states in self.record[:, cell.K :]]  # batch first, as is
        self.first, self.y = [self.h[0].T, *self.cell_states[0]], self.h[1:].swapaxes(1, 2)
        self.unprojected = self.h[1:] if P == H else rows(n, H, B)  # h before its projection
        own = self.h if P == H else np.zeros((n + 1, H, B), dtype)  # a cell with a projection can't take its own h
        view, self.run = step_program(cell, order).bind((H, B), dtype, h=self.Rh.reshape(G, H, B), b=self.b_h)
        per_step = [self.Wx.reshape(n, G, H, B), *([self.aux] if cell.E else []), own, self.unprojected]
        self.views = list(zip(self.h, map(view, *per_step, self.record, self.record[1:])))
        self.Wx_0 = self.Wx[0]

    def load(self, weights: Weights, state: Sequence[Any]) -> tuple[Any, Callable[[np.ndarray, np.ndarray], Any]]:
        """-> the input weights for `project`, or None, and a function from h to the recurrent projection."""
        for place, initial in zip(self.first, state):
            np.copyto(place, initial)
        w_ih, w_hh, b_ih, b_hh = weights[:4]
        bias = (self.zero if b_ih is None else b_ih) + (self.zero if b_hh is None else b_hh)
        for b, gate in self.separate:
            b[...], bias[gate] = 0 if b_hh is None else b_hh[gate, None], 0 if b_ih is None else b_ih[gate]
        if self.scaled:
            bias = scaled(bias, self.layout.inputs, self.layout.scale)
            w_ih = None if w_ih is None else scaled(w_ih, self.layout.inputs, self.layout.scale)
            w_hh = scaled(w_hh, self.layout.recurrent, self.layout.scale)
        np.copyto(self.b_x, bias[:, None])
        recur = matmul_fn(np.ascontiguousarray(w_hh), self.Rh.shape[1])
        return None if w_ih is None else np.ascontiguousarray(w_ih), recur

    def project(self, W: np.ndarray | None, x: np.ndarray) -> None:
        """Compute the input projection of m time steps x [m, B, I], or take it from x [m, B, G*H] where W is None."""
        (m, B, I), Wx = x.shape, self.Wx[: len(x)]
        if W is None:
            H, inputs = self.b_h.shape[1], self.layout.inputs
            gates, rows = x.reshape(m, B, len(inputs), H), Wx.reshape(m, len(inputs), H, B)
            for row, g in enumerate(inputs):
                np.multiply(gates[:, :, g].swapaxes(1, 2), self.layout.scale[g], rows[:, row])
        elif m == 1:
            Wx = self.Wx_0
            matmul_fn(W, B)(np.ascontiguousarray(x[0]).T, Wx)
        elif self.step_gemm:
            batched_matmul_fn(W, B)(np.ascontiguousarray(x).swapaxes(1, 2), Wx)
        elif B == 1:
            np.dot(x.reshape(m, I), W.T, Wx.reshape(m, len(W)))
        else:
            gates_first = np.dot(W, x.reshape(m * B, I).T).reshape(len(W), m, B)
            np.add(gates_first.swapaxes(0, 1), self.b_x, Wx)
            return
        np.add(Wx, self.b_x, Wx)


def make_step(problem: Problem, weights: Weights) -> tuple[np.ndarray, np.ndarray, list, Callable[[], None]]:
    """Make one layer that advances by one time step per call on fixed arrays, without flags or random numbers.

    -> x [I, B] and y [P, B], the states, [., B] each and zero; and a function that goes from x and the states to y and
    the states, and allocates nothing
    """
    weights, _ = to_numpy_weights(weights, ())
    B, H, P, w_hr = problem.B, problem.H, problem.P or problem.H, weights.w_hr
    I = weights.w_ih.shape[1]
    S, cell, n = problem.cell.S, problem.cell.kernel_cell, 1 if problem.cell.lowered is None else 2
    dtype = weights.w_ih.dtype
    order = choose_layout(cell, math.inf, B, H, I + P, dtype)
    workspace = ForwardWorkspace(cell, order, n, True, B, I, H, P, dtype)
    passes = None if n == 1 else np.repeat(np.arange(n, dtype=np.uint8)[:, None], B, 1)  # its one flag
    aux = Aux(cell, weights._replace(flags=passes), n, False)
    aux.load(0, workspace.aux)
    W, recur = workspace.load(weights, tuple(np.zeros((B, P if k == 0 else H)) for k in range(cell.S)))
    x, Wx, Rh, y = np.zeros((1, B, I), dtype), workspace.Wx[:1], workspace.Rh, workspace.h[n]
    project, columns, run, bias = batched_matmul_fn(W, B), x.swapaxes(1, 2), workspace.run, workspace.b_x
    states = [[state.T for state in workspace.cell_states[k]] for k in (0, n)]
    moves = [(workspace.h[0], y), *zip(*states)][:S]

    def step() -> None:
        project(columns, Wx)
        np.add(Wx, bias, Wx)
        if n > 1:
            np.copyto(workspace.Wx[1:], Wx)
        with ignore_fp_overflow(workspace.layout):
            for h_in, views in workspace.views:
                recur(h_in, Rh)
                run(*views)
        if w_hr is not None:
            np.dot(w_hr, workspace.unprojected[-1], y)
        for before, after in moves:
            np.copyto(before, after)

    return columns[0], y, [before for before, _ in moves], step


class BackwardWorkspace(Workspace):
    """The arrays of n time steps backward."""

    def __init__(self, cell: Cell, n: int, B: int, H: int, P: int, dtype: np.dtype):
        rows, program, self.projected = partial(self.rows, dtype=dtype), gradient(cell), P != H
        self.row, self.coefficients = (H, B), program.coefficients
        self.gates = gates = cell.G + len(layout(cell).separate)
        self.h, self.dy = rows(n + 1, P, B), rows(n, P, B)
        self.aux = rows(n, cell.E, H, B)
        self.own = rows(n, H, B) if self.projected else self.h[:-1]  # a cell with a projection doesn't take its own h
        self.c, self.dunits = rows(n, program.rows, H, B), rows(cell.num_trainable, H, B)
        self.dh_unprojected = rows(H, B)
        self.d, self.ds = rows(n + 1, gates + program.width, H, B), rows(gates * H * n * B)
        self.zero_state_grads = [rows(n + 1, H, B) for row in program.state_grad_rows[1:] if row is None]
        zeros = iter(self.zero_state_grads)
        self.state_grads = [next(zeros) if row is None else self.d[:, row] for row in program.state_grad_rows[1:]]
        fixed = {"q0": self.dh_unprojected} | ({"g": self.dunits} if cell.num_trainable else {})
        view, self.run = program.grad.bind(self.row, dtype, **fixed)
        direct = self.d if program.state_grad_rows[0] is None else self.d[:, program.state_grad_rows[0]]
        recurrent = self.d[:, gates - cell.G : gates].reshape(n + 1, cell.G * H, B)
        state_grads = list(zip(*(array[1:] for array in self.state_grads))) or [()] * n
        views = (view(*q, c, d) for q, c, d in zip(state_grads, self.c, self.d))
        self.views = list(zip(self.dy, state_grads, recurrent, direct, views))

    def load(self, h: np.ndarray, dy: np.ndarray) -> None:
        """Take m time steps: h [m+1, B, P], dy [m, B, P]."""
        self.h[: len(h)], self.dy[: len(dy)] = h.swapaxes(1, 2), dy.swapaxes(1, 2)
        for array in self.zero_state_grads:
            array[...] = 0

    def compute_coefficients(self, record: np.ndarray, unprojected: np.ndarray | None = None) -> None:
        """Compute all of m time steps that doesn't depend on later ones, from what was saved of them: record
        [m+1, ., H, B], unprojected [m, H, B] where h is projected. By blocks that stay in the cache."""
        (H, B), m = self.row, len(record) - 1
        unprojected = self.h[1:] if unprojected is None else unprojected
        block = max(1, BACKWARD_BLOCK // max(H * B, 1))
        for first in range(0, m, block):
            now = slice(first, min(first + block, m))
            after = slice(now.start + 1, now.stop + 1)
            inputs = {"n": unprojected[now], "s": self.own[now], "v": record[now], "r": record[after]}
            inputs |= {"m": self.aux[now]} if self.aux.shape[1] else {}
            self.coefficients.execute_batched(self.row, self.c.dtype, **inputs, c=self.c[now])

    def gather_gate_grads(self, m: int) -> np.ndarray:
        """The gradients of all gates, [G+n, H, m, B]."""
        H, B = self.row
        ds = self.ds[: self.gates * H * m * B].reshape(self.gates, H, m, B)
        np.copyto(ds, self.d[:m, : self.gates].transpose(1, 2, 0, 3))
        return ds


class Aux:
    """The auxiliary inputs of a cell as rows, m [E, H, B] for a time step; does nothing for a cell without."""

    def __init__(self, cell: Cell, weights: Weights, T: int, reverse: bool):
        self.cell, self.inputs = cell, AuxInputs.of(weights)
        self.units = weights.units.swapaxes(1, 2) if cell.per_unit_params else None
        self.at = range(T)[::-1] if reverse else range(T)

    def load(self, first: int, m: np.ndarray) -> None:
        """Load the time steps from `first` on into m [n, E, H, B], by blocks that stay in the cache."""
        cell, (n, _, H, B), row = self.cell, m.shape, len(self.cell.per_unit_params)
        if cell.per_unit_params:
            m[:, :row] = self.units
        block = max(1, BACKWARD_BLOCK // max(H * B, 1))
        for start in range(0, n, block) if cell.flags or cell.uniforms else ():
            now = m[start : start + block]
            t = np.array(self.at[first + start : first + start + len(now)])
            for j in range(len(cell.flags)):
                now[:, row + j] = (self.inputs.flags[t] >> j & 1)[:, None]
            if cell.uniforms:
                row_of, unit = np.arange(B), np.arange(H)[:, None]
                random = uniforms(self.inputs.seed, t[:, None, None], row_of, unit, cell.uniforms)
                for j, uniform in enumerate(random, row + len(cell.flags)):
                    now[:, j] = uniform

    def recurrent_input(self, m: np.ndarray, h: np.ndarray) -> np.ndarray:
        """h [P, B] -> the input of the recurrent matmul."""
        ((h_in,),) = recurrent_input_graph(self.cell).run(OPERATIONS, h=[h], extra=list(m[:, : len(h)]))
        return h_in

    def recurrent_input_grad(self, m: np.ndarray, dh: np.ndarray, dunits: np.ndarray) -> None:
        """Pull dh back through `recurrent_input`, in place; add the gradients of per-unit parameters to dunits."""
        if self.cell.recurrent_input is not None:
            P = len(dh)
            (dh_in,), parts = recurrent_input_grad_graph(self.cell).run(OPERATIONS, dnew=[dh], extra=list(m[:, :P]))
            for total, part in zip(dunits, parts):
                total[:P] += part
            dh[...] = dh_in

    def apply_mask(self, m: np.ndarray, before: np.ndarray, h: np.ndarray) -> None:
        """Keep the projected h of the time step before where the mask holds the states."""
        if HOLD in self.cell.flags:
            np.copyto(h, before, where=m[self.mask_index, : len(h)] > 0)

    def split_masked_grad(self, m: np.ndarray, dh: np.ndarray) -> Any:
        """Take the gradient that `apply_mask` passes to the h before out of dh, and return it."""
        if HOLD not in self.cell.flags:
            return 0
        passthrough = np.where(m[self.mask_index, : len(dh)] > 0, dh, 0)
        dh -= passthrough
        return passthrough

    @property
    def mask_index(self) -> int:
        return len(self.cell.per_unit_params) + self.cell.flags.index(HOLD)

    def per_unit_grad(self, dunits: np.ndarray) -> np.ndarray:
        """[trainable, H, B] -> [N, R, H]."""
        N, R, H = self.inputs.units.shape
        per_unit = np.zeros((N, R, H), dunits.dtype)
        per_unit[: len(dunits)] = dunits.sum(2)[:, None] if R == 1 else dunits.swapaxes(1, 2)
        return per_unit


# ---- Matmuls --------------------------------------------------------------------------------------------------------


def matmul_fn(M: np.ndarray, B: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    """M [N, K] -> a function of z [K, B] and out [N, B] that computes M z into out, by blocks of rows."""
    return M.dot if num_blocks(*M.shape, B) == 1 else batched_matmul_fn(M, B)


def batched_matmul_fn(M: np.ndarray, B: int) -> Callable[[np.ndarray, np.ndarray], Any]:
    """As `matmul_fn`, for z [..., K, B] and out [..., N, B] of many time steps at once."""
    N, K = M.shape
    count = num_blocks(N, K, B)
    if count == 1:
        return partial(np.matmul, M)
    pieces = M.reshape(count, N // count, K)
    split = count, N // count, B
    return lambda z, out: np.matmul(pieces, z[..., None, :, :], out.reshape(*out.shape[:-2], *split))


@cache
def num_blocks(N: int, K: int, B: int) -> int:
    """How many blocks of rows a matmul is split into; 1 for none, and for a matrix with a vector."""
    work, count = N * K * B, 1
    if not has_avx512():
        return 1
    while work > count * MAX_UNBLOCKED_FLOPS and N % (2 * count) == 0:
        count *= 2
    return 1 if B == 1 or work > count * MAX_UNBLOCKED_FLOPS or N // count < MIN_GEMM_ROWS else count


@cache
def has_avx512() -> bool:
    """Whether NumPy found it here; an old NumPy doesn't say. It isn't timed, so that every run adds in one order."""
    introspect = getattr(np.lib, "introspect", None)
    if introspect is None:
        return False
    (of_tanh,) = introspect.opt_func_info("^tanh$", "^float32$").values() or [{}]
    return any(name in info["current"] for info in of_tanh.values() for name in ("X86_V4", "AVX512"))
