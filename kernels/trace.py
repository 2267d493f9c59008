"""Trace a cell: run its functions once on symbols and keep what they did, as a graph of operations.

All are elementwise but one: a mean is that over all units of a batch row, the same for each of them. What waits for
means, and for how many of them one after the other, every symbol knows.

From that graph follow the NumPy backend's preallocated calls (`codegen/numpy.py`), the Triton functions
(`triton/cell_functions.py`) and the C++ struct (`codegen/cpp.py`), a gradient for a cell without one (`autodiff.py`),
facts that a definition need not repeat, such as which gates' two parts have different gradients, and the cell on arrays
of any library (`Graph.run`).
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

# Every operation a cell can be made of, and how many operands it has.
ARITY = {
    "add": 2, "subtract": 2, "multiply": 2, "divide": 2, "maximum": 2,
    "negative": 1, "sigmoid": 1, "tanh": 1, "exp": 1, "log": 1, "rsqrt": 1, "positive": 1, "where": 3, "mean": 1,
}  # fmt: skip
MEANS = "means"  # the argument that holds means, in graphs that take them instead of making them
OPERATORS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv}


class Symbolic:
    """A value that isn't there yet, on which operators and `kernels.mathematics` leave a note of what they would do."""

    __slots__ = ()

    def apply(self, op: str, *others: Any) -> Any:
        """The operation on this value and others, symbolic ones or numbers."""
        raise NotImplementedError

    def lift(self, value: Any) -> Any:
        """A number as a value of the same graph; one of its values as it is."""
        raise NotImplementedError

    def __add__(self, other):
        return self.apply("add", other)

    def __radd__(self, other):
        return self.lift(other).apply("add", self)

    def __sub__(self, other):
        return self.apply("subtract", other)

    def __rsub__(self, other):
        return self.lift(other).apply("subtract", self)

    def __mul__(self, other):
        return self.apply("multiply", other)

    def __rmul__(self, other):
        return self.lift(other).apply("multiply", self)

    def __truediv__(self, other):
        return self.apply("divide", other)

    def __rtruediv__(self, other):
        return self.lift(other).apply("divide", self)

    def __neg__(self):
        return self.apply("negative")

    def __array_ufunc__(self, ufunc, method, *operands, **keywords):
        """An operator with a NumPy number on its left side is NumPy's; no other function of NumPy's has a symbol."""
        if ufunc.__name__ not in OPERATORS or method != "__call__" or keywords:
            raise TypeError(refusal(f"call numpy.{ufunc.__name__} on"))
        return OPERATORS[ufunc.__name__](*(each if isinstance(each, Symbolic) else number(each) for each in operands))


class Symbol(Symbolic):
    """A value of the cell while it is traced. Equal operations on equal operands are one symbol."""

    __slots__ = ("graph", "is_broadcast", "op", "operands", "reduction_depth")

    def __init__(self, graph: "Graph", op: str, operands: tuple):
        self.graph, self.op, self.operands = graph, op, operands
        symbols = [operand for operand in operands if isinstance(operand, Symbol)]
        depth = max((operand.reduction_depth for operand in symbols), default=0)
        self.reduction_depth: int = depth + (op == "mean")  # means in a row
        shared = op in ("mean", "constant") or operands[0] == MEANS
        alike = bool(symbols) and all(operand.is_broadcast for operand in symbols)
        self.is_broadcast: bool = shared or alike  # the same for all units

    def apply(self, op: str, *others: "Symbol | float") -> "Symbol":
        return self.graph.node(op, self, *map(self.graph.symbol, others))

    def lift(self, value: "Symbol | float") -> "Symbol":
        return self.graph.symbol(value)

    def __repr__(self):
        return self.text(4)

    def text(self, depth: int) -> str:
        """The expression, cut off below a depth."""
        if self.op in ("input", "constant"):
            return "".join(map(str, self.operands[:1])) + "".join(f"[{k}]" for k in self.operands[1:])
        inner = [operand.text(depth - 1) for operand in self.operands] if depth else ["..."]
        return f"{self.op}({', '.join(inner)})"


class Traced(Symbolic):
    """A symbol as a cell definition sees it. It runs once, for all units and time steps, so whatever would look at the
    value, to branch on it or to compute with it elsewhere, is refused."""

    __slots__ = ("symbol",)

    def __init__(self, symbol: Symbol):
        self.symbol = symbol

    def apply(self, op: str, *others: "Traced | float") -> "Traced":
        return as_traced(self.symbol.apply(op, *map(behind, others)))

    def lift(self, value: "Traced | float") -> "Traced":
        return as_traced(self.symbol.lift(behind(value)))

    def __repr__(self):
        return repr(self.symbol)


LOOKS = {
    "branch on": "bool",
    "compare": "eq ne lt le gt ge",
    "hash": "hash",
    "go through": "iter len contains getitem",
    "make a number of": "float int complex index round trunc floor ceil",
    "make an array of": "array array_function",
}


def refusal(what: str) -> str:
    return (
        f"a cell definition can't {what} a traced value: it runs once, for all units and time steps; "
        "use where(condition, a, b), which is a where condition > 0, else b"
    )


def refuse(what: str) -> Callable:
    def look(self, *_, **__):
        raise TypeError(refusal(what))

    return look


for _what, _names in LOOKS.items():
    for _name in _names.split():
        setattr(Traced, f"__{_name}__", refuse(_what))


def as_traced(symbol: Symbol) -> Traced:
    """The same for the same symbol."""
    faces = symbol.graph.faces
    if symbol not in faces:
        faces[symbol] = Traced(symbol)
    return faces[symbol]


def behind(value: Any) -> Any:
    """The symbol of a traced value; all else as it is."""
    return value.symbol if isinstance(value, Traced) else value


def number(value: Any) -> float:
    """A constant of a cell definition, in which -0.0 is 0.0. TypeError for what has no fixed value, or isn't one."""
    if not isinstance(value, Real) and not (isinstance(value, np.ndarray) and value.ndim == 0):
        raise TypeError(f"a constant of a cell definition must be a number, not {type(value).__name__}")
    return float(value) + 0.0


def is_op(symbol: Symbol) -> bool:
    return symbol.op not in ("input", "constant")


def operands(symbol: Symbol) -> Sequence[Symbol]:
    return symbol.operands if is_op(symbol) else ()


def ascending(values: Iterable[Symbol], below: Callable[[Symbol], Sequence[Symbol]] = operands) -> Iterator[Symbol]:
    """The values and all that is `below` them, each once and operands first. A graph may be deeper than Python's stack:
    whatever goes down a graph goes this way."""
    seen = set()
    for value in values:
        waiting = [value]
        while waiting:
            fresh = [operand for operand in below(waiting[-1]) if operand not in seen]
            if waiting[-1] in seen or not fresh:
                symbol = waiting.pop()
                if symbol not in seen:
                    seen.add(symbol)
                    yield symbol
            else:
                waiting += reversed(fresh)


@dataclass
class Graph:
    """What a cell did. `outputs` has the cell's own nesting; `nodes` is in an order that computes."""

    nodes: dict[tuple, Symbol] = field(default_factory=dict)
    outputs: tuple = ()
    faces: dict[Symbol, Traced] = field(default_factory=dict)  # of the symbols that a definition has seen

    def node(self, op: str, *operands) -> Symbol:
        key = (op, *operands)
        if key not in self.nodes:
            self.nodes[key] = Symbol(self, op, operands)
        return self.nodes[key]

    def symbol(self, value: "Symbol | float") -> Symbol:
        if not isinstance(value, Symbol):
            return self.node("constant", number(value))
        if value.graph is not self:
            raise TypeError("a cell definition is a function of its arguments alone, but kept a value of another run")
        return value

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

    def copy_into(self, value: Symbol, known: dict[Symbol, Symbol]) -> Symbol:
        """A symbol of another graph in this one, with all that it is computed from; `known` says what stands for what,
        and is added to."""
        for each in ascending([value], lambda symbol: () if symbol in known else operands(symbol)):
            if each not in known:
                known[each] = self.node(each.op, *(known[o] if isinstance(o, Symbol) else o for o in each.operands))
        return known[value]

    def pruned(self) -> "Graph":
        """A graph with nothing but what the outputs need."""
        graph = Graph()
        known: dict[Symbol, Symbol] = {}
        graph.outputs = tuple(tuple(graph.copy_into(value, known) for value in group) for group in self.outputs)
        return graph


def read(function: Callable, **inputs: int) -> tuple[Graph, Any]:
    """Run `function` on tuples of traced values -> the graph, and what it returned; `inputs` gives each argument's
    length, in order."""
    graph = Graph()
    arguments = [tuple(as_traced(graph.node("input", name, k)) for k in range(n)) for name, n in inputs.items()]
    return graph, function(*arguments)


def trace(function: Callable, **inputs: int) -> Graph:
    """The graph of a function that returns groups of values."""
    graph, outputs = read(function, **inputs)
    graph.outputs = tuple(tuple(graph.symbol(behind(value)) for value in group) for group in outputs)
    return graph
