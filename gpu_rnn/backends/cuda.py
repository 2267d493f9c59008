"""CUDA: the kernels of kernels/cuda, compiled by CuPy at first use, on the arrays and the stream of the caller.

Where the recurrent weights fit on-chip, a whole pass is one launch of a persistent kernel (persistent.cu); else the
`per_step` loop runs one matmul and one launch per time step. Both save the same activations. Memory comes from the
caller's library alone, and nothing waits for the GPU: after `warmup`, or one call, a CUDA graph can capture it.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.cuda import persistent, stepwise
from gpu_rnn.kernels.cuda.launch import OPTIONS, Launch, Runner, Unit

from ..core import arrays, optional_imports
from ..core.problem import Grads, Memory, Problem, Result, Run
from . import gpu_common, per_step
from .gpu_common import BackwardBuffers, ForwardBuffers
from .gpu_common import gemm_operands as gemm_operands
from .gpu_common import saved_shapes as saved_shapes
from .protocol import Needs, backward_in_turn, forward_in_turn

NAME = "cuda"
RUNS_HEADS = REPEATS_INPUTS = False
MIN_STEPS = 4  # fewer don't repay loading the weights


def reasons(problem: Problem) -> list[str]:
    why = [reason for reason in (optional_imports.no_gpu(), optional_imports.missing("cupy")) if reason is not None]
    if problem.device != "cuda":
        why.append(problem.elsewhere)
    if problem.dtype not in arrays.DTYPES:
        why.append(f"has no kernel for {problem.dtype}, only for {', '.join(arrays.DTYPES)}")
    if (problem.library, problem.dtype) == ("cupy", "bfloat16"):
        why.append("takes no bfloat16 CuPy arrays, since CuPy supports this dtype in part; pass torch tensors")
    return why


def plan(problem: Problem) -> str:
    lines = [gpu_common.describe_projection(problem)]
    for backward in passes(problem):
        config, why = persistent_config(problem, device(), backward)
        text = f"{gpu_common.describe_per_step(problem)}; no persistent kernel: {'; '.join(why)}"
        if config and why:
            text = f"{config}; {config.directions} of {problem.directions} runs at a time: {'; '.join(why)}"
        text = text if why else str(config)
        if problem.layers > 1:
            wavefront, against = wavefront_config(problem, device(), backward)
            text = str(wavefront) if wavefront else f"{text}; layer by layer: {'; '.join(against)}"
        lines.append(f"{'backward' if backward else 'forward'}: {text}")
    return "\n".join(lines)


def method(problem: Problem, backward: bool) -> str:
    config, _ = (wavefront_config if problem.layers > 1 else persistent_config)(problem, device(), backward)
    return "per-step" if config is None else f"persistent/{config.scope}"


def memory(problem: Problem) -> Memory:
    return memory_on(problem, device())


def memory_on(problem: Problem, on: persistent.Device) -> Memory:
    """Of one layer by itself: in a wavefront the upper ones have no input projection."""
    workspace, own = per_step.memory(problem), []
    for backward in (False, True):
        config, _ = persistent_config(problem, on, backward)
        if config is None:
            own.append(workspace[backward])
        else:
            own.append(config.launches * config.exchange_bytes(problem.T) // config.directions)
    return gpu_common.memory(problem, *own)


def passes(problem: Problem) -> tuple[bool, ...]:
    """Whether each pass that a problem has is the backward one."""
    return (False, True) if problem.training else (False,)


def forward(problem: Problem, runs: Sequence[Run]) -> list[Result]:
    if problem.layers > 1 and not fuses_layers(problem, backward=False):
        return forward_in_turn(forward, problem, runs)
    with stream_of(runs[0].x), arrays.matmul_precision(runs[0].x, problem.tf32):
        return gpu_common.forward(partial(run_forward, launcher(), device(), query=max_coresident), problem, runs)


def backward(
    problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads], needs: Sequence[Needs]
) -> list[dict[str, Any]]:
    if problem.layers > 1 and not fuses_layers(problem, backward=True):
        return backward_in_turn(backward, problem, runs, saved, grads, needs)
    with stream_of(runs[0].x), arrays.matmul_precision(runs[0].x, problem.tf32):
        loop = partial(run_backward, launcher(), device(), query=max_coresident)
        return gpu_common.backward(loop, problem, runs, saved, grads, needs)


def fuses_layers(problem: Problem, backward: bool) -> bool:
    key = "wavefront", device(), backward, max_coresident
    return problem.decide(key, wavefront_config, problem, device(), backward, max_coresident)[0] is not None


def warmup(problem: Problem) -> tuple[str, ...]:
    """Compile what a problem needs, for the current device, and run nothing. -> the kernels."""
    kernels = list(kernels_of(problem, max_coresident))
    for unit, kernel in kernels:
        loaded(unit, kernel)
    return tuple(kernel for _, kernel in kernels)


def kernels_of(problem: Problem, query: "Query | None" = None) -> Iterator[tuple[Unit, str]]:
    """What a problem needs on the current device. Without `query` the driver isn't queried, and nothing is compiled."""
    configs = [persistent_config(problem, device(), backward, query)[0] for backward in passes(problem)]
    if problem.layers > 1:
        fused = [wavefront_config(problem, device(), backward, query)[0] for backward in passes(problem)]
        configs = [wavefront or config for wavefront, config in zip(fused, configs)]
    for config in filter(None, configs):
        yield persistent.translation_unit(config, problem.cell, problem.dtype), persistent.kernel_name(config)
    if all(configs):
        return
    product = arrays.product_dtype(problem.library, problem.dtype)
    for kernel in KERNELS.values():
        launch = stepwise.launch(
            kernel, problem.cell, B=problem.B, H=problem.H, R=1, storage=problem.dtype, product=product, addresses=()
        )
        yield launch.unit, launch.kernel


# ---- The configuration of a pass ------------------------------------------------------------------------------------


# How many clusters of a configuration, or blocks of its grid, are co-resident: of its kernel for a cell and a dtype.
Query = Callable[[Cell, str, persistent.PersistentConfig], int]
Choice = tuple[persistent.PersistentConfig | None, Sequence[str]]


def persistent_config(problem: Problem, on: persistent.Device, backward: bool, query: Query | None = None) -> Choice:
    """The configuration of the persistent kernel for one pass, or why there is none.

    For a problem of more runs (directions, heads) than can share a launch, it is the configuration of as many as can,
    and the reasons why no more. Without `query` nothing is compiled, and the driver isn't queried.
    """
    why: list[str] = []
    if problem.B == 0:
        why.append("the batch is empty")
    if problem.P is not None:
        why.append("a projection (w_hr) takes a second matmul per time step")
    if problem.T < MIN_STEPS and not problem.step_exact:
        why.append(f"T = {problem.T}: fewer than {MIN_STEPS} time steps don't repay loading the weights")
    if why:
        return None, why
    sizes = problem.H, problem.B, problem.directions
    return config_of(problem.cell, problem.dtype, *sizes, on, backward, not problem.tf32, query)


def wavefront_config(problem: Problem, on: persistent.Device, backward: bool, query: Query | None = None) -> Choice:
    """The configuration by which the layers of a stack run one pass at once, or why they don't."""
    cell, dtype, ieee = problem.cell, problem.dtype, not problem.tf32
    if problem.B == 0 or problem.P is not None or problem.T < MIN_STEPS:
        return None, persistent_config(problem, on, backward)[1]
    if cell.has_reduction:
        return None, ("it reduces over hidden units, which the wavefront kernel does not support",)
    if cell.E:
        return None, (f"the wavefront kernel does not support modifiers ({cell.label})",)
    sizes = problem.H, problem.T, problem.B, problem.layers
    element, apart = persistent.registers_per_element(cell, backward=backward), sum(cell.separate)
    config, why = persistent.select_wavefront(
        cell.G, element, dtype, *sizes, on, backward=backward, separate_gates=apart, ieee=ieee
    )
    if config is not None and query is not None:
        _, fewer = persistent.check_occupancy(config, on, partial(query, cell, dtype))
        if fewer is not None:
            return None, (fewer,)
    return config, why


@lru_cache(maxsize=1024)  # the search takes milliseconds, and its result is the same for every T
def config_of(
    cell: Cell, dtype: str, H: int, B: int, runs: int, on: persistent.Device, backward: bool, ieee: bool,
    query: Query | None,
) -> Choice:  # fmt: skip
    if runs > 1:
        single, why = config_of(cell, dtype, H, B, 1, on, backward, ieee, query)
        if single is None:
            return None, why
        fused, why = persistent.fuse_runs(single, runs, B, on, query and partial(query, cell, dtype))
        return fused or single, why
    element = persistent.registers_per_element(cell, backward=backward)
    reductions = persistent.reductions(cell, backward=backward)
    how: dict[str, Any] = {"backward": backward, "ieee": ieee, "reductions": reductions}
    predicted = persistent.select(cell.G, element, dtype, H, B, on, **how)
    if query is None:
        return predicted
    config, why = persistent.select_verified(
        cell.G, element, dtype, H, B, on, occupancy=partial(query, cell, dtype), **how
    )
    if config != predicted[0]:
        what = f"{cell.label}, H={H} B={B} {dtype}: {'; '.join(why)}; using {config or 'per-step kernels'} instead"
        warnings.warn(what, RuntimeWarning, stacklevel=2)
    return config, why


# ---- The time loop: a persistent kernel where there is a configuration, else per step -------------------------------


def run_pass(
    backward: bool, run: Runner, on: persistent.Device, problem: Problem, buffers: Sequence[Any],
    query: Query | None = None,
) -> None:  # fmt: skip
    """One pass of all runs."""
    rows = gpu_common.aux_rows(buffers[0].aux)
    launches = problem.decide((run, on, backward, query, rows), launches_of, run, on, problem, backward, query, rows)
    if launches is None:
        (per_step.run_backward if backward else per_step.run_forward)(partial(bind, run), problem, buffers)
        return
    for k in range(0, len(buffers), launches.instances):
        launch_persistent(launches, buffers[k : k + launches.instances], backward_args if backward else forward_args)


run_forward, run_backward = partial(run_pass, False), partial(run_pass, True)


def config_for(
    problem: Problem, on: persistent.Device, backward: bool, query: Query | None
) -> persistent.PersistentConfig | None:
    """The configuration of a pass, decided once for a problem."""
    kind, choose = ("wavefront", wavefront_config) if problem.layers > 1 else ("persistent", persistent_config)
    config, why = problem.decide((kind, on, backward, query), choose, problem, on, backward, query)
    assert config is not None or problem.layers == 1, why
    return config


class Launches(NamedTuple):
    """All launches of the persistent kernel in one pass, ready to be repeated."""

    instances: int  # runs of a launch
    per_part: int  # of the sequence, one after the other: each is of a part of the batch
    exchange_bytes: int  # of one launch
    parts: Sequence[tuple[int, int, Sequence[Callable[..., None]]]]  # of the sequence: from and to, and its launches


def launches_of(
    run: Runner, on: persistent.Device, problem: Problem, backward: bool, query: Query | None, rows: int
) -> Launches | None:
    """Those of a pass; None where it goes per step. rows: batch rows of the per-unit values, B or 1."""
    config = config_for(problem, on, backward, query)
    if config is None:
        return None
    parts = []
    for begin, end in persistent.time_slices(config, problem.T):
        sizes = end - begin, problem.B, problem.H, rows
        sequence = persistent.launches(config, problem.cell, problem.dtype, *sizes, save=problem.saves or backward)
        parts.append((begin, end, tuple(map(run, sequence))))
    longest = max(end - begin for begin, end, _ in parts)
    return Launches(config.instances, config.launches, config.exchange_bytes(longest), parts)


def forward_args(buffers: ForwardBuffers) -> tuple:
    """The arrays of `persistent_forward`, in its order."""
    b = buffers
    from_below = b.w_ih, None if b.w_ih is None else b.b_ih
    return b.Wx, b.w_hh, b.b_hh, b.h0, b.cell_states, b.saved, b.y, *b.aux, *from_below


def backward_args(buffers: BackwardBuffers) -> tuple:
    """The arrays of `persistent_backward`, in its order."""
    b = buffers
    read, written = (b.y, b.h0, b.cell_states, b.saved), (b.dWx, b.dRh, b.dhistory, b.dunits)
    return b.dy, b.dh, b.dcell_states, b.w_hh, *read, *written, *b.aux, b.w_ih


def launch_persistent(launches: Launches, buffers: Sequence[Any], args_of: Callable[[Any], tuple]) -> None:
    """Run the persistent kernel for as many runs as share it. args_of: see `forward_args`."""
    like, (_, per_part, bytes_, parts) = buffers[0].w_hh, launches
    exchange = arrays.zeros((per_part * bytes_,), like=like, dtype="uint8") if bytes_ else None
    address = arrays.pointer(exchange)
    for n, (begin, end, launched) in enumerate(parts):
        if n > 0 and exchange is not None:
            exchange[...] = 0  # the sequence numbers of the part before would satisfy this one's waits
        these = buffers if len(parts) == 1 else [one.time_slice(begin, end) for one in buffers]
        members = [persistent.Instance(arrays.pointers(args_of(one), like), one.reverse) for one in these]
        words = persistent.kernel_params(members)
        for k, launch in enumerate(launched):
            launch(words, address + k * bytes_)


KERNELS = {per_step.Step: "stepwise_forward", per_step.Grad: "stepwise_backward"}


def bind(run: Runner, cell: Cell, buffers: per_step.Step | per_step.Grad) -> Callable[..., None]:
    """Bind a per-step kernel to its arrays."""
    product = buffers.Rh if isinstance(buffers, per_step.Step) else buffers.dh_recurrent
    _, B, H = buffers.y.shape
    R = 1 if buffers.units is None else buffers.units.shape[1]
    return run(
        stepwise.launch(
            KERNELS[type(buffers)], cell, B=B, H=H, R=R, storage=arrays.dtype(buffers.y), product=arrays.dtype(product),
            addresses=tuple(map(arrays.pointer, buffers)),
        )
    )  # fmt: skip


# ---- CuPy -----------------------------------------------------------------------------------------------------------


WATCHDOG = ("-DWATCHDOG",) if os.environ.get("GPU_RNN_WATCHDOG") else ()  # a wait of over 2 s ends its kernel


def text(unit: Unit) -> tuple[str, tuple[str, ...]]:
    """What is compiled: the source and the options."""
    return unit.source, (*OPTIONS, *WATCHDOG, *(f"-D{name}={value}" for name, value in unit.defines))


def cupy() -> Any:
    return optional_imports.require("cupy", "the cuda backend")


@cache
def module(unit: Unit) -> Any:
    """A cupy.RawModule, which compiles once per device and keeps the result on disk."""
    code, options = text(unit)
    return cupy().RawModule(code=code, options=options)


@cache
def loaded(unit: Unit, kernel: str) -> Any:
    return module(unit).get_function(kernel)


def prepare_kernel(unit: Unit, kernel: str, shared: int, cluster: int) -> Any:
    """Load a kernel, and allow it so many bytes of shared memory and blocks in a cluster."""
    raw = loaded(unit, kernel)
    if shared > DEFAULT_SMEM_BYTES:
        raw.max_dynamic_shared_size_bytes = shared
    if cluster > PORTABLE_CLUSTER:
        driver().allow_large_clusters(raw.kernel.ptr)
    return raw


def prepare_launch(launch: Launch) -> Callable[..., None]:
    """Load a kernel on the current device, compiled if need be -> a function that launches it on the current stream.

    Nothing is launched here. This is a `Runner`.
    """
    function = prepare_kernel(launch.unit, launch.kernel, launch.shared, launch.cluster[0]).kernel
    if launch.cooperative:
        most = coresident(function.ptr, launch.block[0], launch.shared)
        if launch.grid[0] > most:  # CuPy would launch fewer blocks, which would wait for the others for ever
            raise RuntimeError(
                f"{launch.kernel}: a cooperative launch of {launch.grid[0]} blocks of {launch.block[0]} threads, and "
                f"the device holds {most} at once"
            )

    def launch_again(*more: int) -> None:
        function(
            launch.grid, launch.block, (*launch.arguments, *more), shared_mem=launch.shared,
            enable_cooperative_groups=launch.cooperative,
        )  # fmt: skip

    return launch_again


def launcher() -> Runner:
    """`prepare_launch`, as an object of its own for each device: it is a key of `Problem.decide`, so that a launch
    prepared on one device is never used on another."""
    return launcher_of(cupy().cuda.Device().id)


@cache
def launcher_of(index: int) -> Runner:
    return partial(prepare_launch)


DEFAULT_SMEM_BYTES = 48 << 10  # more must be requested, kernel by kernel
CLUSTERS, PORTABLE_CLUSTER = (2, 4, 8, 16), 8  # blocks; more than the latter must be requested, too


# ---- What fits the device at once, as the driver knows it -----------------------------------------------------------


def max_coresident(cell: Cell, dtype: str, config: persistent.PersistentConfig) -> int:
    """`Query` of the current device."""
    cupy().cuda.Device().use()  # gives a thread that is new to it its context
    in_cluster = config.blocks if config.scope == "cluster" else 1
    unit, shared = persistent.translation_unit(config, cell, dtype), config.shared_bytes
    kernel = prepare_kernel(unit, persistent.kernel_name(config), shared, in_cluster).kernel
    if config.scope == "cluster":
        return driver().clusters(kernel.ptr, config.blocks, config.threads, shared)
    return coresident(kernel.ptr, config.threads, shared)


@cache
def coresident(function: int, threads: int, shared: int) -> int:
    """How many blocks of a kernel the current device holds at once. function: a CUfunction, which has one device."""
    return device().multiprocessors * driver().blocks(function, threads, shared)


# What configurations may use: a scope that failed on a machine can be left out there.
SCOPES = tuple(filter(None, os.environ.get("GPU_RNN_CUDA_SCOPES", ",".join(persistent.SCOPES)).split(",")))
PROVEN_ONLY = not os.environ.get("GPU_RNN_CUDA_UNPROVEN")


def device() -> persistent.Device:
    """The current device, by what configurations depend on."""
    return device_of(cupy().cuda.Device().id, SCOPES, PROVEN_ONLY)


@cache
def device_of(index: int, scopes: tuple[str, ...], proven_only: bool) -> persistent.Device:
    """Of a part of a device (MIG, MPS) the driver says how many multiprocessors it has, and how many clusters fit."""
    properties = cupy().cuda.runtime.getDeviceProperties(index)
    capability, shared = (properties["major"], properties["minor"]), properties["sharedMemPerBlockOptin"]
    clusters = max_active_clusters(shared) if capability >= (9, 0) else ()
    return persistent.Device(
        capability, properties["multiProcessorCount"], shared, clusters,
        cooperative=bool(properties["cooperativeLaunch"]), scopes=scopes, proven_only=proven_only,
    )  # fmt: skip


def max_active_clusters(shared: int) -> tuple[tuple[int, int], ...]:
    """By size, how many clusters are co-resident whose blocks have a multiprocessor each."""
    counts, module = [], cluster_probe_module()
    for n in CLUSTERS:
        raw = module.get_function(f"cluster_of_{n}")
        raw.max_dynamic_shared_size_bytes = shared
        if n > PORTABLE_CLUSTER:
            driver().allow_large_clusters(raw.kernel.ptr)
        counts.append((n, driver().clusters(raw.kernel.ptr, n, 32, shared)))
    return tuple((n, count) for n, count in counts if count)


def cluster_probe_module() -> Any:
    """A cupy.RawModule of a kernel for each cluster size, to query."""
    code = "".join(f'extern "C" __global__ void __cluster_dims__({n}) cluster_of_{n}() {{}}\n' for n in CLUSTERS)
    return cupy().RawModule(code=code, options=OPTIONS)


class Driver:
    """What CuPy has no function for, through the driver that it has loaded. Functions are CUfunctions."""

    NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # of CUfunction_attribute
    INVALID_CLUSTER_SIZE = 912  # of CUresult

    class Configuration(ctypes.Structure):  # CUlaunchConfig
        _fields_ = (
            *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
            ("shared", ctypes.c_uint),
            ("stream", ctypes.c_void_p),
            ("attributes", ctypes.c_void_p),
            ("attribute_count", ctypes.c_uint),
        )

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")

    def allow_large_clusters(self, function: int) -> None:
        attribute = self.NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        self.check("cuFuncSetAttribute", self.library.cuFuncSetAttribute(ctypes.c_void_p(function), attribute, 1))

    def blocks(self, function: int, threads: int, shared: int) -> int:
        """How many blocks a multiprocessor has at once."""
        count, name = ctypes.c_int(), "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        query = getattr(self.library, name)
        self.check(name, query(ctypes.byref(count), ctypes.c_void_p(function), threads, ctypes.c_size_t(shared)))
        return count.value

    def clusters(self, function: int, blocks: int, threads: int, shared: int) -> int:
        """How many clusters of so many blocks the device has at once, of a kernel that declares this size."""
        count, name = ctypes.c_int(), "cuOccupancyMaxActiveClusters"
        launch = self.Configuration(blocks, 1, 1, threads, 1, 1, shared)
        status = getattr(self.library, name)(ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(launch))
        if status == self.INVALID_CLUSTER_SIZE:
            return 0
        self.check(name, status)
        return count.value

    @staticmethod
    def check(name: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{name}: CUresult {status}")


@cache
def driver() -> Driver:
    return Driver()


@contextmanager
def stream_of(x: Any) -> Iterator[None]:
    """CuPy on the device of x, and on the stream that the library of x uses there."""
    cuda = cupy().cuda
    if arrays.library(x) == "cupy":
        with x.device:
            yield
        return
    stream = arrays.module("torch").cuda.current_stream(x.device)
    if hasattr(stream, "__cuda_stream__") and hasattr(cuda.Stream, "from_external"):
        borrowed = cuda.Stream.from_external(stream)
    else:  # torch or CuPy of before the protocol
        borrowed = cuda.ExternalStream(stream.cuda_stream, x.device.index)
    with cuda.Device(x.device.index), borrowed:
        yield
