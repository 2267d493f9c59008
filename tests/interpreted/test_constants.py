"""Constants of generated Triton code have the precision of what is computed."""

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import config

from .. import constants, reference_modifiers


@pytest.mark.parametrize(("dtype", "how"), [("float64", "stepwise"), ("float32", "stepwise"), ("float32", "sequence")])
def test_every_operation(dtype, how, monkeypatch):
    constants.define(monkeypatch)
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    made = reference_modifiers.drawn("constants", {}, dtype, 5, 3, 4, 6)
    constants.check(made, made.case.run(triton.forward, triton.backward), dtype)


def test_a_clipped_cell_state_has_no_gradient():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    w_ih, w_hh = (2 * torch.randn(shape, dtype=torch.float64) for shape in ((20, 3), (20, 5)))
    _, (_, c) = gpu_rnn.lstm(x, w_ih, w_hh, cell_clip=0.7, backend="triton")
    (ours,) = torch.autograd.grad(c.sum(), x)

    h = after = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(4):
        i, f, g, o = (x[t] @ w_ih.T + h @ w_hh.T).chunk(4, -1)
        after = (torch.sigmoid(f) * after + torch.sigmoid(i) * torch.tanh(g)).clamp(-0.7, 0.7)
        h = torch.sigmoid(o) * torch.tanh(after)
    (exact,) = torch.autograd.grad(after.sum(), x)
    np.testing.assert_allclose(c.detach(), after.detach(), rtol=1e-14)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-14)
