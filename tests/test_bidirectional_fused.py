"""Both directions of a layer in one launch: the kernels' numbers, the plans, autograd and the compiler's view."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings

import gpu_rnn
from bench import nvrtc
from gpu_rnn.backends import cuda, dispatch, gpu_common, protocol
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calls, cuda_on_cpu, reference_modifiers, sequences
from .cuda_emulator import runtime
from .persistent import check_machine_code
from .test_persistent_config import ARCHITECTURES, COMPILATIONS, DEVICES, any_plan, launches, planned, problems, stored

ON_HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
WITH_NVRTC = pytest.mark.skipif(
    (nvrtc.why_not() or nvrtc.why_no_resources()) is not None, reason=f"{nvrtc.why_not()}; {nvrtc.why_no_resources()}"
)


@pytest.fixture(autouse=True)
def on_numpy():
    """NumPy stands for the backend that runs several at once, whatever is undone in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_RNN_BACKEND", "numpy")
        yield


# ---- The kernels, as the backend runs them --------------------------------------------------------------------------


class FusedRuns:
    """The backend's forward and backward of one direction or several, on the host runtime."""

    def __init__(self, device):
        self.launched = []
        self.run_forward, self.run_backward = (
            partial(loop, self.ready, device) for loop in (cuda.run_forward, cuda.run_backward)
        )

    def ready(self, launch):
        self.launched.append((launch.kernel, dict(launch.unit.defines).get("DIRECTIONS")))
        return cuda_on_cpu.prepare_launch(launch)

    def run(self, cases, tf32, *, together):
        """-> every result of each case by name, in training and in inference."""
        cell = cases[0].cell
        turns = [range(len(cases))] if together else [[k] for k in range(len(cases))]
        results = []
        for turn in turns:
            these = [cases[k] for k in turn]
            forward, backward = (
                partial(whole, loop)
                for whole, loop in ((gpu_common.forward, self.run_forward), (gpu_common.backward, self.run_backward))
            )
            unsaved = calls.forward_many(forward, these, tf32=tf32, save=False)
            outputs = calls.forward_many(forward, these, tf32=tf32)
            gradients = calls.backward_many(backward, these, outputs, tf32=tf32)
            for k, (y, last, *_), (inferred, *_), each in zip(turn, outputs, unsaved, gradients):
                assert torch.equal(y, inferred), "inference and training agree bit for bit"
                states = {f"{letter}T": state for letter, state in zip(cell.states, last)}
                results.append({"y": y} | states | sequences.named(cases[k], each))
        return results


def pair(*sizes):
    return [sequences.draw(*sizes, reverse=reverse, seed=seed) for seed, reverse in enumerate((False, True))]


@ON_HOST
@pytest.mark.parametrize(
    ("name", "dtype"), [("lstm", "bfloat16"), ("rnn_relu", "float16"), ("rnn_tanh", "float32"), ("gru", "tf32")]
)
@pytest.mark.parametrize(
    ("device", "size"),
    [("h200", (5, 3, 4, 20)), ("h200", (4, 11, 3, 140)), ("a100", (4, 3, 3, 140))],
    ids=["block", "cluster", "grid"],
)
def test_numbers_are_those_of_a_launch_for_each(name, dtype, device, size):
    """And right: ragged, each direction with x, weights and states of its own."""
    tf32 = dtype == "tf32"
    fused, cases = FusedRuns(DEVICES[device]), pair(name, "float32" if tf32 else dtype, *size)
    alone = fused.run(cases, tf32, together=False)
    assert {directions for _, directions in fused.launched} == {"1"}
    fused.launched.clear()
    both = fused.run(cases, tf32, together=True)
    kernels = [kernel for kernel, directions in fused.launched if directions == "2"]
    n, ways = len(kernels) // 3, ("persistent_forward", "persistent_forward", "persistent_backward")
    assert kernels == [way for way in ways for _ in range(n)], "one launch for two directions, and a part of the batch"
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        for what in one:
            assert torch.equal(one[what], other[what]), what
    for case, results in zip(cases, both):
        sequences.check(case, results, tf32=tf32)


@ON_HOST
@pytest.mark.parametrize("option", ["all", "reset", "mean", "norm"])
@pytest.mark.parametrize(("device", "size"), [("h200", (5, 3, 4, 20)), ("a100", (4, 5, 3, 140))], ids=["block", "grid"])
def test_modifiers_stay_each_directions_own(option, device, size):
    """Flags, values per unit and the seeds of masks."""
    fused, made = FusedRuns(DEVICES[device]), []
    for seed, reverse in enumerate((False, True)):
        options = (reference_modifiers.OPTIONS | reference_modifiers.NORMED)[option]
        made.append(reference_modifiers.drawn("lstm", options, "float32", *size, reverse=reverse, seed=seed))
    both = fused.run([each.case for each in made], False, together=True)
    assert ("persistent_backward", "2") in fused.launched
    for each, results in zip(made, both):
        reference_modifiers.check(each, results)


@ON_HOST
def test_a_batch_that_does_not_fit_beside_itself_takes_several_launches():
    """Of which each has both directions; every group of one direction is followed by that of the other."""
    small, cases = persistent.Device((9, 0), 24, 232448), pair("gru", "float16", 4, 40, 3, 140)
    fused = FusedRuns(small)
    both, alone = (fused.run(cases, False, together=together) for together in (True, False))
    count = sum(kernel == "persistent_forward" and directions == "2" for kernel, directions in fused.launched)
    plan, _ = planned("gru", "float16", 140, 40, small, False)
    both_ways, _ = persistent.fuse_runs(plan, 2, 40, small)
    assert (plan.scope, both_ways.launches > 1, count) == ("grid", True, 2 * both_ways.launches)
    for one, other in zip(alone, both, strict=True):
        assert all(torch.equal(one[what], other[what]) for what in one)


@ON_HOST
def test_where_both_do_not_fit_they_go_one_after_the_other():
    device = replace(DEVICES["a100"], multiprocessors=9)
    cases, fused = pair("lstm", "bfloat16", 4, 3, 3, 140), FusedRuns(device)
    both, alone = (fused.run(cases, False, together=together) for together in (True, False))
    assert all(torch.equal(one["dx"], other["dx"]) for one, other in zip(alone, both, strict=True))
    assert {directions for kernel, directions in fused.launched} == {"1"}


# ---- The plans ------------------------------------------------------------------------------------------------------


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(problems)
def test_every_plan_for_both_fits_and_covers(problem):
    cell, dtype, H, B, name, backward, scope = problem
    device = DEVICES[name]
    alone, _ = planned(cell, dtype, H, B, device, backward, scope)
    if alone is None:
        return
    both, reasons = persistent.fuse_runs(alone, 2, B, device)
    if both is None:
        assert reasons
        assert alone.scope == "grid" or 2 * alone.waves < -(-2 * -(-B // alone.rows) // device.multiprocessors)
        return
    assert not reasons
    changed = {"directions", "groups", "launches", "waves"}
    assert replace(both, **{field: getattr(alone, field) for field in changed}) == alone, (
        "each computes as it would alone"
    )
    assert both.waves <= 2 * alone.waves, "no slower than one after the other"
    assert (both.launches - 1) * both.groups * both.rows < B <= both.launches * both.groups * both.rows
    assert both.grid == 2 * both.groups * both.blocks
    if both.scope == "grid":
        assert both.grid <= device.multiprocessors
        assert both.exchange_bytes(T=9) == both.grid // both.blocks * 2 * both.round_bytes
    for part, launch in enumerate(launches(both, cell, stored(dtype), B, H)):
        assert launch.grid == (both.grid, 1, 1)
        assert launch.arguments[4] == part * both.groups * both.rows, "no row is left out between launches"


def test_the_driver_is_queried_about_both():
    device, queried = DEVICES["h200"], []

    def occupancy(cell, dtype, plan):
        queried.append(plan.directions)
        return 132 if plan.scope == "grid" and plan.directions == 1 else 16

    cuda.config_of.cache_clear()
    arguments = cells.get("gru"), "bfloat16", 1024, 8, 2, device, False, True
    plan, why = cuda.config_of(*arguments, occupancy)
    assert (plan.directions, queried) == (1, [1, 2])
    assert why == ("grid scope: needs 128 blocks co-resident, but the CUDA driver reports 16",)
    cuda.config_of.cache_clear()
    assert cuda.config_of(*arguments, lambda *_: 132)[0].directions == 2


def test_explain_tells_both_from_one_after_the_other(monkeypatch):
    monkeypatch.setattr(cuda, "device", lambda: DEVICES["h200"])
    options = {"dtype": "bfloat16", "device": "cuda", "library": "torch", "directions": 2}
    assert "2 runs in one launch" in cuda.plan(Problem(cells.get("lstm"), 50, 8, 64, 512, **options))
    plan = cuda.plan(Problem(cells.get("lstm"), 50, 8, 64, 2048, **options))
    assert "1 of 2 runs at a time: grid scope: 2 runs in one launch need 2 x 128 blocks" in plan
    assert "per-step" in cuda.plan(Problem(cells.get("lstm"), 50, 8, 64, 4096, **options))


@WITH_NVRTC
@pytest.mark.parametrize(("problem", "arch", "backward"), COMPILATIONS[::12], ids=str)
def test_compiles_without_spills(problem, arch, backward):
    """As many registers are enough as for one: each direction has code of its own."""
    cell, dtype, _, B = problem
    alone = any_plan(problem, arch, backward)
    plan, _ = persistent.fuse_runs(alone, 2, B, DEVICES[ARCHITECTURES[arch]])
    if plan is None:
        pytest.skip("both don't fit")
    check_machine_code(plan, cells.get(cell).kernel_cell, stored(dtype), arch)


# ---- Autograd -------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    """The NumPy backend; notes how many runs it is called with at once, but not those that it runs in turn."""
    backend, recorded_calls = dispatch.backend("numpy"), []
    forward, backward = backend.forward, backend.backward

    def recording_forward(problem, runs):
        recorded_calls.append(("forward", len(runs), problem.saves))
        return forward(problem, runs)

    def recording_backward(problem, runs, *args):
        recorded_calls.append(("backward", len(runs)))
        return backward(problem, runs, *args)

    monkeypatch.setattr(backend, "forward_in_turn", lambda _, *args: protocol.forward_in_turn(forward, *args))
    monkeypatch.setattr(backend, "backward_in_turn", lambda _, *args: protocol.backward_in_turn(backward, *args))
    monkeypatch.setattr(backend, "forward", recording_forward)
    monkeypatch.setattr(backend, "backward", recording_backward)
    return recorded_calls


CALLS = {
    "plain": ({}, {}),
    "history": ({}, {"return_states": True}),
    "lengths and resets": ({}, {"lengths": torch.tensor([5, 2]), "reset": torch.rand(5, 2) < 0.3}),
    "masks": ({"zoneout": 0.2, "recurrent_dropout": 0.3, "input_dropout": 0.2, "weight_dropout": 0.1}, {}),
    "recompute": ({"recompute": True}, {}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_layer_runs_both_and_gets_the_same(kind, call, at_once, monkeypatch):
    options, call_options = CALLS[call]
    layer = getattr(gpu_rnn, kind)(3, 4, num_layers=2, bidirectional=True, **options)

    def results(trains):
        torch.manual_seed(0)
        x = torch.randn(5, 2, 3, requires_grad=trains)
        outputs = torch.utils._pytree.tree_leaves(layer(x, **call_options))
        if not trains:
            return tuple(outputs)
        return *outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *layer.parameters()])

    with torch.no_grad():
        inferred = results(False)
    assert at_once == [("forward", 2, call == "history")] * 2
    at_once.clear()
    trained = results(True)
    saves = call != "recompute"
    ways = [("backward", 2)] if saves else [("forward", 2, True), ("backward", 2)]
    assert at_once == [("forward", 2, saves or call == "history")] * 2 + ways * 2
    monkeypatch.undo()
    for ours, alone in zip((*inferred, *trained), (*results(False), *results(True)), strict=True):
        assert torch.equal(ours, alone)


def test_it_is_differentiated_again(at_once):
    """A graph that is kept runs backward twice; and one frozen direction has no gradients."""
    layer = gpu_rnn.GRU(2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)
    assert ("forward", 2, True) in at_once
    loss = layer(x)[0].square().sum()
    once, again = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("reverse"))
    layer(x.detach())[0].sum().backward()
    assert all((p.grad is not None) == name.endswith("reverse") for name, p in layer.named_parameters())


def test_transforms_go_one_after_the_other(at_once):
    layer = gpu_rnn.LSTM(2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(x)
    assert {recorded_calls[1] for recorded_calls in at_once} == {1}
    expected = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-14)
