"""Weights to and from ONNX, against onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import gpu_rnn
import gpu_rnn.onnx
from gpu_rnn.functional import ShapeError

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Exporting a model")
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("kind", list(KINDS)[:4])
def test_what_torch_exports_is_loaded(kind, bidirectional, rng, tmp_path):
    cls, options = KINDS[kind]
    torch.manual_seed(0)
    layer = getattr(torch.nn, cls.__name__)(I, H, 2, bidirectional=bidirectional, **options).eval()
    x = torch.tensor(draw(rng, T, B, I))
    torch.onnx.export(layer, (x,), tmp_path / "torch.onnx", dynamo=False)
    ours = gpu_rnn.onnx.load(tmp_path / "torch.onnx")
    for name, parameter in layer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], parameter)
    assert_same(flat(ours(x)), flat(layer(x)))


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


def test_what_onnx_has_no_form_for_is_refused():
    with pytest.raises(NotImplementedError, match=r"weights \[2, 6\] beside W, R and b"):
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
    with pytest.raises(ImportError, match=r"gpu_rnn.onnx needs onnx.*pip install 'gpu-rnn\[onnx\]'"):
        importlib.import_module("gpu_rnn.onnx")
