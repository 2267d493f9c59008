"""NaN on its way forward and back, as torch has it: what is bounded gives NaN on, but no gradient beyond its bound."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import gpu_rnn
from gpu_rnn.kernels.mathematics import maximum, minimum

from .tolerance import assert_close

PLACES = ["x", "h0", "weight", "gradient"]
SHAPES = {"one": {}, "stacked": {"num_layers": 2, "bidirectional": True}}
T, B, I, H = 4, 3, 2, 5


class Case(NamedTuple):
    """What is run, `run(x, h0)` -> (y, hT), and what has gradients: x, h0, then the parameters."""

    run: Callable
    leaves: list[torch.Tensor]

    def results(self, place):
        """y, hT and all gradients; those of y in sequence 1 at the first time step may be NaN."""
        outputs, loss = self.run(*self.leaves[:2]), 0
        for k, out in enumerate(outputs):
            d = torch.linspace(1, 2, out.numel()).reshape(out.shape).to(out)
            if place == "gradient" and k == 0:
                d[0, 1] = float("nan")
            loss = loss + (d * out).sum()
        return [*outputs, *torch.autograd.grad(loss, self.leaves)]

    def second(self, place):
        """The gradients of a sum of gradients, of the squares of y: in x, h0, and the gradient of the squares."""
        y, _ = self.run(*self.leaves[:2])
        d = torch.linspace(1, 2, y.numel()).reshape(y.shape).to(y)
        if place == "gradient":
            d[0, 1] = float("nan")
        gradients = torch.autograd.grad(y.square(), self.leaves, d.requires_grad_(), create_graph=True)
        return torch.autograd.grad(sum(gradient.sum() for gradient in gradients), [*self.leaves[:2], d])


class Three(NamedTuple):
    """The same case by our code, by torch in the same dtype, and by torch in float64."""

    ours: Case
    peer: Case
    exact: Case

    def compare(self, place, dtype, results=Case.results):
        """NaN for NaN, and all else within the tolerance of `dtype`."""
        results = [[wide(array) for array in results(case, place)] for case in self]
        for k, (ours, peer, exact) in enumerate(zip(*results, strict=True)):
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact), f"NaN of result {k}")
            there = ~np.isnan(exact)
            assert_close(ours[there], exact[there], peer[there], dtype, f"result {k}")
        finite, spoiled = (any(look(array).any() for array in results[0]) for look in (np.isfinite, np.isnan))
        assert finite, "there is more than NaN"
        assert spoiled


def wide(array):
    return array.detach().cpu().double().numpy()


def spoil(place, x, h0, weight):
    """With NaN in one of them: in sequence 1, or in all."""
    if place != "gradient":
        with torch.no_grad():
            {"x": x[2, 1], "h0": h0[0, 1], "weight": weight[0]}[place][0] = float("nan")


def leaves(arrays, dtype, device="cpu"):
    return [array.detach().to(device, dtype).requires_grad_() for array in arrays]


def relu(place, shape="stacked", device="cpu", backend=None, peer=torch.float32):
    """RNN with the rectifier in float32. Its biases decide which units are active, not rounding. `peer`: the dtype of
    torch.nn's that is as precise."""
    torch.manual_seed(1)
    drawn = nn.RNN(I, H, nonlinearity="relu", **SHAPES[shape])
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if name.startswith("bias_ih"):
                parameter.copy_(torch.where(torch.arange(H) % 3 == 0, -2.0, 2.0))
    x, h0 = torch.randn(T, B, I), torch.rand(len(drawn.all_weights), B, H)
    spoil(place, x, h0, drawn.weight_hh_l0)
    made = {"ours": (gpu_rnn.RNN, torch.float32, device, {"backend": backend})}
    made |= {name: (nn.RNN, dtype, "cpu", {}) for name, dtype in (("peer", peer), ("exact", torch.float64))}
    cases = {}
    for name, (kind, dtype, where, options) in made.items():
        layer = kind(I, H, nonlinearity="relu", **SHAPES[shape], **options).to(where, dtype)
        layer.load_state_dict(drawn.state_dict())
        cases[name] = Case(layer, [*leaves((x, h0), dtype, where), *layer.parameters()])
    return Three(**cases)


@gpu_rnn.cell(gates="a", states="h")
def bounded(x, h, state):
    return (minimum(maximum(x[0] + h[0], -0.5), 0.5) + 0.5 * state[0],)


@gpu_rnn.cell(gates="ab", states="h")
def larger(x, h, state):
    return (maximum(x[0] + h[0], x[1] + h[1]) + 0.5 * state[0],)


def by_loop(step):
    """The cell's loop over time in torch, given w_ih, w_hh, b_ih, b_hh."""

    def run(weights, x, h0):
        w_ih, w_hh, b_ih, b_hh = weights
        h, outputs = h0[0], []
        for now in x:
            h = step(now @ w_ih.T + b_ih + h @ w_hh.T + b_hh) + 0.5 * h
            outputs.append(h)
        return torch.stack(outputs), h[None]

    return run


def bounds(place, backend=None):
    """A cell of one's own, in float32; torch.maximum and torch.minimum give NaN on."""
    torch.manual_seed(2)
    layer = bounded(I, H, backend=backend)
    x, h0 = 2 * torch.randn(T, B, I), torch.rand(1, B, H)

    def step(a):
        bound = torch.tensor(0.5, dtype=a.dtype)
        return torch.minimum(torch.maximum(a, -bound), bound)

    return custom(layer, step, place, x, h0)


def pairs(place, backend=None):
    """The larger of two, in float32; in whole numbers, where they can be equal: always in unit 0. "second": that is NaN
    in unit 1, at the only time step."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randint(-1, 2, shape, generator=generator).float()

    layer = larger(I, H, backend=backend)
    x, h0 = drawn(1 if place == "second" else T, B, I), drawn(1, B, H)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(drawn(*parameter.shape))
            parameter[H] = parameter[0]
        if place == "second":
            layer.bias_ih_l0[H + 1] = float("nan")
    return custom(layer, lambda a: torch.maximum(a[:, :H], a[:, H:]), place, x, h0)


def custom(layer, step, place, x, h0):
    if place != "second":
        spoil(place, x, h0, layer.weight_hh_l0)
    cases = [Case(layer, [*leaves((x, h0), torch.float32), *layer.parameters()])]
    for dtype in (torch.float32, torch.float64):
        weights = leaves(layer.parameters(), dtype)
        run = by_loop(step)
        cases.append(
            Case(lambda x, h0, run=run, weights=weights: run(weights, x, h0), [*leaves((x, h0), dtype), *weights])
        )
    return Three(*cases)
