"""Our kernels alone, so that a slow step can be placed: `python -m bench run --device cuda --implementation kernels`.

    step      a time step of the per-step kernels without its matmul: gates and states, bound by memory; all T in a row
    sequence  the persistent launch, without packing, input projection and the matmuls after it
    exchange  the same with the arithmetic left out
    product   the same with the waiting left out

They run on the arrays of a real call, by the plans of the backend. What the last two compute is wrong by design; a
kernel has a time only if the whole call that it is part of is right.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from gpu_rnn.backends import cuda, gpu_common, per_step, triton
from gpu_rnn.core import arrays
from gpu_rnn.core.optional_imports import missing, no_gpu
from gpu_rnn.core.problem import Grads, Weights
from gpu_rnn.core.problem import Run as LayerRun
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import Runner, Unit

from . import problems
from .data import Data
from .implementations import IMPLEMENTATIONS, Implementation, Run, tf32
from .problems import Case


class LaunchContext(NamedTuple):
    """Where kernels run."""

    run: Runner
    device: persistent.Device
    held: cuda.Query | None
    stream: Callable[[Any], AbstractContextManager]


def current_device() -> LaunchContext:
    return LaunchContext(cuda.prepare_launch, cuda.device(), cuda.max_coresident, cuda.stream_of)


class KernelOnly:
    def __init__(self, backend: str, way: str, part: str, context: Callable[[], LaunchContext] = current_device):
        self.triton, self.backward, self.part, self.context = backend == "triton", way == "backward", part, context

    def implementation(self) -> Implementation:
        return Implementation(self.prepare, self.skip_reason, self.plan)

    def skip_reason(self, case: Case) -> str | None:
        reason = missing("triton" if self.triton else "cupy") or no_gpu()
        if reason and self.context is current_device:
            return reason
        if self.backward and not case.training:
            return "it takes part in training"
        plan, why = (None, ()) if self.part == "step" else self.persistent(case)
        return None if plan or self.part == "step" else f"no persistent kernel: {'; '.join(why)}"

    def plan(self, case: Case) -> str:
        plan = None if self.part == "step" else self.persistent(case)[0]
        return plan.scope if plan else "stepwise"

    def persistent(self, case: Case) -> tuple[persistent.PersistentConfig | None, Any]:
        at = self.context()
        return cuda.persistent_config(case.problem(tf32(case)), at.device, self.backward, at.held)

    def prepare(self, case: Case, data: Data) -> tuple[Run, Callable]:
        def stream() -> AbstractContextManager:
            return nullcontext() if self.triton else self.context().stream(data.dy)

        with stream():
            launch = self.launch(case, self.args(case, data))

        def run(k: int) -> None:
            with stream():
                launch()

        def outputs() -> tuple:  # those of the whole call
            run(0)
            with stream():
                return self.call(case, data, self.loop(False), self.loop(True))

        return run, outputs

    def loop(self, backward: bool) -> Callable[..., None]:
        """What goes through time in a call."""
        if self.part == "step":
            return partial(per_step.run_backward if backward else per_step.run_forward, self.bind)
        at, run = self.context(), cuda.run_backward if backward else cuda.run_forward
        return lambda problem, buffers: run(at.run, at.device, problem, buffers, at.held)

    def bind(self, cell: Any, args: Any) -> Callable[..., None]:
        return triton.bind(cell, args) if self.triton else cuda.bind(self.context().run, cell, args)

    def call(self, case: Case, data: Data, forward: Callable, backward: Callable) -> tuple:
        """(y, last states[, gradients]) of a call whose time loops are these."""
        run = LayerRun(data.x[0], Weights(**data.weights), tuple(data.state.values()))
        problem = case.problem(tf32(case))
        with arrays.matmul_precision(run.x, problem.tf32):
            ((y, last, _, saved),) = gpu_common.forward(forward, problem, [run])
            if not case.training:
                return y, last
            incoming = [(y, *saved)], [Grads(data.dy, data.dlast)], [{"x", *data.weights}]
            (grads,) = gpu_common.backward(backward, problem, [run], *incoming)
        return y, last, grads | dict(zip(data.state, grads.pop("state")))

    def args(self, case: Case, data: Data) -> Any:
        """The arrays of the time loop."""
        caught: list[Any] = []
        catch: Any = lambda problem, buffers: caught.extend(buffers)  # noqa: E731
        self.call(case, data, self.loop(False) if self.backward else catch, catch)
        return caught[-1 if self.backward else 0]

    def launch(self, case: Case, args: Any) -> Callable[[], None]:
        cell, steps, kernels = case.problem().cell, list[tuple](), list[Any]()
        if self.part != "step":
            plan, ordered = self.persistent(case)[0], cuda.backward_args if self.backward else cuda.forward_args
            only, sizes = None if self.part == "sequence" else self.part, (case.T, case.B, case.H)
            how = {"like": args.w_hh, "save": case.training, "only": only}
            return launch_plan(self.context().run, plan, cell, case.dtype, *sizes, ordered(args), **how)

        def record(cell: Any, args: Any) -> Callable[..., None]:
            kernels[:] = self.bind(cell, args), args  # a kernel has addresses and keeps nothing alive
            return lambda *step: (steps.append(step), kernels[0](*step))

        (per_step.backward_loop if self.backward else per_step.forward_loop)(record, case.problem(), args)

        def replay() -> None:
            for step in steps:
                kernels[0](*step)

        return replay


def launch_plan(
    run: Runner, plan: Any, cell: Any, dtype: str, T: int, B: int, H: int, args: Sequence[Any], like: Any, save: bool,
    only: str | None = None,
) -> Callable[[], None]:  # fmt: skip
    """A function that launches a persistent kernel over a sequence, on these arrays, with nothing else in Python."""
    step = plan.exchange_bytes(T)
    exchange = arrays.zeros((max(1, plan.launches * step),), like=like, dtype="uint8")
    words = persistent.kernel_params([persistent.Instance(arrays.pointers(args, like), reverse=False)])
    launches = list(map(run, persistent.launches(plan, cell, dtype, T, B, H, 1, save=save, only=only)))

    def launch(alive: Any = args) -> None:  # the launches have addresses and keep nothing alive
        exchange.zero_()  # or the last call's stamps would let every block pass
        for k, each in enumerate(launches):
            each(words, arrays.pointer(exchange) + k * step)

    return launch


def units(case: Case, names: Sequence[str]) -> set[Unit]:
    """What the CUDA implementations of a case compile, for the current device; the driver isn't queried."""
    problem, compiled = case.problem(tf32(case)), set[Unit]()
    if {problems.CUDA, problems.LAYER, problems.KERNEL} & {*names}:
        compiled |= {unit for unit, _ in cuda.kernels_of(problem)}
    for backend, way, part in (problems.KERNELS[name] for name in names if name in problems.KERNELS):
        plan, _ = cuda.persistent_config(problem, cuda.device(), way == "backward")
        if backend == "cuda" and part != "step" and plan is not None:
            only = None if part == "sequence" else part
            compiled.add(persistent.translation_unit(plan, problem.cell, problem.dtype, only))
    return compiled


def compile_text(text: tuple[str, tuple[str, ...]]) -> None:
    """Into CuPy's cache on the disk, where every process finds it."""
    import cupy

    cupy.RawModule(code=text[0], options=text[1]).compile()


IMPLEMENTATIONS |= {name: KernelOnly(*which).implementation() for name, which in problems.KERNELS.items()}
