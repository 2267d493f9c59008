"""Reverse-mode differentiation of a cell definition that has a step alone, on its graph.

A value that the gradient reads is one of the states after the time step, or recomputed from the states before and from
saved values; only the others are saved. For the LSTM these are its four gates, as in its definition written by hand.

Saved values may be rounded to half precision, and their differences could have another sign. So what a sign decides, as
which of two values is the larger, is decided once and saved.

A mean is a reduction that kernels wait for, so what follows from one is saved; a mean is recomputed only where the
gradient has reductions anyway. The gradient's own means are rewritten until they wait for each other as little as can
be (`push_mean_inside`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import chain
from math import prod
from operator import add

from . import mathematics
from .trace import Graph, Symbol, ascending, is_op, operands, trace

MAX_TERMS = 24  # of a mean; with more, each round of a long loop would multiply their number

# (gradient d of a result y, y, its operands) -> gradients of the operands, None where there is none.
VJP_RULES: dict[str, Callable] = {
    "add": lambda d, y, a, b: (d, d),
    "subtract": lambda d, y, a, b: (d, -d),
    "multiply": lambda d, y, a, b: (d * b, d * a),
    "divide": lambda d, y, a, b: (d / b, -(d / b * y)),
    "maximum": lambda d, y, a, b: maximum_vjp(d, y, a, b),
    "negative": lambda d, y, a: (-d,),
    "sigmoid": lambda d, y, a: (d * (y * (1 - y)),),
    "tanh": lambda d, y, a: (d * (1 - y * y),),
    "exp": lambda d, y, a: (d * y,),
    "log": lambda d, y, a: (d / a,),
    "rsqrt": lambda d, y, a: (d * (-0.5 * (y * y * y)),),
    "positive": lambda d, y, a: (None,),
    "where": lambda d, y, c, a, b: (None, mathematics.where(c, d, 0.0), mathematics.where(c, 0.0, d)),
}

# The operations, on arrays or on symbols.
OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negative": lambda a: -a,
    mathematics.RECURRENT_MATMUL: lambda value, gate: mathematics.recurrent(int(gate), value),
    **{name: getattr(mathematics, name) for name in ("maximum", "sigmoid", "tanh", "exp", "log", "rsqrt")},
    **{name: getattr(mathematics, name) for name in ("positive", "where", "mean")},
}


def maximum_vjp(d: Symbol, y: Symbol, a: Symbol, b: Symbol) -> tuple[Symbol | None, Symbol | None]:
    """Give all of d to the larger operand, or to both where y is NaN; nothing to the smaller, not even NaN; half to
    each of two that are equal: as torch does. An operand that equals a constant gets nothing, as the rectifier at 0.
    """
    if b.op == "constant":
        return mathematics.where(greater_mask(y, b), d, 0.0), None
    if a.op == "constant":
        return None, mathematics.where(greater_mask(y, a), d, 0.0)
    over_b, over_a = greater_mask(y, b), greater_mask(y, a)
    half = 0.5 * d
    return (
        mathematics.where(over_b, d, mathematics.where(over_a, 0.0, half)),
        mathematics.where(over_a, d, mathematics.where(over_b, 0.0, half)),
    )


def greater_mask(y: Symbol, operand: Symbol) -> Symbol:
    """Return 1 where y, the larger of two, is larger than this one of them, or NaN."""
    return mathematics.positive(y if operand is y.graph.symbol(0.0) else y - operand)


def derive(step: Callable, gates: int, states: int, extra: int = 0, trainable: int = 0) -> tuple[Callable, Callable]:
    """Return step and grad of a cell whose step returns the new states; saved values of its own are ignored.

    With `extra` values step takes a fourth argument and grad a fifth; grad then returns a fourth group, the gradients
    of the first `trainable` of them.
    """
    sizes = {"x": gates, "h": gates, "state": states} | ({"extra": extra} if extra else {})
    graph = trace(lambda *args: (new_states(step(*args), states),), **sizes)
    (new,), order = graph.outputs, list(graph.nodes.values())
    gradients = vjp(graph, sizes | ({"extra": trainable} if extra else {}))
    order += [node for node in graph.nodes.values() if node.op == "positive" and node not in order]  # of greater_mask
    read = used_values(gradients, set(order))
    saved, again = choose_saved_values(order, new, read), frozenset[Symbol]()
    backward = build_backward_graph(gradients, new, saved)
    for mean in (node for node in order if node.op == "mean"):
        fewer = choose_saved_values(order, new, read, again | {mean})
        if len(fewer) < len(saved) and depth(instead := build_backward_graph(gradients, new, fewer)) <= depth(backward):
            saved, again, backward = fewer, again | {mean}, instead

    forward = Graph()
    known: dict[Symbol, Symbol] = {}
    forward.outputs = tuple(tuple(forward.copy_into(value, known) for value in group) for group in (new, saved))
    more = ("extra",) if extra else ()
    return as_function(forward, "x", "h", "state", *more), as_function(backward, "dnew", "new", "state", "saved", *more)


def build_backward_graph(gradients: tuple, new: tuple[Symbol, ...], saved: tuple[Symbol, ...]) -> Graph:
    """Return the graph of the gradients, as functions of saved values and of the states after the time step."""
    backward = Graph()
    known = {value: backward.node("input", "saved", k) for k, value in enumerate(saved)}
    for k, value in enumerate(new):
        if is_op(value):
            known.setdefault(value, backward.node("input", "new", k))
    backward.outputs = tuple(tuple(backward.copy_into(value, known) for value in group) for group in gradients)
    return backward


def depth(graph: Graph) -> int:
    """Return the number of reductions one after the other."""
    return max(value.reduction_depth for group in graph.outputs for value in group)


def new_states(outputs: tuple, states: int) -> tuple:
    """Return the new states of a step that returns (new, saved), or new alone."""
    new = tuple(outputs[0] if len(outputs) == 2 and isinstance(outputs[0], (tuple, list)) else outputs)
    if len(new) != states:
        raise ValueError(f"step gives {len(new)} new states; the cell has {states}")
    return new


def linear_vjp(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """Return the vector-Jacobian product of a graph whose outputs are linear in the inputs with gradients."""
    copy = graph.pruned()
    copy.outputs = vjp(copy, sizes)
    return copy.pruned()


def vjp(graph: Graph, sizes: Mapping[str, int]) -> tuple[tuple[Symbol, ...], ...]:
    """Return the gradients of the inputs, from those of the outputs, inputs "dnew". They are added to the graph."""
    gradients: dict[Symbol, Symbol] = {}

    def accumulate(value: Symbol, d: Symbol) -> None:
        gradients[value] = gradients[value] + d if value in gradients else d

    order, (outputs,) = list(graph.nodes.values()), graph.outputs
    waiting = dict.fromkeys(order, False)  # by value, whether it depends on means that aren't the cell's

    def depends_on_reduction(value: Symbol) -> bool:
        for each in ascending([value], lambda symbol: () if symbol in waiting else operands(symbol)):
            if each not in waiting:
                waiting[each] = each.op == "mean" or any(waiting[operand] for operand in operands(each))
        return waiting[value]

    for k, value in enumerate(outputs):
        accumulate(value, graph.node("input", "dnew", k))
    for node in reversed(order):
        if node in gradients and is_op(node):
            if node.op == "mean":
                pulls = (push_mean_inside(gradients[node], depends_on_reduction),)
            else:
                pulls = VJP_RULES[node.op](gradients[node], node, *node.operands)
            for operand, d in zip(node.operands, pulls, strict=True):
                if d is not None and operand.op != "constant":
                    accumulate(operand, d)
    inputs = {name: [graph.node("input", name, k) for k in range(n)] for name, n in sizes.items()}
    return tuple(tuple(gradients.get(v, graph.symbol(0.0)) for v in group) for group in inputs.values())


def push_mean_inside(d: Symbol, depends_on_reduction: Callable[[Symbol], bool]) -> Symbol:
    """Return the mean of d: factors that are the same for all units stand outside, the mean of a sum is a sum of means.

    So a mean depends on others only where d isn't linear in them.
    """
    uniform: list[Symbol] = []
    while d.op == "multiply" and any(operand.is_broadcast for operand in d.operands):
        a, b = d.operands
        uniform, d = ([*uniform, a], b) if a.is_broadcast else ([*uniform, b], a)
    sums: dict[Symbol, Symbol] = {}
    for factor, value in as_sum_of_products(d, depends_on_reduction):
        sums[factor] = sums[factor] + value if factor in sums else value
    means = [mul(factor, mathematics.mean(value)) for factor, value in sums.items() if not has_zero_mean(value)]
    return reduce(lambda product, factor: factor * product, reversed(uniform), sum_of(means, d.graph))


def sum_of(values: list[Symbol], graph: Graph) -> Symbol:
    return reduce(add, values) if values else graph.symbol(0.0)


Terms = list[tuple[Symbol, Symbol]]


def as_sum_of_products(d: Symbol, depends_on_reduction: Callable[[Symbol], bool]) -> Terms:
    """Return d as a sum of (factor, value), as far as it is one: a factor is the same for all units, a value depends on
    no reduction."""
    one = d.graph.symbol(1.0)
    terms: dict[Symbol, Terms] = {}

    def summed(symbol: Symbol) -> Sequence[Symbol]:
        """The operands whose terms a symbol's terms follow from."""
        if symbol.is_broadcast or not depends_on_reduction(symbol):
            return ()
        if symbol.op in ("add", "subtract", "multiply", "negative"):
            return symbol.operands
        return symbol.operands[1:] if symbol.op == "where" and not depends_on_reduction(symbol.operands[0]) else ()

    for symbol in ascending([d], summed):
        alone = (symbol, one) if symbol.is_broadcast and depends_on_reduction(symbol) else (one, symbol)
        parts = [terms[operand] for operand in summed(symbol)]
        sizes = [len(part) for part in parts]
        many = (prod if symbol.op == "multiply" else sum)(sizes) > MAX_TERMS
        terms[symbol] = combined(symbol, parts) if parts and not many else [alone]
    return terms[d]


def combined(symbol: Symbol, parts: list[Terms]) -> Terms:
    """The terms of an operation, from those of its operands."""
    if symbol.op == "multiply":
        a, b = parts
        return [(mul(f, g), mul(v, w)) for f, v in a for g, w in b]
    if symbol.op == "where":
        condition, (a, b) = symbol.operands[0], parts
        taken = [(factor, mathematics.where(condition, value, 0.0)) for factor, value in a]
        return taken + [(factor, mathematics.where(condition, 0.0, value)) for factor, value in b]
    *first, last = parts
    return [*chain(*first), *((factor, value if symbol.op == "add" else -value) for factor, value in last)]


def mul(a: Symbol, b: Symbol) -> Symbol:
    one = a.graph.symbol(1.0)
    return b if a is one else a if b is one else a * b


def has_zero_mean(value: Symbol) -> bool:
    """Whether it is a value less its own mean, or a sum of such."""
    summed = ascending([value], lambda symbol: symbol.operands if symbol.op in ("add", "negative") else ())
    return all(
        symbol.op in ("add", "negative")
        or (symbol.op == "subtract" and symbol.operands[1] is mathematics.mean(symbol.operands[0]))
        for symbol in summed
    )


def used_values(gradients: tuple, values: set[Symbol]) -> set[Symbol]:
    """Return the cell's values that the gradients read."""
    used, waiting = set(), [value for group in gradients for value in group]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        if value in values:
            used.add(value)
        elif is_op(value):
            waiting += (fresh := [operand for operand in value.operands if operand not in seen])
            seen |= set(fresh)
    return used


def choose_saved_values(
    order: list[Symbol], new: tuple[Symbol, ...], read: set[Symbol], again: frozenset[Symbol] = frozenset()
) -> tuple[Symbol, ...]:
    """Return the values read that can't be recomputed; of means, those in `again` are recomputed."""
    saved: list[Symbol] = []
    deciding = {value.operands[0] for value in order if value.op == "where"}
    exact: dict[Symbol, bool] = {}  # whether it is available without the rounding of storage, which h has
    available: dict[Symbol, bool] = {}
    candidates, after = set(order), set(filter(is_op, new))

    def is_recomputable(value: Symbol, known: Mapping[Symbol, bool]) -> bool:
        if is_op(value):
            return (value.op != "mean" or value in again) and all(known[operand] for operand in value.operands)
        return value.op == "constant" or value.operands[0] not in ("x", "h")

    for value in ascending(order):
        exact[value] = value in new[1:] or is_recomputable(value, exact)
        if value.op == "positive":
            available[value] = value.operands[0] in new or exact[value]
        else:
            available[value] = exact[value] if value in deciding else is_recomputable(value, available)
        available[value] = available[value] or value in after
        if value in read and value in candidates and not available[value]:
            available[value] = True
            saved.append(value)
    return tuple(saved)


def as_function(graph: Graph, *names: str) -> Callable:
    """Return a function of tuples of arrays or of symbols, one for each name."""
    return lambda *args: graph.run(OPERATIONS, **dict(zip(names, args, strict=True)))
