"""CUDA: the kernels of kernels/cuda, compiled by CuPy at first use, on the arrays and the stream of the caller.

Where the recurrent weights fit the chip, a whole sequence is one launch that holds them there (persistent.cu); else
`stepwise` walks through time with one product and one launch per instant. Both leave the same tape. Memory comes from
the caller's library alone, and nothing waits for the GPU: after `warmup`, or one run, a CUDA graph can capture it.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda import stepwise as plans
from gpu_rnn.kernels.cuda.launch import OPTIONS, Launch, Runner, Unit

from ..core import arrays, optional_imports
from ..core.problem import Direction, Memory, Problem, Weights
from . import gpu_common, per_step
from .gpu_common import factors as factors
from .gpu_common import history as history

NAME = "cuda"


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
    ways = [gpu_common.projection(problem)]
    for backward in ways_of(problem):
        resident, why = residence_of(problem, device(), backward)
        each = f"{gpu_common.per_step(problem)}; no persistent kernel: {'; '.join(why)}"
        if resident and why:
            each = f"{resident}; one direction after the other: {'; '.join(why)}"
        each = each if why else str(resident)
        if problem.layers > 1:
            wavefront, against = stack_of(problem, device(), backward)
            each = str(wavefront) if wavefront else f"{each}; layer by layer: {'; '.join(against)}"
        ways.append(f"{'backward' if backward else 'forward'}: {each}")
    return "\n".join(ways)


def method(problem: Problem, backward: bool, stacked: bool = False) -> str:
    """How one way through time is run, in a word, for the name of a profiler's range."""
    found, _ = (stack_of if stacked else residence_of)(problem, device(), backward)
    return "per-step" if found is None else f"persistent/{found.scope}"


def memory(problem: Problem) -> Memory:
    return memory_on(problem, device())


def memory_on(problem: Problem, on: persistent.Device) -> Memory:
    """Of one layer by itself: in a wavefront the upper ones have no input part."""
    workspace, own = per_step.memory(problem), []
    for backward in (False, True):
        plan, _ = residence_of(problem, on, backward)
        own.append(plan.launches * plan.exchange_bytes(problem.T) // plan.directions if plan else workspace[backward])
    return gpu_common.memory(problem, *own)


def ways_of(problem: Problem) -> tuple[bool, ...]:
    """Through time: whether backward."""
    return (False, True) if problem.training else (False,)


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, tf32: bool = False, save: bool,
    step_exact: bool = False,
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    with stream_of(x), arrays.products(x, tf32):
        step = partial(walk, runner(), device(), held=held)
        return gpu_common.forward(
            step, cell, x, weights, state, reverse=reverse, tf32=tf32, save=save, step_exact=step_exact
        )


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    with stream_of(x), arrays.products(x, tf32):
        step = partial(walk_back, runner(), device(), held=held)
        return gpu_common.backward(
            step, cell, x, weights, state, y, tape, dy, dlast, dhistory, reverse=reverse, tf32=tf32, needs=needs
        )


def forwards(
    cell: Cell, directions: Sequence[Direction], *, tf32: bool, save: bool, step_exact: bool = False
) -> list[tuple[Any, tuple, tuple]]:
    with stream_of(directions[0].x), arrays.products(directions[0].x, tf32):
        step = partial(walk, runner(), device(), held=held)
        return gpu_common.forwards(step, cell, directions, tf32=tf32, save=save, step_exact=step_exact)


def backwards(
    cell: Cell, directions: Sequence[Direction], recorded: Sequence[gpu_common.Recorded], *, tf32: bool,
    needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    with stream_of(directions[0].x), arrays.products(directions[0].x, tf32):
        step = partial(walk_back, runner(), device(), held=held)
        return gpu_common.backwards(step, cell, directions, recorded, tf32=tf32, needs=needs)


def stacks(problem: Problem, backward: bool) -> bool:
    return stack_of(problem, device(), backward, held)[0] is not None


def stack(
    cell: Cell, x: Any, layers: Sequence[tuple[Weights, Sequence[Any]]], *, tf32: bool, save: bool
) -> list[tuple[Any, tuple, tuple]]:
    with stream_of(x), arrays.products(x, tf32):
        step = partial(walk_stack, runner(), device(), held=held)
        return gpu_common.stack(step, cell, x, layers, tf32=tf32, save=save)


def stack_back(
    cell: Cell, x: Any, layers: Sequence[tuple[Weights, Sequence[Any]]], recorded: Sequence[gpu_common.Recorded],
    *, tf32: bool, needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    with stream_of(x), arrays.products(x, tf32):
        step = partial(walk_stack_back, runner(), device(), held=held)
        return gpu_common.stack_back(step, cell, x, layers, recorded, tf32=tf32, needs=needs)


def warmup(problem: Problem) -> tuple[str, ...]:
    """Compile what a problem needs, for the current device, and run nothing. -> the kernels."""
    kernels = list(kernels_of(problem, held))
    for unit, kernel in kernels:
        loaded(unit, kernel)
    return tuple(kernel for _, kernel in kernels)


def kernels_of(problem: Problem, held: "Held | None" = None) -> Iterator[tuple[Unit, str]]:
    """What a problem needs on the current device. Without `held` the driver isn't asked, and nothing is compiled."""
    found = [residence_of(problem, device(), backward, held)[0] for backward in ways_of(problem)]
    if problem.layers > 1:
        found = [stack_of(problem, device(), way, held)[0] or plan for way, plan in zip(ways_of(problem), found)]
    for resident in filter(None, found):
        unit = persistent.compiled(resident, problem.cell, problem.dtype)
        yield unit, persistent.name(resident)
    if all(found):
        return
    product = arrays.product_dtype(problem.library, problem.dtype)
    for kernel in KERNELS.values():
        launch = plans.launch(
            kernel, problem.cell, B=problem.B, H=problem.H, R=1, storage=problem.dtype, product=product, addresses=()
        )
        yield launch.unit, launch.kernel


# ---- the walk: resident where a plan fits, else an instant at a time ------------------------------------------------

LEAST_INSTANTS = 4  # fewer don't repay loading the weights


# How many clusters of a plan, or blocks of its grid, are resident at once: of its kernel for a cell and a dtype.
Held = Callable[[Cell, str, persistent.Residence], int]


def residence_of(
    problem: Problem, on: persistent.Device, backward: bool, held: Held | None = None
) -> tuple[persistent.Residence | None, Sequence[str]]:
    """The resident plan of a problem, one way through time, or why there is none.

    A plan for one direction with a reason is for a problem of two: why they don't go together. Without `held` nothing
    is compiled, and the driver isn't asked.
    """
    why: list[str] = []
    if problem.B == 0:
        why.append("the batch is empty")
    if problem.P is not None:
        why.append("a projection (w_hr) takes a second matmul per time step")
    if problem.T < LEAST_INSTANTS and not problem.step_exact:
        why.append(f"T = {problem.T}: fewer than {LEAST_INSTANTS} time steps don't repay loading the weights")
    if why:
        return None, why
    sizes = problem.H, problem.B, problem.directions
    return plan_of(problem.cell, problem.dtype, *sizes, on, backward, not problem.tf32, held)


@lru_cache(maxsize=1024)  # asked at every call
def stack_of(
    problem: Problem, on: persistent.Device, backward: bool, held: Held | None = None
) -> tuple[persistent.Residence | None, Sequence[str]]:
    """The plan by which the layers of a stack go one way through time at once, or why they don't."""
    cell, dtype, tf32 = problem.cell, problem.dtype, problem.tf32
    if problem.B == 0 or problem.P is not None or problem.T < LEAST_INSTANTS:
        return None, residence_of(problem, on, backward)[1]
    if cell.meets:
        return None, ("it reduces over hidden units, which the wavefront kernel does not support",)
    if cell.E:
        return None, (f"the wavefront kernel does not support modifiers ({cell.label})",)
    sizes = problem.H, problem.T, problem.B, problem.layers
    element, apart = persistent.element(cell, backward=backward), sum(cell.separate)
    plan, why = persistent.stack(cell.G, element, dtype, *sizes, on, backward=backward, apart=apart, ieee=not tf32)
    if plan is not None and held is not None:
        _, fewer = persistent.holds(plan, on, partial(held, cell, dtype))
        if fewer is not None:
            return None, (fewer,)
    return plan, why


@lru_cache(maxsize=1024)  # asked at every call
def plan_of(
    cell: Cell, dtype: str, H: int, B: int, directions: int, on: persistent.Device, backward: bool, ieee: bool,
    held: Held | None,
) -> tuple[persistent.Residence | None, Sequence[str]]:  # fmt: skip
    if directions > 1:
        alone, why = plan_of(cell, dtype, H, B, 1, on, backward, ieee, held)
        if alone is None:
            return None, why
        both, why = persistent.together(alone, B, on, held and partial(held, cell, dtype))
        return both or alone, why
    element = persistent.element(cell, backward=backward)
    how: dict[str, Any] = {"backward": backward, "ieee": ieee, "meetings": persistent.meetings(cell, backward=backward)}
    announced = persistent.plan(cell.G, element, dtype, H, B, on, **how)
    if held is None:
        return announced
    ours = partial(held, cell, dtype)
    plan, why = persistent.settled(cell.G, element, dtype, H, B, on, held=ours, **how)
    if plan != announced[0]:
        what = f"{cell.label}, H={H} B={B} {dtype}: {'; '.join(why)}; using {plan or 'per-step kernels'} instead"
        warnings.warn(what, RuntimeWarning, stacklevel=2)
    return plan, why


def planned(
    on: persistent.Device, cell: Cell, gates: Any, w_hr: Any, directions: int, backward: bool, tf32: bool,
    held: Held | None, step_exact: bool = False,
) -> persistent.Residence | None:  # fmt: skip
    """The resident plan for arrays; gates [T, B, G, H]."""
    T, B, _, H = gates.shape
    P = None if w_hr is None else w_hr.shape[0]
    problem = Problem(
        cell, T, B, 0, H, P, arrays.dtype(gates), "cuda", arrays.library(gates), tf32=tf32, directions=directions,
        step_exact=step_exact,
    )  # fmt: skip
    return residence_of(problem, on, backward, held)[0]


def walk(run: Runner, on: persistent.Device, cell: Cell, *given: gpu_common.Forward, held: Held | None = None) -> None:
    one = given[0]
    plan = planned(on, cell, one.xg, one.w_hr, len(given), False, one.tf32, held, one.step_exact)
    for together in launched(plan, given):
        if plan is None:
            per_step.walk(partial(bind, run), cell, *together)
        else:
            resident(run, plan, cell, together, forward_arrays, one.xg.shape, one.saved is not None)


def walk_stack(
    run: Runner, on: persistent.Device, cell: Cell, *given: gpu_common.Forward, held: Held | None = None
) -> None:
    """The layers forward at once, for a problem that `stack_of` has a plan for."""
    plan = stack_plan(on, cell, given[0].xg, given, False, held)
    resident(run, plan, cell, given, forward_arrays, given[0].xg.shape, given[0].saved is not None)


def walk_stack_back(
    run: Runner, on: persistent.Device, cell: Cell, *given: gpu_common.Backward, held: Held | None = None
) -> None:
    """And back."""
    plan = stack_plan(on, cell, given[0].dxg, given, True, held)
    resident(run, plan, cell, given, backward_arrays, given[0].dxg.shape, True)


def stack_plan(
    on: persistent.Device, cell: Cell, gates: Any, layers: Sequence[gpu_common.Forward | gpu_common.Backward],
    backward: bool, held: Held | None,
) -> persistent.Residence:  # fmt: skip
    """As `planned`, of a stack."""
    T, B, _, H = gates.shape
    dtype, library = arrays.dtype(gates), arrays.library(gates)
    problem = Problem(cell, T, B, 0, H, None, dtype, "cuda", library, tf32=layers[0].tf32, layers=len(layers))
    plan, why = stack_of(problem, on, backward, held)
    assert plan is not None, why
    return plan


def walk_back(
    run: Runner, on: persistent.Device, cell: Cell, *given: gpu_common.Backward, held: Held | None = None
) -> None:
    one = given[0]
    plan = planned(on, cell, one.dxg, one.w_hr, len(given), True, one.tf32, held)
    for together in launched(plan, given):
        if plan is None:
            per_step.walk_back(partial(bind, run), cell, *together)
        else:
            resident(run, plan, cell, together, backward_arrays, one.dxg.shape, True)


def launched(plan: persistent.Residence | None, given: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The directions, those in turn that a launch is for."""
    n = 1 if plan is None else plan.directions
    return (given[k : k + n] for k in range(0, len(given), n))


def forward_arrays(given: gpu_common.Forward) -> tuple:
    """Those of `resident_forward`, in its order."""
    below = given.w_ih, None if given.w_ih is None else given.b_ih
    return given.xg, given.w_hh, given.b_hh, given.h0, given.others, given.saved, given.y, *given.extra, *below


def backward_arrays(given: gpu_common.Backward) -> tuple:
    """Those of `resident_backward`, in its order."""
    tape = given.y, given.h0, given.others, given.saved
    written = given.dxg, given.dhg, given.dhistory, given.dunits
    return given.dy, given.dh, given.dothers, given.w_hh, *tape, *written, *given.extra, given.w_ih


def resident(
    run: Runner, plan: persistent.Residence, cell: Cell, given: Sequence[Any], ordered: Callable[[Any], tuple],
    shape: tuple, save: bool,
) -> None:  # fmt: skip
    """Run the sequence of every direction or layer. `ordered`: see `forward_arrays`."""
    (T, B, _, H), like = shape, given[0].w_hh
    parts, bytes_ = launches(run, plan, cell, arrays.dtype(like), T, B, H, given[0].extra.rows, save)
    exchange = arrays.zeros((plan.launches * bytes_,), like=like, dtype="uint8") if bytes_ else None
    at = arrays.pointer(exchange)
    for n, (begin, end, repeats) in enumerate(parts):
        if n > 0 and exchange is not None:
            exchange[...] = 0  # or the stamps of the part before would let everybody pass
        these = given if len(parts) == 1 else [one.between(begin, end) for one in given]
        members = [persistent.Member(arrays.pointers(ordered(one), like), one.reverse) for one in these]
        words = persistent.words(members)
        for k, repeat in enumerate(repeats):
            repeat(words, at + k * bytes_)


@lru_cache(maxsize=1024)  # asked at every call
def launches(
    run: Runner, plan: persistent.Residence, cell: Cell, dtype: str, T: int, B: int, H: int, rows: int, save: bool
) -> tuple[list[tuple[int, int, tuple]], int]:
    """From which to which time step, and what launches them; and the bytes that each launch exchanges through."""
    parts = [
        (begin, end, tuple(map(run, persistent.sequence(plan, cell, dtype, end - begin, B, H, rows, save=save))))
        for begin, end in persistent.cuts(plan, T)
    ]
    return parts, plan.exchange_bytes(max(end - begin for begin, end, _ in parts))


KERNELS = {per_step.Step: "stepwise_forward", per_step.Grad: "stepwise_backward"}


def bind(run: Runner, cell: Cell, given: per_step.Step | per_step.Grad) -> Callable[..., None]:
    """Either kernel on its arrays, for whoever runs it."""
    gates, product = (given.xg, given.hg) if isinstance(given, per_step.Step) else (given.dxg, given.back)
    _, B, _, H = gates.shape
    R = 1 if given.units is None else given.units.shape[1]
    return run(
        plans.launch(
            KERNELS[type(given)], cell, B=B, H=H, R=R, storage=arrays.dtype(gates), product=arrays.dtype(product),
            addresses=tuple(map(arrays.pointer, given)),
        )
    )  # fmt: skip


# ---- CuPy -----------------------------------------------------------------------------------------------------------


WATCHDOG = ("-DWATCHDOG",) if os.environ.get("GPU_RNN_WATCHDOG") else ()  # a wait of over 2 s ends its kernel


def text(unit: Unit) -> tuple[str, tuple[str, ...]]:
    """What is compiled: the source and the options."""
    return unit.source, (*OPTIONS, *WATCHDOG, *(f"-D{name}={value}" for name, value in unit.defines))


@cache
def module(unit: Unit) -> Any:
    """A cupy.RawModule, which compiles once per device and keeps the result on disk."""
    code, options = text(unit)
    return optional_imports.require("cupy", "the cuda backend").RawModule(code=code, options=options)


@cache
def loaded(unit: Unit, kernel: str) -> Any:
    return module(unit).get_function(kernel)


def prepared(unit: Unit, kernel: str, shared: int, cluster: int) -> Any:
    """The kernel, allowed so many bytes of shared memory and blocks in a cluster."""
    raw = loaded(unit, kernel)
    if shared > PLAIN_SHARED_BYTES:
        raw.max_dynamic_shared_size_bytes = shared
    if cluster > PORTABLE_CLUSTER:
        driver().allow_large_clusters(raw.kernel.ptr)
    return raw


def ready(launch: Launch) -> Callable[..., None]:
    """A `Runner` on the current device and stream. It loads the kernel, and compiles it if nobody has."""
    function = prepared(launch.unit, launch.kernel, launch.shared, launch.cluster[0]).kernel
    if launch.cooperative:
        most = coresident(function.ptr, launch.block[0], launch.shared)
        if launch.grid[0] > most:  # CuPy would launch fewer blocks, and the others would be awaited for ever
            raise RuntimeError(
                f"{launch.kernel}: a cooperative launch of {launch.grid[0]} blocks of {launch.block[0]} threads, and "
                f"the device holds {most} at once"
            )

    def repeat(*more: int) -> None:
        function(
            launch.grid, launch.block, (*launch.arguments, *more), shared_mem=launch.shared,
            enable_cooperative_groups=launch.cooperative,
        )  # fmt: skip

    return repeat


def runner() -> Runner:
    """`ready`, as an object of the current device: what is kept by runner is kept by device."""
    return runner_of(optional_imports.require("cupy", "the cuda backend").cuda.Device().id)


@cache
def runner_of(index: int) -> Runner:
    return partial(ready)


PLAIN_SHARED_BYTES = 48 << 10  # more must be asked for, kernel by kernel
CLUSTERS, PORTABLE_CLUSTER = (2, 4, 8, 16), 8  # blocks; more than the latter must be asked for, too


# ---- What fits the device at once, as the driver knows it -----------------------------------------------------------


def held(cell: Cell, dtype: str, plan: persistent.Residence) -> int:
    """`Held`, of the current device."""
    optional_imports.require(
        "cupy", "the cuda backend"
    ).cuda.Device().use()  # gives a thread that is new to it its context
    in_cluster = plan.blocks if plan.scope == "cluster" else 1
    kernel = prepared(
        persistent.compiled(plan, cell, dtype), persistent.name(plan), plan.shared_bytes, in_cluster
    ).kernel
    if plan.scope == "cluster":
        return driver().clusters(kernel.ptr, plan.blocks, plan.threads, plan.shared_bytes)
    return coresident(kernel.ptr, plan.threads, plan.shared_bytes)


@cache
def coresident(function: int, threads: int, shared: int) -> int:
    """How many blocks of a kernel the current device holds at once. function: a CUfunction, which has one device."""
    return device().multiprocessors * driver().blocks(function, threads, shared)


# What plans may use: a scope that failed on a machine can be left out there.
SCOPES = tuple(filter(None, os.environ.get("GPU_RNN_CUDA_SCOPES", ",".join(persistent.SCOPES)).split(",")))
PROVEN_ONLY = not os.environ.get("GPU_RNN_CUDA_UNPROVEN")


def device() -> persistent.Device:
    """The current device, as plans see it."""
    return device_of(optional_imports.require("cupy", "the cuda backend").cuda.Device().id, SCOPES, PROVEN_ONLY)


@cache
def device_of(index: int, scopes: tuple[str, ...], proven_only: bool) -> persistent.Device:
    """Of a part of a device (MIG, MPS) the driver says how many multiprocessors it has, and how many clusters fit."""
    properties = optional_imports.require("cupy", "the cuda backend").cuda.runtime.getDeviceProperties(index)
    capability, shared = (properties["major"], properties["minor"]), properties["sharedMemPerBlockOptin"]
    return persistent.Device(
        capability, properties["multiProcessorCount"], shared, clusters(shared) if capability >= (9, 0) else (),
        cooperative=bool(properties["cooperativeLaunch"]), scopes=scopes, proven_only=proven_only,
    )  # fmt: skip


def clusters(shared: int) -> tuple[tuple[int, int], ...]:
    """By size, how many clusters are resident at once whose blocks have a multiprocessor each."""
    found, module = [], of_clusters()
    for n in CLUSTERS:
        raw = module.get_function(f"cluster_of_{n}")
        raw.max_dynamic_shared_size_bytes = shared
        if n > PORTABLE_CLUSTER:
            driver().allow_large_clusters(raw.kernel.ptr)
        found.append((n, driver().clusters(raw.kernel.ptr, n, 32, shared)))
    return tuple((n, count) for n, count in found if count)


def of_clusters() -> Any:
    """A cupy.RawModule of a kernel for each size, to ask about."""
    code = "".join(f'extern "C" __global__ void __cluster_dims__({n}) cluster_of_{n}() {{}}\n' for n in CLUSTERS)
    return optional_imports.require("cupy", "the cuda backend").RawModule(code=code, options=OPTIONS)


class Driver:
    """What CuPy has no word for, through the driver that it has loaded. Functions are CUfunctions."""

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
        ask = getattr(self.library, name)
        self.check(name, ask(ctypes.byref(count), ctypes.c_void_p(function), threads, ctypes.c_size_t(shared)))
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
    cupy = optional_imports.require("cupy", "the cuda backend")
    if arrays.library(x) == "cupy":
        with x.device:
            yield
        return
    stream = optional_imports.require("torch", "a torch tensor").cuda.current_stream(x.device)
    if hasattr(stream, "__cuda_stream__") and hasattr(cupy.cuda.Stream, "from_external"):
        borrowed = cupy.cuda.Stream.from_external(stream)
    else:  # torch or CuPy of before the protocol
        borrowed = cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)
    with cupy.cuda.Device(x.device.index), borrowed:
        yield
