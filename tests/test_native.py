"""The native backend: equal to torch.nn and to plain loops, whatever cell, modifier, size, thread and vectors."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import compiler, native
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.native import isa

from . import calls, custom_cells, reference_modifiers, sequences
from .cuda_emulator import sanitize
from .test_numpy import FUNCTIONS, NEEDS, torch_run

pytestmark = pytest.mark.native
EVERY = pytest.mark.parametrize("name", cells.NAMES)
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True])
SIZES = [  # T, B, I, H: aligned, ragged and degenerate; tiles of every number of rows, several pieces of K = T B, too
    (1, 1, 1, 1), (3, 2, 5, 3), (5, 5, 4, 31), (4, 13, 9, 64), (3, 7, 140, 150), (60, 1, 7, 33), (2, 50, 3, 8),
    (30, 9, 16, 24), (1, 2, 140, 37), (1, 1, 64, 64),
]  # fmt: skip


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(native, "threads", lambda: request.param)
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)
    return request.param


def run(case):
    return case.run(native.forward, native.backward)


@EVERY
@BOTH_WAYS
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_result_is_as_good_as_torchs(name, reverse, dtype, threads):
    for size in SIZES:
        case = sequences.draw(name, dtype, *size, reverse=reverse)
        sequences.check(case, run(case))


@EVERY
@BOTH_WAYS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("T", "B", "I", "H", "P"), [(7, 3, 5, 4, None), (5, 1, 2, 6, 5), (40, 2, 3, 9, 2)])
def test_equals_torch_in_float64(name, reverse, bias, T, B, I, H, P, threads, rng):
    if P is not None and name != "lstm":
        return
    cell = cells.get(name)
    x, weights, state = sequences.sequence_arrays(rng, name, T, B, I, H, P)
    if not bias:
        weights = weights._replace(b_ih=None, b_hh=None)
    dy, dlast = rng.standard_normal((T, B, P or H)), tuple(rng.standard_normal(s.shape) for s in state)
    exact_y, exact_last, exact = torch_run(name, x, weights, state, dy, dlast, reverse)
    y, last, saved = calls.forward(native.forward, cell, x, weights, state, reverse=reverse, save=True)
    needs = NEEDS - {field for field, w in weights._asdict().items() if w is None}
    ours = calls.backward(native.backward, cell, x, weights, state, y, saved, dy, dlast, reverse=reverse, needs=needs)
    pairs = [(y, exact_y), *zip(last, exact_last), *zip(ours.pop("state"), exact.pop("state"))]
    for actual, expected in pairs + [(ours[key], exact[key]) for key in exact]:
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("options", reference_modifiers.OPTIONS.values(), ids=reference_modifiers.OPTIONS)
def test_modifiers(name, options, threads):
    projected = 4 if name == "lstm" and "zoneout" not in options else None
    for B, H, rows, P, reverse in ((3, 6, None, None, False), (2, 9, 1, None, True), (1, 17, None, projected, False)):
        made = reference_modifiers.drawn(name, options, "float32", 5, B, 4, H, P, rows=rows, reverse=reverse)
        reference_modifiers.check(made, run(made.case))


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("options", reference_modifiers.NORMED.values(), ids=reference_modifiers.NORMED)
def test_layer_normalization(name, options, threads):
    for dtype, B, H, reverse in (("float32", 3, 6, False), ("float32", 1, 35, True), ("bfloat16", 2, 4, False)):
        made = reference_modifiers.drawn(name, options, dtype, 5, B, 4, H, reverse=reverse)
        reference_modifiers.check(made, run(made.case))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dropout_of_the_candidate(name, threads):
    made = reference_modifiers.drawn(name, {"candidate": True}, "float32", 5, 3, 4, 11)
    reference_modifiers.check(made, run(made.case))


@pytest.mark.parametrize(
    "options", [{}, *reference_modifiers.OPTIONS.values()], ids=["plain", *reference_modifiers.OPTIONS]
)
def test_a_second_recurrent_product(options):
    backend = TwoPass(native)
    for B, H, rows, reverse in ((3, 6, None, False), (2, 9, 1, True)):
        made = reference_modifiers.drawn("gru+before", options, "float32", 5, B, 4, H, rows=rows, reverse=reverse)
        reference_modifiers.check(made, made.case.run(backend.forward, backend.backward))


@pytest.mark.parametrize("name", custom_cells.CELLS)
@pytest.mark.parametrize("option", ["plain", "reset", "hold", "mean"])
def test_custom_cells(name, option, threads, monkeypatch):
    monkeypatch.setattr(reference_modifiers, "published", custom_cells.published)
    options = {"plain": {}, "mean": {"zoneout": (0.3,) * 4, "mean": True}}.get(
        option
    ) or reference_modifiers.OPTIONS.get(option, {})
    for B, H in ((3, 6), (1, 37)):
        made = custom_cells.case(name, options, "float32", 5, B, 4, H, reverse=option == "hold")
        reference_modifiers.check(made, run(made.case))


@pytest.mark.parametrize("G", [2, 5, 9])
def test_any_number_of_gates(G, threads):
    """More gates than a tile has columns."""
    from gpu_rnn.kernels.mathematics import tanh

    def step(x, h, state):
        total = state[0]
        for a, b in zip(x, h):
            total = total * tanh(a + b) + a * b
        return (total,)

    cell = cells.make_cell(f"gates{G}", "abcdefghi"[:G], "h", step)
    rng = np.random.default_rng(G)
    x, w, r, b = (rng.standard_normal(s) * 0.3 for s in ((4, 3, 5), (G * 11, 5), (G * 11, 11), G * 11))
    h = np.zeros((3, 11))
    weights = native.Weights(w, r, b, None)
    y, _, _ = calls.forward(native.forward, cell, x, weights, (h,), reverse=False, save=False)
    for now, actual in zip(x, y):
        (h,) = step(np.split(now @ w.T + b, G, 1), np.split(h @ r.T, G, 1), (h,))
        np.testing.assert_allclose(actual, h, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("reverse", [False, True])
def test_reads_x_where_it_lies(library, reverse, rng, threads):
    """Rows before time steps, every second time step, one for all, every second input: the bits of a copy."""
    cell = cells.get("gru")
    for T, B in ((6, 3), (1, 2), (60, 1)):
        arrays = [rng.standard_normal((B, 2 * T, 9)), *flatten(sequences.sequence_arrays(rng, "gru", T, B, 5, 11)[1:])]
        wide, *weights, h = [None if a is None else library.asarray(a) for a in arrays]
        views = wide[:, :T, :5], wide[:, ::2, 4:], library.broadcast_to(wide[:, :1, :5], (B, T, 5)), wide[:, :T, ::2]
        for x in [view.swapaxes(0, 1) for view in views]:
            results = []
            for array in (x, library.zeros_like(x) + x):
                call = cell, array, Weights(*weights), (h,)
                y, last, saved = calls.forward(native.forward, *call, reverse=reverse, save=True)
                needs = {"x", "w_ih"}
                grads = calls.backward(native.backward, *call, y, saved, y, last, reverse=reverse, needs=needs)
                results.append([y, *last, *grads["state"], grads["x"], grads["w_ih"]])
            assert all(map(np.array_equal, *results))


def flatten(groups):
    return [array for group in groups for array in group]


# ---- bits -----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_depend_on_nothing_but_the_row(name, dtype, monkeypatch, rng):
    """Neither on T nor on B nor on threads: a step is a sequence, a row is a batch."""
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)
    cell = cells.get(name)
    for B, H in ((7, 37), (1, 300), (2, 20), (64, 20)):
        x, weights, state = sequences.sequence_arrays(rng, name, 6, B, 5, H, dtype=dtype)
        results = []
        for count in (1, 2, 5):
            monkeypatch.setattr(native, "threads", lambda: count)  # noqa: B023
            y, last, saved = calls.forward(native.forward, cell, x, weights, state, reverse=False, save=True)
            needs = {"x", "w_ih", "w_hh", "b_ih", "b_hh"}
            gradients = calls.backward(native.backward, cell, x, weights, state, y, saved, y, last, needs=needs
            )  # fmt: skip
            results.append([y, *last, *gradients.pop("state"), *gradients.values()])
        for others in results[1:]:
            assert all(map(np.array_equal, results[0], others))
        y, hx = results[0][0], state
        for t in range(6):
            now, hx, _ = calls.forward(native.forward, cell, x[t : t + 1], weights, hx, reverse=False, save=False)
            assert np.array_equal(now[0], y[t])
        row, _, _ = calls.forward(
            native.forward, cell, x[:, -1:], weights, tuple(s[-1:] for s in state), reverse=False, save=False
        )
        assert np.array_equal(row[:, 0], y[:, -1])


# ---- instruction sets and functions ---------------------------------------------------------------------------------


@pytest.fixture(params=[i for i in isa.TABLE if i.features <= compiler.cpu()[1]], ids=lambda i: i.name)
def instruction_set(request, monkeypatch):
    """All that this CPU has."""
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)
    for remembered in (native.code, native.library):
        remembered.cache_clear()
    yield request.param
    for remembered in (native.code, native.library):
        remembered.cache_clear()


def test_every_instruction_set(instruction_set):
    for name, options in (("lstm", reference_modifiers.OPTIONS["all"]), ("gru", {"norm": True}), ("rnn_tanh", {})):
        for dtype in ("float32", "bfloat16"):
            made = reference_modifiers.drawn(name, options, dtype, 4, 7, 5, 35, reverse=True)
            reference_modifiers.check(made, run(made.case))


def test_the_table_chooses_by_what_the_cpu_has():
    assert isa.best(frozenset({"avx2", "fma", "sse2"})) is isa.AVX2
    assert isa.best(frozenset({"avx2", "fma", *isa.AVX512_FEATURES})) is isa.AVX512
    assert isa.best(frozenset({"asimd"})) is isa.NEON
    assert isa.best(frozenset({"avx2"})) is isa.PLAIN
    assert [i.lanes("float32") for i in isa.TABLE] == [16, 8, 4, 4]
    assert isa.AVX512.tile(4) == "6 rows x 4 vectors"
    assert isa.AVX2.tile(3) == "4 rows x 3 vectors"


EXACT = {
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sigmoid": lambda a: np.where(a < 0, np.exp(-abs(a)), 1.0) / (1 + np.exp(-abs(a))),
    "positive": lambda a: 1 - np.less_equal(a, 0).astype(a.dtype),
}


def over(name, values, real):
    source = native.text("simd.h", "sequence.h") + (Path(__file__).parent / "native_functions.cpp").read_text()
    function = getattr(compiler.load(f"functions-{real}", source, native.flags(real)), f"over_{name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    padded = np.concatenate([values, np.ones(-len(values) % 64, real)]).astype(real)
    out = np.empty_like(padded)
    function(padded.ctypes.data, out.ctypes.data, len(padded))
    return out[: len(values)]


@pytest.mark.parametrize("name", EXACT)
def test_functions_are_right_to_4_ulp(name, instruction_set):
    """Over all magnitudes of float32, of both signs, denormal numbers and infinities and NaN among them."""
    values = np.arange(0, 1 << 32, 509, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([values, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, -1.0], np.float32)])
    values = np.concatenate([values, np.linspace(-110, 110, 200_001, dtype=np.float32)])
    with np.errstate(all="ignore"):
        exact, actual = EXACT[name](values.astype(np.float64)), over(name, values, "float32")
        rounded = exact.astype(np.float32)
    finite = np.isfinite(rounded)
    ulp = np.spacing(np.abs(rounded[finite])).astype(np.float64)
    assert (np.abs(actual[finite] - exact[finite]) / ulp).max() <= 4
    np.testing.assert_array_equal(actual[~finite], rounded[~finite])


@pytest.mark.parametrize("name", EXACT)
def test_functions_in_float64(name, instruction_set):
    """NumPy's are right to an ulp or two themselves."""
    rng = np.random.default_rng(0)
    values = np.concatenate([
        rng.uniform(-750, 715, 50_000), rng.uniform(-3, 3, 50_000),
        rng.choice([-1, 1], 50_000) * 10.0 ** rng.uniform(-320, 308, 50_000), [np.inf, -np.inf, np.nan, 0.0, -0.0],
    ])  # fmt: skip
    with np.errstate(all="ignore"):
        exact, actual = EXACT[name](values.astype(np.longdouble)), over(name, values, "float64")
        rounded = exact.astype(np.float64)
    finite = np.isfinite(rounded)
    ulp = np.spacing(np.abs(rounded[finite])).astype(np.longdouble)
    assert (np.abs(actual[finite] - exact[finite]) / ulp).max() <= 4
    np.testing.assert_array_equal(actual[~finite], rounded[~finite])


# ---- threads and processes ------------------------------------------------------------------------------------------


def test_several_python_threads_at_once(monkeypatch, rng):
    monkeypatch.setattr(native, "threads", lambda: 2)
    monkeypatch.setattr(native, "WORTH_A_THREAD", 0)
    cases = [sequences.sequence_arrays(rng, "lstm", 40, 1 + k % 5, 3, 21, dtype=np.float32) for k in range(12)]

    def compute(k):
        x, weights, state = cases[k % 12]
        return calls.forward(native.forward, cells.get("lstm"), x, weights, state, reverse=False, save=False)[0]

    expected = [compute(k) for k in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for k, y in enumerate(pool.map(compute, range(120))):
            assert np.array_equal(y, expected[k % 12])


FORKED = """
import os
import numpy as np
from gpu_rnn.backends import native
from gpu_rnn.kernels import cells
from tests import calls
from tests.conftest import sequence_arrays
native.threads, native.WORTH_A_THREAD = lambda: 3, 0
x, w, s = sequence_arrays(np.random.default_rng(0), "gru", 9, 2, 3, 40)
def run():
    return calls.forward(native.forward, cells.get("gru"), x, w, s, reverse=False, save=False)[0]
y = run()
if (child := os.fork()) == 0:
    os._exit(0 if np.array_equal(run(), y) else 7)
_, status = os.waitpid(child, 0)
assert np.array_equal(run(), y)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_threads_of_its_own():
    assert subprocess.check_output([sys.executable, "-c", FORKED], timeout=120, text=True) == "0\n"


def test_idle_threads_sleep(rng):
    code = "import time; exec(open(0).read()); begin = time.process_time(); time.sleep(0.5)"
    code += "; print(time.process_time() - begin < 0.1)"
    said = subprocess.check_output(
        [sys.executable, "-c", code], input=FORKED.partition("if (child")[0], timeout=120, text=True
    )
    assert said == "True\n"


OPENMP = """
import os, sys
import torch
import gpu_rnn
from gpu_rnn.backends import native
native.WORTH_A_THREAD = 0
torch.set_num_threads(2)
layer, x = gpu_rnn.LSTM(20, 40), torch.randn(9, 3, 20)
tasks = lambda: len(os.listdir("/proc/self/task"))
def run():
    layer.zero_grad()
    y, _ = layer(x)
    y.sum().backward()
    return [y.detach(), *[p.grad for p in layer.parameters()]]
torch.set_num_threads(1)
expected = run()
torch.set_num_threads(2)
torch.ones(1 << 20).exp()
before = tasks()
same = lambda: all(map(torch.equal, run(), expected))
"""
RUNS_ON_OPENMP = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info(),
    reason="torch has no OpenMP here, or there is no telling how many threads there are",
)


def by_openmp(code, **env):
    return subprocess.check_output(
        [sys.executable, "-c", OPENMP + code], timeout=120, text=True, env={**os.environ, **env}
    ).strip()


@RUNS_ON_OPENMP
def test_tensors_are_computed_on_the_threads_of_torch():
    assert by_openmp("print(same(), tasks() - before)") == "True 0"


@RUNS_ON_OPENMP
def test_an_openmp_that_gives_fewer_threads_leaves_the_work_to_others():
    assert by_openmp("print(same(), tasks() - before)", OMP_THREAD_LIMIT="1") == "True 1"


@RUNS_ON_OPENMP
def test_a_fork_does_not_wait_for_openmp():
    child = "os._exit(0 if same() and tasks() == 2 else 7)"
    code = f"same()\nif (child := os.fork()) == 0: {child}\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same(), tasks() - before)"
    assert by_openmp(code) == "0 True 0"


@RUNS_ON_OPENMP
@pytest.mark.parametrize("before", ["pass", "run(torch.float32)"])
def test_a_library_loaded_in_a_fork_does_not_wait_for_openmp(before):
    """Its parent used OpenMP before; there is a library for every dtype."""
    code = f"""
import os, sys, torch
def run(dtype):
    import gpu_rnn
    from gpu_rnn.backends import native
    native.WORTH_A_THREAD = 0
    gpu_rnn.GRU(20, 40, dtype=dtype)(torch.randn(9, 3, 20, dtype=dtype))
torch.set_num_threads(2)
torch.ones(1 << 20).exp()
{before}
if (child := os.fork()) == 0:
    run(torch.float64)
    os._exit(len(os.listdir("/proc/self/task")))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.check_output([sys.executable, "-c", code], timeout=120, text=True) == "2\n"


# ---- through the front door -----------------------------------------------------------------------------------------


def test_a_tensor_without_memory_is_not_read():
    with pytest.raises(ValueError, match=r"a tensor of shape \[5, 2, 3\] has no memory"):
        gpu_rnn.GRU(3, 4)(torch._efficientzerotensor((5, 2, 3)))


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_gradcheck(name, function, options, rng):
    x, weights, state = sequences.sequence_arrays(rng, name, 4, 2, 3, 3)
    letters = [letter + "0" for letter in cells.get(name).states]
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], *state)]

    def call(*tensors):
        y, last = function(*tensors[:5], **dict(zip(letters, tensors[5:])), backend="native", **options)
        return (y, *last) if isinstance(last, tuple) else (y, last)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_arguments_may_be_strided_expanded_read_only_and_stay_untouched(name, function, options, rng):
    x, weights, state = sequences.sequence_arrays(rng, name, 4, 3, 5, 6)
    named = {letter + "0": s for letter, s in zip(cells.get(name).states, state)}
    expected, _ = function(x, *weights[:4], **named, backend="native", **options)
    odd = {letter: np.repeat(s, 2, axis=1)[:, ::2] for letter, s in named.items()}
    inputs = [np.asfortranarray(a) for a in (x, *weights[:4])]
    for array in (*inputs, *odd.values()):
        array.flags.writeable = False
    (y, last), pullback = gpu_rnn.vjp(function, *inputs, **odd, backend="native", **options)
    assert np.array_equal(y, expected)
    dy = np.broadcast_to(rng.standard_normal((1, 1, 6)), y.shape)
    nothing = [None] * len(state)
    _, contiguous = gpu_rnn.vjp(function, x, *weights[:4], **named, backend="native", **options)
    for key, gradient in contiguous((dy.copy(), nothing)).items():
        np.testing.assert_array_equal(pullback((dy, nothing))[key], gradient, err_msg=key)


@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_an_empty_batch_gives_empty_results(name, function, options, rng):
    x, weights, state = sequences.sequence_arrays(rng, name, 4, 0, 3, 5)
    (y, last), pullback = gpu_rnn.vjp(function, x, *weights[:4], backend="native", **options)
    assert y.shape == (4, 0, 5)
    gradients = pullback((y, None if len(state) == 1 else (None, None)))
    assert gradients["x"].shape == x.shape
    assert gradients["w_hh"].shape == weights.w_hh.shape
    assert not gradients["w_hh"].any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("name", "function", "options"), FUNCTIONS)
def test_inputs_may_have_no_columns(name, function, options, library, rng):
    """An empty tensor has no address."""
    x, weights, _ = sequences.sequence_arrays(rng, name, 4, 3, 1, 5)
    arrays, results = (x[..., :0], weights.w_ih[:, :0], *weights[1:4]), []
    inputs = [torch.from_numpy(a) if library == "torch" else a for a in arrays]
    for backend in ("native", "numpy"):
        (y, last), pullback = gpu_rnn.vjp(function, *inputs, backend=backend, **options)
        gradients = pullback((y, last))
        assert [gradients[key].shape for key in ("x", "w_ih")] == [a.shape for a in arrays[:2]]
        results.append([y, *map(gradients.get, ("w_hh", "b_ih", "b_hh"))])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"recompute": True}], ids=str)
def test_layers(kind, options):
    torch.manual_seed(0)
    named = {k: v for k, v in options.items() if k != "recompute"}
    theirs = getattr(torch.nn, kind)(5, 9, **named).double()
    ours = getattr(gpu_rnn, kind)(5, 9, **options, dtype=torch.float64, backend="native")
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(6, 3, 5, dtype=torch.float64), []
    for layer in (ours, theirs):
        y, _ = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_histories_and_streams_and_torch_compile():
    torch.manual_seed(0)
    layer = gpu_rnn.LSTM(5, 9, num_layers=2, backend="native", step_exact=True)
    x = torch.randn(6, 3, 5)
    y, _ = layer(x)
    listen = gpu_rnn.stream(layer, 3)
    with torch.no_grad():
        for now, expected in zip(x, y):
            assert torch.equal(listen(now), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    captured, _ = compiled(x)
    assert torch.equal(captured, y)
    for a, b in zip(*(torch.autograd.grad(o.sum(), list(layer.parameters())) for o in (captured, y)), strict=True):
        torch.testing.assert_close(a, b)
    inputs = [torch.randn(s) for s in ((6, 3, 5), (36, 5), (36, 9))]
    for reverse in (False, True):
        y, last, (h, c) = gpu_rnn.lstm(*inputs, reverse=reverse, return_states=True, backend="native")
        _, _, (h_, c_) = gpu_rnn.lstm(*inputs, reverse=reverse, return_states=True, backend="numpy")
        torch.testing.assert_close((h, c), (h_, c_))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_returned_states_may_be_modified(recompute, reverse, rng):
    """Also those that are returned without a copy, as any result of torch's."""
    x, *weights = [torch.tensor(rng.standard_normal(s)) for s in ((6, 3, 5), (36, 5), (36, 9))]
    run = partial(gpu_rnn.lstm, reverse=reverse, recompute=recompute, return_states=True, backend="native")
    with torch.no_grad():
        _, _, (_, c) = run(x, *weights)
    c[0] = 2 * weights[0].requires_grad_()[:3, :1]
    assert c.requires_grad
    assert c[0].unique().numel() == 3
    c.detach_()
    gradients = []
    for double in (torch.Tensor.mul, torch.Tensor.mul_):
        _, _, (_, c) = run(x, *weights)
        gradients += torch.autograd.grad(double(c, 2).sum(), weights[0])
    assert torch.equal(*gradients)


def test_vjp_of_tensors_that_need_gradients():
    inputs = [torch.randn(s, requires_grad=True) for s in ((6, 3, 5), (36, 5), (36, 9), 36, 36)]
    (y, _), pullback = gpu_rnn.vjp(gpu_rnn.lstm, *inputs, backend="native")
    actual = pullback((torch.ones_like(y), (None, None)))
    y, _ = gpu_rnn.lstm(*inputs, backend="native")
    expected = torch.autograd.grad(y.sum(), inputs)
    for name, gradient in zip(("x", "w_ih", "w_hh", "b_ih", "b_hh"), expected):
        assert torch.equal(actual[name], gradient)


def test_long_sums_keep_their_precision(rng):
    T, B, H = 1024, 64, 4
    dy = rng.standard_normal((T, B, H)).astype(np.float32)
    x, (w_ih, _, b_ih, b_hh, *_), _ = sequences.sequence_arrays(rng, "rnn_relu", T, B, 1, H, dtype=np.float32)
    weights = np.zeros_like(w_ih), np.zeros((H, H), np.float32), np.ones_like(b_ih), np.zeros_like(b_hh)  # h = 1
    _, pullback = gpu_rnn.vjp(gpu_rnn.rnn, x, *weights, nonlinearity="relu", backend="native")
    exact = dy.astype(np.float64).sum((0, 1))
    error = np.abs(pullback((dy, None))["b_ih"] - exact).max()
    assert error <= 4 * np.spacing(np.abs(exact).max().astype(np.float32))


def test_long_sums_after_two_passes_do_too(rng):
    x, weights, _ = sequences.sequence_arrays(rng, "gru", 1024, 64, 1, 4)
    dy, gradients = rng.random((1024, 64, 4)), []
    for dtype in ("float32", "float64"):
        inputs = [array.astype(dtype) for array in (x, *weights[:4])]
        _, pullback = gpu_rnn.vjp(gpu_rnn.gru, *inputs, reset_after=False, backend="native")
        gradients.append(pullback((dy.astype(dtype), None))["b_ih"])
    np.testing.assert_allclose(*gradients, rtol=0, atol=2e-7 * np.abs(gradients[1]).max())


@pytest.mark.parametrize("B", [1, 512])
def test_extreme_values_stay_finite(B):
    x = np.array([0.0, 1e4, -1e4, 1e30, -1e30], np.float32).reshape(5, 1, 1).repeat(B, 1)
    for name, function, options in FUNCTIONS:
        G = cells.get(name).G
        w, r = np.ones((G * 2, 1), np.float32), np.ones((G * 2, 2), np.float32)
        y, _ = function(x, w, r, backend="native", **options) if name != "rnn_relu" else (x, None)
        assert np.isfinite(y).all()
        y, _ = function(np.full_like(x, np.nan), w, r, backend="native", **options)
        assert np.isnan(y).all(), name


def test_it_says_what_it_does():
    text = str(gpu_rnn.explain("lstm", T=5, B=2, I=3, H=4, device="cpu", library="numpy", backend="native"))
    isa = native.instruction_set()
    assert f"float32, {isa.name}, {isa.lanes('float32')} lanes, tiles of {isa.tile(4)}" in text
    assert "at most" in text
    assert native.warmup(gpu_rnn.core.problem.Problem(apply_modifiers(cells.get("lstm"), hold=True), 1, 1, 1, 1))


# ---- sanitizers -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "a barrier is missing": ("thread", "barrier.wait();\n            if (!f.W_hr) continue;", "if (!f.W_hr) continue;"),
    "an index is shifted": ("address", "load(panel + n * next + c * V)", "load(panel + n * next + (c + 1) * V)"),
}


def sanitized(sanitizer, *mutation):
    if (why := sanitize.why_not(sanitizer)) is not None:
        pytest.skip(why)
    return sanitize.run(sanitizer, ["-m", "tests.native_sanitized", sanitizer, *mutation])


@pytest.mark.first
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_sanitizer_finds_nothing(sanitizer):
    """All shapes and modifiers, by two threads."""
    outcome = sanitized(sanitizer)
    assert outcome.returncode == 0, outcome.output
    assert not outcome.reports


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_sanitizer_finds_a_mistake(mistake):
    outcome = sanitized(*MISTAKES[mistake])
    assert outcome.reports, outcome.output
