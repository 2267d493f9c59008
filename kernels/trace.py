"""Reads a cell's page: runs it once on symbols and keeps what it did, as a graph of operations.

All are elementwise but one: a mean is that over all units of a batch row, the same for each of them. What waits for
means, and for how many of them one after the other, every symbol knows.

From that graph follow the NumPy backend's preallocated calls (`program.py`), the Triton functions and the CUDA struct
(`emit.py`), a gradient for a page without one (`derive.py`), facts about a cell that its page need not repeat, such as
which gates' two parts have different gradients, and the page on arrays of any library (`Graph.run`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Every operation a page can be made of, and how many operands it has.
ARITY = {
    "add": 2, "subtract": 2, "multiply": 2, "divide": 2, "maximum": 2,
    "negative": 1, "sigmoid": 1, "tanh": 1, "exp": 1, "log": 1, "rsqrt": 1, "positive": 1, "where": 3, "mean": 1,
}  # fmt: skip


class Symbol:
    """A value of the page while it is traced. Equal operations on equal operands are one symbol."""

    __slots__ = ("graph", "level", "op", "operands", "uniform")

    def __init__(self, graph: "Graph", op: str, operands: tuple):
        self.graph, self.op, self.operands = graph, op, operands
        met = [operand for operand in operands if isinstance(operand, Symbol)]
        self.level: int = max((operand.level for operand in met), default=0) + (op == "mean")  # of means in a row
        self.uniform: bool = op in ("mean", "constant") or (bool(met) and all(o.uniform for o in met))  # over the units

    def apply(self, op: str, *others: "Symbol | float") -> "Symbol":
        return self.graph.node(op, self, *map(self.graph.symbol, others))

    def __add__(self, other):
        return self.apply("add", other)

    def __radd__(self, other):
        return self.graph.symbol(other).apply("add", self)

    def __sub__(self, other):
        return self.apply("subtract", other)

    def __rsub__(self, other):
        return self.graph.symbol(other).apply("subtract", self)

    def __mul__(self, other):
        return self.apply("multiply", other)

    def __rmul__(self, other):
        return self.graph.symbol(other).apply("multiply", self)

    def __truediv__(self, other):
        return self.apply("divide", other)

    def __rtruediv__(self, other):
        return self.graph.symbol(other).apply("divide", self)

    def __neg__(self):
        return self.apply("negative")

    def __bool__(self):
        raise TypeError("a cell's page can't branch on a value: it runs once, for every unit at the same time")

    def __repr__(self):
        if self.op in ("input", "constant"):
            return "".join(map(str, self.operands[:1])) + "".join(f"[{k}]" for k in self.operands[1:])
        return f"{self.op}({', '.join(map(repr, self.operands))})"


@dataclass
class Graph:
    """What a page did. `outputs` has the page's own nesting; `nodes` is in an order that computes."""

    nodes: dict[tuple, Symbol] = field(default_factory=dict)
    outputs: tuple = ()

    def node(self, op: str, *operands) -> Symbol:
        return self.nodes.setdefault((op, *operands), Symbol(self, op, operands))

    def symbol(self, value: "Symbol | float") -> Symbol:
        return value if isinstance(value, Symbol) else self.node("constant", float(value))

    def run(self, operations: Mapping[str, Callable], **inputs: Sequence) -> tuple:
        """The outputs for these inputs, with a library's own functions for the operations; constants are floats."""
        values: dict[Symbol, Any] = {}
        for node in self.nodes.values():
            if node.op == "input":
                name, k = node.operands
                values[node] = inputs[name][k]
            elif node.op == "constant":
                (values[node],) = node.operands
            else:
                values[node] = operations[node.op](*(values[operand] for operand in node.operands))
        return tuple(tuple(values[value] for value in group) for group in self.outputs)

    def image(self, value: Symbol, known: dict[Symbol, Symbol]) -> Symbol:
        """A symbol of another graph in this one, with all that it is computed from; `known` says what stands for what,
        and is added to."""
        if value not in known:
            if value.op in ("input", "constant"):
                known[value] = self.node(value.op, *value.operands)
            else:
                known[value] = self.node(value.op, *(self.image(operand, known) for operand in value.operands))
        return known[value]

    def pruned(self) -> "Graph":
        """A graph with nothing but what the outputs need."""
        graph = Graph()
        known: dict[Symbol, Symbol] = {}
        graph.outputs = tuple(tuple(graph.image(value, known) for value in group) for group in self.outputs)
        return graph


def trace(function: Callable, **inputs: int) -> Graph:
    """Run `function` on tuples of symbols; `inputs` gives each argument's length, in order."""
    graph = Graph()
    arguments = [tuple(graph.node("input", name, k) for k in range(n)) for name, n in inputs.items()]
    outputs = function(*arguments)
    graph.outputs = tuple(tuple(graph.symbol(value) for value in group) for group in outputs)
    return graph
