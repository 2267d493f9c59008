"""python -m bench [run | gpu | sass | report | compare | once | list]: see --help of each."""

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

from gpu_rnn.core.optional_imports import no_gpu

from . import floor, problems, results
from .problems import Case, Group
from .progress import Progress
from .summary import summary
from .worker import Worker

ROOT = Path(__file__).parents[1]
CASE_TIMEOUT_S = 240
GRACE_S = 30  # for the case that is under way when the minutes are over


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments or sys.argv[1:] or ["run"])
    try:
        return options.command(options)
    except BrokenPipeError:  # nothing reads on; Python would try again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # of sizes, names and files: a sentence is enough
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m bench", description="Microbenchmarks of gpu_rnn and its peers.")
    commands = root.add_subparsers(required=True)

    run = commands.add_parser("run", help="measure on this machine; without sizes, NumPy against torch.nn on the CPU")
    run.add_argument("--quick", action="store_true", help="less than a minute")
    run.add_argument("--minutes", type=float, help="start no case after so long (14; quick 0.8)")
    run.add_argument("--threads", type=int, nargs="+", help="a process for each number (1, and 2 where there are)")
    run.add_argument("--filter", help="only cases whose text has these words, as in 'lstm forward H=128'")
    run.add_argument("--out", type=Path, help="the CSV to append to (bench/results/MACHINE.csv)")
    run.add_argument(
        "--contender", nargs="+", help="beside torch.nn: " + ", ".join((*problems.EVERYBODY[1:], *problems.TOGETHER))
    )
    problem_options(run)
    run.set_defaults(command=run_command)

    gpu = commands.add_parser("gpu", help="everything on a GPU machine: what it is, checks, tests, benchmarks")
    gpu.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results (bench/results)")
    gpu.add_argument("--minutes", type=float, default=6, help="it ends by then, whatever happens (6)")
    gpu.add_argument("--only", choices=("plans", "tests", "bench", "sanitize", "profile"))
    gpu.add_argument("--stage", choices=("first", "rest"), default="rest", help="first: a look at every part (rest)")
    gpu.add_argument("--filter", help="only tests and cases whose text has these words")
    gpu.add_argument("--dry", action="store_true", help="walk through the whole plan on the CPU, keep no result")
    gpu.set_defaults(command=gpu_command)

    sass = commands.add_parser(
        "sass", help="what a time step of the persistent kernels executes, by machine code; no GPU"
    )
    sass.add_argument("--filter", help="only kernels whose text has these words, as in 'lstm H=512 backward'")
    what = sass.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="compare with the table, bench/sass.csv, instead of writing it"
    )
    what.add_argument("--code", action="store_true", help="print the instructions that a warp executes in a time step")
    sass.set_defaults(command=sass_command)

    report = commands.add_parser("report", help="tables for README.md and docs/benchmarks.md, plots, and an HTML page")
    report.add_argument("--results", type=Path, default=results.FOLDER, help="folder of CSV files (bench/results)")
    report.add_argument("--out", type=Path, default=ROOT / "bench/figures", help="folder (bench/figures)")
    report.add_argument("--document", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "docs/benchmarks.md"])
    report.add_argument(
        "--publish", type=Path, nargs="?", const=ROOT / "docs/figures", help="also copy the plots that they show there"
    )
    report.set_defaults(command=report_command)

    compare = commands.add_parser("compare", help="what changed beyond noise between two runs, commits or CSV files")
    compare.add_argument("a")
    compare.add_argument("b")
    compare.set_defaults(command=compare_command)

    once = commands.add_parser("once", help="run one case without timing it, for a sanitizer or a profiler")
    once.add_argument("--contender", nargs="+", default=[problems.NUMPY])
    once.add_argument("--calls", type=int, default=1)
    problem_options(once)
    once.set_defaults(command=once_command)

    known = commands.add_parser("list", help="the contenders and why they can't take part here, and the problems")
    known.set_defaults(command=list_command)
    return root


def problem_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--cell", nargs="+", help="lstm, gru, rnn_tanh, rnn_relu (lstm)")
    for letter, what in {"T": "instants", "B": "batch rows", "H": "hidden units", "L": "layers"}.items():
        command.add_argument(f"-{letter}", f"--{letter}", type=int, nargs="+", help=what)
    command.add_argument("-I", "--I", type=int, help="input size (H)")
    command.add_argument("--dtype", nargs="+", help="float32 and so on (float32)")
    command.add_argument("--mode", nargs="+", help=f"{', '.join(problems.MODES)} (forward training)")
    command.add_argument("--device", default="cpu")


def needed(device: str) -> None:
    if device == "cuda" and (reason := no_gpu()):
        raise ValueError(reason)


def asked_for(options: argparse.Namespace, contenders: list[str]) -> list[Group]:
    needed(options.device)
    return problems.custom(
        options.cell or ["lstm"], options.T or [256], options.B or [8], options.H or [128], options.I,
        options.dtype or ["float32"], options.mode or ["forward", "training"], options.device, contenders,
        options.L or [1],
    )  # fmt: skip


def run_command(options: argparse.Namespace) -> int:
    asked = ("cell", *"TBHLI", "dtype", "mode", "contender")
    if any(getattr(options, name) is not None for name in asked):
        default = [problems.NUMPY] if options.device == "cpu" else [problems.CUDA, problems.TRITON]
        groups = asked_for(options, options.contender or default)
    elif options.device == "cuda":
        needed(options.device)
        groups = problems.gpu()
    else:
        groups = problems.quick() if options.quick else problems.cpu()
    groups = problems.filtered(groups, options.filter)
    if not groups:
        raise ValueError(f"no case has the words {options.filter!r}")
    minutes, seconds = (0.8, 0.15) if options.quick else (14, 0.25)
    if options.minutes is not None:
        minutes = options.minutes
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes {minutes:g}: it takes some, and has an end")
    cores = len(os.sched_getaffinity(0))
    for count in options.threads or ():
        if not 1 <= count <= cores:
            raise ValueError(f"--threads {count}: this process may use {cores} cores")
    several = list(dict.fromkeys(options.threads or (1, min(2, cores))))
    threads = [None] if options.device == "cuda" else several
    from . import machine  # asks for the versions of everything: not before the arguments are right

    path = options.out or results.FOLDER / f"{machine.slug()}.csv"
    results.begin(path)
    return run(groups, threads, path, minutes, seconds)


def run(groups: list[Group], threads: list[int | None], path: Path, minutes: float, seconds: float) -> int:
    """Every case, short ones first, each with every number of threads. What was measured is kept, also on Ctrl-C."""
    when, until, left = results.now(), time.monotonic() + 60 * minutes, 0
    workers = {count: Worker(count) for count in threads}
    device = groups[0].cases[0].device
    rows: list[results.Row] = []
    interrupted, folder = False, tempfile.TemporaryDirectory()
    try:
        ceilings = {count: measured_ceilings(worker, device) for count, worker in workers.items()}
        plan = [
            (expected_s(case, len(group.contenders), seconds, ceilings[count]), group, case, count)
            for group in groups for case in group.cases for count in (threads[:1] if group.once else threads)
        ]  # fmt: skip
        plan.sort(key=lambda entry: entry[0])  # who stops early has most of it
        with Progress(sum(expected for expected, *_ in plan)) as progress:
            for expected, group, case, count in plan:
                if time.monotonic() + min(expected * progress.pace, CASE_TIMEOUT_S) > until + GRACE_S:
                    left += 1
                    continue
                progress.doing(str(case))
                before = len(rows)
                given = case, group.contenders, seconds, CASE_TIMEOUT_S, until + GRACE_S
                answers = None if group.once or len(threads) == 1 else folder.name
                for row in workers[count].measure(*given, answers):
                    row = results.complete(row, case, when, count, ceilings[count])
                    results.append(path, row)
                    rows.append(row)
                    if row["status"] not in ("ok", "absent"):
                        progress.say(f"{row['contender']}: {row['status']} at {case}: {row['note']}")
                progress.did(expected)
                left += len(rows) == before
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for worker in workers.values():
            worker.close()
        folder.cleanup()
    print("\n".join(summary(rows)))
    late = f"; {left} measurements left out, to end in {minutes:g} minutes" if left else ""
    print(f"\n{len(rows)} rows in {path.name}{late}")
    if interrupted:
        print("interrupted: what was measured is kept")
        return 130
    return 0


def measured_ceilings(worker: Worker, device: str) -> floor.Ceilings:
    scales = floor.HOPPER if device == "cuda" else floor.CPU
    return floor.Ceilings(**worker.ceilings(device), scales=scales)


def expected_s(case: Case, contenders: int, seconds: float, ceilings: floor.Ceilings) -> float:
    """How long a case takes, roughly: its rounds; and of a large one two or three calls of everybody, at two thirds of
    the rate of a large product, and the check's in float64, which takes twice as long."""
    call = 1.5 * case.flops / ceilings.flops.get(case.dtype, min(ceilings.flops.values()))
    calls = contenders * (2 if contenders * call > problems.LONG_S else 3)
    return 0.2 + seconds + call * (calls + 2)


def gpu_command(options: argparse.Namespace) -> int:
    from .gpu import visit

    return visit(options)


def sass_command(options: argparse.Namespace) -> int:
    from .sass import tell

    return tell(options.filter, check=options.check, code=options.code)


def report_command(options: argparse.Namespace) -> int:
    from .report import write

    for path in write(options.results, options.out, options.document, options.publish):
        print(path)
    return 0


def compare_command(options: argparse.Namespace) -> int:
    changes, common = results.compare(results.select(options.a), results.select(options.b))
    if not common:
        raise ValueError("the two have no measurement in common")
    for change in changes:
        print(change)
    print(f"{len(changes)} of {common} changed beyond noise")
    return 0


def once_command(options: argparse.Namespace) -> int:
    import torch

    from .contenders import contender
    from .data import Data

    for group in asked_for(options, options.contender):
        for case in group.cases:
            torch.set_grad_enabled(case.training)
            for name in problems.expanded(options.contender):
                run = contender(name).prepare(case, Data(case))
                for k in range(options.calls):
                    run(k)
                print(f"{name}: {case}")
    return 0


def list_command(options: argparse.Namespace) -> int:
    from .contenders import contender

    for name in problems.EVERYBODY:
        reasons = {contender(name).absent(Case("lstm", 8, 8, 64, 64, "float32", "forward", d)) for d in ("cpu", "cuda")}
        print(f"{name:26}{'takes part' if None in reasons else ', '.join(sorted(map(str, reasons)))}")
    for title, groups in (("run --quick", problems.quick()), ("run", problems.cpu()), ("gpu", problems.gpu())):
        print(f"\n{title}: {sum(len(group.cases) for group in groups)} cases")
        for group in groups:
            print(f"  {group.name:24}{len(group.cases):4} cases: {group.cases[0]}, ...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
