"""Weights to and from Keras, against Keras on its torch backend."""

import importlib
import sys

import numpy as np
import pytest
import torch

import gpu_rnn
import gpu_rnn.keras
from gpu_rnn.functional import ShapeError

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
KINDS = {  # our class, Keras's, and the arguments of both
    "rnn_tanh": (gpu_rnn.RNN, "SimpleRNN", {}, {}),
    "rnn_relu": (gpu_rnn.RNN, "SimpleRNN", {"nonlinearity": "relu"}, {"activation": "relu"}),
    "lstm": (gpu_rnn.LSTM, "LSTM", {}, {}),
    "gru": (gpu_rnn.GRU, "GRU", {}, {}),
    "gru_before": (gpu_rnn.GRU, "GRU", {"reset_after": False}, {"reset_after": False}),
}
T, B, I, H = 5, 3, 4, 6
FILES = ("model.keras", "model.h5", "model.weights.h5")


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        return importlib.import_module("keras")


@pytest.fixture
def made(keras, rng):
    return Made(keras, rng)


class Made:
    """Layers and models of Keras with random weights, biases included."""

    def __init__(self, keras, rng):
        self.keras, self.rng = keras, rng

    def layer(self, kind, bidirectional=False, **arguments):
        _, name, _, own = KINDS[kind]
        layer = getattr(self.keras.layers, name)(H, return_sequences=True, **own | arguments)
        return self.keras.layers.Bidirectional(layer) if bidirectional else layer

    def drawn(self, layer):
        if not layer.built:
            layer.build((1, None, I))
        layer.set_weights([0.4 * self.rng.standard_normal(array.shape) for array in layer.get_weights()])
        return layer

    def sequential(self, *layers):
        return self.drawn(self.keras.Sequential([self.keras.Input((None, I)), *layers]))

    def saved(self, model, path):
        (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
        return path


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def assert_same(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours.detach()), np.asarray(theirs.detach()), **CLOSE)


def assert_bitwise(ours, theirs):
    assert [array.tobytes() for array in ours] == [array.tobytes() for array in theirs]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_keras_computes(kind, bidirectional, bias, made, rng):
    theirs = made.drawn(made.layer(kind, bidirectional, use_bias=bias))
    ours = gpu_rnn.keras.load(theirs)
    assert (type(ours), ours.bias) == (KINDS[kind][0], bias)
    D, letters = 1 + bidirectional, 2 if kind == "lstm" else 1
    x, states = torch.tensor(draw(rng, B, T, I)), torch.tensor(draw(rng, letters, D, B, H))
    hx = tuple(states) if kind == "lstm" else states[0]
    initial = [states[letter, d] for d in range(D) for letter in range(letters)]
    assert_same(ours(x, hx)[0], theirs(x, initial_state=initial))
    again = made.drawn(made.layer(kind, bidirectional, use_bias=bias))
    gpu_rnn.keras.save(ours, again)
    assert_bitwise(again.get_weights(), theirs.get_weights())


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_stack_runs_in_keras_and_comes_back(kind, bidirectional, made, rng, tmp_path):
    cls, _, options, _ = KINDS[kind]
    layer = cls(I, H, 2, batch_first=True, bidirectional=bidirectional, **options)
    path = tmp_path / "layer.keras"
    gpu_rnn.keras.save(layer, path)
    x = torch.tensor(draw(rng, B, T, I))
    assert_same(layer(x)[0], made.keras.models.load_model(path)(x))
    again = gpu_rnn.keras.load(path)
    assert repr(again) == repr(layer)
    for name, parameter in layer.state_dict().items():
        if kind == "gru" or "weight" in name:
            assert torch.equal(again.state_dict()[name], parameter)
        elif "bias_ih" in name:
            both = parameter + layer.state_dict()[name.replace("ih", "hh")]
            assert torch.equal(again.state_dict()[name], both)


@pytest.mark.filterwarnings("ignore:You are saving")
@pytest.mark.parametrize("file", FILES)
def test_files_are_read_without_keras(file, made, tmp_path, monkeypatch):
    model = made.sequential(
        made.layer("rnn_tanh", use_bias=False, name="first"),
        made.layer("gru", bidirectional=True),
        made.layer("gru_before", name="gru"),
        made.layer("lstm", name="simple_rnn"),
        made.layer("lstm", name="first_lstm"),
    )
    made.saved(model, tmp_path / file)
    expected = [gpu_rnn.keras.weights(layer) for layer in model.layers]
    paths = ["simple_rnn", "bidirectional", "gru", "lstm", "lstm_1"]
    names = paths if file == "model.weights.h5" else [layer.name for layer in model.layers]
    monkeypatch.setitem(sys.modules, "keras", None)
    for name, theirs in zip(names, expected):
        ours = gpu_rnn.keras.weights(tmp_path / file, name)
        assert (ours.cell, ours.D) == (theirs.cell, theirs.D)
        for w, same in zip(ours.weights[0], theirs.weights[0]):
            assert_bitwise([a for a in w if a is not None], [a for a in same if a is not None])
    with pytest.raises(ValueError, match=f"has no recurrent layer 'other'; it has: .*{names[4]}"):
        gpu_rnn.keras.load(tmp_path / file, "other")


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_layers_of_nested_models_have_their_paths(file, made, tmp_path):
    keras = made.keras
    inner = made.sequential(made.layer("lstm", name="a"), made.layer("lstm", name="b"))
    x = keras.Input((None, I))
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.GRU(3, name="top")(inner(x))))
    made.saved(model, tmp_path / file)
    prefix, names = (inner.name, ("a", "b")) if file == "model.keras" else ("sequential", ("lstm", "lstm_1"))
    names = [f"{prefix}/{name}" for name in names]
    stack = gpu_rnn.keras.weights(tmp_path / file, names)
    for k in range(2):
        assert_bitwise(stack.weights[k][0][:2], gpu_rnn.keras.weights(inner.layers[k]).weights[0][0][:2])
    if file == "model.keras":
        assert_bitwise(stack.weights[1][0][:2], gpu_rnn.keras.weights(model, names).weights[1][0][:2])
    with pytest.raises(ValueError, match="no single recurrent layer or stack"):
        gpu_rnn.keras.load(tmp_path / file)


def test_an_archive_of_keras_2_is_read(made, tmp_path):
    import h5py

    layer = made.drawn(made.layer("gru"))
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"gru_7"]
        group = file.create_group("gru_7")
        names = [f"gru_7/gru_cell/{name}:0" for name in ("kernel", "recurrent_kernel", "bias")]
        group.attrs["weight_names"] = [name.encode() for name in names]
        for name, array in zip(names, layer.get_weights()):
            group[name] = array
    again = made.drawn(made.layer("gru"))
    gpu_rnn.keras.save(gpu_rnn.keras.load(tmp_path / "old.h5"), again)
    assert_bitwise(again.get_weights(), layer.get_weights())


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("rnn_tanh", {"activation": "sigmoid"}, "activation='sigmoid'"),
        ("lstm", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}, "activation='relu', recurrent_act"),
        ("gru", {"go_backwards": True}, "go_backwards=True"),
        ("lstm", {"stateful": True}, "stateful=True"),
        ("lstm", {"dropout": 0.25, "recurrent_dropout": 0.5}, r"dropout=0.25, recurrent_dropout=0.5; dropout=\.\.\."),
    ],
)
def test_what_no_layer_has_is_refused(kind, arguments, reason, made):
    with pytest.raises(NotImplementedError, match=rf"with weights [\[(]4, .*no layer here has: {reason}"):
        gpu_rnn.keras.load(made.drawn(made.layer(kind, **arguments)))


def test_the_directions_of_one_layer_are_one_cell(made):
    layers = made.keras.layers
    summed = layers.Bidirectional(layers.LSTM(H), merge_mode="sum")
    with pytest.raises(NotImplementedError, match="merge_mode='sum'"):
        gpu_rnn.keras.load(made.drawn(summed))
    mixed = layers.Bidirectional(
        layers.SimpleRNN(H), backward_layer=layers.SimpleRNN(H, activation="relu", go_backwards=True)
    )
    with pytest.raises(NotImplementedError, match=r"activation=\('tanh', 'relu'\)"):
        gpu_rnn.keras.load(made.drawn(mixed))
    mixed = layers.Bidirectional(
        layers.GRU(H), backward_layer=layers.GRU(H, reset_after=False, use_bias=False, go_backwards=True)
    )
    with pytest.raises(NotImplementedError, match=r"reset_after=\(True, False\)"):
        gpu_rnn.keras.load(made.drawn(mixed))


def test_arguments_can_be_taken_otherwise(made, rng, tmp_path):
    layer = made.drawn(made.layer("lstm", dropout=0.25))
    x = torch.tensor(draw(rng, B, T, I))
    assert_same(gpu_rnn.keras.load(layer, dropout=0)(x)[0], layer(x, training=False))
    backwards = made.drawn(made.layer("gru", go_backwards=True))
    assert_same(gpu_rnn.keras.load(backwards, go_backwards=False)(x.flip(1))[0], backwards(x))
    rectified = made.saved(made.sequential(made.layer("rnn_relu")), tmp_path / "model.weights.h5")
    assert gpu_rnn.keras.load(rectified, activation="relu").nonlinearity == "relu"
    with pytest.raises(TypeError, match="units can't be given; there are activation, reset_after, recurrent"):
        gpu_rnn.keras.load(layer, units=3)


def test_what_does_not_fit_is_said_with_its_shapes(made, tmp_path):
    target, stack = made.drawn(made.layer("lstm")), gpu_rnn.LSTM(I, H + 1)
    with pytest.raises(ShapeError, match=r"[\[(]4, 24[\])].*these weights are [\[(]4, 28[\])]"):
        gpu_rnn.keras.save(stack, target)
    with pytest.raises(ShapeError, match="these weights are"):
        gpu_rnn.keras.save(gpu_rnn.LSTM(I, H, bias=False), target)
    with pytest.raises(ValueError, match="2 layers don't go into 1 of Keras"):
        gpu_rnn.keras.save(gpu_rnn.LSTM(I, H, 2), target)
    with pytest.raises(ValueError, match="a lstm, not gru"):
        gpu_rnn.keras.save(gpu_rnn.GRU(I, H), target)
    with pytest.raises(ShapeError, match=r"LSTM with weights \(not built\); expected"):
        gpu_rnn.keras.load(made.layer("lstm"))
    for options, why in (
        ({"peephole": True}, r"no lstm\+peephole"), ({"coupled": True}, r"no lstm\+coupled"),
        ({"cell_clip": 1.0}, "has cell_clip"), ({"zoneout": 0.1}, "has zoneout"),
    ):  # fmt: skip
        for to in (target, tmp_path / "layer.keras"):
            with pytest.raises(NotImplementedError, match=why):
                gpu_rnn.keras.save(gpu_rnn.LSTM(I, H, **options), to)
    with pytest.raises(NotImplementedError, match="projection"):
        gpu_rnn.keras.save(gpu_rnn.LSTM(I, H, proj_size=2), target)
    with pytest.raises(ValueError, match=r"layer\.pt must end in"):
        gpu_rnn.keras.save(gpu_rnn.LSTM(I, H), tmp_path / "layer.pt")
    (tmp_path / "layer.pt").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"neither a \.keras archive nor an HDF5 file"):
        gpu_rnn.keras.load(tmp_path / "layer.pt")
    unbuilt = made.layer("lstm")
    gpu_rnn.keras.save(gpu_rnn.LSTM(I, H), unbuilt)
    assert gpu_rnn.keras.load(unbuilt).input_size == I


def test_only_a_sequential_of_nothing_else_is_a_stack(made):
    layers = made.keras.layers
    between = made.sequential(made.layer("lstm", name="a"), layers.Dropout(0.5), made.layer("lstm", name="b"))
    with pytest.raises(ValueError, match=r"no single recurrent layer or stack of them; .*: a, b"):
        gpu_rnn.keras.load(between)
    assert gpu_rnn.keras.load(between, ["a", "b"]).num_layers == 2
    with pytest.raises(ValueError, match=r"must be alike, got {'lstm': 'lstm', 'gru': 'gru'}"):
        gpu_rnn.keras.load(made.sequential(made.layer("lstm", name="lstm"), made.layer("gru", name="gru")))
