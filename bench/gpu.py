"""A visit to a GPU machine: minutes, no network, nothing installed, nobody watching. `python3 -m bench gpu`.

What is it, how fast at best; do the instructions do what the host runtime assumes; the GPU tests, fastest first; the
benchmarks in order of importance; on request the sanitizers and the profiler; a summary last. Every result is in a
file as soon as it is known. Whatever crashes or hangs runs in a process that is ended in time, and so does the visit.
Needs torch, NumPy, CuPy or Triton, and pytest.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_rnn.compat import no_gpu

from . import floor, machine, problems, results, supervise
from .problems import Case
from .progress import Progress
from .summary import short, summary
from .supervise import Journal
from .worker import Worker

RESERVE_S = 10  # of the visit, for the summary
TESTS_SHARE = 0.5  # of the time, when there are benchmarks to come
CASE_TIMEOUT_S = 60
TEST_PATIENCE_S, FEATURE_PATIENCE_S, TOOL_TIMEOUT_S = 60, 30, 150
SUMMARY_LINES = 100
BAD = ("failed", "hung", "crashed")
OUTCOMES = ("passed", *BAD, "skipped")


def visit(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes:g}: it takes some")
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
        if only in (None, "tests"):
            stages |= {"features": self.check_features, "tests": self.run_tests}
        if only in (None, "bench"):
            stages["benchmarks"] = self.run_benchmarks
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
        self.supervised("features", command, self.features, FEATURE_PATIENCE_S, self.until)

    def run_tests(self) -> None:
        earlier = {*results.FOLDER.glob("*-tests.jsonl"), *self.out.glob("*-tests.jsonl")} - {self.tests.path}
        environment = os.environ | {
            "BENCH_JOURNAL": str(self.tests.path),
            "BENCH_EARLIER": ":".join(map(str, sorted(earlier))),
        }
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "bench.ordered", "-q", "--tb=short"]
        words = [word for word in (self.options.filter or "").split() if word.isidentifier()]
        command += ["--continue-on-collection-errors", "-k", " and ".join(words)]  # a file may need what isn't here
        share = 1.0 if self.options.only == "tests" else TESTS_SHARE
        until = time.monotonic() + share * (self.until - time.monotonic())
        fine = (0, 1, 5)  # all passed, some failed, none found
        self.supervised("tests", command, self.tests, TEST_PATIENCE_S, until, fine=fine, env=environment)
        if not self.tests.outcomes() and "tests" not in self.found.get("notes", {}) and not self.options.dry:
            self.note("tests", "no test has the mark gpu" + (" and these words" if self.options.filter else ""))

    def supervised(
        self, title: str, command: list[str], journal: Journal, patience: float, until: float, **options: Any
    ) -> None:
        """Run the checks of a journal and tell what failed; why, where they couldn't begin."""
        with tempfile.TemporaryFile("w+") as said:
            why = supervise.supervise(
                command, journal, patience, until, cwd=machine.ROOT, stdout=said, stderr=said, **options
            )
            if why:
                said.seek(0)
                last = [line.strip() for line in said.read()[-3000:].splitlines() if line.strip()][-3:]
                self.note(title, f"{why}: {' | '.join(last)}" if why != "out of time" else why)
        self.found[title] = Counter(line["outcome"] for line in journal.outcomes().values())
        self.say(f"{title}: " + ", ".join(f"{n} {outcome}" for outcome, n in self.found[title].items()))
        for line in failures(journal):
            self.say(line)

    def run_benchmarks(self) -> None:
        plan = self.plan()
        done = 0
        with Progress(len(plan)) as progress:
            for case, contenders in plan:
                if time.monotonic() > self.until - 5:
                    break
                progress.doing(str(case))
                told = []
                for row in self.worker.measure(case, contenders, self.case_s, CASE_TIMEOUT_S, self.until):
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
        groups = problems.filtered(problems.gpu(), self.options.filter)
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
                lines += failures(journal)[:15]
        for title, notes in self.found.get("notes", {}).items():
            lines += [f"{title}: {note}" for note in notes[:6]]
        return lines + summary(self.rows)


def failures(journal: Journal) -> list[str]:
    bad = [line for line in journal.outcomes().values() if line["outcome"] in BAD]
    return [f"  {line['outcome'].upper()} {line['name']}: {line['note'][-160:]}" for line in bad]
