"""Operators of torch as `torch.library.custom_op` makes them, which torch.func takes as well.

torch's own decorator gives an operator on lists of tensors a gradient that torch.func.grad refuses: it goes by
autograd.Function.apply, which wants a Function of another kind while a transform is active. But where the kernel for
autograd runs, the transform is about to let autograd handle its level, so an ordinary Function is right there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class Operator:
    """An operator, made of a function whose annotations are its schema. Calls go by torch.ops."""

    def __init__(self, name: str, run: Callable) -> None:
        self.name = name
        namespace, self.own = name.split("::")
        self.library = torch.library.Library(namespace, "FRAGMENT")
        schema = torch.library.infer_schema(run, mutates_args=())
        self.library.define(self.own + schema, tags=torch.Tag.pt2_compliant_tag)
        self.library.impl(self.own, torch._disable_dynamo(run), "CompositeExplicitAutograd")
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
                with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):  # for the levels below
                    output = below(keyset, args)
                ctx.spec = spec
                setup_context(ctx, args, output)
                return tuple(output)

            @staticmethod
            def backward(ctx: Any, *arriving: Any) -> tuple:
                needs = tree_unflatten(ctx.needs_input_grad[2:], ctx.spec)
                found = backward(ctx, needs, arriving)
                places = [found.get(k, [None] * len(tree_leaves(need))) for k, need in enumerate(needs)]
                return None, None, *[gradient for gradients in places for gradient in gradients]

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
