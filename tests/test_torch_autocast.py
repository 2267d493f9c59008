"""Autocast and half precision: whose dtype, how many casts, which gradients."""

import pytest
import torch
from torch import nn

import gpu_rnn

from .test_layers import LAYERS, flat, twins

HALF_DTYPES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)


@every_half
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_is_as_good_as_parameters_of_its_dtype(kind, dtype):
    """The same numbers as a layer and an input of that dtype; gradients arrive in float32."""
    _, layer = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True, dtype=torch.float32)
    _, half = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True, dtype=torch.float32)
    half.to(dtype)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype):
        outputs = flat(layer(x))
    expected = flat(half(x.to(dtype)))
    for output, expected_output in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert torch.equal(output, expected_output)
    sum(output.float().square().sum() for output in outputs).backward()
    sum(output.float().square().sum() for output in expected).backward()
    for parameter, expected_parameter in zip(layer.parameters(), half.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, expected_parameter.grad.float())


@pytest.mark.parametrize("kind", ["LSTMCell", "LSTM", "stack"])
def test_graphs_of_calls_in_turn_keep_the_weights_once(kind):
    """The parameters, and no cast of them."""
    made = gpu_rnn.LSTM(3, 4, num_layers=2) if kind == "stack" else getattr(gpu_rnn, kind)(3, 4)
    x, hx, saved = torch.randn(6, 2, 3), None, []
    sizes = {parameter.shape for parameter in made.parameters()}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.detach(), lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        for step in x:
            hx = made(step, hx) if kind == "LSTMCell" else made(step[None], hx)[1]
    weights = [tensor for tensor in saved if tensor.shape in sizes]
    assert {tensor.data_ptr() for tensor in weights} == {parameter.data_ptr() for parameter in made.parameters()}


CHANGES = {
    "in place": lambda p: p.mul_(3),
    "new data": lambda p: setattr(p, "data", 3 * p.data),
    "in place of data": lambda p: p.data.mul_(3),
    "by NumPy": lambda p: p.detach().numpy().__imul__(3),
    "by another view": lambda p: p.detach().view(-1).data.mul_(3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"])
def test_changed_weights_are_cast_again_even_in_an_older_graphs_life(kind, change):
    """By the layer of torch.nn with the weights of now, which are of the dtype of autocast."""
    ours = getattr(gpu_rnn, kind)(3, 4)
    x = torch.randn(2, 3) if kind.endswith("Cell") else torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = flat(ours(x))  # holds what it was made of
        with torch.no_grad():
            for parameter in ours.parameters():
                change(parameter)
        after = flat(ours(x))
    theirs = getattr(nn, kind)(3, 4)
    theirs.load_state_dict(ours.state_dict())
    for actual, true, old in zip(after, flat(theirs(x)), before, strict=True):
        torch.testing.assert_close(actual.float(), true, rtol=0.03, atol=0.03)
        assert (actual - old).abs().max() > 0.1
    gradients = torch.autograd.grad(sum(out.float().sum() for out in after), list(ours.parameters()))
    expected = torch.autograd.grad(sum(out.sum() for out in flat(theirs(x))), list(theirs.parameters()))
    for actual, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=0.1, atol=0.1)


def test_the_graph_of_a_cast_is_differentiated_again():
    layer = gpu_rnn.GRU(3, 4)
    x = torch.randn(5, 2, 3).bfloat16().float().requires_grad_()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())

    def penalty(y):
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(layer.parameters()))

    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x)
    for actual, expected in zip(penalty(y), penalty(layer(x)[0]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_grad_scaler_steps_and_skips():
    model = nn.Linear(3, 3), gpu_rnn.LSTM(3, 4)
    parameters = [p for module in model for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in parameters]
    for inputs in (torch.randn(5, 2, 3), torch.full((5, 2, 3), torch.inf)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y, _ = model[1](model[0](inputs))
        scaler.scale(y.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if inputs.isfinite().all():
            stepped = [p.detach().clone() for p in parameters]
    assert not any(torch.equal(a, b) for a, b in zip(before, stepped))
    assert all(torch.equal(a, b) for a, b in zip(parameters, stepped)), "a step with infinite gradients was taken"
    assert scaler.get_scale() == 2.0**7


@every_half
def test_autocast_under_compile(dtype):
    layer, x = gpu_rnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        y, expected = compiled(x)[0], layer(x)[0]
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    for gradient, eager_gradient in zip(
        *(torch.autograd.grad(out.float().sum(), list(layer.parameters())) for out in (y, expected))
    ):
        torch.testing.assert_close(gradient, eager_gradient)


@pytest.mark.gpu
@every_half
def test_autocast_on_a_gpu_follows_its_dtype(dtype):
    layer, x = gpu_rnn.LSTM(3, 4, device="cuda"), torch.randn(5, 2, 3, device="cuda")
    with torch.autocast("cuda", dtype):
        y, _ = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
