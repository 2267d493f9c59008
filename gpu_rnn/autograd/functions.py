"""What stands in torch's graph: autograd.Functions around a backend.

Recorded   directions of a layer, whose results are there already
Sequence   one direction, in the place of `Recorded` where a transform (torch.func, forward mode) looks on
Stack      the layers of a stack
Gradient   the gradient of one direction, where it is differentiated again: by `derivatives`

Where a TorchDispatchMode looks on, a graph from before it computes its gradients by an operator that it sees.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import replace
from functools import partial, wraps
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from ..backends import dispatch
from ..core.problem import Direction, Problem, Weights
from .derivatives import (
    FIRST_STATE,
    named,
    observed,
    pushed,
    reference,
    reference_gradient,
    spread,
    transformed,
    uncast,
    vjp,
)


def member_by_member(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A `backward` for torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True), too.

    These map over gradients by torch's old vmap, for which an autograd.Function can't have a rule of its own.
    """

    @wraps(backward)
    def run(ctx: Any, *arriving: Tensor | None) -> tuple:
        mapped = [d is not None and is_legacy_batchedtensor(d) for d in arriving]
        if not any(mapped):
            return backward(ctx, *arriving)
        some = next(d for d, m in zip(arriving, mapped) if m)
        level = next(n for n in count(1) if not is_legacy_batchedtensor(torch._remove_batch_dim(some, n, 1, 0)))
        rows: list[Any] = [torch._remove_batch_dim(d, level, 1, 0) if m else d for d, m in zip(arriving, mapped)]
        V = next(len(d) for d, m in zip(rows, mapped) if m)
        found = [backward(ctx, *(d[v] if m else d for d, m in zip(rows, mapped))) for v in range(V)]
        return tuple(
            None if each[0] is None else torch._add_batch_dim(torch.stack(each), 0, level) for each in zip(*found)
        )

    return run


def backward(
    backend: dispatch.Backend, problem: Problem, needs: List[bool], given: List, doutputs: List[Tensor],
    kept: List[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> the gradients of those of `given` in `needs`. kept: y and the tape, or nothing."""
    if observed() and not transformed():  # by the operator of `operators`, which stands above this module
        there = [tensor for tensor in given if tensor is not None]
        need = [int(wanted) for wanted, tensor in zip(needs, given) if tensor is not None]
        names = " ".join(field for field, weight in zip(Weights._fields, given[1:FIRST_STATE]) if weight is not None)
        chosen = backend.NAME, "tf32" if problem.tf32 else "ieee", problem.step_exact, problem.history
        reverse = [int(problem.reverse)]
        found = torch.ops.gpu_rnn.backward(problem.cell.name, there, names, doutputs, kept, reverse, *chosen, need)
        return tuple(found)
    (y, *tape), (dy, *dlast) = kept or (None,), doutputs
    wanted = names_of(needs)
    found = dispatch.backward(backend, problem, *named(given), y, tuple(tape), dy, tuple(dlast), wanted)
    return needed(found, needs)


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
    def forward(backend: dispatch.Backend, problem: Problem, *given: Any) -> tuple:
        y, last, tape = dispatch.forward(backend, problem, *named(given))
        return y, *last, *tape

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend, ctx.problem, *given = inputs
        tape = output[ctx.problem.outputs :]
        ctx.tape = len(tape)
        ctx.mark_non_differentiable(*tape)
        ctx.set_materialize_grads(False)  # or the tape would be sent zeros of its size
        ctx.save_for_backward(*given, *taped(output[0], tape))
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*given)

    @staticmethod
    @member_by_member
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        saved = ctx.saved_tensors
        n = FIRST_STATE + ctx.problem.cell.S
        given = saved[:n]
        doutputs = zero_filled(given[0], given[FIRST_STATE:], arriving[: ctx.problem.outputs])
        needs = ctx.needs_input_grad[2:]
        run = Gradient.apply if torch.is_grad_enabled() or transformed() else Gradient.forward
        gradients = run(ctx.backend, ctx.problem, needs, *given, *doutputs, *saved[n:])
        return None, None, *spread(gradients, needs)

    @staticmethod
    def jvp(ctx: Any, _backend: None, _problem: None, *tangents: Tensor | None) -> tuple:
        return *pushed(partial(reference, ctx.problem), ctx.saved_tensors, tangents), *[None] * ctx.tape

    @staticmethod
    def vmap(info: Any, in_dims: tuple, backend: dispatch.Backend, problem: Problem, *given: Any) -> tuple:
        dims, V = in_dims[2:], info.batch_size
        if any_of(dims[1:FIRST_STATE]) or apart(problem):
            return members(V, partial(Sequence.apply, backend, problem), dims, given)
        outputs = Sequence.apply(backend, problem, *folded(V, dims, given))[: problem.outputs]
        return unfolded(V, outputs)  # without the tape, which is the backend's own and can't be unfolded


class Gradient(Direct):
    """The gradient of `Sequence`: given, gradients of y and the states after, y, tape -> gradients of those in `needs`.

    Without y and tape these are computed anew.
    """

    @staticmethod
    def forward(backend: dispatch.Backend, problem: Problem, needs: tuple, *rest: Any) -> tuple:
        n = FIRST_STATE + problem.cell.S
        end = n + problem.outputs
        return backward(backend, problem, needs, rest[:n], rest[n:end], rest[end:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, ctx.problem, ctx.needs, *rest = inputs
        n = FIRST_STATE + ctx.problem.cell.S + ctx.problem.outputs
        ctx.recorded = len(rest) - n  # y and the tape follow from the others: what depends on them is counted there
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest[:n])
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*rest[:n])

    @staticmethod
    @member_by_member
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
    def vmap(info: Any, in_dims: tuple, backend: dispatch.Backend, problem: Problem, needs: tuple, *rest: Any) -> tuple:
        dims, V = in_dims[3:], info.batch_size
        run = partial(Gradient.apply, backend, problem, needs)
        if (
            any_of(dims[1:FIRST_STATE]) or apart(problem) or any(needs[1:FIRST_STATE])
        ):  # weights' gradients of their own
            return members(V, run, dims, rest)
        n = FIRST_STATE + problem.cell.S
        doutputs = folded(V, dims[n:], rest[n : n + 1 + problem.cell.S], states=1)
        gradients = run(*folded(V, dims, rest[:n]), *doutputs)
        return unfolded(V, gradients, sequences=needs[0])


class Recorded(Function):
    """What was found for directions of a layer, with its gradient: given of each in turn -> y, states after, of each in
    turn. A state may have an axis of layers before, [1, B, .], where the backend takes that.

    Not where a transform looks on. What is differentiated again goes through each direction's `Gradient`.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[dispatch.Backend, Problem, List[bool]], found: List, *given: Any) -> tuple:
        outputs: list[Tensor] = []
        saved = to_save(given)
        for y, last, tape in found:
            outputs += y, *last
            saved += taped(y, tape)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @member_by_member
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        backend, problem, reverse = ctx.call
        n, N = len(reverse), len(reverse) * (FIRST_STATE + problem.cell.S)
        tensors = ctx.saved_tensors
        whole = from_saved(tensors[0], tensors[:N]), tensors[N:], ctx.needs_input_grad[2:]
        given, kept, needs = (parts(each, n) for each in whole)
        doutputs = [zero_filled(g[0], g[FIRST_STATE:], d) for g, d in zip(given, parts(arriving, n))]
        if torch.is_grad_enabled() or observed():
            found: list[Any] = []
            for r, wanted, *each in zip(reverse, needs, given, doutputs, kept):
                found.append(differentiable(backend, replace(problem, reverse=r, directions=1), wanted, *each))
        else:
            found = pulled(backend, problem, reverse, needs, given, doutputs, kept)
        gradients = [each for gradients, wanted in zip(found, needs) for each in spread(gradients, wanted)]
        return None, None, *gradients


record = super(Function, Recorded).apply  # torch's own looks for transforms and binds defaults, which takes its time


def recorded(
    backend: dispatch.Backend, problem: Problem, directions: List[Direction], found: List[tuple[Tensor, tuple, tuple]]
) -> list[tuple[Tensor, tuple]]:
    """y and the states after, of each direction, with their gradients. `found`: these, and the tapes."""
    reverse = [direction.reverse for direction in directions]
    given = [tensor for x, weights, state, _ in directions for tensor in (x, *weights, *state)]
    outputs = record((backend, problem, reverse), found, *given)
    return [(each[0], tuple(each[1:])) for each in parts(outputs, len(directions))]


def differentiable(
    backend: dispatch.Backend, problem: Problem, needs: List[bool], given: List, doutputs: List, kept: List
) -> list[Tensor]:
    """`Gradient` of one direction, whose states may have an axis of layers."""
    first, S = FIRST_STATE, problem.cell.S
    state, dlast = ([each.flatten(0, -2) for each in many] for many in (given[first:], doutputs[1 : 1 + S]))
    arriving = doutputs[0], *dlast, *doutputs[1 + S :]
    gradients = Gradient.apply(backend, problem, needs, *given[:first], *state, *arriving, *kept)
    wanted = [tensor for tensor, need in zip(given, needs) if need]
    return [d if d.shape == tensor.shape else d.reshape(tensor.shape) for d, tensor in zip(gradients, wanted)]


class Stack(Direct):
    """The layers of a stack: x, then weights and states of each in turn -> y, states after, of each in turn.

    What is differentiated again goes through each one's `Gradient`, from the top down. Every y is an output, that of a
    lower layer for this alone: there it is what the layer above depends on.
    """

    @staticmethod
    def forward(ctx: Any, backend: dispatch.Backend, problem: Problem, n: int, x: Tensor, *given: Any) -> tuple:
        found = dispatch.stack(backend, problem, x, layers_of(given, n))
        ctx.backend, ctx.problem, ctx.n = backend, problem, n
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *to_save(given), *[tensor for y, _, tape in found for tensor in taped(y, tape)])
        return tuple([tensor for y, last, _ in found for tensor in (y, *last)])

    @staticmethod
    @member_by_member
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        backend, problem, n = ctx.backend, ctx.problem, ctx.n
        x, *tensors = ctx.saved_tensors
        N = n * (len(Weights._fields) + problem.cell.S)
        given, kept, doutputs = from_saved(x, tensors[:N]), parts(tensors[N:], n), parts(arriving, n)
        _, _, _, need_x, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or observed():
            found = layer_after_layer(backend, problem, n, x, given, kept, doutputs, stack_needs(need_x, needs, n))
        else:
            found = stack_pulled(backend, problem, n, x, given, kept, doutputs, stack_needs(need_x, needs, n))
        (dx, *first), *others = found
        return None, None, None, dx, *first, *[each for _, *gradients in others for each in gradients]


def above(x: Tensor, weights: Weights) -> Tensor:
    """Of the shape of what a layer above the first sees, without memory for it."""
    return x.new_empty(1).expand(*x.shape[:2], weights.w_hh.shape[1])


def layers_of(given: List, n: int) -> list[tuple[Weights, tuple]]:
    """As backends take them."""
    N = len(Weights._fields)
    return [(Weights(*each[:N]), tuple(each[N:])) for each in parts(given, n)]


def stack_needs(need_x: bool, needs: List[bool], n: int) -> list[tuple[bool, ...]]:
    """Of each layer, in the order of `given`: its input is needed where something below is."""
    found, below = [], need_x
    for each in parts(needs, n):
        found.append((below, *each))
        below = below or any(each)
    return found


def stack_pulled(
    backend: dispatch.Backend, problem: Problem, n: int, x: Tensor, given: List, kept: List[List],
    doutputs: List[List[Tensor | None]], needs: List[tuple[bool, ...]],
) -> list[list[Tensor | None]]:  # fmt: skip
    """The gradients of each layer's `given`, by `dispatch.stack_back`."""
    layers, arriving = layers_of(given, n), []
    for (_, state), (dy, *dlast) in zip(layers, doutputs):
        arriving.append((dy, tuple(torch.zeros_like(h) if d is None else d for h, d in zip(state, dlast))))
    tapes, names = [(y, tuple(tape)) for y, *tape in kept], [*map(names_of, needs)]
    found = dispatch.stack_back(backend, problem, x, layers, tapes, arriving, names)
    below = [need and k == 0 for k, (need, *_) in enumerate(needs)]  # of the others x stays within the stack
    needs = [(need, *each) for need, (_, *each) in zip(below, needs)]
    return [[*spread(needed(gradients, each), each)] for gradients, each in zip(found, needs)]


def layer_after_layer(
    backend: dispatch.Backend, problem: Problem, n: int, x: Tensor, given: List, kept: List[List],
    doutputs: List[List[Tensor | None]], needs: List[tuple[bool, ...]],
) -> list[list[Tensor | None]]:  # fmt: skip
    """The same, differentiable."""
    found: list[list[Tensor | None]] = [[None] * len(each) for each in needs]
    from_above = None
    for k in reversed(range(n)):
        if not any(needs[k]):
            break
        seen, each, (dy, *dlast) = kept[k - 1][0] if k else x, parts(given, n)[k], doutputs[k]
        if from_above is not None:
            dy = from_above if dy is None else dy + from_above
        filled = zero_filled(seen, each[len(Weights._fields) :], [dy, *dlast])
        gradients = Gradient.apply(backend, problem.layer(k), needs[k], seen, *each, *filled, *kept[k])
        from_above, *_ = found[k] = [*spread(gradients, needs[k])]
    return found


def pulled(
    backend: dispatch.Backend, problem: Problem, reverse: List[bool], needs: List[List[bool]], given: List[List],
    doutputs: List[List], kept: List[List],
) -> list[tuple]:  # fmt: skip
    """`Gradient.forward` of several directions."""
    directions = [Direction(*named(each), r) for each, r in zip(given, reverse)]
    tapes = [(k[0], tuple(k[1:])) if k else (None, ()) for k in kept]
    arriving = [(d[0], tuple(d[1:])) for d in doutputs]
    found = dispatch.backwards(backend, problem, directions, tapes, arriving, [*map(names_of, needs)])
    return [*map(needed, found, needs)]


def parts(tensors: List, n: int) -> list[List]:
    """What n directions have in turn, of each."""
    size = len(tensors) // n
    return [tensors[k * size : (k + 1) * size] for k in range(n)]


def names_of(needs: List[bool]) -> set[str]:
    return {name for name, need in zip(("x", *Weights._fields), needs) if need}


def needed(gradients: dict[str, Any], needs: List[bool]) -> tuple[Tensor, ...]:
    """A backend's gradients, those that are needed in the order of `given`."""
    found = [*(gradients.get(name) for name in ("x", *Weights._fields)), *gradients["state"]]
    return tuple(gradient for gradient, need in zip(found, needs) if need)


def taped(y: Tensor, tape: List[Tensor]) -> tuple[Tensor, ...]:
    """What is kept for `Gradient` beside `given`: y is of no use without the tape."""
    return (y, *tape) if tape else ()


def to_save(given: List[Tensor | None]) -> list[Tensor | None]:
    """What a graph keeps of `given`: for a weight that autocast has cast its parameter, of which calls in turn, as of a
    cell at every time step, keep one and not a copy each."""
    return [getattr(tensor, "cast_of", tensor) for tensor in given]


def from_saved(x: Tensor, saved: List[Tensor | None]) -> list[Tensor | None]:
    """`given`, all of the dtype of x again."""
    return [t.to(x.dtype) if t is not None and t.is_floating_point() else t for t in saved]


def zero_filled(x: Tensor, state: List[Tensor], arriving: List[Tensor | None]) -> list[Tensor]:
    """The gradients of y, of the states after, and of other states' histories, with zeros for None."""
    T, B, _ = x.shape
    shapes = [(T, B, state[0].shape[-1]), *(initial.shape for initial in state)]
    shapes += [(T, B, state[-1].shape[-1])] * (len(arriving) - len(shapes))
    return [x.new_zeros(shape) if d is None else d for shape, d in zip(shapes, arriving)]


# ---- vmap -----------------------------------------------------------------------------------------------------------
# Members with the same weights are more rows of one batch. With weights of their own, or gradients of these, each is a
# call: the kernels have one set of weights.


def any_of(dims: Iterable[int | None]) -> bool:
    return any(dim is not None for dim in dims)


def apart(problem: Problem) -> bool:
    """Whether a call has more that belongs to batch rows than x and states."""
    return bool(problem.cell.E) or problem.history


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
