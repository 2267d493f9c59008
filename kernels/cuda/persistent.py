"""Where the recurrent weights live for a whole sequence: the launch plans of persistent.cu.

A pure function of the problem and of what the driver says about the device. Every plan it gives holds all weights on
the chip, covers every hidden unit and batch row once, and fits the registers and the shared memory of the device; for
a problem without one it says why, and the stepwise kernels take over. Times are predictions, in microseconds a step,
from the constants below; they only rank plans. `settled` asks the driver once more, about the compiled kernels.

Both directions of a bidirectional layer go side by side in one launch where two of the plan for one fit: `together`.
The layers of a stack go as a wavefront, either way, where all fit the grid and it is predicted to pay: `stack`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..cells import Cell
from ..codegen.reductions import grad_cut, step_cut
from .launch import C_TYPES, HERE, Launch, Unit, unit

KERNELS = HERE / "persistent.cu"
HEADERS = tuple(
    HERE / name for name in ("persistent_params.cuh", "matmul_tile.cuh", "unit_reduction.cuh", "persistent_block.cuh")
)
SCOPES = ("block", "cluster", "grid")  # SCOPE 0, 1, 2 of persistent.cu
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

UNIT = 16  # rows of an mma: hidden units are dealt out in tiles of so many
ROWS = 8  # its columns: so are batch rows ...
IEEE_ROWS = 2  # ... and for fused multiply-adds pairs, which lanes share out
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, all architectures since sm_70
MOST_REGISTERS = 255  # of a thread
# What a thread needs beside weights, sums and elements, and what more to load weights from shared memory (if IEEE): all
# of it is held against ptxas by compile-only tests.
WORK_REGISTERS = {"block": 84, "cluster": 80, "grid": 96}
LOADING_REGISTERS = {False: 16, True: 20}
MOST_PUBLISHED = 256 << 20  # bytes for what layers of a stack hand on; longer sequences are cut over time
LEAST_SPAN = 64  # instants of such a part: in fewer the wavefront hardly unfolds
STACK_REGISTERS = 24  # for the second matrix of a stack's layers, beside its weights
BEHIND = {False: 1, True: 2}  # instants that a layer of a stack is behind the one it takes from, forward and backward
MOST_ELEMENTS = 4  # of a thread: what it keeps for each is hard to foresee
MOST_WARPS = 16
BATCH_TILES = (1, 2, 3, 4)  # more sums than these leave no registers for weights
IEEE_BATCH_TILES = (1, 2, 4, 8)  # more code than this leaves no room in the instruction cache
PIECES = (1, 2, 4, 8)  # of the operand in the grid; backward's is G times as large as forward's
MOST_GRID_BLOCKS = 128  # of one group: each reads from all the others

# Costs, in microseconds where nothing else is said. Measured: by `python -m bench.plans` on an H200 at 1980 MHz, a
# least squares fit over 96 plans of bf16 and TF32 LSTMs and GRUs, 8 % off in the mean, 22 % at worst. Else assumed.
CYCLES_PER_MICROSECOND = 1980.0  # measured
MMA_CYCLES = 8.0  # of one tensor core for m16n8k16, by the rate that mma.sync reaches on sm_90; a k8 TF32 one alike
MMA_LATENCY_CYCLES = 33.0  # until the sum may be used by the next one
FMA_CYCLES = 1.0  # of one scheduler, four to a multiprocessor, for a warp's 32 multiply-adds
SHARED_BYTES_PER_CYCLE = 128.0
FRAGMENT = 0.001  # measured: issuing a fragment's mma
PARTIAL_SUMS = 2.4  # measured: times the cycles that storing them takes; they are read one by one, too
WARP = 0.022  # measured: a warp more at the step's barriers
ELEMENT = {False: 0.18, True: 0.37}  # measured: of a thread, forward and backward: mathematics, loads and stores
EXCHANGE = {"block": 0.3, "cluster": 0.13, "grid": 0.51}  # the rest of a step: measured, of a block at H = 128 alone
CLUSTER_KILOBYTE = 0.044  # measured: received by a multiprocessor
GRID_WORD, GRID_KILOBYTE = 0.055, 0.003  # measured: a 16-byte word that a thread receives; what all threads receive
ZERO_BYTES_PER_MICROSECOND = 2e6  # that a stack's exchange begins with
MEETING = {"block": 0.1, "cluster": 0.6, "grid": 1.1}  # of a level of means: their sums beside such a latency
LAUNCHES = 20.0  # measured: of a step that takes a product and a fused kernel, launched one by one from Python
PASS = 1.0  # of that kernel, for a level of means
WEIGHT_BYTES_PER_MICROSECOND = 4e6  # of that product
OPERATIONS_PER_MICROSECOND, IEEE_OPERATIONS_PER_MICROSECOND = 4e8, 4e7


@dataclass(frozen=True)
class Device:
    """What a plan depends on, as the driver reports it."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # a block may ask for
    clusters: tuple[tuple[int, int], ...] = ()  # (blocks of a cluster, how many of them are resident at once)
    cooperative: bool = True  # a cooperative launch is possible
    scopes: tuple[str, ...] = SCOPES  # that plans may use
    proven_only: bool = False  # without the kinds of plans that were wrong on a GPU, see `UNPROVEN`

    @property
    def cluster_blocks(self) -> int:
        """The largest cluster that can be launched."""
        return max((blocks for blocks, _ in self.clusters), default=1)

    def holding(self, plan: "Residence", count: int) -> "Device":
        """As this one, which turns out to hold `count` of the plan's clusters, or of its grid's blocks, at once."""
        if plan.scope == "grid":
            return replace(self, multiprocessors=max(1, count), cooperative=count > 0)
        others = tuple(entry for entry in self.clusters if entry[0] != plan.blocks)
        return replace(self, clusters=(*others, (plan.blocks, count)) if count else others)


# Kinds of plans whose results were wrong, or which hung, on the first GPU that they met (an H200, 2026-11-29), while
# all tests on the host pass. Until the cause is known they are made for tests alone.
UNPROVEN = {"ieee": "IEEE float32 matmuls", "wavefront": "layers as a wavefront"}

DEVICES = {  # for planning without a device, of all kinds; where there is a device, the driver is asked
    "a100": Device((8, 0), 108, 166912),
    "h100": Device((9, 0), 132, 232448, ((2, 66), (4, 32), (8, 16), (16, 8))),
    "h200": Device((9, 0), 132, 232448, ((2, 66), (4, 32), (8, 16), (16, 8))),
    "b200": Device((10, 0), 148, 232448, ((2, 74), (4, 36), (8, 16), (16, 8))),
    "rtx5090": Device((12, 0), 170, 101376, ((2, 85), (4, 42), (8, 20))),
}


def unproven(kind: str) -> str:
    return f"{UNPROVEN[kind]} by persistent kernels were wrong on a GPU; GPU_RNN_CUDA_UNPROVEN=1 allows them, for tests"


@dataclass(frozen=True)
class Residence:
    """A launch plan of persistent.cu, for one direction of time. The same numbers are its macros."""

    backward: bool
    scope: str
    blocks: int  # of a group, which shares one batch tile
    unit_tiles: int  # of 16 hidden units, a block's own
    k_splits: int  # warps that share a unit tile
    k_registers: int  # k tiles of a warp that are held in registers, backward per gate ...
    k_shared: int  # ... and in shared memory
    batch_tiles: int  # of 8 batch rows, or of 2 if `ieee`, a group's own
    pieces: int  # that the operand comes in
    gates: int
    size: int  # bytes of a stored number
    ieee: bool  # float32 products by fused multiply-adds, not as TF32
    groups: int  # batch tiles of one launch
    launches: int  # one after another, where they can't all be resident
    waves: int  # how often the device is filled, in all launches
    directions: int = 1  # side by side, with groups of their own
    layers: int = 1  # of a stack, likewise; then each block holds rows of the input weights, too
    meetings: tuple[int, ...] = ()  # at an instant, one after the other: how many means over the units each gives
    apart: int = 0  # gates that are exchanged twice, as their input part has a gradient of its own: of a stack's

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        return UNIT * self.unit_tiles

    @property
    def rows(self) -> int:
        """Batch rows of a group."""
        return (IEEE_ROWS if self.ieee else ROWS) * self.batch_tiles

    @property
    def threads(self) -> int:
        return 32 * self.unit_tiles * self.k_splits

    @property
    def elements(self) -> int:
        """Of a thread: a hidden unit of a batch row each."""
        return -(-self.units * self.rows // self.threads)

    @property
    def grid(self) -> int:
        return self.members * self.groups * self.blocks

    @property
    def members(self) -> int:
        return self.directions * self.layers

    @property
    def row_sets(self) -> int:
        return 1 if self.backward else self.gates

    @property
    def values(self) -> int:
        """Exchanged, of a hidden unit."""
        return self.gates + self.apart if self.backward else 1

    @property
    def k_tiles(self) -> int:
        """Of a warp and a row set."""
        return self.values * (self.k_registers + self.k_shared)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; persistent_block.cuh asserts that it computes the same."""
        operand = self.rows * (self.k_splits * -(-self.k_tiles // self.pieces) * 32 + 16)
        staged = -(-self.rows // 3) * 3 * self.values * self.units * self.size if self.scope == "grid" else 0
        parts = self.k_splits * self.row_sets * self.rows * (self.units + 4) * 4
        weights = self.unit_tiles * self.k_splits * self.row_sets * self.values * self.k_shared * 512
        whole = (2 if self.scope == "cluster" else 1) * operand + staged + parts + weights + 16 + self.meeting_bytes
        if self.layers == 1:
            return whole
        return whole + (parts + weights if self.backward else whole)

    @property
    def meeting_bytes(self) -> int:
        """Of that, what means take."""
        if not self.meetings:
            return 0
        sums = max(self.meetings) * self.rows
        of_group = {"block": 0, "cluster": 2 * sums * self.blocks, "grid": min(self.blocks, 16) * -(-sums // 3) * 3}
        received = 16 if self.scope == "cluster" else 0
        return -(-((2 * sums * self.unit_tiles + of_group[self.scope]) * 4 + received) // 16) * 16

    @property
    def exchanged(self) -> int:
        """Bytes of a publication of a group in the grid: a stamp and 4 bytes of three batch rows each."""
        return -(-self.rows // 3) * self.blocks * self.values * self.units * self.size // 4 * 16

    @property
    def handed(self) -> int:
        """Bytes that a block of a stack gives to the layer below at an instant, backward: a stamp for each element."""
        return 8 * self.units * self.rows if self.backward and self.layers > 1 else 0

    def exchange_bytes(self, T: int) -> int:
        """Zeros that one launch of a grid plan wants for itself: two publications, or all that another layer reads; two
        meetings; and what is handed down."""
        if self.scope != "grid":
            return 0
        kept = T + 1 if self.layers > 1 and not self.backward else 2
        met = 16 * self.blocks * -(-max(self.meetings, default=0) * self.rows // 3)  # bytes of a meeting of a group
        handed = (self.layers - 1) * self.groups * T * self.blocks * self.handed
        return self.members * self.groups * (kept * self.exchanged + 2 * met) + handed

    @property
    def microseconds(self) -> float:
        """Predicted for a step: the slowest of arithmetic, its latency and shared memory, and then all the rest."""
        warps = self.unit_tiles * self.k_splits
        if self.ieee:
            fragment, latency = 4 * self.rows * FMA_CYCLES, 0.0
            read = 2 if self.row_sets > 1 else 1  # cycles for a batch row of a k tile, by 16- or 8-byte loads
            operand = 1.0 * warps * self.k_tiles * self.rows * read
        else:
            fragment = self.batch_tiles * MMA_CYCLES
            latency = self.k_tiles * MMA_LATENCY_CYCLES / max(1, 4 // (self.row_sets * self.batch_tiles))
            operand = warps * self.k_tiles * self.rows * 32 / SHARED_BYTES_PER_CYCLE
        arithmetic = -(-warps // 4) * self.row_sets * self.k_tiles * fragment
        from_shared = operand + warps * self.row_sets * self.values * self.k_shared * 512 / SHARED_BYTES_PER_CYCLE
        parts = self.k_splits * self.row_sets * self.rows * self.units * 4 / SHARED_BYTES_PER_CYCLE
        product = (max(arithmetic, latency, from_shared) + PARTIAL_SUMS * parts) / CYCLES_PER_MICROSECOND
        product += FRAGMENT * self.k_tiles * self.row_sets * self.batch_tiles
        rest = EXCHANGE[self.scope] + WARP * warps + ELEMENT[self.backward] * self.elements
        received = 0.0
        if self.scope == "cluster":
            bytes_ = (self.blocks - 1) * self.values * self.units * self.rows * self.size
            received = CLUSTER_KILOBYTE * bytes_ / 1e3
        elif self.scope == "grid":
            bytes_ = self.exchanged if self.blocks > 1 else 0
            if self.layers > 1:
                bytes_ += self.handed if self.backward else self.exchanged  # from the other layer
            received = bytes_ * (GRID_WORD / 16 / self.threads + GRID_KILOBYTE / 1e3)
        # a stack's product with the input weights is made while the exchange is under way
        beside = max(0.0, product - EXCHANGE[self.scope]) if self.layers > 1 else 0.0
        return product + beside + rest + received + len(self.meetings) * MEETING[self.scope]

    def defines(self) -> dict[str, int]:
        return {
            "BACKWARD": int(self.backward),
            "IEEE": int(self.ieee),
            "SCOPE": SCOPES.index(self.scope),
            "BLOCKS": self.blocks,
            "UNIT_TILES": self.unit_tiles,
            "K_SPLITS": self.k_splits,
            "K_REGISTERS": self.k_registers,
            "K_SHARED": self.k_shared,
            "BATCH_TILES": self.batch_tiles,
            "PIECES": self.pieces,
            "DIRECTIONS": self.directions,
            "LAYERS": self.layers,
            "SHARED_BYTES": self.shared_bytes,
        }

    def __str__(self) -> str:
        on_chip = f"{self.k_registers} k-tiles per warp in registers"
        if self.k_shared:
            on_chip += f", {self.k_shared} in shared memory"
        matmul = "16-bit" if self.size == 2 else "IEEE float32" if self.ieee else "TF32"
        several = "both directions in one launch; " if self.directions == 2 else ""
        if self.layers > 1:
            several = f"{self.layers} layers as a wavefront in one launch; "
        count = self.members * self.groups
        blocks = f"{count} groups of " * (count > 1) + f"{self.blocks} block{'s' * (self.blocks > 1)}"
        launches = f"{self.launches} launch{'es' * (self.launches > 1)}"
        return (
            f"persistent kernel ({self.scope} scope): {several}{blocks} of {self.threads} threads, {self.units} hidden "
            f"units per block, {self.rows} sequences per group; recurrent weights on-chip: {on_chip}; "
            f"{matmul} matmuls; {launches}; predicted {self.microseconds:.2f} us per time step"
        )


# ---- Launches --------------------------------------------------------------------------------------------------------


def compiled(plan: Residence, cell: Cell, dtype: str, only: str | None = None) -> Unit:
    """The kernels of a plan; only "exchange" or "product": what a step spends on it, for benchmarks."""
    defines = {"SCALAR": C_TYPES[dtype], **plan.defines(), **({"ONLY": only.upper()} if only else {})}
    return unit(KERNELS, cell, defines, HEADERS)


class Member(NamedTuple):
    """What is a direction's own, or a layer's."""

    addresses: tuple[int, ...]  # of the kernel's arrays, in its order
    reverse: bool


def sequence(
    plan: Residence, cell: Cell, dtype: str, T: int, B: int, H: int, R: int, *, save: bool, only: str | None = None
) -> Iterator[Launch]:
    """The whole sequence, in `plan.launches` parts of the batch.

    To each launch belong, as the last arguments, `words` of the members and the address of `plan.exchange_bytes(T)` of
    zeros for a grid plan, else 0. R: batch rows of the values per unit, B or 1. save: of a forward plan. only: see
    `compiled`; the results are then wrong.
    """
    keep = () if plan.backward else (np.int32(save),)
    for part in range(plan.launches):
        first_row = part * plan.groups * plan.rows
        yield Launch(
            compiled(plan, cell, dtype, only),
            name(plan),
            (plan.grid, 1, 1),
            (plan.threads, 1, 1),
            (T, np.int32(B), np.int32(H), np.int32(R), np.int32(first_row), *keep),
            shared=plan.shared_bytes,
            cluster=(plan.blocks if plan.scope == "cluster" else 1, 1, 1),
            cooperative=plan.scope == "grid",
        )


def words(members: Sequence[Member]) -> np.ndarray:
    """struct Members, by value."""
    given = np.array([(*addresses, reverse) for addresses, reverse in members], np.uint64)
    return given.ravel().view(f"V{given.nbytes}")


def cuts(plan: Residence, T: int) -> list[tuple[int, int]]:
    """The instants, from and to, that a launch has, in the order of the walk: all, unless a stack hands on too much."""
    if plan.layers == 1:
        return [(0, T)]
    fixed, room = plan.exchange_bytes(0), MOST_PUBLISHED // plan.launches
    most = max(1, (room - fixed) // (plan.exchange_bytes(1) - fixed))
    span = -(-T // -(-T // most))
    found = [(begin, min(begin + span, T)) for begin in range(0, T, span)]
    return found[::-1] if plan.backward else found


def name(plan: Residence) -> str:
    """Of the kernel."""
    return "resident_backward" if plan.backward else "resident_forward"


# ---- Planning --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # asked at every call
def plan(
    gates: int, element: int, dtype: str, H: int, B: int, device: Device,
    *, backward: bool, ieee: bool = False, scope: str | None = None, meetings: tuple[int, ...] = (),
) -> tuple[Residence | None, tuple[str, ...]]:  # fmt: skip
    """The fastest plan by prediction, or None and the reasons.

    element, meetings: registers of an element, and its means, from the functions of these names. ieee: float32 isn't to
    be TF32. `scope` insists on one.
    """
    if dtype not in SIZES:
        return None, (f"there is no persistent kernel for {dtype}, only for {', '.join(SIZES)}",)
    if device.capability < (8, 0):
        return None, (f"compute capability {device.capability[0]}.{device.capability[1]} is below 8.0",)
    size, ieee = SIZES[dtype], ieee and dtype == "float32"
    if ieee and device.proven_only:
        return None, (unproven("ieee"),)
    scopes = device.scopes if scope is None else (scope,)
    page = (gates, element, size, ieee, meetings)
    found = [made for name in scopes for made in candidates(name, backward, page, H, B, device)]
    if not found:
        return None, tuple(why_not(name, gates, size, H, device) for name in scopes)
    best = min(found, key=lambda made: made.waves * made.microseconds)
    other = stepwise(gates, size, H, B, ieee, len(meetings))
    if scope is None and best.waves * best.microseconds > other:
        taken = f"{best.waves} x {best.microseconds:.1f} us per time step for {B} sequences"
        return None, (f"{best.scope} scope: predicted {taken}, against {other:.1f} us by per-step kernels",)
    return best, ()


def settled(
    gates: int, element: int, dtype: str, H: int, B: int, device: Device,
    *, backward: bool, ieee: bool, held: Callable[[Residence], int], meetings: tuple[int, ...] = (),
) -> tuple[Residence | None, tuple[str, ...]]:  # fmt: skip
    """The plan that the driver agrees to, and the reasons against those that it doesn't.

    held: how many clusters of a plan, or blocks of a grid, are resident at once: of its compiled kernel.
    """
    refused: tuple[str, ...] = ()
    while True:
        made, reasons = plan(gates, element, dtype, H, B, device, backward=backward, ieee=ieee, meetings=meetings)
        if made is None:
            return made, (*refused, *reasons)
        count, why_not = holds(made, device, held)
        if why_not is None:
            return made, refused
        refused += (why_not,)
        device = device.holding(made, count)


def holds(made: Residence, device: Device, held: Callable[[Residence], int]) -> tuple[int, str | None]:
    """How many of a plan the driver holds at once, and why that is too few, if it is. `held`: see `settled`."""
    if made.scope == "block":  # blocks that wait for no other come in their turn
        return 0, None
    grid = made.scope == "grid"
    wanted, count = made.grid if grid else resident_groups(made.scope, made.blocks, device), held(made)
    if count >= wanted:
        return count, None
    what = f"{wanted} blocks" if grid else f"{wanted} clusters of {made.blocks} blocks"
    return count, f"{made.scope} scope: needs {what} co-resident, but the CUDA driver reports {count}"


def together(
    alone: Residence, B: int, device: Device, held: Callable[[Residence], int] | None = None
) -> tuple[Residence | None, tuple[str, ...]]:
    """The plan for both directions in one launch, made of that for one, or None and why one goes after the other.

    Each computes what it would alone, bit for bit: only how many groups there are changes. `held`: see `settled`.
    """
    tiles, at_once = -(-B // alone.rows), resident_groups(alone.scope, alone.blocks, device)
    groups = tiles
    if alone.scope != "block":
        if at_once < 2:
            what = f"2 x {alone.blocks} blocks, more than fit {device.multiprocessors} multiprocessors"
            return None, (f"{alone.scope} scope: both directions in one launch need {what}",)
        groups = min(tiles, at_once // 2)
    launches = -(-tiles // groups)
    waves = -(-2 * tiles // at_once) if alone.scope == "block" else launches
    if waves > 2 * alone.waves:
        return None, (
            f"{alone.scope} scope: both directions in one launch take {waves} waves of blocks, one alone {alone.waves}",
        )
    made = replace(alone, directions=2, groups=groups, launches=launches, waves=waves)
    _, why_not = (0, None) if held is None else holds(made, device, held)
    return (made, ()) if why_not is None else (None, (why_not,))


def stack(
    gates: int, element: int, dtype: str, H: int, T: int, B: int, layers: int, device: Device,
    *, backward: bool = False, apart: int = 0, ieee: bool = False,
) -> tuple[Residence | None, tuple[str, ...]]:  # fmt: skip
    """The plan by which the layers of a stack go as a wavefront, or None and why one goes after the other.

    apart: of `gates`, how many have a gradient of their own for each of their two parts.
    """
    if device.proven_only:
        return None, (unproven("wavefront"),)
    alone, why = plan(gates, element, dtype, H, B, device, backward=backward, ieee=ieee)
    if dtype not in SIZES or device.capability < (8, 0):
        return None, why
    size, ieee = SIZES[dtype], ieee and dtype == "float32"
    page = (gates, element, size, ieee, ())
    grid = device.cooperative and "grid" in device.scopes
    found = [*candidates("grid", backward, page, H, B, device, layers, apart)] if grid else []
    if not found:
        mebibytes = layers * 2 * gates * H * H * size / 2**20
        what = f"[W | R] of {layers} layers, {mebibytes:.1f} MiB, on {device.multiprocessors} multiprocessors at once"
        return None, (f"grid scope: the weights don't fit on-chip: {what}",)
    best = min(found, key=lambda made: made.waves * made.microseconds)
    step = alone.waves * alone.microseconds if alone else stepwise(gates, size, H, B, ieee)
    spans = [end - begin for begin, end in cuts(best, T)]
    if max(spans) < min(T, LEAST_SPAN):
        mebibytes = best.launches * best.exchange_bytes(1) / 2**20
        what = f"the buffer between layers takes {mebibytes:.1f} MiB per time step"
        return None, (f"grid scope: {what}, and may take {MOST_PUBLISHED >> 20} MiB",)
    rate = IEEE_OPERATIONS_PER_MICROSECOND if ieee else OPERATIONS_PER_MICROSECOND
    inputs = (layers - 1) * (LAUNCHES / 2 + 2 * T * B * gates * H * H / rate)
    in_turn = layers * T * step + inputs
    instants = T + len(spans) * BEHIND[backward] * (layers - 1)
    zeros = best.launches * sum(map(best.exchange_bytes, spans)) / ZERO_BYTES_PER_MICROSECOND
    at_once = best.waves * instants * best.microseconds + zeros + (len(spans) - 1) * LAUNCHES
    if at_once > in_turn:
        return None, (f"predicted {at_once:.0f} us as a wavefront, {in_turn:.0f} us layer by layer",)
    return best, ()


def element(cell: Cell, *, backward: bool) -> int:
    """Registers that one unit of one batch row takes for the whole sequence."""
    extra = cell.E + bool(cell.flags) + sum(meetings(cell, backward=backward))  # and the flags of the instant to come
    if not backward:
        return cell.S + 3 * cell.G + extra
    return 3 * cell.S + 2 * cell.G + 6 + extra + cell.learned + (cell.S - 1) * bool(cell.E)


def meetings(cell: Cell, *, backward: bool) -> tuple[int, ...]:
    """How many means over all units each level of a page's has."""
    return tuple(len(level.outputs[0]) for level in (grad_cut(cell) if backward else step_cut(cell)).levels)


def why_not(scope: str, gates: int, size: int, H: int, device: Device) -> str:
    if scope == "cluster" and device.cluster_blocks < 2:
        return "cluster scope: this GPU has no thread block clusters"
    if scope == "grid" and not device.cooperative:
        return "grid scope: this GPU has no cooperative launch"
    most = {"block": 1, "cluster": device.cluster_blocks, "grid": min(device.multiprocessors, MOST_GRID_BLOCKS)}[scope]
    mebibytes = gates * H * H * size / 2**20
    blocks = f"{most} block{'s' * (most > 1)}"
    return f"{scope} scope: the recurrent weights ({mebibytes:.1f} MiB) exceed the on-chip memory of {blocks}"


Page = tuple[int, int, int, bool, tuple[int, ...]]  # gates, element, size, ieee, meetings


def candidates(
    scope: str, backward: bool, page: Page, H: int, B: int, device: Device, layers: int = 1, apart: int = 0
) -> Iterator[Residence]:
    """Every plan of a scope that fits. apart: see `stack`."""
    ieee = page[3]
    rows, all_tiles = (IEEE_ROWS, IEEE_BATCH_TILES) if ieee else (ROWS, BATCH_TILES)
    enough = next((tiles for tiles in all_tiles if tiles * rows >= B), all_tiles[-1])
    for unit_tiles in (1, 2, 4, 8):
        blocks = group_blocks(scope, -(-H // (UNIT * unit_tiles)), device, layers)
        if blocks is None:
            continue
        for batch_tiles in all_tiles[: all_tiles.index(enough) + 1]:
            for k_splits in (1, 2, 4, 8, 16):
                if unit_tiles * k_splits <= MOST_WARPS:
                    shape = (scope, blocks, unit_tiles, k_splits, batch_tiles)
                    made = fitted(backward, shape, page, B, device, layers, apart if backward else 0)
                    if made is not None:
                        yield made


def group_blocks(scope: str, needed: int, device: Device, layers: int) -> int | None:
    """How many blocks a group has that needs at least so many, or None. One alone is the grid's only in a stack."""
    if scope == "block":
        return 1 if needed == 1 else None
    if scope == "cluster":
        sizes = sorted(blocks for blocks, _ in device.clusters if blocks >= needed > 1)
        return sizes[0] if sizes else None
    least, most = 2 if layers == 1 else 1, min(device.multiprocessors, MOST_GRID_BLOCKS)
    fits = least <= needed <= most and device.cooperative
    return needed if fits else None


def fitted(
    backward: bool, shape: tuple[str, int, int, int, int], page: Page, B: int, device: Device, layers: int, apart: int
) -> Residence | None:
    """A plan with as many k tiles in registers as there is room for and the rest in shared memory, or None."""
    gates, element, size, ieee, met = page
    scope, blocks, unit_tiles, k_splits, batch_tiles = shape
    threads = 32 * unit_tiles * k_splits
    rows = (IEEE_ROWS if ieee else ROWS) * batch_tiles
    k_tiles = -(-blocks * UNIT * unit_tiles // (32 // size * k_splits))
    own = -(-UNIT * unit_tiles * rows // threads)
    row_sets = 1 if backward else gates
    sums = max(row_sets, 2) * rows if ieee else 4 * max(row_sets * batch_tiles, 4) + 8 * (batch_tiles - 1)
    room = min(MOST_REGISTERS, REGISTER_FILE // threads // 8 * 8) - WORK_REGISTERS[scope] - sums - own * element
    fragments = 4 * (gates + apart)  # registers of a k tile
    if layers > 1:  # two matrices; the bias of the input, or a word from above
        fragments, room = 2 * fragments, room - STACK_REGISTERS - own * (2 if backward else gates)
    k_registers = min(k_tiles, room // fragments)
    if k_registers < k_tiles:
        k_registers = (room - LOADING_REGISTERS[ieee]) // fragments
    if k_registers < 0 or own > MOST_ELEMENTS:
        return None
    tiles = -(-B // rows)
    at_once = resident_groups(scope, blocks, device) // layers
    if at_once == 0:
        return None
    # A cooperative launch refuses what can't be resident. Clusters could take each other's places, which an H200 has
    # not been seen to do right: both directions of IEEE float32, 144 blocks for 132 multiprocessors, failed there.
    groups = tiles if scope == "block" else min(tiles, at_once)
    launches, waves = -(-tiles // max(groups, 1)), -(-tiles // at_once)
    held = (k_registers, k_tiles - k_registers)
    # An operand in pieces was wrong on a GPU, too (LSTM, bf16, H = 1024, B = 64, backward): see UNPROVEN.
    several = scope == "grid" and blocks > 1 and not (backward and layers > 1) and not device.proven_only
    for pieces in PIECES if several else (1,):
        made = Residence(
            backward, scope, blocks, unit_tiles, k_splits, *held, batch_tiles, pieces, gates, size, ieee,
            groups, launches, waves, layers=layers, meetings=met, apart=apart,
        )  # fmt: skip
        none_empty = (pieces - 1) * -(-made.k_tiles // pieces) < made.k_tiles
        if none_empty and made.shared_bytes <= device.shared_bytes:
            return made
    return None


def stepwise(gates: int, size: int, H: int, B: int, ieee: bool, levels: int = 0) -> float:
    """Microseconds of a step of stepwise.cu: two launches, and a product that reads R from L2 or memory; a pass through
    a row for each level of means."""
    weights, operations = gates * H * H * size, 2 * B * gates * H * H
    rate = IEEE_OPERATIONS_PER_MICROSECOND if ieee else OPERATIONS_PER_MICROSECOND
    return LAUNCHES + levels * PASS + max(weights / WEIGHT_BYTES_PER_MICROSECOND, operations / rate)


def resident_groups(scope: str, blocks: int, device: Device) -> int:
    """How many groups of so many blocks the device has at once."""
    return dict(device.clusters)[blocks] if scope == "cluster" else max(1, device.multiprocessors // blocks)
