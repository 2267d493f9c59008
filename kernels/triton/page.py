"""A cell's page as Triton functions, written from its graph."""

import linecache
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell, extra, grad_graph, step_graph
from ..emit import assignments
from ..trace import ARITY, Graph
from . import mathematics

NUMBERS = count()


class Page(NamedTuple):
    step: Callable  # x [G], h [G], state [S] -> new states [S], saved [K]; tuples of tiles
    grad: Callable  # dnew [S], new [S], state [S], saved [K] -> dx [G], dh [G], dstate [S]; a zero is a plain 0.0


@cache
def page(cell: Cell) -> Page:
    more = tuple(extra(cell))
    return Page(
        function("step", step_graph(cell), "x", "h", "state", *more),
        function("grad", grad_graph(cell), "dnew", "new", "state", "saved", *more),
    )


def function(name: str, graph: Graph, *arguments: str) -> Callable:
    lines, groups = assignments(graph, repr)
    results = ", ".join("({})".format("".join(f"{value}, " for value in group)) for group in groups)
    body = [f"    {line}\n" for line in [*lines, f"return {results}"]]
    text = f"def {name}({', '.join(arguments)}):\n{''.join(body)}"
    known: dict[str, Any] = {op: getattr(mathematics, op) for op in ARITY if hasattr(mathematics, op)}
    known |= {"__name__": __name__, "tl": tl}  # Triton looks for its language among a function's globals
    file = f"<{__name__} {next(NUMBERS)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where triton.jit looks for it
    exec(compile(text, file, "exec"), known)
    return triton.jit(known[name])
