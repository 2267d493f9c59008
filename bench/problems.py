"""Every problem that is measured, for the benchmark and for the tests; without torch."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells

WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # bytes of a value
# training: forward and backward; step: one time step with its state as input; model: training between linear layers
MODES = ("forward", "training", "step", "model")
MOST_BYTES = 64 << 30  # of input, output and saved activations: beyond, a size is a typing error

NN, NUMPY, LAYER, STREAM = "torch.nn", "ours (numpy)", "ours (layer)", "ours (stream)"
CUDA, TRITON, NATIVE = "ours (cuda)", "ours (triton)", "ours (native)"
NN_KERNEL, KERNEL = "torch.nn's kernel", "ours (kernel)"  # what those layers call, without their Python
KERNEL_OF = {NN: NN_KERNEL, LAYER: KERNEL}
PER_LAYER = "ours (layers in turn)"  # the layer without its wavefront
PER_LAYER_BACKWARD = "ours (layers back in turn)"  # with a wavefront forward alone
MATMULS = "NumPy's products"  # the matmuls of a case, and nothing else
ONNX, EAGER, COMPILED = "onnxruntime", "torch loop", "torch.compile loop"
FLASHRNN, HASTE, TORCHRL, XLSTM = "FlashRNN", "Haste", "TorchRL", "xlstm"
PEERS = (ONNX, EAGER, COMPILED, FLASHRNN, HASTE, TORCHRL, XLSTM)
STACKED = (NN, LAYER, PER_LAYER, PER_LAYER_BACKWARD)  # these compute several layers

PLAIN = "ours, plain"
MODIFIERS: dict[str, dict[str, Any]] = {  # keywords of our functions; ... stands for an array that modifiers.py draws
    PLAIN: {},
    **{f"ours, {name}": {name: ...} for name in ("reset", "lengths", "left_padding")},
    "ours, zoneout": {"zoneout": 0.1, "seed": 1},
    "ours, recurrent_dropout": {"recurrent_dropout": 0.25, "seed": 1},
    "ours, candidate dropout": {"recurrent_dropout": 0.25, "recurrent_dropout_on": "candidate", "seed": 1},
    **{f"ours, {name}": {name: 0.25, "seed": 1} for name in ("input_dropout", "weight_dropout")},
    "ours, peephole": {"peephole": ...},
    "ours, coupled": {"coupled": True},
    "ours, cell_clip": {"cell_clip": 0.5},
    "ours, layer_norm": {"layer_norm": ...},
    "ours, reset before": {"reset_after": False},
    **{f"ours, {name}": {name: True} for name in ("return_states", "recompute")},
    "ours, input projection": {"w_ih": None},
    "ours, projection": {"w_hr": ...},
    "ours, step_exact": {"step_exact": True},
}

PARTS = ("step", "sequence", "exchange", "product")  # of our kernels, each alone; kernels.py says what they are
KERNELS = {
    f"{backend} {way} {part}": (backend, way, part)
    for backend, parts in {"cuda": PARTS, "triton": PARTS[:1]}.items()
    for way, part in product(("forward", "backward"), parts)
}
ALL = (
    NN, NN_KERNEL, CUDA, TRITON, NATIVE, NUMPY, MATMULS, LAYER, *STACKED[2:], KERNEL, STREAM, *PEERS, *MODIFIERS,
    *KERNELS,
)  # fmt: skip
GROUPS = {"modifiers": tuple(MODIFIERS), "kernels": tuple(KERNELS)}  # names for several implementations


@dataclass(frozen=True)
class Case:
    """One problem and one way to run it. ValueError when it makes no sense."""

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
        for letter in "TBIHL":
            size = getattr(self, letter)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{letter} = {size!r}; a size is a whole number of at least 1")
        for value, known in ((self.dtype, WIDTH), (self.mode, MODES), (self.device, ("cpu", "cuda"))):
            if value not in known:
                raise ValueError(f"unknown {value!r}; there are {', '.join(known)}")
        if self.mode == "step" and self.T != 1:
            raise ValueError(f"a step is one time step, but T = {self.T}")
        if self.bytes > MOST_BYTES:
            raise ValueError(f"{self} would take about {self.bytes >> 30} GiB; at most {MOST_BYTES >> 30} are measured")

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={getattr(self, letter)}" for letter in "TBIH") + f" L={self.L}" * (self.L > 1)
        return f"{self.cell} {self.mode} {sizes} {self.dtype} {self.device}"

    @property
    def gates(self) -> int:
        return cells.get(self.cell).G

    @property
    def training(self) -> bool:
        return self.mode in ("training", "model")

    @property
    def inputs(self) -> int:
        """The input sizes of all layers together."""
        return self.I + (self.L - 1) * self.H

    @property
    def flops(self) -> int:
        """Multiplications and additions of its matmuls; a backward pass has twice those of a forward pass."""
        columns = self.inputs + self.L * self.H
        return 2 * self.T * self.B * self.gates * self.H * columns * (3 if self.training else 1)

    @property
    def bytes(self) -> int:
        """Input, weights and output; in training the saved activations, too."""
        saved = self.gates + cells.get(self.cell).S if self.training else 1
        weights = self.gates * self.H * (self.inputs + self.L * self.H)
        return (self.T * self.B * (self.inputs + self.L * saved * self.H) + weights) * WIDTH[self.dtype]

    def problem(self, tf32: bool = False) -> Problem:
        return Problem(
            cells.get(self.cell), self.T, self.B, self.I, self.H, None, self.dtype, self.device, "torch",
            self.training, tf32=tf32, layers=self.L,
        )  # fmt: skip

    def small(self) -> "Case":
        """The same in little on the CPU: what a dry run runs."""
        return replace(self, T=min(self.T, 3), B=2, I=8, H=8, L=min(self.L, 2), dtype="float32", device="cpu")


@dataclass(frozen=True)
class Group:
    """Cases that are measured with the same implementations, torch.nn first: the ratios are to it."""

    name: str
    cases: tuple[Case, ...]
    implementations: tuple[str, ...]
    once: bool = False  # with the first number of threads only, where there are several


def grid(
    cells: str, T: tuple[int, ...], B: tuple[int, ...], H: tuple[int, ...], dtypes: tuple[str, ...] = ("float32",),
    modes: tuple[str, ...] = ("forward", "training"), device: str = "cpu",
) -> tuple[Case, ...]:  # fmt: skip
    """All combinations with I = H; what varies slowest comes first: dtype, cell, T, H, B, mode."""
    sizes = product(dtypes, cells.split(), T, H, B, modes)
    return tuple(Case(cell, t, b, h, h, dtype, mode, device) for dtype, cell, t, h, b, mode in sizes)


on_gpu = partial(grid, dtypes=("bfloat16",), device="cuda")


def scaling(name: str, names: tuple[str, ...], centre: Case, once: bool = False, **sizes: tuple) -> list[Group]:
    """From one case along T, B, H and L, forward and training: a group of one layer and one of several."""
    along = [replace(centre, **{letter: n, **({"I": n} if letter == "H" else {})}) for letter in sizes
             for n in sizes[letter]]  # fmt: skip
    cases = [replace(case, mode=mode) for case in dict.fromkeys(along) for mode in ("forward", "training")]
    one, several = (tuple(case for case in cases if (case.L > 1) is many) for many in (False, True))
    with_one = (centre, replace(centre, mode="training"), *several)  # several are compared with one
    return [Group(name, one, names, once), Group(f"{name}, layers", with_one, (NN, LAYER), once)]


GOALS = ((32, 256, 1024), (1, 8, 64), (32, 128, 512))  # T, B, H of the CPU backends' goals
MIDDLE = 256  # the T at which its matmuls are timed, too


def among_goals(row: Any) -> bool:
    """Whether a row is of a case that the CPU backends' goals are about."""
    T, B, H = GOALS
    sizes = row["T"] in (1,) if row["mode"] == "step" else row["T"] in T
    return sizes and row["B"] in B and row["H"] in H and row["I"] == row["H"] and row["L"] == 1


def cpu() -> list[Group]:
    """Native code and NumPy against torch.nn; modifiers; sizes far from the usual ones, with one number of threads."""
    cells, both, step = "lstm gru rnn_tanh", "lstm gru", {"modes": ("step",)}
    peers = grid(both, (32,), (8,), (128,))
    far = scaling(
        "scaling", (NN, NATIVE, NUMPY), Case("lstm", 16, 8, 128, 128), once=True, T=(16, 1, 64, 256, 1024, 4096, 16384),
        B=(1, 64, 256, 1024), H=(32, 64, 256, 512, 1024, 2048, 4096), L=(2, 4, 8),
    )  # fmt: skip
    return [
        Group("one step", grid(cells, (1,), *GOALS[1:], **step), (NN, NATIVE, NUMPY)),
        Group("call overhead", grid(cells, (1,), (1,), (64,), **step), (NN, NN_KERNEL, LAYER, KERNEL, STREAM)),
        Group("peers", peers, (NN, NATIVE, NUMPY, *(name for name in PEERS if name != COMPILED))),
        Group("compiled loop", peers[:1], (NN, NATIVE, NUMPY, COMPILED), once=True),
        Group("in a model", grid(cells, (32, 256), (8, 64), (128, 512), modes=("model",)), (NN, LAYER)),
        Group("modifiers", grid(both, (64,), (16,), (128,)), (NN, *MODIFIERS), once=True),
        *far,
        Group("sequences and their matmuls", grid(cells, (MIDDLE,), *GOALS[1:]), (NN, NATIVE, NUMPY, MATMULS)),
        Group("sequences", tuple(case for case in grid(cells, *GOALS) if case.T != MIDDLE), (NN, NATIVE, NUMPY)),
    ]


def quick() -> list[Group]:
    """A look at the CPU in less than a minute."""
    steps, sequences = ((1,), (1,), (128,)), ((32, 256), (1, 8), (32, 128))
    return [
        Group("one step", grid("lstm gru rnn_tanh", *steps, modes=("step",)), (NN, NATIVE, NUMPY)),
        Group("sequences", grid("lstm gru rnn_tanh", *sequences), (NN, NATIVE, NUMPY)),
    ]


def gpu_first() -> list[Group]:
    """Two dozen cases that show where torch.nn stands, and the kernels alone."""
    cases = on_gpu("lstm", (1024,), (16, 1, 64), (512, 128, 1024))
    for cell, dtype, H in (("gru", "bfloat16", 512), ("lstm", "float16", 768), ("lstm", "float32", 512)):
        cases += on_gpu(cell, (1024,), (16,), (H,), dtypes=(dtype,))
    parts = on_gpu("lstm", (1024,), (16,), (512, 128, 1024), modes=("training",))
    return [
        Group("first", cases, (NN, CUDA)),
        Group("kernels", parts, (NN, CUDA, *(name for name in KERNELS if name.startswith("cuda")))),
        Group("one step", on_gpu("lstm", (1,), (1,), (512,), modes=("step",)), (NN, CUDA, STREAM)),
    ]


def gpu() -> list[Group]:
    """In order of importance, because a session on a GPU machine is short."""
    ours, sizes = (NN, CUDA, TRITON), ((1024,), (1, 8, 32, 64, 128), (512, 1024, 256, 768, 1536, 128))
    main = [
        Group(f"{cell} {dtype}", on_gpu(cell, *sizes, dtypes=(dtype,)), ours)
        for dtype, cell in product(("bfloat16", "float32", "float16"), ("lstm", "gru"))
    ]
    far = [
        group for cell in ("lstm", "gru") for group in scaling(
            f"{cell} scaling", ours, Case(cell, 256, 16, 512, 512, "bfloat16", device="cuda"),
            T=(256, 1, 4, 16, 64, 1024, 4096, 16384), B=(1, 4, 64, 256, 1024),
            H=(32, 64, 128, 256, 768, 1024, 1536, 2048, 4096), L=(2, 4, 8),
        )
    ]  # fmt: skip
    both, tiles = "lstm gru", ((256,), (16,), (512,))
    parts = on_gpu("lstm", (256,), (16,), (512, 128, 1024, 2048)) + on_gpu("gru", *tiles)
    large = on_gpu(both, (8,), (1024,), (4096,))  # a time step that is far more than the L2 cache holds
    stacks = tuple(replace(case, L=n) for case in on_gpu(both, (1024,), (8,), (512, 256, 128, 64)) for n in (2, 4))
    rivals = (NN, CUDA, TRITON, *(name for name in PEERS if name not in (COMPILED, ONNX)))
    return [
        *main[:2],
        Group("kernels", parts, (NN, CUDA, *KERNELS)),
        Group("gates and states", large, (NN, *(name for name in KERNELS if name.endswith("step")))),
        Group("modifiers", on_gpu(both, *tiles), (NN, *MODIFIERS)),
        Group("wavefront", stacks, STACKED),
        *main[2:],
        *far,
        Group("one step", on_gpu(both, (1,), (1, 64), (128, 512, 1024), modes=("step",)), (*ours, STREAM)),
        Group("peers", on_gpu(both, (256,), (16,), (256, 768)), rivals),
        Group("compiled loop", on_gpu("lstm", (256,), (16,), (256,)), (NN, CUDA, COMPILED)),
        Group("Elman", on_gpu("rnn_tanh", (1024,), (16, 64), (256, 1024)), ours),
    ]


def custom(
    cells: list[str], T: list[int], B: list[int], H: list[int], I: int | None, dtypes: list[str], modes: list[str],
    device: str, names: list[str], layers: list[int],
) -> list[Group]:  # fmt: skip
    """The cases that a command line selects. ValueError for an unknown implementation."""
    names = expanded(names)
    for name in names:
        if name not in ALL:
            raise ValueError(f"unknown implementation {name!r}; there are {', '.join((*ALL, *GROUPS))}")
    sizes = tuple(T), tuple(B), tuple(H), tuple(dtypes), tuple(modes), device
    cases = (replace(case, L=L, I=case.I if I is None else I) for case in grid(" ".join(cells), *sizes) for L in layers)
    return [Group("custom", tuple(cases), (NN, *(name for name in names if name != NN)))]


def expanded(names: list[str]) -> list[str]:
    """The names of groups replaced by those of their implementations."""
    return [member for name in names for member in GROUPS.get(name, (name,))]


def filtered(groups: list[Group], text: str | None) -> list[Group]:
    """The cases whose text has all these words. ValueError where there are none."""
    words = (text or "").split()
    groups = [replace(g, cases=tuple(case for case in g.cases if all(w in str(case) for w in words))) for g in groups]
    if not any(group.cases for group in groups):
        raise ValueError(f"no case has the words {text!r}")
    return [group for group in groups if group.cases]
