"""python -m bench [run | gpu | sass | report | compare | once | list]: see --help of each."""

import argparse
import math
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_rnn.core.optional_imports import no_gpu

from . import problems, results, roofline
from .problems import Case, Group
from .worker import ROOT, Worker

CASE_TIMEOUT_S = 240
GRACE_S = 30  # for the case that is measured when the minutes are over


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments or sys.argv[1:] or ["run"])
    try:
        if not 0 < getattr(options, "minutes", 1) < math.inf:
            raise ValueError(f"--minutes {options.minutes:g}: it takes some, and has an end")
        if getattr(options, "device", "cpu") == "cuda" and (reason := no_gpu()):
            raise ValueError(reason)
        command = options.command
        return (pkgutil.resolve_name(command) if isinstance(command, str) else command)(options)
    except BrokenPipeError:  # nothing reads on; Python would try again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # of sizes, names and files: a sentence is enough
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """argparse, because `gpu` runs where nothing can be installed."""
    root = argparse.ArgumentParser(prog="python -m bench", description="Microbenchmarks of gpu_rnn and its peers.")
    commands = root.add_subparsers(required=True)

    def add(name: str, function: Callable | str, **more: Any) -> argparse.ArgumentParser:
        """function: by its name where it is imported when it is called, since not all commands can be imported here."""
        command = commands.add_parser(name, **more)
        command.set_defaults(command=function)
        return command

    run = add("run", run_command, help="measure on this machine; without sizes, NumPy against torch.nn on the CPU")
    run.add_argument("--quick", action="store_true", help="less than a minute")
    run.add_argument("--minutes", type=float, default=argparse.SUPPRESS, help="start no case after so long (14; 0.8)")
    run.add_argument("--threads", type=int, nargs="+", help="a process for each number (1, and 2 where there are)")
    run.add_argument("--filter", help="only cases whose text has these words, as in 'lstm forward H=128'")
    run.add_argument("--out", type=Path, help="the CSV to append to (bench/results/MACHINE.csv)")
    known = ", ".join((*problems.ALL[1:], *problems.GROUPS))
    run.add_argument("--implementation", nargs="+", help=f"in addition to torch.nn: {known}")

    gpu = add("gpu", "bench.gpu:session", help="everything on a GPU machine: what it is, checks, tests, benchmarks")
    gpu.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results (bench/results)")
    gpu.add_argument("--minutes", type=float, default=6, help="it ends by then, whatever happens (6)")
    gpu.add_argument("--only", choices=("plans", "tests", "bench", "sanitize", "profile"))
    gpu.add_argument("--stage", choices=("first", "rest"), default="rest", help="first: a look at every part (rest)")
    gpu.add_argument("--filter", help="only tests and cases whose text has these words")
    gpu.add_argument("--dry", action="store_true", help="walk through the whole plan on the CPU, keep no result")

    sass = add("sass", "bench.sass:command", help="what a time step of the persistent kernels executes; without a GPU")
    sass.add_argument("--filter", help="only kernels whose text has these words, as in 'lstm H=512 backward'")
    what = sass.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with bench/sass.csv instead of writing it")
    what.add_argument("--code", action="store_true", help="print the instructions that a warp executes in a time step")

    report = add("report", report_command, help="tables for README.md and docs/benchmarks.md, plots, an HTML page")
    report.add_argument("--results", type=Path, default=results.FOLDER, help="folder of CSV files (bench/results)")
    report.add_argument("--out", type=Path, default=ROOT / "bench/figures", help="folder (bench/figures)")
    report.add_argument("--document", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "docs/benchmarks.md"])
    report.add_argument("--publish", type=Path, nargs="?", const=ROOT / "docs/figures", help="also copy plots there")

    compare = add("compare", compare_command, help="what changed beyond noise between two runs, commits or CSV files")
    compare.add_argument("a")
    compare.add_argument("b")

    once = add("once", once_command, help="run one case without timing it, for a sanitizer or a profiler")
    once.add_argument("--implementation", nargs="+", default=[problems.NUMPY])
    for command in (run, once):
        command.add_argument("--cell", nargs="+", help="lstm, gru, rnn_tanh, rnn_relu (lstm)")
        for letter, size in {"T": "time steps", "B": "batch size", "H": "hidden size", "L": "layers"}.items():
            command.add_argument(f"-{letter}", f"--{letter}", type=int, nargs="+", help=size)
        command.add_argument("-I", "--I", type=int, help="input size (H)")
        command.add_argument("--dtype", nargs="+", help="float32 and so on (float32)")
        command.add_argument("--mode", nargs="+", help=f"{', '.join(problems.MODES)} (forward training)")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    add("list", list_command, help="the implementations and why they can't run here, and the problems")
    return root


def requested(options: argparse.Namespace, names: list[str]) -> list[Group]:
    return problems.custom(
        options.cell or ["lstm"], options.T or [256], options.B or [8], options.H or [128], options.I,
        options.dtype or ["float32"], options.mode or ["forward", "training"], options.device, names, options.L or [1],
    )  # fmt: skip


def run_command(options: argparse.Namespace) -> int:
    cpu, quick, cores = options.device == "cpu", options.quick, len(os.sched_getaffinity(0))
    if any(getattr(options, name) is not None for name in ("cell", *"TBHLI", "dtype", "mode", "implementation")):
        default = [problems.NUMPY] if cpu else [problems.CUDA, problems.TRITON]
        groups = requested(options, options.implementation or default)
    else:
        groups = (problems.quick() if quick else problems.cpu()) if cpu else problems.gpu()
    groups = problems.filtered(groups, options.filter)
    for count in options.threads or ():
        if not 1 <= count <= cores:
            raise ValueError(f"--threads {count}: this process may use {cores} cores")
    threads = list(dict.fromkeys(options.threads or (1, min(2, cores)))) if cpu else [None]
    path = options.out or results.FOLDER / results.file_of_machine()
    results.begin(path)
    minutes = getattr(options, "minutes", 0.8 if quick else 14)
    return run(groups, threads, path, minutes, 0.15 if quick else 0.25)


def run(groups: list[Group], threads: list, path: Path, minutes: float, seconds: float) -> int:
    """Every case, short ones first, each with every number of threads. What was measured is kept, also on Ctrl-C."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    began, until = results.now(), time.monotonic() + 60 * minutes + GRACE_S
    workers = [Worker(count) for count in threads]
    rows: list[results.Row] = []
    interrupted, left, device = False, 0, groups[0].cases[0].device
    columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False)
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as bar:
        try:
            scales = roofline.HOPPER if device == "cuda" else roofline.CPU
            ceilings = {worker: roofline.Ceilings(**worker.ceilings(device), scales=scales) for worker in workers}
            plan = [
                results.Measurement(
                    case, group.implementations, worker, ceilings[worker],
                    expected_s(case, len(group.implementations), seconds, ceilings[worker]),
                    folder if len(workers) > 1 and not group.once else None,
                )
                for group in groups for case in group.cases for worker in (workers[:1] if group.once else workers)
            ]  # fmt: skip
            plan.sort(key=lambda one: one.seconds)  # a run that is ended early has most of it
            task = bar.add_task("", total=sum(one.seconds for one in plan))

            def on_case(one: results.Measurement, new: list[results.Row]) -> None:
                bar.update(task, advance=one.seconds, description=str(one.case))
                for row in new:
                    if row["status"] not in ("ok", "absent"):
                        bar.console.print(f"{one.case}: {results.short(row)}", markup=False, highlight=False)

            left = results.measure(plan, path, began, seconds, CASE_TIMEOUT_S, until, on_case, rows)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for worker in workers:
                worker.close()
    print("\n".join(results.summary(rows)))
    print(f"\n{len(rows)} rows in {path.name}" + (f"; {left} measurements left out, to end in time" if left else ""))
    if interrupted:
        print("interrupted: what was measured is kept")
    return 130 if interrupted else 0


def expected_s(case: Case, count: int, seconds: float, ceilings: roofline.Ceilings) -> float:
    """How long a case takes, roughly: its rounds; and of a large one two or three calls of each implementation, at two
    thirds of the rate of a large matmul, and the check's in float64, which takes twice as long."""
    call = 1.5 * case.flops / ceilings.flops.get(case.dtype, min(ceilings.flops.values()))
    return 0.2 + seconds + call * (count * (2 if count * call > 6 else 3) + 2)


def report_command(options: argparse.Namespace) -> int:
    from . import report

    for path in report.write(options.results, options.out, options.document, options.publish):
        print(path)
    return 0


def compare_command(options: argparse.Namespace) -> int:
    from . import report

    print("\n".join(report.compare(options.a, options.b)))
    return 0


def once_command(options: argparse.Namespace) -> int:
    import torch

    from .data import Data
    from .timing import IMPLEMENTATIONS

    for case in (case for group in requested(options, options.implementation) for case in group.cases):
        torch.set_grad_enabled(case.training)
        for name in problems.expanded(options.implementation):
            run = IMPLEMENTATIONS[name].prepare(case, Data(case))
            (run[0] if isinstance(run, tuple) else run)(0)
            print(f"{name}: {case}")
    return 0


def list_command(options: argparse.Namespace) -> int:
    from .timing import IMPLEMENTATIONS

    case = Case("lstm", 8, 8, 64, 64)
    for name in problems.ALL:
        reasons = {IMPLEMENTATIONS[name].skip_reason(replace(case, device=device)) for device in ("cpu", "cuda")}
        print(f"{name:26}{'takes part' if None in reasons else ', '.join(sorted(map(str, reasons)))}")
    for title, groups in (("run --quick", problems.quick()), ("run", problems.cpu()), ("gpu", problems.gpu())):
        print(f"\n{title}: {sum(len(group.cases) for group in groups)} cases")
        for group in groups:
            print(f"  {group.name:24}{len(group.cases):4} cases: {group.cases[0]}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
