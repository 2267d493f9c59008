"""What rows add up to: the ratio to torch.nn over many cases, as text and for the tables."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .problems import KERNELS, NN

Row = dict[str, Any]
KIND = ("contender", "cell", "dtype", "mode", "threads")


@dataclass(frozen=True)
class Ratio:
    """Time over torch.nn's, of several cases; as text how many times as fast, and in brackets the worst case."""

    mean: float  # geometric
    worst: Row
    cases: int

    def __str__(self) -> str:
        return f"{1 / self.mean:.2f} ({1 / self.worst['ratio']:.2f})"


def ratio(rows: Iterable[Row]) -> Ratio | None:
    """Over the rows that have a ratio; None if none has."""
    rows = [row for row in rows if row["status"] == "ok" and row.get("ratio")]
    if not rows:
        return None
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
    return Ratio(mean, max(rows, key=lambda row: row["ratio"]), len(rows))


def summary(rows: list[Row]) -> list[str]:
    """A line for every kind of case, one for every way to have no time, then kernels alone."""
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["contender"] != NN:
            kinds.setdefault(tuple(row.get(name) for name in KIND), []).append(row)
    lines = []
    for (*words, threads), group in kinds.items():
        found = ratio(group)
        if found is not None:
            algorithm = found.worst.get("cudnn_algorithm")
            lines.append(
                f"{' '.join(words)}{f', threads {threads}' if threads else ''}: {1 / found.mean:.2f} times as fast as "
                f"torch.nn, {found.cases} cases, worst {1 / found.worst['ratio']:.2f} at {where(found.worst)}"
                + (f" against {algorithm}" if algorithm else "")
            )
    without = Counter(f"{row['contender']}: {row['status']}" for row in rows if row["status"] not in ("ok", "absent"))
    absent = sorted({row["contender"] for row in rows if row["status"] == "absent"})
    lines += [f"{what}, {count} cases" for what, count in without.items()]
    lines += [f"absent in some or all cases: {', '.join(absent)}"] if absent else []
    alone = [row for row in rows if row["contender"] in KERNELS and row["status"] == "ok"]
    return lines + [f"{row['cell']} {row['mode']} {where(row)}: {short(row)}" for row in alone]


def where(row: Row) -> str:
    return " ".join(f"{letter}={row[letter]}" for letter in "TBH")


def short(row: Row) -> str:
    """A row in a few words."""
    name, status = row["contender"], row["status"]
    if status != "ok":
        return f"{name} {status}" + (f" ({row['note'][:80]})" if status != "absent" else "")
    faster = f" {1 / row['ratio']:.2f}x" if row["ratio"] and name != NN else ""
    if name in KERNELS and row.get("of_floor"):
        faster = f", {row['of_floor']:.0%} of " + ("the copy bandwidth" if name.endswith("step") else "its floor")
    return f"{name} {row['us_per_step']:.3g} us/step{faster}"
