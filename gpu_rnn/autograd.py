"""The functions as torch's autograd, its transforms (torch.func) and its compiler see them.

Eager     `differentiated`: two autograd.Functions, `Sequence` and its gradient `Gradient`, around the chosen backend.
Captured  `captured`: two operators, gpu_rnn::forward and gpu_rnn::backward, for torch.compile and torch.export. They
          choose their backend when they run, and time stays inside of them. A program that torch.export saved needs
          this module imported before it is loaded.

First derivatives are the backend's. Second and higher ones, and forward mode, are torch's own, of `reference`: the
cell's page driven through time by torch's operations. Right for every cell and in every order, but slow.

Everywhere here `given` is (x, *weights, *state), in the order of `Weights`, with None for the weights there aren't.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import linear

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.trace import Graph, trace

from . import arrays, dispatch
from .arguments import checked
from .problem import Problem, Weights

FIRST_STATE = 1 + len(Weights._fields)  # its place in `given`


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for."""
    return transformed() or required(*tensors)


def required(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def transformed() -> bool:
    """Whether torch.func or forward mode looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ---- eager ----------------------------------------------------------------------------------------------------------


def differentiated(
    backend: ModuleType, problem: Problem, x: Tensor, weights: Weights, state: tuple
) -> tuple[Tensor, tuple]:
    y, *last = Sequence.apply(backend, problem, x, *weights, *state)[: 1 + problem.cell.S]
    return y, tuple(last)


class Direct(Function):
    """An autograd.Function for torch.func, without what that costs a call for autograd alone.

    torch's own `apply` inspects the signature of `forward` to bind defaults, every time.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)


class Sequence(Direct):
    """One layer, one direction: given -> y, states after, tape.

    The tape is read, never written, so that a retained graph can be walked again.
    """

    @staticmethod
    def forward(backend: ModuleType, problem: Problem, *given: Any) -> tuple:
        y, last, tape = backend.forward(problem.cell, *named(given), reverse=problem.reverse, save=True)
        return y, *last, *tape

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, ctx.problem, *given = inputs
        tape = output[1 + ctx.problem.cell.S :]
        ctx.tape = len(tape)
        ctx.mark_non_differentiable(*tape)
        ctx.set_materialize_grads(False)  # or the tape would be sent zeros of its size
        ctx.save_for_backward(*given, output[0], *tape)
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        n = FIRST_STATE + ctx.problem.cell.S
        given, recorded = saved[:n], saved[n:]
        outputs = (recorded[0], *given[FIRST_STATE:])
        doutputs = [torch.zeros_like(a) if d is None else d for a, d in zip(outputs, arriving)]
        needs = ctx.needs_input_grad[2:]
        run = Gradient.apply if torch.is_grad_enabled() or transformed() else Gradient.forward
        gradients = run(ctx.backend, ctx.problem, needs, *given, *doutputs, *recorded)
        return None, None, *spread(gradients, needs)

    @staticmethod
    def jvp(ctx: Any, _backend: None, _problem: None, *tangents: Tensor | None) -> tuple:
        return *pushed(partial(reference, ctx.problem), ctx.saved_tensors, tangents), *[None] * ctx.tape

    @staticmethod
    def vmap(info: Any, in_dims: tuple, backend: ModuleType, problem: Problem, *given: Any) -> tuple:
        dims, V = in_dims[2:], info.batch_size
        if any_of(dims[1:FIRST_STATE]):
            return members(V, partial(Sequence.apply, backend, problem), dims, given)
        outputs = Sequence.apply(backend, problem, *folded(V, dims, given))[: 1 + problem.cell.S]
        return unfolded(V, outputs)  # without the tape, which is the backend's own and can't be unfolded


class Gradient(Direct):
    """The gradient of `Sequence`: given, gradients of y and the states after, y, tape -> gradients of those in `needs`.

    Without y and tape it records them anew.
    """

    @staticmethod
    def forward(backend: ModuleType, problem: Problem, needs: tuple, *rest: Any) -> tuple:
        n, S = FIRST_STATE + problem.cell.S, problem.cell.S
        given, dy, dlast, recorded = named(rest[:n]), rest[n], rest[n + 1 : n + 1 + S], rest[n + 1 + S :]
        if len(recorded) > 1:
            y, tape = recorded[0], tuple(recorded[1:])
        else:
            y, _, tape = backend.forward(problem.cell, *given, reverse=problem.reverse, save=True)
        wanted = {name for name, needed in zip(("x", *Weights._fields), needs) if needed}
        gradients = backend.backward(problem.cell, *given, y, tape, dy, dlast, reverse=problem.reverse, needs=wanted)
        found = [*(gradients.get(name) for name in ("x", *Weights._fields)), *gradients["state"]]
        return tuple(gradient for gradient, needed in zip(found, needs) if needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, ctx.problem, ctx.needs, *rest = inputs
        n = FIRST_STATE + 2 * ctx.problem.cell.S + 1
        ctx.recorded = len(rest) - n  # y and the tape follow from the others: what depends on them is counted there
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest[:n])
        ctx.save_for_forward(*rest[:n])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3 : 3 + len(inputs)]
        differentiated = [tensor for tensor, needed in zip(inputs, ctx.needs) if needed]
        filled = tuple(torch.zeros_like(a) if d is None else d for a, d in zip(differentiated, arriving))
        with uncast(inputs[0]):
            _, pullback = vjp(partial(reference_gradient, ctx.problem, ctx.needs), inputs, needs)
            gradients = pullback(filled)
        return None, None, None, *spread(gradients, needs), *[None] * ctx.recorded

    @staticmethod
    def jvp(ctx: Any, _backend: None, _problem: None, _needs: Any, *tangents: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        return pushed(partial(reference_gradient, ctx.problem, ctx.needs), inputs, tangents[: len(inputs)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, backend: ModuleType, problem: Problem, needs: tuple, *rest: Any) -> tuple:
        dims, V = in_dims[3:], info.batch_size
        run = partial(Gradient.apply, backend, problem, needs)
        if any_of(dims[1:FIRST_STATE]) or any(needs[1:FIRST_STATE]):  # a weight's gradient of its own for each
            return members(V, run, dims, rest)
        n = FIRST_STATE + problem.cell.S
        doutputs = folded(V, dims[n:], rest[n : n + 1 + problem.cell.S], states=1)
        gradients = run(*folded(V, dims, rest[:n]), *doutputs)
        return unfolded(V, gradients, sequences=needs[0])


def named(given: List) -> tuple[Tensor, Weights, tuple]:
    """As backends take it."""
    return given[0], Weights(*given[1:FIRST_STATE]), tuple(given[FIRST_STATE:])


def spread(gradients: Iterable[Tensor], needs: Iterable[bool]) -> Iterator[Tensor | None]:
    """Each gradient at the place that needs it, None between them."""
    following = iter(gradients)
    return (next(following) if needed else None for needed in needs)


# ---- vmap -----------------------------------------------------------------------------------------------------------
# Members with the same weights are more rows of one batch. With weights of their own, or gradients of these, each is a
# call: the kernels have one set of weights.


def any_of(dims: Iterable[int | None]) -> bool:
    return any(dim is not None for dim in dims)


def members(V: int, run: Callable, dims: tuple, tensors: tuple) -> tuple[tuple, tuple]:
    results = [
        run(*(tensor if dim is None else tensor.select(dim, v) for tensor, dim in zip(tensors, dims))) for v in range(V)
    ]
    stacked = tuple(map(torch.stack, zip(*results)))
    return stacked, (0,) * len(stacked)


def folded(V: int, dims: tuple, tensors: tuple, states: int = FIRST_STATE) -> list[Tensor | None]:
    """Sequences [T, B, .], then weights as they are, then from place `states` on states [B, .]: V*B rows for B."""

    def rows(tensor: Tensor, dim: int | None, place: int) -> Tensor:
        whole = tensor.expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return whole.movedim(0, place).flatten(place, place + 1)

    sequence = rows(tensors[0], dims[0], 1)
    return [sequence, *tensors[1:states], *(rows(t, d, 0) for t, d in zip(tensors[states:], dims[states:]))]


def unfolded(V: int, tensors: List[Tensor], sequences: int = 1) -> tuple[tuple, tuple]:
    places = [1] * sequences + [0] * (len(tensors) - sequences)
    return tuple(tensor.unflatten(place, (V, -1)) for tensor, place in zip(tensors, places)), tuple(places)


# ---- derivatives of any order ---------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "maximum": lambda a, b: torch.where(a <= b, b, a),  # NaN wins; where both are equal the gradient is the second's
    "negative": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "positive": lambda a: (a > 0).to(a.dtype),
}


@cache
def step_graph(cell: cells.Cell) -> Graph:
    return trace(cell.step, x=cell.G, h=cell.G, state=cell.S)


def reference(problem: Problem, *given: Tensor | None) -> tuple[Tensor, ...]:
    """y and the states after, as a backend computes them, in torch's operations."""
    x, weights, state = named(given)
    real = getattr(torch, arrays.real_dtype(x))
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if weight is None else weight.to(real) for weight in weights)
    h, *others = (initial.to(real) for initial in state)
    page, G = step_graph(problem.cell), problem.cell.G
    projected = linear(x.to(real), w_ih, b_ih).chunk(G, -1)
    outputs = []
    for t in range(len(x) - 1, -1, -1) if problem.reverse else range(len(x)):
        recurrent = linear(h, w_hh, b_hh).chunk(G, -1)
        (h, *others), _ = page.run(OPERATIONS, x=[gate[t] for gate in projected], h=recurrent, state=(h, *others))
        h = h if w_hr is None else linear(h, w_hr)
        outputs.append(h)
    y = torch.stack(outputs[::-1] if problem.reverse else outputs)
    return tuple(output.to(x.dtype) for output in (y, h, *others))


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


# ---- captured -------------------------------------------------------------------------------------------------------


capturing = torch.compiler.is_compiling


def captured(
    name: str, x: Tensor, weights: Weights, initial: dict[str, Tensor | None], reverse: bool, backend: str | None
) -> tuple[Tensor, tuple]:
    """As `functional.sequence`, as one node of a graph."""
    h0, *others = initial.values()
    B, P = x.shape[1], weights.w_hh.shape[1]
    H = P if weights.w_hr is None else weights.w_hr.shape[1]
    state = [x.new_zeros(B, P) if h0 is None else h0, *(x.new_zeros(B, H) if s is None else s for s in others)]
    save = required(x, *weights, *state) and not torch.compiler.is_exporting()  # what is exported seldom trains
    y, *rest = torch.ops.gpu_rnn.forward(name, x, *weights, state, reverse, backend or "auto", save)
    return y, tuple(rest[: len(state)])


@torch.library.custom_op("gpu_rnn::forward", mutates_args=())
def forward(
    cell: str, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, state: list[Tensor], reverse: bool, backend: str, save: bool,
) -> list[Tensor]:  # fmt: skip
    """-> y, states after, and the tape if it is to be saved."""
    problem, chosen = asked(cell, x, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), state, reverse, backend, save)
    with uncast(x):
        y, last, tape = chosen.forward(
            problem.cell, x, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), tuple(state), reverse=reverse, save=save
        )
    return [y, *last, *tape]


@forward.register_fake
def _(cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, state, reverse, backend, save):
    problem, chosen = asked(cell, x, Weights(w_ih, w_hh, b_ih, b_hh, w_hr), state, reverse, backend, save)
    T, B = x.shape[:2]
    y = x.new_empty(T, B, w_hh.shape[1])
    return [y, *(x.new_empty(initial.shape) for initial in state), *(tape_like(chosen, problem, x) if save else ())]


@torch.library.custom_op("gpu_rnn::backward", mutates_args=())
def backward(
    cell: str, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, state: list[Tensor], doutputs: list[Tensor], recorded: list[Tensor],
    reverse: bool, backend: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of x, the weights and the states, those in `needs`. `recorded` is y and the tape."""
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
    problem, chosen = asked(cell, x, weights, state, reverse, backend, True)
    with uncast(x):
        gradients = Gradient.forward(chosen, problem, tuple(needs), x, *weights, *state, *doutputs, *recorded)
    return [gradient.contiguous() for gradient in gradients]


@backward.register_fake
def _(cell, x, w_ih, w_hh, b_ih, b_hh, w_hr, state, doutputs, recorded, reverse, backend, needs):
    given = (x, w_ih, w_hh, b_ih, b_hh, w_hr, *state)
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(given, needs) if needed]


def asked(
    cell: str, x: Tensor, weights: Weights, state: list[Tensor], reverse: bool, backend: str, training: bool
) -> tuple[Problem, ModuleType]:
    if forward_ad._current_level >= 0:  # torch would take the outputs for constants
        raise NotImplementedError(
            "gpu_rnn has forward mode (jvp) in eager mode only, not in torch.compile or its operators"
        )
    initial = dict(zip((letter + "0" for letter in cells.get(cell).states), state, strict=True))
    problem, _ = checked(cell, x, weights, initial, reverse, training)
    return problem, dispatch.choose(problem, backend)


def tape_like(backend: ModuleType, problem: Problem, x: Tensor) -> list[Tensor]:
    """Empty tensors of the shapes, dtypes and strides of a backend's tape."""
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    real = getattr(torch, arrays.real_dtype(x))
    if backend.NAME == "numpy":
        rows = (T, cell.K, B, H) if B == 1 else (cell.K, T, B, H)
        saved = x.new_empty(rows, dtype=real)
        others = [x.new_empty(T, B, H, dtype=real) for _ in cell.states[1:]]
        shown = x.new_empty(T, B, H, dtype=real)
        return [saved.transpose(0, 1) if B == 1 else saved, *others, *([] if problem.P is None else [shown])]
    tape = [x.new_empty(T, B, cell.K, H), x.new_empty(T + 1, cell.S - 1, B, H, dtype=real)]
    return tape if problem.P is None else [*tape, x.new_empty(T, B, H)]


def keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, *given, state, ctx.reverse, ctx.backend, ctx.saved = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *state, output[0], *output[1 + len(state) :])


def pull(ctx: Any, arriving: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors
    S = cells.get(ctx.cell).S
    n = FIRST_STATE + S
    given, recorded = saved[:n], saved[n:]
    outputs = (recorded[0], *given[FIRST_STATE:])
    doutputs = [torch.zeros_like(a) if d is None else d for a, d in zip(outputs, arriving)]
    _, *needs, of_states, _, _, _ = ctx.needs_input_grad
    needs = [*needs, *of_states]
    gradients = torch.ops.gpu_rnn.backward(
        ctx.cell, *given[:FIRST_STATE], given[FIRST_STATE:], doutputs, recorded, ctx.reverse, ctx.backend, needs
    )
    found = list(spread(gradients, needs))
    return None, *found[:FIRST_STATE], found[FIRST_STATE:], None, None, None


forward.register_autograd(pull, setup_context=keep)
