"""What a call can ask for around its cells, in the layers: against the rules in plain torch, in float64."""

import re

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn
from gpu_rnn import ShapeError

from .reference_layers import FEATURES, SHAPES, VARIANTS, VARIED, by_the_rules, inputs, layer

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
every_layer = pytest.mark.parametrize("name", VARIED)


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def gradients(made, outputs, inputs):
    """Of a random weighting of all outputs, by the parameters and what is given; None where there is none."""
    torch.manual_seed(2)
    outputs = tree_leaves(outputs)
    leaves = [*made.parameters(), *(leaf for leaf in tree_leaves(inputs) if leaf is not None and leaf.requires_grad)]
    return torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs], allow_unused=True)


def agree(made, x, hx, call):
    actual = made(x, hx, **call, generator=generator(), return_states=True)
    expected = by_the_rules(made, x, hx, generator(), **call)
    for kind, ours, theirs in zip(("y", "last", "every"), actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, kind=kind: f"{kind}: {text}")
    ours, theirs = (gradients(made, outputs, (x, hx, call)) for outputs in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **CLOSE)
    y, last = made(x, hx, **call, generator=generator())
    torch.testing.assert_close((y, last), tuple(actual[:2]), rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_feature_by_the_rules(name, feature, shape):
    keywords, names = FEATURES[feature]
    for training in (True, False):
        made = layer(name, shape, **keywords).train(training)
        agree(made, *inputs(made, names))


@pytest.mark.parametrize("name", ["lstm", "projected"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature", [None, "everything"])
def test_every_variant_of_the_lstm_by_the_rules(name, variant, feature):
    keywords, names = FEATURES.get(feature, ({}, []))
    made = layer(name, "stacked", **VARIANTS[variant], **keywords)
    agree(made, *inputs(made, names))


@pytest.mark.parametrize("name", ["gru", "gru before", "lstm", "projected"])
@pytest.mark.parametrize("feature", ["recurrent dropout", "everything"])
def test_dropout_of_the_candidate_by_the_rules(name, feature):
    keywords, names = FEATURES[feature]
    for training in (True, False):
        made = layer(name, "stacked", **keywords, recurrent_dropout_on="candidate").train(training)
        agree(made, *inputs(made, names))


def test_the_state_is_spared():
    """Semeniuta et al. 2016: with everything dropped, an open forget or update gate keeps all that there is."""
    for kind, open_gate in (("lstm", 1), ("gru", 1)):
        made = layer(kind, recurrent_dropout=1.0, recurrent_dropout_on="candidate")
        with torch.no_grad():
            made.bias_ih_l0[4 * open_gate : 4 * open_gate + 4] = 1e3
        x, hx, _ = inputs(made)
        _, last = made(x, hx)
        state = last[-1] if kind == "lstm" else last
        torch.testing.assert_close(state, hx[-1] if kind == "lstm" else hx)


# ---- layouts --------------------------------------------------------------------------------------------------------

CALLS = ["reset", "reset_state", "lengths", "left_padding"]


@every_layer
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_first_is_the_same_turned(name, shape):
    made, turned = layer(name, shape), layer(name, shape, batch_first=True)
    x, hx, call = inputs(made, CALLS)
    y, last, states = made(x, hx, **call, return_states=True)
    across = call | {"reset": call["reset"].t()}
    actual = turned(x.transpose(0, 1), hx, **across, return_states=True)
    expected = y.transpose(0, 1), last, tree_map(lambda s: s.transpose(1, 2), states)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_single_sequence_is_a_row(name, batch_first):
    made = layer(name, "stacked", batch_first=batch_first)
    x, hx, call = inputs(made, CALLS)
    y, last, states = layer(name, "stacked")(x, hx, **call, return_states=True)
    for b in range(x.shape[1]):
        alone = {
            name: value[:, b] if name == "reset" else value if name == "reset_state" else value[b]
            for name, value in call.items()
        }
        actual = made(x[:, b], tree_map(lambda s, b=b: s[:, b], hx), **alone, return_states=True)
        expected = (
            y[:, b],
            tree_map(lambda s, b=b: s[:, b], last),
            tree_map(lambda s, b=b: s[:, :, b], states),
        )
        torch.testing.assert_close(actual, expected, **CLOSE)


@every_layer
def test_a_reset_state_for_every_row(name):
    made = layer(name, "stacked")
    x, hx, call = inputs(made, ["reset", "reset_state"])
    each = tree_map(lambda s: s[:, None].expand(-1, x.shape[1], -1).detach().requires_grad_(), call["reset_state"])
    actual, expected = made(x, hx, reset=call["reset"], reset_state=each), made(x, hx, **call)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    ours, theirs = (gradients(made, outputs, arguments) for outputs, arguments in ((actual, each), (expected, call)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a if a.shape == b.shape else a.sum(1), b, **CLOSE)


def test_layers_without_a_row_have_nothing_to_do():
    made = layer("lstm", "stacked")
    empty = torch.zeros(4, 0, dtype=torch.bool)
    y, (h, c) = made(torch.zeros(4, 0, 2).double(), reset=empty, lengths=torch.zeros(0, dtype=torch.int64))
    assert (y.shape, h.shape, c.shape) == ((4, 0, 8), (4, 0, 4), (4, 0, 4))


# ---- torch's transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("lstm", "everything"),
        ("projected", "everything"),
        ("gru", "reset state"),
        ("rnn", "weight dropout"),
        ("gru before", "everything"),
    ],
)
def test_compiled_is_eager(name, feature):
    keywords, names = FEATURES[feature]
    variant = VARIANTS["all variants"] if name == "lstm" else {}
    made = layer(name, "stacked", **keywords, **variant)
    x, hx, call = inputs(made, names)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    results = []
    for run in (made, compiled):
        torch.manual_seed(4)
        outputs = run(x, hx, **call, return_states=True)
        results.append((outputs, gradients(made, outputs, (x, hx, call))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_per_row_gradients_and_vmap():
    """By torch.func: of each row alone, which is what a loop over the rows gives."""
    made = layer("lstm", peephole=True, cell_clip=0.5, zoneout=0.2).eval()
    x, _, call = inputs(made, ["reset"])
    parameters = dict(made.named_parameters())

    def loss(parameters, x, reset):
        return functional_call(made, parameters, (x[:, None],), {"reset": reset[:, None]})[0].square().sum()

    rows = vmap(grad(loss), in_dims=(None, 1, 1))(parameters, x, call["reset"])
    for b in range(x.shape[1]):
        alone = torch.autograd.grad(loss(parameters, x[:, b], call["reset"][:, b]), list(parameters.values()))
        torch.testing.assert_close([rows[name][b] for name in parameters], [*alone], **CLOSE)


def test_under_vmap_masks_are_the_same_or_not_as_one_asks():
    made = layer("gru", recurrent_dropout=0.5, zoneout=0.5)
    x = torch.randn(1, 6, 3, 2, dtype=torch.float64).expand(2, -1, -1, -1)
    for randomness, alike in (("same", True), ("different", False)):
        y = vmap(lambda x: made(x)[0], randomness=randomness)(x)
        assert torch.equal(y[0], y[1]) == alike


def test_half_precision_by_autocast():
    made = layer("lstm", "stacked", dtype=torch.float32, peephole=True, **FEATURES["everything"][0])
    x, hx, call = inputs(made, CALLS)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = made(x, hx, **call, generator=generator())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x, hx, **call, generator=generator())[0], rtol=0.1, atol=0.1)


# ---- masks ----------------------------------------------------------------------------------------------------------

REGULARIZERS = pytest.mark.parametrize("keyword", ["zoneout", "recurrent_dropout", "input_dropout", "weight_dropout"])


@REGULARIZERS
def test_a_seed_gives_the_same_masks(keyword):
    made = layer("gru", "stacked", **{keyword: 0.5})
    x, hx, _ = inputs(made)
    run = [made(x, hx, generator=generator(seed))[0] for seed in (5, 5, 6)]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])
    torch.manual_seed(3)
    first, second = made(x, hx)[0], made(x, hx)[0]
    torch.manual_seed(3)
    assert torch.equal(first, made(x, hx)[0])
    assert not torch.equal(first, second), "every call draws anew"


@REGULARIZERS
def test_eval_mode_draws_nothing(keyword):
    made = layer("gru", **{keyword: 0.5}).eval()
    x, hx, _ = inputs(made)
    before = torch.get_rng_state()
    y = made(x, hx)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(y, made(x, hx)[0])
    if keyword != "zoneout":
        assert torch.equal(y, layer("gru")(x, hx)[0]), "dropout is for training"


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_layers_of_one_time_step(kind):
    keywords = FEATURES["everything"][0] | ({"peephole": True, "coupled": True} if kind == "LSTMCell" else {})
    made = layer(kind.removesuffix("Cell").lower(), **keywords)
    cell = getattr(gpu_rnn, kind)(2, 4, dtype=torch.float64, **keywords)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in made.state_dict().items()})
    x, hx, _ = inputs(made)
    _, last = made(x[:1], hx, generator=generator())
    first = cell(x[0], tree_map(lambda s: s[0], hx), generator=generator())
    torch.testing.assert_close(first, tree_map(lambda s: s[0], last), rtol=0, atol=0)


# ---- errors ---------------------------------------------------------------------------------------------------------

x = torch.ones(5, 2, 3)
LSTM, GRU = gpu_rnn.LSTM(3, 4, 2, bidirectional=True), gpu_rnn.GRU(3, 4, batch_first=True)
RESET, HALF = torch.ones(5, 2, dtype=torch.bool), (torch.ones(4, 4), torch.ones(1, 4))
CALLED = {
    "reset": (LSTM, {"reset": torch.ones(2, 5)}, ShapeError, "LSTM: reset is a tensor [2, 5]; expected a tensor [5"),
    "reset, batch first": (GRU, {"reset": torch.ones(2, 5)}, ShapeError, "expected a tensor [5, 2], with input [5, 2,"),
    "a list of resets": (LSTM, {"reset": [[True]]}, TypeError, "reset is a list of a list of bool; expected a tensor"),
    "lengths": (LSTM, {"lengths": torch.ones(5)}, ShapeError, "lengths is a tensor [5]; expected a tensor [2], with"),
    "left_padding": (GRU, {"left_padding": torch.ones(5, 1)}, ShapeError, "left_padding is a tensor [5, 1]; expected"),
    "a list of lengths": (GRU, {"lengths": [1, 2]}, TypeError, "lengths is a list of int, int; expected a tensor [5]"),
    "no reset": (LSTM, {"reset_state": (torch.ones(4, 4),) * 2}, ValueError, "reset_state is given, but reset, which"),
    "reset_state alone": (
        LSTM, {"reset": RESET, "reset_state": torch.ones(4, 4)}, ShapeError,
        "reset_state must be one tensor [L*D, B, .] or [L*D, .] per state (h, c), with L*D = 4; got a tensor [4, 4]",
    ),
    "layers of reset_state": (LSTM, {"reset": RESET, "reset_state": HALF}, ShapeError, "a tuple of a tensor [4, 4], a"),
    "size of reset_state": (
        LSTM, {"reset": RESET, "reset_state": (torch.ones(4, 3), torch.ones(4, 4))}, ShapeError,
        "reset_state h has shape [3]; expected [2, 4] or [4]",
    ),
    "unknown": (LSTM, {"resets": RESET}, TypeError, "unexpected keyword argument 'resets'"),
    "zoneout of a GRU": (gpu_rnn.GRU(3, 4, zoneout=(0.1, 0.2)), {}, ValueError, "(0.1, 0.2), but gru has 1 state (h)"),
    "zoneout of h projected": (gpu_rnn.LSTM(3, 4, proj_size=2, zoneout=0.1), {}, ValueError, "from H = 4 to P = 2;"),
}  # fmt: skip
CONSTRUCTED = {
    "zoneout": ("GRU", {"zoneout": 1.1}, ValueError, "zoneout must be a number in [0, 1], a probability; got 1.1"),
    "zoneout of two": ("LSTM", {"zoneout": (0.1, -1)}, ValueError, "zoneout must be a number in [0, 1]"),
    "dropout": ("GRU", {"input_dropout": True}, ValueError, "input_dropout must be a number in [0, 1]"),
    "weights": ("LSTMCell", {"weight_dropout": "0.1"}, ValueError, "weight_dropout must be a number in [0, 1]"),
    "no forget gate": ("LSTM", {"forget_bias": 1.0, "coupled": True}, ValueError, "forget_bias is for the bias of a"),
    "no bias": ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias is for the bias of a forget"),
    "reset_after": ("LSTM", {"reset_after": False}, TypeError, "LSTM got an unexpected keyword argument 'reset_after'"),
    "candidate": ("LSTM", {"recurrent_dropout_on": "c"}, ValueError, "must be 'h' or 'candidate', got 'c'"),
    "no candidate": ("RNN", {"recurrent_dropout_on": "candidate"}, TypeError, "RNN got an unexpected keyword"),
    "normalized": (
        "GRU",
        {"layer_norm": True, "reset_after": False},
        ValueError,
        "layer_norm is not defined for a GRU",
    ),
    "peephole": ("GRU", {"peephole": True}, TypeError, "GRU got an unexpected keyword argument 'peephole'"),
    "no bool": ("LSTM", {"coupled": "yes"}, TypeError, "coupled must be a bool, got 'yes'"),
    "no number": ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias must be a number, got '1'"),
    "no bound": ("LSTMCell", {"cell_clip": 0}, ValueError, "cell_clip must be a number larger than 0, got 0"),
    "backend": ("GRU", {"backend": "cudnn"}, ValueError, "backend must be one of None, 'auto', 'cuda', 'triton', 'nat"),
    "precision": ("GRU", {"precision": "fp8"}, ValueError, "precision must be one of None, 'tf32', 'ieee'; got 'fp8'"),
    "unknown": ("LSTM", {"zonout": 0.1}, TypeError, "LSTM got an unexpected keyword argument 'zonout'"),
    "cell": ("RNNCell", {"cell_clip": 1.0}, TypeError, "RNNCell got an unexpected keyword argument 'cell_clip'"),
}


@pytest.mark.parametrize("case", CALLED)
def test_a_bad_call_is_named_with_its_shapes(case):
    made, call, error, message = CALLED[case]
    with pytest.raises(error, match=re.escape(message)):
        made(x, **call)


@pytest.mark.parametrize("case", CONSTRUCTED)
def test_a_bad_layer_is_named(case):
    kind, keywords, error, message = CONSTRUCTED[case]
    with pytest.raises(error, match=re.escape(message)):
        getattr(gpu_rnn, kind)(3, 4, **keywords)


def test_packed_input_has_its_own_lengths():
    packed = pack_padded_sequence(x, torch.tensor([5, 3]))
    for call in ({"lengths": torch.tensor([5, 3])}, {"reset": RESET}, {"return_states": True}):
        with pytest.raises(TypeError, match="LSTM: packed input has its own lengths"):
            LSTM(packed, **call)
