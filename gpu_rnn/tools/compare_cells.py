"""Trains recurrent cells on the standard tests of memory, side by side: a table, curves, and the numbers behind them.

adding   add up two marked numbers among T (Hochreiter & Schmidhuber 1997); mean squared error, 0.167 by always saying 1
copy     repeat 10 symbols of 8 after T blanks (Arjovsky, Shah & Bengio 2016); nats per symbol, 2.08 by guessing
digits   tell scikit-learn's 8x8 digits, read pixel by pixel in one random order (Le, Jaitly & Hinton 2015); test error
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gpu_rnn

from ..backends import dispatch
from ..core.optional_imports import require
from ..core.problem import Problem

SYMBOLS, COPIED = 8, 10
TEST_ROWS = 360  # of 1797 digits
POINTS = 20  # of a curve, where there are as many steps
OTHERS = ("RNN", "LSTM", "GRU")


class Task(NamedTuple):
    """batch(n) -> x [T, n, I] and targets; the model answers at the last `answers` time steps, each with O numbers."""

    inputs: int
    outputs: int
    answers: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]  # of answers [answers, n, O]
    score: Callable[[Tensor, Tensor], Tensor]
    scored: str
    chance: float


class Settings(NamedTuple):
    """What is the same for all cells and tasks."""

    steps: int = 200
    length: int = 100
    hidden: int = 64
    layers: int = 1
    batch: int = 32
    rate: float = 3e-3
    seed: int = 0
    backend: str | None = None


def adding(length: int, seed: int) -> Task:
    random = torch.Generator().manual_seed(seed)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        values, half = torch.rand(length, n, generator=random), length // 2
        marks = torch.zeros(length, n)
        marks[torch.randint(half, (n,), generator=random), torch.arange(n)] = 1
        marks[torch.randint(half, length, (n,), generator=random), torch.arange(n)] = 1
        return torch.stack([values, marks], -1), (values * marks).sum(0)[None, :, None]

    return Task(2, 1, 1, batch, batch(500), mse_loss, mse_loss, "mean squared error", 1 / 6)


def copying(length: int, seed: int) -> Task:
    random, marker = torch.Generator().manual_seed(seed), SYMBOLS + 1

    def batch(n: int) -> tuple[Tensor, Tensor]:
        symbols = torch.randint(SYMBOLS, (COPIED, n), generator=random)
        blank = torch.full((length + COPIED, n), SYMBOLS)
        blank[length] = marker
        return nn.functional.one_hot(torch.cat([symbols, blank]), SYMBOLS + 2).float(), symbols

    def loss(answers: Tensor, symbols: Tensor) -> Tensor:
        return cross_entropy(answers.flatten(0, 1), symbols.flatten())

    chance = torch.tensor(float(SYMBOLS)).log().item()
    return Task(SYMBOLS + 2, SYMBOLS, COPIED, batch, batch(200), loss, loss, "nats per symbol", chance)


def digits(length: int, seed: int) -> Task:
    """Of 64 time steps, whatever the length."""
    data = require("sklearn.datasets", "the task of digits").load_digits()
    random = torch.Generator().manual_seed(seed)
    order, rows = torch.randperm(64, generator=random), torch.randperm(len(data.data), generator=random)
    pixels, labels = torch.tensor(data.data / 16, dtype=torch.float32)[:, order].T[..., None], torch.tensor(data.target)
    test, train = rows[:TEST_ROWS], rows[TEST_ROWS:]

    def batch(n: int) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (n,), generator=random)]
        return pixels[:, chosen], labels[None, chosen]

    def loss(answers: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(answers[0], labels[0])

    def error(answers: Tensor, labels: Tensor) -> Tensor:
        return (answers[0].argmax(-1) != labels[0]).float().mean()

    return Task(1, 10, 1, batch, (pixels[:, test], labels[None, test]), loss, error, "test error", 0.9)


TASKS: dict[str, Callable[[int, int], Task]] = {"adding": adding, "copy": copying, "digits": digits}


class Model(nn.Module):
    """A cell's layers, and a linear one on their last outputs."""

    def __init__(self, cell: str, task: Task, settings: Settings) -> None:
        super().__init__()
        kind = getattr(gpu_rnn if cell in OTHERS else gpu_rnn.cells, cell)
        self.layers = kind(task.inputs, settings.hidden, num_layers=settings.layers, backend=settings.backend)
        self.out, self.answers = nn.Linear(settings.hidden, task.outputs), task.answers

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x)[0][-self.answers :])


class Result(NamedTuple):
    cell: str
    task: str
    parameters: int  # of the recurrent layers
    step_ms: float  # the median
    curve: list[tuple[int, float]]  # steps done, score on the test batch


def quickest_backend(device: str) -> str | None:
    """The compiled CPU backend where there is a compiler; else what is chosen anyway."""
    problem = Problem(gpu_rnn.kernels.cells.get("gru"), 1, 1, 1, 1, device=device, library="torch")
    return "native" if device == "cpu" and not dispatch.backend("native").reasons(problem) else None


def train(cell: str, name: str, task: Task, settings: Settings, device: str, done: Callable[[], Any]) -> Result:
    """With Adam, gradients clipped to a norm of 1. `done` is called after every step."""
    torch.manual_seed(settings.seed)
    model = Model(cell, task, settings).to(device)
    optimizer = torch.optim.Adam(model.parameters(), settings.rate)
    x_test, test = (tensor.to(device) for tensor in task.test)
    curve, times = [], []
    for step in range(1, settings.steps + 1):
        x, target = (tensor.to(device) for tensor in task.batch(settings.batch))
        start = perf_counter()
        optimizer.zero_grad()
        task.loss(model(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - start))
        if step * POINTS // settings.steps > (step - 1) * POINTS // settings.steps:
            with torch.no_grad():
                curve.append((step, float(task.score(model(x_test), test))))
        done()
    return Result(cell, name, sum(p.numel() for p in model.layers.parameters()), median(times), curve)


def run(cells: Sequence[str], tasks: Sequence[str], settings: Settings, out: Path, console: Console) -> list[Result]:
    """Every cell on every task, on the same data; writes `curves.csv` and `curves.png` to `out`."""
    require("matplotlib", "the comparison")
    made = {name: TASKS[name] for name in tasks}
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = settings._replace(backend=settings.backend or quickest_backend(device))
    results = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all", total=len(made) * len(cells) * settings.steps)
        for name, make in made.items():
            for cell in cells:
                bar = progress.add_task(f"{name}: {cell}", total=settings.steps)

                def done(bar: Any = bar) -> None:
                    progress.advance(bar)
                    progress.advance(whole)

                task = make(settings.length, settings.seed)
                results.append(train(cell, name, task, settings, device, done))
                progress.remove_task(bar)
    facts = {name: make(settings.length, settings.seed) for name, make in made.items()}
    console.print(table(results, facts))
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "cell", "parameters", "step_ms", "step", "score"))
        writer.writerows(
            (r.task, r.cell, r.parameters, f"{r.step_ms:.2f}", *point) for r in results for point in r.curve
        )
    draw(results, facts, out / "curves.png")
    console.out(f"{out / 'curves.png'}, {out / 'curves.csv'}: the scores while training", highlight=False)
    return results


def table(results: Sequence[Result], tasks: dict[str, Task]) -> Table:
    """The last scores, the best of each task in bold, and the time of a step."""
    rendered = Table("cell", title="after training; less is better")
    for name, task in tasks.items():
        rendered.add_column(f"{name}\n{task.scored}\n(by chance {task.chance:.3f})", justify="right")
        rendered.add_column("ms per\nstep", justify="right")
    best = {name: min(r.curve[-1][1] for r in results if r.task == name) for name in tasks}
    for cell in dict.fromkeys(r.cell for r in results):
        row = []
        for r in (r for r in results if r.cell == cell):
            score = r.curve[-1][1]
            row += [f"[bold]{score:.4f}[/]" if score == best[r.task] else f"{score:.4f}", f"{r.step_ms:.1f}"]
        rendered.add_row(cell, *row)
    return rendered


def draw(results: Sequence[Result], tasks: dict[str, Task], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, (name, task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items()):
        for r in (r for r in results if r.task == name):
            axes.plot(*zip(*r.curve), label=r.cell, marker=".", markersize=3, linewidth=1.2)
        axes.axhline(task.chance, color="gray", linestyle="--", linewidth=1, label="chance")
        axes.set(title=name, xlabel="training step", ylabel=task.scored, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
