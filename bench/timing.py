"""One case: every contender is checked first, then those that passed are timed in turn, A B A B.

On the CPU, and for single steps, by torch.utils.benchmark, which warms up in every round; calls of over 10 ms without
that, by timeit. Sequences on a GPU by CUDA events around each call, with inputs that rotate through more than the L2
cache. Every call starts on an idle device, and on a CPU when the threads of whoever was before have gone to sleep: it
is the time that a caller waits. Each round times everybody once, so that the ratio to torch.nn is a median of ratios
within a round.
"""

import ctypes
import math
import time
import timeit
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.benchmark

from . import problems
from .contenders import Run, contender
from .data import Data, named
from .oracle import Judge, exact
from .problems import KERNEL_OF, KERNELS, NN, STACKED, WIDTH, Case

ROUNDS = (3, 25)  # at least, for a spread; at most, since more tell nothing new
SLOW_S = 1  # a call that needs no warm-up, so that the one that was checked counts
LARGE_FLOPS = 1e10
BLOCK_S = 0.01  # a timed block on the CPU is at least as long
GLANCE_S, PATIENCE_S = 0.005, 0.5  # how often to look whether threads still spin; when to go on all the same
Emit = Callable[[dict[str, Any]], None]


def measure(case: Case, names: list[str], seconds: float, emit: Emit, answers: str | None = None) -> None:
    """Emit a row for each contender: at once when it can't be timed, at the end when it was.

    `{"doing": name}` comes before anything that a contender could hang or crash in. `answers`: a folder in which the
    exact answer to a large case waits for who measures it with another number of threads.
    """
    torch.set_grad_enabled(case.training)
    emit({"doing": "oracle"})
    data = Data(case)
    judge, ready = Judge(case, exact_once(case, data, answers)), {}
    for name in names:
        emit({"doing": name})
        outcome = prepared(name, case, data, judge)
        if isinstance(outcome, Checked):
            ready[name] = outcome
        else:
            emit({"row": {"contender": name, **outcome}})
            if case.device == "cuda":
                torch.cuda.synchronize()  # raises after an illegal access: let a new process go on without it
    alternated(case, ready, seconds, emit)
    for name, checked in ready.items():
        rounds = np.array(checked.times)
        p20, median, p80 = 1e6 * np.quantile(rounds, (0.2, 0.5, 0.8))
        emit({
            "row": {
                "contender": name, "status": "ok", "median_us": median, "p20_us": p20, "p80_us": p80,
                "rounds": len(rounds), "us_per_step": median / case.T, "peak_bytes": checked.peak,
                "saved_bytes": checked.saved, "error": checked.error, "plan": checked.plan,
                "note": beside_kernel(name, ready),
                "ratio": float(np.median(rounds / ready[NN].times)) if NN in ready and name not in KERNELS else None,
            }
        })  # fmt: skip


def exact_once(case: Case, data: Data, folder: str | None) -> dict[str, torch.Tensor]:
    if folder is None or case.flops < LARGE_FLOPS:
        return exact(case, data)
    path = Path(folder) / f"{case}.pt"
    if path.exists():
        found = torch.load(path)
        path.unlink()
    else:
        found = exact(case, data)
        torch.save(found, path)
    return found


class Checked:
    """A contender whose answer was right."""

    def __init__(self, run: Run, error: float, saved: int | None, plan: str) -> None:
        self.run, self.error, self.saved, self.plan = run, error, saved, plan
        self.first: tuple[float, int | None] | None = None  # seconds and peak of a first call that counts
        self.peak: int | None = None
        self.times: list[float] = []  # seconds per call, by round


def beside_kernel(name: str, ready: dict[str, Checked]) -> str:
    """What a layer costs beside the kernel that it calls: the median difference within a round."""
    kernel = KERNEL_OF.get(name)
    if kernel not in ready:
        return ""
    return f"{1e6 * np.median(np.subtract(ready[name].times, ready[kernel].times)):.1f} us more than {kernel}"


def prepared(name: str, case: Case, data: Data, judge_of_all: Judge) -> Checked | dict[str, str]:
    """The contender, or the status and the note of the row that says why not."""
    try:
        somebody = contender(name)
        reason = "it computes one layer" if case.L > 1 and name not in STACKED else somebody.absent(case)
        if reason:
            return {"status": "absent", "note": reason}
        run = somebody.prepare(case, data)
        judge = somebody.judge(case, data, lambda: judge_of_all)
        answers: list[Any] = []
        answering = clock(case, lambda k: answers.append(somebody.answer(case, data, run)))
        with Kept() as kept:
            first = watched(case, partial(answering, 0, 1))
        (answer,) = answers
        errors = judge.errors(answer)
        wrong = judge.verdict(errors)
        if wrong:
            return {"status": "wrong", "note": wrong}
        if name == NN:
            judge.baseline(errors)
        saved = None if name in KERNELS else kept.bytes(beside=(*named(case, answer).values(), *data.x))
        checked = Checked(run, judge.relative(errors), saved, somebody.plan(case))
        if case.device == "cpu" and first[0] > SLOW_S and not somebody.compiles:
            checked.first = first
        return checked
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"status": "out of memory", "note": line(error)}
    except Exception as error:  # whatever it is, it costs one row
        return {"status": "failed", "note": f"{type(error).__name__}: {line(error)}"}


def line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def alternated(case: Case, ready: dict[str, Checked], seconds: float, emit: Emit) -> None:
    """Fill in peaks and times."""
    clocks, first = {name: clock(case, checked.run) for name, checked in ready.items()}, {}
    for name, checked in ready.items():
        emit({"doing": name})
        first[name], peak = checked.first or watched(case, partial(clocks[name], 0, 1))  # the check was the warm-up
        checked.peak = None if name in KERNELS else peak  # theirs was taken before
    calls = {name: max(1, math.ceil(BLOCK_S / t)) if counts_calls(case) else 1 for name, t in first.items()}
    round_s = sum(first[name] * calls[name] for name in ready)
    least, most = ROUNDS[0] - (round_s > problems.LONG_S), ROUNDS[1]
    rounds, end = 0, time.perf_counter() + seconds - round_s
    if round_s > seconds:  # they are slow: that was the first round
        rounds = 1
        for name, checked in ready.items():
            checked.times.append(first[name])
    while rounds < least or (rounds < most and time.perf_counter() < end):
        rounds += 1
        for name, checked in ready.items():
            emit({"doing": name})
            checked.times.append(clocks[name](rounds, calls[name]))


def counts_calls(case: Case) -> bool:
    return case.device == "cpu" or case.mode == "step"


def clock(case: Case, run: Run) -> Callable[[int, int], float]:
    """A function of (k, calls): seconds per call of the k-th input."""
    if counts_calls(case):
        scope = {"run": run, "k": 0}
        timer = torch.utils.benchmark.Timer("run(k)", globals=scope, num_threads=torch.get_num_threads())
        without_warming = timeit.Timer("run(k)", globals=scope)

        def counted(k: int, calls: int) -> float:
            scope["k"] = k
            settle(case)
            return timer.timeit(calls).median if calls > 1 else without_warming.timeit(1)

        return counted

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def evented(k: int, calls: int) -> float:
        torch.cuda.synchronize()
        begin.record()
        run(k)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return evented


def settle(case: Case) -> None:
    """Wait until no thread spins that somebody left behind: OpenBLAS's do for a tenth of a second after a product, and
    would take the cores from whoever comes next."""
    if case.device != "cpu" or torch.get_num_threads() == 1:
        return
    end, spent, busy = time.perf_counter() + PATIENCE_S, time.process_time(), True
    while busy and time.perf_counter() < end:
        time.sleep(GLANCE_S)
        before, spent = spent, time.process_time()
        busy = spent - before > GLANCE_S / 5


# ---- memory ---------------------------------------------------------------------------------------------------------


def watched(case: Case, call: Callable[[], float]) -> tuple[float, int | None]:
    """What `call` returns, and the most memory it took beside what was there before; None where it can't be told."""
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept would hide what the call takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the highest resident size so far
    except (OSError, AttributeError):
        return call(), None
    before = resident("VmRSS")
    return call(), max(resident("VmHWM") - before, 0)


class Kept:
    """While it is entered, what torch's autograd keeps for a gradient, beside what one is asked of."""

    def __enter__(self) -> "Kept":
        self.asked, self.found = False, dict[int, int]()
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.asked = True
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, beside: Iterable[torch.Tensor]) -> int | None:
        """Of all but these; None where torch's autograd wasn't asked to keep any."""
        others = {tensor.untyped_storage().data_ptr() for tensor in beside}
        return sum(size for at, size in self.found.items() if at not in others) if self.asked else None


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


# ---- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(device: str, seconds: float = 0.3) -> dict[str, Any]:
    """The best rates seen here: matrix product by dtype, and copy. The floor is made of them."""
    size, dtypes = (1024, ["float32", "float64"]) if device == "cpu" else (8192, list(WIDTH))
    found = {}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as torch.nn's recurrent layers round
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2 * size**3 / best(partial(torch.matmul, a, b), device, seconds)
    if device == "cuda":
        torch.set_float32_matmul_precision("highest")
    source = torch.randn((64 << 20 if device == "cpu" else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    return {"flops": found, "bandwidth": 2 * source.nbytes / best(lambda: target.copy_(source), device, seconds)}


def best(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest seconds per call."""
    call()
    timer = torch.utils.benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while not found or time.perf_counter() < stop:
        found.append(timer.timeit(10 if device == "cuda" else 1).median)
    return min(found)
