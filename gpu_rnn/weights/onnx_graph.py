"""The graph of an ONNX model: its recurrent nodes, the constants they read, and which of them reads which.

Only what concerns recurrent nodes is computed: sizes, and initial states that are made of constants. Data are followed
as `Axes`, so that every way to write a movement of axes is taken for what it does. A file is not trusted: weights come
from the model or from a plain file next to it, and time and memory stay in proportion to their size.
"""

import math
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from os import PathLike, fspath
from pathlib import PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..core.optional_imports import require
from .interchange import Budget

onnx = require("onnx", "gpu_rnn.onnx")

GATES = {"RNN": "a", "LSTM": "iofg", "GRU": "zrn"}  # our letters; ONNX calls g and n by c and h
PEEPHOLES = "iof"
CELLS = {  # operator and activations, the operator's default first
    ("RNN", "Tanh"): "rnn_tanh",
    ("RNN", "Relu"): "rnn_relu",
    ("LSTM", "Sigmoid", "Tanh", "Tanh"): "lstm",
    ("GRU", "Sigmoid", "Tanh"): "gru",
}
DOMAINS = ("", "ai.onnx")
STAND_IN = 211  # the first size that stands for a symbolic one: odd ones from here on are rare among real sizes
MOST_SIZES = 64  # elements of an array that is computed with, rather than moved
MOST_ELEMENTS = 1 << 22  # of an array that is moved
MOST_MOVED = 1 << 24  # elements, of all arrays that are moved
MOST_CALLED = 100_000  # nodes of functions, wherever they are called
MOST_CALLS = 64  # of functions within each other
MOST_AXES = 64


# ---- values ---------------------------------------------------------------------------------------------------------


class Source:
    """Where tensors have their data: in the model, or in files of a folder; and how much may be read."""

    def __init__(self, model: Any, folder: str | None = None) -> None:
        self.folder, self.budget, self.files = folder, Budget(model.ByteSize()), set[str]()

    def path(self, location: str) -> str:
        """A regular file in the model's folder or below, reached without a link; ValueError for others."""
        if self.folder is None:
            raise ValueError(f"its data are in {location!r}; give the model's path, or load its external data first")
        ways = PurePosixPath(location), PureWindowsPath(location)
        if not location or any(way.anchor or ".." in way.parts for way in ways):
            raise ValueError(f"its external data are in {location!r}, which is not a path within the model's folder")
        path = self.folder
        for part in ways[0].parts:
            path = os.path.join(path, part)
            if os.path.islink(path):
                raise ValueError(
                    f"its external data are in {location!r}, and {path} is a link, which is not followed; copy what it "
                    "leads to if you trust it"
                )
        if not os.path.isfile(path):
            raise ValueError(f"its external data are in {location!r}, and {path} is no file")
        if path not in self.files:
            self.files.add(path)
            self.budget.extend(os.path.getsize(path))
        return path


class Constant:
    """A tensor of the model, read when it is needed."""

    def __init__(self, tensor: Any, source: Source) -> None:
        self.tensor, self.source = tensor, source
        self.shape = tuple(tensor.dims)

    @cached_property
    def array(self) -> np.ndarray:
        tensor = self.tensor
        try:
            if min(self.shape, default=0) < 0:
                raise ValueError("a size is negative")
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                return self.external()
            return onnx.numpy_helper.to_array(tensor)
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = f"tensor {tensor.name!r} of data type {tensor.data_type} and shape {list(tensor.dims)}"
            raise ValueError(f"{what} can't be read: {error}") from error

    def external(self) -> np.ndarray:
        """Data in another file."""
        entries = {entry.key: entry.value for entry in self.tensor.external_data}
        location = entries.get("location", "")
        path = self.source.path(location)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.tensor.data_type).newbyteorder("<")
        count, offset, size = math.prod(self.shape), int(entries.get("offset", 0)), os.path.getsize(path)
        length = int(entries.get("length", count * dtype.itemsize))
        if offset < 0 or length != count * dtype.itemsize or offset + length > size:
            raise ValueError(
                f"it takes {count * dtype.itemsize} bytes, and has {length} from byte {offset} on of {location!r}, "
                f"which has {size}"
            )
        self.source.budget.take(length, location)
        return np.fromfile(path, dtype, count, offset=offset).astype(dtype.newbyteorder("=")).reshape(self.shape)


class Factor(NamedTuple):
    """An axis of data where they come from."""

    of: str
    axis: str
    size: int


class Axes:
    """Data of the model, as NumPy's arrays have a shape and can be moved: of each axis, which axes of what it is."""

    def __init__(self, axes: Iterable[Iterable[Factor]]) -> None:
        # an axis of size 1 tells nothing, and comes and goes
        self.axes = tuple(tuple(factor for factor in axis if factor.size != 1) for axis in axes)
        self.shape = tuple(math.prod(factor.size for factor in axis) for axis in self.axes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axes) and self.axes == other.axes

    __hash__ = None  # type: ignore[assignment]

    def transpose(self, order: Sequence[int]) -> "Axes":
        if sorted(order) != list(range(len(self.axes))):
            raise ValueError("no permutation")
        return Axes(self.axes[k] for k in order)

    def reshape(self, shape: Sequence[int]) -> "Axes":
        """ValueError where an axis would be cut into pieces."""
        left = [factor for axis in reversed(self.axes) for factor in reversed(axis)]
        axes: list[list[Factor]] = []
        for size in shape:
            axes.append([])
            while left and math.prod(factor.size for factor in axes[-1]) < size:
                axes[-1].append(left.pop())
        moved = Axes(axes)
        if left or moved.shape != tuple(shape):
            raise ValueError("an axis is cut")
        return moved


class Data:
    """Data of the model, of which no more is known."""


DATA = Data()


class Known(ChainMap[str, Any]):
    """What is known of the values of a graph, by name, None where nothing is: those of the graph around it, too."""

    declared: Mapping[str, Any] = MappingProxyType({})  # ValueInfoProto, by name

    def __missing__(self, name: str) -> None:
        return None

    def __setitem__(self, name: str, value: Any) -> None:
        if name:  # an output without a name is none
            super().__setitem__(name, value)


# ---- nodes ----------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A node with what is known of its inputs."""

    name: str
    op: str
    inputs: tuple[str, ...]
    values: tuple[Any, ...]  # Constant, np.ndarray, Axes, DATA, or None of what is neither
    attributes: dict[str, Any]  # AttributeProto
    graph: int  # which graph it is in

    def get(self, name: str, kind: str, default: Any) -> Any:
        """An attribute of that type; ValueError for another type."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type != onnx.AttributeProto.AttributeType.Value(kind):
            raise ValueError(f"{self.op} {self.name!r}: attribute {name} must be of type {kind}")
        return onnx.helper.get_attribute_value(attribute)


def in_order(nodes: Sequence[Any]) -> list[Any]:
    """The nodes so that each comes after those whose outputs it reads: as they are where they are so.

    ValueError where there is no such order.
    """
    makers = {output: k for k, node in enumerate(nodes) for output in node.output if output}
    before = {k: {makers[name] for name in names_read(node) if name in makers} for k, node in enumerate(nodes)}
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        circle = ", ".join(nodes[k].name or nodes[k].op_type for k in error.args[1])
        raise ValueError(f"nodes read each other's outputs in a circle: {circle}") from error
    if all(max(those, default=-1) < k for k, those in before.items()):
        return list(nodes)
    return [nodes[k] for k in order]


def bodies(node: Any) -> list[tuple[str, Any]]:
    """The graphs in a node's attributes: branches of If, bodies of Loop and Scan."""
    attributes = [a for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [(attribute.name, attribute.g) for attribute in attributes]


def names_read(node: Any) -> set[str]:
    """What a node reads, from within its bodies, too."""
    names = set(node.input)
    for _, graph in bodies(node):
        inside = {output.name for output in graph.output}.union(*map(names_read, graph.node))
        own = {value.name for value in (*graph.input, *graph.initializer)}
        names |= inside - own.union(*(inner.output for inner in graph.node))
    return names


class Graph:
    """A model's recurrent nodes by their names, those in bodies of nodes and in functions included.

    A node in a body is named after the node around it, the branch and a slash, as "if/then_branch/lstm"; one in a
    function after the node that calls it, as "call/lstm".

    Raises ValueError for a graph that has no order, and for functions that call themselves.
    """

    def __init__(self, model: Any) -> None:
        folder = None
        if isinstance(model, (str, PathLike)):
            path = fspath(model)
            folder, model = os.path.dirname(path) or os.curdir, onnx.load(path, load_external_data=False)
        if not isinstance(model, onnx.ModelProto):
            raise TypeError(f"expected onnx.ModelProto or a path, got {type(model).__name__}")
        self.source = Source(model, folder)
        self.functions = {(f.domain, f.name, getattr(f, "overload", "")): f for f in model.functions}
        self.recurrent: dict[str, Node] = {}
        self.sizes: dict[str, int] = {}  # of symbols
        self.graphs = self.called = self.moved = 0
        self.read_graph(model.graph, Known())

    def read_graph(self, graph: Any, known: Known, prefix: str = "", calls: tuple = ()) -> None:
        self.graphs += 1
        known.declared = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        for value in graph.input:
            known[value.name] = self.declared(known, value.name)
        for tensor in graph.initializer:
            known[tensor.name] = Constant(tensor, self.source)
        self.read_nodes(in_order(graph.node), known, self.graphs, prefix, calls, {}, ())

    def read_nodes(
        self, nodes: list[Any], known: Known, graph: int, prefix: str, calls: tuple, attributes: dict[str, Any],
        ends: Iterable[str],
    ) -> None:  # fmt: skip
        """calls: the functions that the nodes are in; attributes: those of the innermost call; ends: what it gives."""
        if calls:
            self.called += len(nodes)
            if self.called > MOST_CALLED:
                raise ValueError(f"functions come to more than {MOST_CALLED} nodes where they are called")
        useful = set(ends)  # the values that recurrent nodes read, or that lead to them
        for proto in reversed(nodes):
            reads = proto.op_type in GATES or self.function(proto) is not None or bodies(proto)
            if reads or not useful.isdisjoint(proto.output):
                useful |= names_read(proto)
        for proto in nodes:
            own = {a.name: attributes.get(a.ref_attr_name) if a.ref_attr_name else a for a in proto.attribute}
            own = {name: attribute for name, attribute in own.items() if attribute is not None}
            label = prefix + (proto.name or next(filter(None, proto.output), proto.op_type))
            values = tuple(known[name] for name in proto.input)
            node = Node(label, proto.op_type, tuple(proto.input), values, own, graph)
            function = self.function(proto)
            if function is not None:
                self.call(function, proto, node, known, calls)
            elif node.op in GATES and proto.domain in DOMAINS:
                self.add(node, proto, known, prefix)
            else:
                for name, body in bodies(proto):
                    self.read_graph(body, known.new_child(), f"{label}/{name}/", calls)
                if not useful.isdisjoint(proto.output):
                    self.move(node, proto, known)

    def function(self, proto: Any) -> Any:
        """The local function that a node calls, or None."""
        return self.functions.get((proto.domain, proto.op_type, getattr(proto, "overload", "")))

    def move(self, node: Node, proto: Any, known: Known) -> None:
        """The outputs of a node that is no recurrent one."""
        results = self.outcome(node) if proto.domain in DOMAINS else None
        if results is None:
            moving = any(isinstance(value, (Axes, Data)) for value in node.values) and node.op not in ("Shape", "Size")
            moving |= bool(bodies(proto))
            results = [self.declared(known, name) if moving else None for name in proto.output]
        for name, value in zip(proto.output, results):
            known[name] = value

    def call(self, function: Any, proto: Any, node: Node, known: Known, calls: tuple) -> None:
        key = (function.domain, function.name, getattr(function, "overload", ""))
        if key in calls or len(calls) == MOST_CALLS:
            what = "calls itself" if key in calls else f"is within {MOST_CALLS} others"
            raise ValueError(f"function {function.name!r} {what}")
        inner = Known()
        for name, value in zip(function.input, node.values):
            inner[name] = value
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        attributes = defaults | node.attributes
        nodes, prefix = in_order(function.node), f"{node.name}/"
        self.read_nodes(nodes, inner, node.graph, prefix, (*calls, key), attributes, function.output)
        for name, output in zip(function.output, proto.output):
            known[output] = inner[name]

    def add(self, node: Node, proto: Any, known: Known, prefix: str) -> None:
        """A recurrent node, under its name or, where another has it, under that of an output."""
        others = (prefix + name for name in (*proto.output, f"{node.op}_{len(self.recurrent)}") if name)
        name = next(name for name in (node.name, *others) if name not in self.recurrent)
        node = self.recurrent[name] = node._replace(name=name)
        for output in proto.output:
            known[output] = DATA
        if proto.output and (y := self.output(node, known)):
            known[proto.output[0]] = Axes(y)

    def output(self, node: Node, known: Known) -> list[list[Factor]] | None:
        """Y [T, D, B, H], or [B, T, D, H] of layout 1."""
        x, weights = node.values[0] if node.values else None, node.values[2] if len(node.values) > 2 else None
        if not isinstance(weights, Constant) or len(weights.shape) != 3:
            return None
        sizes = x.shape[:2] if isinstance(x, Axes) and len(x.shape) == 3 else [self.size(""), self.size("")]
        batch_first = node.get("layout", "INT", 0) == 1
        axes = dict(zip("BT" if batch_first else "TB", sizes)) | {"D": weights.shape[0], "H": weights.shape[2]}
        return [[Factor(node.name, axis, axes[axis])] for axis in ("BTDH" if batch_first else "TDBH")]

    def below(self, node: Node) -> str | None:
        """The recurrent node of the same graph whose Y, with the directions side by side, is this one's X."""
        x = node.values[0] if node.values else None
        if not isinstance(x, Axes) or len(x.axes) != 3:
            return None
        name = next((factor.of for axis in x.axes for factor in axis if factor.of in self.recurrent), "")
        source = self.recurrent.get(name)
        if source is None or source.graph != node.graph:
            return None
        sizes = {factor.axis: factor for axis in x.axes for factor in axis}
        order = "BT" if node.get("layout", "INT", 0) == 1 else "TB"
        side_by_side = Axes([[sizes[axis] for axis in axes if axis in sizes] for axes in (*order, "DH")])
        return name if x == side_by_side and all(factor.of == name for factor in sizes.values()) else None

    def chain(self) -> list[str]:
        """All recurrent nodes from the bottom up, where each feeds the next and only it; else nothing."""
        above = {self.below(node): name for name, node in self.recurrent.items()}
        names: list[str] = []
        at = above.get(None)
        while at is not None:
            names.append(at)
            at = above.get(at)
        return names if len(names) == len(self.recurrent) else []

    def size(self, symbol: str) -> int:
        """What stands for a size that isn't known, the same for the same symbol."""
        return self.sizes.setdefault(symbol or f"#{len(self.sizes)}", STAND_IN + 2 * len(self.sizes))

    def declared(self, known: Known, name: str) -> Axes | Data:
        """A value of which its graph says the shape, or not."""
        tensor = known.declared[name].type.tensor_type if name in known.declared else None
        if tensor is None or not tensor.HasField("shape") or len(tensor.shape.dim) > MOST_AXES:
            return DATA
        sizes = [d.dim_value if d.HasField("dim_value") else self.size(d.dim_param) for d in tensor.shape.dim]
        return Axes([[Factor(name, str(k), size)] for k, size in enumerate(sizes)])

    def outcome(self, node: Node) -> Sequence[Any] | None:
        """The node's outputs where it is a movement of what is known, or reckons with sizes; else None."""
        if node.op == "Constant":
            return [self.constant(attribute) for attribute in node.attributes.values()][:1]
        rule = RULES.get(node.op)
        first, *others = node.values or (DATA,)
        if rule is None or isinstance(first, Data) or any(isinstance(value, (Axes, Data)) for value in others):
            return None
        try:
            untouched = node.op in ("Identity", "Shape")
            values = [value if untouched else self.array(value) for value in node.values]
            with np.errstate(all="ignore"):
                result = rule(node, *values)
            results = result if isinstance(result, list) else [result]
            return [self.counted(value) for value in results]
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError, MemoryError):
            return None  # it can't be followed, or is wrong: either is no concern of a loader

    def array(self, value: Any) -> Any:
        """A constant as an array, others as they are."""
        return self.counted(small(value)).array if isinstance(value, Constant) else value

    def counted(self, value: Any) -> Any:
        """The value; ValueError where it is an array, all those moved are too many, and it is more than some sizes."""
        size = math.prod(value.shape) if isinstance(value, (Constant, np.ndarray)) else 0
        if size > MOST_SIZES:
            if self.moved + size > MOST_MOVED:
                raise ValueError("too many")
            self.moved += size
        return value

    def constant(self, attribute: Any) -> Any:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value" and isinstance(value, onnx.TensorProto):
            return Constant(value, self.source)
        dtypes = {"value_int": "int64", "value_ints": "int64", "value_float": "float32", "value_floats": "float32"}
        return np.asarray(value, dtypes[attribute.name]) if attribute.name in dtypes else None


# ---- movements: the outputs of operators, of arrays and Axes alike where these can follow ---------------------------


def small(value: Any, most: int = MOST_ELEMENTS) -> Any:
    """The value, or ValueError."""
    if math.prod(value.shape) > most:
        raise ValueError("too large")
    return value


def listed(array: np.ndarray) -> list[int]:
    return [int(size) for size in small(array, MOST_SIZES).ravel()]


def told(node: Node, name: str, operand: np.ndarray | None) -> list[int] | None:
    """Sizes or axes, which are an attribute in older versions of an operator and an input in later ones."""
    return node.get(name, "INTS", None) if operand is None else listed(operand)


def reshape(node: Node, x: Any, operand: np.ndarray | None = None) -> Any:
    sizes = list(told(node, "shape", operand) or [])
    if not node.get("allowzero", "INT", 0):
        sizes = [size or x.shape[k] for k, size in enumerate(sizes)]
    if sizes.count(-1) == 1 and (others := -math.prod(sizes)):
        sizes[sizes.index(-1)] = math.prod(x.shape) // others
    return x.reshape(sizes)


def squeeze(node: Node, x: Any, operand: np.ndarray | None = None) -> Any:
    n = len(x.shape)
    axes = told(node, "axes", operand)
    gone = {k for k in range(n) if x.shape[k] == 1} if axes is None else {range(n)[axis] for axis in axes}
    return x.reshape([x.shape[k] for k in range(n) if k not in gone])


def unsqueeze(node: Node, x: Any, operand: np.ndarray | None = None) -> Any:
    axes = told(node, "axes", operand) or []
    rank = len(x.shape) + len(axes)
    new, sizes = {range(rank)[axis] for axis in axes}, iter(x.shape)
    return x.reshape([1 if k in new else next(sizes) for k in range(rank)])


def flatten(node: Node, x: Any) -> Any:
    axis = slice(None, node.get("axis", "INT", 1)).indices(len(x.shape))[1]
    return x.reshape([math.prod(x.shape[:axis]), math.prod(x.shape[axis:])])


def expand(node: Node, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(x.shape, tuple(listed(sizes)))
    return small(np.broadcast_to(x, shape))


def cut(node: Node, x: np.ndarray, *operands: np.ndarray | None) -> np.ndarray:
    names = "starts", "ends", "axes", "steps"
    starts, ends, axes, steps = (told(node, name, one) for name, one in zip(names, (*operands, None, None, None, None)))
    where = [slice(None)] * x.ndim
    for k, (start, end) in enumerate(zip(starts or [], ends or [])):
        where[axes[k] if axes else k] = slice(start, end, steps[k] if steps else None)
    return x[tuple(where)]


def gather(node: Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    listed(indices)
    axis = node.get("axis", "INT", 0)
    return np.take(small(x, MOST_ELEMENTS // max(1, indices.size)), indices, axis)


def concat(node: Node, *parts: np.ndarray) -> np.ndarray:
    small(np.broadcast_to(0, sum(part.size for part in parts)))
    return np.concatenate(parts, node.get("axis", "INT", 0))


def split(node: Node, x: np.ndarray, operand: np.ndarray | None = None) -> list[np.ndarray]:
    sizes = told(node, "split", operand)
    axis, parts = node.get("axis", "INT", 0), min(node.get("num_outputs", "INT", 0), MOST_SIZES)
    return np.split(x, np.cumsum(sizes)[:-1] if sizes else parts, axis)


def reckon(function: Callable) -> Callable:
    """An elementwise operator, of sizes alone."""

    def rule(node: Node, *arrays: np.ndarray) -> np.ndarray:
        if any(small(array, MOST_SIZES).ndim > 1 for array in arrays):
            raise ValueError("no sizes")
        return np.asarray(function(*arrays))

    return rule


def filled(node: Node, sizes: np.ndarray) -> np.ndarray:
    value = node.get("value", "TENSOR", None)
    one = np.zeros((), np.float32) if value is None else Constant(value, Source(value)).array.reshape(())
    return small(np.broadcast_to(one, listed(sizes)))


RULES: dict[str, Callable] = {
    "Identity": lambda node, x: x,
    "Dropout": lambda node, x, ratio=None, training=None: x if training is None or not training.any() else None,
    "Cast": lambda node, x: small(x).astype(onnx.helper.tensor_dtype_to_np_dtype(node.get("to", "INT", 0))),
    "Shape": lambda node, x: np.array(x.shape[node.get("start", "INT", 0) : node.get("end", "INT", None)], np.int64),
    "Transpose": lambda node, x: x.transpose(node.get("perm", "INTS", range(len(x.shape))[::-1])),
    "Reshape": reshape, "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Flatten": flatten, "Expand": expand, "Slice": cut,
    "Gather": gather, "Concat": concat, "Split": split, "ConstantOfShape": filled,
    "Add": reckon(np.add), "Sub": reckon(np.subtract), "Mul": reckon(np.multiply), "Div": reckon(np.floor_divide),
    "Equal": reckon(np.equal), "Where": reckon(np.where),
}  # fmt: skip
