"""ONNX's RNN, LSTM and GRU nodes as layers, and layers as ONNX models.

    import gpu_rnn.onnx

    layer = gpu_rnn.onnx.load("model.onnx")    # a node, or nodes that follow each other
    gpu_rnn.onnx.save(layer, "layer.onnx")
    stack = gpu_rnn.onnx.weights("model.onnx")  # the same as NumPy arrays, without torch

Gate orders and biases, of ONNX and of here: docs/importing_weights.md. The operators' definition:
https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html.
"""

import warnings
from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers

from .core.optional_imports import require
from .core.problem import Weights
from .core.validation import ShapeError, shape
from .weights.interchange import DTYPES, Budget, Stack, chosen, reading, reordered

onnx = require("onnx", "gpu_rnn.onnx")

# After the error that says how to get onnx
from .weights.onnx_graph import CELLS, DATA, GATES, PEEPHOLES, Axes, Constant, Graph, Node

OPSET, IR = 17, 8
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
DIRECTIONS = {name.encode(): name for name in ("forward", "reverse", "bidirectional")}
ATTRIBUTES = {  # all that the operators have; of activation_alpha and _beta the activations here have no use
    "activations", "activation_alpha", "activation_beta", "clip", "direction", "hidden_size", "input_forget", "layout",
    "linear_before_reset", "output_sequence",
}  # fmt: skip


# ---- from ONNX ------------------------------------------------------------------------------------------------------


def load(model: Any, node: str | Iterable[str] | None = None) -> Any:
    """Load a recurrent node, or several that follow each other, as a layer.

    Args:
        model: onnx.ModelProto, or the path of one. The weights must be constants: initializers or Constant nodes.
        node: a node's name, or the name of an output of it where it has none; or several, from the bottom up. A node
            in a body of If, Loop or Scan is named after the node around it and the body, as "if/then_branch/lstm", one
            in a local function after the node that calls it, as "call/lstm"; the last part is enough where no other
            node has it. None takes all, where each reads the outputs of the one below it with the directions side by
            side, however the exporter wrote it.

    Returns:
        gpu_rnn.RNN, LSTM or GRU on the CPU, in the weights' dtype. Its batch_first is the nodes' `layout`. Initial
        states and sequence_lens are data as X is: they go into the layer's call, as hx and as a packed sequence.
        Where they are constants of the model, a warning says so; `weights(model, node).hx` has the states.

    Raises:
        NotImplementedError: other activations, clip, and the reverse direction alone, which `weights` has. ShapeError:
            shapes that don't fit.
        ValueError: no such node, several that aren't a stack, weights that aren't constants; a file that is damaged, is
            no ONNX model, or would have data read from outside of its folder. It names the path.
        TypeError: bfloat16.
    """
    return read(model, node).module()


def weights(model: Any, node: str | Iterable[str] | None = None) -> Stack:
    """Load what `load` loads as NumPy arrays in torch's layout and gate order, and constant initial states as `hx`.

    Arguments and errors are those of `load`.
    """
    return read(model, node)


def read(model: Any, node: str | Iterable[str] | None) -> Stack:
    path = fspath(model) if isinstance(model, (str, PathLike)) else None
    with reading(path, "an ONNX model"):
        graph = Graph(model)
        nodes = chosen(graph.recurrent, node, graph.chain(), path or "the model")
        layers = {name: read_layer(node) for name, node in nodes.items()}
        kinds = {name: (layer.cell, layer.direction, layer.layout) for name, layer in layers.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"nodes of one stack must be alike in cell, direction and layout, got {kinds}")
        (cell, direction, layout), *_ = kinds.values()
        each = list(layers.values())
        stacked = tuple(layer.weights for layer in each)
        stack = Stack(cell, stacked, direction == "reverse", layout == 1, hx=initial_states(each, graph.source.budget))
    for lost in (lost for layer in each for lost in layer.lost):
        warnings.warn(f"{lost}, which is left out", stacklevel=3)
    return stack


def initial_states(layers: list["Layer"], budget: Budget) -> Any:
    """h0 or (h0, c0), [L*D, B, H]; zeros where a node has none, None where no node has any."""
    rows = {array.shape[1] for layer in layers for array in layer.states.values() if array is not None}
    if not rows:
        return None
    if len(rows - {1}) > 1:
        raise ValueError(f"the nodes' constant initial states have batches of {', '.join(map(str, sorted(rows)))}")
    hx = []
    for slot in layers[0].states:
        states = []
        for layer in layers:
            w, state = layer.weights[0].w_hh, layer.states[slot]
            state = np.zeros((len(layer.weights), 1, w.shape[1]), w.dtype) if state is None else state
            states.append(np.broadcast_to(state, (len(state), max(rows), state.shape[2])))
            budget.take(states[-1].nbytes, slot)
        hx.append(np.concatenate(states))
    return tuple(hx) if len(hx) > 1 else hx[0]


class Layer(NamedTuple):
    """A recurrent node, read."""

    cell: str
    direction: str
    layout: int
    weights: tuple[Weights, ...]  # of each direction
    states: dict[str, np.ndarray | None]  # constant and not zero: initial_h, initial_c, [D, B, H]
    lost: list[str]  # what of the node is neither


def read_layer(node: Node) -> Layer:
    """Read a node, or raise an error that says what is wrong with it."""
    op, what = node.op, f"{node.op} {node.name!r}"
    values = {slot: value for slot, name, value in zip(INPUTS, node.inputs, node.values) if name}
    told = node.get("direction", "STRING", b"forward")
    direction = DIRECTIONS.get(told)
    if direction is None:
        raise ValueError(f"{what}: direction is {told!r}, not one of {[*DIRECTIONS.values()]}")
    D, G = 2 if direction == "bidirectional" else 1, len(GATES[op])
    tensors: dict[str, Any] = {
        slot: values.get(slot) for slot in ("W", "R", *(slot for slot in "BP" if slot in values))
    }
    for slot, tensor in tensors.items():
        if not isinstance(tensor, (Constant, np.ndarray)):
            raise ValueError(f"{what}: {slot} is not a constant of the model; fold its constants first")
    shapes = {slot: list(tensor.shape) for slot, tensor in tensors.items()}
    known = [activations for kind, *activations in CELLS if kind == op]
    activations = [name.decode().capitalize() for name in node.get("activations", "STRINGS", ())] or known[0] * D
    one = activations[: len(known[0])]
    cell = CELLS.get((op, *one)) if activations == one * D else None
    reasons = [f"activations {activations}, of which there are {known}"] * (cell is None)
    reasons += ["clip of the activations' inputs"] * ("clip" in node.attributes)
    reasons += [f"attribute {name}" for name in sorted(node.attributes.keys() - ATTRIBUTES)]
    if cell is None or reasons:
        raise NotImplementedError(f"{what} with {shapes} has what no layer here has: {'; '.join(reasons)}")
    I, H = ([0, *shapes[slot]][-1] for slot in "WR")  # a scalar has no size
    H = node.get("hidden_size", "INT", H)
    expected = {"W": [D, G * H, I], "R": [D, G * H, H], "B": [D, 2 * G * H], "P": [D, 3 * H]}
    if any(shapes[slot] != expected[slot] for slot in shapes):
        raise ShapeError(f"{what}, {direction}, has shapes {shapes}; expected {expected} with hidden_size {H}")
    arrays = {slot: read_array(tensor) for slot, tensor in tensors.items()}
    layout = node.get("layout", "INT", 0)
    states, lost = read_states(what, values, D, H, layout)
    states = {slot: states.get(slot) for slot in ("initial_h", "initial_c")[: 2 if op == "LSTM" else 1]}
    every = {**arrays, **{slot: state for slot, state in states.items() if state is not None}}
    dtypes = {slot: array.dtype.name for slot, array in every.items()}
    if len(set(dtypes.values())) > 1 or dtypes["W"] not in (*DTYPES, "bfloat16"):
        raise ValueError(f"{what} has {dtypes}; all must be alike, and one of {', '.join(DTYPES)}")
    definition = apply_modifiers(
        cells.get(cell), coupled=node.get("input_forget", "INT", 0) != 0, peephole="P" in arrays,
        before=op == "GRU" and node.get("linear_before_reset", "INT", 0) == 0,
    )  # fmt: skip

    def ours(array: np.ndarray) -> np.ndarray:
        return reordered(array, GATES[op], definition.gates)

    units = []
    for d in range(D):
        biases = map(ours, np.split(arrays["B"][d], 2)) if "B" in arrays else (None, None)
        w = Weights(ours(arrays["W"][d]), ours(arrays["R"][d]), *biases)
        if definition.per_unit_params:
            w = w._replace(
                units=reordered(arrays["P"][d], PEEPHOLES, "".join(definition.per_unit_params)).reshape(-1, 1, H)
            )
        units.append(w)
    return Layer(definition.name, direction, layout, tuple(units), states, lost)


def read_states(
    what: str, values: dict[str, Any], D: int, H: int, layout: int
) -> tuple[dict[str, np.ndarray | None], list[str]]:
    """The constant initial states that aren't zero, [D, B, H]; and what can't be given back."""
    states: dict[str, np.ndarray | None] = {}
    lost = []
    for slot in ("sequence_lens", "initial_h", "initial_c"):
        value = values.get(slot, DATA)
        if value is None:
            lost.append(f"{what} has {slot} that the model computes from its constants")
        elif isinstance(value, Axes) or value is DATA:
            continue
        elif slot == "sequence_lens":
            lost += sequence_lens(what, read_array(value), values.get("X"), layout)
        else:
            states[slot] = initial_state(what, slot, value, [D, H], layout)
    return states, lost


def read_array(value: Constant | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    array = value.array
    value.source.budget.take(array.nbytes, f"tensor {value.tensor.name!r}")  # nodes may share it, copies don't
    return array


def initial_state(what: str, slot: str, value: Any, sizes: list[int], layout: int) -> np.ndarray | None:
    """[D, B, H] of constants, B = 1 where all rows agree; None of zeros."""
    D, H = sizes
    if len(value.shape) != 3 or [value.shape[layout == 1], value.shape[2]] != sizes:
        expected = [("B", D, H), (D, "B", H)][layout != 1]
        raise ShapeError(f"{what}: {slot} has shape {shape(value)}; expected [{', '.join(map(str, expected))}]")
    state = read_array(value)
    state = state.swapaxes(0, 1) if layout == 1 else state
    if state.shape[1] and (state == state[:, :1]).all():
        state = state[:, :1]
    return np.ascontiguousarray(state) if state.any() else None


def sequence_lens(what: str, lengths: np.ndarray, x: Any, layout: int) -> list[str]:
    """Nothing where all sequences are whole, or that they aren't, or may not be."""
    T = x.shape[layout == 1] if isinstance(x, Axes) and x.shape else None
    whole = lengths.size > 0 and bool((lengths == T).all())
    return [] if whole else [f"{what} has constant sequence_lens {np.unique(lengths)[:8].tolist()}"]


# ---- to ONNX, by torch.onnx.export ----------------------------------------------------------------------------------


def translations() -> dict[Any, Any]:
    """What to give torch.onnx.export as custom_translation_table where it doesn't find gpu_rnn's operator by itself.

    Returns:
        The operator's overload and the function that writes it, which ends in NotImplementedError for random numbers.

    Raises:
        ImportError: without torch and onnxscript.
    """
    torch = require("torch", "torch.onnx.export")
    require("onnxscript", "torch.onnx.export")
    from .weights.onnx_export import translate

    return {torch.ops.gpu_rnn.forward.default: translate}


# ---- to ONNX --------------------------------------------------------------------------------------------------------


def save(layer: Any, path: str | PathLike) -> None:
    """Write `model(layer)` to a file."""
    onnx.save(model(layer), fspath(path))


def model(layer: Any) -> Any:
    """A layer as an ONNX model of opset 17: one node for each layer, named lstm_l0, lstm_l1 and so on.

    Inputs, T and B being whatever they are at a call:
        X [T, B, I], or [B, T, I] of a layer with batch_first.
        initial_h, and initial_c of an LSTM: [L*D, B, H], optional: zeros, or the stack's hx.
    Outputs: Y [T, B, D*H] or [B, T, D*H], Y_h and Y_c [L*D, B, H], as the layer's.

    Args:
        layer: gpu_rnn.RNN, LSTM or GRU, or the stack that `weights` gives.

    Returns:
        onnx.ModelProto, in the weights' dtype. Dropout of every kind is left out: a model is for inference. Where a
        layer's gates are coupled, ONNX's forget gate, which nothing reads, has zeros.

    Raises:
        NotImplementedError: proj_size, cell_clip and zoneout, for which ONNX has no form. TypeError: something else, or
            bfloat16.
    """
    stack = Stack.of(layer)
    op, *activations = next(key for key, cell in CELLS.items() if cell == stack.cell_name)
    attributes: dict[str, Any] = {"hidden_size": stack.H, "direction": stack.direction}
    attributes |= {"activations": activations * stack.D} if op == "RNN" else {}
    attributes |= {"linear_before_reset": int(stack.reset_after)} if op == "GRU" else {}
    attributes |= {"input_forget": 1} if stack.coupled else {}
    nodes, constants = [], {}

    def apply(op: str, inputs: list[str], *outputs: str, name: str = "", **attributes: Any) -> str:
        nodes.append(onnx.helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def constant(name: str, value: Any) -> str:
        constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def theirs(array: np.ndarray) -> np.ndarray:
        return reordered(array, stack.gates, GATES[op])

    letters = "hc" if op == "LSTM" else "h"
    x = apply("Transpose", ["X"], "X_time_first", perm=[1, 0, 2]) if stack.batch_first else "X"
    # An input is optional where it has a value. That can't know B, so it has one row, which is broadcast.
    one = constant("one", [1])
    apply("Shape", [x], "B", start=1, end=2)
    apply("Concat", [one, "B", one], "rows", axis=0)
    states = (None,) * len(letters) if stack.hx is None else stack.hx if isinstance(stack.hx, tuple) else (stack.hx,)
    first = {}
    for letter, state in zip(letters, states):
        state = np.zeros((stack.L * stack.D, 1, stack.H), stack.dtype) if state is None else state
        first[letter] = apply("Expand", [constant(f"initial_{letter}", state), "rows"], f"first_{letter}")

    for k, directions in enumerate(stack.weights):
        name = f"{op.lower()}_l{k}"
        inputs = [x]
        inputs.append(constant(f"W_l{k}", [theirs(w.w_ih) for w in directions]))
        inputs.append(constant(f"R_l{k}", [theirs(w.w_hh) for w in directions]))
        biases = [np.concatenate([theirs(w.b_ih), theirs(w.b_hh)]) for w in directions if w.b_ih is not None]
        inputs += [constant(f"B_l{k}", biases) if biases else "", ""]
        units = constant(f"units_l{k}", np.arange(k * stack.D, (k + 1) * stack.D))
        inputs += [apply("Gather", [first[letter], units], f"initial_{letter}_l{k}") for letter in letters]
        if stack.peephole:
            peepholes = [reordered(w.units.ravel(), "io" if stack.coupled else "ifo", PEEPHOLES) for w in directions]
            inputs.append(constant(f"P_l{k}", peepholes))
        last = [f"Y_{letter}_l{k}" for letter in letters]
        y = apply(op, inputs, f"Y_l{k}", *last, name=name, **attributes)
        turned = apply("Transpose", [y], f"Y_l{k}_turned", perm=[0, 2, 1, 3])
        x = apply("Reshape", [turned, constant("side_by_side", [0, 0, -1])], f"{name}_output")
    for letter in letters:
        apply("Concat", [f"Y_{letter}_l{k}" for k in range(stack.L)], f"Y_{letter}", axis=0)
    turn: dict[str, Any] = {"perm": [1, 0, 2]} if stack.batch_first else {}
    apply("Transpose" if turn else "Identity", [x], "Y", **turn)

    dtype = onnx.helper.np_dtype_to_tensor_dtype(stack.dtype)
    sequence = ["B", "T"] if stack.batch_first else ["T", "B"]

    def value(name: str, *sizes: Any) -> Any:
        return onnx.helper.make_tensor_value_info(name, dtype, sizes)

    sizes = [stack.L * stack.D, "B", stack.H]
    graph = onnx.helper.make_graph(
        nodes, stack.cell,
        [value("X", *sequence, stack.I), *(value(f"initial_{letter}", *sizes) for letter in letters)],
        [value("Y", *sequence, stack.D * stack.H), *(value(f"Y_{letter}", *sizes) for letter in letters)],
        list(constants.values()),
    )  # fmt: skip
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="gpu_rnn"
    )
