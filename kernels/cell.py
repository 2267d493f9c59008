"""A cell: the functions of its definition, and the facts that follow from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from .autodiff import as_function, derive, linear_vjp, new_states
from .mathematics import RECURRENT_MATMUL, where
from .trace import Graph, Symbol, operands, trace
from .two_pass import PASS_FLAG, gate_of, recurrent_calls, split


@dataclass(frozen=True)
class Cell:
    """A cell definition, with the facts that follow from it: see `make_cell`. Equal are cells of the same functions."""

    name: str
    gates: str
    states: str
    step: Callable
    grad: Any  # a function; None of a cell that kernels don't run itself, see `lowered`
    saved: int  # K: values saved by step for grad, in addition to the states
    separate: tuple[bool, ...]  # [G] false where only x + h is read: then both have the same gradient
    per_unit_params: tuple[str, ...] = ()  # values of an element for the whole sequence, the first of `extra` ...
    num_trainable: int = 0  # ... of which so many have gradients
    flags: tuple[str, ...] = ()  # 0 or 1 for every time step and batch row, next in `extra`
    uniforms: int = 0  # random numbers in [0, 1) for every time step, row and unit; last in `extra`
    recurrent_input: Callable | None = None  # (h, extra) -> the input of the recurrent matmul, if it isn't h
    norm_groups: tuple[str, ...] = ()  # gates that layer normalization takes together
    candidate: str = ""  # the gate whose activation is written into the state
    pass_gates: tuple[int, ...] = ()  # of a lowered cell: first and end of the gates of R h that each pass reads
    lowered: "Cell | None" = None  # the cell that kernels run instead, in two steps for each time step

    @property
    def label(self) -> str:
        """The name in messages: with the keywords of the caller."""
        return label(self.name)

    @property
    def kernel_cell(self) -> "Cell":
        """The cell that kernels run."""
        return self.lowered or self

    def __hash__(self) -> int:
        return hash(self.name)  # of caches, at every call

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
    def has_reduction(self) -> bool:
        """Whether it reduces over hidden units."""
        return any(node.op == "mean" for graph in (step_graph(self), grad_graph(self)) for node in graph.nodes.values())

    @cached_property
    def E(self) -> int:
        """Values of `extra`, the fourth argument of step; without any there is no such argument."""
        return len(self.per_unit_params) + len(self.flags) + self.uniforms


KEYWORDS = {  # of variants and modifiers, where the caller's keyword is another word
    "before": "reset_after=False", "candidate": "recurrent_dropout_on='candidate'", "clip": "cell_clip",
    "dropout": "recurrent_dropout", "hold": "lengths", "mean": "training=False",
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


def make_cell(
    name: str, gates: str, states: str, step: Callable, grad: Callable | None = None, units: tuple[str, ...] = (),
    *, num_trainable: int | None = None, flags: tuple[str, ...] = (), uniforms: int = 0,
    recurrent_input: Callable | None = None,
) -> Cell:  # fmt: skip
    """Make a cell of the functions of a definition. units: names of the per-unit parameters."""
    G, S, E = len(gates), len(states), len(units) + len(flags) + uniforms
    trainable = len(units) if num_trainable is None else num_trainable
    aux = tuple(units), trainable, tuple(flags), uniforms, recurrent_input
    graph = trace(lambda *args: (new_states(step(*args), S),), x=G, h=G, state=S, **({"extra": E} if E else {}))
    if recurrent_calls(graph):
        return lower_two_pass(name, gates, states, graph, *aux)
    if grad is None:
        step, grad = derive(step, G, S, E, trainable)
    partial = Cell(name, gates, states, step, grad, 0, (), *aux)
    graph = step_graph(partial)
    K = len(graph.outputs[1])
    dx, dh, *_ = trace(grad, dnew=S, new=S, state=S, saved=K, **extra(partial)).outputs
    pairs = zip(dx, dh, read_separately(graph.pruned(), G), strict=True)
    separate = tuple(a is not b or alone for a, b, alone in pairs)
    return Cell(name, gates, states, step, grad, K, separate, *aux)


def read_separately(graph: Graph, G: int) -> list[bool]:
    """For each gate, whether x or h is read alone, be it without a gradient, as by the condition of a `where`."""
    gates = [{graph.node("input", name, g) for name in ("x", "h")} for g in range(G)]
    separate = [not pair.isdisjoint(value for group in graph.outputs for value in group) for pair in gates]
    for node in graph.nodes.values():
        for g, pair in enumerate(gates):
            separate[g] |= not pair.isdisjoint(operands(node)) and (node.op != "add" or set(node.operands) != pair)
    return separate


def lower_two_pass(
    name: str, gates: str, states: str, graph: Graph, units: tuple[str, ...], trainable: int, flags: tuple[str, ...],
    uniforms: int, recurrent_input: Callable | None,
) -> Cell:  # fmt: skip
    """Make a cell that applies the recurrent weights to a value of its own, with the cell that kernels run instead."""
    E, place = len(units) + len(flags) + uniforms, len(units) + len(flags)
    step, grad, carried, pass_gates = split(graph, len(gates), len(states), E, place, trainable)

    def masked_in_first(h: Any, extra: Sequence) -> Any:
        """The value of the second pass is masked by the cell itself."""
        assert recurrent_input is not None
        return where(extra[place], h, recurrent_input(h, (*extra[:place], *extra[place + 1 :])))

    lowered = make_cell(
        name, gates, states + "".join(map(str, range(carried))), step, grad, units,
        num_trainable=trainable, flags=(*flags, PASS_FLAG), uniforms=uniforms,
        recurrent_input=masked_in_first if recurrent_input else None,
    )  # fmt: skip
    lowered = replace(lowered, pass_gates=pass_gates)

    graph.outputs = (*graph.outputs, ())
    whole = as_function(graph, "x", "h", "state", *(("extra",) if E else ()))
    aux = units, trainable, flags, uniforms, recurrent_input
    return Cell(name, gates, states, whole, None, 0, (), *aux, lowered=lowered)


def extra(cell: Cell) -> dict[str, int]:
    return {"extra": cell.E} if cell.E else {}


def reads(cell: Cell) -> dict[str, set[int]]:
    """The gates whose "x" and "h" a definition reads, its own recurrent matmuls included."""
    sizes = {"x": cell.G, "h": cell.G, "state": cell.S, **extra(cell)}
    nodes = trace(lambda *args: (new_states(cell.step(*args), cell.S),), **sizes).pruned().nodes.values()
    inputs = [node.operands for node in nodes if node.op == "input"]
    read = {part: {gate for name, gate in inputs if name == part} for part in ("x", "h")}
    read["h"] |= {gate_of(node) for node in nodes if node.op == RECURRENT_MATMUL}
    return read


@cache
def step_graph(cell: Cell) -> Graph:
    return trace(cell.step, x=cell.G, h=cell.G, state=cell.S, **extra(cell))


@cache
def grad_graph(cell: Cell) -> Graph:
    """With the fourth group, of the per-unit parameters, also where there are none."""
    graph = trace(cell.grad, dnew=cell.S, new=cell.S, state=cell.S, saved=cell.K, **extra(cell))
    graph.outputs = (*graph.outputs, ())[:4]
    return graph


def activation(graph: Graph, g: int) -> Symbol:
    """The first function of a gate's pre-activation: from x[g], past what is added to it."""
    symbol = graph.node("input", "x", g)
    while symbol.op in ("input", "add"):
        symbol = next(node for node in graph.nodes.values() if symbol in node.operands)
    return symbol


@cache
def recurrent_input_graph(cell: Cell) -> Graph:
    """h, extra -> the input of the recurrent matmul."""
    recurrent_input = cell.recurrent_input or (lambda h, _: h)
    return trace(lambda h, extra: ((recurrent_input(h[0], extra),),), h=1, extra=cell.E).pruned()


@cache
def recurrent_input_grad_graph(cell: Cell) -> Graph:
    """Its gradient, extra -> the gradients of h, and of the trainable ones of extra."""
    return linear_vjp(recurrent_input_graph(cell), {"h": 1, "extra": cell.num_trainable})
