"""A stack of recurrent layers as NumPy arrays: what the weights of other frameworks pass through on their way."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers

from ..core.optional_imports import require
from ..core.problem import Weights
from ..core.validation import ShapeError, shape

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
VARIANTS = ("coupled", "peephole", "reset_after")  # keywords that both sides have a form for
DTYPES = ("float16", "float32", "float64")
UNSEEN = {  # keywords of layers that a format for inference needn't know
    "backend", "precision", "recompute", "recurrent_dropout", "recurrent_dropout_on", "input_dropout", "weight_dropout",
    "forget_bias", "layer_norm_over",
}  # fmt: skip
EXPANSION, SLACK = 32, 64 << 20  # bytes that a file may take in memory, for each of its own and in any case


class DtypeError(TypeError):
    """Weights are of a dtype that isn't exchanged."""


class Budget:
    """How many bytes may be read from a file. Weights hardly shrink, so a file that expands more is no honest one."""

    def __init__(self, size: int, slack: int = SLACK) -> None:
        self.left = slack
        self.extend(size)

    def extend(self, size: int) -> None:
        self.left += EXPANSION * size

    def take(self, size: int, what: str) -> None:
        """ValueError where it is too much."""
        self.left -= size
        if self.left < 0:
            raise ValueError(f"{what} takes {size} bytes; the whole may take {EXPANSION} for each of the file's")


@contextmanager
def reading(path: str | None, form: str) -> Iterator[None]:
    """Errors say which file they are about, and all that damage to it can cause are ValueErrors.

    Raises OSError where there is no such file.
    """
    if path is not None:
        with open(path, "rb"):
            pass
    try:
        yield
    except Exception as error:
        if path is None or isinstance(error, ImportError) or (path in str(error) and type(error) is ValueError):
            raise
        if isinstance(error, (ShapeError, DtypeError, NotImplementedError)):
            raise type(error)(f"{path}: {error}") from error
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} can't be read as {form}: {kind}{error}") from error


@dataclass(frozen=True)
class Stack:
    """L layers in D directions, in torch's layout and gate order. It needs no torch to run:

        (forward,), = stack.weights                       # one layer, one direction
        y, (hT, cT) = gpu_rnn.lstm(x, *forward[:4], reverse=stack.reverse)  # coupled=stack.coupled, peephole=...
        y, hT = gpu_rnn.gru(x, *forward[:4], reverse=stack.reverse, reset_after=stack.reset_after)

    Raises ShapeError where a layer doesn't fit the one below it, DtypeError for dtypes that NumPy doesn't have.
    """

    cell: str  # one of CELLS, perhaps "lstm+coupled", "lstm+peephole", "lstm+coupled+peephole" or "gru+before"
    weights: tuple[tuple[Weights, ...], ...]  # [L][D], forward before reverse; peepholes are their units, [N, 1, H]
    reverse: bool = False  # D = 1, from the last time step to the first
    batch_first: bool = False  # of input and output where they come from
    hx: Any = None  # constant initial states, as a layer's hx: h0 or (h0, c0), [L*D, B, H]; B = 1 where all rows agree

    def __post_init__(self) -> None:
        below = self.I
        for k, directions in enumerate(self.weights):
            for w in directions:
                dtypes = {array.dtype.name for array in w if array is not None}
                if dtypes != {self.dtype.name} or self.dtype.name not in DTYPES:
                    raise DtypeError(
                        f"layer {k} has {', '.join(sorted(dtypes))}; all must be one of {', '.join(DTYPES)}"
                    )
                if w.w_ih.shape[1] != below or w.w_hh.shape[1] != self.H or len(directions) != self.D:
                    raise ShapeError(
                        f"layer {k}, of {len(directions)} directions, has input weights {shape(w.w_ih)} and recurrent "
                        f"weights {shape(w.w_hh)}; expected {self.D} directions, [G*H, {below}] and [G*H, {self.H}]"
                    )
            below = self.D * self.H

    I = property(lambda self: self.weights[0][0].w_ih.shape[1])
    H = property(lambda self: self.weights[0][0].w_hh.shape[1])
    L = property(lambda self: len(self.weights))
    D = property(lambda self: len(self.weights[0]))
    dtype = property(lambda self: self.weights[0][0].w_ih.dtype)
    cell_name = property(lambda self: self.cell.partition("+")[0])
    gates = property(lambda self: cells.get(self.cell).gates)
    coupled = property(lambda self: "+coupled" in self.cell)
    peephole = property(lambda self: "+peephole" in self.cell)
    reset_after = property(lambda self: "+before" not in self.cell)

    @property
    def direction(self) -> str:
        return "bidirectional" if self.D == 2 else "reverse" if self.reverse else "forward"

    @classmethod
    def of(cls, layer: Any) -> "Stack":
        """The weights of gpu_rnn.RNN, LSTM or GRU; a stack as it is."""
        if isinstance(layer, cls):
            return layer
        torch = require("torch", "saving a layer")
        from ..nn.base import Recurrent
        from ..nn.layers import RecurrentLayer

        if not isinstance(layer, RecurrentLayer):
            raise TypeError(
                f"expected gpu_rnn.RNN, LSTM or GRU, or a stack of weights, got {type(layer).__name__}; "
                "gpu_rnn.replace_ makes the first of torch.nn's"
            )
        if layer._cell not in CELLS:
            raise NotImplementedError(f"{layer}: only {', '.join(CELLS)} are exchanged, not {layer._cell}")
        computing = layer.keywords.__annotations__.keys() - UNSEEN - set(VARIANTS)
        if beyond := [name for name in sorted(computing) if getattr(layer, name) != getattr(Recurrent, name)]:
            raise NotImplementedError(
                f"{layer} has {', '.join(beyond)}, which counts in inference too and which other formats don't have"
            )
        if any(weight.dtype == torch.bfloat16 for weight in layer.parameters()):
            raise TypeError(f"{layer} has bfloat16 weights, which NumPy lacks; save layer.float()")
        units = []
        for suffix in layer._suffixes:
            weights = layer._weights(suffix)
            for (peephole,) in layer._per_unit_params(suffix).values():
                weights = weights._replace(units=peephole.reshape(-1, 1, layer.hidden_size))
            units.append(Weights(*(None if w is None else w.detach().cpu().numpy() for w in weights)))
        if more := [shape(w.w_hr) for w in units if w.w_hr is not None]:
            raise NotImplementedError(f"{layer} has weights {', '.join(more)} besides W, R and b, as of a projection")
        variant = {"coupled": layer.coupled, "peephole": layer.peephole, "before": not layer.reset_after}
        D, cell = layer._directions, apply_modifiers(cells.get(layer._cell), **variant)
        stacked = tuple(tuple(units[k : k + D]) for k in range(0, len(units), D))
        return cls(cell.name, stacked, batch_first=layer.batch_first)

    def module(self) -> Any:
        """The weights as gpu_rnn.RNN, LSTM or GRU on the CPU. torch's random state is not touched.

        Warns where there are constant initial states: a layer has none, they go into its call.
        """
        torch = require("torch", "making a layer")
        from ..nn import base, layers

        if self.reverse:
            raise NotImplementedError(
                f"{self.cell} with weights {shape(self.weights[0][0].w_ih)} in reverse alone is no layer; "
                "take weights() instead of load(), and the function of gpu_rnn with reverse=True"
            )
        if self.hx is not None:
            made = "tuple(map(torch.tensor, hx))" if isinstance(self.hx, tuple) else "torch.tensor(hx)"
            sizes = shape(self.hx[0] if isinstance(self.hx, tuple) else self.hx)
            warnings.warn(
                f"the model starts from constant initial states {sizes}, which a layer does not hold: take hx from "
                f"weights(), make it {made}, expand it to [L*D, B, H] and call layer(x, hx)",
                stacklevel=3,
            )
        kind, _, nonlinearity = self.cell_name.partition("_")
        options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
        keywords = {"LSTM": VARIANTS[:2], "GRU": VARIANTS[2:]}.get(kind.upper(), ())
        options |= {name: getattr(self, name) for name in keywords}
        bias = any(w.b_ih is not None for directions in self.weights for w in directions)
        layer = getattr(layers, kind.upper())(
            self.I, self.H, self.L, bias=bias, batch_first=self.batch_first, bidirectional=self.D == 2,
            device="meta", **options,
        )  # fmt: skip
        none = np.zeros(len(self.gates) * self.H, self.dtype)
        units = [w for directions in self.weights for w in directions]
        state = {
            name + suffix: torch.tensor(none if array is None else array, device="cpu")
            for suffix, w in zip(layer._suffixes, units, strict=True)
            for name, array in zip(base.PARAM_NAMES[: 4 if bias else 2], w)
        }
        if self.peephole:
            for suffix, w in zip(layer._suffixes, units):
                state[base.PEEPHOLE + suffix] = torch.tensor(w.units.ravel(), device="cpu")
        layer.load_state_dict(state, strict=True, assign=True)
        return layer


def reordered(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """The blocks of H rows, one for each gate, for other gates: [G*H, ...] -> the same with another G, a copy.

    Of a gate that `source` lacks there are zeros.
    """
    blocks = array.reshape(len(source), -1, *array.shape[1:])
    made = [blocks[source.index(gate)] if gate in source else np.zeros_like(blocks[0]) for gate in target]
    return np.concatenate(made)


def chosen(
    layers: dict[str, Any], name: str | Iterable[str] | None, sequence: list[str], where: object,
    refused: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the layers of the name or names; for None, all of them where `sequence` says in which order it is a stack.

    Of a name "a/b/c" the end is enough where no other has the same. `refused` says why others can't be taken.
    """
    reasons = "".join(f"; {other!r} is {why}" for other, why in (refused or {}).items())
    listing = (", ".join(layers) or "none") + reasons
    if name is None:
        if not sequence:
            raise ValueError(
                f"{where} has no single recurrent layer or stack of them; name one of what it has, or several from the "
                f"bottom up: {listing}"
            )
        names = sequence
    else:
        names = []
        for requested in [name] if isinstance(name, str) else list(name):
            matches = [each for each in layers if each.endswith(f"/{requested}")]
            if requested not in layers and len(matches) != 1:
                why = f"several recurrent layers {requested!r}" if matches else f"no recurrent layer {requested!r}"
                raise ValueError(f"{where} has {why}; it has: {listing}")
            names.append(requested if requested in layers else matches[0])
        if not names:
            raise ValueError(f"no name was given; {where} has: {listing}")
    return {each: layers[each] for each in names}
