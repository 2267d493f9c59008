"""`warmup`: what it has backends compile, and that nothing is left to be compiled after it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gpu_rnn
from gpu_rnn import ShapeError
from gpu_rnn.backends import dispatch, native
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells

LSTM = Problem(cells.get("lstm"), 1, 1, 1, 1)


@pytest.fixture
def requested(monkeypatch):
    """The problems that a backend was requested to compile for."""
    problems = []
    backend = SimpleNamespace(NAME="stub", warmup=lambda problem: problems.append(problem) or ("one", "two"))
    monkeypatch.setattr(dispatch, "choose", lambda problem, name: backend)
    return problems


def test_numpy_compiles_nothing():
    assert gpu_rnn.warmup(gpu_rnn.LSTM(3, 4, num_layers=2), T=5, B=2, training=True, backend="numpy") == []
    assert gpu_rnn.warmup(nn.GRUCell(3, 4), B=2, backend="numpy") == []
    assert gpu_rnn.warmup(gpu_rnn.rnn, T=5, B=2, I=3, H=4, device="cpu", backend="numpy") == []


@pytest.mark.skipif(native.reasons(LSTM) != [], reason=str(native.reasons(LSTM)))
def test_by_default_a_cpu_has_native_code_compiled():
    (line,) = gpu_rnn.warmup(nn.GRUCell(3, 4), B=2)
    assert line.startswith("gru T=1 B=2 I=3 H=4 float32 on cpu (torch): native, gru, compiled for ")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_layer_and_direction_is(requested, batch_first, training):
    layer = gpu_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first, precision="tf32")
    lines = gpu_rnn.warmup(layer, T=5, B=2, training=training)
    assert [(p.T, p.B, p.I, p.H, p.reverse) for p in requested] == [
        (5, 2, 3, 4, False), (5, 2, 3, 4, True), (5, 2, 8, 4, False), (5, 2, 8, 4, True),
    ]  # fmt: skip
    assert all(p.training == training and p.tf32 for p in requested)
    assert lines == [f"lstm T=5 B=2 I={I} H=4 float32 on cpu (torch): stub, one, two" for I in (3, 8)]


def test_cells_functions_and_autocast(requested):
    gpu_rnn.warmup(gpu_rnn.GRUCell(3, 4), B=2)
    gpu_rnn.warmup("rnn_relu", T=5, B=2, I=3, H=4, dtype="float16", device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        gpu_rnn.warmup(gpu_rnn.RNN(3, 4), T=7)
    problems = [(p.cell.name, p.T, p.B, p.dtype) for p in requested]
    assert problems == [("gru", 1, 2, "float32"), ("rnn_relu", 5, 2, "float16"), ("rnn_tanh", 7, 1, "bfloat16")]


def test_bad_calls_are_refused():
    with pytest.raises(TypeError, match="missing: H"):
        gpu_rnn.warmup(gpu_rnn.lstm, T=5, B=2, I=3)
    with pytest.raises(TypeError, match="a layer knows H"):
        gpu_rnn.warmup(gpu_rnn.LSTM(3, 4), T=5, B=2, H=4)
    with pytest.raises(ShapeError, match="size 0"):
        gpu_rnn.warmup(gpu_rnn.LSTM(3, 4), T=0)
    with pytest.raises(gpu_rnn.BackendError, match="backend 'cuda' was requested"):
        gpu_rnn.warmup(gpu_rnn.LSTM(3, 4, backend="cuda"), T=5, B=2)


INTERPRETED = """
import torch, gpu_rnn
from gpu_rnn.backends import triton
for options in ({}, {"proj_size": 2}, {"bias": False}):
    layer = gpu_rnn.LSTM(3, 4, backend="triton", **options)
    print(*gpu_rnn.warmup(layer, T=4, B=2, training=True), sep="\\n")
"""


def test_triton_runs_its_kernels_once():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    size = "lstm T=4 B=2 I=3 H=4"
    assert done.stdout.splitlines() == [
        f"{size} float32 on cpu (torch): triton, sequence_forward, sequence_backward",
        f"{size} P=2 float32 on cpu (torch): triton, stepwise_forward, stepwise_backward",
        f"{size} float32 on cpu (torch): triton, sequence_forward, sequence_backward",
    ], done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "bidirectional": True}, {"proj_size": 32}], ids=str)
def test_nothing_is_compiled_after_it(backend, options):
    layer = gpu_rnn.LSTM(64, 64, device="cuda", backend=backend, **options)
    assert gpu_rnn.warmup(layer, T=32, B=4, training=True)

    if backend == "cuda":
        from gpu_rnn.backends import cuda

        def compiled():
            return cuda.loaded.cache_info().misses
    else:
        from gpu_rnn.kernels.triton import persistent, stepwise

        kernels = persistent.forward_kernel, persistent.backward_kernel, stepwise.step_kernel, stepwise.grad_kernel

        def compiled():
            return sum(len(binaries) for kernel in kernels for binaries, *_ in kernel.device_caches.values())

    before = compiled()
    assert before
    layer(torch.randn(32, 4, 64, device="cuda"))[0].sum().backward()
    assert compiled() == before
