"""Keras's layers as they are found: in objects, in .keras archives, and in HDF5 files, which are read without Keras.

A file is not trusted. Its weights are read after their shapes are known to fit, from its own datasets alone, and in
memory it takes no more than a `Budget`.
"""

import io
import json
import math
import mmap
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from ..core.optional_imports import require
from ..core.validation import shape
from .interchange import Budget

GATES = {"SimpleRNN": "a", "LSTM": "ifgo", "GRU": "zrn"}  # our letters; Keras calls g and n by c and h
CUDNN = "CuDNN"  # CuDNNLSTM and CuDNNGRU of Keras 2: the same cells, with their weights as cuDNN has them
KINDS = (*GATES, CUDNN + "LSTM", CUDNN + "GRU")
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
TAKEN = f"only {', '.join(KINDS)} themselves and Bidirectional around them are taken"
CONFIG_SLACK = 1 << 20  # bytes that the text of a configuration may have in any case
PARTS = ("forward_layer", "backward_layer", "layer", "cell")  # of a layer that has another one in it
PACKAGES = ("keras", "tf_keras", "tensorflow")


class KerasLayer(NamedTuple):
    """A layer of Keras's."""

    kind: str  # its class; within Bidirectional that of the wrapped layer
    config: dict[str, Any]  # the arguments it was made with, as far as they are known; the others have their defaults
    D: int
    arrays: list[Any]  # kernel [I, G*H], recurrent_kernel [H, G*H], perhaps bias; for each direction. NumPy's or Stored
    layer: Any = None  # the object, where it isn't in a file
    refusal: str = ""  # why it is recurrent and can't be taken

    @property
    def cudnn(self) -> bool:
        return self.kind.startswith(CUDNN)

    @property
    def cell(self) -> str:
        """One of GATES."""
        return self.kind.removeprefix(CUDNN)

    def directions(self) -> list[list[np.ndarray]]:
        """The arrays of each direction, read."""
        arrays = [array.read() if isinstance(array, Stored) else array for array in self.arrays]
        n = len(arrays) // self.D
        return [arrays[d * n : (d + 1) * n] for d in range(self.D)]

    def __str__(self) -> str:
        return f"{self.kind} with weights {', '.join(map(shape, self.arrays)) or '(not built)'}"


@contextmanager
def layers_in(source: Any) -> Iterator[tuple[dict[str, KerasLayer], bool]]:
    """Every layer of a Keras layer, model or file by its name; and whether it is a Sequential.

    Of a file of weights alone the recurrent layers. A file is open within the context, as long as arrays are read.
    """
    if not isinstance(source, (str, PathLike)):
        yield dict(in_object(source)), type(source).__name__ == "Sequential"
        return
    path = fspath(source)
    h5py, size = require("h5py", f"reading {path}"), os.path.getsize(path)
    budget = Budget(size)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            config = json.loads(extracted(archive, "config.json", size, budget, CONFIG_SLACK))
            weights = extracted(archive, "model.weights.h5", size, budget)
        with h5py.File(io.BytesIO(weights), "r") as file:
            arrays = by_path(file, budget)
            yield with_config(config, lambda name, path: arrays.get(path, (1, [])))
        return
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is neither a .keras archive nor an HDF5 file")
    check_texts(path)
    with h5py.File(path, "r") as file:
        if "model_config" in file.attrs:
            arrays = by_name(member(file, "model_weights"), budget)
            config = json.loads("".join(texts(file, "model_config", budget)))
            yield with_config(config, lambda name, path: arrays.get(name, (1, [])))
        else:
            arrays = by_name(file, budget) if "layer_names" in file.attrs else by_path(file, budget)
            yield {name: layer for name, (D, each) in arrays.items() if (layer := infer_layer(D, each))}, False


# ---- objects and configurations -------------------------------------------------------------------------------------


def in_object(layer: Any, inside: str = "") -> Iterator[tuple[str, KerasLayer]]:
    """Every layer of a model by its name; a layer by its own."""
    kind = type(layer).__name__
    if hasattr(layer, "layers"):
        for each in layer.layers:
            nested = hasattr(each, "layers")
            yield from in_object(each, f"{inside}{each.name}/" if nested else inside)
    elif kind != "InputLayer":
        parts = [part for name in PARTS if (part := getattr(layer, name, None)) is not None]
        whys = (refused(kind, own_class(layer), type(part).__name__, own_class(part)) for part in parts or [None])
        if refusal := next(filter(None, whys), ""):
            yield inside + layer.name, KerasLayer(kind, {}, 1, [], layer, refusal)
        elif kind in (*KINDS, "Bidirectional"):
            yield inside + layer.name, made(kind, layer.get_config(), layer.get_weights(), layer)
        else:
            yield inside + layer.name, KerasLayer(kind, {}, 1, [], layer)


def own_class(layer: Any) -> str:
    """What to say of a layer whose class is not Keras's."""
    if layer is None or type(layer).__module__.partition(".")[0] in PACKAGES:
        return ""
    bases = (base.__name__ for base in type(layer).__mro__ if base.__module__.partition(".")[0] in PACKAGES)
    return f"a subclass of {next(bases, 'nothing')}"


def refused(kind: str, own: str, part: str = "NoneType", part_own: str = "") -> str:
    """Why a layer that may be recurrent isn't taken, or nothing. part: the class of a layer or cell within it."""
    if own:
        return f"{kind}, {own}, which may compute something else; {TAKEN}"
    if part == "NoneType" or kind in KINDS or (kind == "Bidirectional" and part in KINDS and not part_own):
        return ""
    return f"{kind}({part})" + f", {part} being {part_own}" * bool(part_own) + f"; {TAKEN}"


def made(kind: str, config: dict[str, Any], arrays: list[Any], layer: Any = None) -> KerasLayer:
    """A layer with its configuration. Where the two directions of Bidirectional differ, it has both as a pair."""
    if kind != "Bidirectional":
        return KerasLayer(kind, config, 1, arrays, layer)
    forward = config["layer"]["config"]
    backward = (config.get("backward_layer") or {}).get("config", forward | {"go_backwards": True})
    backward = backward | {"go_backwards": not backward.get("go_backwards", False)}
    both = {
        key: value if value == backward.get(key, value) else (value, backward[key])
        for key, value in forward.items() if key in FREE | COMPUTED | {"units": None}
    }  # fmt: skip
    return KerasLayer(config["layer"]["class_name"], both | {"merge_mode": config["merge_mode"]}, 2, arrays, layer)


def with_config(model: dict[str, Any], arrays: Callable) -> tuple[dict[str, KerasLayer], bool]:
    """Every layer of a model, from its configuration and `arrays(name, path)`."""
    layers: dict[str, KerasLayer] = {}
    kind = model["class_name"]
    for name, path, layer in iter_layers(model["config"].get("layers", ())):
        each = arrays(name, path)[1]
        layers[name] = KerasLayer(layer["class_name"], {}, 1, [], refusal=refused_config(layer, bool(each)))
        if not layers[name].refusal and layer["class_name"] in (*KINDS, "Bidirectional"):
            layers[name] = made(layer["class_name"], layer["config"], each)
    if not layers:
        why = f"{kind}, a model whose configuration names no layers; its weights file has them, without a model"
        layers[model["config"].get("name", kind)] = KerasLayer(kind, {}, 1, [], refusal=why)
    return layers, kind == "Sequential"


def refused_config(layer: dict[str, Any], recurrent: bool) -> str:
    """Why a layer of this configuration isn't taken, or nothing. recurrent: whether its weights are."""

    def own(each: dict[str, Any]) -> str:
        named = "module" in each and str(each["module"]).partition(".")[0] not in PACKAGES
        return "a class of its own" * named

    kind = layer["class_name"]
    parts = [part for name in PARTS if isinstance(part := layer["config"].get(name), dict) and "class_name" in part]
    unknown = recurrent and not parts and kind not in KINDS
    whys = [refused(kind, own(layer), part["class_name"], own(part)) for part in parts]
    return next(filter(None, [*whys, refused(kind, own(layer) or "a class of its own" * unknown)]), "")


def iter_layers(layers: Iterable[dict], names: str = "", path: str = "") -> Iterator[tuple[str, str, dict]]:
    """Every layer's name, path in Keras 3's files, and description. The path counts the layers of a class."""
    counts: Counter[str] = Counter()
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        word = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
        here = f"{path}{word}_{counts[word]}" if counts[word] else path + word
        counts[word] += 1
        if "layers" in config:
            yield from iter_layers(config["layers"], f"{names}{config['name']}/", here + "/")
        elif kind != "InputLayer":
            yield names + config["name"], here, layer


def infer_layer(D: int, arrays: list[Any]) -> KerasLayer | None:
    """A layer of which there are weights only: the recurrent ones tell the class, the bias its form."""
    recurrent: tuple[int, ...] = arrays[1].shape if len(arrays) > 1 else ()
    H, columns = recurrent if len(recurrent) == 2 else (1, 0)  # the others are those of convolutions
    kind = next((kind for kind, gates in GATES.items() if len(gates) * H == columns), None)
    if kind is None:
        return None
    bias = arrays[2].shape if len(arrays) > 2 * D else ()
    if kind != "SimpleRNN" and bias == (2 * columns,):
        return KerasLayer(CUDNN + kind, {}, D, arrays)
    return KerasLayer(kind, {"reset_after": False} if kind == "GRU" and len(bias) == 1 else {}, D, arrays)


# ---- files ----------------------------------------------------------------------------------------------------------


def extracted(archive: zipfile.ZipFile, name: str, size: int, budget: Budget, slack: int | None = None) -> bytes:
    """A member of an archive of `size` bytes, unless it expands beyond measure."""
    if name not in archive.NameToInfo:
        raise ValueError(f"the archive has no {name}, as Keras's have; it has {', '.join(archive.namelist()[:8])}")
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by method {info.compress_type}; Keras's archives aren't")
    if info.compress_size > size:  # which zipfile believes
        raise ValueError(f"{name} has {info.compress_size} bytes, and the archive {size}")
    if slack is not None:
        Budget(info.compress_size, slack).take(info.file_size, name)
    budget.take(info.file_size, name)
    return archive.read(info)


class Stored:
    """A dataset of a file, which is read when its shape fits."""

    def __init__(self, dataset: Any, budget: Budget) -> None:
        self.dataset, self.budget = dataset, budget
        self.shape = dataset.shape

    def read(self) -> np.ndarray:
        """ValueError where the file itself doesn't have all of it."""
        data = self.dataset
        what, size = f"dataset {data.name!r}", math.prod(data.shape) * data.dtype.itemsize
        if data.is_virtual:
            raise ValueError(
                f"{what} is virtual: its data are in {', '.join(s.file_name for s in data.virtual_sources())}"
            )
        if data.external:
            raise ValueError(f"{what} has its data in other files: {', '.join(name for name, *_ in data.external)}")
        if data.dtype.kind != "f" and data.dtype != "V2":  # bfloat16, for h5py
            raise ValueError(f"{what} has {data.dtype}, no weights")
        stored, filtered = data.id.get_storage_size(), data.id.get_create_plist().get_nfilters() > 0
        if stored < (1 if filtered else size):
            raise ValueError(f"{what} of shape {shape(data)} takes {size} bytes, of which the file has {stored}")
        self.budget.take(max(size, math.prod(data.chunks or ()) * data.dtype.itemsize), what)
        return data[()]


def check_texts(path: str) -> None:
    """ValueError where an attribute of text would be longer than the file: HDF5 takes the memory before it looks.

    HDF5 tells no length, so it is read where it stands: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html,
    "Attribute Message". A file has each of them as it is, behind its name.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in re.finditer(rb"(?:model_config|(?:layer|weight)_names\d*)\0", data):
            for header, versions in ((8, (1, 2)), (9, (3,))):
                version, _, *sizes = struct.unpack_from("<BBHHH", data, max(0, name.start() - header))
                if version not in versions or sizes[0] != len(name[0]):
                    continue
                kind, space, begin = accumulate(-(-n // 8) * 8 if version == 1 else n for n in sizes)
                kind, space, begin = (name.start() + offset for offset in (kind, space, begin))
                if begin > size or data[kind] & 15 != 9:  # not of variable length
                    continue
                dims = space + (8 if data[space] == 1 else 4)
                count = math.prod(struct.unpack_from(f"<{data[space + 1]}Q", data, dims))
                lengths = count * 16 <= size and struct.unpack_from("<" + "I12x" * count, data, begin)
                if not lengths or sum(lengths) > size:
                    what = f"attribute {name[0][:-1].decode()}"
                    raise ValueError(f"{what} has {count} texts, of more bytes than the file, which has {size}")


def member(group: Any, path: str) -> Any:
    """An object of the file itself: a link may lead into another one."""
    h5py = require("h5py", "reading HDF5")
    for part in filter(None, path.split("/")):
        link = group.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            why = "isn't there" if link is None else f"is a link to {getattr(link, 'filename', 'the file')}:{link.path}"
            raise ValueError(f"{part!r} in {group.name!r} {why}; only what the file itself has is read")
        group = group[part]
    return group


def stored(group: Any, path: str, budget: Budget) -> Stored:
    dataset = member(group, path)
    if not isinstance(dataset, require("h5py", "reading HDF5").Dataset):
        raise ValueError(f"{dataset.name!r} is no dataset")
    return Stored(dataset, budget)


def texts(group: Any, name: str, budget: Budget) -> list[str]:
    """An attribute of text or texts, which Keras cuts into several with a number each where it is long."""
    if name not in group.attrs:
        numbered = (f"{name}{k}" for k in range(len(group.attrs)))
        return [text for part in numbered if part in group.attrs for text in texts(group, part, budget)]
    stored = group.attrs.get_id(name)
    budget.take(math.prod(stored.shape) * stored.dtype.itemsize, f"attribute {name}")
    value = group.attrs[name]
    return [each.decode() if isinstance(each, bytes) else str(each) for each in np.ravel(value).tolist()]


def by_path(file: Any, budget: Budget) -> dict[str, tuple[int, list[Any]]]:
    """Keras 3: the directions and arrays of every recurrent layer, by its path without "layers"."""
    paths: list[str] = []
    file.visit(lambda path: paths.append(path) if path.endswith("/cell/vars") else None)
    arrays: dict[str, tuple[int, list[Any]]] = {}
    for path in sorted(paths, key=lambda path: "/backward_layer/" in path):
        layer = re.sub("/(forward|backward)_layer/cell/vars$|/cell/vars$", "", path)
        name = "/".join(layer.split("/")[1::2]) if layer.startswith("layers/") else layer
        D, before = arrays.get(name, (0, []))
        vars = member(file, path)
        arrays[name] = D + 1, before + [stored(vars, str(k), budget) for k in range(len(vars))]
    return arrays


def by_name(group: Any, budget: Budget) -> dict[str, tuple[int, list[Any]]]:
    """HDF5 as Keras 2 wrote it and `model.save("model.h5")` still does: the same, by the layer's name."""
    layers = {}
    for layer in texts(group, "layer_names", budget):
        weights = member(group, layer)
        names = texts(weights, "weight_names", budget)
        recurrent = [name for name in names if name.removesuffix(":0").endswith("recurrent_kernel")]
        if recurrent:
            both = len(recurrent) == 2 and "forward_" in recurrent[0] and "backward_" in recurrent[1]
            layers[layer] = 1 + both, [stored(weights, name, budget) for name in names]
    return layers
