"""Layers with heads next to the loops that flashrnn and TiRex-2 run on a CPU: `python -m bench.heads`.

Times `gpu_rnn.flashrnn` on native code and flashrnn's own function, at the sizes of FlashRNN's benchmarks, and the
sLSTM layer of TiRex-2 with either. `--slow` adds what takes many minutes: the loop's training, and TiRex-2's layer
compiled by torch, which unrolls the loop. One thread, processor time, the best of several calls; into
bench/results/heads/*.csv and the table in docs/modifiers.md.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pandas import DataFrame
from torch import Tensor

from gpu_rnn.flashrnn import FUNCTIONS
from gpu_rnn.flashrnn import flashrnn as ours

from .cells import MODES, milliseconds, record
from .report import Block, filled
from .results import FOLDER
from .worker import ROOT, Row

DOCUMENT = ROOT / "docs" / "modifiers.md"
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
    """Measure; a row for each layer or function, mode and kind."""
    for what, (T, B, N, D), make, modes in (
        *(
            (f"flashrnn, {name}", (1024, 16, N, 768 // N), functions, MODES)
            for name in ("lstm", "slstm") for N in (12, 1)
        ),
        *(("TiRex-2's layer", (512, B, 4, 128), tirex, MODES[:1]) for B in (1, 64)),
    ):  # fmt: skip
        own = (what.split()[1],) if make is functions else ()
        torch.manual_seed(0)
        x, kinds = make(*own, T, B, N, D, *([slow] if make is tirex else []))
        for mode in modes:
            for kind, run in kinds.items():
                if kind == "loop" and mode == "training" and not slow:
                    continue
                ms = f"{milliseconds(run, x, mode == 'training'):.4g}"
                yield {"what": what, "T": T, "B": B, "heads": N, "size": D, "mode": mode, "kind": kind, "ms": ms}


def table(rows: list[Row]) -> Block:
    """Milliseconds of native code, and how many times as long the others take."""
    subject = ["what", "T", "B", "heads", "size"]
    ms = DataFrame(rows).astype({"ms": float}).pivot_table("ms", subject, ["mode", "kind"], sort=False)
    columns = [(mode, kind) for mode in MODES for kind in ("native", "loop", "compiled loop") if (mode, kind) in ms]
    head = ["", *(f"{mode}: {kind}, {'ms' if kind == 'native' else 'x'}" for mode, kind in columns)]
    shown = {
        (mode, kind): ms[mode, kind].map("{:.4g}".format) if kind == "native"
        else (ms[mode, kind] / ms[mode, "native"]).map("{:.1f}".format) for mode, kind in columns
    }  # fmt: skip
    texts = DataFrame(shown).where(ms[columns].notna(), "")
    body = [[f"{what}, T={T}, B={B}, {N} x {D}", *line] for (what, T, B, N, D), line in zip(ms.index, texts.values)]
    return Block(head, body, ["Measured on {machine}, torch {torch}, {date}; float32, one thread.".format(**rows[0])])


if __name__ == "__main__":
    block = table(record(FOLDER / "heads", rows("--slow" in sys.argv)))
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), {"heads": block.markdown()}, DOCUMENT.name))
