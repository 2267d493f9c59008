"""One time step of any cell in one launch: everything but the matmuls.

The recurrent projection of this time step, R h_{t-1}, comes from a library's matmul; the kernel adds the input
projection, runs the cell and writes states, outputs and what the gradient needs; the mirror of it backwards. It reads
and writes every element once, so its time is that of the memory, or of the launch. A program owns a tile of rows and
hidden units; nothing is shared between programs. Within one, the thread that writes an element in place needn't be the
one that read it, as a load and a store may be spread over the threads differently; so all wait in between.

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
def units_between(H, BLOCK_H: tl.constexpr, REDUCTION_COUNTS: tl.constexpr):
    """This program's first unit, and the one after its last: of a tile, or of a row."""
    first = tl.program_id(1) * BLOCK_H
    end = first + BLOCK_H
    if len(REDUCTION_COUNTS) > 0:
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
    Wx, Rh, b_hh, h, cell_states, units, flags, seed, t, state_in, B, H, R, top, row, column, mask,
    G: tl.constexpr, S: tl.constexpr, PER_UNIT: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """What the cell takes: x, h, state, extra."""
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all time steps
    at = row * H + column
    gate = row * G * H + column
    x_gates = load_tiles(Wx + here * G * H, H, gate, mask, REAL, G)
    h_gates = load_tiles(Rh + top * G * H, H, gate, mask, REAL, G)
    if b_hh is not None:
        bias = load_tiles(b_hh, H, column + 0 * row, mask, REAL, G)  # each by the thread that uses it
        h_gates = add_tiles(h_gates, bias, G)
    state = load_tiles(h + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(cell_states + state_in * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    extra = unit_tiles(units, R, top, row, column, mask, H, PER_UNIT) + flag_tiles(flags, t, B, top, row, REAL, FLAGS)
    extra = extra + uniform_tiles(key_of(seed, UNIFORMS), t, top, row, column, REAL, UNIFORMS)
    return x_gates, h_gates, state, extra


@triton.jit(do_not_specialize=["t", "state_in", "state_out", "t_next", "B", "R"])
def step_kernel(
    Wx,  # [T, B, G, H] storage; input projection, b_ih included
    Rh,  # [B, G, H] product; recurrent projection of this time step, without b_hh
    b_hh,  # [G, H] storage, or None
    h,  # [B, H] real; the h that the cell itself takes, updated in place
    cell_states,  # [T+1 or 1, S-1, B, H] real; reads index `state_in`, writes `state_out`
    saved,  # [T, B, K, H] storage, written, or None; may be Wx itself
    y,  # [T, B, H] storage, written; h after
    recurrent_input,  # [B, H] storage, written: input of the next recurrent matmul; None where that is y
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    t, state_in, state_out, t_next, B, H, R,
    STEP: tl.constexpr, REDUCE: tl.constexpr, REDUCTION_COUNTS: tl.constexpr, RECURRENT_INPUT: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_UNIT: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row = rows(B, BLOCK_B)
    begin, end = units_between(H, BLOCK_H, REDUCTION_COUNTS)
    means = ()
    for level in tl.static_range(len(REDUCTION_COUNTS)):
        sums = zeros(BLOCK_B, REAL, REDUCTION_COUNTS[level])
        for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
            column, mask = columns(first, top, row, B, H, BLOCK_H)
            x_gates, h_gates, state, extra = step_arguments(
                Wx, Rh, b_hh, h, cell_states, units, flags, seed, t, state_in, B, H, R, top, row, column, mask,
                G, S, PER_UNIT, FLAGS, UNIFORMS, REAL,
            )  # fmt: skip
            parts = REDUCE(level, x_gates, h_gates, state, extra, means, column < H, H)
            sums = add_tiles(sums, parts, REDUCTION_COUNTS[level])
        means = means + sums

    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top
    for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
        column, mask = columns(first, top, row, B, H, BLOCK_H)
        x_gates, h_gates, state, extra = step_arguments(
            Wx, Rh, b_hh, h, cell_states, units, flags, seed, t, state_in, B, H, R, top, row, column, mask,
            G, S, PER_UNIT, FLAGS, UNIFORMS, REAL,
        )  # fmt: skip
        new, saved_values = STEP(x_gates, h_gates, state, extra, means)

        tl.debug_barrier()
        at = row * H + column
        store_tiles(h + top * H, size, at, mask, new, 0, 1)
        store_tiles(y + here * H, size, at, mask, new, 0, 1)
        store_tiles(cell_states + state_out * size * (S - 1) + top * H, size, at, mask, new, 1, S - 1)
        if saved is not None:
            store_tiles(saved + here * K * H, H, row * K * H + column, mask, saved_values, 0, K)
        if recurrent_input is not None:  # noqa: SIM102 -- known when it is compiled, and the other when it runs
            if t_next >= 0:
                per_unit = unit_tiles(units, R, top, row, column, mask, H, PER_UNIT)
                h_in = RECURRENT_INPUT((new[0],), per_unit + flag_tiles(flags, t_next, B, top, row, REAL, FLAGS))
                store_tiles(recurrent_input + top * H, size, at, mask, h_in[0], 0, 1)


@triton.jit
def grad_arguments(
    dy, dh_recurrent, dh_direct, dcell_states, y, h0, cell_states, saved, dhistory, units, flags, seed,
    t, t_prev, state_in, state_out, t_next, B, H, R, top, row, column, mask,
    RECURRENT_INPUT_GRAD: tl.constexpr, S: tl.constexpr, K: tl.constexpr, PER_UNIT: tl.constexpr, FLAGS: tl.constexpr,
    UNIFORMS: tl.constexpr, TRAINABLE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What the cell takes: dnew, new, state, saved, extra; and what `recurrent_input` adds to dunits."""
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all time steps
    at = row * H + column
    per_unit = unit_tiles(units, R, top, row, column, mask, H, PER_UNIT)
    arrived = tl.load(dh_recurrent + top * H + at, mask=mask, other=0.0).to(REAL)
    dunits_part = ()
    for _ in tl.static_range(TRAINABLE):
        dunits_part = dunits_part + (tl.zeros_like(arrived),)
    if RECURRENT_INPUT_GRAD is not None:  # noqa: SIM102 -- as above
        if t_next >= 0:
            flagged = per_unit + flag_tiles(flags, t_next, B, top, row, REAL, FLAGS)
            dh_in, parts = RECURRENT_INPUT_GRAD((arrived,), flagged)
            arrived = dh_in[0]
            dunits_part = add_tiles(dunits_part, parts, TRAINABLE)
    arrived += tl.load(dh_direct + top * H + at, mask=mask, other=0.0)
    if dy is not None:
        arrived += tl.load(dy + here * H + at, mask=mask, other=0.0).to(REAL)
    dnew = (arrived,)
    dcell = load_tiles(dcell_states + top * H, size, at, mask, REAL, S - 1)
    if dhistory is not None:
        of_history = load_tiles(dhistory + t * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
        dcell = add_tiles(dcell, of_history, S - 1)
    dnew = dnew + dcell
    new = load_tiles(y + here * H, size, at, mask, REAL, 1)
    new = new + load_tiles(cell_states + state_out * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    h_prev = tl.where(t_prev < 0, h0, y + t_prev * size)
    state = load_tiles(h_prev + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(cell_states + state_in * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    saved_values = load_tiles(saved + here * K * H, H, row * K * H + column, mask, REAL, K)

    extra = per_unit + flag_tiles(flags, t, B, top, row, REAL, FLAGS)
    extra = extra + uniform_tiles(key_of(seed, UNIFORMS), t, top, row, column, REAL, UNIFORMS)
    return dnew, new, state, saved_values, extra, dunits_part


@triton.jit(do_not_specialize=["t", "t_prev", "state_in", "state_out", "t_next", "B", "R"])
def grad_kernel(
    dy,  # [T, B, H] storage, or None for zero
    dh_recurrent,  # [B, H] product; gradient of h through the recurrent weights
    dh_direct,  # [B, H] real; gradient of h past the weights, updated in place
    dcell_states,  # [S-1, B, H] real; gradient of the cell states, updated in place
    y,  # [T, B, H] storage; every h
    h0,  # [B, H] storage
    cell_states,  # [T+1, S-1, B, H] real
    saved,  # [T, B, K, H] storage
    dWx,  # [T, B, G, H] storage, written
    dRh,  # [T, B, G, H] storage, written, or None where it equals dWx
    dhistory,  # [T, S-1, B, H] storage; gradients of the cell states after each time step, or None for zero
    dunits,  # [trainable, B, H] real, added to
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    t, t_prev, state_in, state_out, t_next, B, H, R,
    GRAD: tl.constexpr, REDUCE: tl.constexpr, REDUCTION_COUNTS: tl.constexpr, RECURRENT_INPUT_GRAD: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_UNIT: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, TRAINABLE: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row = rows(B, BLOCK_B)
    begin, end = units_between(H, BLOCK_H, REDUCTION_COUNTS)
    means = ()
    for level in tl.static_range(len(REDUCTION_COUNTS)):
        total = zeros(BLOCK_B, REAL, REDUCTION_COUNTS[level])
        for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
            column, mask = columns(first, top, row, B, H, BLOCK_H)
            dnew, new, state, saved_values, extra, dunits_part = grad_arguments(
                dy, dh_recurrent, dh_direct, dcell_states, y, h0, cell_states, saved, dhistory, units, flags, seed,
                t, t_prev, state_in, state_out, t_next, B, H, R, top, row, column, mask,
                RECURRENT_INPUT_GRAD, S, K, PER_UNIT, FLAGS, UNIFORMS, TRAINABLE, REAL,
            )  # fmt: skip
            parts = REDUCE(level, dnew, new, state, saved_values, extra, means, column < H, H)
            total = add_tiles(total, parts, REDUCTION_COUNTS[level])
        means = means + total

    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top
    for first in tl.range(begin, end, BLOCK_H, disable_licm=True):
        column, mask = columns(first, top, row, B, H, BLOCK_H)
        dnew, new, state, saved_values, extra, dunits_part = grad_arguments(
            dy, dh_recurrent, dh_direct, dcell_states, y, h0, cell_states, saved, dhistory, units, flags, seed,
            t, t_prev, state_in, state_out, t_next, B, H, R, top, row, column, mask,
            RECURRENT_INPUT_GRAD, S, K, PER_UNIT, FLAGS, UNIFORMS, TRAINABLE, REAL,
        )  # fmt: skip
        dx_gates, dh_gates, dbefore, parts = GRAD(dnew, new, state, saved_values, extra, means)

        tl.debug_barrier()
        at = row * H + column
        gate = row * G * H + column
        store_tiles(dWx + here * G * H, H, gate, mask, dx_gates, 0, G)
        if dRh is not None:
            store_tiles(dRh + here * G * H, H, gate, mask, dh_gates, 0, G)
        store_tiles(dh_direct + top * H, size, at, mask, dbefore, 0, 1)
        store_tiles(dcell_states + top * H, size, at, mask, dbefore, 1, S - 1)
        if TRAINABLE > 0:  # read late, as these would take registers
            sums = load_tiles(dunits + top * H, size, at, mask, REAL, TRAINABLE)
            sums = add_tiles(sums, add_tiles(dunits_part, parts, TRAINABLE), TRAINABLE)
            store_tiles(dunits + top * H, size, at, mask, sums, 0, TRAINABLE)
