"""A backend for a layer with heads: each head is a run by itself, by any other backend.

Nothing goes from one head to another, so they are run as the directions of a layer are (`core.heads` has the arrays).
Forward every head projects the input by its rows of W. Backward heads give the gradients of their input projections,
from which one matmul makes that of x.
"""

from collections.abc import Sequence
from typing import Any

from ..core.flat_runs import chunks
from ..core.heads import join, split, split_run
from ..core.problem import Grads, Memory, Problem, Result, Run
from . import gpu_common
from .adapter import Adapter, input_side_grad, recurrent_needs
from .protocol import Needs


class Heads(Adapter):
    """A `Backend`; `backend` is the one that runs the heads."""

    def inner(self, problem: Problem) -> Problem:
        N = problem.heads
        return problem.variant(H=problem.H // N, heads=1, directions=problem.directions * N)

    def plan(self, problem: Problem) -> str:
        return f"{problem.of_heads}, each a run by itself\n{self.backend.plan(self.inner(problem))}"

    def memory(self, problem: Problem) -> Memory:
        """That of all heads at once, the parts that they take, and what is put together of theirs."""
        inside, N, s = self.inner(problem), problem.heads, problem.itemsize
        memory, back = self.backend.memory(inside), self.backend.memory(inside.variant(I=None))
        y, states, weights = (n * s for n in (problem.output_elements, problem.state_elements, problem.weight_elements))
        projection = N * inside.variant(I=None).input_elements * s
        forward = N * memory.forward + y + 2 * states + weights + (projection if problem.I is None else 0)
        if not problem.training:
            return Memory(0, forward, 0)
        after = projection + 2 * weights + (problem.input_elements * s if problem.I else 0)
        return Memory(N * memory.saved, forward, N * back.backward + 2 * y + 2 * states + after)

    def saved_shapes(self, problem: Problem) -> list[tuple[tuple, str]]:
        return problem.heads * self.backend.saved_shapes(self.inner(problem))

    def forward(self, problem: Problem, runs: Sequence[Run]) -> list[Result]:
        N, G = problem.heads, problem.cell.G
        calls = [head for run in map(gpu_common.as_contiguous, runs) for head in split_run(run, N, G)]
        results = self.backend.forward(self.inner(problem), calls)
        return [join_results(heads, run) for heads, run in zip(chunks(results, len(runs)), runs)]

    def backward(
        self, problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads],
        needs: Sequence[Needs],
    ) -> list[dict[str, Any]]:  # fmt: skip
        N, G, n = problem.heads, problem.cell.G, len(runs)
        contiguous = [*map(gpu_common.as_contiguous, runs)]
        calls: list[Run] = []
        head_saved: list[tuple] = []
        head_grads: list[Grads] = []
        head_needs: list[Needs] = []
        for run, (y, *activations), grad, names in zip(contiguous, saved, grads, needs):
            recurrent = run._replace(x=None, weights=run.weights._replace(w_ih=None, b_ih=None))
            calls += [head._replace(x=run.x) for head in split_run(recurrent, N, G)]  # which isn't read without w_ih
            head_saved += [(part, *own) for part, own in zip(split(y, N), chunks(activations, N))]
            dy, last, history = split(grad.y, N), *([split(d, N) for d in group] for group in grad[1:])
            head_grads += [Grads(dy[k], *(tuple(d[k] for d in group) for group in (last, history))) for k in range(N)]
            head_needs += [recurrent_needs(names)] * N
        inside = self.inner(problem).variant(I=None)
        gradients = self.backend.backward(inside, calls, head_saved, head_grads, head_needs)
        joined = zip(contiguous, runs, needs, chunks(gradients, n))
        return [self.join_gradients(problem, *of_run) for of_run in joined]

    def join_gradients(
        self, problem: Problem, run: Run, original: Run, names: Needs, heads: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """The gradients of a run from those of its heads, of whose input projections it has that of x."""
        states = zip(zip(*(gradients.pop("state") for gradients in heads)), original.state)
        joined: dict[str, Any] = {"state": tuple([join(parts).reshape(first.shape) for parts, first in states])}
        for name in heads[0]:
            parts = [gradients[name] for gradients in heads]
            joined[name] = join(parts) if name == "units" else join(parts, problem.cell.G, -1 if name == "x" else 0)
        dWx = joined.pop("x", None)
        return joined if dWx is None else joined | input_side_grad(self.backend, problem, run, dWx, names)


def join_results(heads: Sequence[Result], run: Run) -> Result:
    """The results of a run's heads -> its own; what they saved stays apart, one after the other."""
    y, *last = (join(parts) for parts in zip(*((result.y, *result.last) for result in heads)))
    last = [state.reshape(initial.shape) for state, initial in zip(last, run.state)]
    history = tuple(join(parts) for parts in zip(*(result.history for result in heads)))
    return Result(y, tuple(last), history, tuple(array for result in heads for array in result.saved))
