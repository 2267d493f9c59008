"""`precision`: what decides over float32 matmuls, how far the word reaches, and that it holds for a whole call."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import gpu_rnn
from gpu_rnn.backends import call_cache, dispatch
from gpu_rnn.core import arrays

from .conftest import sequence_arrays

FUNCTIONS = {"lstm": gpu_rnn.lstm, "gru": gpu_rnn.gru, "rnn_tanh": gpu_rnn.rnn}
LAYERS = ("RNN", "LSTM", "GRU")


@pytest.fixture
def told(monkeypatch):
    """What the backend is told, forward and back."""
    backend, words = dispatch.backend("numpy"), []
    monkeypatch.setenv(dispatch.VARIABLE, "numpy")
    for name in ("forward", "backward"):
        run = getattr(backend, name)

        def recording(problem, *args, run=run, name=name):
            words.append((name, problem.tf32))
            return run(problem, *args)

        monkeypatch.setattr(backend, name, recording)
    return words


@pytest.fixture
def setting(monkeypatch):
    """A float32 tensor follows this word, as if it were on a GPU."""
    words = ["tf32"]
    monkeypatch.setattr(arrays, "default_precision", lambda array: words[-1])
    monkeypatch.setattr(call_cache, "CACHE", {})  # of tensors on the CPU, which knew no such word
    return words


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("precision", "tf32"), [("tf32", True), ("ieee", False), (None, False)])
def test_functions(name, precision, tf32, told, rng):
    x, weights, _ = sequence_arrays(rng, name, 3, 2, 4, 5)
    inputs = [a.astype("f") for a in (x, *weights[:4])]
    y, _ = FUNCTIONS[name](*inputs, precision=precision)
    (_, _), pullback = gpu_rnn.vjp(FUNCTIONS[name], *inputs, precision=precision)
    pullback((y, (None, None) if name == "lstm" else None))
    tensors = [torch.from_numpy(a).requires_grad_() for a in inputs]
    FUNCTIONS[name](*tensors, precision=precision)[0].sum().backward()
    assert told == [("forward", tf32), ("forward", tf32), ("backward", tf32), ("forward", tf32), ("backward", tf32)]


@pytest.mark.parametrize("kind", [*LAYERS, "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("swapped", [False, True])
def test_layers(kind, swapped, told):
    layer = getattr(gpu_rnn, kind)(3, 4, precision="tf32")
    if swapped:
        layer = gpu_rnn.replace_(getattr(nn, kind)(3, 4), precision="tf32")
    assert "precision=tf32" in repr(layer)
    outputs = layer(torch.randn(5, 3))
    (outputs if torch.is_tensor(outputs) else outputs[0]).sum().backward()
    assert told == [("forward", True), ("backward", True)]


def test_unknown_keywords_are_refused():
    for make in (gpu_rnn.LSTM, gpu_rnn.GRUCell):
        with pytest.raises(TypeError, match="got an unexpected keyword argument 'precison'"):
            make(3, 4, precison="ieee")
    with pytest.raises(TypeError, match="'precison'"):
        gpu_rnn.replace_(model := nn.LSTM(3, 4), precison="ieee")
    assert type(model) is nn.LSTM


def test_back_as_forward_whatever_the_setting_has_become(told, setting):
    y, _ = gpu_rnn.GRU(3, 4)(torch.randn(5, 2, 3))
    setting.append("ieee")
    y.sum().backward()
    assert told == [("forward", True), ("backward", True)]
    gpu_rnn.GRU(3, 4, precision="tf32")(torch.randn(5, 2, 3))
    assert told[-1] == ("forward", True), "the argument overrules the setting"


@pytest.mark.parametrize(("precision", "tf32"), [("tf32", True), ("ieee", False)])
def test_compiled(precision, tf32, told, setting):
    setting.append("ieee" if tf32 else "tf32")
    layer = torch.compile(gpu_rnn.LSTM(3, 4, precision=precision), backend="aot_eager", fullgraph=True)
    layer(torch.randn(5, 2, 3))[0].sum().backward()
    assert told == [("forward", tf32), ("backward", tf32)]


def test_a_graph_without_gradient_follows_the_setting_of_its_runs(told, setting):
    layer = torch.compile(gpu_rnn.LSTM(3, 4), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        layer(torch.randn(5, 2, 3))
        setting.append("ieee")
        layer(torch.randn(5, 2, 3))
    assert told == [("forward", True), ("forward", False)]


def test_other_dtypes(told):
    with pytest.raises(ValueError, match="precision='tf32' is for float32, but x is float64"):
        gpu_rnn.LSTM(3, 4, precision="tf32", dtype=torch.float64)(torch.randn(5, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="precision must be one of None, 'tf32', 'ieee'; got 'bf16'"):
        gpu_rnn.LSTM(3, 4, precision="bf16")(torch.randn(5, 2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        gpu_rnn.LSTM(3, 4, precision="tf32")(torch.randn(5, 2, 3))
    assert told == [("forward", False)], "half precision has no TF32"


# ---- torch's settings -----------------------------------------------------------------------------------------------


@pytest.fixture
def backends():
    """torch's settings, all unset; put back."""
    if not hasattr(torch.backends.cudnn.rnn, "fp32_precision"):
        pytest.skip("this torch has allow_tf32 only")
    holders = (torch.backends, torch.backends.cudnn, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "none"
    yield torch.backends
    for holder, word in zip(holders, before):
        holder.fp32_precision = word


def on_gpu(dtype=torch.float32):
    """What looks like a tensor on a GPU."""
    with FakeTensorMode():
        return torch.empty(2, 2, device="cuda", dtype=dtype)


def test_torch_tensors_on_a_gpu_follow_torchs_recurrent_layers(backends):
    backends.cudnn.rnn.fp32_precision = "tf32"
    assert arrays.default_precision(on_gpu()) == "tf32"
    assert arrays.default_precision(on_gpu(torch.float64)) == arrays.default_precision(torch.empty(2)) == "ieee"
    backends.cudnn.rnn.fp32_precision = "ieee"
    assert arrays.default_precision(on_gpu()) == "ieee"


def test_products_of_a_layer_have_its_precision(backends):
    matmul = backends.cuda.matmul
    for before in ("none", "ieee", "tf32"):
        for tf32 in (False, True):
            matmul.fp32_precision = before
            with arrays.matmul_precision(on_gpu(), tf32):
                assert matmul.fp32_precision == ("tf32" if tf32 else "ieee")
            assert matmul.fp32_precision == before
    with pytest.raises(MemoryError), arrays.matmul_precision(on_gpu(), tf32=False):
        raise MemoryError
    assert matmul.fp32_precision == "tf32"
    with (
        arrays.matmul_precision(on_gpu(torch.bfloat16), tf32=False),
        arrays.matmul_precision(torch.empty(2), tf32=False),
    ):
        assert matmul.fp32_precision == "tf32", "nothing to set"


def test_products_go_on_by_the_setting_they_began_with(backends):
    backends.fp32_precision = "tf32"
    with arrays.matmul_precision(on_gpu(), tf32=False):
        assert backends.cuda.matmul.fp32_precision == "ieee"
    backends.fp32_precision = "ieee"
    assert backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("allowed", [False, True])
def test_older_torch(monkeypatch, allowed):
    cudnn, matmul = SimpleNamespace(allow_tf32=allowed, rnn=object()), SimpleNamespace(allow_tf32=not allowed)
    backends = SimpleNamespace(cudnn=cudnn, cuda=SimpleNamespace(matmul=matmul))
    monkeypatch.setattr(arrays, "module", lambda kind: SimpleNamespace(backends=backends))
    assert arrays.default_precision(on_gpu()) == ("tf32" if allowed else "ieee")
    with arrays.matmul_precision(on_gpu(), allowed):
        assert matmul.allow_tf32 is allowed
    assert matmul.allow_tf32 is not allowed


# ---- numbers --------------------------------------------------------------------------------------------------------


def errors(layer, x, exact):
    """Of the outputs and of the input weights' gradient, to float64's."""
    y, _ = layer(x)
    (dw,) = torch.autograd.grad(y.square().sum(), layer.weight_ih_l0)
    return [(a.double() - b).abs().max().item() / b.abs().max().item() for a, b in zip((y, dw), exact)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("T", [1, 16])
def test_on_a_gpu_the_numbers_are_those_of_the_precision(kind, backend, T):
    layer = getattr(gpu_rnn, kind)(256, 256, device="cuda", backend=backend)
    x = torch.randn(T, 8, 256, device="cuda")
    wide = getattr(nn, kind)(256, 256, device="cuda", dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    y, _ = wide(x.double())
    exact = y, *torch.autograd.grad(y.square().sum(), wide.weight_ih_l0)
    layer.precision = "ieee"
    assert max(errors(layer, x, exact)) < 2e-5
    layer.precision = "tf32"
    visible = max if T == 1 else min  # for the few rows of one time step cuBLAS may choose a kernel without TF32
    assert visible(errors(layer, x, exact)) > 2e-5


@pytest.mark.gpu
def test_on_a_gpu_a_compiled_layer_goes_back_as_it_went_forward(backends):
    rnn = backends.cudnn.rnn
    layer, x = gpu_rnn.LSTM(256, 256, device="cuda"), torch.randn(16, 8, 256, device="cuda")
    gradients = []
    for change in ("tf32", "ieee"):
        rnn.fp32_precision = "tf32"
        torch.compiler.reset()
        y, _ = torch.compile(layer, fullgraph=True)(x)
        rnn.fp32_precision = change
        gradients.append(torch.autograd.grad(y.square().sum(), layer.weight_hh_l0)[0])
    assert torch.equal(*gradients)
