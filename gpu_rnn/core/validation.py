"""Do the arrays of a call fit together? If so, what problem are they?"""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells

from . import arrays
from .arrays import Signature
from .problem import Options, Problem, Run, Weights

PRECISIONS = ("tf32", "ieee")
INTEGERS = {"flags": "uint8", "seed": "int64"}


class ShapeError(ValueError, RuntimeError):
    """A shape does not match the others. Both a ValueError and a RuntimeError, since torch.nn raises either."""


def validate(
    name: str, runs: Sequence[Run], options: Options, training: bool, precision: str | None = None, linked: bool = False
) -> Problem:
    """Check that all arrays of a call's runs fit, or raise an error that repeats the shapes -> the problem.

    precision: what `options` leave open. linked: whether the runs are the layers of a stack.
    """
    problem: Problem | None = None
    for run in runs:
        signatures = signatures_of(name, run)
        if problem is not None and linked:
            kind, _, dtype, device = signatures_of(name, runs[0])[0]  # type: ignore[misc]
            signatures[0] = kind, (problem.T, problem.B, problem.P or problem.H), dtype, device
        this = make_problem(
            name, signatures, options, run.reverse, training, precision or arrays.default_precision(runs[0].x)
        )
        problem = problem or this
    assert problem is not None
    n = len(runs)
    return replace(problem, layers=n) if linked else problem if n == 1 else replace(problem, directions=n)


def signatures_of(name: str, run: Run) -> list[Signature | None]:
    """Kind, shape, dtype and device of x, the weights and the states; None for what there isn't."""
    many = run.x, *run.weights, *run.state
    try:
        return [arrays.array_signature(array) for array in many]
    except TypeError:  # said again by the name of the argument, which is looked up here alone
        for label, array in zip(("x", *Weights._fields, *first_states(cells.get(name))), many):
            if array is not None:
                arrays.library(array, label)
        raise


def zero_states(problem: Problem, runs: Sequence[Run]) -> tuple[tuple[tuple[int, int] | None, ...], ...]:
    """The shapes of the states that are missing, for each run; empty where all are there."""
    H = problem.H
    whole = (problem.B, problem.P or H), *[(problem.B, H)] * (problem.cell.S - 1)
    shapes = [tuple([shape if s is None else None for s, shape in zip(run.state, whole)]) for run in runs]
    return tuple(shapes) if any(map(any, shapes)) else ()


def make_problem(
    name: str, signatures: Sequence[Signature | None], options: Options, reverse: bool, training: bool, precision: str
) -> Problem:
    """Make the problem of one run from what x, the weights and the states are, in this order; raise as `validate`."""
    precision = options.precision or precision
    cell = cells.get(name)
    labels = ("x", *Weights._fields, *first_states(cell))
    present = {label: array for label, array in zip(labels, signatures, strict=True) if array is not None}
    for label in ("x", "w_hh"):
        if label not in present:
            raise TypeError(f"{label} is None, but {cell.label} needs it")
    kinds = {label: arrays.kind_to_str(*array) for label, array in present.items()}
    library, dtype, device = kinds["x"]
    for label, kind in kinds.items():
        if label in INTEGERS and kind != (library, INTEGERS[label], device):
            raise TypeError(f"{label} is {' '.join(kind)}; with this x it must be {library} {INTEGERS[label]} {device}")
        if label not in INTEGERS and kind != kinds["x"]:
            raise TypeError(
                f"{label} is {' '.join(kind)}, but x is {' '.join(kinds['x'])}; library, dtype and device must agree"
            )
    if dtype not in arrays.DTYPES:
        raise TypeError(f"x is {dtype}; supported are {', '.join(arrays.DTYPES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if (precision, dtype) == ("tf32", "float64"):
        raise ValueError("precision='tf32' is for float32, but x is float64")

    shapes = {label: tuple(array[1]) for label, array in present.items()}
    for label, rank in {"x": 3, "w_ih": 2, "w_hh": 2, "w_hr": 2}.items():
        if label in shapes and len(shapes[label]) != rank:
            raise ShapeError(f"{label} has shape {list(shapes[label])}; expected {rank} dimensions")
    (T, B, size), (rows, _), G = shapes["x"], shapes["w_hh"], cell.G
    if rows == 0 or rows % G:
        raise ShapeError(
            f"w_hh has shape {list(shapes['w_hh'])}; a {cell.label} has {G} gates ({', '.join(cell.gates)}), "
            f"so its rows are a positive multiple of {G}"
        )
    H, heads = rows // G, options.heads
    check_heads(heads, H, "w_hr" in shapes, f", with w_hh {list(shapes['w_hh'])} and {G} gates")
    P, out = (shapes["w_hr"][0], "P") if "w_hr" in shapes else (H, "H")
    h, *others = first_states(cell)
    N, R = len(cell.per_unit_params), shapes["units"][1] if len(shapes.get("units", ())) == 3 else 1
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": ("[T, B, I]", (T, B, size)) if "w_ih" in shapes else (f"[T, B, {G}*H]", (T, B, G * H)),
        "w_ih": (f"[{G}*H, I]", (G * H, size)),
        "w_hh": (f"[{G}*H, {out}]" if heads == 1 else f"[{G}*H, H/{heads}]", (G * H, P // heads)),
        "b_ih": (f"[{G}*H]", (G * H,)),
        "b_hh": (f"[{G}*H]", (G * H,)),
        "w_hr": ("[P, H]", (P, H)),
        "units": ("[N, 1 or B, H]", (N, 1 if R == 1 else B, H)),
        "flags": ("[T, B]", (T, B)),
        "seed": ("[1]", (1,)),
        h: (f"[B, {out}]", (B, P)),
        **dict.fromkeys(others, ("[B, H]", (B, H))),
    }
    for label, actual in shapes.items():
        symbols, sizes = expected[label]
        if actual != sizes:
            raise ShapeError(
                f"{label} has shape {list(actual)}; expected {symbols} = {list(sizes)}, with x {list(shapes['x'])}, "
                f"w_ih {list(shapes['w_ih']) if 'w_ih' in shapes else None}, w_hh {list(shapes['w_hh'])}"
            )
    if T == 0:
        raise ShapeError(f"the sequence is empty: x has shape {list(shapes['x'])}, and T must be larger than 0")
    if out == "P" and not 0 < P < H:
        raise ShapeError(f"w_hr has shape {list(shapes['w_hr'])}; a projection needs 0 < P < H")
    I = size if "w_ih" in shapes else None
    return Problem(
        cell, T, B, I, H, P if out == "P" else None, dtype, device.partition(":")[0], library, training, reverse,
        tf32=(precision, dtype) == ("tf32", "float32"), history=options.history, step_exact=options.step_exact,
        heads=heads,
    )  # fmt: skip


def check_heads(heads: int, H: int, projected: Any = False, where: str = "") -> None:
    """ShapeError unless H units are so many heads, which have no projection together."""
    if H % heads:
        raise ShapeError(f"num_heads={heads} doesn't divide the hidden size H = {H}{where}")
    if heads > 1 and projected:
        raise ShapeError(f"num_heads={heads} is not defined with a projection (w_hr, proj_size) of all units{where}")


def first_states(cell: cells.Cell) -> list[str]:
    """The arguments' names for the states before the first time step."""
    return [letter + "0" for letter in cell.states]


def shape(array: Any) -> str:
    return str(list(array.shape))


def check_flags(**flags: Any) -> None:
    """TypeError unless each is a bool."""
    for name, flag in flags.items():
        if flag is not True and flag is not False and not isinstance(flag, np.bool_):
            raise TypeError(f"{name} must be a bool, got {describe_value(flag)}")


def as_count(name: str, value: Any) -> int:
    """A whole number larger than 0 as an int, also NumPy's; or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {describe_value(value)}")
    if value < 1:
        raise ValueError(f"{name} must be larger than 0, got {value}")
    return int(value)


def check_words(**words: Any) -> None:
    """TypeError unless each is a str, or None."""
    for name, word in words.items():
        if word is not None and not isinstance(word, str):
            raise TypeError(f"{name} must be a str or None, got {describe_value(word)}")


def describe_value(value: Any) -> str:
    """A value in an error, of arrays and other large things the type alone."""
    return repr(value) if isinstance(value, (str, bytes, int, float)) else type(value).__name__
