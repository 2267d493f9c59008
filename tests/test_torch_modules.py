"""What torch does to modules and tensors, done to ours: layouts, parametrizations, moves, copies, checkpointing."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import gpu_rnn
from gpu_rnn.backends import dispatch

from .test_layers import CELLS, LAYERS, assert_equal, flat, results, twins

every = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def some_input(kind, **options):
    return torch.randn(*([2, 3] if kind.endswith("Cell") else [5, 2, 3]), **{"dtype": torch.float64} | options)


def states(kind):
    shape = [2, 4] if kind.endswith("Cell") else [1, 2, 4]
    h, c = torch.randn(2, *shape, dtype=torch.float64)
    return (h, c) if kind.startswith("LSTM") else h


# ---- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
}


@every
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_states_and_arriving_gradients(kind, layout):
    arranged, (_, layer) = LAYOUTS[layout], twins(kind, input_size=3, hidden_size=4)
    x, hx = arranged(some_input(kind)), states(kind)
    hx = tuple(map(arranged, hx)) if isinstance(hx, tuple) else arranged(hx)
    outputs = {}
    for name, change in (("odd", lambda t: t), ("plain", torch.Tensor.contiguous)):
        inputs = [change(tensor).detach().requires_grad_() for tensor in flat((x, hx))]
        results = flat(layer(inputs[0], tuple(inputs[1:]) if len(inputs) > 2 else inputs[1]))
        arriving = [change(arranged(torch.ones_like(y).cumsum(0))) for y in results]
        gradients = torch.autograd.grad(results, [*inputs, *layer.parameters()], arriving)
        outputs[name] = dict(enumerate([*results, *gradients]))
    assert_equal(outputs["odd"], outputs["plain"])


@every_layer
def test_strided_weights(kind):
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    weights = {name: LAYOUTS["strided"](p.detach()) for name, p in ours.named_parameters()}
    x = some_input(kind)
    for actual, expected in zip(flat(torch.func.functional_call(ours, weights, (x,))), flat(theirs(x)), strict=True):
        torch.testing.assert_close(actual, expected)


# ---- parametrizations and such --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_norms(kind, norm):
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    x, name = some_input(kind), "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    for module in (theirs, ours):
        torch.manual_seed(3)
        norm(module, name)
        module.eval()
    assert_equal(results(ours, x), results(theirs, x))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(x)), flat(ours(x)))


@every
def test_a_parametrization_of_ones_own(kind):
    class Skew(nn.Module):
        def forward(self, weight):
            return weight.sin() + 0.1

    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    for module in (theirs, ours):
        for name in [name for name, _ in module.named_parameters()]:
            parametrize.register_parametrization(module, name, Skew())
    x = some_input(kind)
    assert_equal(results(ours, x), results(theirs, x))


@every_layer
def test_pruning_masks_hold_through_training(kind):
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    x = some_input(kind)
    for module in (theirs, ours):
        torch.manual_seed(3)
        prune.random_unstructured(module, "weight_hh_l0", amount=0.5)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
        prune.remove(module, "weight_hh_l0")
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert (ours.weight_hh_l0 == 0).sum() >= ours.weight_hh_l0.numel() // 2


@every_layer
def test_tied_weights_get_the_sum_of_their_gradients(kind):
    both = []
    for layer in twins(kind, input_size=4, hidden_size=4, num_layers=2):
        layer.weight_hh_l1 = layer.weight_hh_l0
        layer.bias_ih_l1 = layer.bias_ih_l0
        both.append(results(layer, torch.ones(5, 2, 4, dtype=torch.float64)))
    assert_equal(both[1], both[0])


def test_two_layers_of_one_parameter():
    first = gpu_rnn.GRU(4, 4, dtype=torch.float64)
    second = copy.deepcopy(first)
    for name, parameter in first.named_parameters():
        setattr(second, name, parameter)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    tied = torch.autograd.grad(second(first(x)[0])[0].sum(), list(first.parameters()))
    twice = torch.autograd.grad(first(first(x)[0])[0].sum(), list(first.parameters()))
    torch.testing.assert_close(tied, twice)


# ---- moves ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_to_another_dtype(kind, dtype):
    layer = getattr(gpu_rnn, kind)(3, 4)
    assert layer.to(dtype) is layer
    outputs = flat(layer(some_input(kind, dtype=dtype)))
    assert {output.dtype for output in outputs} == {dtype}
    sum(output.sum() for output in outputs).backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {dtype}


@every
def test_meta_device_and_deferred_values(kind):
    torch.manual_seed(7)
    expected = getattr(gpu_rnn, kind)(3, 4)
    with torch.device("meta"):
        layer = getattr(gpu_rnn, kind)(3, 4)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    torch.manual_seed(7)
    layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected.parameters(), strict=True))
    with torch.device("meta"):
        again = getattr(gpu_rnn, kind)(3, 4)
    again.load_state_dict(expected.state_dict(), assign=True)
    x = some_input(kind, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(flat(again(x)), flat(expected(x))))


@every
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_alone(kind, fake):
    """Forward and backward without numbers, as torch.nn's layers do it."""
    with FakeTensorMode() if fake else torch.device("meta"):
        layer, x = getattr(gpu_rnn, kind)(3, 4, zoneout=0.1), some_input(kind, dtype=torch.float32)
        outputs = flat(layer(x))
        sum(output.sum() for output in outputs).backward()
    expected = flat(getattr(gpu_rnn, kind)(3, 4)(some_input(kind, dtype=torch.float32)))
    assert [output.shape for output in outputs] == [output.shape for output in expected]
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def test_shared_memory_and_flatten_parameters_change_nothing():
    layer, x = gpu_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    before = layer(x)[0]
    layer.share_memory()
    layer.flatten_parameters()
    assert torch.equal(layer(x)[0], before)


@every
def test_optimizers_that_step_in_backward(kind):
    """Post-accumulate hooks change the weights while backward runs, each after its own gradient."""
    _, layer = twins(kind, input_size=3, hidden_size=4)
    expected = {name: p - 0.1 * g for (name, p), g in zip(layer.named_parameters(), gradients(layer, kind))}

    def step(parameter):
        parameter.data.sub_(0.1 * parameter.grad)

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    sum(output.sum() for output in flat(layer(some_input(kind).fill_(0.5)))).backward()
    assert_equal(dict(layer.named_parameters()), expected)


def gradients(layer, kind):
    outputs = flat(layer(some_input(kind).fill_(0.5)))
    return torch.autograd.grad(sum(output.sum() for output in outputs), list(layer.parameters()))


# ---- graphs ---------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(kind, reentrant):
    _, layer = twins(kind, input_size=3, hidden_size=4, num_layers=2, dropout=0.5)
    x = some_input(kind).requires_grad_()
    results = []
    for run in (layer, lambda a: checkpoint(layer, a, use_reentrant=reentrant)):
        torch.manual_seed(5)
        layer.zero_grad()
        x.grad = None
        run(x)[0].square().sum().backward()
        results.append([tensor.grad.clone() for tensor in (x, *layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointing_under_autocast():
    layer, x = gpu_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    results = []
    for run in (layer, lambda a: checkpoint(layer, a, use_reentrant=False)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(x)[0].float().sum()
        results.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_saved_tensors_can_be_moved_away():
    layer, x = gpu_rnn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    with torch.autograd.graph.save_on_cpu():
        y, _ = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), list(layer.parameters())), expected))


def test_a_weight_changed_before_backward_is_noticed():
    layer = gpu_rnn.LSTM(3, 4)
    y, _ = layer(torch.randn(5, 2, 3))
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_the_gradients_requested_are_computed(monkeypatch):
    requested, run = [], dispatch.backward
    monkeypatch.setattr(dispatch, "backward", lambda *args: requested.extend(map(set, args[-1])) or run(*args))
    layer, x = gpu_rnn.GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(False)
    layer(x)[0].sum().backward()
    layer.requires_grad_(False)(x)[0].sum().backward()
    assert requested == [{"x", "w_hh", "b_ih"}, {"x"}]


def test_the_last_states_alone_carry_a_gradient():
    """The gradient of y is then none at all, not zeros that were allocated."""
    theirs, ours = twins("LSTM", input_size=3, hidden_size=4)
    x = some_input("LSTM")
    actual, expected = (
        torch.autograd.grad(layer(x)[1][1].sin().sum(), list(layer.parameters())) for layer in (ours, theirs)
    )
    torch.testing.assert_close(actual, expected)
