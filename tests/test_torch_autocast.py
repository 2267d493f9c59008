"""Autocast and halves: whose dtype, how many casts, which gradients."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_rnn

from .test_layers import LAYERS, flat, twins

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


class Copies(TorchDispatchMode):
    """Counts the conversions of tensors of some shapes to halves. (On the CPU, NumPy then computes them in float32.)"""

    def __init__(self, *shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and tuple(args[0].shape) in self.shapes:
            self.count += kwargs.get("dtype") in HALVES
        return function(*args, **kwargs or {})


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
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == dtype
        assert torch.equal(output, wanted)
    sum(output.float().square().sum() for output in outputs).backward()
    sum(output.float().square().sum() for output in expected).backward()
    for parameter, wanted in zip(layer.parameters(), half.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, wanted.grad.float())


def test_a_cell_called_in_turn_casts_its_weights_once():
    cell, x = gpu_rnn.LSTMCell(3, 4), torch.randn(6, 2, 3)

    def run():
        state = None
        with torch.autocast("cpu", torch.bfloat16), Copies((16, 3), (16, 4), (16,)) as copies:
            for step in x:
                state = cell(step, state)
        return state[0], copies.count

    h, count = run()
    assert count == 4
    h.float().sum().backward()
    first = [parameter.grad.clone() for parameter in cell.parameters()]
    del h
    h, count = run()
    assert count == 4, "a cast outlived its graph"
    cell.zero_grad()
    h.float().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(cell.parameters(), first))


@pytest.mark.parametrize("change", ["in place", "new data", "optimizer"])
def test_changed_weights_are_cast_again_even_in_an_older_graphs_life(change):
    cell, x = gpu_rnn.GRUCell(3, 4), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        kept = cell(x)  # holds the first cast
        with torch.no_grad():
            if change == "in place":
                cell.weight_hh.mul_(3)
                cell.bias_ih.add_(1)
            elif change == "new data":
                cell.weight_hh.data = 3 * cell.weight_hh.data
                cell.bias_ih.data = 1 + cell.bias_ih.data
            else:
                for parameter in cell.parameters():
                    parameter.grad = torch.ones_like(parameter)
                torch.optim.SGD(cell.parameters(), lr=1.0).step()
        changed = cell(x)
        with torch.no_grad():
            expected = cell(x)
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, kept)


def test_without_a_cache_every_call_casts():
    cell, x = gpu_rnn.GRUCell(3, 4), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Copies((12, 3), (12, 4), (12,)) as copies:
        cell(x, cell(x))
    assert copies.count == 8


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
    for found, wanted in zip(
        *(torch.autograd.grad(out.float().sum(), list(layer.parameters())) for out in (y, expected))
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@every_half
def test_autocast_on_a_gpu_follows_its_dtype(dtype):
    layer, x = gpu_rnn.LSTM(3, 4, device="cuda"), torch.randn(5, 2, 3, device="cuda")
    with torch.autocast("cuda", dtype):
        y, _ = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
