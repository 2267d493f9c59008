"""The CUDA backend on a GPU: every result, and what only a GPU can show. test_cuda runs the same kernels on a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.backends import cuda, triton
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.core import arrays
from gpu_rnn.core.problem import Problem, Result, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calls, cell_struct, reference_modifiers, sequences
from .tolerance import assert_close

pytestmark = pytest.mark.gpu
EVERY = pytest.mark.parametrize("name", cells.NAMES)
ARRAYS = pytest.mark.parametrize(
    ("library", "dtype"),
    [*(("torch", dtype) for dtype in arrays.DTYPES), *(("cupy", dtype) for dtype in ("float64", "float32", "float16"))],
)
SIZES = [  # T, B, I, H: aligned, ragged and degenerate
    (1, 1, 1, 1), (5, 2, 7, 31), (3, 70, 4, 100), (20, 16, 64, 256),
]  # fmt: skip
# Those where the weights stay on-chip, on a Hopper GPU, both ways; where both directions of a layer go at once; and
# where the batch takes several launches, at least forward. test_residence sees to it that plans are so.
PERSISTENT = [(4, 3, 5, 20), (20, 17, 9, 128), (6, 40, 7, 300), (5, 9, 33, 512), (7, 5, 8, 700)]
MODIFIED = {  # where the weights are, and a problem with few time steps that goes step by step
    "block": ("lstm", 6, 9, 24), "cluster": ("gru", 5, 20, 300), "grid": ("rnn_tanh", 6, 5, 1100),
    "per step": ("lstm", 3, 4, 33),
}  # fmt: skip
NORMALIZED = MODIFIED | {  # and more hidden units than a block of the per-step kernel has threads
    "grid": ("lstm", 5, 8, 1100), "many units": ("gru", 3, 3, 2050),
}  # fmt: skip
BOTH_AT_ONCE = {"block": (4, 3, 5, 20), "cluster": (20, 17, 9, 256), "grid": (7, 4, 8, 700)}
LONG = {"block": 64, "cluster": 256, "grid": 768}  # H
SEVERAL_LAUNCHES = [
    ("gru", "float32", (4, 100, 8, 700)),
    ("lstm", "bfloat16", (4, 150, 8, 600)),
    ("rnn_tanh", "float16", (4, 130, 8, 1100)),
]
PRECISIONS = {"ieee": ("float32", False), "tf32": ("float32", True), "bfloat16": ("bfloat16", False)}
# How a kernel's groups are launched; "crowded": more clusters at once than the device has room for, which no plan does.
FILLS = {
    "block": ("one wave", "waves"),
    "cluster": ("one launch", "launches", "crowded"),
    "grid": ("one launch", "launches"),
}
MOST_OF_THE_GRID = "lstm", "bfloat16", (200, 24, 8, 1100)  # of two such launches one has to wait


def moved(library, case):
    """To the GPU, as arrays of `library`."""
    if library == "torch":
        return case.mapped(torch.Tensor.cuda)
    cupy = pytest.importorskip("cupy")
    return case.mapped(lambda tensor: cupy.asarray(tensor.numpy()))


def trained(case, x, needs):
    """y and the gradients of a case with another x, by the CUDA backend."""
    inputs = case.cell, x, case.weights, case.state
    y, _, saved = calls.forward(cuda.forward, *inputs, save=True)
    return y, calls.backward(cuda.backward, *inputs, y, saved, case.dy, case.dlast, needs=needs)


def problem_of(name, dtype, size, **options):
    """float32 is multiplied as TF32 in one direction, and as IEEE's in two."""
    tf32 = dtype == "float32" and options.get("directions", 1) == 1
    keywords = {"dtype": dtype, "device": "cuda", "library": "torch", "training": True, "tf32": tf32}
    return Problem(cells.get(name), *size, **keywords, **options)


def plans(problem, on):
    """Forward and back: the persistent ones, or None."""
    return [cuda.persistent_config(problem, on, backward)[0] for backward in (False, True)]


@EVERY
@pytest.mark.parametrize("size", PERSISTENT, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scope", persistent.SCOPES)
def test_persistent_kernels(name, dtype, size, scope, monkeypatch):
    """Weights on-chip, in each scope that can hold them; one batch tile and several."""
    monkeypatch.setattr(cuda, "SCOPES", (scope,))
    problem = problem_of(name, dtype, size)
    if None in plans(problem, cuda.device()):
        pytest.skip(cuda.plan(problem))
    check_as_planned(problem, reverse=bool(size[0] % 2))


def isolated(name, precision, directions, scope, fill, on):
    """A small problem, and the device as plans have to see it, so that its kernels differ from others' in one thing."""
    dtype, tf32 = PRECISIONS[precision]
    B, H = {"launches": (80, 64), "waves": (40000, 64), "crowded": (5000, 256)}.get(fill, (9, 64))
    on = replace(on, scopes=(scope,), proven_only=False)
    if fill == "launches":
        clusters = tuple((blocks, directions) for blocks, _ in on.clusters)
        on = replace(on, multiprocessors=4 * directions, clusters=clusters)
    elif fill in ("waves", "crowded"):
        on = replace(on, multiprocessors=10**6, clusters=((16, 10**6),))
    keywords = {"dtype": dtype, "device": "cuda", "library": "torch", "training": True, "tf32": tf32}
    return Problem(cells.get(name), 5, B, 3, H, directions=directions, **keywords), on


@pytest.mark.parametrize("name", cells.NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("directions", [1, 2], ids=["alone", "both"])
@pytest.mark.parametrize(("scope", "fill"), [(scope, fill) for scope in FILLS for fill in FILLS[scope]])
def test_one_cause(scope, fill, directions, precision, name, monkeypatch):
    """Each thing that a persistent kernel may be wrong with, apart from all others; right, and the same once more."""
    problem, on = isolated(name, precision, directions, scope, fill, cuda.device())
    monkeypatch.setattr(cuda, "device", lambda: on)
    if fill == "crowded":
        monkeypatch.setattr(cuda, "max_coresident", lambda *plan: 10**6)
    if None in plans(problem, on):
        pytest.skip(cuda.plan(problem))
    size = problem.T, problem.B, problem.I, problem.H
    drawn = [sequences.draw(name, problem.dtype, *size, reverse=bool(k), seed=k) for k in range(directions)]
    cases = [moved("torch", case) for case in drawn]
    first, again = (side_by_side(cases, problem.tf32) for _ in range(2))
    for case, one, other in zip(cases, first, again, strict=True):
        for what, ours in one.items():
            assert torch.equal(ours, other[what]), f"{what} isn't repeatable"
        sequences.check(case, one, tf32=problem.tf32)


def side_by_side(cases, tf32):
    """Every result by name of cases that differ in their direction, in one launch where the plan has it so."""
    cell = cases[0].cell
    outputs = calls.forward_many(cuda.forward, cases, tf32=tf32)
    gradients = calls.backward_many(cuda.backward, cases, outputs, tf32=tf32)
    return [
        {"y": y, **{f"{letter}T": a for letter, a in zip(cell.states, last)}, **sequences.named(case, gradient)}
        for case, (y, last, *_), gradient in zip(cases, outputs, gradients)
    ]


@pytest.mark.parametrize(("name", "dtype", "size"), SEVERAL_LAUNCHES)
def test_a_batch_of_several_launches(name, dtype, size):
    problem = problem_of(name, dtype, size)
    plan, _ = plans(problem, cuda.device())
    assert plan, cuda.plan(problem)
    assert plan.launches > 1, cuda.plan(problem)
    check_as_planned(problem, reverse=False)


def check_as_planned(problem, reverse):
    size = problem.T, problem.B, problem.I, problem.H
    case = sequences.draw(problem.cell.name, problem.dtype, *size, reverse=reverse)
    sequences.check(case, moved("torch", case).run(cuda.forward, cuda.backward, problem.tf32), tf32=problem.tf32)


@pytest.mark.parametrize("backend", [cuda, triton], ids=["cuda", "triton"])
@pytest.mark.parametrize("option", reference_modifiers.OPTIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("place", MODIFIED)
def test_modifiers(place, dtype, option, backend, monkeypatch):
    """With IEEE products."""
    (name, T, B, H), scopes = MODIFIED[place], tuple({place} & {*persistent.SCOPES})
    monkeypatch.setattr(cuda, "SCOPES", scopes)
    made = reference_modifiers.drawn(
        name, reference_modifiers.OPTIONS[option], dtype, T, B, 7, H, reverse=name == "gru"
    )
    reference_modifiers.check(made, moved("torch", made.case).run(backend.forward, backend.backward))


@pytest.mark.parametrize("backend", [cuda, triton], ids=["cuda", "triton"])
@pytest.mark.parametrize("option", reference_modifiers.NORMED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("place", NORMALIZED)
def test_layer_normalization(place, dtype, option, backend, monkeypatch):
    """Where there are reductions over hidden units; with IEEE products."""
    (name, T, B, H), scopes = NORMALIZED[place], tuple({place} & {*persistent.SCOPES})
    monkeypatch.setattr(cuda, "SCOPES", scopes)
    made = reference_modifiers.drawn(name, reference_modifiers.NORMED[option], dtype, T, B, 7, H, reverse=name == "gru")
    reference_modifiers.check(made, moved("torch", made.case).run(backend.forward, backend.backward))


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scope", BOTH_AT_ONCE)
def test_both_directions_in_one_launch(scope, dtype, name, monkeypatch):
    """The numbers of a launch for each, bit for bit."""
    monkeypatch.setattr(cuda, "SCOPES", (scope,))
    size = BOTH_AT_ONCE[scope]
    problem = problem_of(name, dtype, size, directions=2)
    assert [plan.directions for plan in plans(problem, cuda.device()) if plan] == [2, 2], cuda.plan(problem)
    pair = [moved("torch", sequences.draw(name, dtype, *size, reverse=back, seed=back)) for back in (False, True)]
    alone = [case.run(cuda.forward, cuda.backward) for case in pair]
    for one, together in zip(alone, side_by_side(pair, tf32=False), strict=True):
        for what, ours in together.items():
            assert torch.equal(one[what], ours), what


def test_a_bidirectional_layer_trains_as_one_graph():
    """Nothing waits, a CUDA graph captures it, and torch.compile sees the strides that come."""
    layer = gpu_rnn.LSTM(16, 64, bidirectional=True, num_layers=2, device="cuda")
    gpu_rnn.warmup(layer, T=12, B=3, training=True)
    x = torch.randn(12, 3, 16, device="cuda")
    expected = torch.autograd.grad(layer(x)[0].square().sum(), tuple(layer.parameters()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = torch.autograd.grad(layer(x)[0].square().sum(), tuple(layer.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(layer(x)[0].square().sum(), tuple(layer.parameters()))
    graph.replay()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    through = torch.autograd.grad(compiled(x)[0].square().sum(), tuple(layer.parameters()))
    torch.cuda.synchronize()
    for gradients in (again, captured, through):
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("L", "T", "B", "H"), [(2, 300, 3, 700), (4, 300, 9, 512), (3, 500, 5, 330)])
def test_layers_as_a_wavefront(L, T, B, H, dtype, name):
    """As good as one after the other, forward and, over what it saved, back."""
    problem = Problem(cells.get(name), T, B, H, H, dtype=dtype, device="cuda", library="torch", layers=L)
    if not cuda.fuses_layers(problem, backward=False):
        assert "layer after layer" in cuda.plan(problem)
        pytest.skip(cuda.plan(problem))
    cases = [moved("torch", sequences.draw(name, dtype, T, B, H, H, seed=k)) for k in range(L)]
    cases = [case._replace(weights=case.weights._replace(w_hh=0.5 * case.weights.w_hh)) for case in cases]
    outputs, x = calls.forward_many(cuda.forward, cases, linked=True), cases[0].x
    exact = sequences.wide(x)
    for case, (y, last, _, saved) in zip(cases, outputs):
        alone, last_alone, saved_alone = calls.forward(
            cuda.forward, problem.cell, x, case.weights, case.state, reverse=False, save=True
        )
        wide = case.mapped(sequences.wide)
        exact, last_exact, _ = calls.forward(
            numpy_backend.forward, problem.cell, exact, wide.weights, wide.state, reverse=False, save=False
        )
        for ours, peer, truth in zip((y, *last), (alone, *last_alone), (exact, *last_exact)):
            assert_close(*map(sequences.wide, (ours, truth, peer)), dtype, f"{name} T={T} H={H} L={L}")
        forwards = [(y, saved), (alone, saved_alone)]
        dx, dx_alone = (
            calls.backward(
                cuda.backward,
                problem.cell,
                x,
                case.weights,
                case.state,
                *kept,
                case.dy,
                case.dlast,
                reverse=False,
                needs={"x"},
            )["x"]
            for kept in forwards
        )
        torch.testing.assert_close(dx, dx_alone, rtol=0, atol=0.02 * dx_alone.abs().max().item())
        x = y


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("L", "T", "B", "H"), [(2, 200, 3, 700), (4, 100, 9, 512), (3, 150, 5, 330)])
def test_layers_as_a_wavefront_back(L, T, B, H, dtype, name):
    """As good as one by one over the same saved activations, and repeatable; only the last layer has a dy."""
    problem = replace(Problem(cells.get(name), T, B, H, H, dtype=dtype, device="cuda", library="torch"), layers=L)
    if not cuda.fuses_layers(problem, backward=True):
        assert "layer after layer" in cuda.plan(replace(problem, training=True)).split("back:")[1]
        pytest.skip(cuda.plan(problem))
    cases = [moved("torch", sequences.draw(name, dtype, T, B, H, H, seed=k)) for k in range(L)]
    cases = [case._replace(weights=case.weights._replace(w_hh=0.5 * case.weights.w_hh)) for case in cases]
    seen, exact_seen = [cases[0].x], [sequences.wide(cases[0].x)]
    forwards, exact_forwards = [], []
    for case in cases:
        y, _, saved = calls.forward(
            cuda.forward, problem.cell, seen[-1], case.weights, case.state, reverse=False, save=True
        )
        wide = case.mapped(sequences.wide)
        exact = calls.forward(
            numpy_backend.forward, problem.cell, exact_seen[-1], wide.weights, wide.state, reverse=False, save=True
        )
        forwards.append((y, saved))
        exact_forwards.append((exact[0], exact[2]))
        seen.append(y)
        exact_seen.append(exact[0])
    dys = [*[None] * (L - 1), cases[-1].dy]
    results = [Result(y, (), (), saved) for y, saved in forwards]
    ours, again = (calls.backward_many(cuda.backward, cases, results, linked=True, dys=dys) for _ in range(2))
    dy, exact_dy = cases[-1].dy, sequences.wide(cases[-1].dy)
    for k in reversed(range(L)):
        case, wide = cases[k], cases[k].mapped(sequences.wide)
        inputs = problem.cell, seen[k], case.weights, case.state, *forwards[k], dy, case.dlast
        alone = calls.backward(cuda.backward, *inputs, reverse=False, needs=case.needs)
        inputs = problem.cell, exact_seen[k], wide.weights, wide.state, *exact_forwards[k], exact_dy, wide.dlast
        truth = calls.backward(numpy_backend.backward, *inputs, reverse=False, needs=case.needs)
        for what in case.needs - ({"x"} if k else set()):
            assert torch.equal(ours[k][what], again[k][what]), what
            gradients = map(sequences.wide, (ours[k][what], truth[what], alone[what]))
            assert_close(*gradients, dtype, f"{name} d{what}{k} T={T} H={H} L={L}")
        dy, exact_dy = alone["x"], truth["x"]


def test_a_stack_trains_as_one_graph():
    """Nothing waits, and a CUDA graph captures the wavefront."""
    layer = gpu_rnn.LSTM(64, 512, num_layers=4, device="cuda", dtype=torch.bfloat16)
    for way in str(gpu_rnn.explain(layer, (256, 8, 64), training=True)).split("back:")[:2]:
        assert "as a wavefront" in way
    gpu_rnn.warmup(layer, T=256, B=8, training=True)
    x, parameters = torch.randn(256, 8, 64, device="cuda", dtype=torch.bfloat16), tuple(layer.parameters())
    expected = torch.autograd.grad(layer(x)[0].square().sum(), parameters)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = torch.autograd.grad(layer(x)[0].square().sum(), parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(layer(x)[0].square().sum(), parameters)
    for _ in range(3):  # the stamps of the last replay must not let anybody pass
        graph.replay()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    through = torch.autograd.grad(compiled(x)[0].square().sum(), parameters)
    torch.cuda.synchronize()
    for gradients in (again, captured, through):
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))


@pytest.mark.parametrize(("scope", "H"), LONG.items())
def test_a_long_persistent_sequence(scope, H, monkeypatch):
    """Exchanges go on for thousands of steps, forward and back, and stay right."""
    monkeypatch.setattr(cuda, "SCOPES", (scope,))
    case = moved("torch", sequences.draw("gru", "float16", 3000, 4, 3, H))
    case = case._replace(weights=case.weights._replace(w_hh=0.5 * case.weights.w_hh))  # no chaos: errors die out
    sequences.check(case, case.run(cuda.forward, cuda.backward))


@EVERY
@ARRAYS
@pytest.mark.parametrize("reverse", [False, True])
def test_every_result_is_as_good_as_torchs(name, library, dtype, reverse):
    for size in SIZES:
        case = sequences.draw(name, dtype, *size, reverse=reverse)
        sequences.check(case, moved(library, case).run(cuda.forward, cuda.backward))


@ARRAYS
@pytest.mark.parametrize("reverse", [False, True])
def test_projection(library, dtype, reverse):
    for *size, P in ((3, 2, 5, 3, 1), (5, 17, 2, 64, 24)):
        case = sequences.draw("lstm", dtype, *size, P, reverse=reverse)
        sequences.check(case, moved(library, case).run(cuda.forward, cuda.backward))


@EVERY
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_cell_struct_equals_the_definition(name, dtype):
    cupy = pytest.importorskip("cupy")
    cell_struct.check_cell(cuda.prepare_launch, cupy.asarray, cupy.asnumpy, name, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_functions(dtype):
    cupy = pytest.importorskip("cupy")
    cell_struct.check_functions(cuda.prepare_launch, cupy.asarray, cupy.asnumpy, dtype)


@pytest.mark.parametrize("dtype", arrays.HALF_DTYPES)
def test_products_in_half_precision_are_not_rounded(dtype):
    a, b = (torch.randn(64, 64, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty(64, 64, device="cuda", dtype=getattr(torch, arrays.product_dtype("torch", dtype)))
    arrays.matmul(a, b.T, out=out)
    error = (out.double() - a.double() @ b.double().T).abs().max().item()
    assert error < 1e-4


@EVERY
def test_strided_and_expanded_arrays(name):
    case = moved("torch", sequences.draw(name, "float32", 4, 6, 5, 8))
    case = case._replace(dy=case.dy[:1, :1, :1].expand(case.dy.shape))
    plain = case._replace(dy=case.dy.contiguous()).run(cuda.forward, cuda.backward)
    spread = case.mapped(lambda a: torch.stack([a, torch.full_like(a, torch.nan)], -1)[..., 0])
    for name, ours in spread._replace(dy=case.dy).run(cuda.forward, cuda.backward).items():
        assert torch.equal(ours, plain[name]), name


def test_runs_on_the_callers_stream():
    """The other stream is kept busy before it writes x: a kernel on a wrong stream would see the old values."""
    case = moved("torch", sequences.draw("lstm", "float32", 4, 3, 5, 32))
    expected = case.run(cuda.forward, cuda.backward)
    x = torch.full_like(case.x, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(case.x)
        y, gradients = trained(case, x, {"x"})
    stream.synchronize()
    assert torch.equal(y, expected["y"])
    assert torch.equal(gradients["x"], expected["dx"])


def test_grids_on_two_streams_do_not_hold_each_other_up():
    """Each starts as a whole or not at all: half of one and half of another would wait for ever."""
    problem = problem_of(*MOST_OF_THE_GRID)
    assert 2 * plans(problem, cuda.device())[0].grid > cuda.device().multiprocessors
    name, dtype, size = MOST_OF_THE_GRID
    case = moved("torch", sequences.draw(name, dtype, *size))
    inputs = case.cell, case.x, case.weights, case.state
    expected, _, _ = calls.forward(cuda.forward, *inputs, reverse=False, save=False)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(calls.forward(cuda.forward, *inputs, reverse=False, save=False)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in outputs)


def test_waits_for_nothing_and_takes_no_foreign_memory():
    cupy = pytest.importorskip("cupy")
    case = moved("torch", sequences.draw("gru", "float32", 4, 3, 5, 32))
    case.run(cuda.forward, cuda.backward)
    held = cupy.get_default_memory_pool().total_bytes()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained(case, case.x, case.needs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cupy.get_default_memory_pool().total_bytes() == held


def test_captured_in_a_graph():
    """After `warmup` nothing is compiled or loaded any more; only the products' library needs a first run."""
    case = moved("torch", sequences.draw("lstm", "bfloat16", 4, 3, 5, 32))
    cuda.warmup(Problem(case.cell, 4, 3, 5, 32, dtype="bfloat16", device="cuda", library="torch"))
    x = case.x.clone()

    def both():
        return trained(case, x, {"x", "w_hh"})

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = both()
    x.copy_(case.x.flip(0))
    graph.replay()
    expected_y, expected = both()
    torch.cuda.synchronize()
    assert torch.equal(y, expected_y)
    assert torch.equal(gradients["x"], expected["x"])
    assert torch.equal(gradients["w_hh"], expected["w_hh"])


def test_autograd_over_a_retained_graph():
    case = moved("torch", sequences.draw("lstm", "float32", 6, 3, 5, 16))
    x, *weights = (array.clone().requires_grad_() for array in (case.x, *case.weights[:4]))
    h0, c0 = case.state
    y, (hT, cT) = gpu_rnn.lstm(x, *weights, h0=h0, c0=c0, backend="cuda", precision="ieee")
    expected = case.run(cuda.forward, cuda.backward)
    for _ in range(2):
        gradients = torch.autograd.grad((y, hT, cT), (x, *weights), (case.dy, *case.dlast), retain_graph=True)
        for name, gradient in zip(("x", *Weights._fields[:4]), gradients, strict=True):
            assert torch.equal(gradient, expected[f"d{name}"]), name


def test_offsets_beyond_32_bits():
    T, B, I, H = 33, 8192, 8, 2100
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    torch.manual_seed(1)
    x = torch.randn(T, B, I, device="cuda")
    weights = Weights(*(torch.randn(4 * H, n, device="cuda") * n**-0.5 for n in (I, H)))
    state = tuple(torch.zeros(B, H, device="cuda") for _ in range(2))
    cell = cells.get("lstm")
    y, _, saved = calls.forward(cuda.forward, cell, x, weights, state, reverse=False, save=True)
    rows = torch.tensor([0, 4097, B - 1], device="cuda")
    few, _, _ = calls.forward(
        cuda.forward, cell, x[:, rows], weights, tuple(s[rows] for s in state), reverse=False, save=False
    )
    np.testing.assert_allclose(y[:, rows].cpu().numpy(), few.cpu().numpy(), atol=1e-4)
    assert saved[0].numel() > 2**31
