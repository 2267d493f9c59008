"""Renews docs/cells.md: equations from the definitions; table and figure from bench/results/cells/*.csv."""

import csv
import inspect
import re
import sys
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu_rnn import cells
from gpu_rnn.kernels import cells as definitions

DOCUMENT, FIGURE = ROOT / "docs" / "cells.md", ROOT / "docs" / "figures" / "cells.svg"
KINDS, MODES = ("native", "torchrecurrent", "compiled loop"), ("forward", "training")
REGION = re.compile(r"(<!-- cells:(\w+) -->\n).*?(<!-- /cells -->)", re.DOTALL)

Row = dict[str, str]
Size = tuple[str, ...]


def measured() -> dict[Size, dict[str, dict[str, Row]]]:
    """The newest measurements: by sizes T, B, H, then by cell, then by kind."""
    measurements: dict[Size, dict[str, dict[str, Row]]] = {}
    with max((ROOT / "bench" / "results" / "cells").glob("*.csv")).open() as file:
        for row in csv.DictReader(file):
            measurements.setdefault((row["T"], row["B"], row["H"]), {}).setdefault(row["cell"], {})[row["kind"]] = row
    return measurements


def factors(by_kind: dict[str, Row], kind: str) -> list[float]:
    """How many times as long as native, forward and training; nothing where there is no such measurement."""
    return [float(by_kind[kind][mode]) / float(by_kind["native"][mode]) for mode in MODES] if kind in by_kind else []


def table() -> str:
    measurements = measured()
    head, means = ["cell", "parameters", "states", "matmuls"], ["geometric mean", "", "", ""]
    for (T, B, H), by_cell in measurements.items():
        head += [f"T={T}, B={B}, H={H}: native, ms", *(f"{kind}, x" for kind in KINDS[1:])]
        columns = [zip(*filter(None, (factors(by_kind, kind) for by_kind in by_cell.values()))) for kind in KINDS[1:]]
        means += ["", *(" / ".join(f"**{geometric_mean(column):.1f}**" for column in pair) for pair in columns)]
    lines = [head, ["---", "---:", "---", *["---:"] * (len(head) - 3)]]
    first = next(iter(next(iter(measurements.values())).values()))["native"]
    for name in cells.__all__:
        cls = getattr(cells, name)
        cell = definitions.get(cls.cell_name)
        count = sum(parameter.numel() for parameter in cls(int(first["I"]), int(first["H"])).parameters())
        matmuls = "2" if cell.lowered else "1" if definitions.reads(cell)["h"] else "0"
        line = [f"[{name}](#{name.lower()})", f"{count:,}", ", ".join(cell.states), matmuls]
        for by_cell in measurements.values():
            line.append(" / ".join(by_cell[name]["native"][mode] for mode in MODES))
            line += [" / ".join(f"{factor:.1f}" for factor in factors(by_cell[name], kind)) for kind in KINDS[1:]]
        lines.append(line)
    dates = {
        row["date"] for by_cell in measurements.values() for by_kind in by_cell.values() for row in by_kind.values()
    }
    where = "Measured on {machine}, torch {torch}, {dates}; float32, I = H; parameters for H = {H}"
    where = where.format(dates=" and ".join(sorted(dates)), **first)
    rows = "".join(f"| {' | '.join(line)} |\n" for line in [*lines, means])
    return f"{where}. Forward / training, which is forward and backward.\n\n{rows}"


def gallery() -> str:
    sections = []
    for name in cells.__all__:
        title, equations, *notes = inspect.cleandoc(getattr(cells, name).__doc__).split("\n\n")
        prose = [" ".join(part.split()) for part in (title, *notes)]
        sections.append("\n\n".join([f"### {name}", prose[0], f"```text\n{equations}\n```", *prose[1:]]))
    return "\n\n".join(sections) + "\n"


def text() -> str:
    """The document as it should be."""
    parts = {"table": table, "gallery": gallery}
    return REGION.sub(lambda region: region[1] + parts[region[2]]() + region[3], DOCUMENT.read_text(encoding="utf-8"))


def draw() -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "gpu_rnn", "svg.fonttype": "none", "font.size": 8}
    figure = Figure(figsize=(8, 7), layout="constrained")
    (T, B, H), by_cell = next(iter(measured().items()))
    ranked = sorted(by_cell.items(), key=lambda item: float(item[1]["native"]["training"]))
    names = [name for name, _ in ranked]
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), MODES):
        xs = [float(row[mode]) for _, by_kind in ranked for row in by_kind.values()]
        for kind, marker in zip(KINDS, "oxs"):
            there = [(float(by_kind[kind][mode]), k) for k, (_, by_kind) in enumerate(ranked) if kind in by_kind]
            axes.plot(*zip(*there), marker, markersize=4, label=kind)
        axes.set(xscale="log", xlabel=f"{mode}, ms; T={T}, B={B}, I=H={H}", axisbelow=True)
        axes.set_yticks(range(len(names)), names)
        axes.minorticks_off()
        axes.set_xticks(ticks := [ms for ms in (1, 3, 10, 30, 100, 300) if min(xs) / 2 < ms < 2 * max(xs)], ticks)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURE, metadata={"Date": None, "Creator": "docs/cells.py"})


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
    draw()
