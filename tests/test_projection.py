"""Projections of the GRU's and Elman's outputs: our definition, in a loop in torch; and every backend against it."""

import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpu_rnn
from gpu_rnn.backends import numpy as numpy_backend

from . import cuda_on_cpu, reference_modifiers
from .conftest import sequence_arrays
from .cuda_emulator import runtime
from .reference_layers import FEATURES, PROJECTED, inputs, layer
from .test_modifiers import agree

EVERY = pytest.mark.parametrize("name", ["gru+projected", "rnn_tanh", "rnn_relu"])
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


@EVERY
@pytest.mark.parametrize(
    "options", [{}, {"reset": True, "reset_state": True, "hold": True, "dropout": True}], ids=["plain", "all"]
)
def test_numpy(name, options):
    for B, reverse in ((3, False), (9, True)):
        made = reference_modifiers.drawn(name, options, "float32", 5, B, 4, 6, 3, reverse=reverse)
        reference_modifiers.check(made, made.case.run(numpy_backend.forward, numpy_backend.backward))


@on_host_runtime
@EVERY
def test_cuda_stepwise(name):
    options = {"reset": True, "reset_state": True, "hold": True, "dropout": True}
    made = reference_modifiers.drawn(name, options, "float32", 6, 4, 3, 5, P=2, reverse=name == "rnn_relu")
    reference_modifiers.check(made, made.case.run(*cuda_on_cpu.per_step_passes()))


@pytest.mark.parametrize("feature", [None, "reset state", "both ends", "recurrent dropout", "everything"])
@pytest.mark.parametrize("name", PROJECTED)
def test_layers_by_the_rules(name, feature):
    if (name, feature) == ("rnn projected", "everything"):
        pytest.skip("no zoneout of a projected h")
    keywords, names = FEATURES.get(feature, ({}, []))
    made = layer(name, "stacked", **keywords)
    agree(made, *inputs(made, names))


@pytest.mark.parametrize("name", PROJECTED)
def test_compiled_exported_recomputed_and_a_step_at_a_time(name):
    made = layer(name, "stacked")
    x, hx, _ = inputs(made)
    torch._dynamo.reset()
    expected = made(x, hx)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x, hx), expected)
    made.recompute = True
    torch.testing.assert_close(made(x, hx), expected)
    forward = layer(name)
    listen, (y, _) = gpu_rnn.stream(forward, 3), forward(x)
    torch.testing.assert_close(torch.stack([listen(now).clone() for now in x]), y)
    inside = gpu_rnn.inspect(forward, x)
    np.testing.assert_allclose(inside["h"], y.detach())


@pytest.mark.parametrize("name", ["gru", "rnn_tanh"])
def test_functions(rng, name):
    P = 2
    x, weights, (h0, *_) = sequence_arrays(rng, name, 4, 2, 3, 5, P)
    kwargs = {"x": x, **weights._asdict(), "h0": h0}
    kwargs = {label: array for label, array in kwargs.items() if array is not None}
    kwargs |= {"s0": rng.standard_normal((2, 5))} if name == "gru" else {}
    function = gpu_rnn.gru if name == "gru" else gpu_rnn.rnn
    leaves = {label: torch.from_numpy(array).requires_grad_() for label, array in kwargs.items()}

    def run(*values):
        y, last = function(**dict(zip(leaves, values)))
        return y, *(last if isinstance(last, tuple) else (last,))

    assert gradcheck(run, [*leaves.values()], fast_mode=True)
    assert gradgradcheck(run, [*leaves.values()], fast_mode=True)
    (y, _), pullback = gpu_rnn.vjp(function, **kwargs)
    run(*leaves.values())[0].sum().backward()
    actual = pullback((np.ones_like(y), None))
    assert actual.keys() == kwargs.keys()
    for label, gradient in actual.items():
        np.testing.assert_allclose(gradient, leaves[label].grad, rtol=1e-12, atol=1e-14, err_msg=label)


BAD = {
    "s0 alone": ({"s0": np.ones((3, 6))}, TypeError, "s0 is given, but w_hr is None"),
    "s0": ({"w_hr": np.ones((2, 6)), "w_hh": np.ones((18, 2)), "s0": np.ones((3, 2))}, ValueError, "s0 has shape"),
    "P": ({"w_hr": np.ones((6, 6))}, ValueError, "w_hr has shape [6, 6]; a projection needs 0 < P < H"),
    "before": (
        {"w_hr": np.ones((2, 6)), "w_hh": np.ones((18, 2)), "reset_after": False}, ValueError,
        "projected with its reset gate after the recurrent product alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, error, message = BAD[case]
    kwargs = {"x": np.ones((5, 3, 4)), "w_ih": np.ones((18, 4)), "w_hh": np.ones((18, 6))}
    with pytest.raises(error, match=re.escape(message)):
        gpu_rnn.gru(**kwargs | changes)
    with pytest.raises(ValueError, match="proj_size is not defined for a GRU with reset_after=False"):
        gpu_rnn.GRU(3, 4, proj_size=2, reset_after=False)
