"""The modifiers of a call: the modified cell (`gpu_rnn.kernels.modifiers`) and the arrays that it takes.

    reset       x[t] is the first of an episode: the states that enter it, in reverse those that enter the time step
                before it, are the reset state
    lengths     outside of left_padding[b] <= t < lengths[b] a sequence holds its states: sequences of unequal lengths
    recurrent_dropout
                of h before the recurrent matmul, or of the candidate, one mask for a whole sequence
    zoneout     of each state, one mask for a time step
    peephole, coupled, cell_clip
                variants of the LSTM
    reset_after of the GRU; whether its reset gate comes after the recurrent matmul
    layer_norm  the input projection, the recurrent projection and the LSTM's cell state are normalized (`layer_norm`)

Masks are functions of the seed and of where they are used (`gpu_rnn.kernels.philox`): a seed gives the same masks on
every backend. Everything here is computed on whole arrays before and after the sequence; torch differentiates it by
itself, and for other arrays `ModifiedCall.vjp` does.
"""

import numbers
from collections.abc import Sequence
from operator import eq
from typing import Any, NamedTuple

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.philox import uniforms

from ..core import arrays
from ..core.problem import Modifiers, Weights
from ..core.validation import ShapeError, check_heads, shape
from .layer_norm import Norm

NO_MODIFIERS = Modifiers()
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
MASK = 0xFFFFFFFF  # the time step of masks that hold for a whole sequence; sequences are shorter


class ModifiedCall(NamedTuple):
    """A call whose modifiers are in its cell and arrays, and the way back from its results."""

    name: str
    x: Any
    weights: Weights
    valid: Any  # [T, B, 1], or None
    sources: dict[str, Any]  # the arrays that `weights.units` is made of, by argument; several are tuples, or a Norm

    def mask_outputs(self, y: Any) -> Any:
        """Outputs [T, B, .], zero where a sequence holds its states."""
        return y if self.valid is None else arrays.operations(y)["where"](self.valid, y, 0.0)

    def unpack(self, y: Any, after: Sequence[Any], S: int, history: bool) -> tuple[Any, ...]:
        """y, the S states after; with a history also the states after every time step, the first a copy of y.

        A caller who writes to one result changes no other.
        """
        y, last = self.mask_outputs(y), tuple(after[:S])
        return (y, last, (arrays.copied(y), *map(self.mask_outputs, after[S:]))) if history else (y, last)

    def vjp(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """The gradients of x and of the caller's arrays, from those of the modified call."""
        own = {label: gradient for label, gradient in gradients.items() if label not in ("units", "flags", "seed")}
        row = 0
        for label, source in self.sources.items():
            if isinstance(source, Norm):
                rows = len(source.units())
                own |= source.vjp(own, gradients["units"][row : row + rows])
                row += rows
                continue
            parts = []
            for array in source if isinstance(source, tuple) else (source,):
                rows = array.shape[0] // gradients["units"].shape[2] if label in ("peephole", "units") else 1
                parts.append(unbroadcast_grad(gradients["units"][row : row + rows], array))
                row += rows
            own[label] = tuple(parts) if isinstance(source, tuple) else parts[0]
        if "x" in own:
            own["x"] = self.mask_outputs(own["x"])
        return own


class CellInfo(NamedTuple):
    """The facts of a cell that the modifiers need."""

    name: str
    G: int
    gates: str
    states: str
    per_unit_params: tuple[str, ...]
    norm_groups: tuple[str, ...]
    uniforms: int

    def __str__(self) -> str:
        S = len(self.states)
        return f"{cells.label(self.name)} has {S} state{'s' * (S > 1)} ({', '.join(self.states)})"


def cell_info(name: str, **options: Any) -> CellInfo:
    """Of a cell with modifiers. torch.compile takes it for a constant (`custom_ops`)."""
    cell = apply_modifiers(cells.get(name), **options)
    return CellInfo(cell.name, cell.G, cell.gates, cell.states, cell.per_unit_params, cell.norm_groups, cell.uniforms)


def apply(name: str, x: Any, weights: Weights, modifiers: Modifiers, reverse: bool, heads: int = 1) -> ModifiedCall:
    """Apply the modifiers of a call to its cell and arrays. Errors repeat the shapes.

    Masks and all that is per unit are those of the H units of all heads together.
    """
    if modifiers is NO_MODIFIERS:
        return ModifiedCall(name, x, weights, None, {})
    m = modifiers
    ranks = [len(getattr(array, "shape", ())) for array in (x, weights.w_hh)]
    if ranks != [3, 2] or all(value is default for value, default in zip(m, NO_MODIFIERS)):
        return ModifiedCall(name, x, weights, None, {})  # arrays without sizes to go by are refused like any call's
    check_choices(m.recurrent_dropout_on, m.layer_norm_over)
    T, B, _ = x.shape
    variants = {"coupled": m.coupled, "before": not m.reset_after}
    options: dict[str, Any] = {word: True for word, requested in variants.items() if requested}
    if m.cell_clip is not None:
        check_positive("cell_clip", m.cell_clip)
        options["clip"] = (arrays.constant(float(m.cell_clip), like=x),)
    if m.peephole is not None:
        options["peephole"] = True
    cell = cell_info(name, **options)
    rows, P = arrays.sizes(weights.w_hh)
    H = rows // cell.G
    check_heads(heads, H, weights.w_hr is not None, f", with w_hh {[rows, P]}")
    P = H if heads > 1 else P
    valid = None
    if m.lengths is not None or m.left_padding is not None:
        valid = valid_mask(m.left_padding, m.lengths, x)[..., None]
        x = arrays.operations(x)["where"](valid, x, 0.0)

    sources: dict[str, Any] = {}
    units: list[Any] = []
    for label, own in {"peephole": m.peephole, "units": m.units}.items():
        if own is not None:
            check_array(label, own, [(len(cell.per_unit_params) * H,)], x, arrays.dtype(x))
            sources[label] = own
            units += arrays.unstack(own.reshape(len(cell.per_unit_params), 1, H), len(cell.per_unit_params))
    if m.layer_norm is not None:
        options["norm"] = True
        check_norm_over(m.layer_norm_over, heads)
        sources["layer_norm"] = norm = make_norm(cell_info(name, **options), x, weights, m.layer_norm, heads)
        x, weights = norm.input_projection(), norm.weights_of_call()
        units += norm.units()
    flags = None
    if m.reset is not None:
        check_array("reset", m.reset, [(T, B)], x, "bool")
        options["reset"], flags = True, pack_flag(reset_before(m.reset, valid, reverse), 0)
    if m.reset_state is not None:
        if m.reset is None:
            raise ValueError("reset_state is given, but reset, which marks the time steps that take it, is None")
        several = isinstance(m.reset_state, (tuple, list))
        states = tuple(m.reset_state) if several else (m.reset_state,)
        if len(states) != len(cell.states):
            raise ValueError(f"reset_state has {len(states)} arrays, but {cell}")
        options["reset_state"], sources["reset_state"] = True, states if several else states[0]
        units += [
            broadcast_to_units(f"reset_state {letter}", array, (B, P if k == 0 else H), H, x)
            for k, (letter, array) in enumerate(zip(cell.states, states))
        ]
    if valid is not None:
        # A program for elsewhere takes the lengths themselves: there may be an operator for them
        lengths_alone = m.left_padding is None and m.reset is None and arrays.is_exporting(x)
        hold = m.lengths if lengths_alone else pack_flag(~valid[..., 0], len(options.keys() & {"reset"}))
        options["hold"], flags = True, hold if flags is None else flags | hold
    seed = None
    check_probability("recurrent_dropout", m.recurrent_dropout)
    if m.training and m.recurrent_dropout:
        seed = as_seed(m.seed, x, "recurrent dropout")
        of_h = m.recurrent_dropout_on == "h"
        options["dropout" if of_h else "candidate"] = True
        units.append(pad_units(dropout_mask(seed, m.recurrent_dropout, (B, P if of_h else H), x), H))
    zoneout = m.zoneout if isinstance(m.zoneout, tuple) else (m.zoneout,) * len(cell.states)
    if len(zoneout) != len(cell.states):
        raise ValueError(f"zoneout has {len(zoneout)} probabilities, {zoneout}, but {cell}")
    for p in zoneout:
        check_probability("zoneout", p)
    if zoneout[0] and P != H:
        raise ValueError(f"zoneout of h is not defined for an h that is projected from H = {H} to P = {P}; pass (0, p)")
    if any(zoneout):
        options["zoneout"] = tuple(arrays.constant(float(p), like=x) for p in zoneout)
        options["mean"] = not m.training
        if m.training:
            seed = as_seed(m.seed, x, "zoneout")
    modified = cell_info(name, **options)
    stacked = stack_per_unit(units) if units else None
    weights = weights._replace(units=stacked, flags=flags, seed=seed if modified.uniforms else None)
    return ModifiedCall(modified.name, x, weights, valid, sources)


# ---- flags ----------------------------------------------------------------------------------------------------------


def pack_flag(flag: Any, bit: int) -> Any:
    """A flag [T, B] in its bit."""
    return arrays.astype(flag != 0, "uint8") << bit


def reset_before(reset: Any, valid: Any, reverse: bool) -> Any:
    """[T, B], true at the time steps that the reset state enters: the first one of an episode, in reverse the last.

    Which is known where another episode follows: the last time step of x is entered by the first states in reverse.
    """
    if not reverse:
        return reset
    if valid is not None:  # an episode that begins in the padding doesn't end the one before it
        reset = reset & valid[..., 0]
    return arrays.concatenate([reset[1:], arrays.zeros((1, reset.shape[1]), like=reset)], 0)


def held_flags(lengths: Any, x: Any) -> Any:
    """The flags [T, B] of a cell that holds its states from lengths [B] on, and has no other flag."""
    return pack_flag(~valid_mask(None, lengths, x), 0)


def valid_mask(left_padding: Any, lengths: Any, x: Any) -> Any:
    """[T, B], true from the start of a sequence to its end."""
    T, B, _ = x.shape
    t, valid = arrays.arange(T, like=x)[:, None], None
    for label, bound in (("left_padding", left_padding), ("lengths", lengths)):
        if bound is not None:
            check_bound(label, bound, (B,), T, x)
            inside = t >= bound[None] if label == "left_padding" else t < bound[None]
            valid = inside if valid is None else valid & inside
    return valid


def check_bound(label: str, bound: Any, sizes: tuple[int, ...], T: int, x: Any) -> None:
    """Raise for what isn't integers of these sizes, and on a CPU for what isn't in [0, T].

    Reading a GPU's would wait for it. There what is less than 0 or more than T counts as that.
    """
    check_array(label, bound, [sizes], x, *INTEGERS)
    if arrays.device(bound) != "cpu":
        return
    if not arrays.is_readable(bound):
        arrays.assert_async(((bound >= 0) & (bound <= T)).all(), f"{label} must be in [0, T]")
    elif 0 not in sizes and not 0 <= int(bound.min()) <= int(bound.max()) <= T:
        raise ShapeError(f"{label} is {bound.tolist()}; expected integers in [0, T] = [0, {T}], with x {shape(x)}")


# ---- layer normalization --------------------------------------------------------------------------------------------


def make_norm(cell: CellInfo, x: Any, weights: Weights, gains: Any, heads: int) -> Norm:
    """The normalization of a call, all of whose arrays are checked, since they are used up before it."""
    rows, sizes = arrays.sizes(weights.w_hh)[0], tuple(x.shape)
    others = [name for name in cell.per_unit_params if name in ("c_gain", "c_bias")]
    labels = "of the input projection", "of the recurrent projection", *(name.replace("_", "'s ") for name in others)
    if not isinstance(gains, (tuple, list)) or len(gains) != len(labels):
        actual = f"{len(gains)} arrays" if isinstance(gains, (tuple, list)) else type(gains).__name__
        raise ValueError(f"layer_norm must be {len(labels)} arrays ({', '.join(labels)}), got {actual}")
    for label, array, size in zip(labels, gains, [rows, rows, *[rows // cell.G] * len(others)]):
        if array is not None or label != "c's bias":
            check_array(f"layer_norm {label}", array, [(size,)], x, arrays.dtype(x))
    if weights.w_ih is None and sizes[2] != rows:
        expected = f"[T, B, {cell.G}*H] = {[*sizes[:2], rows]}"
        raise ShapeError(f"x has shape {list(sizes)}; expected {expected}, with w_ih None")
    for label, size in {"w_ih": (rows, sizes[2]), "b_ih": (rows,), "b_hh": (rows,)}.items():
        if (array := getattr(weights, label)) is not None:
            check_array(label, array, [size], x, arrays.dtype(x))
    return Norm.of(x, weights, tuple(gains), cell.gates, cell.norm_groups, cell.per_unit_params, heads)


# ---- values per unit ------------------------------------------------------------------------------------------------


def broadcast_to_units(label: str, array: Any, sizes: tuple[int, int], H: int, x: Any) -> Any:
    """[B, N], [1, N] or [N] -> [R, H], the last units zero."""
    B, N = sizes
    check_array(label, array, [(B, N), (N,), (1, N)], x, arrays.dtype(x))
    return pad_units(array.reshape(-1, N), H)


def unbroadcast_grad(gradient: Any, array: Any) -> Any:
    """The gradient [n, R, H] of `broadcast_to_units`, or of n * H values in a row -> in the shape of the array."""
    if array.ndim == 1 and array.shape[0] == len(gradient) * gradient.shape[2]:
        return gradient.sum(1).reshape(array.shape)
    rows = gradient[0, :, : array.shape[-1]]
    return rows if tuple(rows.shape) == tuple(array.shape) else rows.sum(0).reshape(array.shape)


def pad_units(array: Any, H: int) -> Any:
    """[R, N] -> [R, H]."""
    N = arrays.sizes(array)[1]
    return array if N == H else arrays.concatenate([array, arrays.zeros((array.shape[0], H - N), like=array)], 1)


def stack_per_unit(units: Sequence[Any]) -> Any:
    """Arrays [R, H] -> [n, R, H], each repeated if one isn't the same for the whole batch, be it empty."""
    return arrays.stack(arrays.broadcast(units), 0)


# ---- masks ----------------------------------------------------------------------------------------------------------


def as_seed(seed: Any, x: Any, what: str) -> Any:
    """[1] int64 where x is."""
    if seed is None:
        raise ValueError(f"{what} draws random masks and needs seed=: an int, or an int64 array [1] on the device of x")
    if isinstance(seed, numbers.Integral):
        if not -(2**63) <= int(seed) < 2**63:
            raise ValueError(f"seed must be an int of 64 bits, got {seed}")
        return arrays.int64_scalar(int(seed), like=x)
    check_array("seed", seed, [(1,)], x, "int64")
    return seed


def dropout_mask(seed: Any, p: float, sizes: tuple[int, int], x: Any, which: int = 0) -> Any:
    """[rows, columns]: 0 with probability p, else 1 / (1 - p). Masks that differ in `which` are independent."""
    row, column = (arrays.arange(n, like=x) for n in sizes)
    (u,) = uniforms(seed, 0 * seed + (MASK - which), row[:, None], column[None], 1)
    scale = 1 / (1 - p) if p < 1 else 0.0
    return arrays.astype(u >= p, arrays.dtype(x)) * scale


# ---- checks ----------------------------------------------------------------------------------------------------------


@arrays.unrecorded
def check_array(label: str, array: Any, shapes: Sequence[tuple[int, ...]], x: Any, *dtypes: str) -> None:
    """Raise unless the array is on the device of x and has one of the shapes and one of the dtypes."""
    expected = f"{' or '.join(dtypes)} of {arrays.library(x)} {arrays.device(x)}"
    if not hasattr(array, "dtype"):
        raise TypeError(f"{label} must be an array, {expected}; got {type(array).__name__}")
    kind = arrays.library(array, label), arrays.dtype(array), arrays.device(array)
    if (kind[0], kind[2]) != (arrays.library(x), arrays.device(x)) or kind[1] not in dtypes:
        raise TypeError(f"{label} is {' '.join(kind)}; with this x it must be {expected}")
    if not any(len(array.shape) == len(sizes) and all(map(eq, array.shape, sizes)) for sizes in shapes):
        expected = " or ".join(str(list(sizes)) for sizes in shapes)
        raise ShapeError(f"{label} has shape {shape(array)}; expected {expected}, with x {shape(x)}")


def check_norm_over(what: str, heads: int) -> None:
    if heads > 1 and what == "units":
        raise ValueError(
            f"layer_norm over all units is not defined for num_heads={heads}, since heads don't see each other; "
            "layer_norm_over='head' normalizes each head by itself"
        )


def check_positive(label: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not float(number) > 0:
        raise ValueError(f"{label} must be a number larger than 0, got {number!r}")


def check_choices(recurrent_dropout_on: Any, layer_norm_over: Any) -> None:
    for label, what, choices in (
        ("recurrent_dropout_on", recurrent_dropout_on, ("h", "candidate")),
        ("layer_norm_over", layer_norm_over, ("units", "head")),
    ):
        if not isinstance(what, str) or what not in choices:
            raise ValueError(f"{label} must be {' or '.join(map(repr, choices))}, got {what!r}")


def check_probability(label: str, p: Any) -> None:
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) <= 1:
        raise ValueError(f"{label} must be a number in [0, 1], a probability; got {p!r}")
