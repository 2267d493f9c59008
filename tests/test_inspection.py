"""What `inspect` records is what the formulas say and what the layers give; what `explain` tells is what would run."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import gpu_rnn
from gpu_rnn.backends import dispatch
from gpu_rnn.kernels import cells
from gpu_rnn.tools.explain import problem
from gpu_rnn.tools.inspect import activated

from .conftest import sequence_arrays

FUNCTIONS = {"lstm": gpu_rnn.lstm, "gru": gpu_rnn.gru, "rnn_tanh": gpu_rnn.rnn, "rnn_relu": gpu_rnn.rnn}
PNG = b"\x89PNG\r\n\x1a\n"


def close(ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, strict=True)


def named(name, x, weights, state, **options):
    """A call's arguments by keyword, as a user writes them."""
    arguments = {key: value for key, value in weights._asdict().items() if value is not None}
    arguments |= {letter + "0": array for letter, array in zip(cells.get(name).states, state)}
    arguments |= {"nonlinearity": name.removeprefix("rnn_")} if name.startswith("rnn") else {}
    return {"x": x, **arguments, **options}


# ---- inspect --------------------------------------------------------------------------------------------------------


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def by_hand(name, x, w, state):
    """The formulas as a textbook writes them, one time step after the other."""
    h, *c = state
    steps = []
    for x_t in x:
        a, b = x_t @ w.w_ih.T + w.b_ih, h @ w.w_hh.T + w.b_hh
        if name == "lstm":
            i, f, g, o = np.split(a + b, 4, axis=1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            c = [f * c[0] + i * g]
            h = o * np.tanh(c[0])
            h = h if w.w_hr is None else h @ w.w_hr.T
            steps.append({"i": i, "f": f, "g": g, "o": o, "h": h, "c": c[0]})
        elif name == "gru":
            (xr, xz, xn), (hr, hz, hn) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
            r, z = sigmoid(xr + hr), sigmoid(xz + hz)
            n = np.tanh(xn + r * hn)
            h = (1 - z) * n + z * h
            steps.append({"r": r, "z": z, "n": n, "h": h})
        else:
            h = np.tanh(a + b) if name == "rnn_tanh" else np.maximum(a + b, 0)
            steps.append({"a": h, "h": h})
    return {letter: np.stack([step[letter] for step in steps]) for letter in steps[0]}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "P"), [*((name, None) for name in FUNCTIONS), ("lstm", 3)])
def test_gates_and_states_are_the_formulas(rng, name, P, reverse):
    x, weights, state = sequence_arrays(rng, name, T=5, B=3, I=4, H=6, P=P)
    arguments = named(name, x, weights, state, reverse=reverse)
    inside = gpu_rnn.inspect(FUNCTIONS[name], **arguments)
    expected = by_hand(name, x[::-1] if reverse else x, weights, state)
    assert list(inside) == list(dict.fromkeys(cells.get(name).gates + cells.get(name).states))
    for letter, values in expected.items():
        close(inside[letter], values[::-1] if reverse else values)
    y, last = FUNCTIONS[name](**arguments)
    close(inside["h"], y)
    last = last if isinstance(last, tuple) else (last,)
    for letter, array in zip(cells.get(name).states, last):
        close(inside[letter][0 if reverse else -1], array)


def test_every_cell_shows_its_gates():
    for name in cells.NAMES:
        cell = cells.get(name)
        assert len(set(activated(cell).outputs[1])) == cell.G
    _, gates = activated(cells.get("lstm")).outputs
    assert [gate.op for gate in gates] == ["sigmoid", "sigmoid", "tanh", "sigmoid"]
    states, gates = activated(cells.get("rnn_tanh")).outputs
    assert states == gates, "h itself"


def make(kind, **options):
    torch.manual_seed(3)
    return kind(4, 6, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3, "bidirectional": True, "dropout": 0.5}, {"batch_first": True}]
)
@pytest.mark.parametrize("kind", [gpu_rnn.RNN, gpu_rnn.GRU, gpu_rnn.LSTM, nn.LSTM])
def test_a_layers_states_are_its_outputs(kind, options):
    layer = make(kind, **options)
    L, D = layer.num_layers, 1 + layer.bidirectional
    x, h0, c0 = (torch.randn(*shape, dtype=torch.float64) for shape in [(5, 3, 4), (L * D, 3, 6), (L * D, 3, 6)])
    hx = (h0, c0) if "LSTM" in kind.__name__ else h0
    x = x.transpose(0, 1) if layer.batch_first else x
    inside = gpu_rnn.inspect(layer, x, hx)
    assert layer.training, "the layer stays as it was"
    assert "_run" not in layer.__dict__
    y, last = layer.eval()(x, hx)
    y = y.transpose(0, 1) if layer.batch_first else y
    endings = [f"_l{k}{end}" for k in range(L) for end in ("", "_reverse")[:D]] if L * D > 1 else [""]
    close(np.concatenate([inside["h" + ending] for ending in endings[-D:]], -1), y)
    for letter, states in zip("hc", last if isinstance(last, tuple) else (last,)):
        for ending, state in zip(endings, states, strict=True):
            close(inside[letter + ending][0 if "reverse" in ending else -1], state)
    assert set(inside) == {letter + ending for letter in inside.cell.gates + inside.cell.states for ending in endings}
    assert all(values.shape == (5, 3, 6) and values.dtype == np.float64 for values in inside.values())


def test_a_layers_gates_are_its_functions():
    layer, x = make(gpu_rnn.LSTM, num_layers=2), torch.randn(5, 3, 4, dtype=torch.float64)
    inside = gpu_rnn.inspect(layer, x)
    weights = [[w.detach().numpy() for w in part] for part in layer.all_weights]
    below = gpu_rnn.inspect(gpu_rnn.lstm, x.numpy(), *weights[0])
    above = gpu_rnn.inspect(gpu_rnn.lstm, below["h"], *weights[1])
    for letter in "ifgohc":
        close(inside[letter + "_l0"], below[letter])
        close(inside[letter + "_l1"], above[letter])


@pytest.mark.parametrize("kind", [gpu_rnn.RNNCell, gpu_rnn.GRUCell, gpu_rnn.LSTMCell, nn.GRUCell])
def test_cells_are_layers_of_one_time_step(kind):
    cell, x = make(kind), torch.randn(3, 4, dtype=torch.float64)
    inside, after = gpu_rnn.inspect(cell, x), cell(x)
    assert inside["h"].shape == (1, 3, 6)
    close(inside["h"][0], after[0] if "LSTM" in kind.__name__ else after)
    close(gpu_rnn.inspect(cell, x[1])["h"][:, 0], inside["h"][:, 1])


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_rows_end_in_nan(enforce_sorted):
    layer = make(gpu_rnn.GRU, num_layers=2, bidirectional=True)
    lengths = [5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3]
    x = pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in lengths], enforce_sorted=enforce_sorted)
    h0 = torch.randn(4, 4, 6, dtype=torch.float64)
    inside = gpu_rnn.inspect(layer, x, h0)
    y, last = layer(x, h0)
    y, _ = pad_packed_sequence(y, padding_value=np.nan)
    close(np.concatenate([inside["h_l1"], inside["h_l1_reverse"]], -1), y)
    for row, length in enumerate(lengths):
        close(inside["h_l0"][length - 1, row], last[0, row])
        close(inside["h_l0_reverse"][0, row], last[1, row])
        assert np.isnan(inside["z_l0_reverse"][length:, row]).all()


def test_half_precision_is_inspected_in_float32():
    layer = gpu_rnn.LSTM(4, 6).to(torch.bfloat16)
    x = torch.randn(5, 3, 4, dtype=torch.bfloat16)
    inside = gpu_rnn.inspect(layer, x)
    assert inside["f"].dtype == np.float32
    np.testing.assert_allclose(inside["h"], layer(x)[0].detach().float(), atol=2e-2)


INSIDE = gpu_rnn.inspect(gpu_rnn.RNN(4, 6), torch.ones(5, 3, 4))

BAD = {
    "no layer": (lambda: gpu_rnn.inspect(nn.Linear(4, 6), torch.ones(5, 3, 4)), TypeError, "got Linear(in_features=4"),
    "no function": (lambda: gpu_rnn.inspect(len, []), TypeError, "expected a recurrent layer or a function of gpu_rnn"),
    "an array for a layer": (
        lambda: gpu_rnn.inspect(gpu_rnn.RNN(4, 6), np.ones((5, 3, 4))), TypeError, "RNN takes a torch tensor, got"),
    "input size": (
        lambda: gpu_rnn.inspect(gpu_rnn.RNN(4, 6), torch.ones(5, 3, 7)), gpu_rnn.ShapeError, "has shape [5, 3, 7]"),
    "weights": (
        lambda: gpu_rnn.inspect(gpu_rnn.gru, np.ones((5, 3, 4)), np.ones((18, 5)), np.ones((18, 6))),
        gpu_rnn.ShapeError, "w_ih has shape [18, 5]"),
    "letter": (lambda: INSIDE["f"], KeyError, "'f'; there are a, h"),
    "row": (lambda: INSIDE.plot(row=3), ValueError, "row must be in [0, 3), the batch size; got 3"),
    "labels": (lambda: INSIDE.plot(labels="long label"), ValueError, "one entry per time step, 5; got 10"),
    "too many units": (lambda: INSIDE.plot(units=7), ValueError, "units must be between 1 and H = 6, got 7"),
    "unknown unit": (lambda: INSIDE.plot(units=[0, 6]), ValueError, "units must be in [0, H = 6), got [0, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_figure_has_a_panel_for_each_gate_and_state(tmp_path):
    layer = gpu_rnn.LSTM(4, 6, bidirectional=True, proj_size=2)
    figure = gpu_rnn.inspect(layer, torch.randn(5, 3, 4)).plot(tmp_path / "gates.png", row=2, labels="a b\tc")
    assert (tmp_path / "gates.png").read_bytes().startswith(PNG)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 2 * 6
    assert [tick.get_text() for tick in images[-1].axes.get_xticklabels()] == ["a", "␣", "b", "⇥", "c"]


def test_a_figure_shows_what_is_requested():
    inside = gpu_rnn.inspect(gpu_rnn.RNN(4, 6), torch.randn(5, 3, 4))
    (panel,) = [axes for axes in inside.plot(row=1, units=[4, 0]).axes if axes.images]
    close(panel.images[0].get_array().data, inside["h"][:, 1, [4, 0]].T)
    h = inside["h"][:, 1]
    change = np.abs(np.diff(h, axis=0)).sum(0) / h.std(0)
    (panel,) = [axes for axes in inside.plot(row=1, units=2).axes if axes.images]
    close(panel.images[0].get_array().data, h[:, [change.argmin(), change.argmax()]].T)


# ---- explain --------------------------------------------------------------------------------------------------------

SIZES = {"T": 7, "B": 3, "I": 4, "H": 6}


def test_a_name_is_explained_as_the_dispatcher_does():
    explanation = gpu_rnn.explain("gru", **SIZES, library="numpy", device="cpu", dtype="float64", training=True)
    expected = problem(cells.get("gru"), **SIZES, library="numpy", device="cpu", dtype="float64", training=True)
    assert explanation == dispatch.explain(expected)
    assert str(explanation).startswith("gru T=7 B=3 I=4 H=6 float64 on cpu (numpy)")
    for same in (torch.float32, np.float32, np.dtype("float32")):
        assert gpu_rnn.explain("lstm", **SIZES, dtype=same).problem.dtype == "float32"


def test_a_function_takes_what_an_array_says():
    for x in (np.ones((7, 3, 4)), torch.ones(7, 3, 4, dtype=torch.float64)):
        problem = gpu_rnn.explain(gpu_rnn.rnn, x, H=6).problem
        assert (problem.cell.name, problem.T, problem.B, problem.I, problem.H) == ("rnn_tanh", 7, 3, 4, 6)
        library = type(x).__module__.partition(".")[0]
        assert (problem.dtype, problem.device, problem.library) == ("float64", "cpu", library)
    assert gpu_rnn.explain(gpu_rnn.lstm, (7, 3, 4), H=6, P=2, device="cpu").problem.P == 2


def test_a_forced_backend_is_explained():
    explanation = gpu_rnn.explain("lstm", **SIZES, device="cuda", library="torch", backend="numpy")
    assert explanation.backend is None
    assert "not available for arrays on the GPU" in explanation.reasons["numpy"][0]
    layer = gpu_rnn.LSTM(4, 6, backend="numpy")
    assert gpu_rnn.explain(layer, (7, 3, 4))[0].requested


@pytest.mark.parametrize("kind", [gpu_rnn.LSTM, nn.LSTM])
def test_a_layer_is_explained_part_by_part(kind):
    layer = kind(4, 6, num_layers=2, bidirectional=True, batch_first=True, proj_size=2)
    explanations = gpu_rnn.explain(layer, (3, 7, 4))
    assert [e.problem.I for e in explanations] == [4, 4, 4, 4], "the second layer reads 2 directions of P = 2"
    assert [e.problem.reverse for e in explanations] == [False, True, False, True]
    assert all((e.problem.T, e.problem.B, e.problem.P, e.problem.training) == (7, 3, 2, True) for e in explanations)
    assert explanations == gpu_rnn.explain(layer, torch.empty(3, 7, 4))
    assert str(explanations).count("backend:") == 1, "equal ones are told once"
    with torch.no_grad():
        assert not gpu_rnn.explain(layer, (3, 7, 4))[0].problem.training
    assert gpu_rnn.explain(gpu_rnn.GRU(4, 600), (3, 7, 4))[0].cudnn == "STANDARD"
    assert gpu_rnn.explain(gpu_rnn.GRU(4, 60), (3, 7, 4))[0].cudnn == "PERSIST_STATIC_SMALL_H"


def test_layers_are_told_apart():
    explanations = gpu_rnn.explain(gpu_rnn.GRU(4, 6, num_layers=3), (7, 3, 4))
    assert [e.problem.I for e in explanations] == [4, 6, 6]
    assert str(explanations).count("backend:") == 2
    assert repr(explanations) == str(explanations)


def test_cells_and_packed_rows_are_explained():
    (cell,) = gpu_rnn.explain(gpu_rnn.LSTMCell(4, 6), (3, 4))
    assert (cell.problem.T, cell.problem.B) == (1, 3)
    assert cell.cudnn.startswith("none")
    packed = pack_sequence([torch.ones(n, 4) for n in (9, 8, 8, 1)])
    (explanation,) = gpu_rnn.explain(gpu_rnn.LSTM(4, 6), packed)
    assert (explanation.problem.T, explanation.problem.B) == (9, 4)
    assert explanation.problem.cell.flags == ("hold",), "as padded rows with lengths"
    assert explanation.cudnn == "STANDARD"


def test_autocast_is_explained():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gpu_rnn.explain(gpu_rnn.LSTM(4, 6), (7, 3, 4))[0].problem.dtype == "bfloat16"


UNEXPLAINED = {
    "missing sizes": (("lstm",), {"T": 7, "B": 3}, TypeError, "the sizes T, B, I and H; missing: I, H"),
    "zero": (("lstm",), SIZES | {"T": 0}, gpu_rnn.ShapeError, "T has the size 0; sizes are whole numbers, 1 or larger"),
    "negative": (("gru",), SIZES | {"H": -1}, gpu_rnn.ShapeError, "H has the size -1"),
    "no number": (("gru",), SIZES | {"B": 2.5}, gpu_rnn.ShapeError, "B has the size 2.5"),
    "wide projection": (("lstm",), SIZES | {"P": 6}, gpu_rnn.ShapeError, "P = 6, H = 6; a projection"),
    "unknown cell": (("transformer",), SIZES, ValueError, "unknown cell 'transformer'; there are gru, lstm"),
    "unknown dtype": (("lstm",), SIZES | {"dtype": "int8"}, ValueError, "'int8' is none of float64, float32"),
    "unknown device": (("lstm",), SIZES | {"device": "tpu"}, ValueError, "'tpu' is none of cpu, cuda"),
    "unknown library": (("lstm",), SIZES | {"library": "jax"}, ValueError, "'jax' is none of numpy, torch, cupy"),
    "unknown backend": (("lstm",), SIZES | {"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    "nowhere": (("lstm",), SIZES | {"library": "numpy", "device": "cuda"}, ValueError, "numpy has no arrays on cuda"),
    "rank": ((gpu_rnn.lstm, (3, 4)), {"H": 6}, gpu_rnn.ShapeError, "x has shape [3, 4]; expected [T, B, I]"),
    "twice": ((gpu_rnn.lstm, (7, 3, 4)), {"H": 6, "T": 7}, TypeError, "x already has T"),
    "layer without input": ((gpu_rnn.RNN(4, 6),), {}, TypeError, "explain(layer, x) takes the input or its shape"),
    "layer and sizes": ((gpu_rnn.RNN(4, 6), (7, 3, 4)), {"H": 6}, TypeError, "no other sizes; got H too"),
    "layer and no size": ((gpu_rnn.RNN(4, 6), (7, 0, 4)), {}, gpu_rnn.ShapeError, "x has the size 0 in its shape"),
    "layer and input size": ((gpu_rnn.RNN(4, 6), (7, 3, 5)), {}, gpu_rnn.ShapeError, "input has shape [7, 3, 5]"),
    "no layer": ((nn.Linear(4, 6), (7, 3, 4)), {}, TypeError, "got Linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNEXPLAINED)
def test_bad_questions_are_named(case):
    arguments, options, error, message = UNEXPLAINED[case]
    with pytest.raises(error, match=re.escape(message)):
        gpu_rnn.explain(*arguments, **options)
