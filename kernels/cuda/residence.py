"""Where the recurrent weights live for a whole sequence: the launch plans of resident.cu.

A pure function of the problem and of what the driver says about the device. Every plan it gives holds all weights on
the chip, covers every hidden unit and batch row once, and fits the registers and the shared memory of the device; for
a problem without one it says why, and the stepwise kernels take over. Times are predictions, in microseconds a step,
from the constants below; they only rank plans.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..cells import Cell
from .launch import C_TYPES, Launch, Unit, unit

KERNELS = Path(__file__).with_name("resident.cu")
SCOPES = ("block", "cluster", "grid")  # SCOPE 0, 1, 2 of resident.cu
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

UNIT = 16  # rows of an mma: hidden units are dealt out in tiles of so many
ROWS = 8  # its columns: so are batch rows
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, all architectures since sm_70
MOST_REGISTERS = 255  # of a thread
WORK_REGISTERS = 92  # what a thread needs beside weights, sums and elements; compile-only tests hold it against ptxas
LOADING_REGISTERS = 16  # what it needs more where weights come from shared memory
MOST_WARPS = 16
MOST_BATCH_TILES = 4  # more sums than these leave no registers for weights
MOST_GRID_BLOCKS = 128  # of one group: each polls all the others

CYCLES_PER_MICROSECOND = 1750.0
MMA_CYCLES = 8.0  # of one tensor core for m16n8k16, by the rate that mma.sync reaches on sm_90; a k8 TF32 one alike
MMA_LATENCY_CYCLES = 33.0  # until the sum may be used by the next one
SHARED_BYTES_PER_CYCLE = 128.0
EXCHANGE = {"block": 0.05, "cluster": 0.45, "grid": 1.8}  # latency of a step's exchange, its barriers included
EXCHANGE_BYTES_PER_MICROSECOND = {"block": 1e9, "cluster": 60e3, "grid": 40e3}  # into one multiprocessor
LAUNCHES = 6.0  # of a step that takes a product and a fused kernel
WEIGHT_BYTES_PER_MICROSECOND, OPERATIONS_PER_MICROSECOND = 4e6, 4e8  # of that product
POINTWISE = 0.15  # the cell's mathematics, its barrier, memory


@dataclass(frozen=True)
class Device:
    """What a plan depends on, as the driver reports it."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # a block may ask for
    cluster_blocks: int = 1  # the largest cluster that can be launched
    clusters: int = 0  # how many of that size are resident at once
    cooperative: bool = True  # a cooperative launch is possible: not under MPS, for one

    @classmethod
    def named(cls, name: str) -> "Device":
        return DEVICES[name]


DEVICES = {  # for planning without a device; the clusters that fit at once are asked of the driver where there is one
    "a100": Device((8, 0), 108, 166912),
    "h100": Device((9, 0), 132, 232448, 16, 8),
    "h200": Device((9, 0), 132, 232448, 16, 8),
    "b200": Device((10, 0), 148, 232448, 16, 8),
    "rtx5090": Device((12, 0), 170, 101376, 8, 20),
}


@dataclass(frozen=True)
class Residence:
    """A launch plan of resident.cu. The same numbers are its macros."""

    scope: str
    blocks: int  # of a group, which shares one batch tile
    unit_tiles: int  # of 16 hidden units, a block's own
    k_splits: int  # warps that share a unit tile
    k_registers: int  # forward k tiles of a warp that are held in registers ...
    k_shared: int  # ... and in shared memory
    batch_tiles: int  # of 8 batch rows, a group's own
    gates: int
    size: int  # bytes of a stored number
    groups: int  # batch tiles of one launch
    launches: int  # one after another, where they can't all be resident
    waves: int  # how often the device is filled, in all launches
    microseconds: float  # predicted for a forward step

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        return UNIT * self.unit_tiles

    @property
    def rows(self) -> int:
        """Batch rows of a group."""
        return ROWS * self.batch_tiles

    @property
    def threads(self) -> int:
        return 32 * self.unit_tiles * self.k_splits

    @property
    def grid(self) -> int:
        return self.groups * self.blocks

    def shared_bytes(self, *, backward: bool) -> int:
        """Dynamic shared memory; resident.cu asserts that it computes the same."""
        row_sets, scale = (1, self.gates) if backward else (self.gates, 1)
        k_tiles = scale * (self.k_registers + self.k_shared)
        operand = self.rows * (self.k_splits * k_tiles * 32 + 16)
        parts = self.k_splits * row_sets * self.rows * (self.units + 4) * 4
        weights = self.unit_tiles * self.k_splits * row_sets * scale * self.k_shared * 512
        return (2 if self.scope == "cluster" else 1) * operand + parts + weights + 16

    @property
    def fragments(self) -> int:
        """16-byte parts of the packed weights, one for each lane that holds one: the same number both ways."""
        return self.blocks * self.threads * self.gates * (self.k_registers + self.k_shared)

    @property
    def flags(self) -> int:
        """Of a grid plan: one for each block of each launch."""
        return self.launches * self.grid if self.scope == "grid" else 0

    def exchange_bytes(self, *, backward: bool) -> int:
        """Global scratch of a grid plan."""
        if self.scope != "grid":
            return 0
        values = self.gates if backward else 1
        return self.groups * 2 * self.rows * self.blocks * values * self.units * self.size

    def defines(self) -> dict[str, int]:
        return {
            "SCOPE": SCOPES.index(self.scope),
            "BLOCKS": self.blocks,
            "UNIT_TILES": self.unit_tiles,
            "K_SPLITS": self.k_splits,
            "K_REGISTERS": self.k_registers,
            "K_SHARED": self.k_shared,
            "BATCH_TILES": self.batch_tiles,
            "SHARED_FORWARD": self.shared_bytes(backward=False),
            "SHARED_BACKWARD": self.shared_bytes(backward=True),
        }

    def __str__(self) -> str:
        held = f"{self.k_registers} k tiles a warp in registers"
        if self.k_shared:
            held += f", {self.k_shared} in shared memory"
        return (
            f"resident, {self.scope}: {self.blocks} blocks of {self.threads} threads, {self.units} hidden units each, "
            f"{held}; {self.groups} groups of {self.rows} batch rows in each of {self.launches} launches; "
            f"about {self.microseconds:.2f} us a step"
        )


# ---- Launches --------------------------------------------------------------------------------------------------------


def compiled(plan: Residence, cell: Cell, dtype: str) -> Unit:
    return unit(KERNELS, cell, {"SCALAR": C_TYPES[dtype], **plan.defines()})


def pack(plan: Residence, cell: Cell, dtype: str, R: int, packed: int, H: int, *, backward: bool) -> Launch:
    """The weights at address R, [G*H, H], into `plan.fragments` times 16 bytes at `packed`."""
    blocks = -(-plan.fragments // 128)
    arguments = (R, packed, np.int32(H), np.int32(backward))
    return Launch(compiled(plan, cell, dtype), "resident_pack", (blocks, 1, 1), (128, 1, 1), arguments)


def sequence(
    plan: Residence, cell: Cell, dtype: str, addresses: tuple[int, ...], exchange: int, flags: int, T: int, B: int,
    H: int, *, reverse: bool, save: bool, backward: bool,
) -> Iterator[Launch]:  # fmt: skip
    """The whole sequence, in `plan.launches` parts of the batch.

    addresses: of the kernel's arrays, in its order. exchange: of `plan.exchange_bytes` of scratch; flags: of
    `plan.flags` zeros; both for a grid plan only.
    """
    name = "resident_backward" if backward else "resident_forward"
    keep = () if backward else (np.int32(save),)
    for part in range(plan.launches):
        first_row = part * plan.groups * plan.rows
        yield Launch(
            compiled(plan, cell, dtype),
            name,
            (plan.grid, 1, 1),
            (plan.threads, 1, 1),
            (
                *(*addresses, exchange, flags and flags + 4 * part * plan.grid),
                *(T, np.int32(B), np.int32(H), np.int32(reverse), *keep, np.int32(first_row)),
            ),
            shared=plan.shared_bytes(backward=backward),
            cluster=(plan.blocks if plan.scope == "cluster" else 1, 1, 1),
            cooperative=plan.scope == "grid",
        )


# ---- Planning --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # asked at every call
def plan(
    gates: int, states: int, dtype: str, H: int, B: int, device: Device, *, training: bool, scope: str | None = None
) -> tuple[Residence | None, tuple[str, ...]]:
    """The fastest plan by prediction, or None and the reasons; `scope` insists on one."""
    if dtype not in SIZES:
        return None, (f"{dtype} has no resident kernel: tensor cores take float16, bfloat16 and float32 as TF32",)
    if device.capability < (8, 0):
        return None, (f"compute capability {device.capability[0]}.{device.capability[1]} is below 8.0",)
    scopes = SCOPES if scope is None else (scope,)
    found = [made for name in scopes for made in candidates(name, gates, states, SIZES[dtype], H, B, device, training)]
    if not found:
        return None, tuple(why_not(name, gates, SIZES[dtype], H, device) for name in scopes)
    best = min(found, key=lambda made: made.waves * made.microseconds)
    other = stepwise(gates, SIZES[dtype], H, B)
    if scope is None and best.waves * best.microseconds > other:
        taken = f"{best.waves} times {best.microseconds:.1f} us a step for {B} batch rows"
        return None, (f"{best.scope}: predicted to take {taken}, and one product per step {other:.1f} us",)
    return best, ()


def why_not(scope: str, gates: int, size: int, H: int, device: Device) -> str:
    if scope == "cluster" and device.cluster_blocks < 2:
        return "cluster: this device has no thread block clusters"
    if scope == "grid" and not device.cooperative:
        return "grid: this device has no cooperative launch"
    most = {"block": 1, "cluster": device.cluster_blocks, "grid": min(device.multiprocessors, MOST_GRID_BLOCKS)}[scope]
    mebibytes = gates * H * H * size / 2**20
    return f"{scope}: R, {mebibytes:.1f} MiB, does not fit the registers and shared memory of {most} blocks"


def candidates(
    scope: str, gates: int, states: int, size: int, H: int, B: int, device: Device, training: bool
) -> Iterator[Residence]:
    """Every plan of a scope that fits."""
    for unit_tiles in (1, 2, 4, 8):
        blocks = group_blocks(scope, -(-H // (UNIT * unit_tiles)), device)
        if blocks is None:
            continue
        for batch_tiles in range(1, min(MOST_BATCH_TILES, max(1, -(-B // ROWS))) + 1):
            for k_splits in (1, 2, 4, 8, 16):
                if unit_tiles * k_splits <= MOST_WARPS:
                    made = fitted(
                        scope, blocks, unit_tiles, k_splits, batch_tiles, gates, states, size, B, device, training
                    )
                    if made is not None:
                        yield made


def group_blocks(scope: str, needed: int, device: Device) -> int | None:
    """How many blocks a group has that needs at least so many, or None."""
    if scope == "block":
        return 1 if needed == 1 else None
    if scope == "cluster":
        sizes = [n for n in (2, 4, 8, 16) if needed <= n <= device.cluster_blocks]
        return sizes[0] if sizes and needed > 1 else None
    fits = 1 < needed <= min(device.multiprocessors, MOST_GRID_BLOCKS) and device.cooperative
    return needed if fits else None


def fitted(
    scope: str, blocks: int, unit_tiles: int, k_splits: int, batch_tiles: int,
    gates: int, states: int, size: int, B: int, device: Device, training: bool,
) -> Residence | None:  # fmt: skip
    """A plan with as many k tiles in registers as there is room for and the rest in shared memory, or None."""
    threads = 32 * unit_tiles * k_splits
    k_step = 32 // size
    k_tiles = -(-blocks * UNIT * unit_tiles // (k_step * k_splits))
    own = -(-UNIT * unit_tiles * ROWS * batch_tiles // threads)
    sums = 4 * max(gates * batch_tiles, 4 * batch_tiles)
    elements = own * (2 * states + 3 * gates)
    room = min(MOST_REGISTERS, REGISTER_FILE // threads // 8 * 8) - WORK_REGISTERS - sums - elements
    k_registers = min(k_tiles, room // (4 * gates))
    if k_registers < k_tiles:
        k_registers = (room - LOADING_REGISTERS) // (4 * gates)
    if k_registers < 0:
        return None
    tiles = -(-B // (ROWS * batch_tiles))
    at_once = resident_groups(scope, blocks, device)
    groups = min(tiles, at_once) if scope == "grid" else tiles  # a cooperative launch refuses what can't be resident
    launches, waves = -(-tiles // max(groups, 1)), -(-tiles // at_once)
    shape = (scope, blocks, unit_tiles, k_splits, k_registers, k_tiles - k_registers, batch_tiles, gates, size)
    sketch = Residence(*shape, groups, launches, waves, 0.0)
    if max(sketch.shared_bytes(backward=back) for back in {False, training}) > device.shared_bytes:
        return None
    return replace(sketch, microseconds=predicted(sketch))


def stepwise(gates: int, size: int, H: int, B: int) -> float:
    """Microseconds of a step of stepwise.cu: two launches, and a product that reads R from L2 or memory."""
    weights, operations = gates * H * H * size, 2 * B * gates * H * H
    return LAUNCHES + max(weights / WEIGHT_BYTES_PER_MICROSECOND, operations / OPERATIONS_PER_MICROSECOND)


def resident_groups(scope: str, blocks: int, device: Device) -> int:
    if scope == "cluster":  # clusters of fewer blocks fit at least as often
        return max(1, device.clusters * device.cluster_blocks // blocks)
    return max(1, device.multiprocessors // blocks)


def predicted(plan: Residence) -> float:
    """Microseconds of a forward step: the slowest of tensor cores, latency and shared memory, and the rest."""
    k_tiles = plan.k_registers + plan.k_shared
    warps = plan.unit_tiles * plan.k_splits
    rate = -(-warps // 4) * plan.gates * k_tiles * plan.batch_tiles * MMA_CYCLES
    latency = k_tiles * MMA_LATENCY_CYCLES
    from_shared = warps * plan.gates * plan.k_shared * 512 / SHARED_BYTES_PER_CYCLE
    from_shared += warps * k_tiles * plan.rows * 32 / SHARED_BYTES_PER_CYCLE
    received = (plan.blocks - 1) * plan.units * plan.rows * plan.size
    exchange = EXCHANGE[plan.scope] + received / EXCHANGE_BYTES_PER_MICROSECOND[plan.scope]
    return max(rate, latency, from_shared) / CYCLES_PER_MICROSECOND + exchange + POINTWISE
