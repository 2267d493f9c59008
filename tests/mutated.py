"""Damage to files: seeded mutations, and what reading one may cost."""

import time
import tracemalloc
from pathlib import Path

import numpy as np

SECONDS, MEMORY = 5.0, 256 << 20  # of one file of some KB


def mutations(data: bytes, count: int, seed: int):
    """The bytes with some changed, cut, doubled, or replaced by others; numbers grow huge and negative, too."""
    rng = np.random.default_rng(seed)
    extremes = [b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f", b"\x01" + b"\x00" * 7]
    for _ in range(count):
        mutated = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            if not mutated:
                break
            at, n = int(rng.integers(len(mutated))), int(rng.integers(1, 9))
            match rng.integers(6):
                case 0:
                    mutated[at] ^= 1 << int(rng.integers(8))
                case 1:
                    mutated[at : at + n] = rng.bytes(n)
                case 2:
                    mutated[at : at + n] = extremes[rng.integers(len(extremes))][:n]
                case 3:
                    del mutated[at : at + n]
                case 4:
                    mutated[at:at] = mutated[at : at + 8 * n]
                case 5 if rng.random() < 0.3:
                    del mutated[at:]
        yield bytes(mutated)


def read_mutated(read, data: bytes, path: Path, count: int, seed: int) -> int:
    """Read every mutation: it is read, or an error names the file; in bounded time and memory. How many were read."""
    survived = 0
    tracemalloc.start()
    try:
        for k, mutated in enumerate(mutations(data, count, seed)):
            path.write_bytes(mutated)
            tracemalloc.reset_peak()
            start, before = time.monotonic(), tracemalloc.get_traced_memory()[0]
            error: Exception | None = None
            try:
                read(path)
                survived += 1
            except (ValueError, NotImplementedError, TypeError) as raised:
                error = raised
            named = "must be one of float16" if isinstance(error, TypeError) else path.name
            assert error is None or named in str(error), f"mutation {k} of seed {seed}: {error!r}"
            assert time.monotonic() - start < SECONDS, f"mutation {k} of seed {seed}"
            assert tracemalloc.get_traced_memory()[1] - before < MEMORY, f"mutation {k} of seed {seed}"
    finally:
        tracemalloc.stop()
    return survived
