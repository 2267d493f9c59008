"""Instruction sets for the native kernels: how wide a vector is, how many registers there are, what a compiler is told.

The tile of a product follows from the number of registers (sequence.cpp): of 32, 24 hold sums, 6 rows x 4 gates of an
LSTM; of 16, 12 do, 3 rows x 4 gates. The others hold an input for each row and a weight, or the other way round.
"""

from typing import NamedTuple


class ISA(NamedTuple):
    name: str
    bytes: int  # of a vector
    registers: int
    flags: tuple[str, ...]  # of GCC and Clang
    features: frozenset[str]  # that the CPU must have, as /proc/cpuinfo spells them

    def lanes(self, dtype: str) -> int:
        return self.bytes // (8 if dtype == "float64" else 4)

    def tile(self, gates: int) -> str:
        """Rows and vectors of a full tile, as sequence.cpp has them."""
        sums, columns = (24 if self.registers == 32 else 12), min(gates, 4)
        rows, blocks = (sums // columns, 1) if columns >= 3 else (sums // 4, 4 // columns)
        return f"{rows} rows x {columns * blocks} vectors"


AVX512_FEATURES = ("avx512f", "avx512dq", "avx512bw", "avx512vl")
AVX512 = ISA("avx512", 64, 32, tuple(f"-m{name}" for name in AVX512_FEATURES), frozenset(AVX512_FEATURES))
AVX2 = ISA("avx2", 32, 16, ("-mavx2", "-mfma"), frozenset(("avx2", "fma")))
NEON = ISA("neon", 16, 32, (), frozenset(("asimd",)))
PLAIN = ISA("plain", 16, 16, (), frozenset())  # what every compiler makes of vectors of 16 bytes
TABLE = (AVX512, AVX2, NEON, PLAIN)  # widest first


def best(features: frozenset[str]) -> ISA:
    """The widest that a CPU with these features has."""
    return next(isa for isa in TABLE if isa.features <= features)
