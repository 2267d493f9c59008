"""Random numbers that are a function of where they are used: Philox4x32-10 (Salmon et al. 2011).

Seed, time step, batch row and unit decide a number, so that a seed gives the same masks forward, recomputed and
backward, on every backend: `kernels/cuda/cell_inputs.cuh` and Triton's `tl.philox` have the same function.
"""

from typing import Any

WORD = 0xFFFFFFFF
SCALE = 2.0**-24


def uniforms(seed: Any, t: Any, b: Any, unit: Any, count: int) -> list[Any]:
    """`count` arrays of multiples of 2^-24 in [0, 1), float64 of NumPy and CuPy, of torch float32.

    All arguments are int64 arrays that broadcast against each other: of NumPy, CuPy or torch. Products of two words
    wrap around in int64, with the right bits.
    """
    words: list[Any] = []
    for group in range(-(-count // 4)):
        words += philox(seed & WORD, (seed >> 32) & WORD, [unit, b, t, group + 0 * seed])
    return [(word >> 8) * SCALE for word in words[:count]]


def philox(low: Any, high: Any, counter: list[Any]) -> list[Any]:
    """A key of two words and a counter of four -> four random words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ low, b & WORD, (a >> 32 & WORD) ^ c3 ^ high, a & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]
