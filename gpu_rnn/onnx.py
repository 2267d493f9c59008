"""ONNX's RNN, LSTM and GRU nodes as layers, and layers as ONNX models.

    import gpu_rnn.onnx

    layer = gpu_rnn.onnx.load("model.onnx")    # a node, or nodes that follow each other
    gpu_rnn.onnx.save(layer, "layer.onnx")
    stack = gpu_rnn.onnx.weights("model.onnx")  # the same as NumPy arrays, without torch

Gate orders and biases, of ONNX and of here: docs/importing_weights.md. The operators' definition:
https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html.
"""

from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.weave import weave

from .compat import require
from .exchange import Stack, chosen, reordered
from .functional import ShapeError
from .problem import Weights

onnx = require("onnx", "gpu_rnn.onnx")

OPSET, IR = 17, 8
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
GATES = {"RNN": "a", "LSTM": "iofg", "GRU": "zrn"}  # our letters; ONNX calls g and n by c and h
PEEPHOLES = "iof"
DIRECTIONS = {name.encode(): name for name in ("forward", "reverse", "bidirectional")}
CELLS = {  # operator and activations, the operator's default first
    ("RNN", "Tanh"): "rnn_tanh",
    ("RNN", "Relu"): "rnn_relu",
    ("LSTM", "Sigmoid", "Tanh", "Tanh"): "lstm",
    ("GRU", "Sigmoid", "Tanh"): "gru",
}


# ---- from ONNX ------------------------------------------------------------------------------------------------------


def load(model: Any, node: str | Iterable[str] | None = None) -> Any:
    """A layer with the weights of a recurrent node, or of several that follow each other.

    Args:
        model: onnx.ModelProto, or the path of one. The weights must be constants: initializers or Constant nodes.
        node: a node's name, or the name of an output of it where it has none; or several, from the bottom up. None
            takes all, where each reads what the one below it gives with the directions side by side and nothing else
            between, as `save` and torch.onnx write it.

    Returns:
        gpu_rnn.RNN, LSTM or GRU on the CPU, in the weights' dtype. Its batch_first is the nodes' `layout`. Initial
        states and sequence_lens are data as X is: they go into the layer's call, as hx and as a packed sequence.

    Raises:
        NotImplementedError: other activations, clip, and the reverse direction alone, which `weights` has. ShapeError:
            shapes that don't fit.
        ValueError: no such node, several that aren't a stack, weights that aren't constants; what is no ONNX model.
        TypeError: bfloat16.
    """
    return weights(model, node).module()


def weights(model: Any, node: str | Iterable[str] | None = None) -> Stack:
    """What `load` loads as NumPy arrays in torch's layout and gate order. Arguments and errors are those of `load`."""
    graph = Graph(model)
    nodes = chosen(graph.recurrent, node, graph.chain(), "the model")
    read = {name: graph.read(node) for name, node in nodes.items()}
    kinds = {name: kind for name, (kind, _) in read.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"nodes of one stack must be alike in cell, direction and layout, got {kinds}")
    cell, direction, layout = next(iter(kinds.values()))
    return Stack(cell, tuple(units for _, units in read.values()), direction == "reverse", layout == 1)


def read_file(path: str) -> Any:
    try:
        return onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's and onnx's errors have no other base in common
        raise ValueError(f"{path} can't be read as an ONNX model: {error}") from error


def values(tensor: Any) -> np.ndarray:
    try:
        return onnx.numpy_helper.to_array(tensor)
    except (ValueError, KeyError) as error:
        what = f"tensor {tensor.name!r} of data type {tensor.data_type} and shape {list(tensor.dims)}"
        raise ValueError(f"{what} can't be read: {error}") from error


class Graph:
    """A model's recurrent nodes, its constants, and which node makes what."""

    def __init__(self, model: Any) -> None:
        graph = (read_file(fspath(model)) if isinstance(model, (str, PathLike)) else model).graph
        self.makers = {output: node for node in graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.recurrent = {
            self.name(node): node for node in graph.node if node.op_type in GATES and node.domain in ("", "ai.onnx")
        }

    @staticmethod
    def name(node: Any) -> str:
        return node.name or next(filter(None, node.output), node.op_type)

    def constant(self, name: str) -> np.ndarray | None:
        maker = self.makers.get(name)
        if name in self.constants:
            return values(self.constants[name])
        if maker is not None and maker.op_type == "Constant" and maker.attribute:
            value = onnx.helper.get_attribute_value(maker.attribute[0])
            return values(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
        return None

    def read(self, node: Any) -> tuple[tuple[str, str, int], tuple[Weights, ...]]:
        """(cell, direction, layout) and the weights of each direction; or an error that says what is wrong."""
        op, what = node.op_type, f"{node.op_type} {self.name(node)!r}"
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        inputs = {slot: name for slot, name in zip(INPUTS, node.input) if name}
        direction = DIRECTIONS.get(attributes.get("direction", b"forward"))
        if direction is None:
            raise ValueError(f"{what}: direction is {attributes['direction']!r}, not one of {[*DIRECTIONS.values()]}")
        D, G = 2 if direction == "bidirectional" else 1, len(GATES[op])
        arrays: dict[str, np.ndarray] = {}
        for slot in ("W", "R", *(slot for slot in "BP" if slot in inputs)):
            array = self.constant(inputs.get(slot, ""))
            if array is None:
                raise ValueError(f"{what}: {slot} is not a constant of the model; fold its constants first")
            arrays[slot] = array
        shapes = {slot: list(array.shape) for slot, array in arrays.items()}
        known = [activations for kind, *activations in CELLS if kind == op]
        given = [name.decode().capitalize() for name in attributes.get("activations", ())] or known[0] * D
        one = given[: len(known[0])]
        cell = CELLS.get((op, *one)) if given == one * D else None
        reasons = ["clip of the activations' inputs"] if "clip" in attributes else []
        if cell is None or reasons:
            reasons = [f"activations {given}, of which there are {known}"] * (cell is None) + reasons
            raise NotImplementedError(f"{what} with {shapes} has what no layer here has: {'; '.join(reasons)}")
        I, H = ([0, *shapes[slot]][-1] for slot in "WR")  # a scalar has no size
        H = attributes.get("hidden_size", H)
        expected = {"W": [D, G * H, I], "R": [D, G * H, H], "B": [D, 2 * G * H], "P": [D, 3 * H]}
        if any(shapes[slot] != expected[slot] for slot in shapes):
            raise ShapeError(f"{what}, {direction}, has shapes {shapes}; expected {expected} with hidden_size {H}")
        page = weave(
            cells.get(cell), coupled=attributes.get("input_forget", 0) != 0, peephole="P" in arrays,
            before=op == "GRU" and attributes.get("linear_before_reset", 0) == 0,
        )  # fmt: skip
        cell = page.name

        def ours(array: np.ndarray) -> np.ndarray:
            return reordered(array, GATES[op], page.gates)

        units = []
        for d in range(D):
            biases = map(ours, np.split(arrays["B"][d], 2)) if "B" in arrays else (None, None)
            w = Weights(ours(arrays["W"][d]), ours(arrays["R"][d]), *biases)
            if page.units:
                w = w._replace(units=reordered(arrays["P"][d], PEEPHOLES, "".join(page.units)).reshape(-1, 1, H))
            units.append(w)
        return (cell, direction, attributes.get("layout", 0)), tuple(units)

    def chain(self) -> list[str]:
        """All recurrent nodes from the bottom up, where each feeds the next and only it; else nothing."""
        below = {name: self.below(node) for name, node in self.recurrent.items()}
        above = {source: name for name, source in below.items()}
        names: list[str] = []
        at = above.get(None)
        while at is not None:
            names.append(at)
            at = above.get(at)
        return names if len(names) == len(self.recurrent) else []

    def below(self, node: Any) -> str | None:
        """The recurrent node whose Y, with the directions side by side, is this one's X."""
        steps: list[tuple[str, tuple[int, ...]]] = []
        value = node.input[0]
        while (maker := self.makers.get(value)) is not None and maker.op_type in ("Squeeze", "Transpose", "Reshape"):
            told = [onnx.helper.get_attribute_value(a) for a in maker.attribute if a.name in ("perm", "axes")]
            told += [self.constant(name) for name in maker.input[1:]]
            sizes = told[0] if told and told[0] is not None else ()
            steps.insert(0, (maker.op_type, tuple(np.ravel(sizes).tolist())))
            value = maker.input[0]
        if maker is None or self.name(maker) not in self.recurrent or maker.output[0] != value:
            return None
        match steps:  # from Y [T, D, B, H]
            case [("Squeeze", (1,))] | [("Transpose", (0, 2, 1, 3)), ("Reshape", (0, 0, _))]:
                return self.name(maker)
        return None


# ---- to ONNX --------------------------------------------------------------------------------------------------------


def save(layer: Any, path: str | PathLike) -> None:
    """Write `model(layer)` to a file."""
    onnx.save(model(layer), fspath(path))


def model(layer: Any) -> Any:
    """A layer as an ONNX model of opset 17: one node for each layer, named lstm_l0, lstm_l1 and so on.

    Inputs, T and B being whatever they are at a call:
        X [T, B, I], or [B, T, I] of a layer with batch_first.
        initial_h, and initial_c of an LSTM: [L*D, B, H], optional: zeros.
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
    op, *activations = next(key for key, cell in CELLS.items() if cell == stack.page)
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
    first = {}
    for letter in letters:
        zeros = constant(f"initial_{letter}", np.zeros((stack.L * stack.D, 1, stack.H), stack.dtype))
        first[letter] = apply("Expand", [zeros, "rows"], f"first_{letter}")

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

    states = [stack.L * stack.D, "B", stack.H]
    graph = onnx.helper.make_graph(
        nodes, stack.cell,
        [value("X", *sequence, stack.I), *(value(f"initial_{letter}", *states) for letter in letters)],
        [value("Y", *sequence, stack.D * stack.H), *(value(f"Y_{letter}", *states) for letter in letters)],
        list(constants.values()),
    )  # fmt: skip
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="gpu_rnn"
    )
