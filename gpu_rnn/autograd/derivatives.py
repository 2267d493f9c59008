"""Derivatives of any order: the plain reference in torch's operations, which torch can differentiate.

Right for every cell and in every order, forward mode included, but slow. First derivatives are the backends'.

Here and in `functions` and `custom_ops`, `tensors` are those of a call's runs (`FlatRuns`), and `grads` the gradients
of its outputs: of each run y, the states after the last time step, and those of a history.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gpu_rnn.kernels.cells import step_graph

from ..core import arrays
from ..core import reference as plain
from ..core.flat_runs import FlatRuns
from ..core.problem import Problem, Weights
from .torch_private import in_transform


def reference(problem: Problem, layout: FlatRuns, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The outputs of all runs, as a backend computes them, in torch's operations."""
    outputs: list[Tensor] = []
    y: Tensor | None = None
    for run in layout.unflatten(tensors):
        x = y if layout.linked and y is not None else run.x
        real = getattr(torch, arrays.real_dtype(x))
        weights = [*(None if w is None else w.to(real) for w in run.weights[:5]), *run.weights[5:]]
        state = [initial.to(real).flatten(0, -2) for initial in run.state]
        args = x.to(real), Weights(*weights), state, run.reverse, problem.heads
        steps = plain.run_heads(problem.cell, step_graph(problem.cell), *args)
        last, _ = steps[0 if run.reverse else -1]
        y, *history = (torch.stack(values).to(x.dtype) for values in zip(*(states for states, _ in steps)))
        after = [new.to(x.dtype).reshape(initial.shape) for new, initial in zip(last, run.state)]
        outputs += [y, *after, *(history if problem.history else ())]
    return tuple(outputs)


def reference_gradient(
    problem: Problem, layout: FlatRuns, needs: Sequence, *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """The needed gradients of the tensors, differentiable. inputs: the tensors, then grads, None for zero."""
    n = len(needs)
    outputs, pullback = vjp(partial(reference, problem, layout), inputs[:n], needs)
    return pullback(tuple([torch.zeros_like(a) if d is None else d for a, d in zip(outputs, inputs[n:])]))


def vjp(function: Callable, inputs: Sequence[Tensor | None], needs: Sequence) -> tuple[tuple, Callable]:
    """torch.func.vjp with respect to the inputs that need a gradient."""

    def of_needed(*tensors: Tensor) -> tuple:
        return function(*(a if b is None else b for a, b in zip(inputs, scatter(tensors, needs))))

    return torch.func.vjp(of_needed, *(tensor for tensor, need in zip(inputs, needs) if need))


def jvp(function: Callable, inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the outputs. The pullback is linear and the pushforward its transpose, so pull it back."""
    moving = [tangent is not None for tangent in tangents]
    with no_autocast(inputs[0]):
        outputs, pullback = vjp(function, inputs, moving)
        _, pushforward = torch.func.vjp(pullback, tuple(map(torch.zeros_like, outputs)))
        (output_tangents,) = pushforward(tuple(tangent for tangent in tangents if tangent is not None))
    return output_tangents


def no_autocast(x: Tensor) -> torch.autocast:
    """Without autocast: dtypes are decided."""
    return torch.autocast(x.device.type, enabled=False)


def scatter(gradients: Iterable[Tensor], needs: Iterable) -> Iterator[Tensor | None]:
    """Each gradient at the place that needs it, None between them."""
    following = iter(gradients)
    return (next(following) if need else None for need in needs)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd may ask for a gradient."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if getattr(tensor, "requires_grad", False):  # what is no tensor is refused later, by its name
                return True
    return False


def may_need_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd or a transform may ask for a derivative."""
    return in_transform() or any_requires_grad(*tensors)
