"""What can happen to any cell between two instants, woven into its page.

In this order, at an instant t, for one unit of one batch row:

    s      = where reset[t], the reset state or 0, else the state before
    p      = m s_h                     what the recurrent weights see; m is a dropout mask of the whole sequence, and a
                                       value that the page shows them itself is masked alike
    new    = step(x_t, R p + b, s)     the cell's own page; or m is its candidate's factor, and p = s_h
    new_k  = zoneout_k: s_k where u_k < its probability, else new_k; or their mean, weighted so
    after  = where hold[t], the state before, else new

reset[t] is a direction's own: true where it enters an episode at t, in reverse by the episode's last time step.
Resetting is what an episode's end asks for, holding what sequences of unequal lengths do, dropout of the recurrent
input is Gal & Ghahramani's (2016), of the candidate Semeniuta et al.'s (2016), zoneout is Krueger et al.'s (2017). The
gradient follows by `derive`.
"""

from collections.abc import Sequence
from typing import Any

from .autodiff import OPERATIONS
from .cell import Cell, activation, made, step_graph
from .mathematics import PRODUCT, recurrent, where
from .trace import Graph

RESET, HOLD, DROPOUT = "reset", "hold", "dropout"


Option = bool | tuple[float, ...]


def named(word: str, value: Option) -> str:
    return word if isinstance(value, bool) else f"{word}({','.join(map(repr, value))})"


def read(parts: Sequence[str]) -> dict[str, Any]:
    """The parts of a name after the cell's, as options."""
    found: dict[str, Option] = {}
    for part in parts:
        word, _, values = part.rstrip(")").partition("(")
        found[word] = tuple(map(float, values.split(","))) if values else True
    return found


def woven(
    name: str, cell: Cell, *, reset: bool = False, given: bool = False, hold: bool = False, dropout: bool = False,
    candidate: bool = False, zoneout: tuple[float, ...] = (), mean: bool = False,
) -> Cell:  # fmt: skip
    own, S = len(cell.units), cell.S
    at_random = [k for k in range(S) if zoneout and zoneout[k] and not mean]
    units = (
        *cell.units,
        *(f"{letter}_reset" for letter in cell.states if given),
        *([DROPOUT] if dropout or candidate else []),
    )
    flags = (*cell.flags, *([RESET] if reset else []), *([HOLD] if hold else []))
    places = {name: k for k, name in enumerate((*units, *flags))}

    page = masked(cell) if candidate else step_graph(cell)

    def entered(state: Sequence, extra: Sequence) -> list:
        if not reset:
            return list(state)
        instead = [extra[places[f"{letter}_reset"]] if given else 0.0 for letter in cell.states]
        return [where(extra[places[RESET]], r, s) for r, s in zip(instead, state)]

    def step(x: Sequence, h: Sequence, state: Sequence, extra: Sequence = ()) -> tuple:
        def product(value: Any, gate: float) -> Any:
            return recurrent(int(gate), dropped(value, extra))

        s = entered(state, extra)
        factor = [extra[places[DROPOUT]]] if candidate else []
        new = list(page.run(OPERATIONS | {PRODUCT: product}, x=x, h=h, state=s, extra=extra[:own], factor=factor)[0])
        for k, p in enumerate(zoneout):
            if k in at_random:
                uniform = extra[len(places) + at_random.index(k)]
                new[k] = where(p - uniform, s[k], new[k])
            elif p:
                new[k] = p * s[k] + (1 - p) * new[k]
        return tuple(where(extra[places[HOLD]], old, n) for old, n in zip(state, new)) if hold else tuple(new)

    def operand(h: Any, extra: Sequence) -> Any:
        (seen, *_) = entered((h, *[0.0] * (S - 1)), extra)
        return dropped(seen, extra)

    def dropped(seen: Any, extra: Sequence) -> Any:
        return seen * extra[places[DROPOUT]] if dropout else seen

    return made(
        name, cell.gates, cell.states, step, None, units,
        learned=cell.learned + S * given, flags=flags, uniforms=len(at_random),
        operand=operand if reset or dropout else None,
    )  # fmt: skip


def masked(cell: Cell) -> Graph:
    """The page with its candidate times a factor, an input of its own."""
    if not cell.candidate:
        raise ValueError(f"{cell.label} has no candidate gate for recurrent_dropout_on='candidate'")
    page, graph = step_graph(cell), Graph()
    candidate = activation(page, cell.gates.index(cell.candidate))
    known = {candidate: graph.image(candidate, {}) * graph.node("input", "factor", 0)}
    graph.outputs = (tuple(graph.image(value, known) for value in page.outputs[0]),)
    return graph
