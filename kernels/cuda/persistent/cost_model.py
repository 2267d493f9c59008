"""Predicted microseconds of a time step. They rank configurations, and decide between persistent and per-step kernels.

Constants marked "measured" are a least squares fit over 96 configurations of bf16 and TF32 LSTMs and GRUs, timed by
`python -m bench gpu --only plans` on an H200 at 1980 MHz: off by 8 % in the mean, by 22 % at worst. "documented" are
rates of the hardware. The rest is assumed. Keys False and True are forward and backward.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import PersistentConfig

CYCLES_PER_MICROSECOND = 1980.0  # measured
MMA_CYCLES = 8.0  # measured: of a tensor core, for mma.sync.m16n8k16 on sm_90; a k8 TF32 one takes as long
MMA_LATENCY_CYCLES = 33.0  # measured: until the sum may be an operand of the next mma
FMA_CYCLES = 1.0  # documented: of one of four schedulers, for 32 multiply-adds
SHARED_BYTES_PER_CYCLE = 128.0  # documented
FRAGMENT_US = 0.001  # measured: to issue the mma of a fragment
PARTIAL_SUMS = 2.4  # measured: multiple of the cycles that storing them takes, as they are read one by one, too
WARP_US = 0.022  # measured: per warp, at the barriers of a time step
ELEMENT_US = {False: 0.18, True: 0.37}  # measured: per element of a thread: cell, loads and stores
EXCHANGE_US = {"block": 0.3, "cluster": 0.13, "grid": 0.51}  # measured, of a block at H = 128 alone: all the rest
CLUSTER_US_PER_KB = 0.044  # measured: received by a multiprocessor
GRID_US_PER_WORD, GRID_US_PER_KB = 0.055, 0.003  # measured: 16-byte words received by a thread; KB by its block
REDUCTION_US = {"block": 0.1, "cluster": 0.6, "grid": 1.1}  # assumed: a reduction over hidden units
ZERO_BYTES_PER_US = 2e6  # assumed: zeroing the exchange buffer of a wavefront
LAUNCHES_US = 20.0  # measured: per-step kernels take a GEMM and a fused kernel, launched from Python
PASS_US = 1.0  # assumed: one pass of that kernel through a row, for a reduction
WEIGHT_BYTES_PER_US = 4e6  # assumed: of that GEMM
FLOPS_PER_US = {False: 4e8, True: 4e7}  # assumed: of a GEMM in 16 bits or TF32; in IEEE float32


def step_us(config: "PersistentConfig") -> float:
    """The slowest of arithmetic, its latency and shared memory; then the exchange and all the rest."""
    warps = config.unit_tiles * config.k_splits
    if config.ieee:
        fragment, latency = 4 * config.rows * FMA_CYCLES, 0.0
        read = 2 if config.gate_sets > 1 else 1  # cycles for a batch row of a k tile, by 16- or 8-byte loads
        operand = 1.0 * warps * config.k_tiles * config.rows * read
    else:
        fragment = config.batch_tiles * MMA_CYCLES
        chains = max(1, 4 // (config.gate_sets * config.batch_tiles))
        latency = config.k_tiles * MMA_LATENCY_CYCLES / chains
        operand = warps * config.k_tiles * config.rows * 32 / SHARED_BYTES_PER_CYCLE
    arithmetic = -(-warps // 4) * config.gate_sets * config.k_tiles * fragment
    weights = warps * config.gate_sets * config.values * config.k_shared * 512 / SHARED_BYTES_PER_CYCLE
    sums = config.k_splits * config.gate_sets * config.rows * config.units * 4 / SHARED_BYTES_PER_CYCLE
    matmul = (max(arithmetic, latency, operand + weights) + PARTIAL_SUMS * sums) / CYCLES_PER_MICROSECOND
    matmul += FRAGMENT_US * config.k_tiles * config.gate_sets * config.batch_tiles
    rest = EXCHANGE_US[config.scope] + WARP_US * warps + ELEMENT_US[config.backward] * config.elements
    received = 0.0
    if config.scope == "cluster":
        bytes_ = (config.blocks - 1) * config.values * config.units * config.rows * config.itemsize
        received = CLUSTER_US_PER_KB * bytes_ / 1e3
    elif config.scope == "grid":
        bytes_ = config.round_bytes if config.blocks > 1 else 0
        if config.layers > 1:
            bytes_ += config.dx_bytes if config.backward else config.round_bytes  # from the other layer
        received = bytes_ * (GRID_US_PER_WORD / 16 / config.threads + GRID_US_PER_KB / 1e3)
    # the second matmul of a wavefront, with the input weights, overlaps the exchange
    second = max(0.0, matmul - EXCHANGE_US[config.scope]) if config.layers > 1 else 0.0
    return matmul + second + rest + received + len(config.reductions) * REDUCTION_US[config.scope]


def per_step_us(gates: int, itemsize: int, H: int, B: int, ieee: bool, levels: int = 0) -> float:
    """A time step of stepwise.cu: two launches, a GEMM that reads R from L2 or memory, a pass for each reduction."""
    weights = gates * H * H * itemsize / WEIGHT_BYTES_PER_US
    return LAUNCHES_US + levels * PASS_US + max(weights, 2 * B * gates * H * H / FLOPS_PER_US[ieee])


def wavefront_us(config: "PersistentConfig", time_slices: list[tuple[int, int]]) -> float:
    """A whole sequence, all layers in one launch for each time slice."""
    spans = [end - begin for begin, end in time_slices]
    steps = sum(spans) + len(spans) * config.layer_lag * (config.layers - 1)
    zeros = config.launches * sum(map(config.exchange_bytes, spans)) / ZERO_BYTES_PER_US
    return config.waves * steps * config.predicted_us + zeros + (len(spans) - 1) * LAUNCHES_US


def layer_by_layer_us(step_us: float, gates: int, H: int, T: int, B: int, layers: int, ieee: bool) -> float:
    """A whole sequence, one layer after the other, with the input projections of all but the first."""
    projection = LAUNCHES_US / 2 + 2 * T * B * gates * H * H / FLOPS_PER_US[ieee]
    return layers * T * step_us + (layers - 1) * projection
