"""Heads: a layer whose recurrent weights are block-diagonal (Beck et al. 2024, Pöppel et al. 2024).

The H units of every gate are N heads of D = H / N, those of head n from n*D on, and R [G*H, D] has for every unit its
row of the block of its head. So a head is a layer of D units by itself: of the same x, with its rows of W, R and the
biases, its part of the states, and a seed of its own. Here a run becomes those of its heads, and what they give is put
together again; a backend knows nothing of heads. On arrays of any library; torch differentiates it.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from . import arrays
from .problem import Run, Weights

GOLDEN = 0x9E3779B97F4A7C15  # between the seeds of neighbouring heads, modulo 2^64: the golden ratio's bits


def split(array: Any, N: int, G: int = 1, axis: int = -1) -> list[Any]:
    """An array with G*H entries along an axis -> for each head that with its G*D, contiguous; one copy in all."""
    if array is None:
        return [None] * N
    shape, axis = tuple(array.shape), axis % len(array.shape)
    D = shape[axis] // (G * N)
    apart = array.reshape(*shape[:axis], G, N, D, *shape[axis + 1 :])
    first = arrays.module(arrays.library(array)).moveaxis(apart, axis + 1, 0)
    return arrays.unstack(first.reshape(N, *shape[:axis], G * D, *shape[axis + 1 :]), N)


def join(parts: Sequence[Any], G: int = 1, axis: int = -1) -> Any:
    """The inverse of `split`."""
    shape, axis = tuple(parts[0].shape), axis % len(parts[0].shape)
    if G == 1:
        return arrays.concatenate(parts, axis)
    lead, rest, D = shape[:axis], shape[axis + 1 :], shape[axis] // G
    apart = arrays.stack([part.reshape(*lead, G, D, *rest) for part in parts], axis + 1)
    return apart.reshape(*lead, prod((len(parts), G, D)), *rest)


def int64(value: int) -> int:
    """A whole number modulo 2^64, as a signed one."""
    return (value + 2**63) % 2**64 - 2**63


def seeds(seed: Any, N: int) -> list[Any]:
    """Of each head, [1] as that of all."""
    return [seed + int64(n * GOLDEN) for n in range(N)]


def split_run(run: Run, N: int, G: int) -> list[Run]:
    """The runs of the heads of a run."""
    x, (w_ih, w_hh, b_ih, b_hh, _, units, flags, seed), state, reverse = run
    xs = [x] * N if w_ih is not None else split(x, N, G)
    own_seeds = [None] * N if seed is None else seeds(seed, N)
    rows = [split(array, N, G, axis=0) for array in (w_ih, w_hh, b_ih, b_hh)]
    states, units = [split(initial, N) for initial in state], split(units, N)
    runs = []
    for n in range(N):
        w_ih, w_hh, b_ih, b_hh = (array[n] for array in rows)
        weights = Weights(w_ih, w_hh, b_ih, b_hh, None, units[n], flags, own_seeds[n])
        runs.append(Run(xs[n], weights, [initial[n] for initial in states], reverse))
    return runs
