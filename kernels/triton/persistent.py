"""A whole sequence of any cell in one launch, for hidden sizes whose recurrent weights one program can hold.

A program owns 16 rows of the batch, the least that tensor cores multiply, and all H units of them: it never waits
for another one. The recurrent weights are read from global memory once and stay on-chip as G square tiles; the
states stay in registers. Per time step a program reads the input projection, which depends on nothing and is therefore
loaded ahead, and writes what the caller and the backward pass need. Backwards the same, the gradients of the states in
registers; dW, dR, dx and db are large matmuls afterwards.

Compared with a matmul and a launch per time step, a time step costs about as much as its arithmetic on one
multiprocessor, G matmuls of [16, H] by [H, H] and a dozen barriers, instead of two launches.

Limits: tiles are padded to a power of two, TILE >= H, so that the weights take G * TILE^2 elements on-chip; see
`config.py` for what fits. float32 and half precision; matmul inputs are rounded to the storage dtype, as everywhere.
T and B are plain arguments: a new length or batch compiles nothing. Offsets to a time step or a row are int64.

What is written in place, `saved` over `Wx` and states at the end over those at the beginning, may have been read by
another thread. The matmuls lie between: none of them begins before all threads have come to it.
"""

import triton
import triton.language as tl

from .cell_inputs import flag_tiles, key_of, uniform_tiles, unit_tiles
from .tiles import add_tiles, load_tiles, store_tiles


@triton.jit
def load_weights(w_hh, unit, source, H: tl.constexpr, G: tl.constexpr):
    """w_hh [G*H, H], rows `unit`, columns `source`, as G tiles; `unit` and `source` broadcast to a tile."""
    weights = ()
    for g in tl.static_range(G):
        at = w_hh + (g * H + unit) * H + source
        weights = weights + (tl.load(at, mask=(unit < H) & (source < H), other=0.0),)
    return weights


@triton.jit(do_not_specialize=["T", "B", "R", "reverse"])
def forward_kernel(
    Wx,  # [T, B, G, H] storage; input projection, b_ih included
    w_hh,  # [G*H, H] storage
    b_hh,  # [G, H] storage, or None
    h0,  # [B, H] storage
    cell_states,  # [T+1, S-1, B, H] float32; reads the first index, writes the others; or [1, ...], updated in place
    saved,  # [T, B, K, H] storage, written, or None; may be Wx itself
    y,  # [T, B, H] storage, written; every h
    units, flags, seed,  # [N, R, H] float32, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    T, B, R, reverse,
    STEP: tl.constexpr, REDUCE: tl.constexpr, REDUCTION_COUNTS: tl.constexpr, RECURRENT_INPUT: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_UNIT: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, H: tl.constexpr,
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
    per_unit = unit_tiles(units, R, top, row, column, mask, H, PER_UNIT)
    key = key_of(seed, UNIFORMS)
    t = reverse * (T - 1)
    first = t + reverse if saved is not None else 0
    state = load_tiles(h0 + top * H, B * H, at, mask, tl.float32, 1)
    state = state + load_tiles(cell_states + (first * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)

    for _ in tl.range(0, T, num_stages=STAGES):
        here = t * B + top  # the row among those of all time steps
        x_gates = load_tiles(Wx + here * G * H, H, row * G * H + column, mask, tl.float32, G)
        extra = per_unit + flag_tiles(flags, t, B, top, row, tl.float32, FLAGS)
        h_in = RECURRENT_INPUT((state[0],), extra)
        h = tl.where(column < H, h_in[0][0], 0.0).to(w_hh.dtype.element_ty)  # NaN in the padding times zero is NaN
        h_gates = ()
        for g in tl.static_range(G):
            h_gates = h_gates + (tl.dot(h, weights[g], bias[g], input_precision=PRECISION),)
        extra = extra + uniform_tiles(key, t, top, row, column, tl.float32, UNIFORMS)
        means = ()
        for level in tl.static_range(len(REDUCTION_COUNTS)):
            means = means + REDUCE(level, x_gates, h_gates, state, extra, means, column < H, H)
        state, saved_values = STEP(x_gates, h_gates, state, extra, means)
        store_tiles(y + here * H, 0, at, mask, state, 0, 1)
        if saved is not None:
            state_out = t + 1 - reverse
            store_tiles(cell_states + (state_out * (S - 1) * B + top) * H, B * H, at, mask, state, 1, S - 1)
            store_tiles(saved + here * K * H, H, row * K * H + column, mask, saved_values, 0, K)
        t += 1 - 2 * reverse

    if saved is None:
        store_tiles(cell_states + top * H, B * H, at, mask, state, 1, S - 1)


@triton.jit(do_not_specialize=["T", "B", "R", "reverse"])
def backward_kernel(
    w_hh,  # [G*H, H] storage
    dy,  # [T, B, H] storage
    dh,  # [B, H] float32; gradient of h after the sequence, becomes that of h0
    dcell_states,  # [S-1, B, H] float32; the same of the cell states
    y,  # [T, B, H] storage; every h
    h0,  # [B, H] storage
    cell_states,  # [T+1, S-1, B, H] float32
    saved,  # [T, B, K, H] storage
    dWx,  # [T, B, G, H] storage, written
    dRh,  # [T, B, G, H] storage, written, or None where it equals dWx
    dhistory,  # [T, S-1, B, H] storage; gradients of the cell states after each time step, or None for zero
    dunits,  # [trainable, B, H] float32, added to
    units, flags, seed,  # [N, R, H] float32, [T, B] uint8, [1] int64, or None: see cell_inputs.py
    T, B, R, reverse,
    GRAD: tl.constexpr, REDUCE: tl.constexpr, REDUCTION_COUNTS: tl.constexpr, RECURRENT_INPUT_GRAD: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PER_UNIT: tl.constexpr, FLAGS: tl.constexpr, UNIFORMS: tl.constexpr, TRAINABLE: tl.constexpr, H: tl.constexpr,
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
    per_unit = unit_tiles(units, R, top, row, column, mask, H, PER_UNIT)
    key = key_of(seed, UNIFORMS)
    if TRAINABLE > 0:
        sums = load_tiles(dunits + top * H, B * H, at, mask, tl.float32, TRAINABLE)
    t = (1 - reverse) * (T - 1)
    dstate = load_tiles(dh + top * H, 0, at, mask, tl.float32, 1)  # of the states, by the later time steps
    dstate = dstate + load_tiles(dcell_states + top * H, B * H, at, mask, tl.float32, S - 1)

    for i in tl.range(0, T, num_stages=STAGES):
        here = t * B + top  # the row among those of all time steps
        t_prev = t + 2 * reverse - 1
        state_in = t + reverse
        state_out = t + 1 - reverse
        dnew = (dstate[0] + tl.load(dy + here * H + at, mask=mask, other=0.0).to(tl.float32),)
        for s in tl.static_range(1, S):
            arrived = dstate[s]
            if dhistory is not None:
                where = dhistory + ((t * (S - 1) + s - 1) * B + top) * H + at
                arrived += tl.load(where, mask=mask, other=0.0).to(tl.float32)
            dnew = dnew + (arrived,)
        new = load_tiles(y + here * H, 0, at, mask, tl.float32, 1)
        new = new + load_tiles(cell_states + (state_out * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)
        h_prev = tl.where(i == T - 1, h0, y + t_prev * B * H)
        state = load_tiles(h_prev + top * H, 0, at, mask, tl.float32, 1)
        state = state + load_tiles(cell_states + (state_in * (S - 1) * B + top) * H, B * H, at, mask, tl.float32, S - 1)
        saved_values = load_tiles(saved + here * K * H, H, row * K * H + column, mask, tl.float32, K)

        extra = per_unit + flag_tiles(flags, t, B, top, row, tl.float32, FLAGS)
        drawn = uniform_tiles(key, t, top, row, column, tl.float32, UNIFORMS)
        means = ()
        for level in tl.static_range(len(REDUCTION_COUNTS)):
            means = means + REDUCE(level, dnew, new, state, saved_values, extra + drawn, means, column < H, H)
        dx_gates, dh_gates, dbefore, parts = GRAD(dnew, new, state, saved_values, extra + drawn, means)
        if TRAINABLE > 0:
            sums = add_tiles(sums, parts, TRAINABLE)

        store_tiles(dWx + here * G * H, H, gate, mask, dx_gates, 0, G)
        if dRh is not None:
            store_tiles(dRh + here * G * H, H, gate, mask, dh_gates, 0, G)
        dh_prev = tl.zeros([ROWS, TILE], tl.float32)
        if RECURRENT_INPUT_GRAD is None:
            dh_prev += dbefore[0]
        for g in tl.static_range(G):
            da = tl.where(inside, dh_gates[g], 0.0).to(w_hh.dtype.element_ty)  # a plain number where h isn't read
            dh_prev = tl.dot(da, weights[g], dh_prev, input_precision=PRECISION)
        if RECURRENT_INPUT_GRAD is not None:
            dh_in, parts = RECURRENT_INPUT_GRAD((dh_prev,), extra)
            dh_prev = dh_in[0] + dbefore[0]
            if TRAINABLE > 0:
                sums = add_tiles(sums, parts, TRAINABLE)
        dstate = (dh_prev,)
        for s in tl.static_range(1, S):
            dstate = dstate + (tl.zeros([ROWS, TILE], tl.float32) + dbefore[s],)
        t = t_prev

    store_tiles(dh + top * H, 0, at, mask, dstate, 0, 1)
    store_tiles(dcell_states + top * H, B * H, at, mask, dstate, 1, S - 1)
    if TRAINABLE > 0:
        store_tiles(dunits + top * H, B * H, at, mask, sums, 0, TRAINABLE)
