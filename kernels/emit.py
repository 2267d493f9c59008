"""A page as straight-line code: one assignment for every operation, in a form that Python and C++ read alike."""

from collections.abc import Callable

from .trace import Graph, Symbol

INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


def assignments(graph: Graph, constant: Callable[[float], str]) -> tuple[list[str], list[list[str]]]:
    """Of what the outputs need: ["t0 = x[0] + h[0]", ...], and the outputs' names by group.

    Inputs are read before anything is assigned to the outputs, so that these may stand in the same place.
    """
    names: dict[Symbol, str] = {}
    lines = []

    def name(value: Symbol) -> str:
        if value in names:
            return names[value]
        if value.op == "constant":
            return constant(*value.operands)
        if value.op == "input":
            array, k = value.operands
            text, names[value] = f"{array}[{k}]", f"{array}_{k}"
        else:
            text = expression(value.op, [name(operand) for operand in value.operands])
            names[value] = f"t{len(names)}"
        lines.append(f"{names[value]} = {text}")
        return names[value]

    return lines, [[name(value) for value in group] for group in graph.outputs]


def expression(op: str, operands: list[str]) -> str:
    if op in INFIX:
        return f"{operands[0]} {INFIX[op]} {operands[1]}"
    return f"-{operands[0]}" if op == "negative" else f"{op}({', '.join(operands)})"
