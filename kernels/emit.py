"""A cell as straight-line code: one assignment for every operation, in a form that Python and C++ read alike."""

from collections.abc import Callable

from .trace import Graph, Symbol, ascending

INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


def assignments(graph: Graph, constant: Callable[[float], str]) -> tuple[list[str], list[list[str]]]:
    """Of what the outputs need: ["t0 = x[0] + h[0]", ...], and the outputs' names by group.

    Inputs are read before anything is assigned to the outputs, so that these may stand in the same place.
    """
    names: dict[Symbol, str] = {}
    lines: list[str] = []
    for value in ascending(value for group in graph.outputs for value in group):
        if value.op == "constant":
            names[value] = constant(*value.operands)
            continue
        if value.op == "input":
            array, k = value.operands
            text, names[value] = f"{array}[{k}]", f"{array}_{k}"
        else:
            text, names[value] = expression(value.op, [names[operand] for operand in value.operands]), f"t{len(lines)}"
        lines.append(f"{names[value]} = {text}")
    return lines, [[names[value] for value in group] for group in graph.outputs]


def expression(op: str, operands: list[str]) -> str:
    if op in INFIX:
        return f"{operands[0]} {INFIX[op]} {operands[1]}"
    return f"-{operands[0]}" if op == "negative" else f"{op}({', '.join(operands)})"
