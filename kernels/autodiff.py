"""The gradient of a page, from its step alone: reverse mode on the page's graph.

A value that meets the gradient is taken from the states after the instant where it is one of them, computed again where
the states before, and what is saved anyway, give it; only what is left is saved. For the LSTM that are its four gates,
which is what the page written by hand saves.

What is saved may be rounded to halves, and of differences of such values even the sign would be another. So what was
decided by a sign, as which of two is the larger, is decided once and saved.

A mean is what units wait for, so what follows from one is saved; a mean of what is there is taken again only where the
gradient has to wait for means anyway. Its own means are pulled apart until they wait for each other as little as can be
(`averaged`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import chain
from math import prod
from operator import add

from . import mathematics
from .trace import Graph, Symbol, ascending, operands, operated, trace

MOST_TERMS = 24  # of a mean that is pulled apart; of more, each round of a long loop would have as many again

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
    "rsqrt": lambda d, y, a: (d * (-0.5 * (y * y * y)),),
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
    mathematics.PRODUCT: lambda value, gate: mathematics.recurrent(int(gate), value),
    **{name: getattr(mathematics, name) for name in ("maximum", "sigmoid", "tanh", "exp", "log", "rsqrt")},
    **{name: getattr(mathematics, name) for name in ("positive", "where", "mean")},
}


def above(y: Symbol, b: Symbol) -> Symbol:
    """1 where y = max(a, b) is a and not b; where both are equal the gradient is b's, and a's where y is NaN."""
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
    read = met(wanted, set(order))
    saved, again = to_save(order, new, read), frozenset[Symbol]()
    backward = looking_back(wanted, new, saved)
    for mean in (node for node in order if node.op == "mean"):
        fewer = to_save(order, new, read, again | {mean})
        if len(fewer) < len(saved) and depth(instead := looking_back(wanted, new, fewer)) <= depth(backward):
            saved, again, backward = fewer, again | {mean}, instead

    forward = Graph()
    known: dict[Symbol, Symbol] = {}
    forward.outputs = tuple(tuple(forward.image(value, known) for value in group) for group in (new, saved))
    more = ("extra",) if extra else ()
    return playing(forward, "x", "h", "state", *more), playing(backward, "dnew", "new", "state", "saved", *more)


def looking_back(wanted: tuple, new: tuple[Symbol, ...], saved: tuple[Symbol, ...]) -> Graph:
    """The gradient's graph, from what is saved and the states after."""
    backward = Graph()
    known = {value: backward.node("input", "saved", k) for k, value in enumerate(saved)}
    for k, value in enumerate(new):
        if operated(value):
            known.setdefault(value, backward.node("input", "new", k))
    backward.outputs = tuple(tuple(backward.image(value, known) for value in group) for group in wanted)
    return backward


def depth(graph: Graph) -> int:
    """How many means wait for one another."""
    return max(value.level for group in graph.outputs for value in group)


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
    waiting = dict.fromkeys(order, False)  # for means that aren't the page's

    def waits(value: Symbol) -> bool:
        for each in ascending([value], lambda symbol: () if symbol in waiting else operands(symbol)):
            if each not in waiting:
                waiting[each] = each.op == "mean" or any(waiting[operand] for operand in operands(each))
        return waiting[value]

    for k, value in enumerate(outputs):
        arrive(value, graph.node("input", "dnew", k))
    for node in reversed(order):
        if node in gradients and operated(node):
            if node.op == "mean":
                pulls = (averaged(gradients[node], waits),)
            else:
                pulls = PULL[node.op](gradients[node], node, *node.operands)
            for operand, d in zip(node.operands, pulls, strict=True):
                if d is not None and operand.op != "constant":
                    arrive(operand, d)
    inputs = {name: [graph.node("input", name, k) for k in range(n)] for name, n in sizes.items()}
    return tuple(tuple(gradients.get(v, graph.symbol(0.0)) for v in group) for group in inputs.values())


def averaged(d: Symbol, waits: Callable[[Symbol], bool]) -> Symbol:
    """The mean of d: what is the same for all units stands before a mean, and that of a sum is the sum of means.

    So a mean waits for others only where d isn't linear in them. `waits` for them is what isn't the page's own.
    """
    uniform: list[Symbol] = []
    while d.op == "multiply" and any(operand.uniform for operand in d.operands):
        a, b = d.operands
        uniform, d = ([*uniform, a], b) if a.uniform else ([*uniform, b], a)
    sums: dict[Symbol, Symbol] = {}
    for factor, value in terms(d, waits):
        sums[factor] = sums[factor] + value if factor in sums else value
    means = [times(factor, mathematics.mean(value)) for factor, value in sums.items() if not is_centred(value)]
    return reduce(lambda found, factor: factor * found, reversed(uniform), sum_of(means, d.graph))


def sum_of(values: list[Symbol], graph: Graph) -> Symbol:
    return reduce(add, values) if values else graph.symbol(0.0)


Terms = list[tuple[Symbol, Symbol]]


def terms(d: Symbol, waits: Callable[[Symbol], bool]) -> Terms:
    """d as a sum of products, each of what is the same for all units and what doesn't wait, as far as it is one."""
    one = d.graph.symbol(1.0)
    found: dict[Symbol, Terms] = {}

    def summed(symbol: Symbol) -> Sequence[Symbol]:
        """The operands that a symbol's terms follow from."""
        if symbol.uniform or not waits(symbol):
            return ()
        if symbol.op in ("add", "subtract", "multiply", "negative"):
            return symbol.operands
        return symbol.operands[1:] if symbol.op == "where" and not waits(symbol.operands[0]) else ()

    for symbol in ascending([d], summed):
        alone = (symbol, one) if symbol.uniform and waits(symbol) else (one, symbol)
        parts = [found[operand] for operand in summed(symbol)]
        sizes = [len(part) for part in parts]
        many = (prod if symbol.op == "multiply" else sum)(sizes) > MOST_TERMS
        found[symbol] = combined(symbol, parts) if parts and not many else [alone]
    return found[d]


def combined(symbol: Symbol, parts: list[Terms]) -> Terms:
    """The terms of an operation, from those of its operands."""
    if symbol.op == "multiply":
        a, b = parts
        return [(times(f, g), times(v, w)) for f, v in a for g, w in b]
    if symbol.op == "where":
        condition, (a, b) = symbol.operands[0], parts
        taken = [(factor, mathematics.where(condition, value, 0.0)) for factor, value in a]
        return taken + [(factor, mathematics.where(condition, 0.0, value)) for factor, value in b]
    *first, last = parts
    return [*chain(*first), *((factor, value if symbol.op == "add" else -value) for factor, value in last)]


def times(a: Symbol, b: Symbol) -> Symbol:
    one = a.graph.symbol(1.0)
    return b if a is one else a if b is one else a * b


def is_centred(value: Symbol) -> bool:
    """Whether it is what it is less its mean, or sums of such: its mean is zero."""
    summed = ascending([value], lambda symbol: symbol.operands if symbol.op in ("add", "negative") else ())
    return all(
        symbol.op in ("add", "negative")
        or (symbol.op == "subtract" and symbol.operands[1] is mathematics.mean(symbol.operands[0]))
        for symbol in summed
    )


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


def to_save(
    order: list[Symbol], new: tuple[Symbol, ...], read: set[Symbol], again: frozenset[Symbol] = frozenset()
) -> tuple[Symbol, ...]:
    """Those of the values read that nothing else gives; of means, only those in `again` are taken again."""
    saved: list[Symbol] = []
    deciding = {value.operands[0] for value in order if value.op == "where"}
    exact: dict[Symbol, bool] = {}  # whether it is there and not even rounded, as h is
    there: dict[Symbol, bool] = {}
    candidates, after = set(order), set(filter(operated, new))

    def given(value: Symbol, known: Mapping[Symbol, bool]) -> bool:
        if operated(value):
            return (value.op != "mean" or value in again) and all(known[operand] for operand in value.operands)
        return value.op == "constant" or value.operands[0] not in ("x", "h")

    for value in ascending(order):
        exact[value] = value in new[1:] or given(value, exact)
        if value.op == "positive":
            there[value] = value.operands[0] in new or exact[value]
        else:
            there[value] = exact[value] if value in deciding else given(value, there)
        there[value] = there[value] or value in after
        if value in read and value in candidates and not there[value]:
            there[value] = True
            saved.append(value)
    return tuple(saved)


def playing(graph: Graph, *names: str) -> Callable:
    """A graph as a function of tuples of arrays or of symbols, one for each name."""
    return lambda *given: graph.run(OPERATIONS, **dict(zip(names, given, strict=True)))
