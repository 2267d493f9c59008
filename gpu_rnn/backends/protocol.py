"""What a backend is: two operations, and what it says about a problem before it runs. One module or object for each."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from ..core import arrays
from ..core.problem import Grads, Memory, Problem, Result, Run, Weights

Needs = Collection[str]  # names of the gradients of a run that are needed: x, w_ih, w_hh, b_ih, b_hh, w_hr, units


class Backend(Protocol):
    """`gpu_rnn.backends.numpy`, `native`, `triton`, `cuda`, and `two_pass.TwoPass` and `heads.Heads` on any of them.

    Arrays of a run are never written to. There is no work left to wait for but that of the caller's stream.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def RUNS_HEADS(self) -> bool:
        """Whether it takes problems with heads; else `heads.Heads` runs each by itself."""
        ...

    @property
    def REPEATS_INPUTS(self) -> bool:
        """Whether x may have half as many time steps as the problem, each for two; else `TwoPass` repeats them."""
        ...

    def reasons(self, problem: Problem) -> list[str]:
        """Return every reason why it can't serve a problem; none where it can."""
        ...

    def plan(self, problem: Problem) -> str:
        """Describe how it would run a problem: a line for the input projection, each pass a line."""
        ...

    def method(self, problem: Problem, backward: bool) -> str:
        """Name the kind of kernel for one pass, in a word or two, for profilers."""
        ...

    def memory(self, problem: Problem) -> Memory:
        """Return the bytes that one run takes."""
        ...

    def saved_shapes(self, problem: Problem) -> list[tuple[tuple, str]]:
        """Return shape and dtype of each array that `forward` saves for one run. Sizes may be symbolic."""
        ...

    def warmup(self, problem: Problem) -> tuple[str, ...]:
        """Compile what a problem needs for the current device -> the names of its kernels."""
        ...

    def fuses_layers(self, problem: Problem, backward: bool) -> bool:
        """Return whether a stack's layers run at once, as a wavefront, in one pass."""
        ...

    def gemm_operands(self, x: Any, weights: Weights) -> tuple[Any, Weights]:
        """Return both as arrays of the library by which the backend multiplies."""
        ...

    def forward(self, problem: Problem, runs: Sequence[Run]) -> list[Result]:
        """Run forward: the directions of a layer, or the layers of a stack if problem.layers > 1."""
        ...

    def backward(
        self, problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads],
        needs: Sequence[Needs],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Run backward -> of each run the gradients in `needs` by name, and those of its states as "state", a tuple.

        saved: of each run y and what `forward` saved, which is only read, so that backward can run again. In a
        stack "x" among the needs of an upper layer says that something below it is needed; it returns no "x" itself,
        and without needs of its own a layer need not return any gradient.
        """
        ...


def forward_in_turn(forward: Callable, problem: Problem, runs: Sequence[Run]) -> list[Result]:
    """Run one run after the other by the `forward` of a backend that doesn't run these at once."""
    results: list[Result] = []
    for k, run in enumerate(runs):
        if problem.layers > 1 and k > 0:
            run = run._replace(x=results[-1].y)
        results += forward(problem.single(k, run.reverse), [run])
    return results


def backward_in_turn(
    backward: Callable, problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads],
    needs: Sequence[Needs],
) -> list[dict[str, Any]]:  # fmt: skip
    """As `forward_in_turn`; a stack from its last layer to its first, as far down as there is something to do."""
    by_run: list[dict[str, Any]] = [{"state": ()} for _ in runs]
    linked, dx = problem.layers > 1, None
    for k in reversed(range(len(runs))):
        run, grad = runs[k], grads[k]
        if linked and k > 0:
            run = run._replace(x=saved[k - 1][0])
        if linked:
            dys = [dy for dy in (grad.y, dx) if dy is not None]
            dy = sum(dys[1:], dys[0]) if dys else arrays.zeros(tuple(saved[k][0].shape), like=saved[k][0])
            grad = grad._replace(y=dy)
        (by_run[k],) = backward(problem.single(k, run.reverse), [run], [saved[k]], [grad], [needs[k]])
        if linked and k > 0:
            if "x" not in needs[k]:
                break
            dx = by_run[k].pop("x")
    return by_run


def never_fuses_layers(problem: Problem, backward: bool) -> bool:
    """`Backend.fuses_layers` of a backend without a wavefront."""
    return False
