"""Native code for the CPU: a whole sequence in one call of C++ (kernels/native), compiled by the system's compiler.

Matmuls and time loop are compiled once for a dtype, a cell's elementwise part once a cell. float64 and float32; half
precision is computed in float32. Kernels read the caller's arrays where they are, contiguous. All matmuls are in them,
so that NumPy arrays and tensors give the same bits.
"""

import ctypes
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu_rnn import kernels
from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.codegen.cpp import render_cell as render_cell
from gpu_rnn.kernels.modifiers import HOLD
from gpu_rnn.kernels.native import isa as instruction_sets

from ..core import arrays, heads
from ..core.problem import Grads, Memory, Problem, Result, Run, Weights
from . import compiler, gpu_common
from .protocol import Needs, backward_in_turn, forward_in_turn
from .protocol import never_fuses_layers as fuses_layers  # noqa: F401

NAME = "native"
RUNS_HEADS = REPEATS_INPUTS = True
MAX_STATES = 16  # as in sequence.h
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-exceptions", "-fno-rtti", "-Wno-psabi",
)  # fmt: skip
WORTH_A_THREAD = 500_000  # multiply-adds between two waits from which a second thread helps: 20 us
WAKING = 5  # times as many, where threads have to wake up for it
INPUT_AT = struct.calcsize("5q")  # of the values of Forward after those that it and Backward have in common
EMPTY = 64  # an address that nothing is read from
NO_MEMORY = "there is no memory for packed weights, or no thread"
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
    apart = f"{problem.of_heads}, each a recurrence by itself\n" if problem.heads > 1 else ""
    return f"{apart}{projection}\n{ways}: native code, one call for the whole sequence: {how}"


def method(problem: Problem, backward: bool) -> str:
    return NAME


def memory(problem: Problem) -> Memory:
    """Without what its code allocates for itself while it runs: the input projection of a chunk, packed weights."""
    cell, T, B, H, r = problem.cell, problem.T, problem.B, problem.H, problem.real_itemsize
    half, states = problem.itemsize == 2, problem.state_elements
    twice = bool(cell.pass_gates)  # two time steps for each of x
    y, x, rows = problem.output_elements, problem.input_elements >> twice, T * B * cell.G * H
    copies = x + problem.weight_elements + states if half else 0  # in float32
    record = sum(math.prod(shape) for shape in kept_shapes(problem) if shape is not None)
    # Without gradients the states after every time step are those that are kept.
    history = T * (cell.S - 1) * B * H if problem.history and (problem.training or half) else 0
    forward = y + states + record + history + copies + ((y + states) // 2 if half else 0)
    if not problem.training:
        return Memory(0, forward * r, 0)
    back = rows * (1 + any(cell.separate)) + (rows // 2 if twice else 0) + (y if problem.P else 0)
    back += cell.num_trainable * B * H + states
    gradients = problem.weight_elements + (x if problem.I is not None else 0)
    converted = copies + 2 * y + gradients // 2 if half else 0
    saved = (y // 2 if half else y) + record
    return Memory(saved * r, forward * r, (back + gradients + converted) * r)


def warmup(problem: Problem) -> tuple[str, ...]:
    code(problem.cell, real_of(problem))
    return (f"{problem.cell.label}, compiled for {instruction_set().name}",)


def forward(problem: Problem, runs: Sequence[Run]) -> list[Result]:
    """step_exact needs nothing: every sum has one order, and nothing depends on T."""
    if problem.layers > 1:
        return forward_in_turn(forward, problem, runs)
    compiled, (together, inside) = compile_problem(problem), shared_threads(problem, len(runs))
    calls, values = [], []
    for run in runs:
        x, w, first = as_rows(run.x), plain_weights(problem, run.weights), compiled.plain(run.state)
        empty = allocator(x)
        y, last = empty(compiled.output), [*map(compiled.empty_like, first)]
        saved = [shape and empty(shape) for shape in compiled.saved]
        values.append(forward_arguments(compiled, x, w, first, y, last, saved, reverse=run.reverse, threads=inside))
        calls.append((x, w, first, y, last, saved))
    call(compiled.forward, b"".join(values), len(runs), together)
    return [to_result(problem, run, y, last, saved) for run, (*_, y, last, saved) in zip(runs, calls)]


def to_result(problem: Problem, run: Run, y: Any, last: Sequence[Any], saved: Sequence[Any]) -> Result:
    history: list[Any] = []
    if problem.history:
        history = [states[:-1] for states in saved[1 : problem.cell.S]]
        if problem.training or y.dtype != run.x.dtype:
            history = [gpu_common.to_storage(states, run.x) for states in history]
        elif problem.library == "torch":  # autograd would not let a caller modify a view
            history = [states.detach() for states in history]
    if y.dtype != run.x.dtype:
        y, *last = [to_caller(array, run.x) for array in (y, *last)]
    return Result(y, tuple(last), tuple(history), tuple(saved) if problem.training else ())


def forward_arguments(
    compiled: "Compiled", x: Any, w: Weights, first: Sequence[Any], y: Any, last: Sequence[Any],
    saved: Sequence[Any] = (), packed: Any = None, *, reverse: bool = False, threads: int = 1,
) -> bytes:  # fmt: skip
    """The struct Forward of plain arrays."""
    S = len(first)
    activations, states, unprojected = saved[:1] or [None], saved[1:S] or [None] * (S - 1), saved[S:] or [None]
    pointed = x, *w, y, *activations, *unprojected, packed, *first, *last, None, *states
    return compiled.sizes + compiled.forward_values.pack(reverse, threads, *layout(x, w), *compiled.addresses(pointed))


def make_step(problem: Problem, weights: Weights, x: Any, y: Any) -> tuple[list[Any], Callable[[Any], None]]:
    """Make one layer that runs a time step per call, with weights that are packed once.

    -> its states, [B, .] each and zero; and what goes from an input like x [B, I] and the states to y [B, P] and the
    states. Of half precision states are float32, as within a sequence. x, y: torch tensors.
    """
    w, compiled = plain_weights(problem, weights), compile_problem(problem)
    _, threads = shared_threads(problem, 1)
    source, target = (array.view(1, *array.shape) for array in compiled.plain((x, y)))
    sizes = [problem.P or problem.H, *[problem.H] * (problem.cell.S - 1)]
    states = [source.new_zeros(problem.B, size) for size in sizes]
    size = compiled.pack(forward_arguments(compiled, source, w, states, target, states), None)
    packed = source.new_empty(size)
    values = forward_arguments(compiled, source, w, states, target, states, packed=packed, threads=threads)
    compiled.pack(values, packed.data_ptr())
    arguments, copied = ctypes.create_string_buffer(values, len(values)), target.dtype != y.dtype
    address = ctypes.c_uint64.from_buffer(arguments, len(compiled.sizes) + INPUT_AT)
    single, own, tensor = compiled.step, source[0], type(source)
    written = range(target.data_ptr(), target.data_ptr() + target.nbytes)  # while x is still read

    def step(x: Any, _alive: Any = (w, target, states, packed)) -> None:
        elsewhere = copied or type(x) is not tensor or not x.is_contiguous() or x.is_neg()
        if elsewhere or (at := x.data_ptr()) in written or not at:
            at = own.copy_(x).data_ptr() or EMPTY
        address.value = at
        if single(arguments):
            raise MemoryError(NO_MEMORY)
        if copied:
            y.copy_(target[0])

    return states, step


def backward(
    problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads], needs: Sequence[Needs]
) -> list[dict[str, Any]]:
    if problem.layers > 1:
        return backward_in_turn(backward, problem, runs, saved, grads, needs)
    calls = [BackwardCall(problem, *each) for each in zip(runs, saved, grads, needs)]
    together, inside = shared_threads(problem, len(runs), backward=True)
    call(compile_problem(problem).backward, b"".join([each.arguments(inside) for each in calls]), len(runs), together)
    return [each.gradients() for each in calls]


class BackwardCall:
    """The arrays that one run of `backward` reads and writes."""

    def __init__(self, problem: Problem, run: Run, saved: tuple, grads: Grads, names: Needs) -> None:
        self.problem, self.run, self.names = problem, run, names
        compiled = compile_problem(problem)
        plain = compiled.plain
        self.x, self.w, self.first = as_rows(run.x), plain_weights(problem, run.weights), plain(run.state)
        self.y, self.activations, *kept = plain(saved)
        self.states, self.unprojected = kept[: problem.cell.S - 1], (*kept[problem.cell.S - 1 :], None)[0]
        (self.dy,), self.dlast, self.dhistory = plain([grads.y]), plain(grads.last), plain(grads.history)
        (T, B, P), cell, H, w, empty = self.y.shape, problem.cell, problem.H, self.w, allocator(self.x)
        self.dWx = self.dWx_sum = empty((T, B, cell.G * H))
        if len(self.x) < T:
            self.dWx_sum = empty((len(self.x), B, cell.G * H)) if {"x", "w_ih", "b_ih"} & {*names} else None
        self.dRh = empty((T, B, cell.G * H)) if any(cell.separate) else self.dWx
        self.dy_total: Any = empty((T, B, P)) if w.w_hr is not None else None
        self.dfirst = [*map(compiled.empty_like, self.first)]
        parameters = {"x": None if w.w_ih is None else self.x, **w._asdict(), "units": None}
        self.grads = {name: empty(a.shape) for name, a in parameters.items() if a is not None and name in names}
        self.dunits, self.dunits_sum = arrays.zeros((cell.num_trainable, B, H), like=self.x), None
        if "units" in names:
            self.grads["units"] = arrays.zeros(w.units.shape, like=self.x)
            if w.units.shape[1] == B:
                self.dunits = self.grads["units"]
            else:
                self.dunits_sum = self.grads["units"]

    def arguments(self, threads: int) -> bytes:
        """The struct Backward."""
        problem, compiled, w, (T, B, P) = self.problem, compile_problem(self.problem), self.w, self.y.shape
        after = T * B * problem.cell.G * problem.H * ((problem.I or 0) + P // problem.heads)
        written = [self.grads.get(name) for name in ("x", *Weights._fields[:5])]
        pointed = (
            self.x, w.w_ih, w.w_hh, w.w_hr, *w[5:], self.y, self.activations, self.unprojected, self.first[0], self.dy,
            self.dWx, self.dWx_sum, self.dRh, self.dy_total, self.dunits, *written, self.dunits_sum, *self.dlast,
            *self.dfirst, None, *self.states, None, *(self.dhistory or [None] * (problem.cell.S - 1)),
        )  # fmt: skip
        return compiled.sizes + compiled.backward_values.pack(
            self.run.reverse, threads, threads_for(after // WAKING), *layout(self.x, w), *compiled.addresses(pointed)
        )

    def gradients(self) -> dict[str, Any]:
        if "x" in self.names:
            self.grads.setdefault("x", self.dWx_sum)
        x = self.run.x
        states = tuple([to_caller(array, x) for array in self.dfirst])
        return {name: to_caller(array, x) for name, array in self.grads.items()} | {"state": states}


def gemm_operands(x: Any, weights: Weights) -> tuple[Any, Weights]:
    """NumPy's, whichever library the arrays are of: so its results don't depend on that."""
    if isinstance(x, np.ndarray):
        return x, weights
    x, *plain = [tensor if tensor is None else tensor.detach().numpy() for tensor in plain_tensors((x, *weights))]
    return x, Weights(*plain)


def saved_shapes(problem: Problem) -> list[tuple[tuple, str]]:
    cell, T, B, H, real = problem.cell, problem.T, problem.B, problem.H, real_of(problem)
    lanes = instruction_set().lanes(real)
    blocks = -(-(H // problem.heads) // lanes)
    shapes: list[tuple] = [(problem.heads * T, B, blocks, cell.K, lanes), *[(T + 1, B, H)] * (cell.S - 1)]
    return [(shape, real) for shape in (shapes if problem.P is None else [*shapes, (T, B, H)])]


def kept_shapes(problem: Problem) -> list[tuple | None]:
    """Of what forward keeps: activations, the states from the second on, h before its projection; None is left out."""
    shapes: list[tuple | None] = [shape for shape, _ in saved_shapes(problem)]
    return shapes if problem.training else [None, *shapes[1 : problem.cell.S]] if problem.history else []


# ---- Arguments ------------------------------------------------------------------------------------------------------


def plain_arrays(arrays: Iterable[Any]) -> list[Any]:
    """NumPy arrays as the kernels read them: contiguous. None stays None."""
    return [
        a if a is None or ((how := a.flags).c_contiguous and how.aligned) else np.array(a, order="C") for a in arrays
    ]


def plain_tensors(tensors: Iterable[Any]) -> list[Any]:
    """Tensors as the kernels read them: contiguous, in the dtype of computing. None stays None."""
    return [
        t if t is None or (t.is_contiguous() and not t.is_neg() and t.dtype.itemsize != 2) else as_plain(t)
        for t in tensors
    ]


def as_plain(tensor: Any) -> Any:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype.itemsize == 2 else tensor).resolve_neg().contiguous()


def as_rows(x: Any) -> Any:
    """x as the kernels read it: plain, but time steps and rows may lie anywhere."""
    if isinstance(x, np.ndarray):
        return x if x.flags.aligned and x.strides[2] == x.itemsize else np.array(x, order="C")
    return x if x.dtype.itemsize > 2 and x.stride(2) == 1 and not x.is_neg() else as_plain(x)


def plain_weights(problem: Problem, weights: Sequence[Any]) -> Weights:
    """As the kernels read them, with a seed for each head."""
    plain = Weights(*compile_problem(problem).plain(weights))
    if problem.heads == 1 or plain.seed is None:
        return plain
    return plain._replace(seed=arrays.concatenate(heads.seeds(plain.seed, problem.heads), 0))


def allocator(like: Any) -> Callable[[tuple], Any]:
    """A function shape -> uninitialized array, of the library and dtype of a plain one."""
    return partial(np.empty, dtype=like.dtype) if isinstance(like, np.ndarray) else like.new_empty


def to_caller(array: Any, x: Any) -> Any:
    """In the dtype of the caller's x."""
    return array if array.dtype == x.dtype else array.to(x.dtype)


def array_addresses(arrays: Iterable[Any]) -> list[int]:
    """0 for None."""
    return [
        0 if a is None
        else ctypes.addressof(ctypes.c_char.from_buffer(a))  # NumPy's own words for it take four times as long
        if (how := a.flags).writeable and how.c_contiguous and a.size
        else a.__array_interface__["data"][0]
        for a in arrays
    ]  # fmt: skip


def tensor_addresses(tensors: Iterable[Any]) -> list[int]:
    """0 for None alone: an empty tensor has no address, but is not left out."""
    return [0 if tensor is None else tensor.data_ptr() or address_without_memory(tensor) for tensor in tensors]


def address_without_memory(tensor: Any) -> int:
    if tensor.numel():  # zeros as of torch.autograd.forward_ad, or of a storage that was resized
        raise ValueError(f"a tensor of shape {[*tensor.shape]} has no memory; clone() gives zeros without it some")
    return EMPTY


def layout(x: Any, w: Weights) -> tuple[int, int, int]:
    """Elements from one time step of x to the next, and from one row; rows of the values per unit."""
    if isinstance(x, np.ndarray):
        time, row = x.strides[0] // x.itemsize, x.strides[1] // x.itemsize
    else:
        time, row, _ = x.stride()
    return time, row, 1 if w.units is None else w.units.shape[1]


def threads() -> int:
    """As many as torch is set to, or OMP_NUM_THREADS, or the cores of this process."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return cores()


def shared_threads(problem: Problem, runs: int, backward: bool = False) -> tuple[int, int]:
    """How many threads do a head each at a time (1: none does), and how many share a head.

    One that has heads, or batch rows, of its own waits once, at the end, but has to wake up before.
    """
    T, B, N, many = problem.T, problem.B, problem.heads, threads()
    I, Q = 0 if backward else problem.I or 0, (problem.P or problem.H) // N
    step, jobs, by_rows = B * problem.cell.G * problem.H // N * (I + Q), runs * N, 2 * many <= B
    if jobs * T * step < WORTH_A_THREAD:  # however many there are
        return 1, 1
    if many > 1 and (jobs % many == 0 or (jobs > many and not by_rows)):
        return threads_for(jobs * T * step // WAKING), 1
    return 1, threads_for(T * step // WAKING if by_rows else step)


def threads_for(work: int) -> int:
    """How many threads do so many multiply-adds and then wait for each other."""
    return threads() if work >= WORTH_A_THREAD else 1


def shares_openmp(problem: Problem) -> bool:
    """Whether kernels run on the OpenMP threads of the arrays' library, which else spin on the cores of ours.

    A process that was forked without exec may have inherited an OpenMP that waits for threads of the parent.
    """
    return problem.library == "torch" and not forked()


def forked() -> bool:  # not cached: a child would inherit its parent's answer
    """Whether this process was forked and has executed no program since. Where there is no telling: yes."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])  # as man 5 proc numbers it, 9
    except (OSError, ValueError, IndexError):
        return True
    return bool(flags & 0x40)  # PF_FORKNOEXEC of the kernel's include/linux/sched.h


@cache
def cores() -> int:
    setting = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if setting.isdecimal() and int(setting) > 0:
        return int(setting)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def call(function: Callable[..., int], values: bytes, runs: int, threads: int) -> None:
    if function(values, runs, threads):
        raise MemoryError(NO_MEMORY)


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


class Compiled(NamedTuple):
    """What calls of a problem have in common."""

    forward: Callable[[bytes, int, int], int]
    backward: Callable[[bytes, int, int], int]
    step: Callable[[Any], int]  # forward of one run of one time step
    pack: Callable[[bytes, int | None], int]
    sizes: bytes  # the first fields of Forward and Backward, which are the same
    forward_values: struct.Struct  # all others; the address of x is at INPUT_AT
    backward_values: struct.Struct
    output: tuple[int, ...]  # the shape of y
    plain: Callable[[Iterable[Any]], list[Any]]  # of the arrays' library, as the next one
    addresses: Callable[[Iterable[Any]], list[int]]
    empty_like: Callable[[Any], Any]  # the same
    saved: list[tuple | None]  # `kept_shapes`


def compile_problem(problem: Problem) -> Compiled:
    return problem.decide(NAME, compile_once, problem)


def compile_once(problem: Problem) -> Compiled:
    cell, real, N, H = problem.cell, real_of(problem), problem.heads, problem.H
    P, I, G, loaded = problem.P or H, problem.I, cell.G, library(real)
    passes = 2 if cell.pass_gates else 1, *(cell.pass_gates or (0, G, 0, G))
    sizes = problem.T, problem.B, G * H if I is None else I, H, P, N, H // N, P // N
    states = f"{cell.S}Q{8 * (MAX_STATES - cell.S)}x"
    plain, addresses, empty_like = of_library(problem.library)
    return Compiled(
        loaded.forward, loaded.backward, loaded.step, loaded.pack,
        struct.pack("15Q", code(cell, real), *sizes, *passes, shares_openmp(problem)),
        struct.Struct(f"5q13Q{3 * states}"), struct.Struct(f"6q24Q{4 * states}"), (problem.T, problem.B, P),
        plain, addresses, empty_like, kept_shapes(problem),
    )  # fmt: skip


def of_library(name: str) -> tuple[Callable, Callable, Callable]:
    if name == "numpy":
        return plain_arrays, array_addresses, partial(np.empty_like, subok=False)
    return plain_tensors, tensor_addresses, arrays.module("torch").empty_like


@lru_cache(16)
def library(real: str) -> Any:
    """Matmuls and time loop."""
    loaded = compiler.load(f"sequence-{real}", text("simd.h", "sequence.h", "sequence.cpp"), flags(real))
    for function in (loaded.forward, loaded.backward):
        function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_int
    loaded.pack.argtypes, loaded.pack.restype = [ctypes.c_char_p, ctypes.c_void_p], ctypes.c_int64
    return loaded


@cache
def code(cell: Cell, real: str) -> int:
    """The address of a cell's `Code`."""
    library(real)
    loaded = compiler.load(f"{cell.name}-{real}", source(cell), flags(real))
    return ctypes.addressof(ctypes.c_char.in_dll(loaded, "code"))


def source(cell: Cell) -> str:
    hold = cell.flags.index(HOLD) if HOLD in cell.flags else -1
    definition = f'#line 1 "{cell.name}"\n{render_cell(cell)}#define HOLD_FLAG {hold}\n'
    return text("simd.h", "sequence.h") + definition + text("cell.cpp")
