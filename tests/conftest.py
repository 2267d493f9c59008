"""What all tests share: random arrays that are never zero and never alike, and the mark for GPU tests."""

import os
import sys
from pathlib import Path

# Arrays are small, and each core may have a worker of pytest-xdist: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from gpu_rnn.backends import compiler, native
from gpu_rnn.core.optional_imports import no_gpu
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells

# Native code that tests compile is kept from run to run, and not among the user's own.
os.environ.setdefault("GPU_RNN_CACHE", str(Path(__file__).parents[1] / ".build" / "native"))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    skip([item for item in items if item.get_closest_marker("gpu")], no_gpu)
    skip([item for item in items if uses_native(item)], no_native_code)


def skip(items, why_not):
    if items and (reason := why_not()) is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


def uses_native(item):
    """Whether a test is marked so, or the backend, or Inductor, is one of its parameters."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = {value for value in parameters if isinstance(value, str)}
    return item.get_closest_marker("native") or names & {"native", "inductor"} or any(p is native for p in parameters)


def no_native_code():
    try:
        native.library("float32")
    except compiler.CompileError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def compiled_anew():
    """torch compiles one function so often and no more, whichever test compiles it."""
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def sequence_arrays(rng, name, T, B, I, H, P=None, dtype=np.float64):
    """x, weights and initial states for a cell: small enough weights to keep gates away from saturation."""
    cell = cells.get(name)
    G, out = cell.G, H if P is None else P

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    weights = Weights(
        draw(G * H, I, scale=I**-0.5), draw(G * H, out, scale=out**-0.5), draw(G * H), draw(G * H),
        None if P is None else draw(P, H, scale=H**-0.5),
    )  # fmt: skip
    state = (draw(B, out), *(draw(B, H) for _ in cell.states[1:]))
    return draw(T, B, I), weights, state
