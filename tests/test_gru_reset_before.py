"""Cells with a second recurrent projection: how they are split, and the GRU with its reset before it by backend."""

from functools import partial

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import cuda, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.mathematics import recurrent, sigmoid, tanh

from . import calls, cuda_on_cpu, reference_modifiers
from .cuda_emulator import runtime

NAME = "gru+before"
OPTIONS = pytest.mark.parametrize(
    "options", [{}, *reference_modifiers.OPTIONS.values()], ids=["plain", *reference_modifiers.OPTIONS]
)
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


def check(made, forward, backward):
    """A case by a backend, against the equations in a loop."""
    backend = TwoPass(calls.operations(forward, backward))
    reference_modifiers.check(made, made.case.run(backend.forward, backend.backward))


@OPTIONS
def test_numpy(options):
    for B, rows, reverse in ((3, None, False), (2, 1, True)):
        made = reference_modifiers.drawn(NAME, options, "float32", 5, B, 4, 6, rows=rows, reverse=reverse)
        check(made, numpy_backend.forward, numpy_backend.backward)


@pytest.mark.parametrize(
    ("dtype", "T", "B"), [("float64", 1, 3), ("float64", 4, 2), ("float32", 40, 9), ("float32", 3, 0)]
)
def test_numpy_in_other_sizes(dtype, T, B):
    check(
        reference_modifiers.drawn(NAME, reference_modifiers.OPTIONS["all"], dtype, T, B, 4, 5),
        numpy_backend.forward,
        numpy_backend.backward,
    )


@on_host_runtime
@pytest.mark.parametrize(("option", "reverse"), list(zip(["plain", *reference_modifiers.OPTIONS], [False, True] * 4)))
def test_cuda_stepwise(option, reverse):
    check(
        reference_modifiers.drawn(
            NAME, reference_modifiers.OPTIONS.get(option, {}), "float32", 5, 3, 4, 6, reverse=reverse
        ),
        *cuda_on_cpu.per_step_passes(),
    )


@on_host_runtime
@pytest.mark.parametrize("scope", persistent.SCOPES)
@pytest.mark.parametrize("option", ["plain", "reset_state", "all"])
def test_cuda_persistent(option, scope, monkeypatch):
    monkeypatch.setattr(persistent, "select", partial(persistent.select, scope=scope))
    monkeypatch.setattr(per_step, "run_forward", None)
    cuda.config_of.cache_clear()
    on = persistent.DEVICES["h200"]
    check(
        reference_modifiers.drawn(
            NAME, reference_modifiers.OPTIONS.get(option, {}), "bfloat16", 5, 9, 4, 20, reverse=option == "reset_state"
        ),
        *cuda_on_cpu.passes(on),
    )
    cuda.config_of.cache_clear()


# ---- definitions ----------------------------------------------------------------------------------------------------


def test_the_cut():
    """What the second phase needs is handed on; what it can make again isn't; gates are saved in one place."""
    cell = cells.get(NAME)
    assert (cell.states, cell.flags, cell.E, cell.grad) == ("h", (), 0, None)
    run = cell.lowered
    assert (run.states, run.flags) == ("h01", ("phase",))
    assert (run.K, run.separate) == (1, (False,) * 3), "r or n; z is a state by then"
    whole = reference_modifiers.apply_modifiers(cell, **reference_modifiers.OPTIONS["all"] | {"zoneout": (0.3,)})
    assert whole.lowered.states == "h01", "a reset h is made again"


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (lambda x, h, s: (recurrent(0, s[0]) + recurrent(1, s[0] * x[0]),), "at most one value per time step"),
        (lambda x, h, s: (recurrent(0, recurrent(1, s[0])),), "at most one value per time step"),
        (lambda x, h, s: (recurrent(2, s[0] * h[0]),), "for gate 2; the cell has 2 gates"),
        (lambda x, h, s: (h[1] + recurrent(1, s[0] * h[0]),), "this cell uses both"),
    ],
)
def test_definitions_that_can_not_be_split(step, what):
    with pytest.raises(ValueError, match=what):
        cells.make_cell("bad", "ab", "h", step)


def test_recurrent_is_for_definitions_alone():
    with pytest.raises(TypeError, match=r"recurrent\(\) takes a traced value of a cell definition, got float"):
        recurrent(0, 1.0)


# ---- a cell of one's own --------------------------------------------------------------------------------------------


def test_two_states_with_two_products(rng):
    """A cell whose other state is changed in both passes, with its history; against torch."""

    @gpu_rnn.cell(gates="abn", states="hc", units=("p",), check=True)
    def Twofold(x, h, state, units):
        a, b = sigmoid(x[0] + h[0]), tanh(x[1] + h[1] + units[0] * state[1])
        n = tanh(x[2] + recurrent(2, a * state[0] + b))
        return n * b, a * state[1] + n

    layer = Twofold(3, 4, bidirectional=True, dtype=torch.float64)
    x, hx = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 2, 2, 4, dtype=torch.float64)
    y, last, states = layer(x, (hx[0], hx[1]), return_states=True, lengths=torch.tensor([5, 2]))
    weights = dict(layer.named_parameters())

    def by_hand(end):
        w = {name: weights[f"{name}_l0{end}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_p")}
        h, c = hx[:, 1 if end else 0]
        history = [None] * 5
        for t in reversed(range(5)) if end else range(5):
            xs = (x[t] @ w["weight_ih"].T + w["bias_ih"]).chunk(3, -1)
            hs = (h @ w["weight_hh"].T + w["bias_hh"]).chunk(3, -1)
            a, b = torch.sigmoid(xs[0] + hs[0]), torch.tanh(xs[1] + hs[1] + w["weight_p"] * c)
            n = torch.tanh(xs[2] + (a * h + b) @ w["weight_hh"][8:].T + w["bias_hh"][8:])
            there = (t < torch.tensor([5, 2]))[:, None]
            h, c = torch.where(there, n * b, h), torch.where(there, a * c + n, c)
            history[t] = torch.where(there, h, 0.0), torch.where(there, c, 0.0)
        return [torch.stack(each) for each in zip(*history)], (h, c)

    (forward, f_last), (back, b_last) = by_hand(""), by_hand("_reverse")
    expected = [torch.cat([forward[0], back[0]], -1), *map(torch.stack, zip(f_last, b_last))]
    expected += [torch.stack(pair) for pair in zip(forward, back)]
    actual = [y, *last, *states]
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(sum(o.sin().sum() for o in results), [*layer.parameters()])
        for results in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


# ---- layers ---------------------------------------------------------------------------------------------------------


def made(**options):
    torch.manual_seed(3)
    return gpu_rnn.GRU(3, 4, reset_after=False, dtype=torch.float64, **options)


def test_transforms():
    layer, x = made(num_layers=2), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    together = torch.func.vmap(lambda x: layer(x)[0])(x)
    torch.testing.assert_close(together, torch.stack([layer(member)[0] for member in x]))
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x[0],), (x[1],))
    eps = 1e-6
    numeric = (layer(x[0] + eps * x[1])[0] - layer(x[0] - eps * x[1])[0]) / (2 * eps)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_export_with_dynamic_sizes():
    layer = made(bidirectional=True).eval()
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: T, 1: B},)).module()
    longer = torch.randn(9, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(program(longer), layer(longer))


def test_a_cell_a_step_and_truncated_gradients_are_the_layer():
    layer, cell = made(), gpu_rnn.GRUCell(3, 4, reset_after=False, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y, hT = layer(x)
    h, hx = None, None
    for t in range(5):
        h, (step, hx) = cell(x[t], h), layer.step(x[t], hx)
        torch.testing.assert_close(h, y[t])
        torch.testing.assert_close(step, y[t])
    windows = [window for window, _ in gpu_rnn.tbptt(layer, x, 2, 3)]
    torch.testing.assert_close(torch.cat(windows), y)
    assert "reset_after=False" in repr(cell)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """As good as the other form, which torch.nn has, to a few ulp of outputs below 1."""
    layer = gpu_rnn.GRU(3, 8, reset_after=False, dtype=dtype)
    x = torch.randn(6, 3, 3).to(dtype)
    wide = gpu_rnn.GRU(3, 8, reset_after=False, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    error = (layer(x)[0].double() - wide(x.double())[0]).abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_inspect_and_explain():
    layer, x = made(), torch.randn(5, 2, 3, dtype=torch.float64)
    inside = gpu_rnn.inspect(layer, x)
    y = layer(x)[0].detach().numpy()
    np.testing.assert_allclose(inside["h"], y, rtol=1e-12)
    before = np.concatenate([np.zeros((1, 2, 4)), y[:-1]])
    np.testing.assert_allclose(inside["z"] * before + (1 - inside["z"]) * inside["n"], y, rtol=1e-12)
    (explained,) = gpu_rnn.explain(layer, x)
    assert explained.plan.startswith("two kernel steps per time step, since the cell has a second recurrent matmul\n")
    assert explained.plan.count("input projection") == 1
    assert explained.cudnn == "none"
