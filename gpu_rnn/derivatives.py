"""Derivatives of any order: a cell's page driven through time by torch's operations, which torch can differentiate.

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
from torch.nn.functional import linear

from gpu_rnn.kernels.cells import operand_graph, step_graph
from gpu_rnn.kernels.mathematics import PRODUCT
from gpu_rnn.kernels.weave import HOLD

from . import arrays
from .backends import phased
from .extra import Extra
from .problem import Problem, Weights

FIRST_STATE = 1 + len(Weights._fields)  # its place in `given`


def reference(problem: Problem, *given: Tensor | None) -> tuple[Tensor, ...]:
    """y and the states after, as a backend computes them, in torch's operations."""
    x, weights, state = named(given)
    cell, H, real = problem.cell, problem.H, getattr(torch, arrays.real_dtype(x))
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if weight is None else weight.to(real) for weight in weights[:5])
    h, *others = (initial.to(real) for initial in state)
    extra = Extra.of(weights)

    def recurrent(value: Tensor, gate: float) -> Tensor:
        """As of h, of a value of the page's own."""
        rows = slice(int(gate) * H, (int(gate) + 1) * H)
        assert w_hh is not None
        return linear(value, w_hh[rows], None if b_hh is None else b_hh[rows])

    operations: dict[str, Callable] = {**arrays.operations(x), PRODUCT: recurrent}
    part = x.to(real) if w_ih is None else linear(x.to(real), w_ih)
    projected = (part if b_ih is None else part + b_ih).chunk(cell.G, -1)
    outputs, blank = [], projected[0][0].detach().new_zeros(problem.B, H)
    for t in range(len(x) - 1, -1, -1) if problem.reverse else range(len(x)):
        before, fixed = h, [value.to(real) for value in extra.at(cell, t, H)]
        drawn_at = t if cell.phases is None else phased.second(t, problem.reverse)
        random = [u.to(real) for u in extra.drawn(cell, drawn_at, problem.B, H)]
        ((seen,),) = operand_graph(cell).run(operations, h=[h], extra=[value[..., : h.shape[-1]] for value in fixed])
        new, _ = step_graph(cell).run(
            operations,
            x=[gate[t] for gate in projected],
            h=linear(seen, w_hh, b_hh).chunk(cell.G, -1),
            state=(h if w_hr is None else h.new_zeros(problem.B, H), *others),
            extra=[*fixed, *random],
        )
        h, *others = (whole(value, blank) for value in new)
        if w_hr is not None:
            h = linear(h, w_hr)
            if HOLD in cell.flags:
                h = operations["where"](fixed[len(cell.units) + cell.flags.index(HOLD)], before, h)
        outputs.append((h, *others))
    y, *history = (torch.stack(state[::-1] if problem.reverse else state) for state in zip(*outputs))
    return tuple(output.to(x.dtype) for output in (y, h, *others, *(history if problem.history else ())))


def whole(value: Tensor | float, blank: Tensor) -> Tensor:
    """A new state [B, H], also where the cell gives a number, or one for all units [B, 1]."""
    return value if isinstance(value, Tensor) and value.shape == blank.shape else value + blank


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
