"""The plots, as SVG that is the same for the same results: speedup over H x B; cost over T, B, H and layers; memory.

A panel for every cell and mode; a figure for every machine, number of threads, dtype and, for the maps, implementation
of ours. What wasn't measured isn't drawn. Where a backend hands over from one kind of kernel to the next there is a
vertical line with their names.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from pandas import DataFrame

from .problems import CUDA, KERNELS, LAYER, MATMULS, MODIFIERS, NATIVE, NN, NUMPY, TRITON

matplotlib.use("agg")
matplotlib.rcParams |= {"svg.hashsalt": "gpu_rnn", "svg.fonttype": "none", "font.size": 9}
from matplotlib import pyplot

OURS = (CUDA, TRITON, NATIVE, NUMPY)
MODES = {"forward": "forward", "training": "forward + backward"}
SCALED = (*OURS, LAYER)  # whose cost is drawn over sizes
LEAST_SIZES, LEAST_POINTS = 4, 3  # fewer make no figure, and no curve in one
CREATOR = "python -m bench report"


def draw(rows: DataFrame, out: Path) -> list[Path]:
    """All the figures there are measurements for; their paths. Those of an earlier report are removed."""
    rows = rows[(rows["status"] == "ok") & rows["mode"].isin(MODES)]
    rows = rows[~rows["implementation"].isin((*MODIFIERS, *KERNELS, MATMULS))]
    paths = []
    for (gpu, machine, threads, dtype), group in rows.groupby(["gpu", "machine", "threads", "dtype"]):
        title = f"{gpu or machine}, {dtype}" + (f", threads: {threads}" if threads else "")
        figures = {f"speedup-{name}": speedup_map(group, name, title) for name in OURS}
        for name, letter in {"steps": "H", "time": "T", "batch": "B", "layers": "L"}.items():
            figures[name] = curves(group, letter, "us_per_step", "us per step", title)
        memory = group.assign(peak=group["peak_bytes"].replace(0, np.nan) / 2**20)
        figures["memory"] = curves(memory, "H", "peak", "peak MiB without inputs", title)
        for name, figure in figures.items():
            if figure is not None:
                path = out / f"{slug(title)}-{slug(name)}.svg"
                figure.savefig(path, metadata={"Date": None, "Creator": CREATOR})
                pyplot.close(figure)
                paths.append(path)
    for path in set(out.glob("*.svg")) - set(paths):
        if CREATOR in path.read_text():
            path.unlink()
    return paths


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def panels(rows: DataFrame, title: str) -> tuple[Any, list[tuple[Any, DataFrame]]]:
    """A figure with a row of panels for each cell and a column for each mode, and the rows of each."""
    cells = sorted(set(rows["cell"]), key=("lstm", "gru", "rnn_tanh", "rnn_relu").index)
    modes = [mode for mode in MODES if mode in set(rows["mode"])]
    size = (4.6 * len(modes), 2.9 * len(cells) + 0.4)
    figure, axes = pyplot.subplots(len(cells), len(modes), figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title)
    pairs = []
    for (i, j), axis in np.ndenumerate(axes):
        axis.set_title(f"{cells[i]} {MODES[modes[j]]}")
        pairs.append((axis, rows[(rows["cell"] == cells[i]) & (rows["mode"] == modes[j])]))
    return figure, pairs


def speedup_map(rows: DataFrame, name: str, title: str) -> Any:
    """Times as fast as torch.nn, over H and B, at the most frequent T and number of layers."""
    rows = rows[(rows["implementation"] == name) & rows["ratio"].notna()]
    if rows.empty:
        return None
    T, L = rows.groupby(["T", "L"], sort=False).size().idxmax()
    rows = rows[(rows["T"] == T) & (rows["L"] == L)]
    figure, pairs = panels(rows, f"{name}: times as fast as torch.nn\n{title}, T = {T}")
    for axis, group in pairs:
        grid = (1 / group.drop_duplicates(["B", "H"], keep="last").set_index(["B", "H"])["ratio"]).unstack()
        limit = np.log2(8)  # eight times as fast or as slow has the strongest colour
        axis.imshow(np.log2(grid), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
        for (i, j), value in np.ndenumerate(grid):
            if not np.isnan(value):
                color = "white" if abs(np.log2(value)) > 0.7 * limit else "black"
                axis.text(j, i, f"{value:.2g}" if value < 10 else f"{value:.0f}", ha="center", va="center", color=color)
        Bs, Hs = grid.index, grid.columns
        axis.set(xticks=range(len(Hs)), xticklabels=Hs, yticks=range(len(Bs)), yticklabels=Bs, xlabel="H", ylabel="B")
    return figure


def curves(rows: DataFrame, letter: str, column: str, label: str, title: str) -> Any:
    """A column of every implementation over one letter, the others where it has most sizes; times with their bound."""
    others, times = [other for other in "TBHL" if other != letter], column == "us_per_step"
    rows = rows[rows["implementation"].isin((NN, *SCALED)) & rows[column].notna() & (rows["I"] == rows["H"])]
    sizes = rows[rows["implementation"].isin(SCALED)].groupby(others, sort=False)[letter].nunique()
    if sizes.empty or sizes.max() < LEAST_SIZES:
        return None
    at = dict(zip(others, sizes.idxmax()))
    rows = rows[(rows[others] == list(at.values())).all(axis=1)]
    rows = rows[rows.groupby(["cell", "mode", "implementation"])[column].transform("size") >= LEAST_POINTS]
    if rows.empty:
        return None
    where = ", ".join(f"{other} = {size}" for other, size in at.items())
    figure, pairs = panels(rows, f"{label} over {letter}\n{title}, {where}")
    for axis, group in pairs:
        for name in [name for name in (NN, *SCALED) if name in set(group["implementation"])]:
            line = group[group["implementation"] == name].sort_values(letter, kind="stable")
            (drawn,) = axis.plot(line[letter], line[column], marker="o", markersize=3, label=name)
            points = zip(line[letter], line["plan"]) if times else ()
            for (x1, before), (x2, after) in pairwise(points):
                if before != after:
                    x, color = (x1 * x2) ** 0.5, drawn.get_color()  # the middle, on a logarithmic axis
                    axis.axvline(x, color=color, linewidth=0.7, linestyle=":")
                    axis.text(
                        x, 0.98, f"{before} | {after}", transform=axis.get_xaxis_transform(), rotation=90, ha="right",
                        va="top", fontsize=6, color=color,
                    )  # fmt: skip
        bound = group[group["bound_us"].notna()].sort_values(letter, kind="stable").drop_duplicates(letter)
        if times and not bound.empty:
            us = bound["bound_us"] / bound["T"]
            axis.plot(bound[letter], us, color="gray", linestyle="--", label="roofline bound")
        axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=label)
        ticks = sorted(set(group[letter]))
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    return figure
