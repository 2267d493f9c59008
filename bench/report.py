"""From the CSV files: tables for README.md and docs/benchmarks.md, plots, and one HTML page that needs nothing else.

Documents are changed only between `<!-- bench:NAME -->` and `<!-- /bench -->`; NAME is one in BLOCKS. Tables and plots
show one machine for the CPU and one GPU, those measured last; the HTML page has the rows of all. Plots that an earlier
report made and this one doesn't are removed. `publish` copies those of PUBLISHED to where the documents show them.

Every comparison says how many times as fast something is: above 1 is faster.
"""

import html
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import plots, problems, results
from .summary import ratio, where

Row = dict[str, Any]
PUBLISHED = {  # end of a name -> copy
    "bfloat16-speedup-ours-cuda": "speedup_gpu.svg",
    "float32-threads-1-speedup-ours-numpy": "speedup_cpu.svg",
    "float32-threads-1-steps": "steps_cpu.svg",
}
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench -->)", re.S)
NOTHING = "Not measured yet."
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>gpu_rnn: benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
svg { max-width: 100%; height: auto } .rows { overflow: auto; font-size: 12px }
</style>
<h1>gpu_rnn: benchmarks</h1>
"""


def write(folder: Path, out: Path, documents: Iterable[Path], publish: Path | None = None) -> Iterator[Path]:
    """Write everything, from the latest row of every subject; yield the paths written. publish: folder of copies."""
    every = results.latest(results.everything(folder))
    if not every:
        raise ValueError(f"there are no results in {folder.name}/")
    rows = shown_rows(every)
    out.mkdir(parents=True, exist_ok=True)
    figures = plots.draw(rows, out)
    plots.tidy(out, figures)
    yield from figures
    blocks = {name: block(rows) for name, block in BLOCKS.items()}
    page = out / "benchmarks.html"
    page.write_text(PAGE + "\n".join(body(blocks, figures, every)) + "\n</html>\n")
    yield page
    for document in filter(Path.is_file, documents):
        before = document.read_text()
        after = filled(before, blocks, document.name)
        if after != before:
            document.write_text(after)
            yield document
    if publish is not None:
        for end, name in PUBLISHED.items():
            yield from (shutil.copyfile(figure, publish / name) for figure in figures if figure.stem.endswith(end))


def shown_rows(rows: list[Row]) -> list[Row]:
    """For each kind of device, those of the place that has the last run."""
    last = {row["device"]: place(row) for row in sorted(rows, key=lambda row: row["run"])}
    return [row for row in rows if place(row) == last[row["device"]]]


def place(row: Row) -> str:
    return row["gpu"] if row["device"] == "cuda" else row["machine"]


def filled(text: str, blocks: dict[str, list[str]], document: str) -> str:
    """The text with every block between its markers; ValueError for a name there is no block of."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in blocks:
            raise ValueError(f"{document} asks for bench:{name}; there are {', '.join(blocks)}")
        return begin + "\n".join(blocks[name]) + "\n" + end

    return BLOCK.sub(block, text)


# ---- blocks: lines of Markdown --------------------------------------------------------------------------------------


def sources(rows: list[Row]) -> list[str]:
    """Where the numbers come from."""
    lines = []
    for here, group in by(rows, place).items():
        last = max(group, key=lambda row: row["run"])
        versions = [f"{name} {last[name]}" for name in ("torch", "cudnn", "triton", "cupy", "numpy") if last[name]]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in group))
        lines.append(f"- {here}: Python {last['python']}, {', '.join(versions)}; {last['run'][:10]}, commit {commits}.")
    return lines


def overview(rows: list[Row]) -> list[str]:
    """A line for every cell and dtype: NumPy on one thread, CUDA on a GPU."""
    modes = {"forward": "forward", "training": "forward + backward", "step": "one step"}
    ours = {problems.NUMPY: "NumPy, 1 thread", problems.CUDA: "CUDA"}
    rows = [row for row in rows if row["contender"] in ours and row["threads"] in (1, None)]
    rows = [row for row in rows if row["device"] == "cuda" or problems.among_goals(row)]
    cells = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    rows.sort(key=lambda row: (row["device"] == "cpu", cells.index(row["cell"]), row["dtype"]))
    body = []
    for (contender, cell, dtype), group in by(rows, lambda row: (row["contender"], row["cell"], row["dtype"])).items():
        found = [ratio(row for row in group if row["mode"] == mode) for mode in modes]
        cases = sum(one.cases for one in found if one)
        body.append([f"{ours[contender]}: {cell} {dtype}", *(str(one or "") for one in found), str(cases)])
    return table(["", *modes.values(), "cases"], body)


def cpu(rows: list[Row]) -> list[str]:
    """NumPy against torch.nn, geometric mean and worst case, over the cases of its goals, or so many of them."""
    rows = [row for row in rows if row["device"] == "cpu" and row["contender"] == problems.NUMPY]
    rows = list(filter(problems.among_goals, rows))
    names = {"forward": "forward", "training": "forward + backward", "step": "one step"}
    columns = sorted({(row["mode"], row["threads"]) for row in rows}, key=lambda at: (list(names).index(at[0]), at[1]))
    head = ["", *(f"{names[mode]}, {threads} thread{'s' * (threads > 1)}" for mode, threads in columns)]
    cells = [name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") if any(row["cell"] == name for row in rows)]

    def shown(cell: str, mode: str, threads: int) -> str:
        found = ratio(row for row in rows if (row["cell"], row["mode"], row["threads"]) == (cell, mode, threads))
        goals = math.prod(map(len, problems.GRID[mode == "step" :]))
        return f"{found or ''}" + (f", {found.cases} of {goals}" if found and found.cases < goals else "")

    return table(head, [[cell, *(shown(cell, *column) for column in columns)] for cell in cells])


def products(rows: list[Row]) -> list[str]:
    """What NumPy can't be faster than: its matmuls alone against torch.nn, next to all of ours in the same runs."""
    sized = by(rows, lambda row: tuple(row[name] for name in (*results.CASE, "threads", "run")))
    groups = [{row["contender"]: row for row in group if row["ratio"]} for group in sized.values()]
    both = [found for found in groups if found.keys() >= {problems.NUMPY, problems.PRODUCTS}]
    found = by(both, lambda each: tuple(each[problems.NUMPY][name] for name in ("cell", "mode", "threads")))
    body = []
    for (cell, mode, threads), group in sorted(found.items()):
        ours, least = (ratio(each[name] for each in group) for name in (problems.NUMPY, problems.PRODUCTS))
        body.append([f"{cell} {mode}, threads {threads}", str(ours), str(least), str(len(group))])
    return table(["", "gpu_rnn", "NumPy's matmuls alone", "cases"], body)


def peers(rows: list[Row]) -> list[str]:
    """Every implementation against torch.nn at the sizes where all peers take part; and which don't, and why."""
    size = *"TBHIL", "cell", "dtype", "mode", "threads"
    sized = by(rows, lambda row: tuple(row[name] for name in size))
    asked = {key: {row["contender"]: row for row in group} for key, group in sized.items()}
    asked = {key: found for key, found in asked.items() if found.keys() & set(problems.PEERS)}
    names = [name for name in (*plots.OURS, *problems.PEERS) if any(name in found for found in asked.values())]
    timed = [name for name in names if any(found.get(name, {}).get("ratio") for found in asked.values())]

    def shown(row: Row | None) -> str:
        return "" if row is None else f"{1 / row['ratio']:.2f}" if row["ratio"] else row["status"]

    body = []
    for found in asked.values():
        one = found[problems.NN] if problems.NN in found else next(iter(found.values()))
        threads = f", threads {one['threads']}" if one["threads"] else ""
        case = f"{one['cell']} {one['mode']} {where(one)} {one['dtype']}{threads}"
        body.append([case, *(shown(found.get(name)) for name in timed)])
    reasons = {name: dict.fromkeys(found[name]["note"] for found in asked.values() if name in found) for name in names}
    absent = [f"- {name}: {', '.join(reasons[name])}." for name in names if name not in timed]
    return [*table(["", *timed], sorted(body)), *(["", *absent] if absent else [])]


def calls(rows: list[Row]) -> list[str]:
    """Call overhead: what a layer's call costs in addition to the kernel that it calls, for one time step."""
    body = []
    for group in by(rows, lambda row: tuple(row[name] for name in (*results.CASE, "threads"))).values():
        times = {row["contender"]: row["median_us"] for row in group if row["status"] == "ok"}
        if not set(problems.KERNEL_OF.values()) & times.keys():
            continue
        case = f"{group[0]['cell']} {where(group[0])}, threads {group[0]['threads']}"
        for name in (*problems.KERNEL_OF, problems.STREAM):
            if name in times:
                alone = times.get(problems.KERNEL_OF.get(name, ""))
                numbers = [
                    f"{times[name]:.3g}",
                    *([f"{alone:.3g}", f"{times[name] - alone:.3g}"] if alone else ["", ""]),
                ]
                body.append([f"{case}: {name}", *numbers])
    return table(["", "us per call", "kernel", "call overhead"], body)


def gpu(rows: list[Row]) -> list[str]:
    """How much faster than torch.nn: geometric mean and worst case, over all sequences."""
    parts = {problems.NN, *problems.FEATURES, *problems.KERNELS}
    rows = [row for row in rows if row["device"] == "cuda" and row["contender"] not in parts]
    body = []
    for key, group in by(rows, lambda row: (row["contender"], row["cell"], row["dtype"])).items():
        found = [ratio(row for row in group if row["mode"] == mode) for mode in ("forward", "training")]
        if any(found):
            cases = sum(one.cases for one in found if one)
            body.append([" ".join(key), *(str(one or "") for one in found), str(cases)])
    return table(["", "forward", "forward + backward", "cases"], body)


def features(rows: list[Row]) -> list[str]:
    """Options against the plain function in the same run, and in training the memory; torch.nn next to them."""
    head = ["", "forward", "forward + backward", "saved for backward, MiB", "peak without inputs, MiB"]
    body = []
    sized = "device", "cell", "dtype", *"TBIHL", "threads"
    for group in by(rows, lambda row: tuple(row[name] for name in sized)).values():
        found = {(row["contender"], row["mode"], row["run"]): row for row in group if row["status"] == "ok"}
        for name in (problems.NN, *problems.FEATURES):
            times, last = list[str](), dict[str, Any]()
            for mode in ("forward", "training"):
                mine = [row for (who, how, _), row in found.items() if (who, how) == (name, mode)]
                last = mine[0] if mine else {}
                plain = found.get((problems.PLAIN, mode, last.get("run")))
                times.append(f"{plain['median_us'] / last['median_us']:.2f}" if plain else "")
            if any(times):
                memory = [last.get(column) for column in ("saved_bytes", "peak_bytes")]
                case = f"{group[0]['cell']} {where(group[0])} {group[0]['dtype']}"
                body.append([f"{case}: {name}", *times, *map(mebibytes, memory)])
    return table(head, body)


def kernels(rows: list[Row]) -> list[str]:
    """Where the time of a step goes: our kernels alone, next to the whole of their case."""
    head = ["", "plan", "us per step", "roofline bound, us", "of the bound", "GB/s"]
    body = []
    for _, group in by(rows, lambda row: (row["run"], *(row[name] for name in results.CASE))).items():
        if not any(row["contender"] in problems.KERNELS for row in group):
            continue
        for row in group:
            if row["status"] == "ok":
                case = f"{row['cell']} {row['mode']} {where(row)} {row['dtype']}"
                numbers = [f"{row['us_per_step']:.3g}"]
                of_memory = row["contender"].endswith(" step")
                if row["of_floor"]:
                    numbers += [f"{row['floor_us'] / row['T']:.3g}", f"{row['of_floor']:.0%}"]
                    numbers += [f"{row['of_floor'] * row['ceiling_bandwidth'] / 1e9:.0f}" if of_memory else ""]
                body.append([f"{case}: {row['contender']}", row["plan"], *numbers, *[""] * (4 - len(numbers))])
    return table(head, body)


BLOCKS: dict[str, Callable[[list[Row]], list[str]]] = {
    "overview": overview, "sources": sources, "cpu": cpu, "products": products, "peers": peers, "calls": calls,
    "gpu": gpu, "features": features, "kernels": kernels,
}  # fmt: skip


def mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.2g}"


def by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def table(head: list[str], body: list[list[str]]) -> list[str]:
    if not body:
        return [NOTHING]
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body)]


# ---- the page -------------------------------------------------------------------------------------------------------


def body(blocks: dict[str, list[str]], figures: list[Path], rows: list[Row]) -> Iterator[str]:
    titles = {
        "sources": "Measured on",
        "cpu": "CPU: times as fast as torch.nn, geometric mean (worst case)",
        "products": "Upper bound for NumPy: times as fast as torch.nn, geometric mean (worst case)",
        "peers": "Peers: times as fast as torch.nn",
        "calls": "Call overhead",
        "gpu": "GPU: times as fast as torch.nn, geometric mean (worst case)",
        "features": "Cell options: times as fast as the plain function",
        "kernels": "Kernels alone",
    }
    for name, title in titles.items():
        yield f"<h2>{title}</h2>"
        yield from marked_up(blocks[name])
    for path in figures:
        svg = path.read_text()
        yield svg[svg.index("<svg") :]  # without the XML declaration, which HTML doesn't know
    yield f"<details><summary>All {len(rows)} rows</summary><div class=rows>"
    counts = Counter(name for row in rows for name, value in row.items() if value not in ("", None))
    columns = [name for name in results.FIELDS if counts[name]]
    yield from html_table(columns, [[results.shown(row[name]) for name in columns] for row in rows])
    yield "</div></details>"


def marked_up(lines: list[str]) -> Iterator[str]:
    """The little Markdown that blocks are made of."""
    cells = [[value.strip() for value in line[1:-1].split("|")] for line in lines if line.startswith("|")]
    if cells:
        head, _, *rows = cells
        yield from html_table(head, rows)
    others = [line.removeprefix("- ") for line in lines if line and not line.startswith("|")]
    yield from (f"<p>{html.escape(line)}</p>" for line in others)


def html_table(head: list[str], rows: Iterable[list[Any]]) -> Iterator[str]:
    def line(tag: str, values: list[Any]) -> str:
        cells = ("" if value is None else html.escape(str(value)) for value in values)
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    yield "<table>"
    yield line("th", head)
    yield from (line("td", row) for row in rows)
    yield "</table>"
