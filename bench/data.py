"""The inputs of a case, and the outputs of an implementation by name."""

from typing import Any

import torch

import gpu_rnn
from gpu_rnn.kernels import cells

from .problems import WIDTH, Case

ROTATED_BYTES = 128 << 20  # twice the L2 cache of an H200: an input is not in it when it comes round again
Tensors = dict[str, torch.Tensor]


class Data:
    """Random and never zero: x (several, for rotation), weights, states and gradients of all outputs, as tensors."""

    def __init__(self, case: Case) -> None:
        dtype, generator = getattr(torch, case.dtype), torch.Generator(case.device).manual_seed(20)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, generator=generator, device=case.device)).to(dtype)

        G, B, H, L = case.gates, case.B, case.H, case.L
        size = case.T * B * case.I * WIDTH[case.dtype]
        self.x = list(draw(1 if case.device == "cpu" else min(512, -(-ROTATED_BYTES // size)), case.T, B, case.I))
        self.weights: Tensors = {}  # by the names of our functions, above the first layer with _l1, ...
        for layer in range(L):
            I, end = (H, f"_l{layer}") if layer else (case.I, "")
            self.weights |= {
                f"w_ih{end}": draw(G * H, I, scale=I**-0.5), f"w_hh{end}": draw(G * H, H, scale=H**-0.5),
                f"b_ih{end}": draw(G * H), f"b_hh{end}": draw(G * H),
            }  # fmt: skip
        letters, sizes = cells.get(case.cell).states, (B, H) if L == 1 else (L, B, H)
        self.state = {f"{letter}0": draw(*sizes) for letter in letters}
        self.dy = draw(case.T, B, H)
        self.dlast = tuple(draw(*sizes) for _ in letters)
        if case.mode == "model":  # weights of the linear layers before and after
            self.embedding, self.head = draw(case.I, case.I, scale=case.I**-0.5), draw(H, H, scale=H**-0.5)

    def double(self) -> "Data":
        """The same numbers, exactly, in float64; of the inputs only the first."""
        wide = object.__new__(Data)
        wide.x = [self.x[0].double()]
        for name in vars(self).keys() & {"dy", "embedding", "head"}:
            setattr(wide, name, getattr(self, name).double())
        wide.weights, wide.state = ({k: v.double() for k, v in each.items()} for each in (self.weights, self.state))
        wide.dlast = tuple(value.double() for value in self.dlast)
        return wide

    def copies(self) -> tuple[Tensors, Tensors]:
        """Weights and states of an implementation's own."""
        return tuple({k: v.clone() for k, v in each.items()} for each in (self.weights, self.state))  # type: ignore


def function(cell: str) -> tuple[Any, dict[str, str]]:
    """Our function for a cell, and its options."""
    kind, _, nonlinearity = cell.partition("_")
    return getattr(gpu_rnn, kind), {"nonlinearity": nonlinearity} if nonlinearity else {}


def named(case: Case, outputs: Any) -> Tensors:
    """The outputs of an implementation, (y, last states[, gradients by name]) or by name, flat and by name."""
    if isinstance(outputs, dict):
        return outputs
    y, last, *gradients = outputs
    last = last if isinstance(last, (tuple, list)) else (last,)
    flat = {"y": y} | {f"{letter}T": value for letter, value in zip(cells.get(case.cell).states, last, strict=True)}
    flat |= {f"d{name}": value for name, value in (gradients[0] if gradients else {}).items()}
    return {name: torch.as_tensor(value).detach() for name, value in flat.items() if value is not None}
