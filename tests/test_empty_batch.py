"""A batch without rows, as torch.nn has it: outputs and states without rows, and weights whose gradients are 0."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn

from . import cuda_on_cpu
from .cuda_emulator import runtime
from .reference_layers import FEATURES, VARIANTS, VARIED, as_tuple, inputs, layer
from .test_persistent_config import DEVICES

KEYWORDS = [
    *((name, keywords, names) for name in VARIED for keywords, names in FEATURES.values()),
    *(("lstm", keywords, ["reset", "reset_state"]) for keywords in VARIANTS.values()),
    *((name, {"layer_norm": True}, names) for name in ("gru", "lstm") for names in ([], FEATURES["everything"][1])),
    *((name, {"recurrent_dropout": 0.3, "recurrent_dropout_on": "candidate"}, []) for name in ("gru", "lstm")),
    ("gru", {"step_exact": True}, ["reset"]), ("lstm", {"recompute": True, "recurrent_dropout": 0.2}, ["lengths"]),
]  # fmt: skip
SHAPES = [{}, {"num_layers": 2, "bidirectional": True}]


def none_of(name, array):
    """Of a call's arrays, those of no rows: the batch is the last axis but one of x, states and reset states."""
    return (
        array[..., :0] if name in ("reset", "lengths", "left_padding") else array[..., :0, :].detach().requires_grad_()
    )


def check(made, names):
    """`reset_state` of all rows or of each; y, states and gradients of nothing."""
    full, hx, call = inputs(made, names)
    x, hx = none_of("x", full), tree_map(lambda s: none_of("hx", s), hx)
    each = {name: value if name == "reset_state" else none_of(name, value) for name, value in call.items()}
    for own in (False, True):
        if own and "reset_state" in each:
            each["reset_state"] = tree_map(lambda s: s.detach().new_zeros(len(s), 0, s.shape[-1]), each["reset_state"])
        y, last, every = made(x, hx, **each, return_states=True)
        assert y.shape == (len(x), 0, (made.proj_size or 4) * (1 + made.bidirectional))
        assert [s.shape for s in as_tuple(last)] == [s.shape for s in as_tuple(hx)]
        assert [s.shape[:3] for s in as_tuple(every)] == [(len(as_tuple(hx)[0]), len(x), 0)] * len(as_tuple(hx))
        made.zero_grad()
        (y.sum() + sum(s.sum() for s in as_tuple(last)) + sum(s.sum() for s in as_tuple(every))).backward()
        assert x.grad.shape == x.shape
        assert not any(parameter.grad.any() for parameter in made.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "keywords", "names"), KEYWORDS, ids=str)
def test_every_keyword(name, keywords, names, shape):
    check(layer(name, **SHAPES[0] | shape, **keywords), names)


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize("keywords", [{"recurrent_dropout": 0.3}, {"layer_norm": True}], ids=str)
def test_on_cuda_kernels(keywords, monkeypatch):
    cuda_on_cpu.in_place_of_numpy(monkeypatch, DEVICES["h200"])
    check(layer("gru", bidirectional=True, dtype=torch.float32, **keywords), FEATURES["everything"][1])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.filterwarnings("error")
def test_arrays_of_numpy(kind, norm):
    G, S, H = {"gru": (3, 1, 4), "lstm": (4, 2, 4)}[kind]
    x, w_ih, w_hh = np.ones((5, 0, 3)), np.ones((G * H, 3)), np.ones((G * H, H))
    gains = {"layer_norm": (*[np.ones(G * H)] * 2, *[np.ones(H)] * (2 * (S - 1)))} if norm else {}
    call = {
        "reset": np.ones((5, 0), bool), "reset_state": (np.ones((0, H)),) * S, "lengths": np.zeros(0, int),
        "recurrent_dropout": 0.3, "seed": 1,
    }  # fmt: skip
    (y, last), pullback = gpu_rnn.vjp(getattr(gpu_rnn, kind), x, w_ih, w_hh, **call, **gains)
    assert y.shape == (5, 0, H)
    assert all(state.shape == (0, H) for state in as_tuple(last))
    gradients = pullback((y, last))
    assert gradients["x"].shape == x.shape
    assert not any(array.any() for array in tree_leaves(gradients))


@pytest.mark.parametrize(("name", "cell"), [("gru", "GRUCell"), ("lstm", "LSTMCell"), ("rnn", "RNNCell")])
def test_cells(name, cell):
    made = getattr(gpu_rnn, cell)(2, 4, recurrent_dropout=0.3, zoneout=0.1)
    assert all(state.shape == (0, 4) for state in as_tuple(made(torch.zeros(0, 2))))
