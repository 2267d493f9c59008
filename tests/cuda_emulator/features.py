"""What the kernels of features.cu must compute, on the host and on a GPU alike.

    for name, check in CHECKS.items():
        check(launch)

`launch(name, grid, block, args, *, shared=0, cluster=(1, 1, 1))` runs a kernel on NumPy arrays, which it
changes in place, and waits for its end. A check raises AssertionError. Its name is that of its kernel. Those
in HOPPER need sm_90."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

SOURCE = Path(__file__).with_suffix(".cu")

Array = NDArray[Any]
Size = tuple[int, int, int]


class Launch(Protocol):
    def __call__(
        self,
        name: str,
        grid: Size,
        block: Size,
        args: Sequence[Any],
        *,
        shared: int = 0,
        cluster: Size = (1, 1, 1),
    ) -> None: ...


CHECKS: dict[str, Callable[[Launch], None]] = {}
HOPPER: set[str] = set()


def _feature(check: Callable[[Launch], None]) -> Callable[[Launch], None]:
    CHECKS[check.__name__] = check
    return check


def _hopper(check: Callable[[Launch], None]) -> Callable[[Launch], None]:
    HOPPER.add(check.__name__)
    return _feature(check)


def _poisoned(shape: int | tuple[int, ...], dtype: DTypeLike) -> Array:
    """An array of 0xff bytes: NaN, or a number that no check expects."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


def _random(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def _equal(actual: Array, expected: Any) -> None:
    expected = np.asarray(expected).astype(actual.dtype)
    np.testing.assert_array_equal(actual, expected.reshape(actual.shape) if expected.size > 1 else expected)


# ---- 16-bit and tf32 numbers as bits -----------------------------------------------------------------------


def to_bf16(x: Array) -> Array:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_f16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def from_f16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_tf32(x: Array) -> Array:
    """float32 to tf32 in 32 bits, to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32)


def from_tf32(bits: Array) -> Array:
    return bits.view(np.float32)


# ---- Fragment layouts --------------------------------------------------------------------------------------
#
# Where element i of lane l lies in its matrix, after the PTX ISA, chapter "Warp Level Matrix
# Multiply-Accumulate Instructions", there with groupID = laneid >> 2 and threadID_in_group = laneid % 4.
# Written down from those formulas, not from collectives.cpp. Elements are numbered as there: two 16-bit
# elements to a register, the even one in the low half.

Layout = Callable[[int, int], tuple[int, int]]  # (lane, element) -> (row, column)


# "Matrix Fragments for mma.m16n8k16 with floating point type", .f16 and .bf16.
def a_16x16(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if 0 <= i < 2 or 4 <= i < 6 else lane // 4 + 8
    column = lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def b_16x8(lane: int, i: int) -> tuple[int, int]:
    row = lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8)
    return row, lane // 4


def c_16x8(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i < 2 else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1)


# "Matrix Fragments for mma.m16n8k8", .tf32; its C and D are those of m16n8k16.
def a_16x8_tf32(lane: int, i: int) -> tuple[int, int]:
    row = lane // 4 if i in (0, 2) else lane // 4 + 8
    column = lane % 4 if i in (0, 1) else lane % 4 + 4
    return row, column


def b_8x8_tf32(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4 if i == 0 else lane % 4 + 4), lane // 4


# "Warp-level matrix load instruction: ldmatrix": of each 8 x 8 matrix, thread T gets elements 2 * (T % 4) and
# the next of row T / 4.
def m_8x8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4, lane % 4 * 2 + i


# (kernel, layout of A, of B, elements per lane of A, of B, depth, to bits, from bits)
_PRODUCTS = {
    "mma_bf16": (a_16x16, b_16x8, 8, 4, 16, to_bf16, from_bf16),
    "mma_f16": (a_16x16, b_16x8, 8, 4, 16, to_f16, from_f16),
    "mma_tf32": (a_16x8_tf32, b_8x8_tf32, 4, 2, 8, to_tf32, from_tf32),
}


def _fragments(matrices: Array, layout: Layout, elements: int) -> Array:
    """[n, rows, columns] to [n, 32, elements]."""
    places = [[layout(lane, i) for i in range(elements)] for lane in range(32)]
    rows, columns = np.moveaxis(np.array(places), -1, 0)
    return matrices[:, rows, columns]


def _registers(fragments: Array) -> Array:
    """Fragments as the 32-bit registers that hold them."""
    return np.ascontiguousarray(fragments).view(np.uint32)


def _one_hot(rows: int, columns: int) -> Array:
    """All [rows, columns] matrices with a single 1."""
    return np.eye(rows * columns, dtype=np.float32).reshape(-1, rows, columns)


def _check_mma(launch: Launch, name: str) -> None:
    a_layout, b_layout, a_elements, b_elements, depth, encode, decode = _PRODUCTS[name]
    # One-hot A times a B of distinct numbers shows where each element of A went, and the other way round. All
    # numbers are integers that every type holds exactly. The last case is random, with a C.
    a_all = np.arange(1, 16 * depth + 1, dtype=np.float32).reshape(1, 16, depth)
    b_all = np.arange(1, depth * 8 + 1, dtype=np.float32).reshape(1, depth, 8)
    a_ones, b_ones = _one_hot(16, depth), _one_hot(depth, 8)
    a = np.concatenate([a_ones, np.repeat(a_all, len(b_ones), 0), _random(1, 16, depth)])
    b = np.concatenate([np.repeat(b_all, len(a_ones), 0), b_ones, 2 * _random(1, depth, 8)])
    c = np.concatenate([np.zeros((len(a) - 1, 16, 8), np.float32), _random(1, 16, 8)])
    a_bits, b_bits = encode(a), encode(b)
    d = _poisoned((len(a), 32, 4), np.float32)
    args = [
        _registers(_fragments(a_bits, a_layout, a_elements)),
        _registers(_fragments(b_bits, b_layout, b_elements)),
        np.ascontiguousarray(_fragments(c, c_16x8, 4)),
        d,
    ]
    launch(name, (len(a), 1, 1), (32, 1, 1), args)
    exact = decode(a_bits).astype(np.float64) @ decode(b_bits).astype(np.float64) + c
    expected = _fragments(exact, c_16x8, 4)
    _equal(d[:-1], expected[:-1])
    np.testing.assert_allclose(d[-1], expected[-1], rtol=1e-5, atol=1e-5)


@_feature
def mma_bf16(launch: Launch) -> None:
    _check_mma(launch, "mma_bf16")


@_feature
def mma_f16(launch: Launch) -> None:
    _check_mma(launch, "mma_f16")


@_feature
def mma_tf32(launch: Launch) -> None:
    _check_mma(launch, "mma_tf32")


@_feature
def ldmatrix(launch: Launch) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    loaded = _poisoned((2, 32, 4), np.uint32)
    launch("ldmatrix", (1, 1, 1), (32, 1, 1), [matrices, loaded])
    for n, count in enumerate((2, 4)):
        for m in range(count):
            _equal(loaded[n, :, m : m + 1], _registers(_fragments(matrices[m][None], m_8x8, 2)))
        assert (loaded[n, :, count:] == 0xFFFFFFFF).all()


# ---- Warps -------------------------------------------------------------------------------------------------


@_feature
def shuffles(launch: Launch) -> None:
    x = np.random.default_rng(1).integers(-1000, 1000, 64).astype(np.int32)
    y = _poisoned((13, 2, 32), np.int32)
    launch("shuffles", (1, 1, 1), (64, 1, 1), [x, y])
    lane = np.arange(32)
    for warp in range(2):
        v = x.reshape(2, 32)[warp]
        ballot = np.uint32(sum(1 << int(i) for i in lane if v[i] & 1)).astype(np.int32)
        expected = [
            v[(32 * warp + lane) * 5 % 32],
            v[lane ^ 9],
            np.where(lane + 3 < 32, v[(lane + 3) % 32], v),
            np.where(lane % 8 >= 3, v[lane - 3], v),
            ballot,
            (v == x[7]).any(),
            (v > x[7]).all(),
            v.sum(),
            v.min(),
            v.view(np.uint32).max().astype(np.int32),
            np.bitwise_xor.reduce(v),
            np.where(lane < 16, v[lane ^ 1], v[lane ^ 2]),
            v.sum(),
        ]
        _equal(y[:, warp], [np.broadcast_to(row, 32) for row in expected])


@_feature
def warp_exchange(launch: Launch) -> None:
    x, rounds = np.arange(32, dtype=np.float32), 5
    y = _poisoned(32, np.float32)
    launch("warp_exchange", (1, 1, 1), (32, 1, 1), [x, y, np.int32(rounds)])
    _equal(y, np.roll(x, -rounds) + rounds)


# ---- Numbers -----------------------------------------------------------------------------------------------


@_feature
def numbers(launch: Launch) -> None:
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, 2049, 65519])
    special = np.array([0, 1, 1e-6, 3e-5, 1e-8, 65504, 1e30, np.inf])
    x = np.concatenate([special, halfway, 3 * _random(105)]).astype(np.float32)
    x = np.concatenate([x, -x])
    n = len(x)
    y = _poisoned((5, n), np.uint32)
    launch("numbers", ((n + 63) // 64, 1, 1), (64, 1, 1), [x, y, np.int32(n)])
    _equal(y[0], from_bf16(to_bf16(x)).view(np.uint32))
    _equal(y[1], from_f16(to_f16(x)).view(np.uint32))
    _equal(y[2][np.isfinite(x)], to_tf32(x)[np.isfinite(x)])
    np.testing.assert_allclose(y[3].view(np.float32), np.tanh(x), rtol=2**-10, atol=1e-7)
    _equal(y[4], x.view(np.uint32))


# ---- Blocks ------------------------------------------------------------------------------------------------


@_feature
def block_sum(launch: Launch) -> None:
    x = np.arange(3 * 128, dtype=np.float32)
    total, count = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    launch("block_sum", (3, 1, 1), (128, 1, 1), [x, total, count], shared=64)
    _equal(total, x.sum())
    _equal(count, len(x))


@_feature
def named_barriers(launch: Launch) -> None:
    y, rounds = _poisoned((2, 64), np.float32), 5
    launch("named_barriers", (1, 1, 1), (128, 1, 1), [y, np.int32(rounds)])
    v = np.arange(128).reshape(2, 64)
    _equal(y, [v[0, ::-1] + rounds, v[1] + 2 * rounds])


# ---- The grid ----------------------------------------------------------------------------------------------


@_feature
def flag_in_data(launch: Launch) -> None:
    blocks, rounds = 3, 5
    y = _poisoned((blocks, 32), np.uint32)
    slots = np.zeros((2, blocks, 32, 4), np.uint32)
    launch("flag_in_data", (blocks, 1, 1), (32, 1, 1), [slots, y, np.int32(rounds)])
    v = np.arange(blocks * 32, dtype=np.uint32).reshape(blocks, 32)
    for _ in range(rounds):
        v = v + np.roll(v, -1, 1).sum(0, dtype=np.uint32)
    _equal(y, v)


@_feature
def handed_down(launch: Launch) -> None:
    blocks, rounds = 4, 6
    y, words = _poisoned((blocks, 32), np.uint32), np.zeros((blocks, rounds, 32, 2), np.uint32)
    launch("handed_down", (blocks, 1, 1), (32, 1, 1), [words, y, np.int32(rounds)])
    got = np.arange(32)
    for rank in range(blocks):
        _equal(y[rank], got * sum(range(1, rounds + 1)))
        got = np.roll(got + 1, -1)


# ---- Clusters ----------------------------------------------------------------------------------------------


@_hopper
def async_stores(launch: Launch) -> None:
    blocks, cluster, rounds = 8, 4, 5
    y = _poisoned((blocks, 32), np.uint32)
    args = [y, np.int32(cluster), np.int32(rounds)]
    launch("async_stores", (blocks, 1, 1), (32, 1, 1), args, cluster=(cluster, 1, 1))
    v = np.arange(blocks * 32, dtype=np.uint32).reshape(blocks // cluster, cluster, 32)
    for _ in range(rounds):
        received = (4 * v[..., :16] + 6 + v[..., 16:]).sum(1, dtype=np.uint32)
        v = v + np.tile(received, 2)[:, None]
    _equal(y, v)
