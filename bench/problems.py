"""Every problem that is measured, in one place, for the benchmark and for the tests; without torch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from gpu_rnn.kernels import cells
from gpu_rnn.problem import Problem

WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value
MODES = ("forward", "training", "step")  # training is forward and backward; a step is one instant with its state given
MOST_BYTES = 64 << 30  # of input, output and saved values: beyond, a problem is a slip of the keyboard

NN = "torch.nn"
NUMPY, LAYER, CUDA, TRITON = "ours (numpy)", "ours (layer)", "ours (cuda)", "ours (triton)"
NN_KERNEL, KERNEL = "torch.nn's kernel", "ours (kernel)"  # what those layers call, without their Python
KERNEL_OF = {NN: NN_KERNEL, LAYER: KERNEL}
ONNX, EAGER, COMPILED = "onnxruntime", "torch loop", "torch.compile loop"
FLASHRNN, HASTE, TORCHRL, XLSTM = "FlashRNN", "Haste", "TorchRL", "xlstm"
EVERYBODY = (NN, NN_KERNEL, CUDA, TRITON, NUMPY, LAYER, KERNEL, ONNX, EAGER, COMPILED, FLASHRNN, HASTE, TORCHRL, XLSTM)


@dataclass(frozen=True)
class Case:
    """One problem, one way to run it. ValueError when it makes no sense."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str = "float32"
    mode: str = "forward"
    device: str = "cpu"

    def __post_init__(self) -> None:
        cells.get(self.cell)  # an unknown name is a ValueError that lists the known ones
        for letter, size in self.sizes().items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{letter} = {size!r}; a size is a whole number of at least 1")
        for value, known in ((self.dtype, WIDTH), (self.mode, MODES), (self.device, ("cpu", "cuda"))):
            if value not in known:
                raise ValueError(f"unknown {value!r}; there are {', '.join(known)}")
        if self.mode == "step" and self.T != 1:
            raise ValueError(f"a step is one instant, but T = {self.T}")
        if self.bytes > MOST_BYTES:
            raise ValueError(f"{self} would take about {self.bytes >> 30} GiB; at most {MOST_BYTES >> 30} are measured")

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes().items())
        return f"{self.cell} {self.mode} {sizes} {self.dtype} {self.device}"

    def sizes(self) -> dict[str, Any]:
        return {"T": self.T, "B": self.B, "I": self.I, "H": self.H}

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def gates(self) -> int:
        return cells.get(self.cell).G

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def flops(self) -> int:
        """Multiplications and additions of its matrix products; a backward pass has twice those of a forward pass."""
        return 2 * self.T * self.B * self.gates * self.H * (self.I + self.H) * (3 if self.training else 1)

    @property
    def bytes(self) -> int:
        """Input, weights and output; in training the saved gates and states, too."""
        kept = self.gates + cells.get(self.cell).S if self.training else 1
        weights = self.gates * self.H * (self.I + self.H)
        return (self.T * self.B * (self.I + kept * self.H) + weights) * WIDTH[self.dtype]

    def problem(self, tf32: bool = False) -> Problem:
        cell = cells.get(self.cell)
        return Problem(
            cell, self.T, self.B, self.I, self.H, None, self.dtype, self.device, "torch", self.training, tf32=tf32
        )

    def small(self) -> "Case":
        """The same in little on the CPU: what a dry run runs."""
        return replace(self, T=min(self.T, 3), B=2, I=8, H=8, dtype="float32", device="cpu")


@dataclass(frozen=True)
class Group:
    """Cases that are measured with the same contenders; torch.nn always comes first, as the one that ratios are to."""

    name: str
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]


def grid(
    cells: tuple[str, ...], T: tuple[int, ...], B: tuple[int, ...], H: tuple[int, ...],
    dtypes: tuple[str, ...] = ("float32",), modes: tuple[str, ...] = ("forward", "training"), device: str = "cpu",
) -> Iterator[Case]:  # fmt: skip
    """All combinations with I = H; the first arguments to vary slowest: dtype, cell, T, H, B, mode."""
    for dtype, cell, t, h, b, mode in product(dtypes, cells, T, H, B, modes):
        yield Case(cell, t, b, h, h, dtype, mode, device)


def cpu() -> list[Group]:
    """NumPy against torch.nn. The small ones first: whoever stops early has most of them."""
    names = ("lstm", "gru", "rnn_tanh")
    sequences = sorted(grid(names, (32, 256, 1024), (1, 8, 64), (32, 128, 512)), key=lambda case: case.flops)
    steps = grid(names, (1,), (1, 8, 64), (32, 128, 512), modes=("step",))
    layers = grid(names, (1,), (1,), (64,), modes=("step",))
    return [
        Group("one step", tuple(steps), (NN, NUMPY)),
        Group("what a call costs beside its kernel", tuple(layers), (NN, NN_KERNEL, LAYER, KERNEL)),
        Group("peers", tuple(grid(("lstm", "gru"), (32,), (8,), (128,))), (NN, NUMPY, ONNX, EAGER, XLSTM)),
        Group("sequences", tuple(sequences), (NN, NUMPY)),
    ]


def quick() -> list[Group]:
    """A look at the CPU in less than a minute."""
    names = ("lstm", "gru", "rnn_tanh")
    return [
        Group("one step", tuple(grid(names, (1,), (1,), (128,), modes=("step",))), (NN, NUMPY)),
        Group("sequences", tuple(grid(names, (32, 256), (1, 8), (32, 128))), (NN, NUMPY)),
    ]


def gpu() -> list[Group]:
    """In order of importance, because the visit to a GPU machine is short."""
    ours, both = (NN, CUDA, TRITON), ("lstm", "gru")
    groups = []
    for dtype, cell in product(("bfloat16", "float32", "float16"), both):
        cases = grid((cell,), (1024,), (1, 8, 32, 64, 128), (512, 1024, 256, 768, 1536, 128), (dtype,), device="cuda")
        groups.append(Group(f"{cell} {dtype}", tuple(cases), ours))

    def bf16(cells: tuple[str, ...], T: tuple[int, ...], B: tuple[int, ...], H: tuple[int, ...], **more) -> tuple:
        return tuple(grid(cells, T, B, H, ("bfloat16",), device="cuda", **more))

    rivals = (NN, CUDA, TRITON, EAGER, FLASHRNN, HASTE, TORCHRL, XLSTM)
    return [
        *groups,
        Group("T", bf16(both, (16, 64, 256, 4096), (16,), (512,)), ours),
        Group("B", bf16(both, (256,), (2, 4, 16, 256, 512), (512,)), ours),
        Group("one step", bf16(both, (1,), (1, 64), (128, 512, 1024), modes=("step",)), ours),
        Group("peers", bf16(both, (256,), (16,), (256, 768)), rivals),
        Group("compiled loop", bf16(("lstm",), (256,), (16,), (256,)), (NN, CUDA, COMPILED)),
        Group("Elman", bf16(("rnn_tanh",), (1024,), (16, 64), (256, 1024)), ours),
    ]


def custom(
    cells: list[str], T: list[int], B: list[int], H: list[int], I: int | None, dtypes: list[str], modes: list[str],
    device: str, contenders: list[str],
) -> list[Group]:  # fmt: skip
    """What the command line asks for."""
    for name in contenders:
        if name not in EVERYBODY:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join(EVERYBODY)}")
    cases = grid(tuple(cells), tuple(T), tuple(B), tuple(H), tuple(dtypes), tuple(modes), device)
    if I is not None:
        cases = (replace(case, I=I) for case in cases)
    return [Group("asked for", tuple(cases), (NN, *(name for name in contenders if name != NN)))]


def filtered(groups: list[Group], text: str | None) -> list[Group]:
    """Only the cases whose text has all these words, and the groups that still have any."""
    words = (text or "").split()
    kept = [
        replace(group, cases=tuple(case for case in group.cases if all(word in str(case) for word in words)))
        for group in groups
    ]
    return [group for group in kept if group.cases]
