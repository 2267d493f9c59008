"""What gpu_rnn takes from torch that is private there, with what breaks if torch changes it; and what is built on it.

Nothing else of gpu_rnn touches a private name of torch, except `gpu_rnn.__init__`, which waits for a module of the ONNX
exporter before torch is loaded. This module imports torch alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # is_grads_batched=True: an AttributeError at import
from torch._functorch.autograd_function import enable_single_level_autograd_function  # torch.func.grad of operators
from torch._subclasses.fake_tensor import FakeTensor  # shapes-only runs (torch.export, FakeTensorMode) would compute
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # operators' lists of tensors

# Each of these is a C function, called as it is; without it `import gpu_rnn.autograd` raises an AttributeError.
are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active  # torch.func sees no call
num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # make_fx, FlopCounterMode see no call
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing  # torch.jit.trace would record a constant
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled  # autocast would be ignored
is_profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled  # torch.profiler would show no ranges
disable_dynamo: Callable[[Callable], Callable] = torch._disable_dynamo  # torch.compile would trace backends
assert_async: Callable[[Tensor, str], None] = torch._assert_async  # checks of lengths in compiled programs

ONNX_REGISTRY = "torch.onnx._internal.exporter._torchlib._torchlib_registry"  # see weights/onnx_export.py


def is_capturing() -> bool:
    """Whether calls are recorded as they are made, so that they have to be operators.

    By torch.compile or torch.export, torch.jit.trace, or a mode that sees every operator: make_fx's, a fake one, one
    that counts. None of these sees what a backend does with memory.
    """
    return torch.compiler.is_compiling() or is_jit_tracing() or num_dispatch_modes() > 0


def in_transform() -> bool:
    """Whether torch.func or forward mode is active. Without forward_ad._current_level jvp would lose tangents."""
    return are_transforms_active() or forward_ad._current_level >= 0


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_observed() -> bool:
    """Whether anything watches a call, so that a backend can't just compute: `is_capturing` or `in_transform`."""
    watched = torch.compiler.is_compiling() or is_jit_tracing() or num_dispatch_modes() > 0
    return watched or are_transforms_active() or forward_ad._current_level >= 0


def is_meta_or_fake(x: Tensor) -> bool:
    """Whether a tensor has a shape alone: on the meta device, or in a run that only looks at shapes."""
    return x.is_meta or isinstance(x, FakeTensor)


def is_readable(array: Tensor) -> bool:
    """Whether Python may read the values of a CPU tensor: they are there, and nothing watches."""
    return not (is_capturing() or are_transforms_active() or isinstance(array, FakeTensor))


def constant_when_captured(function: Any) -> Any:
    """As torch.compiler.assume_constant_result, without loading the compiler; else torch.compile breaks the graph."""
    function._dynamo_marked_constant = True
    return function


def guard_scalar(value: Any) -> Any:
    """A number that torch.compile(dynamic=True) made a variable, as a constant; else `cell_clip` can't be compiled."""
    return torch.fx.experimental.symbolic_shapes.guard_scalar(value)


class Traced(torch.nn.Module):
    """A module that may refuse a tracer of TorchScript before arguments are bound to its `forward`.

    torch.onnx.export(dynamo=False) passes the defaults of keyword-only parameters to a module by position. If torch
    renames the method overridden here, that is a TypeError in Python's words.
    """

    def check_tracer(self) -> None:
        """Raise where the active tracer can't have this module."""

    def _slow_forward(self, *args: Any, **keywords: Any) -> Any:
        self.check_tracer()
        return super()._slow_forward(*args, **keywords)


@contextmanager
def without_jit_tracing() -> Iterator[None]:
    """Hide what is done from torch.jit.trace, which would record and warn about arithmetic with sizes."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def fast_apply(function: type[Function], *args: Any) -> Any:
    """`function.apply`, without what torch.func alone needs: it binds defaults by inspecting `forward`, every time.

    If torch moves the C method that `Function.apply` ends in, take `function.apply`.
    """
    return function.apply(*args) if are_transforms_active() else super(Function, function).apply(*args)  # type: ignore[misc]


def over_legacy_vmap(backward: Callable[..., tuple], ctx: Any, *grads: Tensor | None) -> tuple:
    """Call the `backward` of a Function for each member that torch.autograd.grad(is_grads_batched=True) maps over.

    It and jacobian(vectorize=True) map by torch's old vmap, for which a Function can't have a rule of its own.
    """
    mapped = [d is not None and is_legacy_batchedtensor(d) for d in grads]
    first = next(d for d, m in zip(grads, mapped) if m)
    level = next(n for n in count(1) if not is_legacy_batchedtensor(torch._remove_batch_dim(first, n, 1, 0)))
    rows: list[Any] = [torch._remove_batch_dim(d, level, 1, 0) if m else d for d, m in zip(grads, mapped)]
    V = next(len(d) for d, m in zip(rows, mapped) if m)
    members = [backward(ctx, *(d[v] if m else d for d, m in zip(rows, mapped))) for v in range(V)]
    return tuple(
        None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level) for parts in zip(*members)
    )


def is_legacy_batched(grads: tuple) -> bool:
    return any(d is not None and is_legacy_batchedtensor(d) for d in grads)


class Operator:
    """An operator, made of a function whose annotations are its schema. Calls go by torch.ops.

    torch.library.custom_op gives an operator on lists of tensors a gradient that torch.func.grad refuses: it goes by
    autograd.Function.apply, which wants a Function of another kind while a transform is active. But where the kernel
    for autograd runs, the transform is about to let autograd handle its level, so an ordinary Function is right there.
    If torch changes the dispatch keys used here, captured layers lose their gradients.
    """

    def __init__(self, name: str, run: Callable) -> None:
        self.name = name
        namespace, self.own = name.split("::")
        self.library = torch.library.Library(namespace, "FRAGMENT")
        schema = torch.library.infer_schema(run, mutates_args=())
        self.library.define(self.own + schema, tags=torch.Tag.pt2_compliant_tag)
        self.library.impl(self.own, disable_dynamo(run), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, namespace), self.own).default

    def register_fake(self, function: Callable) -> None:
        """Take the outputs' shapes from a function of the same arguments."""
        torch.library.register_fake(self.name, function, lib=self.library)

    def register_vmap(self, rule: Callable) -> None:
        """rule(V, in_dims, *args) -> the outputs, of which dimension 0 or another, by output, is the mapped one."""
        torch.library.register_vmap(
            self.name, lambda info, in_dims, *args: rule(info.batch_size, in_dims, *args), lib=self.library
        )

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Give it a gradient. setup_context: as of an autograd.Function.

        backward(ctx, needs, gradients of the outputs) -> the arguments' gradients by place, lists of lists' members;
        `needs` says of each argument, and each member of a list, whether its gradient is needed.
        """
        overload = self.overload

        def below(keyset: Any, args: Any) -> list:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        class Node(Function):
            @staticmethod
            def forward(ctx: Any, keyset: Any, spec: Any, *flat: Any) -> tuple:
                args = tree_unflatten(flat, spec)
                with torch.set_grad_enabled(are_transforms_active()):  # for the levels below
                    output = below(keyset, args)
                ctx.spec = spec
                setup_context(ctx, args, output)
                return tuple(output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> tuple:
                needs = tree_unflatten(ctx.needs_input_grad[2:], ctx.spec)
                gradients = backward(ctx, needs, grads)
                places = [gradients.get(k, [None] * len(tree_leaves(need))) for k, need in enumerate(needs)]
                return None, None, *[gradient for of_place in places for gradient in of_place]

        def run(keyset: Any, *args: Any) -> list:
            flat, spec = tree_flatten(args)
            tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
            if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
                return below(keyset, args)
            with enable_single_level_autograd_function():
                return list(super(Function, Node).apply(keyset, spec, *flat))  # type: ignore[misc]

        self.library.impl(self.own, run, "Autograd", with_keyset=True)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorate the function that an operator runs."""
    return lambda run: Operator(name, run)
