"""One case: every implementation is checked first, then those that passed are timed in turn, A B A B.

On the CPU, and for single steps, by torch.utils.benchmark, which warms up in every round; calls of over 10 ms without
that, by timeit. Sequences on a GPU by CUDA events around each call, with inputs that rotate through more than the L2
cache. Every call starts on an idle device, and on a CPU when the threads of the one before have gone to sleep: it is
the time that a caller waits. Each round times every implementation once, so that the ratio to torch.nn is a median of
ratios within a round.
"""

import ctypes
import math
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.benchmark

from . import kernels, modifiers, third_party  # noqa: F401, they add theirs to IMPLEMENTATIONS
from .correctness import AccuracyCheck
from .data import Data, Tensors, named
from .implementations import IMPLEMENTATIONS, Run, module_run
from .problems import KERNEL_OF, KERNELS, NN, STACKED, WIDTH, Case

ROUNDS = (3, 25)  # at least, for a spread; at most, since more tell nothing new
LONG_S = 6  # a round of all implementations that takes so long is timed twice, not three times
SLOW_S = 1  # a call that needs no warm-up, so that the one that was checked counts
LARGE_FLOPS = 1e10
BLOCK_S = 0.01  # a timed block on the CPU is at least as long
GLANCE_S, PATIENCE_S = 0.005, 0.5  # how often to look whether threads still spin; when to go on all the same
Emit = Callable[[dict[str, Any]], None]


class Checked:
    """An implementation whose outputs were right."""

    def __init__(self, run: Run, error: float, saved: int | None, plan: str) -> None:
        self.run, self.error, self.saved, self.plan = run, error, saved, plan
        self.first: tuple[float, int | None] | None = None  # seconds and peak of a first call that counts
        self.peak: int | None = None
        self.times: list[float] = []  # seconds per call, by round


def measure(emit: Emit, case: Case, names: list[str], seconds: float, folder: str | None = None) -> None:
    """Emit a row for each implementation: at once when it can't be timed, at the end when it was.

    {"begin": name} comes before anything in which one could hang or crash. `folder`: where the exact outputs of a large
    case wait for the process that measures it with another number of threads.
    """
    torch.set_grad_enabled(case.training)
    emit({"begin": "exact"})
    data, ready = Data(case), dict[str, Checked]()
    check = AccuracyCheck(case, exact_once(case, data, folder))
    for name in names:
        emit({"begin": name})
        outcome = checked(name, case, data, check)
        if isinstance(outcome, Checked):
            ready[name] = outcome
        else:
            emit({"row": {"implementation": name, **outcome}})
            if case.device == "cuda":
                torch.cuda.synchronize()  # raises after an illegal access: let a new process go on without it
    interleave(emit, case, ready, seconds)
    for name, one in ready.items():
        p20, median, p80 = 1e6 * np.quantile(one.times, (0.2, 0.5, 0.8))
        ratio = NN in ready and name not in KERNELS and float(np.median(np.divide(one.times, ready[NN].times)))
        note, kernel = "", KERNEL_OF.get(name)
        if kernel in ready:
            overhead = 1e6 * np.median(np.subtract(one.times, ready[kernel].times))
            note = f"{overhead:.1f} us more than {kernel}"
        row = {
            "implementation": name, "status": "ok", "median_us": median, "p20_us": p20, "p80_us": p80,
            "rounds": len(one.times), "us_per_step": median / case.T, "peak_bytes": one.peak, "saved_bytes": one.saved,
            "error": one.error, "plan": one.plan, "note": note, "ratio": ratio or None,
        }  # fmt: skip
        emit({"row": row})
    if case.device == "cuda":
        torch.cuda.empty_cache()


def exact_once(case: Case, data: Data, folder: str | None) -> Tensors:
    """The outputs in float64, by torch.nn: so it judges its own float32, too."""
    path = Path(folder or "") / f"{case}.pt"
    if folder and path.exists():
        exact = torch.load(path)
        path.unlink()
        return exact
    exact = named(case, module_run(torch.nn, case, data.double())(0))
    if folder and case.flops >= LARGE_FLOPS:
        torch.save(exact, path)
    return exact


def checked(name: str, case: Case, data: Data, default: AccuracyCheck) -> Checked | dict[str, str]:
    """The implementation, or the status and the note of the row that says why not."""
    try:
        one = IMPLEMENTATIONS[name]
        beyond = name not in STACKED and (case.L > 1 or case.mode == "model")
        if reason := "it computes one layer, outside of a model" if beyond else one.skip_reason(case):
            return {"status": "absent", "note": reason}
        prepared, outputs = one.prepare(case, data), list[Any]()
        run, answer = prepared if isinstance(prepared, tuple) else (prepared, partial(prepared, 0))
        check, call = one.check(case, data, default), clock(case, lambda k: outputs.append(answer()))
        with SavedTensors() as saved:
            first = watch_memory(case, partial(call, 0, 1))
        errors = check.errors(outputs[0])
        if message := check.error_message(errors):
            return {"status": "wrong", "note": message}
        if name == NN:
            check.set_baseline(errors)
        others = (*named(case, outputs[0]).values(), *data.x)
        result = Checked(run, check.relative(errors), None if name in KERNELS else saved.bytes(others), one.plan(case))
        if case.device == "cpu" and first[0] > SLOW_S and not one.compiles:
            result.first = first
        return result
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"status": "out of memory", "note": " ".join(str(error).split())[:300]}
    except Exception as error:  # whatever it is, it costs one row
        return {"status": "failed", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def interleave(emit: Emit, case: Case, ready: dict[str, Checked], seconds: float) -> None:
    """Fill in peaks and times."""
    clocks, first = {name: clock(case, one.run) for name, one in ready.items()}, {}
    for name, one in ready.items():
        emit({"begin": name})
        first[name], peak = one.first or watch_memory(case, partial(clocks[name], 0, 1))  # the check was the warm-up
        one.peak = None if name in KERNELS else peak  # theirs was taken before
    calls = {name: max(1, math.ceil(BLOCK_S / t)) if counts_calls(case) else 1 for name, t in first.items()}
    round_s = sum(first[name] * calls[name] for name in ready)
    least, most = ROUNDS[0] - (round_s > LONG_S), ROUNDS[1]
    rounds, end = 0, time.perf_counter() + seconds - round_s
    if round_s > seconds:  # they are slow: that was the first round
        rounds = 1
        for name, one in ready.items():
            one.times.append(first[name])
    while rounds < least or (rounds < most and time.perf_counter() < end):
        rounds += 1
        for name, one in ready.items():
            emit({"begin": name})
            one.times.append(clocks[name](rounds, calls[name]))


def counts_calls(case: Case) -> bool:
    return case.device == "cpu" or case.mode == "step"


def clock(case: Case, run: Run) -> Callable[[int, int], float]:
    """A function of (k, calls): seconds per call of the k-th input."""
    if counts_calls(case):
        scope = {"run": run, "k": 0}
        timer = torch.utils.benchmark.Timer("run(k)", globals=scope, num_threads=torch.get_num_threads())
        without_warm_up = timeit.Timer("run(k)", globals=scope)

        def counted(k: int, calls: int) -> float:
            scope["k"] = k
            wait_for_idle_threads(case)
            return timer.timeit(calls).median if calls > 1 else without_warm_up.timeit(1)

        return counted

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events(k: int, calls: int) -> float:
        torch.cuda.synchronize()
        begin.record()
        run(k)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    return by_events


def wait_for_idle_threads(case: Case) -> None:
    """OpenBLAS's threads spin for a tenth of a second after a matmul, and would take the cores from the next one."""
    if case.device != "cpu" or torch.get_num_threads() == 1:
        return
    end, spent, busy = time.perf_counter() + PATIENCE_S, time.process_time(), True
    while busy and time.perf_counter() < end:
        time.sleep(GLANCE_S)
        before, spent = spent, time.process_time()
        busy = spent - before > GLANCE_S / 5


# ---- memory ---------------------------------------------------------------------------------------------------------


def watch_memory(case: Case, call: Callable[[], float]) -> tuple[float, int | None]:
    """What `call` returns, and the most memory it took in addition to what was there; None where it can't be told."""
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return call(), torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
        before = resident_bytes("VmRSS")
    except (OSError, AttributeError):
        return call(), None
    return call(), max(resident_bytes("VmHWM") - before, 0)


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, what torch's autograd saves for a gradient, apart from its leaves."""

    def __init__(self) -> None:
        self.used, self.sizes = False, dict[int, int]()
        super().__init__(self.keep, lambda tensor: tensor)

    def __enter__(self) -> "SavedTensors":
        super().__enter__()
        return self

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.used = True
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes(self, others: Any) -> int | None:
        """Of all but the others; None where torch's autograd saved nothing at all."""
        known = {tensor.untyped_storage().data_ptr() for tensor in others}
        return sum(size for at, size in self.sizes.items() if at not in known) if self.used else None


# ---- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(emit: Emit, device: str, seconds: float = 0.3) -> None:
    """Emit the best rates seen here, of matmul by dtype and of copy. The roofline is made of them."""
    size, dtypes = (1024, ["float32", "float64"]) if device == "cpu" else (8192, list(WIDTH))
    flops = {}
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as torch.nn's recurrent layers round
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        flops[dtype] = 2 * size**3 / best(partial(torch.matmul, a, b), device, seconds)
    torch.set_float32_matmul_precision("highest")
    source = torch.randn((64 << 20 if device == "cpu" else 1 << 30) // 4, device=device)
    target = torch.empty_like(source)
    emit({"flops": flops, "bandwidth": 2 * source.nbytes / best(lambda: target.copy_(source), device, seconds)})


def best(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest seconds per call."""
    call()
    timer = torch.utils.benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times, stop = list[float](), time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        times.append(timer.timeit(10 if device == "cuda" else 1).median)
    return min(times)
