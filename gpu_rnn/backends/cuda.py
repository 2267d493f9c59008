"""CUDA: the kernels of kernels/cuda, compiled by CuPy at first use, on the arrays and the stream of the caller.

Where the recurrent weights fit the chip, a whole sequence is one launch that holds them there (resident.cu); else
`stepwise` walks through time with one product and one launch per instant. Both leave the same tape. Memory comes from
the caller's library alone, and nothing waits for the GPU: after `warmup`, or one run, a CUDA graph can capture it.
"""

import ctypes
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.cuda import residence
from gpu_rnn.kernels.cuda import stepwise as plans
from gpu_rnn.kernels.cuda.launch import OPTIONS, Launch, Runner, Unit

from .. import arrays, compat
from ..problem import Problem, Weights
from . import sequence, stepwise

NAME = "cuda"


def reasons(problem: Problem) -> list[str]:
    why = [reason for reason in (compat.no_gpu(), compat.missing("cupy")) if reason is not None]
    if problem.device != "cuda":
        why.append(f"the arrays are on {problem.device}; CUDA computes on the GPU and nothing is moved silently")
    if problem.dtype not in arrays.DTYPES:
        why.append(f"{problem.dtype} has no kernel; there are {', '.join(arrays.DTYPES)}")
    if (problem.library, problem.dtype) == ("cupy", "bfloat16"):
        why.append("bfloat16 CuPy arrays are not computed, as CuPy knows this dtype only in part; give torch tensors")
    return why


def plan(problem: Problem) -> str:
    resident, why = residence_of(problem, device())
    if resident is not None:
        return f"one product for all inputs; then {resident}"
    product = arrays.product_dtype(problem.library, problem.dtype)
    return (
        f"stepwise: one product for all inputs; one product, in {product}, and one fused kernel per step; "
        f"not resident: {'; '.join(why)}"
    )


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, save: bool
) -> tuple[Any, tuple, tuple]:
    with stream_of(x):
        step = partial(walk, ready, device())
        return sequence.forward(step, cell, x, weights, state, reverse=reverse, save=save)


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    with stream_of(x):
        step = partial(walk_back, ready, device())
        return sequence.backward(step, cell, x, weights, state, y, tape, dy, dlast, reverse=reverse, needs=needs)


def warmup(problem: Problem) -> None:
    """Compile what a problem needs, for the current device, and run nothing."""
    resident, _ = residence_of(problem, device())
    if resident is not None:
        unit = residence.compiled(resident, problem.cell, problem.dtype)
        for kernel in ("resident_pack", "resident_forward", "resident_backward"):
            loaded(unit, kernel)
        return
    product = arrays.product_dtype(problem.library, problem.dtype)
    for kernel in KERNELS.values():
        launch = plans.launch(
            kernel, problem.cell, B=problem.B, H=problem.H, storage=problem.dtype, product=product, addresses=()
        )
        loaded(launch.unit, launch.kernel)


# ---- the walk: resident where a plan fits, else an instant at a time ------------------------------------------------

LEAST_INSTANTS = 4  # fewer don't repay packing the weights


def residence_of(problem: Problem, on: residence.Device) -> tuple[residence.Residence | None, Sequence[str]]:
    """The resident plan of a problem, or why there is none."""
    why: list[str] = []
    if problem.P is not None:
        why.append("a projection is one more product per step")
    if problem.T < LEAST_INSTANTS:
        why.append(f"T = {problem.T}: fewer than {LEAST_INSTANTS} steps don't repay packing the weights")
    if problem.dtype == "float32" and not arrays.tf32(problem.library):
        why.append("float32 products are to be IEEE's, and tensor cores have TF32")
    if why:
        return None, why
    cell = problem.cell
    return residence.plan(cell.G, cell.S, problem.dtype, problem.H, problem.B, on, training=problem.training)


def planned(on: residence.Device, cell: Cell, gates: Any, w_hr: Any, training: bool) -> residence.Residence | None:
    """The resident plan for arrays; gates [T, B, G, H]."""
    T, B, _, H = gates.shape
    P = None if w_hr is None else w_hr.shape[0]
    problem = Problem(cell, T, B, 0, H, P, arrays.dtype(gates), "cuda", arrays.library(gates), training)
    return residence_of(problem, on)[0]


def walk(run: Runner, on: residence.Device, cell: Cell, given: sequence.Forward) -> None:
    save = given.saved is not None
    plan = planned(on, cell, given.xg, given.w_hr, save)
    if plan is None:
        stepwise.walk(partial(bind, run), cell, given)
    else:
        whole = (given.b_hh, given.h0, given.others, given.saved, given.y)
        resident(run, plan, cell, given.w_hh, (given.xg,), whole, given.xg.shape, given.reverse, save, backward=False)


def walk_back(run: Runner, on: residence.Device, cell: Cell, given: sequence.Backward) -> None:
    plan = planned(on, cell, given.dxg, given.w_hr, True)
    if plan is None:
        stepwise.walk_back(partial(bind, run), cell, given)
    else:
        before = (given.dy, given.dh, given.dothers)
        whole = (given.y, given.h0, given.others, given.saved, given.dxg, given.dhg)
        resident(run, plan, cell, given.w_hh, before, whole, given.dxg.shape, given.reverse, True, backward=True)


def resident(
    run: Runner, plan: residence.Residence, cell: Cell, w_hh: Any, before: tuple, after: tuple, shape: tuple,
    reverse: bool, save: bool, *, backward: bool,
) -> None:  # fmt: skip
    """Pack the weights, then run the sequence. `before` and `after`: the kernel's arrays around the packed weights."""
    (T, B, _, H), dtype = shape, arrays.dtype(w_hh)
    packed = arrays.empty((plan.fragments, 4), like=w_hh, dtype="int32")
    run(residence.pack(plan, cell, dtype, arrays.pointer(w_hh), arrays.pointer(packed), H, backward=backward))()
    exchange = arrays.empty((plan.exchange_bytes(backward=backward),), like=w_hh, dtype="uint8")
    flags = arrays.zeros((plan.flags,), like=w_hh, dtype="int32")
    launches = residence.sequence(
        plan, cell, dtype, tuple(map(arrays.pointer, (*before, packed, *after))), arrays.pointer(exchange),
        arrays.pointer(flags), T, B, H, reverse=reverse, save=save, backward=backward,
    )  # fmt: skip
    for launch in launches:
        run(launch)()


KERNELS = {stepwise.Step: "stepwise_forward", stepwise.Grad: "stepwise_backward"}


def bind(run: Runner, cell: Cell, given: stepwise.Step | stepwise.Grad) -> Callable[..., None]:
    """Either kernel on its arrays, for whoever runs it."""
    gates, product = (given.xg, given.hg) if isinstance(given, stepwise.Step) else (given.dxg, given.back)
    _, B, _, H = gates.shape
    return run(
        plans.launch(
            KERNELS[type(given)], cell, B=B, H=H, storage=arrays.dtype(gates), product=arrays.dtype(product),
            addresses=tuple(map(arrays.pointer, given)),
        )
    )  # fmt: skip


# ---- CuPy -----------------------------------------------------------------------------------------------------------


@cache
def module(unit: Unit) -> Any:
    """A cupy.RawModule, which compiles once per device and keeps the result on disk."""
    options = (*OPTIONS, *(f"-D{name}={value}" for name, value in unit.defines))
    return compat.require("cupy", "the cuda backend").RawModule(code=unit.source, options=options)


@cache
def loaded(unit: Unit, kernel: str) -> Any:
    return module(unit).get_function(kernel)


def ready(launch: Launch) -> Callable[..., None]:
    """A `Runner` on the current device and stream. It loads the kernel, and compiles it if nobody has."""
    raw = loaded(launch.unit, launch.kernel)
    if launch.shared > PLAIN_SHARED_BYTES:
        raw.max_dynamic_shared_size_bytes = launch.shared
    function = raw.kernel
    if launch.cluster[0] > PORTABLE_CLUSTER:
        allow_large_clusters(function.ptr)

    def repeat(*more: int) -> None:
        function(
            launch.grid, launch.block, (*launch.arguments, *more), shared_mem=launch.shared,
            enable_cooperative_groups=launch.cooperative,
        )  # fmt: skip

    return repeat


PLAIN_SHARED_BYTES = 48 << 10  # more must be asked for, kernel by kernel
PORTABLE_CLUSTER = 8  # blocks; more must be asked for, too
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # of CUfunction_attribute


@cache
def allow_large_clusters(function: int) -> None:
    """CuPy has no word for this attribute, so it is set through the driver that CuPy has loaded."""
    status = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(
        ctypes.c_void_p(function), NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1
    )
    if status:
        raise RuntimeError(f"the driver refuses clusters of more than {PORTABLE_CLUSTER} blocks (CUresult {status})")


def device() -> residence.Device:
    """The current device, as plans see it."""
    return device_of(compat.require("cupy", "the cuda backend").cuda.Device().id)


@cache
def device_of(index: int) -> residence.Device:
    properties = compat.require("cupy", "the cuda backend").cuda.runtime.getDeviceProperties(index)
    capability, count = (properties["major"], properties["minor"]), properties["multiProcessorCount"]
    clusters = {9: 16, 10: 16, 12: 8}.get(capability[0], 1)  # the largest of each architecture
    return residence.Device(
        capability, count, properties["sharedMemPerBlockOptin"], clusters, max(1, count // clusters),
        cooperative=bool(properties["cooperativeLaunch"]),
    )  # fmt: skip


@contextmanager
def stream_of(x: Any) -> Iterator[None]:
    """CuPy on the device of x, and on the stream that the library of x uses there."""
    cupy = compat.require("cupy", "the cuda backend")
    if arrays.library(x) == "cupy":
        with x.device:
            yield
        return
    stream = compat.require("torch", "a torch tensor").cuda.current_stream(x.device)
    if hasattr(stream, "__cuda_stream__") and hasattr(cupy.cuda.Stream, "from_external"):
        borrowed = cupy.cuda.Stream.from_external(stream)
    else:  # torch or CuPy of before the protocol
        borrowed = cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)
    with cupy.cuda.Device(x.device.index), borrowed:
        yield
