"""`explain` foretells memory: NumPy's allocations by tracemalloc, what torch keeps by its saved-tensor hooks."""

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_sequence

import gpu_rnn
from gpu_rnn.backends import cuda, dispatch, gpu_common, numpy
from gpu_rnn.core.problem import Grads, Problem, Run, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calls

WITHIN = 0.05
H200 = persistent.Device((9, 0), 132, 232448, ((2, 66), (4, 33), (8, 16), (16, 7)))


def allocated(function):
    """What a function gives, and the most bytes that there were at once beyond those before."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = function()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def arrays(problem, rng):
    cell, H, P = problem.cell, problem.H, problem.P or problem.H
    rows = cell.G * H

    def array(*shape):
        return (0.05 * rng.standard_normal(shape)).astype(problem.dtype)  # gradients of 2,000 time steps stay finite

    projection = array(P, H) if problem.P else None
    size = rows if problem.I is None else problem.I
    w_ih, b_ih = (None, None) if problem.I is None else (array(rows, problem.I), array(rows))
    weights = Weights(w_ih, array(rows, P), b_ih, array(rows), projection)
    state = array(problem.B, P), *[array(problem.B, H) for _ in cell.states[1:]]
    return array(problem.T, problem.B, size), weights, state


def close(foretold, measured):
    assert abs(foretold - measured) <= WITHIN * measured, (foretold, measured, foretold / measured)


def needs(weights):
    return {"x", *(name for name, weight in weights._asdict().items() if weight is not None)}


SIZES = {  # T, B, I, H, P, reverse
    "lstm": (200, 32, 64, 128, None, False),
    "lstm reverse": (200, 32, 64, 128, None, True),
    "lstm projected": (100, 16, 64, 128, 32, False),
    "lstm input projection given": (100, 16, None, 128, None, False),
    "gru": (64, 4, 256, 256, None, False),
    "gru reverse": (500, 64, 16, 32, None, True),
    "gru+before": (100, 16, 64, 96, None, False),
    "rnn_tanh one row": (2000, 1, 32, 256, None, False),
    "rnn_relu": (300, 48, 8, 64, None, False),
}


def problem_of(name, dtype, library="numpy", device="cpu", **options):
    T, B, I, H, P, reverse = SIZES[name]
    return Problem(cells.get(name.split()[0]), T, B, I, H, P, dtype, device, library, reverse=reverse, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SIZES)
def test_numpy(name, dtype, rng):
    problem = problem_of(name, dtype, training=True)
    backend = dispatch.choose(problem)
    x, weights, state = arrays(problem, rng)
    run = Run(x, weights, state, problem.reverse)
    forward = partial(backend.forward, problem, [run])
    ((y, last, _, saved),) = forward()  # what is made once for a cell isn't a call's
    dy = np.ones_like(y)
    backward = partial(calls.backward_of, backend, problem, run, y, saved, dy, last, needs(weights))
    backward()

    def measured(function):
        for kept in (numpy.pool_for, numpy.forward_pool):
            kept.cache_clear()
        return allocated(function)[1]

    memory = dispatch.explain(problem).memory
    assert memory.saved == sum(array.nbytes for array in (y, *saved))
    close(memory.forward, measured(forward))
    close(memory.backward, measured(backward))
    inference = replace(problem, training=False)
    foretold = dispatch.explain(inference).memory
    assert foretold.saved == foretold.backward == 0
    close(foretold.forward, measured(partial(backend.forward, inference, [run])))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["lstm", "lstm reverse", "lstm projected", "gru", "rnn_relu"])
def test_native(name, dtype, rng):
    problem = problem_of(name, dtype, training=True)
    backend = dispatch.backend("native")
    if why := backend.reasons(problem):
        pytest.skip("; ".join(why))
    x, weights, state = arrays(problem, rng)
    run = Run(x, weights, state, problem.reverse)
    forward = partial(backend.forward, problem, [run])
    ((y, last, _, saved),) = forward()
    memory = backend.memory(problem)
    assert memory.saved == sum(array.nbytes for array in (y, *saved))
    close(memory.forward, allocated(forward)[1])
    dy = np.ones_like(y)
    backward = partial(calls.backward_of, backend, problem, run, y, saved, dy, last, needs(weights))
    close(memory.backward, allocated(backward)[1])


def no_kernel(launch):
    return lambda *more: None


@np.errstate(all="ignore")  # of what new arrays happen to hold
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("gru+before", "rnn_tanh one row")])
def test_cuda(name, dtype, training, rng, monkeypatch):
    """Its arrays as NumPy's, on a device that isn't there; nothing is computed: torch's matmuls allocate nothing."""
    monkeypatch.setattr(gpu_common.arrays, "matmul", lambda *_args, **named: None)
    problem = problem_of(name, dtype, device="cuda", training=training)
    x, weights, state = arrays(problem, rng)
    run = Run(x, weights, state, problem.reverse)
    step = partial(cuda.run_forward, no_kernel, H200)
    call = partial(gpu_common.forward, step, problem, [run])
    foretold = cuda.memory_on(problem, H200)
    ((y, last, _, saved),), measured = allocated(call)
    close(foretold.forward, measured)
    if training:
        assert foretold.saved == sum(array.nbytes for array in (y, *saved))
        back = partial(cuda.run_backward, no_kernel, H200)
        dy = np.ones_like(y)
        args = [(y, *saved)], [Grads(dy, last)], [needs(weights)]
        close(foretold.backward, allocated(partial(gpu_common.backward, back, problem, [run], *args))[1])


def test_cuda_in_a_grid_counts_what_blocks_exchange():
    problem = Problem(cells.get("lstm"), 8, 8, 16, 1024, None, "float16", "cuda", "torch", training=True)
    plan, _ = cuda.persistent_config(problem, H200, False)
    assert plan.scope == "grid"
    alone = gpu_common.memory(problem, 0, 0)
    assert cuda.memory_on(problem, H200).forward == alone.forward + plan.launches * plan.exchange_bytes(8)


def kept(layer, *args):
    """Bytes of the storages that autograd keeps, without those of the input and the parameters."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    held = args[0]
    held = held.data if hasattr(held, "batch_sizes") else held.values() if held.is_nested else held
    callers = {tensor.untyped_storage()._cdata for tensor in (held, *args[1:], *layer.parameters())}
    with saved_tensors_hooks(note, lambda tensor: tensor):
        layer(*args)
    return sum(storage.nbytes() for key, storage in storages.items() if key not in callers)


LAYERS = {
    "LSTM": lambda: gpu_rnn.LSTM(16, 32),
    "two layers": lambda: gpu_rnn.GRU(16, 32, num_layers=2),
    "two directions": lambda: gpu_rnn.LSTM(16, 32, num_layers=3, bidirectional=True),
    "projection": lambda: gpu_rnn.LSTM(16, 32, num_layers=2, proj_size=8),
    "batch first": lambda: gpu_rnn.GRU(16, 32, batch_first=True, bidirectional=True),
    "reset before": lambda: gpu_rnn.GRU(16, 32, reset_after=False),
    "zoneout": lambda: gpu_rnn.LSTM(16, 32, num_layers=2, zoneout=0.1).eval(),
    "layer norm": lambda: gpu_rnn.GRU(16, 32, layer_norm=True),
    "recompute": lambda: gpu_rnn.LSTM(16, 32, num_layers=2, bidirectional=True, recompute=True),
    "cell": lambda: gpu_rnn.LSTMCell(16, 32),
}


@pytest.mark.parametrize("name", LAYERS)
def test_saved_by_layers(name):
    layer = LAYERS[name]()
    x = torch.randn(32, 16) if name == "cell" else torch.randn(100, 16, 16)
    explained = gpu_rnn.explain(layer, x)
    close(explained.saved, kept(layer, x))
    with torch.no_grad():
        assert gpu_rnn.explain(layer, x).saved == 0


@pytest.mark.parametrize("layout", ["packed", "nested", "autocast"])
def test_saved_of_other_inputs(layout):
    layer, rows = gpu_rnn.GRU(16, 32, bidirectional=True), [torch.randn(n, 16) for n in (90, 120, 20)]
    packed = pack_sequence(rows, enforce_sorted=False)
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    x = {"packed": packed, "nested": nested, "autocast": rows[0][:, None]}
    with torch.autocast("cpu", torch.bfloat16, enabled=layout == "autocast"):
        close(gpu_rnn.explain(layer, x[layout]).saved, kept(layer, x[layout]))


def test_said_in_words():
    text = str(gpu_rnn.explain("lstm", T=100, B=8, I=16, H=32, device="cpu", training=True))
    memory = gpu_rnn.explain("lstm", T=100, B=8, I=16, H=32, device="cpu", training=True).memory
    saved, forward = (f"{count / 1024:.3g} KiB" for count in memory[:2])
    assert f"memory: at most {forward} at once forward and " in text
    assert f"{saved} kept in between" in text
    layer = gpu_rnn.LSTM(16, 32, bidirectional=True)
    assert str(gpu_rnn.explain(layer, (100, 8, 16))).count("memory of the largest part: ") == 1
    assert "kept" not in str(gpu_rnn.explain("lstm", T=100, B=8, I=16, H=32, device="cpu"))
    assert [dispatch.bytes_to_str(n) for n in (17, 3 << 20, 5 << 30)] == ["17 bytes", "3 MiB", "5 GiB"]
    nowhere = gpu_rnn.explain("lstm", T=1, B=1, I=1, H=1, device="cuda", library="torch", backend="numpy")
    assert nowhere.memory is None
