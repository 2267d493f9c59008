"""NaN on its way forward and back, on every backend and where torch differentiates the reference."""

from functools import partial

import pytest
import torch

from . import cuda_on_cpu, nan
from .cuda_emulator import runtime
from .test_persistent_config import DEVICES

every_place = pytest.mark.parametrize("place", nan.PLACES)
on_a_cpu = pytest.mark.parametrize("backend", ["numpy", "native"])


@every_place
@pytest.mark.parametrize("shape", nan.SHAPES)
@on_a_cpu
def test_the_rectifier(place, shape, backend):
    nan.relu(place, shape, backend=backend).compare(place, "float32")


@every_place
@on_a_cpu
def test_bounds(place, backend):
    nan.bounds(place, backend).compare(place, "float32")


@pytest.mark.parametrize("place", [*nan.PLACES, "second"])
@on_a_cpu
def test_the_larger_of_two(place, backend):
    nan.pairs(place, backend).compare(place, "float32")


@every_place
@pytest.mark.parametrize("name", ["relu", "bounds", "pairs"])
def test_differentiated_again(place, name):
    """By the reference."""
    make = {"relu": partial(nan.relu, shape="one"), "bounds": nan.bounds, "pairs": nan.pairs}[name]
    make(place).compare(place, "float32", nan.Case.second)


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize("place", ["x", "gradient"])
def test_on_cuda_kernels(place, monkeypatch):
    cuda_on_cpu.in_place_of_numpy(monkeypatch, DEVICES["h200"])
    nan.relu(place, "one").compare(place, "float32")
    nan.bounds(place).compare(place, "float32")
    nan.pairs(place).compare(place, "float32")


@pytest.mark.gpu
@every_place
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_rectifier_on_a_gpu(place, backend):
    """float32 is multiplied as TF32, which has float16's mantissa."""
    nan.relu(place, "stacked", "cuda", backend, peer=torch.float16).compare(place, "float16")
