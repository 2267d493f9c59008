"""Calls on torch tensors, as torch's autograd, its transforms (torch.func) and its compiler see them.

Eager     `functions`: autograd.Functions around the chosen backend
Captured  `custom_ops`: operators for torch.compile, torch.export, torch.jit.trace, make_fx and any other mode. A
          program that was saved needs `import gpu_rnn` before it is loaded.

First derivatives are the backend's; second and higher ones, and forward mode, those of `derivatives`.
"""

from collections.abc import Sequence

from torch import Tensor

from ..backends import dispatch
from ..backends.call_cache import CachedCall, lookup
from ..core.flat_runs import FlatRuns
from ..core.problem import Options, Run, with_zeros
from ..core.validation import validate, zero_states
from . import flops  # noqa: F401  (registers what operators cost)
from .custom_ops import call_op, is_exporting
from .derivatives import any_requires_grad
from .functions import Outputs, RNNFunction, run_cached, torch_state
from .torch_private import fast_apply, in_transform, is_capturing, is_meta_or_fake


def run(name: str, runs: Sequence[Run], options: Options) -> Outputs:
    """Run the directions of one layer, whose states may be None."""
    if is_capturing() or is_meta_or_fake(runs[0].x):
        return call_op(name, runs, options)
    if in_transform():
        return [run_under_transform(name, single, options) for single in runs]
    call = find_call(name, runs, options)
    assert call is not None
    return run_cached(call, runs)


def run_stack(name: str, runs: Sequence[Run], options: Options) -> Outputs | None:
    """Run the layers of a stack at once, the first of which has x; None where nothing would go at once."""
    if options.recompute or in_transform():  # recomputed, it would not get the same bits; transforms know single layers
        return None
    if is_capturing() or is_meta_or_fake(runs[0].x):
        return None if is_exporting() else call_op(name, runs, options, linked=True)
    call = find_call(name, runs, options, linked=True)
    return None if call is None else run_cached(call, runs)


def run_under_transform(name: str, run: Run, options: Options) -> tuple[Tensor, tuple]:
    """One direction, where a transform is active."""
    call = make_call(name, [run], options, training=not options.recompute)
    assert call is not None
    (filled,) = with_zeros([run], call.zeros, run.x.new_zeros)
    y, *last = fast_apply(RNNFunction, call, None, *call.layout.flatten([filled]))[: call.problem.outputs]
    return y, tuple(last)


def find_call(name: str, runs: Sequence[Run], options: Options, linked: bool = False) -> CachedCall | None:
    """The cached call of some runs."""
    settings = name, options, tuple([run.reverse for run in runs]), linked, *torch_state(runs[0].x)
    tensors = [tensor for x, weights, state, _ in runs for tensor in (x, *weights, *state)]
    return lookup(settings, "torch", tensors, make_call, name, runs, options, linked)


def make_call(
    name: str, runs: Sequence[Run], options: Options, linked: bool = False, training: bool | None = None
) -> CachedCall | None:
    """Check that everything fits, and choose; None for a stack whose layers the backend runs one after the other."""
    needed = any(any_requires_grad(x, *weights, *state) for x, weights, state, _ in runs)
    save = needed and not options.recompute if training is None else training
    problem = validate(name, runs, options, save, linked=linked)
    backend = dispatch.choose(problem, options.backend)
    if linked and not any(backend.fuses_layers(problem, backward) for backward in (False, True)[: 1 + save]):
        return None
    return CachedCall(backend, problem, FlatRuns.of(runs, linked), zero_states(problem, runs), needed)
