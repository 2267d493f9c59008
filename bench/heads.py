"""Layers with heads beside the loops that flashrnn and TiRex-2 run on a CPU: `python -m bench.heads`.

Times `gpu_rnn.flashrnn` on native code and flashrnn's own function, at the sizes of FlashRNN's benchmarks, and the
sLSTM layer of TiRex-2 with either. `--slow` adds what takes many minutes: the loop's training, and TiRex-2's layer
compiled by torch, which unrolls the loop. One thread, processor time, the best of several calls; into
bench/results/heads/*.csv and the table in docs/modifiers.md.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.flashrnn import FUNCTIONS
from gpu_rnn.flashrnn import flashrnn as ours

from .cells import milliseconds
from .results import describe

RESULTS = Path(__file__).parent / "results" / "heads"
DOCUMENT = Path(__file__).parents[1] / "docs" / "modifiers.md"
TABLE = re.compile(r"(<!-- heads -->\n).*?(<!-- /heads -->)", re.DOTALL)
FIELDS = ["what", "T", "B", "heads", "size", "mode", "kind", "ms", "machine", "torch", "date"]
MODES = ("forward", "training")

Row = dict[str, Any]
Kinds = dict[str, Callable[[Tensor], Any]]


def functions(name: str, T: int, B: int, N: int, D: int) -> tuple[Tensor, Kinds]:
    """flashrnn's function and ours: the input projection, and what each makes of it."""
    from flashrnn import flashrnn as theirs

    kind = FUNCTIONS[name]
    R, b = torch.randn(kind.recurrent, N, D, D) * D**-0.5, torch.randn(kind.bias, N, D)
    R.requires_grad_(), b.requires_grad_()
    return torch.randn(B, T, kind.input, N, D), {
        "native": lambda x: ours(x, R, b, function=name, backend="native"),
        "loop": lambda x: theirs(x, R, b, function=name, backend="vanilla", dtype="float32"),
    }


def tirex(T: int, B: int, N: int, D: int, slow: bool) -> tuple[Tensor, Kinds]:
    """TiRex-2's sLSTM layer: its input, and the layer on our function and on flashrnn's."""
    import flashrnn
    from tirex2.model.component.flashrnn_slstm import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    config = FlashRNNLayerConfig(
        embedding_dim=N * D, num_heads=N, backend="vanilla", recurrent_shape="HPGD", bias_shape="HGD"
    )
    layer, theirs = sLSTMFlashRNNLayer(config, block_idx=0, num_blocks=1), flashrnn.flashrnn

    def by(function: Callable, module: Callable) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> Any:
            flashrnn.flashrnn = function  # the layer looks it up at every call
            return (module(x),)

        return run

    kinds = {"native": by(ours, layer), "loop": by(theirs, layer)}
    return torch.randn(B, T, N * D), kinds | ({"compiled loop": by(theirs, torch.compile(layer))} if slow else {})


def rows(slow: bool) -> Iterator[Row]:
    facts = {"machine": describe()["machine"], "torch": torch.__version__, "date": date.today()}
    for what, (T, B, N, D), make, modes in (
        *(
            (f"flashrnn, {name}", (1024, 16, N, 768 // N), functions, MODES)
            for name in ("lstm", "slstm") for N in (12, 1)
        ),
        *(("TiRex-2's layer", (512, B, 4, 128), tirex, MODES[:1]) for B in (1, 64)),
    ):  # fmt: skip
        sizes = {"T": T, "B": B, "heads": N, "size": D}
        own = (what.split()[1],) if make is functions else ()
        torch.manual_seed(0)
        x, kinds = make(*own, T, B, N, D, *([slow] if make is tirex else []))
        for mode in modes:
            for kind, run in kinds.items():
                if kind == "loop" and mode == "training" and not slow:
                    continue
                ms = f"{milliseconds(run, x, mode == 'training'):.4g}"
                yield {"what": what} | sizes | {"mode": mode, "kind": kind, "ms": ms} | facts


def table(rows: list[Row]) -> str:
    """Milliseconds of native code, and how many times as long the others take."""
    cases: dict[tuple, dict[tuple, float]] = {}
    for row in rows:
        case = cases.setdefault(tuple(row[name] for name in FIELDS[:5]), {})
        case[row["mode"], row["kind"]] = float(row["ms"])
    columns = [(mode, kind) for mode in MODES for kind in ("native", "loop", "compiled loop")]
    columns = [column for column in columns if any(column in case for case in cases.values())]
    head = ["", *(f"{mode}: {kind}, {'ms' if kind == 'native' else 'x'}" for mode, kind in columns)]
    lines = [head, ["---", *["---:"] * len(columns)]]
    for (what, T, B, N, D), case in cases.items():
        line = [f"{what}, T={T}, B={B}, {N} x {D}"]
        for mode, kind in columns:
            ms, native = case.get((mode, kind)), case.get((mode, "native"), 1.0)
            line.append("" if ms is None else f"{ms:.4g}" if kind == "native" else f"{ms / native:.1f}")
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    done = []
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{date.today()}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows("--slow" in arguments):
            writer.writerow(row)
            file.flush()
            print(*(row[name] for name in FIELDS[:8]), flush=True)
            done.append(row)
    where = "\nMeasured on {machine}, torch {torch}, {date}; float32, one thread.\n".format(**done[0])
    DOCUMENT.write_text(TABLE.sub(lambda match: f"{match[1]}{table(done)}{where}{match[2]}", DOCUMENT.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
