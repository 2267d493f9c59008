"""A layer as one node of a graph that torch.compile, torch.export, torch.jit.trace or make_fx captures.

Two operators, gpu_rnn::forward and gpu_rnn::backward, choose their backend when they run, and the time loop stays
inside of them. In both, `tensors` are those of the call's runs, flat, as `FlatRuns` says of `names`, `reverse` and
`linked`: the directions of a layer, or the layers of a stack.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.kernels import cells

from ..backends import dispatch
from ..backends.call_cache import CachedCall, lookup
from ..core import arrays
from ..core.flat_runs import FlatRuns, chunks
from ..core.problem import Options, Run
from ..core.validation import validate
from ..modifiers.apply import cell_info, held_flags
from . import functions
from .derivatives import may_need_grad, no_autocast, scatter
from .functions import fill_zeros, fold, fold_vmap, has_mapped_weights, saved_for_backward, unfold_vmap
from .torch_private import Operator, constant_when_captured, in_forward_mode, is_observed, operator

TENSORS, GRADS = 1, 3  # places of arguments

for looked_up in (cell_info, arrays.library_of_class):
    constant_when_captured(looked_up)  # a capture needn't look into it


def is_exporting() -> bool:
    """Whether the recorded program is for elsewhere."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@constant_when_captured
def is_exporting_to_onnx() -> bool:
    """Whether torch.onnx.export captures. Dynamo takes torch's own function for False."""
    return torch.onnx.is_in_onnx_export()


def refuse_if_observed(what: str, instead: str) -> None:
    """Raise where a tracer or a transform sees a call that computes at once, out of their sight."""
    if is_observed():
        raise NotImplementedError(
            f"{what} computes at once, out of sight of torch's tracers and transforms (torch.jit.trace, make_fx, "
            f"torch.func, vmap), of which one is active; {instead}"
        )


def refuse_torchscript_onnx() -> None:
    """Raise NotImplementedError within torch.onnx.export(dynamo=False)."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "torch.onnx.export(dynamo=False) has no ONNX operator for gpu_rnn's layers: export with dynamo=True, which "
            "writes ONNX's own, or gpu_rnn.restore_(model) first, which puts torch.nn's layers there"
        )


def call_op(name: str, runs: Sequence[Run], options: Options, linked: bool = False) -> list[tuple[Tensor, tuple]]:
    """As `eager.run`, as one node of a graph."""
    refuse_torchscript_onnx()
    x = runs[0].x
    filled = [run._replace(state=fill_states(x, run, options.heads)) for run in runs]
    layout = FlatRuns.of(filled, linked)
    tensors = layout.flatten(filled)
    precision, save = compile_time_options(tensors, options)
    outputs = torch.ops.gpu_rnn.forward(
        name, tensors, " ".join(layout.names), [int(run.reverse) for run in runs], linked, options.backend or "auto",
        precision, options.step_exact, options.heads, options.history, save,
    )  # fmt: skip
    n = 1 + layout.S + (layout.S - 1) * options.history
    return [(part[0], tuple(part[1:n])) for part in chunks(outputs, layout.n)]


def fill_states(x: Tensor, run: Run, heads: int) -> list[Tensor]:
    """The states of a run, zeros for None."""
    weights, B = run.weights, x.shape[1]
    P = weights.w_hh.shape[1] * heads
    H = P if weights.w_hr is None else weights.w_hr.shape[1]
    return [x.new_zeros(B, H if k else P) if state is None else state for k, state in enumerate(run.state)]


def compile_time_options(tensors: Sequence[Tensor], options: Options) -> tuple[str | None, bool]:
    """The precision that a capture decides on, and whether activations are saved."""
    needed = may_need_grad(*tensors) and not is_exporting()  # what is exported seldom trains
    precision, x = options.precision, tensors[0]
    if precision is None and needed and x.is_cuda and x.dtype == torch.float32:
        precision = precision_now()
    return precision, needed and not options.recompute


@constant_when_captured
def precision_now() -> str:
    """The setting at the time of the capture: with the gradient's graph made, forward may not change its mind."""
    return arrays.torch_precision()


# Flags in lists are ints, since torch.jit.trace takes no list of bools.


@operator("gpu_rnn::forward")
def forward(
    cell: str, tensors: Sequence[Tensor], names: str, reverse: Sequence[int], linked: bool, backend: str,
    precision: str | None, step_exact: bool, heads: int, history: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """-> of each run y, states after, their history if there is one, what is saved for backward."""
    layout = layout_of(cell, names, reverse, linked)
    runs, options = unflatten(layout, tensors), options_of(backend, precision, step_exact, heads, history)
    call = find_call(cell, layout, runs, options, save)
    with no_autocast(tensors[0]):
        results = functions.forward(call.backend, call.problem, runs)
    return [tensor for y, last, past, saved in results for tensor in (y, *last, *past, *saved)]


@forward.register_fake
def _(cell, tensors, names, reverse, linked, backend, precision, step_exact, heads, history, save):
    layout, x = layout_of(cell, names, reverse, linked), tensors[0]
    runs = unflatten(layout, tensors)
    call = make_call(cell, layout, runs, options_of(backend, precision, step_exact, heads, history), save)
    problem = call.problem
    T, B, H = problem.T, problem.B, problem.H
    outputs = []
    for run in runs:
        outputs += [x.new_empty(T, B, problem.P or H), *[x.new_empty(initial.shape) for initial in run.state]]
        outputs += [x.new_empty(T, B, H) for _ in range(problem.outputs - 1 - layout.S)]
        shapes = call.backend.saved_shapes(problem) if save else ()
        outputs += [x.new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes]
    return outputs


@operator("gpu_rnn::backward")
def backward(
    cell: str, tensors: Sequence[Tensor], names: str, grads: Sequence[Tensor | None], saved: Sequence[Tensor],
    reverse: Sequence[int], linked: bool, backend: str, precision: str | None, step_exact: bool, heads: int,
    history: bool, needs: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of the tensors, those in `needs`. saved: of each run y and what it saved, or nothing."""
    layout = layout_of(cell, names, reverse, linked)
    runs, options = unflatten(layout, tensors), options_of(backend, precision, step_exact, heads, history)
    call = find_call(cell, layout, runs, options, True)
    with no_autocast(tensors[0]):
        gradients = functions.backward(call, needs, layout.flatten(runs), grads, saved)
    return [gradient.contiguous() for gradient in gradients]


@backward.register_fake
def _(cell, tensors, names, grads, saved, reverse, linked, backend, precision, step_exact, heads, history, needs):
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(tensors, needs) if need]


def layout_of(cell: str, names: str, reverse: Sequence[int], linked: bool) -> FlatRuns:
    return FlatRuns(tuple(names.split()), tuple(map(bool, reverse)), cells.get(cell).S, linked)


def options_of(backend: str, precision: str | None, step_exact: bool, heads: int, history: bool) -> Options:
    return Options(False, backend, precision, history, step_exact=step_exact, heads=heads)


def unflatten(layout: FlatRuns, tensors: Sequence[Tensor]) -> list[Run]:
    """The runs, with flags [T, B] also where lengths [B] stand in their place, as in exported programs."""
    runs = layout.unflatten(tensors)
    for k, (x, weights, *_) in enumerate(runs):
        if weights.flags is not None and weights.flags.ndim == 1:
            runs[k] = runs[k]._replace(weights=weights._replace(flags=held_flags(weights.flags, x)))
    return runs


def find_call(cell: str, layout: FlatRuns, runs: Sequence[Run], options: Options, save: bool) -> CachedCall:
    settings = "op", cell, layout, options, save, in_forward_mode(), arrays.default_precision(runs[0].x)
    call = lookup(settings, "torch", layout.flatten(runs), make_call, cell, layout, runs, options, save)
    assert call is not None
    return call


def make_call(cell: str, layout: FlatRuns, runs: Sequence[Run], options: Options, save: bool) -> CachedCall:
    """As `eager.make_call`; for symbolic sizes, too."""
    if in_forward_mode():  # torch would take the outputs for constants
        raise NotImplementedError(
            "gpu_rnn has forward mode (jvp) in eager mode only, not in torch.compile or its operators"
        )
    problem = validate(cell, runs, options, save, linked=layout.linked)
    if problem.device == "meta":
        problem = replace(problem, device="cpu")  # which one it will be doesn't matter to shapes
    return CachedCall(dispatch.choose(problem, options.backend), problem, layout)


def setup_forward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, tensors, ctx.names, *ctx.options, _ = inputs
    reverse, linked, *_, history = ctx.options
    ctx.layout = layout_of(ctx.cell, ctx.names, reverse, linked)
    ctx.outputs, ctx.size = 1 + ctx.layout.S + (ctx.layout.S - 1) * history, len(tensors)
    ctx.set_materialize_grads(False)
    saved = [t for y, *rest in chunks(output, len(reverse)) for t in saved_for_backward(y, rest[ctx.outputs - 1 :])]
    ctx.save_for_backward(*tensors, *saved)


def backward_of_forward(ctx: Any, needs: tuple, grads: Sequence[Tensor | None]) -> dict[int, list]:
    flat = ctx.saved_tensors  # once: selective checkpointing recomputes them at every look
    tensors, saved = flat[: ctx.size], flat[ctx.size :]
    filled = fill_zeros(ctx.layout, tensors, [part[: ctx.outputs] for part in chunks(grads, ctx.layout.n)])
    needed = [*map(int, needs[TENSORS])]
    gradients = torch.ops.gpu_rnn.backward(ctx.cell, tensors, ctx.names, filled, saved, *ctx.options, needed)
    return {TENSORS: [*scatter(gradients, needs[TENSORS])]}


def setup_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, tensors, ctx.names, grads, _, *ctx.options, ctx.needs = inputs
    ctx.size = len(tensors)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *grads)


def backward_of_backward(ctx: Any, needs: tuple, grads: Sequence[Tensor | None]) -> dict[int, list]:
    """Differentiate the gradient by torch's operations. y and saved activations follow from the tensors."""
    inputs, (reverse, linked, *options) = ctx.saved_tensors, ctx.options
    layout, n = layout_of(ctx.cell, ctx.names, reverse, linked), ctx.size
    runs = unflatten(layout, inputs[:n])
    call = make_call(ctx.cell, layout, runs, options_of(*options), True)
    flags = [bool(flag) for flag in (*needs[TENSORS], *needs[GRADS])]
    whole = (*layout.flatten(runs), *inputs[n:])
    gradients = [*scatter(functions.differentiate_again(call, [*map(bool, ctx.needs)], flags, whole, grads), flags)]
    return {TENSORS: gradients[:n], GRADS: gradients[n:]}


forward.register_autograd(backward_of_forward, setup_context=setup_forward)
backward.register_autograd(backward_of_backward, setup_context=setup_backward)


# Mapped by torch.vmap, members become one larger batch where they have the same weights, and else calls in turn.


def loop_over_vmap(operator: Operator, V: int, in_dims: tuple, args: Sequence) -> tuple[list[Tensor], list[int]]:
    outputs = [operator.overload(*map(partial(member, v), args, in_dims)) for v in range(V)]
    stacked = [torch.stack(parts) for parts in zip(*outputs)]
    return stacked, [0] * len(stacked)


def member(v: int, arg: Any, dim: Any) -> Any:
    """Number v of an argument, or of every tensor in a list."""
    if isinstance(arg, (list, tuple)):
        return [member(v, part, d) for part, d in zip(arg, dim)]
    return arg if dim is None else arg.select(dim, v)


def vmap_forward(V: int, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list[int]]:
    cell, tensors, names, reverse, linked, *options, history, _ = args
    layout, dims = layout_of(cell, names, reverse, linked), in_dims[TENSORS]
    if history or cells.get(cell).E or has_mapped_weights(layout, dims):
        return loop_over_vmap(forward, V, in_dims, args)
    folded = fold_vmap(V, dims, tensors, layout)
    save = False  # what is saved can't be unfolded
    tensors = torch.ops.gpu_rnn.forward(cell, folded, names, reverse, linked, *options, history, save)
    outputs, places = unfold_vmap(V, tensors)
    return [*outputs], [*places]


def vmap_backward(V: int, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list[int]]:
    cell, tensors, names, grads, _, reverse, linked, *options, history, needs = args
    layout, dims = layout_of(cell, names, reverse, linked), in_dims[TENSORS]
    shared = not (history or cells.get(cell).E or has_mapped_weights(layout, dims))
    if not shared or any(of_run - {"x"} for of_run in layout.needs(needs)):
        return loop_over_vmap(backward, V, in_dims, args)
    folded = fold_vmap(V, dims, tensors, layout)
    folded_grads = [fold(V, d, dim) for d, dim in zip(grads, in_dims[GRADS])]
    gradients = torch.ops.gpu_rnn.backward(
        cell, folded, names, folded_grads, [], reverse, linked, *options, history, needs
    )
    outputs, places = unfold_vmap(V, gradients)
    return [*outputs], [*places]


forward.register_vmap(vmap_forward)
backward.register_vmap(vmap_backward)
