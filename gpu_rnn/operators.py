"""A layer as one node of a graph that torch.compile or torch.export captures.

Two operators, gpu_rnn::forward and gpu_rnn::backward, choose their backend when they run, and time stays inside of
them. gpu_rnn::stack and gpu_rnn::stack_backward are those of a stack's layers, for torch.compile.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpu_rnn.kernels import cells

from . import arrays, dispatch
from .arguments import fitted, known
from .backends import phased
from .derivatives import FIRST_STATE, required, spread, uncast
from .nodes import above, parts, pulled, stack_needs, stack_pulled, taped, zero_filled
from .problem import Direction, Options, Problem, Weights
from .woven import page

capturing = torch.compiler.is_compiling
for looked_up in (page, arrays.library_of_class):  # what a capture needn't look into
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
