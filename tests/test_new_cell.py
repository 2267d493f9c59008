"""docs/new_cell.md is true: its cells run everywhere with nothing else written; other definitions are refused."""

import copy
import importlib
import math
import operator
import pickle
import sys
from functools import cache, partial

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import functional
from gpu_rnn.backends import cuda, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.core.problem import Options, Weights
from gpu_rnn.functional import ShapeError
from gpu_rnn.kernels import cells, validation
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.mathematics import exp, log, log_sigmoid, maximum, mean, sigmoid, tanh, where

from . import cuda_on_cpu, custom_cells, reference_modifiers
from .conftest import sequence_arrays
from .cuda_emulator import runtime

EVERY = pytest.mark.parametrize("name", custom_cells.CELLS)
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


@pytest.fixture(autouse=True)
def _published(monkeypatch):
    monkeypatch.setattr(reference_modifiers, "published", custom_cells.published)


@pytest.fixture
def forgotten(monkeypatch):
    """What a test defines isn't there after it."""
    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))
    yield
    cells.get.cache_clear()


@pytest.fixture
def mgu(tmp_path, monkeypatch):
    """The cell "mgu", defined in the folder of cell definitions."""
    (tmp_path / "mgu.py").write_text(custom_cells.MODULE)
    monkeypatch.setattr(cells, "__path__", [*cells.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    monkeypatch.setattr(cells, "MODULES", cells.definitions())
    cells.get.cache_clear()
    yield cells.get("mgu")
    cells.get.cache_clear()
    sys.modules.pop(f"{cells.__name__}.mgu")


# ---- the document ---------------------------------------------------------------------------------------------------


def test_the_definitions_are_short():
    assert len(custom_cells.DEFINITIONS) == len(custom_cells.CELLS)
    assert all(len(block.splitlines()) < 30 for block in custom_cells.DEFINITIONS)


def test_the_documents_use_runs():
    exec(custom_cells.USE, dict(vars(custom_cells.document)))


def test_the_documents_use_of_a_module_runs(mgu):
    names = {}
    exec(custom_cells.USE_OF_MODULE, names)
    assert names["y"].shape == (7, 2, 4)
    assert names["hT"].shape == (2, 4)


def test_facts_follow_from_the_definitions(mgu):
    assert (mgu.G, mgu.S, mgu.K, mgu.separate) == (2, 1, 3, (False, True))
    derived = cells.get("MGU")
    assert (derived.K, derived.separate) == (mgu.K, mgu.separate), "what the definition written by hand saves"
    assert cells.get("SLSTM").separate == (False,) * 4


def test_a_derived_gradient_is_the_one_by_hand(mgu, rng):
    x, h, state, dnew = ([rng.standard_normal(7) for _ in range(n)] for n in (2, 2, 1, 1))
    results = []
    for cell in (mgu, cells.get("MGU")):
        new, saved = cell.step(x, h, state)
        results.append([*new, *(g for group in cell.grad(dnew, new, state, saved) for g in group)])
    np.testing.assert_allclose(*results, rtol=1e-12)


def test_the_mgu_is_the_published_one(rng):
    x, w, (h0,) = sequence_arrays(rng, "MGU", 4, 3, 2, 5)
    y, hT = custom_cells.document.MGU.function(x, *w[:4], h0=h0)
    h, H = h0, 5
    for t in range(4):  # Zhou et al. 2016, with the gate after the recurrent product
        a, r = x[t] @ w.w_ih.T + w.b_ih, h @ w.w_hh.T + w.b_hh
        f = 1 / (1 + np.exp(-a[:, :H] - r[:, :H]))
        h = (1 - f) * h + f * np.tanh(a[:, H:] + f * r[:, H:])
        np.testing.assert_allclose(y[t], h, rtol=1e-12)
    np.testing.assert_allclose(hT, h, rtol=1e-12)


def test_the_slstm_is_the_published_one_without_its_stabilizer(rng):
    T, B, H = 6, 3, 5
    x, w, _ = sequence_arrays(rng, "SLSTM", T, B, 2, H)
    y, last = custom_cells.document.SLSTM.function(x, *w[:4])
    h = c = n = np.zeros((B, H))
    for t in range(T):  # Beck et al. 2024, equations 8 to 14
        z, i, f, o = np.split(x[t] @ w.w_ih.T + w.b_ih + h @ w.w_hh.T + w.b_hh, 4, axis=1)
        i, f, o = np.exp(i), 1 / (1 + np.exp(-f)), 1 / (1 + np.exp(-o))
        c, n = f * c + i * np.tanh(z), f * n + i
        h = o * c / n
        np.testing.assert_allclose(y[t], h, rtol=1e-10)
    scale = np.exp(last[3])
    np.testing.assert_allclose([last[1] * scale, last[2] * scale], [c, n], rtol=1e-10)


def test_the_stabilizer_stabilizes(rng):
    """Gates whose exponentials float32 can't hold."""
    x, w, _ = sequence_arrays(rng, "SLSTM", 6, 3, 2, 5, dtype=np.float32)
    w.b_ih[5:10] = 200 * rng.random(5)
    y, _ = custom_cells.document.SLSTM.function(x, *w[:4])
    exact, _ = custom_cells.document.SLSTM.function(x.astype("float64"), *(a.astype("float64") for a in w[:4]))
    np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-4)


# ---- every backend --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("option", ["plain", "reset", "hold", "mean"])
def test_numpy(name, option):
    options = {"plain": {}, "mean": {"zoneout": (0.3,) * 4, "mean": True}}.get(
        option
    ) or reference_modifiers.OPTIONS.get(option, {})
    made = custom_cells.case(name, options, "float32", 5, 3, 4, 6, reverse=option == "hold")
    reference_modifiers.check(made, made.case.run(numpy_backend.forward, numpy_backend.backward))


@on_host_runtime
@EVERY
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_cuda_stepwise(name, dtype):
    made = custom_cells.case(name, {}, dtype, 4, 5, 3, 7)
    reference_modifiers.check(made, made.case.run(*cuda_on_cpu.per_step_passes()))


@on_host_runtime
@EVERY
@pytest.mark.parametrize("scope", persistent.SCOPES)
def test_cuda_persistent(name, scope, monkeypatch):
    monkeypatch.setattr(persistent, "select", partial(persistent.select, scope=scope))
    monkeypatch.setattr(per_step, "run_forward", None)  # which would be no test
    cuda.config_of.cache_clear()
    made = custom_cells.case(name, {}, "bfloat16", 4, 9, 3, 20)
    reference_modifiers.check(made, made.case.run(*cuda_on_cpu.passes(persistent.DEVICES["h200"])))
    cuda.config_of.cache_clear()


def test_a_definition_in_the_folder_of_cells_runs_with_gradients(mgu, rng):
    x, weights, (h0,) = sequence_arrays(rng, "mgu", 4, 3, 2, 5)
    y, _ = functional.run("mgu", x, weights, (h0,), Options())
    expected, _ = custom_cells.document.MGU.function(x, *weights[:4], h0=h0)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], h0)]

    def run(x, *rest):
        y, (hT,) = functional.run("mgu", x, Weights(*rest[:4]), (rest[4],), Options(reverse=True))
        return y, hT

    assert torch.autograd.gradcheck(run, tensors)


def test_units_are_reduced_by_a_mean(forgotten):
    def step(x, h, state):
        e = exp(tanh(x[0] + h[0]))
        return (e / mean(e) + 0.5 * state[0],)

    cls = gpu_rnn.cell(step, gates="a", states="h", name="competing", check=True)
    layer = cls(3, 4, dtype=torch.float64)
    x, h = torch.randn(2, 1, 2, 3, dtype=torch.float64)[0], torch.zeros(1, 2, 4, dtype=torch.float64)
    y, _ = layer(x)
    a = torch.nn.RNN(3, 4, dtype=torch.float64)
    a.load_state_dict(layer.state_dict())
    assert torch.allclose(y, 4 * torch.softmax(a(x, h)[0], -1))
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x.requires_grad_())


# ---- layers ---------------------------------------------------------------------------------------------------------


@EVERY
def test_derivatives(name, rng):
    x, weights, state = sequence_arrays(rng, name, 3, 2, 2, 3)
    labels = [letter + "0" for letter in cells.get(name).states]
    state = [abs(s) + 0.5 if label == "n0" else s for label, s in zip(labels, state)]
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], *state)]

    def run(*inputs):
        y, last = custom_cells.CELLS[name].function(*inputs[:5], **dict(zip(labels, inputs[5:])), reverse=True)
        return y, *(last if isinstance(last, tuple) else (last,))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@EVERY
def test_vjp_is_autograd(name, rng):
    x, weights, state = sequence_arrays(rng, name, 3, 2, 2, 3)
    labels = [letter + "0" for letter in cells.get(name).states]
    kwargs = {"x": x, **{label: w for label, w in weights._asdict().items() if w is not None}, labels[0]: state[0]}
    function = custom_cells.CELLS[name].function
    tensors = {label: torch.from_numpy(array).requires_grad_() for label, array in kwargs.items()}
    function(**tensors)[0].sum().backward()
    (y, _), pullback = gpu_rnn.vjp(function, **kwargs)
    gradients = pullback((np.ones_like(y), None))
    assert gradients.keys() == kwargs.keys()
    for label, tensor in tensors.items():
        np.testing.assert_allclose(gradients[label], tensor.grad, rtol=1e-12, atol=1e-14, err_msg=label)


@EVERY
def test_a_layer_is_its_function_layer_after_layer(name):
    torch.manual_seed(1)
    cls = custom_cells.CELLS[name]
    layer = cls(3, 4, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    S, x = cells.get(name).S, torch.randn(2, 5, 3, dtype=torch.float64)
    y, last = layer(x)
    below, states_of_ways = x.transpose(0, 1), []
    for l in range(2):
        ways = [
            cls.function(below, *layer.all_weights[2 * l + d], reverse=bool(d))  # by hand
            for d in range(2)
        ]
        below = torch.cat([way[0] for way in ways], -1)
        states_of_ways += [way[1] if S > 1 else (way[1],) for way in ways]
    torch.testing.assert_close(y, below.transpose(0, 1))
    for k, states in enumerate(last if S > 1 else (last,)):
        torch.testing.assert_close(states, torch.stack([each[k] for each in states_of_ways]))
    assert repr(layer) == f"{name}(3, 4, num_layers=2, batch_first=True, bidirectional=True)"
    assert (cls.__name__, cls.__module__, cls.__qualname__) == (name, "document", name)


@EVERY
def test_a_layer_is_pickled_copied_compiled_and_exported(name):
    torch.manual_seed(2)
    layer, x = custom_cells.CELLS[name](3, 4), torch.randn(5, 2, 3)
    y, _ = layer(x)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(again) is type(layer)
        assert torch.equal(again(x)[0], y)
    fresh = custom_cells.CELLS[name](3, 4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], y)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], y)
    (ours,), (eager,) = (torch.autograd.grad(run(x)[0].sum(), [layer.weight_hh_l0]) for run in (compiled, layer))
    assert torch.equal(ours, eager)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x)[0], y)


def test_keywords_are_those_of_every_layer():
    torch.manual_seed(3)
    x, reset = torch.randn(6, 2, 3), torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    layer = custom_cells.document.MGU(3, 4)
    y, hT = layer(x, reset=reset)
    torch.testing.assert_close(y, torch.cat([layer(x[:3])[0], layer(x[3:])[0]]))
    y, hT, states = layer(x, lengths=torch.tensor([6, 2]), return_states=True)
    assert (y[2:, 1] == 0).all()
    assert torch.equal(hT[0, 1], layer(x[:2])[1][0, 1])
    with pytest.raises(TypeError, match="peephole"):
        custom_cells.document.MGU(3, 4, peephole=True)
    with pytest.raises(ShapeError, match=r"h0 has shape \[2, 4\].*\[1, 2, 4\]"):
        layer(x, torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"\(h0, c0, n0, m0\)"):
        custom_cells.document.SLSTM(3, 4)(x, torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match="c0"):
        custom_cells.document.MGU.function(*(np.ones(n) for n in ((5, 2, 3), (8, 3), (8, 4))), c0=np.ones((2, 4)))
    assert "MGU" in str(gpu_rnn.explain(layer, x))


# ---- definitions ----------------------------------------------------------------------------------------------------


def elman(x, h, state):
    return (tanh(x[0] + h[0]),)


def indrnn(x, h, state, extra):
    """Li et al. 2018: every unit sees itself alone; here in addition to the recurrent weights."""
    return (tanh(x[0] + h[0] + extra[0] * state[0]),)


def test_a_unit_has_values_of_its_own(forgotten):
    cls = gpu_rnn.cell(indrnn, gates="a", states="h", units=("own",), check=True)
    torch.manual_seed(4)
    layer = cls(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    assert layer.weight_own_l1_reverse.shape == (4,)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    layer(x)[0].square().sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in layer.parameters())

    def run(x, w_ih, w_hh, units):
        return cls.function(x, w_ih, w_hh, units=units)[0]

    w_ih, w_hh, units = layer.weight_ih_l0, layer.weight_hh_l0, layer.weight_own_l0
    h = torch.zeros(2, 4, dtype=torch.float64)
    for t, y in enumerate(run(x, w_ih, w_hh, units)):
        h = torch.tanh(x[t] @ w_ih.T + h @ w_hh.T + units * h)
        torch.testing.assert_close(y, h)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), w_ih, w_hh, units))
    with pytest.raises(TypeError, match=r"indrnn has weights per unit \(own\): units=\[1\*H\]"):
        cls.function(x, w_ih, w_hh)
    with pytest.raises(ShapeError, match=r"units has shape \[3\]; expected \[4\]"):
        cls.function(x, w_ih, w_hh, units=units[:3])


def test_a_name_keeps_its_definition(forgotten):
    def leaky(x, h, state):
        return (0.5 * state[0] + 0.5 * tanh(x[0] + h[0]),)

    first = gpu_rnn.cell(elman, gates="a", states="h", name="Mine")
    layer, x = first(3, 4), torch.randn(5, 2, 3)
    y, _ = layer(x)
    second = gpu_rnn.cell(leaky, gates="a", states="h", name="Mine")
    assert (first.cell_name, second.cell_name, second.__name__) == ("Mine", "Mine#2", "Mine")
    other = second(3, 4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], y)
    assert not torch.allclose(other(x)[0], y)
    again = gpu_rnn.cell(elman, gates="a", states="h", name="Mine")
    assert (again.cell_name, cells.get("Mine")) == ("Mine", cells.get(first.cell_name))
    assert gpu_rnn.cell(leaky, gates="a", states="h", name="Mine").cell_name == "Mine#2"
    other(x, lengths=torch.tensor([5, 3]))


def grad(dnew, new, state, saved):
    d = dnew[0] * (1 - new[0] * new[0])
    return (d,), (d,), (0.0,)


def test_a_gradient_is_checked_on_request(forgotten):
    def step(x, h, state):
        return elman(x, h, state), ()

    gpu_rnn.cell(step, grad=grad, gates="a", states="h", name="right", check=True)

    def half(*inputs):
        dx, dh, dstate = grad(*inputs)
        return (dx[0] * 0.5,), dh, dstate

    gpu_rnn.cell(step, grad=half, gates="a", states="h", name="unchecked")
    with pytest.raises(ValueError, match=r"halved: grad gives a wrong gradient of x of gate 'a': \S+, but .* is \S+$"):
        gpu_rnn.cell(step, grad=half, gates="a", states="h", name="halved", check=True)
    assert "halved" not in cells.REGISTERED
    with pytest.raises(ValueError, match="aren't finite"), np.errstate(divide="ignore"):
        gpu_rnn.cell(lambda x, h, s: (log(s[0]),), gates="a", states="h", name="nowhere", check=True)


@pytest.mark.parametrize("name", [*cells.NAMES, *custom_cells.CELLS])
def test_every_gradient_passes_the_check(name):
    validation.gradcheck(cells.get(name))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda x, h, state: (np.sin(x[0]),), r"sin.*may use \+ - \* /, numbers, and of .* exp, log"),
        (lambda x, h, state: (x[0] * torch.ones(()),), "a constant of a cell definition must be a number, not Tensor"),
        (lambda x, h, state: (x[0] * "0.5",), "must be a number, not str"),
        (lambda x, h, state: (x[0] * np.ones(3),), "must be a number, not ndarray"),
        (lambda x, h, state: (torch.sigmoid(x[0]),), "sigmoid.*may use"),
        (lambda x, h, state: (x[1] + h[1],), r"index out of range.*|.*x \[1\]"),
        (lambda x, h, state: tanh(x[0]), r"must return a tuple of 1 new states \(h\), got Traced"),
        (lambda x, h, state: (tanh(x[0]), h[0]), r"must return a tuple of 1 new states \(h\), got 2"),
        (lambda x, h, state: ("h",), "one of them is str"),
        (lambda x, h: (x[0],), "takes 2 positional arguments but 3"),
    ],
)
def test_what_is_no_definition_is_refused(step, why):
    with pytest.raises((TypeError, ValueError), match=f"mine: step .*{why}"):
        gpu_rnn.cell(step, gates="a", states="h", name="mine")
    with pytest.raises(TypeError, match=r"step must be a function of .* got 5"):
        gpu_rnn.cell(5, gates="a", states="h")
    assert "mine" not in cells.REGISTERED


LOOKS = {
    "branch on": [
        lambda a, b: a if a else b, lambda a, b: not a, lambda a, b: a and b, lambda a, b: a or b,
        lambda a, b: next(a for _ in "_" if a), lambda a, b: a if any((a, b)) else b,
        lambda a, b: next(filter(None, [a])),
        lambda a, b: a if operator.truth(a) else b,
    ],
    "compare": [
        lambda a, b: a if a == 0 else b, lambda a, b: a if a != b else b, lambda a, b: a if a > 0 else b,
        lambda a, b: a if a <= b else b, lambda a, b: a if a > 0 else b, lambda a, b: max(a, b), lambda a, b: min(a, 0),
        lambda a, b: sorted([a, b])[0], lambda a, b: a if a in (0, 1) else b, lambda a, b: a if 0.0 in [a] else b,
        lambda a, b: (0, b).index(a), lambda a, b: [0].count(a), lambda a, b: a if (a, b) == (0, 0) else b,
        lambda a, b: where(a > 0, a, b),
    ],
    "hash": [
        lambda a, b: {0: a}.get(a, b), lambda a, b: a if a in {0, 1} else b, lambda a, b: {a: b}[a],
        lambda a, b: cache(lambda x: x)(a), lambda a, b: a if hash(a) else b,
    ],
    "go through": [lambda a, b: [*a], lambda a, b: a[0], lambda a, b: len(a), lambda a, b: a if 0 in a else b],
    "make a number of": [
        lambda a, b: float(a), lambda a, b: int(a), lambda a, b: complex(a), lambda a, b: round(a),
        lambda a, b: math.exp(a), lambda a, b: math.floor(a), lambda a, b: math.ceil(a), lambda a, b: math.isnan(a),
        lambda a, b: "ab"[a], lambda a, b: range(a), lambda a, b: math.trunc(a),
    ],
    "make an array of": [
        lambda a, b: np.asarray(a), lambda a, b: np.asarray([a, b]), lambda a, b: np.where(a, a, b),
        lambda a, b: np.stack([a, b]), lambda a, b: np.isclose(a, b),
    ],
    "call numpy.equal on": [lambda a, b: a if np.float64(0) == a else b],
    "call numpy.exp on": [lambda a, b: np.exp(a)],
}  # fmt: skip


@pytest.mark.parametrize(("what", "look"), [(what, look) for what, looks in LOOKS.items() for look in looks])
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_definition_that_looks_at_a_value_is_refused(what, look, with_grad):
    """In step, and in grad, where the values come from."""

    def step(x, h, state):
        return ((tanh(x[0] + h[0]),), ()) if with_grad else (look(x[0], h[0]),)

    def grad(dnew, new, state, saved):
        d = look(new[0], dnew[0])
        return (d,), (d,), (0.0,)

    options = {"grad": grad} if with_grad else {}
    why = f"mine: {'grad' if with_grad else 'step'} .*can't {what} a traced value.*use where"
    if what == "make an array of":
        why = f"({why}|can't call numpy.* on a traced value)"
    with pytest.raises(TypeError, match=why):
        gpu_rnn.cell(step, gates="a", states="h", name="mine", **options)


def test_a_numpy_number_stands_on_either_side(forgotten):
    def step(x, h, state):
        a = np.float64(0.5) * x[0] + np.float32(0.25) - h[0] / np.int64(2)
        return (np.float64(1) - a + np.array(0.5) * a,)

    cell = cells.make_cell("mine", "a", "h", step)
    assert cell.step((3.0,), (1.0,), (0.0,))[0] == (1 - 1.25 + 0.5 * 1.25,)


def test_a_value_kept_from_another_run_is_refused():
    kept = []

    def step(x, h, state):
        kept.append(x[0])
        return (tanh(kept[0] + h[0]),)

    with pytest.raises(TypeError, match=r"function of its arguments alone, but kept a value of another run"):
        gpu_rnn.cell(step, gates="a", states="h", name="mine")


def test_what_is_no_gradient_is_refused():
    def step(x, h, state):
        return elman(x, h, state), (x[0],)

    wrong = {
        r"must return 3 tuples: gradients of x": lambda *inputs: (inputs[0][0], inputs[0][0]),
        r"2 gradients of x|1 gradients of x \(a\), got 2": lambda *inputs: ((0.0, 0.0), (0.0,), (0.0,)),
        r"can't be traced.*saved \[1\].*unpack": lambda dnew, new, state, saved: [a for a, b in [saved]],
    }
    for why, grad in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"mine: grad .*({why})"):
            gpu_rnn.cell(step, grad=grad, gates="a", states="h", name="mine")
    with pytest.raises(TypeError, match="with a grad, step must return two tuples"):
        gpu_rnn.cell(elman, grad=grad, gates="a", states="h", name="mine")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"gates": ["a"]}, r"gates must be a string of one letter each, got \['a'\]"),
        ({"gates": ""}, "gates must be letters"),
        ({"states": "hh"}, "states must be letters, each once"),
        ({"units": ("a b",)}, "units must be a tuple of names"),
        ({"name": "LSTM"}, "can't be named 'LSTM'; it takes an identifier, and not gru, lstm"),
        ({"name": "a+b"}, r"can't be named 'a\+b'"),
        ({"name": None}, "can't be named '<lambda>'"),
    ],
)
def test_unsuited_definitions_are_refused(arguments, why):
    step = elman if "units" not in arguments else indrnn
    if arguments.get("name", "") is None:
        step = lambda *inputs: elman(*inputs)  # noqa: E731
    with pytest.raises((TypeError, ValueError), match=why):
        gpu_rnn.cell(step, **{"gates": "a", "states": "h", "name": "mine"} | arguments)
    with pytest.raises(ValueError, match="units can't be named hh"):
        gpu_rnn.cell(indrnn, gates="a", states="h", units=("hh",))


def test_what_was_decided_by_a_sign_survives_the_rounding_of_what_is_saved(rng):
    def largest(x, h, state):
        c = maximum(tanh(x[0] + h[0]), tanh(x[1] + h[1]))
        return where(c - tanh(x[1]), c, state[0]), c

    derived = cells.make_cell("derived", "ab", "hc", largest)
    x, h, state, dnew = ([rng.standard_normal(500) for _ in range(2)] for _ in range(4))
    new, saved = derived.step(x, h, state)
    kept = [value.astype(np.float16).astype(np.float64) for value in saved]
    as_kept = derived.grad(dnew, (new[0].astype(np.float16), new[1]), state, kept)
    for rounded, exact in zip(as_kept, derived.grad(dnew, new, state, saved)):
        for ours, theirs in zip(rounded, exact):
            np.testing.assert_allclose(ours, theirs, atol=0.02)


def test_log_sigmoid(rng):
    a = np.array([-1e4, -100, -1, -1e-3, 0, 1e-3, 1, 100, 1e4])
    exact = torch.nn.functional.logsigmoid(torch.from_numpy(a)).numpy()
    np.testing.assert_allclose(log_sigmoid(a), exact, rtol=1e-15, atol=2e-16)
    derived = cells.make_cell("derived", "a", "h", lambda x, h, state: (log_sigmoid(x[0]),))
    new, saved = derived.step((a,), (a,), (a,))
    (dx,), _, _ = derived.grad((np.ones_like(a),), new, (a,), saved)
    np.testing.assert_allclose(dx, sigmoid(-a), rtol=1e-12, atol=1e-15)
