"""The cells of `gpu_rnn.cells` next to torchrecurrent's layers and compiled loops: `python -m bench.cells [CELL ...]`.

Times them on one thread of this machine's CPU into bench/results/cells/*.csv: processor time, which hardly depends on
what else runs, the best of several calls. `python docs/cells.py` then renews docs/cells.md and its figure.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any

import torch
from pandas import DataFrame
from torch.nn.functional import linear

from gpu_rnn import cells
from gpu_rnn.core.arrays import operations
from gpu_rnn.kernels import cells as definitions
from gpu_rnn.kernels.mathematics import RECURRENT_MATMUL

from .results import FOLDER, describe
from .worker import Row

SIZES = (100, 16, 128), (100, 1, 32)  # T, B, H; and I = H
MODES = ("forward", "training")
SECONDS, LEAST = 0.5, 3  # of a measurement; calls
THEIRS = {"NBRC": "NBR", "BRC": "BR", "CoRNN": "coRNN", "ResidualLSTM": "ResLSTM"}


def native(name: str, H: int) -> Callable:
    return getattr(cells, name)(H, H, backend="native")


def torchrecurrent(name: str, H: int) -> Callable | None:
    import torchrecurrent

    kind = getattr(torchrecurrent, THEIRS.get(name, name), None)
    return kind and kind(H, H)


def compiled_loop(name: str, H: int) -> Callable:
    """The cell's own operations in torch, a time step of them compiled by Inductor, in a loop over time."""
    layer = getattr(cells, name)(H, H)
    cell, known = definitions.get(layer.cell_name), operations(torch.empty(0))
    graph = definitions.step_graph(cell).pruned()
    graph.outputs = graph.outputs[:1]
    graph = graph.pruned()
    inputs = [node.operands for node in graph.nodes.values() if node.op == "input"]
    read = sorted({gate for part, gate in inputs if part == "h"})

    @torch.compile(dynamic=False)
    def step(x: Any, state: Any, joined: Any, blocks: Any, units: Any) -> Any:
        def recurrent(value: Any, g: float) -> Any:
            return linear(value, *blocks[int(g)])

        h = dict(zip(read, linear(state[0], *joined).split(H, -1))) if read else {}
        return graph.run({**known, RECURRENT_MATMUL: recurrent}, x=x.split(H, -1), h=h, state=state, extra=units)[0]

    def run(x: Any) -> Any:
        weights, state, y = layer.function_arguments(), (x.new_zeros(x.shape[1], H),) * cell.S, []
        blocks = [*zip(weights["w_hh"].split(H), weights["b_hh"].split(H))]
        joined, units = [torch.cat(parts) for parts in zip(*(blocks[g] for g in read))], weights.get("units", x[:0])
        for row in linear(x, weights["w_ih"], weights["b_ih"]).unbind():
            state = step(row, state, joined, blocks, units.split(H) if len(units) else ())
            y.append(state[0])
        return torch.stack(y), state

    return run


def milliseconds(run: Callable, x: torch.Tensor, training: bool) -> float:
    best, spent, calls = float("inf"), 0.0, 0
    while calls <= LEAST or spent < SECONDS:
        start = process_time()
        with torch.set_grad_enabled(training):
            y = run(x)[0]
        if training:
            y.sum().backward()
        took = process_time() - start
        if calls:  # the first one compiles
            best, spent = min(best, took), spent + took
        calls += 1
    return 1e3 * best


def rows(names: list[str]) -> Iterator[Row]:
    """Measure; a row for each kind, size and cell."""
    for kind, (T, B, H), name in product((native, torchrecurrent, compiled_loop), SIZES, names):
        torch.manual_seed(0)
        if (run := kind(name, H)) is not None:
            x = torch.randn(T, B, H)
            times = {mode: f"{milliseconds(run, x, mode == 'training'):.2f}" for mode in MODES}
            yield {"cell": name, "kind": kind.__name__.replace("_", " "), **times, "T": T, "B": B, "I": H, "H": H}


def record(folder: Path, rows: Iterable[Row]) -> list[Row]:
    """Write rows, with where they come from, to a file of today as soon as they are known; on one thread."""
    torch.set_num_threads(1)
    facts, done = {"machine": describe()["machine"], "torch": torch.__version__, "date": date.today()}, list[Row]()
    with (folder / f"{date.today()}.csv").open("w", newline="") as file:
        for row in rows:
            DataFrame([row | facts]).to_csv(file, header=not done, index=False, lineterminator="\n")
            file.flush()
            print(*row.values(), flush=True)
            done.append(row | facts)
    return done


if __name__ == "__main__":
    record(FOLDER / "cells", rows(sys.argv[1:] or cells.__all__))
