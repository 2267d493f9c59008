"""Do the arrays of a call fit together? If so, what problem are they."""

from typing import Any

from gpu_rnn.kernels import cells

from . import arrays
from .problem import Problem, Weights


class ShapeError(ValueError, RuntimeError):
    """An array doesn't fit the others. torch.nn raises the one or the other for this, so it is caught as both."""


def checked(
    name: str, x: Any, weights: Weights, initial: dict[str, Any], reverse: bool, training: bool
) -> tuple[Problem, tuple]:
    """Every array fits, or an error that repeats the shapes. -> the problem, and the states with zeros filled in."""
    cell = cells.get(name)
    given = {"x": x, **weights._asdict(), **initial}
    given = {label: array for label, array in given.items() if array is not None}
    for label in ("x", "w_ih", "w_hh"):
        if label not in given:
            raise TypeError(f"{label} is None; {name} needs it")
    kinds = {label: (arrays.library(a), arrays.dtype(a), arrays.device(a)) for label, a in given.items()}
    for label, kind in kinds.items():
        if kind != kinds["x"]:
            raise TypeError(f"{label} is {' '.join(kind)}, but x is {' '.join(kinds['x'])}; all must be alike")
    library, dtype, device = kinds["x"]
    if dtype not in arrays.DTYPES:
        raise TypeError(f"x is {dtype}; there are {', '.join(arrays.DTYPES)}")

    for label, rank in {"x": 3, "w_ih": 2, "w_hh": 2, "w_hr": 2}.items():
        if label in given and len(given[label].shape) != rank:
            raise ShapeError(f"{label} has shape {shape(given[label])}; expected {rank} dimensions")
    T, B, I = x.shape
    G, H = cell.G, hidden_size(cell, weights)
    P = H if weights.w_hr is None else weights.w_hr.shape[0]
    out = "H" if weights.w_hr is None else "P"
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": ("[T, B, I]", (T, B, I)),
        "w_ih": (f"[{G}*H, I]", (G * H, I)),
        "w_hh": (f"[{G}*H, {out}]", (G * H, P)),
        "b_ih": (f"[{G}*H]", (G * H,)),
        "b_hh": (f"[{G}*H]", (G * H,)),
        "w_hr": ("[P, H]", (P, H)),
    }
    h, *others = initial
    expected |= {h: (f"[B, {out}]", (B, P)), **dict.fromkeys(others, ("[B, H]", (B, H)))}
    for label, array in given.items():
        symbols, sizes = expected[label]
        if tuple(array.shape) != sizes:
            raise ShapeError(
                f"{label} has shape {shape(array)}; expected {symbols} = {list(sizes)}, "
                f"with x {shape(x)}, w_ih {shape(weights.w_ih)}, w_hh {shape(weights.w_hh)}"
            )
    if T == 0:
        raise ShapeError(f"the sequence is empty: x has shape {shape(x)}, and T must be larger than 0")
    if weights.w_hr is not None and not 0 < P < H:
        raise ShapeError(f"w_hr has shape {shape(weights.w_hr)}; a projection needs 0 < P < H")
    state = tuple(
        arrays.zeros(expected[label][1], like=x) if array is None else array for label, array in initial.items()
    )
    where = device.partition(":")[0]
    projected = None if weights.w_hr is None else P
    return Problem(cell, T, B, I, H, projected, dtype, where, library, training, reverse), state


def hidden_size(cell: cells.Cell, weights: Weights) -> int:
    rows = weights.w_hh.shape[0]
    if rows == 0 or rows % cell.G:
        raise ShapeError(
            f"w_hh has shape {shape(weights.w_hh)}; a {cell.name} has {cell.G} gates ({', '.join(cell.gates)}), "
            f"so its rows are a positive multiple of {cell.G}"
        )
    return rows // cell.G


def shape(array: Any) -> str:
    return str(list(array.shape))
