"""The exact answer to a case, and how far from it an answer may be."""

from typing import Any

import numpy as np
import torch

import gpu_rnn
from tests.tolerance import EPS, ULPS

from .contenders import module_run
from .data import Data, function, named
from .problems import Case

# How far torch.nn may be from the exact answer, in units of the largest exact value. It is its own measure; this is
# only there to notice that it computed something else.
BASELINE = {"float64": 1e-10, "float32": 2e-2, "float16": 5e-2, "bfloat16": 2e-1}  # float32 may be TF32


def exact(case: Case, data: Data) -> dict[str, torch.Tensor]:
    """The answer in float64: of one layer on the CPU our NumPy's, else torch.nn's. So it judges others, too."""
    wide = data.double()
    if case.device == "cuda" or case.L > 1:
        return named(case, module_run(torch.nn, case, wide)(0))
    arrays = {name: value.numpy() for name, value in {**wide.weights, **wide.state}.items()}
    ours, options = function(case.cell)
    options = options | {"backend": "numpy"}
    if not case.training:
        return named(case, ours(wide.x[0].numpy(), **arrays, **options))
    (y, last), pullback = gpu_rnn.vjp(ours, wide.x[0].numpy(), **arrays, **options)
    return named(case, (y, last, pullback((wide.dy.numpy(), tuple(d.numpy() for d in wide.dlast)))))


class Judge:
    """The rule of tests/tolerance.py, on the device: |answer - exact| <= 2 |torch.nn - exact| + a few ulp."""

    def __init__(self, case: Case, right: dict[str, torch.Tensor]) -> None:
        self.case, self.exact = case, right
        self.scale = {name: max(float(value.abs().max()), 1e-30) for name, value in self.exact.items()}
        self.allowed = {name: BASELINE[case.dtype] * scale for name, scale in self.scale.items()}

    def errors(self, answer: Any) -> dict[str, float]:
        """The largest difference per array; ValueError for one that is absent or has another size."""
        given, found = named(self.case, answer), {}
        for name, right in self.exact.items():
            if name not in given or given[name].numel() != right.numel():
                raise ValueError(f"{name} is missing or has the wrong size")
            found[name] = float((given[name].to(right.device).double().reshape(right.shape) - right).abs().max())
        return found

    def baseline(self, errors: dict[str, float]) -> None:
        """torch passed: from now on it is the measure."""
        ulps = ULPS * EPS[self.case.dtype]
        self.allowed = {name: 2 * error + ulps * self.scale[name] for name, error in errors.items()}

    def verdict(self, errors: dict[str, float]) -> str | None:
        """What is wrong, or None. NaN is wrong."""
        wrong = [name for name, error in errors.items() if not error <= self.allowed[name]]
        told = [f"{name} is off by {errors[name]:.2g}, {self.allowed[name]:.2g} allowed" for name in wrong]
        return ", ".join(told) or None

    def relative(self, errors: dict[str, float]) -> float:
        """The worst of the arrays, in units of its largest exact value."""
        return float(np.max([error / self.scale[name] for name, error in errors.items()]))
