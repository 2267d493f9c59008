"""One instant of any cell in one launch: everything but the products.

The recurrent product of this instant, R h_{t-1}, has been made by a library; the kernel adds the input part, runs the
cell's page and writes states, outputs and what the gradient needs; the mirror of it backwards. It reads and writes
every element once, so its time is that of the memory, or of the launch. A program owns a tile of rows and hidden
units, of whole rows where a page takes means; nothing is shared between programs.

T and B are plain arguments: a new length or batch compiles nothing. Offsets to an instant or a row are int64.
"""

import triton
import triton.language as tl

from .extra import flag_tiles, key_of, uniform_tiles, unit_tiles
from .tiles import add_tiles, load_tiles, store_tiles


@triton.jit
def tile(B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where this program's rows begin, its rows from there [BLOCK_B, 1], its columns [1, BLOCK_H], which of them exist.

    The beginning is int64; the rest is small, and each thread has many of them.
    """
    top = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)[:, None]
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    return top, row, column, (row < B - top) & (column < H)


@triton.jit(do_not_specialize=["t", "before", "after", "following", "B", "R"])
def step_kernel(
    xg,  # [T, B, G, H] storage; input part, b_ih included
    hg,  # [B, G, H] product; recurrent part of this instant, without b_hh
    b_hh,  # [G, H] storage, or None
    h,  # [B, H] real; the h that the cell itself sees, updated in place
    others,  # [boundaries, S-1, B, H] real; reads boundary `before`, writes `after`
    saved,  # [T, B, K, H] storage, written, or None; may be xg itself
    y,  # [T, B, H] storage, written; h after
    operand,  # [B, H] storage, written: what the next instant's product sees; None where that is y
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see extra.py
    t, before, after, following, B, H, R,
    STEP: tl.constexpr, OPERAND: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row, column, mask = tile(B, H, BLOCK_B, BLOCK_H)
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all instants
    at = row * H + column
    gate = row * G * H + column
    x_part = load_tiles(xg + here * G * H, H, gate, mask, REAL, G)
    h_part = load_tiles(hg + top * G * H, H, gate, mask, REAL, G)
    if b_hh is not None:
        h_part = add_tiles(h_part, load_tiles(b_hh, H, column, column < H, REAL, G), G)
    state = load_tiles(h + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(others + before * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)

    per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
    extra = per_unit + flag_tiles(flags, t, B, top, row, REAL, FLAGS)
    extra = extra + uniform_tiles(key_of(seed, UNIFORMS), t, top, row, column, REAL, UNIFORMS)

    new, kept = STEP(x_part, h_part, state, extra, column < H, H)

    store_tiles(h + top * H, size, at, mask, new, 0, 1)
    store_tiles(y + here * H, size, at, mask, new, 0, 1)
    store_tiles(others + after * size * (S - 1) + top * H, size, at, mask, new, 1, S - 1)
    if saved is not None:
        store_tiles(saved + here * K * H, H, row * K * H + column, mask, kept, 0, K)
    if operand is not None:  # noqa: SIM102 -- known when it is compiled, and the other when it runs
        if following >= 0:
            seen = OPERAND((new[0],), per_unit + flag_tiles(flags, following, B, top, row, REAL, FLAGS))
            store_tiles(operand + top * H, size, at, mask, seen[0], 0, 1)


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
    dhistory,  # [T, S-1, B, H] storage; gradients of the other states after each instant, or None for zero
    dunits,  # [learned, B, H] real, added to
    units, flags, seed,  # [N, R, H] real, [T, B] uint8, [1] int64, or None: see extra.py
    t, previous, before, after, following, B, H, R,
    GRAD: tl.constexpr, OPERAND_GRAD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, LEARNED: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row, column, mask = tile(B, H, BLOCK_B, BLOCK_H)
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all instants
    at = row * H + column
    gate = row * G * H + column
    per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
    sums = ()
    if LEARNED > 0:
        sums = load_tiles(dunits + top * H, size, at, mask, REAL, LEARNED)
    arrived = tl.load(back + top * H + at, mask=mask, other=0.0).to(REAL)
    if OPERAND_GRAD is not None:  # noqa: SIM102 -- as above
        if following >= 0:
            flagged = per_unit + flag_tiles(flags, following, B, top, row, REAL, FLAGS)
            met, parts = OPERAND_GRAD((arrived,), flagged)
            arrived = met[0]
            sums = add_tiles(sums, parts, LEARNED)
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
    dx_part, dh_part, past, parts = GRAD(dnew, new, state, kept, extra, column < H, H)
    sums = add_tiles(sums, parts, LEARNED)

    store_tiles(dxg + here * G * H, H, gate, mask, dx_part, 0, G)
    if dhg is not None:
        store_tiles(dhg + here * G * H, H, gate, mask, dh_part, 0, G)
    store_tiles(dh + top * H, size, at, mask, past, 0, 1)
    store_tiles(dothers + top * H, size, at, mask, past, 1, S - 1)
    if LEARNED > 0:
        store_tiles(dunits + top * H, size, at, mask, sums, 0, LEARNED)
