"""Constants in a cell definition: as precise as what is computed, and as good a new state as any other value.

Triton's part: `tests/interpreted/test_constants.py`, and `tests/test_triton_compile.py`.
"""

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import numpy
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.codegen.cpp import render_cell as cuda_text
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.mathematics import center, mean, positive, recurrent, rms_normalize, tanh, where

from . import constants, cuda_on_cpu, reference_modifiers
from .cuda_emulator import runtime

HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
BOTH = pytest.mark.parametrize("dtype", ["float64", "float32"])


@pytest.fixture
def forgotten(monkeypatch):
    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))
    yield
    cells.get.cache_clear()


@BOTH
def test_every_operation_in_numpy(dtype, forgotten, monkeypatch):
    constants.define(monkeypatch)
    made = reference_modifiers.drawn("constants", {}, dtype, 5, 3, 4, 6, reverse=True)
    constants.check(made, made.case.run(numpy.forward, numpy.backward), dtype)


@HOST
@BOTH
def test_every_operation_in_cuda(dtype, forgotten, monkeypatch):
    constants.define(monkeypatch)
    made = reference_modifiers.drawn("constants", {}, dtype, 5, 3, 4, 6)
    constants.check(made, made.case.mapped(torch.Tensor.numpy).run(*cuda_on_cpu.per_step_passes()), dtype)


def test_every_operation_in_second_derivatives(forgotten, monkeypatch):
    """Of the layer against torch's own, of a loop."""
    constants.define(monkeypatch)
    made = reference_modifiers.drawn("constants", {}, "float64", 4, 2, 3, 5)
    case = made.case
    x, w_ih, w_hh, b_ih, b_hh = (a.clone().requires_grad_() for a in (case.x, *case.weights[:4]))

    def loop(x):
        state = case.state
        for x_t in x:
            parts = (x_t @ w_ih.T + b_ih).chunk(2, -1), (state[0] @ w_hh.T + b_hh).chunk(2, -1)
            state = constants.published("constants", *parts, state)
        return state

    def layer(x):
        weights = gpu_rnn.functional.Weights(w_ih, w_hh, b_ih, b_hh)
        options = gpu_rnn.functional.Options()
        return gpu_rnn.functional.run("constants", x, weights, case.state, options)[1]

    def second(run):
        outputs = run(x)
        (first,) = torch.autograd.grad(outputs, x, case.dlast, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, w_ih, w_hh))

    for ours, theirs in zip(second(layer), second(loop), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


# ---- new states that are no value of every unit ---------------------------------------------------------------------

STATES = {
    "a constant": lambda x, h, state: (tanh(x[0] + h[0] + state[1]), 0.7),
    "a constant output": lambda x, h, state: (0.7, tanh(x[0] + state[1])),
    "the same for all units": lambda x, h, state: (tanh(x[0] + h[0] + state[1]), mean(tanh(x[0]))),
    "an output that is": lambda x, h, state: (mean(tanh(x[0] + h[0])), state[1] + x[0]),
    "two constants": lambda x, h, state: (tanh(x[0] + h[0] + state[1]), where(x[0], 0.7, 0.1)),
    "of an input": lambda x, h, state: (x[0], state[0]),
    "by a part alone": lambda x, h, state: (tanh(x[0] + h[0]), positive(h[0]) * state[0]),
}
SAME = {
    "a constant": lambda x, h, state: (torch.tanh(x[0] + h[0] + state[1]), torch.full_like(h[0], 0.7)),
    "a constant output": lambda x, h, state: (torch.full_like(h[0], 0.7), torch.tanh(x[0] + state[1])),
    "the same for all units": lambda x, h, state: (
        torch.tanh(x[0] + h[0] + state[1]), torch.tanh(x[0]).mean(-1, keepdim=True) + 0 * x[0],
    ),
    "an output that is": lambda x, h, state: (
        torch.tanh(x[0] + h[0]).mean(-1, keepdim=True) + 0 * x[0], state[1] + x[0],
    ),
    "two constants": lambda x, h, state: (
        torch.tanh(x[0] + h[0] + state[1]), 0.1 + 0.6 * (x[0] > 0).to(x[0]),
    ),
    "of an input": lambda x, h, state: (x[0], state[0]),
    "by a part alone": lambda x, h, state: (torch.tanh(x[0] + h[0]), (h[0] > 0).to(h[0]) * state[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_any_value_is_a_new_state(name, forgotten):
    """As a layer, a function with modifiers, a stream, and looked into; against a loop in torch."""
    cls = gpu_rnn.cell(STATES[name], gates="a", states="hc", name=name.replace(" ", "_"), check=True)
    torch.manual_seed(0)
    layer, x = cls(3, 4, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y, (h, c) = layer(x)
    state, outputs = [torch.zeros(2, 4, dtype=torch.float64)] * 2, []
    for x_t in x:
        a = x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0
        # A layer whose cell reads no h has no recurrent weights.
        reads_h = hasattr(layer, "weight_hh_l0")
        b = state[0] @ layer.weight_hh_l0.T + layer.bias_hh_l0 if reads_h else torch.zeros_like(a)
        state = SAME[name]((a,), (b,), state)
        outputs.append(state[0])
    exact = torch.stack(outputs)
    torch.testing.assert_close((y, h[0], c[0]), (exact, *state), rtol=1e-13, atol=1e-14)

    def gradients(y, c):
        return torch.autograd.grad(y.sum() + c.square().sum() + 0 * x.sum(), x)

    torch.testing.assert_close(gradients(y, c), gradients(exact, state[1]), rtol=1e-13, atol=1e-14)
    listen = gpu_rnn.stream(layer, 2)
    for x_t, y_t in zip(x, exact):
        torch.testing.assert_close(listen(x_t), y_t, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(listen.state[1][0], state[1])
    ragged, (_, last), (_, every) = layer(x, lengths=torch.tensor([5, 3]), return_states=True)
    torch.testing.assert_close(ragged[:3], exact[:3], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close((last[0, 0], every[0, -1, 0]), (state[1][0],) * 2, rtol=1e-13, atol=1e-14)
    inside = gpu_rnn.inspect(layer, x) if name not in ("a constant output", "of an input") else None
    if inside is not None:
        torch.testing.assert_close(torch.from_numpy(inside["c"][-1]), state[1].detach(), rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda x: (layer(x)[0] + 0 * x.sum()).square(), x)


@HOST
@pytest.mark.parametrize("name", ["a constant", "a constant output", "the same for all units"])
def test_a_persistent_kernel_hands_on_any_state(name, forgotten, monkeypatch):
    cells.register(cells.make_cell("mine", "a", "hc", STATES[name]))

    def published(_, *inputs):
        return [value + 0 * sum(map(sum, inputs)) for value in SAME[name](*inputs)]

    monkeypatch.setattr(reference_modifiers, "published", published)
    made = reference_modifiers.drawn("mine", {}, "float32", 4, 3, 5, 20)
    constants.check(made, made.case.run(*cuda_on_cpu.passes(persistent.DEVICES["h200"])), "float32")


# ---- deep definitions -----------------------------------------------------------------------------------------------


def deep(tanh, mean, where, rounds):
    """With something to go down in every round: a derivative, a mean, a choice."""

    def step(x, h, state):
        a, few = x[0] + h[0], min(rounds, 10)
        for k in range(rounds):
            a = tanh(a * (1 + 0.7 / (k + 1)) + 0.1 * state[0])
        for _ in range(few):
            a = where(a - 0.1, a - mean(a), 0.7 * tanh(a))
        return (a,)

    return step


def test_a_definition_may_be_deeper_than_pythons_stack(forgotten):
    """By NumPy: a C++ compiler doesn't get through so long a function in the time that it has."""
    cls = gpu_rnn.cell(deep(tanh, mean, where, 400), gates="a", states="h", name="Deep")
    torch.manual_seed(0)
    layer = cls(3, 4, dtype=torch.float64, backend="numpy")
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    published = deep(
        torch.tanh, lambda a: a.mean(-1, keepdim=True), lambda c, a, b: torch.where(c > 0, a, b), rounds=400
    )
    h, outputs = torch.zeros(2, 4, dtype=torch.float64), []
    for x_t in x:
        a, b = x_t @ layer.weight_ih_l0.T + layer.bias_ih_l0, h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        (h,) = published((a,), (b,), (h,))
        outputs.append(h)
    exact = torch.stack(outputs)
    torch.testing.assert_close(y, exact, rtol=1e-9, atol=1e-9)
    ours, theirs = (
        torch.autograd.grad(torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().sum(), x)
        for out in (y, exact)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    cell = cells.get("Deep")
    assert cuda_text(cell).count("tanh(") > 800
    assert len(repr(cells.step_graph(cell).outputs)) < 5000
    assert gpu_rnn.inspect(layer, x)["h"].shape == (2, 2, 4)


def test_a_deep_definition_with_a_product_of_its_own(forgotten):
    def step(x, h, state):
        a = x[1] + recurrent(1, deep(tanh, mean, where, 400)(x, h, state)[0])
        return (deep(tanh, mean, where, 400)([a], [0.0], state)[0],)

    layer = gpu_rnn.cell(step, gates="ab", states="h", name="Twice")(3, 4, dtype=torch.float64, backend="numpy")
    y, _ = layer(torch.randn(2, 2, 3, dtype=torch.float64))
    assert y.isfinite().all()


def test_many_means_in_a_row_take_no_exponential_time(forgotten):
    def step(x, h, state):
        a = x[0] + h[0]
        for _ in range(12):
            a = rms_normalize(center(a))[0] * 0.7 + tanh(a)
        return (a,)

    cell = cells.make_cell("rows", "a", "h", step)
    assert len(cells.grad_graph(cell).nodes) < 1500, "and 12 times as many each round"


def test_a_value_made_of_itself_takes_no_exponential_time(forgotten):
    def step(x, h, state):
        a = 0.1 * state[0]
        for _ in range(60):
            a = 0.3 * a * a + 0.5 * a
        return (tanh(x[0] + h[0] + a),)

    gpu_rnn.cell(step, gates="a", states="h", name="Squares", check=True)
