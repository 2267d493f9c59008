"""In torch.nn's place: names, first values, saving, dropout, what torch does to modules."""

import copy
import inspect
import io
import pickle
import typing

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout as dropped
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gpu_rnn

from .test_layers import CELLS, LAYERS, assert_equal, flat, results, twins

FULL = {"num_layers": 3, "bidirectional": True, "dtype": torch.float64}
ARGUMENTS = [
    ("RNN", {}), ("LSTM", {}), ("GRU", {}),
    ("RNN", {"nonlinearity": "relu", "bias": False, "dtype": torch.float64}),
    ("RNN", {"num_layers": 2, "dropout": 0.25, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dropout": 1}),
    ("LSTM", {"proj_size": 3, "bias": False, "dtype": torch.bfloat16}),
    ("GRU", {"num_layers": 3, "bidirectional": True, "batch_first": True}),
    ("RNNCell", {}), ("LSTMCell", {}), ("GRUCell", {}),
    ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {"bias": False}), ("GRUCell", {"dtype": torch.float64}),
]  # fmt: skip
every_argument = pytest.mark.parametrize(("kind", "arguments"), ARGUMENTS, ids=str)
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def some_input(kind):
    return torch.randn(*([2, 3] if kind.endswith("Cell") else [5, 2, 3]), dtype=torch.float64)


# ---- construction ---------------------------------------------------------------------------------------------------


@every_argument
def test_the_same_seed_gives_the_same_layer(kind, arguments):
    torch.manual_seed(7)
    theirs, after = getattr(nn, kind)(3, 4, **arguments), torch.rand(1)
    torch.manual_seed(7)
    ours = getattr(gpu_rnn, kind)(3, 4, **arguments)
    assert torch.equal(torch.rand(1), after), "another number of random draws"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, parameter), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert parameter.dtype == expected.dtype
        assert torch.equal(parameter, expected), name
    assert repr(ours) == repr(theirs)
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    assert {name: getattr(ours, name) for name in public} == public
    if kind in LAYERS:
        assert [[w.shape for w in weights] for weights in ours.all_weights] == [
            [w.shape for w in weights] for weights in theirs.all_weights
        ]
        assert ours.flatten_parameters() is None
    else:
        assert (ours.bias_ih is None) == (theirs.bias_ih is None)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_arguments_in_torchs_order_with_torchs_defaults(kind):
    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    theirs = getattr(nn, kind).__init__
    documented = next(iter(typing.get_overloads(theirs)), theirs)
    assert positional(getattr(gpu_rnn, kind).__init__) == positional(documented)
    assert [name for name, _ in positional(getattr(gpu_rnn, kind).forward)] == ["self", "input", "hx"]


@every_argument
def test_state_dicts_go_both_ways(kind, arguments):
    theirs, ours = getattr(nn, kind)(3, 4, **arguments), getattr(gpu_rnn, kind)(3, 4, **arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fresh = getattr(nn, kind)(3, 4, **arguments)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), theirs.parameters(), strict=True))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_copies_compute_the_same(kind, copied):
    layer = getattr(gpu_rnn, kind)(3, 4, dtype=torch.float64, backend="numpy")
    other, x = copied(layer), some_input(kind)
    assert repr(other) == repr(layer)
    assert {id(p) for p in other.parameters()}.isdisjoint(map(id, layer.parameters()))
    assert_equal(results(other, x), results(layer, x))


# ---- lists of weights -----------------------------------------------------------------------------------------------


@every_argument
def test_lists_of_weights(kind, arguments):
    theirs, ours = getattr(nn, kind)(3, 4, **arguments), getattr(gpu_rnn, kind)(3, 4, **arguments)
    lists = ("_all_weights", "_flat_weights_names")
    assert [hasattr(ours, name) for name in (*lists, "_flat_weights")] == 3 * [kind in LAYERS]
    if kind in LAYERS:
        assert all(getattr(ours, name) == getattr(theirs, name) for name in lists)
        assert isinstance(ours._flat_weights, list)
        assert [id(weight) for weight in ours._flat_weights] == [id(parameter) for parameter in ours.parameters()]
        assert list(map(type, ours._flat_weights)) == list(map(type, theirs._flat_weights))


@every_layer
def test_initialization_by_names(kind):
    """As public code writes it, five ways."""
    theirs, ours = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True)
    for layer in (theirs, ours):
        torch.manual_seed(4)
        for names in layer._all_weights:
            for name in names:
                if "weight" in name:
                    nn.init.orthogonal_(layer.__getattr__(name))
                else:
                    nn.init.constant_(getattr(layer, name), 0.1)
        for names in layer._all_weights:
            for name in filter(lambda n: "bias" in n, names):
                getattr(layer, name).data[4:8].fill_(1.0)
        for name in layer._flat_weights_names:
            if name.startswith("weight_hh"):
                layer.get_parameter(name).data.mul_(0.5)
        for weight in layer._flat_weights:
            weight.data.add_(0.01)
        nn.init.xavier_uniform_(layer.all_weights[1][0])
    x = some_input(kind)
    assert_equal(results(ours, x), results(theirs, x))


class WeightDrop(nn.Module):
    """As in awd-lstm-lm; `listed`: as in its forks for later versions of torch."""

    def __init__(self, module, names, p, listed):
        super().__init__()
        self.module, self.names, self.p, self.listed = module, names, p, listed
        module.flatten_parameters = lambda *args: None
        for name in names:
            weight = getattr(module, name)
            del module._parameters[name]
            module.register_parameter(name + "_raw", nn.Parameter(weight.data))

    def forward(self, *args):
        for name in self.names:
            raw = getattr(self.module, name + "_raw")
            setattr(self.module, name, dropped(raw, self.p, self.training))
        if self.listed:
            names = self.module._flat_weights_names
            self.module._flat_weights = [getattr(self.module, name, None) for name in names]
        return self.module.forward(*args)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@every_layer
def test_weight_drop_from_outside(kind, swapped, listed):
    theirs, ours = twins(kind, input_size=3, hidden_size=4, num_layers=2)
    if swapped:
        ours = copy.deepcopy(theirs)
    theirs, ours = (WeightDrop(layer, ["weight_hh_l0", "weight_hh_l1"], 0.5, listed) for layer in (theirs, ours))
    assert ours.module._flat_weights[1] is None or swapped
    gpu_rnn.replace_(ours)
    assert type(ours.module) is getattr(gpu_rnn, kind)
    x = some_input(kind)
    for mode in (True, False):
        assert_equal(results(ours.train(mode), x), results(theirs.train(mode), x))


def test_assigned_lists_of_weights_are_the_weights():
    layer, x = gpu_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    others = [nn.Parameter(torch.randn_like(weight)) for weight in layer._flat_weights]
    expected = nn.GRU(3, 4)
    for name, weight in zip(layer._flat_weights_names, others):
        setattr(expected, name, weight)
    layer._flat_weights[:2] = others[:2]
    layer._flat_weights[2] = others[2]
    assert [id(weight) for weight in layer.parameters()][:3] == [id(weight) for weight in others][:3]
    layer._flat_weights = others
    assert [id(weight) for weight in layer.parameters()] == [id(weight) for weight in others]
    torch.testing.assert_close(layer(x), expected(x))
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'bias_hh_l0'"):
        layer._flat_weights[3] = torch.zeros(12)
    with pytest.raises(ValueError, match=r"_flat_weights must be 4 tensors .*, got 3"):
        layer._flat_weights = others[:3]


def test_the_backend_is_told_and_taken():
    layer = gpu_rnn.LSTM(3, 4, num_layers=2, backend="triton")
    assert repr(layer) == "LSTM(3, 4, num_layers=2, backend=triton)"
    with pytest.raises(gpu_rnn.BackendError, match="triton"):
        layer(torch.ones(5, 2, 3))
    layer.backend = None
    layer(torch.ones(5, 2, 3))


def test_dropout_on_one_layer_warns_where_it_is_set():
    with pytest.warns(UserWarning, match=r"dropout option adds dropout after all but last.*dropout=0.5") as caught:
        gpu_rnn.GRU(3, 4, dropout=0.5)
    assert caught[0].filename == __file__


# ---- autograd -------------------------------------------------------------------------------------------------------


@every_layer
def test_a_retained_graph_runs_backward_twice(kind):
    layer = getattr(gpu_rnn, kind)(3, 4, **FULL)
    x = some_input(kind).requires_grad_()
    y, _ = layer(x)
    y.sin().sum().backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in (x, *layer.parameters())]
    y.sin().sum().backward()
    for tensor, gradient in zip((x, *layer.parameters()), once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient, rtol=0, atol=0)


@every_layer
def test_eval_mode_has_the_gradients_of_training(kind):
    theirs, ours = twins(kind, input_size=3, hidden_size=4, **FULL)
    x = some_input(kind).requires_grad_()
    assert_equal(results(ours.eval(), x), results(theirs.train(), x))


def test_without_gradients_there_is_no_graph():
    layer = gpu_rnn.LSTM(3, 4)
    with torch.no_grad():
        assert not any(output.requires_grad for output in flat(layer(torch.ones(5, 2, 3))))


@every_layer
def test_functional_call_swaps_the_weights(kind):
    theirs, ours = twins(kind, input_size=3, hidden_size=4, **FULL)
    others = {name: torch.randn_like(parameter) for name, parameter in theirs.named_parameters()}
    x = some_input(kind)
    mine, expected = (flat(torch.func.functional_call(layer, others, (x,))) for layer in (ours, theirs))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_makes_everything_of_its_dtype_but_float64():
    layer, x = gpu_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = flat(layer(x, (torch.randn(2, 2, 4), torch.randn(2, 2, 4).bfloat16())))
        assert {output.dtype for output in outputs} == {torch.bfloat16}
        assert layer.double()(x.double())[0].dtype == torch.float64
    sum(output.sum() for output in outputs).backward()


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
@every_layer
def test_dropout_draws_torchs_masks(kind, packed, dtype):
    arguments = {"input_size": 3, "hidden_size": 40, "num_layers": 3, "bidirectional": True, "dropout": 0.4}
    theirs, ours = twins(kind, **arguments, batch_first=True, dtype=dtype)
    x = torch.randn(4, 7, 3, dtype=dtype)
    input = pack_sequence([x[0], x[1, :5], x[2, :5], x[3, :2]]) if packed else x
    actual, expected = results(ours, input), results(theirs, input)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(flat(ours.train()(input))[0], flat(ours.eval()(input))[0])


def test_dropout_zeroes_its_share_between_layers_only():
    """The second layer passes on what reaches it: its outputs show the mask, and no mask is on them."""
    layer = gpu_rnn.RNN(1, 500, 2, "relu", dropout=0.3, bias=False)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            nn.init.eye_(parameter) if name == "weight_ih_l1" else nn.init.zeros_(parameter)
        layer.weight_ih_l0.fill_(1.0)
        y, _ = layer(torch.ones(20, 10, 1))
    kept = y != 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.7))


# ---- packed input ---------------------------------------------------------------------------------------------------


def test_packed_output_is_described_as_the_input():
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)
    y, _ = gpu_rnn.GRU(3, 4)(packed)
    assert isinstance(y, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(y, field), getattr(packed, field))


def test_batch_first_says_nothing_about_packed_input():
    _, ours = twins("LSTM", input_size=3, hidden_size=4)
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)])
    expected = results(ours, packed)
    ours.batch_first = True
    assert_equal(results(ours, packed), expected)
