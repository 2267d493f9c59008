"""What stands in torch's graph: the autograd.Function of a call, and that of its gradient.

RNNFunction          runs of a call -> y, the states after, their history. First derivatives are the backend's.
RNNBackwardFunction  its gradient, where that is differentiated again: by `derivatives`

Where a TorchDispatchMode is active, a graph from before computes its gradients by an operator, which the mode sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends import dispatch
from ..backends.call_cache import CachedCall
from ..backends.protocol import Backend
from ..core import arrays
from ..core.flat_runs import FlatRuns, chunks
from ..core.problem import Grads, Problem, Result, Run, with_zeros
from .derivatives import jvp, no_autocast, reference, reference_gradient, scatter, vjp
from .torch_private import (
    fast_apply,
    in_forward_mode,
    in_transform,
    is_legacy_batched,
    is_profiler_enabled,
    num_dispatch_modes,
    over_legacy_vmap,
)


def forward(backend: Backend, problem: Problem, runs: Sequence[Run]) -> list[Result]:
    """`Backend.forward`, in a range of torch.profiler where that is on, under emit_nvtx an NVTX range."""
    if not is_profiler_enabled():
        return backend.forward(problem, runs)
    with torch.profiler.record_function(dispatch.call_name(backend, problem, backward=False)):
        return backend.forward(problem, runs)


def backward(
    call: CachedCall, needs: Sequence, tensors: Sequence, grads: Sequence, saved: Sequence[Tensor]
) -> list[Tensor]:
    """The needed gradients of the tensors. grads: of the outputs. saved: of each run y and what it saved, or none."""
    backend, problem, layout = call.backend, call.problem, call.layout
    S, n, names = problem.cell.S, layout.n, layout.needs(needs)
    runs = layout.unflatten(tensors)
    run_grads = [Grads(dy, tuple(rest[:S]), tuple(rest[S:])) for dy, *rest in chunks(grads, n)]
    args: Any = backend, problem, runs, chunks(saved, n), run_grads, names
    if not is_profiler_enabled():
        return layout.select(dispatch.backward(*args), needs)
    with torch.profiler.record_function(dispatch.call_name(backend, problem, backward=True)):
        return layout.select(dispatch.backward(*args), needs)


def backward_op(
    call: CachedCall, needs: Sequence, tensors: Sequence, grads: Sequence, saved: Sequence[Tensor]
) -> list[Tensor]:
    """`backward` as the operator of `custom_ops`, which stands above this module, and takes states [B, .] alone."""
    problem, layout = call.problem, call.layout
    runs = [run._replace(state=[s.flatten(0, -2) for s in run.state]) for run in layout.unflatten(tensors)]
    flat_grads: list[Tensor | None] = []
    for dy, *rest in chunks(grads, layout.n):
        flat_grads += [dy, *(d.flatten(0, -2) for d in rest[: layout.S]), *rest[layout.S :]]
    gradients = torch.ops.gpu_rnn.backward(
        problem.cell.name, layout.flatten(runs), " ".join(layout.names), flat_grads, saved,
        [*map(int, layout.reverse)], layout.linked, call.backend.NAME, "tf32" if problem.tf32 else "ieee",
        problem.step_exact, problem.heads, problem.history, [*map(int, needs)],
    )  # fmt: skip
    return [d.reshape(t.shape) for d, t in zip(gradients, (t for t, need in zip(tensors, needs) if need))]


Outputs = list[tuple[Tensor, tuple]]  # of each run y, and the states after, then their history if there is one


def torch_state(x: Tensor) -> tuple[bool, str | None]:
    """The settings of torch that decide on a call."""
    return torch.is_grad_enabled(), arrays.default_precision(x) if x.is_cuda else None


def run_cached(call: CachedCall, runs: Sequence[Run]) -> Outputs:
    """Run a call by what was decided for it. States may be None, for zeros."""
    runs = with_zeros(runs, call.zeros, runs[0].x.new_zeros)
    results = forward(call.backend, call.problem, runs)
    if not call.requires_grad:
        return [(y, last + history) for y, last, history, _ in results]
    outputs = fast_apply(RNNFunction, call, results, *call.layout.flatten(runs))
    return [(y, tuple(last)) for y, *last in chunks(outputs, call.layout.n)]


class RNNFunction(Function):
    """call, results, tensors -> of each run its outputs.

    results: those of the call, computed already; None where a transform is active, which wants to see them computed:
    then what was saved is among the outputs of each run, too. It is only read, so that backward can run again.
    """

    @staticmethod
    def forward(call: CachedCall, results: list[Result] | None, *tensors: Tensor) -> tuple:
        saved_too = results is None
        if results is None:
            results = forward(call.backend, call.problem, call.layout.unflatten(tensors))
        outputs: list[Tensor] = []
        for y, last, history, saved in results:
            outputs += (y, *last, *history, *(saved if saved_too else ()))
        return tuple(outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple) -> None:
        ctx.call, results, *tensors = inputs
        parts, m = chunks(outputs, ctx.call.layout.n), ctx.call.problem.outputs
        if results is None:
            activations = [part[m:] for part in parts]
            ctx.mark_non_differentiable(*(tensor for of_run in activations for tensor in of_run))
        else:
            activations = [result.saved for result in results]
        saved = [t for part, of_run in zip(parts, activations) for t in saved_for_backward(part[0], of_run)]
        ctx.num_saved = len(parts[0]) - m
        ctx.set_materialize_grads(False)  # or what was saved would be sent zeros of its size
        ctx.size = len(tensors)
        ctx.save_for_backward(*without_casts(tensors), *saved)
        if in_forward_mode():
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if is_legacy_batched(grads):
            return over_legacy_vmap(RNNFunction.backward, ctx, *grads)
        call, (*flat,), needs = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[2:]
        tensors, saved = with_casts(flat[: ctx.size]), flat[ctx.size :]
        m = call.problem.outputs
        filled = fill_zeros(call.layout, tensors, [part[:m] for part in chunks(grads, call.layout.n)])
        if torch.is_grad_enabled() or in_transform():
            gradients = fast_apply(RNNBackwardFunction, call, needs, *tensors, *filled, *saved)
        else:
            run = backward_op if num_dispatch_modes() else backward
            gradients = run(call, needs, tensors, filled, saved)
        return None, None, *scatter(gradients, needs)

    @staticmethod
    def jvp(ctx: Any, _call: None, _results: None, *tangents: Tensor | None) -> tuple:
        output_tangents = jvp(
            partial(reference, ctx.call.problem, ctx.call.layout), ctx.saved_tensors[: ctx.size], tangents
        )
        nothing = [None] * ctx.num_saved
        return tuple([d for part in chunks(output_tangents, ctx.call.layout.n) for d in (*part, *nothing)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: CachedCall, results: None, *tensors: Tensor) -> tuple:
        dims, V, layout = in_dims[2:], info.batch_size, call.layout
        if cannot_fold(call.problem, layout, dims):
            return loop_over_vmap(V, partial(RNNFunction.apply, call, None), dims, tensors)
        outputs = RNNFunction.apply(with_batch(call, V), None, *fold_vmap(V, dims, tensors, layout))
        m = call.problem.outputs  # without what was saved, which is the backend's own and can't be unfolded
        return unfold_vmap(V, [tensor for part in chunks(outputs, layout.n) for tensor in part[:m]])


class RNNBackwardFunction(Function):
    """call, needs, tensors, grads, saved -> the needed gradients of the tensors. Without `saved` it is recomputed."""

    @staticmethod
    def forward(call: CachedCall, needs: Sequence, *rest: Any) -> tuple:
        n = len(needs)
        end = n + call.layout.n * call.problem.outputs
        # A transform of torch.func that has ended leaves wrappers, which have no memory of their own.
        unwrapped = [None if tensor is None else tensor.detach() for tensor in rest]
        run = backward_op if num_dispatch_modes() and not in_transform() else backward
        return tuple(run(call, needs, unwrapped[:n], unwrapped[n:end], unwrapped[end:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple) -> None:
        ctx.call, ctx.needs, *rest = inputs
        end = len(ctx.needs) + ctx.call.layout.n * ctx.call.problem.outputs
        ctx.num_saved = len(rest) - end  # it follows from the others: what depends on it is counted there
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*rest[:end])
        if in_forward_mode():
            ctx.save_for_forward(*rest[:end])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        if is_legacy_batched(grads):
            return over_legacy_vmap(RNNBackwardFunction.backward, ctx, *grads)
        inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 : 2 + len(inputs)]
        gradients = differentiate_again(ctx.call, ctx.needs, needs, inputs, grads)
        return None, None, *scatter(gradients, needs), *[None] * ctx.num_saved

    @staticmethod
    def jvp(ctx: Any, _call: None, _needs: Any, *tangents: Tensor | None) -> tuple:
        inputs = ctx.saved_tensors
        gradient = partial(reference_gradient, ctx.call.problem, ctx.call.layout, ctx.needs)
        return jvp(gradient, inputs, tangents[: len(inputs)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: CachedCall, needs: Sequence, *rest: Any) -> tuple:
        dims, V, layout, n = in_dims[2:], info.batch_size, call.layout, len(needs)
        if cannot_fold(call.problem, layout, dims[:n]) or any(names - {"x"} for names in layout.needs(needs)):
            # of weights of their own, or with gradients of their own
            return loop_over_vmap(V, partial(RNNBackwardFunction.apply, call, needs), dims, rest)
        end = n + layout.n * call.problem.outputs
        tensors = fold_vmap(V, dims[:n], rest[:n], layout)
        grads = [fold(V, d, dim) for d, dim in zip(rest[n:end], dims[n:end])]
        gradients = RNNBackwardFunction.apply(with_batch(call, V), needs, *tensors, *grads)
        return unfold_vmap(V, gradients)


def differentiate_again(
    call: CachedCall, needs: Sequence, needs_again: Sequence, inputs: Sequence, grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The gradients of `backward`'s tensors and grads (inputs), from those of the gradients that it gave."""
    differentiated = [tensor for tensor, need in zip(inputs, needs) if need]
    filled = tuple([torch.zeros_like(a) if d is None else d for a, d in zip(differentiated, grads)])
    with no_autocast(inputs[0]):
        _, pullback = vjp(partial(reference_gradient, call.problem, call.layout, needs), inputs, needs_again)
        return pullback(filled)


def saved_for_backward(y: Tensor, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a graph keeps of a run besides its tensors: y is of no use without saved activations."""
    return (y, *activations) if activations else ()


def without_casts(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What a graph keeps of a call: for a weight that autocast has cast its parameter, of which calls in turn, as of a
    cell at every time step, keep one and not a copy each."""
    return [getattr(tensor, "cast_of", tensor) for tensor in tensors]


def with_casts(kept: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a call, all of x's dtype again."""
    dtype = kept[0].dtype
    return [t if t.dtype == dtype or not t.is_floating_point() else t.to(dtype) for t in kept]


def fill_zeros(layout: FlatRuns, tensors: Sequence[Tensor], grads: Sequence[Sequence[Tensor | None]]) -> list:
    """The gradients of all outputs with zeros for None; but that of a y under another layer may stay None."""
    (T, B, _), filled, x = tensors[0].shape, [], tensors[0]
    for k, ((dy, *rest), entries) in enumerate(zip(grads, layout.split(tensors))):
        state = entries[-layout.S :]
        if dy is None and not (layout.linked and k < layout.n - 1):
            dy = x.new_zeros(T, B, state[0].shape[-1])
        filled.append(dy)
        shapes = [*(initial.shape for initial in state), *[(T, B, state[-1].shape[-1])] * (len(rest) - layout.S)]
        filled += [x.new_zeros(shape) if d is None else d for shape, d in zip(shapes, rest)]
    return filled


# ---- vmap -----------------------------------------------------------------------------------------------------------
# Members with the same weights become one larger batch. With weights of their own, or gradients of these, each is a
# call: the kernels have one set of weights.


def has_mapped_weights(layout: FlatRuns, dims: Sequence) -> bool:
    return any(d is not None for _, *entries in layout.split(dims) for d in entries[: len(layout.names)])


def cannot_fold(problem: Problem, layout: FlatRuns, dims: Sequence) -> bool:
    """Whether members have more of their own than x and states."""
    return bool(problem.cell.E) or problem.history or has_mapped_weights(layout, dims)


def with_batch(call: CachedCall, V: int) -> CachedCall:
    """The call with V times the batch."""
    return replace(call, problem=call.problem.variant(B=V * call.problem.B))


def loop_over_vmap(V: int, run: Callable, dims: Sequence, tensors: Sequence) -> tuple[tuple, tuple]:
    members = [run(*(t if dim is None else t.select(dim, v) for t, dim in zip(tensors, dims))) for v in range(V)]
    stacked = tuple(map(torch.stack, zip(*members)))
    return stacked, (0,) * len(stacked)


def fold(V: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Members [.., B, N] -> [.., V*B, N]."""
    if tensor is None:
        return None
    whole = tensor.expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    axis = whole.ndim - 3
    return whole.movedim(0, axis).flatten(axis, axis + 1)


def fold_vmap(V: int, dims: Sequence, tensors: Sequence, layout: FlatRuns) -> list[Tensor]:
    """The tensors of all runs with x and states of V*B rows."""
    folded: list[Any] = []
    N = len(layout.names)
    for (x, *rest), (dim, *rest_dims) in zip(layout.split(tensors), layout.split(dims)):
        folded += [] if x is None else [fold(V, x, dim)]
        folded += [*rest[:N], *(fold(V, t, d) for t, d in zip(rest[N:], rest_dims[N:]))]
    return folded


def unfold_vmap(V: int, tensors: Sequence[Tensor]) -> tuple[tuple, tuple]:
    """Tensors [.., V*B, N] -> [.., V, B, N] each, and the places of V."""
    places = tuple([tensor.ndim - 2 for tensor in tensors])
    return tuple([tensor.unflatten(place, (V, -1)) for tensor, place in zip(tensors, places)]), places
