"""The plots, as SVG that is the same for the same results: speed-up over H x B; cost over T, B, H and layers; memory.

Needs matplotlib. A panel for every cell and mode; a figure for every machine, number of threads, dtype and, for the
maps, contender of ours. What wasn't measured isn't drawn. Where a backend hands over from one of its plans to the next
there is a vertical line with their names.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .problems import CUDA, FEATURES, KERNELS, LAYER, NN, NUMPY, PRODUCTS, TRITON

matplotlib.use("agg")
matplotlib.rcParams |= {"svg.hashsalt": "gpu_rnn", "svg.fonttype": "none", "font.size": 9}
from matplotlib import pyplot

Row = dict[str, Any]
OURS = (CUDA, TRITON, NUMPY)
MODES = {"forward": "forward", "training": "forward + backward"}
SCALED = (*OURS, LAYER)  # whose cost is drawn over sizes
LEAST_SIZES, LEAST_POINTS = 4, 3  # fewer make no figure, and no curve in one
CREATOR = "python -m bench report"
PLACE = ("gpu", "machine", "threads", "dtype")


def draw(rows: list[Row], out: Path) -> list[Path]:
    """All the figures there are measurements for; their paths."""
    parts = {*FEATURES, *KERNELS, PRODUCTS}
    rows = [row for row in rows if row["status"] == "ok" and row["mode"] in MODES and row["contender"] not in parts]
    paths = []
    for place in sorted({tuple(row[name] for name in PLACE) for row in rows}, key=str):
        here = [row for row in rows if tuple(row[name] for name in PLACE) == place]
        gpu, machine, threads, dtype = place
        title = f"{gpu or machine}, {dtype}" + (f", threads: {threads}" if threads else "")
        figures: dict[str, Any] = {
            f"speedup-{name}": maps(here, name, title) for name in OURS if any(row["contender"] == name for row in here)
        }
        for name, letter in {"steps": "H", "time": "T", "batch": "B", "layers": "L"}.items():
            figures[name] = curves(here, letter, us_per_step, "us per step", title)
        figures["memory"] = curves(here, "H", mebibytes, "peak MiB without inputs", title)
        for name, figure in figures.items():
            if figure is not None:
                path = out / f"{slug(title)}-{slug(name)}.svg"
                figure.savefig(path, metadata={"Date": None, "Creator": CREATOR})
                pyplot.close(figure)
                paths.append(path)
    return paths


def tidy(out: Path, made: list[Path]) -> None:
    """Remove figures of an earlier report."""
    for path in set(out.glob("*.svg")) - set(made):
        if CREATOR in path.read_text():
            path.unlink()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def us_per_step(row: Row) -> float:
    return row["us_per_step"]


def mebibytes(row: Row) -> float | None:
    return row["peak_bytes"] / 2**20 if row["peak_bytes"] else None


def usual(rows: list[Row], *letters: str) -> list[Row]:
    """Only the rows with the most frequent values of these letters, so that a plot compares like with like."""
    if not rows:
        return []
    most, _ = Counter(tuple(row[letter] for letter in letters) for row in rows).most_common(1)[0]
    return [row for row in rows if tuple(row[letter] for letter in letters) == most]


def panels(rows: list[Row], title: str, at: list[Row] | None = None) -> tuple[Any, dict[tuple[str, str], Any]]:
    """A figure with a row of panels for each cell and a column for each mode."""
    cells = sorted({row["cell"] for row in rows}, key=("lstm", "gru", "rnn_tanh", "rnn_relu").index)
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    size = (4.6 * len(modes), 2.9 * len(cells) + 0.4)
    figure, axes = pyplot.subplots(len(cells), len(modes), figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title)
    found = {(cell, mode): axes[i, j] for i, cell in enumerate(cells) for j, mode in enumerate(modes)}
    for (cell, mode), axis in found.items():
        axis.set_title(f"{cell} {MODES[mode]}")
    return figure, found


def maps(rows: list[Row], contender: str, title: str) -> Any:
    """Times as fast as torch.nn, over H and B, at the usual T."""
    rows = usual([row for row in rows if row["contender"] == contender and row["ratio"]], "T", "L")
    if not rows:
        return None
    figure, axes = panels(rows, f"{contender}: times as fast as torch.nn\n{title}, T = {rows[0]['T']}")
    for (cell, mode), axis in axes.items():
        found = {(row["B"], row["H"]): 1 / row["ratio"] for row in rows if (row["cell"], row["mode"]) == (cell, mode)}
        Bs, Hs = sorted({B for B, _ in found}), sorted({H for _, H in found})
        grid = np.array([[found.get((B, H), np.nan) for H in Hs] for B in Bs])
        limit = np.log2(8)  # eight times as fast or as slow has the strongest colour
        axis.imshow(np.log2(grid), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if abs(np.log2(value)) > 0.7 * limit else "black"
                axis.text(j, i, f"{value:.2g}" if value < 10 else f"{value:.0f}", ha="center", va="center", color=color)
        axis.set(xticks=range(len(Hs)), xticklabels=Hs, yticks=range(len(Bs)), yticklabels=Bs, xlabel="H", ylabel="B")
    return figure


def curves(rows: list[Row], letter: str, value: Callable[[Row], float | None], what: str, title: str) -> Any:
    """`value` of every contender over one letter, the others where it has most sizes; times with the floor."""
    others = [other for other in "TBHL" if other != letter]
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["contender"] in SCALED and value(row) and row["I"] == row["H"]:
            lines.setdefault(tuple(row[other] for other in others), []).append(row)
    sizes, chosen = max(lines.items(), key=lambda line: len({row[letter] for row in line[1]}), default=((), []))
    if len({row[letter] for row in chosen}) < LEAST_SIZES:
        return None
    at = dict(zip(others, sizes))
    rows = [
        row for row in rows
        if row["contender"] in (NN, *SCALED) and value(row) and row["I"] == row["H"]
        and all(row[o] == size for o, size in at.items())
    ]  # fmt: skip
    points = Counter((row["cell"], row["mode"], row["contender"]) for row in rows)
    rows = [row for row in rows if points[row["cell"], row["mode"], row["contender"]] >= LEAST_POINTS]
    if not rows:
        return None
    where = ", ".join(f"{other} = {size}" for other, size in at.items())
    figure, axes = panels(rows, f"{what} over {letter}\n{title}, {where}")
    for (cell, mode), axis in axes.items():
        here = [row for row in rows if (row["cell"], row["mode"]) == (cell, mode)]
        for name in sorted({row["contender"] for row in here}, key=(NN, *SCALED).__contains__, reverse=True):
            line = sorted((row for row in here if row["contender"] == name), key=lambda row: row[letter])
            (drawn,) = axis.plot(
                [row[letter] for row in line], [value(row) for row in line], marker="o", markersize=3, label=name
            )
            if value is us_per_step:
                hand_over(axis, line, letter, drawn.get_color())
        if value is us_per_step:
            floor = sorted({(row[letter], row["floor_us"] / row["T"]) for row in here if row["floor_us"]})
            if floor:
                axis.plot(*zip(*floor), color="gray", linestyle="--", label="roofline bound")
        axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=what)
        ticks = sorted({row[letter] for row in here})
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    return figure


def hand_over(axis: Any, line: list[Row], letter: str, color: str) -> None:
    """Between two sizes that run by different plans, a line with their names."""
    for before, after in pairwise(line):
        if before["plan"] != after["plan"]:
            x = (before[letter] * after[letter]) ** 0.5  # the middle, on a logarithmic axis
            axis.axvline(x, color=color, linewidth=0.7, linestyle=":")
            text, at = f"{before['plan']} | {after['plan']}", axis.get_xaxis_transform()
            axis.text(x, 0.98, text, transform=at, rotation=90, ha="right", va="top", fontsize=6, color=color)
