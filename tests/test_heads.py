"""Heads: functions, layers and every backend against the block-diagonal matrix of all units."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import gpu_rnn
from bench import nvrtc
from gpu_rnn.backends import cuda, dispatch, native, numpy
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.tools.explain import problem

from . import calls, cuda_on_cpu, heads, reference_modifiers
from .cuda_emulator import runtime
from .persistent import check_machine_code
from .test_layers import assert_equal, results

ON_HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
HEADS = pytest.mark.parametrize("N", [1, 2, 3])
BACKENDS = pytest.mark.parametrize("backend", [numpy, native], ids=lambda backend: backend.NAME)
NAMES = ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru+before", *heads.CUSTOM]
KINDS = {"RNN": 1, "LSTM": 4, "GRU": 3}  # gates


# ---- Backends -------------------------------------------------------------------------------------------------------


def skip_without(backend):
    if why := backend.reasons(problem(cells.get("lstm"), T=1, B=1, I=1, H=1, device="cpu", training=True)):
        pytest.skip("; ".join(why))


def use_threads(monkeypatch, count):
    """However little there is to do."""
    monkeypatch.setattr(native, "threads", lambda: count)
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)


@HEADS
@BACKENDS
@pytest.mark.parametrize("name", NAMES)
def test_every_cell(backend, name, N, monkeypatch):
    skip_without(backend)
    heads.check(monkeypatch, backend, name, N, "float32", 5, 3, 4, 12, reverse=N == 2)


@pytest.mark.parametrize("N", [2, 3, 4])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("B", [1, 7])
def test_native_heads_are_shared_by_threads(N, count, B, monkeypatch):
    """A head each, or some for one: by units, by batch rows."""
    skip_without(native)
    use_threads(monkeypatch, count)
    heads.check(monkeypatch, native, "gru", N, "bfloat16", 5, B, 4, N * 35)
    heads.check(monkeypatch, native, "lstm", N, "float32", 5, B, 4, N * 130, options=reference_modifiers.OPTIONS["all"])


def test_native_directions_are_run_at_once(monkeypatch):
    skip_without(native)
    layer, x = gpu_rnn.GRU(5, 20, 2, bidirectional=True, num_heads=2, backend="native"), torch.randn(9, 3, 5)
    alone = results(layer, x)
    use_threads(monkeypatch, 4)
    called = []
    monkeypatch.setattr(native, "call", lambda *args, own=native.call: called.append(args[2:4]) or own(*args))
    for name, array in results(layer, x).items():
        assert torch.equal(array, alone[name]), name
    assert called == [(2, 4)] * 4, "two runs by four threads, each layer forward and backward"


@HEADS
@BACKENDS
@pytest.mark.parametrize("options", reference_modifiers.OPTIONS.values(), ids=reference_modifiers.OPTIONS)
@pytest.mark.parametrize("name", ["lstm", "gru", "gru+before", "MGU"])
def test_every_modifier(name, options, backend, N, monkeypatch):
    skip_without(backend)
    heads.check(monkeypatch, backend, name, N, "float32", 5, 3, 4, 12, options=options, rows=1 if N == 2 else None)


@HEADS
@BACKENDS
@pytest.mark.parametrize("options", reference_modifiers.NORMED.values(), ids=reference_modifiers.NORMED)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_norm_within_a_head(name, options, backend, N, monkeypatch):
    skip_without(backend)
    heads.check(monkeypatch, backend, name, N, "float32", 5, 3, 4, 24, options=options, rows=1)  # few units cancel


@ON_HOST
@pytest.mark.parametrize("scope", ["stepwise", *persistent.SCOPES])
@pytest.mark.parametrize(
    ("name", "options", "N"), [("lstm", {}, 3), ("SLSTM", {}, 3), ("gru", reference_modifiers.OPTIONS["all"], 2)]
)
def test_cuda(name, options, N, scope, monkeypatch):
    launched = []

    def prepare(launch):
        launched.append(dict(launch.unit.defines).get("DIRECTIONS"))
        return cuda_on_cpu.prepare_launch(launch)

    forward, backward = cuda_on_cpu.per_step_passes(prepare)
    if scope != "stepwise":
        only = persistent.select
        monkeypatch.setattr(persistent, "select", lambda *args, **how: only(*args, **how | {"scope": scope}))
        forward, backward = cuda_on_cpu.passes(persistent.DEVICES["h200"], prepare)
    cuda.config_of.cache_clear()
    backend = calls.operations(forward, backward)
    H = N * (12 if scope in ("stepwise", "block") else 40)
    heads.check(monkeypatch, backend, name, N, "bfloat16", 5, 3, 4, H, options=options, reverse=name == "gru")
    cuda.config_of.cache_clear()
    assert {*launched} == {None if scope == "stepwise" else str(N)}, "all heads in one launch"


@ON_HOST
def test_cuda_by_as_many_heads_as_may_go_together(monkeypatch):
    """Two, until a GPU has run more; an odd number one after the other."""
    for N, together in ((3, "1"), (4, "2")):
        launched = []

        def prepare(launch, launched=launched):
            launched.append(dict(launch.unit.defines)["DIRECTIONS"])
            return cuda_on_cpu.prepare_launch(launch)

        forward, backward = cuda_on_cpu.passes(replace(persistent.DEVICES["h200"], proven_only=True), prepare)
        backend = calls.operations(forward, backward)
        heads.check(monkeypatch, backend, "rnn_tanh", N, "float16", 5, 3, 4, 12)
        assert {*launched} == {together}


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("name", "N", "D", "B"),
    [("lstm", 12, 64, 16), (gpu_rnn.cells.SLSTM.cell_name, 12, 64, 16), ("gru", 4, 512, 8), ("lstm", 3, 256, 16)],
)
def test_cuda_compiles_without_spills(name, N, D, B, backward):
    cell, on = cells.get(name), persistent.DEVICES["h200"]
    config, why = cuda.config_of(cell, "bfloat16", D, B, N, on, backward, False, None)
    assert not why
    assert config.directions == N
    check_machine_code(config, cell, "bfloat16", "sm_90")


# ---- Layers ---------------------------------------------------------------------------------------------------------


class Dense(torch.nn.Module):
    """torch.nn's layer on the parameters of one with heads."""

    def __init__(self, ours, **arguments):
        super().__init__()
        self.ours, self.G = ours, KINDS[type(ours).__name__]
        self.theirs = getattr(torch.nn, type(ours).__name__)(5, 12, dtype=torch.float64, **arguments)

    def named_parameters(self):
        return self.ours.named_parameters()

    def weights(self):
        return {
            name: heads.dense(p, self.ours.num_heads, self.G) if name.startswith("weight_hh") else p
            for name, p in self.ours.named_parameters()
        }

    def forward(self, *args):
        return functional_call(self.theirs, self.weights(), args)


def twins(kind, N, **arguments):
    torch.manual_seed(N)
    ours = getattr(gpu_rnn, kind)(5, 12, dtype=torch.float64, num_heads=N, **arguments)
    return ours, Dense(ours, **arguments)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def initial(kind, L, *batch):
    states = drawn(L, *batch, 12), drawn(L, *batch, 12)
    return states if kind == "LSTM" else states[0]


@HEADS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (6, 3, 5)), ({"bias": False}, (1, 1, 5)), ({"batch_first": True}, (3, 6, 5)), ({}, (4, 5)),
        ({"bidirectional": True, "num_layers": 2}, (6, 3, 5)), ({"num_layers": 3}, (6, 0, 5)),
    ],
    ids=str,
)  # fmt: skip
def test_layers_are_torchs(kind, N, arguments, shape):
    ours, theirs = twins(kind, N, **arguments)
    L = arguments.get("num_layers", 1) * (1 + arguments.get("bidirectional", False))
    batch = [] if len(shape) == 2 else [shape[0 if "batch_first" in arguments else 1]]
    x, hx = drawn(*shape), initial(kind, L, *batch)
    for states in (hx, None):
        assert_equal(results(ours, x, states), results(theirs, x, states))


@HEADS
@pytest.mark.parametrize("keyword", ["recompute", "step_exact"])
def test_ways_to_compute(keyword, N):
    ours, theirs = twins("LSTM", N)
    setattr(ours, keyword, True)
    x, hx = drawn(6, 3, 5), initial("LSTM", 1, 3)
    assert_equal(results(ours, x, hx), results(theirs, x, hx))


def test_step_exact_is_exact():
    layer = gpu_rnn.GRU(5, 12, num_heads=3, step_exact=True)
    x, h = torch.randn(7, 3, 5), None
    for t, whole in enumerate(layer(x)[0]):
        y, h = layer.step(x[t], h)
        assert torch.equal(y, whole)


@HEADS
def test_packed(N):
    ours, theirs = twins("GRU", N, bidirectional=True)
    x = pack_sequence([torch.randn(n, 5, dtype=torch.float64) for n in (2, 5, 3)], enforce_sorted=False)
    assert_equal(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("kind", KINDS)
def test_cells_and_steps(kind):
    layer, cell = (getattr(gpu_rnn, kind + end)(5, 12, num_heads=2, dtype=torch.float64) for end in ("", "Cell"))
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    x, hx = drawn(3, 5), initial(kind, 1, 3)
    flat = tuple(s[0] for s in hx) if kind == "LSTM" else hx[0]
    stepped, whole = layer.step(x, hx)[0], cell(x, flat)
    torch.testing.assert_close(stepped, whole[0] if kind == "LSTM" else whole)


def test_modifiers_of_a_call_are_those_of_the_functions():
    """Resets, lengths and states of every time step, through the layer; masks are tested with the backends."""
    layer = gpu_rnn.LSTM(5, 12, num_heads=3, dtype=torch.float64, peephole=True, cell_clip=0.5)
    x, reset, lengths = drawn(6, 3, 5), torch.rand(6, 3) < 0.3, torch.tensor([6, 2, 4])
    reset_state = drawn(1, 12), drawn(1, 12)
    y, _, states = layer(x, reset=reset, reset_state=reset_state, lengths=lengths, return_states=True)
    assert states[1].shape == (1, 6, 3, 12)
    weights = [p.detach().numpy() for p in layer.parameters()]
    common = {"peephole": weights.pop(), "cell_clip": 0.5, "lengths": lengths.numpy(), "num_heads": 3}
    common |= {"reset": reset.numpy(), "reset_state": tuple(s[0].detach().numpy() for s in reset_state)}
    whole, _, c = gpu_rnn.lstm(x.detach().numpy(), *weights, **common, return_states=True)
    np.testing.assert_allclose(y.detach(), whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(states[1][0].detach(), c[1], rtol=1e-12, atol=1e-12)


PUBLISHED = {name: getattr(gpu_rnn.cells, name) for name in ("MGU", "AntisymmetricRNN", "FastGRNN", "SLSTM", "LEM")}
NORMED = {f"{kind.__name__} normed": partial(kind, layer_norm=True) for kind in (gpu_rnn.LSTM, gpu_rnn.GRU)}


@pytest.mark.parametrize("kind", (PUBLISHED | NORMED).values(), ids=PUBLISHED | NORMED)
def test_a_head_is_a_layer_of_its_own(kind):
    """Transforms of the recurrent weights, and normalizations, would mix heads."""
    N, H, normed = 3, 12, isinstance(kind, partial)
    layer = kind(5, H, num_heads=N, dtype=torch.float64, **{"layer_norm_over": "head"} if normed else {})
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = drawn(6, 2, 5)
    whole = layer(x)[0]
    (dx,) = torch.autograd.grad(whole.square().sum(), x)
    expected = 0
    for n, y in enumerate(whole.split(H // N, -1)):
        own = kind(5, H // N, dtype=torch.float64)
        for value, target in zip(layer.parameters(), own.parameters(), strict=True):
            rows = value if len(value) == 1 else value.unflatten(0, (-1, N, H // N))[:, n].flatten(0, 1)
            target.data.copy_(rows)
        torch.testing.assert_close(y, own(x)[0])
        expected = expected + torch.autograd.grad(own(x)[0].square().sum(), x)[0]
    torch.testing.assert_close(dx, expected)
    assert layer.weight_hh_l0.shape[1] == H // N


def test_pullback_of_a_norm_within_heads():
    layer, x = (
        gpu_rnn.LSTM(5, 12, num_heads=3, dtype=torch.float64, layer_norm=True, layer_norm_over="head"),
        drawn(6, 2, 5),
    )
    y = layer(x)[0]
    dx, *expected = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    arrays = [p.detach().numpy() for p in layer.parameters()]
    how = {"layer_norm": tuple(arrays[4:]), "layer_norm_over": "head", "num_heads": 3}
    (ours, _), pullback = gpu_rnn.vjp(gpu_rnn.lstm, x.detach().numpy(), *arrays[:4], **how)
    gradients = pullback((2 * ours, None))
    actual = [*(gradients[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")), *gradients["layer_norm"]]
    for a, b in zip([gradients["x"], *actual], [dx, *expected], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_a_constant_first_value_of_recurrent_weights_is_that_of_each_head(monkeypatch):
    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))

    @gpu_rnn.cell(gates="an", states="h", initial={"weight_hh.n": torch.nn.init.eye_})
    def Identity(x, h, state):
        return (x[0] + h[0] + x[1] + h[1],)

    weight = Identity(3, 6, num_heads=2).weight_hh_l0[6:]
    assert torch.equal(weight, torch.eye(3).repeat(2, 1))


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_derivatives_of_any_order():
    ours, theirs = twins("GRU", 3)
    x, direction = drawn(4, 2, 5), torch.randn(4, 2, 5, dtype=torch.float64)
    tangents = [jvp(lambda a, layer=layer: layer(a)[0], (x.detach(),), (direction,))[1] for layer in (ours, theirs)]
    torch.testing.assert_close(*tangents)

    def twice(layer):
        (dx,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *ours.parameters()])

    for a, b in zip(twice(ours), twice(theirs)):
        torch.testing.assert_close(a, b)
    xs = torch.stack([x.detach(), direction])
    torch.testing.assert_close(vmap(lambda a: ours(a)[0])(xs), torch.stack([ours(a)[0] for a in xs]))

    def loss(parameters):
        return functional_call(ours, parameters, (x,))[0].square().sum()

    parameters = dict(ours.named_parameters())
    gradients = torch.func.grad(loss)(parameters)
    for name, expected in zip(gradients, torch.autograd.grad(loss(parameters), [*parameters.values()])):
        torch.testing.assert_close(gradients[name], expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    layer = gpu_rnn.LSTM(5, 12, num_heads=3, num_layers=2, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (4, 6):
        x = drawn(T, 2, 5)
        y, expected = compiled(x)[0], layer(x)[0]
        torch.testing.assert_close(y, expected)
        for a, b in zip(*(torch.autograd.grad(out.sum(), [x, *layer.parameters()]) for out in (y, expected))):
            torch.testing.assert_close(a, b)


def test_operators_are_what_their_fakes_say():
    layer, x = gpu_rnn.LSTM(5, 12, num_heads=3), torch.randn(4, 2, 5, requires_grad=True)
    tensors = [x, *layer.parameters(), torch.randn(2, 12), torch.randn(2, 12)]
    args = "lstm", tensors, "w_ih w_hh b_ih b_hh", [0], False, "auto", None, False, 3, False, True
    torch.library.opcheck(torch.ops.gpu_rnn.forward.default, args)


def test_flops():
    layer, x = gpu_rnn.GRU(5, 12, num_heads=3), torch.randn(4, 2, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        layer(x)[0].sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 4 * 2 * 36 * (5 + 12 // 3)


def test_streams():
    for backend in (None, "numpy"):
        layer = gpu_rnn.LSTM(5, 12, num_heads=3, num_layers=2, backend=backend)
        stream, x = gpu_rnn.stream(layer, batch=2), torch.randn(5, 2, 5)
        with torch.no_grad():
            torch.testing.assert_close(torch.stack([stream(x[t]).clone() for t in range(5)]), layer(x)[0])


@pytest.mark.parametrize(("kind", "options"), [("GRU", {"bidirectional": True}), ("LSTM", {"cell_clip": 0.5})])
def test_exported_to_onnx(kind, options, tmp_path):
    """As ONNX's operator, and as a loop."""
    runtime = pytest.importorskip("onnxruntime")
    layer, x = getattr(gpu_rnn, kind)(5, 12, num_heads=3, **options).eval(), torch.randn(6, 2, 5)
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(tmp_path / "layer.onnx")
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    y, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, layer(x)[0].detach(), rtol=1e-5, atol=1e-6)
    normed = gpu_rnn.LSTM(5, 12, num_heads=3, layer_norm=True, layer_norm_over="head").eval()
    with pytest.raises(Exception, match="num_heads=3 takes means over the units of each head"):
        torch.onnx.export(normed, (x,), dynamo=True, verbose=False)
    with pytest.raises(NotImplementedError, match="has num_heads"):
        gpu_rnn.onnx.save(gpu_rnn.LSTM(5, 12, num_heads=3), tmp_path / "layer.onnx")


def test_truncated_gradients_and_copies_of_a_layer():
    layer = gpu_rnn.GRU(5, 12, num_heads=3, dtype=torch.float64)
    x = drawn(8, 2, 5)
    whole = layer(x)[0]
    torch.testing.assert_close(torch.cat([y for (y, _) in gpu_rnn.tbptt(layer, x, 2, 4)]), whole)
    again = gpu_rnn.GRU(5, 12, num_heads=3, dtype=torch.float64)
    again.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(again(x)[0], whole, rtol=0, atol=0)


# ---- functions ------------------------------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize("source", ["input", "input projection"])
def test_functions_and_their_pullbacks(N, source):
    layer, theirs = twins("LSTM", N)
    w_ih, *weights = (p.detach().numpy() for p in layer.parameters())
    x, (h0, c0) = drawn(6, 3, 5), initial("LSTM", 1, 3)
    y, (hT, cT) = theirs(x, (h0, c0))
    dy = torch.randn_like(y)
    dx, dW, *expected = torch.autograd.grad(y, [x, *layer.parameters(), h0, c0], dy)
    arguments = (x.detach().numpy(), w_ih) if source == "input" else ((x @ layer.weight_ih_l0.T).detach().numpy(), None)
    state = {"h0": h0[0].detach().numpy(), "c0": c0[0].detach().numpy()}
    (ours, last), pullback = gpu_rnn.vjp(gpu_rnn.lstm, *arguments, *weights, **state, num_heads=N)
    np.testing.assert_allclose(ours, y.detach(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(last[1], cT[0].detach(), rtol=1e-12, atol=1e-12)
    gradients = pullback((dy.numpy(), None))
    own = [gradients[name] for name in ("w_hh", "b_ih", "b_hh", "h0", "c0")]
    for a, b in zip(own, expected):
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=1e-10, atol=1e-12)
    if source == "input":
        np.testing.assert_allclose(gradients["w_ih"], dW, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(gradients["x"], dx, rtol=1e-10, atol=1e-12)
    else:
        np.testing.assert_allclose(gradients["x"] @ w_ih, dx, rtol=1e-10, atol=1e-12)


def test_one_head_is_the_layer_bit_for_bit_and_the_same_call():
    x, weights = np.random.default_rng(0).standard_normal((4, 2, 5)), gpu_rnn.GRU(5, 12, dtype=torch.float64)
    arrays = [p.detach().numpy() for p in weights.parameters()]
    np.testing.assert_array_equal(gpu_rnn.gru(x, *arrays)[0], gpu_rnn.gru(x, *arrays, num_heads=np.int64(1))[0])
    made = Problem(cells.get("gru"), 4, 2, 5, 12)
    assert dispatch.choose(made, "numpy") is numpy, "nothing stands between a call of one head and its backend"


LSTM = [np.ones((3, 2, 5)), np.ones((48, 5)), np.ones((48, 4)), np.ones(48), np.ones(48)]
GAINS = (np.ones(48), np.ones(48), np.ones(12), None)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gpu_rnn.LSTM(5, 10, num_heads=4), ValueError, "num_heads=4 doesn't divide the hidden size H = 10"),
        (lambda: gpu_rnn.GRUCell(5, 10, num_heads=4), ValueError, "num_heads=4 doesn't divide"),
        (lambda: gpu_rnn.LSTM(5, 12, proj_size=4, num_heads=2), ValueError, "num_heads=2 is not defined with a projec"),
        (lambda: gpu_rnn.LSTM(5, 12, num_heads=0), ValueError, "num_heads must be larger than 0, got 0"),
        (lambda: gpu_rnn.GRU(5, 12, num_heads=2.0), TypeError, "num_heads must be an int, got 2.0"),
        (lambda: gpu_rnn.GRU(5, 12, num_heads=True), TypeError, "num_heads must be an int, got True"),
        (lambda: gpu_rnn.GRU(5, 12, num_heads=2, layer_norm=True), ValueError, "layer_norm_over='head' normalizes"),
        (lambda: gpu_rnn.GRU(5, 12, layer_norm=True, layer_norm_over="row"), ValueError, "must be 'units' or 'head'"),
        (lambda: gpu_rnn.replace_(torch.nn.GRU(5, 12), num_heads=2), ValueError, "num_heads=2: replace_ keeps"),
        (lambda: gpu_rnn.restore_(gpu_rnn.GRU(5, 12, num_heads=2)), NotImplementedError, "GRU with num_heads=2"),
        (lambda: gpu_rnn.lstm(*LSTM), gpu_rnn.ShapeError, "w_hh has shape [48, 4]; expected [4*H, H] = [48, 12]"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=4), gpu_rnn.ShapeError, "w_hh has shape [48, 4]; expected [4*H, H/4] ="),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=5), gpu_rnn.ShapeError, "num_heads=5 doesn't divide the hidden size H"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=5, zoneout=0.1, seed=1), gpu_rnn.ShapeError, "num_heads=5 doesn't"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads="3"), TypeError, "num_heads must be an int, got '3'"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=3, w_hr=np.ones((4, 12))), gpu_rnn.ShapeError, "with a projection"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=3, layer_norm=GAINS), ValueError, "layer_norm over all units is not"),
        (lambda: gpu_rnn.lstm(*LSTM, num_heads=3, h0=np.ones((2, 4))), gpu_rnn.ShapeError, "h0 has shape [2, 4]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


# ---- what is said about it ------------------------------------------------------------------------------------------


def test_parameters():
    layer = gpu_rnn.LSTM(5, 512, num_heads=4)
    assert layer.weight_hh_l0.shape == (2048, 128)
    assert layer.weight_hh_l0.abs().max() <= 512**-0.5, "first values are those of hidden_size"
    assert "num_heads=4" in repr(layer)


def test_explained():
    layer = gpu_rnn.LSTM(5, 512, num_heads=4)
    text = str(gpu_rnn.explain(layer, (7, 3, 5)))
    assert "H=512 (4 heads of 128)" in text
    assert "4 heads of 128, each a " in text
    assert text.splitlines()[0] == str(gpu_rnn.explain("lstm", T=7, B=3, I=5, H=512, num_heads=4)).splitlines()[0]
    assert gpu_rnn.warmup("lstm", B=3, I=5, H=512, num_heads=4, backend="numpy") == []


def test_inspected():
    layer, x = gpu_rnn.GRU(5, 12, num_heads=3, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    inside = gpu_rnn.inspect(layer, x)
    np.testing.assert_allclose(inside["h"], layer(x)[0].detach(), rtol=1e-12, atol=1e-12)
    weights = [p.detach().numpy() for p in layer.parameters()]
    np.testing.assert_array_equal(gpu_rnn.inspect(gpu_rnn.gru, x.numpy(), *weights, num_heads=3)["z"], inside["z"])


@BACKENDS
@pytest.mark.parametrize("I", [5, None])
def test_saved_memory_is_foretold(I, backend):
    made = Problem(cells.get("lstm"), 20, 8, I, 24, training=True, heads=3)
    skip_without(backend)
    backend, rng = dispatch.choose(made, backend.NAME), np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in ((20, 8, I or 96), (96, 8), (8, 24), (96, 5))]
    x, w_hh, state, w_ih = arrays
    run = numpy.Run(x, numpy.Weights(None if I is None else w_ih, w_hh), (state, state))
    (result,) = backend.forward(made, [run])
    assert backend.memory(made).saved == sum(array.nbytes for array in (result.y, *result.saved))
    assert [(array.shape, array.dtype.name) for array in result.saved] == backend.saved_shapes(made)
