"""Modifiers: what can happen to the states of any cell between two time steps, added to its graph.

In this order, at time step t, for one hidden unit of one batch row:

    s      = where reset[t], the reset state or 0, else the state before
    p      = m s_h                     input of the recurrent matmul; m is a dropout mask of the whole sequence, which
                                       masks a value of `recurrent(gate, value)`, too
    new    = step(x_t, R p + b, s)     the cell itself; or m is a factor of its candidate, and p = s_h
    new_k  = zoneout_k: s_k where u_k < its probability, else new_k; or their expectation
    after  = where hold[t], the state before, else new

reset[t] is a direction's own: true where it enters an episode at t, in reverse by the episode's last time step. Resets
are for the ends of episodes, hold is for sequences of unequal lengths. Dropout of the recurrent input is variational
(Gal & Ghahramani 2016), that of the candidate Semeniuta et al.'s (2016), zoneout Krueger et al.'s (2017). The gradient
is derived.
"""

from collections.abc import Sequence
from typing import Any

from .autodiff import OPERATIONS
from .cell import Cell, activation, make_cell, step_graph
from .mathematics import RECURRENT_MATMUL, recurrent, where
from .trace import Graph

RESET, HOLD, DROPOUT = "reset", "hold", "dropout"


Option = bool | tuple[float, ...]


def format_option(word: str, value: Option) -> str:
    return word if isinstance(value, bool) else f"{word}({','.join(map(repr, value))})"


def parse_options(parts: Sequence[str]) -> dict[str, Any]:
    """Parse the parts of a name after the cell's."""
    options: dict[str, Option] = {}
    for part in parts:
        word, _, values = part.rstrip(")").partition("(")
        options[word] = tuple(map(float, values.split(","))) if values else True
    return options


def build_modified(
    name: str, cell: Cell, *, reset: bool = False, reset_state: bool = False, hold: bool = False, dropout: bool = False,
    candidate: bool = False, zoneout: tuple[float, ...] = (), mean: bool = False,
) -> Cell:  # fmt: skip
    own, S = len(cell.per_unit_params), cell.S
    stochastic = [k for k in range(S) if zoneout and zoneout[k] and not mean]
    units = *cell.per_unit_params, *(f"{letter}_reset" for letter in cell.states if reset_state)
    units += (DROPOUT,) * (dropout or candidate)
    flags = (*cell.flags, *[RESET] * reset, *[HOLD] * hold)
    places = {name: k for k, name in enumerate((*units, *flags))}

    graph = with_candidate_mask(cell) if candidate else step_graph(cell)

    def apply_reset(state: Sequence, extra: Sequence) -> list:
        if not reset:
            return list(state)
        initial = [extra[places[f"{letter}_reset"]] if reset_state else 0.0 for letter in cell.states]
        return [where(extra[places[RESET]], r, s) for r, s in zip(initial, state)]

    def step(x: Sequence, h: Sequence, state: Sequence, extra: Sequence = ()) -> tuple:
        def masked_matmul(value: Any, gate: float) -> Any:
            return recurrent(int(gate), apply_dropout(value, extra))

        s = apply_reset(state, extra)
        factor = [extra[places[DROPOUT]]] if candidate else []
        operations = OPERATIONS | {RECURRENT_MATMUL: masked_matmul}
        new = list(graph.run(operations, x=x, h=h, state=s, extra=extra[:own], factor=factor)[0])
        for k, p in enumerate(zoneout):
            if k in stochastic:
                uniform = extra[len(places) + stochastic.index(k)]
                new[k] = where(p - uniform, s[k], new[k])
            elif p:
                new[k] = p * s[k] + (1 - p) * new[k]
        return tuple(where(extra[places[HOLD]], old, n) for old, n in zip(state, new)) if hold else tuple(new)

    def recurrent_input(h: Any, extra: Sequence) -> Any:
        (h, *_) = apply_reset((h, *[0.0] * (S - 1)), extra)
        return apply_dropout(h, extra)

    def apply_dropout(h: Any, extra: Sequence) -> Any:
        return h * extra[places[DROPOUT]] if dropout else h

    return make_cell(
        name, cell.gates, cell.states, step, None, units,
        num_trainable=cell.num_trainable + S * reset_state, flags=flags, uniforms=len(stochastic),
        recurrent_input=recurrent_input if reset or dropout else None,
    )  # fmt: skip


def with_candidate_mask(cell: Cell) -> Graph:
    """Return the step's graph with its candidate times a factor, an input of its own."""
    if not cell.candidate:
        raise ValueError(f"{cell.label} has no candidate gate for recurrent_dropout_on='candidate'")
    step, graph = step_graph(cell), Graph()
    candidate = activation(step, cell.gates.index(cell.candidate))
    known = {candidate: graph.copy_into(candidate, {}) * graph.node("input", "factor", 0)}
    graph.outputs = (tuple(graph.copy_into(value, known) for value in step.outputs[0]),)
    return graph
