"""One time step of any cell in one launch: everything but the products.

The recurrent product of this time step, R h_{t-1}, has been made by a library; the kernel adds the input projection,
runs the cell and writes states, outputs and what the gradient needs; the mirror of it backwards. It reads and writes
every element once, so its time is that of the memory, or of the launch. A program owns a tile of rows and hidden
units; nothing is shared between programs. Within one, the thread that writes an element in place needn't be the one
that read it, as a load and a store may be spread over the threads differently; so all wait in between.

Where a cell takes means, a program owns whole rows, and goes through their tiles once for each level of means and once
more for the cell. What a time step needs is then read again, from the nearest cache: in registers it would limit H.
Hoisted out of these loops, what is the same for all tiles would take registers, too.

T and B are plain arguments: a new length or batch compiles nothing. Offsets to a time step or a row are int64.
"""

import triton
import triton.language as tl

from .cell_inputs import flag_tiles, key_of, uniform_tiles, unit_tiles
from .tiles import add_tiles, load_tiles, store_tiles


@triton.jit
def rows(B, BLOCK_B: tl.constexpr):
    """Where this program's rows begin, and its rows from there [BLOCK_B, 1].

    The beginning is int64; the rest is small, and each thread has many of them.
    """
    return tl.program_id(0).to(tl.int64) * BLOCK_B, tl.arange(0, BLOCK_B)[:, None]


@triton.jit
def units_between(H, BLOCK_H: tl.constexpr, MEANS: tl.constexpr):
    """This program's first unit, and the one after its last: of a tile, or of a row."""
    first = tl.program_id(1) * BLOCK_H
    end = first + BLOCK_H
    if len(MEANS) > 0:
        end = H
    return first, end


@triton.jit
def columns(first, top, row, B, H, BLOCK_H: tl.constexpr):
    """A tile's columns [1, BLOCK_H], and which of its elements exist."""
    column = first + tl.arange(0, BLOCK_H)[None, :]
    return column, (row < B - top) & (column < H)


@triton.jit
def zeros(BLOCK_B: tl.constexpr, REAL: tl.constexpr, N: tl.constexpr):
    """[BLOCK_B, 1], N of them."""
    columns = ()
    for _ in tl.static_range(N):
        columns = columns + (tl.zeros([BLOCK_B, 1], REAL),)
    return columns


@triton.jit
def step_arguments(
    xg, hg, b_hh, h, others, units, flags, seed, t, before, B, H, R, top, row, column, mask,
    G: tl.constexpr, S: tl.constexpr, UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """What the cell takes: x, h, state, extra."""
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all time steps
    at = row * H + column
    gate = row * G * H + column
    x_part = load_tiles(xg + here * G * H, H, gate, mask, REAL, G)
    h_part = load_tiles(hg + top * G * H, H, gate, mask, REAL, G)
    if b_hh is not None:
        bias = load_tiles(b_hh, H, column + 0 * row, mask, REAL, G)  # each by the thread that wants it
        h_part = add_tiles(h_part, bias, G)
    state = load_tiles(h + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(others + before * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    extra = unit_tiles(units, R, top, row, column, mask, H, UNITS) + flag_tiles(flags, t, B, top, row, REAL, FLAGS)
    extra = extra + uniform_tiles(key_of(seed, UNIFORMS), t, top, row, column, REAL, UNIFORMS)
    return x_part, h_part, state, extra


@triton.jit(do_not_specialize=["t", "before", "after", "following", "B", "R"])
def step_kernel(
    xg,  # [T, B, G, H] storage; input projection, b_ih included
    hg,  # [B, G, H] product; recurrent projection of this time step, without b_hh
    b_hh,  # [G, H] storage, or None
    h,  # [B, H] real; the h that the cell itself sees, updated in place
    others,  # [boundaries, S-1, B, H] real; reads boundary `before`, writes `after`
    saved,  # [T, B, K, H] storage, written, or None; may be xg itself
    y,  # [T, B, H] storage, written; h after
    operand,  # [B, H] storage, written: what the next time step's product sees; None where that is y
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    t, before, after, following, B, H, R,
    STEP: tl.constexpr, LEVEL: tl.constexpr, MEANS: tl.constexpr, OPERAND: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row = rows(B, BLOCK_B)
    begin, end = units_between(H, BLOCK_H, MEANS)
    means = ()
    for level in tl.static_range(len(MEANS)):
        sums = zeros(BLOCK_B, REAL, MEANS[level])
        for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
            column, mask = columns(first, top, row, B, H, BLOCK_H)
            x_part, h_part, state, extra = step_arguments(
                xg, hg, b_hh, h, others, units, flags, seed, t, before, B, H, R, top, row, column, mask,
                G, S, UNITS, FLAGS, UNIFORMS, REAL,
            )  # fmt: skip
            parts = LEVEL(level, x_part, h_part, state, extra, means, column < H, H)
            sums = add_tiles(sums, parts, MEANS[level])
        means = means + sums

    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top
    for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
        column, mask = columns(first, top, row, B, H, BLOCK_H)
        x_part, h_part, state, extra = step_arguments(
            xg, hg, b_hh, h, others, units, flags, seed, t, before, B, H, R, top, row, column, mask,
            G, S, UNITS, FLAGS, UNIFORMS, REAL,
        )  # fmt: skip
        new, kept = STEP(x_part, h_part, state, extra, means)

        tl.debug_barrier()
        at = row * H + column
        store_tiles(h + top * H, size, at, mask, new, 0, 1)
        store_tiles(y + here * H, size, at, mask, new, 0, 1)
        store_tiles(others + after * size * (S - 1) + top * H, size, at, mask, new, 1, S - 1)
        if saved is not None:
            store_tiles(saved + here * K * H, H, row * K * H + column, mask, kept, 0, K)
        if operand is not None:  # noqa: SIM102 -- known when it is compiled, and the other when it runs
            if following >= 0:
                per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
                seen = OPERAND((new[0],), per_unit + flag_tiles(flags, following, B, top, row, REAL, FLAGS))
                store_tiles(operand + top * H, size, at, mask, seen[0], 0, 1)


@triton.jit
def grad_arguments(
    dy, back, dh, dothers, y, h0, others, saved, dhistory, units, flags, seed,
    t, previous, before, after, following, B, H, R, top, row, column, mask,
    OPERAND_GRAD: tl.constexpr, S: tl.constexpr, K: tl.constexpr, UNITS: tl.constexpr, FLAGS: tl.constexpr,
    UNIFORMS: tl.constexpr, LEARNED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What the cell takes: dnew, new, state, saved, extra; and what `operand` adds to dunits."""
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all time steps
    at = row * H + column
    per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
    arrived = tl.load(back + top * H + at, mask=mask, other=0.0).to(REAL)
    learned = ()
    for _ in tl.static_range(LEARNED):
        learned = learned + (tl.zeros_like(arrived),)
    if OPERAND_GRAD is not None:  # noqa: SIM102 -- as above
        if following >= 0:
            flagged = per_unit + flag_tiles(flags, following, B, top, row, REAL, FLAGS)
            dh_in, parts = OPERAND_GRAD((arrived,), flagged)
            arrived = dh_in[0]
            learned = add_tiles(learned, parts, LEARNED)
    arrived += tl.load(dh + top * H + at, mask=mask, other=0.0)
    if dy is not None:
        arrived += tl.load(dy + here * H + at, mask=mask, other=0.0).to(REAL)
    dnew = (arrived,)
    others_after = load_tiles(dothers + top * H, size, at, mask, REAL, S - 1)
    if dhistory is not None:
        of_history = load_tiles(dhistory + t * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
        others_after = add_tiles(others_after, of_history, S - 1)
    dnew = dnew + others_after
    new = load_tiles(y + here * H, size, at, mask, REAL, 1)
    new = new + load_tiles(others + after * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    seen = tl.where(previous < 0, h0, y + previous * size)
    state = load_tiles(seen + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(others + before * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    kept = load_tiles(saved + here * K * H, H, row * K * H + column, mask, REAL, K)

    extra = per_unit + flag_tiles(flags, t, B, top, row, REAL, FLAGS)
    extra = extra + uniform_tiles(key_of(seed, UNIFORMS), t, top, row, column, REAL, UNIFORMS)
    return dnew, new, state, kept, extra, learned


@triton.jit(do_not_specialize=["t", "previous", "before", "after", "following", "B", "R"])
def grad_kernel(
    dy,  # [T, B, H] storage, or None for zero
    back,  # [B, H] product; what came back through the recurrent weights
    dh,  # [B, H] real; what came back past them, updated in place
    dothers,  # [S-1, B, H] real; gradient of the other states, updated in place
    y,  # [T, B, H] storage; every h
    h0,  # [B, H] storage
    others,  # [T+1, S-1, B, H] real
    saved,  # [T, B, K, H] storage
    dxg,  # [T, B, G, H] storage, written
    dhg,  # [T, B, G, H] storage, written, or None where it equals dxg
    dhistory,  # [T, S-1, B, H] storage; gradients of the other states after each time step, or None for zero
    dunits,  # [learned, B, H] real, added to
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    t, previous, before, after, following, B, H, R,
    GRAD: tl.constexpr, LEVEL: tl.constexpr, MEANS: tl.constexpr, OPERAND_GRAD: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, LEARNED: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row = rows(B, BLOCK_B)
    begin, end = units_between(H, BLOCK_H, MEANS)
    means = ()
    for level in tl.static_range(len(MEANS)):
        total = zeros(BLOCK_B, REAL, MEANS[level])
        for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
            column, mask = columns(first, top, row, B, H, BLOCK_H)
            dnew, new, state, kept, extra, learned = grad_arguments(
                dy, back, dh, dothers, y, h0, others, saved, dhistory, units, flags, seed,
                t, previous, before, after, following, B, H, R, top, row, column, mask,
                OPERAND_GRAD, S, K, UNITS, FLAGS, UNIFORMS, LEARNED, REAL,
            )  # fmt: skip
            parts = LEVEL(level, dnew, new, state, kept, extra, means, column < H, H)
            total = add_tiles(total, parts, MEANS[level])
        means = means + total

    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top
    for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
        column, mask = columns(first, top, row, B, H, BLOCK_H)
        dnew, new, state, kept, extra, learned = grad_arguments(
            dy, back, dh, dothers, y, h0, others, saved, dhistory, units, flags, seed,
            t, previous, before, after, following, B, H, R, top, row, column, mask,
            OPERAND_GRAD, S, K, UNITS, FLAGS, UNIFORMS, LEARNED, REAL,
        )  # fmt: skip
        dx_part, dh_part, past, parts = GRAD(dnew, new, state, kept, extra, means)

        tl.debug_barrier()
        at = row * H + column
        gate = row * G * H + column
        store_tiles(dxg + here * G * H, H, gate, mask, dx_part, 0, G)
        if dhg is not None:
            store_tiles(dhg + here * G * H, H, gate, mask, dh_part, 0, G)
        store_tiles(dh + top * H, size, at, mask, past, 0, 1)
        store_tiles(dothers + top * H, size, at, mask, past, 1, S - 1)
        if LEARNED > 0:  # read late, as these would take registers
            sums = load_tiles(dunits + top * H, size, at, mask, REAL, LEARNED)
            sums = add_tiles(sums, add_tiles(learned, parts, LEARNED), LEARNED)
            store_tiles(dunits + top * H, size, at, mask, sums, 0, LEARNED)
