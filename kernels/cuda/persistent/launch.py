"""Describe the kernel launches of a configuration of persistent.cu, as data; the CUDA backend launches them."""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...cells import Cell
from ..launch import C_TYPES, HERE, Launch, Unit, unit
from .config import PersistentConfig

KERNELS = HERE / "persistent.cu"
HEADERS = tuple(
    HERE / name for name in ("persistent_params.cuh", "matmul_tile.cuh", "unit_reduction.cuh", "persistent_block.cuh")
)
MAX_EXCHANGE_BYTES = 256 << 20  # between the layers of a wavefront; longer sequences are cut over time


class Instance(NamedTuple):
    """What a direction, or a layer of a wavefront, has for itself."""

    addresses: tuple[int, ...]  # of the kernel's arrays, in its order
    reverse: bool


def translation_unit(config: PersistentConfig, cell: Cell, dtype: str, only: str | None = None) -> Unit:
    """The kernels of a configuration. only: "exchange" or "product", what a time step spends on it, for benchmarks."""
    profile = {"PROFILE_ONLY": only.upper()} if only else {}
    return unit(KERNELS, cell, {"SCALAR": C_TYPES[dtype], **config.defines(), **profile}, HEADERS)


def kernel_name(config: PersistentConfig) -> str:
    return "persistent_backward" if config.backward else "persistent_forward"


def launches(
    config: PersistentConfig, cell: Cell, dtype: str, T: int, B: int, H: int, R: int,
    *, save: bool, only: str | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """The whole sequence, in `config.launches` parts of the batch.

    Each launch takes two more arguments at the end: `kernel_params` of the instances, and the address of
    `config.exchange_bytes(T)` zeros in the grid, else 0. R: batch rows of the per-unit values, B or 1. save: forward,
    whether values are saved for the gradient. only: see `translation_unit`; results are then wrong.
    """
    saving = () if config.backward else (np.int32(save),)
    for part in range(config.launches):
        first_row = part * config.groups * config.rows
        yield Launch(
            translation_unit(config, cell, dtype, only),
            kernel_name(config),
            (config.grid, 1, 1),
            (config.threads, 1, 1),
            (T, np.int32(B), np.int32(H), np.int32(R), np.int32(first_row), *saving),
            shared=config.shared_bytes,
            cluster=(config.blocks if config.scope == "cluster" else 1, 1, 1),
            cooperative=config.scope == "grid",
        )


def kernel_params(instances: Sequence[Instance]) -> np.ndarray:
    """struct KernelParams, by value."""
    words = array("Q", [word for addresses, reverse in instances for word in (*addresses, reverse)])
    return np.frombuffer(words, f"V{8 * len(words)}")


def time_slices(config: PersistentConfig, T: int) -> list[tuple[int, int]]:
    """The time steps, from and to, of each launch, in order of execution: all, unless a wavefront's exchange buffer
    would exceed MAX_EXCHANGE_BYTES."""
    if config.layers == 1:
        return [(0, T)]
    fixed, room = config.exchange_bytes(0), MAX_EXCHANGE_BYTES // config.launches
    most = max(1, (room - fixed) // (config.exchange_bytes(1) - fixed))
    span = -(-T // -(-T // most))
    slices = [(begin, min(begin + span, T)) for begin in range(0, T, span)]
    return slices[::-1] if config.backward else slices
