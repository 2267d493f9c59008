"""A walk through time, an instant at a time: one recurrent product and one kernel at each, any cell, size and dtype.

The products are the caller's library's; the kernel is the backend's and does everything else of an instant at once:
gates, states, what is saved, and the mirror of it in the gradient. Nothing is allocated inside the loop. A backend
hands over its kernels as binders, called once per sequence with all arrays whole:

    bind(cell, Step(...)) -> step(t, before, after, following)
    bind(cell, Grad(...)) -> grad(t, previous, before, after, following)

and what they return is called once per instant with whole numbers, on the caller's stream:

    t         the instant, an index into [T, ...]
    previous  the instant computed before it, whose h it saw; -1 at the first one, which saw h0
    before    boundary where the other states stand before the instant, and
    after     after it (sequence.py)
    following the instant computed after it, whose product sees its h; -1 at the last one

Beside storage and real there is `product`, the dtype of the recurrent products: float32 for halves where the library
can.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell, operand_grad_graph
from gpu_rnn.kernels.modifiers import HOLD

from ..core import arrays
from ..core.cell_inputs import Extra
from ..core.problem import Problem
from .gpu_common import Backward, Forward, operand


class Step(NamedTuple):
    """What the forward kernel reads and writes."""

    xg: Any  # [T, B, G, H] storage; input part, b_ih included
    hg: Any  # [B, G, H] product; recurrent part of this instant, without b_hh
    b_hh: Any  # [G, H] storage, or None
    h: Any  # [B, H] real; the h that the cell itself sees, updated in place
    others: Any  # [T+1 or 1, S-1, B, H] real; reads boundary `before`, writes `after`: the same one if nothing is saved
    saved: Any  # [T, B, K, H] storage, or None; it is xg itself where K = G: an element is read, then written
    y: Any  # [T, B, H] storage; h after, before its projection
    operand: Any  # [B, H] storage, written: what the following product sees; None where that is y
    units: Any  # as in Extra
    flags: Any
    seed: Any


class Grad(NamedTuple):
    """What the backward kernel reads and writes. The gradient that meets h is dy[t] + back + dh."""

    dy: Any  # [T, B, H] storage, or None for zero
    back: Any  # [B, H] product; what came back through the recurrent weights
    dh: Any  # [B, H] real; what came back past them, updated in place
    dothers: Any  # [S-1, B, H] real; gradient of the other states, updated in place
    y: Any  # [T, B, H] storage; every h, as the step wrote it
    h0: Any  # [B, H] storage
    others: Any  # [T+1, S-1, B, H] real
    saved: Any  # [T, B, K, H] storage
    dxg: Any  # [T, B, G, H] storage, written
    dhg: Any  # [T, B, G, H] storage, written; None where it equals dxg (no gate is `separate`)
    dhistory: Any  # [T, S-1, B, H] storage; gradients of the other states after every instant, or None for zero
    dunits: Any  # [learned, B, H] real, added to
    units: Any  # as in Extra
    flags: Any
    seed: Any


def memory(problem: Problem) -> tuple[int, int]:
    """Bytes that `walk` and `walk_back` take for themselves."""
    cell, B, H, P = problem.cell, problem.B, problem.H, problem.P or problem.H
    product = 4 if arrays.product_dtype(problem.library, problem.dtype) == "float32" else problem.itemsize
    forward = B * H * (cell.G * product + problem.real_itemsize) + (B * P * problem.itemsize if cell.operand else 0)
    projected = B * H * (problem.real_itemsize + product + problem.itemsize) if problem.P else 0
    return forward, B * P * product + projected


Bind = Callable[[Cell, Any], Callable[..., Any]]


class Instant(NamedTuple):
    t: int
    previous: int
    before: int
    after: int
    following: int


def instants(T: int, reverse: bool) -> Iterator[Instant]:
    """In the order of computation."""
    if reverse:
        return (Instant(t, t + 1 if t + 1 < T else -1, t + 1, t, t - 1) for t in range(T - 1, -1, -1))
    return (Instant(t, t - 1, t, t + 1, t + 1 if t + 1 < T else -1) for t in range(T))


def walk(bind: Bind, cell: Cell, given: Forward) -> None:
    (T, B, G, H), P, projected = given.xg.shape, given.h0.shape[1], given.w_hr is not None
    hg = arrays.empty((B, G, H), like=given.xg, dtype=product_dtype(given.xg))
    h = arrays.empty((B, H), like=given.xg, dtype=arrays.real_dtype(given.xg))
    h[...] = 0 if projected else given.h0  # a cell with a projection can't look at its own h
    buffer = None if cell.operand is None else arrays.empty((B, P), like=given.xg)
    step = bind(
        cell,
        Step(given.xg, hg, given.b_hh, h, given.others, given.saved, given.shown, None if projected else buffer,
             *given.extra),
    )  # fmt: skip
    R, recurrent = given.w_hh.T, hg.reshape(B, G * H)
    outputs, unprojected = list(given.y), list(given.shown)
    before_it, seen = given.h0, given.h0
    if buffer is not None:
        seen = operand(cell, given.h0, given.extra, T - 1 if given.reverse else 0)
    for t, _, before, after, following in instants(T, given.reverse):
        arrays.matmul(seen, R, out=recurrent)
        step(t, *((before, after) if given.saved is not None else (0, 0)), following)
        if projected:
            arrays.matmul(unprojected[t], given.w_hr.T, out=outputs[t])
            keep(cell, given.extra, t, outputs[t], before_it)
            if buffer is not None and following >= 0:
                buffer[...] = operand(cell, outputs[t], given.extra, following)
        before_it = outputs[t]
        seen = outputs[t] if buffer is None else buffer


def keep(cell: Cell, extra: Extra, t: int, h: Any, before: Any) -> None:
    """Where the page holds its states, the projected h [B, P] stays what it was before."""
    if HOLD in cell.flags:
        h[...] = arrays.operations(h)["where"](extra.at(cell, t, 0)[-1], before, h)


def walk_back(bind: Bind, cell: Cell, given: Backward) -> None:
    (T, B, G, H), P, projected = given.dxg.shape, given.h0.shape[1], given.w_hr is not None
    back = arrays.empty((B, P), like=given.dxg, dtype=product_dtype(given.dxg))
    if projected:
        back[...] = given.dh
        past = arrays.zeros((B, H), like=given.others)
        dy, asked = None, arrays.empty((B, H), like=given.dxg, dtype=product_dtype(given.dxg))
        h0 = arrays.zeros((B, H), like=given.dxg)  # unseen by a cell with a projection
    else:
        back[...] = 0  # the gradient of the last h is in dh
        past, dy, asked, h0 = given.dh, given.dy, back, given.h0  # past: what comes back to h past the weights
    grad = bind(
        cell,
        Grad(dy, asked, past, given.dothers, given.shown, h0, given.others, given.saved, given.dxg, given.dhg,
             given.dhistory, given.dunits, *given.extra),
    )  # fmt: skip
    whole = list(given.dy)
    gates = list((given.dxg if given.dhg is None else given.dhg).reshape(T, B, G * H))
    for instant in reversed(list(instants(T, given.reverse))):
        if projected:
            whole[instant.t] += back
            held = keep_back(cell, given.extra, instant.t, whole[instant.t])
            arrays.matmul(whole[instant.t], given.w_hr, out=asked)
            grad(*instant[:-1], -1)
            arrays.matmul(gates[instant.t], given.w_hh, out=back)
            back[...] = operand_back(cell, back, given.extra, instant.t, given.dunits) + held
        else:
            grad(*instant)
            arrays.matmul(gates[instant.t], given.w_hh, out=back)
    if projected:
        given.dh[...] = back
    else:
        given.dh[...] += operand_back(cell, back, given.extra, T - 1 if given.reverse else 0, given.dunits)


def keep_back(cell: Cell, extra: Extra, t: int, dh: Any) -> Any:
    """The gradient of `keep`: what goes to the h before. It is taken from dh [B, P]."""
    if HOLD not in cell.flags:
        return 0
    select, hold = arrays.operations(dh)["where"], extra.at(cell, t, 0)[-1]
    held = select(hold, dh, 0.0)
    dh[...] = select(hold, 0.0, dh)
    return held


def operand_back(cell: Cell, back: Any, extra: Extra, t: int, dunits: Any) -> Any:
    """The gradient of `operand` at instant t: that of h is returned, those of values per unit are added to dunits."""
    if cell.operand is None:
        return back
    P = back.shape[1]
    (dh,), parts = operand_grad_graph(cell).run(arrays.operations(back), dnew=[back], extra=extra.at(cell, t, P))
    for total, part in zip(dunits, parts):
        total[:, :P] += part
    return dh


def product_dtype(array: Any) -> str:
    return arrays.product_dtype(arrays.library(array), arrays.dtype(array))
