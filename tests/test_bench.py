"""The benchmarks: what can't be measured costs a row and not the run, and results are never lost or rewritten."""

import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import (
    calibration,
    device_checks,
    gpu,
    kernels,
    modifiers,
    nvrtc,
    problems,
    results,
    roofline,
    timing,
    worker,
)
from bench.data import Data
from bench.implementations import IMPLEMENTATIONS, Implementation, plan_of
from bench.problems import NATIVE, NN, NUMPY, Case
from bench.worker import Worker
from gpu_rnn import functional
from gpu_rnn.backends import call_cache, cuda, dispatch, numpy
from gpu_rnn.core.optional_imports import no_gpu
from gpu_rnn.kernels.cuda import persistent

from . import cuda_on_cpu, test_gpu
from .cuda_emulator import runtime

CASE = Case("lstm", 3, 2, 4, 5)
TRAINING = replace(CASE, mode="training")


# ---- problems and the roofline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [problems.cpu, problems.quick, problems.gpu])
def test_every_planned_case_is_there_once_in_its_group(plan):
    for group in plan():
        assert len(set(group.cases)) == len(group.cases) > 0
        assert set(group.implementations) <= set(problems.ALL)


def test_the_gpu_begins_with_what_matters_most():
    first = problems.gpu()[0].cases[0]
    assert (first.dtype, first.cell, first.T, first.H) == ("bfloat16", "lstm", 1024, 512)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"T": 0}, "T = 0"), ({"B": -3}, "B = -3"), ({"H": 2.5}, "H = 2.5"), ({"I": True}, "I = True"),
        ({"H": 10**6}, "GiB"), ({"L": 0}, "L = 0"),
        ({"dtype": "int8"}, "int8"), ({"mode": "step"}, "T = 3"), ({"cell": "lstn"}, "lstn"),
    ],
)  # fmt: skip
def test_a_senseless_case_says_what_is_wrong_with_it(change, word):
    with pytest.raises(ValueError, match=word):
        replace(CASE, **change)


@pytest.mark.parametrize(
    "arguments",
    [
        "-T 0", "-B -1", "-H 99999999", "--cell lstn", "-T 1 --implementation me", "--minutes 0", "--minutes -1",
        "--minutes inf", "--minutes nan",
        "--threads 0", "--threads 999", "--filter nonsense", f"-T 1 --out {__file__}/x.csv",
        *([] if no_gpu() is None else ["--device cuda"]),
    ],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(arguments, capsys):
    assert command.main(["run", *arguments.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


GPU = roofline.Ceilings({"bfloat16": 8e14, "float32": 4e14}, 4e12, roofline.HOPPER)


def test_the_bound_grows_with_the_problem():
    small = Case("lstm", 64, 8, 128, 128, "bfloat16", device="cuda")

    def bound(case, name=NN):
        return roofline.bound_us(name, case, GPU)

    for larger in ({"T": 128}, {"B": 4096}, {"H": 1024}, {"mode": "training"}):
        assert bound(replace(small, **larger)) > bound(small) > 0
    assert bound(small) > 64 * 0.6, "no step is shorter than its exchange"
    assert bound(replace(small, L=2)) > 1.9 * bound(small)
    assert bound(replace(small, dtype="float16")) is None, "its ceiling wasn't measured"
    assert bound(small, "ours, coupled") is None, "it computes less"


def test_the_bounds_of_kernels_alone():
    case = Case("lstm", 8, 16, 256, 256, "float32", "training", "cuda")
    least = {part: roofline.bound_us(f"cuda forward {part}", case, GPU) for part in problems.PARTS}
    assert least["sequence"] == max(least["exchange"], least["product"]) == pytest.approx(8 * 0.8)
    forward = 4 * (4 + 4 + 1 + 4 + 4)  # Wx, Rh, y, h and c before and after, four gates saved; a unit's bytes
    assert roofline.step_bytes("forward", case) == forward * 16 * 256
    back = 4 * (1 + 1 + 4 + 4 + 4 + 2)  # dy, back, da, dh and dc before and after, gates, c before and after
    assert roofline.step_bytes("backward", case) == back * 16 * 256
    assert least["step"] == pytest.approx(1e6 * 8 * forward * 16 * 256 / 4e12)


@pytest.mark.parametrize(("H", "name"), [(128, "SM"), (512, "cluster"), (1024, "grid"), (2048, "streamed")])
def test_weights_are_kept_at_the_smallest_scale_that_holds_them(H, name):
    assert roofline.scale(Case("lstm", 8, 8, H, H, "bfloat16", device="cuda"), GPU).name == name


# ---- one case -------------------------------------------------------------------------------------------------------


def measured(case, *names, seconds=0.01):
    """The rows of these implementations, by name."""
    told, enabled = [], torch.is_grad_enabled()
    try:
        timing.measure(told.append, case, [NN, *names], seconds)
    finally:
        torch.set_grad_enabled(enabled)
    return {message["row"]["implementation"]: message["row"] for message in told if "row" in message}


def broken(how):
    """Wrong, without memory, or raising."""

    def prepare(case, data):
        run = IMPLEMENTATIONS[NN].prepare(case, data)

        def run_broken(k):
            if how == "memory":
                raise MemoryError("no more")
            if how == "error":
                raise RuntimeError("what a pity")
            y, *rest = run(k)
            return (y + float("nan") if how == "nan" else y * 1.01, *rest)

        return run_broken

    return Implementation(prepare)


@pytest.mark.parametrize("case", [CASE, TRAINING], ids=str)
def test_an_implementation_that_errs_or_breaks_has_a_row_without_a_time(case, monkeypatch):
    for how in ("off", "nan", "memory", "error"):
        monkeypatch.setitem(IMPLEMENTATIONS, how, broken(how))
    rows = measured(case, NUMPY, "off", "nan", "memory", "error")
    assert {name: row["status"] for name, row in rows.items()} == {
        NN: "ok", NUMPY: "ok", "off": "wrong", "nan": "wrong", "memory": "out of memory", "error": "failed",
    }  # fmt: skip
    assert "what a pity" in rows["error"]["note"]
    assert "y is off by" in rows["off"]["note"]
    assert rows[NN]["ratio"] == 1
    for name in (NN, NUMPY):
        assert 0 < rows[name]["p20_us"] <= rows[name]["median_us"] <= rows[name]["p80_us"]
    assert not any("median_us" in row for row in rows.values() if row["status"] != "ok")


def test_small_lstms_pass_their_check():
    """Sums over T B rows, one after the other, were less exact than torch's."""
    case = Case("lstm", 32, 8, 32, 32, mode="training")
    assert measured(case, NUMPY)[NUMPY]["status"] == "ok"


def test_a_stream_is_checked_and_has_a_row():
    case = Case("lstm", 1, 3, 4, 5, mode="step")
    rows = measured(case, problems.STREAM)
    assert rows[problems.STREAM]["status"] == "ok", rows
    assert measured(CASE, problems.STREAM)[problems.STREAM]["status"] == "absent"


def test_a_slow_call_that_was_checked_counts(monkeypatch):
    calls = []

    def slow(case, data):
        run = IMPLEMENTATIONS[NN].prepare(case, data)
        return lambda k: calls.append(time.sleep(0.02)) or run(k)

    monkeypatch.setitem(IMPLEMENTATIONS, "slow", Implementation(slow))
    monkeypatch.setattr(timing, "SLOW_S", 0.01)
    assert measured(CASE, "slow")["slow"]["rounds"] == len(calls) == 3
    calls.clear()
    monkeypatch.setattr(timing, "LONG_S", 0.01)
    assert measured(CASE, "slow")["slow"]["rounds"] == len(calls) == 2
    calls.clear()
    monkeypatch.setitem(IMPLEMENTATIONS, "slow", Implementation(slow, compiles=True))
    measured(CASE, "slow")
    assert len(calls) == 3, "its first call was no measure"


def test_an_exact_answer_is_computed_once_for_all_numbers_of_threads(tmp_path, monkeypatch):
    told, run = [], timing.module_run
    monkeypatch.setattr(timing, "LARGE_FLOPS", 1)
    monkeypatch.setattr(timing, "module_run", lambda *args: told.append(1) or run(*args))
    data = Data(TRAINING)
    first, second = (timing.exact_once(TRAINING, data, str(tmp_path)) for _ in range(2))
    assert len(told) == 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.iterdir())


def test_several_layers():
    case = replace(TRAINING, L=3, cell="gru")
    rows = measured(case, NUMPY, *problems.STACKED)
    assert {name: row["status"] for name, row in rows.items()} == {NUMPY: "absent"} | dict.fromkeys(
        problems.STACKED, "ok"
    )
    assert len(Data(case).weights) == 12
    assert case.flops > 2 * replace(case, L=1).flops


def test_a_wavefront_is_held_against_layers_in_turn(monkeypatch):
    """Either way for itself, of the very call that is timed."""
    queried = []
    monkeypatch.setattr(cuda, "fuses_layers", lambda problem, backward: queried.append(backward))
    monkeypatch.setattr(numpy, "fuses_layers", lambda *args: cuda.fuses_layers(*args))  # serves here
    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")
    monkeypatch.setattr(call_cache, "CACHE", {})
    expected = {problems.LAYER: [False, True], problems.PER_LAYER: [], problems.PER_LAYER_BACKWARD: [False]}
    for name in expected:
        run = IMPLEMENTATIONS[name].prepare(replace(TRAINING, L=2), Data(replace(TRAINING, L=2)))
        queried.clear()
        call_cache.CACHE.clear()
        with torch.enable_grad():
            run(0)
        assert queried == expected[name]
    monkeypatch.setattr(cuda, "device", lambda: persistent.DEVICES["h200"])
    monkeypatch.setattr(dispatch, "choose", lambda problem: cuda)
    (case, *_) = [
        case for group in problems.gpu() if group.name == "wavefront" for case in group.cases if case.training
    ]
    both, in_turn, forward = (IMPLEMENTATIONS[name].plan(case) for name in problems.STACKED[1:])
    assert both == "wavefront"
    assert "wavefront" not in in_turn
    assert forward == f"wavefront, back {in_turn.split()[-1]}"


def test_memory_is_what_is_kept_for_the_gradient():
    case = Case("lstm", 16, 4, 8, 8, mode="training")
    rows = measured(case, problems.LAYER, problems.PLAIN, "ours, recompute", NUMPY)
    saved = 4 * 16 * 4 * (4 + 1) * 8  # four gates and c, of all time steps
    assert saved <= rows[problems.PLAIN]["saved_bytes"] <= rows[problems.LAYER]["saved_bytes"] < 1.2 * saved
    assert rows["ours, recompute"]["saved_bytes"] == 0
    assert rows[NUMPY]["saved_bytes"] is None, "autograd knows nothing of it"
    assert rows[NN]["saved_bytes"] > 0


# ---- modifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_every_modifier_is_right_and_has_a_row(cell, mode):
    rows = measured(Case(cell, 9, 3, 4, 16, mode=mode), *problems.MODIFIERS)
    lacking = {keyword for keywords in modifiers.OF.values() for keyword in keywords} - set(modifiers.OF.get(cell, ()))
    expected = {name: "absent" if lacking & keywords.keys() else "ok" for name, keywords in problems.MODIFIERS.items()}
    assert {name: row["status"] for name, row in rows.items() if name != NN} == expected, rows


@pytest.mark.parametrize("name", list(problems.MODIFIERS)[1:])
def test_a_modifier_that_does_nothing_is_noticed(name, monkeypatch):
    cell = "gru" if name == "ours, reset before" else "lstm"
    ours = getattr(functional, cell)

    def forgetful(*args, **kwargs):
        left = {"w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0"}
        if name == "ours, coupled":
            raise ValueError("three gates")
        y, last = ours(*args, **{key: value for key, value in kwargs.items() if key in left})
        return (y, last, (y, 0 * y)) if name == "ours, return_states" else (y, last)

    monkeypatch.setattr(modifiers, "function", lambda cell: (forgetful, {}))
    row = measured(Case(cell, 33, 3, 4, 5, mode="forward"), name)[name]
    known = {"ours, coupled": "failed", "ours, projection": "failed"}  # of other shapes
    known |= {"ours, recompute": "ok", "ours, input projection": "ok", "ours, step_exact": "ok"}  # the same numbers
    known |= {f"ours, {mask}": "ok" for mask in modifiers.MASKED}  # a product before the call, here as there
    assert row["status"] == known.get(name, "wrong")


# ---- kernels alone --------------------------------------------------------------------------------------------------


def test_nothing_is_timed_while_threads_spin(monkeypatch):
    """As OpenBLAS's do for a while after a product of several threads."""
    spent = iter((0.0, 0.005, 0.010, 0.015, 0.0151))  # seconds of all threads, at every glance
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(timing.time, "process_time", lambda: next(spent))
    timing.clock(CASE, lambda k: None)(0, 1)
    assert next(spent, "all seen") == "all seen"


HOST = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


def on_cpu(backend, way, part):
    """A kernel of ours, on the CPU, as an H200 would have it."""
    place = kernels.LaunchContext(cuda_on_cpu.prepare_launch, persistent.DEVICES["h200"], None, lambda x: nullcontext())
    return kernels.KernelOnly(backend, way, part, lambda: place)


@HOST
@pytest.mark.parametrize("H", [13, 130])
def test_every_kernel_alone_runs_and_has_a_row(H, monkeypatch):
    """The per-step ones, and the persistent ones in a block and in a cluster."""
    cuda = [name for name in problems.KERNELS if name.startswith("cuda")]
    for name in cuda:
        monkeypatch.setitem(IMPLEMENTATIONS, name, on_cpu(*problems.KERNELS[name]).implementation())
    case = Case("lstm", 4, 3, 5, H, mode="training")
    rows = measured(case, *cuda)
    assert {row["status"] for row in rows.values()} == {"ok"}, [row.get("note") for row in rows.values()]
    for name in cuda:
        assert rows[name]["median_us"] > 0
        assert rows[name]["plan"] == ("stepwise" if name.endswith("step") else "block" if H == 13 else "cluster")
        assert rows[name]["ratio"] is rows[name]["peak_bytes"] is rows[name]["saved_bytes"] is None
    inference = measured(replace(case, mode="forward"), "cuda forward sequence", "cuda backward sequence")
    assert inference["cuda forward sequence"]["status"] == "ok"
    assert inference["cuda backward sequence"]["status"] == "absent"


@HOST
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_persistent_kernel_alone_computes_what_the_call_does(way):
    case = Case("gru", 4, 3, 5, 20, mode="training")
    alone, data = on_cpu("cuda", way, "sequence"), Data(case)
    args = alone.args(case, data)
    output = args.y if way == "forward" else args.dWx
    output.fill_(float("nan"))
    alone.launch(case, args)()
    ours = output.clone()
    output.fill_(float("nan"))
    args_of_loop = alone.args(case, data)
    alone.loop(way == "backward")(case.problem(), [args_of_loop])
    assert torch.equal(ours, args_of_loop.dWx if way == "backward" else args_of_loop.y)


@HOST
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_per_step_kernel_alone_is_launched_for_all_time_steps(way):
    case = Case("lstm", 5, 2, 3, 4, mode="training")
    alone, data, told = on_cpu("cuda", way, "step"), Data(case), []
    run = alone.context().run
    counted = kernels.LaunchContext(lambda launch: told.append(launch) or run(launch), *alone.context()[1:])
    alone.context = lambda: counted
    args = alone.args(case, data)
    told.clear()
    launch = alone.launch(case, args)
    assert [each.kernel for each in told] == [f"stepwise_{way}"]
    output = args.y if way == "forward" else args.dWx
    output.fill_(float("nan"))
    launch()
    assert torch.isfinite(output).all()


def fill_ones(problem, buffers):
    for one in buffers:
        one.y.fill_(1.0)


@HOST
def test_a_kernel_of_a_wrong_call_has_no_time(monkeypatch):
    monkeypatch.setattr(kernels.KernelOnly, "loop", lambda self, backward: fill_ones)
    product = on_cpu("cuda", "forward", "product").implementation()
    monkeypatch.setitem(IMPLEMENTATIONS, "cuda forward product", product)
    row = measured(Case("lstm", 4, 3, 5, 20), "cuda forward product")["cuda forward product"]
    assert row["status"] == "wrong"
    assert "median_us" not in row


@pytest.mark.parametrize("case", [Case("gru", 7, 3, 5, 4), Case("lstm", 3, 1000, 2, 4, mode="training")], ids=str)
def test_matmuls_alone_are_all_that_a_case_has(case, monkeypatch):
    run, _ = IMPLEMENTATIONS[problems.MATMULS].prepare(case, Data(case))
    work, dot = [], np.dot

    def counted(a, b, *out):
        work.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return dot(a, b, *out)

    monkeypatch.setattr(np, "dot", counted)
    run(0)
    assert sum(work) == case.flops
    monkeypatch.undo()
    assert measured(case, problems.MATMULS)[problems.MATMULS]["ratio"] > 0


@pytest.mark.skipif(no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_kernels_alone_say_so():
    rows = measured(CASE, *problems.KERNELS)
    assert {row["status"] for name, row in rows.items() if name != NN} == {"absent"}
    assert all("no NVIDIA GPU" in row["note"] for name, row in rows.items() if name != NN)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("forward: persistent kernel (cluster scope)\nbackward: persistent kernel (grid scope)", "cluster, back grid"),
        ("forward: persistent kernel (grid scope): 2\nbackward: persistent kernel (grid scope): 64", "grid"),
        ("input\nforward: per-step kernels: one GEMM; no persistent kernel: cluster scope: weights exceed", "stepwise"),
        ("input projection: one GEMM\nforward: persistent kernel: 4 x 64 threads", "sequence"),
        ("forward: float32, one recurrent matmul and 9 elementwise NumPy calls per time step", ""),
    ],
)  # fmt: skip
def test_the_plan_of_a_backend_in_a_word(text, plan):
    class Backend:
        @staticmethod
        def plan(problem):
            return text

    assert plan_of(Backend, None) == plan


@pytest.fixture
def process(monkeypatch):
    """A worker that measures nothing."""
    monkeypatch.setattr(worker, "MEASURE", "tests.bench_worker:measure")
    monkeypatch.setattr(worker, "CEILINGS", "tests.bench_worker:ceilings")
    yield (one := Worker())
    one.close()
    assert not worker.ALIVE


def test_a_crash_or_a_hang_costs_one_row(process):
    for attempt in range(4):
        rows = process.measure(CASE, ("crash", "a", "hang", "b"), 0.1, timeout=2)
        rows = {row["implementation"]: row for row in rows}
        statuses = [rows[name]["status"] for name in (NN, "crash", "a", "hang", "b")]
        if attempt < 3:
            assert statuses == ["ok", "crashed", "ok", "timed out", "ok"]
            assert rows["crash"]["note"] == "exit status 1: a last word"
        else:
            assert statuses == ["ok", "left out", "ok", "left out", "ok"], "three times are enough"


def test_answers_that_come_too_late_are_not_those_of_the_next_case(process):
    with pytest.raises(TimeoutError):
        process.ceilings("cpu", timeout=0.2)
    next(process.run(worker.MEASURE, CASE, ["never read", "hang"], 0.1, None, until=time.monotonic() + 60))
    for name in "ab":
        rows = list(process.measure(CASE, (name,), 0.1, timeout=60))
        assert [row["implementation"] for row in rows] == [NN, name]


def test_what_is_not_done_when_the_time_is_over_has_no_row(process):
    rows = list(process.measure(CASE, ("a", "hang", "b"), 0.1, timeout=60, until=time.monotonic() + 4))
    assert [row["implementation"] for row in rows] == [NN, "a"]
    assert not process.failures


def checked(function, *args, journal, patience=60.0, seconds=60.0):
    until = time.monotonic() + seconds
    return worker.run_checks(
        Worker(), f"tests.bench_worker:{function}", *args, journal=journal, patience=patience, until=until
    )


def test_checks_go_on_after_one_that_hangs_or_crashes(tmp_path):
    journal = worker.Journal(tmp_path / "journal.jsonl")
    assert checked("checks", journal=journal, patience=4) == ""
    outcomes = {name: (line["outcome"], line["note"]) for name, line in journal.outcomes().items()}
    assert outcomes.pop("b") == ("hung", "nothing happened for 4 s")
    assert outcomes == {
        "a": ("passed", ""), "c": ("crashed", "SIGABRT: free(): invalid pointer | Aborted"), "d": ("passed", ""),
    }  # fmt: skip
    assert checked("script", "time.sleep(60)", journal=journal, seconds=0.3) == "out of time"
    assert not worker.ALIVE


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import a_library_that_is_not_here", "ModuleNotFoundError: No module named 'a_library_that_is_not_here'"),
        ("import faulthandler; faulthandler.enable(); os.abort()", "SIGABRT: Fatal Python error: Aborted | "),
        ("pass", ""),
    ],
)  # fmt: skip
def test_why_checks_could_not_begin_is_told(script, why, tmp_path):
    told = checked("script", script, journal=worker.Journal(tmp_path / "journal.jsonl"))
    assert why in told if why else told == ""


SEVERAL = """
import pytest

@pytest.mark.parametrize("n", [0, 1, 2])
def test_many(n): pass

def test_one(): pass

def test_known(): pass
"""


def test_time_goes_to_every_function_and_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "test_a.py").write_text(SEVERAL)
    (tmp_path / "test_b.py").write_text("import a_library_that_is_not_here")
    journal = worker.Journal(tmp_path / "journal")
    arguments = ["-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
    known = {"test_a.py::test_known": 0.1}
    how = {"journal": journal, "patience": 60, "until": time.monotonic() + 60}
    worker.run_checks(Worker(), "bench.pytest_journal:run", [*arguments, str(tmp_path)], (0, 1), known, **how)
    outcomes = journal.outcomes()
    order = ["test_many[0]", "test_one", "test_many[1]", "test_many[2]", "test_known"]
    assert list(outcomes) == ["test_b.py", *(f"test_a.py::{name}" for name in order)]
    assert [line["outcome"] for line in outcomes.values()] == ["failed", *["passed"] * 5]
    assert "a_library_that_is_not_here" in outcomes["test_b.py"]["note"]


# ---- results --------------------------------------------------------------------------------------------------------


def row(implementation=NUMPY, case=CASE, us=100.0, ratio=0.5, **more):
    measured = {
        "implementation": implementation, "status": "ok", "median_us": us, "p20_us": 0.98 * us, "p80_us": 1.02 * us,
        "us_per_step": us / case.T, "ratio": ratio, "rounds": 5, "peak_bytes": 1 << 20, **more,
    }  # fmt: skip
    return results.complete(
        measured, case, "2026-01-01T00:00:00Z", 1, roofline.Ceilings({"float32": 1e11}, 1e10, roofline.CPU)
    )


def rows_of(path):
    return pytest.importorskip("bench.report").read(path).to_dict("records")


def test_results_only_grow(tmp_path):
    path = tmp_path / "new" / "here.csv"
    for us in (100.0, 1 / 3):
        results.append(path, row(us=us))
    first, second = rows_of(path)
    assert (first["median_us"], second["median_us"]) == (100, 0.333333)
    assert (first["T"], first["dtype"], first["implementation"], first["driver"]) == (3, "float32", NUMPY, "")
    assert first["fraction_of_bound"] == pytest.approx(first["bound_us"] / 100, rel=1e-4)
    before = path.read_text()
    with pytest.raises(ValueError, match="colour"):
        results.append(path, row(colour="red"))
    path.write_text(before.replace("implementation", "who", 1))
    with pytest.raises(ValueError, match="never rewritten"):
        results.append(path, row())


def test_an_older_file_is_given_the_new_columns(tmp_path):
    path = tmp_path / "old.csv"
    results.append(path, row())
    lines = [line.split(",") for line in path.read_text().splitlines()]
    kept = [n for n, name in enumerate(lines[0]) if name not in ("L", "plan", "saved_bytes")]
    path.write_text("".join(",".join(line[n] for n in kept) + "\n" for line in lines))
    (old,) = rows_of(path)
    assert (old["L"], old["plan"]) == (1, "")
    assert np.isnan(old["saved_bytes"])
    results.append(path, row(case=replace(CASE, L=2)))
    first, second = rows_of(path)
    np.testing.assert_equal(first, old)
    assert second["L"] == 2
    assert not list(tmp_path.glob("*.new"))


def test_compare_tells_what_changed_beyond_noise(tmp_path, capsys):
    names = {"a": (100.0, 100.0, 100.0), "b": (200.0, 103.0, 50.0)}
    for name, (slower, noisy, faster) in names.items():
        for H, us in ((5, slower), (6, noisy), (7, faster)):
            results.append(tmp_path / f"{name}.csv", row(case=replace(CASE, H=H), us=us))
        wide = row(case=replace(CASE, H=8), us=slower, p20_us=90.0, p80_us=210.0)
        results.append(tmp_path / f"{name}.csv", wide)
    assert command.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 0
    slower, faster, count = capsys.readouterr().out.splitlines()
    assert "H=5" in slower
    assert "100 -> 200 us, 2.00x slower" in slower
    assert "2.00x faster" in faster
    assert count == "2 of 4 changed beyond noise"
    assert command.main(["compare", str(tmp_path / "a.csv"), "no such run"]) == 2


def test_a_run_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.csv"
    sizes = ["-T", "4", "-B", "2", "-H", "8", "--mode", "forward", "--cell", "lstm", "gru", "rnn_tanh"]
    names = ["--implementation", NUMPY, problems.ONNX, problems.EAGER, problems.LAYER]
    assert command.main(["run", *sizes, *names, "--threads", "1", "--out", str(path)]) == 0
    rows = rows_of(path)
    assert {row["status"] for row in rows} <= {"ok", "absent"}, [row["note"] for row in rows]
    assert len(rows) == 3 * 5
    for one in rows:
        if one["status"] == "ok":
            assert one["error"] < 1e-5
            assert one["us_per_step"] == pytest.approx(one["median_us"] / 4, rel=1e-4)
    assert "times as fast as torch.nn" in capsys.readouterr().out


def test_what_was_measured_before_ctrl_c_is_kept(tmp_path, monkeypatch, capsys):
    measure, process = Worker.measure, worker.ALIVE

    def interrupted(*args):
        yield next(measure(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "measure", interrupted)
    path = tmp_path / "run.csv"
    assert command.main(["run", "-T", "1", "2", "-B", "1", "-H", "4", "--threads", "1", "--out", str(path)]) == 130
    assert [row["implementation"] for row in rows_of(path)] == [NN]
    assert "what was measured is kept" in capsys.readouterr().out
    assert not process


# ---- reports --------------------------------------------------------------------------------------------------------


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for H in (32, 128, 256, 512):
        usual = Case("lstm", 32, 8, H, H)
        for case in (usual, replace(usual, mode="training"), replace(usual, T=9)):
            for name, ratio in ((NN, 1.0), (NUMPY, 0.5 if case.T == 32 and H in problems.GOALS[2] else 0.9)):
                plan = "cluster" if H < 256 else "grid"
                results.append(tmp_path / "results" / "x.csv", row(name, case, us=H * 10.0, ratio=ratio, plan=plan))
    for name, us in ((problems.PLAIN, 100.0), ("ours, reset", 150.0), ("cuda forward step", 20.0)):
        results.append(tmp_path / "results" / "x.csv", row(name, TRAINING, us=us, ratio=None, saved_bytes=1 << 20))
    results.append(tmp_path / "results" / "x.csv", row(NATIVE, Case("lstm", 32, 8, 32, 32), ratio=0.25))
    readme, other = tmp_path / "README.md", tmp_path / "benchmarks.md"
    other.write_text("<!-- bench:cpu -->\n<!-- /bench -->\n")
    readme.write_text(
        "a\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:overview -->\n<!-- /bench -->\nc\n"
        "<!-- bench:modifiers -->\n<!-- /bench -->\n<!-- bench:kernels -->\n<!-- /bench -->\n"
    )
    (tmp_path / "published").mkdir()
    argv = ["report", "--results", tmp_path / "results", "--out", tmp_path / "out", "--document", readme, other]
    argv = [*map(str, argv), "--publish", str(tmp_path / "published")]
    assert command.main(argv) == 0
    assert str(readme) in capsys.readouterr().out
    text = readme.read_text()
    assert "| NumPy: lstm | 2.00 (2.00), 3 of 27 | 2.00 (2.00), 3 of 27 |" in text
    assert "| NumPy: lstm | 2.00 (2.00), 3 of 27 | 2.00 (2.00), 3 of 27 |" in other.read_text()
    assert "| NumPy, 1 thread: lstm float32 | 2.00 (2.00) | 2.00 (2.00) |  | 6 |" in text
    assert "old" not in text
    assert "| lstm T=3 B=2 H=5 float32: ours, reset |  | 0.67 | 1 | 1 |" in text
    assert "| lstm training T=3 B=2 H=5 float32: cuda forward step |  | 6.67 |" in text
    (steps,) = (tmp_path / "out").glob("*-steps.svg")
    assert "cluster | grid" in steps.read_text()
    (speedup,) = (tmp_path / "out").glob("*-speedup-ours-native.svg")
    assert "| native: lstm | 4.00 (4.00), 1 of 27 |" in text
    assert "| native, 1 thread: lstm float32 | 4.00 (4.00) |" in text
    assert (tmp_path / "published" / "speedup_cpu.svg").read_text() == speedup.read_text()
    html = (tmp_path / "out" / "benchmarks.html").read_text()
    assert "<svg" in html
    assert "src=" not in html, "it needs nothing else"
    command.main(argv)
    assert text == readme.read_text(), "the same results, the same report"
    readme.write_text("<!-- bench:typo -->\n<!-- /bench -->\n")
    assert command.main(argv) == 2
    assert "bench:typo" in capsys.readouterr().err


def reported(tmp_path, *rows, blocks=("cpu", "matmuls", "peers", "calls", "sources")):
    """README.md after a report of these rows, by block."""
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    for one in rows:
        results.append(tmp_path / "results" / "x.csv", one)
    readme, paths = tmp_path / "README.md", {"results": "results", "out": "out", "document": "README.md"}
    readme.write_text("".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in blocks))
    command.main(["report", *(word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path)))])
    return dict(re.findall(r"<!-- bench:(\w+) -->\n(.*?)\n<!-- /bench -->", readme.read_text(), re.S))


def test_a_report_is_of_the_machine_measured_last(tmp_path):
    case = Case("lstm", 32, 8, 128, 128)
    earlier = row(case=case, ratio=0.9) | {"machine": "another", "run": "2025-01-01T00:00:00Z"}
    (tmp_path / "out").mkdir()
    old, foreign = tmp_path / "out" / "old.svg", tmp_path / "out" / "foreign.svg"
    old.write_text("<svg>python -m bench report</svg>")
    foreign.write_text("<svg/>")
    blocks = reported(tmp_path, row(case=case, ratio=0.5), earlier, row(case=replace(case, H=32, I=32), ratio=0.5))
    assert "| NumPy: lstm | 2.00 (2.00), 2 of 27 |" in blocks["cpu"]
    assert "another" not in blocks["sources"]
    assert "another" in (tmp_path / "out" / "benchmarks.html").read_text()
    assert foreign.exists()
    assert not old.exists()


def test_peers_that_are_absent_are_named(tmp_path):
    case = Case("lstm", 32, 8, 128, 128)
    absent = row(problems.HASTE, case, ratio=None) | {"status": "absent", "median_us": None, "note": "not installed"}
    blocks = reported(tmp_path, row(NN, case, ratio=1.0), row(case=case), row(problems.EAGER, case, ratio=3.0), absent)
    assert "| lstm forward T=32 B=8 H=128 float32, threads 1 | 2.00 | 0.33 |" in blocks["peers"]
    assert "- Haste: not installed." in blocks["peers"]


def test_what_a_call_costs_is_told(tmp_path):
    case = Case("gru", 1, 1, 64, 64, mode="step")
    costs = {NN: 50.0, problems.NN_KERNEL: 30.0, problems.LAYER: 40.0, problems.KERNEL: 25.0, problems.STREAM: 9.0}
    table = reported(tmp_path, *(row(name, case, us=us) for name, us in costs.items()))["calls"]
    assert "| gru T=1 B=1 H=64, threads 1: ours (layer) | 40 | 25 | 15 |" in table
    assert "ours (stream) | 9 |" in table


def test_matmuls_alone_are_held_against_ours(tmp_path):
    whole = [row(case=replace(CASE, B=B), ratio=r) for B, r in ((1, 0.4), (8, 0.9))]
    alone = [row(problems.MATMULS, replace(CASE, B=B), ratio=r) for B, r in ((1, 0.2), (8, 0.8), (64, 0.1))]
    table = reported(tmp_path, *whole, *alone)["matmuls"]
    assert "threads 1 |  | 1.67 (1.11) | 2.50 (1.25) | 2 |" in table  # without the case that ours has no time for


# ---- the session on a GPU machine -----------------------------------------------------------------------------------


def test_a_session_needs_nothing_that_only_reports_need():
    """The GPU machine has torch, CuPy and pytest, and nothing can be installed there."""
    modules = "__main__", "gpu", "timing", "calibration", "device_checks", "pytest_journal"
    script = f"import sys, {', '.join(f'bench.{name}' for name in modules)}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], cwd=worker.ROOT, capture_output=True, text=True, check=True)
    assert not {"pandas", "rich", "click", "matplotlib"} & {*told.stdout.split()}


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*-plans.jsonl")), ids=lambda path: path.stem)
def test_measured_configurations_are_listed_fastest_first(path):
    lines, measured = calibration.table(path), {}
    assert len(lines) == len(calibration.read(path)) > 0
    for line in lines:
        problem, times = line[:35], re.search(r": +([\d.]+) us, predicted", line)
        if times:
            measured.setdefault(problem, []).append(float(times[1]))
    assert measured
    assert all(times == sorted(times) for times in measured.values())


@pytest.mark.skipif(no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("python -m bench gpu: no NVIDIA GPU: ")
    assert not list(tmp_path.iterdir())
    assert command.main(["gpu", "--minutes", "0"]) == 2


def test_the_dry_run_goes_through_the_whole_plan(tmp_path, capsys):
    options = SimpleNamespace(dry=True, stage="rest", filter=None, minutes=1)
    planned = gpu.GpuRun(options, tmp_path, time.monotonic()).plan()
    assert {(case.cell, case.mode) for case, _ in planned} >= {("lstm", "training"), ("gru", "step")}
    said = capsys.readouterr().out
    for group in problems.gpu():
        assert f"of {group.name}: {group.cases[0]}" in said
    assert command.main(["gpu", "--dry", "--out", str(tmp_path), "--minutes", "3", "--stage", "first"]) == 0
    said = capsys.readouterr().out
    for stage in ("machine", "ceilings", "compiling", "features", "smoke", "plans", "benchmarks", "tests", "summary"):
        assert f"== {stage}" in said
    for group in problems.gpu_first():
        assert f"of {group.name}: {group.cases[0]}" in said
    assert len(said[said.index("== summary") :].splitlines()) <= 101
    assert not list(tmp_path.iterdir()), "it keeps nothing"
    for only, word in (("sanitize", "compute-sanitizer --tool racecheck"), ("profile", "ncu --clock-control none")):
        command.main(["gpu", "--dry", "--only", only])
        assert word in capsys.readouterr().out


SCOPES = """
import os, time, pytest

def test_other(): raise AssertionError("it isn't asked for")

@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize("scope", ["block", "cluster", "grid"])
def test_persistent_kernels(scope, name):
    assert "GPU_RNN_CUDA_UNPROVEN" not in os.environ
    if (scope, name) == ("cluster", "lstm"): time.sleep(60)
    if (scope, name) == ("grid", "gru"): os.abort()
    assert (scope, name) != ("block", "lstm"), "wrong numbers"
"""


@pytest.fixture
def trying(tmp_path, monkeypatch):
    """A session whose GPU tests are those of a text."""

    def run(text):
        (tmp_path / "test_a.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        monkeypatch.setattr(gpu, "gpu_tests", lambda: ["--rootdir", str(tmp_path), str(tmp_path / "test_a.py")])
        monkeypatch.setattr(gpu, "TEST_PATIENCE_S", 15)
        monkeypatch.setattr(gpu, "TEST_PROCESSES", 2)
        monkeypatch.setattr(cuda, "SCOPES", persistent.SCOPES)
        monkeypatch.setenv("GPU_RNN_CUDA_SCOPES", "")
        options = SimpleNamespace(dry=False, minutes=2, only=None, stage="first", filter=None)
        return gpu.GpuRun(options, tmp_path / "out", time.monotonic())

    return run


def test_scopes_that_hang_or_crash_are_left_out_by_name(trying, capsys):
    run = trying(SCOPES)
    run.try_scopes()
    assert cuda.SCOPES == ("block",)
    assert os.environ["GPU_RNN_CUDA_SCOPES"] == "block"
    outcomes = {name.partition("[")[2]: line["outcome"] for name, line in run.tests.outcomes().items()}
    assert outcomes == {
        "block-gru]": "passed", "block-lstm]": "failed", "cluster-gru]": "passed", "cluster-lstm]": "hung",
        "grid-gru]": "crashed", "grid-lstm]": "passed",
    }  # fmt: skip
    (note,) = run.facts["notes"]["smoke"]
    assert note == "cluster, grid: left out of the rest; block stay"
    summary = "\n".join(run.summary())
    assert "SIGABRT: Fatal Python error: Aborted" in summary
    assert note in summary
    run.pytest("tests", gpu.SMOKE, run.until)
    assert not run.facts["tests"], "each is tried once"


def test_scopes_that_pass_or_are_only_wrong_stay(trying):
    run = trying(SCOPES.replace('("cluster", "lstm")', "None").replace('("grid", "gru")', "None"))
    run.try_scopes()
    assert cuda.SCOPES == persistent.SCOPES
    assert "notes" not in run.facts
    assert run.facts["smoke"] == {"passed": 5, "failed": 1}


def test_why_tests_could_not_begin_is_in_the_summary(trying):
    run = trying(SCOPES)
    run.pytest("tests", "a word and and another", run.until)
    (note,) = run.facts["notes"]["tests"]
    assert note.startswith("exit status 4: ")
    assert note.endswith("(2 processes)")
    assert any(note in line for line in run.summary())


def test_the_smoke_test_names_the_scope_first():
    """`try_scopes` reads it from there."""
    assert getattr(test_gpu, gpu.SMOKE).pytestmark[0].args == ("scope", persistent.SCOPES)


def test_device_checks_load_what_nvrtc_compiled(monkeypatch):
    """CuPy takes it before it needs a driver, or for what a GPU makes of it."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(device_checks.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(cupy, "zeros", lambda n: None)
    with pytest.raises((cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError)):
        device_checks.Launcher(nvrtc.Cubin(b"no module"))


def test_a_line_that_was_cut_short_is_no_outcome(tmp_path):
    journal = worker.Journal(tmp_path / "j")
    journal.write(begin="x")
    with journal.path.open("a") as file:
        file.write('{"name": "x", "outc')
    assert journal.lines() == [{"begin": "x"}]
    assert not journal.outcomes()
