"""`reset`: nothing goes from one episode to another, in either direction. Each is what torch.nn makes of it alone."""

import numpy as np
import pytest
import torch

import gpu_rnn

from . import cuda_on_cpu, episodes
from .cuda_emulator import runtime
from .reference_layers import LAYERS, inputs, layer
from .test_persistent_config import DEVICES

SHAPES = {
    "one": {},
    "both directions": {"bidirectional": True},
    "stacked": {"num_layers": 2},
    "stacked, both directions": {"num_layers": 2, "bidirectional": True},
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_call = pytest.mark.parametrize("call", episodes.CALLS)


@every_layer
@every_shape
@every_call
def test_every_episode_is_as_if_it_were_alone(name, shape, call):
    made = layer(name, **SHAPES[shape])
    episodes.check(made, *inputs(made, episodes.CALLS[call]))


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize(("name", "call"), [("lstm", "padded"), ("gru", "plain"), ("relu", "reset_state")])
def test_on_cuda_kernels(name, call, monkeypatch):
    cuda_on_cpu.in_place_of_numpy(monkeypatch, DEVICES["h200"])
    made = layer(name, bidirectional=True, dtype=torch.float32)
    episodes.check(made, *inputs(made, episodes.CALLS[call]))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_of_functions_and_arrays_of_numpy(kind):
    made = layer(kind, bidirectional=True)
    x, hx, _ = inputs(made)
    theirs = episodes.twin(made)
    expected, _ = episodes.by_episodes(made, theirs, x, zeros(hx))
    weights = [p.detach().numpy() for p in made.parameters()][4:]  # those in reverse
    y, *_ = getattr(gpu_rnn, kind)(x.detach().numpy(), *weights, reset=episodes.RESET.numpy(), reverse=True)
    np.testing.assert_allclose(y, expected[..., 4:].detach().numpy(), rtol=1e-10, atol=1e-11)


def zeros(hx):
    return tuple(map(torch.zeros_like, hx)) if isinstance(hx, tuple) else torch.zeros_like(hx)


@pytest.mark.parametrize("dynamic", [None, True])
def test_under_torch_compile(dynamic):
    made = layer("gru", bidirectional=True)
    x, hx, call = inputs(made, ["reset_state"])
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    y, last = compiled(x, hx, reset=episodes.RESET, **call)
    expected = episodes.by_episodes(made, episodes.twin(made), x, hx, **call)
    torch.testing.assert_close((y, last), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("t", [2, 3])
def test_nan_stays_in_its_episode(t):
    """Of the first of two, which ends there, or of the second, which begins."""
    made = layer("lstm", bidirectional=True)
    x, hx, _ = inputs(made)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3] = True
    bad = x.detach().clone()
    bad[t] = float("nan")
    clean = slice(3, None) if t == 2 else slice(3)
    assert torch.equal(made(bad, hx, reset=reset)[0][clean], made(x, hx, reset=reset)[0][clean])


def test_one_time_step_and_none_of_a_row():
    made = layer("gru", bidirectional=True)
    x, hx, _ = inputs(made)
    y, last = made(x[:1], hx, reset=torch.ones(1, 3, dtype=torch.bool))
    first = torch.stack([torch.zeros_like(hx[0]), hx[1]])  # forward an episode begins, in reverse x ends
    torch.testing.assert_close((y, last), episodes.twin(made)(x[:1], first), rtol=1e-10, atol=1e-11)
    _, last = made(x, hx, reset=torch.ones(6, 3, dtype=torch.bool), lengths=torch.zeros(3, dtype=torch.int64))
    assert torch.equal(last, hx)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_as_torchrl_has_it(kind, bidirectional):
    modules, tensordict = pytest.importorskip("torchrl.modules"), pytest.importorskip("tensordict")
    states = {"GRU": ["h"], "LSTM": ["h", "c"]}[kind]
    keys = {"in_keys": ["seen", *states], "out_keys": ["y", *(("next", letter) for letter in states)]}
    module = getattr(modules, f"{kind}Module")(
        input_size=3, hidden_size=4, bidirectional=bidirectional, default_recurrent_mode=True, **keys
    )
    ours = getattr(gpu_rnn, kind)(3, 4, batch_first=True, bidirectional=bidirectional)
    ours.load_state_dict(getattr(module, kind.lower()).state_dict())
    x, first = torch.randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.bool)
    first[:, 0] = first[0, 3] = first[1, 1] = first[1, 5] = True
    zero = {letter: torch.zeros(2, 6, 1 + bidirectional, 4) for letter in states}
    y = module(tensordict.TensorDict({"seen": x, "is_init": first[..., None], **zero}, [2, 6]))["y"]
    torch.testing.assert_close(ours(x, reset=first)[0], y)
