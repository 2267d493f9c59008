"""`cell`: a cell definition that a user wrote, as a layer and as a function.

Cell definitions are those of `gpu_rnn.kernels.cells`; docs/new_cell.md has examples. From there on it is a cell like
the others: every backend, operator and keyword takes it by its name.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from gpu_rnn.kernels import cells, validation

from .. import functional
from ..core.problem import Options, Weights
from ..core.validation import check_flags, check_words, first_states
from ..functional import ModifierKeywords, parse_keywords, unpack_states
from .base import CELLS, PARAM_NAMES, Keywords
from .layers import RecurrentLayer

RESERVED = [name.removeprefix("weight_") for name in PARAM_NAMES if name is not None]


class FunctionKeywords(ModifierKeywords, total=False):
    """units: [N*H] per-unit weights of the cell, those of its first name first."""

    units: Any


class Custom(RecurrentLayer):
    """What the layers that `cell` makes have in common."""

    cell_name: ClassVar[str]  # type: ignore[misc]
    function: ClassVar[Callable]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None,
        **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        super().__init__(
            self.cell_name, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device,
            dtype, keywords,
        )  # fmt: skip

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        super()._register(suffix, I, device, dtype)
        for unit in CELLS[self.cell_name].units:
            parameter = nn.Parameter(torch.empty(self.hidden_size, device=device, dtype=dtype))
            self.register_parameter(f"weight_{unit}{suffix}", parameter)

    def _per_unit_params(self, suffix: str) -> dict[str, tuple[Any, ...]]:
        units = [getattr(self, f"weight_{unit}{suffix}") for unit in CELLS[self.cell_name].units]
        return {"units": (torch.cat(units),)} if units else {}

    def _has_modifiers(self) -> bool:
        return bool(CELLS[self.cell_name].units) or super()._has_modifiers()


def cell(
    step: Callable | None = None, *, gates: str, states: str, units: Sequence[str] = (), grad: Callable | None = None,
    name: str | None = None, check: bool = False,
) -> Any:  # fmt: skip
    """Make a layer class from the equations of one time step, written once for every backend.

        @gpu_rnn.cell(gates="fn", states="h")
        def MGU(x, h, state):
            f = sigmoid(x[0] + h[0])
            n = tanh(x[1] + f * h[1])
            return ((1 - f) * state[0] + f * n,)

        layer = MGU(64, 128, num_layers=2)
        y, hT = layer(x)                                                  # torch
        y, hT = MGU.function(x, w_ih, w_hh, b_ih, b_hh, h0=h0)            # NumPy, CuPy and torch arrays

    The layer has GRU's arguments, parameters, keywords and layouts, with G = len(gates) blocks of H rows in w_ih, w_hh
    and the biases, and with several states (h0, c0, ...) instead of h0. `weight_p_l0` [H] and so on are the per-unit
    weights named p. `function` takes them as `units` [N*H] and is like `gpu_rnn.gru` otherwise, also with w_ih=None.

    Args:
        step: step(x, h, state) -> the states after, a tuple of S. Every argument is a tuple: of the input and of the
            recurrent projections of all gates, biases included, and of the states before; h[k] is row block k of
            w_hh h_{t-1} + b_hh. Allowed are + - * /, numbers, and the functions of `gpu_rnn.kernels.mathematics`.
            With `units` it takes a fourth, a tuple of their values; with `grad` it returns what that needs as well, as
            (states after, saved). It must be a function of its arguments alone: it is read once.
        gates, states: a letter for each; the first state is the output, and the input of the recurrent matmul.
        units: names of per-unit weights, as peepholes are.
        grad: grad(dnew, new, state, saved) -> gradients of x, h and the states, all without what comes back through
            w_hh; with `units` it takes them as a fifth and returns their gradients, too. Derived where it is None.
        name: of the cell; that of `step` when None. A name keeps its definition: a later one gets a number, "MGU#2".
        check: whether to hold the gradient against finite differences of step now, in float64.

    Returns:
        A class; without step, a decorator that makes one.

    Raises:
        TypeError: step isn't a cell definition: it branches on a value, calls what it may not, or returns other things.
        ValueError: wrong numbers of results, an unsuited name, or, with `check`, a wrong gradient; names the input.
    """
    if step is None:
        return partial(cell, gates=gates, states=states, units=units, grad=grad, name=name, check=check)
    if not callable(step):
        raise TypeError(f"step must be a function of (x, h, state), got {step!r}")
    check_words(name=name)
    check_flags(check=check)
    label, names = name or step.__name__, (units,) if isinstance(units, str) else units
    if not isinstance(names, (tuple, list)):
        raise TypeError(f"{label}: units must be a tuple of names, got {names!r}")
    if grad is not None and not callable(grad):
        raise TypeError(f"{label}: grad must be a function, got {grad!r}")
    names = tuple(names)
    new = register(label, gates, states, names, step, grad, check)
    CELLS[new.name] = new
    place = step.__qualname__ if name is None else name
    members = {
        "cell_name": new.name, "function": staticmethod(function(new)),
        "__doc__": step.__doc__, "__module__": step.__module__, "__qualname__": place,
    }  # fmt: skip
    return type(label, (Custom,), members)


def register(
    name: str, gates: str, states: str, units: tuple[str, ...], step: Callable, grad: Callable | None, checked: bool
) -> cells.Cell:
    validation.form(name, gates, states, units, step, grad)
    if reserved := set(units) & set(RESERVED):
        raise ValueError(f"{name}: units can't be named {', '.join(sorted(reserved))}, as other weights are")
    new = cells.made(name, gates, states, step, grad, units)
    if checked:
        validation.derivative(new.run)
    return cells.define(new)


def function(cell: cells.Cell) -> Callable:
    """Make the function of a cell, which is like `gpu_rnn.gru`."""
    initial = first_states(cell)

    def run(
        x,
        w_ih,
        w_hh,
        b_ih=None,
        b_hh=None,
        *,
        reverse=False,
        backend=None,
        precision=None,
        recompute=False,
        step_exact=False,
        **modifiers,
    ):
        state = tuple(modifiers.pop(label, None) for label in initial)
        if cell.units and modifiers.get("units") is None:
            raise TypeError(f"{cell.name} has weights per unit ({', '.join(cell.units)}): units=[{len(cell.units)}*H]")
        parsed = parse_keywords(
            Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact),
            modifiers,
            FunctionKeywords,
        )
        return unpack_states(functional.run(cell.name, x, Weights(w_ih, w_hh, b_ih, b_hh), state, *parsed), cell.S)

    run.__name__ = run.__qualname__ = cell.name
    plain = list(inspect.signature(run).parameters.values())
    first = [inspect.Parameter(label, inspect.Parameter.KEYWORD_ONLY, default=None) for label in initial]
    run.__signature__ = inspect.Signature([*plain[:5], *first, *plain[5:]])  # type: ignore[attr-defined]
    functional.KEYWORDS[run] = FunctionKeywords
    return run
