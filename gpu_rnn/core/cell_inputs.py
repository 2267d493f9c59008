"""What a cell's page takes beside x, h and states (`gpu_rnn.kernels.cells`), as arrays of any library."""

from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.philox import uniforms

from . import arrays
from .problem import Weights


class Extra(NamedTuple):
    """None where the page takes none."""

    units: Any  # [N, R, H] in the dtype of computing; R = B, or 1 where all rows have the same
    flags: Any  # [T, B] uint8, bit k is flag k
    seed: Any  # [1] int64

    @classmethod
    def of(cls, weights: Weights) -> "Extra":
        units = weights.units
        if units is not None:
            units = arrays.converted(units, arrays.real_dtype(units))
        return cls(units, weights.flags, weights.seed)

    @property
    def rows(self) -> int:
        return 1 if self.units is None else self.units.shape[1]

    def at(self, cell: Cell, t: Any, P: int) -> list[Any]:
        """All but random numbers, for P units: at an instant [.., P] or [B, 1], or at several, `t` being a slice."""
        found = [] if self.units is None else [self.units[n, :, :P] for n in range(len(self.units))]
        return found + [(self.flags[t] >> k & 1)[..., None] for k in range(len(cell.flags))]

    def drawn(self, cell: Cell, t: int, B: int, H: int) -> list[Any]:
        """The random numbers of an instant, [B, H] each."""
        if not cell.uniforms:
            return []
        row, unit = (arrays.counted(n, like=self.seed) for n in (B, H))
        return uniforms(self.seed, 0 * self.seed + t, row[:, None], unit[None], cell.uniforms)
