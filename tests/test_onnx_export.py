"""Whole models by torch.onnx.export, run by onnxruntime, against the published rules in a plain float64 loop."""

import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import gpu_rnn
import gpu_rnn.onnx
from gpu_rnn.kernels.mathematics import sigmoid, tanh
from tests import reference_layers
from tests.tolerance import assert_close

STACKED = {"num_layers": 2, "bidirectional": True}
BOTH = {"bidirectional": True}
STANDARD = {  # name of `reference_layers.layer`, its keywords, what a call takes; the nodes it should be
    "lstm": ("lstm", STACKED, [], {"LSTM": 2}),
    "gru": ("gru", STACKED, [], {"GRU": 2}),
    "rnn": ("rnn", STACKED, [], {"RNN": 2}),
    "relu": ("relu", {"bias": False}, [], {"RNN": 1}),
    "lengths": ("lstm", BOTH, ["lengths"], {"LSTM": 1}),
    "gru lengths": ("gru", BOTH, ["lengths"], {"GRU": 1}),
    "rnn lengths": ("rnn", BOTH, ["lengths"], {"RNN": 1}),
    "reset gate before": ("gru before", BOTH, ["lengths"], {"GRU": 1}),
    "peephole": ("lstm", BOTH | {"peephole": True}, ["lengths"], {"LSTM": 1}),
    "coupled": ("lstm", {"coupled": True}, [], {"LSTM": 1}),
    "coupled peephole": ("lstm", BOTH | {"coupled": True, "peephole": True}, [], {"LSTM": 1}),
}
LOOPS = {
    "cell_clip": ("lstm", {"cell_clip": 0.2}, ["lengths"], {"Scan": 1}),
    "all variants": ("lstm", reference_layers.VARIANTS["all variants"] | BOTH, ["left_padding"], {"Scan": 2}),
    "reset": ("lstm", STACKED, ["reset"], {"Scan": 4}),
    "reset state": ("gru", BOTH, ["reset", "reset_state"], {"Scan": 2}),
    "reset and lengths": ("lstm", {}, ["reset", "reset_state", "left_padding", "lengths"], {"Scan": 1}),
    "reset gate before": ("gru before", {}, ["reset"], {"Scan": 1}),
    "layer_norm": ("lstm", BOTH | {"layer_norm": True}, ["lengths"], {"Scan": 2}),
    "gru layer_norm": ("gru", {"layer_norm": True}, [], {"Scan": 1}),
    "projected": ("projected", BOTH, ["lengths"], {"Scan": 2}),
    "gru projected": ("gru projected", {}, ["reset"], {"Scan": 1}),
    "rnn projected": ("rnn projected", {}, ["left_padding", "lengths"], {"Scan": 1}),
    "dropout": (
        "lstm",
        {"zoneout": (0.4, 0.3), "recurrent_dropout": 0.2, "input_dropout": 0.3, "weight_dropout": 0.2},
        [],
        {"Scan": 1},
    ),
}
HALF_DTYPES = {label: STANDARD[label] for label in ("lstm", "reset gate before", "rnn lengths")} | {
    label: LOOPS[label] for label in ("cell_clip", "reset state", "gru projected")
}
GROUPS = {
    "standard": (STANDARD, torch.float32),
    "loops": (LOOPS, torch.float32),
    "half precision": (HALF_DTYPES, torch.float16),
    "float64": ({"lstm": ("lstm", STACKED, [], {"Scan": 4})}, torch.float64),
}
DYNAMIC = torch.export.Dim.DYNAMIC


class Together(nn.Module):
    """Layers that all read the same x."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, calls):
        return [
            layer(x, call["hx"], **{k: v for k, v in call.items() if k != "hx"})
            for layer, call in zip(self.layers, calls)
        ]


def leaves(structure):
    return [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(structure) if leaf is not None]


def export(model, *args, shapes=None, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own
        made = torch.onnx.export(model, args, dynamic_shapes=shapes, dynamo=True, verbose=False, **keywords)
    onnx.checker.check_model(made.model_proto, full_check=True)
    return made.model_proto


def run(model, *args):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [slot.name for slot in session.get_inputs()]
    return session.run(None, {name: leaf.numpy() for name, leaf in zip(names, leaves(args), strict=True)})


def recurrent_nodes(model):
    return Counter(node.op_type for node in model.graph.node if node.op_type in ("LSTM", "GRU", "RNN", "Scan", "Loop"))


def of(layer, modifiers, T, B, seed):
    """x, and what a call takes, for T time steps of B sequences."""
    x, hx, call = reference_layers.inputs(layer, modifiers, seed)
    rng = torch.Generator().manual_seed(seed)

    def resized(state):
        return torch.randn(state.shape[0], B, state.shape[-1], generator=rng)

    call |= {"lengths": torch.randint(0, T + 1, (B,), generator=rng)} if "lengths" in call else {}
    call |= {"left_padding": torch.randint(0, T // 2, (B,), generator=rng)} if "left_padding" in call else {}
    call |= {"reset": torch.rand(T, B, generator=rng) < 0.3} if "reset" in call else {}
    if "lengths" in call:
        call["lengths"][0] = 0
        call["lengths"][1] = T
    return {"hx": reference_layers.as_hx([resized(state) for state in reference_layers.as_tuple(hx)]), **call}


def to(dtype, structure):
    """Floats in another dtype, without gradients."""
    return torch.utils._pytree.tree_map(lambda a: a.detach().to(dtype) if a.is_floating_point() else a, structure)


@pytest.mark.parametrize("group", GROUPS)
def test_onnxruntime_computes_what_the_layers_do(group):
    """One model of many layers, exported for one T and B and run with others."""
    cases, dtype = GROUPS[group]
    layers = [
        reference_layers.layer(name, seed=k, **keywords).eval() for k, (name, keywords, *_) in enumerate(cases.values())
    ]
    model = Together([layer.to(dtype) for layer in layers])
    data = []
    for T, B in ((6, 3), (9, 2)):
        rng = torch.Generator().manual_seed(T)
        calls = [of(layer, case[2], T, B, seed=T + k) for k, (layer, case) in enumerate(zip(layers, cases.values()))]
        data.append(to(dtype, (torch.randn(T, B, reference_layers.I, generator=rng), calls)))
    axes = {
        "hx": {1: DYNAMIC},
        "lengths": {0: DYNAMIC},
        "left_padding": {0: DYNAMIC},
        "reset": {0: DYNAMIC, 1: DYNAMIC},
    }

    def shape(label, value):
        return tuple(axes.get(label, {}) for _ in value) if isinstance(value, tuple) else axes.get(label, {})

    shapes = ({0: DYNAMIC, 1: DYNAMIC}, [{k: shape(k, v) for k, v in call.items()} for call in data[0][1]])
    exported = export(model, *data[0], shapes=shapes)
    assert recurrent_nodes(exported) == sum((Counter(case[3]) for case in cases.values()), Counter())
    for x, calls in data:
        outputs = iter(run(exported, x, calls))
        for label, layer, call in zip(cases, layers, calls):
            with torch.no_grad():
                peer = reference_layers.by_the_rules(layer, x, **call)[:2]
                exact = reference_layers.by_the_rules(
                    layer.double(), *to(torch.float64, (x,)), **to(torch.float64, call)
                )[:2]
            layer.to(dtype)
            for a, b in zip(leaves(exact), leaves(peer), strict=True):
                ours, name = next(outputs), str(dtype).removeprefix("torch.")
                assert ours.dtype == name
                assert_close(ours.astype("float64"), a.numpy(), b.double().numpy(), name, label)
        assert next(outputs, None) is None


# ---- a model of everything else -------------------------------------------------------------------------------------


@gpu_rnn.cell(gates="fn", states="hm", units="p")
def Leaky(x, h, state, units):
    f = sigmoid(x[0] + h[0] + units[0] * state[1])
    m = (1 - f) * state[1] + f * tanh(x[1] + f * h[1])
    return f * m, m


class Model(nn.Module):
    """Ours between layers of torch's: a layer, every state of one, a cell, a function, and a cell of a user's own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(5, 2)
        self.lstm = gpu_rnn.LSTM(4, 3, batch_first=True, bidirectional=True)
        self.states, self.cell, self.own = gpu_rnn.LSTM(6, 4), gpu_rnn.GRUCell(4, 5), Leaky(6, 5)
        self.w_ih, self.w_hh = (nn.Parameter(0.3 * torch.randn(5, n)) for n in (6, 5))

    def forward(self, x):
        y = self.lstm(self.first(x))[0].transpose(0, 1)
        _, _, (_, c) = self.states(y, return_states=True)
        z, _ = gpu_rnn.rnn(y, self.w_ih, self.w_hh, reverse=True)
        own, (_, m) = self.own(y)
        return c, self.last(self.cell(c[0, -1])), z, own, m

    def by_torch(self, x):
        """The same by torch.nn's layers, and loops over time where there is none."""
        x = self.first(x)
        y = self.torch("LSTM", self.lstm, 4, 3, batch_first=True, bidirectional=True)(x)[0].transpose(0, 1)
        states, T = self.torch("LSTMCell", self.states, 6, 4), len(y)
        hc, c = None, []
        for t in range(T):
            hc = states(y[t], hc)
            c.append(hc[1])
        h, z = torch.zeros(y.shape[1], 5, dtype=x.dtype), [None] * T
        for t in reversed(range(T)):
            h = z[t] = torch.tanh(y[t] @ self.w_ih.T + h @ self.w_hh.T)
        own = []
        h = m = torch.zeros(y.shape[1], 5, dtype=x.dtype)
        for t in range(T):
            a = (y[t] @ self.own.weight_ih_l0.T + self.own.bias_ih_l0).chunk(2, -1)
            r = (h @ self.own.weight_hh_l0.T + self.own.bias_hh_l0).chunk(2, -1)
            f = torch.sigmoid(a[0] + r[0] + self.own.weight_p_l0 * m)
            m = (1 - f) * m + f * torch.tanh(a[1] + f * r[1])
            h = f * m
            own.append(h)
        cell = self.torch("GRUCell", self.cell, 4, 5)
        return torch.stack(c)[None], self.last(cell(c[-1])), torch.stack(z), torch.stack(own), m[None]

    @staticmethod
    def torch(name, layer, *sizes, **arguments):
        made = getattr(nn, name)(*sizes, dtype=next(layer.parameters()).dtype, **arguments)
        suffix = "" if name.endswith("Cell") else None
        weights = {k if suffix is None else k.removesuffix("_l0"): v for k, v in layer.state_dict().items()}
        made.load_state_dict(weights)
        return made


ROADS = ["model", "exported program", "translations"]


@pytest.mark.parametrize("road", ROADS)
def test_ours_may_be_anywhere_in_a_model(road, monkeypatch):
    torch.manual_seed(0)
    model, x, shapes = Model().eval(), torch.randn(3, 6, 3), ({0: DYNAMIC, 1: DYNAMIC},)
    if road == "model":
        exported = export(model, x, shapes=shapes)
    elif road == "exported program":
        exported = export(torch.export.export(model, (x,), dynamic_shapes=shapes))
    else:
        from torch.onnx._internal.exporter._torchlib import _torchlib_registry

        others = [meta for meta in _torchlib_registry._registry if "gpu_rnn" not in str(meta.fx_target)]
        monkeypatch.setattr(_torchlib_registry, "_registry", others)
        with pytest.raises(Exception, match=r"No ONNX function found for .*gpu_rnn.forward"):
            export(model, x, shapes=shapes)
        exported = export(model, x, shapes=shapes, custom_translation_table=gpu_rnn.onnx.translations())
    assert recurrent_nodes(exported) == {"LSTM": 1, "Scan": 2, "GRU": 1, "RNN": 1}
    x = torch.randn(2, 9, 3)
    actual = run(exported, x)
    with torch.no_grad():
        peer, exact = model.by_torch(x), model.double().by_torch(x.double())
    for k, (ours, a, b) in enumerate(zip(actual, exact, peer, strict=True)):
        assert_close(ours.astype("float64"), a.numpy(), b.double().numpy(), "float32", f"output {k}")


class Cast(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)[0].float()


def test_a_layer_under_autocast_is_of_its_dtype():
    """bfloat16, for which neither ONNX's older operators nor onnxruntime's are there."""
    torch.manual_seed(0)
    peer, x = nn.LSTM(3, 4, bidirectional=True), torch.randn(6, 2, 3)
    ours = gpu_rnn.LSTM(3, 4, bidirectional=True)
    ours.load_state_dict(peer.state_dict())
    (actual,) = run(export(Cast(ours).eval(), x), x)
    np.testing.assert_allclose(actual, peer(x)[0].detach().numpy(), atol=2e-2)


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (Path(__file__).parents[1] / "docs" / "production.md").read_text(encoding="utf-8")
    guide, _, _ = whole.partition("## Seen by torch's tools")  # from there on a script of its own
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec("\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)), names)
    assert tuple(names["scores"].shape) == (3, 7, 5)
    onnx.checker.check_model("tagger.onnx", full_check=True)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = gpu_rnn.GRU(3, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.layer(packed)[1]


def test_what_onnx_cannot_express_is_refused_with_the_way_out():
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    with pytest.raises(Exception, match=r"draws masks in training mode, by zoneout, weight_dropout.*model\.eval\(\)"):
        export(gpu_rnn.LSTM(3, 4, zoneout=0.1, weight_dropout=0.2).train(), x)
    with pytest.raises(Exception, match="give padded input and lengths="):
        export(Packing().eval(), x, lengths)
    program = torch.export.export(gpu_rnn.LSTM(3, 4, zoneout=0.1).train(), (x,))
    assert any("zoneout" in str(node.args) for node in program.graph.nodes)
    with pytest.raises(Exception, match=r"random numbers|randint"):
        export(program)
