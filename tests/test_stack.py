"""The layers of a stack as a wavefront in one launch: the kernel against the oracle, its races, its plans."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpu_rnn
from gpu_rnn import dispatch
from gpu_rnn.backends import cuda, sequence
from gpu_rnn.backends import numpy as oracle
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import residence
from gpu_rnn.kernels.cuda.launch import OPTIONS
from gpu_rnn.problem import Problem, Weights

from . import on_host, sequences
from .host import nvrtc, runtime, sanitize
from .resident import CUDA, EPSILON, decode, encode, poison, sources, zeros
from .tolerance import assert_close

ON_HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
SOURCE = (CUDA / "resident.cu").read_text()
DEVICES = residence.DEVICES
DTYPES = (*sorted(residence.SIZES), "ieee")  # which is float32 not as TF32


def stored(dtype):
    return "float32" if dtype == "ieee" else dtype


def planned(cell, dtype, H, T, B, layers, device):
    page = cells.get(cell)
    element = residence.element(page, backward=False)
    return residence.stack(page.G, element, stored(dtype), H, T, B, layers, device, ieee=dtype == "ieee")


def errors(name, dtype, T, B, H, layers, plan, kernels, *, save=True, seed=0, **options):
    """Run it; by layer and result, the largest error over what the operands' rounding allows: right when below 1."""
    cell, kept, rng = cells.get(name), stored(dtype), np.random.default_rng(5)
    G, S, K = cell.G, cell.S, cell.K

    def draw(*shape, scale=1.0):  # exactly what the dtype can store
        return decode(encode(scale * rng.standard_normal(shape), kept), kept)

    xg, members, alive = draw(T, B, G, H), [], []
    below, found, ys = xg.reshape(T, B, G * H), {}, []
    for k in range(layers):
        W = draw(G * H, H, scale=H**-0.5) if k else np.eye(G * H)
        R, b_ih, b_hh = draw(G * H, H, scale=H**-0.5), draw(G * H), draw(G * H)
        state = (draw(B, H), *draw(S - 1, B, H))
        exact = oracle.forward(cell, below, Weights(W, R, b_ih if k else None, b_hh), state, reverse=False, save=True)
        below = exact[0]
        others = np.full((T + 1 if save else 1, S - 1, B, H), np.nan, np.float32)
        others[0] = np.reshape(state[1:], (S - 1, B, H))
        y, saved = poison((T, B, H), kept), poison((T, B, K, H), kept) if save else None
        packed = []
        for matrix in (R, W) if k else (R,):
            fragments, weights = np.full((plan.fragments, 4), 0xFFFFFFFF, np.uint32), encode(matrix, kept)
            pack = residence.pack(plan, cell, kept, weights.ctypes.data, fragments.ctypes.data, H)
            on_host.execute(kernels, pack)
            packed.append(fragments)
        h0, bias, bias_below = (encode(array, kept) for array in (state[0], b_hh, b_ih))
        given = [None if k else encode(xg, kept), packed[0], bias, h0, others, saved, y, None, None, None]
        given += [packed[1], bias_below] if k else [None, None]
        alive.append(given)
        members.append(residence.Member(tuple(0 if a is None else a.ctypes.data for a in given), reverse=False))
        ys.append((y, others, exact))
    exchange = zeros(plan.launches * plan.exchange_bytes(T))
    for launch in residence.sequence(plan, cell, kept, members, exchange.ctypes.data, T, B, H, 1, save=save):
        on_host.execute(kernels, launch, seed=seed, **options)
    for k, (y, others, (y_exact, last, _)) in enumerate(ys):
        scale = EPSILON[dtype] * np.sqrt(T * (k + 1)) * 2**k
        found[f"y{k}"] = np.abs(decode(y, kept) - y_exact).max() / (4 * scale)
        for letter, ours, theirs in zip(cell.states[1:], others[-1], last[1:]):
            found[f"{letter}T{k}"] = np.abs(ours - theirs).max() / (8 * scale)
    return found


def wrong(found):
    return {name: error for name, error in found.items() if not error < 1}  # NaN is wrong, too


def library(name, dtype, plan, sanitizer=None, kernel=None):
    unit = residence.compiled(plan, cells.get(name), stored(dtype))
    return runtime.compile(sources(name, kernel), dict(unit.defines), sanitizer)


VARIANTS = [  # cell, dtype, T, B, H, layers: of one batch tile and several, ragged, each dtype
    ("lstm", "bfloat16", 5, 11, 40, 3), ("gru", "ieee", 4, 5, 35, 3), ("rnn_relu", "float32", 4, 3, 40, 2),
    ("rnn_tanh", "float16", 1, 3, 20, 4), ("gru", "bfloat16", 4, 3, 64, 2),
]  # fmt: skip
DEVICE = residence.Device((9, 0), 60, 232448)


def forced(name, dtype, H, B, layers, device=DEVICE):
    """The best plan, whether or not it pays."""
    page = cells.get(name)
    size, element = residence.SIZES[stored(dtype)], residence.element(page, backward=False)
    made = residence.candidates("grid", False, (page.G, element, size, dtype == "ieee", ()), H, B, device, layers)
    return min(made, key=lambda plan: plan.waves * plan.microseconds)


@ON_HOST
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_the_oracle(variant):
    name, dtype, T, B, H, layers = variant
    plan = forced(name, dtype, H, B, layers)
    kernels = library(name, dtype, plan)
    for seed, save in ((0, True), (1, True), (2, False), (3, True)):
        found = errors(*variant, plan, kernels, save=save, seed=seed)
        assert not wrong(found), (plan, seed, found)


@ON_HOST
def test_weights_in_shared_memory_and_several_launches():
    small = residence.Device((9, 0), 9, 232448)
    plan = forced("lstm", "bfloat16", 40, 40, 3, small)
    plan = replace(plan, k_registers=0, k_shared=plan.k_registers + plan.k_shared)
    assert plan.launches > 1
    variant = "lstm", "bfloat16", 4, 40, 40, 3
    found = errors(*variant, plan, library("lstm", "bfloat16", plan), resident_blocks=small.multiprocessors, seed=1)
    assert not wrong(found), found


@ON_HOST
def test_a_layer_that_is_not_resident_would_hang_and_is_reported():
    """The lowest of all, since none waits for one above: those go on as soon as one has ended below."""
    variant = "lstm", "bfloat16", 4, 3, 40, 3
    plan = forced("lstm", "bfloat16", 40, 3, 3)
    kernels = library("lstm", "bfloat16", plan)
    with pytest.raises(runtime.HostError, match="have not started"):
        errors(*variant, plan, kernels, resident_blocks=plan.blocks - 1)
    assert not wrong(errors(*variant, plan, kernels, resident_blocks=plan.blocks))


@ON_HOST
def test_a_lower_layer_never_waits_for_a_higher_one():
    """By a schedule that lets blocks run in their order for as long as they can; and no run depends on it."""
    variant = "gru", "bfloat16", 6, 3, 20, 4
    plan = forced("gru", "bfloat16", 20, 3, 4)
    kernels = library("gru", "bfloat16", plan)
    found = [errors(*variant, plan, kernels, seed=seed) for seed in range(9)]
    assert all(each == found[0] for each in found), "two runs are bitwise equal"


@ON_HOST
def test_no_race():
    if (reason := sanitize.why_not("thread")) is not None:
        pytest.skip(reason)
    outcome = sanitize.run("thread", ["-m", "tests.test_stack"])
    assert not outcome.reports, outcome.reports[0].text
    assert outcome.returncode == 0, outcome.output


MUTATIONS = {
    "the layer above doesn't wait for the one below": (
        "if (ABOVE) below.multiply_all(n + 1);", "if (ABOVE) below.multiply_all(n > 1 ? n - 1 : n);"),
    "publications share two places": ("return STACK ? n : n % 2;", "return n % 2;"),
    "the last instant isn't published": ("if (STACK || n + 1 < T) home.publish(n + 1);",
                                        "if (n + 1 < T) home.publish(n + 1);"),
    "it receives its own": ("group() - ABOVE, T", "group(), T"),
    "a word is taken as it comes": ("while (got[f].w != stamp(n)) got[f] = ld_relaxed_gpu(word(i));", ""),
}  # fmt: skip


@ON_HOST
@pytest.mark.parametrize("what", MUTATIONS)
def test_what_makes_it_right_is_needed(what):
    right, broken = MUTATIONS[what]
    assert right in SOURCE
    variant = "lstm", "bfloat16", 6, 3, 40, 3
    plan = forced("lstm", "bfloat16", 40, 3, 3)
    kernels = library("lstm", "bfloat16", plan, kernel=runtime.Source("resident.cu", SOURCE.replace(right, broken)))
    assert any(caught(variant, plan, kernels, seed) for seed in range(1, 9)), what


def caught(variant, plan, kernels, seed):
    try:
        return wrong(errors(*variant, plan, kernels, seed=seed, max_switches=2_000_000))
    except runtime.HostError:
        return True


# ---- The backend ----------------------------------------------------------------------------------------------------


@ON_HOST
@pytest.mark.parametrize(("name", "dtype"), [("lstm", "bfloat16"), ("gru", "float32")])
def test_the_backend_hands_it_layers_and_back_they_go_alone(name, dtype):
    """As good as one after the other, and with a tape that the way back takes."""
    L, device, launched, cell = 3, DEVICES["a100"], [], cells.get(name)

    def ready(launch):
        launched.append((launch.kernel, dict(launch.unit.defines).get("LAYERS")))
        return on_host.ready(launch)

    cases = drawn(name, dtype, L)
    layers = [(case.weights, case.state) for case in cases]
    walk, walk_stack, walk_back = (partial(w, ready, device) for w in (cuda.walk, cuda.walk_stack, cuda.walk_back))

    def outcome(found, backward):
        results, x = {}, cases[0].x
        for k, (case, (y, last, tape)) in enumerate(zip(cases, found)):
            results |= {f"y{k}": y} | {f"{letter}T{k}": state for letter, state in zip(cell.states, last)}
            given = cell, x, case.weights, case.state, y, tape, case.dy, case.dlast
            gradients = backward(*given, reverse=False, needs=case.needs)
            results |= {f"{what}{k}": array for what, array in sequences.named(case, gradients).items()}
            x = y
        return {what: sequences.wide(array) for what, array in results.items()}

    def in_turn(forward, x, layers):
        found = []
        for weights, state in layers:
            found.append(forward(cell, x, weights, state, reverse=False, save=True))
            x = found[-1][0]
        return found

    back = partial(sequence.backward, walk_back)
    peer = outcome(in_turn(partial(sequence.forward, walk), cases[0].x, layers), back)
    launched.clear()
    ours = outcome(sequence.stack(walk_stack, cell, cases[0].x, layers, tf32=False, save=True), back)
    assert launched.count(("resident_forward", "3")) == 1
    assert ("resident_forward", "1") not in launched
    cases = [case.mapped(sequences.wide) for case in cases]
    exact = in_turn(oracle.forward, cases[0].x, [(case.weights, case.state) for case in cases])
    truth = outcome(exact, oracle.backward)
    for what in truth:
        assert_close(ours[what], truth[what], peer[what], dtype, what)
    unsaved = sequence.stack(walk_stack, cell, drawn(name, dtype, L)[0].x, layers, tf32=False, save=False)
    for k, (y, _, tape) in enumerate(unsaved):
        assert tape == ()
        assert np.array_equal(sequences.wide(y), ours[f"y{k}"]), "inference and training agree bit for bit"


def drawn(name, dtype, L):
    return [sequences.draw(name, dtype, 6, 3, 5 if k == 0 else 140, 140, seed=k) for k in range(L)]


def test_explain_tells_of_it_and_why_not(monkeypatch):
    monkeypatch.setattr(cuda, "device", lambda: DEVICES["h200"])
    options = {"dtype": "bfloat16", "device": "cuda", "library": "torch", "training": True}

    def plan(H, name="lstm", **more):
        return cuda.plan(Problem(cells.get(name), 1000, 8, 64, H, **options | {"layers": 4} | more))

    assert "4 layers as a wavefront in one launch" in plan(512)
    assert "4 layers as a wavefront" not in plan(512).split("back:")[1], "back one goes after the other"
    assert "layer after layer: grid: there is no place for [W | R] of 4 layers" in plan(1024)
    assert "layer after layer: something is woven into its page" in plan(512, "lstm+hold")
    assert "wavefront" not in plan(512, layers=1)


def test_the_driver_is_asked():
    problem = Problem(cells.get("lstm"), 1000, 8, 64, 512, dtype="bfloat16", device="cuda", layers=4)
    cuda.stack_of.cache_clear()
    plan, (reason,) = cuda.stack_of(problem, DEVICES["h200"], lambda cell, dtype, plan: plan.grid - 1)
    assert plan is None
    assert "128 blocks were to be resident at once, and the driver holds 127" in reason
    assert cuda.stack_of(problem, DEVICES["h200"], lambda cell, dtype, plan: plan.grid)[0].layers == 4


# ---- Layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """The NumPy backend, as if it could run a stack at once; notes how many layers, and whether they keep a tape."""
    backend, noted = dispatch.backend("numpy"), []

    def stack(cell, x, layers, *, tf32, save):
        noted.append((len(layers), save))
        found = []
        for weights, state in layers:
            found.append(backend.forward(cell, x, weights, state, reverse=False, tf32=tf32, save=save))
            x = found[-1][0]
        return found

    monkeypatch.setattr(backend, "stacks", lambda problem: problem.layers > 1, raising=False)
    monkeypatch.setattr(backend, "stack", stack, raising=False)
    return noted


def results(layer, x, trains):
    outputs = torch.utils._pytree.tree_leaves(layer(x))
    if not trains:
        return outputs
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), wanted)]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_stack_asks_for_all_layers_and_gets_the_same(kind, batch_first, at_once, monkeypatch):
    layer = getattr(gpu_rnn, kind)(3, 4, num_layers=3, batch_first=batch_first, bias=kind != "GRU")
    x = torch.randn(5, 2, 3, requires_grad=True)
    layer.weight_hh_l1.requires_grad_(False)
    with torch.no_grad():
        found = results(layer, x, False)
    found += results(layer, x, True)
    assert at_once == [(3, False), (3, True)]
    monkeypatch.undo()
    for ours, alone in zip(found, results(layer, x, False) + results(layer, x, True), strict=True):
        assert torch.equal(ours, alone)


def test_it_is_differentiated_again_and_a_graph_is_walked_twice(at_once):
    layer = gpu_rnn.LSTM(2, 3, num_layers=2, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)
    loss = layer(x)[0].square().sum()
    once, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    assert set(at_once) == {(2, True)}


IN_TURN = {
    "one layer": {"num_layers": 1}, "two directions": {"bidirectional": True}, "a projection": {"proj_size": 2},
    "dropout between layers": {"dropout": 0.5}, "masks": {"recurrent_dropout": 0.5}, "a page's own": {"peephole": True},
    "the same bits again": {"recompute": True},
}  # fmt: skip


@pytest.mark.parametrize("why", IN_TURN)
def test_what_is_between_layers_or_in_them_goes_in_turn(why, at_once):
    layer = gpu_rnn.LSTM(3, 4, **{"num_layers": 2} | IN_TURN[why])
    layer(torch.randn(5, 2, 3))
    assert at_once == []


def test_transforms_lengths_and_the_compiler_go_in_turn(at_once):
    layer, x = gpu_rnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    torch.func.vmap(lambda x: layer(x)[0])(x[None])
    layer(x, lengths=torch.tensor([5, 3]))
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert at_once == []
    layer(x)
    assert at_once == [(2, True)]


def test_bad_states_are_refused_before_anything_runs(at_once):
    layer = gpu_rnn.LSTM(3, 4, num_layers=2)
    with pytest.raises(TypeError, match="h0 is torch float64 cpu, but x is torch float32 cpu"):
        layer(torch.randn(5, 2, 3), (torch.zeros(2, 2, 4, dtype=torch.float64), torch.zeros(2, 2, 4)))
    assert at_once == []


# ---- The plans ------------------------------------------------------------------------------------------------------


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(
    st.sampled_from(["gru", "lstm", "rnn_relu", "rnn_tanh"]), st.sampled_from(DTYPES), st.integers(1, 1100),
    st.integers(1, 130), st.integers(2, 12), st.sampled_from(sorted(DEVICES)),
)  # fmt: skip
def test_every_plan_fits_and_covers(name, dtype, H, B, layers, device):
    device = DEVICES[device]
    plan, reasons = planned(name, dtype, H, 1000, B, layers, device)
    if plan is None:
        assert reasons
        return
    assert not reasons
    assert (plan.scope, plan.layers, plan.backward) == ("grid", layers, False)
    assert plan.grid == layers * plan.groups * plan.blocks <= device.multiprocessors, "all layers are resident"
    assert (plan.blocks - 1) * plan.units < H <= plan.blocks * plan.units, "every unit of a layer once"
    assert (plan.launches - 1) * plan.groups * plan.rows < B <= plan.launches * plan.groups * plan.rows
    assert plan.k_splits * plan.k_tiles * (32 // plan.size) >= plan.blocks * plan.units, "all rows of both matrices"
    assert plan.threads * 8 * cells.get(name).G * plan.k_registers <= residence.REGISTER_FILE
    assert plan.shared_bytes <= device.shared_bytes
    assert plan.exchange_bytes(7) == layers * plan.groups * 8 * plan.exchanged
    assert "as a wavefront" in str(plan)


def test_it_is_taken_where_it_is_predicted_to_pay():
    device = DEVICES["h200"]
    assert planned("lstm", "bfloat16", 512, 1000, 8, 4, device)[0].layers == 4
    plan, (reason,) = planned("lstm", "bfloat16", 1024, 1000, 8, 2, device)
    assert plan is None
    assert "no place for [W | R] of 2 layers, 32.0 MiB, on 132 multiprocessors" in reason
    plan, (reason,) = planned("lstm", "bfloat16", 64, 100, 8, 2, device)
    assert plan is None
    assert "layer after layer" in reason
    plan, (reason,) = planned("lstm", "bfloat16", 512, 16384, 8, 4, device)
    assert plan is None
    assert "the publications of 16384 instants take 768 MiB, over 256" in reason
    assert planned("lstm", "float64", 64, 100, 8, 2, device)[0] is None
    assert planned("lstm", "bfloat16", 512, 1000, 8, 4, replace(device, cooperative=False))[0] is None


COMPILED = [
    ("lstm", "bfloat16", 512, 8, 4), ("lstm", "bfloat16", 512, 32, 2), ("gru", "bfloat16", 512, 8, 3),
    ("lstm", "float32", 256, 8, 3), ("lstm", "ieee", 256, 8, 2), ("rnn_tanh", "float16", 512, 64, 4),
]  # fmt: skip
ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("problem", COMPILED, ids=str)
def test_compiles_without_spills(problem, arch):
    name, dtype, H, B, layers = problem
    try:
        plan = forced(name, dtype, H, B, layers, DEVICES[ARCHITECTURES[arch]])
    except ValueError:
        pytest.skip("it doesn't fit this device")
    unit = residence.compiled(plan, cells.get(name), stored(dtype))
    cubin = nvrtc.compile(unit.source, arch, [*OPTIONS[1:], *(f"-D{name}={value}" for name, value in unit.defines)])
    assert not cubin.log
    kernel = nvrtc.resources(cubin)[residence.name(plan)]
    assert (kernel.stack, kernel.spills, kernel.trap) == (0, 0, False), (kernel, str(plan))
    assert kernel.registers * plan.threads <= residence.REGISTER_FILE


def main():
    """What ThreadSanitizer watches."""
    variant = "lstm", "bfloat16", 4, 3, 40, 3
    plan = forced("lstm", "bfloat16", 40, 3, 3)
    found = errors(*variant, plan, library("lstm", "bfloat16", plan, sanitizer="thread"), seed=1)
    raise SystemExit(bool(wrong(found)))


if __name__ == "__main__":
    main()
