"""The data of a case, and the answer of a contender by name."""

from typing import Any

import torch

import gpu_rnn
from gpu_rnn.kernels import cells

from .problems import WIDTH, Case

ROTATED_BYTES = 128 << 20  # twice the L2 cache of an H200: an input is not in it when it comes round again


class Data:
    """Random and never zero: x (several, for rotation), weights, states, and gradients of all outputs, as tensors."""

    def __init__(self, case: Case) -> None:
        self.case, dtype = case, getattr(torch, case.dtype)
        generator = torch.Generator(case.device).manual_seed(20)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, generator=generator, device=case.device)).to(dtype)

        G, B, H, L = case.gates, case.B, case.H, case.L
        size = case.T * B * case.I * WIDTH[case.dtype]
        copies = 1 if case.device == "cpu" else min(512, -(-ROTATED_BYTES // size))
        self.x = list(draw(copies, case.T, B, case.I))
        self.weights: dict[
            str, torch.Tensor
        ] = {}  # by names that are our functions', above the first layer with _l1...
        for layer in range(L):
            I, end = (H, f"_l{layer}") if layer else (case.I, "")
            self.weights |= {
                f"w_ih{end}": draw(G * H, I, scale=I**-0.5),
                f"w_hh{end}": draw(G * H, H, scale=H**-0.5),
                f"b_ih{end}": draw(G * H),
                f"b_hh{end}": draw(G * H),
            }
        letters, sizes = cells.get(case.cell).states, (B, H) if L == 1 else (L, B, H)
        self.state = {f"{letter}0": draw(*sizes) for letter in letters}
        self.dy = draw(case.T, B, H)
        self.dlast = tuple(draw(*sizes) for _ in letters)

    def double(self) -> "Data":
        """The same numbers, exactly, in float64; of the inputs only the first."""
        wide = object.__new__(Data)
        wide.case, wide.x, wide.dy = self.case, [self.x[0].double()], self.dy.double()
        wide.weights = {name: value.double() for name, value in self.weights.items()}
        wide.state = {name: value.double() for name, value in self.state.items()}
        wide.dlast = tuple(value.double() for value in self.dlast)
        return wide


def function(cell: str) -> tuple[Any, dict[str, str]]:
    """Ours for a cell, and its options."""
    if cell.startswith("rnn_"):
        return gpu_rnn.rnn, {"nonlinearity": cell.removeprefix("rnn_")}
    return getattr(gpu_rnn, cell), {}


def named(case: Case, answer: Any) -> dict[str, torch.Tensor]:
    """What a contender returned, as (y, last states[, gradients by name]) or by name, flat and by name."""
    if isinstance(answer, dict):
        return answer
    y, last, *gradients = answer
    last = last if isinstance(last, (tuple, list)) else (last,)
    letters = cells.get(case.cell).states
    flat = {"y": y, **{f"{letter}T": value for letter, value in zip(letters, last, strict=True)}}
    flat |= {f"d{name}": value for name, value in (gradients[0] if gradients else {}).items()}
    return {name: torch.as_tensor(value).detach() for name, value in flat.items() if value is not None}
