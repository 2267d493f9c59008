"""A call goes by the plan of those that look like it, and skips the checks and choices that can't come out differently.

All that decides on a plan is in its key, and no array or layer is kept, so that none can be out of date.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..core import arrays
from ..core.problem import Options, Problem, Weights
from .dispatch import Backend, prepared, variable


class Plan(NamedTuple):
    """How a call of one layer in one direction goes, and with it all that look like it."""

    backend: Backend
    problem: Problem
    zeros: Sequence[tuple[int, ...] | None]  # shapes of the states that aren't given; empty where all are
    wanted: bool = False  # whether a gradient may be asked for
    squeezed: bool = False  # whether states lose the axis of layers on their way

    @classmethod
    def of(
        cls, name: str, x: Any, weights: Weights, state: Sequence[Any], options: Options, wanted: bool = False
    ) -> "Plan":
        """Everything fits, or an error."""
        backend, problem, filled = prepared(name, x, weights, state, options, wanted and not options.recompute)
        zeros = [tuple(zero.shape) if given is None else None for given, zero in zip(state, filled)]
        return cls(backend, problem, zeros if any(zeros) else [], wanted)

    def filled(self, x: Any, state: Sequence[Any]) -> Sequence[Any]:
        """The states with zeros for None."""
        if not self.zeros:
            return state
        return [given if zero is None else arrays.zeros(zero, like=x) for given, zero in zip(state, self.zeros)]


PLANS: dict[tuple, Plan | None] = {}  # None: such calls go the long way
MOST_PLANS, UNSEEN = 1024, Plan(*[None] * 3)  # type: ignore[arg-type]


def planned(
    settings: tuple, look: Callable[[Any], tuple], given: Iterable[Any], make: Callable[..., Plan | None], *call: Any
) -> Plan | None:
    """The plan of a call, which `make` makes of it for the first of those alike; None: it goes the long way.

    settings: all that decides beside the environment and how the arrays given `look`.
    """
    try:
        key = settings, variable(), *[None if array is None else look(array) for array in given]
        plan = PLANS.get(key, UNSEEN)
    except (AttributeError, TypeError):  # no array, or nothing to look up: the long way has the words for it
        return None
    if plan is UNSEEN:
        if len(PLANS) >= MOST_PLANS:
            PLANS.clear()
        plan = PLANS[key] = make(*call)
    return plan
