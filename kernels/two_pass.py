"""A page with a product of its own, cut in two at that product.

A page may ask for `recurrent(gate, value)`: what its gate's rows of the recurrent weights make of a value that the page
itself has just made, where those of all other gates see h. Then an instant takes two products, one after the other, and
before each of them all units exchange what they made. Such a page is cut into two phases, both of the usual kind:

    first    makes the value, and gives it out as its h, which is what the recurrent weights see next; hands on what the
             second needs beside, as states after the page's own
    second   has the product as the recurrent part of that gate, and gives the page's states after

A flag says of every instant which one it is, and T instants of the page are 2 T of a cell that does the one or the
other. Every kernel runs that cell as any other, with no more exchanges than the equation itself needs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .autodiff import derive, playing
from .mathematics import PRODUCT, where
from .trace import Graph, Symbol, ascending, operands, operated, trace

PHASE = "phase"  # the flag, 1 in the second phase


class Cut(NamedTuple):
    """One page of two phases."""

    step: Callable
    grad: Callable  # each phase's derived by itself
    carried: int  # states that the first phase hands on to the second


def products(graph: Graph) -> list[Symbol]:
    return [node for node in graph.nodes.values() if node.op == PRODUCT]


def cut(graph: Graph, G: int, S: int, E: int, place: int, learned: int) -> Cut:
    """`graph`: the page's step, to its states after. The flag gets a place among the E values that the page takes
    beside gates and states. ValueError for a page that can't be cut in two."""
    (new,), nodes = graph.outputs, list(graph.nodes.values())
    own = products(graph)
    later = tuple(sorted({gate_of(product) for product in own}))
    seeing = following(nodes, [node for node in nodes if node.op == "input" and node.operands[0] == "h"])
    waiting = following(nodes, own)
    shown, *others = dict.fromkeys(product.operands[0] for product in own)
    if others or shown in waiting:
        raise ValueError("recurrent() may be applied to at most one value per time step; this cell applies it to more")
    if not all(0 <= gate < G for gate in later):
        raise ValueError(f"recurrent() for gate {later[-1]}; the cell has {G} gates, numbered from 0")
    twice = [graph.node("input", "h", gate) for gate in later]
    if any(operated(node) and not set(twice).isdisjoint(node.operands) for node in nodes):
        raise ValueError("a cell uses h[k] or recurrent(k, value) of a gate k, not both; this cell uses both")

    first, second = Graph(), Graph()
    known = {product: second.node("input", "h", gate_of(product)) for product in own}
    carried: list[Symbol] = []

    def gone(value: Symbol) -> bool:
        return value not in waiting and (value in seeing or value is graph.node("input", "state", 0))

    # For the second phase: what is gone by then is handed on, what isn't is made again.
    for value in ascending(new, lambda value: () if value in known or gone(value) else operands(value)):
        if gone(value) and value not in known:
            known[value] = second.node("input", "state", S + len(carried))
            carried.append(value)
    handed: dict[Symbol, Symbol] = {}
    others = [graph.node("input", "state", k) for k in range(1, S)]
    first.outputs = (tuple(first.image(value, handed) for value in (shown, *others, *carried)), ())
    second.outputs = ((*(second.image(value, known) for value in new), *[second.symbol(0.0)] * len(carried)), ())
    return Cut(*joined(first, second, G, S + len(carried), E, place, learned), len(carried))


def gate_of(product: Symbol) -> int:
    return int(product.operands[1].operands[0])


def following(nodes: Sequence[Symbol], first: Sequence[Symbol]) -> set[Symbol]:
    """These, and all that is computed from them; nodes in an order that computes."""
    found = set(first)
    for node in nodes:
        if operated(node) and not found.isdisjoint(node.operands):
            found.add(node)
    return found


def joined(
    first: Graph, second: Graph, G: int, S: int, E: int, place: int, learned: int
) -> tuple[Callable, Callable]:  # fmt: skip
    """step and grad that are the first phase's or the second's, by the flag."""
    sizes = {"x": G, "h": G, "state": S} | ({"extra": E} if E else {})
    a, b = (derive(playing(phase, *sizes), G, S, E, learned) for phase in (first, second))
    a_saves, b_saves = (len(trace(step, **sizes).outputs[1]) for step, _ in (a, b))

    def without(extra: Sequence) -> list[Sequence]:
        return [(*extra[:place], *extra[place + 1 :])] if E else []

    def either(flag: Any, in_first: Sequence, in_second: Sequence) -> tuple:
        """Where only one of them has values, those."""
        n = min(len(in_first), len(in_second))
        alike = [
            p is q or (isinstance(p, float) and isinstance(q, float) and p == q) for p, q in zip(in_first, in_second)
        ]
        chosen = [p if same else where(flag, q, p) for same, p, q in zip(alike, in_first, in_second)]
        return *chosen, *in_first[n:], *in_second[n:]

    def step(x: Sequence, h: Sequence, state: Sequence, extra: Sequence) -> tuple:
        given = x, h, state, *without(extra)
        return tuple(either(extra[place], *groups) for groups in zip(a[0](*given), b[0](*given)))

    def grad(dnew: Sequence, new: Sequence, state: Sequence, saved: Sequence, extra: Sequence) -> tuple:
        given = [(dnew, new, state, saved[:n], *without(extra)) for n in (a_saves, b_saves)]
        return tuple(either(extra[place], *groups) for groups in zip(a[1](*given[0]), b[1](*given[1])))

    return step, grad


def second(t: int, reverse: bool) -> int:
    """The instant of the second phase of t, which a row comes to after that of the first."""
    return 2 * t + (not reverse)
