"""What torch's tracers see of a call: an operator, a leaf, or an error; never the numbers of that call alone."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import rnn
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_rnn

LAYERS = [
    ("LSTM", {}), ("LSTM", {"num_layers": 2, "proj_size": 2, "batch_first": True}), ("RNN", {"num_layers": 2}),
    ("GRU", {"bidirectional": True, "num_layers": 2}), ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}),
]  # fmt: skip
every_layer = pytest.mark.parametrize(("kind", "arguments"), LAYERS, ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(25)


def pair(kind, arguments, frozen=False):
    """torch.nn's layer in a model, and ours with its weights."""
    theirs = nn.Sequential(getattr(nn, kind)(3, 4, **arguments)).requires_grad_(not frozen)
    ours = nn.Sequential(getattr(gpu_rnn, kind)(3, 4, **arguments)).requires_grad_(not frozen)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind, T=5, B=2):
    return torch.randn(B, 3) if kind.endswith("Cell") else torch.randn(T, B, 3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def operators(graph):
    return [str(node.target) for node in graph.nodes if "gpu_rnn" in str(node.target)]


# ---- torch.jit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@every_layer
def test_a_traced_model_computes_for_other_inputs_and_sizes(kind, arguments, frozen, recwarn):
    ours, theirs = pair(kind, arguments, frozen)
    traced = torch.jit.trace(ours, inputs(kind))
    assert not [warning for warning in recwarn if issubclass(warning.category, torch.jit.TracerWarning)]
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for run in (traced, torch.jit.load(buffer)):
        for x in (inputs(kind), inputs(kind, T=7, B=3)):
            close(run(x), theirs(x))


def test_a_traced_model_trains():
    ours, theirs = pair("LSTM", {"num_layers": 2})
    x = torch.randn(5, 2, 3)
    traced = torch.jit.trace(ours, torch.zeros(5, 2, 3))
    for model in (traced, theirs):
        model(x)[0].square().sum().backward()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(parameter.grad, expected.grad)


@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "mask"])
@pytest.mark.parametrize(
    "keywords",
    [
        {"layer_norm": True}, {"peephole": True, "cell_clip": 0.5}, {"coupled": True}, {"proj_size": 2},
        {"num_heads": 2, "layer_norm": True, "layer_norm_over": "head"},
    ],
    ids=str,
)  # fmt: skip
def test_a_traced_modifier_is_the_layers(keywords, masked):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = gpu_rnn.LSTM(3, 4, **keywords)

        def forward(self, x, reset, until, h, c):
            return self.layer(x, reset=reset, reset_state=(h, c), **{"mask" if masked else "lengths": until})[0]

    run, P = Model(), keywords.get("proj_size", 4)

    def arguments(T, B):
        lengths = torch.randint(1, T, (B,))
        until = torch.arange(T)[:, None] < lengths if masked else lengths
        return torch.randn(T, B, 3), torch.rand(T, B) < 0.3, until, torch.randn(1, B, P), torch.randn(1, B, 4)

    traced = torch.jit.trace(run, arguments(5, 1), check_trace=False)
    for sizes in ((5, 2), (7, 3)):
        inputs = arguments(*sizes)
        close(traced(*inputs), run(*inputs))


def test_a_traced_function_computes():
    _, theirs = pair("GRU", {})
    weights = [parameter.detach() for parameter in theirs.parameters()]
    x = torch.randn(7, 3, 3)
    traced = torch.jit.trace(lambda x: gpu_rnn.gru(x, *weights)[0], torch.zeros_like(x[:5]))
    close(traced(x), theirs(x)[0])


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)], ids=str)
def test_a_traced_model_takes_packed_input_of_other_lengths(lengths):
    class Model(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, lengths):
            y, last = self.layer(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
            return rnn.pad_packed_sequence(y)[0], last

    ours, theirs = (Model(model[0]) for model in pair("LSTM", {"bidirectional": True}))
    traced = torch.jit.trace(ours, (torch.randn(5, 2, 3), torch.tensor(lengths)))
    for other_lengths in ((5, 5), (2, 5), (4, 7, 1)):
        x = torch.randn(max(other_lengths), len(other_lengths), 3)
        close(traced(x, torch.tensor(other_lengths)), theirs(x, torch.tensor(other_lengths)))


def test_script_is_refused_by_name_and_takes_a_traced_layer():
    ours, theirs = pair("GRU", {})
    with pytest.raises(NotImplementedError, match=r"gpu_rnn\.GRU.*torch\.jit\.trace"):
        torch.jit.script(ours)
    x = torch.randn(7, 3, 3)
    model = nn.Sequential(torch.jit.trace(ours[0], torch.zeros(5, 2, 3)))
    close(torch.jit.script(model)(x), theirs(x))


@gpu_rnn.cell(gates="a", states="h")
def plain(x, h, state):
    return (x[0] + h[0],)


def test_a_function_is_refused_by_script_by_name_and_can_be_traced_for_it():
    _, theirs = pair("GRU", {})
    weights, x = [parameter.detach() for parameter in theirs.parameters()], torch.randn(7, 3, 3)

    def calls_it(x: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor):
        return gpu_rnn.gru(x, w_ih, w_hh)

    refused = {
        "lstm": gpu_rnn.lstm, "gru": calls_it, "rnn": gpu_rnn.rnn, "cell's plain.function": plain.function,
        "stream": gpu_rnn.stream(gpu_rnn.GRU(3, 4)),
    }  # fmt: skip
    for name, what in refused.items():
        with pytest.raises(NotImplementedError, match=rf"gpu_rnn\.{name} .*torch\.jit\.trace"):
            torch.jit.script(what)
    traced = torch.jit.trace(lambda x, *weights: gpu_rnn.gru(x, *weights)[0], (torch.zeros(5, 2, 3), *weights))

    def calls_the_traced(x, w_ih, w_hh, b_ih, b_hh):
        return traced(2 * x, w_ih, w_hh, b_ih, b_hh)

    close(torch.jit.script(calls_the_traced)(x, *weights), theirs(2 * x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it is deprecated in torch
@every_layer
def test_the_old_onnx_exporter_is_refused_by_name(kind, arguments):
    """For a layer in a model, and for a layer alone, to which the exporter passes more than it takes."""
    model, _ = pair(kind, arguments)
    for module in (model, model[0]):
        with pytest.raises(NotImplementedError, match=r"dynamo=True.*gpu_rnn\.restore_"):
            torch.onnx.export(module, (inputs(kind),), io.BytesIO(), dynamo=False)


# ---- torch.fx -------------------------------------------------------------------------------------------------------


@every_layer
def test_a_layer_is_a_leaf_of_fx_as_torchs_is(kind, arguments):
    ours, theirs = pair(kind, arguments)
    graph, expected = torch.fx.symbolic_trace(ours), torch.fx.symbolic_trace(theirs)
    assert [(node.op, node.target) for node in graph.graph.nodes] == [
        (node.op, node.target) for node in expected.graph.nodes
    ]
    x = inputs(kind, T=7)
    close(graph(x), expected(x))


def test_a_leafs_arguments_are_recorded():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([gpu_rnn.LSTM(3, 4)])

        def forward(self, x, h, c, reset):
            return self.inner[0](x * 2, (h, c), reset=reset, return_states=True)[0]

    model = Model()
    inputs = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.rand(5, 2) < 0.5
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(*inputs), model(*inputs))
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert (node.target, set(node.kwargs)) == ("inner.0", {"reset", "return_states"})


class Doubled(gpu_rnn.GRU):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_what_would_be_recorded_twice_is_refused():
    hooked = gpu_rnn.GRU(3, 4)
    hooked.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    wrapped = gpu_rnn.GRU(3, 4)
    inner = wrapped.forward
    wrapped.forward = lambda x: inner(2 * x)
    for model in (nn.Sequential(Doubled(3, 4)), nn.Sequential(hooked), nn.Sequential(wrapped), gpu_rnn.GRU(3, 4)):
        with pytest.raises(torch.fx.proxy.TraceError, match=r"gpu_rnn\..*is_leaf_module"):
            torch.fx.symbolic_trace(model)


def test_a_function_names_the_way_into_fx():
    weights = [parameter.detach() for parameter in gpu_rnn.GRU(3, 4).parameters()]
    with pytest.raises(TypeError, match=r"gpu_rnn.*torch\.fx\.wrap"):
        torch.fx.symbolic_trace(lambda x: gpu_rnn.gru(x, *weights))


# ---- make_fx and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@every_layer
def test_make_fx_records_operators(kind, arguments, frozen):
    ours, theirs = pair(kind, arguments, frozen)
    graph = make_fx(ours)(inputs(kind))
    assert operators(graph.graph)
    x = inputs(kind)
    close(graph(x), theirs(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_with_weights_as_inputs(mode):
    ours, theirs = pair("LSTM", {"num_layers": 2})

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].square().sum()

    inputs = dict(ours.named_parameters()), torch.randn(5, 2, 3)
    graph = make_fx(torch.func.grad(loss), tracing_mode=mode)(*inputs)
    x = torch.randn(5, 2, 3)
    theirs(x)[0].square().sum().backward()
    for name, gradient in graph(inputs[0], x).items():
        close(gradient, theirs.get_parameter(name).grad)


def test_every_mode_sees_an_operator():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen, (ours, theirs), x = [], pair("GRU", {}), torch.randn(5, 2, 3, requires_grad=True)
    with Log():
        y, _ = ours(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert {"gpu_rnn.forward.default", "gpu_rnn.backward.default"} <= set(seen)
    (dx,) = torch.autograd.grad(theirs(x)[0].square().sum(), x, create_graph=True)
    close(ddx, torch.autograd.grad(dx.square().sum(), x)[0])


# ---- what computes at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("look", [lambda f, x: torch.jit.trace(f, x), lambda f, x: make_fx(f)(x), torch.vmap])
def test_what_computes_at_once_is_refused(look):
    def seen(function, x):
        return look(function, x) if look is not torch.vmap else torch.vmap(function)(x[None])

    layer = gpu_rnn.GRU(3, 4).requires_grad_(False)
    stream, weights = gpu_rnn.stream(layer, 2), [*layer.parameters()]
    with pytest.raises(NotImplementedError, match=r"a stream .*layer\.step"):
        seen(lambda x: stream(x), torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match=r"gpu_rnn\.vjp .*torch\.func\.vjp"):
        seen(lambda x: gpu_rnn.vjp(gpu_rnn.gru, x, *weights)[0][0], torch.zeros(5, 2, 3))


@every_layer
def test_vmap_is_member_by_member(kind, arguments):
    ours, theirs = pair(kind, arguments, frozen=True)
    xs = torch.stack([inputs(kind) for _ in range(3)])
    for actual, *expected in zip(leaves(torch.vmap(ours)(xs)), *(leaves(theirs(x)) for x in xs), strict=True):
        close(actual, torch.stack(expected))


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


# ---- JAX ------------------------------------------------------------------------------------------------------------


def test_what_jax_traces_is_refused_by_name():
    jax = pytest.importorskip("jax")
    x, w_ih, w_hh = jax.numpy.ones((5, 2, 3)), jax.numpy.ones((12, 3)), jax.numpy.ones((12, 4))

    def loss(x, w_ih):
        return gpu_rnn.gru(x, w_ih, w_hh)[0].sum()

    transformed = [
        lambda: jax.jit(loss)(x, w_ih),
        lambda: jax.grad(loss)(x, w_ih),
        lambda: jax.grad(loss, argnums=1)(x, w_ih),
        lambda: jax.grad(lambda w: gpu_rnn.gru(np.ones((5, 2, 3), np.float32), w, np.asarray(w_hh))[0].sum())(w_ih),
        lambda: jax.vmap(loss, (0, None))(x[None], w_ih),
        lambda: jax.jit(lambda x: gpu_rnn.vjp(gpu_rnn.gru, x, w_ih, w_hh)[0][0])(x),
    ]
    for call in transformed:
        with pytest.raises(TypeError, match=r"gpu_rnn.*JAX.*pure_callback"):
            call()


def test_a_tracer_that_is_no_array_yet_is_refused_without_jax():
    """As JAX's: it shows the methods of an array, and lacks the one by which it would be lent."""
    Tracer = type("Tracer", (), {"__module__": "jax._src.core", "__dlpack__": 1, "__array_namespace__": 1})
    tracer = type("DynamicJaxprTracer", (Tracer,), {"__module__": "jax._src.interpreters.partial_eval"})()
    weights = np.ones((12, 3), np.float32), np.ones((12, 4), np.float32)
    for call in (
        lambda: gpu_rnn.gru(tracer, *weights),
        lambda: gpu_rnn.gru(np.ones((5, 2, 3), np.float32), tracer, weights[1]),
        lambda: gpu_rnn.vjp(gpu_rnn.gru, tracer, *weights),
    ):
        with pytest.raises(TypeError, match=r"gpu_rnn.*JAX.*pure_callback"):
            call()


# ---- programs from a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["import gpu_rnn, torch", "import torch, gpu_rnn", "import gpu_rnn, torch.export"])
def test_a_saved_program_loads_after_the_package_alone(first, tmp_path):
    ours, theirs = pair("LSTM", {})
    x = torch.randn(5, 2, 3)
    torch.export.save(torch.export.export(ours, (x,)), tmp_path / "exported.pt2")
    torch.jit.save(torch.jit.trace(ours, x), tmp_path / "traced.pt")
    torch.save((x, theirs(x)[0].detach()), tmp_path / "data.pt")
    script = f"""
{first}
folder = {str(tmp_path)!r}
x, y = torch.load(folder + "/data.pt")
for run in (torch.export.load(folder + "/exported.pt2").module(), torch.jit.load(folder + "/traced.pt")):
    torch.testing.assert_close(run(x)[0], y, rtol=1e-5, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_saved_program_finds_its_cell(tmp_path):
    """A published one by its name, one of a user's own once the module that defines it is imported."""
    x = torch.randn(5, 2, 3)
    for name, layer in {"published": gpu_rnn.cells.JANET(3, 4), "own": plain(3, 4)}.items():
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / f"{name}.pt2")
        torch.save((x, layer(x)[0].detach()), tmp_path / f"{name}.pt")
    script = f"""
import gpu_rnn, torch
def check(name):
    x, y = torch.load({str(tmp_path)!r} + f"/{{name}}.pt")
    torch.testing.assert_close(torch.export.load({str(tmp_path)!r} + f"/{{name}}.pt2").module()(x)[0], y)
check("published")
try:
    check("own")
except ValueError as error:
    assert "unknown cell 'plain'" in str(error) and "imported" in str(error), error
else:
    raise AssertionError("nothing has defined that cell")
import {__name__}
check("own")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_watching_for_torch_costs_nothing_and_hides_nothing():
    script = """
import gpu_rnn, sys
from gpu_rnn.core.optional_imports import Watch, installed
assert "torch" not in sys.modules and installed("torch") and not installed("no such module")
import torch, importlib.resources, inspect
assert torch.__spec__.loader.__class__.__name__ == "SourceFileLoader" and "exec_module" not in vars(torch.__loader__)
assert inspect.getsource(torch.nn.LSTM)
assert "torch" not in [finder.name for finder in sys.meta_path if isinstance(finder, Watch)]
assert "gpu_rnn.autograd.custom_ops" in sys.modules and "gpu_rnn.nn.layers" not in sys.modules
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
