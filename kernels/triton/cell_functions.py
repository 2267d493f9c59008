"""Renders a cell as Triton functions."""

import linecache
from collections.abc import Callable
from functools import cache
from itertools import count
from math import isfinite
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell, recurrent_input_grad_graph, recurrent_input_graph
from ..codegen.reductions import ReductionSplit, grad_split, step_split
from ..emit import assignments
from ..trace import ARITY, Graph
from . import mathematics

NUMBERS = count()
STEP, GRAD = ("x", "h", "state", "extra", "means"), ("dnew", "new", "state", "saved", "extra", "means")


class CellFunctions(NamedTuple):
    """Functions from tuples of tiles to tuples of tiles; a constant is a scalar, a value that is the same for all units
    one column. New states are always tiles, as loops over time carry them.

    A cell with reductions over hidden units is split there (`kernels.codegen.reductions`). A level returns the part of
    its means that a tile's columns contribute, those `inside` [1, columns] the layer, of H units in all. The caller
    adds up the parts, and they are `means` [rows, 1] for the next level, at last for the cell.
    """

    step: Callable  # x [G], h [G], state [S], extra, means -> new states [S], saved [K]
    grad: Callable  # dnew [S], new [S], state [S], saved [K], extra, means
    #                 -> dx [G], dh [G], dstate [S], dunits [num_trainable]
    step_level: Callable | None  # level, x, h, state, extra, means, inside, H -> parts
    grad_level: Callable | None  # level, dnew, new, state, saved, extra, means, inside, H -> parts
    step_means: tuple[int, ...]  # of each level
    grad_means: tuple[int, ...]
    recurrent_input: Callable  # h [1], extra -> [1]
    recurrent_input_grad: Callable  # dnew [1], extra -> dh [1], dunits [num_trainable]


@cache
def compile_cell(cell: Cell) -> CellFunctions:
    step, grad = step_split(cell), grad_split(cell)
    return CellFunctions(
        function("step", STEP, body(step.graph, "x", tiles=1)),
        function("grad", GRAD, body(grad.graph, "dnew")),
        reduction_levels("step_level", STEP, step),
        reduction_levels("grad_level", GRAD, grad),
        step.counts,
        grad.counts,
        function("recurrent_input", ("h", "extra"), body(recurrent_input_graph(cell), "h")),
        function("recurrent_input_grad", ("dnew", "extra"), body(recurrent_input_grad_graph(cell), "dnew")),
    )


def body(graph: Graph, like: str, tiles: int = 0) -> list[str]:
    """The lines of a function; the values of the first `tiles` groups are broadcast to tiles."""
    lines, groups = assignments(graph, typed(like))
    for values, names in list(zip(graph.outputs, groups))[:tiles]:
        names[:] = [f"tile({name}, {like}[0])" if value.is_broadcast else name for value, name in zip(values, names)]
    return [*lines, f"return {''.join(f'{as_tuple(group)}, ' for group in groups)}"]


def typed(like: str) -> Callable[[float], str]:
    """Constants of the dtype of an argument's tiles. Triton takes plain ones for float32 where two operands meet that
    aren't the operator's, as those of a maximum."""

    def constant(value: float) -> str:
        text = repr(value) if isfinite(value) else f'float("{value}")'
        return f"tl.full((), {text}, {like}[0].dtype)"

    return constant


def reduction_levels(name: str, arguments: tuple[str, ...], split: ReductionSplit) -> Callable | None:
    if not split.levels:
        return None
    text = []
    for level, graph in enumerate(split.levels):
        lines, (values,) = assignments(graph, typed(arguments[0]))
        lines.append(f"parts = {as_tuple([f'mean({value}, inside, H)' for value in values])}")
        text += [f"if level == {level}:", *(f"    {line}" for line in lines)]
    return function(name, ("level", *arguments, "inside", "H"), [*text, "return parts"])


def as_tuple(values: list[str]) -> str:
    """The text of a tuple."""
    return "({})".format("".join(f"{value}, " for value in values))


def function(name: str, arguments: tuple[str, ...], lines: list[str]) -> Callable:
    text = "".join([f"def {name}({', '.join(arguments)}):\n", *(f"    {line}\n" for line in lines)])
    known: dict[str, Any] = {op: getattr(mathematics, op) for op in (*ARITY, "tile") if hasattr(mathematics, op)}
    known |= {"__name__": __name__, "tl": tl}  # Triton looks for its language among a function's globals
    file = f"<{__name__} {next(NUMBERS)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where triton.jit looks for it
    exec(compile(text, file, "exec"), known)
    return triton.jit(known[name])
