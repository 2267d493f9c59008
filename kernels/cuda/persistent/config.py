"""What a launch of persistent.cu is, as frozen data: which block holds which weights, and where."""

from dataclasses import dataclass, replace

from . import cost_model

SCOPES = ("block", "cluster", "grid")  # SCOPE 0, 1, 2 of persistent.cu
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
UNIT_TILE = 16  # rows of an mma: hidden units come in tiles of so many
BATCH_TILE = {False: 8, True: 2}  # columns of an mma; with IEEE float32, batch rows that lanes share out
REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor, on all architectures since sm_70
REDUCTION_SEGMENTS = 16  # at most: blocks of a grid whose sums different threads add up


@dataclass(frozen=True)
class Device:
    """What a configuration depends on, as the driver reports it."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that a block may request
    clusters: tuple[tuple[int, int], ...] = ()  # (blocks of a cluster, how many such clusters are co-resident)
    cooperative: bool = True  # a cooperative launch is possible
    scopes: tuple[str, ...] = SCOPES  # that may be used
    proven_only: bool = False  # without the kinds of configurations in `UNPROVEN`

    @property
    def cluster_blocks(self) -> int:
        """The largest cluster that can be launched."""
        return max((blocks for blocks, _ in self.clusters), default=1)

    def with_occupancy(self, config: "PersistentConfig", count: int) -> "Device":
        """This device, where `count` clusters of the configuration, or blocks of its grid, are co-resident."""
        if config.scope == "grid":
            return replace(self, multiprocessors=max(1, count), cooperative=count > 0)
        others = tuple(entry for entry in self.clusters if entry[0] != config.blocks)
        return replace(self, clusters=(*others, (config.blocks, count)) if count else others)


# Kinds of configurations whose results were wrong, or which hung, on the first GPU that they ran on (an H200,
# 2026-11-29), while all tests on the CPU pass. Until a GPU has confirmed them, tests alone use them.
UNPROVEN = {
    "ieee": "IEEE float32 matmuls",
    "wavefront": "layers as a wavefront",
    "chunks": "operands received in chunks",
}
# Runs (directions, heads) of one launch, by `proven_only`: no GPU has run more than two yet. Their addresses, 136 bytes
# a run, are arguments of the kernel, which may take 4 KiB.
MAX_RUNS = {True: 2, False: 28}

DEVICES = {  # for selection without a device, of all kinds; where there is a device, the driver is queried
    "a100": Device((8, 0), 108, 166912),
    "h100": Device((9, 0), 132, 232448, ((2, 66), (4, 32), (8, 16), (16, 8))),
    "h200": Device((9, 0), 132, 232448, ((2, 66), (4, 32), (8, 16), (16, 8))),
    "b200": Device((10, 0), 148, 232448, ((2, 74), (4, 36), (8, 16), (16, 8))),
    "rtx5090": Device((12, 0), 170, 101376, ((2, 85), (4, 42), (8, 20))),
}


@dataclass(frozen=True)
class PersistentConfig:
    """A configuration of persistent.cu, for one direction of time. The same numbers are its macros.

    A group of `blocks` blocks holds one copy of the recurrent weights, and computes one batch tile of one instance: a
    direction, or a layer of a wavefront.
    """

    backward: bool
    scope: str
    blocks: int  # of a group
    unit_tiles: int  # of 16 hidden units, per block
    k_splits: int  # warps that share a unit tile
    k_registers: int  # k tiles of a warp in registers, backward per gate ...
    k_shared: int  # ... and in shared memory
    batch_tiles: int  # of 8 batch rows, or of 2 if `ieee`, per group
    k_chunks: int  # in which the operand is received, one after the other
    gates: int
    itemsize: int  # bytes of a stored number
    ieee: bool  # float32 is multiplied by fused multiply-adds, not as TF32
    groups: int  # batch tiles of one launch
    launches: int  # one after another, where the groups can't all be co-resident
    waves: int  # how often the device is filled, in all launches
    directions: int = 1  # instances in one launch, directions or heads ...
    layers: int = 1  # ... likewise; above 1 it is a wavefront, and blocks hold input weights, too
    reductions: tuple[int, ...] = ()  # one after the other in a time step: the means over hidden units of each
    separate_gates: int = 0  # of a wavefront, backward: gates exchanged twice, as x and h have different gradients

    @property
    def units(self) -> int:
        """Hidden units of a block."""
        return UNIT_TILE * self.unit_tiles

    @property
    def rows(self) -> int:
        """Batch rows of a group."""
        return BATCH_TILE[self.ieee] * self.batch_tiles

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.unit_tiles * self.k_splits

    @property
    def elements(self) -> int:
        """Of a thread: each is a hidden unit of a batch row."""
        return -(-self.units * self.rows // self.threads)

    @property
    def instances(self) -> int:
        """Directions, heads or layers of a launch."""
        return self.directions * self.layers

    @property
    def grid(self) -> int:
        """Blocks of a launch."""
        return self.instances * self.groups * self.blocks

    @property
    def layer_lag(self) -> int:
        """Time steps that a layer of a wavefront runs behind the one it takes its input, or gradient, from."""
        return 2 if self.backward else 1

    @property
    def gate_sets(self) -> int:
        """Sets of 16 rows that a warp multiplies: forward one per gate."""
        return 1 if self.backward else self.gates

    @property
    def values(self) -> int:
        """Values exchanged per hidden unit and batch row."""
        return self.gates + self.separate_gates if self.backward else 1

    @property
    def k_tiles(self) -> int:
        """Of a warp and a gate set."""
        return self.values * (self.k_registers + self.k_shared)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; persistent_block.cuh asserts that it computes the same."""
        operand = self.rows * (self.k_splits * -(-self.k_tiles // self.k_chunks) * 32 + 16)
        staged = -(-self.rows // 3) * 3 * self.values * self.units * self.itemsize if self.scope == "grid" else 0
        sums = self.k_splits * self.gate_sets * self.rows * (self.units + 4) * 4
        weights = self.unit_tiles * self.k_splits * self.gate_sets * self.values * self.k_shared * 512
        buffers = 2 if self.scope == "cluster" else 1
        total = buffers * operand + staged + sums + weights + 16 + self.reduction_bytes
        if self.layers == 1:
            return total
        return total + (sums + weights if self.backward else total)

    @property
    def reduction_bytes(self) -> int:
        """Shared memory for reductions over hidden units."""
        if not self.reductions:
            return 0
        sums = max(self.reductions) * self.rows
        segments = min(self.blocks, REDUCTION_SEGMENTS)
        of_group = {"block": 0, "cluster": 2 * sums * self.blocks, "grid": segments * -(-sums // 3) * 3}
        barriers = 16 if self.scope == "cluster" else 0
        return -(-((2 * sums * self.unit_tiles + of_group[self.scope]) * 4 + barriers) // 16) * 16

    @property
    def round_bytes(self) -> int:
        """Bytes of a group's exchange round in the grid: words of a flag and 4 bytes of three batch rows each."""
        return -(-self.rows // 3) * self.blocks * self.values * self.units * self.itemsize // 4 * 16

    @property
    def dx_bytes(self) -> int:
        """Bytes per block and time step for the layer below, backward: a word of 8, with a flag, for each element."""
        return 8 * self.units * self.rows if self.backward and self.layers > 1 else 0

    def exchange_bytes(self, T: int) -> int:
        """Zeroed bytes that one launch over T time steps needs in the grid: two exchange rounds of a group, or all that
        another layer reads; two reductions; and the gradients for the layers below."""
        if self.scope != "grid":
            return 0
        rounds = T + 1 if self.layers > 1 and not self.backward else 2
        reduction = 16 * self.blocks * -(-max(self.reductions, default=0) * self.rows // 3)
        dx = (self.layers - 1) * self.groups * T * self.blocks * self.dx_bytes
        return self.instances * self.groups * (rounds * self.round_bytes + 2 * reduction) + dx

    @property
    def predicted_us(self) -> float:
        """Predicted microseconds of a time step."""
        return cost_model.step_us(self)

    def defines(self) -> dict[str, int]:
        """The macros."""
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
            "K_CHUNKS": self.k_chunks,
            "DIRECTIONS": self.directions,
            "LAYERS": self.layers,
            "SHARED_BYTES": self.shared_bytes,
        }

    def __str__(self) -> str:
        on_chip = f"{self.k_registers} k-tiles per warp in registers"
        if self.k_shared:
            on_chip += f", {self.k_shared} in shared memory"
        matmul = "16-bit" if self.itemsize == 2 else "IEEE float32" if self.ieee else "TF32"
        several = f"{self.directions} runs in one launch; " if self.directions > 1 else ""
        if self.layers > 1:
            several = f"{self.layers} layers as a wavefront in one launch; "
        count = self.instances * self.groups
        blocks = f"{count} groups of " * (count > 1) + f"{self.blocks} block{'s' * (self.blocks > 1)}"
        launches = f"{self.launches} launch{'es' * (self.launches > 1)}"
        return (
            f"persistent kernel ({self.scope} scope): {several}{blocks} of {self.threads} threads, {self.units} hidden "
            f"units per block, {self.rows} sequences per group; recurrent weights on-chip: {on_chip}; "
            f"{matmul} matmuls; {launches}; predicted {self.predicted_us:.2f} us per time step"
        )
