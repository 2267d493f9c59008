"""Weights to and from Keras, against Keras on its torch backend."""

import importlib
import io
import json
import struct
import sys
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
import torch

import gpu_rnn
import gpu_rnn.keras
from gpu_rnn.functional import ShapeError
from tests.mutated import read_mutated

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


# ---- files that are not to be trusted

pytestmark = pytest.mark.filterwarnings("ignore:You are saving", "ignore:__array__")


def edited(path, edit, config=None):
    """A file of any of the three kinds with its HDF5 part changed, or the text of its configuration."""
    if path.suffix != ".keras":
        with h5py.File(path, "a") as file:
            edit(file.get("model_weights", file))
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        edit(file)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, weights.getvalue() if name == "model.weights.h5" else data)
    return path


def kernel_of(file):
    """The group of the first kernel, and its name in it."""
    paths = []
    file.visititems(lambda path, each: paths.append(path) if isinstance(each, h5py.Dataset) else None)
    path = next(path for path in paths if path.endswith(("/kernel", "/kernel:0", "cell/vars/0")))
    return file[path].parent, path.rpartition("/")[2]


def secret_file(path):
    with h5py.File(path, "w") as file:
        file["secret"] = np.full((I, 4 * H), 7.0, np.float32)
    (path.parent / "raw").write_bytes(bytes(4 * I * 4 * H))


def replace_by(what, folder):
    def edit(file):
        group, name = kernel_of(file)
        shape = group[name].shape
        del group[name]
        match what:
            case "external storage":
                group.create_dataset(name, shape, "f4", external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)])
            case "external link":
                group[name] = h5py.ExternalLink(str(folder / "secret.h5"), "/secret")
            case "soft link to an external one":
                file["way"] = h5py.ExternalLink(str(folder / "secret.h5"), "/")
                group[name] = h5py.SoftLink(file["/"].name.rstrip("/") + f"{file.name.rstrip('/')}/way/secret")
            case "virtual dataset":
                layout = h5py.VirtualLayout(shape, "f4")
                layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "secret", shape)
                group.create_virtual_dataset(name, layout)

    return edit


REFUSED = {
    "external storage": "has its data in other files: .*raw",
    "external link": r"is a link to .*secret\.h5:/secret",
    "soft link to an external one": "is a link to the file:.*/way/secret",
    "virtual dataset": r"is virtual: its data are in .*secret\.h5",
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("file", FILES)
def test_weights_in_other_files_are_refused_by_name(file, what, made, tmp_path):
    secret_file(tmp_path / "secret.h5")
    path = made.saved(made.sequential(made.layer("lstm")), tmp_path / file)
    assert gpu_rnn.keras.load(path).hidden_size == H
    edited(path, replace_by(what, tmp_path))
    with pytest.raises(ValueError, match=rf"{file}.*{REFUSED[what]}"):
        gpu_rnn.keras.load(path)


def test_a_group_in_another_file_is_refused(made, tmp_path):
    path = made.saved(made.sequential(made.layer("lstm", name="lstm")), tmp_path / "model.h5")
    other = made.saved(made.sequential(made.layer("lstm", name="lstm")), tmp_path / "other.h5")
    with h5py.File(path, "a") as file:
        del file["model_weights"]["lstm"]
        file["model_weights"]["lstm"] = h5py.ExternalLink(str(other), "/model_weights/lstm")
    with pytest.raises(ValueError, match=r"model\.h5.*'lstm' in '/model_weights' is a link to .*other\.h5"):
        gpu_rnn.keras.load(path)


def peak(read):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="model") as error:
            read()
        return tracemalloc.get_traced_memory()[1], str(error.value)
    finally:
        tracemalloc.stop()


BOMBS = {  # shape of the kernel [I, 4*H], and how it is stored
    "no chunk is stored": ((1 << 30, 4 * H), {"chunks": (1 << 10, 4 * H)}),
    "no chunk is stored, of a layer's shape": ((I, 4 * H), {"chunks": (1, 4 * H)}),
    "nothing is stored": ((1 << 30, 4 * H), {}),
    "one chunk that shrinks": ((1 << 25, 4 * H), {"chunks": (1 << 20, 4 * H), "compression": "gzip"}),
    "a chunk beyond the shape": ((I, 4 * H), {"chunks": (1 << 22, 4 * H), "maxshape": (None, 4 * H), "compression": 4}),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("file", FILES)
def test_shapes_that_are_not_stored_are_refused(file, bomb, made, tmp_path):
    shape, options = BOMBS[bomb]

    def edit(file):
        group, name = kernel_of(file)
        del group[name]
        dataset = group.create_dataset(name, shape, "f4", **options)
        if bomb.startswith("one chunk"):
            dataset[:10] = 1

    if bomb.startswith("a chunk") and file != "model.h5":
        pytest.skip("HDF5 writes 400 MB for it")
    path = edited(made.saved(made.sequential(made.layer("lstm")), tmp_path / file), edit)
    memory, said = peak(lambda: gpu_rnn.keras.weights(path))
    assert memory < 32 << 20, said
    assert "of which the file has" in said or "the whole may take" in said


def test_shapes_are_judged_by_the_configuration_before_weights_are_read(made, tmp_path):
    def edit(file):
        for layer in ("kernel", "recurrent_kernel"):
            group = file["lstm"]["sequential"]["lstm"]["lstm_cell"] if "sequential" in file["lstm"] else None
            group = group or kernel_of(file)[0]
            name = next(name for name in group if name.startswith(layer))
            del group[name]
            group[name] = np.zeros((100, 400), np.float32)

    path = made.saved(made.sequential(made.layer("lstm", name="lstm", use_bias=False)), tmp_path / "model.h5")
    edited(path, edit)
    with pytest.raises(ShapeError, match=r"model\.h5: 'lstm' is LSTM .*with H = units = 6"):
        gpu_rnn.keras.load(path)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5"])
def test_members_that_expand_are_refused(member, made, tmp_path):
    path = made.saved(made.sequential(made.layer("lstm")), tmp_path / "model.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert gpu_rnn.keras.load(path).hidden_size == H  # what is merely compressed is read
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + b" " * (100 << 20) * (name == member))
    memory, said = peak(lambda: gpu_rnn.keras.weights(path))
    assert memory < 32 << 20
    assert f"{member} takes" in said


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "unmarked": lambda data: data.replace(b"PK", b"XX").replace(b"HDF", b"XXX"),
    "text": lambda data: b"something else",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_value_errors_with_the_path(file, damage, made, tmp_path):
    path = made.saved(made.sequential(made.layer("lstm")), tmp_path / file)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{file}.*(can't be read as|neither a) "):
        gpu_rnn.keras.load(path)
    with pytest.raises(FileNotFoundError):
        gpu_rnn.keras.load(tmp_path / f"absent-{file}")


CONFIGS = [
    "", "[]", "3", "{}", "[" * 100_000, '{"class_name": "Sequential"}',
    '{"class_name": "Sequential", "config": {"layers": [3]}}',
    '{"class_name": "Sequential", "config": {"layers": {"a": 1}}}',
    '{"class_name": "Sequential", "config": {"layers": [{"class_name": "LSTM", "config": {}}]}}',
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_damaged_configurations_are_value_errors_with_the_path(config, made, tmp_path):
    path = made.saved(made.sequential(made.layer("lstm")), tmp_path / "model.keras")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | {"config.json": config}
    for names in (members, ["metadata.json"], ["config.json"]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, members[name])
        with pytest.raises(ValueError, match=r"model\.keras.*can't be read as a Keras file"):
            gpu_rnn.keras.load(path)
    path = made.saved(made.sequential(made.layer("lstm")), tmp_path / "model.h5")
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = config if len(config) < 60_000 else config[:60_000]
    with pytest.raises(ValueError, match=r"model\.h5.*can't be read as a Keras file"):
        gpu_rnn.keras.load(path)


@pytest.mark.parametrize("name", ["model_config", "layer_names"])
def test_texts_longer_than_the_file_are_refused(name, made, tmp_path):
    """HDF5 takes 4 GB for one before it sees that the text ends elsewhere."""
    path = made.saved(made.sequential(made.layer("lstm", name="lstm")), tmp_path / "model.h5")
    with h5py.File(path) as file:
        length = len(file.attrs["model_config"] if name == "model_config" else "lstm")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<I", length), data.index(name.encode() + b"\0"))
    data[at : at + 4] = b"\xff" * 4
    path.write_bytes(data)
    memory, said = peak(lambda: gpu_rnn.keras.weights(path))
    assert f"attribute {name} has 1 texts, of more bytes than the file" in said


@pytest.mark.parametrize("file", FILES)
def test_mutated_files_are_read_or_refused(file, made, tmp_path):
    model = made.sequential(
        made.layer("gru", name="gru"), made.keras.layers.Bidirectional(made.layer("lstm"), name="bidirectional")
    )
    path, names = made.saved(model, tmp_path / file), ["gru", "bidirectional"]

    def read(path):
        for name in names:
            gpu_rnn.keras.weights(path, name)

    read(path)
    read_mutated(read, path.read_bytes(), tmp_path / f"mutated{path.suffix}", 60, seed=3)


# ---- layers of other classes


class Own:
    """Classes of a user's, made where Keras is there."""

    def __init__(self, keras):
        class MyLSTM(keras.layers.LSTM):
            pass

        class LSTM(keras.layers.LSTM):  # of the same name
            def call(self, sequences, initial_state=None, mask=None, training=False):
                return 2 * super().call(sequences, initial_state, mask, training)

        self.MyLSTM, self.LSTM = MyLSTM, LSTM


def others(keras):
    layers, own, each = keras.layers, Own(keras), {"return_sequences": True}
    with keras.saving.custom_object_scope({"MyLSTM": own.MyLSTM}):
        inner = layers.Bidirectional(own.MyLSTM(H, **each), name="x")
    return {
        r"RNN\(LSTMCell\); only": layers.RNN(layers.LSTMCell(H), **each, name="x"),
        r"RNN\(StackedRNNCells\); only": layers.RNN([layers.LSTMCell(H), layers.GRUCell(H)], **each, name="x"),
        r"TimeDistributed\(LSTM\); only": layers.TimeDistributed(layers.LSTM(H), name="x"),
        r"Bidirectional\(RNN\); only": layers.Bidirectional(layers.RNN(layers.GRUCell(H), **each), name="x"),
        r"MyLSTM, a (class of its own|subclass of LSTM)": own.MyLSTM(H, **each, name="x"),
        r"LSTM, a (class of its own|subclass of LSTM)": own.LSTM(H, **each, name="x"),
        r"Bidirectional\((MyLSTM|LSTM)\), MyLSTM being a": inner,
    }


@pytest.mark.parametrize("source", ["object", "model.keras", "model.h5"])
@pytest.mark.parametrize("k", range(7))
def test_other_classes_are_named_with_the_reason(k, source, made, tmp_path):
    keras = made.keras
    why, layer = list(others(keras).items())[k]
    shape = (3, None, I) if "TimeDistributed" in why else (None, I)
    model = keras.Sequential([keras.Input(shape), layer])
    if source == "model.h5" and why.startswith("LSTM, a"):
        pytest.skip("the format names the class alone")
    if source == "model.h5":
        why = why.partition(", MyLSTM being")[0]
    argument = model if source == "object" else made.saved(model, tmp_path / source)
    for name in (None, "x"):
        with pytest.raises(ValueError, match=f"has: none; 'x' is {why}|bottom up: none; 'x' is {why}"):
            gpu_rnn.keras.load(argument, name)


# ---- weights as cuDNN has them


def as_keras_2_did(kernels, gates):
    """CuDNNLSTM's or CuDNNGRU's as LSTM's or GRU's, gate by gate: tensorflow/python/keras/saving/hdf5_format.py."""
    turned = [block.T.reshape(block.shape, order="F") for block in np.hsplit(kernels, gates)]
    return np.hstack(turned)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("content", ["model", "weights"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_layers_of_cudnn_are_converted(kind, content, bidirectional, made, rng, tmp_path):
    G, word, D = (4, "LSTM", 2) if kind == "lstm" else (3, "GRU", 1)
    directions = ["forward_cu_dnn", "backward_cu_dnn"] if bidirectional else ["cu_dnn"]
    names, arrays, theirs = [], [], []
    for direction in directions:
        kernel, recurrent, bias = draw(rng, I, G * H), draw(rng, H, G * H), draw(rng, 2 * G * H)
        arrays += [0.4 * kernel, 0.4 * recurrent, bias]
        names += [f"x/{direction}{kind}/{name}:0" for name in ("kernel", "recurrent_kernel", "bias")]
        both = bias.reshape(2, -1)
        theirs += [as_keras_2_did(0.4 * kernel, G), as_keras_2_did(0.4 * recurrent, G)]
        theirs.append(both.sum(0) if kind == "lstm" else both)
    layer = {"class_name": f"CuDNN{word}", "config": {"name": "x", "units": H, "go_backwards": False}}
    if bidirectional:
        layer = {"class_name": "Bidirectional", "config": {"name": "x", "layer": layer, "merge_mode": "concat"}}
    with h5py.File(tmp_path / "old.h5", "w") as file:
        group = file
        if content == "model":
            file.attrs["model_config"] = json.dumps(
                {"class_name": "Sequential", "config": {"layers": [layer]}}
            ).encode()
            group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"x"]
        group.create_group("x").attrs["weight_names"] = [name.encode() for name in names]
        for name, array in zip(names, arrays):
            group["x"][name] = array
    keras_layer = made.drawn(made.layer(kind, bidirectional))
    keras_layer.set_weights(theirs)
    x = torch.tensor(draw(rng, B, T, I))
    assert_same(gpu_rnn.keras.load(tmp_path / "old.h5")(x)[0], keras_layer(x))


def test_long_lists_of_names_are_read(made, tmp_path):
    """Keras cuts an attribute of more than 64 KB into several."""
    layer = made.layer("lstm", name="lstm")
    path = made.saved(made.sequential(layer), tmp_path / "model.h5")
    with h5py.File(path, "a") as file:
        for group, name in ((file["model_weights"], "layer_names"), (file["model_weights"]["lstm"], "weight_names")):
            each = list(group.attrs[name])
            del group.attrs[name]
            group.attrs[f"{name}0"], group.attrs[f"{name}1"] = each[:1], each[1:] or np.array([], "S1")
    again = gpu_rnn.keras.weights(path)
    assert_bitwise(again.weights[0][0][:2], gpu_rnn.keras.weights(layer).weights[0][0][:2])


def test_a_layer_named_backward_is_one_direction(made, tmp_path):
    layer = made.layer("lstm", name="backward_lstm")
    model = made.sequential(layer)
    path = tmp_path / "old.h5"
    with h5py.File(made.saved(model, tmp_path / "model.h5")) as file, h5py.File(path, "w") as weights:
        file.copy("model_weights/backward_lstm", weights)
        weights.attrs["layer_names"] = [b"backward_lstm"]
    assert not gpu_rnn.keras.load(path).bidirectional
