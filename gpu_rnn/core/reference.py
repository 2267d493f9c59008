"""The plain reference: a loop over time that runs a cell's graph one operation at a time, on arrays of any library.

Right for every cell and modifier, and slow. Double backward and forward mode differentiate it, `inspect` looks into it,
and the benchmark checks modifiers by it. tests/test_reference.py compares it with torch.nn.
"""

from collections.abc import Callable, Sequence
from typing import Any

from gpu_rnn.kernels.cells import Cell, recurrent_input_graph
from gpu_rnn.kernels.mathematics import RECURRENT_MATMUL
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.trace import Graph
from gpu_rnn.kernels.two_pass import second

from . import arrays
from .cell_inputs import AuxInputs
from .heads import join, split_run
from .problem import Run, Weights


def run(
    cell: Cell, step: Graph, x: Any, weights: Weights, state: Sequence[Any], reverse: bool
) -> list[tuple[tuple, tuple]]:
    """Run one layer in one direction; `run_heads` runs one with heads.

    Args:
        cell: the cell with its modifiers.
        step: its graph; the outputs are the new states, and whatever else is to be seen of a time step.
        x, weights, state: [T, B, I], `Weights`, [B, P] and [B, H]; floating point in the dtype of computing.
        reverse: whether the last time step is computed first.

    Returns:
        By time step, in the order of x: the states after it, projection included, and the graph's other outputs.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights[:5]
    (T, B), H, aux = x.shape[:2], w_hh.shape[0] // cell.G, AuxInputs.of(weights)
    blank, real = arrays.zeros((B, H), like=x), arrays.dtype(x)

    def gate(g: float) -> slice:
        return slice(int(g) * H, (int(g) + 1) * H)

    def by_gate(rows: Any) -> list[Any]:
        return [rows[..., gate(g)] for g in range(cell.G)]

    def recurrent(value: Any, g: float) -> Any:
        """As of h, of a value of the cell's own."""
        return linear(value, w_hh[gate(g)], None if b_hh is None else b_hh[gate(g)])

    operations: dict[str, Callable] = {**arrays.operations(x), RECURRENT_MATMUL: recurrent}
    projected, (h, *others) = by_gate(linear(x, w_ih, b_ih)), state
    steps = []
    for t in range(T)[:: -1 if reverse else 1]:
        t_random = t if cell.lowered is None else second(t, reverse)
        fixed = [arrays.astype(value, real) for value in aux.at(cell, t, H)]
        random = [arrays.astype(value, real) for value in aux.uniforms_at(cell, t_random, B, H)]
        ((h_in,),) = recurrent_input_graph(cell).run(
            operations, h=[h], extra=[value[..., : h.shape[-1]] for value in fixed]
        )
        new, observed = step.run(
            operations, x=[part[t] for part in projected], h=by_gate(linear(h_in, w_hh, b_hh)),
            state=(h if w_hr is None else blank, *others), extra=[*fixed, *random],
        )  # fmt: skip
        before, (h, *others) = h, (whole(value, blank) for value in new)
        if w_hr is not None:
            h = linear(h, w_hr, None)
            if HOLD in cell.flags:
                h = operations["where"](fixed[len(cell.per_unit_params) + cell.flags.index(HOLD)], before, h)
        steps.append(((h, *others), observed))
    return steps[:: -1 if reverse else 1]


def run_heads(
    cell: Cell, step: Graph, x: Any, weights: Weights, state: Sequence[Any], reverse: bool, heads: int
) -> list[tuple[tuple, tuple]]:
    """As `run`, with so many heads: each by itself."""
    if heads == 1:
        return run(cell, step, x, weights, state, reverse)
    of_heads = split_run(Run(x, weights, state, reverse), heads, cell.G)
    steps = zip(*(run(cell, step, *of_head) for of_head in of_heads))
    return [(join_each(states), join_each(outputs)) for states, outputs in (zip(*heads) for heads in steps)]


def join_each(heads: Sequence[tuple]) -> tuple:
    """The values [B, H/N] of N heads -> [B, H]."""
    return tuple([join(parts) for parts in zip(*heads)])


def linear(value: Any, weight: Any, bias: Any) -> Any:
    """Without a weight the value is projected already."""
    product = value if weight is None else value @ weight.T
    return product if bias is None else product + bias


def whole(value: Any, blank: Any) -> Any:
    """A new state [B, H], also where the cell gives a number, or one for all units [B, 1]."""
    return value if getattr(value, "shape", None) == blank.shape else value + blank
