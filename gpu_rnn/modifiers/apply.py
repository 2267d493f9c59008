"""The modifiers of a call: the modified cell (`gpu_rnn.kernels.modifiers`) and the arrays that it takes.

    reset       x[t] is the first of an episode: the states that enter it, in reverse those that enter the time step
                before it, are the reset state
    lengths     outside of left_padding[b] <= t < lengths[b] a row holds its states: sequences of unequal lengths
    recurrent_dropout
                of what the recurrent weights see, or of what is written into the state, one mask for a sequence
    zoneout     of each state, one mask for an instant
    peephole, coupled, cell_clip
                variants of the LSTM
    reset_after of the GRU; whether its reset gate comes after the recurrent product
    layer_norm  the input part, the recurrent part and the LSTM's cell state are normalized (`normed`)

Masks are functions of the seed and of where they are used (`gpu_rnn.kernels.philox`): a seed gives the same masks on
every backend. Everything here is made of whole arrays before and after the sequence; torch differentiates it by itself,
and for other arrays `Applied.pulled` does.
"""

import numbers
from collections.abc import Sequence
from operator import eq
from typing import Any, NamedTuple

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import weave
from gpu_rnn.kernels.philox import uniforms

from ..core import arrays
from ..core.problem import Around, Weights
from ..core.validation import ShapeError, shape
from .layer_norm import Norm

PLAIN = Around()
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
MASK = 0xFFFFFFFF  # the instant of masks that hold for a whole sequence; sequences are shorter


class Applied(NamedTuple):
    """A call without anything around its cell, and the way back from its results."""

    name: str
    x: Any
    weights: Weights
    valid: Any  # [T, B, 1], or None
    parts: dict[
        str, Any
    ]  # the given arrays that `weights.units` is made of, by argument; several are tuples, or a Norm

    def shown(self, y: Any) -> Any:
        """Outputs [T, B, .], zero where a row holds its states."""
        return y if self.valid is None else arrays.operations(y)["where"](self.valid, y, 0.0)

    def results(self, y: Any, after: Sequence[Any], S: int, history: bool) -> tuple[Any, ...]:
        """y, the S states after; with a history also the states after every time step, the first a copy of y.

        A caller who writes to one result changes no other.
        """
        y, last = self.shown(y), tuple(after[:S])
        return (y, last, (arrays.copied(y), *map(self.shown, after[S:]))) if history else (y, last)

    def pulled(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """The gradients of x and of the given arrays, from those of what is called."""
        found = {label: gradient for label, gradient in gradients.items() if label not in ("units", "flags", "seed")}
        row = 0
        for label, given in self.parts.items():
            if isinstance(given, Norm):
                rows = len(given.units())
                found |= given.pulled(found, gradients["units"][row : row + rows])
                row += rows
                continue
            many = given if isinstance(given, tuple) else (given,)
            pulled = []
            for array in many:
                rows = array.shape[0] // gradients["units"].shape[2] if label in ("peephole", "units") else 1
                pulled.append(unspread(gradients["units"][row : row + rows], array))
                row += rows
            found[label] = tuple(pulled) if isinstance(given, tuple) else pulled[0]
        if "x" in found:
            found["x"] = self.shown(found["x"])
        return found


class Page(NamedTuple):
    """What has to be known of a cell here."""

    name: str
    G: int
    gates: str
    states: str
    units: tuple[str, ...]
    together: tuple[str, ...]
    uniforms: int

    def __str__(self) -> str:
        S = len(self.states)
        return f"{cells.label(self.name)} has {S} state{'s' * (S > 1)} ({', '.join(self.states)})"


def page(name: str, **options: Any) -> Page:
    """Of a cell with what is woven in. torch.compile takes it for a constant (`autograd`)."""
    cell = weave(cells.get(name), **options)
    return Page(cell.name, cell.G, cell.gates, cell.states, cell.units, cell.together, cell.uniforms)


def apply(name: str, x: Any, weights: Weights, around: Around, reverse: bool) -> Applied:
    """Errors repeat the shapes. An `around` that asks for nothing costs nothing."""
    if around is PLAIN:
        return Applied(name, x, weights, None, {})
    ranks = [len(getattr(array, "shape", ())) for array in (x, weights.w_hh)]
    if ranks != [3, 2] or all(given is default for given, default in zip(around, PLAIN)):
        return Applied(name, x, weights, None, {})  # arrays without sizes to go by are refused like any call's
    T, B, _ = x.shape
    variants = {"coupled": around.coupled, "before": not around.reset_after}
    options: dict[str, Any] = {word: True for word, asked in variants.items() if asked}
    if around.cell_clip is not None:
        positive("cell_clip", around.cell_clip)
        options["clip"] = (arrays.constant(float(around.cell_clip), like=x),)
    if around.peephole is not None:
        options["peephole"] = True
    cell = page(name, **options)
    rows, P = arrays.sizes(weights.w_hh)
    H = rows // cell.G
    valid = None
    if around.lengths is not None or around.left_padding is not None:
        valid = within(around.left_padding, around.lengths, x)[..., None]
        x = arrays.operations(x)["where"](valid, x, 0.0)

    parts: dict[str, Any] = {}
    units: list[Any] = []
    for label, own in {"peephole": around.peephole, "units": around.units}.items():
        if own is not None:
            fitting(label, own, [(len(cell.units) * H,)], x, arrays.dtype(x))
            parts[label] = own
            units += list(own.reshape(len(cell.units), 1, H))
    if around.layer_norm is not None:
        options["norm"] = True
        parts["layer_norm"] = norm = normalizing(page(name, **options), x, weights, around.layer_norm)
        x, weights = norm.part(), norm.called()
        units += norm.units()
    flags = None
    if around.reset is not None:
        fitting("reset", around.reset, [(T, B)], x, "bool")
        options["reset"], flags = True, raised(entering(around.reset, valid, reverse), 0)
    if around.reset_state is not None:
        if around.reset is None:
            raise ValueError("reset_state is given, but reset, which marks the time steps that take it, is None")
        several = isinstance(around.reset_state, (tuple, list))
        given = tuple(around.reset_state) if several else (around.reset_state,)
        if len(given) != len(cell.states):
            raise ValueError(f"reset_state has {len(given)} arrays, but {cell}")
        options["given"], parts["reset_state"] = True, given if several else given[0]
        units += [
            spread(f"reset_state {letter}", array, (B, P if k == 0 else H), H, x)
            for k, (letter, array) in enumerate(zip(cell.states, given))
        ]
    if valid is not None:
        # A program for elsewhere is told the lengths themselves: there may be an operator that takes them
        alone = around.left_padding is None and around.reset is None and arrays.exporting(x)
        hold = around.lengths if alone else raised(~valid[..., 0], len(options.keys() & {"reset"}))
        options["hold"], flags = True, hold if flags is None else flags | hold
    seed = None
    probability("recurrent_dropout", around.recurrent_dropout)
    checked_place("recurrent_dropout_on", around.recurrent_dropout_on)
    if around.training and around.recurrent_dropout:
        seed = seeded(around.seed, x, "recurrent dropout")
        of_h = around.recurrent_dropout_on == "h"
        options["dropout" if of_h else "candidate"] = True
        units.append(padded(dropout_mask(seed, around.recurrent_dropout, (B, P if of_h else H), x), H))
    zoneout = around.zoneout if isinstance(around.zoneout, tuple) else (around.zoneout,) * len(cell.states)
    if len(zoneout) != len(cell.states):
        raise ValueError(f"zoneout has {len(zoneout)} probabilities, {zoneout}, but {cell}")
    for p in zoneout:
        probability("zoneout", p)
    if zoneout[0] and P != H:
        raise ValueError(f"zoneout of h is not defined for an h that is projected from H = {H} to P = {P}; pass (0, p)")
    if any(zoneout):
        options["zoneout"] = tuple(arrays.constant(float(p), like=x) for p in zoneout)
        options["mean"] = not around.training
        if around.training:
            seed = seeded(around.seed, x, "zoneout")
    woven = page(name, **options)
    stacked = together(units) if units else None
    weights = weights._replace(units=stacked, flags=flags, seed=seed if woven.uniforms else None)
    return Applied(woven.name, x, weights, valid, parts)


# ---- flags ----------------------------------------------------------------------------------------------------------


def raised(flag: Any, bit: int) -> Any:
    """A flag [T, B] in its bit."""
    return arrays.converted(flag != 0, "uint8") << bit


def entering(reset: Any, valid: Any, reverse: bool) -> Any:
    """[T, B], true at the time steps that the reset state enters: the first one of an episode, in reverse the last.

    Which is known where another episode follows: the last time step of x is entered by the first states in reverse.
    """
    if not reverse:
        return reset
    if valid is not None:  # an episode that begins in the padding doesn't end the one before it
        reset = reset & valid[..., 0]
    return arrays.concatenate([reset[1:], arrays.zeros((1, reset.shape[1]), like=reset)], 0)


def held(lengths: Any, x: Any) -> Any:
    """The flags [T, B] of a cell that holds its states from lengths [B] on, and has no other flag."""
    return raised(~within(None, lengths, x), 0)


def within(left_padding: Any, lengths: Any, x: Any) -> Any:
    """[T, B], true from a row's start to its end."""
    T, B, _ = x.shape
    t, valid = arrays.counted(T, like=x)[:, None], None
    for label, bound in (("left_padding", left_padding), ("lengths", lengths)):
        if bound is not None:
            check_bound(label, bound, (B,), T, x)
            inside = t >= bound[None] if label == "left_padding" else t < bound[None]
            valid = inside if valid is None else valid & inside
    return valid


def check_bound(label: str, bound: Any, sizes: tuple[int, ...], T: int, x: Any) -> None:
    """An error for what isn't integers of these sizes, and on a CPU for what isn't in [0, T].

    A look at a GPU's would wait for it. There what is less than 0 or more than T counts as that.
    """
    fitting(label, bound, [sizes], x, *INTEGERS)
    if arrays.device(bound) != "cpu":
        return
    if not arrays.readable(bound):
        arrays.ensured(((bound >= 0) & (bound <= T)).all(), f"{label} must be in [0, T]")
    elif 0 not in sizes and not 0 <= int(bound.min()) <= int(bound.max()) <= T:
        raise ShapeError(f"{label} is {bound.tolist()}; expected integers in [0, T] = [0, {T}], with x {shape(x)}")


# ---- layer normalization --------------------------------------------------------------------------------------------


def normalizing(cell: Page, x: Any, weights: Weights, given: Any) -> Norm:
    """Every array that is used up before the call fits."""
    rows, sizes = arrays.sizes(weights.w_hh)[0], tuple(x.shape)
    others = [name for name in cell.units if name in ("c_gain", "c_bias")]
    labels = "of the input projection", "of the recurrent projection", *(name.replace("_", "'s ") for name in others)
    if not isinstance(given, (tuple, list)) or len(given) != len(labels):
        found = f"{len(given)} arrays" if isinstance(given, (tuple, list)) else type(given).__name__
        raise ValueError(f"layer_norm must be {len(labels)} arrays ({', '.join(labels)}), got {found}")
    for label, array, size in zip(labels, given, [rows, rows, *[rows // cell.G] * len(others)]):
        if array is not None or label != "c's bias":
            fitting(f"layer_norm {label}", array, [(size,)], x, arrays.dtype(x))
    if weights.w_ih is None and sizes[2] != rows:
        expected = f"[T, B, {cell.G}*H] = {[*sizes[:2], rows]}"
        raise ShapeError(f"x has shape {list(sizes)}; expected {expected}, with w_ih None")
    for label, size in {"w_ih": (rows, sizes[2]), "b_ih": (rows,), "b_hh": (rows,)}.items():
        if (array := getattr(weights, label)) is not None:
            fitting(label, array, [size], x, arrays.dtype(x))
    return Norm.of(x, weights, tuple(given), cell.gates, cell.together, cell.units)


# ---- values per unit ------------------------------------------------------------------------------------------------


def spread(label: str, array: Any, sizes: tuple[int, int], H: int, x: Any) -> Any:
    """[B, N], [1, N] or [N] -> [R, H], the last units zero."""
    B, N = sizes
    fitting(label, array, [(B, N), (N,), (1, N)], x, arrays.dtype(x))
    return padded(array.reshape(-1, N), H)


def unspread(gradient: Any, array: Any) -> Any:
    """The gradient [n, R, H] of what was spread, or of n * H values in a row -> in the shape of the array."""
    if array.ndim == 1 and array.shape[0] == len(gradient) * gradient.shape[2]:
        return gradient.sum(1).reshape(array.shape)
    found = gradient[0, :, : array.shape[-1]]
    return found if tuple(found.shape) == tuple(array.shape) else found.sum(0).reshape(array.shape)


def padded(array: Any, H: int) -> Any:
    """[R, N] -> [R, H]."""
    R, N = array.shape
    return array if N == H else arrays.concatenate([array, arrays.zeros((R, H - N), like=array)], 1)


def together(units: Sequence[Any]) -> Any:
    """Arrays [R, H] -> [n, R, H], each repeated if there is one that isn't the same for all rows, be there none."""
    R = next((array.shape[0] for array in units if array.shape[0] != 1), 1)
    return arrays.stack([array if array.shape[0] == R else arrays.repeated(array, R) for array in units], 0)


# ---- masks ----------------------------------------------------------------------------------------------------------


def seeded(seed: Any, x: Any, what: str) -> Any:
    """[1] int64 where x is."""
    if seed is None:
        raise ValueError(f"{what} draws random masks and needs seed=: an int, or an int64 array [1] on the device of x")
    if isinstance(seed, numbers.Integral):
        if not -(2**63) <= int(seed) < 2**63:
            raise ValueError(f"seed must be an int of 64 bits, got {seed}")
        return arrays.integer(int(seed), like=x)
    fitting("seed", seed, [(1,)], x, "int64")
    return seed


def dropout_mask(seed: Any, p: float, sizes: tuple[int, int], x: Any, which: int = 0) -> Any:
    """[rows, columns]: 0 with probability p, else 1 / (1 - p). Masks that differ in `which` are independent."""
    row, column = (arrays.counted(n, like=x) for n in sizes)
    (u,) = uniforms(seed, 0 * seed + (MASK - which), row[:, None], column[None], 1)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return arrays.converted(u >= p, arrays.dtype(x)) * scale


# ---- what is given --------------------------------------------------------------------------------------------------


@arrays.unrecorded
def fitting(label: str, array: Any, shapes: Sequence[tuple[int, ...]], x: Any, *dtypes: str) -> None:
    """An error unless the array lies where x does and has one of the shapes and one of the dtypes."""
    wanted = f"{' or '.join(dtypes)} of {arrays.library(x)} {arrays.device(x)}"
    if not hasattr(array, "dtype"):
        raise TypeError(f"{label} must be an array, {wanted}; got {type(array).__name__}")
    kind = arrays.library(array, label), arrays.dtype(array), arrays.device(array)
    if (kind[0], kind[2]) != (arrays.library(x), arrays.device(x)) or kind[1] not in dtypes:
        raise TypeError(f"{label} is {' '.join(kind)}; with this x it must be {wanted}")
    if not any(len(array.shape) == len(sizes) and all(map(eq, array.shape, sizes)) for sizes in shapes):
        expected = " or ".join(str(list(sizes)) for sizes in shapes)
        raise ShapeError(f"{label} has shape {shape(array)}; expected {expected}, with x {shape(x)}")


def positive(label: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not float(number) > 0:
        raise ValueError(f"{label} must be a number larger than 0, got {number!r}")


def checked_place(label: str, what: Any) -> None:
    if not isinstance(what, str) or what not in ("h", "candidate"):
        raise ValueError(f"{label} must be 'h' or 'candidate', got {what!r}")


def probability(label: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) <= 1:
        raise ValueError(f"{label} must be a number in [0, 1], a probability; got {p!r}")
