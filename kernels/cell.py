"""What a cell is: its definition's functions, and what follows from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from .autodiff import derive, new_states, playing, pullback
from .mathematics import PRODUCT, where
from .trace import Graph, Symbol, operands, trace
from .two_pass import PHASE, cut, gate_of, products


@dataclass(frozen=True)
class Cell:
    """A page, with what follows from it. `made` makes it; two are equal only if they are the same page's."""

    name: str
    gates: str
    states: str
    step: Callable
    grad: Any  # as step; None where there are phases
    saved: int  # K: how many values `step` keeps for `grad`, beside the states themselves
    separate: tuple[bool, ...]  # [G] true where x and h don't just meet as x + h; else their gradients are the same
    units: tuple[str, ...] = ()  # values that an element has for the whole sequence, the first of `extra` ...
    learned: int = 0  # ... of which so many have gradients
    flags: tuple[str, ...] = ()  # 0 or 1 for every instant and batch row, next in `extra`
    uniforms: int = 0  # random numbers in [0, 1), new ones for every instant, row and unit; last in `extra`
    operand: Callable | None = None  # (h, extra) -> what the recurrent weights see in the place of h
    together: tuple[str, ...] = ()  # gates of which all units' parts are normalized together, by a page that does
    candidate: str = ""  # the gate whose activation is what is written into the state, of a page that says so
    phases: "Cell | None" = None  # what kernels run in its place, in two instants for each

    @property
    def label(self) -> str:
        """The name for people: with the keywords that its caller wrote."""
        return label(self.name)

    @property
    def run(self) -> "Cell":
        """What kernels run."""
        return self.phases or self

    def __hash__(self) -> int:
        return hash(self.name)  # every call looks something up by its cell

    @cached_property
    def G(self) -> int:
        return len(self.gates)

    @cached_property
    def S(self) -> int:
        return len(self.states)

    @cached_property
    def K(self) -> int:
        return self.saved

    @cached_property
    def meets(self) -> bool:
        """Whether units meet: the page takes means."""
        return any(node.op == "mean" for graph in (step_graph(self), grad_graph(self)) for node in graph.nodes.values())

    @cached_property
    def E(self) -> int:
        """How many values `extra` has, the page's argument beside x, h and states; without any it takes none."""
        return len(self.units) + len(self.flags) + self.uniforms


KEYWORDS = {  # of variants and modifiers, where the caller's keyword is another word
    "before": "reset_after=False", "candidate": "recurrent_dropout_on='candidate'", "clip": "cell_clip",
    "dropout": "recurrent_dropout", "given": "reset_state", "hold": "lengths", "mean": "training=False",
    "norm": "layer_norm", "projected": "proj_size",
}  # fmt: skip


def label(name: str) -> str:
    """ "lstm+hold+zoneout(0.1,0.05)" -> "lstm[lengths, zoneout=(0.1, 0.05)]"."""
    base, *parts = name.split("+")
    words = []
    for part in parts:
        word, _, values = part.rstrip(")").partition("(")
        text = f"({', '.join(values.split(','))})" if "," in values else values
        words.append(KEYWORDS.get(word, word) + f"={text}" * bool(text))
    return f"{base}[{', '.join(words)}]" if words else base


def made(
    name: str, gates: str, states: str, step: Callable, grad: Callable | None = None, units: tuple[str, ...] = (),
    *, learned: int | None = None, flags: tuple[str, ...] = (), uniforms: int = 0, operand: Callable | None = None,
) -> Cell:  # fmt: skip
    """A cell, with what can be read off its page."""
    G, S, E = len(gates), len(states), len(units) + len(flags) + uniforms
    learned = len(units) if learned is None else learned
    page = trace(lambda *given: (new_states(step(*given), S),), x=G, h=G, state=S, **({"extra": E} if E else {}))
    if products(page):
        return by_phases(name, gates, states, page, tuple(units), learned, tuple(flags), uniforms, operand)
    if grad is None:
        step, grad = derive(step, G, S, E, learned)
    sketch = Cell(name, gates, states, step, grad, 0, (), tuple(units), learned, tuple(flags), uniforms, operand)
    graph = step_graph(sketch)
    K = len(graph.outputs[1])
    dx, dh, *_ = trace(grad, dnew=S, new=S, state=S, saved=K, **extra(sketch)).outputs
    pairs = zip(dx, dh, apart(graph.pruned(), G), strict=True)
    separate = tuple(a is not b or alone for a, b, alone in pairs)
    return Cell(name, gates, states, step, grad, K, separate, tuple(units), learned, tuple(flags), uniforms, operand)


def apart(graph: Graph, G: int) -> list[bool]:
    """For each gate, whether x or h is seen alone, be it without a gradient as by the condition of a `where`."""
    gates = [{graph.node("input", name, g) for name in ("x", "h")} for g in range(G)]
    found = [not pair.isdisjoint(value for group in graph.outputs for value in group) for pair in gates]
    for node in graph.nodes.values():
        for g, pair in enumerate(gates):
            found[g] |= not pair.isdisjoint(operands(node)) and (node.op != "add" or set(node.operands) != pair)
    return found


def by_phases(
    name: str, gates: str, states: str, page: Graph, units: tuple[str, ...], learned: int, flags: tuple[str, ...],
    uniforms: int, operand: Callable | None,
) -> Cell:  # fmt: skip
    """The cell of a page with a product of its own, and the cell that is run in its place."""
    E, place = len(units) + len(flags) + uniforms, len(units) + len(flags)
    step, grad, carried = cut(page, len(gates), len(states), E, place, learned)

    def seen(h: Any, extra: Sequence) -> Any:
        """What the page itself shows, in the second phase, is as it should be."""
        assert operand is not None
        return where(extra[place], h, operand(h, (*extra[:place], *extra[place + 1 :])))

    handed = "".join(map(str, range(carried)))
    run = made(
        name, gates, states + handed, step, grad, units,
        learned=learned, flags=(*flags, PHASE), uniforms=uniforms, operand=seen if operand else None,
    )  # fmt: skip

    page.outputs = (*page.outputs, ())
    whole = playing(page, "x", "h", "state", *(("extra",) if E else ()))
    return Cell(name, gates, states, whole, None, 0, (), units, learned, flags, uniforms, operand, phases=run)


def extra(cell: Cell) -> dict[str, int]:
    return {"extra": cell.E} if cell.E else {}


def reads(cell: Cell) -> dict[str, set[int]]:
    """The gates whose "x" and "h" a definition reads, its own recurrent products included."""
    sizes = {"x": cell.G, "h": cell.G, "state": cell.S, **extra(cell)}
    nodes = trace(lambda *given: (new_states(cell.step(*given), cell.S),), **sizes).pruned().nodes.values()
    inputs = [node.operands for node in nodes if node.op == "input"]
    read = {part: {gate for name, gate in inputs if name == part} for part in ("x", "h")}
    read["h"] |= {gate_of(node) for node in nodes if node.op == PRODUCT}
    return read


@cache
def step_graph(cell: Cell) -> Graph:
    return trace(cell.step, x=cell.G, h=cell.G, state=cell.S, **extra(cell))


@cache
def grad_graph(cell: Cell) -> Graph:
    """With the group of what is learned per unit also where there is nothing."""
    graph = trace(cell.grad, dnew=cell.S, new=cell.S, state=cell.S, saved=cell.K, **extra(cell))
    graph.outputs = (*graph.outputs, ())[:4]
    return graph


def activation(graph: Graph, g: int) -> Symbol:
    """The first function that a gate's pre-activation meets: from x[g], past what is added to it."""
    symbol = graph.node("input", "x", g)
    while symbol.op in ("input", "add"):
        symbol = next(node for node in graph.nodes.values() if symbol in node.operands)
    return symbol


@cache
def operand_graph(cell: Cell) -> Graph:
    """h, extra -> what the recurrent weights see."""
    seen = cell.operand or (lambda h, _: h)
    return trace(lambda h, extra: ((seen(h[0], extra),),), h=1, extra=cell.E).pruned()


@cache
def operand_grad_graph(cell: Cell) -> Graph:
    """The gradient of that, extra -> that of h, those of the learned among extra."""
    return pullback(operand_graph(cell), {"h": 1, "extra": cell.learned})
