"""Step by step: the numbers of the whole sequence, and no memory for them."""

import copy
import pickle
import tracemalloc

import pytest
import torch
from torch import nn

import gpu_rnn
from gpu_rnn import ShapeError
from gpu_rnn.backends import native, numpy

LAYERS = [
    ("LSTM", {}), ("LSTM", {"num_layers": 3, "bias": False, "batch_first": True}), ("LSTM", {"proj_size": 8}),
    ("LSTM", {"num_layers": 2, "peephole": True, "coupled": True, "cell_clip": 0.2}),
    ("LSTM", {"zoneout": 0.2, "recurrent_dropout": 0.5}), ("GRU", {"num_layers": 2}), ("GRU", {"zoneout": 0.2}),
    ("RNN", {"nonlinearity": "relu"}),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("kind", "options"), LAYERS, ids=str)
T, I, H = 70, 24, 32


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(7)


def states(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def in_time(layer, x):
    return x.transpose(0, 1) if layer.batch_first else x


def followed(listen, x):
    return torch.stack([listen(now).clone() for now in x])


def whole(layer, x, hx=None):
    """In eval mode, as a stream is; the layer stays as it was."""
    before = layer.training
    with torch.no_grad():
        y, last = layer.eval()(in_time(layer, x), hx)
    layer.train(before)
    return in_time(layer, y), states(last)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 3, 41])
def test_with_step_exact_a_stream_is_the_sequence_bit_for_bit(kind, options, dtype, B):
    layer, x = getattr(gpu_rnn, kind)(I, H, **options, dtype=dtype, step_exact=True), torch.randn(T, B, I, dtype=dtype)
    listen = gpu_rnn.stream(layer, B)
    y, last = whole(layer, x)
    assert torch.equal(followed(listen, x), y)
    assert all(map(torch.equal, states(listen.state), last))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("T", "H"), [(1, 37), (9, 112), (70, 37)], ids=str)
@pytest.mark.parametrize("B", [1, 5])
def test_also_with_ragged_units(kind, T, H, B):
    layer, x = getattr(gpu_rnn, kind)(I, H, step_exact=True), torch.randn(T, B, I)
    assert torch.equal(followed(gpu_rnn.stream(layer, B), x), whole(layer, x)[0])


@pytest.mark.parametrize(
    ("kind", "options"), [*LAYERS, ("GRU", {"reset_after": False, "num_layers": 2, "zoneout": 0.2})], ids=str
)
@pytest.mark.parametrize("B", [1, 3])
def test_without_it_agrees_to_rounding(kind, options, B):
    layer, x = getattr(gpu_rnn, kind)(I, H, **options, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    listen = gpu_rnn.stream(layer, B)
    y, last = whole(layer, x)
    torch.testing.assert_close(followed(listen, x), y, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(states(listen.state), last, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 1], torch.nn.Parameter,
        lambda x: torch._neg_view(-x), lambda x: x.clone().requires_grad_(), lambda x: x[:1].expand(3, -1),
        lambda x: torch._efficientzerotensor(x.shape),
    ],
    ids=["columns", "strided", "parameter", "negated", "leaf", "expanded", "without memory"],
)  # fmt: skip
def test_an_input_may_lie_anywhere(wrap, backend):
    layer, x = gpu_rnn.GRU(4, 5, num_layers=2, backend=backend), torch.randn(3, 4)
    first, second = gpu_rnn.stream(layer, 3), gpu_rnn.stream(layer, 3)
    for _ in range(2):
        wrapped = wrap(x)
        assert torch.equal(second(wrapped), first(wrapped.detach().clone()))


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("part", [lambda y: y, lambda y: y[:, 5:]], ids=["whole", "part"])
@pytest.mark.parametrize("B", [1, 100])
def test_an_output_may_be_the_next_input(B, part, num_layers, monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: 2)
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)
    y = part(torch.randn(B, 300))
    layer = gpu_rnn.GRU(y.shape[1], 300, num_layers=num_layers)
    first, second = gpu_rnn.stream(layer, len(y)), gpu_rnn.stream(layer, len(y))
    for _ in range(5):
        expected = second(y.clone())
        y = part(first(y))
        assert torch.equal(y, part(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_in_half_precision_hand_over_what_they_would_in_a_sequence(dtype):
    layer, x = gpu_rnn.LSTM(I, H, num_layers=3, dtype=dtype, step_exact=True), torch.randn(T, 2, I).to(dtype)
    listen = gpu_rnn.stream(layer, 2)
    y, last = whole(layer, x)
    assert torch.equal(followed(listen, x), y)
    assert all(map(torch.equal, listen.state, last))


def test_memory_is_that_of_the_first_call():
    layer = gpu_rnn.LSTM(1024, 2048, num_layers=2, proj_size=1024, cell_clip=1.0)
    listen, x = gpu_rnn.stream(layer, 2), torch.randn(2, 1024)
    first, least = listen(x), 2 * 1024 * 4  # bytes of the smallest array; Python's own objects are smaller
    listen(x)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            y = listen(x)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert y is first
    assert peak - before < least
    assert after - before < least // 4


# ---- states ---------------------------------------------------------------------------------------------------------


def test_a_state_can_be_looked_at_set_and_reset():
    layer, x = gpu_rnn.LSTM(I, H, num_layers=2), torch.randn(9, 8, I)
    listen = gpu_rnn.stream(layer, 8)
    y = followed(listen, x)
    kept = listen.state
    again = followed(listen, x)
    assert not torch.equal(again, y)
    listen.state = kept
    assert torch.equal(followed(listen, x), again)
    listen.reset()
    assert all(not state.any() for state in listen.state)
    assert torch.equal(followed(listen, x), y)
    listen.state = None
    assert all(not state.any() for state in listen.state)


@pytest.mark.parametrize("rows", [[1, 4], torch.tensor([False, True, False, False, True, False, False, False])])
def test_rows_are_reset_alone(rows):
    layer, x = gpu_rnn.GRU(I, H, num_layers=2), torch.randn(9, 8, I)
    listen = gpu_rnn.stream(layer, 8)
    fresh_y, on = followed(listen, x), listen.state
    listen.reset(rows)
    reset = torch.zeros(8, dtype=torch.bool)
    reset[[1, 4]] = True
    assert torch.equal(listen.state, torch.where(reset[None, :, None], 0.0, on))
    y = followed(listen, x)
    assert torch.equal(y[:, reset], fresh_y[:, reset])
    assert not torch.equal(y[:, ~reset], fresh_y[:, ~reset])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_rollout_and_its_training_have_the_same_bits(kind):
    """Acting a time step at a time, learning from the whole rollout in one call, with episodes' ends in both."""
    B, layer = 3, getattr(gpu_rnn, kind)(I, H, num_layers=2, step_exact=True)
    x, reset, listen, acted = torch.randn(T, B, I), torch.rand(T, B) < 0.1, gpu_rnn.stream(layer, B), []
    for now, first in zip(x, reset):
        listen.reset(first)
        acted.append(listen(now).clone())
    learned, _ = layer(x, reset=reset)
    assert learned.requires_grad
    assert torch.equal(torch.stack(acted), learned)


def test_streams_are_apart_and_the_layer_stays_as_it_was():
    layer, x = gpu_rnn.LSTM(I, H, zoneout=0.1), torch.randn(9, 2, I)
    one, other = gpu_rnn.stream(layer, 2), gpu_rnn.stream(layer, 2)
    y = followed(one, x)
    assert torch.equal(followed(other, x), y)
    assert layer.training
    assert "_sequence" not in vars(layer)
    assert one(x[0].requires_grad_()).grad_fn is None
    assert one(x[0]) is not other(x[0])


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"num_layers": 2}), ("GRU", {"batch_first": True}), ("RNN", {}), ("LSTM", {"proj_size": 8}),
        ("LSTM", {"num_layers": 2, "dtype": torch.bfloat16}), ("GRU", {"dtype": torch.float64}),
    ],
    ids=str,
)  # fmt: skip
def test_a_copy_goes_on_by_itself(kind, options, way, tmp_path):
    """Against torch.nn on each of the two continuations; also in half precision, whose states are kept in float32."""
    theirs = getattr(nn, kind)(I, H, **options)
    x, other = (torch.randn(T, 3, I, dtype=options.get("dtype", torch.float32)) for _ in range(2))
    listen, alone = gpu_rnn.stream(theirs, 3), gpu_rnn.stream(theirs, 3)
    before = followed(listen, x[:20])
    exact = followed(alone, x)
    if way == "save":
        torch.save(listen, tmp_path / "stream")
        copied = torch.load(tmp_path / "stream", weights_only=False)
    else:
        copied = pickle.loads(pickle.dumps(listen)) if way == "pickle" else getattr(copy, way)(listen)
    went = followed(copied, torch.cat([x[20:30], other[30:]]))
    assert torch.equal(followed(listen, x[20:]), exact[20:]), "bit for bit, whatever its copy did"
    assert torch.equal(went[:10], exact[20:30])
    tolerance = {"rtol": 0, "atol": 2e-2 if "dtype" in options else 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.cat([before, exact[20:]]), in_time(theirs, theirs(in_time(theirs, x))[0]), **tolerance
        )
        mixed = torch.cat([x[:30], other[30:]])
        torch.testing.assert_close(went, in_time(theirs, theirs(in_time(theirs, mixed))[0])[20:], **tolerance)
    copied.reset()
    assert any(state.any() for state in states(listen.state))


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_one_made_in_inference_mode_goes_on_outside(backend):
    layer, x = gpu_rnn.LSTM(I, H, num_layers=2, backend=backend), torch.randn(5, 2, I)
    expected = followed(gpu_rnn.stream(layer, 2), x)
    with torch.inference_mode():
        listen = gpu_rnn.stream(layer, 2)
        assert torch.equal(followed(listen, x), expected)
    listen.reset()
    assert torch.equal(followed(copy.deepcopy(listen), x), expected)
    listen.reset([0])
    listen.state = listen.state
    assert torch.equal(followed(listen, x), expected)


def test_a_layer_of_torch_and_of_a_custom_cell_stream():
    theirs, x = nn.GRU(I, H, num_layers=2), torch.randn(9, 8, I)
    with torch.no_grad():
        torch.testing.assert_close(followed(gpu_rnn.stream(theirs, 8), x), theirs(x)[0])
    assert type(theirs) is nn.GRU


# ---- one time step --------------------------------------------------------------------------------------------------


@EVERY
def test_step_is_a_sequence_of_one(kind, options):
    layer, x = getattr(gpu_rnn, kind)(I, H, **options).eval(), torch.randn(T, 8, I)
    y, last = whole(layer, x)
    hx, outputs = None, []
    for now in x:
        out, hx = layer.step(now, hx)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs), y)
    for ours, expected in zip(states(hx), last, strict=True):
        torch.testing.assert_close(ours, expected)
    torch.stack(outputs).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_step_of_a_single_row():
    layer, x = gpu_rnn.LSTM(I, H, num_layers=2, batch_first=True), torch.randn(I)
    y, (h, c) = layer.step(x)
    assert y.shape == (H,)
    assert h.shape == c.shape == (2, H)
    torch.testing.assert_close(y, layer.step(x[None])[0][0])


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_with_its_shapes():
    layer = gpu_rnn.LSTM(I, H, bidirectional=True)
    for call in (lambda: layer.step(torch.randn(2, I)), lambda: gpu_rnn.stream(layer)):
        with pytest.raises(ValueError, match="is not defined for a bidirectional layer"):
            call()
    for what, message in ((gpu_rnn.LSTMCell(I, H), "a layer, not a cell: LSTMCell"), (nn.Linear(I, H), "got Linear")):
        with pytest.raises(TypeError, match=message):
            gpu_rnn.stream(what)
    layer = gpu_rnn.LSTM(I, H)
    for batch in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"batch must be an int larger than 0, got {batch}"):
            gpu_rnn.stream(layer, batch)
    with pytest.raises(ShapeError, match=r"input has shape \[5, 2, 24\]; expected \[B, I\] or \[I\]"):
        layer.step(torch.randn(5, 2, I))
    listen = gpu_rnn.stream(layer, 2)
    with pytest.raises(ShapeError, match=r"x has shape \[3, 24\]; expected \[B, I\] = \[2, 24\]"):
        listen(torch.randn(3, I))
    with pytest.raises(TypeError, match=r"x is torch.float64 on cpu; the stream is torch.float32 on cpu"):
        listen(torch.randn(2, I, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"h0 has shape \[1, 3, 32\]"):
        listen.state = torch.zeros(1, 3, H), torch.zeros(1, 2, H)
    with pytest.raises(ShapeError, match=r"rows has shape \[3\]; expected indices \[N\] or bool \[B\] = \[2\]"):
        listen.reset(torch.ones(3, dtype=torch.bool))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@EVERY
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_replays_a_time_step(kind, options, backend):
    layer = getattr(gpu_rnn, kind)(I, H, **options, device="cuda", backend=backend, precision="ieee")
    x = torch.randn(T, 3, I, device="cuda")
    listen = gpu_rnn.stream(layer, 3)
    y, last = whole(layer, x)
    torch.testing.assert_close(followed(listen, x), y)
    for actual, expected in zip(states(listen.state), last, strict=True):
        torch.testing.assert_close(actual, expected)
    listen(x[0])
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for now in x:
        out = listen(now)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (held, reserved)
    assert out is listen(x[0])


@pytest.mark.gpu
def test_a_call_becomes_part_of_a_graph_that_is_being_captured():
    layer, x = gpu_rnn.GRU(I, H, device="cuda"), torch.randn(3, I, device="cuda")
    listen = gpu_rnn.stream(layer, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = listen(x)
    listen.reset()
    graph.replay()
    first = y.clone()
    listen.reset()
    torch.testing.assert_close(listen(x), first)


CALLED = {"num_layers": 1}  # stands for a stream that calls the layer, which NumPy's don't
WRITES = {
    "in place": lambda p: p.mul_(3),
    "new data": lambda p: setattr(p, "data", 3 * p.data),
    "in place of data": lambda p: p.data.mul_(3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *LAYERS, ("RNN", {"proj_size": 8}), ("GRU", {"proj_size": 8}), ("GRU", {"layer_norm": True}),
        ("LSTM", {"layer_norm": True}), ("GRU", {"reset_after": False}), ("LSTM", CALLED),
    ],
    ids=str,
)  # fmt: skip
def test_a_stream_has_the_weights_of_when_it_was_made(kind, options, write, monkeypatch):
    """None of them changes with the layer's, whichever way it keeps them."""
    if options == CALLED:  # as on a GPU
        options = monkeypatch.setattr(numpy, "NAME", "another") or {}
    layer, x = getattr(gpu_rnn, kind)(I, H, **options), torch.randn(5, 2, I)
    expected, last = whole(layer, x)
    listen = gpu_rnn.stream(layer, 2)
    y = followed(listen, x[:3])
    with torch.no_grad():
        for parameter in layer.parameters():
            write(parameter)
    y = torch.cat([y, followed(listen, x[3:])])
    torch.testing.assert_close((y, states(listen.state)), (expected, last))
    later = gpu_rnn.stream(layer, 2)
    later.state = listen.state
    torch.testing.assert_close(followed(later, x), whole(layer, x, listen.state)[0])


@pytest.mark.parametrize("norm", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_so_has_one_whose_weights_are_made_of_others(norm, options):
    layer, x = gpu_rnn.GRU(I, H, **options), torch.randn(5, 2, I)
    norm(layer, "weight_hh_l0")
    expected, _ = whole(layer, x)
    listen = gpu_rnn.stream(layer, 2)
    for parameter in layer.parameters():
        parameter.data.mul_(3)
    torch.testing.assert_close(followed(listen, x), expected)


@pytest.mark.parametrize("rows", [[], (), torch.tensor([]), torch.zeros(0, dtype=torch.int64), range(0)], ids=str)
def test_none_of_the_rows_are_reset(rows):
    listen = gpu_rnn.stream(gpu_rnn.LSTM(I, H), 2)
    listen(torch.randn(2, I))
    before = listen.state
    listen.reset(rows)
    assert all(map(torch.equal, before, listen.state))


def test_rows_are_ints_or_bools():
    with pytest.raises(TypeError, match=r"rows must be ints, or bools, got torch\.float32"):
        gpu_rnn.stream(gpu_rnn.LSTM(I, H), 2).reset([0.5])
