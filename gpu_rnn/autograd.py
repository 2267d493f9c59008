"""The functions as torch's autograd sees them."""

from types import ModuleType
from typing import Any

import torch

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
    def backward(ctx: Any, dy: torch.Tensor, *dlast: torch.Tensor) -> tuple:
        x, *rest = ctx.saved_tensors
        inputs, (y, *tape) = rest[: ctx.count], rest[ctx.count :]
        weights, state = Weights(*inputs[: len(Weights._fields)]), tuple(inputs[len(Weights._fields) :])
        names = ("x", *Weights._fields)
        needs = {name for name, needed in zip(names, ctx.needs_input_grad[2:]) if needed}
        with torch.no_grad():
            gradients = ctx.backend.backward(
                ctx.problem.cell, x, weights, state, y, tuple(tape), dy, dlast, reverse=ctx.problem.reverse, needs=needs
            )
        wanted = ctx.needs_input_grad[2 + len(names) :]
        states = (gradient if needed else None for gradient, needed in zip(gradients["state"], wanted))
        given = (*(gradients.get(name) for name in names), *states)
        if torch.is_grad_enabled():  # create_graph=True
            given = tuple(None if g is None else Once.apply(g, dy, x, *inputs) for g in given)
        return None, None, *given


class Once(torch.autograd.Function):
    """Passes a gradient on, but not a second derivative: without this torch would take the gradient for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *depends_on: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise NotImplementedError("gpu_rnn's recurrent functions have no second derivative yet")
