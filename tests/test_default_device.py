"""torch.set_default_device and set_default_dtype are for what a caller makes, not for what a call here makes inside."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn
from gpu_rnn.weights import interchange

T, B, I, H = 5, 2, 3, 4
X, LENGTHS = torch.randn(T, B, I), torch.tensor([3, 5])
CALL = {"lengths": LENGTHS, "left_padding": 0 * LENGTHS, "reset": torch.rand(T, B) < 0.3, "return_states": True}
PACKED = pack_sequence([X[:3, 0], X[:, 1]], enforce_sorted=False)
RANDOM = {"recurrent_dropout": 0.2, "zoneout": 0.1, "input_dropout": 0.1, "weight_dropout": 0.1}
LAYERS = {
    "plain": gpu_rnn.LSTM(I, H, 2),
    "at random": gpu_rnn.LSTM(I, H, 2, bidirectional=True, **RANDOM),
    "variants": gpu_rnn.LSTM(I, H, peephole=True, cell_clip=0.3),
    "normalized": gpu_rnn.GRU(I, H, 2, layer_norm=True),
    "reset before": gpu_rnn.GRU(I, H, reset_after=False),
    "step_exact": gpu_rnn.RNN(I, H, step_exact=True),
}
CELL, GRU = gpu_rnn.LSTMCell(I, H, **RANDOM), gpu_rnn.GRU(I, H)


def trained(layer):
    x = X.clone().requires_grad_()
    outputs = tree_leaves(layer(x, **CALL, generator=torch.Generator("cpu").manual_seed(1)))
    loss = sum(out.square().sum() for out in outputs)
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()], create_graph=True)
    return outputs, gradients, torch.autograd.grad(sum(g.square().sum() for g in gradients), x)


def streamed(layer):
    listen, outputs = gpu_rnn.stream(layer, B), []
    for rows in (None, [0], [False, True], ()):
        outputs += [listen(X[0]).clone(), listen.state]
        listen.reset(rows)
    listen.state = None
    return outputs, listen.state


def loaded(kind):
    made = gpu_rnn.LSTM(I, H, peephole=True, device="cpu") if kind == "lstm" else gpu_rnn.GRU(I, H, device="cpu")
    return [*interchange.Stack.of(made).module().parameters(), *made.parameters()]


WAYS = {
    **{f"{name} trains": lambda layer=layer: trained(layer) for name, layer in LAYERS.items()},
    **{f"{n} streams": lambda layer=layer: streamed(layer) for n, layer in LAYERS.items() if "rand" not in n},
    "packed": lambda: tree_map(lambda each: getattr(each, "data", each), GRU(PACKED)),
    "cell": lambda: CELL(X[0], generator=torch.Generator("cpu").manual_seed(1)),
    "function": lambda: gpu_rnn.gru(X, *GRU.parameters(), recurrent_dropout=0.2, seed=5),
    "tbptt": lambda: [*gpu_rnn.tbptt(GRU, X, 2, 3, lengths=LENGTHS)],
    "jvp": lambda: torch.func.jvp(lambda x: GRU(x)[0], (X,), (X,)),
    "vmap": lambda: torch.func.vmap(lambda x: GRU(x)[0])(X[None]),
    "swapped": lambda: gpu_rnn.replace_(torch.nn.GRU(I, H, device="meta"))(X.to("meta"))[0].shape,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_of_another_device(way):
    expected = way()
    torch.set_default_device("meta")
    try:
        actual = way()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_of_another_dtype(way):
    expected = way()
    torch.set_default_dtype(torch.float64)
    try:
        actual = way() if way is not WAYS["swapped"] else expected
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(tree_leaves(actual), tree_leaves(expected), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_is_loaded_is_on_the_cpu(kind):
    torch.set_default_device("meta")
    try:
        parameters = loaded(kind)
    finally:
        torch.set_default_device(None)
    ours, made = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
    torch.testing.assert_close(ours, made, rtol=0, atol=0)
