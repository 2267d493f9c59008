"""A layer as one node of a graph that torch.compile, torch.export, torch.jit.trace or make_fx captures.

Two operators, gpu_rnn::forward and gpu_rnn::backward, choose their backend when they run, and time stays inside of
them. gpu_rnn::stack and gpu_rnn::stack_backward are those of a stack's layers, for torch.compile.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpu_rnn.kernels import cells

from ..backends import dispatch, two_pass
from ..core import arrays
from ..core.problem import Direction, Options, Problem, Weights
from ..core.validation import fitted, known
from ..modifiers.apply import held, page
from .derivatives import FIRST_STATE, reference_gradient, spread, tracked, transformed, uncast, vjp
from .functions import above, any_of, folded, parts, pulled, stack_needs, stack_pulled, taped, unfolded, zero_filled
from .torch_private import Operator, operator


def capturing() -> bool:
    """Whether calls are recorded as they are made, so that they have to be operators.

    By torch.compile or torch.export, torch.jit.trace, or a mode that sees every operator: make_fx's, a fake one, one
    that counts. None of these sees what a backend does with memory.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def constant_when_captured(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, which loads the compiler: mark what a capture needn't look into."""
    function._dynamo_marked_constant = True
    return function


for looked_up in (page, arrays.library_of_class):
    constant_when_captured(looked_up)


def exporting() -> bool:
    """Whether the recorded program is for elsewhere."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@constant_when_captured
def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export captures. Dynamo takes torch's own function for False."""
    return torch.onnx.is_in_onnx_export()


def refuse_watched(what: str, instead: str) -> None:
    """Raise where a tracer or a transform sees a call that computes at once, out of their sight."""
    if capturing() or transformed():
        raise NotImplementedError(
            f"{what} computes at once, out of sight of torch's tracers and transforms (torch.jit.trace, make_fx, "
            f"torch.func, vmap), of which one is active; {instead}"
        )


def captured(name: str, directions: List[Direction], options: Options) -> list[tuple[Tensor, tuple]]:
    """As `sequences`, as one node of a graph."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "torch.onnx.export(dynamo=False) has no ONNX operator for gpu_rnn's layers: export with dynamo=True, which "
            "writes ONNX's own, or gpu_rnn.restore_(model) first, which puts torch.nn's layers there"
        )
    given = [tensor for x, weights, state, _ in directions for tensor in (x, *there(x, weights, state))]
    precision, save = asked_now(given, options)
    names, reverse = names_in(directions[0].weights), [int(direction.reverse) for direction in directions]
    found = torch.ops.gpu_rnn.forward(
        name, given, names, reverse, options.backend or "auto", precision, options.step_exact, options.history, save
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
    wanted = tracked(*given) and not exporting()  # what is exported seldom trains
    precision, (x, *_) = options.precision, given
    if precision is None and wanted and x.is_cuda and x.dtype == torch.float32:
        precision = precision_now()
    return precision, wanted and not options.recompute


@constant_when_captured
def precision_now() -> str:
    """The setting at the time of the capture: with the gradient's graph made, forward may not change its mind."""
    return arrays.torch_precision()


# Of both operators: `given` is of each direction in turn x, the weights there are, `names`, and the states; and so are
# all other lists. Flags in lists are ints, since torch.jit.trace takes no list of bools.


GIVEN, DOUTPUTS = 1, 3  # places of arguments


@operator("gpu_rnn::forward")
def forward(
    cell: str, given: List[Tensor], names: str, reverse: List[int], backend: str, precision: str | None,
    step_exact: bool, history: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """-> y, states after, their history if asked for, the tape if it is to be saved."""
    directions = apart_from(given, names, reverse)
    options = Options(False, backend, precision, history, step_exact=step_exact)
    chosen, problem = asked(known, cell, directions, options, save)
    with uncast(given[0]):
        found = dispatch.forwards(chosen, problem, directions)
    return [tensor for y, last, tape in found for tensor in (y, *last, *tape)]


@forward.register_fake
def _(cell, given, names, reverse, backend, precision, step_exact, history, save):
    directions = apart_from(given, names, reverse)
    chosen, problem = asked(
        fitted, cell, directions, Options(False, backend, precision, history, step_exact=step_exact), save
    )
    found = []
    for x, _, state, _ in directions:
        found.append(x.new_empty(problem.T, problem.B, problem.P or problem.H))
        found += [x.new_empty(initial.shape) for initial in state]
        found += [x.new_empty(problem.T, problem.B, problem.H) for _ in range(problem.outputs - 1 - len(state))]
        found += tape_like(chosen, problem, x) if save else ()
    return found


@operator("gpu_rnn::backward")
def backward(
    cell: str, given: List[Tensor], names: str, doutputs: List[Tensor], recorded: List[Tensor], reverse: List[int],
    backend: str, precision: str | None, step_exact: bool, history: bool, needs: List[int],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of what is given, those in `needs`. `recorded`: y and the tape, or nothing."""
    directions, n = apart_from(given, names, reverse), len(reverse)
    options = Options(False, backend, precision, history, step_exact=step_exact)
    chosen, problem = asked(known, cell, directions, options, True)
    fields = [0, *(1 + Weights._fields.index(name) for name in names.split())]
    all_needs = []
    for wanted in parts([*map(bool, needs)], n):
        need = dict(zip(fields, wanted))
        all_needs.append((*(need.get(k, False) for k in range(FIRST_STATE)), *wanted[len(fields) :]))
    whole = [(x, *weights, *state) for x, weights, state, _ in directions]
    with uncast(given[0]):
        found = pulled(
            chosen, problem, [d.reverse for d in directions], all_needs, whole, parts(doutputs, n), parts(recorded, n)
        )
    return [gradient.contiguous() for gradients in found for gradient in gradients]


@backward.register_fake
def _(cell, given, names, doutputs, recorded, reverse, backend, precision, step_exact, history, needs):
    return [tensor.new_empty(tensor.shape) for tensor, needed in zip(given, needs) if needed]


def apart_from(given: List[Tensor], names: str, reverse: List[int]) -> list[Direction]:
    """As `directions_in`, with flags [T, B] also where lengths [B] stand in their place, as in exported programs."""
    found = directions_in(given, names, reverse)
    for k, (x, weights, *_) in enumerate(found):
        if weights.flags is not None and weights.flags.ndim == 1:
            found[k] = found[k]._replace(weights=weights._replace(flags=held(weights.flags, x)))
    return found


def directions_in(given: List[Any], names: str, reverse: List[int]) -> list[Direction]:
    """The directions that are in a list of an operator."""
    fields = names.split()
    found = []
    for (x, *rest), r in zip(parts(given, len(reverse)), reverse):
        there = dict(zip(fields, rest))
        found.append(Direction(x, Weights(*map(there.get, Weights._fields)), tuple(rest[len(fields) :]), bool(r)))
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
        more = options.history, len(directions), options.layers, options.step_exact
        problem = judge(cell, given, reverse, precision, save, *more)
    if problem.device == "meta":
        problem = replace(problem, device="cpu")  # which one it will be doesn't matter to shapes
    return dispatch.choose(problem, options.backend), problem


def tape_like(backend: dispatch.Backend, problem: Problem, x: Tensor) -> list[Tensor]:
    """Empty tensors of the shapes, dtypes and strides of a backend's tape."""
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    real = getattr(torch, arrays.real_dtype(x))
    if isinstance(backend, two_pass.Phased):
        return [x.new_empty(2 * T, B, H), *tape_like(backend.backend, two_pass.run(problem), x)]
    if backend.NAME == "native":
        shapes = backend.tape_shapes(cell, T, B, H, problem.P is not None, arrays.real_dtype(x))
        return [x.new_empty(shape, dtype=real) for shape in shapes]
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


def pull(ctx: Any, needs: tuple, arriving: List[Tensor | None]) -> dict[int, list]:
    n, S = len(ctx.reverse), cells.get(ctx.cell).S
    size = 1 + len(ctx.names.split()) + S
    saved = ctx.saved_tensors  # once: selective checkpointing recomputes them at every look
    given, kept = saved[: n * size], saved[n * size :]
    doutputs = []
    for each, gradients in zip(parts(given, n), parts(arriving, n)):
        doutputs += zero_filled(each[0], each[-S:], gradients[: ctx.outputs])
    needed = [*map(int, needs[GIVEN])]
    found = torch.ops.gpu_rnn.backward(ctx.cell, given, ctx.names, doutputs, kept, *ctx.options, needed)
    return {GIVEN: [*spread(found, needs[GIVEN])]}


forward.register_autograd(pull, setup_context=keep)


def keep_gradient(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.cell, given, ctx.names, doutputs, ctx.recorded, *ctx.options, ctx.needs = inputs
    ctx.given = len(given)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *doutputs)


def pull_gradient(ctx: Any, needs: tuple, arriving: List[Tensor | None]) -> dict[int, list]:
    """Differentiate the gradient, by torch's operations. y and saved activations follow from what they are made of."""
    saved = ctx.saved_tensors
    given, doutputs = saved[: ctx.given], saved[ctx.given :]
    reverse, backend, precision, step_exact, history = ctx.options
    directions, n = apart_from(given, ctx.names, reverse), len(reverse)
    options = Options(False, backend, precision, history, step_exact=step_exact)
    _, problem = asked(fitted, ctx.cell, directions, options, True)
    found: dict[int, list] = {GIVEN: [], DOUTPUTS: []}
    following = iter(arriving)
    lists = [parts(each, n) for each in (ctx.needs, doutputs, needs[GIVEN], needs[DOUTPUTS])]
    for direction, wanted, d, need, need_d in zip(directions, *lists):
        inputs = (direction.x, *direction.weights, *direction.state)
        there = [tensor is not None for tensor in inputs]
        wanted, need = [[bool(flag) for flag in spread(flags, there)] for flags in (wanted, need)]
        gradients = [tensor for tensor, want in zip(inputs, wanted) if want]  # as their sizes are
        filled = tuple([torch.zeros_like(a) if b is None else b for a, b in zip(gradients, following)])
        run = partial(reference_gradient, replace(problem, reverse=direction.reverse, directions=1), tuple(wanted))
        with uncast(direction.x):
            _, pullback = vjp(run, (*inputs, *d), (*need, *need_d))
            pulled_back = [*spread(pullback(filled), (*need, *need_d))]
        found[GIVEN] += [gradient for gradient, is_there in zip(pulled_back, there) if is_there]
        found[DOUTPUTS] += pulled_back[len(inputs) :]
    return found


backward.register_autograd(pull_gradient, setup_context=keep_gradient)


# Mapped by torch.vmap, members are more batch rows where they have their weights in common, and else calls in turn.


def member_by_member(operator: Operator) -> Callable:
    """A call for each member."""

    def rule(V: int, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list[int]]:
        outputs = [operator.overload(*map(partial(member, v), args, in_dims)) for v in range(V)]
        stacked = [torch.stack(each) for each in zip(*outputs)]
        return stacked, [0] * len(stacked)

    return rule


def member(v: int, arg: Any, dim: Any) -> Any:
    """Number v of an argument, or of every tensor in a list."""
    if isinstance(arg, (list, tuple)):
        return [member(v, each, d) for each, d in zip(arg, dim)]
    return arg if dim is None else arg.select(dim, v)


def rows_of_one_batch(
    V: int, dims: List[int | None], cell: str, given: List[Tensor], names: str, n: int
) -> list[Tensor] | None:
    """`given` with V*B rows for B; None where members have more of their own than x and states."""
    weights = 1 + len(names.split())
    directions = [*zip(parts(given, n), parts(dims, n))]
    if cells.get(cell).E or any(any_of(d[1:weights]) for _, d in directions):
        return None
    return [tensor for each, d in directions for tensor in folded(V, tuple(d), tuple(each), weights)]


def map_forward(V: int, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list[int]]:
    cell, given, names, reverse, *options, history, _ = args
    rows = None if history else rows_of_one_batch(V, in_dims[GIVEN], cell, given, names, len(reverse))
    if rows is None:
        return member_by_member(forward)(V, in_dims, *args)
    found = torch.ops.gpu_rnn.forward(cell, rows, names, reverse, *options, history, False)  # a tape can't be unfolded
    each = [unfolded(V, outputs) for outputs in parts(found, len(reverse))]
    return [y for outputs, _ in each for y in outputs], [place for _, places in each for place in places]


def map_backward(V: int, in_dims: tuple, *args: Any) -> tuple[list[Tensor], list[int]]:
    cell, given, names, doutputs, _, reverse, *options, history, needs = args
    n, weights = len(reverse), 1 + len(names.split())
    rows = None if history else rows_of_one_batch(V, in_dims[GIVEN], cell, given, names, n)
    if rows is None or any(any(each[1:weights]) for each in parts(needs, n)):
        return member_by_member(backward)(V, in_dims, *args)
    arriving = zip(parts(doutputs, n), parts(in_dims[DOUTPUTS], n))
    drows = [tensor for each, dims in arriving for tensor in folded(V, tuple(dims), tuple(each), 1)]
    found = iter(torch.ops.gpu_rnn.backward(cell, rows, names, drows, [], reverse, *options, history, needs))
    each = [unfolded(V, [next(found) for need in wanted if need], wanted[0]) for wanted in parts(needs, n)]
    return [d for gradients, _ in each for d in gradients], [place for _, places in each for place in places]


forward.register_vmap(map_forward)
backward.register_vmap(map_backward)


# The same of a stack: `given` is x, then of each layer in turn the weights there are, `names`, and the states. Which
# layers go at once is decided at run time, too.


@operator("gpu_rnn::stack")
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


@operator("gpu_rnn::stack_backward")
def stack_backward(
    cell: str, given: List[Tensor], names: str, doutputs: List[Tensor | None], recorded: List[Tensor], layers: int,
    backend: str, precision: str | None, needs: List[int],
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of what is given, those in `needs`. `recorded`: y and the tape of each layer, or nothing."""
    x, whole = all_of(given, names, layers)
    chosen, problem = asked_of_stack(known, cell, x, whole, backend, precision, True)
    fields, S = [*map(Weights._fields.index, names.split())], problem.cell.S
    need_x, *others_need = map(bool, needs)
    all_needs: list[bool] = []
    for wanted in parts(others_need, layers):
        need = dict(zip(fields, wanted))
        all_needs += [*(need.get(k, False) for k in range(len(Weights._fields))), *wanted[-S:]]
    tensors = [tensor for weights, state in whole for tensor in (*weights, *state)]
    wanted = stack_needs(need_x, all_needs, layers)
    with uncast(x):
        if not recorded:
            again = dispatch.stack(chosen, problem, x, whole)
            recorded = [tensor for y, _, tape in again for tensor in taped(y, tape)]
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


def pull_stack(ctx: Any, needs: tuple, arriving: List[Tensor | None]) -> dict[int, list]:
    saved = ctx.saved_tensors
    given, kept = saved[: ctx.given], saved[ctx.given :]
    doutputs = [gradient for each in parts(arriving, ctx.layers) for gradient in each[: ctx.outputs]]
    needed = [*map(int, needs[GIVEN])]
    found = torch.ops.gpu_rnn.stack_backward(
        ctx.cell, given, ctx.names, doutputs, kept, ctx.layers, *ctx.options, needed
    )
    return {GIVEN: [*spread(found, needs[GIVEN])]}


def refuse_gradient(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "gpu_rnn::stack_backward has no gradient of its own: compile torch.func's transforms of the layer, or "
        "differentiate twice in eager mode"
    )


stack.register_autograd(pull_stack, setup_context=keep_stack)
stack_backward.register_autograd(refuse_gradient, setup_context=lambda *_: None)
for each in (stack, stack_backward):
    each.register_vmap(member_by_member(each))
