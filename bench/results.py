"""Results are data: rows of a CSV file that only ever grows, and what changed between two runs."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import floor, machine
from .problems import Case

FOLDER = Path(__file__).parent / "results"
CASE = ("cell", "mode", "T", "B", "I", "H", "L", "dtype", "device")
FIELDS = (
    "run",  # when the run began, UTC; all its rows have it
    "contender", *CASE,
    "threads",  # of every library; empty on a GPU
    "tf32",  # 1: float32 products are rounded to TF32, as torch.nn does by default on a GPU
    "status",  # ok, or why there is no time: absent, wrong, failed, out of memory, crashed, timed out, left out
    "median_us", "p20_us", "p80_us", "rounds", "us_per_step",
    "ratio",  # to torch.nn in the same rounds; under 1 is faster
    "floor_us", "of_floor",  # floor.py; floor over median
    "peak_bytes",  # beside inputs and weights
    "saved_bytes",  # that torch's autograd keeps for the gradient, beside inputs, weights and outputs
    "error",  # the largest against float64, relative to the largest value of that array
    "cudnn_algorithm",  # that PyTorch's rules predict for torch.nn on a GPU
    "ceiling_flops", "ceiling_bandwidth",  # measured at the start, per second
    "machine", "gpu", "driver", "python", "numpy", "torch", "triton", "cupy", "onnxruntime", "cudnn",
    "commit", "source",
    "plan",  # which of its plans a backend took: block, cluster, grid, sequence or stepwise; back, where it differs
    "note",
)  # fmt: skip
NUMBERS = {
    "T", "B", "I", "H", "L", "threads", "tf32", "median_us", "p20_us", "p80_us", "rounds", "us_per_step", "ratio",
    "floor_us", "of_floor", "peak_bytes", "saved_bytes", "error", "ceiling_flops", "ceiling_bandwidth",
}  # fmt: skip
SUBJECT = ("contender", *CASE, "threads", "tf32", "machine", "gpu")  # what two rows must agree in to be compared
NOISE = 0.05  # a change under this is none, whatever the spread says
Row = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def complete(row: Row, case: Case, run: str, threads: int | None, ceilings: floor.Ceilings | None) -> Row:
    """A contender's row with everything that is known about where it comes from."""
    known = {"run": run, **case.asdict(), "threads": threads, **machine.describe()}
    known["tf32"] = int(machine.tf32(case))
    if case.device == "cuda":
        from gpu_rnn.backends import cudnn

        known["cudnn_algorithm"] = cudnn.algorithm(case.problem(bool(known["tf32"])))
    if ceilings is not None:
        least = floor.least_us(row["contender"], case, ceilings)
        known |= {"floor_us": least, "ceiling_bandwidth": ceilings.bandwidth}
        known["ceiling_flops"] = ceilings.flops.get(case.dtype)
        if least is not None and "median_us" in row:
            known["of_floor"] = least / row["median_us"]
    return known | row


def append(path: Path, row: Row) -> None:
    """Write one row, and be done with it before returning."""
    strange = set(row) - set(FIELDS)
    if strange:
        raise ValueError(f"no such columns: {', '.join(sorted(strange))}")
    begin(path)
    with path.open("a", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writerow({name: shown(value) for name, value in row.items()})


def begin(path: Path) -> None:
    """Make a file ready for rows; OSError or ValueError where that can't be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size == 0:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writeheader()
    elif header(path) != list(FIELDS):
        widen(path)


def widen(path: Path) -> None:
    """Give a file the columns that there were none of when it was begun, empty; not a value changes."""
    strange = set(header(path)) - set(FIELDS)
    if strange:
        raise ValueError(
            f"{path} has columns {', '.join(sorted(strange))}; another name, please: it is never rewritten"
        )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole = path.with_suffix(".new")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    whole.replace(path)


def header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(*paths: Path) -> list[Row]:
    """Rows in the order they were written; numbers as numbers, None where there is none, or was no such column yet."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                given = dict.fromkeys(FIELDS, "") | {"L": "1"} | {name: value for name, value in row.items() if value}
                rows.append({name: parsed(name, value) for name, value in given.items()})
    return rows


def parsed(name: str, value: str) -> Any:
    if name not in NUMBERS:
        return value
    if not value:
        return None
    return int(value) if value.lstrip("-").isdigit() else float(value)


def everything(folder: Path = FOLDER) -> list[Row]:
    return [row for row in read(*sorted(folder.glob("*.csv"))) if row.get("contender")]


def subject(row: Row) -> tuple:
    return tuple(row[name] for name in SUBJECT)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every subject."""
    return list({subject(row): row for row in sorted(rows, key=lambda row: row["run"])}.values())


# ---- what changed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    row: Row  # the newer one
    before: float  # microseconds
    after: float

    def __str__(self) -> str:
        row = self.row
        what = f"{row['contender']}: {row['cell']} {row['mode']} T={row['T']} B={row['B']} H={row['H']} {row['dtype']}"
        threads = f" {row['threads']} threads" if row["threads"] else ""
        verb = "faster" if self.after < self.before else "slower"
        times = max(self.after / self.before, self.before / self.after)
        return f"{what}{threads}: {self.before:.4g} -> {self.after:.4g} us, {times:.2f}x {verb}"


def select(name: str, folder: Path = FOLDER) -> list[Row]:
    """The rows of a CSV file, or of the run or commit whose name begins like this."""
    path = Path(name)
    if path.suffix == ".csv":
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        return read(path)
    rows = [row for row in everything(folder) if row["run"].startswith(name) or row["commit"].startswith(name)]
    if not rows:
        raise ValueError(f"no run or commit begins with {name!r} in {folder.name}/, and it is no .csv file")
    return rows


def compare(a: Iterable[Row], b: Iterable[Row]) -> tuple[list[Change], int]:
    """What changed beyond noise from a to b, the worst first, and how many subjects both have.

    Beyond noise: the ranges from the 20th to the 80th percentile don't meet, and the medians differ by over 5 %.
    """
    before = {subject(row): row for row in latest(a) if row["status"] == "ok"}
    after = {subject(row): row for row in latest(b) if row["status"] == "ok"}
    changes = []
    common = before.keys() & after.keys()
    for key in common:
        old, new = before[key], after[key]
        apart = old["p80_us"] < new["p20_us"] or new["p80_us"] < old["p20_us"]
        if apart and abs(new["median_us"] / old["median_us"] - 1) > NOISE:
            changes.append(Change(new, old["median_us"], new["median_us"]))
    return sorted(changes, key=lambda change: change.before / change.after), len(common)
