"""The functions as torch's autograd, its transforms (torch.func) and its compiler see them, whichever looks on.

Eager     `nodes`: autograd.Functions around the chosen backend
Captured  `operators`: operators for torch.compile, torch.export, torch.jit.trace, make_fx and any other mode. A program
          that was saved needs `import gpu_rnn` before it is loaded.

First derivatives are the backend's; second and higher ones, and forward mode, those of `derivatives`.
"""

from collections.abc import Sequence as List
from operator import attrgetter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import dispatch
from ..backends.call_cache import Plan, planned
from ..backends.dispatch import prepared
from ..core import arrays
from ..core.problem import Direction, Options, Weights
from . import flops  # noqa: F401  (flops registers what operators cost)
from .custom_ops import captured, captured_stack, capturing, exporting
from .derivatives import required, transformed
from .functions import Sequence, Stack, above, parts, recorded

LOOK = attrgetter("__class__", "shape", "dtype", "device", "requires_grad")


def sequence(
    name: str, x: Tensor, weights: Weights, state: List[Tensor | None], options: Options
) -> tuple[Tensor, tuple]:
    """As `functional.sequence`, for tensors."""
    if not (capturing() or transformed()):
        plan = planned(
            (name, options, *switches(x)), LOOK, (x, *weights, *state), made, name, x, weights, state, options
        )
        if plan is not None:
            return followed(plan, x, weights, plan.filled(x, state))
    (result,) = sequences(name, [Direction(x, weights, state, options.reverse)], options)
    return result


def sequences(name: str, directions: List[Direction], options: Options) -> list[tuple[Tensor, tuple]]:
    """`sequence` for each direction of a layer: at once where the backend can and no transform looks on."""
    if capturing() or unreal(directions[0].x):
        return captured(name, directions, options)
    if transformed():
        return [watched(name, *direction, options) for direction in directions]
    if len(directions) > 1:
        options = options._replace(directions=len(directions))
    wanted = any(required(d.x, *d.weights, *d.state) for d in directions)
    filled = []
    for x, weights, state, reverse in directions:
        if reverse != options.reverse:
            options = options._replace(reverse=reverse)
        backend, problem, state = prepared(name, x, weights, state, options, wanted and not options.recompute)
        filled.append(Direction(x, weights, state, reverse))
    found = dispatch.forwards(backend, problem, filled)
    return recorded(backend, problem, filled, found) if wanted else [(y, last) for y, last, _ in found]


def watched(
    name: str, x: Tensor, weights: Weights, state: List[Tensor | None], reverse: bool, options: Options
) -> tuple[Tensor, tuple]:
    """One direction, where a transform looks on."""
    options = options._replace(reverse=reverse)
    backend, problem, filled = prepared(name, x, weights, state, options, not options.recompute)
    y, *last = Sequence.apply(backend, problem, x, *weights, *filled)[: problem.outputs]
    return y, tuple(last)


def stacked(
    name: str, x: Tensor, layers: List[tuple[Weights, List[Tensor | None]]], options: Options
) -> list[tuple[Tensor, tuple]] | None:
    """`sequence` for each layer of a stack, as one node; None where nothing would go at once."""
    if options.recompute or transformed():  # recomputed, it would not get the same bits; transforms know single layers
        return None
    if capturing() or unreal(x):
        return None if exporting() else captured_stack(name, x, layers, options)
    wanted = required(x, *(tensor for weights, state in layers for tensor in (*weights, *state)))
    backend, problem, state = prepared(name, x, *layers[0], options, wanted)
    if not any(dispatch.stacks(backend, problem, backward=way) for way in (False, True)[: 1 + wanted]):
        return None
    filled = [(layers[0][0], state)]
    for weights, initial in layers[1:]:
        filled.append((weights, prepared(name, above(x, weights), weights, initial, options, wanted)[2]))
    if not wanted:
        return [(y, last) for y, last, _ in dispatch.stack(backend, problem, x, filled)]
    outputs = Stack.apply(backend, problem, len(filled), x, *(tensor for w, state in filled for tensor in (*w, *state)))
    return [(y, tuple(last)) for y, *last in parts(outputs, len(filled))]


def made(name: str, x: Tensor, weights: Weights, state: List[Tensor | None], options: Options) -> Plan | None:
    """The plan of a call of a function."""
    return None if unreal(x) else Plan.of(name, x, weights, state, options, required(x, *weights, *state))


def switches(x: Tensor) -> tuple[bool, str | None]:
    """What torch's own say that decides on a plan."""
    return torch.is_grad_enabled(), arrays.precision(x) if x.is_cuda else None


def followed(plan: Plan, x: Tensor, weights: Weights, state: List[Tensor]) -> tuple[Tensor, tuple]:
    """What a plan gives."""
    backend, problem, _, wanted, _ = plan
    found = y, last, _ = dispatch.forward(backend, problem, x, weights, state)
    if wanted:
        ((y, last),) = recorded(backend, problem, [Direction(x, weights, state, problem.reverse)], [found])
    return y, last


def unreal(x: Tensor) -> bool:
    """Whether a tensor has a shape alone: on the meta device, or of somebody who looks how much a model will take."""
    return x.is_meta or isinstance(x, FakeTensor)
