"""Dropout of the candidate (Semeniuta et al. 2016) by every backend; the layers' is in test_around."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpu_rnn
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.backends import per_step
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.cuda import persistent

from . import calls, cuda_on_cpu, reference_modifiers
from .cuda_emulator import runtime
from .test_modifiers_functions import drawn, tensors

OPTIONS = {"candidate": True, "reset": True, "hold": True, "zoneout": (0.3, 0.2)}
EVERY = pytest.mark.parametrize("name", ["lstm", "gru", "gru+before"])
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


def check(made, forward, backward):
    backend = calls.operations(forward, backward)
    backend = TwoPass(backend) if made.case.cell.lowered else backend
    reference_modifiers.check(made, made.case.run(backend.forward, backend.backward))


@EVERY
@pytest.mark.parametrize("options", [{"candidate": True}, OPTIONS], ids=["alone", "all"])
def test_numpy(name, options):
    check(
        reference_modifiers.drawn(name, options, "float32", 5, 3, 4, 6), numpy_backend.forward, numpy_backend.backward
    )


@on_host_runtime
@EVERY
def test_cuda_stepwise(name):
    check(
        reference_modifiers.drawn(name, OPTIONS, "float32", 5, 3, 4, 6, reverse=name == "gru"),
        *cuda_on_cpu.per_step_passes(),
    )


@on_host_runtime
@EVERY
def test_cuda_persistent(name, monkeypatch):
    monkeypatch.setattr(per_step, "run_forward", None)
    on = persistent.DEVICES["h200"]
    check(
        reference_modifiers.drawn(name, OPTIONS, "bfloat16", 5, 9, 4, 20),
        *cuda_on_cpu.passes(on),
    )


@pytest.mark.parametrize("name", ["gru", "before", "lstm", "projected"])
def test_derivatives_and_vjp(rng, name):
    function, kwargs = drawn(rng, name, "dropout")
    kwargs["recurrent_dropout_on"] = "candidate"
    leaves = tensors(kwargs)
    learned = [label for label, value in leaves.items() if isinstance(value, torch.Tensor)]

    def run(*values):
        y, last = function(**leaves | dict(zip(learned, values)))
        return y, *(last if isinstance(last, tuple) else (last,))

    values = [leaves[label] for label in learned]
    assert gradcheck(run, values, fast_mode=True)
    assert gradgradcheck(run, values, fast_mode=True)
    (y, _), pullback = gpu_rnn.vjp(function, **kwargs)
    y_leaf, _ = function(**leaves)
    y_leaf.backward(torch.ones_like(y_leaf))
    for label, gradient in pullback((y * 0 + 1, None)).items():
        torch.testing.assert_close(torch.from_numpy(gradient), leaves[label].grad)


def test_a_cell_without_a_candidate_is_refused():
    with pytest.raises(ValueError, match="rnn_tanh has no candidate gate"):
        apply_modifiers(cells.get("rnn_tanh"), candidate=True)
    with pytest.raises(ValueError, match="recurrent_dropout_on must be 'h' or 'candidate', got 1"):
        gpu_rnn.gru(torch.ones(2, 1, 2), torch.ones(6, 2), torch.ones(6, 2), recurrent_dropout_on=1)
