"""A cell that takes every operation to constants that float32 can't hold; and the same equations in torch."""

from math import inf
from types import SimpleNamespace

import numpy as np
import torch

from gpu_rnn.kernels import cells, mathematics

from . import reference_modifiers
from .sequences import wide

GATES, STATES = "ab", "hcdefgijklmnpq"


def equations(of, x, h, state):
    """Each operation with a constant in each of its operands' places, and its derivative; one state for each."""
    u, v, c = x[0] + h[0], x[1] + h[1], state[1]
    return (
        0.7 * of.tanh(u - 0.37) + 0.1 * (c - 0.37 * state[9]),
        of.maximum(u, -0.37) * v,
        of.maximum(0.37, u) * of.minimum(of.maximum(v, -inf), inf),
        of.minimum(u, 0.37) * of.relu(v + 0.1),
        of.where(u - 0.1, 0.7, 0.37),
        of.where(u, v, 0.7) + of.where(v, 0.37, u),
        of.positive(u - 0.37) - 0.7,
        (u / 0.7 + 0.37 / (2.1 + u * u)) * (0.7 - v),
        of.sigmoid(u + 0.1) * of.exp(0.37 * of.tanh(v)),
        of.log(1.1 + u * u) * of.rsqrt(0.37 + v * v),
        of.mean(u * 0.37 + 0.1) * v,
        0.7,
        of.mean(of.tanh(u) - 0.1),
        of.where(of.maximum(u, v) - 0.1, c, 0.37),
    )


def step(x, h, state):
    return equations(mathematics, x, h, state)


def published(name, x, h, state, *more):
    """In torch, with tensors for numbers, as torch takes these for float32."""

    def tensor(value):
        return value if isinstance(value, torch.Tensor) else torch.full_like(state[0], value)

    of = SimpleNamespace(
        tanh=torch.tanh, sigmoid=torch.sigmoid, exp=torch.exp, log=torch.log, rsqrt=torch.rsqrt, relu=torch.relu,
        maximum=lambda a, b: torch.maximum(tensor(a), tensor(b)),
        minimum=lambda a, b: torch.minimum(tensor(a), tensor(b)),
        where=lambda condition, a, b: torch.where(condition > 0, tensor(a), tensor(b)),
        positive=lambda a: (a > 0).to(a.dtype), mean=lambda a: a.mean(-1, keepdim=True),
    )  # fmt: skip
    nothing = sum(0 * before for before in state)  # so that every result has a gradient
    return tuple(nothing + value for value in equations(of, x, h, state))


def define(monkeypatch):
    """Known as "constants" until the end of the test, also to the judge."""
    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))
    monkeypatch.setattr(reference_modifiers, "published", published)
    cells.register(cells.make_cell("constants", GATES, STATES, step))
    cells.get.cache_clear()


def check(made, results, dtype="float64"):
    """To a few ulp of the largest: constants rounded to float32 are further off."""
    truth = reference_modifiers.by_the_rules(made, torch.float64)
    for name, array in results.items():
        eps = np.finfo(dtype).eps
        atol = 200 * eps * max(1.0, np.abs(wide(truth[name])).max())
        np.testing.assert_allclose(wide(array), wide(truth[name]), rtol=0, atol=atol, err_msg=name)
