"""NaN on its way forward and back, as torch has it: what is bounded from one side or both gives it on."""

import torch
from torch import nn

import gpu_rnn
from gpu_rnn.kernels.mathematics import maximum, minimum

PLACES = ["x", "h0", "weight"]
SHAPES = {"one": {}, "stacked": {"num_layers": 2, "bidirectional": True}}
T, B, I, H = 4, 3, 2, 5


def compare(outputs, given):
    """Outputs and gradients of two, NaN for NaN."""
    results = []
    for outs, inputs in zip(outputs, given, strict=True):
        loss = sum((torch.linspace(1, 2, out.numel()).reshape(out.shape).to(out.device) * out).sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(loss, inputs)])
    close = {"rtol": 1e-10, "atol": 1e-12} if outputs[0][0].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], equal_nan=True, **close)
    finite, nan = (any(look(array).any() for array in results[0][2:]) for look in (torch.isfinite, torch.isnan))
    assert finite, "there is more than NaN"
    assert nan


def spoiled(place, x, h0, weight):
    """With NaN in one of them: in row 1, or in all."""
    with torch.no_grad():
        {"x": x[2, 1], "h0": h0[0, 1], "weight": weight[0]}[place][0] = float("nan")


def relu(place, shape, dtype, device="cpu", backend=None):
    """RNN with the rectifier, by torch.nn."""
    torch.manual_seed(1)
    theirs = nn.RNN(I, H, nonlinearity="relu", **SHAPES[shape], dtype=dtype)
    ours = gpu_rnn.RNN(I, H, nonlinearity="relu", **SHAPES[shape], dtype=dtype, backend=backend, device=device)
    x, h0 = torch.randn(T, B, I, dtype=dtype), torch.rand(len(theirs.all_weights), B, H, dtype=dtype)
    spoiled(place, x, h0, theirs.weight_hh_l0)
    ours.load_state_dict(theirs.state_dict())
    given = [[a.detach().to(where).requires_grad_() for a in (x, h0)] for where in (device, "cpu")]
    outputs = [layer(*each) for layer, each in zip((ours, theirs), given)]
    outputs[0] = [out.cpu() for out in outputs[0]]
    given = [[*each, *layer.parameters()] for layer, each in zip((ours, theirs), given)]
    return outputs, given


@gpu_rnn.cell(gates="a", states="h")
def bounded(x, h, state):
    return (minimum(maximum(x[0] + h[0], -0.5), 0.5) + 0.5 * state[0],)


def bounds(place, dtype, backend=None):
    """A cell of one's own, by a loop; torch.maximum and torch.minimum give NaN on."""
    torch.manual_seed(2)
    made, bound = bounded(I, H, dtype=dtype, backend=backend), torch.tensor(0.5, dtype=dtype)
    x, h0 = torch.randn(T, B, I, dtype=dtype), torch.rand(1, B, H, dtype=dtype)
    spoiled(place, x, h0, made.weight_hh_l0)
    given, outputs = [x.requires_grad_(), h0.requires_grad_(), *made.parameters()], []
    w_ih, w_hh, b_ih, b_hh = made.parameters()
    h = h0[0]
    for now in x:
        a = now @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        h = torch.minimum(torch.maximum(a, -bound), bound) + 0.5 * h
        outputs.append(h)
    return (made(x, h0), (torch.stack(outputs), h[None])), (given, given)
