"""`replace_` and `restore_`: models whose recurrent layers become ours, and torch.nn's again."""

import copy
import functools
import gc
import pickle
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrize, prune

import gpu_rnn

from .test_layers import CELLS, LAYERS, assert_equal, flat, results, twins

every = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def some_input(kind):
    return torch.randn(*([2, 3] if kind.endswith("Cell") else [5, 2, 3]), dtype=torch.float64)


def equal_bits(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(flat(actual), flat(expected), strict=True))


# ---- replace_ -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2, bidirectional=True), "cell": nn.GRUCell(8, 5)})
        self.heads = nn.Sequential(nn.Linear(5, 5), nn.RNN(5, 5, nonlinearity="relu", batch_first=True))
        self.again = self.encoder["rnn"]

    def forward(self, x):
        y, _ = self.encoder["rnn"](x)
        y, _ = self.again(self.heads[0](self.encoder["cell"](y[-1]))[None, :, :3])
        return self.heads[1](torch.cat([y, y], -1)[..., :5])[0]


def test_replace_swaps_every_layer_and_training_goes_on():
    torch.manual_seed(0)
    theirs = Model().double()
    ours = copy.deepcopy(theirs)
    ours.heads[1].eval()
    parameters, printed = list(ours.parameters()), repr(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (theirs, ours)]
    assert gpu_rnn.replace_(ours) is ours
    assert type(ours.encoder["rnn"]) is gpu_rnn.LSTM
    assert type(ours.encoder["cell"]) is gpu_rnn.GRUCell
    assert type(ours.heads[1]) is gpu_rnn.RNN
    assert ours.again is ours.encoder["rnn"]
    assert repr(ours) == printed
    assert [id(p) for p in ours.parameters()] == [id(p) for p in parameters]
    assert ours.encoder.training
    assert not ours.heads[1].training

    x = torch.randn(6, 2, 3, dtype=torch.float64)
    for _ in range(3):
        for model, optimizer in zip((theirs, ours), optimizers):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_replace_swaps_a_layer_itself(kind):
    theirs, _ = twins(kind, input_size=3, hidden_size=4)
    ours = copy.deepcopy(theirs)
    assert gpu_rnn.replace_(ours, backend="numpy") is ours
    assert type(ours) is getattr(gpu_rnn, kind)
    assert ours.backend == "numpy"
    x = some_input(kind)
    assert_equal(results(ours, x), results(theirs, x))
    assert_equal(results(copy.deepcopy(ours), x), results(theirs, x))
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_replace_leaves_hooks_and_forgets_torchs_caches():
    layer, seen = nn.GRU(3, 4), []
    handle = layer.register_forward_hook(lambda module, arguments, output: seen.append(type(module)))
    gpu_rnn.replace_(layer)(torch.ones(5, 2, 3))
    handle.remove()
    layer(torch.ones(5, 2, 3))
    assert seen == [gpu_rnn.GRU]
    old = weakref.ref(layer.weight_hh_l0)
    layer.weight_hh_l0 = nn.Parameter(torch.ones(12, 4))
    gc.collect()
    assert old() is None


def test_replace_leaves_derived_classes_alone_and_says_so():
    class Mine(nn.LSTM):
        pass

    model = nn.ModuleDict({"mine": Mine(3, 4), "plain": nn.LSTM(3, 4)})
    with pytest.warns(UserWarning, match=r"derived from torch.nn's alone: mine \(Mine\)$") as caught:
        gpu_rnn.replace_(model)
    assert caught[0].filename == __file__
    assert type(model["mine"]) is Mine
    assert type(model["plain"]) is gpu_rnn.LSTM


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("replaced", [True, False])
def test_weight_norm(norm, replaced):
    """On torch's layer before it is swapped, and on ours."""
    theirs, ours = twins("LSTM", input_size=3, hidden_size=4)
    layer = copy.deepcopy(theirs) if replaced else ours
    for module in (theirs, layer):
        norm(module, "weight_hh_l0")
    if replaced:
        gpu_rnn.replace_(layer)
    assert isinstance(layer, gpu_rnn.LSTM)
    assert not isinstance(layer, nn.LSTM)
    x = some_input("LSTM")
    assert_equal(results(layer, x), results(theirs, x))
    if norm is nn.utils.parametrizations.weight_norm:
        nn.utils.parametrize.remove_parametrizations(layer, "weight_hh_l0")
        assert type(layer) is gpu_rnn.LSTM
        assert_equal({"y": layer(x)[0]}, {"y": theirs(x)[0]})


def test_replace_checks_its_keywords_before_anything():
    for model in (nn.Linear(3, 4), nn.Sequential(nn.LSTM(3, 4), nn.GRU(3, 4))):
        with pytest.raises(TypeError, match="replace_ got an unexpected keyword argument 'bakend'"):
            gpu_rnn.replace_(model, bakend="numpy")
        with pytest.raises(ValueError, match="backend must be one of"):
            gpu_rnn.replace_(model, backend="nump")
        assert not any(type(module) in (gpu_rnn.LSTM, gpu_rnn.GRU) for module in model.modules())


# ---- a forward of the instance's own --------------------------------------------------------------------------------


def by_lambda(layer):
    forward = layer.forward
    layer.forward = lambda *args: forward(*args)


def by_weight_drop(layer):
    """As in PyTorch-NLP."""
    name = next(name for name, _ in layer.named_parameters() if name.startswith("weight_hh"))
    weight, forward = getattr(layer, name), layer.forward
    del layer._parameters[name]
    layer.register_parameter(name + "_raw", nn.Parameter(weight))

    def dropping(*args):
        setattr(layer, name, dropout(getattr(layer, name + "_raw"), 0.5, layer.training))
        return forward(*args)

    layer.forward = dropping


def by_hook(layer):
    """As accelerate's `add_hook_to_module` does it."""

    def forward(module, *args):
        return module._old_forward(*args)

    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(forward, layer), layer._old_forward)


WRAPS = [by_lambda, by_weight_drop, by_hook]
every_wrap = pytest.mark.parametrize("wrap", WRAPS)


@every
@every_wrap
def test_replace_leaves_a_wrapped_forward_alone_and_says_so(kind, wrap):
    model = nn.ModuleDict({"wrapped": getattr(nn, kind)(3, 4), "plain": nn.LSTM(3, 4)}).double()
    wrap(model["wrapped"])
    x = some_input(kind)
    torch.manual_seed(3)
    expected = flat(model["wrapped"](x))
    with pytest.warns(UserWarning, match=rf"with a forward of their own alone: wrapped \({kind}\)$") as caught:
        gpu_rnn.replace_(model)
    assert caught[0].filename == __file__
    assert type(model["plain"]) is gpu_rnn.LSTM
    assert "forward" in vars(model["wrapped"])
    torch.manual_seed(3)
    assert equal_bits(model["wrapped"](x), expected)


@every
@every_wrap
def test_our_layers_can_be_wrapped(kind, wrap):
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    x = some_input(kind)
    for layer in (theirs, ours):
        wrap(layer)
    assert_equal(results(ours, x), results(theirs, x))
    with pytest.raises(NotImplementedError, match=rf"the model itself \({kind} with a forward of its own\)"):
        gpu_rnn.restore_(ours)
    assert_equal(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("theirs", [False, True])
def test_a_wrapped_forward_is_not_looked_into(theirs):
    layer = (nn if theirs else gpu_rnn).GRU(3, 4)
    by_lambda(layer)
    for look in (lambda: gpu_rnn.inspect(layer, torch.ones(5, 2, 3)), lambda: gpu_rnn.stream(layer)):
        with pytest.raises(TypeError, match=r"GRU\(3, 4\) has a forward of its own"):
            look()


# ---- restore_ -------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    ("RNN", {}), ("LSTM", {}), ("GRU", {}), ("RNNCell", {}), ("LSTMCell", {}), ("GRUCell", {}),
    ("RNN", {"num_layers": 2, "nonlinearity": "relu", "bias": False}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "dropout": 0.5}),
    ("GRU", {"num_layers": 3, "bidirectional": True, "bias": False}),
    ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {"bias": False}),
]  # fmt: skip
every_argument = pytest.mark.parametrize(("kind", "arguments"), ARGUMENTS, ids=str)


@every_argument
def test_restore_undoes_replace(kind, arguments):
    layer = getattr(nn, kind)(3, 4, dtype=torch.float64, **arguments).eval()
    first = next(layer.parameters()).requires_grad_(False)
    x, before, kept = some_input(kind), dict(vars(layer)), dict(layer.named_parameters())
    expected = results(layer, x)
    assert gpu_rnn.restore_(gpu_rnn.replace_(layer, backend="numpy", precision="ieee", recompute=True)) is layer
    assert type(layer) is getattr(nn, kind)
    assert vars(layer).keys() == before.keys()
    assert all(getattr(layer, name) is parameter for name, parameter in kept.items())
    assert not layer.training
    assert not first.requires_grad
    actual = results(layer, x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert equal_bits(pickle.loads(pickle.dumps(layer))(x), layer(x))


@every_argument
def test_replace_undoes_restore(kind, arguments):
    layer = getattr(gpu_rnn, kind)(3, 4, dtype=torch.float64, backend="numpy", **arguments)
    state, before, x = layer.state_dict(), dict(vars(layer)), some_input(kind)
    theirs = getattr(nn, kind)(3, 4, dtype=torch.float64, **arguments)
    theirs.load_state_dict(state)
    expected = results(layer.eval(), x)
    restored = gpu_rnn.restore_(layer)
    assert repr(restored) == repr(theirs)
    assert equal_bits(restored(x), theirs.eval()(x))
    restored.load_state_dict(state, strict=True)
    assert gpu_rnn.replace_(layer, backend="numpy") is layer
    assert vars(layer).keys() == before.keys()
    actual = results(layer, x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_restore_within_a_model_whose_training_goes_on():
    theirs = Model().double()
    ours = gpu_rnn.replace_(copy.deepcopy(theirs))
    ours.heads[1].eval()
    parameters, seen = list(ours.parameters()), []
    ours.encoder["rnn"].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (theirs, ours)]
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    for step in range(4):
        if step == 2:
            assert gpu_rnn.restore_(ours) is ours
        for model, optimizer in zip((theirs, ours), optimizers):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert not any(type(module).__module__.startswith("gpu_rnn") for module in ours.modules())
    assert seen == 4 * [gpu_rnn.LSTM] + 4 * [nn.LSTM]  # used twice in each call
    assert ours.again is ours.encoder["rnn"]
    assert not ours.heads[1].training
    assert [id(p) for p in ours.parameters()] == [id(p) for p in parameters]
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_restored_layers_move_and_swap_their_weights(dtype):
    theirs, ours = twins("LSTM", input_size=3, hidden_size=4)
    gpu_rnn.restore_(ours)
    ours.to(dtype).to(torch.float64)
    theirs.to(dtype).to(torch.float64)
    x, others = some_input("LSTM"), {name: torch.randn_like(p) for name, p in theirs.named_parameters()}
    assert equal_bits(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer.weight_hh_l0 = nn.Parameter(others["weight_hh_l0"])
    assert equal_bits(ours(x), theirs(x))
    assert equal_bits(*(torch.func.functional_call(layer, others, (x,)) for layer in (ours, theirs)))


@every
def test_restore_keeps_parametrizations_and_pruning(kind):
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    x = some_input(kind)
    for layer in (theirs, ours):
        torch.manual_seed(5)
        nn.utils.parametrizations.spectral_norm(layer, name)
        prune.random_unstructured(layer, name.replace("hh", "ih"), amount=0.5)
        layer.eval()
    gpu_rnn.restore_(ours)
    assert isinstance(ours, getattr(nn, kind))
    assert not isinstance(ours, getattr(gpu_rnn, kind))
    assert_equal(results(ours, x), results(theirs, x))
    for layer in (theirs, ours):
        parametrize.remove_parametrizations(layer, name)
        prune.remove(layer, name.replace("hh", "ih"))
    assert type(ours) is getattr(nn, kind)
    assert equal_bits(ours(x), theirs(x))


@gpu_rnn.cell(gates="n", states="h")
def Forgetful(x, h, state):
    return (x[0] + 0.5 * h[0],)


REFUSED = {
    "zoneout": (lambda: gpu_rnn.RNN(3, 4, zoneout=0.1), "RNN with zoneout=0.1"),
    "drop": (lambda: gpu_rnn.GRUCell(3, 4, recurrent_dropout=0.2, recurrent_dropout_on="candidate"),
             "GRUCell with recurrent_dropout=0.2"),
    "input": (lambda: gpu_rnn.RNNCell(3, 4, input_dropout=0.2), "RNNCell with input_dropout=0.2"),
    "weight": (lambda: gpu_rnn.LSTM(3, 4, weight_dropout=0.2), "LSTM with weight_dropout=0.2"),
    "before": (lambda: gpu_rnn.GRU(3, 4, reset_after=False), "GRU with reset_after=False"),
    "norm": (lambda: gpu_rnn.LSTM(3, 4, layer_norm=True), "LSTM with layer_norm=True"),
    "two": (lambda: gpu_rnn.LSTM(3, 4, peephole=True, cell_clip=1.0), "LSTM with cell_clip=1.0, peephole=True"),
    "coupled": (lambda: gpu_rnn.LSTMCell(3, 4, coupled=True), "LSTMCell with coupled=True"),
    "projected": (lambda: gpu_rnn.GRU(3, 4, proj_size=2), "GRU with proj_size=2"),
    "elman": (lambda: gpu_rnn.RNN(3, 4, proj_size=2), "RNN with proj_size=2"),
    "custom": (lambda: Forgetful(3, 4), "Forgetful, a class of its own"),
    "derived": (lambda: type("Mine", (gpu_rnn.LSTM,), {})(3, 4), "Mine, a class of its own"),
}  # fmt: skip


def test_restore_names_all_that_torch_has_no_form_for_and_changes_nothing():
    fitting = {"first": gpu_rnn.LSTM(3, 4, 2, dropout=0.5, proj_size=2), "last": gpu_rnn.GRU(3, 4)}
    model = nn.ModuleDict({"first": fitting["first"]} | {name: make() for name, (make, _) in REFUSED.items()})
    model["last"] = fitting["last"]
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    with pytest.raises(NotImplementedError, match="restore_ changed nothing") as caught:
        gpu_rnn.restore_(model)
    listing = str(caught.value).partition("nothing: ")[2]
    assert listing == ", ".join(f"{name} ({why})" for name, (_, why) in REFUSED.items())
    assert {name: (type(module), dict(vars(module))) for name, module in model.named_modules()} == before
    for name in REFUSED:
        del model[name]
    gpu_rnn.restore_(model)
    assert (type(model["first"]), type(model["last"])) == (nn.LSTM, nn.GRU)


def test_what_only_says_how_to_compute_is_forgotten():
    layer = gpu_rnn.LSTM(3, 4, backend="numpy", precision="ieee", recompute=True, step_exact=True, forget_bias=1.0)
    layer.zoneout, layer.recurrent_dropout_on = (0.0, 0), "candidate"
    x, expected = torch.randn(5, 2, 3), dict(layer.named_parameters())
    y, _ = layer(x)
    assert repr(gpu_rnn.restore_(layer)) == "LSTM(3, 4)"
    torch.testing.assert_close(layer(x)[0], y)
    assert dict(layer.named_parameters()) == expected
    assert (layer.bias_ih_l0[4:8] == 1).all()


# ---- where the way back leads ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@every_layer
def test_restored_models_are_scripted(kind, tmp_path):
    model = gpu_rnn.replace_(nn.Sequential(getattr(nn, kind)(3, 4, 2))).eval()
    x = torch.randn(5, 2, 3)
    expected = model(x)
    torch.jit.script(gpu_rnn.restore_(model)).save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(flat(torch.jit.load(str(tmp_path / "model.pt"))(x)), flat(expected))


@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per_tensor).*deprecated")
def test_restored_models_are_quantized():
    model = nn.Sequential(nn.LSTM(8, 16)).eval()
    x, quantize = (
        torch.randn(5, 2, 8),
        functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.LSTM}),
    )
    expected = flat(quantize(model)(x))
    gpu_rnn.replace_(model)
    assert type(quantize(model)[0]) is gpu_rnn.LSTM  # what docs/conversion.md says of it
    quantized = quantize(gpu_rnn.restore_(model))
    assert "quantized" in type(quantized[0]).__module__
    assert equal_bits(quantized(x), expected)


def test_compiled_models_are_compiled_anew():
    model = nn.Sequential(nn.GRU(3, 4))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 2, 3)
    expected = flat(compiled(x))
    for change in (gpu_rnn.replace_, gpu_rnn.restore_):
        change(model)
        torch.testing.assert_close(flat(compiled(x)), expected)


@pytest.mark.filterwarnings("ignore:torch.(ao.quantization|quantize_per_tensor).*deprecated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_python_of_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.LSTM(3, 4))
    names = {"gpu_rnn": gpu_rnn, "torch": torch, "model": model, "x": torch.randn(5, 2, 3)}
    layer, lengths = nn.LSTM(3, 4, batch_first=True), torch.tensor([2, 1, 2, 2, 1])
    names |= {"layer": layer, "lengths": lengths}
    expected = flat(model(names["x"]))
    text = (Path(__file__).parents[1] / "docs" / "conversion.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/conversion.md", "exec"), names)
    for made, tolerance in {"traced": 0.0, "small": 0.05}.items():
        torch.testing.assert_close(flat(names[made](names["x"])), expected, rtol=tolerance, atol=tolerance)
    assert equal_bits(torch.jit.load("model.pt")(names["x"]), expected)
    y, _ = gpu_rnn.replace_(layer)(names["x"], lengths=lengths)
    torch.testing.assert_close(names["y"], y)
