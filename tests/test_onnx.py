"""Weights to and from ONNX, against onnxruntime."""

import logging
import os
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import gpu_rnn
import gpu_rnn.onnx
from gpu_rnn.functional import ShapeError
from gpu_rnn.weights import interchange
from tests.mutated import read_mutated

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
KINDS = {
    "rnn_tanh": (gpu_rnn.RNN, {}),
    "rnn_relu": (gpu_rnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (gpu_rnn.LSTM, {}),
    "gru": (gpu_rnn.GRU, {}),
    "gru_before": (gpu_rnn.GRU, {"reset_after": False}),
}
NODES = {  # operator, its gates in ONNX's order, attributes that make it ours
    "rnn_tanh": ("RNN", 1, {}),
    "rnn_relu": ("RNN", 1, {"activations": ["Relu"]}),
    "lstm": ("LSTM", 4, {}),
    "gru": ("GRU", 3, {"linear_before_reset": 1}),
    "gru_before": ("GRU", 3, {}),  # its default
}
T, B, I, H = 5, 3, 4, 6


def random_layer(kind, seed=0, **arguments):
    torch.manual_seed(seed)
    cls, options = KINDS[kind]
    return cls(I, H, **options, **arguments)


def run(model, *inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs that have a value
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(("X", "initial_h", "initial_c"), inputs)))


def node_model(kind, rng, direction="forward", bias=True, dtype=np.float32, name="cell", **attributes):
    """A model of one random node, as anyone may have written it, and its weights."""
    op, G, own = NODES[kind]
    D = 2 if direction == "bidirectional" else 1
    own = {key: value * D if key == "activations" else value for key, value in own.items()}
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), **({"B": (D, 2 * G * H)} if bias else {})}
    arrays = {slot: (0.4 * rng.standard_normal(sizes)).astype(dtype) for slot, sizes in shapes.items()}
    states = ["initial_h", "initial_c"][: 2 if op == "LSTM" else 1]
    last = ["Y_h", "Y_c"][: len(states)]
    inputs = ["X", "W", "R", "B" if bias else "", "", *states]
    node = helper.make_node(op, inputs, ["Y", *last], name=name, hidden_size=H, direction=direction, **own | attributes)
    kind_of = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def value(name, *sizes):
        return helper.make_tensor_value_info(name, kind_of, sizes)

    graph = helper.make_graph(
        [node], "graph",
        [value("X", "T", "B", I), *(value(state, D, "B", H) for state in states)],
        [value("Y", "T", D, "B", H), *(value(state, D, "B", H) for state in last)],
        [numpy_helper.from_array(array, slot) for slot, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), arrays


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def flat(outputs):
    y, last = outputs
    return [np.asarray(part.detach()) for part in (y, *(last if isinstance(last, tuple) else (last,)))]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, **CLOSE)


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_node_computes_what_onnxruntime_computes(kind, direction, bias, rng):
    model, arrays = node_model(kind, rng, direction, bias)
    D = 2 if direction == "bidirectional" else 1
    x, states = draw(rng, T, B, I), [draw(rng, D, B, H) for _ in range(2 if kind == "lstm" else 1)]
    y, *last = run(model, x, *states)
    stack = gpu_rnn.onnx.weights(model)
    if direction == "reverse":
        function, own = getattr(gpu_rnn, kind.partition("_")[0]), KINDS[kind][1]
        initial = {letter: state[0] for letter, state in zip(("h0", "c0"), states)}
        ours, after = function(x, *stack.weights[0][0][:4], **initial, **own, reverse=stack.reverse)
        after = after if isinstance(after, tuple) else (after,)
        assert_same([ours, *after], [y[:, 0], *(state[0] for state in last)])
    else:
        hx = tuple(map(torch.tensor, states))
        ours = gpu_rnn.onnx.load(model)(torch.tensor(x), hx if kind == "lstm" else hx[0])
        assert_same(flat(ours), [y.swapaxes(1, 2).reshape(T, B, D * H), *last])
    again = constants(gpu_rnn.onnx.model(stack))
    for slot, array in arrays.items():
        assert again[f"{slot}_l0"].tobytes() == array.tobytes()
    assert ("B_l0" in again) == bias


@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_layer_runs_in_onnxruntime_and_comes_back(kind, L, bidirectional, batch_first, rng, tmp_path):
    layer = random_layer(kind, num_layers=L, bidirectional=bidirectional, batch_first=batch_first, bias=L == 2)
    gpu_rnn.onnx.save(layer, tmp_path / "layer.onnx")
    model = onnx.load(tmp_path / "layer.onnx")
    onnx.checker.check_model(model, full_check=True)
    x, D = draw(rng, *((B, T) if batch_first else (T, B)), I), 1 + bidirectional
    states = [draw(rng, L * D, B, H) for _ in range(2 if kind == "lstm" else 1)]
    hx = tuple(map(torch.tensor, states)) if kind == "lstm" else torch.tensor(states[0])
    assert_same(run(model, x, *states), flat(layer(torch.tensor(x), hx)))
    assert_same(run(model, x), flat(layer(torch.tensor(x))))
    again = gpu_rnn.onnx.load(tmp_path / "layer.onnx")
    assert (type(again), again.num_layers, again.bidirectional, again.bias) == (type(layer), L, bidirectional, L == 2)
    for name, parameter in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)
    assert gpu_rnn.onnx.model(again) == gpu_rnn.onnx.model(layer) or batch_first
    assert again.weight_hh_l0.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_is_kept(dtype):
    layer = random_layer("gru", dtype=dtype)
    model = gpu_rnn.onnx.model(layer)
    onnx.checker.check_model(model, full_check=True)
    assert torch.equal(gpu_rnn.onnx.load(model).weight_ih_l0, layer.weight_ih_l0)


EXPORTS = {  # arguments of torch.onnx.export
    "dynamo": {"verbose": False},
    "dynamo, any size": {"verbose": False, "dynamic_shapes": ({0: torch.export.Dim("a"), 1: torch.export.Dim("b")},)},
    "traced": {"dynamo": False},
    "traced, any size": {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": [0, 1]}},
}


def exported(module, x, path, how):
    logging.disable(logging.WARNING)  # of libraries that the exporter misses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (x,), path, **EXPORTS[how])
    finally:
        logging.disable(logging.NOTSET)
    return path


CASES = [(kind, bidirectional, "traced") for kind in list(KINDS)[:4] for bidirectional in (False, True)]
CASES += [(kind, bidirectional, "dynamo") for kind in ("lstm", "gru") for bidirectional in (False, True)]
CASES += [("lstm", True, "dynamo, any size"), ("lstm", True, "traced, any size")]


@pytest.mark.parametrize(("kind", "bidirectional", "how"), CASES)
def test_what_torch_exports_is_loaded(kind, bidirectional, how, rng, tmp_path):
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    batch_first = {"batch_first": True} if bidirectional else {}
    layer = getattr(torch.nn, cls.__name__)(I, H, 2, bidirectional=bidirectional, **options, **batch_first).eval()
    x = torch.tensor(draw(rng, T, B, I))
    ours = gpu_rnn.onnx.load(exported(layer, x, tmp_path / "torch.onnx", how))
    assert ours.state_dict().keys() == layer.state_dict().keys()
    for name, parameter in layer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter)
    ours.batch_first = layer.batch_first  # the exporter turns the axes in nodes of its own
    assert_same(flat(ours(x)), flat(layer(x)))


class FromLearnedStates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(I, H, 2)
        self.h0, self.c0 = (torch.nn.Parameter(torch.randn(2, 1, H)) for _ in range(2))

    def forward(self, x):
        return self.lstm(x, tuple(state.expand(-1, x.shape[1], -1).contiguous() for state in (self.h0, self.c0)))


@pytest.mark.parametrize("how", EXPORTS)
def test_learned_initial_states_are_given_back(how, rng, tmp_path):
    torch.manual_seed(0)
    module, x = FromLearnedStates().eval(), torch.tensor(draw(rng, T, B, I))
    path = exported(module, x, tmp_path / "learned.onnx", how)
    with pytest.warns(UserWarning, match=r"constant initial states \[2, 1, 6\].*take hx from weights"):
        layer = gpu_rnn.onnx.load(path)
    stack = gpu_rnn.onnx.weights(path)
    hx = tuple(torch.tensor(state).expand(-1, B, -1) for state in stack.hx)
    assert_same(flat(layer(x, hx)), flat(module(x)))
    again = gpu_rnn.onnx.model(stack)  # and are written as they were
    assert_same(run(again, x.numpy()), flat(module(x)))
    for state, same in zip(gpu_rnn.onnx.weights(again).hx, stack.hx):
        assert state.tobytes() == same.tobytes()


@pytest.mark.parametrize("rows", ["alike", "different"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_constant_initial_states_are_given_back(kind, rows, rng):
    model, _ = node_model(kind, rng, "bidirectional")
    x, states = draw(rng, T, B, I), []
    for name in [value.name for value in model.graph.input[1:]]:
        states.append(np.broadcast_to(draw(rng, 2, 1 if rows == "alike" else B, H), (2, B, H)))
        model.graph.initializer.append(numpy_helper.from_array(states[-1], name))
    del model.graph.input[1:]
    y, *last = run(model, x)
    with pytest.warns(UserWarning, match="constant initial states"):
        layer = gpu_rnn.onnx.load(model)
    hx = gpu_rnn.onnx.weights(model).hx
    hx = tuple(torch.tensor(state).expand(2, B, H) for state in (hx if kind == "lstm" else (hx,)))
    ours = layer(torch.tensor(x), hx if kind == "lstm" else hx[0])
    assert_same(flat(ours), [y.swapaxes(1, 2).reshape(T, B, 2 * H), *last])


def test_what_is_no_constant_state_gives_no_warning(rng):
    zeros, _ = node_model("lstm", rng)
    zeros.graph.initializer.append(numpy_helper.from_array(np.zeros((1, B, H), np.float32), "initial_c"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu_rnn.onnx.weights(zeros).hx is None
        gpu_rnn.onnx.load(zeros)
    wrong, _ = node_model("gru", rng)
    wrong.graph.initializer.append(numpy_helper.from_array(np.ones((2, B, H), np.float32), "initial_h"))
    with pytest.raises(ShapeError, match=r"initial_h has shape \[2, 3, 6\]; expected \[1, B, 6\]"):
        gpu_rnn.onnx.load(wrong)


def test_what_a_layer_leaves_out_is_said(rng):
    model, _ = node_model("gru", rng)
    model.graph.node[0].input[4] = "lengths"
    model.graph.initializer.append(numpy_helper.from_array(np.array([5, 5, 2], np.int32), "lengths"))
    with pytest.warns(UserWarning, match=r"GRU 'cell' has constant sequence_lens \[2, 5\], which is left out"):
        gpu_rnn.onnx.load(model)
    model, _ = node_model("gru", rng)
    model.graph.node.insert(0, helper.make_node("Sin", ["one"], ["initial_h"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, B, H), np.float32), "one"))
    del model.graph.input[1:]
    with pytest.warns(
        UserWarning, match="GRU 'cell' has initial_h that the model computes from its constants, which is"
    ):
        gpu_rnn.onnx.load(model)
    model.graph.node[1].attribute.append(helper.make_attribute("attention", 1))
    with pytest.raises(NotImplementedError, match="attribute attention"):
        gpu_rnn.onnx.load(model)


def wrapped(model, wrapper):
    """The node of a model within a body or a function. X and the weights are read from outside of it."""
    graph = model.graph
    node = graph.node[0]
    del graph.node[:]
    for value in graph.input[1:]:  # initial states: none
        node.input[node.input[:].index(value.name)] = ""
    del graph.input[1:], graph.output[1:]
    del node.output[1:]
    constants = [tensor for tensor in graph.initializer if tensor.name == "W"]

    def constant(name, value):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))
        return name

    def body(inputs=(), outputs=(), **own):
        return helper.make_graph([node], "body", list(inputs), [*outputs, graph.output[0]], **own)

    kind_of = graph.output[0].type.tensor_type.elem_type
    match wrapper:
        case "If":
            graph.initializer.remove(constants[0])
            other = helper.make_node("Expand", ["zero", "four"], ["Y"])
            constant("zero", np.float32(0)), constant("four", [1, 1, 1, 1])
            branches = {"then_branch": body(initializer=constants), "else_branch": helper.make_graph(
                [other], "other", [], [graph.output[0]])}  # fmt: skip
            graph.node.append(helper.make_node("If", [constant("condition", True)], ["Y"], name="outer", **branches))
        case "Loop":
            inputs = [helper.make_tensor_value_info("n", 7, []), helper.make_tensor_value_info("go", 9, [])]
            looped = body(inputs, [helper.make_tensor_value_info("go_on", 9, [])])
            looped.node.append(helper.make_node("Identity", ["go"], ["go_on"]))
            inputs = [constant("rounds", 1), constant("condition", True)]
            graph.node.append(helper.make_node("Loop", inputs, ["stacked"], name="outer", body=looped))
            graph.node.append(helper.make_node("Squeeze", ["stacked", constant("axis", [0])], ["Y"]))
        case "Scan":
            node.input[0] = "slice"
            inputs = [helper.make_tensor_value_info("slice", kind_of, ["T", "B", I])]
            graph.node.append(helper.make_node("Unsqueeze", ["X", constant("axis", [0])], ["sliced"]))
            scan = {"body": body(inputs), "num_scan_inputs": 1}
            graph.node.append(helper.make_node("Scan", ["sliced"], ["stacked"], name="outer", **scan))
            graph.node.append(helper.make_node("Squeeze", ["stacked", "axis"], ["Y"]))
        case "function":
            hidden = next(attribute for attribute in node.attribute if attribute.name == "hidden_size")
            hidden.ref_attr_name, hidden.i = "units", 0
            hidden.ClearField("i")
            imports = [helper.make_opsetid("", 17)]
            model.functions.append(
                helper.make_function("mine", "Cell", ["X", "W", "R", "B"], ["Y"], [node], imports, ["units"])
            )
            model.opset_import.append(helper.make_opsetid("mine", 1))
            inputs = ["X", "W", "R", "B"]
            graph.node.append(helper.make_node("Cell", inputs, ["Y"], name="outer", domain="mine", units=H))
    return model


@pytest.mark.parametrize(
    ("wrapper", "name"),
    [("If", "outer/then_branch/cell"), ("Loop", "outer/body/cell"), ("Scan", "outer/body/cell"),
     ("function", "outer/cell")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_nodes_in_bodies_and_functions_are_loaded(kind, wrapper, name, rng):
    model, x = wrapped(node_model(kind, rng)[0], wrapper), draw(rng, T, B, I)
    (y,) = run(model, x)
    for node in (None, name, "cell"):
        np.testing.assert_allclose(gpu_rnn.onnx.load(model, node)(torch.tensor(x))[0].detach(), y[:, 0], **CLOSE)
    with pytest.raises(ValueError, match=f"no recurrent layer 'other'; it has: {name}"):
        gpu_rnn.onnx.load(model, "other")


def test_a_stack_of_functions_is_one(rng):
    """Each call is a layer, as exporters that keep modules as functions write it."""
    layer, node = random_layer("gru", num_layers=2), helper.make_node
    nodes = [
        node("GRU", ["X", "W", "R", "B"], ["Y"], name="gru", hidden_size=H, linear_before_reset=1),
        node("Constant", [], ["axis"], value_ints=[1]),
        node("Squeeze", ["Y", "axis"], ["out"]),
    ]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "Layer", ["X", "W", "R", "B"], ["out"], nodes, imports)
    saved = gpu_rnn.onnx.model(layer).graph.initializer
    calls = [node("Layer", [x, *(f"{slot}_l{k}" for slot in "WRB")], [y], name=f"layer{k}", domain="mine")
             for k, x, y in ((0, "X", "between"), (1, "between", "Y"))]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, 1, ["T", "B", size]) for name, size in (("X", I), ("Y", H))]
    graph = helper.make_graph(
        calls, "graph", ends[:1], ends[1:], [t for t in saved if t.name[:2] in ("W_", "R_", "B_")]
    )
    imports.append(helper.make_opsetid("mine", 1))
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[function])
    x, ours = draw(rng, T, B, I), gpu_rnn.onnx.load(model)
    assert ours.num_layers == 2
    np.testing.assert_allclose(ours(torch.tensor(x))[0].detach(), run(model, x)[0], **CLOSE)
    with pytest.raises(ValueError, match=r"several recurrent layers 'gru'; it has: layer0/gru, layer1/gru"):
        gpu_rnn.onnx.load(model, "gru")


BETWEEN = {  # operators and their constants from Y [T, 1, B, H] to X [T, B, H], T = 5, B = 3, H = 6
    "Squeeze": [("Squeeze", [1])],
    "Squeeze of all": [("Squeeze", None)],
    "Reshape": [("Reshape", [5, 3, 6])],
    "Reshape with -1": [("Reshape", [5, -1, 6])],
    "Reshape of all": [("Reshape", [-1]), ("Reshape", [5, 3, 6])],
    "Identity": [("Identity", None), ("Squeeze", [1])],
    "turned twice": [("Transpose", [2, 1, 0, 3]), ("Squeeze", [1]), ("Transpose", [1, 0, 2])],
    "turned and cut": [("Transpose", [2, 1, 0, 3]), ("Reshape", [3, 5, 6]), ("Transpose", [1, 0, 2])],
    "Unsqueeze": [("Squeeze", [1]), ("Unsqueeze", [0]), ("Reshape", [5, 3, 6])],
}
NO_STACK = {
    "turned by Reshape": [("Transpose", [2, 1, 0, 3]), ("Reshape", [5, 3, 6])],
    "units among time steps": [("Transpose", [3, 1, 2, 0]), ("Reshape", [5, 3, 6])],
    "another operator": [("Relu", None), ("Squeeze", [1])],
}


@pytest.mark.parametrize("between", [*BETWEEN, *NO_STACK])
def test_a_stack_is_known_by_what_lies_between(between, rng):
    first, _ = node_model("gru", rng, name="first")
    second = helper.make_node("GRU", ["x", "W2", "R", "B"], ["Y2"], name="second", hidden_size=H, linear_before_reset=1)
    graph, value = first.graph, "Y"
    del graph.input[1:], graph.output[:]
    graph.node[0].input[5] = ""
    graph.input[0].CopyFrom(helper.make_tensor_value_info("X", 1, [T, B, I]))
    graph.initializer.append(numpy_helper.from_array(0.4 * draw(rng, 1, 3 * H, H), "W2"))
    for k, (op, sizes) in enumerate((BETWEEN | NO_STACK)[between]):
        inputs, own = [value], {"perm": sizes} if op == "Transpose" else {}
        if sizes is not None and not own:
            inputs.append(f"sizes{k}")
            graph.initializer.append(numpy_helper.from_array(np.array(sizes), f"sizes{k}"))
        value = f"value{k}"
        graph.node.append(helper.make_node(op, inputs, [value], **own))
    second.input[0] = value
    graph.node.append(second)
    graph.output.append(helper.make_tensor_value_info("Y2", 1, [T, 1, B, H]))
    x = draw(rng, T, B, I)
    (y,) = run(first, x)
    ours = gpu_rnn.onnx.load(first, ["first", "second"])(torch.tensor(x))[0].detach()
    assert np.allclose(ours, y[:, 0], **CLOSE) == (between in BETWEEN)
    if between in BETWEEN:
        assert gpu_rnn.onnx.load(first).num_layers == 2
    else:
        with pytest.raises(ValueError, match="no single recurrent layer or stack"):
            gpu_rnn.onnx.load(first)


def test_constant_nodes_and_the_layout_are_read(rng):
    model, arrays = node_model("lstm", rng, layout=1)
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    layer = gpu_rnn.onnx.load(model)
    assert layer.batch_first
    assert constants(gpu_rnn.onnx.model(layer))["W_l0"].tobytes() == arrays["W"].tobytes()


def test_several_nodes_are_a_stack_only_where_each_feeds_the_next():
    model = gpu_rnn.onnx.model(random_layer("lstm", num_layers=3))
    assert gpu_rnn.onnx.load(model, "lstm_l1").input_size == H
    assert gpu_rnn.onnx.load(model, ["lstm_l0", "lstm_l1"]).num_layers == 2
    top = next(node for node in model.graph.node if node.name == "lstm_l2")
    top.input[0] = "lstm_l0_output"
    with pytest.raises(ValueError, match=r"no single recurrent layer or stack.*: lstm_l0, lstm_l1, lstm_l2"):
        gpu_rnn.onnx.load(model)
    between = gpu_rnn.onnx.model(random_layer("lstm", num_layers=2))
    next(node for node in between.graph.node if node.op_type == "Transpose").attribute[0].ints[:] = [2, 0, 1, 3]
    with pytest.raises(ValueError, match="no single recurrent layer or stack"):
        gpu_rnn.onnx.load(between)


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("lstm", {"activations": ["Sigmoid", "Tanh", "Relu"]}, r"activations \['Sigmoid', 'Tanh', 'Relu'\].*there are"),
        ("rnn_tanh", {"activations": ["Softsign"]}, "Softsign"),
        ("lstm", {"clip": 1.0}, "clip"),
    ],
)
def test_what_no_layer_has_is_refused(kind, attributes, reason, rng):
    model, _ = node_model(kind, rng, **attributes)
    with pytest.raises(NotImplementedError, match=rf"'cell' with .*'W': \[1, .*{reason}"):
        gpu_rnn.onnx.load(model)


@pytest.mark.parametrize("variant", ["peephole", "coupled", "both"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_peepholes_and_coupled_gates_compute_what_onnxruntime_computes(direction, variant, rng):
    model, arrays = node_model("lstm", rng, direction, input_forget=int(variant != "peephole"))
    D = 2 if direction == "bidirectional" else 1
    if variant != "coupled":
        arrays["P"] = draw(rng, D, 3 * H)
        model.graph.node[0].input.append("P")
        model.graph.initializer.append(numpy_helper.from_array(arrays["P"], "P"))
    x, states = draw(rng, T, B, I), [draw(rng, D, B, H) for _ in range(2)]
    y, *last = run(model, x, *states)
    stack = gpu_rnn.onnx.weights(model)
    assert (stack.coupled, stack.peephole) == (variant != "peephole", variant != "coupled")
    for d, w in enumerate(stack.weights[0]):
        peephole = w.units.ravel() if stack.peephole else None
        own = {"coupled": stack.coupled, "peephole": peephole, "reverse": stack.reverse or d == 1}
        ours, (hT, cT) = gpu_rnn.lstm(x, *w[:4], h0=states[0][d], c0=states[1][d], **own)
        assert_same([ours, hT, cT], [y[:, d], last[0][d], last[1][d]])
    again = constants(gpu_rnn.onnx.model(stack))
    for slot, array in arrays.items():
        expected = array.reshape(D, -1, 3 if slot == "P" else 4, H, *array.shape[2:]).copy()
        expected[:, :, 2] *= not stack.coupled  # nothing reads the forget gate
        np.testing.assert_array_equal(again[f"{slot}_l0"], expected.reshape(array.shape))


@pytest.mark.parametrize(
    "options", [{"peephole": True}, {"coupled": True}, {"peephole": True, "coupled": True}], ids=str
)
def test_a_saved_lstm_with_variants_runs_in_onnxruntime_and_comes_back(options, rng, tmp_path):
    dropout = {"recurrent_dropout": 0.5, "input_dropout": 0.5, "weight_dropout": 0.5}
    layer = random_layer("lstm", num_layers=2, bidirectional=True, **options, **dropout).eval()
    gpu_rnn.onnx.save(layer, tmp_path / "layer.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "layer.onnx"), full_check=True)
    x = draw(rng, T, B, I)
    assert_same(run(onnx.load(tmp_path / "layer.onnx"), x), flat(layer(torch.tensor(x))))
    again = gpu_rnn.onnx.load(tmp_path / "layer.onnx")
    assert all(getattr(again, name) for name in options)
    assert again.state_dict().keys() == layer.state_dict().keys()
    for name, parameter in layer.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)


def test_directions_with_different_activations_are_refused(rng):
    model, _ = node_model("rnn_tanh", rng, "bidirectional", activations=["Tanh", "Relu"])
    with pytest.raises(NotImplementedError, match="'Tanh', 'Relu'"):
        gpu_rnn.onnx.load(model)


def test_what_does_not_fit_is_said_with_its_shapes(rng):
    model, _ = node_model("lstm", rng)
    with pytest.raises(ValueError, match="no recurrent layer 'other'; it has: cell"):
        gpu_rnn.onnx.load(model, "other")
    model.graph.node[0].attribute.append(helper.make_attribute("direction", "bidirectional"))
    del model.graph.node[0].attribute[1]
    with pytest.raises(ShapeError, match=r"bidirectional, has shapes .*\[1, 24, 4\].*expected .*\[2, 24, 4\]"):
        gpu_rnn.onnx.load(model)
    model, _ = node_model("lstm", rng, "reverse")
    with pytest.raises(NotImplementedError, match=r"\[24, 4\].*reverse"):
        gpu_rnn.onnx.load(model)
    del model.graph.initializer[0]
    with pytest.raises(ValueError, match="LSTM 'cell': W is not a constant"):
        gpu_rnn.onnx.load(model)
    stacked = gpu_rnn.onnx.model(random_layer("gru", num_layers=2))
    with pytest.raises(ShapeError, match=r"layer 1.*\[18, 4\].*expected .*\[G\*H, 6\]"):
        gpu_rnn.onnx.load(stacked, ["gru_l1", "gru_l0"])


@pytest.mark.parametrize("content", [b"no model", "cut", "elsewhere"])
def test_a_file_that_is_no_model_is_said_to_be_none(content, rng, tmp_path):
    path, (model, _) = tmp_path / "broken.onnx", node_model("gru", rng)
    if content == "elsewhere":
        onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
        (tmp_path / "weights").unlink()
    else:
        path.write_bytes(model.SerializeToString()[:-9] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"broken\.onnx can't be read as an ONNX model: "):
        gpu_rnn.onnx.load(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        gpu_rnn.onnx.load(tmp_path / "absent.onnx")


def test_what_is_malformed_within_a_model_is_said(rng):
    model, _ = node_model("gru", rng)
    weights = model.graph.initializer[0]
    for field, value in (("raw_data", b"123"), ("data_type", 99)):
        before = getattr(weights, field)
        setattr(weights, field, value)
        with pytest.raises(ValueError, match=r"tensor 'W' of data type .* and shape \[1, 18, 4\] can't be read"):
            gpu_rnn.onnx.load(model)
        setattr(weights, field, before)
    del weights.dims[:]
    weights.raw_data = weights.raw_data[:4]
    with pytest.raises(ShapeError, match=r"'W': \[\].*expected"):
        gpu_rnn.onnx.load(model)
    model, _ = node_model("gru", rng, "sideways")
    with pytest.raises(ValueError, match="GRU 'cell': direction is b'sideways', not one of"):
        gpu_rnn.onnx.load(model)


def test_large_constants_are_not_read_for_other_nodes(rng, tmp_path, monkeypatch):
    """Nor do they keep a stack from being seen."""
    model, node = gpu_rnn.onnx.model(random_layer("gru", num_layers=2)), helper.make_node
    table = numpy_helper.from_array(np.zeros((1000, 64), np.float32), "table")
    model.graph.initializer.append(table)
    for k in range(9):
        model.graph.node.insert(k, node("Transpose", ["table"], [f"turned{k}"]))
        model.graph.node.insert(k, node("Gather", ["table", "X"], [f"rows{k}"]))
    monkeypatch.setattr("gpu_rnn.weights.onnx_graph.MOST_MOVED", 100_000)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=1 << 16)
    (tmp_path / "w").unlink()  # which has the table alone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu_rnn.onnx.load(tmp_path / "m.onnx").num_layers == 2


def test_a_graph_with_a_circle_is_refused(rng, tmp_path):
    model, _ = node_model("lstm", rng)
    model.graph.node[0].input[0] = "a"
    for nodes in (
        [helper.make_node("Squeeze", ["c"], ["a"], name="s"), helper.make_node("Transpose", ["a"], ["c"], name="t")],
        [helper.make_node("Identity", ["a"], ["a"], name="s")],
        [helper.make_node("If", ["go"], ["a"], name="s", then_branch=helper.make_graph(
            [helper.make_node("Identity", ["a"], ["b"])], "body", [], [helper.make_tensor_value_info("b", 1, [])]))],
    ):  # fmt: skip
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        broken.graph.node.extend(nodes)
        onnx.save(broken, tmp_path / "circle.onnx")
        with pytest.raises(ValueError, match=r"circle\.onnx can't be read .*in a circle: .*s"):
            gpu_rnn.onnx.load(tmp_path / "circle.onnx")
    unsorted = onnx.ModelProto()
    unsorted.CopyFrom(model)
    unsorted.graph.node.append(helper.make_node("Identity", ["X"], ["a"]))
    assert gpu_rnn.onnx.load(unsorted).hidden_size == H


def test_functions_that_never_end_are_refused(rng, monkeypatch):
    monkeypatch.setattr("gpu_rnn.weights.onnx_graph.MOST_CALLED", 5000)

    def function(name, *calls):
        nodes = [helper.make_node(call, ["x"], ["y"], domain="mine") for call in calls]
        return helper.make_function("mine", name, ["x"], ["y"], nodes, [helper.make_opsetid("mine", 1)])

    for functions, why in (
        ([function("f0", "f1"), function("f1", "f0")], "'f0' calls itself"),
        ([function(f"f{k}", f"f{k + 1}", f"f{k + 1}") for k in range(40)], "come to more than 5000 nodes"),
        ([function(f"f{k}", f"f{k + 1}") for k in range(5000)], "'f64' is within 64 others"),
    ):
        model, _ = node_model("lstm", rng)
        model.functions.extend(functions)
        model.graph.node.append(helper.make_node("f0", ["X"], ["z"], domain="mine"))
        with pytest.raises(ValueError, match=why):
            gpu_rnn.onnx.load(model)


def test_data_in_other_files_are_read_from_the_folder_alone(rng, tmp_path):
    (tmp_path / "models").mkdir()
    path, (model, arrays) = tmp_path / "models" / "model.onnx", node_model("gru", rng)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    stack = gpu_rnn.onnx.weights(path)
    assert constants(gpu_rnn.onnx.model(stack))["W_l0"].tobytes() == arrays["W"].tobytes()

    outside = tmp_path / "secret"
    outside.write_bytes((tmp_path / "models" / "weights").read_bytes())
    (tmp_path / "models" / "link").symlink_to(outside)
    (tmp_path / "models" / "folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "models" / "pipe")
    model = onnx.load(path, load_external_data=False)
    for location, why in (
        ("../secret", "not a path within"), (str(outside), "not a path within"), ("x/../../w", "not a path within"),
        ("..\\secret", "not a path within"), ("", "not a path within"), ("link", "link is a link"),
        ("folder/secret", "folder is a link"), ("pipe", "pipe is no file"), (".", "is no file"),
    ):  # fmt: skip
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = location
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=rf"model\.onnx can't be read .*external data are in .*{why}"):
            gpu_rnn.onnx.load(path)


def test_data_in_other_files_need_the_path(rng, tmp_path, monkeypatch):
    model, _ = node_model("gru", rng)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"its data are in 'w'; give the model's path"):
        gpu_rnn.onnx.load(onnx.load("m.onnx", load_external_data=False))
    assert gpu_rnn.onnx.load("m.onnx").hidden_size == H
    for key, value in (("offset", "-4"), ("offset", "999999"), ("length", "8"), ("length", "x")):
        model = onnx.load("m.onnx", load_external_data=False)
        next(entry for entry in model.graph.initializer[0].external_data if entry.key == key).value = value
        (tmp_path / "n.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match=r"n\.onnx can't be read .*tensor 'W'"):
            gpu_rnn.onnx.load("n.onnx")


def test_weights_shared_without_measure_are_refused(rng, monkeypatch):
    model, _ = node_model("gru", rng)
    monkeypatch.setattr(interchange.Budget, "__init__", lambda self, size, slack=0: setattr(self, "left", size))
    model.graph.node.append(helper.make_node("GRU", ["X", "W", "R", "B"], ["Y2"], name="twin", linear_before_reset=1))
    gpu_rnn.onnx.load(model, "cell")
    with pytest.raises(ValueError, match="the whole may take"):
        gpu_rnn.onnx.load(model, ["cell", "twin"])


@pytest.mark.parametrize("how", ["exported", "saved"])
def test_mutated_files_are_read_or_refused(how, rng, tmp_path):
    path = tmp_path / "torch.onnx"
    if how == "exported":
        layer = torch.nn.LSTM(3, 4, 2).eval()
        exported(layer, torch.zeros(T, B, 3), path, "traced")
    else:
        gpu_rnn.onnx.save(gpu_rnn.LSTM(3, 4, 2, bidirectional=True), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_mutated(gpu_rnn.onnx.weights, path.read_bytes(), tmp_path / "mutated.onnx", 250, seed=1) > 10


def replace_attribute(model, name, value):
    attributes = model.graph.node[0].attribute
    for attribute in [attribute for attribute in attributes if attribute.name == name]:
        attributes.remove(attribute)
    attributes.append(helper.make_attribute(name, value))


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: model.graph.node[0].input.__delitem__(slice(None)),
        lambda model: model.graph.initializer[0].dims.__setitem__(0, -1),
        lambda model: model.graph.initializer[1].dims.__setitem__(2, 1 << 40),
        lambda model: replace_attribute(model, "hidden_size", "six"),
        lambda model: replace_attribute(model, "direction", 3),
        lambda model: replace_attribute(model, "activations", [1, 2]),
        lambda model: model.graph.initializer.__delitem__(slice(None)),
        lambda model: setattr(model.graph.initializer[0], "data_type", onnx.TensorProto.INT32),
        lambda model: model.graph.ClearField("node"),
        lambda model: model.ClearField("graph"),
    ],
)
def test_damage_is_a_value_error_with_the_path(damage, rng, tmp_path):
    model, _ = node_model("gru", rng)
    damage(model)
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"broken\.onnx"):
        gpu_rnn.onnx.load(tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"GRU 'cell'|the model has no|tensor 'W'"):
        gpu_rnn.onnx.load(model)


def test_what_onnx_has_no_form_for_is_refused():
    with pytest.raises(NotImplementedError, match=r"weights \[2, 6\] besides W, R and b"):
        gpu_rnn.onnx.model(gpu_rnn.LSTM(I, H, proj_size=2))
    for options in ({"cell_clip": 1.0}, {"zoneout": (0.0, 0.1)}):
        with pytest.raises(NotImplementedError, match=rf"LSTM\(4, 6, .*has {next(iter(options))}, which counts in inf"):
            gpu_rnn.onnx.model(gpu_rnn.LSTM(I, H, **options))
    with pytest.raises(TypeError, match="bfloat16"):
        gpu_rnn.onnx.model(gpu_rnn.GRU(I, H, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"got LSTM; gpu_rnn\.replace_"):
        gpu_rnn.onnx.model(torch.nn.LSTM(I, H))


def test_without_onnx_the_error_says_how_to_get_it(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "gpu_rnn.onnx")
    with pytest.raises(ImportError, match=r"gpu_rnn.onnx needs onnx.*pip install '\.\[onnx\]' in a checkout"):
        importlib.import_module("gpu_rnn.onnx")
