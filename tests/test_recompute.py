"""recompute=True: nothing is kept for the gradient but the arguments, and the gradient is the same bit for bit."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import gpu_rnn
from gpu_rnn.autograd import eager
from gpu_rnn.backends import cuda, gpu_common, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.core.problem import Options, Problem, Run, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calls, cuda_on_cpu, reference_modifiers
from .cuda_emulator import runtime
from .sequences import draw

EVERY = pytest.mark.parametrize("name", cells.NAMES)
OPTIONS = pytest.mark.parametrize(
    "options", [{}, *reference_modifiers.OPTIONS.values()], ids=["plain", *reference_modifiers.OPTIONS]
)


def bytes_kept(layer, x):
    """Of everything that waits for backward, weights aside; each storage once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = layer(x)
    for parameter in layer.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return outputs, sum(sizes.values())


@pytest.mark.parametrize("sizes", [(32, 32), (64, 32), (32, 32, 3)], ids=["I = H", "I = 2 H", "three layers"])
def test_an_lstm_keeps_a_third_at_most(sizes):
    layer, x = gpu_rnn.LSTM(*sizes), torch.randn(20, 4, sizes[0], requires_grad=True)
    kept, gradients = [], []
    for layer.recompute in (False, True):
        (y, (_, cT)), amount = bytes_kept(layer, x)
        kept.append(amount)
        gradients.append(torch.autograd.grad(y.square().sum() + cT.sum(), [x, *layer.parameters()]))
    assert kept[0] >= 3 * kept[1], kept
    assert all(map(torch.equal, *gradients))


def by_autograd(case, recompute, history=False):
    """Every output and gradient, of the states after every time step too."""

    def leaf(tensor):
        return tensor if tensor is None or not tensor.is_floating_point() else tensor.clone().requires_grad_()

    x, weights, state = leaf(case.x), Weights(*map(leaf, case.weights)), tuple(map(leaf, case.state))
    options = Options(case.reverse, "numpy", None, history, recompute)
    ((y, after),) = eager.run(case.cell.name, [Run(x, weights, state, case.reverse)], options)
    dlast = [*case.dlast, *(torch.ones_like(array) for array in after[len(state) :])]
    torch.autograd.backward((y, *after), (case.dy, *dlast))
    return [y, *after, *(leaf.grad for leaf in (x, *weights, *state) if leaf is not None and leaf.requires_grad)]


@EVERY
@OPTIONS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_are_the_same_bit_for_bit(name, options, reverse):
    case = reference_modifiers.drawn(name, options, "float32", 5, 3, 4, 6, reverse=reverse).case
    for history in {False, case.cell.S > 1}:
        pairs = zip(*(by_autograd(case, recompute, history) for recompute in (False, True)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_with_a_projection_in_every_dtype(dtype):
    case = draw("lstm", dtype, 6, 3, 4, 5, 2)
    assert all(map(torch.equal, by_autograd(case, False), by_autograd(case, True)))


BACKENDS = {"numpy": numpy_backend}
for way, forward, backward in (
    ("cuda stepwise", partial(per_step.run_forward, partial(cuda.bind, cuda_on_cpu.prepare_launch)),
     partial(per_step.run_backward, partial(cuda.bind, cuda_on_cpu.prepare_launch))),
    ("cuda persistent", partial(cuda.run_forward, cuda_on_cpu.prepare_launch, persistent.DEVICES["h200"]),
     partial(cuda.run_backward, cuda_on_cpu.prepare_launch, persistent.DEVICES["h200"])),
):  # fmt: skip
    BACKENDS[way] = SimpleNamespace(
        forward=partial(gpu_common.forward, forward), backward=partial(gpu_common.backward, backward)
    )


@pytest.mark.parametrize("way", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_every_backend_records_where_a_gradient_is_requested(way, option):
    if way != "numpy" and runtime.why_not() is not None:
        pytest.skip(str(runtime.why_not()))
    again(BACKENDS[way], reference_modifiers.OPTIONS.get(option, {}))


def again(backend, options, dtype="bfloat16"):
    """Compute a backend's gradients from saved activations, and without."""
    case = reference_modifiers.drawn("lstm", options, dtype, 5, 3, 4, 20).case
    run = Run(case.x, case.weights, case.state)
    problem = Problem(case.cell, 5, 3, 4, 20, None, dtype, library="torch", training=True)
    ((y, _, _, saved),) = backend.forward(problem, [run])
    kept, recorded = (
        calls.backward_of(backend, problem, run, y, arrays, case.dy, case.dlast, case.needs) for arrays in (saved, ())
    )
    for label in case.needs:
        assert torch.equal(kept[label], recorded[label]), label
    assert all(map(torch.equal, kept["state"], recorded["state"]))


# ---- every way in ---------------------------------------------------------------------------------------------------

LAYERS = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    ("LSTM", {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.3, "input_dropout": 0.2, "weight_dropout": 0.2}),
    ("LSTM", {"peephole": True, "coupled": True}), ("RNN", {}), ("GRU", {"reset_after": False}),
    ("GRU", {"batch_first": True}), ("LSTMCell", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers(kind, options, compiled):
    layer = getattr(gpu_rnn, kind)(3, 5, **options)
    x = torch.randn(2, 3) if kind.endswith("Cell") else torch.randn(6, 2, 3)
    results = []
    for layer.recompute in (False, True):
        torch.manual_seed(3)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        y = torch.utils._pytree.tree_leaves(run(x))
        results.append([*y, *torch.autograd.grad(sum(part.square().sum() for part in y), [*layer.parameters()])])
    assert all(map(torch.equal, *results))
    assert "recompute=True" in repr(layer)


def test_compiled_keeps_nothing_either():
    layer, saved = gpu_rnn.LSTM(3, 5, recompute=True), []

    def look(graph, inputs):
        saved.extend(node.args[-1] for node in graph.graph.nodes if "gpu_rnn.forward" in str(node.target))
        return graph.forward

    y, _ = torch.compile(layer, fullgraph=True, backend=look)(torch.randn(4, 2, 3))
    y.sum().backward()
    assert saved == [False]
    assert layer.weight_hh_l0.grad.abs().sum() > 0


def test_functions_and_their_vjp(rng):
    case = draw("lstm", "float64", 4, 2, 3, 5).mapped(np.asarray)
    inputs = case.x, *case.weights[:4]
    (_, pullback), (_, recorded) = (
        gpu_rnn.vjp(gpu_rnn.lstm, *inputs, h0=case.state[0], c0=case.state[1], recompute=recompute)
        for recompute in (False, True)
    )
    first, second = (pull((case.dy, case.dlast)) for pull in (pullback, recorded))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[label], second[label]) for label in first)


@EVERY
def test_second_derivatives(name):
    case = draw(name, "float64", 3, 2, 2, 3)
    tensors = [tensor.requires_grad_() for tensor in (case.x, *case.weights[:4], *case.state)]

    def run(x, *rest):
        ((y, after),) = eager.run(name, [Run(x, Weights(*rest[:4]), rest[4:])], Options(recompute=True))
        return y, *after

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_transforms():
    layer = gpu_rnn.GRU(3, 4, recompute=True)
    x = torch.randn(5, 4, 2, 3)  # T first, as vmap's members have it at 1

    def loss(x):
        return layer(x)[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=1)(x)
    apart = torch.stack([torch.func.grad(loss)(member) for member in x.unbind(1)])
    torch.testing.assert_close(together, apart)
