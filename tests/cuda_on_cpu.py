"""Runs the launches of the CUDA backend on the CPU: a `Runner` made of the host runtime (tests/cuda_emulator)."""

import ctypes
import sys
from functools import cache, partial
from itertools import cycle

import numpy as np

from gpu_rnn.backends import call_cache, cuda, gpu_common, numpy, per_step
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda.launch import Launch, Unit

from . import calls
from .conftest import sequence_arrays
from .cuda_emulator import runtime

SEEDS = cycle((0, 1, 2))  # a schedule of its own for every launch


@cache
def compiled(unit: Unit, sanitizer=None) -> runtime.Library:
    return runtime.compile([runtime.Source(unit.kernels.name, unit.source)], dict(unit.defines), sanitizer)


def prepare_launch(launch: Launch, sanitizer=None):
    """The CUDA backend's `prepare_launch`, on the CPU."""
    library = compiled(launch.unit, sanitizer)

    def repeat(*more):
        execute(library, launch, *more, seed=next(SEEDS))

    return repeat


def execute(library: runtime.Library, launch: Launch, *more, **options) -> None:
    """A launch as the plan has it, and the arguments that follow its own."""
    pairs = zip(library.parameters(launch.kernel), (*launch.arguments, *more), strict=True)
    arguments = [passed(parameter.kind, value) for parameter, value in pairs]
    library.launch(
        launch.kernel, launch.grid, launch.block, arguments, shared=launch.shared, cluster=launch.cluster, **options
    )


def passed(kind: str, value):
    """An argument as the host runtime takes it: a plain int is an address, or 64 bits; an array is a struct's bytes."""
    if isinstance(value, int):
        return ctypes.c_void_p(value) if kind == "p" else np.int64(value)
    if not isinstance(value, np.ndarray):
        return value
    assert value.size == 1, "CuPy passes no other array by value"
    return (ctypes.c_char * value.nbytes).from_buffer_copy(value)


def per_step_passes(run=prepare_launch):
    """A backend's forward and backward by the per-step kernels."""
    bind = partial(cuda.bind, run)
    return (
        partial(gpu_common.forward, partial(per_step.run_forward, bind)),
        partial(gpu_common.backward, partial(per_step.run_backward, bind)),
    )


def passes(device, run=prepare_launch):
    """A backend's forward and backward by the kernels that the CUDA backend selects for a device."""
    return (
        partial(gpu_common.forward, partial(cuda.run_forward, run, device)),
        partial(gpu_common.backward, partial(cuda.run_backward, run, device)),
    )


def in_place_of_numpy(monkeypatch, device, run=prepare_launch) -> None:
    """Have the CUDA backend's kernels do what NumPy is requested for, so that layers and functions run by them."""
    forward, backward = passes(device, run)

    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")
    monkeypatch.setattr(call_cache, "CACHE", {})  # of calls that NumPy serves
    monkeypatch.setattr(numpy, "forward", forward)
    monkeypatch.setattr(numpy, "backward", backward)
    for function in (gpu_common.saved_shapes, gpu_common.gemm_operands):
        monkeypatch.setattr(numpy, function.__name__, function)


def main() -> None:
    """The LSTM, ragged and aligned, under the sanitizer named; without torch, which is slow to load there."""
    forward, backward = per_step_passes(partial(prepare_launch, sanitizer=sys.argv[1]))
    cell = cells.get("lstm")
    for H in (3, 8):
        x, weights, state = sequence_arrays(np.random.default_rng(1), "lstm", 2, 3, 2, H, dtype=np.float32)
        y, last, saved = calls.forward(forward, cell, x, weights, state, save=True)
        calls.backward(backward, cell, x, weights, state, y, saved, y, last, needs={"w_hh"})


if __name__ == "__main__":
    main()
