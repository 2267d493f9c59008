"""Problem -> the first backend that has no reason against it; and everything there is to say about that choice."""

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from ..core import arrays
from ..core.problem import Direction, Memory, Options, Problem, Weights
from ..core.validation import checked
from . import cudnn
from .two_pass import Phased

Backend = ModuleType | Phased
ORDER = ("cuda", "triton", "native", "numpy")  # fastest first
VARIABLE = "GPU_RNN_BACKEND"


class BackendError(RuntimeError):
    """The requested backend does not support the call, or none does. The message lists every reason."""


@cache
def backend(name: str) -> ModuleType:
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(ORDER)}, and 'auto'")
    return import_module(f".{name}", __package__)


# os.environ raises and catches two errors to say that a name isn't there, which takes as long as a small product.
RAW: Any = getattr(os.environ, "_data", os.environ)
KEY: Any = VARIABLE if RAW is os.environ else os.environ.encodekey(VARIABLE)


def variable() -> str | None:
    """What $GPU_RNN_BACKEND says."""
    return os.environ[VARIABLE] if KEY in RAW else None


def forced(name: str | None = None) -> str | None:
    """The backend that the caller or the environment insists on, if any."""
    name = name or variable()
    return None if not name or name == "auto" else backend(name).NAME


def order(problem: Problem) -> tuple[str, ...]:
    """Fastest first. On the CPU none is asked before NumPy whose library would be imported by that."""
    on_cpu = ("numpy", "native", "triton", "cuda")
    return tuple(name for name in on_cpu if name in ORDER) if problem.device == "cpu" else ORDER


def serving(name: str, problem: Problem) -> Backend:
    """A backend as the problem's cell takes it."""
    return backend(name) if problem.cell.phases is None else Phased(backend(name))


def choose(problem: Problem, name: str | None = None) -> Backend:
    """The backend for a problem. `name` or $GPU_RNN_BACKEND forces one, which serves it or whose reasons are raised."""
    only = forced(name)
    candidates = (only,) if only else order(problem)
    for candidate in candidates:
        module = serving(candidate, problem)
        if not module.reasons(problem):
            return module
    reasons = {candidate: serving(candidate, problem).reasons(problem) for candidate in candidates}
    what = f"backend {only!r} was requested but does not support" if only else "no backend supports"
    raise BackendError(f"{what} {problem}:\n" + "\n".join(f"  {line}" for line in listed(reasons)))


def prepared(
    name: str, x: Any, weights: Weights, state: Sequence[Any], options: Options, training: bool
) -> tuple[Backend, Problem, tuple]:
    """The backend that runs a call, the problem that it is, and its states with zeros filled in for None."""
    problem, filled = checked(name, x, weights, state, options, training)
    return choose(problem, options.backend), problem, filled


NO_RANGE = nullcontext()


def profiled(
    backend: Backend, problem: Problem, backward: bool = False, directions: int = 1, layers: int = 1
) -> AbstractContextManager:
    """A range around one call of a backend while torch.profiler is on; an NVTX range under torch's emit_nvtx.

    Its name, as "gpu_rnn::lstm forward T=256 B=64 H=512 persistent/cluster", is made only then.
    """
    if problem.library != "torch" or not arrays.module("torch")._C._autograd._profiler_enabled():
        return NO_RANGE
    sizes = {"T": problem.T, "B": problem.B, "H": problem.H, "P": problem.P}
    together = {letter: n for letter, n in {"L": layers, "D": directions}.items() if n > 1}
    words = [f"{letter}={n}" for letter, n in (sizes | together).items() if n is not None]
    way, method = "backward" if backward else "forward", backend.method(problem, backward, layers > 1)
    name = " ".join([f"gpu_rnn::{problem.cell.name}", way, *words, method])
    return arrays.module("torch").profiler.record_function(name)


# What a backend is told of a problem, in one place.


def forward(
    backend: Backend, problem: Problem, x: Any, weights: Weights, state: Sequence[Any]
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    """-> y; the states after, and their history if the problem has one; the tape, empty unless it is training."""
    with profiled(backend, problem):
        y, last, tape = backend.forward(
            problem.cell, x, weights, state, reverse=problem.reverse, tf32=problem.tf32,
            save=problem.training or problem.history, step_exact=problem.step_exact,
        )  # fmt: skip
    return results(backend, problem, problem.reverse, y, last, tape)


def forwards(
    backend: Backend, problem: Problem, directions: Sequence[Direction]
) -> list[tuple[Any, tuple, tuple]]:  # fmt: skip
    """`forward` of directions, of a problem but for its `reverse`: at once where the backend can, else in turn."""
    if len(directions) == 1 or not hasattr(backend, "forwards"):
        return [forward(backend, turned(problem, d.reverse), d.x, d.weights, d.state) for d in directions]
    save = problem.training or problem.history
    with profiled(backend, problem, directions=len(directions)):
        found = backend.forwards(problem.cell, directions, tf32=problem.tf32, save=save, step_exact=problem.step_exact)
    return [results(backend, problem, d.reverse, *each) for d, each in zip(directions, found)]


def turned(problem: Problem, reverse: bool) -> Problem:
    return problem if problem.reverse == reverse else replace(problem, reverse=reverse)


def stacks(backend: Backend, problem: Problem, *, backward: bool) -> bool:
    """Whether the backend would run the layers of a stack at once, by the problem of any of them."""
    return isinstance(backend, ModuleType) and hasattr(backend, "stacks") and backend.stacks(problem, backward)


Layers = Sequence[tuple[Weights, Sequence[Any]]]  # of a stack, weights and states of each


def stack(backend: Backend, problem: Problem, x: Any, layers: Layers) -> list[tuple[Any, tuple, tuple]]:
    """`forward` of every layer, of a problem that is the first one's: at once where the backend would, else in turn."""
    if stacks(backend, problem, backward=False):
        assert isinstance(backend, ModuleType)
        with profiled(backend, problem, layers=len(layers)):
            return backend.stack(problem.cell, x, layers, tf32=problem.tf32, save=problem.training)
    found: list[tuple[Any, tuple, tuple]] = []
    for k, (weights, state) in enumerate(layers):
        found.append(forward(backend, problem.layer(k), found[-1][0] if k else x, weights, state))
    return found


def results(
    backend: Backend, problem: Problem, reverse: bool, y: Any, last: tuple, tape: tuple
) -> tuple[Any, tuple, tuple]:
    if problem.history:
        last = (*last, *backend.history(problem.cell, tape, reverse=reverse, like=y))
    return y, last, tape if problem.training else ()


def backward(
    backend: Backend, problem: Problem, x: Any, weights: Weights, state: Sequence[Any], y: Any, tape: tuple, dy: Any,
    dlast: tuple, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """-> the gradients in `needs` by name, and those of the states as "state". Without a tape it is recorded now."""
    S = problem.cell.S
    if not tape:
        y, _, tape = forward(backend, replace(problem, training=True, history=False), x, weights, state)
    with profiled(backend, problem, backward=True):
        return backend.backward(
            problem.cell, x, weights, state, y, tape, dy, dlast[:S], dlast[S:], reverse=problem.reverse,
            tf32=problem.tf32, needs=needs,
        )  # fmt: skip


def backwards(
    backend: Backend, problem: Problem, directions: Sequence[Direction], recorded: Sequence[tuple[Any, tuple]],
    arriving: Sequence[tuple[Any, tuple]], needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """`backward` of directions. recorded: y and the tape of each; arriving: dy and dlast."""
    S = problem.cell.S
    if len(directions) == 1 or not hasattr(backend, "backwards"):
        return [
            backward(backend, turned(problem, d.reverse), d.x, d.weights, d.state, *kept, *gradients, wanted)
            for d, kept, gradients, wanted in zip(directions, recorded, arriving, needs)
        ]
    if not recorded[0][1]:
        again = forwards(backend, replace(problem, training=True, history=False), directions)
        recorded = [(y, tape) for y, _, tape in again]
    whole = [(*kept, dy, dlast[:S], dlast[S:]) for kept, (dy, dlast) in zip(recorded, arriving)]
    with profiled(backend, problem, backward=True, directions=len(directions)):
        return backend.backwards(problem.cell, directions, whole, tf32=problem.tf32, needs=needs)


def stack_back(
    backend: Backend, problem: Problem, x: Any, layers: Layers, recorded: Sequence[tuple[Any, tuple]],
    arriving: Sequence[tuple[Any, tuple]], needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """`backward` of every layer: at once where the backend would, else in turn.

    arriving: as of `backwards`, dy None for zero. needs: of all but the first layer "x" means that those below need
    something; who isn't needed has no gradients.
    """
    if stacks(backend, problem, backward=True):
        assert isinstance(backend, ModuleType)
        whole = [(*kept, dy, dlast, ()) for kept, (dy, dlast) in zip(recorded, arriving)]
        with profiled(backend, problem, backward=True, layers=len(layers)):
            return backend.stack_back(problem.cell, x, layers, whole, tf32=problem.tf32, needs=needs)
    found: list[dict[str, Any]] = [{"state": ()} for _ in layers]
    from_above = None
    for k in reversed(range(len(layers))):
        (y, tape), (dy, dlast), below = recorded[k], arriving[k], recorded[k - 1][0] if k else x
        there = [each for each in (dy, from_above) if each is not None]
        dy = sum(there[1:], there[0]) if there else arrays.zeros(tuple(y.shape), like=y)
        found[k] = backward(backend, problem.layer(k), below, *layers[k], y, tape, dy, dlast, needs[k])
        if "x" not in needs[k]:
            break
        from_above = found[k].get("x")
    return found


def listed(reasons: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {reason}" for name, why in reasons.items() for reason in why]


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call and how, and why not the others; `str` gives it as a short text.

    problem: the call's sizes, dtype, device and modifiers. backend: its name, None where no backend supports the call.
    forced: whether the caller or $GPU_RNN_BACKEND requested it. plan: a line each for the input projection, the forward
    and the backward pass. reasons: by backend, why it does not support the call; empty where it does. cudnn: the
    algorithm that torch.nn would request from cuDNN on a GPU.
    """

    problem: Problem
    backend: str | None  # None: nothing can run it
    forced: bool
    plan: str
    reasons: dict[str, tuple[str, ...]]  # by backend, why not; empty: it could run this too
    cudnn: str  # the algorithm torch.nn would ask cuDNN for on a GPU
    memory: Memory | None = None  # bytes of a call; None where nothing can run it

    def __str__(self) -> str:
        lines = [str(self.problem)]
        if self.backend is None:
            lines.append("  backend: none, no backend supports this call")
        else:
            how = "requested" if self.forced else f"first available for {self.problem.library} arrays on this device"
            lines += [f"  backend: {self.backend} ({how})", *(f"    {line}" for line in self.plan.splitlines())]
        if self.memory is not None:
            lines.append(f"  memory: {self.memory_in_words()}")
        for name, reasons in self.reasons.items():
            if name != self.backend:
                why = reasons or ("available, but not the first choice",)
                lines += [f"  not {name}: {reason}" for reason in why]
        return "\n".join([*lines, f"  cuDNN would use: {self.cudnn}"])

    def memory_in_words(self) -> str:
        assert self.memory is not None
        saved, forward, backward = map(in_words, self.memory)
        kept = f" and {backward} backward, {saved} kept in between" if self.problem.training else ""
        return f"at most {forward} at once forward{kept}"


def explain(problem: Problem, name: str | None = None) -> Explanation:
    """Where a problem runs and how, why not elsewhere, and what cuDNN would do with it."""
    only = forced(name)
    reasons = {candidate: tuple(serving(candidate, problem).reasons(problem)) for candidate in ORDER}
    able = [candidate for candidate in ([only] if only else order(problem)) if not reasons[candidate]]
    chosen = able[0] if able else None
    plan = serving(chosen, problem).plan(problem) if chosen else ""
    memory = serving(chosen, problem).memory(problem) if chosen else None
    return Explanation(problem, chosen, only is not None, plan, reasons, cudnn.algorithm(problem), memory)


def in_words(count: int) -> str:
    """Bytes, to three digits."""
    power = next(power for power in range(4) if count < 1000 << 10 * power or power == 3)
    return f"{count / (1 << 10 * power):.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
