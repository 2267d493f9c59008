"""A cell's page as Triton functions: the same code, with Triton's mathematics in the place of NumPy's."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import NamedTuple

import triton
import triton.language as tl

from .. import mathematics as numpy_mathematics
from ..cells import Cell
from . import mathematics


class Page(NamedTuple):
    step: Callable  # x [G], h [G], state [S] -> new states [S], saved [K]; tuples of tiles
    grad: Callable  # dnew [S], new [S], state [S], saved [K] -> dx [G], dh [G], dstate [S]; a zero is a plain 0.0


@cache
def page(cell: Cell) -> Page:
    return Page(jitted(cell.step), jitted(cell.grad))


def jitted(function: Callable) -> Callable:
    """triton.jit finds what a function calls in the function's globals, so it gets a copy that has others."""
    known = {
        name: getattr(mathematics, value.__name__)
        for name, value in function.__globals__.items()
        if getattr(value, "__module__", None) == numpy_mathematics.__name__
    }
    globals_ = {"__name__": function.__module__, "__builtins__": __builtins__, "tl": tl, **known}
    return triton.jit(FunctionType(function.__code__, globals_, function.__name__))
