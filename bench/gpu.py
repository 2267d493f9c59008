"""A visit to a GPU machine: minutes, no network, nothing installed, nobody watching. `python3 -m bench gpu`.

What is it, how fast at best; do the instructions do what the host runtime assumes; do the kernels of each scope come to
their end (one that doesn't is left out of the rest); the benchmarks in order of importance; the GPU tests, fastest
first; on request the sanitizers and the profiler; a summary last. Every result is in a
file as soon as it is known. Whatever crashes or hangs runs in a process that is ended in time, and so does the visit.
Needs torch, NumPy, CuPy or Triton, and pytest.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from gpu_rnn.core.optional_imports import no_gpu

from . import floor, machine, problems, results, supervise
from .problems import Case
from .progress import Progress
from .summary import short, summary
from .supervise import Journal
from .worker import Worker

RESERVE_S = 10  # of the visit, for the summary
PLANS_S = 50  # at most, of the visit
SMOKE_S = 60  # at most, of the visit
SMOKE = "test_persistent_kernels"  # whose parameters name the scope
BENCH_SHARE = 0.6  # of the time that is left, when there are tests to come
MARK = "mark.gpu"
CASE_TIMEOUT_S = 60
TEST_PATIENCE_S, FEATURE_PATIENCE_S, TOOL_TIMEOUT_S = 60, 30, 150
COMPILE_S = 60  # at most, of the visit; what isn't compiled by then is at its first use
TEST_PROCESSES = 8
SUMMARY_LINES = 100
LOST = ("hung", "crashed")
BAD = ("failed", *LOST)
OUTCOMES = ("passed", *BAD, "skipped")


def visit(options: argparse.Namespace) -> int:
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes {options.minutes:g}: it takes some, and has an end")
    began = time.monotonic()
    reason = no_gpu()
    if reason and not options.dry:
        print(f"python -m bench gpu: {reason}")
        return 2
    with tempfile.TemporaryDirectory() as nowhere:
        watchdog = threading.Timer(began + 60 * options.minutes - time.monotonic(), give_up)
        watchdog.daemon = True
        watchdog.start()
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
        try:
            return Visit(options, Path(nowhere) if options.dry else options.out, began).go()
        finally:
            watchdog.cancel()
            supervise.end_all()
            signal.signal(signal.SIGTERM, before)


def give_up() -> None:
    """The last resort, at the end of the minutes: something hangs in this very process."""
    print("out of time: the rest is in the files", flush=True)
    supervise.end_all()
    os._exit(1)


class Visit:
    def __init__(self, options: argparse.Namespace, out: Path, began: float) -> None:
        self.options, self.out, self.run, self.began = options, out, results.now(), began
        self.worker = Worker(threads=1 if options.dry else None)
        self.ceilings: floor.Ceilings | None = None  # without them there is no floor, but there are times
        self.case_s = 0.02 if options.dry else 0.5
        self.until = self.began + 60 * options.minutes - min(RESERVE_S, 6 * options.minutes)
        name = "gpu-" + self.run.replace(":", "")
        self.csv = out / f"{machine.slug()}.csv"
        self.json = out / f"{name}.json"
        self.tests, self.features = Journal(out / f"{name}-tests.jsonl"), Journal(out / f"{name}-features.jsonl")
        self.found: dict[str, Any] = {"run": self.run, **machine.describe()}
        self.rows: list[results.Row] = []

    def go(self) -> int:
        only = self.options.only
        stages: dict[str, Callable[[], None]] = {"machine": self.describe}
        if only in (None, "bench"):
            stages["ceilings"] = self.measure_ceilings
        if only in (None, "bench", "plans"):
            stages["compiling"] = self.compile_kernels
        if only is None and self.options.stage == "first":
            stages["features"] = self.check_features
            stages["smoke"] = self.try_scopes
        if only in (None, "plans"):
            stages["plans"] = self.measure_plans
        if only in (None, "bench"):
            stages["benchmarks"] = self.run_benchmarks
        if only in (None, "tests"):
            stages["tests"] = self.run_tests
        if only in ("sanitize", "profile"):
            stages[only] = self.sanitize if only == "sanitize" else self.profile
        interrupted = False
        for title, stage in stages.items():
            self.say(f"== {title}")
            try:
                stage()
            except KeyboardInterrupt:
                interrupted = True
                break
            except Exception as error:  # a broken stage is no reason to lose the next
                self.note(title, f"{type(error).__name__}: {error}")
            self.save()
        self.say("== summary")
        print("\n".join(self.summary()[:SUMMARY_LINES]), flush=True)
        return 130 if interrupted else 0 if self.good(stages) else 1

    def good(self, stages: dict[str, Any]) -> bool:
        """Whether everything that was to be checked was, and passed. A benchmark can't fail the visit."""
        lines = [*self.features.outcomes().values(), *self.tests.outcomes().values()]
        incomplete = any(title in self.found.get("notes", {}) for title in stages if title != "benchmarks")
        return not incomplete and not any(line["outcome"] in BAD for line in lines)

    # ---- stages -----------------------------------------------------------------------------------------------------

    def describe(self) -> None:
        for name, value in machine.describe().items():
            self.say(f"{name:12} {value or '-'}")

    def measure_ceilings(self) -> None:
        device = "cpu" if self.options.dry else "cuda"
        measured = self.worker.ceilings(device)
        self.ceilings = floor.Ceilings(**measured, scales=floor.HOPPER)
        self.found["ceilings"] = measured
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in measured["flops"].items())
        self.say(f"copy {measured['bandwidth'] / 1e12:.3g} TB/s; matrix product, TFLOP/s: {rates}")

    def check_features(self) -> None:
        if self.options.dry:
            from .features import names

            self.say(f"would check on the device: {', '.join(names())}")
            return
        command = [sys.executable, "-m", "bench.features", str(self.features.path)]
        why = supervise.supervise(command, self.features, FEATURE_PATIENCE_S, self.until, cwd=machine.ROOT)
        self.tell("features", self.features.outcomes(), [why])

    def compile_kernels(self) -> None:
        """Those of the benchmarks and of the plans, on all cores, into CuPy's cache on the disk."""
        if self.options.dry:
            return
        from gpu_rnn.backends import cuda

        from . import kernels, plans

        units = dict.fromkeys(plans.units() if self.options.stage == "first" else ())
        for case, contenders in self.plan():
            units |= dict.fromkeys(kernels.units(case, contenders))
        texts, until = [cuda.text(unit) for unit in units], time.monotonic() + COMPILE_S
        pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
        jobs = [pool.submit(kernels.compile_text, text) for text in texts]
        try:
            for job in as_completed(jobs, timeout=until - time.monotonic()):
                job.result()
        except TimeoutError:
            self.note("compiling", f"{sum(not job.done() for job in jobs)} of {len(jobs)} modules not compiled in time")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.say(f"{len(jobs)} modules")

    def measure_plans(self) -> None:
        """In a process of its own, which goes on after the plan that ended it."""
        if self.options.dry or self.options.stage != "first":
            return
        from . import plans

        path = self.out / f"gpu-{self.run.replace(':', '')}-plans.jsonl"
        until = min(time.monotonic() + PLANS_S, self.until)
        for _ in range(4):
            left = until - time.monotonic()
            command = [sys.executable, "-m", "bench.plans", str(path), f"{left:.0f}"]
            with tempfile.TemporaryFile("w+") as said:
                process = supervise.start(command, cwd=machine.ROOT, stdout=said, stderr=said)
                try:
                    process.wait(left + 5)
                except subprocess.TimeoutExpired:
                    self.note("plans", supervise.OUT_OF_TIME)
                else:
                    if process.returncode:
                        self.note("plans", supervise.told(supervise.death(process), said))
                supervise.end(process)
            if process.returncode == 0 or time.monotonic() > until - 5:
                break
        for line in plans.table(path):
            self.say(line)

    def try_scopes(self) -> None:
        """Leave a scope whose kernels hang or crash out of all that follows, by name; wrong numbers are only told."""
        from gpu_rnn.backends import cuda

        if self.options.dry:
            return
        self.pytest("smoke", SMOKE, min(time.monotonic() + SMOKE_S, self.until), os.environ)
        lost = [line["name"] for line in self.tests.outcomes().values() if line["outcome"] in LOST]
        failed = [scope for scope in cuda.SCOPES if any(f"{SMOKE}[{scope}-" in name for name in lost)]
        if failed:
            cuda.SCOPES = tuple(scope for scope in cuda.SCOPES if scope not in failed)
            os.environ["GPU_RNN_CUDA_SCOPES"] = ",".join(cuda.SCOPES)  # of processes to come
            self.worker.close()
            self.note("smoke", f"{', '.join(failed)}: left out of the rest; {' and '.join(cuda.SCOPES) or 'none'} stay")

    def run_tests(self) -> None:
        words = [word for word in (self.options.filter or "").split() if word.isidentifier()]
        self.pytest("tests", " and ".join(words), self.until, os.environ | {"GPU_RNN_CUDA_UNPROVEN": "1"})
        if not self.tests.outcomes() and "tests" not in self.found.get("notes", {}) and not self.options.dry:
            self.note("tests", "no test has the mark gpu" + (" and these words" if self.options.filter else ""))

    def pytest(self, title: str, words: str, until: float, env: Mapping[str, str]) -> None:
        """Of the GPU tests those with these words that have no outcome yet.

        In several processes, since most of a test's time is its compiler's; their journals become one.
        """
        earlier = sorted({*results.FOLDER.glob("*-tests.jsonl"), *self.out.glob("*-tests.jsonl")} - {self.tests.path})
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "bench.ordered", "-qq", "--tb=short"]
        command += ["--continue-on-collection-errors", "-k", words, *gpu_tests()]  # a file may need what isn't here
        count = 1 if self.options.dry else TEST_PROCESSES

        def run(journal: Journal, share: int) -> str | None:
            told = {
                "BENCH_JOURNAL": str(journal.path),
                "BENCH_DONE": str(self.tests.path),
                "BENCH_SHARD": f"{share}/{count}",
                "BENCH_EARLIER": ":".join(map(str, earlier)),
            }
            fine = (0, 1, 5)  # all passed, some failed, none found
            return supervise.supervise(
                command, journal, TEST_PATIENCE_S, until, fine=fine, cwd=machine.ROOT, env={**env, **told}
            )

        with tempfile.TemporaryDirectory() as folder:
            journals = [Journal(Path(folder) / f"{n}.jsonl") for n in range(count)]
            with ThreadPoolExecutor(count) as pool:
                reasons = list(pool.map(run, journals, range(count)))
            lines = [line for journal in journals for line in journal.lines()]
        for line in lines:
            self.tests.write(**line)
        self.tell(title, {line["name"]: line for line in lines if "outcome" in line}, reasons)

    def tell(self, title: str, outcomes: dict[str, dict[str, Any]], reasons: Iterable[str | None]) -> None:
        """What came of checks, what failed, and why those without an outcome have none."""
        for reason, times in Counter(filter(None, reasons)).items():
            self.note(title, reason + f" ({times} processes)" * (times > 1))
        self.found[title] = Counter(line["outcome"] for line in outcomes.values())
        self.say(f"{title}: " + ", ".join(f"{n} {outcome}" for outcome, n in self.found[title].items()))
        for line in failures(outcomes):
            self.say(line)

    def run_benchmarks(self) -> None:
        plan = self.plan()
        done, share = 0, BENCH_SHARE if self.options.only is None else 1.0
        until = time.monotonic() + share * (self.until - time.monotonic())
        with Progress(len(plan)) as progress:
            for case, contenders in plan:
                if time.monotonic() > until - 5:
                    break
                progress.doing(str(case))
                told = []
                for row in self.worker.measure(case, contenders, self.case_s, CASE_TIMEOUT_S, until):
                    row = results.complete(row, case, self.run, self.worker.threads, self.ceilings)
                    results.append(self.csv, row)
                    self.rows.append(row)
                    told.append(short(row))
                done += 1
                progress.say(f"{case}: {'  '.join(told)}")
                progress.did(1)
        self.worker.close()
        if done < len(plan):
            self.note("benchmarks", f"{len(plan) - done} of {len(plan)} cases not reached in the time")

    def plan(self) -> list[tuple[Case, tuple[str, ...]]]:
        """What to measure; in a dry run one small case of each kind, without the compiled loop, that takes too long."""
        groups = problems.gpu_first() if self.options.stage == "first" else problems.gpu()
        groups = problems.filtered(groups, self.options.filter)
        if not groups:
            raise ValueError(f"no case has the words {self.options.filter!r}")
        if not self.options.dry:
            return [(case, group.contenders) for group in groups for case in group.cases]
        for group in groups:
            self.say(f"would measure {len(group.cases):3} cases of {group.name}: {group.cases[0]}, ...")
        small = {(case.small(), group.contenders) for group in groups for case in group.cases}
        return sorted((pair for pair in small if problems.COMPILED not in pair[1]), key=str)

    def sanitize(self) -> None:
        """memcheck and racecheck on shapes that are small, ragged, and of every scale that a small H can have."""
        sizes = ["-T", "3", "-B", "3", "-H", "40", "256", "--cell", "lstm", "gru", "rnn_tanh"]
        for tool in ("memcheck", "racecheck"):
            for contender in (problems.CUDA, problems.TRITON):
                for dtype in ("bfloat16", "float32"):
                    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
                    command += self.once(contender, [*sizes, "--dtype", dtype])
                    self.tool("sanitize", f"{tool}, {contender}, {dtype}", command)

    def profile(self) -> None:
        """Speed of light, occupancy and memory of the package's kernels, in a file."""
        words = (self.options.filter or "").split()
        dtype = next((word for word in words if word in problems.WIDTH), "bfloat16")
        cell = next((word for word in words if word in problems.cells.NAMES), "lstm")
        for contender in (problems.CUDA, problems.TRITON):
            command = ["ncu", "--clock-control", "none", "--launch-count", "2"]
            command += ["--kernel-name", "regex:forward|backward|step|grad"]
            for section in ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats"):
                command += ["--section", section]
            sizes = ["-T", "256", "-B", "16", "-H", "512", "--mode", "training", "--cell", cell, "--dtype", dtype]
            self.tool("profile", f"ncu, {contender}, {cell} {dtype}", command + self.once(contender, sizes))

    def once(self, contender: str, sizes: list[str]) -> list[str]:
        return [sys.executable, "-m", "bench", "once", "--device", "cuda", "--contender", contender, *sizes]

    def tool(self, stage: str, title: str, command: list[str]) -> None:
        """Run a tool over a case; what it says goes to a file, its verdict to the summary."""
        if self.options.dry:
            self.say("would run " + " ".join(command).replace(sys.executable, "python3"))
            return
        path = self.out / f"gpu-{self.run.replace(':', '')}-{stage}.txt"
        with path.open("a") as file:
            file.write(f"\n#### {title}\n")
            file.flush()
            try:
                process = supervise.start(command, cwd=machine.ROOT, stdout=file, stderr=file)
            except FileNotFoundError:
                self.note(stage, f"{command[0]} is not on this machine")
                return
            try:
                code = process.wait(max(min(TOOL_TIMEOUT_S, self.until - time.monotonic()), 0))
                verdict = "clean" if code == 0 else f"exit status {code}: see {path.name}"
            except supervise.subprocess.TimeoutExpired:
                verdict = "out of time"
            supervise.end(process)
        self.found.setdefault(stage, {})[title] = verdict
        if verdict != "clean":
            self.note(stage, f"{title}: {verdict}")
        self.say(f"{title}: {verdict}")

    # ---- telling ----------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def note(self, title: str, text: str) -> None:
        """Something the summary must not leave out."""
        self.found.setdefault("notes", {}).setdefault(title, []).append(text)
        self.say(f"{title}: {text}")

    def save(self) -> None:
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.found, indent=1) + "\n")

    def summary(self) -> list[str]:
        lines = [f"{self.found['gpu'] or self.found['machine']}, torch {self.found['torch']}, {self.found['commit']}"]
        for title, journal in (("features", self.features), ("tests", self.tests)):
            counts = Counter(line["outcome"] for line in journal.outcomes().values())
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o]))
                lines += failures(journal.outcomes())[:15]
        for title, notes in self.found.get("notes", {}).items():
            lines += [f"{title}: {note}" for note in notes[:6]]
        return lines + summary(self.rows)


def failures(outcomes: dict[str, dict[str, Any]]) -> list[str]:
    bad = [line for line in outcomes.values() if line["outcome"] in BAD]
    return [f"  {line['outcome'].upper()} {line['name']}: {both_ends(line['note'])}" for line in bad]


def both_ends(note: str) -> str:
    """The first of a long note says how a process ended, the last what an assertion said."""
    return note if len(note) <= 240 else f"{note[:80]} ... {note[-160:]}"


def gpu_tests() -> list[str]:
    return [str(path) for path in sorted(Path("tests").glob("test_*.py")) if MARK in path.read_text()]
