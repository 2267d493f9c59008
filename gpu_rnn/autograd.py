"""The functions as torch's autograd, its transforms (torch.func) and its compiler see them.

Eager     `sequences`: two autograd.Functions, `Recorded` and its gradient `Gradient`, around the chosen backend;
          `Sequence`, in the place of `Recorded` where a transform looks on; and `Stack`, for the layers of a stack.
Captured  `captured`: two operators, gpu_rnn::forward and gpu_rnn::backward, for torch.compile and torch.export. They
          choose their backend when they run, and time stays inside of them. A program that torch.export saved needs
          this module imported before it is loaded. gpu_rnn::stack and gpu_rnn::stack_backward are for torch.compile.

First derivatives are the backend's. Second and higher ones, and forward mode, are torch's own, of `reference`: the
cell's page driven through time by torch's operations. Right for every cell and in every order, but slow.

Everywhere here `given` is (x, *weights, *state), in the order of `Weights`, with None for the weights there aren't.
"""

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from dataclasses import replace
from functools import partial, wraps
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import linear

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import operand_graph, step_graph
from gpu_rnn.kernels.mathematics import PRODUCT
from gpu_rnn.kernels.weave import HOLD

from . import arrays, dispatch
from .arguments import fitted, known, prepared
from .backends import phased
from .extra import Extra
from .problem import Direction, Options, Problem, Weights
from .woven import page

FIRST_STATE = 1 + len(Weights._fields)  # its place in `given`


def sequence(
    name: str, x: Tensor, weights: Weights, state: List[Tensor | None], options: Options
) -> tuple[Tensor, tuple]:
    """As `functional.sequence`, for tensors."""
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
    if options.recompute:  # which would not get the same bits again
        return None
    if capturing() or unreal(x):
        return None if torch.compiler.is_exporting() else captured_stack(name, x, layers, options)
    if transformed():
        return None
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


def above(x: Tensor, weights: Weights) -> Tensor:
    """Of the shape of what a layer above the first sees, without memory for it."""
    return x.new_empty(1).expand(*x.shape[:2], weights.w_hh.shape[1])


def unreal(x: Tensor) -> bool:
    """Whether a tensor has a shape alone: on the meta device, or of somebody who looks how much a model will take."""
    return x.is_meta or isinstance(x, FakeTensor)


def required(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for."""
    return transformed() or required(*tensors)


def transformed() -> bool:
    """Whether torch.func or forward mode looks on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ---- eager ----------------------------------------------------------------------------------------------------------


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
        given, dy, dlast, (y, *tape) = named(rest[:n]), rest[n], rest[n + 1 : end], rest[end:] or (None,)
        wanted = names_of(needs)
        return needed(dispatch.backward(backend, problem, *given, y, tuple(tape), dy, dlast, wanted), needs)

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
        kept = [*given]
        for y, last, tape in found:
            outputs += y, *last
            kept += taped(y, tape)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    @member_by_member
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        backend, problem, reverse = ctx.call
        n, N = len(reverse), len(reverse) * (FIRST_STATE + problem.cell.S)
        tensors = ctx.saved_tensors
        given, kept, needs = (parts(each, n) for each in (tensors[:N], tensors[N:], ctx.needs_input_grad[2:]))
        doutputs = [zero_filled(g[0], g[FIRST_STATE:], d) for g, d in zip(given, parts(arriving, n))]
        if torch.is_grad_enabled() or transformed():
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
        ctx.save_for_backward(x, *given, *[tensor for y, _, tape in found for tensor in taped(y, tape)])
        return tuple([tensor for y, last, _ in found for tensor in (y, *last)])

    @staticmethod
    @member_by_member
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple:
        backend, problem, n = ctx.backend, ctx.problem, ctx.n
        x, *tensors = ctx.saved_tensors
        N = n * (len(Weights._fields) + problem.cell.S)
        given, kept, doutputs = tensors[:N], parts(tensors[N:], n), parts(arriving, n)
        _, _, _, need_x, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or transformed():
            found = layer_after_layer(backend, problem, n, x, given, kept, doutputs, stack_needs(need_x, needs, n))
        else:
            found = stack_pulled(backend, problem, n, x, given, kept, doutputs, stack_needs(need_x, needs, n))
        (dx, *first), *others = found
        return None, None, None, dx, *first, *[each for _, *gradients in others for each in gradients]


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


def zero_filled(x: Tensor, state: List[Tensor], arriving: List[Tensor | None]) -> list[Tensor]:
    """The gradients of y, of the states after, and of other states' histories, with zeros for None."""
    T, B, _ = x.shape
    shapes = [(T, B, state[0].shape[-1]), *(initial.shape for initial in state)]
    shapes += [(T, B, state[-1].shape[-1])] * (len(arriving) - len(shapes))
    return [x.new_zeros(shape) if d is None else d for shape, d in zip(shapes, arriving)]


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


# ---- derivatives of any order ---------------------------------------------------------------------------------------


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
    outputs = []
    for t in range(len(x) - 1, -1, -1) if problem.reverse else range(len(x)):
        before, fixed = h, [value.to(real) for value in extra.at(cell, t, H)]
        drawn_at = t if cell.phases is None else phased.second(t, problem.reverse)
        random = [u.to(real) for u in extra.drawn(cell, drawn_at, problem.B, H)]
        ((seen,),) = operand_graph(cell).run(operations, h=[h], extra=[value[..., : h.shape[-1]] for value in fixed])
        (h, *others), _ = step_graph(cell).run(
            operations,
            x=[gate[t] for gate in projected],
            h=linear(seen, w_hh, b_hh).chunk(cell.G, -1),
            state=(h if w_hr is None else h.new_zeros(problem.B, H), *others),
            extra=[*fixed, *random],
        )
        if w_hr is not None:
            h = linear(h, w_hr)
            if HOLD in cell.flags:
                h = operations["where"](fixed[len(cell.units) + cell.flags.index(HOLD)], before, h)
        outputs.append((h, *others))
    y, *history = (torch.stack(state[::-1] if problem.reverse else state) for state in zip(*outputs))
    return tuple(output.to(x.dtype) for output in (y, h, *others, *(history if problem.history else ())))


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
for looked_up in (page, arrays.library_of.__wrapped__):  # what a capture needn't look into
    torch.compiler.assume_constant_result(looked_up)


def captured(name: str, directions: List[Direction], options: Options) -> list[tuple[Tensor, tuple]]:
    """As `sequences`, as one node of a graph."""
    given = [tensor for x, weights, state, _ in directions for tensor in (x, *there(x, weights, state))]
    precision, save = asked_now(given, options)
    names, reverse = names_in(directions[0].weights), [direction.reverse for direction in directions]
    found = torch.ops.gpu_rnn.forward(
        name, given, names, reverse, options.backend or "auto", precision, options.bitwise, options.history, save
    )
    S = len(directions[0].state)
    n = 1 + S + (S - 1) * options.history
    return [(outputs[0], tuple(outputs[1:n])) for outputs in parts(found, len(directions))]


def captured_stack(
    name: str, x: Tensor, layers: List[tuple[Weights, List[Tensor | None]]], options: Options
) -> list[tuple[Tensor, tuple]]:  # fmt: skip
    """As `stacked`, as one node of a graph."""
    (weights, state), n = layers[0], len(layers)
    given = [x, *[tensor for layer in layers for tensor in there(x, *layer)]]
    precision, save = asked_now(given, options)
    found = torch.ops.gpu_rnn.stack(name, given, names_in(weights), n, options.backend or "auto", precision, save)
    return [(outputs[0], tuple(outputs[1 : 1 + len(state)])) for outputs in parts(found, n)]


def there(x: Tensor, weights: Weights, state: List[Tensor | None]) -> list[Tensor]:
    """The weights there are, and the states, with zeros for None."""
    B, P = x.shape[1], weights.w_hh.shape[1]
    H = P if weights.w_hr is None else weights.w_hr.shape[1]
    filled = [x.new_zeros(B, H if k else P) if initial is None else initial for k, initial in enumerate(state)]
    return [*[weight for weight in weights if weight is not None], *filled]


def names_in(weights: Weights) -> str:
    return " ".join([field for field, weight in zip(Weights._fields, weights) if weight is not None])


def asked_now(given: List[Tensor], options: Options) -> tuple[str | None, bool]:
    """The precision that a capture decides on, and whether a tape is kept."""
    wanted = required(*given) and not torch.compiler.is_exporting()  # what is exported seldom trains
    precision, (x, *_) = options.precision, given
    if precision is None and wanted and x.is_cuda and x.dtype == torch.float32:
        precision = precision_now()
    return precision, wanted and not options.recompute


@torch.compiler.assume_constant_result
def precision_now() -> str:
    """The setting at the time of the capture: with the gradient's graph made, forward may not change its mind."""
    return arrays.torch_precision()


# Of both operators: `given` is of each direction in turn x, the weights there are, `names`, and the states; and so are
# all other lists.


@torch.library.custom_op("gpu_rnn::forward", mutates_args=())
def forward(
    cell: str, given: List[Tensor], names: str, reverse: List[bool], backend: str, precision: str | None,
    bitwise: bool, history: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """-> y, states after, their history if asked for, the tape if it is to be saved."""
    directions = apart_from(given, names, reverse)
    options = Options(False, backend, precision, history, bitwise=bitwise)
    chosen, problem = asked(known, cell, directions, options, save)
    with uncast(given[0]):
        found = dispatch.forwards(chosen, problem, directions)
    return [tensor for y, last, tape in found for tensor in (y, *last, *tape)]


@forward.register_fake
def _(cell, given, names, reverse, backend, precision, bitwise, history, save):
    directions = apart_from(given, names, reverse)
    chosen, problem = asked(
        fitted, cell, directions, Options(False, backend, precision, history, bitwise=bitwise), save
    )
    found = []
    for x, _, state, _ in directions:
        found.append(x.new_empty(problem.T, problem.B, problem.P or problem.H))
        found += [x.new_empty(initial.shape) for initial in state]
        found += [x.new_empty(problem.T, problem.B, problem.H) for _ in range(problem.outputs - 1 - len(state))]
        found += tape_like(chosen, problem, x) if save else ()
    return found


@torch.library.custom_op("gpu_rnn::backward", mutates_args=())
def backward(
    cell: str, given: List[Tensor], names: str, doutputs: List[Tensor], recorded: List[Tensor], reverse: List[bool],
    backend: str, precision: str | None, bitwise: bool, history: bool, needs: List[bool],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of what is given, those in `needs`. `recorded`: y and the tape, or nothing."""
    directions, n = apart_from(given, names, reverse), len(reverse)
    options = Options(False, backend, precision, history, bitwise=bitwise)
    chosen, problem = asked(known, cell, directions, options, True)
    fields = [0, *(1 + Weights._fields.index(name) for name in names.split())]
    all_needs = []
    for wanted in parts(needs, n):
        need = dict(zip(fields, wanted))
        all_needs.append((*(need.get(k, False) for k in range(FIRST_STATE)), *wanted[len(fields) :]))
    whole = [(x, *weights, *state) for x, weights, state, _ in directions]
    with uncast(given[0]):
        found = pulled(chosen, problem, reverse, all_needs, whole, parts(doutputs, n), parts(recorded, n))
    return [gradient.contiguous() for gradients in found for gradient in gradients]


@backward.register_fake
def _(cell, given, names, doutputs, recorded, reverse, backend, precision, bitwise, history, needs):
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(given, needs) if needed]


def apart_from(given: List[Tensor], names: str, reverse: List[bool]) -> list[Direction]:
    """The directions that are in a list of an operator."""
    fields = names.split()
    found = []
    for (x, *rest), r in zip(parts(given, len(reverse)), reverse):
        there = dict(zip(fields, rest))
        found.append(Direction(x, Weights(*map(there.get, Weights._fields)), tuple(rest[len(fields) :]), r))
    return found


def asked(
    judge: Callable[..., Problem], cell: str, directions: List[Direction], options: Options, save: bool
) -> tuple[dispatch.Backend, Problem]:
    """As `prepared`. `judge` is `known`, or `fitted` for symbolic sizes, which can't be looked up."""
    if forward_ad._current_level >= 0:  # torch would take the outputs for constants
        raise NotImplementedError(
            "gpu_rnn has forward mode (jvp) in eager mode only, not in torch.compile or its operators"
        )
    for x, weights, state, reverse in directions:
        given = tuple(map(arrays.described, (x, *weights, *state)))
        precision = options.precision or arrays.precision(x)
        more = options.history, len(directions), options.layers, options.bitwise
        problem = judge(cell, given, reverse, precision, save, *more)
    if problem.device == "meta":
        problem = replace(problem, device="cpu")  # which one it will be doesn't matter to shapes
    return dispatch.choose(problem, options.backend), problem


def tape_like(backend: dispatch.Backend, problem: Problem, x: Tensor) -> list[Tensor]:
    """Empty tensors of the shapes, dtypes and strides of a backend's tape."""
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    real = getattr(torch, arrays.real_dtype(x))
    if cell.phases is not None:
        return [x.new_empty(2 * T, B, H), *tape_like(backend, phased.run(problem), x)]
    if backend.NAME == "numpy":
        tape = [x.new_empty(T + 1, cell.K + cell.S - 1, H, B, dtype=real)]
        return tape if problem.P is None else [*tape, x.new_empty(T, H, B, dtype=real)]
    tape = [x.new_empty(T, B, cell.K, H), x.new_empty(T + 1, cell.S - 1, B, H, dtype=real)]
    return tape if problem.P is None else [*tape, x.new_empty(T, B, H)]


def keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, given, ctx.names, *ctx.options, _ = inputs
    (ctx.reverse, *_, history), S = ctx.options, cells.get(ctx.cell).S
    ctx.outputs = 1 + S + (S - 1) * history
    ctx.set_materialize_grads(False)
    found = parts(output, len(ctx.reverse))
    ctx.save_for_backward(*given, *[tensor for y, *rest in found for tensor in taped(y, rest[ctx.outputs - 1 :])])


def pull(ctx: Any, arriving: list[Tensor | None]) -> tuple:
    n, S = len(ctx.reverse), cells.get(ctx.cell).S
    size = 1 + len(ctx.names.split()) + S
    given, kept = ctx.saved_tensors[: n * size], ctx.saved_tensors[n * size :]
    doutputs = []
    for each, gradients in zip(parts(given, n), parts(arriving, n)):
        doutputs += zero_filled(each[0], each[-S:], gradients[: ctx.outputs])
    _, needs, _, *others = ctx.needs_input_grad
    found = torch.ops.gpu_rnn.backward(ctx.cell, given, ctx.names, doutputs, kept, *ctx.options, needs)
    return None, [*spread(found, needs)], None, *[None] * len(others)


forward.register_autograd(pull, setup_context=keep)


# The same of a stack: `given` is x, then of each layer in turn the weights there are, `names`, and the states. Which
# layers go at once is decided at run time, too.


@torch.library.custom_op("gpu_rnn::stack", mutates_args=())
def stack(
    cell: str, given: List[Tensor], names: str, layers: int, backend: str, precision: str | None, save: bool
) -> list[Tensor]:
    """-> y, states after and, if it is to be saved, the tape, of each layer."""
    x, whole = all_of(given, names, layers)
    chosen, problem = asked_of_stack(known, cell, x, whole, backend, precision, save)
    with uncast(x):
        found = dispatch.stack(chosen, problem, x, whole)
    return [tensor for y, last, tape in found for tensor in (y, *last, *tape)]


@stack.register_fake
def _(cell, given, names, layers, backend, precision, save):
    x, whole = all_of(given, names, layers)
    chosen, problem = asked_of_stack(fitted, cell, x, whole, backend, precision, save)
    found = []
    for _, state in whole:
        found += [x.new_empty(problem.T, problem.B, problem.H), *[x.new_empty(initial.shape) for initial in state]]
        found += tape_like(chosen, problem, x) if save else ()
    return found


@torch.library.custom_op("gpu_rnn::stack_backward", mutates_args=())
def stack_backward(
    cell: str, given: List[Tensor], names: str, doutputs: List[Tensor | None], recorded: List[Tensor], layers: int,
    backend: str, precision: str | None, needs: List[bool],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of what is given, those in `needs`. `recorded`: y and the tape of each layer."""
    x, whole = all_of(given, names, layers)
    chosen, problem = asked_of_stack(known, cell, x, whole, backend, precision, True)
    fields, S = [*map(Weights._fields.index, names.split())], problem.cell.S
    all_needs: list[bool] = []
    for wanted in parts(needs[1:], layers):
        need = dict(zip(fields, wanted))
        all_needs += [*(need.get(k, False) for k in range(len(Weights._fields))), *wanted[-S:]]
    tensors = [tensor for weights, state in whole for tensor in (*weights, *state)]
    wanted = stack_needs(needs[0], all_needs, layers)
    with uncast(x):
        found = stack_pulled(
            chosen, problem, layers, x, tensors, parts(recorded, layers), parts(doutputs, layers), wanted
        )
    (dx, *first), *others = found
    gradients = [dx, *first, *[each for _, *rest in others for each in rest]]
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


@stack_backward.register_fake
def _(cell, given, names, doutputs, recorded, layers, backend, precision, needs):
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(given, needs) if needed]


def all_of(given: List[Tensor], names: str, layers: int) -> tuple[Tensor, list[tuple[Weights, tuple]]]:
    """x, and weights and states of each layer."""
    x, *rest = given
    fields, whole = names.split(), []
    for each in parts(rest, layers):
        found = dict(zip(fields, each))
        whole.append((Weights(*map(found.get, Weights._fields)), tuple(each[len(fields) :])))
    return x, whole


def asked_of_stack(
    judge: Callable[..., Problem], cell: str, x: Tensor, layers: List[tuple[Weights, tuple]], backend: str,
    precision: str | None, save: bool,
) -> tuple[dispatch.Backend, Problem]:  # fmt: skip
    """As `asked`."""
    options, first = Options(False, backend, precision, layers=len(layers)), None
    for weights, state in layers:
        seen = above(x, weights) if first else x
        found = asked(judge, cell, [Direction(seen, weights, state, False)], options, save)
        first = first or found
    assert first is not None
    return first


def keep_stack(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, given, ctx.names, ctx.layers, *ctx.options, _ = inputs
    ctx.outputs = 1 + cells.get(ctx.cell).S
    ctx.set_materialize_grads(False)
    found = parts(output, ctx.layers)
    ctx.given = len(given)
    ctx.save_for_backward(*given, *[tensor for y, *rest in found for tensor in taped(y, rest[ctx.outputs - 1 :])])


def pull_stack(ctx: Any, arriving: list[Tensor | None]) -> tuple:
    given, kept = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
    doutputs = [gradient for each in parts(arriving, ctx.layers) for gradient in each[: ctx.outputs]]
    _, needs, *others = ctx.needs_input_grad
    found = torch.ops.gpu_rnn.stack_backward(
        ctx.cell, given, ctx.names, doutputs, kept, ctx.layers, *ctx.options, needs
    )
    return None, [*spread(found, needs)], *[None] * len(others)


stack.register_autograd(pull_stack, setup_context=keep_stack)
