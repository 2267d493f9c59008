"""No result shares memory with another or with an argument: writing to one changes no other."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import gpu_rnn

from . import cuda_on_cpu
from .cuda_emulator import runtime
from .reference_layers import LAYERS, inputs, layer
from .test_persistent_config import DEVICES

NAMES = [*LAYERS, "gru projected", "rnn projected", "gru before"]
CALLS = [[], ["lengths"], ["reset", "reset_state"]]


def storages(arrays):
    return {array.untyped_storage().data_ptr() for array in tree_leaves(arrays)}


def check(made, x, hx, call):
    """Of a call that is differentiated, and of one that isn't."""
    inputs = storages([x, hx, call, *made.parameters()])
    for trains in (True, False):
        with torch.set_grad_enabled(trains):
            results = tree_leaves(made(x, hx, **call, return_states=True))
        assert not storages(results) & inputs
        before = [array.detach().clone() for array in results]
        for k, array in enumerate(results):
            array.detach().add_(1)
            assert all(torch.equal(other, old) for other, old in list(zip(results, before))[k + 1 :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("names", CALLS, ids=str)
@pytest.mark.parametrize("T", [1, 6])
def test_of_layers(name, shape, names, T):
    made = layer(name, **shape)
    x, hx, call = inputs(made, names)
    call = {
        key: value[:T] if key == "reset" else value.clamp(max=T) if key == "lengths" else value
        for key, value in call.items()
    }
    check(made, x[:T], hx, call)


@pytest.mark.parametrize("batch_first", [False, True])
def test_of_a_single_sequence_and_batch_first(batch_first):
    made = gpu_rnn.GRU(2, 4, batch_first=batch_first, dtype=torch.float64)
    check(made, torch.randn(6, 2).double(), torch.randn(1, 4).double(), {})
    check(made, torch.randn(3, 6, 2).double(), torch.randn(1, 3 if batch_first else 6, 4).double(), {})


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
def test_on_cuda_kernels(monkeypatch):
    cuda_on_cpu.in_place_of_numpy(monkeypatch, DEVICES["h200"])
    for name in ("gru", "lstm"):
        made = layer(name, dtype=torch.float32)
        check(made, *inputs(made, ["reset"]))


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("T", [1, 5])
def test_of_functions_and_gradients_in_numpy(kind, T):
    G, S, H = {"rnn": (1, 1, 4), "gru": (3, 1, 4), "lstm": (4, 2, 4)}[kind]
    draw = np.random.default_rng(0).standard_normal
    inputs = draw((T, 3, 2)), draw((G * H, 2)), draw((G * H, H)), draw(G * H), draw(G * H)
    initial = dict(zip(("h0", "c0"), (draw((3, H)), draw((3, H)))[:S]))
    function = getattr(gpu_rnn, kind)
    results, pullback = gpu_rnn.vjp(function, *inputs, **initial, return_states=True)
    for arrays in (results, function(*inputs, **initial, return_states=True), pullback(results)):
        for a, b in combinations([*tree_leaves(arrays), *inputs, *initial.values()], 2):
            assert not np.shares_memory(a, b)
