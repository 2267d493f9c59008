"""gpu_rnn's operator as ONNX nodes, for torch.onnx.export(dynamo=True).

The exporter captures a layer as one call of gpu_rnn::forward and looks up how to write that operator in ONNX.
`translate` writes

    LSTM, GRU or RNN    where ONNX's operator computes the same
    Scan                else: a loop over time whose body is the cell's graph (`gpu_rnn.kernels.trace`), so that every
                        cell and modifier that needs no random numbers runs wherever ONNX does

`gpu_rnn.onnx.translations` hands `translate` to the exporter by its public argument, custom_translation_table. That
nothing has to be handed over rests on two private parts of torch (2.9 to 2.13), which only this module touches:

    ONNX_REGISTRY, onnx_impl   where `register` enters `translate`. If torch moves it, an export ends with "No ONNX
                               function found for gpu_rnn.forward", and custom_translation_table is needed
    OpRecorder.nodes, .opset   of the evaluator that is active while a translation runs: where its nodes go, and their
                               version. onnxscript's public functions can't write a node with a variable number of
                               outputs, as Scan is. If torch renames them, every export ends with an AttributeError here
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import evaluator

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.mathematics import RECURRENT_MATMUL
from gpu_rnn.kernels.modifiers import HOLD

from ..autograd.custom_ops import layout_of
from ..autograd.torch_private import ONNX_REGISTRY
from ..core.problem import Run
from .onnx_graph import CELLS, GATES, PEEPHOLES

STANDARD = ("coupled", "peephole", "before", HOLD)  # modifiers that ONNX's operators have
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # dtypes for which onnxruntime has these operators
OPERATORS = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "maximum": "Max", "negative": "Neg",
    "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log",
}  # fmt: skip
BODIES = count()  # numbers of bodies


def register() -> None:
    """Let torch.onnx.export find the translation by itself."""
    import_module(ONNX_REGISTRY).onnx_impl(torch.ops.gpu_rnn.forward.default, no_compile=True)(translate)


class Nodes:
    """The nodes of a graph, or of a loop's body, in the order in which they are added."""

    def __init__(self, nodes: list[ir.Node], version: int, real: ir.DataType, prefix: str = "") -> None:
        """`real`: the dtype of Python's floats among inputs. `prefix`: of values' names in a body, which see those of
        the graph around it, so that the exporter's optimizer would confuse equal ones."""
        self.nodes, self.version, self.real, self.prefix = nodes, version, real, prefix

    def add(self, op: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node -> its output, or a tuple of several. Inputs may be values, None, floats and lists of ints."""
        values = [v if v is None or isinstance(v, ir.Value) else self.constant(v) for v in inputs]
        made = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", op, values, made, num_outputs=outputs, version=self.version))
        results = self.nodes[-1].outputs
        if self.prefix:
            for k, output in enumerate(results):
                output.name = f"{self.prefix}_{len(self.nodes)}_{k}"
        return results[0] if outputs == 1 else tuple(results)

    def constant(self, value: float | Sequence[int]) -> ir.Value:
        dtype = self.real.numpy() if isinstance(value, float) else np.int64
        return self.add("Constant", value=ir.tensor(np.asarray(value, dtype)))

    def slot(self, name: str, columns: int) -> ir.Value:
        """[B, columns], an input of a body."""
        shape = ir.Shape([None, columns])
        return ir.Value(name=f"{self.prefix}_{name}", type=ir.TensorType(self.real), shape=shape)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if value.dtype == dtype else self.add("Cast", value, to=dtype.value)

    def split(self, value: ir.Value, sizes: list[int], axis: int) -> Sequence[ir.Value]:
        return [value] if len(sizes) == 1 else self.add("Split", value, sizes, outputs=len(sizes), axis=axis)

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        return values[0] if len(values) == 1 else self.add("Concat", *values, axis=axis)

    def zeros(self, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        return self.add("ConstantOfShape", list(shape), value=ir.tensor(np.zeros(1, dtype.numpy())))

    def linear(self, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None) -> ir.Value:
        """x [.., I], weight [I, rows] or None where x is the product already, bias [rows] or None."""
        product = x if weight is None else self.add("MatMul", x, weight)
        return product if bias is None else self.add("Add", product, bias)

    def operations(self, recurrent: Callable) -> dict[str, Callable]:
        """What `Graph.run` takes. Operands are values, or floats for a graph's constants."""

        def elementwise(op: str) -> Callable:
            return lambda *operands: self.add(op, *operands)

        def where(condition: Any, a: Any, b: Any) -> Any:
            if isinstance(condition, float):
                return a if condition > 0 else b
            return self.add("Where", self.add("Greater", condition, 0.0), a, b)

        return {name: elementwise(op) for name, op in OPERATORS.items()} | {
            "where": where,
            "rsqrt": lambda a: self.add("Reciprocal", self.add("Sqrt", a)),
            "positive": lambda a: self.cast(self.add("Not", self.add("LessOrEqual", a, 0.0)), self.real),  # 1 of NaN
            "mean": lambda a: a if isinstance(a, float) else self.add("ReduceMean", a, [-1], keepdims=1),
            RECURRENT_MATMUL: recurrent,
        }


def translate(
    cell: str, tensors: Sequence[ir.Value], names: str, reverse: Sequence[int], linked: bool, backend: str,
    precision: str | None, step_exact: bool, heads: int, history: bool, save: bool,
) -> list[ir.Value]:  # fmt: skip
    """Write a call of gpu_rnn::forward, whose arguments these are, as ONNX nodes -> its outputs.

    Backend and precision are the runtime's choice. Raises NotImplementedError, naming the keyword, for what ONNX can't
    express.
    """
    definition = cells.get(cell)
    if definition.uniforms:
        raise NotImplementedError(
            f"{cell} draws random numbers at every time step, by zoneout in training mode, for which ONNX has no "
            "operator; call model.eval() before the export"
        )
    if heads > 1 and definition.kernel_cell.has_reduction:
        raise NotImplementedError(
            f"{cell} with num_heads={heads} takes means over the units of each head, for which the exported loop "
            "has no form; without layer normalization heads are exported"
        )
    directions, real = layout_of(cell, names, reverse, linked).unflatten(tensors), ir.DataType.FLOAT
    if tensors[0].dtype == ir.DataType.DOUBLE:
        real = ir.DataType.DOUBLE
    recorder: Any = evaluator.default()
    nodes = Nodes(recorder.nodes, recorder.opset.version, real)
    if heads > 1:
        directions = [with_dense_weights(nodes, definition, direction, heads) for direction in directions]
    key = operator_of(definition, directions, history)
    if key is None:
        outputs = [loop(nodes, definition, direction, history) for direction in directions]
    elif alike(directions):
        outputs = recurrent(nodes, definition, directions, *key)
    else:
        outputs = [result for direction in directions for result in recurrent(nodes, definition, [direction], *key)]
    return [value for result in outputs for value in result]


def with_dense_weights(nodes: Nodes, cell: cells.Cell, direction: Run, heads: int) -> Run:
    """The run with its recurrent weights [G*H, H/N] as a matrix [G*H, H] that is zero outside of the heads' blocks."""
    w_hh = direction.weights.w_hh
    rows, D = w_hh.shape
    block = np.arange(rows)[:, None] // D % heads == np.arange(heads * D) // D
    within = nodes.add("Constant", value=ir.tensor(block))
    dense = nodes.add("Where", within, nodes.add("Tile", w_hh, [1, heads]), nodes.zeros([1], w_hh.dtype))
    dense.shape, dense.dtype = ir.Shape([rows, heads * D]), w_hh.dtype
    return direction._replace(weights=direction.weights._replace(w_hh=dense))


# ---- ONNX's recurrent operators -------------------------------------------------------------------------------------


def operator_of(cell: cells.Cell, directions: Sequence[Run], history: bool) -> tuple[str, ...] | None:
    """The operator that computes a call, and its activations; None where there is none.

    Its `clip` isn't our cell_clip: it bounds what activations take, not the cell state. Held states are lengths where
    the flags are that.
    """
    base, *modifiers = cell.name.split("+")
    (x, weights, *_), *_ = directions
    fits = not history and weights.w_ih is not None and weights.w_hr is None and x.dtype in FLOATS
    if not fits or not set(modifiers) <= set(STANDARD) or (HOLD in modifiers and not by_lengths(weights.flags)):
        return None
    return next((key for key, name in CELLS.items() if name == base), None)


def by_lengths(flags: ir.Value) -> bool:
    """Whether flags are lengths [B]: one of [T, B] has a rank of two."""
    return flags.shape is not None and len(flags.shape) == 1


def alike(directions: Sequence[Run]) -> bool:
    """Whether directions are one node's: both read the same x and lengths."""
    (x, weights, *_), *others = directions
    return all(same(x, d.x) and same(weights.flags, d.weights.flags) for d in others)


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values are computed alike, as each direction of a layer casts and masks its x by itself."""
    if a is b or a is None or b is None:
        return a is b
    p, q = a.producer(), b.producer()
    if p is None or q is None or (p.op_type, a.index(), len(p.inputs)) != (q.op_type, b.index(), len(q.inputs)):
        return False
    told = [{name: attribute.value for name, attribute in node.attributes.items()} for node in (p, q)]
    if p.op_type == "Constant":
        return all(np.array_equal(np.asarray(told[0][name]), np.asarray(told[1][name])) for name in told[0])
    return told[0] == told[1] and all(map(same, p.inputs, q.inputs))


def recurrent(
    nodes: Nodes, cell: cells.Cell, directions: Sequence[Run], op: str, *activations: str
) -> list[list[ir.Value]]:
    """Write LSTM, GRU or RNN -> of each direction y [T, B, H] and the states after."""
    x, weights, *_ = directions[0]
    D, H, gates = len(directions), weights.w_hh.shape[1], GATES[op]

    def reordered(array: ir.Value, ours: str, theirs: str, *columns: int) -> ir.Value:
        """[G*H, *columns] with a block for each of our gates -> the same for other gates, zeros where there is none."""
        if ours == theirs:
            return array
        if len(ours) < len(theirs):
            array = nodes.add("Concat", array, nodes.zeros([H, *columns], x.dtype), axis=0)
        places = [ours.index(gate) if gate in ours else len(ours) for gate in theirs]
        return nodes.add("Gather", array, [place * H + unit for place in places for unit in range(H)], axis=0)

    def each(of: Callable[[Run], ir.Value]) -> ir.Value:
        """[..] of every direction -> [D, ..]."""
        return nodes.concat([nodes.add("Unsqueeze", of(direction), [0]) for direction in directions], 0)

    def biases(direction: Run) -> ir.Value:
        _, _, *both = direction.weights[:4]
        rows = [cell.G * H]
        filled = [nodes.zeros(rows, x.dtype) if b is None else b for b in both]
        return nodes.add("Concat", *[reordered(b, cell.gates, gates) for b in filled], axis=0)

    def peepholes(direction: Run) -> ir.Value:
        return reordered(nodes.add("Reshape", direction.weights.units, [-1]), "".join(cell.per_unit_params), PEEPHOLES)

    first = [each(lambda d, k=k: d.state[k]) for k in range(cell.S)]  # type: ignore[misc]
    lengths = None if weights.flags is None else nodes.cast(weights.flags, ir.DataType.INT32)
    attributes: dict[str, Any] = {"hidden_size": H}
    attributes |= {"direction": "bidirectional" if D == 2 else "reverse" if directions[0].reverse else "forward"}
    attributes |= {"activations": activations * D} if op == "RNN" else {}
    attributes |= {"linear_before_reset": int("before" not in cell.name)} if op == "GRU" else {}
    attributes |= {"input_forget": 1} if "f" not in cell.gates and op == "LSTM" else {}
    inputs = [
        x, each(lambda d: reordered(d.weights.w_ih, cell.gates, gates, d.weights.w_ih.shape[1])),
        each(lambda d: reordered(d.weights.w_hh, cell.gates, gates, H)),
        None if weights.b_ih is weights.b_hh is None else each(biases), lengths, *first,
        *([each(peepholes)] if cell.per_unit_params else []),
    ]  # fmt: skip
    while inputs[-1] is None:
        inputs.pop()
    y, *last = nodes.add(op, *inputs, outputs=1 + cell.S, **attributes)
    if lengths is not None:  # of an empty row runtimes give zeros
        some = nodes.add("Unsqueeze", nodes.add("Greater", lengths, nodes.zeros([1], ir.DataType.INT32)), [1])
        last = [nodes.add("Where", some, after, before) for after, before in zip(last, first)]
    ones = [1] * D
    of_y = [nodes.add("Squeeze", part, [1]) for part in nodes.split(y, ones, 1)]
    of_states = [[nodes.add("Squeeze", part, [0]) for part in nodes.split(state, ones, 0)] for state in last]
    return [list(result) for result in zip(of_y, *of_states)]


# ---- any cell -------------------------------------------------------------------------------------------------------


def loop(nodes: Nodes, cell: cells.Cell, direction: Run, history: bool) -> list[ir.Value]:
    """Write a Scan -> y [T, B, P], the states after; with a history also the other states after every time step."""
    x, weights, state, reverse = direction
    dtype, real = x.dtype, nodes.real
    wide: list[Any] = [None if w is None else nodes.cast(w, real) for w in weights[:6]]
    w_ih, w_hh, w_hr = [w and nodes.add("Transpose", w, perm=[1, 0]) for w in (*wide[:2], wide[4])]
    b_ih, b_hh, _, units = wide[2:]
    P, G = weights.w_hh.shape[1], cell.G
    H = weights.w_hh.shape[0] // G
    scanned = [nodes.linear(nodes.cast(x, real), w_ih, b_ih), *flags_of(nodes, cell, x, weights.flags)]
    own = [] if units is None else nodes.split(units, [1] * len(cell.per_unit_params), 0)
    fixed = [nodes.add("Squeeze", unit, [0]) for unit in own]  # [1 or B, H]
    of_h = [nodes.split(unit, [P, H - P], -1)[0] for unit in fixed] if P < H else fixed

    body = Nodes([], nodes.version, real, f"{cell.name}_{next(BODIES)}")
    states = [body.slot(f"{letter}_before", P if k == 0 else H) for k, letter in enumerate(cell.states)]
    now = [body.slot("x", G * H), *(body.slot(flag, 1) for flag in cell.flags)]
    blocks = [H] * G

    def product(h_in: ir.Value, gate: float) -> ir.Value:
        bias = None if b_hh is None else nodes.split(b_hh, blocks, 0)[int(gate)]
        return body.linear(h_in, nodes.split(w_hh, blocks, -1)[int(gate)], bias)

    operations = body.operations(product)
    ((h_in,),) = cells.recurrent_input_graph(cell).run(operations, h=states[:1], extra=[*of_h, *now[1:]])
    graph = cells.step_graph(cell)
    graph = replace(graph, outputs=graph.outputs[:1]).pruned()
    (after,) = graph.run(
        operations,
        x=body.split(now[0], blocks, -1),
        h=body.split(body.linear(h_in, w_hh, b_hh), blocks, -1),
        state=(states[0] if w_hr is None else 0.0, *states[1:]),
        extra=[*fixed, *now[1:]],
    )
    after = [
        body.add("Expand", new, body.add("Shape", old)) if symbol.is_broadcast else new
        for new, old, symbol in zip(after, states, graph.outputs[0])
    ]
    if w_hr is not None:
        after[0] = body.add("MatMul", after[0], w_hr)
        if HOLD in cell.flags:
            after[0] = operations["where"](now[1 + cell.flags.index(HOLD)], states[0], after[0])
    states_out = [body.add("Identity", new) for new in (after if history else after[:1])]
    after = [body.add("Identity", new) for new in after]  # a state that stays is an input, which no output may be

    results = nodes.add(
        "Scan", *(nodes.cast(initial, real) for initial in state), *scanned, outputs=len(after) + len(states_out),
        body=ir.Graph([*states, *now], [*after, *states_out], nodes=body.nodes, name=cell.name),
        num_scan_inputs=len(scanned), scan_input_directions=[int(reverse)] * len(scanned),
        scan_output_directions=[int(reverse)] * len(states_out),
    )  # fmt: skip
    last, (y, *others) = results[: len(after)], results[len(after) :]
    return [each if dtype == real else nodes.add("Cast", each, to=dtype.value) for each in (y, *last, *others)]


def flags_of(nodes: Nodes, cell: cells.Cell, x: ir.Value, flags: ir.Value | None) -> list[ir.Value]:
    """[T, B, 1] for each flag of a cell, 0 or 1."""
    if flags is None:
        return []
    if by_lengths(flags):
        T = nodes.add("Squeeze", nodes.add("Shape", x, start=0, end=1))
        t = nodes.add("Unsqueeze", nodes.add("Range", nodes.constant(0), T, nodes.constant(1)), [1])
        raised = [nodes.add("GreaterOrEqual", t, nodes.cast(flags, ir.DataType.INT64))]
    else:
        bits = nodes.cast(flags, ir.DataType.INT64)
        raised = [nodes.add("Mod", nodes.add("Div", bits, [1 << k]), [2]) for k in range(len(cell.flags))]
    return [nodes.add("Unsqueeze", nodes.add("Cast", each, to=nodes.real.value), [-1]) for each in raised]
