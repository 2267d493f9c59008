"""The benchmarks: what can't be measured costs a row and not the run, and results are never lost or rewritten."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import floor, problems, results, supervise, timing
from bench.contenders import Torch
from bench.problems import NN, NUMPY, Case
from bench.worker import Worker
from gpu_rnn.compat import no_gpu

CASE = Case("lstm", 3, 2, 4, 5)
TRAINING = replace(CASE, mode="training")


# ---- problems and the floor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [problems.cpu, problems.quick, problems.gpu])
def test_every_planned_case_is_there_once_in_its_group(plan):
    for group in plan():
        assert len(set(group.cases)) == len(group.cases) > 0
        assert set(group.contenders) <= set(problems.EVERYBODY)


def test_the_gpu_begins_with_what_matters_most():
    first = problems.gpu()[0].cases[0]
    assert (first.dtype, first.cell, first.T, first.H) == ("bfloat16", "lstm", 1024, 512)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"T": 0}, "T = 0"), ({"B": -3}, "B = -3"), ({"H": 2.5}, "H = 2.5"), ({"I": True}, "I = True"),
        ({"H": 10**6}, "GiB"), ({"dtype": "int8"}, "int8"), ({"mode": "step"}, "T = 3"), ({"cell": "lstn"}, "lstn"),
    ],
)  # fmt: skip
def test_a_senseless_case_says_what_is_wrong_with_it(change, word):
    with pytest.raises(ValueError, match=word):
        replace(CASE, **change)


@pytest.mark.parametrize("arguments", ["-T 0", "-B -1", "-H 99999999", "--cell lstn -T 1", "-T 1 --contender me"])
def test_the_command_line_refuses_in_one_line(arguments, capsys):
    assert command.main(["run", *arguments.split()]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


GPU = floor.Ceilings({"bfloat16": 8e14, "float32": 4e14}, 4e12, floor.HOPPER)


def test_the_floor_grows_with_the_problem():
    small = Case("lstm", 64, 8, 128, 128, "bfloat16", device="cuda")
    for larger in ({"T": 128}, {"B": 4096}, {"H": 1024}, {"mode": "training"}):
        assert floor.floor_us(replace(small, **larger), GPU) > floor.floor_us(small, GPU) > 0
    assert floor.floor_us(small, GPU) > 64 * 0.6, "no step is shorter than its exchange"
    assert floor.floor_us(replace(small, dtype="float16"), GPU) is None, "its ceiling wasn't measured"


@pytest.mark.parametrize(("H", "name"), [(128, "SM"), (512, "cluster"), (1024, "grid"), (2048, "streamed")])
def test_weights_are_kept_at_the_smallest_scale_that_holds_them(H, name):
    assert floor.scale(Case("lstm", 8, 8, H, H, "bfloat16", device="cuda"), GPU).name == name


# ---- one case -------------------------------------------------------------------------------------------------------


class Broken(Torch):
    """Wrong, without memory, or raising, as told."""

    def __init__(self, how):
        self.how = how

    def prepare(self, case, data):
        run = super().prepare(case, data)

        def broken(k):
            if self.how == "memory":
                raise MemoryError("no more")
            if self.how == "error":
                raise RuntimeError("what a pity")
            y, *rest = run(k)
            return (y + float("nan") if self.how == "nan" else y * 1.01, *rest)

        return broken


@pytest.mark.parametrize("case", [CASE, TRAINING], ids=str)
def test_who_is_wrong_or_breaks_has_a_row_without_a_time(case, monkeypatch):
    real, told = timing.contender, []
    monkeypatch.setattr(timing, "contender", lambda name: real(name) if name in (NN, NUMPY) else Broken(name))
    names = [NN, NUMPY, "off", "nan", "memory", "error"]
    enabled = torch.is_grad_enabled()
    try:
        timing.measure(case, names, 0.01, told.append)
    finally:
        torch.set_grad_enabled(enabled)
    rows = {message["row"]["contender"]: message["row"] for message in told if "row" in message}
    assert {name: row["status"] for name, row in rows.items()} == {
        NN: "ok", NUMPY: "ok", "off": "wrong", "nan": "wrong", "memory": "out of memory", "error": "failed",
    }  # fmt: skip
    assert "what a pity" in rows["error"]["note"]
    assert "y is off by" in rows["off"]["note"]
    assert rows[NN]["ratio"] == 1
    for name in (NN, NUMPY):
        assert 0 < rows[name]["p20_us"] <= rows[name]["median_us"] <= rows[name]["p80_us"]
    assert not any("median_us" in row for row in rows.values() if row["status"] != "ok")


PROCESS = """
import json, os, sys, time
def emit(**message): print(json.dumps(message), flush=True)
for line in sys.stdin:
    emit(doing="oracle")
    for name in json.loads(line)["contenders"]:
        emit(doing=name)
        if name == "crash": sys.exit("a last word")
        if name == "hang": time.sleep(60)
        emit(row={"contender": name, "status": "ok", "process": os.getpid()})
    emit(done=True)
"""


def test_a_crash_or_a_hang_costs_one_row():
    worker = Worker(command=[sys.executable, "-c", PROCESS])
    for attempt in range(4):
        rows = {row["contender"]: row for row in worker.measure(CASE, ("crash", "a", "hang", "b"), 0.1, timeout=1)}
        statuses = [rows[name]["status"] for name in (NN, "crash", "a", "hang", "b")]
        if attempt < 3:
            assert statuses == ["ok", "crashed", "ok", "timed out", "ok"]
            assert rows["crash"]["note"] == "exit status 1: a last word"
        else:
            assert statuses == ["ok", "left out", "ok", "left out", "ok"], "three times are enough"
    worker.close()
    assert not supervise.ALIVE


CHECKS = """
import os, sys, time
from pathlib import Path
from bench.supervise import Journal
journal = Journal(Path(sys.argv[1]))
for name in "abcd":
    if name in journal.outcomes(): continue
    journal.write(begin=name)
    if name == "b": time.sleep(60)
    if name == "c": os.abort()
    journal.write(name=name, outcome="passed", seconds=0, note="")
"""


def test_checks_go_on_after_one_that_hangs_or_crashes(tmp_path):
    journal = supervise.Journal(tmp_path / "journal.jsonl")
    given = [sys.executable, "-c", CHECKS, str(journal.path)]
    assert supervise.supervise(given, journal, patience=1.5, until=time.monotonic() + 60) is None
    found = {name: (line["outcome"], line["note"]) for name, line in journal.outcomes().items()}
    assert found.pop("b") == ("hung", "nothing happened for 2 s")
    assert found == {"a": ("passed", ""), "c": ("crashed", "SIGABRT"), "d": ("passed", "")}
    hanging = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert supervise.supervise(hanging, journal, 60, until=time.monotonic() + 0.3) == "out of time"


# ---- results --------------------------------------------------------------------------------------------------------


def row(contender=NUMPY, case=CASE, us=100.0, ratio=0.5, **more):
    measured = {
        "contender": contender, "status": "ok", "median_us": us, "p20_us": 0.98 * us, "p80_us": 1.02 * us,
        "us_per_step": us / case.T, "ratio": ratio, "rounds": 5, "peak_bytes": 1 << 20, **more,
    }  # fmt: skip
    return results.complete(
        measured, case, "2026-01-01T00:00:00Z", 1, floor.Ceilings({"float32": 1e11}, 1e10, floor.CPU)
    )


def test_results_only_grow(tmp_path):
    path = tmp_path / "new" / "here.csv"
    for us in (100.0, 1 / 3):
        results.append(path, row(us=us))
    first, second = results.read(path)
    assert (first["median_us"], second["median_us"]) == (100, 0.333333)
    assert (first["T"], first["dtype"], first["contender"], first["driver"]) == (3, "float32", NUMPY, "")
    assert first["of_floor"] == pytest.approx(first["floor_us"] / 100, rel=1e-4)
    before = path.read_text()
    with pytest.raises(ValueError, match="colour"):
        results.append(path, row(colour="red"))
    path.write_text(before.replace("contender", "who", 1))
    with pytest.raises(ValueError, match="never rewritten"):
        results.append(path, row())


def test_compare_tells_what_changed_beyond_noise(tmp_path, capsys):
    names = {"a": (100.0, 100.0, 100.0), "b": (200.0, 103.0, 50.0)}
    for name, (slower, noisy, faster) in names.items():
        for H, us in ((5, slower), (6, noisy), (7, faster)):
            results.append(tmp_path / f"{name}.csv", row(case=replace(CASE, H=H), us=us))
    assert command.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 0
    slower, faster, count = capsys.readouterr().out.splitlines()
    assert "H=5" in slower
    assert "100 -> 200 us, 2.00x slower" in slower
    assert "2.00x faster" in faster
    assert count == "2 of 3 changed beyond noise"
    assert command.main(["compare", str(tmp_path / "a.csv"), "no such run"]) == 2


def test_a_run_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.csv"
    sizes = ["-T", "4", "-B", "2", "-H", "8", "--mode", "forward", "--cell", "lstm", "gru", "rnn_tanh"]
    contenders = ["--contender", NUMPY, problems.ONNX, problems.EAGER, problems.LAYER]
    assert command.main(["run", *sizes, *contenders, "--threads", "1", "--out", str(path)]) == 0
    rows = results.read(path)
    assert {row["status"] for row in rows} <= {"ok", "absent"}, [row["note"] for row in rows]
    assert len(rows) == 3 * 5
    for one in rows:
        if one["status"] == "ok":
            assert one["error"] < 1e-5
            assert one["us_per_step"] == pytest.approx(one["median_us"] / 4, rel=1e-4)
    assert "of torch.nn's time" in capsys.readouterr().out


# ---- reports --------------------------------------------------------------------------------------------------------


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for H in (8, 16):
        for case in (replace(CASE, H=H), replace(TRAINING, H=H), replace(CASE, H=H, T=9)):
            for name, ratio in ((NN, 1.0), (NUMPY, 0.5)):
                results.append(tmp_path / "results" / "x.csv", row(name, case, us=H * 10.0, ratio=ratio))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nb\n<!-- bench:maps -->\n<!-- /bench -->\nc\n")
    given = ["report", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"), "--readme", str(readme)]
    assert command.main(given) == 0
    assert str(readme) in capsys.readouterr().out
    text = readme.read_text()
    assert "| lstm | 0.50 (0.5) | 0.50 (0.5) |" in text
    assert "old" not in text
    assert "](out/" in text
    page = (tmp_path / "out" / "benchmarks.html").read_text()
    assert "<svg" in page
    assert "src=" not in page, "it needs nothing else"
    command.main(given)
    assert text == readme.read_text(), "the same results, the same report"
    readme.write_text("<!-- bench:typo -->\n<!-- /bench -->\n")
    assert command.main(given) == 2
    assert "bench:typo" in capsys.readouterr().err


# ---- the visit to a GPU machine -------------------------------------------------------------------------------------


@pytest.mark.skipif(no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("python -m bench gpu: no NVIDIA GPU: ")
    assert not list(tmp_path.iterdir())
    assert command.main(["gpu", "--minutes", "0"]) == 2


def test_the_dry_run_walks_the_whole_plan(tmp_path, capsys):
    assert command.main(["gpu", "--dry", "--out", str(tmp_path), "--minutes", "3"]) == 0
    said = capsys.readouterr().out
    for stage in ("machine", "ceilings", "features", "tests", "benchmarks", "summary"):
        assert f"== {stage}" in said
    for group in problems.gpu():
        assert f"of {group.name}: {group.cases[0]}" in said
    assert len(said[said.index("== summary") :].splitlines()) <= 101
    assert not list(tmp_path.iterdir()), "it keeps nothing"
    for only, word in (("sanitize", "compute-sanitizer --tool racecheck"), ("profile", "ncu --clock-control none")):
        command.main(["gpu", "--dry", "--only", only])
        assert word in capsys.readouterr().out


def test_a_lost_process_is_told_by_its_journal(tmp_path):
    journal = supervise.Journal(tmp_path / "j")
    journal.write(begin="x")
    with journal.path.open("a") as file:
        file.write('{"name": "x", "outc')  # cut short while it was written
    assert journal.open() == "x"
    assert json.loads(journal.path.read_text().splitlines()[0]) == {"begin": "x"}
