"""Keras's SimpleRNN, LSTM, GRU and Bidirectional as layers, and layers as Keras models.

    import gpu_rnn.keras

    layer = gpu_rnn.keras.load(keras_layer)  # or "model.keras", "model.h5", "model.weights.h5"
    layer = gpu_rnn.keras.load("model.keras", ["lstm", "lstm_1"])  # two layers of Keras's as one of two
    gpu_rnn.keras.save(layer, keras_layer)  # or "layer.keras", "layer.h5", "layer.weights.h5"
    stack = gpu_rnn.keras.weights("model.keras")  # as NumPy arrays, without torch

Files are read without Keras, and written with it. Gate orders and biases, of Keras and of here:
docs/importing_weights.md; the definition: https://keras.io/api/layers/recurrent_layers/ and Keras's source,
keras/src/layers/rnn.
"""

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.weave import weave

from .compat import require
from .exchange import Stack, chosen, reordered
from .functional import ShapeError, shape
from .problem import Weights

GATES = {"SimpleRNN": "a", "LSTM": "ifgo", "GRU": "zrn"}  # our letters; Keras calls g and n by c and h
CELLS = {  # class and activation
    ("SimpleRNN", "tanh"): "rnn_tanh",
    ("SimpleRNN", "relu"): "rnn_relu",
    ("LSTM", "tanh"): "lstm",
    ("GRU", "tanh"): "gru",
}
COMPUTED = {  # of Keras's other arguments, what the layers here compute, which is also Keras's default
    "recurrent_activation": "sigmoid",
    "go_backwards": False,
    "stateful": False,
    "time_major": False,
    "dropout": 0,
    "recurrent_dropout": 0,
    "merge_mode": "concat",
}


FREE = {"activation": "tanh", "reset_after": True}  # what decides over the cell, and Keras's defaults


class Found(NamedTuple):
    """A layer of Keras's."""

    kind: str  # its class; within Bidirectional that of the wrapped layer
    config: dict[str, Any]  # the arguments it was made with, as far as they are known; the others have their defaults
    D: int
    arrays: list[np.ndarray]  # kernel [I, G*H], recurrent_kernel [H, G*H], perhaps bias; for each direction
    layer: Any = None  # the object, where it isn't in a file

    def directions(self) -> list[list[np.ndarray]]:
        n = len(self.arrays) // self.D
        return [self.arrays[d * n : (d + 1) * n] for d in range(self.D)]

    def __str__(self) -> str:
        return f"{self.kind} with weights {', '.join(map(shape, self.arrays)) or '(not built)'}"


# ---- from Keras -----------------------------------------------------------------------------------------------------


def load(source: Any, name: str | Iterable[str] | None = None, **config: Any) -> Any:
    """A layer with the weights of a Keras layer, or of several that follow each other.

    Args:
        source: a Keras layer or model, or the path of a .keras archive, an HDF5 model or an HDF5 file of weights.
        name: the layer's name, after those of the models around it and slashes; in a .weights.h5 file, which has no
            names, its path there without "layers". Or several, from the bottom up. None takes the only one, or all of
            a Sequential that has nothing else.
        config: arguments to take instead of those that the Keras layer was made with. So `dropout=0` loads a layer
            that has dropout, which is another one here, for what it computes in inference. A file of weights alone
            doesn't tell the arguments and is read as of Keras's defaults, unless they are given: `activation="relu"`;
            only a GRU's reset_after can be told from its bias.

    Returns:
        gpu_rnn.RNN, LSTM or GRU on the CPU, in the weights' dtype, with batch_first=True. Where Keras has one bias it
        is b_ih, and b_hh is zero. Outputs are whole sequences and states, whatever `return_sequences` says.

    Raises:
        NotImplementedError: arguments whose effect no layer here has, each named: other activations, go_backwards,
            stateful, dropout, recurrent_dropout, another merge_mode. ShapeError: shapes that don't fit.
        ValueError: no such layer, several that aren't a stack, a file that isn't Keras's. TypeError: bfloat16, or
            a `config` that isn't about this.
    """
    return weights(source, name, **config).module()


def weights(source: Any, name: str | Iterable[str] | None = None, **config: Any) -> Stack:
    """What `load` loads, as NumPy arrays in torch's layout and gate order. Arguments and errors are those of `load`."""
    layers = picked(source, name)
    pages = {name: page(name, found, config) for name, found in layers.items()}
    if len(set(pages.values())) > 1:
        raise ValueError(f"layers of one stack must be alike, got {pages}")
    units = tuple(
        tuple(ours(found.kind, pages[name], *arrays) for arrays in found.directions()) for name, found in layers.items()
    )
    return Stack(next(iter(pages.values())), units, batch_first=True)


def ours(kind: str, page: str, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray | None = None) -> Weights:
    """One direction: kernel [I, G*H], recurrent [H, G*H], bias [G*H], or [2, G*H] of a GRU, in Keras's gate order."""
    both = () if bias is None else bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
    return Weights(*(reordered(a, GATES[kind], cells.get(page).gates) for a in (kernel.T, recurrent.T, *both)))


def page(name: str, found: Found, given: dict[str, Any]) -> str:
    """The cell that the layer computes; or an error that says why there is none."""
    if unknown := given.keys() - COMPUTED.keys() - FREE.keys():
        raise TypeError(f"{', '.join(unknown)} can't be given; there are {', '.join(FREE | COMPUTED)}")
    config = FREE | COMPUTED | found.config | given
    cell = CELLS.get((found.kind, str(config["activation"])))
    lacking = ["activation"] * (cell is None) + [key for key, value in COMPUTED.items() if config[key] != value]
    lacking += ["reset_after"] * (not isinstance(config["reset_after"], bool))  # each direction has another
    if cell is None or lacking:
        raise NotImplementedError(
            f"{name!r}, {found}, has what no layer here has: {', '.join(f'{key}={config[key]!r}' for key in lacking)}; "
            f"{lacking[0]}=... as an argument takes another value for it, where only the weights are wanted"
        )
    G, n = len(GATES[found.kind]), len(found.arrays) // found.D
    I, H = (len(array) for array in found.arrays[:2]) if n > 1 else (0, 0)
    two = found.kind == "GRU" and bool(config["reset_after"])
    bias = (2, G * H) if two else (G * H,)
    expected = [(I, G * H), (H, G * H), bias][:n] * found.D
    if n not in (2, 3) or [array.shape for array in found.arrays] != expected:
        raise ShapeError(
            f"{name!r} is {found}; expected, in each of {found.D} directions, kernel [I, {G}*H], recurrent_kernel "
            f"[H, {G}*H] and a bias [{'2, ' * two}{G}*H] or none"
        )
    return weave(cells.get(cell), before=found.kind == "GRU" and not config["reset_after"]).name


def picked(source: Any, name: str | Iterable[str] | None) -> dict[str, Found]:
    """The layers of these names, from the bottom up."""
    if isinstance(source, (str, PathLike)):
        found, sequential = in_file(fspath(source))
    else:
        found, sequential = dict(in_object(source)), type(source).__name__ == "Sequential"
    recurrent = {name: layer for name, layer in found.items() if layer.kind in GATES}
    stacked = sequential and len(recurrent) == len(found) and not any("/" in name for name in found)
    sequence = list(recurrent) if stacked or len(recurrent) == 1 else []
    return chosen(recurrent, name, sequence, source if isinstance(source, (str, PathLike)) else type(source).__name__)


def in_object(layer: Any, inside: str = "") -> Iterator[tuple[str, Found]]:
    """Every layer of a model by its name; a layer by its own."""
    kind = type(layer).__name__
    if hasattr(layer, "layers"):
        for each in layer.layers:
            nested = hasattr(each, "layers")
            yield from in_object(each, f"{inside}{each.name}/" if nested else inside)
    elif kind in (*GATES, "Bidirectional"):
        yield inside + layer.name, made(kind, layer.get_config(), layer.get_weights(), layer)
    elif kind != "InputLayer":
        yield inside + layer.name, Found(kind, {}, 1, [])


def made(kind: str, config: dict[str, Any], arrays: list[np.ndarray], layer: Any = None) -> Found:
    """A layer with its configuration. Where the two directions of Bidirectional differ, it has both as a pair."""
    if kind != "Bidirectional":
        return Found(kind, config, 1, arrays, layer)
    forward = config["layer"]["config"]
    backward = config.get("backward_layer", {}).get("config", forward | {"go_backwards": True})
    backward = backward | {"go_backwards": not backward.get("go_backwards", False)}
    both = {
        key: value if value == backward.get(key, value) else (value, backward[key])
        for key, value in forward.items() if key in FREE | COMPUTED
    }  # fmt: skip
    return Found(config["layer"]["class_name"], both | {"merge_mode": config["merge_mode"]}, 2, arrays, layer)


# ---- files ----------------------------------------------------------------------------------------------------------


def in_file(path: str) -> tuple[dict[str, Found], bool]:
    """Every layer of a file by its name, recurrent ones where it has weights alone; and whether it is a Sequential."""
    h5py = require("h5py", f"reading {path}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            arrays = by_path(h5py.File(io.BytesIO(archive.read("model.weights.h5"))))
        return with_config(config, lambda name, path: arrays.get(path))
    if not h5py.is_hdf5(path):
        with open(path, "rb"):  # an error of its own where there is no such file
            raise ValueError(f"{path} is neither a .keras archive nor an HDF5 file")
    with h5py.File(path) as file:
        if "model_config" in file.attrs:
            arrays = by_name(file["model_weights"])
            return with_config(json.loads(file.attrs["model_config"]), lambda name, path: arrays.get(name))
        arrays = by_name(file) if "layer_names" in file.attrs else by_path(file)
    return {name: found for name, (D, each) in arrays.items() if (found := guessed(D, each))}, False


def by_path(file: Any) -> dict[str, tuple[int, list[np.ndarray]]]:
    """Keras 3: the directions and arrays of every recurrent layer, by its path without "layers"."""
    paths: list[str] = []
    file.visit(lambda path: paths.append(path) if path.endswith("/cell/vars") else None)
    found: dict[str, tuple[int, list[np.ndarray]]] = {}
    for path in sorted(paths, key=lambda path: "/backward_layer/" in path):
        layer = re.sub("/(forward|backward)_layer/cell/vars$|/cell/vars$", "", path)
        name = "/".join(layer.split("/")[1::2]) if layer.startswith("layers/") else layer
        D, before = found.get(name, (0, []))
        found[name] = D + 1, before + [file[path][str(k)][()] for k in range(len(file[path]))]
    return found


def by_name(group: Any) -> dict[str, tuple[int, list[np.ndarray]]]:
    """HDF5 as Keras 2 wrote it and `model.save("model.h5")` still does: the same, by the layer's name."""
    found = {}
    for layer in map(text, group.attrs["layer_names"]):
        names = [text(name) for name in group[layer].attrs["weight_names"]]
        if any(name.removesuffix(":0").endswith("recurrent_kernel") for name in names):
            D = 2 if any("backward_" in name for name in names) else 1
            found[layer] = D, [group[layer][name][()] for name in names]
    return found


def text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def with_config(model: dict[str, Any], arrays: Callable) -> tuple[dict[str, Found], bool]:
    """Every layer of a model, from its configuration and `arrays(name, path)`."""
    found = {}
    for name, path, kind, config in walked(model["config"].get("layers", ())):
        _, each = arrays(name, path) or (1, [])
        found[name] = made(kind, config, each) if kind in (*GATES, "Bidirectional") else Found(kind, {}, 1, [])
    return found, model["class_name"] == "Sequential"


def walked(layers: Iterable[dict], names: str = "", path: str = "") -> Iterator[tuple[str, str, str, dict]]:
    """Every layer's name, path in Keras 3's files, class and configuration. The path counts the layers of a class."""
    counts: Counter[str] = Counter()
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        word = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
        here = f"{path}{word}_{counts[word]}" if counts[word] else path + word
        counts[word] += 1
        if "layers" in config:
            yield from walked(config["layers"], f"{names}{config['name']}/", here + "/")
        elif kind != "InputLayer":
            yield names + config["name"], here, kind, config


def guessed(D: int, arrays: list[np.ndarray]) -> Found | None:
    """A layer of which there are weights only: the recurrent ones tell the class, the bias a GRU's form."""
    H, columns = arrays[1].shape if arrays[1].ndim == 2 else (1, 0)  # the others are those of convolutions
    kind = next((kind for kind, gates in GATES.items() if len(gates) * H == columns), None)
    if kind is None:
        return None
    one_bias = kind == "GRU" and len(arrays) > 2 * D and arrays[2].ndim == 1
    return Found(kind, {"reset_after": False} if one_bias else {}, D, arrays)


# ---- to Keras -------------------------------------------------------------------------------------------------------


def save(layer: Any, target: Any, name: str | Iterable[str] | None = None, **config: Any) -> None:
    """Write the weights of a layer into layers of Keras, or `model(layer)` into a file.

    Where Keras has one bias, as all but the GRU with its reset after the product, it gets b_ih + b_hh.

    Args:
        layer: gpu_rnn.RNN, LSTM or GRU, or the stack that `weights` gives.
        target: a Keras layer or model; or a path that ends in .keras, in .weights.h5 for the weights alone, or in .h5.
        name, config: which of the target's layers, and what not to look at in them, as for `load`.

    Raises:
        NotImplementedError: proj_size, peephole, coupled, cell_clip and zoneout, for which Keras has no form; layers of
            Keras that compute something else.
        ShapeError: shapes that don't fit. ValueError: another number of layers or cell, an unknown ending.
        TypeError: something else than a layer, or bfloat16.
    """
    stack = plain(layer)
    if isinstance(target, (str, PathLike)):
        path = fspath(target)
        if not path.endswith((".keras", ".h5")):
            raise ValueError(f"{path} must end in .keras, .weights.h5 or .h5")
        made = model(stack)
        (made.save_weights if path.endswith(".weights.h5") else made.save)(path)
        return
    layers = picked(target, name)
    if len(layers) != stack.L:
        raise ValueError(f"{stack.L} layers don't go into {len(layers)} of Keras: {', '.join(layers)}")
    pairs = []
    for (name, found), directions in zip(layers.items(), stack.weights):
        if not found.layer.built:
            found.layer.build((None, None, directions[0].w_ih.shape[1]))
            found = found._replace(arrays=found.layer.get_weights())
        if (cell := page(name, found, config)) != stack.cell:
            raise ValueError(f"{name!r} is {found}, a {cell}, not {stack.cell}")
        arrays = theirs(stack, directions)
        if [array.shape for array in arrays] != [array.shape for array in found.arrays]:
            raise ShapeError(f"{name!r} is {found}; these weights are {', '.join(map(shape, arrays))}")
        pairs.append((found.layer, arrays))
    for target, arrays in pairs:
        target.set_weights(arrays)


def plain(layer: Any) -> Stack:
    stack = Stack.of(layer)
    if stack.coupled or stack.peephole:
        raise NotImplementedError(
            f"Keras has no {stack.cell}; its LSTM has neither peepholes nor coupled gates, got {layer}"
        )
    return stack


def kind_of(stack: Stack) -> tuple[str, str]:
    """Its class and activation."""
    return next(key for key, cell in CELLS.items() if cell == stack.page)


def theirs(stack: Stack, directions: tuple[Weights, ...]) -> list[np.ndarray]:
    """The arrays of one layer: kernel [I, G*H], recurrent_kernel [H, G*H], and the bias; for each direction."""
    (kind, _), arrays = kind_of(stack), []
    for w in directions:
        w_ih, w_hh, *both = (reordered(a, stack.gates, GATES[kind]) for a in w if a is not None)
        arrays += [w_ih.T, w_hh.T]
        if both:
            arrays.append(np.stack(both) if kind == "GRU" and stack.reset_after else both[0] + both[1])
    return arrays


def model(layer: Any) -> Any:
    """A layer as keras.Sequential: one layer of Keras for each, named lstm_l0, lstm_l1 and so on.

    Input [B, T, I]; output [B, T, D*H]. It has the weights' dtype, and no dropout. Arguments and errors are `save`'s.
    """
    stack = plain(layer)
    if stack.reverse:
        raise NotImplementedError("Keras has no layer that reads backwards and leaves the outputs at their instants")
    keras = require("keras", "making a Keras model")
    kind, activation = kind_of(stack)
    form = {"reset_after": stack.reset_after} if kind == "GRU" else {}
    dtype, layers = stack.dtype.name, []
    for k, directions in enumerate(stack.weights):
        name, bias = f"{kind.lower()}_l{k}", directions[0].b_ih is not None
        layers.append(
            getattr(keras.layers, kind)(
                stack.H, activation=activation, use_bias=bias, return_sequences=True, name=name, dtype=dtype, **form
            )
        )
        if stack.D == 2:
            layers[-1] = keras.layers.Bidirectional(layers[-1], name=name, dtype=dtype)
    made = keras.Sequential([keras.Input((None, stack.I), dtype=dtype), *layers])
    save(stack, made)
    return made
