"""TorchRL's recurrent modules after `replace_`, against the same modules before: trajectories, steps, gradients."""

import copy

import pytest
import torch
from torch import nn

import gpu_rnn

modules = pytest.importorskip("torchrl.modules")
tensordict = pytest.importorskip("tensordict")

LAYER = {"LSTM": "lstm", "GRU": "gru"}
STATES = {"LSTM": ("recurrent_state_h", "recurrent_state_c"), "GRU": ("recurrent_state",)}
every_kind = pytest.mark.parametrize("kind", LAYER)
B, T, I, H = 3, 7, 3, 4


def module(kind, num_layers=2, **arguments):
    torch.manual_seed(0)
    states = STATES[kind]
    keys = {"in_keys": ["seen", *states], "out_keys": ["y", *(("next", state) for state in states)]}
    arguments = {"default_recurrent_mode": True} | arguments
    made = getattr(modules, f"{kind}Module")(input_size=I, hidden_size=H, num_layers=num_layers, **keys, **arguments)
    return made.double()


def pair(kind, **arguments):
    """TorchRL's module, and a copy with our layer."""
    theirs = module(kind, **arguments)
    ours = gpu_rnn.replace_(copy.deepcopy(theirs))
    assert type(getattr(ours, LAYER[kind])) is getattr(gpu_rnn, kind)
    return theirs, ours


def trajectories(kind, steps=T, states=2, first=((0, 3), (1, 0), (1, 5), (2, 1), (2, 2))):
    """A batch in which trajectories begin at (row, time step) of `first`."""
    torch.manual_seed(1)
    batch = {state: torch.randn(B, steps, states, H, dtype=torch.float64) for state in STATES[kind]}
    batch |= {"seen": torch.randn(B, steps, I, dtype=torch.float64), "is_init": torch.zeros(B, steps, 1).bool()}
    for row, t in first:
        batch["is_init"][row, t] = True
    return tensordict.TensorDict(batch, [B, steps])


def results(kind, module, batch):
    """Everything that the module writes, and the gradients of y and of all states."""
    actual = module(batch.clone())
    outputs = {"y": actual["y"]} | {state: actual["next", state] for state in STATES[kind]}
    loss = sum((tensor * torch.arange(tensor.numel()).reshape(tensor.shape).cos()).sum() for tensor in outputs.values())
    names, parameters = zip(*module.named_parameters())
    return outputs | dict(zip(names, torch.autograd.grad(loss, parameters)))


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@every_kind
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 1, "bias": False}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("first", [(), ((0, 0), (1, 0), (2, 0)), ((0, 3), (1, 0), (1, 5), (2, 1), (2, 2))])
def test_trajectories(kind, arguments, first):
    theirs, ours = pair(kind, **arguments)
    directions = 2 if arguments.get("bidirectional") else 1
    batch = trajectories(kind, states=arguments.get("num_layers", 2) * directions, first=first)
    assert_same(results(kind, ours, batch), results(kind, theirs, batch))


@every_kind
def test_every_trajectory_is_the_layer_on_it_alone(kind):
    theirs, ours = pair(kind)
    batch, layer = trajectories(kind), getattr(theirs, LAYER[kind])
    y = ours(batch.clone())["y"]
    for row in range(B):
        starts = sorted({0, *batch["is_init"][row, :, 0].nonzero().flatten().tolist()})
        for begin, end in zip(starts, [*starts[1:], T]):
            hx = [batch[state][row, begin].contiguous() for state in STATES[kind]]
            alone, _ = layer(batch["seen"][row, begin:end], hx[0] if kind == "GRU" else tuple(hx))
            torch.testing.assert_close(y[row, begin:end], alone)


@every_kind
def test_one_step_at_a_time(kind):
    theirs, ours = pair(kind, default_recurrent_mode=False)
    batch = trajectories(kind, steps=1, first=((1, 0),))[:, 0]
    assert_same(results(kind, ours, batch), results(kind, theirs, batch))


@every_kind
def test_the_scan_backend_reads_the_weights_by_name(kind):
    theirs, ours = pair(kind)
    theirs.recurrent_backend = ours.recurrent_backend = "scan"
    batch = trajectories(kind)
    assert_same({"y": ours(batch.clone())["y"]}, {"y": theirs(batch.clone())["y"]})


@every_kind
def test_parameters_from_outside(kind):
    """As TorchRL's losses take them."""
    theirs, ours = pair(kind)
    batch = trajectories(kind)
    others = tensordict.from_module(theirs).apply(lambda weight: weight.detach() * 2)
    actual, expected = [], []
    for made, outputs in ((ours, actual), (theirs, expected)):
        with others.to_module(made):
            outputs.append(made(batch.clone())["y"])
    torch.testing.assert_close(actual, expected)
    assert_same(results(kind, ours, batch), results(kind, theirs, batch))


@every_kind
def test_made_with_our_layer_and_back(kind):
    theirs, _ = pair(kind)
    layer = getattr(gpu_rnn, kind)(I, H, 2, batch_first=True, dtype=torch.float64)
    states = STATES[kind]
    ours = getattr(modules, f"{kind}Module")(
        **{LAYER[kind]: layer}, in_keys=["seen", *states], out_keys=["y", *(("next", state) for state in states)],
        default_recurrent_mode=True,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    batch = trajectories(kind)
    expected = results(kind, theirs, batch)
    assert_same(results(kind, ours, batch), expected)
    assert_same(results(kind, copy.deepcopy(ours).make_cudnn_based(), batch), expected)
    assert type(getattr(gpu_rnn.restore_(ours), LAYER[kind])) is getattr(nn, kind)
    assert_same(results(kind, ours, batch), expected)


# ---- the mask that TorchRL's modules give --------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_says_what_lengths_say(kind, batch_first):
    layer = getattr(gpu_rnn, kind)(I, H, 2, bidirectional=True, batch_first=batch_first)
    x, lengths = torch.randn(T, B, I), torch.tensor([4, 7, 0])
    mask = torch.arange(T)[:, None] < lengths
    if batch_first:
        x, mask = x.transpose(0, 1), mask.t()
    actual, expected = layer(x, mask=mask), layer(x, lengths=lengths)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(*states) for states in zip(actual[1], expected[1]))
    alone, _ = layer(x[0] if batch_first else x[:, 0], mask=mask[0] if batch_first else mask[:, 0])
    torch.testing.assert_close(alone, expected[0][0] if batch_first else expected[0][:, 0])


def test_masks_that_say_something_else_are_refused():
    layer, x = gpu_rnn.GRU(I, H), torch.randn(T, B, I)
    mask = torch.ones(T, B, dtype=torch.bool)
    with pytest.raises(
        gpu_rnn.ShapeError, match=r"mask is a tensor \[7, 3\] of torch.float32; expected a bool.*\[7, 3\]"
    ):
        layer(x, mask=mask.float())
    with pytest.raises(gpu_rnn.ShapeError, match=r"mask is a tensor \[3, 7\].*with input \[7, 3, 3\]"):
        layer(x, mask=mask.t())
    with pytest.raises(TypeError, match="mask and lengths"):
        layer(x, mask=mask, lengths=torch.tensor([7, 7, 7]))
    mask[2, 1] = False
    with pytest.raises(ValueError, match="true for the first time steps"):
        layer(x, mask=mask)
