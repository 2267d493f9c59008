"""A walk through time, an instant at a time: one recurrent product and one kernel at each, any cell, size and dtype.

The products are the caller's library's; the kernel is the backend's and does everything else of an instant at once:
gates, states, what is saved, and the mirror of it in the gradient. Nothing is allocated inside the loop. A backend
hands over its kernels as binders, called once per sequence with all arrays whole:

    bind(cell, Step(...)) -> step(t, before, after)
    bind(cell, Grad(...)) -> grad(t, previous, before, after)

and what they return is called once per instant with whole numbers, on the caller's stream:

    t         the instant, an index into [T, ...]
    previous  the instant computed before it, whose h it saw; -1 at the first one, which saw h0
    before    boundary where the other states stand before the instant, and
    after     after it (sequence.py)

Beside storage and real there is `product`, the dtype of the recurrent products: float32 for halves where the library
can.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell

from .. import arrays
from .sequence import Backward, Forward


class Step(NamedTuple):
    """What the forward kernel reads and writes."""

    xg: Any  # [T, B, G, H] storage; input part, b_ih included
    hg: Any  # [B, G, H] product; recurrent part of this instant, without b_hh
    b_hh: Any  # [G, H] storage, or None
    h: Any  # [B, H] real; the h that the cell itself sees, updated in place
    others: Any  # [T+1 or 1, S-1, B, H] real; reads boundary `before`, writes `after`: the same one if nothing is saved
    saved: Any  # [T, B, K, H] storage, or None; it is xg itself where K = G: an element is read, then written
    y: Any  # [T, B, H] storage; h after, before its projection


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


Bind = Callable[[Cell, Any], Callable[..., Any]]


class Instant(NamedTuple):
    t: int
    previous: int
    before: int
    after: int


def instants(T: int, reverse: bool) -> Iterator[Instant]:
    """In the order of computation."""
    if reverse:
        return (Instant(t, t + 1 if t + 1 < T else -1, t + 1, t) for t in range(T - 1, -1, -1))
    return (Instant(t, t - 1, t, t + 1) for t in range(T))


def walk(bind: Bind, cell: Cell, given: Forward) -> None:
    T, B, G, H = given.xg.shape
    hg = arrays.empty((B, G, H), like=given.xg, dtype=product_dtype(given.xg))
    h = arrays.empty((B, H), like=given.xg, dtype=arrays.real_dtype(given.xg))
    h[...] = given.h0 if given.w_hr is None else 0  # a cell with a projection can't look at its own h
    step = bind(cell, Step(given.xg, hg, given.b_hh, h, given.others, given.saved, given.shown))
    seen, R, recurrent = given.h0, given.w_hh.T, hg.reshape(B, G * H)
    outputs, unprojected = list(given.y), list(given.shown)
    for t, _, before, after in instants(T, given.reverse):
        arrays.matmul(seen, R, out=recurrent)
        step(t, *((before, after) if given.saved is not None else (0, 0)))
        seen = outputs[t]
        if given.w_hr is not None:
            arrays.matmul(unprojected[t], given.w_hr.T, out=seen)


def walk_back(bind: Bind, cell: Cell, given: Backward) -> None:
    (T, B, G, H), P = given.dxg.shape, given.h0.shape[1]
    back = arrays.empty((B, P), like=given.dxg, dtype=product_dtype(given.dxg))
    past = given.dh  # what comes back to h past the weights
    if given.w_hr is None:
        back[...] = 0  # the gradient of the last h is in dh
        dy, asked = given.dy, back
    else:
        back[...] = given.dh
        past = arrays.zeros((B, H), like=given.others)
        dy, asked = None, arrays.empty((B, H), like=given.dxg, dtype=product_dtype(given.dxg))
    h0 = given.h0 if given.w_hr is None else arrays.zeros((B, H), like=given.dxg)  # unseen by a cell with a projection
    grad = bind(
        cell,
        Grad(dy, asked, past, given.dothers, given.shown, h0, given.others, given.saved, given.dxg, given.dhg),
    )
    whole = list(given.dy)
    gates = list((given.dxg if given.dhg is None else given.dhg).reshape(T, B, G * H))
    for instant in reversed(list(instants(T, given.reverse))):
        if given.w_hr is not None:
            whole[instant.t] += back
            arrays.matmul(whole[instant.t], given.w_hr, out=asked)
        grad(*instant)
        arrays.matmul(gates[instant.t], given.w_hh, out=back)
    if given.w_hr is None:
        given.dh[...] += back
    else:
        given.dh[...] = back


def product_dtype(array: Any) -> str:
    return arrays.product_dtype(arrays.library(array), arrays.dtype(array))
