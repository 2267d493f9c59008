"""`cell`: a cell definition that a user wrote, as a layer and as a function.

Cell definitions are those of `gpu_rnn.kernels.cells`; docs/new_cell.md has examples. From there on it is a cell like
the others: every backend, operator and keyword takes it by its name.
"""

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpu_rnn.kernels import cells, validation

from .. import functional
from ..core.heads import join, split
from ..core.problem import Options, Weights
from ..core.validation import check_flags, check_words, first_states
from ..functional import ModifierKeywords, parse_keywords, unpack_states
from .base import CELLS, PARAM_NAMES
from .layers import RecurrentLayer

BIASES = PARAM_NAMES.b_ih, PARAM_NAMES.b_hh
NOTHING: Mapping[str, Any] = {}
RESERVED = [name.removeprefix("weight_") for name in PARAM_NAMES if name is not None]


class FunctionKeywords(ModifierKeywords, total=False):
    """units: [N*H] per-unit weights of the cell, those of its first name first."""

    units: Any


@dataclass(frozen=True)
class Layout:
    """Which parameters a layer of a custom cell has, and how the arrays of its kernel are made of them."""

    rows: dict[str, str]  # by parameter: the gates that have a block of H rows in it; the kernel's other rows are zero
    units: tuple[str, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    constants: dict[str, float] = field(default_factory=dict)
    transforms: dict[str, Callable] = field(default_factory=dict)
    initial: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> tuple[str, ...]:
        """The names of the fourth argument of step, in its order."""
        return *self.units, *self.scalars, *self.constants


class Custom(RecurrentLayer):
    """What the layers that `cell` makes have in common."""

    cell_name: ClassVar[str]  # type: ignore[misc]
    function: ClassVar[Callable]
    layout: ClassVar[Layout]

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, device: Any = None, dtype: Any = None, **keywords: Any,
    ) -> None:  # fmt: skip
        """keywords: those of every layer (`Keywords`), and the cell's constants."""
        constants = {name: keywords.pop(name, value) for name, value in self.layout.constants.items()}
        for name, value in constants.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        super().__init__(
            self.cell_name, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device,
            dtype, keywords,  # type: ignore[arg-type]
        )  # fmt: skip
        for name, value in constants.items():
            setattr(self, name, float(value))

    def extra_repr(self) -> str:
        values = {name: (getattr(self, name), value) for name, value in self.layout.constants.items()}
        differing = [f"{name}={own}" for name, (own, value) in values.items() if own != value]
        return ", ".join([super().extra_repr(), *differing])

    def function_arguments(self, layer: int = 0, reverse: bool = False) -> dict[str, Tensor]:
        """The arrays of one layer and direction that `function` takes: w_ih, w_hh [G*H, .], b_ih, b_hh, units [N*H]."""
        suffix = self._suffixes[layer * self._directions + reverse]
        own = {name: array for name, (array,) in self._per_unit_params(suffix).items()}
        named = self._weights(suffix)._asdict() | own
        return {name: array for name, array in named.items() if array is not None}

    @property
    def _all_weights(self) -> list[list[str]]:
        return [[name + suffix for name in self._rows()] for suffix in self._suffixes]

    def _rows(self) -> dict[str, str]:
        """Those of the layout that are there."""
        return {name: gates for name, gates in self.layout.rows.items() if gates and (self.bias or name not in BIASES)}

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        H = self.hidden_size
        columns = {PARAM_NAMES.w_ih: (I,), PARAM_NAMES.w_hh: (H // self.num_heads,)}
        shapes = {name: (len(gates) * H, *columns.get(name, ())) for name, gates in self._rows().items()}
        shapes |= {f"weight_{unit}": (H,) for unit in self.layout.units} | dict.fromkeys(self.layout.scalars, (1,))
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-k, k), k = 1 / sqrt(hidden_size), but those whose first value the cell says."""
        super().reset_parameters()
        H = self.hidden_size
        for label, value in {**self.layout.scalars, **self.layout.initial}.items():
            name, _, gate = label.partition(".")
            first = self.layout.rows[name].index(gate) * H if gate else 0
            for suffix in self._suffixes:
                if (parameter := self._parameters.get(name + suffix)) is not None:
                    rows = parameter.detach()[first : first + H if gate else None]
                    for block in rows.split(H // self.num_heads) if name == PARAM_NAMES.w_hh and gate else [rows]:
                        value(block) if callable(value) else block.fill_(value)

    def _value(self, name: str, suffix: str) -> Tensor:
        """A parameter as the cell takes it."""
        parameter, transform = getattr(self, name + suffix), self.layout.transforms.get(name)
        if transform is None:
            return parameter
        if name == PARAM_NAMES.w_hh and self.num_heads > 1:
            G = len(self.layout.rows[name])
            return join([*map(transform, split(parameter, self.num_heads, G, axis=0))], G, axis=0)
        return transform(parameter)

    def _weights(self, suffix: str) -> Weights:
        if self._plain:
            return super()._weights(suffix)
        gates, H, there = CELLS[self.cell_name].gates, self.hidden_size, self._rows()
        w_ih = getattr(self, PARAM_NAMES.w_ih + suffix)
        columns = {PARAM_NAMES.w_ih: w_ih.shape[1:], PARAM_NAMES.w_hh: (H // self.num_heads,)}

        def whole(name: str) -> Tensor | None:
            if name in BIASES and not self.bias:
                return None
            if (rows := there.get(name, "")) == gates:
                return self._value(name, suffix)
            blocks = dict(zip(rows, self._value(name, suffix).split(H))) if rows else {}
            zero = w_ih.new_zeros((H, *columns.get(name, ())))
            return torch.cat([blocks.get(gate, zero) for gate in gates])

        return Weights(*map(whole, self.layout.rows))

    def _per_unit_params(self, suffix: str) -> dict[str, tuple[Any, ...]]:
        layout, like = self.layout, (self.hidden_size,)
        if not layout.own:
            return {}
        values = [self._value(f"weight_{unit}", suffix) for unit in layout.units]
        values += [self._value(name, suffix).expand(like) for name in layout.scalars]
        w_ih = getattr(self, PARAM_NAMES.w_ih + suffix)
        values += [w_ih.new_full(like, getattr(self, name)) for name in layout.constants]
        return {"units": (torch.cat(values),)}

    def _has_modifiers(self) -> bool:
        return bool(self.layout.own) or super()._has_modifiers()

    def _try_cached(self, *args: Any) -> tuple[Tensor, tuple] | None:
        return super()._try_cached(*args) if self._plain else None

    @property
    def _plain(self) -> bool:
        """Whether the parameters are the arrays of the kernel as they are."""
        gates, layout = CELLS[self.cell_name].gates, self.layout
        return not layout.own and not layout.transforms and all(rows == gates for rows in layout.rows.values())


def cell(
    step: Callable | None = None, *, gates: str, states: str, units: Sequence[str] = (), grad: Callable | None = None,
    name: str | None = None, check: bool = False, scalars: Mapping[str, float] = NOTHING,
    constants: Mapping[str, float] = NOTHING, biases: str | None = None,
    transforms: Mapping[str, Callable] = NOTHING, initial: Mapping[str, Any] = NOTHING,
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

    The layer has GRU's arguments, parameters, keywords and layouts, with (h0, c0, ...) for several states instead of
    h0. Its weights have a block of H rows for every gate whose x or h the step reads. `weight_p_l0` [H] and so on are
    the per-unit weights named p. `function` is like `gpu_rnn.gru`, also with w_ih=None: its arrays have blocks for all
    G = len(gates) gates, and per-unit weights, scalars and constants are its `units` [N*H]; the layer's method
    `function_arguments` makes them.

    Args:
        step: step(x, h, state) -> the states after, a tuple of S. Every argument is a tuple: of the input and of the
            recurrent projections of all gates, biases included, and of the states before; h[k] is row block k of
            w_hh h_{t-1} + b_hh. Allowed are + - * /, numbers, and the functions of `gpu_rnn.kernels.mathematics`.
            With `units`, `scalars` or `constants` it takes a fourth, a tuple of them in this order; with `grad` it
            returns what that needs as well, as (states after, saved). It must be a function of its arguments alone: it
            is read once.
        gates, states: a letter for each; the first state is the output, and the input of the recurrent matmul.
        units: names of per-unit weights, as peepholes are.
        scalars: names of weights that all units share, with their first values; for alpha the layer has `alpha_l0` [1].
        constants: names of numbers that aren't learned, with their defaults; they are keywords of the layer.
        biases: the gates that have biases; all when None.
        transforms: by parameter ("weight_hh", "weight_p", a scalar's name): a torch function of it, whose result the
            cell takes in its place; with heads "weight_hh" is transformed head by head.
        initial: by parameter, or parameter and gate ("bias_ih.f"): a first value, or a function that writes one; with
            heads "weight_hh.f" is written head by head.
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
        more: dict[str, Any] = {"scalars": scalars, "constants": constants, "transforms": transforms}
        more |= {"biases": biases, "initial": initial, "name": name, "check": check}
        return partial(cell, gates=gates, states=states, units=units, grad=grad, **more)
    if not callable(step):
        raise TypeError(f"step must be a function of (x, h, state), got {step!r}")
    check_words(name=name, biases=biases)
    check_flags(check=check)
    label, names = name or step.__name__, (units,) if isinstance(units, str) else units
    if not isinstance(names, (tuple, list)):
        raise TypeError(f"{label}: units must be a tuple of names, got {names!r}")
    if grad is not None and not callable(grad):
        raise TypeError(f"{label}: grad must be a function, got {grad!r}")
    names, title = tuple(names), label.rpartition(".")[2]
    reserved = {*dir(Custom), *inspect.signature(Custom).parameters, *PARAM_NAMES, "mode", "training"}
    if taken := {*scalars, *constants} & reserved:
        raise ValueError(
            f"{label}: scalars and constants can't be named {', '.join(sorted(taken))}, as a layer has these"
        )
    new = checked_cell(label, gates, states, (*names, *scalars, *constants), step, grad, check)
    layout = Layout(
        rows(new, gates if biases is None else biases), names, dict(scalars), dict(constants), dict(transforms),
        dict(initial),
    )  # fmt: skip
    known = {*layout.rows, *(f"weight_{unit}" for unit in names), *scalars}
    for what, functions in {"transforms": transforms, "initial": initial}.items():
        if unknown := {key for key in functions if key.partition(".")[0] not in known}:
            raise ValueError(f"{label}: {what} are of {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
    new = cells.register(new)  # last: what is refused leaves nothing behind
    CELLS[new.name] = new
    own = {
        "cell_name": new.name, "function": staticmethod(function(new)), "layout": layout,
        "__doc__": step.__doc__, "__module__": step.__module__,
        "__qualname__": step.__qualname__ if title == step.__name__ else title,
    }  # fmt: skip
    return type(title, (Custom,), own)


def rows(cell: cells.Cell, biases: str) -> dict[str, str]:
    """By parameter: the gates whose input or recurrent projection the step reads, and has a bias."""
    if unknown := set(biases) - set(cell.gates):
        raise ValueError(f"{cell.name}: biases are those of gates ({cell.gates}), got {', '.join(sorted(unknown))}")
    read = cells.reads(cell)
    x, h = ("".join(gate for k, gate in enumerate(cell.gates) if k in read[name]) for name in ("x", "h"))
    x = x or cell.gates  # a layer has an input
    b_ih, b_hh = ("".join(gate for gate in gates if gate in biases) for gates in (x, h))
    return {PARAM_NAMES.w_ih: x, PARAM_NAMES.w_hh: h, PARAM_NAMES.b_ih: b_ih, PARAM_NAMES.b_hh: b_hh}


def checked_cell(
    name: str, gates: str, states: str, units: tuple[str, ...], step: Callable, grad: Callable | None, checked: bool
) -> cells.Cell:
    validation.validate_definition(name, gates, states, units, step, grad)
    if reserved := set(units) & set(RESERVED):
        raise ValueError(f"{name}: units can't be named {', '.join(sorted(reserved))}, as other weights are")
    new = cells.make_cell(name, gates, states, step, grad, units)
    if checked:
        validation.gradcheck(new.kernel_cell)
    return new


def function(cell: cells.Cell) -> Callable:
    """Make the function of a cell, which is like `gpu_rnn.gru`."""
    initial = first_states(cell)

    def run(
        x, w_ih, w_hh, b_ih=None, b_hh=None, *, reverse=False, backend=None, precision=None, recompute=False,
        step_exact=False, **modifiers,
    ):  # fmt: skip
        state = tuple(modifiers.pop(label, None) for label in initial)
        if cell.per_unit_params and modifiers.get("units") is None:
            names = cell.per_unit_params
            raise TypeError(f"{cell.name} has weights per unit ({', '.join(names)}): units=[{len(names)}*H]")
        options = Options(reverse, backend, precision, recompute=recompute, step_exact=step_exact)
        parsed = parse_keywords(options, modifiers, FunctionKeywords)
        return unpack_states(functional.run(cell.name, x, Weights(w_ih, w_hh, b_ih, b_hh), state, *parsed), cell.S)

    run.__name__ = run.__qualname__ = cell.name
    plain = list(inspect.signature(run).parameters.values())
    first = [inspect.Parameter(label, inspect.Parameter.KEYWORD_ONLY, default=None) for label in initial]
    run.__signature__ = inspect.Signature([*plain[:5], *first, *plain[5:]])  # type: ignore[attr-defined]
    functional.add_function(run, FunctionKeywords, f"cell's {cell.name}.function")
    return run
