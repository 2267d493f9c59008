"""A cell's auxiliary inputs as tiles: the Triton form of kernels/cuda/cell_inputs.cuh.

`row` [rows, 1] and `column` [1, columns] count from `top` and from 0; `units` [N, R, H] has R = B rows, or one.
"""

import triton
import triton.language as tl


@triton.jit
def unit_tiles(units, R, top, row, column, mask, H, N: tl.constexpr):
    tiles = ()
    for n in tl.static_range(N):
        b = tl.where(R > 1, top + row, 0 * row)
        tiles = tiles + (tl.load(units + (n * R + b) * H + column, mask=mask, other=0.0),)
    return tiles


@triton.jit
def flag_tiles(flags, t, B, top, row, REAL: tl.constexpr, N: tl.constexpr):
    tiles = ()
    if N > 0:
        bits = tl.load(flags + t * B.to(tl.int64) + top + row, mask=row < B - top, other=0).to(tl.int32)
        for n in tl.static_range(N):
            tiles = tiles + (((bits >> n) & 1).to(REAL),)
    return tiles


@triton.jit
def key_of(seed, N: tl.constexpr):
    return tl.load(seed).to(tl.uint64) if N > 0 else 0


@triton.jit
def uniform_tiles(key, t, top, row, column, REAL: tl.constexpr, N: tl.constexpr):
    tiles = ()
    if N > 0:
        shape = (row + column) * 0
        b = (top + row).to(tl.int32) + shape
        for group in tl.static_range((N + 3) // 4):
            words = tl.philox(key, column + shape, b, shape + t.to(tl.int32), shape + group)
            for i in tl.static_range(4):
                if group * 4 + i < N:
                    tiles = tiles + ((words[i] >> 8).to(REAL) * 5.9604644775390625e-8,)
    return tiles
