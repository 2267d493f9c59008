"""How far a cached call goes: the files of gpu_rnn that it runs through, and the moves between them."""

import sys
from pathlib import Path

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import call_cache, dispatch, numpy, triton
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import cuda_on_cpu

ROOT = Path(__file__).parents[1]
ROOMS = [f"{ROOT / name}/" for name in ("gpu_rnn", "kernels")]
LAYERS = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


class CallPath:
    """The files of gpu_rnn/ and kernels/ that a call visits, in order."""

    def __init__(self, call):
        self.files, self.moves, stack = [], 0, [None]

        def profile(frame, event, _):
            name = frame.f_code.co_filename
            if event not in ("call", "return") or not name.startswith(tuple(ROOMS)):
                return
            if event == "return":
                stack.pop()
            else:
                self.moves += stack[-1] not in (None, name)
                stack.append(name)
                self.files.append(name)

        sys.setprofile(profile)
        try:
            call()
        finally:
            sys.setprofile(None)

    def __repr__(self):
        return f"{len(set(self.files))} files, {self.moves} moves: " + " ".join(Path(f).name for f in self.files)


def path_of(kind, T=8):
    layer, x = getattr(gpu_rnn, kind)(16, 16), torch.randn(T, 2, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        return CallPath(lambda: layer(x))


@LAYERS
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_on_a_cpu(backend, kind, monkeypatch):
    if why := dispatch.backend(backend).reasons(Problem(cells.get("gru"), 8, 2, 16, 16, library="torch")):
        pytest.skip("; ".join(why))
    monkeypatch.setenv("GPU_RNN_BACKEND", backend)
    path = path_of(kind)
    assert len(set(path.files)) <= 8, path
    assert path.moves <= 16, path


@LAYERS
def test_cuda(kind, monkeypatch):
    """By the persistent kernel of a device that isn't there."""

    def prepare_launch(launch):
        return lambda *more: None

    cuda_on_cpu.in_place_of_numpy(monkeypatch, persistent.DEVICES["h200"], prepare_launch)
    path = path_of(kind)
    assert f"{ROOT}/gpu_rnn/backends/cuda.py" in path.files
    assert len(set(path.files)) <= 10, path


@LAYERS
def test_triton(kind, monkeypatch):
    """Up to the launch, with a device and kernels that only record it."""
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append(grid)

    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")
    monkeypatch.setattr(call_cache, "CACHE", {})
    monkeypatch.setattr(triton, "shared_memory", lambda: triton.LARGEST_SHARED_MEMORY)
    monkeypatch.setattr(triton, "forward_constexprs", lambda cell: ())
    persistent_kernels = pytest.importorskip("gpu_rnn.kernels.triton.persistent")
    monkeypatch.setattr(persistent_kernels, "forward_kernel", Kernel())
    for name in ("forward", "backward", "saved_shapes", "gemm_operands"):
        monkeypatch.setattr(numpy, name, getattr(triton, name))
    monkeypatch.setattr(triton, "device_of", lambda x: torch.no_grad())
    path = path_of(kind)
    assert launches, "the persistent kernel"
    assert f"{ROOT}/gpu_rnn/backends/triton.py" in path.files
    assert len(set(path.files)) <= 10, path


def test_the_goal_is_for_a_cached_call(monkeypatch):
    """The first call goes further: it checks, and chooses a backend."""
    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")
    monkeypatch.setattr(call_cache, "CACHE", {})
    layer, x = gpu_rnn.LSTM(16, 16), torch.randn(8, 2, 16)
    with torch.no_grad():
        path = CallPath(lambda: layer(x))
    assert len(set(path.files)) > 8
