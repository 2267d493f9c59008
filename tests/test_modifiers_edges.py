"""What resets, lengths, regularizers and states mean, at their edges: by torch.nn where it has them, else by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn

from .reference_layers import LAYERS, SHAPES, as_tuple, inputs, layer

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def torch_layer(made):
    """torch.nn's layer with the same parameters."""
    kind, arguments = LAYERS["relu" if made.mode == "RNN_RELU" else made.mode[:4].strip("_").lower()]
    theirs = getattr(nn, kind.removesuffix("_TANH"))(
        made.input_size, made.hidden_size, made.num_layers, bidirectional=made.bidirectional, dtype=torch.float64,
        **arguments | ({"proj_size": made.proj_size} if made.proj_size else {}),
    )  # fmt: skip
    theirs.load_state_dict(made.state_dict())
    return theirs


# ---- resets ---------------------------------------------------------------------------------------------------------


@every_layer
def test_resets_cut_a_sequence_into_episodes(name):
    """Each as if it were alone: torch.nn on every episode by itself."""
    made = layer(name)
    x, hx, _ = inputs(made)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[2], reset[5] = True, True
    y, last = made(x, hx, reset=reset)
    theirs = torch_layer(made)
    alone = [theirs(x[:2], hx), theirs(x[2:5]), theirs(x[5:])]
    torch.testing.assert_close((y, last), (torch.cat([y for y, _ in alone]), alone[-1][1]), **CLOSE)


@every_layer
@pytest.mark.parametrize("layers", [1, 2])
def test_no_gradient_crosses_a_reset(name, layers):
    made = layer(name, num_layers=layers)
    x, hx, call = inputs(made, ["reset", "reset_state"])
    call["reset"][3] = True
    y, last = made(x, hx, **call)
    dx, *dhx = torch.autograd.grad(y[3:].sum() + sum(s.sum() for s in as_tuple(last)), [x, *as_tuple(hx)])
    assert not dx[:3].any()
    assert not any(gradient.any() for gradient in dhx)
    assert all(dx[t].any() for t in range(3, 6))


def test_nan_before_a_reset_is_forgotten():
    made = layer("lstm", peephole=True)
    x, hx, _ = inputs(made)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3] = True
    bad = x.detach().clone()
    bad[2] = float("nan")
    y, last = made(bad, hx, reset=reset)
    expected, expected_last = made(x, hx, reset=reset)
    assert y[2].isnan().all()
    torch.testing.assert_close((y[3:], last), (expected[3:], expected_last), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_learned_reset_state_learns(kind):
    made = layer(kind)
    x, hx, call = inputs(made, ["reset", "reset_state"])
    reset_state = as_tuple(call["reset_state"])
    target = torch.randn(6, 3, 4, dtype=torch.float64)
    optimizer, losses = torch.optim.Adam(reset_state, 0.1), []
    for _ in range(20):
        loss = (made(x, hx, **call)[0] - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(state.grad.any() for state in reset_state)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "projected"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rollout_by_steps_is_the_whole_sequence(name, dtype):
    """To rounding. Not bit by bit on the CPU, whose library rounds a product by its sizes."""
    made = layer(name, dtype=dtype)
    x, hx, call = inputs(made, ["reset", "reset_state"])
    y, last = made(x, hx, **call)
    steps = []
    for t in range(len(x)):
        step, hx = made(x[t : t + 1], hx, reset=call["reset"][t : t + 1], reset_state=call["reset_state"])
        steps.append(step)
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close((torch.cat(steps), hx), (y, last), rtol=eps, atol=eps)


# ---- lengths --------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([2, 6, 3])


@every_layer
@every_shape
def test_lengths_are_torchs_packed_sequences(name, shape):
    """Outputs, final states of both directions at the true ends, and gradients."""
    made = layer(name, shape)
    x, hx, _ = inputs(made)
    actual = made(x, hx, lengths=LENGTHS)
    packed, last = torch_layer(made)(pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx)
    expected = pad_packed_sequence(packed)[0], last
    torch.testing.assert_close(actual, expected, **CLOSE)
    ours, theirs = (
        torch.autograd.grad(sum(o.sin().sum() for o in tree_leaves(outputs)), [x, *as_tuple(hx)])
        for outputs in (actual, expected)
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)


@every_layer
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_input_draws_its_masks_like_padded_input(name, enforce_sorted):
    made = layer(name, "stacked", recurrent_dropout=0.3, input_dropout=0.3, zoneout=0.3)
    x, hx, _ = inputs(made)
    lengths = LENGTHS.sort(descending=True).values if enforce_sorted else LENGTHS
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    y, last = made(packed, hx, generator=torch.Generator().manual_seed(1))
    order = torch.arange(3) if enforce_sorted else packed.sorted_indices
    rows = tree_map(lambda s: s[:, order], hx)
    expected, expected_last = made(
        x[:, order], rows, lengths=lengths[order], generator=torch.Generator().manual_seed(1)
    )  # masks go by the rows as they lie, the longest first
    torch.testing.assert_close(pad_packed_sequence(y)[0][:, order], expected, **CLOSE)
    torch.testing.assert_close(tree_map(lambda s: s[:, order], last), expected_last, **CLOSE)


@every_layer
@every_shape
def test_starts_are_padding_on_the_left(name, shape):
    made, left_padding = layer(name, shape), torch.tensor([4, 0, 1])
    x, hx, _ = inputs(made)
    y, last = made(x, hx, left_padding=left_padding)
    for b, start in enumerate(left_padding.tolist()):
        alone, ended = torch_layer(made)(
            x[start:, b : b + 1], tree_map(lambda s, b=b: s[:, b : b + 1].contiguous(), hx)
        )
        torch.testing.assert_close(y[start:, b : b + 1], alone, **CLOSE)
        torch.testing.assert_close(tree_map(lambda s, b=b: s[:, b : b + 1], last), ended, **CLOSE)
        assert not y[:start, b].any()


@every_layer
@every_shape
@pytest.mark.parametrize(
    "names", [["lengths"], ["left_padding"], ["left_padding", "lengths", "reset", "reset_state"]], ids=str
)
def test_nothing_in_the_padding_matters(name, shape, names):
    """NaN there changes no output and no gradient, forward and backward; and nothing comes out of there."""
    made = layer(name, shape, zoneout=0.3, recurrent_dropout=0.3)
    x, hx, call = inputs(made, names)
    t = torch.arange(len(x))[:, None]
    padding = (t >= call.get("lengths", torch.full((3,), 9))) | (t < call.get("left_padding", torch.zeros(3)))
    results = []
    for fill in (0.0, float("nan")):
        filled = torch.where(padding[..., None], fill, x).detach().requires_grad_()
        outputs = made(filled, hx, **call, generator=torch.Generator().manual_seed(1), return_states=True)
        leaves = [filled, *as_tuple(hx), *made.parameters()]
        y, _, states = outputs
        assert not y[padding].any()
        assert not any(every[:, padding].any() for every in as_tuple(states))
        arriving = [torch.ones_like(o) for o in tree_leaves(outputs)]
        arriving[0] = torch.where(padding[..., None], fill, arriving[0])
        results.append((outputs, torch.autograd.grad(tree_leaves(outputs), leaves, arriving)))
        assert not results[-1][1][0][padding].any()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_row_of_length_zero_keeps_its_states():
    made = layer("lstm", "stacked")
    x, hx, _ = inputs(made)
    y, last = made(x, hx, lengths=torch.tensor([0, 6, 0]))
    for state, initial in zip(last, hx):
        assert torch.equal(state[:, ::2], initial[:, ::2])
    assert not y[:, ::2].any()
    torch.testing.assert_close(y[:, 1], made(x, hx)[0][:, 1], rtol=0, atol=0)


# ---- states ---------------------------------------------------------------------------------------------------------


@every_layer
def test_every_state_is_that_of_a_shorter_sequence(name):
    """Those of two layers, from the start to every time step; of the reverse direction from there to the end."""
    made = layer(name, "stacked")
    x, hx, _ = inputs(made)
    _, last, states = made(x, hx, return_states=True)
    for every, final in zip(as_tuple(states), as_tuple(last)):
        torch.testing.assert_close(every[::2, -1], final[::2], rtol=0, atol=0)
        torch.testing.assert_close(every[1::2, 0], final[1::2], rtol=0, atol=0)
    for t in range(1, len(x)):
        _, first = made(x[:t], hx)
        _, rest = made(x[t:], hx)
        for every, a, b in zip(as_tuple(states), as_tuple(first), as_tuple(rest)):
            torch.testing.assert_close(every[0, t - 1], a[0], **CLOSE)
            torch.testing.assert_close(every[1, t], b[1], **CLOSE)


@pytest.mark.parametrize("name", ["lstm", "projected"])
def test_gradients_go_through_every_cell_state(name):
    made = layer(name)
    x, (h, c), _ = inputs(made)

    def cell_states(x, c):
        return made(x, (h, c), return_states=True)[2][1]

    assert torch.autograd.gradcheck(cell_states, (x, c))
    assert torch.autograd.gradgradcheck(cell_states, (x, c), fast_mode=True)


# ---- regularizers ---------------------------------------------------------------------------------------------------


def test_zoneout_of_nothing_and_of_everything():
    x, hx, _ = inputs(layer("lstm"))
    plain = layer("lstm")(x, hx)
    torch.testing.assert_close(layer("lstm", zoneout=(0.0, 0.0))(x, hx), plain, rtol=0, atol=0)
    for training in (True, False):
        y, last = layer("lstm", zoneout=1.0).train(training)(x, hx)
        torch.testing.assert_close(last, hx, rtol=0, atol=0)
        torch.testing.assert_close(y, hx[0].expand_as(y), rtol=0, atol=0)
        _, (h, c) = layer("lstm", zoneout=(0.0, 1)).train(training)(x, hx)
        torch.testing.assert_close(c, hx[1], rtol=0, atol=0)
        assert (h != hx[0]).all()


@pytest.mark.parametrize("training", [True, False])
def test_zoneout_keeps_as_often_as_it_should(training):
    """One time step of many units: in training a share p is exactly what it was; else all are the mean."""
    made = gpu_rnn.GRU(2, 64, zoneout=0.25, dtype=torch.float64).train(training)
    plain = gpu_rnn.GRU(2, 64, dtype=torch.float64)
    plain.load_state_dict(made.state_dict())
    x, h0 = torch.randn(1, 64, 2, dtype=torch.float64), torch.randn(1, 64, 64, dtype=torch.float64)
    y, new = made(x, h0, generator=torch.Generator().manual_seed(3))[0], plain(x, h0)[0]
    kept = (y == h0).double().mean().item()
    if training:
        assert abs(kept - 0.25) < 0.03
        assert ((y == h0) | torch.isclose(y, new)).all()
    else:
        torch.testing.assert_close(y, 0.25 * h0 + 0.75 * new)


@pytest.mark.parametrize("keyword", ["recurrent_dropout", "input_dropout", "weight_dropout"])
def test_dropout_preserves_the_mean(keyword):
    """A recurrence that is a sum: y = x + h0 on average, whatever is dropped."""
    made = gpu_rnn.RNN(200, 200, nonlinearity="relu", bias=False, dtype=torch.float64, **{keyword: 0.4})
    with torch.no_grad():
        made.weight_ih_l0.copy_(torch.eye(200))
        made.weight_hh_l0.copy_(torch.eye(200))
    x = torch.ones(1, 100, 200, dtype=torch.float64)
    y, _ = made(x, x, generator=torch.Generator().manual_seed(1))
    dropped = y.clone() - 1
    if keyword == "weight_dropout":  # one mask for all rows
        dropped = dropped[:, :1]
    torch.testing.assert_close(dropped, (dropped > 0) / 0.6, check_dtype=False, rtol=1e-6, atol=0)
    assert abs(dropped.mean() - 1) < 5 * (0.4 / 0.6 / dropped.numel()) ** 0.5


@pytest.mark.parametrize("keyword", ["recurrent_dropout", "input_dropout", "weight_dropout"])
def test_a_mask_holds_for_the_whole_sequence(keyword):
    """An input is 1 at one time step only, and what is left of it a step later never depends on which."""
    made = gpu_rnn.RNN(50, 50, nonlinearity="relu", bias=False, dtype=torch.float64, **{keyword: 0.5})
    with torch.no_grad():
        made.weight_ih_l0.copy_(torch.eye(50))
        made.weight_hh_l0.copy_(torch.eye(50))
    left = []
    for t in range(4):
        x = torch.zeros(5, 2, 50, dtype=torch.float64)
        x[t] = 1.0
        left.append(made(x, generator=torch.Generator().manual_seed(1))[0][t + 1])
    assert all(torch.equal(left[0], other) for other in left)
    assert 0 < (left[0] == 0).sum() < left[0].numel()


def test_masks_of_layers_and_rows_and_regularizers_differ():
    made = layer("rnn", "stacked", recurrent_dropout=0.5, input_dropout=0.5, weight_dropout=0.5)
    seen = []
    original = gpu_rnn.nn.base.dropout_mask

    def recorded(*args, **keywords):
        seen.append(original(*args, **keywords))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_rnn.nn.base, "dropout_mask", recorded)
        x, hx, _ = inputs(made)
        made(x, hx, generator=torch.Generator().manual_seed(1))
    flat = [mask.flatten()[:6].tolist() for mask in seen]
    assert len(flat) == 8
    assert len({tuple(mask) for mask in flat}) > 5, "of 8 short masks, few may be alike by chance"


# ---- variants -------------------------------------------------------------------------------------------------------


def test_forget_bias():
    made = gpu_rnn.LSTM(2, 4, 2, bidirectional=True, forget_bias=1.5)
    for name, parameter in made.named_parameters():
        if name.startswith("bias"):
            expected = 1.5 if name.startswith("bias_ih") else 0.0
            assert (parameter[4:8] == expected).all()
            assert (torch.cat([parameter[:4], parameter[8:]]).abs() <= 0.5).all()
    cell = gpu_rnn.LSTMCell(2, 4, forget_bias=2)
    assert (cell.bias_ih[4:8] == 2).all()
    torch.manual_seed(1)
    first = gpu_rnn.LSTM(2, 4)
    torch.manual_seed(1)
    second = gpu_rnn.LSTM(2, 4, forget_bias=1.0)
    assert torch.equal(first.weight_hh_l0, second.weight_hh_l0), "all else is drawn as ever"


@pytest.mark.parametrize(("gate", "place"), [("i", 0), ("f", 1), ("o", 2)])
def test_peepholes_are_in_the_order_i_f_o(gate, place):
    """With all weights 0, c0 = 1 and one peephole p alone, a gate is sigmoid(p) and the others one half."""
    made = gpu_rnn.LSTM(1, 3, peephole=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.bias_ih_l0[6:9] = 0.7  # the candidate
        made.weight_ch_l0[3 * place : 3 * place + 3] = 2.0
    one = torch.ones(1, 1, 3, dtype=torch.float64)
    _, (h, c) = made(one[..., :1], (one, one))
    a, g = {"i": 0.5, "f": 0.5, "o": 0.5}, np.tanh(0.7)
    if gate != "o":  # that gate sees the new cell state
        a[gate] = 1 / (1 + np.exp(-2.0))
    expected = a["f"] + a["i"] * g
    if gate == "o":
        a["o"] = 1 / (1 + np.exp(-2 * expected))
    np.testing.assert_allclose(c.detach(), expected)
    np.testing.assert_allclose(h.detach(), a["o"] * np.tanh(expected))


def test_a_clipped_cell_state_stays_within_its_bound():
    made = layer("lstm", cell_clip=0.1)
    x, hx, _ = inputs(made)
    _, (_, c), (_, every) = made(x, hx, return_states=True)
    assert every.abs().max() == 0.1
    (gradient,) = torch.autograd.grad(every[:, -1][every[:, -1].abs() == 0.1].sum(), x)
    assert not gradient.any(), "what is clipped has no gradient"


def test_a_coupled_lstm_has_three_gates():
    made = gpu_rnn.LSTM(2, 4, 2, coupled=True, peephole=True)
    sizes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters() if name.endswith("l1")}
    assert sizes == {
        "weight_ih_l1": (12, 4), "weight_hh_l1": (12, 4), "bias_ih_l1": (12,), "bias_hh_l1": (12,), "weight_ch_l1": (8,)
    }  # fmt: skip
    again = gpu_rnn.LSTM(2, 4, 2, coupled=True, peephole=True)
    again.load_state_dict(made.state_dict(), strict=True)
    assert "peephole=True" in repr(made)
    assert "coupled=True" in repr(made)
