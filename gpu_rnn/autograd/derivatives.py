"""Derivatives of any order: the plain reference in torch's operations, which torch can differentiate.

Right for every cell and in every order, forward mode included, but slow. First derivatives are the backends'.

Here and in `nodes` and `operators`, `given` is (x, *weights, *state), in the order of `Weights`, with None for the
weights there aren't.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpu_rnn.kernels.cells import step_graph

from ..core import arrays
from ..core import reference as plain
from ..core.problem import Problem, Weights

FIRST_STATE = 1 + len(Weights._fields)  # its place in `given`


def reference(problem: Problem, *given: Tensor | None) -> tuple[Tensor, ...]:
    """y and the states after, as a backend computes them, in torch's operations."""
    x, weights, state = named(given)
    real = getattr(torch, arrays.real_dtype(x))
    weights = Weights._make([*(None if weight is None else weight.to(real) for weight in weights[:5]), *weights[5:]])
    initial = [value.to(real) for value in state]
    steps = plain.run(problem.cell, step_graph(problem.cell), x.to(real), weights, initial, problem.reverse)
    last, _ = steps[0 if problem.reverse else -1]
    y, *history = (torch.stack(values) for values in zip(*(states for states, _ in steps)))
    return tuple(output.to(x.dtype) for output in (y, *last, *(history if problem.history else ())))


def reference_gradient(problem: Problem, needs: tuple, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What `Gradient` computes, differentiable: given, gradients of y and the states after -> gradients."""
    n = FIRST_STATE + problem.cell.S
    return vjp(partial(reference, problem), inputs[:n], needs)[1](inputs[n:])


def vjp(function: Callable, inputs: List[Tensor | None], wanted: List[bool]) -> tuple[tuple, Callable]:
    """torch.func.vjp with respect to the inputs that are wanted."""

    def of_wanted(*tensors: Tensor) -> tuple:
        return function(*(a if b is None else b for a, b in zip(inputs, spread(tensors, wanted))))

    return torch.func.vjp(of_wanted, *(tensor for tensor, want in zip(inputs, wanted) if want))


def pushed(function: Callable, inputs: List[Tensor | None], tangents: List[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the outputs. The pullback is linear and the pushforward its transpose, so pull it back."""
    moving = [tangent is not None for tangent in tangents]
    with uncast(inputs[0]):
        outputs, pullback = vjp(function, inputs, moving)
        _, pushforward = torch.func.vjp(pullback, tuple(map(torch.zeros_like, outputs)))
        (found,) = pushforward(tuple(tangent for tangent in tangents if tangent is not None))
    return found


def uncast(x: Tensor) -> torch.autocast:
    """Without autocast: dtypes are decided."""
    return torch.autocast(x.device.type, enabled=False)


def named(given: List) -> tuple[Tensor, Weights, tuple]:
    """As backends take it."""
    return given[0], Weights(*given[1:FIRST_STATE]), tuple(given[FIRST_STATE:])


def spread(gradients: Iterable[Tensor], needs: Iterable[bool]) -> Iterator[Tensor | None]:
    """Each gradient at the place that needs it, None between them."""
    following = iter(gradients)
    return (next(following) if needed else None for needed in needs)


def required(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if getattr(tensor, "requires_grad", False):  # what is no tensor is refused later, by its name
                return True
    return False


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for."""
    return transformed() or required(*tensors)


def transformed() -> bool:
    """Whether torch.func or forward mode looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a transform looks on, or a TorchDispatchMode: FlopCounterMode, selective checkpointing, a memory tracker.

    A mode sees operators alone.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or transformed()
