"""FLOPs of the operators, for torch.utils.flop_counter: those of their matmuls, a multiply and an add each, as torch
counts its own.

    forward    2 T B G H (I + P), of N heads 2 T B G H (I + H / N); and 2 T B P H of an output projection
    backward   the same for the gradients that went into a matmul, and for those of the weights that are needed; and
               the forward once more where nothing was saved

Elementwise operations count nothing, and neither does a time step past a sequence's end count less.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ..core.problem import Run
from .custom_ops import layout_of

Shape = tuple[int, ...]


def matmuls(run: Run) -> dict[str, int]:
    """FLOPs forward by the weights of a run of shapes."""
    T, B, _ = run.x
    sizes = {name: getattr(run.weights, name) for name in ("w_ih", "w_hh", "w_hr")}
    return {name: 2 * T * B * size[0] * size[1] for name, size in sizes.items() if size is not None}


def runs_of(cell: str, shapes: Sequence[Shape], names: str, reverse: Sequence[int], linked: bool) -> list[Run]:
    """The runs of a call, of shapes for arrays: an upper layer of a stack takes the output of the one below."""
    runs: list[Run] = []
    for run in layout_of(cell, names, reverse, linked).unflatten(shapes):
        runs.append(run if run.x is not None else run._replace(x=(*runs[-1].x[:2], runs[-1].state[0][-1])))
    return runs


@register_flop_formula(torch.ops.gpu_rnn.forward)
def _(cell: str, tensors: Sequence[Shape], names: str, reverse: Sequence[int], linked: bool, *_: Any, **__: Any) -> int:
    return sum(sum(matmuls(run).values()) for run in runs_of(cell, tensors, names, reverse, linked))


@register_flop_formula(torch.ops.gpu_rnn.backward)
def _(
    cell: str, tensors: Sequence[Shape], names: str, grads: Any, saved: Sequence[Shape], reverse: Sequence[int],
    linked: bool, backend: str, precision: str | None, step_exact: bool, heads: int, history: bool,
    needs: Sequence[int], **_: Any,
) -> int:  # fmt: skip
    """Gradients always go back through time and the projection."""
    runs = runs_of(cell, tensors, names, reverse, linked)
    total = 0
    for run, needed in zip(runs, layout_of(cell, names, reverse, linked).needs(needs), strict=True):
        for name, flops in matmuls(run).items():
            total += flops * ((not saved) + (name != "w_ih" or "x" in needed) + (name in needed))
    return total
