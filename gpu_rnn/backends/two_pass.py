"""A backend for a cell with a recurrent matmul of its own: two kernel steps per time step, by any other backend.

The arrays of a run are rearranged for the cell that kernels run in its place. Both passes of a time step have the same
input projection, which is computed once; the values that the cell applies the recurrent weights to stand between its
outputs.
"""

from collections.abc import Sequence
from typing import Any

from gpu_rnn.kernels.two_pass import second

from ..core import arrays
from ..core.problem import Grads, Memory, Problem, Result, Run
from . import gpu_common
from .adapter import Adapter, input_side_grad, recurrent_needs, to_library
from .protocol import Needs, backward_in_turn, forward_in_turn


class TwoPass(Adapter):
    """A `Backend`; `backend` is the one that it runs on."""

    def inner(self, problem: Problem) -> Problem:
        I = problem.I if self.REPEATS_INPUTS else None
        return problem.variant(cell=problem.cell.lowered, T=2 * problem.T, I=I)

    def plan(self, problem: Problem) -> str:
        lines = self.backend.plan(self.inner(problem)).splitlines()
        return "\n".join([
            "two kernel steps per time step, since the cell has a second recurrent matmul",
            gpu_common.describe_projection(problem),
            *(line for line in lines if not line.startswith("input projection")),
        ])  # fmt: skip

    def memory(self, problem: Problem) -> Memory:
        """That of the inner call, what goes in and out of it, and the gradients of the input projection after it."""
        inside = self.inner(problem)
        memory, s = self.backend.memory(inside), problem.itemsize
        y, projection, twice = problem.output_elements * s, inside.input_elements // 2 * s, inside.input_elements * s
        if self.REPEATS_INPUTS:
            return Memory(
                memory.saved + y * problem.training, memory.forward + y, 2 * y * problem.training + memory.backward
            )
        forward = memory.forward + twice + y + (0 if problem.I is None else projection)
        if not problem.training:
            return Memory(0, forward, 0)
        after = twice + projection + (problem.input_elements + problem.weight_elements) * s
        return Memory(memory.saved + y, forward, 2 * y + max(memory.backward, after))

    def saved_shapes(self, problem: Problem) -> list[tuple[tuple, str]]:
        inside = self.inner(problem)
        return [((inside.T, inside.B, inside.H), problem.dtype), *self.backend.saved_shapes(inside)]

    def forward(self, problem: Problem, runs: Sequence[Run]) -> list[Result]:
        if problem.layers > 1:
            return forward_in_turn(self.forward, problem, runs)
        inside, contiguous = self.inner(problem), [*map(gpu_common.as_contiguous, runs)]
        if self.REPEATS_INPUTS:
            calls = [inner_run(problem, run) for run in contiguous]
        else:
            with arrays.matmul_precision(contiguous[0].x, problem.tf32):
                operands = [self.backend.gemm_operands(run.x, run.weights) for run in contiguous]
                projections = [gpu_common.input_projection(*each, problem.step_exact) for each in operands]
            calls = [
                inner_run(problem, with_projection(run, repeat_steps(to_library(projection, like=run.x))))
                for run, projection in zip(contiguous, projections)
            ]
        results = []
        for run, (y, last, history, saved) in zip(runs, self.backend.forward(inside, calls)):
            steps = slice(second(0, run.reverse), None, 2)
            last = tuple([state.reshape(first.shape) for state, first in zip(last, run.state)])
            history = tuple([gpu_common.to_storage(h[steps], like=h) for h in history[: problem.cell.S - 1]])
            own = gpu_common.to_storage(y[steps], like=y)
            results.append(Result(own, last, history, (y, *saved) if problem.training else ()))
        return results

    def backward(
        self, problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads],
        needs: Sequence[Needs],
    ) -> list[dict[str, Any]]:  # fmt: skip
        if problem.layers > 1:
            return backward_in_turn(self.backward, problem, runs, saved, grads, needs)
        contiguous = [*map(gpu_common.as_contiguous, runs)]
        # Without w_ih x is not read again.
        calls = [inner_run(problem, run if self.REPEATS_INPUTS else with_projection(run, run.x)) for run in contiguous]
        inner_grads = [inner_grad(problem, grad, call) for grad, call in zip(grads, calls)]
        inner_needs = needs if self.REPEATS_INPUTS else [*map(recurrent_needs, needs)]
        inner_saved = [arrays_saved[1:] for arrays_saved in saved]  # the inner y and what the inner call saved
        by_run = self.backend.backward(self.inner(problem), calls, inner_saved, inner_grads, inner_needs)
        for gradients, run, original, names in zip(by_run, contiguous, runs, needs):
            states = zip(gradients["state"], original.state)
            gradients["state"] = tuple([d.reshape(first.shape) for d, first in states])
            if not self.REPEATS_INPUTS and (dx := gradients.pop("x", None)) is not None:
                gradients |= input_side_grad(self.backend, problem, run, dx[::2] + dx[1::2], names)
        return by_run


def with_projection(run: Run, x: Any) -> Run:
    """The run with its input projection, [.., B, G*H]."""
    return run._replace(x=x, weights=run.weights._replace(w_ih=None, b_ih=None))


def inner_run(problem: Problem, run: Run) -> Run:
    cell, T, B, weights = problem.cell, problem.T, problem.B, run.weights
    assert cell.lowered is not None
    flags = arrays.zeros((T, B), like=run.x, dtype="uint8") if weights.flags is None else weights.flags
    pair = flags, flags | 1 << len(cell.flags)
    flags = arrays.stack(pair[::-1] if run.reverse else pair, 1).reshape(2 * T, B)
    carried = (arrays.zeros((B, problem.H), like=run.x),) * (cell.lowered.S - cell.S)
    return Run(run.x, weights._replace(flags=flags), (*run.state, *carried), run.reverse)


def inner_grad(problem: Problem, grads: Grads, call: Run) -> Grads:
    """The gradients of its results: those of what the first pass of a time step hands on are zero."""
    zeros = tuple(call.state[problem.cell.S :])
    history = grads.history
    if history:
        empty = [arrays.zeros((problem.T, problem.B, problem.H), like=call.x)] * len(zeros)
        history = tuple(with_zero_steps(d, call.reverse) for d in (*history, *empty))
    last = (*[d.reshape(d.shape[-2:]) for d in grads.last], *zeros)
    return Grads(with_zero_steps(grads.y, call.reverse), last, history)


def repeat_steps(array: Any) -> Any:
    """[T, ...] -> [2*T, ...]."""
    return arrays.stack((array, array), 1).reshape(2 * len(array), *array.shape[1:])


def with_zero_steps(array: Any, reverse: bool) -> Any:
    """[T, ...] -> [2*T, ...], zero at the first pass of every time step."""
    pair = arrays.zeros(tuple(array.shape), like=array), array
    return arrays.stack(pair[::-1] if reverse else pair, 1).reshape(2 * len(array), *array.shape[1:])
