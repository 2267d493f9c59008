"""Every problem that is measured, in one place, for the benchmark and for the tests; without torch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells

WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value
MODES = ("forward", "training", "step")  # training is forward and backward; a step is one instant with its state given
LONG_S = 6  # a round of all contenders that takes so long is timed twice, not three times
MOST_BYTES = 64 << 30  # of input, output and saved values: beyond, a problem is a slip of the keyboard

NN = "torch.nn"
NUMPY, LAYER, CUDA, TRITON = "ours (numpy)", "ours (layer)", "ours (cuda)", "ours (triton)"
NN_KERNEL, KERNEL = "torch.nn's kernel", "ours (kernel)"  # what those layers call, without their Python
NATIVE = "ours (native)"
KERNEL_OF = {NN: NN_KERNEL, LAYER: KERNEL}
IN_TURN = "ours (layers in turn)"  # that layer without its wavefront
BACK_IN_TURN = "ours (layers back in turn)"  # with that forward alone
STREAM = "ours (stream)"
PRODUCTS = "NumPy's products"  # of matrices, that the case has, and nothing else
ONNX, EAGER, COMPILED = "onnxruntime", "torch loop", "torch.compile loop"
FLASHRNN, HASTE, TORCHRL, XLSTM = "FlashRNN", "Haste", "TorchRL", "xlstm"
PEERS = (ONNX, EAGER, COMPILED, FLASHRNN, HASTE, TORCHRL, XLSTM)  # beside torch.nn
LAYERED = (NN, LAYER)  # who computes several layers ...
STACKED = (*LAYERED, IN_TURN, BACK_IN_TURN)  # ... and how else

# What can be around a cell, by the keywords of our functions; ... stands for an array that around.py draws.
PLAIN = "ours, plain"
FEATURES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "ours, reset": {"reset": ...},
    "ours, lengths": {"lengths": ...},
    "ours, left_padding": {"left_padding": ...},
    "ours, zoneout": {"zoneout": 0.1, "seed": 1},
    "ours, recurrent_dropout": {"recurrent_dropout": 0.25, "seed": 1},
    "ours, candidate dropout": {"recurrent_dropout": 0.25, "recurrent_dropout_on": "candidate", "seed": 1},
    "ours, input_dropout": {"input_dropout": 0.25, "seed": 1},
    "ours, weight_dropout": {"weight_dropout": 0.25, "seed": 1},
    "ours, peephole": {"peephole": ...},
    "ours, coupled": {"coupled": True},
    "ours, cell_clip": {"cell_clip": 0.5},
    "ours, layer_norm": {"layer_norm": ...},
    "ours, reset before": {"reset_after": False},
    "ours, return_states": {"return_states": True},
    "ours, recompute": {"recompute": True},
    "ours, input projection": {"w_ih": None},
    "ours, projection": {"w_hr": ...},
    "ours, step_exact": {"step_exact": True},
}

# Our kernels alone; kernels.py says what each is.
PARTS = ("step", "sequence", "exchange", "product")
KERNELS = {
    f"{backend} {way} {part}": (backend, way, part)
    for backend, parts in {"cuda": PARTS, "triton": PARTS[:1]}.items()
    for way, part in product(("forward", "backward"), parts)
}

EVERYBODY = (
    NN, NN_KERNEL, CUDA, TRITON, NATIVE, NUMPY, PRODUCTS, LAYER, IN_TURN, BACK_IN_TURN, KERNEL, STREAM, *PEERS,
    *FEATURES, *KERNELS,
)  # fmt: skip
TOGETHER = {"features": tuple(FEATURES), "kernels": tuple(KERNELS)}  # names for several of them


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
    L: int = 1

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
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes().items() if letter != "L" or size > 1)
        return f"{self.cell} {self.mode} {sizes} {self.dtype} {self.device}"

    def sizes(self) -> dict[str, Any]:
        return {"T": self.T, "B": self.B, "I": self.I, "H": self.H, "L": self.L}

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def gates(self) -> int:
        return cells.get(self.cell).G

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def inputs(self) -> int:
        """What comes into all layers together."""
        return self.I + (self.L - 1) * self.H

    @property
    def flops(self) -> int:
        """Multiplications and additions of its matrix products; a backward pass has twice those of a forward pass."""
        columns = self.inputs + self.L * self.H
        return 2 * self.T * self.B * self.gates * self.H * columns * (3 if self.training else 1)

    @property
    def bytes(self) -> int:
        """Input, weights and output; in training the saved gates and states, too."""
        kept = self.gates + cells.get(self.cell).S if self.training else 1
        weights = self.gates * self.H * (self.inputs + self.L * self.H)
        return (self.T * self.B * (self.inputs + self.L * kept * self.H) + weights) * WIDTH[self.dtype]

    def problem(self, tf32: bool = False) -> Problem:
        cell = cells.get(self.cell)
        return Problem(
            cell, self.T, self.B, self.I, self.H, None, self.dtype, self.device, "torch", self.training, tf32=tf32,
            layers=self.L,
        )  # fmt: skip

    def small(self) -> "Case":
        """The same in little on the CPU: what a dry run runs."""
        return replace(self, T=min(self.T, 3), B=2, I=8, H=8, L=min(self.L, 2), dtype="float32", device="cpu")


@dataclass(frozen=True)
class Group:
    """Cases that are measured with the same contenders; torch.nn always comes first, as the one that ratios are to."""

    name: str
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    once: bool = False  # with the first number of threads only, where there are several


def grid(
    cells: tuple[str, ...], T: tuple[int, ...], B: tuple[int, ...], H: tuple[int, ...],
    dtypes: tuple[str, ...] = ("float32",), modes: tuple[str, ...] = ("forward", "training"), device: str = "cpu",
) -> Iterator[Case]:  # fmt: skip
    """All combinations with I = H; the first arguments to vary slowest: dtype, cell, T, H, B, mode."""
    for dtype, cell, t, h, b, mode in product(dtypes, cells, T, H, B, modes):
        yield Case(cell, t, b, h, h, dtype, mode, device)


def scaling(
    centre: Case, T: tuple[int, ...], B: tuple[int, ...], H: tuple[int, ...], L: tuple[int, ...]
) -> tuple[Case, ...]:
    """From one case along each axis, forward and forward+backward: how the cost of a step grows."""
    along = [replace(centre, T=t) for t in T] + [replace(centre, B=b) for b in B]
    along += [replace(centre, H=h, I=h) for h in H] + [replace(centre, L=n) for n in L]
    return tuple(replace(case, mode=mode) for case in dict.fromkeys(along) for mode in ("forward", "training"))


def by_layers(name: str, cases: tuple[Case, ...], contenders: tuple[str, ...], once: bool = False) -> list[Group]:
    """A group of one layer with these contenders, and one of several with those who compute them."""
    one = tuple(case for case in cases if case.L == 1)
    centre = replace(cases[0], L=1)
    first = (centre, replace(centre, mode="training"))  # several are compared with one
    several = (*first, *(case for case in cases if case.L > 1))
    return [Group(name, one, contenders, once), Group(f"{name}, layers", several, LAYERED, once)]


GRID = ((32, 256, 1024), (1, 8, 64), (32, 128, 512))  # T, B, H of the NumPy fallback's goals
MIDDLE = 256  # the T at which its products are timed, too


def cpu() -> list[Group]:
    """NumPy against torch.nn; what is around a cell, and far from the usual sizes, with one number of threads."""
    names = ("lstm", "gru", "rnn_tanh")
    steps = grid(names, (1,), *GRID[1:], modes=("step",))
    layers = grid(names, (1,), (1,), (64,), modes=("step",))
    peers = tuple(grid(("lstm", "gru"), (32,), (8,), (128,)))
    far = scaling(
        Case("lstm", 16, 8, 128, 128),
        T=(16, 1, 64, 256, 1024, 4096, 16384), B=(1, 64, 256, 1024), H=(32, 64, 256, 512, 1024, 2048, 4096),
        L=(2, 4, 8),
    )  # fmt: skip
    return [
        Group("one step", tuple(steps), (NN, NUMPY)),
        Group("what a call costs beside its kernel", tuple(layers), (NN, NN_KERNEL, LAYER, KERNEL, STREAM)),
        Group("peers", peers, (NN, NUMPY, *(name for name in PEERS if name != COMPILED))),
        Group("compiled loop", peers[:1], (NN, NUMPY, COMPILED), once=True),
        Group("features", tuple(grid(("lstm", "gru"), (64,), (16,), (128,))), (NN, *FEATURES), once=True),
        *by_layers("scaling", far, (NN, NUMPY), once=True),
        Group("sequences and what is in them", tuple(grid(names, (MIDDLE,), *GRID[1:])), (NN, NUMPY, PRODUCTS)),
        Group("sequences", tuple(case for case in grid(names, *GRID) if case.T != MIDDLE), (NN, NUMPY)),
    ]


def among_goals(row: dict[str, Any]) -> bool:
    """Whether a row is of a case that the NumPy fallback's goals are about."""
    T, B, H = GRID
    sizes = row["T"] in (1,) if row["mode"] == "step" else row["T"] in T
    return sizes and row["B"] in B and row["H"] in H and row["I"] == row["H"] and row["L"] == 1


def quick() -> list[Group]:
    """A look at the CPU in less than a minute."""
    names = ("lstm", "gru", "rnn_tanh")
    return [
        Group("one step", tuple(grid(names, (1,), (1,), (128,), modes=("step",))), (NN, NUMPY)),
        Group("sequences", tuple(grid(names, (32, 256), (1, 8), (32, 128))), (NN, NUMPY)),
    ]


def gpu_first() -> list[Group]:
    """Two dozen cases that show where torch.nn stands, and the kernels alone."""
    lstm = grid(("lstm",), (1024,), (16, 1, 64), (512, 128, 1024), ("bfloat16",), device="cuda")
    others = [
        case for cell, dtype, H in (("gru", "bfloat16", 512), ("lstm", "float16", 768), ("lstm", "float32", 512))
        for case in grid((cell,), (1024,), (16,), (H,), (dtype,), device="cuda")
    ]  # fmt: skip
    parts = grid(("lstm",), (1024,), (16,), (512, 128, 1024), ("bfloat16",), ("training",), "cuda")
    return [
        Group("first", (*lstm, *others), (NN, CUDA)),
        Group("kernels", tuple(parts), (NN, CUDA, *(name for name in KERNELS if name.startswith("cuda")))),
        Group(
            "one step", tuple(grid(("lstm",), (1,), (1,), (512,), ("bfloat16",), ("step",), "cuda")), (NN, CUDA, STREAM)
        ),
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

    parts = (*bf16(("lstm",), (256,), (16,), (512, 128, 1024, 2048)), *bf16(("gru",), (256,), (16,), (512,)))
    large = bf16(both, (8,), (1024,), (4096,))  # an instant that is far more than the L2 cache holds
    far: list[Group] = []
    for cell in both:
        away = scaling(
            Case(cell, 256, 16, 512, 512, "bfloat16", device="cuda"),
            T=(256, 1, 4, 16, 64, 1024, 4096, 16384), B=(1, 4, 64, 256, 1024),
            H=(32, 64, 128, 256, 768, 1024, 1536, 2048, 4096), L=(2, 4, 8),
        )  # fmt: skip
        far += by_layers(f"{cell} scaling", away, ours)
    stacks = tuple(replace(case, L=n) for case in bf16(both, (1024,), (8,), (512, 256, 128, 64)) for n in (2, 4))
    rivals = (NN, CUDA, TRITON, *(name for name in PEERS if name not in (COMPILED, ONNX)))
    return [
        *groups[:2],
        Group("kernels", parts, (NN, CUDA, *KERNELS)),
        Group("gates and states", large, (NN, *(name for name in KERNELS if name.endswith("step")))),
        Group("features", bf16(both, (256,), (16,), (512,)), (NN, *FEATURES)),
        Group("wavefront", stacks, STACKED),
        *groups[2:],
        *far,
        Group("one step", bf16(both, (1,), (1, 64), (128, 512, 1024), modes=("step",)), (*ours, STREAM)),
        Group("peers", bf16(both, (256,), (16,), (256, 768)), rivals),
        Group("compiled loop", bf16(("lstm",), (256,), (16,), (256,)), (NN, CUDA, COMPILED)),
        Group("Elman", bf16(("rnn_tanh",), (1024,), (16, 64), (256, 1024)), ours),
    ]


def custom(
    cells: list[str], T: list[int], B: list[int], H: list[int], I: int | None, dtypes: list[str], modes: list[str],
    device: str, contenders: list[str], layers: list[int],
) -> list[Group]:  # fmt: skip
    """What the command line asks for."""
    contenders = expanded(contenders)
    for name in contenders:
        if name not in EVERYBODY:
            raise ValueError(f"unknown contender {name!r}; there are {', '.join((*EVERYBODY, *TOGETHER))}")
    cases = grid(tuple(cells), tuple(T), tuple(B), tuple(H), tuple(dtypes), tuple(modes), device)
    cases = (replace(case, L=L, I=case.I if I is None else I) for case in cases for L in layers)
    return [Group("asked for", tuple(cases), (NN, *(name for name in contenders if name != NN)))]


def expanded(names: list[str]) -> list[str]:
    """With each name of several contenders replaced by theirs."""
    return [name for given in names for name in TOGETHER.get(given, (given,))]


def filtered(groups: list[Group], text: str | None) -> list[Group]:
    """Only the cases whose text has all these words, and the groups that still have any."""
    words = (text or "").split()
    kept = [
        replace(group, cases=tuple(case for case in group.cases if all(word in str(case) for word in words)))
        for group in groups
    ]
    return [group for group in kept if group.cases]
