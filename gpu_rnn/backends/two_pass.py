"""A backend for a cell with a recurrent matmul of its own: two kernel steps per time step, out of any backend.

What the cell takes is laid out for the one that is run in its place. Both phases have the same input part, which is
projected once; the values that the page shows the recurrent weights stand between the outputs.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.two_pass import second

from ..core import arrays
from ..core.problem import Direction, Memory, Problem, Weights
from . import gpu_common

OF_INPUTS = ("x", "w_ih", "b_ih")


@dataclass(frozen=True)
class Phased:
    """With the names that every backend has."""

    backend: ModuleType

    @property
    def NAME(self) -> str:
        return self.backend.NAME

    def reasons(self, problem: Problem) -> list[str]:
        return self.backend.reasons(run(problem))

    def plan(self, problem: Problem) -> str:
        lines = self.backend.plan(run(problem)).splitlines()
        return "\n".join([
            "two kernel steps per time step, since the cell has a second recurrent matmul",
            gpu_common.projection(problem),
            *(line for line in lines if not line.startswith("input projection")),
        ])  # fmt: skip

    def method(self, problem: Problem, backward: bool, stacked: bool = False) -> str:
        return self.backend.method(run(problem), backward, stacked)

    def memory(self, problem: Problem) -> Memory:
        """That of the call that is made, beside what goes in and out of it; and the gradients of inputs after it."""
        inside = run(problem)
        inner, s = self.backend.memory(inside), problem.itemsize
        y, part, twice = problem.output_elements * s, inside.input_elements // 2 * s, inside.input_elements * s
        forward = inner.forward + twice + y + (0 if problem.I is None else part)
        if not problem.training:
            return Memory(0, forward, 0)
        after = twice + part + (problem.input_elements + problem.weight_elements) * s
        return Memory(inner.saved + y, forward, 2 * y + max(inner.backward, after))

    def warmup(self, problem: Problem) -> tuple[str, ...]:
        return self.backend.warmup(run(problem))

    def forward(
        self, cell: Cell, x: Any, weights: Weights, state: Sequence[Any], *, reverse: bool, tf32: bool = False,
        save: bool, step_exact: bool = False,
    ) -> tuple[Any, tuple, tuple]:  # fmt: skip
        direction = Direction(x, weights, state, reverse)
        (result,) = self.forwards(cell, [direction], tf32=tf32, save=save, step_exact=step_exact)
        return result

    def backward(
        self, cell: Cell, x: Any, weights: Weights, state: Sequence[Any], y: Any, tape: tuple, dy: Any,
        dlast: tuple, dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
    ) -> dict[str, Any]:  # fmt: skip
        direction, recorded = Direction(x, weights, state, reverse), (y, tape, dy, dlast, dhistory)
        (gradients,) = self.backwards(cell, [direction], [recorded], tf32=tf32, needs=[needs])
        return gradients

    def forwards(
        self, cell: Cell, directions: Sequence[Direction], *, tf32: bool, save: bool, step_exact: bool = False
    ) -> list[tuple[Any, tuple, tuple]]:
        entering = [*map(gpu_common.plain, directions)]
        with arrays.products(entering[0].x, tf32):
            factors = [self.backend.factors(each.x, each.weights) for each in entering]
            parts = [gpu_common.input_part(x, weights, step_exact) for x, weights in factors]
        run = [laid_out(cell, d, twice(returned(part, like=d.x))) for d, part in zip(entering, parts)]
        how: dict[str, Any] = {"tf32": tf32, "save": save, "step_exact": step_exact}
        if hasattr(self.backend, "forwards"):
            found = self.backend.forwards(cell.phases, run, **how)
        else:
            found = [self.backend.forward(cell.phases, *d[:3], reverse=d.reverse, **how) for d in run]
        results = []
        for (shown, last, tape), direction in zip(found, run):
            y = gpu_common.stored(shown[second(0, direction.reverse) :: 2], like=shown)
            results.append((y, last[: cell.S], (shown, *tape) if save else ()))
        return results

    def backwards(
        self, cell: Cell, directions: Sequence[Direction], recorded: Sequence[gpu_common.Recorded], *, tf32: bool,
        needs: Sequence[Collection[str]],
    ) -> list[dict[str, Any]]:  # fmt: skip
        entering = [*map(gpu_common.plain, directions)]
        run = [laid_out(cell, each, each.x) for each in entering]  # without w_ih nobody looks at x again
        kept = [asked(cell, each, direction) for each, direction in zip(recorded, run)]
        wanted = [set(each) - set(OF_INPUTS) | ({"x"} if set(OF_INPUTS) & set(each) else set()) for each in needs]
        if hasattr(self.backend, "backwards"):
            found = self.backend.backwards(cell.phases, run, kept, tf32=tf32, needs=wanted)
        else:
            found = [
                self.backend.backward(cell.phases, *d[:3], *k, reverse=d.reverse, tf32=tf32, needs=n)
                for d, k, n in zip(run, kept, wanted)
            ]
        for gradients, direction, need in zip(found, entering, needs):
            gradients["state"] = gradients["state"][: cell.S]
            if (each := gradients.pop("x", None)) is not None:
                with arrays.products(direction.x, tf32):
                    x, weights = self.backend.factors(direction.x, direction.weights)
                    dpart, _ = self.backend.factors(each[::2] + each[1::2], Weights(None, None))
                    of_input = gpu_common.of_input(dpart, x, weights, need)
                gradients |= {name: returned(array, like=direction.x) for name, array in of_input.items()}
        return found

    def history(self, cell: Cell, tape: tuple, *, reverse: bool, like: Any) -> tuple:
        found = self.backend.history(cell.phases, tape[1:], reverse=reverse, like=like)
        return tuple(gpu_common.stored(each[second(0, reverse) :: 2], like=like) for each in found[: cell.S - 1])


def run(problem: Problem) -> Problem:
    """What the backend beneath is asked for."""
    assert problem.cell.phases is not None
    return replace(problem, cell=problem.cell.phases, T=2 * problem.T, I=None)


def returned(array: Any, like: Any) -> Any:
    """What may be NumPy's as an array of the library of `like`."""
    return arrays.from_numpy(array, like=like) if arrays.library(array) == "numpy" else array


def twice(array: Any) -> Any:
    """[T, ...] -> [2*T, ...]."""
    return arrays.stack((array, array), 1).reshape(2 * len(array), *array.shape[1:])


def after(array: Any, reverse: bool) -> Any:
    """[T, ...] -> [2*T, ...], zero at the instants of the first phase."""
    pair = arrays.zeros(tuple(array.shape), like=array), array
    return arrays.stack(pair[::-1] if reverse else pair, 1).reshape(2 * len(array), *array.shape[1:])


def laid_out(cell: Cell, given: Direction, x: Any) -> Direction:
    """What is called, with x as it is there."""
    assert cell.phases is not None
    (T, B, _), weights = given.x.shape, given.weights
    flags = arrays.zeros((T, B), like=x, dtype="uint8") if weights.flags is None else weights.flags
    pair = flags, flags | 1 << len(cell.flags)
    flags = arrays.stack(pair[::-1] if given.reverse else pair, 1).reshape(2 * T, B)
    carried = (arrays.zeros((B, weights.w_hh.shape[0] // cell.G), like=x),) * (cell.phases.S - cell.S)
    weights = weights._replace(w_ih=None, b_ih=None, flags=flags)
    return Direction(x, weights, (*given.state, *carried), given.reverse)


def asked(cell: Cell, recorded: gpu_common.Recorded, run: Direction) -> gpu_common.Recorded:
    """The tape and the gradients as that call's: nothing is asked of what the first phase hands on."""
    _, (shown, *tape), dy, dlast, dhistory = recorded
    nothing = run.state[cell.S :]
    if dhistory:
        empty = [arrays.zeros(tuple(d.shape), like=d) for d in dhistory[:1] * len(nothing)]
        dhistory = tuple(after(d, run.reverse) for d in (*dhistory, *empty))
    return shown, tuple(tape), after(dy, run.reverse), (*dlast, *nothing), dhistory
