"""Results are data: rows of a CSV file that only ever grows, with the machine and the versions that they come from."""

import csv
import hashlib
import os
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from . import roofline
from .problems import KERNELS, NN, Case
from .worker import ROOT, Row, Worker

FOLDER = ROOT / "bench/results"
CASE = ("cell", "mode", "T", "B", "I", "H", "L", "dtype", "device")
FIELDS = (
    "run",  # when the run began, UTC; all its rows have it
    "implementation", *CASE,
    "threads",  # of every library; empty on a GPU
    "tf32",  # 1: float32 matmuls are rounded to TF32, as torch.nn does by default on a GPU
    "status",  # ok, or why there is no time: absent, wrong, failed, out of memory, crashed, timed out, left out
    "median_us", "p20_us", "p80_us", "rounds", "us_per_step",
    "ratio",  # to torch.nn in the same rounds; under 1 is faster
    "bound_us", "fraction_of_bound",  # the roofline bound; bound over median
    "peak_bytes",  # without inputs and weights
    "saved_bytes",  # that torch's autograd saves for the gradient, without inputs, weights and outputs
    "error",  # the largest against float64, relative to the largest value of that array
    "cudnn_algorithm",  # that PyTorch's rules predict for torch.nn on a GPU
    "ceiling_flops", "ceiling_bandwidth",  # measured at the start, per second
    "machine", "gpu", "driver", "python", "numpy", "torch", "triton", "cupy", "onnxruntime", "cudnn",
    "commit", "source",
    "plan",  # the kind of its kernels: block, cluster, grid, sequence or stepwise; back, where backward differs
    "note",
)  # fmt: skip
WRITER: dict[str, Any] = {"fieldnames": FIELDS, "restval": "", "lineterminator": "\n"}


# ---- where and with what --------------------------------------------------------------------------------------------


@cache
def describe() -> dict[str, str]:
    """The columns from machine to source."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = (re.findall(r"^model name\s*:\s*(.+)$", cpu, re.M) or [platform.machine()])[0]
    gpu, _, driver = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(", ")
    cudnn = ""
    if driver:
        import torch

        cudnn = str(torch.backends.cudnn.version() or "")
    return {
        "machine": f"{name}{' AVX-512' * (' avx512f' in cpu)}, {os.cpu_count()} cores",
        "gpu": gpu if driver else "", "driver": driver.splitlines()[0] if driver else "",
        "python": platform.python_version(),
        **{package: installed(package) for package in ("numpy", "torch", "triton", "cupy", "onnxruntime")},
        "cudnn": cudnn, "commit": commit(), "source": source(),
    }  # fmt: skip


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def installed(package: str) -> str:
    for distribution in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def commit() -> str:
    """The commit, with a + when the tree differs from it; "unknown" outside a repository."""
    changed = output("git", "status", "--porcelain", "--", "gpu_rnn", "kernels", "bench").splitlines()
    head = output("git", "rev-parse", "--short", "HEAD")
    return head + "+" * any(not row.endswith(".csv") for row in changed) if head else "unknown"


def source() -> str:
    """A hash of the package's files: what was measured, also where there is no repository."""
    digest = hashlib.sha1()
    for path in (path for folder in ("gpu_rnn", "kernels") for path in sorted((ROOT / folder).rglob("*"))):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def file_of_machine() -> str:
    name = describe()["gpu"] or describe()["machine"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".csv"


# ---- rows -----------------------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def complete(row: Row, case: Case, run: str, threads: int | None, ceilings: roofline.Ceilings | None) -> Row:
    """A row with everything that is known about where it comes from."""
    known: Row = {"run": run, **asdict(case), "threads": threads, **describe(), "tf32": 0}
    if case.device == "cuda":
        from gpu_rnn.backends import cudnn

        from .implementations import tf32

        known |= {"tf32": int(tf32(case)), "cudnn_algorithm": cudnn.algorithm(case.problem(tf32(case)))}
    if ceilings is not None:
        bound = roofline.bound_us(row["implementation"], case, ceilings)
        known |= {"bound_us": bound, "ceiling_bandwidth": ceilings.bandwidth}
        known |= {"ceiling_flops": ceilings.flops.get(case.dtype)}
        if bound is not None and "median_us" in row:
            known["fraction_of_bound"] = bound / row["median_us"]
    return known | row


def append(path: Path, row: Row) -> None:
    """Write one row, and be done with it before returning."""
    if unknown := set(row) - set(FIELDS):
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
    begin(path)
    with path.open("a", newline="") as file:
        rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        csv.DictWriter(file, **WRITER).writerow(rounded)


def begin(path: Path) -> None:
    """Make a file ready for rows: a file that was begun when there were fewer columns is given the others, empty; not a
    value changes. OSError or ValueError where that can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if path.exists() and path.stat().st_size:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if tuple(columns) == FIELDS:
                return
            if unknown := set(columns) - set(FIELDS):
                raise ValueError(f"{path} has columns {', '.join(sorted(unknown))}; it is never rewritten: use another")
            rows = list(reader)
    whole = path.with_suffix(".new")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, **WRITER)
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(path)


@dataclass
class Measurement:
    """A case to be measured, by whom, and about how long it takes."""

    case: Case
    names: tuple[str, ...]
    worker: Worker
    ceilings: roofline.Ceilings | None
    seconds: float = 1.0
    folder: str | None = None  # see `timing.measure`


def measure(
    plan: Iterable[Measurement], path: Path, run: str, round_s: float, timeout: float, until: float,
    on_case: Callable[[Measurement, list[Row]], None], rows: list[Row],
) -> int:  # fmt: skip
    """Append a row for each implementation of each case to the file and to `rows`, as soon as it is known.

    None of a case that wouldn't be done by `until` at the pace so far; returns how many cases that are.
    """
    began, done, left = time.monotonic(), 0.0, 0
    for one in plan:
        pace = (time.monotonic() - began) / done if done else 1.0
        if time.monotonic() + min(one.seconds * pace, timeout) > until:
            left += 1
            continue
        first = len(rows)
        for row in one.worker.measure(one.case, one.names, round_s, timeout, until, one.folder):
            row = complete(row, one.case, run, one.worker.threads, one.ceilings)
            append(path, row)
            rows.append(row)
        done += one.seconds
        left += len(rows) == first
        on_case(one, rows[first:])
    return left


# ---- in words -------------------------------------------------------------------------------------------------------


def where(row: Row) -> str:
    return " ".join(f"{letter}={row[letter]}" for letter in "TBH")


def short(row: Row) -> str:
    """A row in a few words."""
    name, status = row["implementation"], row["status"]
    if status != "ok":
        return f"{name} {status}" + (f" ({row['note'][:80]})" if status != "absent" else "")
    faster = f" {1 / row['ratio']:.2f}x" if row["ratio"] and name != NN else ""
    if name in KERNELS and (share := row.get("fraction_of_bound")):
        faster = f", {share:.0%} of the {'copy bandwidth' if name.endswith('step') else 'roofline bound'}"
    return f"{name} {row['us_per_step']:.3g} us/step{faster}"


def summary(rows: list[Row]) -> list[str]:
    """A line for every kind of case, one for every way to have no time, then kernels alone."""
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("ratio") and row["implementation"] != NN:
            kind = tuple(row[name] for name in ("implementation", "cell", "dtype", "mode", "threads"))
            kinds.setdefault(kind, []).append(row)
    lines = []
    for (*words, threads), group in kinds.items():
        worst, mean = max(group, key=lambda row: row["ratio"]), geometric_mean(row["ratio"] for row in group)
        against = f" against {worst['cudnn_algorithm']}" if worst.get("cudnn_algorithm") else ""
        lines.append(
            f"{' '.join(words)}{f', threads {threads}' if threads else ''}: {1 / mean:.2f} times as fast as "
            f"torch.nn, {len(group)} cases, worst {1 / worst['ratio']:.2f} at {where(worst)}{against}"
        )
    untimed = (row for row in rows if row["status"] not in ("ok", "absent"))
    without = Counter(f"{row['implementation']}: {row['status']}" for row in untimed)
    lines += [f"{what}, {count} cases" for what, count in without.items()]
    if absent := sorted({row["implementation"] for row in rows if row["status"] == "absent"}):
        lines.append(f"absent in some or all cases: {', '.join(absent)}")
    alone = [row for row in rows if row["implementation"] in KERNELS and row["status"] == "ok"]
    return lines + [f"{row['cell']} {row['mode']} {where(row)}: {short(row)}" for row in alone]
