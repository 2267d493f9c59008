"""A whole sequence of any cell in one launch, for hidden sizes whose recurrent weights one program can hold.

A program owns 16 rows of the batch, the least that a tensor-core product takes, and all H units of them: it never waits
for another one. The recurrent weights are read from global memory once and stay on the chip as G square tiles; the
states stay in registers. Per time step a program reads the input projection, which depends on nothing and is therefore
loaded ahead, and writes what the caller and the backward pass need. Backwards the same, the gradients of the states in
registers; dW, dR, dx and db are large products that come afterwards.

Compared with a product and a launch per time step, a time step costs about as much as its arithmetic on one
multiprocessor, G products of [16, H] by [H, H] and a dozen barriers, instead of two launches.

Limits: tiles are padded to a power of two, TILE >= H, so that the weights take G * TILE^2 elements on the chip; see
`config.py` for what fits. float32 and half precision; matmul inputs are rounded to the storage dtype, as everywhere.
T and B are plain arguments: a new length or batch compiles nothing. Offsets to a time step or a row are int64.

What is written in place, `saved` over `xg` and states at the end over those at the beginning, may have been read by
another thread. The products lie between: none of them begins before all threads have come to it.
"""

import triton
import triton.language as tl

from .cell_inputs import flag_tiles, key_of, uniform_tiles, unit_tiles
from .tiles import add_tiles, load_tiles, store_tiles


@triton.jit
def load_weights(w_hh, unit, seen, H: tl.constexpr, G: tl.constexpr):
    """w_hh [G*H, H], rows `unit`, columns `seen`, as G tiles; `unit` and `seen` broadcast to a tile."""
    weights = ()
    for g in tl.static_range(G):
        at = w_hh + (g * H + unit) * H + seen
        weights = weights + (tl.load(at, mask=(unit < H) & (seen < H), other=0.0),)
    return weights


@triton.jit(do_not_specialize=["T", "B", "R", "reverse"])
def forward_kernel(
    xg,  # [T, B, G, H] storage; input projection, b_ih included
    w_hh,  # [G*H, H] storage
    b_hh,  # [G, H] storage, or None
    h0,  # [B, H] storage
    others,  # [T+1, S-1, B, H] float32; reads the first boundary, writes the later ones; or [1, ...], updated in place
    saved,  # [T, B, K, H] storage, written, or None; may be xg itself
    y,  # [T, B, H] storage, written; every h
    units, flags, seed,  # [N, R, H] float32, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    T, B, R, reverse,
    STEP: tl.constexpr, LEVEL: tl.constexpr, MEANS: tl.constexpr, OPERAND: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    top = tl.program_id(0).to(tl.int64) * ROWS  # int64; the rest is small, and each thread has many of them
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TILE)[None, :]
    mask = (row < B - top) & (column < H)
    at = row * H + column
    weights = load_weights(w_hh, column, tl.arange(0, TILE)[:, None], H, G)
    bias = ()
    for g in tl.static_range(G):
        tile = tl.zeros([ROWS, TILE], tl.float32)
        if b_hh is not None:
            tile += tl.load(b_hh + g * H + column, mask=column < H, other=0.0).to(tl.float32)
        bias = bias + (tile,)
    B = B.to(tl.int64)
    per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
    key = key_of(seed, UNIFORMS)
    t = reverse * (T - 1)
    first = t + reverse if saved is not None else 0
    state = load_tiles(h0 + top * H, B * H, at, mask, tl.float32, 1)
    state = state + load_tiles(others + (first * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)

    for _ in tl.range(0, T, num_stages=STAGES):
        here = t * B + top  # the row among those of all time steps
        x_part = load_tiles(xg + here * G * H, H, row * G * H + column, mask, tl.float32, G)
        extra = per_unit + flag_tiles(flags, t, B, top, row, tl.float32, FLAGS)
        seen = OPERAND((state[0],), extra)
        h = tl.where(column < H, seen[0][0], 0.0).to(w_hh.dtype.element_ty)  # NaN in the padding would meet zeros: NaN
        h_part = ()
        for g in tl.static_range(G):
            h_part = h_part + (tl.dot(h, weights[g], bias[g], input_precision=PRECISION),)
        extra = extra + uniform_tiles(key, t, top, row, column, tl.float32, UNIFORMS)
        means = ()
        for level in tl.static_range(len(MEANS)):
            means = means + LEVEL(level, x_part, h_part, state, extra, means, column < H, H)
        state, kept = STEP(x_part, h_part, state, extra, means)
        store_tiles(y + here * H, 0, at, mask, state, 0, 1)
        if saved is not None:
            after = t + 1 - reverse
            store_tiles(others + (after * (S - 1) * B + top) * H, B * H, at, mask, state, 1, S - 1)
            store_tiles(saved + here * K * H, H, row * K * H + column, mask, kept, 0, K)
        t += 1 - 2 * reverse

    if saved is None:
        store_tiles(others + top * H, B * H, at, mask, state, 1, S - 1)


@triton.jit(do_not_specialize=["T", "B", "R", "reverse"])
def backward_kernel(
    w_hh,  # [G*H, H] storage
    dy,  # [T, B, H] storage
    dh,  # [B, H] float32; gradient of h after the sequence, becomes that of h0
    dothers,  # [S-1, B, H] float32; the same of the other states
    y,  # [T, B, H] storage; every h
    h0,  # [B, H] storage
    others,  # [T+1, S-1, B, H] float32
    saved,  # [T, B, K, H] storage
    dxg,  # [T, B, G, H] storage, written
    dhg,  # [T, B, G, H] storage, written, or None where it equals dxg
    dhistory,  # [T, S-1, B, H] storage; gradients of the other states after each time step, or None for zero
    dunits,  # [learned, B, H] float32, added to
    units, flags, seed,  # [N, R, H] float32, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    T, B, R, reverse,
    GRAD: tl.constexpr, LEVEL: tl.constexpr, MEANS: tl.constexpr, OPERAND_GRAD: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    UNITS: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, LEARNED: tl.constexpr, H: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    top = tl.program_id(0).to(tl.int64) * ROWS  # int64; the rest is small, and each thread has many of them
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, TILE)[None, :]
    mask = (row < B - top) & (column < H)
    at = row * H + column
    inside = (row < ROWS) & (column < H)  # a whole tile
    gate = row * G * H + column
    weights = load_weights(w_hh, tl.arange(0, TILE)[:, None], column, H, G)
    B = B.to(tl.int64)
    per_unit = unit_tiles(units, R, top, row, column, mask, H, UNITS)
    key = key_of(seed, UNIFORMS)
    if LEARNED > 0:
        sums = load_tiles(dunits + top * H, B * H, at, mask, tl.float32, LEARNED)
    t = (1 - reverse) * (T - 1)
    dstate = load_tiles(dh + top * H, 0, at, mask, tl.float32, 1)  # of the states, by the later time steps
    dstate = dstate + load_tiles(dothers + top * H, B * H, at, mask, tl.float32, S - 1)

    for i in tl.range(0, T, num_stages=STAGES):
        here = t * B + top  # the row among those of all time steps
        previous = t + 2 * reverse - 1
        before = t + reverse
        after = t + 1 - reverse
        dnew = (dstate[0] + tl.load(dy + here * H + at, mask=mask, other=0.0).to(tl.float32),)
        for s in tl.static_range(1, S):
            arrived = dstate[s]
            if dhistory is not None:
                where = dhistory + ((t * (S - 1) + s - 1) * B + top) * H + at
                arrived += tl.load(where, mask=mask, other=0.0).to(tl.float32)
            dnew = dnew + (arrived,)
        new = load_tiles(y + here * H, 0, at, mask, tl.float32, 1)
        new = new + load_tiles(others + (after * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)
        seen = tl.where(i == T - 1, h0, y + previous * B * H)
        state = load_tiles(seen + top * H, 0, at, mask, tl.float32, 1)
        state = state + load_tiles(others + (before * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)
        kept = load_tiles(saved + here * K * H, H, row * K * H + column, mask, tl.float32, K)

        extra = per_unit + flag_tiles(flags, t, B, top, row, tl.float32, FLAGS)
        drawn = uniform_tiles(key, t, top, row, column, tl.float32, UNIFORMS)
        means = ()
        for level in tl.static_range(len(MEANS)):
            means = means + LEVEL(level, dnew, new, state, kept, extra + drawn, means, column < H, H)
        dx_part, dh_part, past, parts = GRAD(dnew, new, state, kept, extra + drawn, means)
        if LEARNED > 0:
            sums = add_tiles(sums, parts, LEARNED)

        store_tiles(dxg + here * G * H, H, gate, mask, dx_part, 0, G)
        if dhg is not None:
            store_tiles(dhg + here * G * H, H, gate, mask, dh_part, 0, G)
        back = tl.zeros([ROWS, TILE], tl.float32)
        if OPERAND_GRAD is None:
            back += past[0]
        for g in tl.static_range(G):
            da = tl.where(inside, dh_part[g], 0.0).to(w_hh.dtype.element_ty)  # a plain number where h isn't read
            back = tl.dot(da, weights[g], back, input_precision=PRECISION)
        if OPERAND_GRAD is not None:
            dh_in, parts = OPERAND_GRAD((back,), extra)
            back = dh_in[0] + past[0]
            if LEARNED > 0:
                sums = add_tiles(sums, parts, LEARNED)
        dstate = (back,)
        for s in tl.static_range(1, S):
            dstate = dstate + (tl.zeros([ROWS, TILE], tl.float32) + past[s],)
        t = previous

    store_tiles(dh + top * H, 0, at, mask, dstate, 0, 1)
    store_tiles(dothers + top * H, B * H, at, mask, dstate, 1, S - 1)
    if LEARNED > 0:
        store_tiles(dunits + top * H, B * H, at, mask, sums, 0, LEARNED)
