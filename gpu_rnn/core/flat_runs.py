"""The arrays of a call's runs in one flat list: what operators and autograd functions take, give and differentiate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .problem import Run, Weights


@dataclass(frozen=True)
class FlatRuns:
    """How they lie: of each run x, but not of a stack's upper layers; the weights that there are; the states.

    All other flat lists (shapes, flags, gradients) lie likewise, one entry for each array.
    """

    names: tuple[str, ...]  # of the weights that each run has, in the order of `Weights`
    reverse: tuple[bool, ...]  # of each run
    S: int
    linked: bool = False  # whether each run takes the y of the one before: a stack

    @classmethod
    def of(cls, runs: Sequence[Run], linked: bool = False) -> "FlatRuns":
        names = tuple([name for name, weight in zip(Weights._fields, runs[0].weights) if weight is not None])
        return cls(names, tuple([run.reverse for run in runs]), len(runs[0].state), linked)

    @property
    def n(self) -> int:
        return len(self.reverse)

    def flatten(self, runs: Sequence[Run]) -> list[Any]:
        flat: list[Any] = []
        for x, weights, state, _ in runs:
            if not (self.linked and flat):
                flat.append(x)
            flat += [weight for weight in weights if weight is not None]
            flat += state
        return flat

    def split(self, flat: Sequence[Any]) -> list[Sequence[Any]]:
        """The entries of each run; that of x is None in a stack's upper layers."""
        if not self.linked:
            return chunks(flat, self.n)
        x, *rest = flat
        return [[None if k else x, *entries] for k, entries in enumerate(chunks(rest, self.n))]

    def unflatten(self, flat: Sequence[Any]) -> list[Run]:
        runs = []
        for (x, *rest), reverse in zip(self.split(flat), self.reverse):
            weights = dict(zip(self.names, rest))
            runs.append(Run(x, Weights(*map(weights.get, Weights._fields)), tuple(rest[len(self.names) :]), reverse))
        return runs

    def needs(self, flags: Sequence[Any]) -> list[set[str]]:
        """Flags of needed gradients -> the names that `Backend.backward` takes for each run."""
        by_run, below = [], False
        for k, (x, *rest) in enumerate(self.split(flags)):
            names = {name for name, flag in zip(self.names, rest) if flag}
            if below if self.linked and k else x:
                names.add("x")
            below = below or bool(x) or any(rest)
            by_run.append(names)
        return by_run

    def select(self, gradients: Sequence[dict[str, Any]], flags: Sequence[Any]) -> list[Any]:
        """The gradients that `Backend.backward` gave, those that are flagged, in the order of the list."""
        selected = []
        for of_run, flagged in zip(gradients, self.split(flags)):
            places = [*(of_run.get(name) for name in ("x", *self.names)), *of_run["state"]]
            selected += [gradient for gradient, flag in zip(places, flagged) if flag]
        return selected


def chunks(flat: Sequence[Any], n: int) -> list[Sequence[Any]]:
    """n equal parts of a list."""
    size = len(flat) // n
    return [flat[k * size : (k + 1) * size] for k in range(n)]
