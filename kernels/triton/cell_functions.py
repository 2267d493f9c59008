"""A cell's page as Triton functions, written from its graph."""

import linecache
from collections.abc import Callable
from functools import cache
from itertools import count
from math import isfinite
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell, operand_grad_graph, operand_graph
from ..codegen.reductions import Cut, grad_cut, step_cut
from ..emit import assignments
from ..trace import ARITY, Graph
from . import mathematics

NUMBERS = count()
STEP, GRAD = ("x", "h", "state", "extra", "means"), ("dnew", "new", "state", "saved", "extra", "means")


class Page(NamedTuple):
    """Functions of tuples of tiles, and to such; a constant is a scalar, and what is the same for all units one column.
    But new states are tiles, as loops over time hand them on.

    Where the cell has reductions over units, its graph is cut there (`gpu_rnn.kernels.codegen.reductions`). A level
    gives the parts of its means that a tile's columns have: those of them that are `inside` [1, columns],
    units of the layer, which are H in all. The caller adds up the parts, and they are `means` [rows, 1] for the next
    level, at last for the whole cell.
    """

    step: Callable  # x [G], h [G], state [S], extra, means -> new states [S], saved [K]
    grad: Callable  # dnew [S], new [S], state [S], saved [K], extra, means
    #                 -> dx [G], dh [G], dstate [S], dunits [learned]
    step_level: Callable | None  # level, x, h, state, extra, means, inside, H -> parts
    grad_level: Callable | None  # level, dnew, new, state, saved, extra, means, inside, H -> parts
    step_means: tuple[int, ...]  # how many there are at each level
    grad_means: tuple[int, ...]
    operand: Callable  # h [1], extra -> [1]
    operand_grad: Callable  # dnew [1], extra -> dh [1], dunits [learned]


@cache
def page(cell: Cell) -> Page:
    step, grad = step_cut(cell), grad_cut(cell)
    return Page(
        function("step", STEP, body(step.page, "x", tiles=1)),
        function("grad", GRAD, body(grad.page, "dnew")),
        meeting("step_level", STEP, step),
        meeting("grad_level", GRAD, grad),
        step.counts,
        grad.counts,
        function("operand", ("h", "extra"), body(operand_graph(cell), "h")),
        function("operand_grad", ("dnew", "extra"), body(operand_grad_graph(cell), "dnew")),
    )


def body(graph: Graph, like: str, tiles: int = 0) -> list[str]:
    """The lines of a function; the first so many groups that it returns are made tiles, if they aren't."""
    lines, groups = assignments(graph, typed(like))
    for values, names in list(zip(graph.outputs, groups))[:tiles]:
        names[:] = [f"tile({name}, {like}[0])" if value.uniform else name for value, name in zip(values, names)]
    return [*lines, f"return {''.join(f'{together(group)}, ' for group in groups)}"]


def typed(like: str) -> Callable[[float], str]:
    """Constants of the dtype of an argument's tiles. Triton takes plain ones for float32 where two operands meet that
    aren't the operator's, as those of a maximum."""

    def constant(value: float) -> str:
        text = repr(value) if isfinite(value) else f'float("{value}")'
        return f"tl.full((), {text}, {like}[0].dtype)"

    return constant


def meeting(name: str, arguments: tuple[str, ...], cut: Cut) -> Callable | None:
    if not cut.levels:
        return None
    text = []
    for level, graph in enumerate(cut.levels):
        lines, (values,) = assignments(graph, typed(arguments[0]))
        lines.append(f"parts = {together([f'mean({value}, inside, H)' for value in values])}")
        text += [f"if level == {level}:", *(f"    {line}" for line in lines)]
    return function(name, ("level", *arguments, "inside", "H"), [*text, "return parts"])


def together(values: list[str]) -> str:
    """As a tuple."""
    return "({})".format("".join(f"{value}, " for value in values))


def function(name: str, arguments: tuple[str, ...], lines: list[str]) -> Callable:
    text = "".join([f"def {name}({', '.join(arguments)}):\n", *(f"    {line}\n" for line in lines)])
    known: dict[str, Any] = {op: getattr(mathematics, op) for op in (*ARITY, "tile") if hasattr(mathematics, op)}
    known |= {"__name__": __name__, "tl": tl}  # Triton looks for its language among a function's globals
    file = f"<{__name__} {next(NUMBERS)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where triton.jit looks for it
    exec(compile(text, file, "exec"), known)
    return triton.jit(known[name])
