"""From the CSV files: tables for README.md and docs/benchmarks.md, plots, and one HTML page that needs nothing else.

Documents are changed only between `<!-- bench:NAME -->` and `<!-- /bench -->`; NAME is one in BLOCKS. Tables and plots
show one machine for the CPU and one GPU, those measured last; the HTML page has the rows of all. Plots that an earlier
report made and this one doesn't are removed. `publish` copies those of PUBLISHED to where the documents show them.

Every comparison says how many times as fast something is: above 1 is faster.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from pandas import DataFrame

from . import plots, problems
from .problems import KERNEL_OF, MATMULS, NATIVE, NN, NUMPY, PEERS, PLAIN, STREAM
from .results import CASE, FIELDS, FOLDER, where

PUBLISHED = {  # end of a name -> copy
    "bfloat16-speedup-ours-cuda": "speedup_gpu.svg", "float32-threads-1-speedup-ours-native": "speedup_cpu.svg",
}  # fmt: skip
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.S)
SUBJECT = ["implementation", *CASE, "threads", "tf32", "machine", "gpu"]  # two rows are compared if they agree in these
NOISE = 0.05  # a change under this is none, whatever the spread says
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
ON_CPU = {NATIVE: "native", NUMPY: "NumPy"}
WAYS = {"forward": "forward", "training": "forward + backward", "step": "one step", "model": "in a model"}
SIZES = ["T", "B", "I", "H", "L"]
NUMBERS = [
    *SIZES, "threads", "tf32", "median_us", "p20_us", "p80_us", "rounds", "us_per_step", "ratio", "bound_us",
    "fraction_of_bound", "peak_bytes", "saved_bytes", "error", "ceiling_flops", "ceiling_bandwidth",
]  # fmt: skip
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>gpu_rnn: benchmarks</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto } svg { max-width: 100% } .rows { overflow: auto }
table { border-collapse: collapse } th, td { padding: .2em .7em; text-align: right }
</style>
<h1>gpu_rnn: benchmarks</h1>
"""


class Block(NamedTuple):
    """A table, and lines below it."""

    head: Sequence[str] = ()
    body: Sequence[Sequence[str]] = ()
    lines: Sequence[str] = ()

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.head) - 1)]
        table = [f"| {' | '.join(row)} |" for row in (self.head, ruler, *self.body)] if self.body else []
        return "\n".join([*table, *[""] * bool(table and self.lines), *self.lines]) or "Not measured yet."

    def html(self) -> str:
        table = DataFrame(self.body, columns=self.head).to_html(index=False) if self.body else ""
        return table + "".join(f"<p>{line}</p>" for line in self.lines)


# ---- rows -----------------------------------------------------------------------------------------------------------


def read(*paths: Path) -> DataFrame:
    """All rows; text is never missing, T to L and threads are whole numbers, and 0 threads are those of a GPU."""
    frames = [pandas.read_csv(path, dtype=object, keep_default_na=False) for path in paths]
    rows = pandas.concat([DataFrame(columns=list(FIELDS)), *frames], ignore_index=True)[list(FIELDS)].fillna("")
    rows[NUMBERS] = rows[NUMBERS].apply(pandas.to_numeric)
    return rows.fillna({"L": 1, "threads": 0, "tf32": 0}).astype(dict.fromkeys((*SIZES, "threads", "tf32"), int))


def latest(rows: DataFrame) -> DataFrame:
    """The last row of every subject, where its first one is."""
    rows = rows.sort_values("run", kind="stable")
    rows = rows.assign(first=rows.groupby(SUBJECT, sort=False).ngroup())
    return rows.drop_duplicates("first", keep="last").sort_values("first").drop(columns="first")


def shown_rows(rows: DataFrame) -> DataFrame:
    """For each kind of device, those of the place that has the last run."""
    rows = rows.assign(place=rows["gpu"].where(rows["device"] == "cuda", rows["machine"]))
    last = rows.sort_values("run", kind="stable").groupby("device")["place"].last()
    return rows[rows["place"] == rows["device"].map(last)]


def select(name: str) -> DataFrame:
    """The rows of a CSV file, or of the run or commit whose name begins like this."""
    if Path(name).suffix == ".csv":
        return read(Path(name))
    rows = read(*sorted(FOLDER.glob("*.csv")))
    rows = rows[rows["run"].str.startswith(name) | rows["commit"].str.startswith(name)]
    if rows.empty:
        raise ValueError(f"no run or commit begins with {name!r} in {FOLDER.name}/, and it is no .csv file")
    return rows


def compare(a: str, b: str) -> Iterator[str]:
    """What changed beyond noise from a to b, the worst first, and how many subjects both have.

    Beyond noise: the ranges from the 20th to the 80th percentile don't meet, and the medians differ by over 5 %.
    """
    ok = (latest(rows[rows["status"] == "ok"]) for rows in (select(a), select(b)))
    both = DataFrame.merge(*ok, on=SUBJECT, suffixes=("_a", ""))
    if both.empty:
        raise ValueError("the two have no measurement in common")
    both["times"] = both["median_us"] / both["median_us_a"]
    apart = (both["p80_us_a"] < both["p20_us"]) | (both["p80_us"] < both["p20_us_a"])
    changed = both[apart & ((both["times"] - 1).abs() > NOISE)].sort_values("times", ascending=False)
    for _, row in changed.iterrows():
        what = f"{row['implementation']}: {row['cell']} {row['mode']} {where(row)} {row['dtype']}{threads_of(row, ' ')}"
        verb = "slower" if row["times"] > 1 else "faster"
        times = f"{max(row['times'], 1 / row['times']):.2f}x {verb}"
        yield f"{what}: {row['median_us_a']:.4g} -> {row['median_us']:.4g} us, {times}"
    yield f"{len(changed)} of {len(both)} changed beyond noise"


def threads_of(row: Any, before: str = ", ") -> str:
    return f"{before}threads {row['threads']}" if row["threads"] else ""


# ---- blocks ---------------------------------------------------------------------------------------------------------


def speedup(rows: DataFrame) -> str:
    """Geometric mean, and in brackets the worst case, of the rows that have a ratio."""
    ratios = rows["ratio"].dropna()
    return "" if ratios.empty else f"{1 / math.exp(np.log(ratios).mean()):.2f} ({1 / ratios.max():.2f})"


def by_mode(rows: DataFrame, name: Callable[[tuple], str], modes: Sequence[str]) -> Block:
    """A line for every implementation, cell and dtype, a column for every mode."""
    body, rows = [], rows[rows["mode"].isin(modes) & rows["ratio"].notna()]
    for key, group in rows.groupby(["implementation", "cell", "dtype"], sort=False):
        columns = [speedup(group[group["mode"] == mode]) for mode in modes]
        body.append([name(key), *columns, str(len(group))])
    return Block(["", *(WAYS[mode] for mode in modes), "cases"], body)


def overview(rows: DataFrame) -> Block:
    """Native code and NumPy on one thread, CUDA on a GPU."""
    ours = {problems.CUDA: "CUDA"} | {name: f"{label}, 1 thread" for name, label in ON_CPU.items()}
    rows = rows[rows["implementation"].isin(ours) & rows["threads"].isin((0, 1))]
    rows = rows[(rows["device"] == "cuda") | rows.apply(problems.among_goals, axis=1).astype(bool)]
    keys, order = ["implementation", "cell", "dtype"], {name: n for n, name in enumerate((*ours, *CELLS))}
    rows = rows.sort_values(keys, kind="stable", key=lambda column: column.map(lambda v: order.get(v, v)))
    return by_mode(rows, lambda key: f"{ours[key[0]]}: {key[1]} {key[2]}", ["forward", "training", "step"])


def sources(rows: DataFrame) -> Block:
    """Where the numbers come from."""
    lines = []
    for place, group in rows.groupby("place", sort=False):
        last = group.sort_values("run", kind="stable").iloc[-1]
        versions = [f"{name} {last[name]}" for name in ("torch", "cudnn", "triton", "cupy", "numpy") if last[name]]
        commits = ", ".join(group["commit"].unique())
        when = f"{last['run'][:10]}, commit {commits}"
        lines.append(f"- {place}: Python {last['python']}, {', '.join(versions)}; {when}.")
    return Block(lines=lines)


def cpu(rows: DataFrame) -> Block:
    """Native code and NumPy against torch.nn, over the cases of their goals, or so many of them."""
    rows = rows[(rows["device"] == "cpu") & rows["implementation"].isin(ON_CPU)]
    rows = rows[rows.apply(problems.among_goals, axis=1).astype(bool)]
    columns = sorted(set(zip(rows["mode"], rows["threads"])), key=lambda at: (list(WAYS).index(at[0]), at[1]))

    def cell_of(name: str, cell: str, mode: str, threads: int) -> str:
        subject = rows[["implementation", "cell", "mode", "threads"]]
        selected = rows[(subject == [name, cell, mode, threads]).all(axis=1)]
        goals, cases = math.prod(map(len, problems.GOALS[mode == "step" :])), selected["ratio"].count()
        return speedup(selected) + (f", {cases} of {goals}" if 0 < cases < goals else "")

    head = ["", *(f"{WAYS[mode]}, {threads} thread{'s' * (threads > 1)}" for mode, threads in columns)]
    known = {*zip(rows["implementation"], rows["cell"])}
    kinds = [kind for kind in product(ON_CPU, CELLS) if kind in known]
    return Block(head, [[f"{ON_CPU[kind[0]]}: {kind[1]}", *(cell_of(*kind, *at) for at in columns)] for kind in kinds])


def matmuls(rows: DataFrame) -> Block:
    """What NumPy can't be faster than: its matmuls alone, next to all of ours in the same runs."""
    kinds, body, names = ["cell", "mode", "threads"], [], [*ON_CPU, MATMULS]
    wide = rows.pivot_table("ratio", [*CASE, "threads", "run"], "implementation").reindex(columns=names)
    wide = wide.dropna(subset=names[1:])
    for (cell, mode, threads), group in wide.groupby(kinds):
        columns = (speedup(group[[name]].rename(columns={name: "ratio"})) for name in names)
        body.append([f"{cell} {mode}, threads {threads}", *columns, str(len(group))])
    return Block(["", *ON_CPU.values(), "NumPy's matmuls alone", "cases"], body)


def peers(rows: DataFrame) -> Block:
    """Every implementation against torch.nn at the sizes where all peers take part; and which don't, and why."""
    case = [*SIZES, "cell", "dtype", "mode", "threads"]
    rows = rows.groupby(case).filter(lambda group: group["implementation"].isin(PEERS).any())
    rows = rows.set_index("implementation")
    names = [name for name in (*plots.OURS, *PEERS) if name in rows.index]
    timed = [name for name in names if rows.loc[[name], "ratio"].notna().any()]
    body = []
    for _, group in rows.groupby(case):
        one, ratio = group.iloc[0], group["ratio"]
        shown = (1 / ratio).map("{:.2f}".format).where(ratio.notna(), group["status"])
        text = f"{one['cell']} {one['mode']} {where(one)} {one['dtype']}{threads_of(one)}"
        body.append([text, *shown.reindex(timed).fillna("")])
    absent = [f"- {name}: {', '.join(rows.loc[[name], 'note'].unique())}." for name in names if name not in timed]
    return Block(["", *timed], sorted(body), absent)


def models(rows: DataFrame) -> Block:
    """Training between linear layers of torch, whose threads are busy or spin: one and more threads side by side."""
    body, rows = [], rows[(rows["mode"] == "model") & (rows["implementation"] != NN)]
    threads = sorted(set(rows["threads"]))
    for cell, group in rows.groupby("cell", sort=False):
        body.append([str(cell), *(speedup(group[group["threads"] == n]) for n in threads), str(len(group))])
    return Block(["", *(f"{n} thread{'s' * (n > 1)}" for n in threads), "cases"], body)


def calls(rows: DataFrame) -> Block:
    """Call overhead: what a layer's call costs in addition to the kernel that it calls, for one time step."""
    body = []
    for _, group in rows[rows["status"] == "ok"].groupby([*CASE, "threads"], sort=False):
        us, one = dict(zip(group["implementation"], group["median_us"])), group.iloc[0]
        if not us.keys() & set(KERNEL_OF.values()):
            continue
        for name in (name for name in (*KERNEL_OF, STREAM) if name in us):
            kernel = us.get(KERNEL_OF.get(name, ""))
            numbers = [f"{us[name]:.3g}", *([f"{kernel:.3g}", f"{us[name] - kernel:.3g}"] if kernel else ["", ""])]
            body.append([f"{one['cell']} {where(one)}, threads {one['threads']}: {name}", *numbers])
    return Block(["", "us per call", "kernel", "call overhead"], body)


def gpu(rows: DataFrame) -> Block:
    """Against torch.nn, over all sequences."""
    parts = [NN, *problems.MODIFIERS, *problems.KERNELS]
    rows = rows[(rows["device"] == "cuda") & ~rows["implementation"].isin(parts)]
    return by_mode(rows, " ".join, ["forward", "training"])


def modifiers(rows: DataFrame) -> Block:
    """Modifiers against the plain function in the same run, and in training the memory; torch.nn next to them."""
    head = ["", "forward", "forward + backward", "saved for backward, MiB", "peak without inputs, MiB"]
    body = []
    for _, group in rows[rows["status"] == "ok"].groupby(["device", "cell", "dtype", *SIZES, "threads"], sort=False):
        one = group.iloc[0]
        plain = group[group["implementation"] == PLAIN].set_index(["mode", "run"])["median_us"]
        for name in (NN, *problems.MODIFIERS):
            times, last = [], None
            for mode in ("forward", "training"):
                own = group[(group["implementation"] == name) & (group["mode"] == mode)]
                last = None if own.empty else own.iloc[0]
                us = None if last is None else plain.get((mode, last["run"]))
                times.append("" if us is None or last is None else f"{us / last['median_us']:.2f}")
            if any(times):
                sizes = [math.nan if last is None else last[column] for column in ("saved_bytes", "peak_bytes")]
                memory = ["" if math.isnan(size) else f"{size / 2**20:.2g}" for size in sizes]
                body.append([f"{one['cell']} {where(one)} {one['dtype']}: {name}", *times, *memory])
    return Block(head, body)


def kernels(rows: DataFrame) -> Block:
    """Where the time of a step goes: our kernels alone, next to the whole of their case."""
    body = []
    for _, group in rows.groupby(["run", *CASE], sort=False):
        if group["implementation"].isin(problems.KERNELS).any():
            for _, row in group[group["status"] == "ok"].iterrows():
                bound, share = row["bound_us"] / row["T"], row["fraction_of_bound"]
                numbers = ["", "", ""] if math.isnan(share) else [f"{bound:.3g}", f"{share:.0%}", ""]
                if numbers[1] and row["implementation"].endswith(" step"):
                    numbers[2] = f"{share * row['ceiling_bandwidth'] / 1e9:.0f}"
                text = f"{row['cell']} {row['mode']} {where(row)} {row['dtype']}: {row['implementation']}"
                body.append([text, row["plan"], f"{row['us_per_step']:.3g}", *numbers])
    return Block(["", "plan", "us per step", "roofline bound, us", "of the bound", "GB/s"], body)


BLOCKS: dict[str, tuple[str, Callable[[DataFrame], Block]]] = {  # titles are those of the page
    "overview": ("", overview),
    "sources": ("Measured on", sources),
    "cpu": ("CPU: times as fast as torch.nn, geometric mean (worst case)", cpu),
    "models": ("Training between linear layers on the CPU: times as fast as torch.nn", models),
    "matmuls": ("Upper bound for NumPy: times as fast as torch.nn, geometric mean (worst case)", matmuls),
    "peers": ("Peers: times as fast as torch.nn", peers),
    "calls": ("Call overhead", calls),
    "gpu": ("GPU: times as fast as torch.nn, geometric mean (worst case)", gpu),
    "modifiers": ("Modifiers: times as fast as the plain function", modifiers),
    "kernels": ("Kernels alone", kernels),
}


# ---- files ----------------------------------------------------------------------------------------------------------


def write(folder: Path, out: Path, documents: Iterable[Path], publish: Path | None = None) -> Iterator[Path]:
    """Write everything, from the latest row of every subject; yield the paths written. publish: folder of copies."""
    every = latest(read(*sorted(folder.glob("*.csv"))))
    if every.empty:
        raise ValueError(f"there are no results in {folder.name}/")
    rows = shown_rows(every)
    out.mkdir(parents=True, exist_ok=True)
    figures = plots.draw(rows, out)
    yield from figures
    blocks = {name: block(rows) for name, (_, block) in BLOCKS.items()}
    for document in filter(Path.is_file, documents):
        before = document.read_text()
        after = filled(before, {name: block.markdown() for name, block in blocks.items()}, document.name)
        if after != before:
            document.write_text(after)
            yield document
    parts = [f"<h2>{title}</h2>\n{blocks[name].html()}" for name, (title, _) in BLOCKS.items() if title]
    parts += [text[text.index("<svg") :] for text in map(Path.read_text, figures)]  # without their XML declaration
    used = every.loc[:, (every.notna() & (every != "")).any()]
    table = used.to_html(index=False, na_rep="", float_format="{:.6g}".format)
    parts.append(f"<details><summary>All {len(every)} rows</summary><div class=rows>{table}</div></details>\n</html>\n")
    (out / "benchmarks.html").write_text(PAGE + "\n".join(parts))
    yield out / "benchmarks.html"
    if publish is not None:
        for end, name in PUBLISHED.items():
            yield from (shutil.copyfile(figure, publish / name) for figure in figures if figure.stem.endswith(end))


def filled(text: str, blocks: dict[str, str], document: str) -> str:
    """The text with every block between its markers; ValueError for a name there is no block of."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in blocks:
            raise ValueError(f"{document} asks for bench:{name}; there are {', '.join(blocks)}")
        return f"{begin}{blocks[name]}\n{end}"

    return BLOCK.sub(block, text)
