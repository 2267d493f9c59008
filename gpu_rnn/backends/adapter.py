"""What backends have in common that run a problem as another one, by a backend below: `TwoPass` and `Heads`."""

from dataclasses import dataclass
from typing import Any

from ..core import arrays
from ..core.problem import Problem, Run, Weights
from . import gpu_common
from .protocol import Backend, Needs, never_fuses_layers

INPUT_SIDE = {"x", "w_ih", "b_ih"}


@dataclass(frozen=True)
class Adapter:
    """Most of a `Backend`; `backend` is the one that it runs on."""

    backend: Backend

    def inner(self, problem: Problem) -> Problem:
        """Return the problem that the backend below is given."""
        raise NotImplementedError

    @property
    def NAME(self) -> str:
        return self.backend.NAME

    @property
    def RUNS_HEADS(self) -> bool:
        return self.backend.RUNS_HEADS

    @property
    def REPEATS_INPUTS(self) -> bool:
        return self.backend.REPEATS_INPUTS

    def reasons(self, problem: Problem) -> list[str]:
        return self.backend.reasons(self.inner(problem))

    def method(self, problem: Problem, backward: bool) -> str:
        return self.backend.method(self.inner(problem), backward)

    def warmup(self, problem: Problem) -> tuple[str, ...]:
        return self.backend.warmup(self.inner(problem))

    def fuses_layers(self, problem: Problem, backward: bool) -> bool:
        return never_fuses_layers(problem, backward)

    def gemm_operands(self, x: Any, weights: Weights) -> tuple[Any, Weights]:
        return self.backend.gemm_operands(x, weights)


def recurrent_needs(names: Needs) -> Needs:
    """The needs of a run that takes its input projection as x."""
    return {*names} - INPUT_SIDE | ({"x"} if INPUT_SIDE & {*names} else set())


def input_side_grad(backend: Backend, problem: Problem, run: Run, dWx: Any, names: Needs) -> dict[str, Any]:
    """The gradients of x, w_ih and b_ih that are needed, from that of the input projection [T, B, G*H]."""
    with arrays.matmul_precision(run.x, problem.tf32):
        x, weights = backend.gemm_operands(run.x, run.weights)
        dWx, _ = backend.gemm_operands(dWx, Weights(None, None))
        gradients = gpu_common.input_projection_grad(dWx, x, weights, names)
    return {name: to_library(array, like=run.x) for name, array in gradients.items()}


def to_library(array: Any, like: Any) -> Any:
    """What may be a NumPy array as one of the library of `like`."""
    return arrays.from_numpy(array, like=like) if arrays.library(array) == "numpy" else array
