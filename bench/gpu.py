"""A session on a GPU machine: minutes, no network, nothing installed, unattended. `python3 -m bench gpu`.

What the machine is, how fast at best; do the instructions do what the CUDA emulator assumes; do the kernels of each
scope come to their end (a scope that doesn't is left out of the rest); the benchmarks in order of importance; the GPU
tests, fastest first; on request the sanitizers and the profiler; a summary last. Every result is in a file as soon as
it is known. What may crash or hang runs in a process that is ended in time, and the session ends in time, too. Needs
torch, NumPy, CuPy or Triton, and pytest.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gpu_rnn.core.optional_imports import no_gpu

from . import problems, results, roofline, worker
from .problems import Case
from .worker import OUT_OF_TIME, ROOT, Journal, Worker, run_checks

RESERVE_S = 10  # of the session, for the summary
PLANS_S, SMOKE_S, COMPILE_S = 50, 60, 60  # of the session, at most; what isn't compiled then is at its first use
SMOKE = "test_persistent_kernels"  # whose parameters name the scope
BENCH_SHARE = 0.6  # of the time that is left, when there are tests to come
CASE_TIMEOUT_S, TOOL_TIMEOUT_S = 60, 150
TEST_PATIENCE_S, CHECK_PATIENCE_S = 60, 30
TEST_PROCESSES = 8
SUMMARY_LINES = 100
LOST = ("hung", "crashed")
BAD = ("failed", *LOST)


def session(options: argparse.Namespace) -> int:
    began, reason = time.monotonic(), no_gpu()
    if reason and not options.dry:
        print(f"python -m bench gpu: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as nowhere:
        watchdog = threading.Timer(60 * options.minutes, give_up)
        watchdog.daemon = True
        watchdog.start()
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
        try:
            return GpuRun(options, Path(nowhere) if options.dry else options.out, began).go()
        finally:
            watchdog.cancel()
            worker.end_all()
            signal.signal(signal.SIGTERM, before)


def give_up() -> None:
    """The last resort, at the end of the minutes: something hangs in this very process."""
    print("out of time: the rest is in the files", flush=True)
    worker.end_all()
    os._exit(1)


class GpuRun:
    def __init__(self, options: argparse.Namespace, out: Path, began: float) -> None:
        self.options, self.out, self.run, self.began, self.dry = options, out, results.now(), began, options.dry
        self.worker = Worker(threads=1 if options.dry else None)
        self.ceilings: roofline.Ceilings | None = None  # without them there is no bound, but there are times
        self.until = began + 60 * options.minutes - min(RESERVE_S, 6 * options.minutes)
        self.name = out / ("gpu-" + self.run.replace(":", ""))
        self.tests, self.checks = (Journal(Path(f"{self.name}-{kind}.jsonl")) for kind in ("tests", "features"))
        self.facts: dict[str, Any] = {"run": self.run, **results.describe()}
        self.rows: list[results.Row] = []

    def go(self) -> int:
        only, first = self.options.only, self.options.stage == "first"
        bench, plans = only in (None, "bench"), only in (None, "plans")
        stages: dict[str, tuple[bool, Callable[[], None]]] = {
            "machine": (True, self.tell_machine), "ceilings": (bench, self.measure_ceilings),
            "compiling": (bench or plans, self.compile_kernels),
            "features": (only is None and first, self.check_device), "smoke": (only is None and first, self.try_scopes),
            "plans": (plans, self.measure_plans), "benchmarks": (bench, self.run_benchmarks),
            "tests": (only in (None, "tests"), self.run_tests),
            "sanitize": (only == "sanitize", self.sanitize), "profile": (only == "profile", self.profile),
        }  # fmt: skip
        stages = {title: stage for title, stage in stages.items() if stage[0]}
        interrupted = False
        for title, (_, stage) in stages.items():
            self.say(f"== {title}")
            try:
                stage()
            except KeyboardInterrupt:
                interrupted = True
                break
            except Exception as error:  # a broken stage is no reason to lose the next
                self.note(title, f"{type(error).__name__}: {error}")
            self.out.mkdir(parents=True, exist_ok=True)
            Path(f"{self.name}.json").write_text(json.dumps(self.facts, indent=1) + "\n")
        self.say("== summary")
        print("\n".join(self.summary()[:SUMMARY_LINES]), flush=True)
        outcomes = [*self.checks.outcomes().values(), *self.tests.outcomes().values()]
        incomplete = (stages.keys() - {"benchmarks"}) & self.facts.get("notes", {}).keys()  # benchmarks can't fail it
        good = not incomplete and not any(line["outcome"] in BAD for line in outcomes)
        return 130 if interrupted else 0 if good else 1

    # ---- stages -----------------------------------------------------------------------------------------------------

    def tell_machine(self) -> None:
        for name, value in results.describe().items():
            self.say(f"{name:12} {value or '-'}")

    def measure_ceilings(self) -> None:
        measured = self.worker.ceilings("cpu" if self.dry else "cuda")
        self.ceilings = roofline.Ceilings(**measured, scales=roofline.HOPPER)
        self.facts["ceilings"] = measured
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in measured["flops"].items())
        self.say(f"copy {measured['bandwidth'] / 1e12:.3g} TB/s; matmul, TFLOP/s: {rates}")

    def compile_kernels(self) -> None:
        """Those of the benchmarks and of the plans, on all cores, into CuPy's cache on the disk."""
        if self.dry:
            return
        from gpu_rnn.backends import cuda

        from . import calibration, kernels

        units = dict.fromkeys(calibration.units() if self.options.stage == "first" else ())
        for case, names in self.plan():
            units |= dict.fromkeys(kernels.units(case, names))
        pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
        jobs = [pool.submit(kernels.compile_text, cuda.text(unit)) for unit in units]
        try:
            for job in as_completed(jobs, timeout=COMPILE_S):
                job.result()
        except TimeoutError:
            self.note("compiling", f"{sum(not job.done() for job in jobs)} of {len(jobs)} modules not compiled in time")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.say(f"{len(jobs)} modules")

    def check_device(self) -> None:
        from . import device_checks

        if self.dry:
            self.say(f"would check on the device: {', '.join(device_checks.names())}")
            return
        how: dict[str, Any] = {"journal": self.checks, "patience": CHECK_PATIENCE_S, "until": self.until}
        why = run_checks(Worker(), "bench.device_checks:run", **how)
        self.tell("features", self.checks.outcomes(), [why])

    def try_scopes(self) -> None:
        """Leave a scope whose kernels hang or crash out of all that follows; wrong numbers are only told."""
        from gpu_rnn.backends import cuda

        if self.dry:
            return
        self.pytest("smoke", SMOKE, min(time.monotonic() + SMOKE_S, self.until))
        lost = [line["name"] for line in self.tests.outcomes().values() if line["outcome"] in LOST]
        failed = [scope for scope in cuda.SCOPES if any(f"{SMOKE}[{scope}-" in name for name in lost)]
        if failed:
            cuda.SCOPES = tuple(scope for scope in cuda.SCOPES if scope not in failed)
            os.environ["GPU_RNN_CUDA_SCOPES"] = ",".join(cuda.SCOPES)  # of processes to come
            self.worker.close()
            self.note("smoke", f"{', '.join(failed)}: left out of the rest; {' and '.join(cuda.SCOPES) or 'none'} stay")

    def measure_plans(self) -> None:
        if self.dry or self.options.stage != "first":
            return
        from . import calibration

        path, until = Path(f"{self.name}-plans.jsonl"), min(time.monotonic() + PLANS_S, self.until)
        how: dict[str, Any] = {"journal": Journal(path), "patience": CHECK_PATIENCE_S, "until": until}
        if why := run_checks(Worker(), "bench.calibration:run", **how):
            self.note("plans", why)
        for line in calibration.table(path):
            self.say(line)

    def run_tests(self) -> None:
        words = " and ".join(word for word in (self.options.filter or "").split() if word.isidentifier())
        self.pytest("tests", words, self.until, GPU_RNN_CUDA_UNPROVEN="1")
        if not self.tests.outcomes() and "tests" not in self.facts.get("notes", {}) and not self.dry:
            self.note("tests", "no test has the mark gpu" + (" and these words" if self.options.filter else ""))

    def pytest(self, title: str, words: str, until: float, **env: str) -> None:
        """Of the GPU tests those with these words that have no outcome yet.

        In several processes, since most of a test's time is its compiler's; their journals become one.
        """
        earlier = sorted({*results.FOLDER.glob("*-tests.jsonl"), *self.out.glob("*-tests.jsonl")} - {self.tests.path})
        seconds = {k: v["seconds"] for path in earlier for k, v in Journal(path).outcomes().items()}
        arguments = ["-m", "gpu", "-qq", "--tb=short", "--continue-on-collection-errors", "-k", words, *gpu_tests()]
        arguments += ["-o", "filterwarnings="]  # what another version of torch or NumPy warns of fails no test here
        count = 1 if self.dry else TEST_PROCESSES

        def run(journal: Journal, share: int) -> str:
            how: dict[str, Any] = {"journal": journal, "patience": TEST_PATIENCE_S, "until": until, "done": self.tests}
            return run_checks(Worker(**env), "bench.pytest_journal:run", arguments, (share, count), seconds, **how)

        with tempfile.TemporaryDirectory() as folder:
            journals = [Journal(Path(folder) / f"{n}.jsonl") for n in range(count)]
            with ThreadPoolExecutor(count) as pool:
                reasons = list(pool.map(run, journals, range(count)))
            lines = [line for journal in journals for line in journal.lines()]
        for line in lines:
            self.tests.write(**line)
        self.tell(title, {line["name"]: line for line in lines if "outcome" in line}, reasons)

    def run_benchmarks(self) -> None:
        plan = [results.Measurement(case, names, self.worker, self.ceilings) for case, names in self.plan()]
        share, now = BENCH_SHARE if self.options.only is None else 1.0, time.monotonic()
        path, round_s = self.out / results.file_of_machine(), 0.02 if self.dry else 0.5
        until = now + share * (self.until - now)

        def on_case(one: results.Measurement, new: list[results.Row]) -> None:
            self.say(f"{one.case}: {'  '.join(map(results.short, new))}")

        left = results.measure(plan, path, self.run, round_s, CASE_TIMEOUT_S, until, on_case, self.rows)
        self.worker.close()
        if left:
            self.note("benchmarks", f"{left} of {len(plan)} cases not reached in the time")

    def plan(self) -> list[tuple[Case, tuple[str, ...]]]:
        """What to measure; in a dry run one small case of each kind, without the compiled loop, that takes too long."""
        groups = problems.gpu_first() if self.options.stage == "first" else problems.gpu()
        groups = problems.filtered(groups, self.options.filter)
        if not self.dry:
            return [(case, group.implementations) for group in groups for case in group.cases]
        for group in groups:
            self.say(f"would measure {len(group.cases):3} cases of {group.name}: {group.cases[0]}, ...")
        small = {(case.small(), group.implementations) for group in groups for case in group.cases}
        return sorted((pair for pair in small if problems.COMPILED not in pair[1]), key=str)

    def sanitize(self) -> None:
        """memcheck and racecheck on shapes that are small, ragged, and of every scale that a small H can have."""
        sizes = "-T 3 -B 3 -H 40 256 --cell lstm gru rnn_tanh --dtype "
        for tool in ("memcheck", "racecheck"):
            for dtype in ("bfloat16", "float32"):
                self.tool("sanitize", f"compute-sanitizer --tool {tool} --error-exitcode 9", sizes + dtype)

    def profile(self) -> None:
        """Speed of light, occupancy and memory of the package's kernels, in a file."""
        words = (self.options.filter or "").split()
        dtype = next((word for word in words if word in problems.WIDTH), "bfloat16")
        cell = next((word for word in words if word in problems.cells.NAMES), "lstm")
        sections = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats")
        command = "ncu --clock-control none --launch-count 2 --kernel-name regex:forward|backward|step|grad "
        command += " ".join(f"--section {section}" for section in sections)
        self.tool("profile", command, f"-T 256 -B 16 -H 512 --mode training --cell {cell} --dtype {dtype}")

    def tool(self, stage: str, tool: str, sizes: str) -> None:
        """Run a tool over cases of each GPU backend; what it says goes to a file, its outcome to the summary."""
        for name in (problems.CUDA, problems.TRITON):
            command = [*tool.split(), sys.executable, "-m", "bench", "once", "--device", "cuda", *sizes.split()]
            command += ["--implementation", name]
            text = " ".join(command).replace(sys.executable, "python3")
            if self.dry:
                self.say(f"would run {text}")
                continue
            with Path(f"{self.name}-{stage}.txt").open("a") as file:
                print(f"\n#### {text}", file=file, flush=True)
                try:
                    process = worker.start(command, cwd=ROOT, stdout=file, stderr=file)
                except FileNotFoundError:
                    return self.note(stage, f"{command[0]} is not on this machine")
                try:
                    code = process.wait(max(min(TOOL_TIMEOUT_S, self.until - time.monotonic()), 0))
                    outcome = "clean" if code == 0 else f"exit status {code}: see {Path(file.name).name}"
                except subprocess.TimeoutExpired:
                    outcome = OUT_OF_TIME
                worker.end(process)
            self.facts.setdefault(stage, {})[text] = outcome
            (self.say if outcome == "clean" else lambda told: self.note(stage, told))(f"{text}: {outcome}")

    # ---- telling ----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def note(self, title: str, text: str) -> None:
        """Something the summary must not leave out."""
        self.facts.setdefault("notes", {}).setdefault(title, []).append(text)
        self.say(f"{title}: {text}")

    def tell(self, title: str, outcomes: dict[str, dict[str, Any]], reasons: list[str]) -> None:
        """What came of checks, what failed, and why those without an outcome have none."""
        for reason, times in Counter(filter(None, reasons)).items():
            self.note(title, reason + f" ({times} processes)" * (times > 1))
        self.facts[title] = Counter(line["outcome"] for line in outcomes.values())
        for line in told(title, outcomes):
            self.say(line)

    def summary(self) -> list[str]:
        lines = [f"{self.facts['gpu'] or self.facts['machine']}, torch {self.facts['torch']}, {self.facts['commit']}"]
        lines += told("features", self.checks.outcomes())[:16] + told("tests", self.tests.outcomes())[:16]
        for title, notes in self.facts.get("notes", {}).items():
            lines += [f"{title}: {note}" for note in notes[:6]]
        return lines + results.summary(self.rows)


def told(title: str, outcomes: dict[str, dict[str, Any]]) -> list[str]:
    """How many passed, and what didn't; the first of a long note says how a process ended, the last why."""
    if not outcomes:
        return []
    counts = Counter(line["outcome"] for line in outcomes.values())
    lines = [f"{title}: " + ", ".join(f"{counts[each]} {each}" for each in ("passed", *BAD, "skipped") if counts[each])]
    for line in outcomes.values():
        if line["outcome"] in BAD:
            note = line["note"] if len(line["note"]) <= 240 else f"{line['note'][:80]} ... {line['note'][-160:]}"
            lines.append(f"  {line['outcome'].upper()} {line['name']}: {note}")
    return lines


def gpu_tests() -> list[str]:
    return [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
