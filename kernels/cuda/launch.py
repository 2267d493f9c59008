"""Describe what is compiled and launched, as plain values: CuPy launches it on a GPU, the tests' emulator on a CPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..cells import Cell
from ..codegen.cpp import render_cell

HERE = Path(__file__).parent
C_TYPES = {"float64": "double", "float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# For NVRTC, besides the architecture: the arithmetic is written out. Subnormals are zero (CuPy asks for that anyway),
# a b + c is rounded once, and division is IEEE's except where __fdividef is written.
OPTIONS = ("-std=c++17", "-ftz=true", "-fmad=true", "-prec-div=true")


class Unit(NamedTuple):
    """One translation unit: a file of kernels, and the cell it is compiled for. It can be a key."""

    kernels: Path  # the .cu file
    cell: Cell
    defines: tuple[tuple[str, str], ...]  # macros and their values
    headers: tuple[Path, ...] = ()  # that the kernels have for themselves

    @property
    def source(self) -> str:
        """The text to compile. Files are joined, not included: CuPy's cache sees only the text that it is given."""
        device, mathematics = HERE / "device.cuh", HERE / "mathematics.cuh"
        parts = {file.name: file.read_text() for file in (device, mathematics)}
        parts[f"cell {self.cell.name}"] = render_cell(self.cell)
        parts |= {file.name: file.read_text() for file in (HERE / "cell_inputs.cuh", *self.headers, self.kernels)}
        return "".join(f'#line 1 "{name}"\n{text}' for name, text in parts.items())


def unit(kernels: Path, cell: Cell, defines: Mapping[str, Any], headers: tuple[Path, ...] = ()) -> Unit:
    return Unit(kernels, cell, tuple((name, str(value)) for name, value in sorted(defines.items())), headers)


class Launch(NamedTuple):
    """One kernel launch, for a GPU or the emulator."""

    unit: Unit
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[Any, ...]  # an int: an address or 64 bits; else NumPy's: scalars or, of a struct, an array of 1
    shared: int = 0  # bytes of dynamic shared memory
    cluster: tuple[int, int, int] = (1, 1, 1)  # as the kernel declares it
    cooperative: bool = False  # all blocks are co-resident


# Makes a launch ready to be repeated. What it returns launches; it takes the arguments that follow the launch's own.
Runner = Callable[[Launch], Callable[..., None]]
