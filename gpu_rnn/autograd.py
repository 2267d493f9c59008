"""The functions as torch's autograd sees them."""

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .problem import Problem, Weights


def tracked(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiated(
    backend: ModuleType, problem: Problem, x: torch.Tensor, weights: Weights, state: tuple
) -> tuple[torch.Tensor, tuple]:
    y, *last = Sequence.apply(backend, problem, x, *weights, *state)
    return y, tuple(last)


class Sequence(torch.autograd.Function):
    """One layer, one direction. The tape is read, never written, so that a retained graph can be walked again."""

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, problem: Problem, x: torch.Tensor, *inputs: torch.Tensor) -> tuple:
        weights, state = Weights(*inputs[: len(Weights._fields)]), inputs[len(Weights._fields) :]
        y, last, tape = backend.forward(problem.cell, x, weights, state, reverse=problem.reverse, save=True)
        ctx.backend, ctx.problem, ctx.count = backend, problem, len(inputs)
        ctx.save_for_backward(x, *inputs, y, *tape)
        return y, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, *dlast: torch.Tensor) -> tuple:
        x, *rest = ctx.saved_tensors
        inputs, (y, *tape) = rest[: ctx.count], rest[ctx.count :]
        weights, state = Weights(*inputs[: len(Weights._fields)]), tuple(inputs[len(Weights._fields) :])
        names = ("x", *Weights._fields)
        needs = {name for name, needed in zip(names, ctx.needs_input_grad[2:]) if needed}
        gradients = ctx.backend.backward(
            ctx.problem.cell, x, weights, state, y, tuple(tape), dy, dlast, reverse=ctx.problem.reverse, needs=needs
        )
        wanted = ctx.needs_input_grad[2 + len(names) :]
        states = (gradient if needed else None for gradient, needed in zip(gradients["state"], wanted))
        return None, None, *(gradients.get(name) for name in names), *states
