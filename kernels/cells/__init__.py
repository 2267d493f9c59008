"""The cells: one page of mathematics each.

A page is a module of this folder with

    GATES, STATES           one letter each; the first state is h, the one that meets the recurrent weights
    step(x, h, state)       -> new states, what the gradient needs
    grad(dnew, new, state, saved)
                            -> gradient of x, of h, of state

where every argument is a tuple over gates or states and every element stands for one unit of one batch row (or an
array or tile of them). Who drives time, memory and hardware takes the page as a parameter: a module put here is found
by name, and NumPy and Triton run it at once. Its CUDA twin is a struct in ``<name>.cuh``.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..trace import trace

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclass(frozen=True)
class Cell:
    """A page, with what follows from it. `get` makes it."""

    name: str
    gates: str
    states: str
    step: Callable
    grad: Callable
    saved: int  # K: how many values `step` keeps for `grad`, beside the states themselves
    separate: tuple[bool, ...]  # [G] true where x and h don't just meet as x + h, so that their gradients differ
    cuda: Path | None  # the CUDA twin

    @property
    def G(self) -> int:
        return len(self.gates)

    @property
    def S(self) -> int:
        return len(self.states)

    @property
    def K(self) -> int:
        return self.saved


@cache
def get(name: str) -> Cell:
    """The cell of that name, or a ValueError that names them all."""
    if name not in NAMES:
        raise ValueError(f"unknown cell {name!r}; there are {', '.join(NAMES)}")
    page = importlib.import_module(f"{__name__}.{name}")
    G, S = len(page.GATES), len(page.STATES)
    _, saved = trace(page.step, x=G, h=G, state=S).outputs
    dx, dh, _ = trace(page.grad, dnew=S, new=S, state=S, saved=len(saved)).outputs
    separate = tuple(a is not b for a, b in zip(dx, dh, strict=True))
    twin = Path(str(page.__file__)).with_suffix(".cuh")
    cuda = twin if twin.exists() else None
    return Cell(name, page.GATES, page.STATES, page.step, page.grad, len(saved), separate, cuda)
