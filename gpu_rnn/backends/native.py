"""Native code for the CPU: a whole sequence in one call of C++ (kernels/native), compiled by the system's compiler.

Products and time loop are compiled once for a dtype, a cell's elementwise part once a cell. float64 and float32; halves
are computed in float32. What the kernels read lies as the caller has it, contiguous; the products after the loop that
give the gradients of weights and inputs are the library's whose arrays they are.
"""

import ctypes
import math
import os
import struct
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_rnn import kernels
from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.codegen.cpp import page
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.native import isa as instruction_sets

from ..core import arrays
from ..core.cell_inputs import Extra
from ..core.problem import Direction, Memory, Problem, Weights
from . import compiler, gpu_common

NAME = "native"
MAX_STATES = 16  # as in gpu_common.h
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-exceptions", "-fno-rtti", "-Wno-psabi",
)  # fmt: skip
FORWARD, BACKWARD = struct.Struct(f"{23 + 2 * MAX_STATES}Q"), struct.Struct(f"{24 + 3 * MAX_STATES}Q")
WORTH_A_THREAD = 500_000  # multiply-adds between two waits from which a second thread helps: 20 us
SOURCES = Path(kernels.__path__[0]) / "native"


def reasons(problem: Problem) -> list[str]:
    why = []
    if problem.device != "cpu":
        why.append(problem.elsewhere)
    if problem.library == "cupy":
        why.append("takes no CuPy arrays, which are on a GPU")
    if problem.library == "numpy" and problem.dtype not in ("float32", "float64"):
        why.append(f"takes NumPy arrays of float32 or float64, not {problem.dtype}")
    if problem.cell.S > MAX_STATES:
        why.append(f"supports at most {MAX_STATES} states; {problem.cell.label} has {problem.cell.S}")
    if not why:
        try:
            code(problem.cell, real_of(problem))
        except compiler.CompileError as error:
            why.append(str(error))
    return why


def plan(problem: Problem) -> str:
    real, isa = real_of(problem), instruction_set()
    how = (
        f"{real}, {isa.name}, {isa.lanes(real)} lanes, tiles of {isa.tile(problem.cell.G)}, at most {threads()} threads"
    )
    ways = "forward and backward" if problem.training else "forward"
    projection = problem.projection or "input projection: one GEMM per chunk of time steps"
    return f"{projection}\n{ways}: native code, one call for the whole sequence: {how}"


def method(problem: Problem, backward: bool, stacked: bool = False) -> str:
    return NAME


def memory(problem: Problem) -> Memory:
    """Without what its code has for itself while it runs: the input projection of a chunk, packed weights."""
    cell, T, B, H, r = problem.cell, problem.T, problem.B, problem.H, problem.real_itemsize
    halves, states = problem.itemsize == 2, problem.state_elements
    y, x, rows = problem.output_elements, problem.input_elements, T * B * cell.G * H
    given = x + problem.weight_elements + states if halves else 0  # in float32
    shapes = tape_shapes(cell, T, B, H, problem.P is not None, real_of(problem))
    record = sum(map(math.prod, shapes)) if problem.training or problem.history else 0
    history = T * (cell.S - 1) * B * H if problem.history else 0
    forward = y + states + record + history + given + ((y + states) // 2 if halves else 0)
    if not problem.training:
        return Memory(0, forward * r, 0)
    back = rows * (1 + any(cell.separate)) + (y if problem.P else 0) + cell.learned * B * H + states
    gradients = problem.weight_elements + (x if problem.I is not None else 0)
    converted = given + 2 * y + gradients // 2 if halves else 0
    if problem.library == "numpy" and T > 1:
        back += cell.G * H * (problem.P or H)  # NumPy adds no product in place
    saved = (y // 2 if halves else y) + record
    return Memory(saved * r, forward * r, (back + gradients + converted) * r)


def warmup(problem: Problem) -> tuple[str, ...]:
    code(problem.cell, real_of(problem))
    return (f"{problem.cell.label}, compiled for {instruction_set().name}",)


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, tf32: bool = False, save: bool,
    step_exact: bool = False,
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    """step_exact: every sum has one order and nothing depends on T, so it always is."""
    given, w, first = plain(x), [plain(w) for w in weights], [plain(s) for s in state]
    (T, B, I), (GH, P), G = given.shape, w[1].shape, cell.G
    H, real, empty = GH // G, real_of(given), new(given)
    y, last = empty((T, B, P)), [empty(s.shape) for s in first]
    tape = [empty(shape) for shape in tape_shapes(cell, T, B, H, w[4] is not None, real)] if save else []
    values = FORWARD.pack(
        code(cell, real), T, B, I, H, P, reverse, helpful(T, B, B * GH * (I + P)), save,
        *[pointer(array) for array in (given, *w[:5])], *auxiliary(w),
        *[pointer(array) for array in (y, *(*tape, None, None, None)[:3])], *pointers(first), *pointers(last),
    )  # fmt: skip
    call(library(real).forward, values)
    return like(y, x), tuple([like(array, x) for array in last]), tuple(tape)


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    leaf = gpu_common.plain(Direction(x, weights, state, reverse))  # products follow, on no graph
    given, w, first = plain(leaf.x), Weights(*map(plain, leaf.weights)), [*map(plain, leaf.state)]
    (T, B, P), GH, G, projected = y.shape, w.w_hh.shape[0], cell.G, w.w_hr is not None
    H, real, empty = GH // G, real_of(given), new(given)
    y, dy, asked, histories = plain(y), plain(dy), [*map(plain, dlast)], [*map(plain, dhistory)]
    saved, cell_states, *hidden = map(plain, tape)
    dWx = empty((T, B, GH))
    dRh = empty((T, B, GH)) if any(cell.separate) else dWx
    total: Any = empty((T, B, P)) if projected else None
    dunits = arrays.zeros((cell.learned, B, H), like=given)
    dfirst = [empty(array.shape) for array in first]
    values = BACKWARD.pack(
        code(cell, real), T, B, 0, H, P, reverse, helpful(T, B, B * GH * P), pointer(w.w_hh), pointer(w.w_hr),
        *auxiliary(w),
        *map(pointer, (y, saved, cell_states, *(hidden or [None]), first[0], dy, dWx, dRh, total, dunits)),
        *pointers(asked), *pointers(dfirst), *pointers([None, *histories]),
    )  # fmt: skip
    call(library(real).backward, values)

    found = gpu_common.of_input(dWx, given, w, set(needs) - {"b_ih"})
    if "w_hh" in needs:
        seen = gpu_common.seen_by_weights(cell, y, first[0], Extra.of(w), reverse)
        found["w_hh"] = gpu_common.recurrent_gradient(dRh, seen, reverse)
    for name, gradient in {"b_ih": dWx, "b_hh": dRh}.items():
        if name in needs:
            found[name] = empty((GH,))
            library(real).sum_rows(pointer(gradient), T * B, GH, pointer(found[name]))
    if projected and "w_hr" in needs:
        found["w_hr"] = gpu_common.product(total.reshape(T * B, P).T, hidden[0].reshape(T * B, H), like=given)
    if "units" in needs:
        found["units"] = arrays.zeros(tuple(w.units.shape), like=given)
        found["units"][: cell.learned] = dunits if w.units.shape[1] == B else dunits.sum(1)[:, None]
    return {name: like(array, x) for name, array in found.items()} | {"state": tuple(like(d, x) for d in dfirst)}


def history(cell: Cell, tape: tuple, *, reverse: bool, like: Any) -> tuple:
    """The other states after every time step, each [T, B, H], in the dtype of `like`."""
    after = arrays.flipped(tape[1][1:]) if reverse else tape[1][1:]
    return tuple(gpu_common.stored(after[:, k], like) for k in range(cell.S - 1))


def factors(x: Any, weights: Weights) -> tuple[Any, Weights]:
    return plain(x), Weights(*map(plain, weights))


# ---- Arguments ------------------------------------------------------------------------------------------------------


def plain(array: Any) -> Any:
    """As the kernels read it: contiguous, in the dtype of computing, no part of an autograd graph. None stays None."""
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return array if array.flags.c_contiguous and array.flags.aligned else np.array(array, order="C")
    if array.dtype.itemsize == 2:
        array = array.detach().float()
    if array.is_neg() or not array.is_contiguous():
        array = array.detach().resolve_neg().contiguous()
    return array


def new(given: Any) -> Callable[[tuple], Any]:
    """What makes arrays of anything, of the library and dtype of a plain one."""
    return partial(np.empty, dtype=given.dtype) if isinstance(given, np.ndarray) else given.new_empty


def like(array: Any, x: Any) -> Any:
    """In the caller's dtype."""
    return array if array.dtype == x.dtype else array.to(x.dtype)


def pointer(array: Any) -> int:
    """0 for None."""
    if array is None:
        return 0
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data_ptr()


def auxiliary(weights: Sequence[Any]) -> tuple[int, ...]:
    """The struct Auxiliary."""
    units, flags, seed = weights[5:]
    return pointer(units), pointer(flags), pointer(seed), 1 if units is None else units.shape[1]


def pointers(many: Sequence[Any]) -> list[int]:
    return [pointer(array) for array in many] + [0] * (MAX_STATES - len(many))


def tape_shapes(cell: Cell, T: Any, B: Any, H: int, projected: bool, real: str) -> list[tuple]:
    lanes = instruction_set().lanes(real)
    shapes = [(T, B, -(-H // lanes), cell.K, lanes), (T + 1, cell.S - 1, B, H)]
    return [*shapes, (T, B, H)] if projected else shapes


def threads() -> int:
    """As many as torch is set to, or OMP_NUM_THREADS, or the cores of this process."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return cores()


def helpful(T: int, B: int, step: int) -> int:
    """How many threads a call takes, of whose time steps each has so many multiply-adds.

    With rows of its own a thread waits once, at the end, but has to wake up before.
    """
    most = threads()
    between = T * step // 5 if 2 * most <= B else step
    return most if most > 1 and between >= WORTH_A_THREAD else 1


@cache
def cores() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call(function: Callable[[bytes], int], values: bytes) -> None:
    if function(values):
        raise MemoryError("there is no memory for packed weights")


# ---- Code -----------------------------------------------------------------------------------------------------------


def real_of(array: Any) -> str:
    """The dtype that is computed in, for an array or a problem."""
    return "float64" if str(array.dtype).endswith("float64") else "float32"


@cache
def instruction_set() -> instruction_sets.ISA:
    return instruction_sets.best(compiler.cpu()[1])


def flags(real: str) -> tuple[str, ...]:
    isa = instruction_set()
    scalar = {"float32": "float", "float64": "double"}[real]
    return *FLAGS, *isa.flags, f"-DSCALAR={scalar}", f"-DVECTOR_BYTES={isa.bytes}", f"-DREGISTERS={isa.registers}"


@cache
def text(*names: str) -> str:
    return "".join(f'#line 1 "{name}"\n{(SOURCES / name).read_text()}' for name in names)


@lru_cache(16)
def library(real: str) -> Any:
    """Products and time loop."""
    found = compiler.load(f"sequence-{real}", text("simd.h", "sequence.h", "sequence.cpp"), flags(real))
    for function in (found.forward, found.backward):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    found.sum_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    found.sum_rows.restype = None
    return found


@cache
def code(cell: Cell, real: str) -> int:
    """The address of a cell's `Code`."""
    library(real)
    found = compiler.load(f"{cell.name}-{real}", source(cell), flags(real))
    return ctypes.addressof(ctypes.c_char.in_dll(found, "code"))


def source(cell: Cell) -> str:
    held = cell.flags.index(HOLD) if HOLD in cell.flags else -1
    definition = f'#line 1 "{cell.name}"\n{page(cell)}#define HOLD_FLAG {held}\n'
    return text("simd.h", "sequence.h") + definition + text("cell.cpp")
