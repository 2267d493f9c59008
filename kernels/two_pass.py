"""A cell that applies the recurrent weights to a value of its own, split in two passes at that matmul.

A definition may call `recurrent(gate, value)`: its gate's rows of the recurrent weights are then applied to a value of
this very time step, those of all other gates to h. Such a time step has two matmuls, one after the other, and all units
exchange values before each. The definition is split into two passes, both of the usual kind:

    first    computes the value, and returns it as its h, which the next recurrent matmul is applied to; carries what
             the second needs, as states after the cell's own
    second   has the matmul as the recurrent projection of that gate, and returns the cell's states after the time step

A flag says which pass a step is, and T time steps of the cell are 2 T steps of the lowered one. Every kernel runs that
as any other cell, with no more exchanges than the equations need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .autodiff import as_function, derive
from .mathematics import RECURRENT_MATMUL, where
from .trace import Graph, Symbol, ascending, is_op, operands, trace

PASS_FLAG = "phase"  # the flag, 1 in the second pass


class TwoPassStep(NamedTuple):
    """Both passes in one step."""

    step: Callable
    grad: Callable  # of each pass by itself
    carried: int  # states from the first pass to the second
    pass_gates: tuple[int, ...]  # of each pass: the first gate of R h that it reads, and the one after the last


def recurrent_calls(graph: Graph) -> list[Symbol]:
    return [node for node in graph.nodes.values() if node.op == RECURRENT_MATMUL]


def split(graph: Graph, G: int, S: int, E: int, place: int, trainable: int) -> TwoPassStep:
    """Split the graph of a step. The flag is value number `place` of the E + 1 of `extra`. ValueError for a cell that
    can't be split in two."""
    (new,), nodes = graph.outputs, list(graph.nodes.values())
    own = recurrent_calls(graph)
    later = tuple(sorted({gate_of(product) for product in own}))
    from_h = dependents(nodes, [node for node in nodes if node.op == "input" and node.operands[0] == "h"])
    from_own = dependents(nodes, own)
    second_input, *others = dict.fromkeys(product.operands[0] for product in own)
    if others or second_input in from_own:
        raise ValueError("recurrent() may be applied to at most one value per time step; this cell applies it to more")
    if not all(0 <= gate < G for gate in later):
        raise ValueError(f"recurrent() for gate {later[-1]}; the cell has {G} gates, numbered from 0")
    own_gates = [graph.node("input", "h", gate) for gate in later]
    if any(is_op(node) and not set(own_gates).isdisjoint(node.operands) for node in nodes):
        raise ValueError("a cell uses h[k] or recurrent(k, value) of a gate k, not both; this cell uses both")

    first, second = Graph(), Graph()
    known = {product: second.node("input", "h", gate_of(product)) for product in own}
    carried: list[Symbol] = []

    def unavailable(value: Symbol) -> bool:
        return value not in from_own and (value in from_h or value is graph.node("input", "state", 0))

    # For the second pass: values that it can't compute are carried, others are recomputed.
    for value in ascending(new, lambda value: () if value in known or unavailable(value) else operands(value)):
        if unavailable(value) and value not in known:
            known[value] = second.node("input", "state", S + len(carried))
            carried.append(value)
    known_in_first: dict[Symbol, Symbol] = {}
    others = [graph.node("input", "state", k) for k in range(1, S)]
    first.outputs = (tuple(first.copy_into(value, known_in_first) for value in (second_input, *others, *carried)), ())
    second.outputs = ((*(second.copy_into(value, known) for value in new), *[second.symbol(0.0)] * len(carried)), ())
    read = {*new, *(value for node in nodes if is_op(node) for value in node.operands)}
    inputs = [node.operands for node in nodes if node.op == "input" and node in read]
    earlier = sorted(gate for part, gate in inputs if part == "h" and gate not in later)
    ranges = [g for gates in (earlier, later) for g in ((gates[0], gates[-1] + 1) if gates else (0, 0))]
    step, grad = select_by_pass(first, second, G, S + len(carried), E, place, trainable)
    return TwoPassStep(step, grad, len(carried), tuple(ranges))


def gate_of(product: Symbol) -> int:
    return int(product.operands[1].operands[0])


def dependents(nodes: Sequence[Symbol], first: Sequence[Symbol]) -> set[Symbol]:
    """These, and all that is computed from them; nodes with operands first."""
    result = set(first)
    for node in nodes:
        if is_op(node) and not result.isdisjoint(node.operands):
            result.add(node)
    return result


def select_by_pass(
    first: Graph, second: Graph, G: int, S: int, E: int, place: int, trainable: int
) -> tuple[Callable, Callable]:  # fmt: skip
    """Return step and grad that are the first pass's or the second's, by the flag."""
    sizes = {"x": G, "h": G, "state": S} | ({"extra": E} if E else {})
    a, b = (derive(as_function(graph, *sizes), G, S, E, trainable) for graph in (first, second))
    a_saves, b_saves = (len(trace(step, **sizes).outputs[1]) for step, _ in (a, b))

    def without(extra: Sequence) -> list[Sequence]:
        return [(*extra[:place], *extra[place + 1 :])] if E else []

    def select(flag: Any, in_first: Sequence, in_second: Sequence) -> tuple:
        """By the flag; where only one of them has values, those."""
        n = min(len(in_first), len(in_second))
        alike = [
            p is q or (isinstance(p, float) and isinstance(q, float) and p == q) for p, q in zip(in_first, in_second)
        ]
        chosen = [p if same else where(flag, q, p) for same, p, q in zip(alike, in_first, in_second)]
        return *chosen, *in_first[n:], *in_second[n:]

    def step(x: Sequence, h: Sequence, state: Sequence, extra: Sequence) -> tuple:
        args = x, h, state, *without(extra)
        return tuple(select(extra[place], *groups) for groups in zip(a[0](*args), b[0](*args)))

    def grad(dnew: Sequence, new: Sequence, state: Sequence, saved: Sequence, extra: Sequence) -> tuple:
        args = [(dnew, new, state, saved[:n], *without(extra)) for n in (a_saves, b_saves)]
        return tuple(select(extra[place], *groups) for groups in zip(a[1](*args[0]), b[1](*args[1])))

    return step, grad


def second(t: int, reverse: bool) -> int:
    """Return the step of the second pass of time step t, which follows that of the first."""
    return 2 * t + (not reverse)
