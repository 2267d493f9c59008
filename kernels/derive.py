"""The gradient of a page, from its step alone: reverse mode on the page's graph.

A value that meets the gradient is taken from the states after the instant where it is one of them, computed again where
the states before, and what is saved anyway, give it; only what is left is saved. For the LSTM that are its four gates,
which is what the page written by hand saves.

What is saved may be rounded to halves, and of differences of such values even the sign would be another. So what was
decided by a sign, as which of two is the larger, is decided once and saved.
"""

from collections.abc import Callable, Mapping

from . import mathematics
from .trace import Graph, Symbol, trace

# Gradient d of a result y of operands a, b, ... -> gradients of the operands; None where there is none.
PULL: dict[str, Callable] = {
    "add": lambda d, y, a, b: (d, d),
    "subtract": lambda d, y, a, b: (d, -d),
    "multiply": lambda d, y, a, b: (d * b, d * a),
    "divide": lambda d, y, a, b: (d / b, -(d / b * y)),
    "maximum": lambda d, y, a, b: (d * above(y, b), d * (1 - above(y, b))),
    "negative": lambda d, y, a: (-d,),
    "sigmoid": lambda d, y, a: (d * (y * (1 - y)),),
    "tanh": lambda d, y, a: (d * (1 - y * y),),
    "exp": lambda d, y, a: (d * y,),
    "log": lambda d, y, a: (d / a,),
    "positive": lambda d, y, a: (None,),
    "where": lambda d, y, c, a, b: (None, mathematics.where(c, d, 0.0), mathematics.where(c, 0.0, d)),
}

# What the operations are, on arrays and on symbols alike.
OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negative": lambda a: -a,
    **{name: getattr(mathematics, name) for name in ("maximum", "sigmoid", "tanh", "exp", "log", "positive", "where")},
}


def above(y: Symbol, b: Symbol) -> Symbol:
    """1 where y = max(a, b) is a and not b; where both are equal the gradient is b's."""
    return mathematics.positive(y if b is y.graph.symbol(0.0) else y - b)


def derive(step: Callable, gates: int, states: int, extra: int = 0, learned: int = 0) -> tuple[Callable, Callable]:
    """-> step and grad of a page whose step gives the new states; what it gives beside them is not looked at.

    With `extra` values the page takes a fourth argument, and grad a fifth; grad then gives a fourth group, the
    gradients of the first `learned` of them.
    """
    sizes = {"x": gates, "h": gates, "state": states} | ({"extra": extra} if extra else {})
    graph = trace(lambda *given: (new_states(step(*given), states),), **sizes)
    (new,), order = graph.outputs, list(graph.nodes.values())
    wanted = pulled(graph, sizes | ({"extra": learned} if extra else {}))
    order += [node for node in graph.nodes.values() if node.op == "positive" and node not in order]  # of `above`
    saved = to_save(order, new, met(wanted, set(order)))

    forward, backward = Graph(), Graph()
    known: dict[Symbol, Symbol] = {}
    forward.outputs = tuple(tuple(forward.image(value, known) for value in group) for group in (new, saved))
    known = {value: backward.node("input", "saved", k) for k, value in enumerate(saved)}
    for k, value in enumerate(new):
        if operated(value):
            known.setdefault(value, backward.node("input", "new", k))
    backward.outputs = tuple(tuple(backward.image(value, known) for value in group) for group in wanted)
    more = ("extra",) if extra else ()
    return playing(forward, "x", "h", "state", *more), playing(backward, "dnew", "new", "state", "saved", *more)


def new_states(outputs: tuple, states: int) -> tuple:
    """Of a step that gives (new, saved), or new alone."""
    new = tuple(outputs[0] if len(outputs) == 2 and isinstance(outputs[0], (tuple, list)) else outputs)
    if len(new) != states:
        raise ValueError(f"step gives {len(new)} new states; the page has {states}")
    return new


def pullback(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The gradient of a graph whose one group of outputs is linear in what has a gradient: it needs none of it."""
    copy = graph.pruned()
    copy.outputs = pulled(copy, sizes)
    return copy.pruned()


def pulled(graph: Graph, sizes: Mapping[str, int]) -> tuple[tuple[Symbol, ...], ...]:
    """The gradients of the inputs, given those of the outputs: inputs named "dnew". Added to the graph."""
    gradients: dict[Symbol, Symbol] = {}

    def arrive(value: Symbol, d: Symbol) -> None:
        gradients[value] = gradients[value] + d if value in gradients else d

    order, (outputs,) = list(graph.nodes.values()), graph.outputs
    for k, value in enumerate(outputs):
        arrive(value, graph.node("input", "dnew", k))
    for node in reversed(order):
        if node in gradients and operated(node):
            pulls = PULL[node.op](gradients[node], node, *node.operands)
            for operand, d in zip(node.operands, pulls, strict=True):
                if d is not None and operand.op != "constant":
                    arrive(operand, d)
    inputs = {name: [graph.node("input", name, k) for k in range(n)] for name, n in sizes.items()}
    return tuple(tuple(gradients.get(v, graph.symbol(0.0)) for v in group) for group in inputs.values())


def met(wanted: tuple, page: set[Symbol]) -> set[Symbol]:
    """The page's own values that the gradient's formulas read."""
    found, waiting = set(), [value for group in wanted for value in group]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        if value in page:
            found.add(value)
        elif operated(value):
            waiting += (fresh := [operand for operand in value.operands if operand not in seen])
            seen |= set(fresh)
    return found


def to_save(order: list[Symbol], new: tuple[Symbol, ...], read: set[Symbol]) -> tuple[Symbol, ...]:
    saved: list[Symbol] = []
    deciding = {value.operands[0] for value in order if value.op == "where"}

    def there(value: Symbol) -> bool:
        if value in saved or (value in new and operated(value)):
            return True
        if value.op == "positive":
            return value.operands[0] in new or exact(value)
        return exact(value) if value in deciding else given(value, there)

    def exact(value: Symbol) -> bool:
        """Not even rounded, as h is."""
        return value in new[1:] or given(value, exact)

    def given(value: Symbol, known: Callable[[Symbol], bool]) -> bool:
        if operated(value):
            return all(map(known, value.operands))
        return value.op == "constant" or value.operands[0] not in ("x", "h")

    for value in order:
        if value in read and not there(value):
            saved.append(value)
    return tuple(saved)


def operated(value: Symbol) -> bool:
    return value.op not in ("input", "constant")


def playing(graph: Graph, *names: str) -> Callable:
    """A graph as a function of tuples of arrays or of symbols, one for each name."""
    return lambda *given: graph.run(OPERATIONS, **dict(zip(names, given, strict=True)))
