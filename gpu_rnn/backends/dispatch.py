"""Problem -> the first backend that has no reason against it; and everything there is to say about that choice."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from ..core.problem import Grads, Memory, Problem, Run
from . import cudnn
from .heads import Heads
from .protocol import Backend, Needs
from .two_pass import TwoPass

ORDER = ("cuda", "triton", "native", "numpy")  # fastest first
VARIABLE = "GPU_RNN_BACKEND"


class BackendError(RuntimeError):
    """The requested backend does not support the call, or none does. The message lists every reason."""


@cache
def backend(name: str) -> Backend:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(ORDER)}, and 'auto'")
    return import_module(f".{name}", __package__)  # type: ignore[return-value]


def requested_backend(name: str | None = None) -> str | None:
    """The backend that the caller or the environment selects, if any."""
    name = os.environ.get(VARIABLE) if name in (None, "auto") else name
    return None if name in (None, "", "auto") else backend(name).NAME


def priority(problem: Problem) -> tuple[str, ...]:
    """Fastest first; on the CPU those come last whose library would be imported to ask them."""
    on_cpu = ("native", "numpy", "triton", "cuda")
    return tuple(name for name in on_cpu if name in ORDER) if problem.device == "cpu" else ORDER


def backend_for(name: str, problem: Problem) -> Backend:
    """A backend as it runs the problem's cell and heads."""
    of_cell = backend(name) if problem.cell.lowered is None else TwoPass(backend(name))
    return of_cell if problem.heads == 1 or of_cell.RUNS_HEADS else Heads(of_cell)


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The backend for a problem. `name` or $GPU_RNN_BACKEND selects one, which runs it or whose reasons are raised."""
    only = requested_backend(name)
    candidates = [backend_for(candidate, problem) for candidate in ((only,) if only else priority(problem))]
    reasons = {}
    for candidate in candidates:
        reasons[candidate.NAME] = candidate.reasons(problem)
        if not reasons[candidate.NAME]:
            return candidate
    what = f"backend {only!r} was requested but does not support" if only else "no backend supports"
    lines = [f"  {name}: {reason}" for name, why in reasons.items() for reason in why]
    raise BackendError("\n".join([f"{what} {problem}:", *lines]))


def backward(
    backend: Backend, problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads],
    needs: Sequence[Needs],
) -> list[dict[str, Any]]:  # fmt: skip
    """`Backend.backward`, which recomputes what a run saved where that is empty."""
    if len(saved[0]) < 2:  # nothing, or y alone
        results = backend.forward(problem.variant(training=True, history=False), runs)
        saved = [(result.y, *result.saved) for result in results]
    return backend.backward(problem, runs, saved, grads, needs)


def call_name(backend: Backend, problem: Problem, backward: bool) -> str:
    """Name one pass for a profiler, as "gpu_rnn::lstm forward T=256 B=64 H=512 persistent/cluster"."""
    sizes = {"T": problem.T, "B": problem.B, "H": problem.H, "P": problem.P}
    counts = {"L": problem.layers, "D": problem.directions, "N": problem.heads}
    several = {letter: n for letter, n in counts.items() if n > 1}
    words = [f"{letter}={n}" for letter, n in (sizes | several).items() if n is not None]
    way = "backward" if backward else "forward"
    return " ".join([f"gpu_rnn::{problem.cell.name}", way, *words, backend.method(problem, backward)])


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call and how, and why not the others; `str` gives it as a short text.

    problem: the call's sizes, dtype, device and modifiers. backend: its name, None where no backend supports the call.
    requested: the backend that the caller or $GPU_RNN_BACKEND requested, or None. plan: a line each for the input
    projection, the forward and the backward pass. reasons: by backend, why it does not support the call; empty where it
    does. cudnn: the algorithm that torch.nn would request from cuDNN on a GPU.
    """

    problem: Problem
    backend: str | None  # None: nothing can run it
    requested: str | None
    plan: str
    reasons: dict[str, tuple[str, ...]]  # by backend, why not; empty: it could run this too
    cudnn: str  # the algorithm torch.nn would ask cuDNN for on a GPU
    memory: Memory | None = None  # bytes of a call; None where nothing can run it

    def __str__(self) -> str:
        lines = [str(self.problem)]
        if self.backend is None:
            why = f"{self.requested} was requested and does not support" if self.requested else "no backend supports"
            lines.append(f"  backend: none, {why} this call")
        else:
            how = "requested" if self.requested else f"first available for {self.problem.library} arrays on this device"
            lines += [f"  backend: {self.backend} ({how})", *(f"    {line}" for line in self.plan.splitlines())]
        if self.memory is not None:
            lines.append(f"  memory: {self.memory_to_str()}")
        for name, reasons in self.reasons.items():
            if name != self.backend:
                other = f"{self.requested} was requested" if self.requested else f"backend={name!r} selects it"
                lines += [f"  not {name}: {reason}" for reason in reasons or (f"available; {other}",)]
        return "\n".join([*lines, f"  on a GPU, cuDNN would use: {self.cudnn}"])

    def memory_to_str(self) -> str:
        assert self.memory is not None
        saved, forward, backward = map(bytes_to_str, self.memory)
        kept = f" and {backward} backward, {saved} kept in between" if self.problem.training else ""
        return f"at most {forward} at once forward{kept}"


def explain(problem: Problem, name: str | None = None) -> Explanation:
    """Where a problem runs and how, why not elsewhere, and what cuDNN would do with it."""
    only = requested_backend(name)
    reasons = {candidate: tuple(backend_for(candidate, problem).reasons(problem)) for candidate in ORDER}
    able = [candidate for candidate in ([only] if only else priority(problem)) if not reasons[candidate]]
    chosen = able[0] if able else None
    plan = backend_for(chosen, problem).plan(problem) if chosen else ""
    memory = backend_for(chosen, problem).memory(problem) if chosen else None
    return Explanation(problem, chosen, only, plan, reasons, cudnn.algorithm(problem), memory)


def bytes_to_str(count: int) -> str:
    """Bytes, to three digits."""
    power = next(power for power in range(4) if count < 1000 << 10 * power or power == 3)
    return f"{count / (1 << 10 * power):.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
