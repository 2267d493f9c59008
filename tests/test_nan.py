"""NaN on its way forward and back, on every backend and where torch differentiates the reference."""

import pytest
import torch

from . import cuda_on_cpu, nan
from .cuda_emulator import runtime
from .test_persistent_config import DEVICES

every_place = pytest.mark.parametrize("place", nan.PLACES)


@every_place
@pytest.mark.parametrize("shape", nan.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rectifier(place, shape, dtype):
    nan.compare(*nan.relu(place, shape, dtype))


@every_place
def test_bounds(place):
    nan.compare(*nan.bounds(place, torch.float64))


@every_place
def test_differentiated_again(place):
    """By the reference."""
    found = []
    for outputs, given in zip(*nan.relu(place, "one", torch.float64)):
        gradients = torch.autograd.grad(outputs[0].square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(gradient.sum() for gradient in gradients), given[:2]))
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_cuda_kernels(dtype, monkeypatch):
    cuda_on_cpu.in_place_of_numpy(monkeypatch, DEVICES["h200"])
    nan.compare(*nan.relu("x", "one", dtype))
    nan.compare(*nan.bounds("x", dtype))


@pytest.mark.gpu
@every_place
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_rectifier_on_a_gpu(place, backend):
    (ours, theirs), given = nan.relu(place, "stacked", torch.float32, "cuda", backend)
    nan.compare((ours, theirs), given)
