"""A cell's page as Triton functions, written from its graph."""

import linecache
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell, grad_graph, operand_grad_graph, operand_graph, step_graph
from ..emit import assignments
from ..trace import ARITY, Graph
from . import mathematics

NUMBERS = count()
BESIDE = ("inside", "H")  # a mean's arguments beside its tile


class Page(NamedTuple):
    """Functions of tuples of tiles, and to such; a zero is a plain 0.0, and what is the same for all units one column.

    `inside` [1, columns] says which columns are units of the layer, all H of which a tile then has: for means.
    """

    step: Callable  # x [G], h [G], state [S], extra, inside, H -> new states [S], saved [K]
    grad: Callable  # dnew [S], new [S], state [S], saved [K], extra, inside, H
    #                 -> dx [G], dh [G], dstate [S], dunits [learned]
    operand: Callable  # h [1], extra -> [1]
    operand_grad: Callable  # dnew [1], extra -> dh [1], dunits [learned]


@cache
def page(cell: Cell) -> Page:
    return Page(
        function("step", step_graph(cell), "x", "h", "state", "extra", *BESIDE),
        function("grad", grad_graph(cell), "dnew", "new", "state", "saved", "extra", *BESIDE),
        function("operand", operand_graph(cell), "h", "extra"),
        function("operand_grad", operand_grad_graph(cell), "dnew", "extra"),
    )


def function(name: str, graph: Graph, *arguments: str) -> Callable:
    lines, groups = assignments(graph, repr, {"mean": BESIDE})
    results = "".join("({}), ".format("".join(f"{value}, " for value in group)) for group in groups)
    body = [f"    {line}\n" for line in [*lines, f"return {results}"]]
    text = f"def {name}({', '.join(arguments)}):\n{''.join(body)}"
    known: dict[str, Any] = {op: getattr(mathematics, op) for op in ARITY if hasattr(mathematics, op)}
    known |= {"__name__": __name__, "tl": tl}  # Triton looks for its language among a function's globals
    file = f"<{__name__} {next(NUMBERS)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where triton.jit looks for it
    exec(compile(text, file, "exec"), known)
    return triton.jit(known[name])
