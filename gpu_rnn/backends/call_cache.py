"""The one cache of decisions: what a call looks like -> the backend and the problem, which holds all that follows.

Kernel configurations and launches are decisions of the problem (`Problem.decide`), and so live in the same entry. All
that decides is in the key: the caller's settings, the environment, kind, shape, dtype and device of every array. No
array and no layer is kept, so that no write to either can be missed.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ..core.flat_runs import FlatRuns
from ..core.problem import Problem
from .dispatch import VARIABLE
from .protocol import Backend


@dataclass(frozen=True, eq=False)
class CachedCall:
    """How a call runs, and every call that looks like it."""

    backend: Backend
    problem: Problem
    layout: FlatRuns
    zeros: tuple = ()  # `validation.zero_states`
    requires_grad: bool = False  # whether autograd may ask for a gradient


CACHE: dict[tuple, CachedCall | None] = {}  # None: such calls are run otherwise
MAX_CALLS, MISSING = 1024, object()
SIGNATURE: dict[str, Callable[[Any], tuple]] = {
    "numpy": attrgetter("__class__", "shape", "dtype"),
    "cupy": lambda array: (array.__class__, array.shape, array.dtype, int(array.device)),
    "torch": attrgetter("__class__", "shape", "dtype", "device", "requires_grad"),
}

# os.environ raises and catches two errors to say that a name isn't there, which takes as long as a small matmul.
_ENVIRONMENT: Any = getattr(os.environ, "_data", os.environ)
_KEY: Any = VARIABLE if _ENVIRONMENT is os.environ else os.environ.encodekey(VARIABLE)


def lookup(
    settings: tuple, library: str, arrays: Iterable[Any], make: Callable[..., CachedCall | None], *args: Any
) -> CachedCall | None:
    """The cached call for arrays of a library and all other settings that decide; `make(*args)` makes a missing one.

    Where an array is none, or nothing that can be looked up, the call is made anew: that has the words for it.
    """
    signature = SIGNATURE[library]
    try:
        key = settings, _ENVIRONMENT.get(_KEY), *[None if array is None else signature(array) for array in arrays]
        call = CACHE.get(key, MISSING)
    except (AttributeError, TypeError):
        return make(*args)
    if call is MISSING:
        if len(CACHE) >= MAX_CALLS:
            CACHE.clear()
        call = CACHE[key] = make(*args)
    return call  # type: ignore[return-value]
