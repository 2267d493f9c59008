"""One instant of any cell in one launch: everything but the products.

The recurrent product of this instant, R h_{t-1}, has been made by a library; the kernel adds the input part, runs the
cell's page and writes states, outputs and what the gradient needs; the mirror of it backwards. It reads and writes
every element once, so its time is that of the memory, or of the launch. A program owns a tile of rows and hidden
units; nothing is shared between programs.

T and B are plain arguments: a new length or batch compiles nothing. Offsets to an instant or a row are int64.
"""

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["t", "before", "after", "B"])
def step_kernel(
    xg,  # [T, B, G, H] storage; input part, b_ih included
    hg,  # [B, G, H] product; recurrent part of this instant, without b_hh
    b_hh,  # [G, H] storage, or None
    h,  # [B, H] real; the h that the cell itself sees, updated in place
    others,  # [boundaries, S-1, B, H] real; reads boundary `before`, writes `after`
    saved,  # [T, B, K, H] storage, written, or None; may be xg itself
    y,  # [T, B, H] storage, written; h after
    t, before, after, B, H,
    STEP: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr,
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

    new, kept = STEP(x_part, h_part, state)

    store_tiles(h + top * H, size, at, mask, new, 0, 1)
    store_tiles(y + here * H, size, at, mask, new, 0, 1)
    store_tiles(others + after * size * (S - 1) + top * H, size, at, mask, new, 1, S - 1)
    if saved is not None:
        store_tiles(saved + here * K * H, H, row * K * H + column, mask, kept, 0, K)


@triton.jit(do_not_specialize=["t", "previous", "before", "after", "B"])
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
    t, previous, before, after, B, H,
    GRAD: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr, REAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    top, row, column, mask = tile(B, H, BLOCK_B, BLOCK_H)
    size = B.to(tl.int64) * H
    here = t * B.to(tl.int64) + top  # the row among those of all instants
    at = row * H + column
    gate = row * G * H + column
    arrived = tl.load(dh + top * H + at, mask=mask, other=0.0)
    arrived += tl.load(back + top * H + at, mask=mask, other=0.0).to(REAL)
    if dy is not None:
        arrived += tl.load(dy + here * H + at, mask=mask, other=0.0).to(REAL)
    dnew = (arrived,) + load_tiles(dothers + top * H, size, at, mask, REAL, S - 1)
    new = load_tiles(y + here * H, size, at, mask, REAL, 1)
    new = new + load_tiles(others + after * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    seen = tl.where(previous < 0, h0, y + previous * size)
    state = load_tiles(seen + top * H, size, at, mask, REAL, 1)
    state = state + load_tiles(others + before * size * (S - 1) + top * H, size, at, mask, REAL, S - 1)
    kept = load_tiles(saved + here * K * H, H, row * K * H + column, mask, REAL, K)

    dx_part, dh_part, past = GRAD(dnew, new, state, kept)

    store_tiles(dxg + here * G * H, H, gate, mask, dx_part, 0, G)
    if dhg is not None:
        store_tiles(dhg + here * G * H, H, gate, mask, dh_part, 0, G)
    store_tiles(dh + top * H, size, at, mask, past, 0, 1)
    store_tiles(dothers + top * H, size, at, mask, past, 1, S - 1)
