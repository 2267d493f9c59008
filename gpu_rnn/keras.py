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

import warnings
from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers

from .core.optional_imports import require
from .core.problem import Weights
from .core.validation import ShapeError, shape
from .weights.interchange import Stack, chosen, reading, reordered
from .weights.keras_layers import COMPUTED, FREE, GATES, KINDS, KerasLayer, layers_in

CELLS = {  # class and activation
    ("SimpleRNN", "tanh"): "rnn_tanh",
    ("SimpleRNN", "relu"): "rnn_relu",
    ("LSTM", "tanh"): "lstm",
    ("GRU", "tanh"): "gru",
}


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
        ValueError: no such layer, or one of another class; several that aren't a stack; a file that is damaged, isn't
            Keras's, has its weights in other files, or takes far more memory than it has bytes. It names the path.
        TypeError: bfloat16, or a `config` that isn't about this.
    """
    return weights(source, name, **config).module()


def weights(source: Any, name: str | Iterable[str] | None = None, **config: Any) -> Stack:
    """What `load` loads, as NumPy arrays in torch's layout and gate order. Arguments and errors are those of `load`."""
    known(config)
    path = fspath(source) if isinstance(source, (str, PathLike)) else None
    with reading(path, "a Keras file"), layers_in(source) as (every, sequential):
        layers = find_layers(every, sequential, name, path or type(source).__name__)
        cell_names = {name: cell_name(name, layer, config) for name, layer in layers.items()}
        if len(set(cell_names.values())) > 1:
            raise ValueError(f"layers of one stack must be alike, got {cell_names}")
        cell, *_ = cell_names.values()
        stacked = (tuple(ours(layer, cell, *arrays) for arrays in layer.directions()) for layer in layers.values())
        return Stack(cell, tuple(stacked), batch_first=True)


def known(config: dict[str, Any]) -> None:
    if unknown := config.keys() - COMPUTED.keys() - FREE.keys():
        raise TypeError(f"{', '.join(unknown)} can't be given; there are {', '.join(FREE | COMPUTED)}")


def find_layers(
    every: dict[str, KerasLayer], sequential: bool, name: str | Iterable[str] | None, where: str
) -> dict[str, KerasLayer]:
    """The layers of these names, from the bottom up."""
    refused = {name: layer.refusal for name, layer in every.items() if layer.refusal}
    recurrent = {name: layer for name, layer in every.items() if layer.kind in KINDS and not layer.refusal}
    stacked = sequential and len(recurrent) == len(every) and not any("/" in name for name in every)
    sequence = list(recurrent) if stacked or len(recurrent) == 1 else []
    return chosen(recurrent, name, sequence, where, refused)


def ours(
    layer: KerasLayer, cell_name: str, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray | None = None
) -> Weights:
    """One direction: kernel [I, G*H], recurrent [H, G*H], bias [G*H], or [2, G*H] of a GRU, in Keras's gate order."""
    gates = GATES[layer.cell]
    if layer.cudnn:
        # Each gate's block has Keras's shape [I, H] and the bytes of cuDNN's [H, I]; a bias has both, [2*G*H].
        blocks = [np.split(array, len(gates), axis=1) for array in (kernel, recurrent)]
        w_ih, w_hh = (np.concatenate([block.ravel().reshape(block.shape[::-1]) for block in each]) for each in blocks)
        bias = None if bias is None else bias.reshape(2, -1)
    else:
        w_ih, w_hh = kernel.T, recurrent.T
    both = () if bias is None else bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
    return Weights(*(reordered(array, gates, cells.get(cell_name).gates) for array in (w_ih, w_hh, *both)))


def cell_name(name: str, layer: KerasLayer, overrides: dict[str, Any]) -> str:
    """The cell that the layer computes; or an error that says why there is none."""
    config = FREE | COMPUTED | layer.config | overrides
    cell = CELLS.get((layer.cell, str(config["activation"])))
    lacking = ["activation"] * (cell is None) + [key for key, value in COMPUTED.items() if config[key] != value]
    lacking += ["reset_after"] * (not isinstance(config["reset_after"], bool))  # each direction has another
    if cell is None or lacking:
        raise NotImplementedError(
            f"{name!r}, {layer}, has what no layer here has: {', '.join(f'{key}={config[key]!r}' for key in lacking)}; "
            f"{lacking[0]}=... as an argument takes another value for it, where only the weights count"
        )
    G, n = len(GATES[layer.cell]), len(layer.arrays) // layer.D
    kernel, recurrent = (array.shape for array in layer.arrays[:2]) if n > 1 else ((), ())
    I, H = kernel[0] if kernel else 0, layer.config.get("units", recurrent[0] if recurrent else 0)
    after = layer.cell == "GRU" and bool(config["reset_after"])
    bias = (2 * G * H,) if layer.cudnn else (2, G * H) if after else (G * H,)
    expected = [(I, G * H), (H, G * H), bias][:n] * layer.D
    if n not in (2, 3) or [array.shape for array in layer.arrays] != expected:
        of_units = f", with H = units = {H}" if "units" in layer.config else ""
        raise ShapeError(
            f"{name!r} is {layer}; expected, in each of {layer.D} directions, kernel [I, {G}*H], recurrent_kernel "
            f"[H, {G}*H] and a bias [{'2*' * layer.cudnn}{'2, ' * (len(bias) - 1)}{G}*H] or none{of_units}"
        )
    return apply_modifiers(cells.get(cell), before=layer.cell == "GRU" and not config["reset_after"]).name


# ---- to Keras -------------------------------------------------------------------------------------------------------


def save(layer: Any, target: Any, name: str | Iterable[str] | None = None, **config: Any) -> None:
    """Write the weights of a layer into layers of Keras, or `model(layer)` into a file.

    Where Keras has one bias, as all but the GRU with its reset after the matmul, it gets b_ih + b_hh.

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
    known(config)
    with layers_in(target) as (every, sequential):
        layers = find_layers(every, sequential, name, type(target).__name__)
    if len(layers) != stack.L:
        raise ValueError(f"{stack.L} layers don't go into {len(layers)} of Keras: {', '.join(layers)}")
    pairs = []
    for (name, layer), directions in zip(layers.items(), stack.weights):
        if not layer.layer.built:
            layer.layer.build((None, None, directions[0].w_ih.shape[1]))
            layer = layer._replace(arrays=layer.layer.get_weights())
        if (cell := cell_name(name, layer, config)) != stack.cell:
            raise ValueError(f"{name!r} is {layer}, a {cell}, not {stack.cell}")
        arrays = theirs(stack, directions)
        if [array.shape for array in arrays] != [array.shape for array in layer.arrays]:
            raise ShapeError(f"{name!r} is {layer}; these weights are {', '.join(map(shape, arrays))}")
        pairs.append((layer.layer, arrays))
    for target, arrays in pairs:
        target.set_weights(arrays)


def plain(layer: Any) -> Stack:
    stack = Stack.of(layer)
    if stack.hx is not None:
        warnings.warn("the stack's constant initial states hx are left out: Keras's layers have none", stacklevel=3)
    if stack.coupled or stack.peephole:
        raise NotImplementedError(
            f"Keras has no {stack.cell}; its LSTM has neither peepholes nor coupled gates, got {layer}"
        )
    return stack


def kind_of(stack: Stack) -> tuple[str, str]:
    """Its class and activation."""
    return next(key for key, cell in CELLS.items() if cell == stack.cell_name)


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
        raise NotImplementedError("Keras has no layer that reads backwards and leaves the outputs at their time steps")
    keras = require("keras", "making a Keras model")
    kind, activation = kind_of(stack)
    form = {"reset_after": stack.reset_after} if kind == "GRU" else {}
    dtype, layers = stack.dtype.name, []
    for k, directions in enumerate(stack.weights):
        name, bias = f"{kind.lower()}_l{k}", directions[0].b_ih is not None
        own = getattr(keras.layers, kind)(
            stack.H, activation=activation, use_bias=bias, return_sequences=True, name=name, dtype=dtype, **form
        )
        layers.append(keras.layers.Bidirectional(own, name=name, dtype=dtype) if stack.D == 2 else own)
    made = keras.Sequential([keras.Input((None, stack.I), dtype=dtype), *layers])
    save(stack, made)
    return made
