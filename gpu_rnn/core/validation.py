"""Do the arrays of a call fit together? If so, what problem are they?"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gpu_rnn.kernels import cells

from . import arrays
from .arrays import Described
from .problem import Options, Problem, Weights

PRECISIONS = ("tf32", "ieee")
INTEGERS = {"flags": "uint8", "seed": "int64"}


class ShapeError(ValueError, RuntimeError):
    """A shape does not match the others. Both a ValueError and a RuntimeError, since torch.nn raises either."""


def checked(
    name: str, x: Any, weights: Weights, state: Sequence[Any], options: Options, training: bool
) -> tuple[Problem, tuple]:
    """Every array fits, or an error that repeats the shapes. -> the problem, and the states with zeros filled in."""
    described = arrays.described
    try:
        given = tuple([None if array is None else described(array) for array in (x, *weights, *state)])
    except TypeError:  # said again by the name of the argument, which is looked up here alone
        for label, array in zip(("x", *Weights._fields, *first_states(cells.get(name))), (x, *weights, *state)):
            if array is not None:
                arrays.library(array, label)
        raise
    reverse, _, precision, history, _, directions, layers, step_exact = options
    precision = precision or arrays.precision(x)
    problem = known(name, given, reverse, precision, training, history, directions, layers, step_exact)
    if None in given[-len(state) :]:
        sizes = (problem.P or problem.H, *[problem.H] * (len(state) - 1))
        state = [arrays.zeros((problem.B, n), like=x) if s is None else s for s, n in zip(state, sizes)]
    return problem, tuple(state)


def fitted(
    name: str, given: tuple[Described | None, ...], reverse: bool, precision: str, training: bool,
    history: bool = False, directions: int = 1, layers: int = 1, step_exact: bool = False,
) -> Problem:  # fmt: skip
    """What x, the weights and the states are, in this order -> the problem, or an error that repeats the shapes."""
    cell = cells.get(name)
    labels = ("x", *Weights._fields, *first_states(cell))
    there = {label: array for label, array in zip(labels, given, strict=True) if array is not None}
    for label in ("x", "w_hh"):
        if label not in there:
            raise TypeError(f"{label} is None, but {cell.label} needs it")
    kinds = {label: arrays.words(*array) for label, array in there.items()}
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

    shapes = {label: tuple(array[1]) for label, array in there.items()}
    for label, rank in {"x": 3, "w_ih": 2, "w_hh": 2, "w_hr": 2}.items():
        if label in shapes and len(shapes[label]) != rank:
            raise ShapeError(f"{label} has shape {list(shapes[label])}; expected {rank} dimensions")
    (T, B, size), (rows, _), G = shapes["x"], shapes["w_hh"], cell.G
    if rows == 0 or rows % G:
        raise ShapeError(
            f"w_hh has shape {list(shapes['w_hh'])}; a {cell.label} has {G} gates ({', '.join(cell.gates)}), "
            f"so its rows are a positive multiple of {G}"
        )
    H = rows // G
    P, out = (shapes["w_hr"][0], "P") if "w_hr" in shapes else (H, "H")
    h, *others = first_states(cell)
    N, R = len(cell.units), shapes["units"][1] if len(shapes.get("units", ())) == 3 else 1
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": ("[T, B, I]", (T, B, size)) if "w_ih" in shapes else (f"[T, B, {G}*H]", (T, B, G * H)),
        "w_ih": (f"[{G}*H, I]", (G * H, size)),
        "w_hh": (f"[{G}*H, {out}]", (G * H, P)),
        "b_ih": (f"[{G}*H]", (G * H,)),
        "b_hh": (f"[{G}*H]", (G * H,)),
        "w_hr": ("[P, H]", (P, H)),
        "units": ("[N, 1 or B, H]", (N, 1 if R == 1 else B, H)),
        "flags": ("[T, B]", (T, B)),
        "seed": ("[1]", (1,)),
        h: (f"[B, {out}]", (B, P)),
        **dict.fromkeys(others, ("[B, H]", (B, H))),
    }
    for label, found in shapes.items():
        symbols, sizes = expected[label]
        if found != sizes:
            raise ShapeError(
                f"{label} has shape {list(found)}; expected {symbols} = {list(sizes)}, with x {list(shapes['x'])}, "
                f"w_ih {list(shapes['w_ih']) if 'w_ih' in shapes else None}, w_hh {list(shapes['w_hh'])}"
            )
    if T == 0:
        raise ShapeError(f"the sequence is empty: x has shape {list(shapes['x'])}, and T must be larger than 0")
    if out == "P" and not 0 < P < H:
        raise ShapeError(f"w_hr has shape {list(shapes['w_hr'])}; a projection needs 0 < P < H")
    I = size if "w_ih" in shapes else None
    return Problem(
        cell, T, B, I, H, P if out == "P" else None, dtype, device.partition(":")[0], library, training, reverse,
        tf32=(precision, dtype) == ("tf32", "float32"), history=history, directions=directions,
        layers=layers, step_exact=step_exact,
    )  # fmt: skip


known = lru_cache(maxsize=1024)(fitted)  # most calls are of arrays like those of a call before


def first_states(cell: cells.Cell) -> list[str]:
    """The arguments' names for the states before the first instant."""
    return [letter + "0" for letter in cell.states]


def shape(array: Any) -> str:
    return str(list(array.shape))


def check_flags(**flags: Any) -> None:
    """TypeError unless each is a bool."""
    for name, flag in flags.items():
        if flag is not True and flag is not False and not isinstance(flag, np.bool_):
            raise TypeError(f"{name} must be a bool, got {told(flag)}")


def check_words(**words: Any) -> None:
    """TypeError unless each is a str, or None."""
    for name, word in words.items():
        if word is not None and not isinstance(word, str):
            raise TypeError(f"{name} must be a str or None, got {told(word)}")


def told(value: Any) -> str:
    """A value in an error, of arrays and other large things the type alone."""
    return repr(value) if isinstance(value, (str, bytes, int, float)) else type(value).__name__
