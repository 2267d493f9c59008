"""The auxiliary inputs of a cell (`gpu_rnn.kernels.cells`), besides x, h and states, as arrays of any library."""

from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.philox import uniforms

from . import arrays
from .problem import Weights


class AuxInputs(NamedTuple):
    """None where the cell has none."""

    units: Any = None  # [N, R, H] per-unit parameters in the dtype of computing; R = B, or 1 for the whole batch
    flags: Any = None  # [T, B] uint8, bit k is flag k
    seed: Any = None  # [1] int64

    @classmethod
    def of(cls, weights: Weights) -> "AuxInputs":
        units = weights.units
        if units is not None:
            units = arrays.astype(units, arrays.real_dtype(units))
        return cls(units, weights.flags, weights.seed)

    def at(self, cell: Cell, t: Any, P: int) -> list[Any]:
        """All but random numbers, for P units: at a time step [.., P] or [B, 1], or at several, `t` being a slice."""
        values = [] if self.units is None else [self.units[n, :, :P] for n in range(len(self.units))]
        return values + [(self.flags[t] >> k & 1)[..., None] for k in range(len(cell.flags))]

    def uniforms_at(self, cell: Cell, t: int, B: int, H: int) -> list[Any]:
        """The random numbers of a time step, [B, H] each."""
        if not cell.uniforms:
            return []
        row, unit = (arrays.arange(n, like=self.seed) for n in (B, H))
        return uniforms(self.seed, 0 * self.seed + t, row[:, None], unit[None], cell.uniforms)


NO_AUX = AuxInputs()
