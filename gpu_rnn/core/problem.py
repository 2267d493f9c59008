"""What a call asks for, without its data: the thing backends judge and plans are made for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell


class Weights(NamedTuple):
    """One layer, one direction, in torch's layout and gate order; any array library."""

    w_ih: Any  # [G*H, I]; None where x is the input part of all gates already, [T, B, G*H]
    w_hh: Any  # [G*H, P]
    b_ih: Any = None  # [G*H]
    b_hh: Any = None  # [G*H]
    w_hr: Any = None  # [P, H] projects the output h; without it P = H
    # What else a cell's page takes (gpu_rnn.kernels.cells), if it does:
    units: Any = None  # [N, R, H] its values per unit; R = B rows, or one for all. Of h with a projection the first P
    flags: Any = None  # [T, B] uint8; bit k is flag k
    seed: Any = None  # [1] int64, of its random numbers


class Direction(NamedTuple):
    """One of several calls that are run at once, and differ in their arrays and in the direction of time alone."""

    x: Any  # [T, B, I]
    weights: Weights
    state: Sequence[Any]
    reverse: bool


class Options(NamedTuple):
    """How a call is to run, as its caller says it."""

    reverse: bool = False
    backend: str | None = None  # insists on one
    precision: str | None = None  # of float32 products, "tf32" or "ieee"; None: what the library's setting says
    history: bool = False  # whether the other states are wanted after every instant, too
    recompute: bool = False  # nothing is kept for the gradient: backward runs forward once more
    directions: int = 1  # how many calls that differ in their direction alone are asked for at once
    layers: int = 1  # of the stack that this is one of, which may go forward at once
    step_exact: bool = False  # a sequence is bit for bit what its instants one at a time are


class Around(NamedTuple):
    """What a call asks for around its cell; see `gpu_rnn.modifiers.apply`."""

    reset: Any = None  # [T, B]; x[t] is the first of an episode, which the reset state enters
    reset_state: Any = None  # one per state, [B, .] or [.]; zeros when None
    lengths: Any = None  # [B] integers; a row's instants are those below
    left_padding: Any = None  # [B] integers; and from there on
    zoneout: float | tuple[float, ...] = 0.0  # one probability per state, or one for all
    recurrent_dropout: float = 0.0  # of what the recurrent weights see, or of the candidate
    recurrent_dropout_on: str = "h"
    seed: Any = None  # of masks, an int or [1] int64
    training: bool = True  # whether masks are drawn
    peephole: Any = None  # [N*H]
    units: Any = None  # [N*H] of a page that has them in any case
    coupled: bool = False
    reset_after: bool = True
    cell_clip: float | None = None
    layer_norm: Any = None  # gains of the input and the recurrent part [G*H], of what else is normalized, biases [H]


class Memory(NamedTuple):
    """Bytes that one call takes beside what it is given, as its library's allocator counts them.

    Of contiguous arrays; where all gradients are wanted; without what cuBLAS has for itself.
    """

    saved: int  # kept for backward: y, and what the backend saves
    forward: int  # the most there is at once on the way forward: y, the last states, what is saved, and workspace
    backward: int  # the same on the way back, with the gradients, but without what was there before; 0 in inference


@dataclass(frozen=True)
class Problem:
    """One layer, one direction, one sequence."""

    cell: Cell
    T: int
    B: int
    I: int | None  # None where x is the input part of all gates already
    H: int
    P: int | None = None  # size of the projected h; None without projection
    dtype: str = "float32"  # storage: float64, float32, float16 or bfloat16
    device: str = "cpu"  # "cpu" or "cuda"
    library: str = "numpy"  # whose arrays: numpy, torch or cupy
    training: bool = False  # whether what a gradient needs is kept
    reverse: bool = False
    tf32: bool = False  # float32 products may be rounded to TF32, as torch.nn's are unless told otherwise
    history: bool = False  # whether the other states are wanted after every instant, too
    directions: int = 1  # how many that differ in their direction alone are asked for at once
    layers: int = 1  # of the stack that this is one of, which may go forward at once
    step_exact: bool = False  # its numbers are those of its instants one at a time, bit for bit

    @property
    def itemsize(self) -> int:
        """Bytes of an element in storage."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def real_itemsize(self) -> int:
        """Bytes of an element where it is computed."""
        return max(self.itemsize, 4)

    @property
    def weight_elements(self) -> int:
        """Of w_ih, w_hh, w_hr, and both biases."""
        rows, P = self.cell.G * self.H, self.P or self.H
        return rows * ((self.I or 0) + P + 2) + (self.H * self.P if self.P else 0)

    @property
    def input_elements(self) -> int:
        """Of x."""
        return self.T * self.B * (self.cell.G * self.H if self.I is None else self.I)

    @property
    def output_elements(self) -> int:
        """Of y."""
        return self.T * self.B * (self.P or self.H)

    @property
    def state_elements(self) -> int:
        """Of the states before, or after."""
        return self.B * ((self.P or self.H) + (self.cell.S - 1) * self.H)

    @property
    def outputs(self) -> int:
        """y, the states after, and with a history the other states after every instant."""
        return 1 + self.cell.S + (self.cell.S - 1) * self.history

    @property
    def projection(self) -> str:
        """The line of a plan where there is nothing to project; else empty."""
        return "input projection: given as x (w_ih=None)" if self.I is None else ""

    @property
    def elsewhere(self) -> str:
        """Why a backend of the other device does not take the arrays."""
        place = "on the GPU" if self.device == "cuda" else "on the CPU"
        return f"not available for arrays {place} (gpu_rnn never copies between devices)"

    def layer(self, k: int) -> "Problem":
        """That of a layer of the stack of which this is the first."""
        return replace(self, layers=1) if k == 0 else replace(self, layers=1, I=self.H)

    def __str__(self) -> str:
        sizes = {"T": self.T, "B": self.B, "I": self.I, "H": self.H, "P": self.P}
        size = " ".join(f"{letter}={n}" for letter, n in sizes.items() if n is not None)
        return f"{self.cell.label} {size} {self.dtype} on {self.device} ({self.library})"
