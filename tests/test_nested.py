"""Nested tensors with the layout torch.jagged, against torch.nn on each sequence alone."""

import pytest
import torch
from torch import nn

import gpu_rnn

I, H = 4, 6
LENGTHS = (3, 5, 1, 4)
KINDS = ("RNN", "LSTM", "GRU")


def pair(kind, **how):
    """A layer and torch.nn's, with the same weights."""
    theirs = getattr(nn, kind)(I, H, **how).double()
    ours = getattr(gpu_rnn, kind)(I, H, **how).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sequences(lengths=LENGTHS, dtype=torch.double):
    return [torch.randn(n, I, dtype=dtype) for n in lengths]


def states(layer, B):
    L = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or H, H) if isinstance(layer, gpu_rnn.LSTM) else (H,)
    result = tuple(torch.randn(L, B, size, dtype=torch.double, requires_grad=True) for size in sizes)
    return result if len(result) > 1 else result[0]


def each(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def row(hx, b):
    """The states of one sequence, as for input without a batch."""
    return tuple(state[:, b] for state in hx) if isinstance(hx, tuple) else hx[:, b]


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("how", [
    {}, {"batch_first": True}, {"bidirectional": True}, {"num_layers": 3}, {"bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("has_states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_those_of_torch_nn_on_each_sequence(kind, has_states, how):
    ours, theirs = pair(kind, **how)
    rows = [x.requires_grad_() for x in sequences()]
    hx = states(ours, len(rows)) if has_states else None
    leaves = [*rows, *(each(hx) if has_states else ())]

    x = jagged(rows)
    y, last = ours(x, hx)
    assert y.is_nested
    assert y.layout == torch.jagged
    (
        y + torch.nested.nested_tensor_from_jagged(torch.ones_like(y.values()), x.offsets())
    ).values()  # the same raggedness
    factors = [torch.randn(n, y.shape[2], dtype=torch.double) for n in LENGTHS]
    loss = (y.values() * torch.cat(factors)).sum()
    loss = loss + sum((state**2).sum() for state in each(last))
    actual = torch.autograd.grad(loss, [*leaves, *ours.parameters()])

    outputs, ends, total = [], [], 0
    for b, x in enumerate(rows):
        out, end = theirs(x, None if hx is None else row(hx, b))
        outputs.append(out)
        ends.append(each(end))
        total = total + (out * factors[b]).sum() + sum((state**2).sum() for state in each(end))
    for a, b in zip(y.unbind(), outputs, strict=True):
        torch.testing.assert_close(a, b)
    for a, *b in zip(each(last), *ends, strict=True):
        torch.testing.assert_close(a, torch.stack(b, 1))
    expected = torch.autograd.grad(total, [*leaves, *theirs.parameters()])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_projection():
    ours, theirs = pair("LSTM", proj_size=2, bidirectional=True)
    rows = sequences()
    y, (h, c) = ours(jagged(rows))
    for b, (out, x) in enumerate(zip(y.unbind(), rows, strict=True)):
        expected, (h_n, c_n) = theirs(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(h[:, b], h_n)
        torch.testing.assert_close(c[:, b], c_n)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 0, 3), (7,)], ids=str)
def test_equal_empty_and_single_sequences(lengths):
    ours, theirs = pair("GRU", bidirectional=True)
    rows = sequences(lengths)
    hx = states(ours, len(rows)).detach()
    y, last = ours(jagged(rows), hx)
    assert [len(out) for out in y.unbind()] == list(lengths)
    for b, (out, x) in enumerate(zip(y.unbind(), rows, strict=True)):
        if len(x):
            expected, end = theirs(x, hx[:, b])
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(last[:, b], end)
        else:
            torch.testing.assert_close(last[:, b], hx[:, b])


def test_holes_between_sequences():
    ours, theirs = pair("LSTM")
    padded, first, lengths = torch.randn(3, 6, I, dtype=torch.double), [0, 1, 2], [3, 2, 4]
    x = torch.nested.narrow(padded, 1, torch.tensor(first), torch.tensor(lengths), layout=torch.jagged)
    assert not x.is_contiguous()
    y, _ = ours(x)
    for out, sequence, begin, n in zip(y.unbind(), padded, first, lengths, strict=True):
        torch.testing.assert_close(out, theirs(sequence[begin : begin + n])[0])


def test_what_packed_sequences_give():
    ours = gpu_rnn.GRU(I, H, num_layers=2, bidirectional=True)
    rows = sequences(dtype=torch.float32)
    packed = nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
    expected, end = ours(packed)
    y, last = ours(jagged(rows))
    for a, b in zip(y.unbind(), nn.utils.rnn.unpack_sequence(expected), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, rows = gpu_rnn.LSTM(I, H, dtype=dtype), sequences(dtype=dtype)
    y, _ = layer(jagged(rows))
    assert y.dtype == dtype
    for out, x in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(out, layer(x)[0], rtol=2e-2, atol=2e-2)


def test_modifiers_and_numerical_gradients():
    x = jagged([x.float() for x in sequences()])
    layer = gpu_rnn.GRU(I, H, layer_norm=True, zoneout=0.2, num_layers=2, dropout=0.3)
    y, _ = layer(x, generator=torch.Generator().manual_seed(3))
    again, _ = layer.train()(x, generator=torch.Generator().manual_seed(3))
    assert y.shape == again.shape == (4, x.shape[1], H)
    plain = gpu_rnn.GRU(2, 2).double()
    offsets = torch.tensor([0, 2, 3])

    def run(values):
        return plain(torch.nested.nested_tensor_from_jagged(values, offsets))[0].values()

    values = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(run, (values,))


def test_compiled_models_take_them():
    layer = gpu_rnn.LSTM(I, H, num_layers=2)
    rows = sequences(dtype=torch.float32)
    compiled = torch.compile(lambda x: layer(x)[0].sin(), backend="aot_eager")
    for out, x in zip(compiled(jagged(rows)).unbind(), rows, strict=True):
        torch.testing.assert_close(out, layer(x)[0].sin())


def test_explain_and_inspect_look_into_them():
    layer, rows = gpu_rnn.GRU(I, H), sequences(dtype=torch.float32)
    (explained,) = gpu_rnn.explain(layer, jagged(rows))
    assert (max(LENGTHS), len(LENGTHS)) == (explained.problem.T, explained.problem.B)
    inside = gpu_rnn.inspect(layer, jagged(rows))["h"]
    for b, x in enumerate(rows):
        torch.testing.assert_close(torch.from_numpy(inside[: len(x), b]), layer(x)[0].detach())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the layout that is refused
def test_errors():
    layer, rows = gpu_rnn.LSTM(I, H), sequences(dtype=torch.float32)
    x = jagged(rows)
    with pytest.raises(TypeError, match=r"layout torch\.jagged, got torch\.strided"):
        layer(torch.nested.nested_tensor(rows, layout=torch.strided))
    with pytest.raises(gpu_rnn.ShapeError, match=r"expected \[B, \*, I\] with I = input_size = 4"):
        layer(x.transpose(1, 2))
    with pytest.raises(gpu_rnn.ShapeError, match=r"expected \[B, \*, I\] with I = input_size = 4"):
        layer(jagged([torch.randn(3, 5), torch.randn(2, 5)]))
    with pytest.raises(gpu_rnn.ShapeError, match="is empty"):
        layer(jagged([torch.randn(0, I), torch.randn(0, I)]))
    with pytest.raises(gpu_rnn.ShapeError, match=r"h0 has shape \[1, 3, 6\]"):
        layer(x, (torch.randn(1, 3, H), torch.randn(1, 3, H)))
    with pytest.raises(TypeError, match="nested input has its own lengths"):
        layer(x, lengths=torch.tensor(LENGTHS))
    with pytest.raises(TypeError, match="nested input has its own lengths"):
        layer(x, return_states=True)
