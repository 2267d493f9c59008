"""Look before and look inside: `explain` says where a problem would run and how, `warmup` compiles what it needs there,
`inspect` shows what happens in the cell."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from itertools import groupby
from os import PathLike
from typing import Any

import numpy as np

from gpu_rnn.kernels.cells import Cell, activation, get, step_graph
from gpu_rnn.kernels.trace import Graph
from gpu_rnn.kernels.weave import HOLD

from . import arrays, cudnn, dispatch, reference
from .arguments import ShapeError, check_flags, check_words, checked
from .compat import installed, no_gpu, require
from .dispatch import Explanation
from .functional import PROJECTED, elman, gru, lstm, named, rnn
from .problem import Memory, Options, Problem, Weights

FUNCTIONS = (lstm, gru, rnn)

# ---- where it runs --------------------------------------------------------------------------------------------------


class Explanations(tuple[Explanation, ...]):
    """One Explanation for each direction of each layer, in torch's order; prints equal ones once.

    saved: bytes that a call of the whole layer keeps for backward beside its input, its parameters and given states,
    as saved-tensor hooks count them: those of the parts, and what is between them (outputs of both directions as one
    input, padded and cast copies, masks); without dropout between layers. 0 in inference.
    """

    saved = 0

    def __str__(self) -> str:
        lines = [text for text, _ in groupby(str(replace(each, memory=None)) for each in self)]
        known = [each.memory for each in self if each.memory is not None]
        if known:
            memory = replace(self[0], memory=Memory(self.saved, *map(max, [*zip(*known)][1:]))).memory_in_words()
            lines.append(f"memory{' of the largest part' if len(self) > 1 else ''}: {memory}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    what: str | Callable,
    x: Any = None,
    *,
    T: int | None = None,
    B: int | None = None,
    I: int | None = None,
    H: int | None = None,
    P: int | None = None,
    input_projection: bool = False,
    dtype: Any = None,
    device: Any = None,
    library: str | None = None,
    training: bool | None = None,
    backend: str | None = None,
) -> Explanation | Explanations:
    """Explain which backend runs a call and how, why not the others, and which cuDNN algorithm torch.nn would use.

        print(gpu_rnn.explain("lstm", T=256, B=64, I=512, H=512, dtype="float16", training=True))
        print(gpu_rnn.explain(layer, x))

    Nothing is computed. The attributes: `backend` (None: no backend supports the call), `plan`, `reasons`, `cudnn`, and
    `memory`, the bytes of a call: `memory.saved` for backward (y included), and the most that is allocated at once,
    `memory.forward` in forward and `memory.backward` in backward, gradients included.

    Args:
        what: "lstm", "gru", "rnn_tanh" or "rnn_relu"; one of the functions gpu_rnn.lstm, gru, rnn; or a layer.
        x: the input or its shape, [T, B, I]; for a layer whatever it takes, also a PackedSequence.
        T, B, I: instead of x. H, P: hidden and projected size. A layer knows them.
        input_projection: whether x is the input projection, [T, B, G*H], as with w_ih=None; excludes I.
        dtype, device, library: those of x or the layer, if given; else float32, this machine's GPU if it has one, torch
            if it is installed.
        training: whether the backward pass is included. None: for a layer what autograd would say now, otherwise no.
        backend: selects one, as for `gpu_rnn.lstm`.

    Returns:
        An Explanation; for a layer Explanations, a tuple of one for each direction of each of its layers, with the
        bytes that all of it keeps for backward as `saved`.

    Raises:
        ShapeError: a size that isn't a positive whole number, or that doesn't fit. TypeError: a size is missing or
        given twice. ValueError: unknown cell, dtype, device, library or backend.
    """
    check_words(backend=backend, library=library)
    check_flags(input_projection=input_projection, training=bool(training) if training is None else training)
    given = {"T": T, "B": B, "I": I, "H": H, "P": P, "dtype": dtype, "device": device, "library": library}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(what, str) and what not in FUNCTIONS:
        if x is None or given:
            superfluous = f"; got {', '.join(given)} too" if given else ""
            raise TypeError(f"explain(layer, x) takes the input or its shape and no other sizes{superfluous}")
        return explain_layer(what, x, training, backend)
    cell = named_cell(what)
    if x is not None:
        shape, found = size_and_kind(x)
        if len(shape) != 3:
            raise ShapeError(f"x has shape {list(shape)}; expected [T, B, I]")
        found |= dict(zip("TBI", shape))
        if input_projection:
            found["H"], rest = divmod(found.pop("I"), cell.G)
            if rest:
                raise ShapeError(f"x has shape {list(shape)}; expected an input projection [T, B, {cell.G}*H]")
        if twice := found.keys() & given.keys():
            raise TypeError(f"x already has {', '.join(sorted(twice))}")
        given |= found
    if input_projection and I is not None:
        raise TypeError(f"input_projection=True excludes I; got I = {I}")
    if absent := [letter for letter in "TBIH" if letter not in given and not (letter == "I" and input_projection)]:
        raise TypeError(f"explaining {cell.label} takes the sizes T, B, I and H; missing: {', '.join(absent)}")
    return dispatch.explain(problem(cell, **given, training=bool(training)), backend)


def named_cell(what: str | Callable) -> Cell:
    return get(elman("tanh") if what in (rnn, "rnn") else what if isinstance(what, str) else what.__name__)


def explain_layer(layer: Any, x: Any, training: bool | None, backend: str | None) -> Explanations:
    layer, packed = as_ours(layer), hasattr(x, "batch_sizes")
    largest, beside = problems_of(layer, x, training)
    if hasattr(layer, "num_layers"):
        directions = 1 + layer.bidirectional
        algorithm = cudnn.algorithm(largest[0], layers=layer.num_layers, directions=directions, packed=packed)
    else:
        algorithm = "none: torch.nn's cells don't use cuDNN"
    found = [dispatch.explain(problem, backend or layer.backend) for problem in largest]
    if layer.recompute:
        found = [replace(each, memory=recomputed(each, backend or layer.backend)) for each in found]
    explanations = Explanations(replace(explanation, cudnn=algorithm) for explanation in found)
    if any(problem.training for problem in largest):
        explanations.saved = beside + sum(explanation.memory.saved for explanation in found if explanation.memory)
    return explanations


def recomputed(explanation: Explanation, backend: str | None) -> Memory | None:
    """What a call takes that keeps nothing, and on its way back goes forward once more."""
    problem, memory = explanation.problem, explanation.memory
    if memory is None or not problem.training:
        return memory
    inference = dispatch.explain(replace(problem, training=False), backend).memory
    return inference and inference._replace(backward=memory.forward + memory.backward)


def warmup(
    what: str | Callable, *, T: int = 1, B: int = 1, I: int | None = None, H: int | None = None, P: int | None = None,
    dtype: Any = None, device: Any = None, training: bool = False, backend: str | None = None,
) -> list[str]:  # fmt: skip
    """Compile the kernels that calls of a layer, a cell or a function will need.

        gpu_rnn.warmup(layer, T=128, B=16, training=True)
        gpu_rnn.warmup(gpu_rnn.lstm, T=128, B=16, I=64, H=512, dtype=torch.bfloat16)

    Before the capture of a CUDA graph, run the layer once besides: cuBLAS, whose products are part of it, makes its
    handle and workspace in its first call on a stream.

    Args:
        what: a layer or cell, torch.nn's are taken for ours; or a name or function, as for `explain`.
        T, B: of the calls to come. A cell has no T. The kernels may be others for other sizes; `explain` tells.
        I, H, P, dtype, device: of a function's arrays, torch tensors. A layer knows them, and under autocast its dtype.
        training: whether the backward pass is included. backend: selects one, as for `gpu_rnn.lstm`.

    Returns:
        A line for each problem for which something was compiled, with the backend and its kernels; empty on a CPU,
        where NumPy compiles nothing. Raises as `explain`, and BackendError where nothing can run.
    """
    check_words(backend=backend)
    check_flags(training=training)
    given = {"I": I, "H": H, "P": P, "dtype": dtype, "device": device}
    given = {name: value for name, value in given.items() if value is not None}
    torch = require("torch", "gpu_rnn.warmup")
    if isinstance(what, str) or what in FUNCTIONS:
        if absent := [letter for letter in "IH" if letter not in given]:
            raise TypeError(f"warming up {what!r} takes the sizes T, B, I and H; missing: {', '.join(absent)}")
        asked = [problem(named_cell(what), T=T, B=B, **given, library="torch", training=training)]
        where = torch.device(device or asked[0].device)
    else:
        if given:
            raise TypeError(f"a layer knows {', '.join(given)}; warmup(layer, T=..., B=..., training=...)")
        layer = as_ours(what)
        whole = hasattr(layer, "num_layers")
        shape = (B, T) if whole and layer.batch_first else (T, B) if whole else (B,)
        asked, _ = problems_of(layer, (*shape, layer.input_size), training)
        where, backend = next(layer.parameters()).device, backend or layer.backend
    lines: dict[str, None] = {}  # as a set that keeps its order: both directions have the same
    with torch.cuda.device(where if where.type == "cuda" else -1):
        for each in dict.fromkeys(asked):
            chosen = dispatch.choose(each, backend)
            if kernels := chosen.warmup(each):
                lines[f"{each}: {chosen.NAME}, {', '.join(kernels)}"] = None
    return list(lines)


def problems_of(layer: Any, x: Any, training: bool | None) -> tuple[list[Problem], int]:
    """What a layer's own forward asks for, for each direction of each of its layers: for packed input, the largest.

    -> and the bytes of what it makes for these calls and keeps: their inputs, as far as they aren't the caller's or
    the outputs of another, and what torch saves between them
    """
    packed = hasattr(x, "batch_sizes")
    from torch.autograd.graph import saved_tensors_hooks

    from .derivatives import tracked

    made: dict[int, Any] = {}  # storages, by identity
    others: set[int] = set()  # of the caller's, and of outputs

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        made[storage._cdata] = storage
        return tensor

    def run(name: str, x: Any, weights: Weights, initial: Sequence, options: Options) -> tuple:
        wanted = tracked(x, *weights, *initial) if training is None else training
        asked, state = checked(name, x, weights, initial, options, wanted)
        for tensor in (x, *weights, *state):
            if tensor is not None:
                keep(tensor)
        y = keep(x.new_empty((asked.T, asked.B, asked.P or asked.H), requires_grad=wanted))
        others.add(y.untyped_storage()._cdata)
        return asked, y, state

    if isinstance(x, (tuple, list)) and not packed:
        for size in x:
            check_size("x", size, f" in its shape {list(x)}")
        x = next(layer.parameters()).new_empty(x)
    held = x.data if packed else x.values() if getattr(x, "is_nested", False) else x
    others |= {tensor.untyped_storage()._cdata for tensor in (held, *layer.parameters())}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        problems = list(driven(layer, run, x, None).values())
    return problems, sum(storage.nbytes() for key, storage in made.items() if key not in others)


def size_and_kind(x: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Of an array or a shape."""
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    return tuple(x.shape), {"library": arrays.library(x), "dtype": arrays.dtype(x), "device": arrays.device(x)}


def problem(
    cell: Cell, *, T: int, B: int, I: int | None = None, H: int, P: int | None = None, dtype: Any = "float32",
    device: Any = None, library: str | None = None, training: bool, reverse: bool = False,
) -> Problem:  # fmt: skip
    """A Problem, with its sizes and words checked."""
    given = zip("TBIHP", (T, B, I, H, P))
    sizes = {letter: check_size(letter, size) for letter, size in given if size is not None}
    T, B, H, I, P = sizes["T"], sizes["B"], sizes["H"], sizes.get("I"), sizes.get("P")
    if P is not None and P >= H:
        raise ShapeError(f"P = {P}, H = {H}; a projection needs P < H")
    if P is not None and cell.name == "gru":
        cell = get(PROJECTED)
    dtype = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")  # "float32", np.float32, torch.float32
    device = str(device or ("cpu" if no_gpu() else "cuda")).partition(":")[0]
    library = library or ("torch" if installed("torch") else "numpy" if device == "cpu" else "cupy")
    check_words(library=library)
    known = {"dtype": (dtype, arrays.DTYPES), "device": (device, ("cpu", "cuda"))}
    for name, (word, words) in (known | {"library": (library, ("numpy", "torch", "cupy"))}).items():
        if word not in words:
            raise ValueError(f"{name}: {word!r} is none of {', '.join(words)}")
    if (library, device) in (("numpy", "cuda"), ("cupy", "cpu")):
        raise ValueError(f"{library} has no arrays on {device}")
    follows = (library, device, dtype) == ("torch", "cuda", "float32")
    tf32 = follows and arrays.torch_precision() == "tf32"
    return Problem(cell, T, B, I, H, P, dtype, device, library, training, reverse, tf32)


def check_size(name: str, size: Any, where: str = "") -> int:
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ShapeError(f"{name} has the size {size!r}{where}; sizes are whole numbers, 1 or larger")
    return int(size)  # NumPy's may be small


# ---- what happens inside --------------------------------------------------------------------------------------------

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
        self,
        path: str | PathLike | None = None,
        row: int = 0,
        units: int | Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
    ) -> Any:
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
        args, kwargs: `hx` for a layer; weights, biases, states and `reverse` for a function.

    Returns:
        An Inspection: NumPy arrays, always time first, in the dtype of x (float32 for half precision).

    Raises:
        ShapeError, TypeError: as `gpu_rnn.lstm`. A layer's dropout is left out, as in evaluation.
    """
    if what in FUNCTIONS:
        return inspect_function(what, x, *args, **kwargs)
    return inspect_layer(what, x, *args, **kwargs)


def inspect_function(function: Callable, *args: Any, **kwargs: Any) -> Inspection:
    bound = signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    cell = get(named(function, given))
    weights = Weights(*(given.get(field) for field in Weights._fields))
    initial = [given[letter + "0"] for letter in cell.states]
    return Inspection(cell, ("",), record(cell.name, given["x"], weights, initial, given["reverse"]))


def inspect_layer(layer: Any, x: Any, hx: Any = None) -> Inspection:
    """The layer's own forward drives the page: through packed rows, stacks and directions."""
    torch = require("torch", "looking inside a layer")
    layer = as_ours(layer)
    cell = get(layer.cell_name)

    def run(name: str, x: Any, weights: Weights, initial: list, options: Options) -> tuple:
        recorded = record(name, x, weights, initial, options.reverse)
        y, *others = (torch.from_numpy(recorded[letter]).to(x) for letter in cell.states)
        if weights.flags is not None:  # past a row's end there is nothing to see
            recorded = {letter: np.where(on_cpu(weights.flags)[..., None], np.nan, a) for letter, a in recorded.items()}
        return recorded, y, tuple(state[0 if options.reverse else -1] for state in (y, *others))

    with torch.no_grad():
        calls = driven(layer, run, x, hx)
    several = len(calls) > 1
    rows = getattr(x, "unsorted_indices", None)
    recorded = {}
    for ending, piece in calls.items():
        for letter, whole in piece.items():
            recorded[letter + ending * several] = whole if rows is None else whole[:, rows.cpu().numpy()]
    return Inspection(cell, tuple(calls) if several else ("",), recorded)


def as_ours(layer: Any) -> Any:
    """A copy of a layer, on the same parameters, as gpu_rnn's layer even if it is torch.nn's. TypeError for others."""
    torch = require("torch", "looking at a layer")
    from .conversion import OURS, counterpart, is_wrapped, replace_
    from .recurrent import Recurrent

    if not isinstance(layer, Recurrent) and not (isinstance(layer, torch.nn.Module) and counterpart(layer, OURS)):
        raise TypeError(f"expected a recurrent layer or a function of gpu_rnn, or a layer of torch.nn; got {layer!r}")
    if is_wrapped(layer):
        raise TypeError(f"{layer!r} has a forward of its own, assigned to the instance, which can't be looked into")
    return replace_(shallow(layer))


def shallow(module: Any) -> Any:
    """A copy of a torch.nn.Module on the same parameters. copy.copy refuses one that is parametrized."""
    own = object.__new__(type(module))
    own.__dict__ |= vars(module)
    return own


def driven(layer: Any, run: Callable, x: Any, hx: Any) -> dict[str, Any]:
    """Call a layer with `run` in the place of its way down, without dropout.

    `run` takes what `autograd.sequence` takes, for one layer and direction, and gives a note, y and the last states.
    -> the notes by the ending of the parameters' names
    """
    notes = []

    def noting(name: str, directions: Sequence, options: Options) -> list[tuple]:
        results = []
        for *given, reverse in directions:
            note, *result = run(name, *given, options._replace(reverse=reverse, directions=len(directions)))
            notes.append(note)
            results.append(result)
        return results

    def no(*given: Any) -> None:
        return None

    layer.__dict__ |= {"_sequences": noting, "_stacked": no, "_again": no, "training": False}
    layer(x, hx)
    return dict(zip(getattr(layer, "_suffixes", [""]), notes, strict=True))


@cache
def activated(cell: Cell) -> Graph:
    """The page, with the states after and each gate's activation as its outputs."""
    graph = step_graph(cell).pruned()
    graph.outputs = graph.outputs[0], tuple(activation(graph, g) for g in range(cell.G))
    return graph


def record(name: str, x: Any, weights: Weights, initial: Sequence, reverse: bool) -> dict[str, np.ndarray]:
    """Every gate and state of every time step of one layer in one direction: x [T, B, I] -> letter: [T, B, H]."""
    _, state = checked(name, x, weights, initial, Options(reverse), training=False)
    cell = get(name)
    if set(cell.flags) - {HOLD} or cell.uniforms or cell.operand:
        raise ValueError(
            f"inspect supports cells, their variants and lengths, but no other modifiers; got {get(name).label}"
        )
    weights, state = Weights(*map(on_cpu, weights)), tuple(map(on_cpu, state))
    steps = reference.run(cell, activated(cell), on_cpu(x), weights, state, reverse)
    columns = zip(*((*gates, *states) for states, gates in steps))
    return {letter: np.stack(column) for letter, column in zip(cell.gates + cell.states, columns)}


def on_cpu(array: Any) -> Any:
    """Any array as NumPy's, wherever it lives. None stays None."""
    if array is None:
        return None
    if arrays.library(array) == "cupy":
        return array.get()
    return arrays.to_numpy(array.cpu() if arrays.library(array) == "torch" else array)
