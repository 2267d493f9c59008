"""The time loop of one pass: one recurrent matmul and one fused elementwise kernel per time step, for any cell, size.

The matmuls are the caller's library's; the backend's kernel does everything else of a time step at once: gates, states,
saved activations, and the mirror of it in the gradient. Nothing is allocated inside the loop. A backend hands over its
kernels as binders, which are called once per run with all arrays whole:

    bind(cell, Step(...)) -> step(t, state_in, state_out, t_next)
    bind(cell, Grad(...)) -> grad(t, t_prev, state_in, state_out, t_next)

and what they return is called once per time step with whole numbers, on the caller's stream:

    t          the time step, an index into [T, ...]
    t_prev     the time step computed before it, whose h it takes; -1 at the first one, which takes h0
    state_in   the state index (gpu_common.py) of the cell states before the time step, and
    state_out  after it
    t_next     the time step computed after it, whose matmul takes its h; -1 at the last one

Besides storage and real there is `product`, the dtype of the recurrent matmuls: float32 for half precision where the
library can.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell, recurrent_input_grad_graph
from gpu_rnn.kernels.modifiers import HOLD

from ..core import arrays
from ..core.cell_inputs import AuxInputs
from ..core.problem import Problem
from .gpu_common import BackwardBuffers, ForwardBuffers, recurrent_input


class Step(NamedTuple):
    """What the forward kernel reads and writes."""

    Wx: Any  # [T, B, G*H] storage; input projection, b_ih included
    Rh: Any  # [B, G*H] product; recurrent projection of this time step, without b_hh
    b_hh: Any  # [G*H] storage, or None
    h: Any  # [B, H] real; the h that the cell itself takes, updated in place
    cell_states: Any  # [T+1 or 1, S-1, B, H] real; reads `state_in`, writes `state_out`, the same if nothing is saved
    saved: Any  # [T, B, K, H] storage, or None; it has Wx's memory where K = G: an element is read, then written
    y: Any  # [T, B, H] storage, written; h before its projection
    recurrent_input: Any  # [B, H] storage, written: the input of the next recurrent matmul; None where that is y
    units: Any  # as in AuxInputs
    flags: Any
    seed: Any


class Grad(NamedTuple):
    """What the backward kernel reads and writes. The gradient that arrives at h is dy[t] + dh_recurrent + dh_direct."""

    dy: Any  # [T, B, H] storage, or None for zero
    dh_recurrent: Any  # [B, H] product; through the recurrent weights, from the next time step
    dh_direct: Any  # [B, H] real; past the weights, updated in place
    dcell_states: Any  # [S-1, B, H] real; gradient of the cell states, updated in place
    y: Any  # [T, B, H] storage; every h, as the step wrote it
    h0: Any  # [B, H] storage
    cell_states: Any  # [T+1, S-1, B, H] real
    saved: Any  # [T, B, K, H] storage
    dWx: Any  # [T, B, G*H] storage, written
    dRh: Any  # [T, B, G*H] storage, written; None where it equals dWx (no gate is `separate`)
    dhistory: Any  # [T, S-1, B, H] storage; gradients of the cell states after every time step, or None for zero
    dunits: Any  # [trainable, B, H] real, accumulated; or None
    units: Any  # as in AuxInputs
    flags: Any
    seed: Any


Bind = Callable[[Cell, Any], Callable[..., Any]]


class StepIndex(NamedTuple):
    t: int
    t_prev: int
    state_in: int
    state_out: int
    t_next: int


def time_steps(T: int, reverse: bool) -> Iterator[StepIndex]:
    """Return the time steps in the order of computation."""
    if reverse:
        return (StepIndex(t, t + 1 if t + 1 < T else -1, t + 1, t, t - 1) for t in range(T - 1, -1, -1))
    return (StepIndex(t, t - 1, t, t + 1, t + 1 if t + 1 < T else -1) for t in range(T))


def memory(problem: Problem) -> tuple[int, int]:
    """Return the bytes that `run_forward` and `run_backward` take for themselves."""
    cell, B, H, P = problem.cell, problem.B, problem.H, problem.P or problem.H
    product = 4 if arrays.product_dtype(problem.library, problem.dtype) == "float32" else problem.itemsize
    dropped = B * P * problem.itemsize if cell.recurrent_input else 0
    forward = B * H * (cell.G * product + problem.real_itemsize) + dropped
    projected = B * H * (problem.real_itemsize + product + problem.itemsize) if problem.P else 0
    return forward, B * P * product + projected


def run_forward(bind: Bind, problem: Problem, buffers: Sequence[ForwardBuffers]) -> None:
    """Run the forward pass of each run, one after the other."""
    for of_run in buffers:
        forward_loop(bind, problem, of_run)


def forward_loop(bind: Bind, problem: Problem, buffers: ForwardBuffers) -> None:
    cell, Wx, T, B, H = problem.cell, buffers.Wx, problem.T, problem.B, problem.H
    P, projected = problem.P or H, problem.P is not None
    Rh = arrays.empty((B, cell.G * H), like=Wx, dtype=product_dtype(Wx))
    h = arrays.empty((B, H), like=Wx, dtype=arrays.real_dtype(Wx))
    h0 = buffers.h0.reshape(B, P)
    h[...] = 0 if projected else h0  # a cell with a projection can't take its own h
    dropped = None if cell.recurrent_input is None else arrays.empty((B, P), like=Wx)
    step = bind(
        cell,
        Step(
            Wx, Rh, buffers.b_hh, h, buffers.cell_states, buffers.saved, buffers.h_unprojected,
            None if projected else dropped, *buffers.aux,
        ),
    )  # fmt: skip
    R, outputs, unprojected = buffers.w_hh.T, list(buffers.y), list(buffers.h_unprojected)
    h_prev, h_in = h0, h0
    if dropped is not None:
        h_in = recurrent_input(cell, h0, buffers.aux, T - 1 if buffers.reverse else 0)
    for t, _, state_in, state_out, t_next in time_steps(T, buffers.reverse):
        arrays.matmul(h_in, R, out=Rh)
        step(t, *((state_in, state_out) if buffers.saved is not None else (0, 0)), t_next)
        if projected:
            arrays.matmul(unprojected[t], buffers.w_hr.T, out=outputs[t])
            apply_mask(cell, buffers.aux, t, outputs[t], h_prev)
            if dropped is not None and t_next >= 0:
                dropped[...] = recurrent_input(cell, outputs[t], buffers.aux, t_next)
        h_prev = outputs[t]
        h_in = outputs[t] if dropped is None else dropped


def apply_mask(cell: Cell, aux: AuxInputs, t: int, h: Any, h_prev: Any) -> None:
    """Keep the projected h [B, P] of the time step before where the mask holds the states."""
    if HOLD in cell.flags:
        h[...] = arrays.operations(h)["where"](aux.at(cell, t, 0)[-1], h_prev, h)


def run_backward(bind: Bind, problem: Problem, buffers: Sequence[BackwardBuffers]) -> None:
    """Run the backward pass of each run, one after the other."""
    for of_run in buffers:
        backward_loop(bind, problem, of_run)


def backward_loop(bind: Bind, problem: Problem, buffers: BackwardBuffers) -> None:
    cell, dWx, T, B, H = problem.cell, buffers.dWx, problem.T, problem.B, problem.H
    projected = problem.P is not None
    dh_recurrent = arrays.empty((B, problem.P or H), like=dWx, dtype=product_dtype(dWx))
    if projected:
        dh_recurrent[...] = buffers.dh
        dh_direct = arrays.zeros((B, H), like=buffers.cell_states)
        dy, dh_unprojected = None, arrays.empty((B, H), like=dWx, dtype=product_dtype(dWx))
        h0 = arrays.zeros((B, H), like=dWx)  # unused by a cell with a projection
    else:
        dh_recurrent[...] = 0  # the gradient of the last h is in dh
        dh_direct, dy, dh_unprojected, h0 = buffers.dh, buffers.dy, dh_recurrent, buffers.h0
    grad = bind(
        cell,
        Grad(
            dy, dh_unprojected, dh_direct, buffers.dcell_states, buffers.h_unprojected, h0, buffers.cell_states,
            buffers.saved, dWx, buffers.dRh, buffers.dhistory, buffers.dunits, *buffers.aux,
        ),
    )  # fmt: skip
    dys, gates = list(buffers.dy), list(dWx if buffers.dRh is None else buffers.dRh)
    for index in reversed(list(time_steps(T, buffers.reverse))):
        t = index.t
        if projected:
            dys[t] += dh_recurrent
            passthrough = split_masked_grad(cell, buffers.aux, t, dys[t])
            arrays.matmul(dys[t], buffers.w_hr, out=dh_unprojected)
            grad(*index[:-1], -1)
            arrays.matmul(gates[t], buffers.w_hh, out=dh_recurrent)
            dh = recurrent_input_grad(cell, dh_recurrent, buffers.aux, t, buffers.dunits)
            dh_recurrent[...] = dh + passthrough
        else:
            grad(*index)
            arrays.matmul(gates[t], buffers.w_hh, out=dh_recurrent)
    if projected:
        buffers.dh[...] = dh_recurrent
    else:
        first = T - 1 if buffers.reverse else 0
        buffers.dh[...] += recurrent_input_grad(cell, dh_recurrent, buffers.aux, first, buffers.dunits)


def split_masked_grad(cell: Cell, aux: AuxInputs, t: int, dh: Any) -> Any:
    """Take the gradient that `apply_mask` passes to the h before out of dh [B, P], and return it."""
    if HOLD not in cell.flags:
        return 0
    select, mask = arrays.operations(dh)["where"], aux.at(cell, t, 0)[-1]
    passthrough = select(mask, dh, 0.0)
    dh[...] = select(mask, 0.0, dh)
    return passthrough


def recurrent_input_grad(cell: Cell, dh: Any, aux: AuxInputs, t: int, dunits: Any) -> Any:
    """The gradient of `recurrent_input` at time step t: that of h is returned, per-unit ones are added to dunits."""
    if cell.recurrent_input is None:
        return dh
    P = dh.shape[1]
    (dh_in,), parts = recurrent_input_grad_graph(cell).run(arrays.operations(dh), dnew=[dh], extra=aux.at(cell, t, P))
    for total, part in zip(() if dunits is None else dunits, parts):
        total[:, :P] += part
    return dh_in


def product_dtype(array: Any) -> str:
    return arrays.product_dtype(arrays.library(array), arrays.dtype(array))
