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

        G, B, H = case.gates, case.B, case.H
        size = case.T * B * case.I * WIDTH[case.dtype]
        copies = 1 if case.device == "cpu" else min(512, -(-ROTATED_BYTES // size))
        self.x = list(draw(copies, case.T, B, case.I))
        self.weights = {
            "w_ih": draw(G * H, case.I, scale=case.I**-0.5),
            "w_hh": draw(G * H, H, scale=H**-0.5),
            "b_ih": draw(G * H),
            "b_hh": draw(G * H),
        }
        letters = cells.get(case.cell).states
        self.state = {f"{letter}0": draw(B, H) for letter in letters}
        self.dy = draw(case.T, B, H)
        self.dlast = tuple(draw(B, H) for _ in letters)

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


def named(case: Case, answer: tuple) -> dict[str, torch.Tensor]:
    """What a contender returned, as (y, last states[, gradients by name]), flat and by name."""
    y, last, *gradients = answer
    last = last if isinstance(last, (tuple, list)) else (last,)
    letters = cells.get(case.cell).states
    flat = {"y": y, **{f"{letter}T": value for letter, value in zip(letters, last, strict=True)}}
    flat |= {f"d{name}": value for name, value in (gradients[0] if gradients else {}).items()}
    return {name: torch.as_tensor(value).detach() for name, value in flat.items() if value is not None}
