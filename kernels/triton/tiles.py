"""Tiles as a cell wants them: tuples of [rows, columns], batch rows by hidden units, one per gate or state."""

import triton
import triton.language as tl


@triton.jit
def load_tiles(first, stride, offsets, mask, REAL: tl.constexpr, N: tl.constexpr):
    """N tiles that lie `stride` elements apart, converted to what is computed in; 0 outside the mask."""
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (tl.load(first + k * stride + offsets, mask=mask, other=0.0).to(REAL),)
    return tiles


@triton.jit
def store_tiles(first, stride, offsets, mask, tiles, FROM: tl.constexpr, N: tl.constexpr):
    """The tiles from number FROM on, N of them; converted to the array's dtype. A plain number fills its tile."""
    for k in tl.static_range(N):
        tl.store(first + k * stride + offsets, tiles[FROM + k], mask=mask)


@triton.jit
def add_tiles(a, b, N: tl.constexpr):
    """Tiles plus tiles, or plain numbers."""
    sums = ()
    for k in tl.static_range(N):
        sums = sums + (a[k] + b[k],)
    return sums
