"""What a call asks for, without its data: the thing backends judge and plans are made for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell


class Weights(NamedTuple):
    """One layer, one direction, in torch's layout and gate order; any array library."""

    w_ih: Any  # [G*H, I]
    w_hh: Any  # [G*H, P]
    b_ih: Any = None  # [G*H]
    b_hh: Any = None  # [G*H]
    w_hr: Any = None  # [P, H] projects the output h; without it P = H


@dataclass(frozen=True)
class Problem:
    """One layer, one direction, one sequence."""

    cell: Cell
    T: int
    B: int
    I: int
    H: int
    P: int | None = None  # size of the projected h; None without projection
    dtype: str = "float32"  # storage: float64, float32, float16 or bfloat16
    device: str = "cpu"  # "cpu" or "cuda"
    library: str = "numpy"  # whose arrays: numpy, torch or cupy
    training: bool = False  # whether a gradient may be asked for
    reverse: bool = False
    tf32: bool = False  # float32 products on tensor cores, as torch.nn has them unless told otherwise

    def __str__(self) -> str:
        size = f"T={self.T} B={self.B} I={self.I} H={self.H}" + (f" P={self.P}" if self.P is not None else "")
        return f"{self.cell.name} {size} {self.dtype} on {self.device} ({self.library})"
