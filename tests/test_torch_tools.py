"""torch's tools see the layers: FlopCounterMode, the profiler, memory snapshots, selective checkpointing, summaries."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import gpu_rnn
from gpu_rnn.autograd import functions
from gpu_rnn.autograd.custom_ops import call_op
from gpu_rnn.core.problem import Options, Run

T, B, I, H = 5, 3, 4, 6
LAYERS = {"RNN": gpu_rnn.RNN, "LSTM": gpu_rnn.LSTM, "GRU": gpu_rnn.GRU}


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ready(layer, needs_x=True):
    """An input, and states as the layer takes them, with gradients."""
    L = layer.num_layers * (1 + layer.bidirectional)
    x = torch.randn(T, B, I, requires_grad=needs_x)
    sizes = [layer.proj_size or H, H][: len(gpu_rnn.kernels.cells.get(layer._cell).states)]
    states = tuple(torch.randn(L, B, size, requires_grad=True) for size in sizes)
    return x, states if len(states) > 1 else states[0]


def one_direction(layer, suffix, x, h, reverse):
    """The matmuls of one layer and direction, a time step at a time, in torch's own operations."""
    w_ih, w_hh = getattr(layer, "weight_ih" + suffix), getattr(layer, "weight_hh" + suffix)
    outputs = []
    for t in reversed(range(T)) if reverse else range(T):
        h = (linear(x[t], w_ih) + linear(h, w_hh)).tanh()[:, :H]
        if layer.proj_size:
            h = linear(h, getattr(layer, "weight_hr" + suffix))
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs)


def loop(layer, x, h0):
    """As many matmuls of the same sizes as the layer has: torch counts them itself."""
    D = 1 + layer.bidirectional
    for k in range(layer.num_layers):
        ways = enumerate(layer._suffixes[k * D : k * D + D])
        x = torch.cat([one_direction(layer, suffix, x, h0[k * D + d], d > 0) for d, suffix in ways], -1)
    return x


VARIANTS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 2},
    "zoneout": {"zoneout": 0.1},
}


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_flops_are_those_that_torch_counts_of_a_loop(kind, variant, needs_x):
    layer = LAYERS[kind](I, H, **VARIANTS[variant])
    x, hx = ready(layer, needs_x)
    first = hx[0] if isinstance(hx, tuple) else hx
    forward = flops(lambda: layer(x, hx))
    assert forward == flops(lambda: loop(layer, x, first)) > 0
    assert flops(lambda: layer(x, hx)[0].sum().backward()) == flops(lambda: loop(layer, x, first).sum().backward())


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_of_a_layer_are_2TBGH_times_I_plus_H(kind):
    layer = LAYERS[kind](I, H)
    x, hx = ready(layer)
    G = {"RNN": 1, "LSTM": 4, "GRU": 3}[kind]
    expected = 2 * T * B * G * H * (I + H)
    assert flops(lambda: layer(x, hx)) == expected
    assert flops(lambda: layer(x, hx)[0].sum().backward()) == 3 * expected
    again = LAYERS[kind](I, H, recompute=True)
    assert flops(lambda: again(x, hx)[0].sum().backward()) == 4 * expected
    with torch.no_grad():
        assert flops(lambda: layer(x)) == expected


def test_flops_of_a_backward_alone_of_a_graph_from_before():
    for layer in (gpu_rnn.LSTM(I, H), gpu_rnn.GRU(I, H, bidirectional=True), gpu_rnn.LSTM(I, H, num_layers=2)):
        x, hx = ready(layer)
        whole = flops(lambda: layer(x, hx)[0].sum().backward())  # noqa: B023
        y = layer(x, hx)[0].sum()
        assert flops(y.backward) == 2 / 3 * whole


def test_flops_of_cells_and_functions():
    cell, x = gpu_rnn.GRUCell(I, H), torch.randn(B, I)
    assert flops(lambda: cell(x)) == 2 * B * 3 * H * (I + H)
    layer = gpu_rnn.GRU(I, H)
    inputs = torch.randn(T, B, I), layer.weight_ih_l0, layer.weight_hh_l0
    assert flops(lambda: gpu_rnn.gru(*inputs)) == 2 * T * B * 3 * H * (I + H)
    part = inputs[0] @ inputs[1].t()
    assert flops(lambda: gpu_rnn.gru(part, None, inputs[2])) == 2 * T * B * 3 * H * H


def test_flops_of_what_torch_compile_and_export_capture():
    """The nodes of a graph; torch compiles nothing while a counter is on."""
    layer = gpu_rnn.LSTM(I, H, num_layers=2)
    x, _ = ready(layer)
    whole = flops(lambda: layer(x)[0].sum().backward())
    program = torch.export.export(layer, (x,)).module()
    assert flops(lambda: program(x)) == whole / 3
    weights = [Run(None, layer._weights(suffix), [None, None]) for suffix in layer._suffixes]
    runs = [weights[0]._replace(x=x), weights[1]]
    ((y, _),) = call_op("lstm", runs[:1], Options())
    first = flops(y.sum().backward)
    assert first == 2 * flops(lambda: call_op("lstm", runs[:1], Options()))
    second = flops(lambda: call_op("lstm", [weights[1]._replace(x=y)], Options()))
    assert flops(lambda: call_op("lstm", runs, Options(), linked=True)[-1][0].sum().backward()) == whole
    assert whole == 3 * (first / 2 + second)


def test_flops_by_module():
    model = nn.Sequential()
    model.encoder, model.decoder = gpu_rnn.LSTM(I, H), nn.Linear(H, 2)
    with FlopCounterMode(display=False) as counter:
        model.decoder(model.encoder(torch.randn(T, B, I))[0])
    counts = counter.get_flop_counts()
    assert {name: sum(each.values()) for name, each in counts.items()}["LSTM"] == 2 * T * B * 4 * H * (I + H)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_counter_changes_no_number(kind):
    layer = LAYERS[kind](I, H, num_layers=2, bidirectional=True)
    x, hx = ready(layer)

    def numbers():
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y, _ = layer(x, hx)
        (y * y).sum().backward()
        return y.detach(), *(leaf.grad.clone() for leaf in leaves)

    plain = numbers()
    with FlopCounterMode(display=False):
        counted = numbers()
    for a, b in zip(plain, counted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_second_derivatives_under_a_counter():
    layer = gpu_rnn.GRU(I, H).double()
    x = torch.randn(2, 2, I, dtype=torch.double, requires_grad=True)

    def run(x):  # a function: the counter's hooks on modules take no torch.autograd.grad
        return gpu_rnn.gru(x, *layer.parameters())[0]

    with FlopCounterMode(display=False):
        assert torch.autograd.gradgradcheck(run, (x,))
        torch.testing.assert_close(torch.func.vmap(run)(x[None])[0], run(x))


def test_selective_checkpointing_saves_the_layer(monkeypatch):
    """Its forward is an operator that the policy decides about, and isn't run twice where it says so."""
    layer, x = gpu_rnn.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
    runs, forward = [], functions.forward
    monkeypatch.setattr(functions, "forward", lambda *args: runs.append(1) or forward(*args))

    def policy(context, operator, *_args, **named):
        saved = operator == torch.ops.gpu_rnn.forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    (expected,) = torch.autograd.grad(layer(x)[0].tanh().sum(), x)
    runs.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(lambda x: layer(x)[0].tanh(), x, use_reentrant=False, context_fn=contexts)
    (actual,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(actual, expected)
    assert len(runs) == 1


# ---- the profiler ---------------------------------------------------------------------------------------------------


def ranges(function) -> list[str]:
    with torch.profiler.profile() as profile:
        function()
    return [event.name for event in profile.events() if event.name.startswith("gpu_rnn::")]


@pytest.fixture
def on_numpy(monkeypatch):
    """Which isn't the first backend everywhere."""
    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")


@pytest.mark.usefixtures("on_numpy")
def test_ranges_of_the_profiler():
    layer, x = gpu_rnn.LSTM(I, H, num_layers=2), torch.randn(T, B, I)
    one = [f"gpu_rnn::lstm {way} T={T} B={B} H={H} numpy" for way in ("forward", "backward")]
    assert ranges(lambda: layer(x)[0].sum().backward()) == [one[0]] * 2 + [one[1]] * 2
    both = gpu_rnn.GRU(I, H, bidirectional=True)
    assert ranges(lambda: both(x)) == [f"gpu_rnn::gru forward T={T} B={B} H={H} D=2 numpy"]
    projected = gpu_rnn.LSTM(I, H, proj_size=2)
    assert ranges(lambda: projected(x)) == [f"gpu_rnn::lstm forward T={T} B={B} H={H} P=2 numpy"]
    function = partial(gpu_rnn.gru, x, both.weight_ih_l0, both.weight_hh_l0)
    assert ranges(function) == [f"gpu_rnn::gru forward T={T} B={B} H={H} numpy"]


@pytest.mark.usefixtures("on_numpy")
def test_ranges_are_within_their_operator_in_a_compiled_model():
    layer, x = gpu_rnn.LSTM(I, H), torch.randn(T, B, I)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    names_of_ranges = ranges(lambda: compiled(x)[0].sum().backward())
    names = [f"gpu_rnn::lstm {way} T={T} B={B} H={H} numpy" for way in ("forward", "backward")]
    assert names_of_ranges == ["gpu_rnn::forward", names[0], "gpu_rnn::backward", names[1]]


def test_no_range_is_made_while_no_profiler_is_on(monkeypatch):
    def fail(*args):
        raise AssertionError("a range without a profiler")

    monkeypatch.setattr(torch.profiler, "record_function", fail)
    layer, x = gpu_rnn.LSTM(I, H), torch.randn(T, B, I)
    layer(x)[0].sum().backward()
    with pytest.raises(AssertionError, match="without a profiler"), torch.profiler.profile():
        layer(x)


@pytest.mark.usefixtures("on_numpy")
@pytest.mark.parametrize("emit", ["emit_itt", pytest.param("emit_nvtx", marks=pytest.mark.gpu)])
def test_ranges_for_other_profilers(emit, monkeypatch):
    """torch hands every record_function to them; without CUDA it refuses emit_nvtx, but has VTune's emit_itt."""
    entered, record_function = [], torch.profiler.record_function
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: entered.append(name) or record_function(name))
    layer, x = gpu_rnn.GRU(I, H), torch.randn(T, B, I)
    with getattr(torch.autograd.profiler, emit)():
        layer(x)[0].sum().backward()
    assert entered == [f"gpu_rnn::gru {way} T={T} B={B} H={H} numpy" for way in ("forward", "backward")]


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_the_profiler_says_whose_memory_it_is(kind, monkeypatch):
    """What a range has allocated and not given back is what `explain` says that is kept."""
    monkeypatch.setenv("GPU_RNN_BACKEND", "native")  # allocates by torch, as the backends on a GPU do; NumPy's doesn't
    layer, x = LAYERS[kind](16, 32), torch.randn(100, 8, 16)
    if gpu_rnn.explain(layer, x)[0].backend is None:
        pytest.skip("native code can't be compiled here")
    layer(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        y, _ = layer(x)
    (event,) = (event for event in profile.events() if event.name.startswith("gpu_rnn::"))
    assert event.cpu_memory_usage == pytest.approx(gpu_rnn.explain(layer, x).saved, rel=0.05)


@pytest.mark.gpu
def test_memory_snapshots_show_whose_buffers_they_are():
    """By the Python frames of every allocation."""
    layer, x = gpu_rnn.LSTM(16, 32, device="cuda"), torch.randn(100, 8, 16, device="cuda")
    layer(x)[0].sum().backward()
    torch.cuda.memory._record_memory_history(context="all", stacks="python")
    try:
        y, _ = layer(x)
        (trace,) = (each for each in torch.cuda.memory._snapshot()["device_traces"] if each)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    allocations = [entry for entry in trace if entry["action"] == "alloc"]
    ours = [e["size"] for e in allocations if any("gpu_rnn" in frame["filename"] for frame in e["frames"])]
    assert sum(ours) >= gpu_rnn.explain(layer, x).saved


# ---- summaries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_torchinfo_says_of_a_layer_what_it_says_of_torch_nn(kind):
    torchinfo = pytest.importorskip("torchinfo")
    how = {"num_layers": 2, "bidirectional": True, "batch_first": True}

    def summary(library):
        model = nn.Sequential(nn.Linear(2, I), getattr(library, kind)(I, H, **how))
        return torchinfo.summary(model, (B, T, 2), verbose=0)

    ours, theirs = summary(gpu_rnn), summary(nn)
    assert str(ours) == str(theirs)
    assert re.search(rf"{kind}: 1-2 +\[{B}, {T}, {2 * H}\]", str(ours))


def test_torchview_draws_what_it_draws_of_torch_nn():
    torchview = pytest.importorskip("torchview")

    def drawn(library):
        model = nn.Sequential(nn.Linear(2, I), library.LSTM(I, H, num_layers=2, bidirectional=True))
        return str(torchview.draw_graph(model, input_size=(T, B, 2), expand_nested=True).visual_graph)

    assert drawn(gpu_rnn) == drawn(nn)
    assert f"({T}, {B}, {2 * H}), 2 x ({4}, {B}, {H})" in drawn(gpu_rnn)


def test_the_document_runs():
    document = Path(__file__).parents[1] / "docs" / "production.md"
    _, sections = document.read_text().split("## Seen by torch's tools")
    exec("\n".join(re.findall(r"```python\n(.*?)```", sections, re.DOTALL)), {})
