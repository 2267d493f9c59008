"""How far an implementation may be from the exact outputs: the rule of tests/tolerance.py, on the device."""

from typing import Any

from tests.tolerance import EPS, ULPS

from .data import Tensors, named
from .problems import Case

# How far torch.nn may be from the exact outputs, in units of the largest exact value. Its error is what others are
# measured by; this is only there to notice that it computed something else.
BASELINE = {"float64": 1e-10, "float32": 2e-2, "float16": 5e-2, "bfloat16": 2e-1}  # float32 may be TF32


class AccuracyCheck:
    """|output - exact| <= 2 |torch.nn in the same dtype - exact| + a few ulp, by the largest error of each array."""

    def __init__(self, case: Case, exact: Tensors) -> None:
        self.case, self.exact = case, exact
        self.scale = {name: max(float(value.abs().max()), 1e-30) for name, value in exact.items()}
        self.allowed = {name: BASELINE[case.dtype] * scale for name, scale in self.scale.items()}

    def errors(self, outputs: Any) -> dict[str, float]:
        """The largest error of each array. ValueError for one that is missing or has another size."""
        arrays, errors = named(self.case, outputs), {}
        for name, exact in self.exact.items():
            if name not in arrays or arrays[name].numel() != exact.numel():
                raise ValueError(f"{name} is missing or has the wrong size")
            errors[name] = float((arrays[name].to(exact.device).double().reshape(exact.shape) - exact).abs().max())
        return errors

    def set_baseline(self, errors: dict[str, float]) -> None:
        """Measure by these errors, torch's, from now on."""
        ulps = ULPS * EPS[self.case.dtype]
        self.allowed = {name: 2 * error + ulps * self.scale[name] for name, error in errors.items()}

    def error_message(self, errors: dict[str, float]) -> str:
        """What is wrong, NaN included; empty if nothing is."""
        wrong = [name for name, error in errors.items() if not error <= self.allowed[name]]
        return ", ".join(f"{name} is off by {errors[name]:.2g}, {self.allowed[name]:.2g} allowed" for name in wrong)

    def relative(self, errors: dict[str, float]) -> float:
        """The worst error, in units of the largest exact value of its array."""
        return max(error / self.scale[name] for name, error in errors.items())
