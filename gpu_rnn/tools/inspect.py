"""The gates inside a cell: every gate's activation and every state after every time step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from os import PathLike
from typing import Any

import numpy as np

from gpu_rnn.kernels.cells import Cell, activation, get, step_graph
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.trace import Graph

from ..backends.numpy import to_numpy
from ..core import arrays, reference
from ..core.optional_imports import require
from ..core.problem import Options, Run, Weights, with_zeros
from ..core.validation import validate, zero_states
from ..functional import ModifierKeywords, cell_name, gru, lstm, parse_keywords, rnn

FUNCTIONS = (lstm, gru, rnn)
TITLES = {
    "i": "input gate", "f": "forget gate", "g": "candidate", "o": "output gate", "r": "reset gate", "z": "update gate",
    "n": "candidate", "c": "cell state", "h": "output",
}  # fmt: skip
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


@dataclass(frozen=True)
class Inspection(Mapping[str, np.ndarray]):
    """Every gate's activation and every state after every time step, by letter: `inspection["f"]` is [T, B, H].

    The letters are those of the cell definition: i f g o h c for LSTM, r z n h for GRU, a h for RNN. A stack of layers
    or directions has torch's endings too: "f_l0", "f_l0_reverse", "f_l1". h is [T, B, P] after a projection. In a
    PackedSequence's shorter rows what comes after the end is NaN.
    """

    cell: Cell
    endings: tuple[str, ...]  # of the keys: ("",) for one layer in one direction, else ("_l0", "_l0_reverse", ...)
    recorded: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.recorded:
            raise KeyError(f"{key!r}; there are {', '.join(self.recorded)}")
        return self.recorded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorded)

    def __len__(self) -> int:
        return len(self.recorded)

    def plot(
        self, path: str | PathLike | None = None, row: int = 0, units: int | Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
    ) -> Any:  # fmt: skip
        """Draw heat maps, units by time: a panel for every gate and state, a column for every layer and direction.

        Args:
            path: where to write the figure, as PNG, PDF or SVG by its ending; None writes nothing.
            row: which sequence of the batch.
            units: which units; a number takes so many, from those that change slowest to the quickest. None: all.
            labels: [T] a label for every time step, e.g. a string's characters; they stand below.

        Returns:
            The matplotlib Figure. ValueError: row or units out of range, or labels of another length; ImportError: no
            matplotlib.
        """
        figure_module = require("matplotlib.figure", "plotting an inspection")  # not pyplot: no window, nothing global
        T, B, _ = self.recorded[self.cell.gates[0] + self.endings[0]].shape
        if not 0 <= row < B:
            raise ValueError(f"row must be in [0, {B}), the batch size; got {row}")
        if labels is not None and len(labels) != T:
            raise ValueError(f"labels must have one entry per time step, {T}; got {len(labels)}")
        states, gates = activated(self.cell).outputs
        shown = [gate for gate, value in zip(self.cell.gates, gates) if value not in states]
        shown += reversed(self.cell.states)  # a gate that is itself a state is shown once

        size = (1.5 + min(max(0.14 * T, 5), 16) * len(self.endings), 0.6 + 1.5 * len(shown))
        figure = figure_module.Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(shown), len(self.endings), sharex=True, squeeze=False)
        for column, ending in enumerate(self.endings):
            chosen = self.chosen_units(units, ending, row)
            for panel, letter in zip(panels[:, column], shown):
                values = self.recorded[letter + ending][:, row]
                values = values[:, [u for u in chosen if u < values.shape[1]]]  # a projected h has fewer
                signed, top = np.nanmin(values) < 0, max(1.0, np.nanpercentile(np.abs(values), 95))  # c can run away
                image = panel.imshow(
                    values.T, vmin=-top if signed else 0, vmax=top, cmap="RdBu_r" if signed else "viridis",
                    aspect="auto", interpolation="nearest",
                )  # fmt: skip
                panel.set_title(f"{letter}{ending}  {TITLES.get(letter, '')}", loc="left", fontsize=9)
                panel.set_ylabel("unit", fontsize=8)
                panel.set_yticks([])
                panel.tick_params(labelsize=8, length=2 if labels is None else 0)
                beyond = "both" if top > 1 else "neither"
                figure.colorbar(image, ax=panel, pad=0.01, aspect=12, extend=beyond).ax.tick_params(labelsize=7)
            if labels is None:
                panel.set_xlabel("time step", fontsize=8)
            else:
                panel.set_xticks(range(T), [label.translate(VISIBLE) for label in labels], family="monospace")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def chosen_units(self, units: int | Sequence[int] | None, ending: str, row: int) -> Sequence[int]:
        H = self.recorded[self.cell.gates[0] + ending].shape[2]
        if units is None:
            return range(H)
        if isinstance(units, (int, np.integer)):
            if not 1 <= units <= H:
                raise ValueError(f"units must be between 1 and H = {H}, got {units}")
            memory = self.recorded[self.cell.states[-1] + ending][:, row]
            memory = memory[: np.isfinite(memory[:, 0]).sum()]
            change = np.abs(np.diff(memory, axis=0)).sum(0) / (memory.std(0) + np.finfo(memory.dtype).tiny)
            return np.argsort(change, kind="stable")[np.linspace(0, H - 1, units).astype(int)].tolist()
        if not all(0 <= unit < H for unit in units):
            raise ValueError(f"units must be in [0, H = {H}), got {list(units)}")
        return list(units)


def inspect(what: Any, x: Any, *args: Any, **kwargs: Any) -> Inspection:
    """Run a layer's cell definition in NumPy, and record every gate and state of every time step.

        inside = gpu_rnn.inspect(layer, x)                                  # or inspect(layer, x, hx)
        inside = gpu_rnn.inspect(gpu_rnn.lstm, x, w_ih, w_hh, b_ih, b_hh)   # or with all that gpu_rnn.lstm takes
        inside["f"]                                                         # [T, B, H] the forget gate
        inside.plot("gates.png", labels="what it read")

    The values are those of the cell definition; those of the other backends agree with them within rounding.

    Args:
        what: an RNN, LSTM, GRU or cell of gpu_rnn (or torch.nn), or one of the functions gpu_rnn.rnn, lstm, gru.
        x: what the layer or function takes: [T, B, I], [B, T, I] for batch_first, [T, I], a PackedSequence, ...
        args, kwargs: `hx` for a layer; weights, biases, states, `reverse` and `num_heads` for a function.

    Returns:
        An Inspection: NumPy arrays, always time first, in the dtype of x (float32 for half precision).

    Raises:
        ShapeError, TypeError: as `gpu_rnn.lstm`. ValueError: modifiers other than variants and lengths of a layer. A
        layer's dropout is left out, as in evaluation.
    """
    if what in FUNCTIONS:
        return inspect_function(what, x, *args, **kwargs)
    return inspect_layer(what, x, *args, **kwargs)


def inspect_function(function: Callable, *args: Any, **kwargs: Any) -> Inspection:
    bound = signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    values = bound.arguments
    cell = get(cell_name(function, values))
    weights = Weights(*(values.get(field) for field in Weights._fields))
    initial = [values[letter + "0"] for letter in cell.states]
    if unseen := values["modifiers"].keys() - {"num_heads"}:
        raise ValueError(f"inspect shows the cell of a function without modifiers; got {', '.join(sorted(unseen))}")
    options, _ = parse_keywords(Options(), values["modifiers"], ModifierKeywords)
    run = Run(values["x"], weights, initial, values["reverse"])
    return Inspection(cell, ("",), run_recorded(cell.name, run, options.heads))


def inspect_layer(layer: Any, x: Any, hx: Any = None) -> Inspection:
    """The layer's own forward calls the cell: through packed sequences, stacks and directions."""
    torch = require("torch", "looking inside a layer")
    from ..nn.base import record
    from ..nn.conversion import as_gpu_rnn_layer

    layer = as_gpu_rnn_layer(layer)
    cell = get(layer._cell)
    calls: list[dict[str, np.ndarray]] = []

    def recorder(name: str, runs: Sequence[Run], options: Options) -> list[tuple[Any, tuple]]:
        outputs = []
        for run in runs:
            values = run_recorded(name, run, options.heads)
            y, *others = (torch.from_numpy(values[letter]).to(run.x) for letter in cell.states)
            if run.weights.flags is not None:  # past the end of a sequence there is nothing to see
                padding = on_cpu(run.weights.flags)[..., None]
                values = {letter: np.where(padding, np.nan, a) for letter, a in values.items()}
            calls.append(values)
            outputs.append((y, tuple(state[0 if run.reverse else -1] for state in (y, *others))))
        return outputs

    with torch.no_grad():
        record(layer, recorder, x, hx)
    endings = tuple(getattr(layer, "_suffixes", [""]))
    several = len(endings) > 1
    rows = getattr(x, "unsorted_indices", None)
    recorded = {}
    for ending, values in zip(endings, calls, strict=True):
        for letter, whole in values.items():
            recorded[letter + ending * several] = whole if rows is None else whole[:, rows.cpu().numpy()]
    return Inspection(cell, endings if several else ("",), recorded)


@cache
def activated(cell: Cell) -> Graph:
    """The cell graph, with the states after and each gate's activation as its outputs."""
    graph = step_graph(cell).pruned()
    graph.outputs = graph.outputs[0], tuple(activation(graph, g) for g in range(cell.G))
    return graph


def run_recorded(name: str, run: Run, heads: int) -> dict[str, np.ndarray]:
    """Run the reference -> every gate and state of every time step, by letter: [T, B, H]."""
    problem = validate(name, [run], Options(heads=heads), training=False)
    zeros, cell = zero_states(problem, [run]), problem.cell
    if set(cell.flags) - {HOLD} or cell.uniforms or cell.recurrent_input:
        raise ValueError(
            f"inspect supports cells, their variants and lengths, but no other modifiers; got {cell.label}"
        )
    x, weights, state, reverse = with_zeros([run], zeros, partial(arrays.zeros, like=run.x))[0]
    weights, state = Weights(*map(on_cpu, weights)), tuple(map(on_cpu, state))
    steps = reference.run_heads(cell, activated(cell), on_cpu(x), weights, state, reverse, heads)
    columns = zip(*((*gates, *states) for states, gates in steps))
    return {letter: np.stack(column) for letter, column in zip(cell.gates + cell.states, columns)}


def on_cpu(array: Any) -> Any:
    """Any array as NumPy's, wherever it lives. None stays None."""
    if array is None:
        return None
    if arrays.library(array) == "cupy":
        return array.get()
    return to_numpy(array.cpu() if arrays.library(array) == "torch" else array)
