"""Check a cell definition before anything runs, with errors for the person who wrote it.

`validate_definition` runs the cell on symbols and looks at its results; `gradcheck` compares its grad with differences.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from . import mathematics
from .cell import Cell
from .trace import Traced, read

ALLOWED = f"+ - * /, numbers, and of gpu_rnn.kernels.mathematics {', '.join(mathematics.__all__)}"
DELTA = 1e-6  # of a central difference: in float64 its error is about 1e-10


def validate_definition(
    name: str, gates: str, states: str, units: Sequence[str], step: Callable, grad: Callable | None = None
) -> None:
    """Raise TypeError or ValueError where this is no cell definition: what it has, and what it should have."""
    for what, letters in {"gates": gates, "states": states}.items():
        if not isinstance(letters, str):
            raise TypeError(f"{name}: {what} must be a string of one letter each, got {letters!r}")
        if not letters.isalpha() or len(set(letters)) < len(letters):
            raise ValueError(f"{name}: {what} must be letters, each once and at least one; got {letters!r}")
    if isinstance(units, str) or not all(isinstance(unit, str) and unit.isidentifier() for unit in units):
        raise TypeError(f"{name}: units must be a tuple of names, got {units!r}")
    if len(set(units)) < len(units):
        raise ValueError(f"{name}: units must have different names, got {units!r}")

    sizes = {"x": len(gates), "h": len(gates), "state": len(states)} | ({"extra": len(units)} if units else {})
    outputs = trace_or_explain(f"{name}: step", step, **sizes)
    pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2 and isinstance(outputs[0], (tuple, list))
    if grad is None:
        check_outputs(f"{name}: step", outputs[0] if pair else outputs, "new states", states)
        return
    if not pair or not isinstance(outputs[1], (tuple, list)):
        raise TypeError(f"{name}: with a grad, step must return two tuples: the new states, and the saved values")
    new, saved = outputs
    check_outputs(f"{name}: step", new, "new states", states)
    check_outputs(f"{name}: step", saved, "saved values", range(len(saved)))

    known = {"dnew": len(states), "new": len(states), "state": len(states), "saved": len(saved)}
    gradients = trace_or_explain(f"{name}: grad", grad, **known | ({"extra": len(units)} if units else {}))
    groups: dict[str, Sequence] = {"gradients of x": gates, "gradients of h": gates, "gradients of state": states}
    groups |= {"gradients of the units": units} if units else {}
    if not isinstance(gradients, (tuple, list)) or len(gradients) != len(groups):
        raise TypeError(f"{name}: grad must return {len(groups)} tuples: {', '.join(groups)}")
    for values, (what, expected) in zip(gradients, groups.items()):
        check_outputs(f"{name}: grad", values, what, expected)


def trace_or_explain(what: str, function: Callable, **sizes: int) -> Any:
    """What the function makes of symbols."""
    try:
        return read(function, **sizes)[1]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        counts = ", ".join(f"{name} [{n}]" for name, n in sizes.items())
        raise TypeError(
            f"{what} can't be traced, with tuples {counts}: {error}. A cell definition may use {ALLOWED}"
        ) from error


def check_outputs(source: str, values: Any, what: str, letters: Sequence) -> None:
    expected = f"a tuple of {len(letters)} {what} ({', '.join(map(str, letters))})"
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{source} must return {expected}, got {type(values).__name__}")
    if len(values) != len(letters):
        raise ValueError(f"{source} must return {expected}, got {len(values)}")
    for value in values:
        if not isinstance(value, (Traced, Real)):
            raise TypeError(f"{source} must return {expected}; one of them is {type(value).__name__}, no traced value")


def gradcheck(cell: Cell) -> None:
    """A ValueError that names the inputs whose gradient isn't the derivative of step.

    Central differences in float64, of a random sum of the new states, where a few steps from zero states lead.
    """
    rng = np.random.default_rng(0)
    sizes = (64, 3)  # batch rows; units, which a cell can reduce over

    def random_inputs(count: int) -> list[np.ndarray]:
        return [rng.standard_normal(sizes) for _ in range(count)]

    extra = [random_inputs(cell.E)] if cell.E else []
    after: Sequence = [np.zeros(sizes)] * cell.S
    for _ in range(3):
        args = [random_inputs(cell.G), random_inputs(cell.G), after, *extra]
        new, saved = cell.step(*args)
        after = [np.broadcast_to(value, sizes) for value in new]
        if not np.isfinite(after).all():
            raise ValueError(f"{cell.name}: from zero states, step leads to states that aren't finite")
    dnew = random_inputs(cell.S)
    gradients = cell.grad(dnew, after, args[2], saved, *extra)

    def perturbed(which: int, k: int, by: float) -> np.ndarray:
        """[unit, row]: every row's sum, with one input of one unit moved."""
        sums = []
        for unit in np.eye(sizes[1]):
            changed = [list(group) for group in args]
            changed[which][k] = changed[which][k] + by * unit
            sums.append(sum((d * new).sum(-1) for d, new in zip(dnew, cell.step(*changed)[0])))
        return np.array(sums)

    groups = {"x of gate": cell.gates, "h of gate": cell.gates, "state": cell.states, "unit": cell.per_unit_params}
    wrong = []
    for which, (what, letters) in enumerate(list(groups.items())[: len(args)]):
        for k, letter in enumerate(letters):
            numeric = (perturbed(which, k, DELTA) - perturbed(which, k, -DELTA)) / (2 * DELTA)
            analytic = np.broadcast_to(gradients[which][k], sizes).T
            off = ~np.isclose(analytic, numeric, rtol=1e-5, atol=1e-7)
            if off.any():
                at = np.unravel_index(np.argmax(off), off.shape)
                wrong.append(f"of {what} {letter!r}: {analytic[at]:.6g}, but step's derivative is {numeric[at]:.6g}")
    if wrong:
        raise ValueError(f"{cell.name}: grad gives a wrong gradient {'; '.join(wrong)}")
