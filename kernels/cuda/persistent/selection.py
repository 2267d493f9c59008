"""The configuration of a problem: the fastest one by prediction, or the reasons why there is none.

A pure function of the problem and of the device. Every configuration holds all weights on-chip, covers every hidden
unit and batch row once, and fits the registers and the shared memory of the device; where none does, per-step kernels
run. `select_verified` queries the driver, too, about the compiled kernels. `fuse_runs` runs the directions and heads
of a layer in one launch, `select_wavefront` the layers of a stack.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ...cells import Cell
from ...codegen.reductions import grad_split, step_split
from .config import BATCH_TILE, ITEMSIZE, MAX_RUNS, REGISTER_FILE, UNIT_TILE, UNPROVEN, Device, PersistentConfig
from .cost_model import layer_by_layer_us, per_step_us, wavefront_us
from .launch import MAX_EXCHANGE_BYTES, time_slices

MAX_REGISTERS = 255  # of a thread
# Registers of a thread for all but weights, sums and elements, and the additional ones to load weights from shared
# memory, by `ieee`. Tests compile configurations, and fail where one spills.
WORK_REGISTERS = {"block": 84, "cluster": 80, "grid": 96}
LOAD_REGISTERS = {False: 16, True: 20}
CHUNK_REGISTERS = 12  # of each further element, where chunks of the operand are received while sums are held
WAVEFRONT_REGISTERS = 24  # for the second matrix of a wavefront, without its weights
MAX_ELEMENTS = 4  # of a thread: the registers of more are hard to foresee
MAX_WARPS = 16
MAX_GRID_BLOCKS = 128  # of one group: each block reads from all others
MIN_TIME_SLICE = 64  # time steps: fewer are over before all layers of a wavefront run
BATCH_TILES = {  # by `ieee`
    False: (1, 2, 3, 4),  # more sums leave no registers for weights
    True: (1, 2, 4, 8),  # more code leaves the instruction cache
}
K_CHUNKS = (1, 2, 4, 8)  # of the grid's operand, which backward is G times as large as forward

Selection = tuple[PersistentConfig | None, tuple[str, ...]]  # or None and the reasons
Occupancy = Callable[[PersistentConfig], int]  # co-resident clusters, or blocks of a grid, of the compiled kernel


class CellCost(NamedTuple):
    """What the cell and the dtype ask of a configuration."""

    gates: int
    registers_per_element: int
    itemsize: int
    ieee: bool
    reductions: tuple[int, ...]


def registers_per_element(cell: Cell, *, backward: bool) -> int:
    """Registers that a hidden unit of a batch row takes for the whole sequence."""
    aux = cell.E + bool(cell.flags) + sum(reductions(cell, backward=backward))  # and the flags of the next time step
    if not backward:
        return cell.S + 3 * cell.G + aux
    return 3 * cell.S + 2 * cell.G + 6 + aux + cell.num_trainable + (cell.S - 1) * bool(cell.E)


def reductions(cell: Cell, *, backward: bool) -> tuple[int, ...]:
    """The number of means over hidden units in each reduction of a time step."""
    return (grad_split(cell) if backward else step_split(cell)).counts


def cell_cost(cell: Cell, dtype: str, *, backward: bool, ieee: bool = False) -> CellCost:
    registers = registers_per_element(cell, backward=backward)
    return CellCost(cell.G, registers, ITEMSIZE[dtype], ieee, reductions(cell, backward=backward))


@lru_cache(maxsize=1024)  # of calls
def select(
    gates: int, registers: int, dtype: str, H: int, B: int, device: Device,
    *, backward: bool, ieee: bool = False, scope: str | None = None, reductions: tuple[int, ...] = (),
) -> Selection:  # fmt: skip
    """Return the fastest configuration by prediction, or None and the reasons.

    registers, reductions: see the functions `registers_per_element` and `reductions`. ieee: float32 isn't rounded to
    TF32. scope: the only one to consider, also where per-step kernels are predicted to be faster.
    """
    if dtype not in ITEMSIZE:
        return None, (f"there is no persistent kernel for {dtype}, only for {', '.join(ITEMSIZE)}",)
    if device.capability < (8, 0):
        return None, (f"compute capability {device.capability[0]}.{device.capability[1]} is below 8.0",)
    ieee = ieee and dtype == "float32"
    if ieee and device.proven_only:
        return None, (unproven("ieee"),)
    cost = CellCost(gates, registers, ITEMSIZE[dtype], ieee, reductions)
    scopes = device.scopes if scope is None else (scope,)
    fitting = [config for name in scopes for config in candidates(name, backward, cost, H, B, device)]
    if not fitting:
        everything = replace(device, proven_only=False)
        return None, tuple(
            f"{name} scope: {unproven('chunks')}"
            if device.proven_only and any(candidates(name, backward, cost, H, B, everything))
            else why_not_on_chip(name, cost, H, device)
            for name in scopes
        )
    best = fastest(fitting)
    per_step = per_step_us(gates, cost.itemsize, H, B, ieee, len(reductions))
    if scope is None and best.waves * best.predicted_us > per_step:
        predicted = f"{best.waves} x {best.predicted_us:.1f} us per time step for {B} sequences"
        return None, (f"{best.scope} scope: predicted {predicted}, against {per_step:.1f} us by per-step kernels",)
    return best, ()


def select_verified(
    gates: int, registers: int, dtype: str, H: int, B: int, device: Device,
    *, backward: bool, ieee: bool, occupancy: Occupancy, reductions: tuple[int, ...] = (),
) -> Selection:  # fmt: skip
    """Return the fastest configuration that the driver can run, and the reasons against faster ones."""
    refused: tuple[str, ...] = ()
    how = {"backward": backward, "ieee": ieee, "reductions": reductions}
    while True:
        config, reasons = select(gates, registers, dtype, H, B, device, **how)  # type: ignore[arg-type]
        if config is None:
            return None, (*refused, *reasons)
        count, why_not = check_occupancy(config, device, occupancy)
        if why_not is None:
            return config, refused
        refused += (why_not,)
        device = device.with_occupancy(config, count)


def check_occupancy(config: PersistentConfig, device: Device, occupancy: Occupancy) -> tuple[int, str | None]:
    """Return how many clusters or blocks the driver holds at once, and why these are too few, if they are."""
    if config.scope == "block":  # blocks that wait for no other may run one after the other
        return 0, None
    grid = config.scope == "grid"
    needed = config.grid if grid else concurrent_groups(config.scope, config.blocks, device)
    count = occupancy(config)
    if count >= needed:
        return count, None
    what = f"{needed} blocks" if grid else f"{needed} clusters of {config.blocks} blocks"
    return count, f"{config.scope} scope: needs {what} co-resident, but the CUDA driver reports {count}"


def fuse_runs(one: PersistentConfig, n: int, B: int, device: Device, occupancy: Occupancy | None = None) -> Selection:
    """Return the configuration of n runs in one launch, or of the largest part of them that fits, from that of one, or
    None; and the reasons against all of them.

    The runs are directions and heads. Each computes what it would alone, bit for bit: only the number of groups
    changes.
    """
    reasons: tuple[str, ...] = ()
    for count in (count for count in range(n, 1, -1) if n % count == 0):
        config, why = fused(one, count, B, device, occupancy)
        reasons = reasons or why
        if config is not None:
            return config, reasons
    return None, reasons


def fused(one: PersistentConfig, n: int, B: int, device: Device, occupancy: Occupancy | None) -> Selection:
    """Return the configuration of exactly n runs in one launch, or None and the reason."""
    tiles, at_once = -(-B // one.rows), concurrent_groups(one.scope, one.blocks, device)
    groups, what = tiles, f"{one.scope} scope: {n} runs in one launch"
    if n > MAX_RUNS[device.proven_only]:
        return None, (f"{what} are more than {MAX_RUNS[device.proven_only]}",)
    if one.scope != "block":
        if at_once < n:
            return None, (
                f"{what} need {n} x {one.blocks} blocks, more than fit {device.multiprocessors} multiprocessors",
            )
        groups = min(tiles, at_once // n)
    launches = -(-tiles // groups)
    waves = -(-n * tiles // at_once) if one.scope == "block" else launches
    if waves > n * one.waves:
        return None, (f"{what} take {waves} waves of blocks, one alone {one.waves}",)
    config = replace(one, directions=n, groups=groups, launches=launches, waves=waves)
    _, why_not = (0, None) if occupancy is None else check_occupancy(config, device, occupancy)
    return (config, ()) if why_not is None else (None, (why_not,))


def select_wavefront(
    gates: int, registers: int, dtype: str, H: int, T: int, B: int, layers: int, device: Device,
    *, backward: bool = False, separate_gates: int = 0, ieee: bool = False,
) -> Selection:  # fmt: skip
    """Return the configuration of a stack's layers as a wavefront, or None and the reasons.

    separate_gates: how many gates have different gradients of x and h.
    """
    if device.proven_only:
        return None, (unproven("wavefront"),)
    one, why = select(gates, registers, dtype, H, B, device, backward=backward, ieee=ieee)
    if dtype not in ITEMSIZE or device.capability < (8, 0):
        return None, why
    cost = CellCost(gates, registers, ITEMSIZE[dtype], ieee and dtype == "float32", ())
    grid = device.cooperative and "grid" in device.scopes
    fitting = [*candidates("grid", backward, cost, H, B, device, layers, separate_gates)] if grid else []
    if not fitting:
        mebibytes = layers * 2 * gates * H * H * cost.itemsize / 2**20
        what = f"[W | R] of {layers} layers, {mebibytes:.1f} MiB, on {device.multiprocessors} multiprocessors at once"
        return None, (f"grid scope: the weights don't fit on-chip: {what}",)
    best = fastest(fitting)
    slices = time_slices(best, T)
    if max(end - begin for begin, end in slices) < min(T, MIN_TIME_SLICE):
        mebibytes = best.launches * best.exchange_bytes(1) / 2**20
        what = f"the buffer between layers takes {mebibytes:.1f} MiB per time step"
        return None, (f"grid scope: {what}, and may take {MAX_EXCHANGE_BYTES >> 20} MiB",)
    step = one.waves * one.predicted_us if one else per_step_us(gates, cost.itemsize, H, B, cost.ieee)
    wavefront, in_turn = wavefront_us(best, slices), layer_by_layer_us(step, gates, H, T, B, layers, cost.ieee)
    if wavefront > in_turn:
        return None, (f"predicted {wavefront:.0f} us as a wavefront, {in_turn:.0f} us layer by layer",)
    return best, ()


def fastest(configs: list[PersistentConfig]) -> PersistentConfig:
    return min(configs, key=lambda config: config.waves * config.predicted_us)


def unproven(kind: str) -> str:
    return f"{UNPROVEN[kind]} by persistent kernels were wrong on a GPU; GPU_RNN_CUDA_UNPROVEN=1 allows them, for tests"


def why_not_on_chip(scope: str, cost: CellCost, H: int, device: Device) -> str:
    if scope == "cluster" and device.cluster_blocks < 2:
        return "cluster scope: this GPU has no thread block clusters"
    if scope == "grid" and not device.cooperative:
        return "grid scope: this GPU has no cooperative launch"
    most = {"block": 1, "cluster": device.cluster_blocks, "grid": min(device.multiprocessors, MAX_GRID_BLOCKS)}[scope]
    mebibytes = cost.gates * H * H * cost.itemsize / 2**20
    blocks = f"{most} block{'s' * (most > 1)}"
    return f"{scope} scope: the recurrent weights ({mebibytes:.1f} MiB) exceed the on-chip memory of {blocks}"


def candidates(
    scope: str, backward: bool, cost: CellCost, H: int, B: int, device: Device,
    layers: int = 1, separate_gates: int = 0,
) -> Iterator[PersistentConfig]:  # fmt: skip
    """Yield every configuration of a scope that fits. separate_gates: see `select_wavefront`."""
    rows, all_tiles = BATCH_TILE[cost.ieee], BATCH_TILES[cost.ieee]
    enough = next((tiles for tiles in all_tiles if tiles * rows >= B), all_tiles[-1])
    for unit_tiles in (1, 2, 4, 8):
        blocks = group_blocks(scope, -(-H // (UNIT_TILE * unit_tiles)), device, layers)
        if blocks is None:
            continue
        for batch_tiles in all_tiles[: all_tiles.index(enough) + 1]:
            for k_splits in (1, 2, 4, 8, 16):
                if unit_tiles * k_splits <= MAX_WARPS:
                    shape = (scope, blocks, unit_tiles, k_splits, batch_tiles)
                    config = fit(backward, shape, cost, B, device, layers, separate_gates if backward else 0)
                    if config is not None:
                        yield config


def group_blocks(scope: str, needed: int, device: Device, layers: int) -> int | None:
    """Blocks of a group that needs at least so many, or None. In the grid a single one is for wavefronts alone."""
    if scope == "block":
        return 1 if needed == 1 else None
    if scope == "cluster":
        sizes = sorted(blocks for blocks, _ in device.clusters if blocks >= needed > 1)
        return sizes[0] if sizes else None
    least, most = 2 if layers == 1 else 1, min(device.multiprocessors, MAX_GRID_BLOCKS)
    fits = least <= needed <= most and device.cooperative
    return needed if fits else None


def fit(
    backward: bool, shape: tuple[str, int, int, int, int], cost: CellCost, B: int, device: Device, layers: int,
    separate_gates: int,
) -> PersistentConfig | None:  # fmt: skip
    """Return the configuration with as many k tiles in registers as fit, the rest in shared memory, or None."""
    scope, blocks, unit_tiles, k_splits, batch_tiles = shape
    gates, registers, itemsize, ieee, reductions = cost
    threads = 32 * unit_tiles * k_splits
    rows = BATCH_TILE[ieee] * batch_tiles
    k_tiles = -(-blocks * UNIT_TILE * unit_tiles // (32 // itemsize * k_splits))
    elements = -(-UNIT_TILE * unit_tiles * rows // threads)
    gate_sets = 1 if backward else gates
    sums = max(gate_sets, 2) * rows if ieee else 4 * max(gate_sets * batch_tiles, 4) + 8 * (batch_tiles - 1)
    room = min(MAX_REGISTERS, REGISTER_FILE // threads // 8 * 8) - WORK_REGISTERS[scope] - sums - elements * registers
    fragments = 4 * (gates + separate_gates)  # registers of a k tile
    if layers > 1:  # two matrices; the bias of the input, or a received gradient
        fragments, room = 2 * fragments, room - WAVEFRONT_REGISTERS - elements * (2 if backward else gates)
    if elements > MAX_ELEMENTS:
        return None
    tiles = -(-B // rows)
    at_once = concurrent_groups(scope, blocks, device) // layers
    if at_once == 0:
        return None
    # A cooperative launch refuses blocks that can't be co-resident. More clusters than fit would run in turn, which an
    # H200 has not been seen to do right: both directions of IEEE float32, 144 blocks on 132 multiprocessors, failed.
    groups = tiles if scope == "block" else min(tiles, at_once)
    launches, waves = -(-tiles // max(groups, 1)), -(-tiles // at_once)
    # In chunks: UNPROVEN, since LSTM, bf16, H = 1024, B = 64, backward was wrong on a GPU.
    chunked = scope == "grid" and blocks > 1 and not (backward and layers > 1) and not device.proven_only
    for k_chunks in K_CHUNKS if chunked else (1,):
        left = room - CHUNK_REGISTERS * (elements - 1) * (k_chunks > 1)
        k_registers = min(k_tiles, left // fragments)
        if k_registers < k_tiles:
            k_registers = (left - LOAD_REGISTERS[ieee]) // fragments
        if k_registers < 0:
            return None
        config = PersistentConfig(
            backward, scope, blocks, unit_tiles, k_splits, k_registers, k_tiles - k_registers, batch_tiles, k_chunks,
            gates, itemsize, ieee, groups, launches, waves,
            layers=layers, reductions=reductions, separate_gates=separate_gates,
        )  # fmt: skip
        none_empty = (k_chunks - 1) * -(-config.k_tiles // k_chunks) < config.k_tiles
        if none_empty and config.shared_bytes <= device.shared_bytes:
            return config
    return None


def concurrent_groups(scope: str, blocks: int, device: Device) -> int:
    """How many groups of so many blocks the device runs at once."""
    return dict(device.clusters)[blocks] if scope == "cluster" else max(1, device.multiprocessors // blocks)
