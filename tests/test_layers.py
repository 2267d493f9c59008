"""Layers and cells against torch.nn's: every argument, layout and state, outputs and all gradients, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gpu_rnn

EQUAL = {"rtol": 1e-12, "atol": 1e-12}
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
thorough = settings(max_examples=150, derandomize=True, deadline=None)


def twins(kind, seed=0, **arguments):
    """torch.nn's layer and ours, with the same parameters."""
    torch.manual_seed(seed)
    theirs = getattr(nn, kind)(**{"dtype": torch.float64} | arguments)
    ours = getattr(gpu_rnn, kind)(**{"dtype": torch.float64} | arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def flat(outputs):
    """The tensors in the nested outputs or arguments of a layer."""
    if isinstance(outputs, PackedSequence):
        return [outputs.data]
    if outputs is None or isinstance(outputs, torch.Tensor):
        return [] if outputs is None else [outputs]
    return [tensor for part in outputs for tensor in flat(part)]


def results(layer, input, hx=None, seed=1):
    """Outputs, and the gradients of a random weighting of them all, by name."""
    torch.manual_seed(seed)
    outputs = flat(layer(input, hx) if hx is not None else layer(input))
    weights = [torch.randint(1, 9, output.shape).to(output.dtype) / 4 for output in outputs]  # exact in every dtype
    leaves = {f"argument {i}": tensor for i, tensor in enumerate(flat((input, hx)))} | dict(layer.named_parameters())
    leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return {f"output {i}": tensor for i, tensor in enumerate(outputs)} | dict(zip(leaves, gradients))


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **EQUAL, msg=lambda text, name=name: f"{name}: {text}")


def tensors(draw, *shape):
    """A random tensor: contiguous, strided or expanded; with a gradient or without."""
    layout = draw(st.sampled_from(("contiguous", "strided", "expanded")))
    if layout == "strided":
        tensor = torch.randn(*shape, 2, dtype=torch.float64)[..., 0]
    elif layout == "expanded":
        tensor = torch.randn(shape[-1], dtype=torch.float64).expand(shape)
    else:
        tensor = torch.randn(shape, dtype=torch.float64)
    return tensor.requires_grad_(draw(st.booleans()))


def states(draw, kind, *leading, H, P=0):
    if not draw(st.booleans()):
        return None
    h0 = tensors(draw, *leading, P or H)
    return (h0, tensors(draw, *leading, H)) if kind.startswith("LSTM") else h0


@st.composite
def layer_cases(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    kind, small, flag = draw(st.sampled_from(LAYERS)), st.integers(1, 5), st.booleans()
    I, H, T, B = draw(small), draw(small), draw(small), draw(st.integers(0, 4))
    arguments = {"input_size": I, "hidden_size": H, "num_layers": draw(st.integers(1, 3))}
    arguments |= {name: draw(flag) for name in ("bias", "batch_first", "bidirectional")}
    if kind == "RNN":
        arguments["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    P = draw(st.integers(0, H - 1)) if kind == "LSTM" else 0
    if P:
        arguments["proj_size"] = P
    if arguments["num_layers"] > 1:
        arguments["dropout"] = draw(st.sampled_from((0.0, 0.3, 1.0)))
    layout = draw(st.sampled_from(("batched", "single", "packed", "packed unsorted")))
    batch = [B] if layout == "batched" else []
    if layout.startswith("packed"):
        lengths = draw(st.lists(small, min_size=1, max_size=5))
        ordered = layout == "packed"
        lengths = sorted(lengths, reverse=True) if ordered else lengths
        input = pack_sequence([torch.randn(n, I, dtype=torch.float64) for n in lengths], enforce_sorted=ordered)
        input = input._replace(data=input.data.requires_grad_(draw(flag)))
        batch = [len(lengths)]
    else:
        shape = [T, *batch] if not arguments["batch_first"] else [*batch, T]
        input = tensors(draw, *shape, I)
    hx = states(draw, kind, arguments["num_layers"] * (1 + arguments["bidirectional"]), *batch, H=H, P=P)
    return kind, arguments, input, hx, draw(flag)


@thorough
@given(layer_cases())
def test_layers_are_torchs(case):
    kind, arguments, input, hx, training = case
    theirs, ours = (layer.train(training) for layer in twins(kind, **arguments))
    before = [tensor.detach().clone() for tensor in flat((input, hx))]
    assert_equal(results(ours, input, hx), results(theirs, input, hx))
    for tensor, copy in zip(flat((input, hx)), before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)
        assert tensor._version == 0, "an input was written to"


@st.composite
def cell_cases(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    kind, small = draw(st.sampled_from(CELLS)), st.integers(1, 5)
    I, H, batch = draw(small), draw(small), draw(st.sampled_from(([], [0], [1], [4])))
    arguments = {"input_size": I, "hidden_size": H, "bias": draw(st.booleans())}
    if kind == "RNNCell":
        arguments["nonlinearity"] = draw(st.sampled_from(("tanh", "relu")))
    return kind, arguments, tensors(draw, *batch, I), states(draw, kind, *batch, H=H)


@thorough
@given(cell_cases())
def test_cells_are_torchs(case):
    kind, arguments, input, hx = case
    theirs, ours = twins(kind, **arguments)
    assert_equal(results(ours, input, hx), results(theirs, input, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_are_each_run_alone(kind):
    """Against ourselves, so that it holds where torch.nn has no say: the same numbers as for one sequence at a time."""
    _, layer = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True, batch_first=True)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 5, 1, 7)]
    y, last = layer(pack_sequence(sequences, enforce_sorted=False))
    apart, lengths = nn.utils.rnn.pad_packed_sequence(y)
    for row, sequence in enumerate(sequences):
        alone, alone_last = layer(sequence)
        torch.testing.assert_close(apart[: lengths[row], row], alone, **EQUAL)
        for state, expected in zip(flat(last), flat(alone_last), strict=True):
            torch.testing.assert_close(state[:, row], expected, **EQUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_dtypes_err_no_more_than_torch(kind, dtype):
    theirs, ours = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True, dtype=dtype)
    input = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    actual, peer = results(ours, input), results(theirs, input)
    exact = results(theirs.double(), input.detach().double().requires_grad_())
    assert {tensor.dtype for tensor in actual.values()} == {dtype}
    for name, truth in exact.items():
        error, allowed = ((result[name] - truth).abs().max() for result in (actual, peer))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth.abs().max(), name
