"""Our kernels alone, so that a slow step can be placed: `python -m bench run --device cuda --contender kernels`.

    step      an instant of the stepwise walk without its product: gates and states, bound by memory; all T in a row
    sequence  the resident launch, without packing, input projection and the products after it
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
from gpu_rnn.core.problem import Grads, Problem, Weights
from gpu_rnn.core.problem import Run as LayerRun
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import Runner, Unit

from . import machine, problems
from .contenders import Contender, Run
from .data import Data
from .problems import Case


class Place(NamedTuple):
    """Where kernels run."""

    run: Runner
    device: persistent.Device
    held: cuda.Query | None
    stream: Callable[[Any], AbstractContextManager]


def here() -> Place:
    return Place(cuda.prepare_launch, cuda.device(), cuda.max_coresident, cuda.stream_of)


def units(case: Case, contenders: tuple[str, ...]) -> set[Unit]:
    """What the CUDA contenders of a case compile, for the current device; the driver isn't asked."""
    problem, found = case.problem(machine.tf32(case)), set[Unit]()
    if {problems.CUDA, problems.LAYER, problems.KERNEL} & {*contenders}:
        found |= {unit for unit, _ in cuda.kernels_of(problem)}
    for backend, way, part in (problems.KERNELS[name] for name in contenders if name in problems.KERNELS):
        plan, _ = cuda.persistent_config(problem, cuda.device(), way == "backward")
        if backend == "cuda" and part != "step" and plan is not None:
            only = None if part == "sequence" else part
            found.add(persistent.compiled(plan, problem.cell, problem.dtype, only))
    return found


def compile_text(text: tuple[str, tuple[str, ...]]) -> None:
    """Into CuPy's cache on the disk, where every process finds it."""
    import cupy

    cupy.RawModule(code=text[0], options=text[1]).compile()


class Alone(Contender):
    def __init__(self, backend: str, way: str, part: str, place: Callable[[], Place] = here) -> None:
        self.backend, self.back, self.part, self.place = backend, way == "backward", part, place

    def absent(self, case: Case) -> str | None:
        library = "cupy" if self.backend == "cuda" else "triton"
        reason = (missing(library) or no_gpu()) if self.place is here else None
        if reason is None and self.back and not case.training:
            reason = "it takes part in training"
        if reason is None and self.part != "step":
            plan, why = self.resident(case)
            reason = None if plan else f"no persistent kernel: {'; '.join(why)}"
        return reason

    def prepare(self, case: Case, data: Data) -> Run:
        with self.stream(data):
            given = self.given(case, data)
            launch = self.instants(case, given) if self.part == "step" else self.whole(case, given)

        def run(k: int) -> None:
            with self.stream(data):
                launch()

        return run

    def answer(self, case: Case, data: Data, run: Run) -> Any:
        """That of the whole call."""
        run(0)
        with self.stream(data):
            y, last, tape = self.forward(case, data, self.walk)
            if not case.training:
                return y, last
            gradients = self.backward(case, data, y, tape, self.walk_back)
        return y, last, gradients | dict(zip(data.state, gradients.pop("state")))

    def plan(self, case: Case) -> str:
        found = None if self.part == "step" else self.resident(case)[0]
        return found.scope if found else "stepwise"

    # ---- the call -------------------------------------------------------------------------------------------------

    def stream(self, data: Data) -> AbstractContextManager:
        return self.place().stream(data.dy) if self.backend == "cuda" else nullcontext()

    def resident(self, case: Case) -> tuple[persistent.Residence | None, Any]:
        at = self.place()
        return cuda.persistent_config(case.problem(machine.tf32(case)), at.device, self.back, at.held)

    @property
    def bind(self) -> per_step.Bind:
        return triton.bind if self.backend == "triton" else partial(cuda.bind, self.place().run)

    def walk(self, problem: Problem, buffers: Sequence[gpu_common.ForwardBuffers]) -> None:
        if self.part == "step":
            per_step.run_forward(self.bind, problem, buffers)
        else:
            cuda.run_forward(self.place().run, self.place().device, problem, buffers, self.place().held)

    def walk_back(self, problem: Problem, buffers: Sequence[gpu_common.BackwardBuffers]) -> None:
        if self.part == "step":
            per_step.run_backward(self.bind, problem, buffers)
        else:
            cuda.run_backward(self.place().run, self.place().device, problem, buffers, self.place().held)

    def forward(self, case: Case, data: Data, walk: Callable) -> tuple:
        run, problem = self.run_of(data), case.problem(machine.tf32(case))
        with arrays.matmul_precision(run.x, problem.tf32):
            ((y, last, _, saved),) = gpu_common.forward(walk, problem, [run])
        return y, last, saved

    def backward(self, case: Case, data: Data, y: Any, tape: tuple, walk_back: Callable) -> dict[str, Any]:
        run, problem = self.run_of(data), case.problem(machine.tf32(case))
        args = [(y, *tape)], [Grads(data.dy, data.dlast)], [{"x", *data.weights}]
        with arrays.matmul_precision(run.x, problem.tf32):
            (gradients,) = gpu_common.backward(walk_back, problem, [run], *args)
        return gradients

    def run_of(self, data: Data) -> LayerRun:
        return LayerRun(data.x[0], Weights(**data.weights), tuple(data.state.values()))

    # ---- one kernel of it -----------------------------------------------------------------------------------------

    def given(self, case: Case, data: Data) -> Any:
        """The arrays that a walk is given, one way through time."""
        found: list[Any] = []
        if not self.back:
            self.forward(case, data, lambda problem, buffers: found.extend(buffers))
        else:
            y, _, tape = self.forward(case, data, self.walk)
            self.backward(case, data, y, tape, lambda problem, buffers: found.extend(buffers))
        return found[0]

    def instants(self, case: Case, given: Any) -> Callable[[], None]:
        found: list[Any] = []

        def catch(cell: Any, arrays: Any) -> Callable[..., None]:
            found.append(arrays)
            return lambda *instant: None

        (per_step.backward_loop if self.back else per_step.forward_loop)(catch, case.problem(), given)
        (the,) = found
        for array in (the.dh_recurrent, the.dh_direct) if self.back else (the.Rh,):
            array.normal_()  # the time loop has not written it
        kernel, all_instants = self.bind(case.problem().cell, the), list(per_step.time_steps(case.T, reverse=False))

        def launch(held: Any = the) -> None:  # as in `whole`
            for instant in all_instants:
                if self.back:
                    kernel(*instant)
                else:
                    states = (instant.state_in, instant.state_out) if case.training else (0, 0)
                    kernel(instant.t, *states, instant.t_next)

        return launch

    def whole(self, case: Case, given: Any) -> Callable[[], None]:
        run, cell, (plan, _) = self.place().run, case.problem().cell, self.resident(case)
        assert plan is not None  # `absent` asked
        exchange = arrays.zeros((plan.launches * plan.exchange_bytes(case.T),), like=given.w_hh, dtype="uint8")
        whole = (cuda.backward_args if self.back else cuda.forward_args)(given)
        words = persistent.words([persistent.Member(arrays.pointers(whole, given.w_hh), reverse=False)])
        only = None if self.part == "sequence" else self.part
        sizes = case.T, case.B, case.H, 1
        launches = list(map(run, persistent.sequence(plan, cell, case.dtype, *sizes, save=case.training, only=only)))

        def launch(held: Any = (whole, given)) -> None:  # the launches have addresses and keep nothing alive
            exchange.zero_()  # or the last call's stamps would let everybody pass
            for k, each in enumerate(launches):
                each(words, arrays.pointer(exchange) + k * plan.exchange_bytes(case.T))

        return launch
