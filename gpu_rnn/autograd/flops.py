"""FLOPs of the operators, for torch.utils.flop_counter: those of their matmuls, a multiply and an add each, as torch
counts its own.

    forward    2 T B G H (I + P), and 2 T B P H of an output projection
    backward   the same for the gradients that went into a matmul, and for those of the weights that are needed; and
               the forward once more where nothing was saved

Elementwise operations count nothing, and neither does a time step past a sequence's end count less.
"""

from collections.abc import Sequence as List
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import custom_ops  # noqa: F401  (registers them)
from .functions import parts

Shape = tuple[int, ...]


def matmuls(shapes: List[Shape], names: List[str]) -> dict[str, int]:
    """FLOPs forward by the weights of one layer and direction. shapes: of x, of each of `names`, and of the states."""
    (T, B, _), sizes = shapes[0], dict(zip(names, shapes[1:]))
    return {name: 2 * T * B * sizes[name][0] * sizes[name][1] for name in ("w_ih", "w_hh", "w_hr") if name in sizes}


def forward_flops(directions: List[List[Shape]], names: List[str]) -> int:
    return sum(sum(matmuls(shapes, names).values()) for shapes in directions)


def backward_flops(directions: List[List[Shape]], names: List[str], needs: List[List[bool]]) -> int:
    """needs: of x, of each of `names`, and of the states. Gradients always go back through time and the projection."""
    total = 0
    for shapes, needed in zip(directions, needs, strict=True):
        need = dict(zip(["x", *names], needed))
        for name, flops in matmuls(shapes, names).items():
            total += flops * ((name != "w_ih" or need["x"]) + need[name])
    return total


def layers_of(given: List[Shape], layers: int) -> list[list[Shape]]:
    """Of each layer of a stack: an upper one's input is the output of the one below."""
    x, *rest = given
    found: list[list[Shape]] = []
    for each in parts(rest, layers):
        found.append([x, *each])
        x = (*x[:2], each[-1][-1])
    return found


@register_flop_formula(torch.ops.gpu_rnn.forward)
def _(cell: str, given: List[Shape], names: str, reverse: List[bool], *_: Any, **__: Any) -> int:
    return forward_flops(parts(given, len(reverse)), names.split())


@register_flop_formula(torch.ops.gpu_rnn.backward)
def _(
    cell: str, given: List[Shape], names: str, doutputs: Any, recorded: List[Shape], reverse: List[bool], backend: str,
    precision: str | None, step_exact: bool, history: bool, needs: List[bool], **_: Any,
) -> int:  # fmt: skip
    directions, fields = parts(given, len(reverse)), names.split()
    again = 0 if recorded else forward_flops(directions, fields)
    return again + backward_flops(directions, fields, parts(needs, len(reverse)))


@register_flop_formula(torch.ops.gpu_rnn.stack)
def _(cell: str, given: List[Shape], names: str, layers: int, *_: Any, **__: Any) -> int:
    return forward_flops(layers_of(given, layers), names.split())


@register_flop_formula(torch.ops.gpu_rnn.stack_backward)
def _(
    cell: str, given: List[Shape], names: str, doutputs: Any, recorded: Any, layers: int, backend: str,
    precision: str | None, needs: List[bool], **_: Any,
) -> int:  # fmt: skip
    (need_x, *rest), whole = needs, []
    for each in parts(rest, layers):
        whole.append([need_x, *each])
        need_x = need_x or any(each)
    return backward_flops(layers_of(given, layers), names.split(), whole)
