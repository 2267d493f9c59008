"""From the CSV files: tables and plots for README.md, and one HTML page that needs nothing else.

README.md is changed only between `<!-- bench:NAME -->` and `<!-- /bench -->`. NAME is sources, cpu or gpu, which are
text, or maps or curves, which are images.
"""

import html
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import plots, problems, results
from .summary import Ratio, ratio

Row = dict[str, Any]
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


def write(folder: Path, out: Path, readme: Path) -> Iterator[Path]:
    """Everything, from the latest row of every subject; the paths written."""
    rows = results.latest(results.everything(folder))
    if not rows:
        raise ValueError(f"there are no results in {folder.name}/")
    out.mkdir(parents=True, exist_ok=True)
    figures = plots.draw(rows, out)
    yield from figures
    blocks = {name: block(rows) for name, block in BLOCKS.items()}
    shown = {path: f"![{path.stem.replace('-', ' ')}]({os.path.relpath(path, readme.parent)})" for path in figures}
    blocks["maps"] = [image for path, image in shown.items() if "speedup" in path.name] or [NOTHING]
    blocks["curves"] = [image for path, image in shown.items() if "speedup" not in path.name] or [NOTHING]
    page = out / "benchmarks.html"
    page.write_text(PAGE + "\n".join(body(blocks, figures, rows)) + "\n</html>\n")
    yield page
    if readme.is_file():
        before = readme.read_text()
        after = filled(before, blocks)
        if after != before:
            readme.write_text(after)
            yield readme


def filled(text: str, blocks: dict[str, list[str]]) -> str:
    """The text with every block between its markers; ValueError for a name there is no block of."""

    def block(match: re.Match) -> str:
        begin, name, end = match.groups()
        if name not in blocks:
            raise ValueError(f"README.md asks for bench:{name}; there are {', '.join(blocks)}")
        return begin + "\n".join(blocks[name]) + "\n" + end

    return BLOCK.sub(block, text)


# ---- blocks: lines of Markdown --------------------------------------------------------------------------------------


def sources(rows: list[Row]) -> list[str]:
    """Where the numbers come from."""
    lines = []
    for place, group in by(rows, lambda row: row["gpu"] or row["machine"]).items():
        last = max(group, key=lambda row: row["run"])
        versions = [f"{name} {last[name]}" for name in ("torch", "cudnn", "triton", "cupy", "numpy") if last[name]]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in group))
        lines.append(
            f"- {place}: Python {last['python']}, {', '.join(versions)}; {last['run'][:10]}, commit {commits}."
        )
    return lines


def cpu(rows: list[Row]) -> list[str]:
    """NumPy's time over torch.nn's, geometric mean and worst case."""
    rows = [row for row in rows if row["device"] == "cpu" and row["contender"] == problems.NUMPY]
    names = {"forward": "forward", "training": "forward+backward", "step": "one step"}
    columns = sorted({(row["mode"], row["threads"]) for row in rows}, key=lambda at: (list(names).index(at[0]), at[1]))
    head = ["", *(f"{names[mode]}, {threads} thread{'s' * (threads > 1)}" for mode, threads in columns)]
    cells = [name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") if any(row["cell"] == name for row in rows)]
    body = [
        [cell, *(shown(ratio(row for row in rows if (row["cell"], row["mode"], row["threads"]) == (cell, *column)))
                 for column in columns)]
        for cell in cells
    ]  # fmt: skip
    return table(head, body)


def gpu(rows: list[Row]) -> list[str]:
    """How much faster than torch.nn: geometric mean and worst case, over all sequences."""
    rows = [row for row in rows if row["device"] == "cuda" and row["contender"] != problems.NN]
    body = []
    for key, group in by(rows, lambda row: (row["contender"], row["cell"], row["dtype"])).items():
        found = [ratio(row for row in group if row["mode"] == mode) for mode in ("forward", "training")]
        if any(found):
            cases = sum(one.cases for one in found if one)
            body.append([" ".join(key), *(one.speedup if one else "" for one in found), str(cases)])
    return table(["", "forward", "forward+backward", "cases"], body)


BLOCKS: dict[str, Callable[[list[Row]], list[str]]] = {"sources": sources, "cpu": cpu, "gpu": gpu}


def shown(found: Ratio | None) -> str:
    return str(found) if found else ""


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
        "cpu": "CPU: time over torch.nn's, geometric mean (worst case)",
        "gpu": "GPU: times as fast as torch.nn, geometric mean (worst case)",
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
    if lines[0].startswith("|"):
        head, _, *rows = ([value.strip() for value in line.strip("|").split("|")] for line in lines)
        yield from html_table(head, rows)
    else:
        yield from (f"<p>{html.escape(line.removeprefix('- '))}</p>" for line in lines)


def html_table(head: list[str], rows: Iterable[list[Any]]) -> Iterator[str]:
    def line(tag: str, values: list[Any]) -> str:
        cells = ("" if value is None else html.escape(str(value)) for value in values)
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    yield "<table>"
    yield line("th", head)
    yield from (line("td", row) for row in rows)
    yield "</table>"
