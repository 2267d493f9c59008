"""gpu_rnn.cells: each cell is the published one, on every backend that a CPU has, as are its gradients."""

import importlib.util
import inspect
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends import cuda, native, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.kernels import cells as definitions
from gpu_rnn.kernels.cuda import persistent

from . import calls, cuda_on_cpu, library, reference_modifiers
from .cuda_emulator import runtime

ROOT = Path(__file__).parents[1]
EVERY = pytest.mark.parametrize("name", cells.__all__)
REPRESENTATIVE = pytest.mark.parametrize("name", library.REPRESENTATIVE)
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


@pytest.fixture(autouse=True)
def _published(monkeypatch):
    monkeypatch.setattr(reference_modifiers, "published", library.published)


def check(made, forward, backward):
    """A case by a backend, against the paper's equations in a loop."""
    backend = calls.operations(forward, backward, REPEATS_INPUTS=forward is native.forward)
    backend = TwoPass(backend) if made.plain.lowered else backend
    reference_modifiers.check(made, made.case.run(backend.forward, backend.backward))


def drawn(name, *sizes, **keywords):
    """A float64 layer, all of whose parameters are random, and x [T, B, I] and states [B, H] for it."""
    T, B, I, H = sizes
    torch.manual_seed(sum(map(ord, name)))
    layer = getattr(cells, name)(I, H, dtype=torch.float64, **keywords)
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -0.7, 0.7)
    letters = definitions.get(layer.cell_name).states
    state = [torch.randn(B, H, dtype=torch.float64) for _ in letters]
    state = [s.abs() + 0.5 if letter == "n" else s for letter, s in zip(letters, state)]
    return layer, torch.randn(T, B, I, dtype=torch.float64), state


def hx(state):
    state = [s[None] for s in state]
    return tuple(state) if len(state) > 1 else state[0]


# ---- the equations --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_published_cell(name, bias):
    layer, x, state = drawn(name, 5, 3, 4, 6, bias=bias)
    y, last = layer(x, hx(state))
    expected, states = library.loop(layer, x, state)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(last if len(state) > 1 else (last,), states):
        torch.testing.assert_close(ours[0], theirs, rtol=1e-11, atol=1e-12)


def test_every_cell_has_a_reference():
    assert library.EQUATIONS.keys() == set(cells.__all__)
    missing = set(cells.__all__) - library.THEIRS.keys()
    assert missing == {"SCRN", "LEM", "NAS", "MGU1", "MGU2", "MGU3", "CIFG", "SLSTM"}


@pytest.mark.parametrize("name", library.THEIRS)
def test_a_stack_is_that_of_torchrecurrent(name):
    torchrecurrent = pytest.importorskip("torchrecurrent")
    layer, x, _ = drawn(name, 5, 3, 6, 6, num_layers=2)
    with torch.no_grad():
        for suffix in ("_l0", "_l1"):
            if name == "IntersectionRNN":  # without a matrix of its input
                torch.nn.init.eye_(getattr(layer, "weight_ih" + suffix)[-6:])
            if name == "GatedAntisymmetricRNN":  # with that bias in one of its gates
                getattr(layer, "bias_hh" + suffix).zero_()
    other = library.torchrecurrent_layer(torchrecurrent, layer)
    x.requires_grad_()
    (y, _), (expected, *_) = layer(x), other(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((out * dy).sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@EVERY
def test_gradients(name):
    """Of x, of every parameter and of the first states, by finite differences."""
    layer, x, state = drawn(name, 3, 2, 2, 3)
    names, parameters = zip(*layer.named_parameters())

    def run(x, *tensors):
        named = dict(zip(names, tensors))
        y, last = functional_call(layer, named, (x, hx(tensors[len(names) :])))
        return y, *(last if isinstance(last, tuple) else (last,))

    inputs = (x, *(p.detach() for p in parameters), *state)
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs])


# ---- backends -------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("module", [numpy_backend, native], ids=["numpy", "native"])
def test_every_backend_is_as_good_as_torch(name, module):
    made = library.case(name, {}, "float32", 5, 3, 4, 7, reverse=module is native)
    check(made, module.forward, module.backward)


@REPRESENTATIVE
@pytest.mark.parametrize("option", ["reset_state", "hold", "dropout", "mean"])
def test_modifiers(name, option):
    options = {"mean": {"zoneout": (0.3,) * 5, "mean": True}}.get(option) or reference_modifiers.OPTIONS[option]
    check(library.case(name, options, "float32", 5, 3, 4, 7), numpy_backend.forward, numpy_backend.backward)


@on_host_runtime
@REPRESENTATIVE
def test_cuda_per_step(name):
    check(
        library.case(name, {}, "float32", 4, 5, 3, 7),
        *cuda_on_cpu.per_step_passes(),
    )


@on_host_runtime
@REPRESENTATIVE
@pytest.mark.parametrize("scope", ["block", "grid"])
def test_cuda_persistent(name, scope, monkeypatch):
    monkeypatch.setattr(persistent, "select", partial(persistent.select, scope=scope))
    monkeypatch.setattr(per_step, "run_forward", None)  # which would be no test
    cuda.config_of.cache_clear()
    check(library.case(name, {}, "float16", 4, 9, 3, 20), *cuda_on_cpu.passes(persistent.DEVICES["h200"]))
    cuda.config_of.cache_clear()


# ---- layers ---------------------------------------------------------------------------------------------------------


@EVERY
def test_a_definition_is_short_and_says_where_it_is_from(name):
    source, cls = inspect.getsource(inspect.getmodule(getattr(cells, name))), getattr(cells, name)
    lines = source.splitlines()
    end = next(k for k, line in enumerate(lines) if line.startswith(f"def {name}("))
    start = max(k for k in range(end) if lines[k].startswith("@published"))
    length = next((k for k in range(end + 1, len(lines)) if lines[k][:1] not in ("", " ")), len(lines))
    assert len("\n".join(lines[start:length]).strip().splitlines()) <= 20
    title, equations, *_ = inspect.cleandoc(cls.__doc__).split("\n\n")
    assert title.endswith(").") or title.endswith("code).")
    assert any(year in title for year in map(str, range(1997, 2026)))
    assert "' " in equations
    assert (cls.__name__, cls.__qualname__, cls.cell_name) == (name, name, f"cells.{name}")
    assert getattr(inspect.getmodule(cls), name) is cls


def test_the_library_lists_its_cells():
    assert len(cells.__all__) >= 28
    assert set(cells.__all__) <= set(dir(cells))
    assert "cells" in dir(gpu_rnn)
    with pytest.raises(AttributeError, match=r"no attribute 'Transformer'; its cells are ATR, .*, WMCLSTM"):
        cells.Transformer  # noqa: B018


def test_a_cell_of_a_users_own_keeps_its_name(monkeypatch):
    monkeypatch.setattr(definitions, "REGISTERED", dict(definitions.REGISTERED))
    assert cells.JANET.cell_name == "cells.JANET"
    mine = gpu_rnn.cell(lambda x, h, s: (x[0] + h[0],), gates="a", states="h", name="JANET")
    assert mine.cell_name == "JANET"


@REPRESENTATIVE
def test_a_layer_is_pickled_compiled_and_exported(name):
    torch.manual_seed(2)
    layer, x = getattr(cells, name)(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    y, _ = layer(x)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x)[0], y)
    fresh = type(layer)(3, 4, num_layers=2, bidirectional=True)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], y)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], y)
    ours, eager = (torch.autograd.grad(run(x)[0].sum(), list(layer.parameters())) for run in (compiled, layer))
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x)[0], y)


@REPRESENTATIVE
def test_a_function_takes_the_arrays_of_a_layer(name):
    layer, x, _ = drawn(name, 5, 3, 4, 6, num_layers=2, bidirectional=True)
    function, D = type(layer).function, 2
    below = x
    for k in range(2):
        ways = [layer.function_arguments(k, reverse=bool(d)) for d in range(D)]
        below = torch.cat([function(below, **weights, reverse=bool(d))[0] for d, weights in enumerate(ways)], -1)
    torch.testing.assert_close(layer(x)[0], below)
    arrays = {label: array.detach().numpy() for label, array in layer.function_arguments().items()}
    y = function(x.numpy(), **arrays)[0]
    np.testing.assert_allclose(y, function(x, **layer.function_arguments())[0].detach(), rtol=1e-12)


def test_first_values():
    torch.manual_seed(3)
    janet, H = cells.JANET(8, 64), 64
    assert (janet.bias_ih_l0[:H] == 1).all()
    assert (janet.bias_hh_l0[:H] == 0).all()
    for parameter in (janet.weight_ih_l0, janet.weight_hh_l0, janet.bias_ih_l0[H:]):
        assert 0.1 < parameter.abs().max() <= 0.125
    fast = cells.FastRNN(8, 64, num_layers=2)
    assert (fast.alpha_l1.item(), fast.beta_l0.item()) == (-3, 3)
    assert 0.9 < cells.IndRNN(8, 64).weight_u_l0.max() <= 1
    assert torch.equal(cells.IntersectionRNN(8, 8).weight_ih_l0[-8:], torch.eye(8))
    layer = cells.JANET(8, 64)
    with torch.no_grad():
        layer.bias_ih_l0.zero_()
    layer.reset_parameters()
    assert (layer.bias_ih_l0[:H] == 1).all()


def test_constants_are_keywords():
    layer, x, state = drawn("CoRNN", 4, 2, 3, 5, gamma=2.5)
    assert repr(layer) == "CoRNN(3, 5, gamma=2.5)"
    other = cells.CoRNN(3, 5, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert not torch.allclose(layer(x, hx(state))[0], other(x, hx(state))[0])
    with pytest.raises(TypeError, match="gamma must be a number, got '2'"):
        cells.CoRNN(3, 5, gamma="2")
    with pytest.raises(TypeError, match="CoRNN got an unexpected keyword argument 'alpha'"):
        cells.CoRNN(3, 5, alpha=1.0)


def test_row_blocks_are_those_that_the_step_reads():
    """And count as in the paper."""
    count = {
        name: sum(p.numel() for p in getattr(cells, name)(5, 7, bias=False).parameters()) for name in cells.__all__
    }
    I, H = 5, 7
    assert count["CFN"] == 3 * H * I + 2 * H * H
    assert count["LightRU"] == 2 * H * I + H * H
    assert count["IndRNN"] == H * I + H
    assert count["TLSTM"] == 6 * H * I
    assert count["MinimalRNN"] == H * I + 2 * H * H
    with pytest.raises(ValueError, match=r"biases are those of gates \(a\), got b"):
        gpu_rnn.cell(lambda x, h, s: (x[0],), gates="a", states="h", name="mine", biases="b")
    with pytest.raises(ValueError, match=r"mine: scalars and constants can't be named bias, zoneout, as a layer has"):
        gpu_rnn.cell(
            lambda x, h, s, p: (x[0],),
            gates="a",
            states="h",
            name="mine",
            scalars={"bias": 0},
            constants={"zoneout": 1},
        )
    with pytest.raises(ValueError, match=r"mine: initial are of .*weight_ih; got weight_p"):
        gpu_rnn.cell(lambda x, h, s: (x[0],), gates="a", states="h", name="mine", initial={"weight_p": 1.0})


# ---- docs/cells.md --------------------------------------------------------------------------------------------------


def test_the_gallery_is_that_of_the_definitions():
    spec = importlib.util.spec_from_file_location("cells_document", ROOT / "docs" / "cells.py")
    document = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(document)
    written = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.text() == written, "python docs/cells.py renews it"
    assert all(set(by_cell) == set(cells.__all__) for by_cell in document.measured().values())
    assert all(f"\n### {name}\n" in written for name in cells.__all__)


def test_python_of_the_gallery_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cells.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (100, 32, 128)
