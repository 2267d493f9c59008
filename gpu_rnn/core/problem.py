"""A call without its data, by which backends decide, and the arrays that a backend takes and gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell


class Weights(NamedTuple):
    """One layer, one direction, in torch's layout and gate order; any array library."""

    w_ih: Any  # [G*H, I]; None where x is the input projection of all gates already, [T, B, G*H]
    w_hh: Any  # [G*H, P]; of N heads [G*H, H/N], for every unit its row of the block of its head
    b_ih: Any = None  # [G*H]
    b_hh: Any = None  # [G*H]
    w_hr: Any = None  # [P, H] projects the output h; without it P = H
    # The cell's auxiliary inputs (gpu_rnn.kernels.cells), if it has them:
    units: Any = None  # [N, R, H] per-unit parameters; R = B, or 1 for the whole batch; h projected has the first P
    flags: Any = None  # [T, B] uint8; bit k is flag k
    seed: Any = None  # [1] int64, of its random numbers


class Run(NamedTuple):
    """One direction of a layer, or one layer of a stack: the arrays of one pass through time."""

    x: Any  # [T, B, I]; None in a stack above its first layer, where it is the y of the layer below
    weights: Weights
    state: Sequence[Any]  # before the first time step: [B, P], then [B, H]; all may have an axis of one layer before B
    reverse: bool = False


class Result(NamedTuple):
    """What a backend's `forward` gives for a run."""

    y: Any  # [T, B, P]
    last: tuple  # the states after the last time step, each in the shape of its first
    history: tuple = ()  # if the problem has one: the states but h after every time step, each [T, B, H]
    saved: tuple = ()  # saved activations if the problem is training: arrays that the backend alone understands


class Grads(NamedTuple):
    """The gradients of a run's results, which its `backward` starts from."""

    y: Any  # [T, B, P]; None for zero, of a layer under another alone
    last: tuple
    history: tuple = ()


def with_zeros(
    runs: Sequence[Run], zeros: Sequence[Sequence[tuple[int, ...] | None]], new: Callable[[tuple[int, ...]], Any]
) -> Sequence[Run]:
    """The runs with zeros for their missing states: one array for all of a shape, as nothing writes to them.

    zeros: `validation.zero_states`. new: makes an array of zeros.
    """
    if not zeros:
        return runs
    missing = {shape for shapes in zeros for shape in shapes if shape is not None}
    made: dict[Any, Any] = {shape: new(shape) for shape in missing}
    return [
        Run(x, weights, [made.get(shape, s) for s, shape in zip(state, shapes)], reverse)
        for (x, weights, state, reverse), shapes in zip(runs, zeros)
    ]


class Options(NamedTuple):
    """How a call is to run, as its caller says it."""

    reverse: bool = False
    backend: str | None = None  # selects one
    precision: str | None = None  # of float32 matmuls, "tf32" or "ieee"; None: what the library's setting says
    history: bool = False  # whether all states are returned after every time step, too
    recompute: bool = False  # saves no activations: backward runs forward once more
    layers: int = 1  # of the stack that is called
    step_exact: bool = False  # a sequence equals its time steps one at a time, bit for bit
    heads: int = 1  # blocks on the diagonal of w_hh


class Modifiers(NamedTuple):
    """Modifiers and variants of the cell, as a caller says them; `gpu_rnn.modifiers.apply` applies them."""

    reset: Any = None  # [T, B]; x[t] is the first of an episode, which the reset state enters
    reset_state: Any = None  # one per state, [B, .] or [.]; zeros when None
    lengths: Any = None  # [B] integers; time steps from there on are padding
    left_padding: Any = None  # [B] integers; time steps before are padding
    zoneout: float | tuple[float, ...] = 0.0  # one probability per state, or one for all
    recurrent_dropout: float = 0.0  # of h before the recurrent matmul, or of the candidate
    recurrent_dropout_on: str = "h"
    seed: Any = None  # of masks, an int or [1] int64
    training: bool = True  # whether masks are drawn
    peephole: Any = None  # [N*H]
    units: Any = None  # [N*H] per-unit weights of a custom cell
    coupled: bool = False
    reset_after: bool = True
    cell_clip: float | None = None
    layer_norm: Any = None  # gains of the input and the recurrent projection [G*H]; of the cell state, and its bias [H]
    layer_norm_over: str = "units"  # what is normalized together: all of these, or those of a "head"


class Memory(NamedTuple):
    """Bytes that one call takes in addition to its arguments, as its library's allocator counts them.

    For contiguous arrays and all gradients, without cuBLAS's own workspace.
    """

    saved: int  # kept for backward: y and saved activations
    forward: int  # the most that is allocated at once forward: y, the last states, saved activations, workspace
    backward: int  # the same backward, gradients included, without what was there before; 0 in inference


@dataclass(frozen=True)
class Problem:
    """A call of one layer, or of a stack of them, without its data: all by which a backend is chosen and configured."""

    cell: Cell
    T: int
    B: int
    I: int | None  # None where x is the input projection, [T, B, G*H]
    H: int
    P: int | None = None  # size of the projected h; None without projection
    dtype: str = "float32"  # storage: float64, float32, float16 or bfloat16
    device: str = "cpu"  # "cpu" or "cuda"
    library: str = "numpy"  # whose arrays: numpy, torch or cupy
    training: bool = False  # whether activations are saved for backward
    reverse: bool = False  # of the first run
    tf32: bool = False  # whether float32 matmuls may round their inputs to TF32
    history: bool = False  # whether all states are returned after every time step
    directions: int = 1  # runs that differ in weights, states and the direction of time; for a backend heads, too
    layers: int = 1  # runs that each take the y of the one before: a stack's; I is that of the first
    step_exact: bool = False  # a sequence equals its time steps one at a time, bit for bit
    heads: int = 1  # blocks on the diagonal of w_hh, each of H / heads units
    # What backends decided for this problem; it lives and dies with it.
    decisions: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def decide(self, key: Any, decision: Callable[..., Any], *args: Any) -> Any:
        """`decision(*args)`, made once for every key; all that it depends on is in the problem, or in the key."""
        try:
            return self.decisions[key]
        except KeyError:
            result = self.decisions[key] = decision(*args)
            return result
        except TypeError:  # symbolic sizes can't be looked up
            return decision(*args)

    def variant(self, **changes: Any) -> "Problem":
        """The problem with other values; the same object for the same changes, so that it keeps its decisions."""
        return self.decide((*changes.items(),), partial(replace, self, **changes))

    def single(self, k: int, reverse: bool) -> "Problem":
        """The problem of run number k by itself."""
        I = self.H if k and self.layers > 1 else self.I
        same = (self.I, self.directions, self.layers, self.reverse) == (I, 1, 1, reverse)
        return self if same else self.variant(I=I, directions=1, layers=1, reverse=reverse)

    @property
    def saves(self) -> bool:
        """Whether a forward pass keeps the states and activations of all time steps."""
        return self.training or self.history

    @property
    def itemsize(self) -> int:
        """Bytes of an element in storage."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def real_itemsize(self) -> int:
        """Bytes of an element in the dtype of computing."""
        return max(self.itemsize, 4)

    @property
    def weight_elements(self) -> int:
        """Of w_ih, w_hh, w_hr, and both biases."""
        rows, P = self.cell.G * self.H, self.P or self.H // self.heads
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
        """Of all states at one time step."""
        return self.B * ((self.P or self.H) + (self.cell.S - 1) * self.H)

    @property
    def outputs(self) -> int:
        """How many arrays a run gives: y, the states after, and with a history those but h after every time step."""
        return 1 + self.cell.S + (self.cell.S - 1) * self.history

    @property
    def projection(self) -> str:
        """What a plan says where x is the input projection; else empty."""
        return "input projection: given as x (w_ih=None)" if self.I is None else ""

    @property
    def of_heads(self) -> str:
        """The heads and their size; empty for one."""
        return f"{self.heads} heads of {self.H // self.heads}" if self.heads > 1 else ""

    @property
    def elsewhere(self) -> str:
        """Why a backend of the other device does not take the arrays."""
        place = "on the GPU" if self.device == "cuda" else "on the CPU"
        return f"not available for arrays {place} (gpu_rnn never copies between devices)"

    def __str__(self) -> str:
        sizes = {"T": self.T, "B": self.B, "I": self.I, "H": self.H, "P": self.P}
        size = " ".join(f"{letter}={n}" for letter, n in sizes.items() if n is not None)
        size += f" ({self.of_heads})" if self.heads > 1 else ""
        return f"{self.cell.label} {size} {self.dtype} on {self.device} ({self.library})"
