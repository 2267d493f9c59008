"""The layers of a stack as a wavefront in one launch: the kernel against the NumPy backend, its races, its plans."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import gpu_rnn
from bench import nvrtc
from gpu_rnn.backends import call_cache, cuda, dispatch, gpu_common
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.core import arrays
from gpu_rnn.core.problem import Problem, Result, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calls, cuda_on_cpu, sequences
from .cuda_emulator import runtime, sanitize
from .persistent import EPSILON, SOURCE, check_machine_code, decode, encode, poison, sources, zeros
from .tolerance import assert_close

ON_HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
DEVICES = persistent.DEVICES
DTYPES = (*sorted(persistent.ITEMSIZE), "ieee")  # which is float32 not as TF32


@pytest.fixture(autouse=True)
def on_numpy():
    """NumPy stands for the backend that runs several at once, whatever is undone in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_RNN_BACKEND", "numpy")
        yield


def stored(dtype):
    return "float32" if dtype == "ieee" else dtype


def planned(cell, dtype, H, T, B, layers, device, backward=False):
    definition = cells.get(cell)
    element = persistent.registers_per_element(definition, backward=backward)
    options = {"backward": backward, "separate_gates": sum(definition.separate), "ieee": dtype == "ieee"}
    return persistent.select_wavefront(definition.G, element, stored(dtype), H, T, B, layers, device, **options)


class Run:
    """A stack's kernels on drawn arrays, layer after layer in lists; what they give is held against float64.

    Each result's error is told over what the operands' rounding allows: right when below 1.
    """

    def __init__(self, name, dtype, T, B, H, layers, plans, kernels):
        self.cell, self.dtype, self.sizes, self.layers = cells.get(name), stored(dtype), (T, B, H), layers
        self.plans, self.kernels, self.epsilon = plans, kernels, EPSILON[dtype]
        G, S, rng = self.cell.G, self.cell.S, np.random.default_rng(5)

        def draw(*shape, scale=1.0):  # exactly what the dtype can store
            return decode(encode(scale * rng.standard_normal(shape), self.dtype), self.dtype)

        self.Wx = draw(T, B, G, H)
        self.W, self.R = ([draw(G * H, H, scale=H**-0.5) for _ in range(layers)] for _ in range(2))
        self.b_ih, self.b_hh = ([draw(G * H) for _ in range(layers)] for _ in range(2))
        self.state = [(draw(B, H), *draw(S - 1, B, H)) for _ in range(layers)]
        self.dlast = [draw(S, B, H) for _ in range(layers)]
        self.dy = [draw(T, B, H) if k % 2 == (layers - 1) % 2 else None for k in range(layers)]  # a hidden y, too

    def launch(self, backward, args, *, save, seed, **options):
        """args: the kernel's arrays of each layer, with places for R and W."""
        (T, B, H), plan, kernels = self.sizes, self.plans[backward], self.kernels[backward]
        places = (3, -1) if backward else (1, -2)
        for k, layer_args in enumerate(args):
            for place, weights in zip(places, (self.R[k], self.W[k] if k else None)):
                layer_args[place] = None if weights is None else encode(weights, self.dtype)
        addresses = [tuple(0 if a is None else a.ctypes.data for a in layer_args) for layer_args in args]
        instances = [persistent.Instance(layer_addresses, False) for layer_addresses in addresses]
        words, exchange = persistent.kernel_params(instances), zeros(plan.launches * plan.exchange_bytes(T))
        for k, launch in enumerate(persistent.launches(plan, self.cell, self.dtype, T, B, H, 1, save=save)):
            at = exchange.ctypes.data + k * plan.exchange_bytes(T)
            cuda_on_cpu.execute(kernels, launch, words, at, seed=seed, **options)

    def forward(self, *, save=True, seed=0, **options):
        (T, B, H), cell, storage, errors = self.sizes, self.cell, self.dtype, {}
        S, K, args, self.saved = cell.S, cell.K, [], []
        for k in range(self.layers):
            h0, b_hh, b_ih = (encode(array, storage) for array in (self.state[k][0], self.b_hh[k], self.b_ih[k]))
            others = np.full((T + 1 if save else 1, S - 1, B, H), np.nan, np.float32)
            others[0] = np.reshape(self.state[k][1:], (S - 1, B, H))
            y, saved = poison((T, B, H), storage), poison((T, B, K, H), storage) if save else None
            Wx = None if k else encode(self.Wx, storage)
            args.append([Wx, None, b_hh, h0, others, saved, y, None, None, None, None, b_ih if k else None])
            self.saved.append((y, h0, others, saved))
        self.launch(False, args, save=save, seed=seed, **options)
        below = self.Wx.reshape(T, B, -1)
        for k, (y, _, others, _) in enumerate(self.saved):
            W, b_ih = (self.W[k], self.b_ih[k]) if k else (np.eye(cell.G * H), None)
            weights = Weights(W, self.R[k], b_ih, self.b_hh[k])
            below, last, _ = calls.forward(
                numpy_backend.forward, cell, below, weights, self.state[k], reverse=False, save=True
            )
            scale = self.epsilon * np.sqrt(T * (k + 1)) * 2**k
            errors[f"y{k}"] = np.abs(decode(y, storage) - below).max() / (4 * scale)
            for letter, ours, theirs in zip(cell.states[1:], others[-1], last[1:]):
                errors[f"{letter}T{k}"] = np.abs(ours - theirs).max() / (8 * scale)
        return errors

    def backward(self, *, seed=0, **options):
        """Read the saved activations of `forward`, and change none."""
        (T, B, H), cell, storage, errors = self.sizes, self.cell, self.dtype, {}
        before, args = [[a.copy() for a in layer_saved] for layer_saved in self.saved], []
        for dy, dlast, layer_saved in zip(self.dy, self.dlast, self.saved):
            dWx, dRh = (poison((T, B, cell.G, H), storage) for _ in range(2))
            dh, *dothers = dlast.astype(np.float32)
            dothers = np.reshape(dothers, (cell.S - 1, B, H))
            dy = None if dy is None else encode(dy, storage)
            dRh = dRh if any(cell.separate) else None
            args.append([dy, dh.copy(), dothers.copy(), None, *layer_saved, dWx, dRh, *[None] * 6])
        self.launch(True, args, save=True, seed=seed, **options)
        for layer_saved, layer_before in zip(self.saved, before):
            assert all(np.array_equal(a, b) for a, b in zip(layer_saved, layer_before)), (
                "backward wrote saved activations"
            )
        dx = None
        for k in reversed(range(self.layers)):
            dWx, dRh, dstate, dx = self.gradients(k, dx)
            _, dh, dothers, *_, ours_dWx, ours_dRh, _, _, _, _, _, _ = args[k]
            scale = 8 * self.epsilon * np.sqrt(T * (self.layers - k)) * max(1.0, np.abs(dWx).max(), np.abs(dRh).max())
            errors[f"dWx{k}"] = np.abs(decode(ours_dWx, storage) - dWx).max() / scale
            if ours_dRh is not None:
                errors[f"dRh{k}"] = np.abs(decode(ours_dRh, storage) - dRh).max() / scale
            for letter, ours, theirs in zip(cell.states, (dh, *dothers), dstate):
                errors[f"d{letter}{k}"] = np.abs(ours - theirs).max() / (2 * scale)
        return errors

    def gradients(self, k, dx):
        """Compute a layer's in float64 from the same saved activations: of Wx, of Rh, of the states, of x."""
        (T, B, H), cell, storage = self.sizes, self.cell, self.dtype
        y, h0, others, saved = (decode(a, storage if n != 2 else "float32") for n, a in enumerate(self.saved[k]))
        dstate, dWx, dRh = [*self.dlast[k]], np.empty((T, B, cell.G, H)), np.empty((T, B, cell.G, H))
        for t in reversed(range(T)):
            for from_above in (self.dy[k], dx):
                dstate[0] = dstate[0] + (0 if from_above is None else from_above[t])
            inputs = {"dnew": dstate, "new": (y[t], *others[t + 1]), "state": (y[t - 1] if t else h0, *others[t])}
            inputs["saved"] = [*saved[t].swapaxes(0, 1)]
            of_x, of_h, of_state, _ = cells.grad_graph(cell).run(arrays.operations(y), **inputs)
            dWx[t], dRh[t] = np.stack(of_x, 1), np.stack(of_h, 1)
            dstate = [of_state[0] + dRh[t].reshape(B, -1) @ self.R[k], *of_state[1:]]
        return dWx, dRh, dstate, dWx.reshape(T, B, -1) @ self.W[k]


def wrong(errors):
    return {name: error for name, error in errors.items() if not error < 1}  # NaN is wrong, too


def libraries(name, dtype, plans, sanitizer=None, kernel=None):
    units = [persistent.translation_unit(plan, cells.get(name), stored(dtype)) for plan in plans]
    return [runtime.compile(sources(name, kernel), dict(unit.defines), sanitizer) for unit in units]


VARIANTS = [  # cell, dtype, T, B, H, layers: of one batch tile and several, ragged, each dtype
    ("lstm", "bfloat16", 5, 11, 40, 3), ("gru", "ieee", 4, 5, 35, 3), ("rnn_relu", "float32", 4, 3, 40, 2),
    ("rnn_tanh", "float16", 1, 3, 20, 4), ("gru", "bfloat16", 4, 3, 64, 2), ("lstm", "ieee", 3, 3, 20, 2),
]  # fmt: skip
DEVICE = persistent.Device((9, 0), 60, 232448)


def forced(name, dtype, H, B, layers, device=DEVICE, alone=False):
    """The best plans, forward and backward, whether or not they pay; alone: of those with a block for each layer."""
    definition, best = cells.get(name), []
    for backward in (False, True):
        cost = persistent.cell_cost(definition, stored(dtype), backward=backward, ieee=dtype == "ieee")
        made = persistent.candidates("grid", backward, cost, H, B, device, layers, sum(definition.separate))
        made = [plan for plan in made if (plan.blocks == 1) == alone]
        best.append(min(made, key=lambda plan: plan.waves * plan.predicted_us))
    return best


@ON_HOST
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_equals_the_numpy_backend(variant, alone):
    name, dtype, T, B, H, layers = variant
    plans = forced(name, dtype, H, B, layers, alone=alone)
    run = Run(*variant, plans, libraries(name, dtype, plans))
    for seed, save in ((0, True), (2, False), (3, True)):
        errors = run.forward(save=save, seed=seed)
        assert not wrong(errors), (plans, seed, errors)
    for seed in (0, 1, 2):
        errors = run.backward(seed=seed)
        assert not wrong(errors), (plans, seed, errors)


@ON_HOST
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_weights_in_shared_memory_and_several_launches(name):
    small = persistent.Device((9, 0), 9, 232448)
    plans = forced(name, "bfloat16", 40, 40, 3, small)
    plans = [replace(plan, k_registers=0, k_shared=plan.k_registers + plan.k_shared) for plan in plans]
    assert all(plan.launches > 1 for plan in plans)
    run = Run(name, "bfloat16", 4, 40, 40, 3, plans, libraries(name, "bfloat16", plans))
    errors = [ways(resident_blocks=small.multiprocessors, seed=1) for ways in (run.forward, run.backward)]
    assert not any(map(wrong, errors)), errors


@ON_HOST
def test_warps_that_share_columns_and_sums():
    """Unit tiles, K splits and batch tiles that larger problems have."""
    plans = []
    for plan in forced("gru", "float16", 70, 11, 2):
        k_tiles = -(-3 * 32 // (16 * 2))
        shape = {"blocks": 3, "unit_tiles": 2, "k_splits": 2, "k_registers": k_tiles - 1, "k_shared": 1}
        plans.append(replace(plan, **shape, batch_tiles=2, groups=1, launches=1))
    run = Run("gru", "float16", 3, 11, 70, 2, plans, libraries("gru", "float16", plans))
    errors = [ways(seed=1) for ways in (run.forward, run.backward)]
    assert not any(map(wrong, errors)), errors


@ON_HOST
def test_a_layer_that_is_not_co_resident_would_hang_and_is_reported():
    """The one that waits for no other: the lowest forward; going back the highest, so that all have to be."""
    plans = forced("lstm", "bfloat16", 40, 3, 3)
    run = Run("lstm", "bfloat16", 4, 3, 40, 3, plans, libraries("lstm", "bfloat16", plans))
    with pytest.raises(runtime.HostError, match="have not started"):
        run.forward(resident_blocks=plans[0].blocks - 1)
    assert not wrong(run.forward(resident_blocks=plans[0].blocks))
    with pytest.raises(runtime.HostError, match="have not started"):
        run.backward(resident_blocks=plans[1].grid - 1)
    assert not wrong(run.backward(resident_blocks=plans[1].grid))


@ON_HOST
def test_producers_wait_for_no_consumer():
    """By a schedule that lets blocks run in their order for as long as they can; and no run depends on it."""
    variant = "gru", "bfloat16", 6, 3, 20, 4
    plans = forced("gru", "bfloat16", 20, 3, 4)
    run = Run(*variant, plans, libraries("gru", "bfloat16", plans))
    for way in (run.forward, run.backward):
        errors = [way(seed=seed) for seed in range(6)]
        assert all(each == errors[0] for each in errors), "two runs are bitwise equal"


@ON_HOST
def test_no_race():
    if (reason := sanitize.why_not("thread")) is not None:
        pytest.skip(reason)
    outcome = sanitize.run("thread", ["-m", "tests.test_wavefront"])
    assert not outcome.reports, outcome.reports[0].text
    assert outcome.returncode == 0, outcome.output


MUTATIONS = {
    "the layer above doesn't wait for the one below": (
        "input.receive_and_multiply(n + 1);", "input.receive_and_multiply(n > 1 ? n - 1 : n);"),
    "rounds share two buffers": ("return KEEPS_ALL_ROUNDS ? n : n & 1;", "return n & 1;"),
    "the last round isn't sent": ("if (WAVEFRONT || n + 1 < T) recurrent.send(n + 1);",
                                 "if (n + 1 < T) recurrent.send(n + 1);"),
    "it receives its own": ("group() - HAS_LOWER_LAYER, T", "group(), T"),
    "a word is taken without its flag": ("if (late == 0) break;", "break;"),
}  # fmt: skip
BACKWARD_MUTATIONS = {
    "a gradient from above is taken without its flag": ("received_dx[k].y != LayerGradChannel::flag(round);", "false;"),
    "the last isn't sent down": ("if (!PersistentBlock::SINGLE_BLOCK) send_dx(T - 1);", ""),
    "all time steps share a word": ("words + ((round * BLOCKS", "words + ((round % 2 * BLOCKS"),
    "the operand is already the next": ("round > 1) send_dx(round - 2);", "round > 1) send_dx(round - 1);"),
    "what is multiplied twice is overwritten": (
        "        store_partial_sums(sums, others);\n",
        "        const Corner at = Sums<GATE_SETS>::corner(lane);\n"
        "        float* to = others + (warp % K_SPLITS * GATE_SETS * BATCH_ROWS + at.column) * SUMS_PITCH;\n"
        "        to += warp / K_SPLITS * 16 + at.row;\n"
        "        sums.finish(lane, [&](int r, int row, int column, float sum) {\n"
        "            to[(r * BATCH_ROWS + column) * SUMS_PITCH + row] = sum;\n"
        "        });\n"),
    "it takes from its own layer": ("dx_in(exchange, T, instance())", "dx_in(exchange, T, instance() - 1)"),
    "both projections have one gradient": ("-1 : value;", "value : value;"),
}  # fmt: skip
ALONE_MUTATIONS = {  # where a single block has a layer
    "it is sent down too late": ("if (PersistentBlock::SINGLE_BLOCK && round > 0) send_dx(round - 1);",
                                "if (PersistentBlock::SINGLE_BLOCK && round > 1) send_dx(round - 2);"),
    "it never waits": ("needs_wait(!SINGLE_BLOCK || from != group())", "needs_wait(!SINGLE_BLOCK)"),
    "it sends nothing": ("SCOPE == GRID && (!SINGLE_BLOCK || KEEPS_ALL_ROUNDS)", "SCOPE == GRID && !SINGLE_BLOCK"),
    "its own is not where it multiplies": ("if (SCOPE == GRID && !SINGLE_BLOCK) return;", "if (SENDS) return;"),
}  # fmt: skip


@ON_HOST
@pytest.mark.parametrize("what", [*MUTATIONS, *BACKWARD_MUTATIONS, *ALONE_MUTATIONS])
def test_what_makes_it_right_is_needed(what):
    right, broken = (MUTATIONS | BACKWARD_MUTATIONS | ALONE_MUTATIONS)[what]
    assert SOURCE.count(right) == 1
    backward = what in BACKWARD_MUTATIONS or what == "it is sent down too late"
    name = "gru" if backward else "lstm"
    plans = forced(name, "bfloat16", 40, 3, 3, alone=what in ALONE_MUTATIONS)
    kernel = runtime.Source("persistent.cu", SOURCE.replace(right, broken))
    kernels = libraries(name, "bfloat16", plans[backward:], kernel=kernel)
    run = Run(name, "bfloat16", 6, 3, 40, 3, plans, [*libraries(name, "bfloat16", plans[:backward]), *kernels])
    if backward:
        assert not wrong(run.forward())
    assert any(caught(run.backward if backward else run.forward, seed) for seed in range(1, 9)), what


def caught(way, seed):
    try:
        return wrong(way(seed=seed, max_switches=2_000_000))
    except runtime.HostError:
        return True


# ---- The backend ----------------------------------------------------------------------------------------------------


@ON_HOST
@pytest.mark.parametrize(("name", "dtype"), [("lstm", "bfloat16"), ("gru", "float32")])
def test_the_backend_hands_it_layers_there_and_back(name, dtype, monkeypatch):
    """As good as one after the other, also over saved activations of the other kind."""
    L, device, launched, cell = 3, DEVICES["a100"], [], cells.get(name)

    def ready(launch):
        launched.append((launch.kernel, dict(launch.unit.defines).get("LAYERS")))
        return cuda_on_cpu.prepare_launch(launch)

    cases = drawn(name, dtype, L)
    stack = Problem(cell, 6, 3, 140, 140, dtype=dtype, device="cuda", layers=L)
    run_forward, run_backward = (
        partial(whole, partial(loop, ready, device))
        for whole, loop in ((gpu_common.forward, cuda.run_forward), (gpu_common.backward, cuda.run_backward))
    )

    def in_turn(forward, backward, cases):
        """Only the last layer's y has a gradient."""
        x, outputs, results, dy = cases[0].x, [], {}, cases[-1].dy
        for case in cases:
            outputs.append(calls.forward(forward, cell, x, case.weights, case.state, save=True))
            x = outputs[-1][0]
        for k in reversed(range(L)):
            case, (y, _, saved_layer), x = cases[k], outputs[k], outputs[k - 1][0] if k else cases[0].x
            inputs = cell, x, case.weights, case.state, y, saved_layer, dy, case.dlast
            results |= gradients_of(k, calls.backward(backward, *inputs, needs=case.needs))
            dy = results[f"dx{k}"]
        return named(results, outputs), outputs

    def gradients_of(k, gradients):
        states = {f"d{letter}0{k}": array for letter, array in zip(cell.states, gradients["state"], strict=True)}
        return states | {f"d{what}{k}": array for what, array in gradients.items() if what != "state"}

    def named(results, outputs):
        for k, (y, last, _) in enumerate(outputs):
            results |= {f"y{k}": y} | {f"{letter}T{k}": state for letter, state in zip(cell.states, last)}
        return {what: sequences.wide(array) for what, array in results.items()}

    def stacked(save):
        results = calls.forward_many(run_forward, cases, save=save, linked=True)
        return [(y, last, saved) for y, last, _, saved in results]

    def back(outputs):
        dys, results = [*[None] * (L - 1), cases[-1].dy], {}
        whole = [Result(y, last, (), saved) for y, last, saved in outputs]
        gradients = calls.backward_many(run_backward, cases, whole, linked=True, dys=dys)
        for k, (case, each) in enumerate(zip(cases, gradients)):
            assert each.keys() == (case.needs if k == 0 else case.needs - {"x"}) | {"state"}
            results |= gradients_of(k, each)
        return named(results, outputs)

    peer, recorded = in_turn(run_forward, run_backward, cases)
    launched.clear()
    outputs = stacked(save=True)
    ours = back(outputs)
    persistent_launches = launched
    assert persistent_launches == [("persistent_forward", "3"), ("persistent_backward", "3")]
    truth, _ = in_turn(numpy_backend.forward, numpy_backend.backward, [case.mapped(sequences.wide) for case in cases])
    over_the_other = back(recorded)
    for what in ours:
        assert_close(ours[what], truth[what], peer[what], dtype, what)
        assert_close(over_the_other[what], truth[what], peer[what], dtype, what)

    config_of = cuda.wavefront_config

    def at_most(steps, backward):
        plan, _ = config_of(stack, device, backward)
        monkeypatch.setattr(persistent.launch, "MAX_EXCHANGE_BYTES", plan.launches * plan.exchange_bytes(steps))
        monkeypatch.setattr(cuda, "wavefront_config", lambda *_: (plan, ()))  # whose prediction is for longer ones

    launched.clear()
    at_most(4, backward=True)
    in_parts = back(outputs)
    assert launched.count(("persistent_backward", "3")) == 2, "cut over time"
    assert all(np.array_equal(in_parts[what], ours[what]) for what in ours), "back it makes no difference"
    at_most(2, backward=False)
    again = stacked(save=True)
    assert launched.count(("persistent_forward", "3")) == 3
    for what, array in named({}, again).items():
        assert_close(array, truth[what], peer[what], dtype, what)
    unsaved = stacked(save=False)
    ours |= named({}, again)
    for k, (y, _, saved_layer) in enumerate(unsaved):
        assert saved_layer == ()
        assert np.array_equal(sequences.wide(y), ours[f"y{k}"]), "inference and training agree bit for bit"


def drawn(name, dtype, L):
    return [sequences.draw(name, dtype, 6, 3, 5 if k == 0 else 140, 140, seed=k) for k in range(L)]


def test_explain_tells_of_it_and_why_not(monkeypatch):
    monkeypatch.setattr(cuda, "device", lambda: DEVICES["h200"])
    options = {"dtype": "bfloat16", "device": "cuda", "library": "torch", "training": True}

    def plan(H, name="lstm", **more):
        sizes = {"T": 1000, "B": 8, "I": 64, "H": H, "layers": 4}
        return cuda.plan(Problem(cells.get(name), **sizes | options | more))

    assert plan(512).count("4 layers as a wavefront in one launch") == 2, "forward and back"
    assert "the driver" not in plan(512)
    monkeypatch.setattr(persistent.launch, "MAX_EXCHANGE_BYTES", 1 << 20)
    assert "layer by layer: grid scope: the buffer between layers takes 0.1 MiB per time step, and may" in plan(512)
    assert "layer by layer: grid scope: the weights don't fit on-chip: [W | R] of 4 layers" in plan(1024)
    assert "layer by layer: the wavefront kernel does not support modifiers (lstm[lengths])" in plan(512, "lstm+hold")
    assert "wavefront" not in plan(512, layers=1)


def test_the_driver_is_queried():
    problem = Problem(cells.get("lstm"), 1000, 8, 64, 512, dtype="bfloat16", device="cuda", layers=4)
    for backward in (False, True):
        plan, (reason,) = cuda.wavefront_config(
            problem, DEVICES["h200"], backward, lambda cell, dtype, plan: plan.grid - 1
        )
        assert plan is None
        assert "needs 128 blocks co-resident, but the CUDA driver reports 127" in reason
        plan, _ = cuda.wavefront_config(problem, DEVICES["h200"], backward, lambda cell, dtype, plan: plan.grid)
        assert (plan.layers, plan.backward) == (4, backward)


# ---- Layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """The NumPy backend, as if it ran stacks at once; notes how many layers, and whether they save activations."""
    return pretending(monkeypatch, (False,))


@pytest.fixture
def both_ways(monkeypatch):
    """The same, back, too."""
    return pretending(monkeypatch, (False, True))


def pretending(monkeypatch, ways):
    backend, recorded_calls = dispatch.backend("numpy"), []
    forward, backward = backend.forward, backend.backward

    def recording_forward(problem, runs):
        if problem.layers > 1 and False in ways:
            recorded_calls.append((len(runs), problem.training))
        return forward(problem, runs)

    def recording_backward(problem, runs, saved, grads, needs):
        if problem.layers > 1 and True in ways:
            recorded_calls.append((len(runs), "back", [*map(sorted, needs)]))
        return backward(problem, runs, saved, grads, needs)

    monkeypatch.setattr(call_cache, "CACHE", {})
    monkeypatch.setattr(backend, "fuses_layers", lambda problem, backward: problem.layers > 1 and backward in ways)
    monkeypatch.setattr(backend, "forward", recording_forward)
    monkeypatch.setattr(backend, "backward", recording_backward)
    return recorded_calls


def results(layer, x, trains, owner=None):
    outputs = torch.utils._pytree.tree_leaves(layer(x))
    if not trains:
        return outputs
    leaves = [p for p in (x, *(owner or layer).parameters()) if p.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("batch_first", "ways"), [(False, (False,)), (True, (True,)), (False, (False, True))])
def test_a_stack_runs_all_layers_and_gets_the_same(kind, batch_first, ways, monkeypatch):
    """Forward, back, or both: what doesn't go at once goes in turn. Only what is needed is requested."""
    layer = getattr(gpu_rnn, kind)(3, 4, 3, batch_first=batch_first, bias=kind != "GRU")
    x = torch.randn(5, 2, 3, requires_grad=True)
    layer.weight_hh_l1.requires_grad_(False)
    expected = results(layer, x, False) + results(layer, x, True)
    with monkeypatch.context() as patched:
        recorded_calls = pretending(patched, ways)
        with torch.no_grad():
            actual = results(layer, x, False)
        actual += results(layer, x, True)
    for ours, alone in zip(actual, expected, strict=True):
        assert torch.equal(ours, alone)
    names = sorted({"x", "w_ih", "w_hh", *(("b_ih", "b_hh") if kind != "GRU" else ())})
    there = [(3, False), (3, True)] if False in ways else []
    back = [(3, "back", [names, [name for name in names if name != "w_hh"], names])] if True in ways else []
    assert recorded_calls == there + back


def test_gradients_end_where_none_is_needed(both_ways, monkeypatch):
    """Lower layers that are frozen get none; a state's alone comes through; states' are requested as well as y's."""
    layer, x, h0 = gpu_rnn.GRU(3, 4, num_layers=3), torch.randn(5, 2, 3), torch.randn(3, 2, 4)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("l2") or name == "weight_ih_l1")
    leaves = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def gradients():
        y, hT = layer(x, h0)
        return torch.autograd.grad(y.square().sum() + hT[1].sum(), leaves)

    def of_states():
        first = h0.clone().requires_grad_()
        return torch.autograd.grad(layer(x, first)[1][0].square().sum(), first)

    ours = [*gradients(), *of_states()]
    (_, _, of_weights), (_, _, of_states_alone) = [call for call in both_ways if call[1] == "back"]
    assert of_weights == [[], ["w_ih"], ["b_hh", "b_ih", "w_hh", "w_ih", "x"]]
    assert of_states_alone == [[], ["w_ih", "x"], of_weights[2]], "the engine says what could be needed"
    monkeypatch.undo()
    for one, other in zip(ours, [*gradients(), *of_states()], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_it_is_differentiated_again_and_a_graph_runs_backward_twice(kind, both_ways):
    """With respect to what is in the lower layer, too, on which all that is above depends."""
    layer = getattr(gpu_rnn, kind)(2, 3, num_layers=2, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        y, hx = layer(x)
        return y, *torch.utils._pytree.tree_leaves(hx)

    inputs = x, layer.weight_ih_l0, layer.weight_hh_l0, layer.weight_ih_l1, layer.bias_hh_l1
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    loss = layer(x)[0].square().sum()
    once, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    assert {call[:2] for call in both_ways} == {(2, True), (2, "back")}


IN_TURN = {
    "one layer": {"num_layers": 1}, "two directions": {"bidirectional": True}, "a projection": {"proj_size": 2},
    "dropout between layers": {"dropout": 0.5}, "masks": {"recurrent_dropout": 0.5}, "peepholes": {"peephole": True},
    "the same bits again": {"recompute": True},
}  # fmt: skip


@pytest.mark.parametrize("why", IN_TURN)
def test_what_is_between_layers_or_in_them_goes_in_turn(why, at_once):
    layer = gpu_rnn.LSTM(3, 4, **{"num_layers": 2} | IN_TURN[why])
    layer(torch.randn(5, 2, 3))
    assert at_once == []


def test_transforms_lengths_and_what_is_exported_go_in_turn(at_once):
    layer, x = gpu_rnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    torch.func.vmap(lambda x: layer(x)[0])(x[None])
    layer(x, lengths=torch.tensor([5, 3]))
    torch.export.export(layer, (x,)).module()(x)
    assert at_once == []
    layer(x)
    assert at_once == [(2, True)]


@pytest.mark.parametrize(("kind", "arguments"), [("LSTM", {}), ("GRU", {"bias": False, "batch_first": True})])
def test_compiled_is_eager_at_every_size_from_one_graph(kind, arguments, both_ways):
    """One operator for the stack, and the backend decides at run time."""
    layer = getattr(gpu_rnn, kind)(3, 4, num_layers=3, **arguments)
    layer.weight_hh_l0.requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T, B in ((5, 2), (7, 3), (40, 6)):
        x = torch.randn(T, B, 3, requires_grad=True)
        for ours, eager in zip(results(compiled, x, True, layer), results(layer, x, True), strict=True):
            assert torch.equal(ours, eager)
            assert ours.stride() == eager.stride()
    assert len(both_ways) == 3 * 2 * 2, "there and back, compiled and eager"
    graphs = [[node for node in graph.graph.nodes if "gpu_rnn" in str(node.target)] for graph in counter.graphs]
    assert [*map(len, filter(None, graphs))] == [1]
    with torch.no_grad():
        for ours, eager in zip(results(compiled, x, False), results(layer, x, False), strict=True):
            assert torch.equal(ours, eager)
    assert both_ways[-1] == (3, False)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_operators_are_what_their_fakes_say(name):
    """Also in turn, on a backend that has no stacks; some gradients needed."""
    layer = getattr(gpu_rnn, name.upper())(3, 4, num_layers=2, bias=name == "lstm")
    S, x = cells.get(name).S, torch.randn(5, 2, 3, requires_grad=True)
    names = "w_ih w_hh b_ih b_hh" if layer.bias else "w_ih w_hh"
    tensors = [x]
    for weights in layer.all_weights:
        tensors += [*weights, *(torch.randn(2, 4, requires_grad=k == 0) for k in range(S))]
    options = [0, 0], True, "auto", None, False, 1, False
    arguments = name, tensors, names, *options, True
    torch.library.opcheck(torch.ops.gpu_rnn.forward.default, arguments)
    outputs = torch.ops.gpu_rnn.forward(*arguments)
    layers = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    doutputs = [torch.randn_like(tensor) for of_layer in layers for tensor in of_layer[: 1 + S]]
    doutputs[0] = None
    saved = [tensor for y, *others in layers for tensor in (y, *others[S:])]
    needs = [tensor.requires_grad for tensor in tensors]
    detached, saved = ([tensor.detach() for tensor in group] for group in (tensors, saved))
    arguments = name, detached, names, doutputs, saved, *options, needs
    torch.library.opcheck(torch.ops.gpu_rnn.backward.default, arguments)


def test_bad_states_are_refused_before_anything_runs(at_once):
    layer = gpu_rnn.LSTM(3, 4, num_layers=2)
    with pytest.raises(TypeError, match="h0 is torch float64 cpu, but x is torch float32 cpu"):
        layer(torch.randn(5, 2, 3), (torch.zeros(2, 2, 4, dtype=torch.float64), torch.zeros(2, 2, 4)))
    assert at_once == []


# ---- The plans ------------------------------------------------------------------------------------------------------


@settings(max_examples=1200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["gru", "lstm", "rnn_relu", "rnn_tanh"]), st.sampled_from(DTYPES), st.integers(1, 1100),
    st.integers(1, 130), st.integers(2, 12), st.sampled_from(sorted(DEVICES)), st.booleans(),
)  # fmt: skip
def test_every_plan_fits_and_covers(name, dtype, H, B, layers, device, backward):
    device, cell = DEVICES[device], cells.get(name)
    plan, reasons = planned(name, dtype, H, 1000, B, layers, device, backward)
    if plan is None:
        assert reasons
        return
    assert not reasons
    assert (plan.scope, plan.layers, plan.backward) == ("grid", layers, backward)
    assert plan.values == (1, cell.G + sum(cell.separate))[backward]
    assert plan.grid == layers * plan.groups * plan.blocks <= device.multiprocessors, "all layers are co-resident"
    assert (plan.blocks - 1) * plan.units < H <= plan.blocks * plan.units, "every unit of a layer once"
    assert (plan.launches - 1) * plan.groups * plan.rows < B <= plan.launches * plan.groups * plan.rows
    k, columns = plan.k_splits * plan.k_tiles * (32 // plan.itemsize), plan.blocks * plan.values * plan.units
    assert k >= columns, "all rows of both matrices"
    assert plan.threads * 8 * plan.gate_sets * plan.values * plan.k_registers <= persistent.REGISTER_FILE
    assert plan.shared_bytes <= device.shared_bytes
    assert plan.k_chunks == 1 or (not backward and plan.blocks > 1), "what is multiplied twice, or made here, is whole"
    handed = (layers - 1) * plan.groups * 7 * plan.blocks * plan.units * plan.rows * 8
    kept = layers * plan.groups * plan.round_bytes
    assert plan.exchange_bytes(7) == (kept * 2 + handed if backward else kept * 8)
    assert "as a wavefront" in str(plan)


def test_it_is_taken_where_it_is_predicted_to_pay():
    device = DEVICES["h200"]
    assert planned("lstm", "bfloat16", 512, 1000, 8, 4, device)[0].layers == 4
    plan, (reason,) = planned("lstm", "bfloat16", 1024, 1000, 8, 2, device)
    assert plan is None
    assert "the weights don't fit on-chip: [W | R] of 2 layers, 32.0 MiB, on 132 multiprocessors" in reason
    for backward in (False, True):
        plan, _ = planned("rnn_tanh", "ieee", 32, 100, 8, 4, device, backward)
        assert (plan.blocks, plan.unit_tiles) == (1, 2), "a block for each layer, though two would do"
    plan, (reason,) = planned("lstm", "bfloat16", 512, 100, 64, 3, device, backward=True)
    assert plan is None
    assert "layer by layer" in reason
    for backward, parts in ((False, 4), (True, 7)):
        plan, _ = planned("lstm", "bfloat16", 512, 16384, 8, 4, device, backward)
        slices = persistent.time_slices(plan, 16384)
        assert len(slices) == parts
        assert sorted(t for cut in slices for t in range(*cut)) == list(range(16384)), "every time step once"
        assert slices == sorted(slices, reverse=backward)
        assert plan.launches * max(plan.exchange_bytes(end - begin) for begin, end in slices) <= 256 << 20
        assert persistent.time_slices(plan, 1000) == [(0, 1000)]
    assert persistent.time_slices(persistent.select(4, 20, "bfloat16", 512, 8, device, backward=False)[0], 10**6) == [
        (0, 10**6)
    ]
    assert planned("lstm", "bfloat16", 512, 1000, 8, 4, device, backward=True)[0].layers == 4
    (reason,) = planned("lstm", "bfloat16", 1024, 1000, 8, 2, device, backward=True)[1]
    assert "the weights don't fit on-chip: [W | R] of 2 layers" in reason
    assert planned("lstm", "float64", 64, 100, 8, 2, device)[0] is None
    assert planned("lstm", "bfloat16", 512, 1000, 8, 4, replace(device, cooperative=False))[0] is None


COMPILED = [
    ("lstm", "bfloat16", 512, 8, 4), ("lstm", "bfloat16", 512, 32, 2), ("gru", "bfloat16", 512, 8, 3),
    ("lstm", "float32", 256, 8, 3), ("lstm", "ieee", 256, 8, 2), ("rnn_tanh", "float16", 512, 64, 4),
    ("lstm", "bfloat16", 64, 8, 4), ("gru", "float32", 64, 8, 2), ("rnn_tanh", "float16", 128, 8, 3),  # a block alone
]  # fmt: skip
ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}
COMPILATIONS = [  # each problem either way on one architecture, each architecture with some problems either way
    (problem, arch, backward)
    for k, problem in enumerate(COMPILED)
    for n, arch in enumerate(ARCHITECTURES)
    for backward in (False, True)
    if (k + n + 2 * backward) % 4 == 1
]


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize(("problem", "arch", "backward"), COMPILATIONS, ids=str)
def test_compiles_without_spills(problem, arch, backward):
    name, dtype, H, B, layers = problem
    try:
        plan = forced(name, dtype, H, B, layers, DEVICES[ARCHITECTURES[arch]], alone=H <= 128)[backward]
    except ValueError:
        pytest.skip("it doesn't fit this device")
    check_machine_code(plan, cells.get(name), stored(dtype), arch)


def main():
    """What ThreadSanitizer watches."""
    variant, plans = ("gru", "bfloat16", 3, 3, 40, 3), forced("gru", "bfloat16", 40, 3, 3)
    run = Run(*variant, plans, libraries("gru", "bfloat16", plans, sanitizer="thread"))
    assert not wrong(run.forward(seed=1))
    assert not wrong(run.backward(seed=1))
    _, run.plans[1] = forced("gru", "bfloat16", 40, 3, 3, alone=True)
    run.kernels[1:] = libraries("gru", "bfloat16", run.plans[1:], sanitizer="thread")
    assert not wrong(run.backward(seed=1)), "a block alone for each layer"


if __name__ == "__main__":
    main()
