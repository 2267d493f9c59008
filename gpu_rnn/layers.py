"""Layers in the place of torch.nn's: RNN, LSTM, GRU and their cells; and `replace_`, which puts them there.

Arguments, attributes, names, shapes, order and first values of the parameters are torch.nn's, so that state_dicts go
both ways with strict=True:

    ours = gpu_rnn.LSTM(64, 128, num_layers=2)
    ours.load_state_dict(torch.nn.LSTM(64, 128, num_layers=2).state_dict())
    torch.nn.LSTM(64, 128, num_layers=2).load_state_dict(ours.state_dict())

Beyond torch.nn's: gradients in eval mode, on every device; and the keywords of `Keywords`.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import NoneType
from typing import Any, ClassVar, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropped
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from gpu_rnn.kernels import cells

from . import arrays, dispatch, functional
from .arguments import PRECISIONS, prepared
from .autograd import capturing, recorded, required, sequences, stacked, transformed, unreal
from .dispatch import ORDER, Backend, variable
from .functional import NORMALIZED_BITWISE, ShapeError
from .problem import Around, Direction, Options, Problem, Weights
from .woven import Applied, apply, checked_place, dropout_mask, positive, probability

OURS = ("rnn_tanh", "rnn_relu", "lstm", "gru", functional.PROJECTED)
PAGES = {name: cells.get(name) for name in OURS}  # looked up as torch.compile can
PEEPHOLE = "weight_ch"
NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last two the LSTM's alone
NAMES = Weights("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # torch's, and in torch's order
FIRST = [name + "_l0" for name in NAMES[:5]]


class Keywords(TypedDict, total=False):
    """What torch.nn's layers don't have; every layer and cell takes these, and has them as attributes.

    backend, precision: as for `gpu_rnn.lstm`; precision="tf32" or "ieee" decides over the products of float32 on a GPU.
    recompute: whether backward runs forward once more, layer by layer, instead of keeping what it needs: less memory.
    bitwise: whether a sequence is, bit for bit, what its instants one at a time are, by `step` or a `stream`; its
        inputs take a product per instant then. Not with layer_norm.
    zoneout: probability by which a state stays what it was, one per state or one for all; in training by a mask for
        every instant, else by the mean (Krueger et al. 2017).
    recurrent_dropout: probability of a zero in what the recurrent weights see of h, and input_dropout: in the input of
        every layer; one mask for a whole sequence (Gal & Ghahramani 2016).
    weight_dropout: probability of a zero in the recurrent weights (DropConnect; Merity et al. 2018).
    """

    backend: str | None
    precision: str | None
    recompute: bool
    bitwise: bool
    zoneout: float | tuple[float, ...]
    recurrent_dropout: float
    input_dropout: float
    weight_dropout: float


class GRUKeywords(Keywords, total=False):
    """What GRU and GRUCell take, too.

    layer_norm: whether the input and the recurrent part are normalized over the units (Ba, Kiros & Hinton 2016), with
        gains weight_ln_ih_l0 and weight_ln_hh_l0 [3*H], and so on; the biases stay what they are.
    reset_after: whether the reset gate comes after the recurrent product, as in torch.nn and cuDNN, or before it (Cho
        et al. 2014); the equations are `gpu_rnn.gru`'s.
    recurrent_dropout_on: "h" or "candidate": whether recurrent dropout is of what the recurrent weights see, or of what
        is written into the state, so that what is there stays (Semeniuta et al. 2016).
    """

    layer_norm: bool
    reset_after: bool
    recurrent_dropout_on: str


class LSTMKeywords(Keywords, total=False):
    """What LSTM and LSTMCell take, too; the equations are `gpu_rnn.lstm`'s.

    layer_norm: as for GRU, [4*H], and so is the cell state that the output sees, with weight_ln_c_l0 and bias_ln_c_l0
        [H].
    peephole: whether the gates i, f, o see the cell state, by weights weight_ch_l0 [3*H], and so on.
    coupled: whether f = 1 - i; then the gates are i, g, o and all weights have 3*H rows.
    cell_clip: bound of the cell state.
    recurrent_dropout_on: as for GRU.
    forget_bias: first value of the forget gate's bias_ih, that of bias_hh being 0 (Jozefowicz et al. 2015).
    """

    layer_norm: bool
    recurrent_dropout_on: str
    peephole: bool
    coupled: bool
    cell_clip: float | None
    forget_bias: float | None


PROBABILITIES = ("zoneout", "recurrent_dropout", "input_dropout", "weight_dropout")
CHOICES = {"backend": (None, "auto", *ORDER), "precision": (None, *PRECISIONS)}


class Call(NamedTuple):
    """What a call asks for around its cells, for every layer and direction together: `functional.AroundKeywords`."""

    reset: Tensor | None = None  # [T, B]
    reset_state: tuple[Tensor, ...] | None = None  # per state [L*D, ...]
    lengths: Tensor | None = None
    starts: Tensor | None = None
    generator: torch.Generator | None = None
    return_states: bool = False


PLAIN = Call()


class Plan(NamedTuple):
    """How a plain call goes, of one layer in one direction, and with it all that look like it."""

    backend: Backend
    problem: Problem
    wanted: bool  # whether a gradient may be asked for
    squeezed: bool  # whether states lose the axis of layers on their way
    zeros: list[tuple[int, ...]]  # shapes of the states, where none are given


# All that decides on a plan is in its key, and no array or layer is kept, so that none can be out of date.
PLANS: dict[tuple, Plan | None] = {}  # None: such calls go the long way
MOST_PLANS, UNSEEN = 1024, Plan(*[None] * 5)  # type: ignore[arg-type]
LOOK = attrgetter("__class__", "shape", "dtype", "device", "requires_grad")
SETTINGS = attrgetter(
    "page", "input_size", "hidden_size", "proj_size", "bias", "backend", "precision", "recompute", "bitwise",
    *PROBABILITIES, "peephole", "coupled", "layer_norm", "reset_after", "cell_clip",
)  # fmt: skip


class Recurrent(nn.Module):
    """What layers and cells share. Not an nn.RNNBase, because Dynamo refuses those."""

    input_size: int
    hidden_size: int
    bias: bool
    shown: ClassVar[dict[str, Any]]  # what repr tells, beside the sizes, where it isn't this
    proj_size = 0
    backend: str | None = None
    precision: str | None = None
    recompute = bitwise = False
    zoneout: float | tuple[float, ...] = 0.0
    recurrent_dropout = input_dropout = weight_dropout = 0.0
    peephole = coupled = layer_norm = False
    reset_after = True
    recurrent_dropout_on = "h"
    cell_clip: float | None = None
    forget_bias: float | None = None
    _layered = False  # whether states have an axis of layers
    keywords: ClassVar[type] = Keywords

    @property
    def page(self) -> str:
        """The name of the cell's page."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-k, k), k = 1 / sqrt(hidden_size), in torch.nn's order; but a normalization's
        gains are 1 and its biases 0."""
        k = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(NORM)):
                nn.init.constant_(parameter, float(name.startswith("weight")))
            else:
                nn.init.uniform_(parameter, -k, k)
        if self.forget_bias is not None:
            gate = slice(self.hidden_size, 2 * self.hidden_size)
            for name, parameter in self.named_parameters():
                if name.startswith((NAMES.b_ih, NAMES.b_hh)):
                    nn.init.constant_(parameter[gate], self.forget_bias if name.startswith(NAMES.b_ih) else 0.0)

    def extra_repr(self) -> str:
        defaults = {**self.shown, **{name: getattr(Recurrent, name) for name in self.keywords.__annotations__}}
        values = {name: getattr(self, name, default) for name, default in defaults.items()}
        differing = [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *differing])

    @classmethod
    def _checked(cls, keywords: Any, known: type) -> dict[str, Any]:
        for name, value in keywords.items():
            if name not in known.__annotations__:
                raise TypeError(f"{cls.__name__} got an unexpected keyword argument {name!r}")
            for p in () if name not in PROBABILITIES else value if isinstance(value, tuple) else (value,):
                probability(name, p)
            if known.__annotations__[name] is bool and not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}; got {value!r}")
            if name == "cell_clip" and value is not None:
                positive(name, value)
            if name == "forget_bias" and not isinstance(value, (numbers.Real, NoneType)):
                raise TypeError(f"forget_bias must be a number, got {value!r}")
        return dict(keywords)

    def _set(self, keywords: Any) -> None:
        for name, value in self._checked(keywords, self.keywords).items():
            setattr(self, name, value)
        checked_place("recurrent_dropout_on", self.recurrent_dropout_on)
        if self.layer_norm and self.bitwise:
            raise ValueError(NORMALIZED_BITWISE)
        if (self.layer_norm or self.proj_size) and not self.reset_after:
            what = "layer_norm" if self.layer_norm else "proj_size"
            raise ValueError(f"a GRU with {what} has its reset after the recurrent product: not reset_after=False")
        if self.forget_bias is not None and (self.coupled or not self.bias):
            raise ValueError("forget_bias is for the bias of a forget gate: it needs bias=True, and not coupled=True")

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        """The parameters of one layer and direction, without values yet."""
        rows, H = (PAGES[self.page].G - self.coupled) * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {NAMES.w_ih: (rows, I), NAMES.w_hh: (rows, self.proj_size or H)}
        if self.bias:
            shapes |= {NAMES.b_ih: (rows,), NAMES.b_hh: (rows,)}
        if self.proj_size:
            shapes[NAMES.w_hr] = (self.proj_size, H)
        if self.peephole:
            shapes[PEEPHOLE] = (rows - H,)  # all gates but g
        if self.layer_norm:
            shapes |= {name: (rows,) if name in NORM[:2] else (H,) for name in self._norm()}
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _norm(self) -> list[str]:
        """The names of a normalization's parameters."""
        return [name for name in NORM if "c" in PAGES[self.page].states or name in NORM[:2]][: None if self.bias else 3]

    def _weights(self, suffix: str) -> Weights:
        return self._named([name + suffix for name in NAMES[:5]])

    def _named(self, names: Sequence[str]) -> Weights:
        """The weights of one layer and direction."""
        w_ih, w_hh, b_ih, b_hh, w_hr = map(self._parameters.get, names)
        # getattr finds any, but takes its time; parametrized, pruned or sharded, a weight isn't among _parameters
        if w_ih is None or w_hh is None:
            w_ih, w_hh = getattr(self, names[0]), getattr(self, names[1])
        if not self.bias:
            b_ih = b_hh = None
        elif b_ih is None or b_hh is None:
            b_ih, b_hh = getattr(self, names[2]), getattr(self, names[3])
        if not self.proj_size:
            w_hr = None
        elif w_hr is None:
            w_hr = getattr(self, names[4])
        return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)

    def _batch(self, input: Tensor, *layouts: str) -> tuple[int, ...]:
        """The sizes that a state has before H: (B,), or () for an input without a batch. An error if it doesn't fit.

        `layouts`: by its letters, how the input may lie; one of each rank.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"{self._get_name()} takes a torch tensor, got {type(input).__name__}")
        shape = input.shape
        for layout in layouts:
            if len(layout) == len(shape) and shape[-1] == self.input_size:
                break
        else:
            expected = " or ".join(f"[{', '.join(layout)}]" for layout in layouts)
            raise ShapeError(
                f"{self._get_name()}: input has shape {list(shape)}; "
                f"expected {expected} with I = input_size = {self.input_size}"
            )
        if "T" in layout and shape[layout.index("T")] == 0:
            raise ShapeError(
                f"{self._get_name()}: the sequence is empty: input has shape {list(shape)}, "
                f"[{', '.join(layout)}], and T must be larger than 0"
            )
        return (shape[layout.index("B")],) if "B" in layout else ()

    def _initial(self, hx: Any, sizes: tuple[int, ...], letters: str, input: Tensor) -> Sequence[Tensor | None]:
        """hx as one tensor [*sizes, P or H] per state of the cell; as None, for zeros. `letters` name the sizes."""
        states = PAGES[self.page].states
        if hx is None:
            return [None] * len(states)
        given = hx if len(states) > 1 else (hx,)
        if not isinstance(given, (tuple, list)) or len(given) != len(states):
            raise self._no_states(hx)
        size = self.proj_size or self.hidden_size
        for letter, state in zip(states, given):
            if not isinstance(state, Tensor):
                raise self._no_states(hx)
            if state.shape != (*sizes, size):
                named = [*letters.split(), "P" if size == self.proj_size else "H"]
                raise ShapeError(
                    f"{self._get_name()}: {letter}0 has shape {functional.shape(state)}; expected "
                    f"[{', '.join(named)}] = {[*sizes, size]}, with input {functional.shape(input)}"
                )
            size = self.hidden_size
        return given

    def _no_states(self, hx: Any) -> TypeError:
        names = ", ".join(letter + "0" for letter in PAGES[self.page].states)
        return TypeError(f"{self._get_name()}: hx must be the tensors ({names}); got {described(hx)}")

    def _run(
        self, x: Tensor, suffixes: Sequence[str], states: Sequence[Sequence[Tensor | None]], call: Call, first: int
    ) -> list[tuple[Any, ...]]:
        """The way down: x [T, B, I] through a layer in all directions, whose parameters' names end so.

        `first`: their numbers go on from there. -> for each y [T, B, P], the states after it; with return_states also
        the states after every instant
        """
        options = self._options(call)
        if call is PLAIN and not self._around():
            given = [cast(x, self._weights(suffix), state) for suffix, state in zip(suffixes, states)]
            return self._sequences(self.page, [Direction(*each, k > 0) for k, each in enumerate(given)], options)
        applied = [
            self._applied(x, suffix, state, call, first + k) for k, (suffix, state) in enumerate(zip(suffixes, states))
        ]
        directions = [Direction(made.x, made.weights, state, k > 0) for k, (made, state) in enumerate(applied)]
        found = self._sequences(applied[0][0].name, directions, options)
        return [
            made.results(y, after, len(state), options.history) for (made, state), (y, after) in zip(applied, found)
        ]

    def _again(self, names: Sequence[str], input: Tensor, hx: Any, *layout: Any) -> tuple[Tensor, tuple] | None:
        """A plain call of one layer in one direction, by its plan -> y [T, B, P], the states after; None without one.

        `names`: of its weights. `layout`: what decides, beside SETTINGS, how the input lies.
        """
        if capturing() or transformed() or torch._C._is_any_autocast_enabled():
            return None
        weights = self._named(names)
        state: Sequence[Tensor] = hx if type(hx) is tuple else () if hx is None else (hx,)
        try:
            looks = [LOOK(tensor) for tensor in (input, *state, *weights) if tensor is not None]
            key = (
                SETTINGS(self), layout, type(hx), torch.is_grad_enabled(), variable(),
                arrays.precision(input) if input.is_cuda else None, *looks,
            )  # fmt: skip
            plan = PLANS.get(key, UNSEEN)
        except (AttributeError, TypeError):  # no tensor, or nothing to look up: the long way has the words for it
            return None
        if plan is UNSEEN:
            if len(PLANS) >= MOST_PLANS:
                PLANS.clear()
            plan = PLANS[key] = self._plan(input, hx, weights)
        if plan is None:
            return None
        if hx is None:
            state = [input.new_zeros(shape) for shape in plan.zeros]
        if plan.squeezed:
            state = [each.squeeze(0) for each in state]
        x = self._in_time(input)
        found = y, last, _ = dispatch.forward(plan.backend, plan.problem, x, weights, state)
        if plan.wanted:
            direction = Direction(x, weights, state, False)
            ((y, last),) = recorded(plan.backend, plan.problem, [direction], [found])
        return y, tuple([each.unsqueeze(0) for each in last]) if plan.squeezed else last

    def _plan(self, input: Tensor, hx: Any, weights: Weights) -> Plan | None:
        """Everything fits, or an error. None where there is more to do than the call of one backend."""
        batch, initial = self._taken(input, hx)
        if not batch or unreal(input) or self._around():
            return None
        x, flat = self._in_time(input), [None if s is None else s.reshape(s.shape[-2:]) for s in initial]
        wanted = required(input, *initial, *weights)
        training = wanted and not self.recompute
        backend, problem, filled = prepared(self.page, x, weights, flat, self._options(PLAIN), training)
        squeezed = self._layered and not hasattr(backend, "LAYERED")
        zeros = [(1, *state.shape) if self._layered else tuple(state.shape) for state in filled]
        return Plan(backend, problem, wanted, squeezed, zeros)

    def _taken(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        """-> the sizes that a state has before H; and the first states. An error where they don't fit."""
        raise NotImplementedError

    def _in_time(self, input: Tensor) -> Tensor:
        """Input with a batch, as [T, B, I]."""
        raise NotImplementedError

    def _applied(
        self, x: Tensor, suffix: str, state: Sequence[Tensor | None], call: Call, k: int
    ) -> tuple[Applied, Sequence[Tensor | None]]:
        """What is asked for around the cell, in layer and direction number k; and its first states."""
        weights, own = self._weights(suffix), self._own(suffix)
        resets = [] if call.reset_state is None else [states[k] for states in call.reset_state]
        flat = [array for arrays in own.values() for array in arrays]
        S, N = len(state), len(state) + len(flat)
        x, weights, given = cast(x, weights, [*state, *flat, *resets])
        state, resets, taken = given[:S], [*given[N:]], iter(given[S:N])
        own = {name: tuple(next(taken) for _ in arrays) for name, arrays in own.items()}
        seed = None
        if self.training and self._random():
            seed = drawn_seed(call.generator, x)
            if self.input_dropout:
                x = x * dropout_mask(seed, self.input_dropout, tuple(x.shape[1:]), x, which=1)
            if self.weight_dropout:
                mask = dropout_mask(seed, self.weight_dropout, tuple(weights.w_hh.shape), x, which=2)
                weights = weights._replace(w_hh=weights.w_hh * mask)
        around = Around(
            reset=call.reset, reset_state=tuple(resets) or None, lengths=call.lengths, starts=call.starts,
            zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout, seed=seed, training=self.training,
            coupled=self.coupled, cell_clip=self.cell_clip, reset_after=self.reset_after,
            recurrent_dropout_on=self.recurrent_dropout_on,
            layer_norm=own.pop("layer_norm", None), **{name: array for name, (array,) in own.items()},
        )  # fmt: skip
        return apply(self.page, x, weights, around), state

    def _options(self, call: Call) -> Options:
        return Options(False, self.backend, self.precision, call.return_states, self.recompute, bitwise=self.bitwise)

    def _sequences(self, *given: Any) -> list[tuple[Tensor, tuple]]:
        return sequences(*given)

    def _own(self, suffix: str) -> dict[str, tuple[Any, ...]]:
        """What the page has per unit in one layer and direction, by its name in `Around`."""
        own: dict[str, tuple[Any, ...]] = {}
        if self.peephole:
            own["peephole"] = (getattr(self, PEEPHOLE + suffix),)
        if self.layer_norm:
            names = self._norm()
            own["layer_norm"] = (*(getattr(self, name + suffix) for name in names), *[None] * (len(names) == 3))
        return own

    def _random(self) -> bool:
        """Whether masks are drawn in training."""
        zoneout = any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout
        return bool(zoneout or self.recurrent_dropout or self.input_dropout or self.weight_dropout)

    def _around(self) -> bool:
        """Whether there is anything around the cell at every call."""
        variant = self.peephole or self.coupled or self.layer_norm or not self.reset_after or self.cell_clip is not None
        return self._random() or variant


# ---- layers ---------------------------------------------------------------------------------------------------------

WAYS = ("", "_reverse")  # how the parameters' names end that read forward, and in reverse


class RecurrentLayer(Recurrent):
    """Several layers in one or two directions over a whole sequence, padded or packed."""

    shown: ClassVar = {
        "proj_size": 0,
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0,
        "bidirectional": False,
    }
    _layered = True
    mode: str
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool, proj_size: int, device: Any, dtype: Any, keywords: Keywords,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        for name, flag in {"bias": bias, "batch_first": batch_first}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {flag!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number in [0, 1], the probability of a zero; got {dropout!r}")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size must be 0, for no projection, or smaller than hidden_size; "
                f"got proj_size={proj_size} with hidden_size={hidden_size}"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so "
                f"dropout={dropout} does nothing with num_layers=1",
                stacklevel=3,
            )
        self.mode = mode
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.proj_size = bidirectional, proj_size
        self._set(keywords)
        for k, suffix in enumerate(self._suffixes):
            below = input_size if k < self._directions else self._directions * (proj_size or hidden_size)
            self._register(suffix, below, device, dtype)
        self.reset_parameters()

    @property
    def page(self) -> str:
        return self.mode.lower()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _suffixes(self) -> list[str]:
        """The ends of the parameters' names: layer after layer, forward before reverse, as the states are stacked."""
        ends = WAYS[: self._directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _options(self, call: Call) -> Options:
        """With how many layers may go at once: all, where each is a plain one on the outputs of the one below."""
        options = super()._options(call)
        if self.num_layers == 1 or self.bidirectional or self.proj_size or self.bitwise or call is not PLAIN:
            return options
        apart = self._around() or (self.dropout and self.training)
        return options if apart else options._replace(layers=self.num_layers)

    def _stacked(self, x: Tensor, first: Sequence[Sequence[Tensor | None]], call: Call) -> tuple[Any, ...] | None:
        """As `_stack`, all layers at once where the backend would; `first`: by state, of each layer."""
        given = [cast(x, self._weights(suffix), state) for suffix, state in zip(self._suffixes, zip(*first))]
        layers = [(weights, state) for _, weights, state in given]
        found = stacked(self.page, given[0][0], layers, self._options(call))
        if found is None:
            return None
        return found[-1][0], [torch.stack(states) for states in zip(*(last for _, last in found))]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of every layer and direction."""
        return [[weight for weight in self._weights(suffix) if weight is not None] for suffix in self._suffixes]

    def flatten_parameters(self) -> None:
        """Nothing: the kernels take the weights from where they are."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, reset: Tensor | None = None, reset_state: Any = None,
        lengths: Tensor | None = None, starts: Tensor | None = None, return_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Run the layers. Shapes and errors: see the class."""
        if isinstance(input, PackedSequence):
            if any(given is not None for given in (reset, reset_state, lengths, starts)) or return_states:
                raise TypeError(
                    f"{self._get_name()}: packed input has its own lengths; for reset, reset_state, lengths, starts or "
                    "return_states give padded input"
                )
            return self._forward_packed(input, hx, generator)
        plain = reset is reset_state is lengths is starts is generator is None and not return_states
        if plain and self.num_layers == 1 and not self.bidirectional:
            found = self._again(FIRST, input, hx, self.batch_first)
            if found is not None:
                y, last = found
                return y.transpose(0, 1) if self.batch_first else y, as_hx(last)
        batch, initial = self._taken(input, hx)
        transposed = self.batch_first and bool(batch)
        call = PLAIN
        if not plain:
            marks = {"reset": (reset, input.shape[:-1]), "lengths": (lengths, batch), "starts": (starts, batch)}
            for name, (given, expected) in marks.items():
                if given is not None and (not isinstance(given, Tensor) or given.shape != expected):
                    raise ShapeError(
                        f"{self._get_name()}: {name} is {described(given)}; expected a tensor {list(expected)}, "
                        f"with input {functional.shape(input)}"
                    )
            if not batch:
                reset, lengths, starts = (None if m is None else m.unsqueeze(-1) for m in (reset, lengths, starts))
            elif transposed and reset is not None:
                reset = reset.t()
            resets = None if reset_state is None else self._resets(reset_state)
            call = Call(reset, resets, lengths, starts, generator, return_states)
        x = input.transpose(0, 1) if transposed else input
        if not batch:
            x, initial = x.unsqueeze(1), [state if state is None else state.unsqueeze(1) for state in initial]
        y, *groups = self._stack(x, initial, call)
        if not batch:  # B is axis 1 of states, and axis 2 of states of every instant
            y, groups = y.squeeze(1), [[s.squeeze(1 + n) for s in states] for n, states in enumerate(groups)]
        if transposed:
            y, groups[1:] = y.transpose(0, 1), [[s.transpose(1, 2) for s in states] for states in groups[1:]]
        return y, *map(as_hx, groups)

    def _taken(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        batch = self._batch(input, "BTI" if self.batch_first else "TBI", "TI")
        sizes = (self.num_layers * self._directions, *batch)
        return batch, self._initial(hx, sizes, "L*D B" if batch else "L*D", input)

    def _in_time(self, input: Tensor) -> Tensor:
        return input.transpose(0, 1) if self.batch_first else input

    def step(self, input: Tensor, hx: Any = None) -> tuple[Any, ...]:
        """One instant, for layers with one direction: input [B, I] or [I], hx as ever -> y [B, P] or [P], the new hx.

        As `forward` for a sequence of one, gradients included. What comes live is `gpu_rnn.stream`'s.
        """
        if self.bidirectional:
            raise ValueError(f"a step goes from the past to the future, but the layer is bidirectional: {self!r}")
        self._batch(input, "BI", "I")
        time = 1 if self.batch_first and input.ndim == 2 else 0
        y, hx = self(input.unsqueeze(time), hx)
        return y.squeeze(time), hx

    def _resets(self, reset_state: Any) -> tuple[Tensor, ...]:
        """One per state, [L*D, B, .] or [L*D, .]; their other sizes are checked with the rest."""
        states, many = PAGES[self.page].states, self.num_layers * self._directions
        given = reset_state if len(states) > 1 else (reset_state,)
        if not isinstance(given, (tuple, list)) or [getattr(state, "shape", (0,))[0] for state in given] != [
            many
        ] * len(states):
            raise ShapeError(
                f"{self._get_name()}: reset_state must be one tensor [L*D, B, .] or [L*D, .] per state "
                f"({', '.join(states)}), with L*D = {many}; got {described(reset_state)}"
            )
        return tuple(given)

    @torch.compiler.disable  # batch sizes are data, and a graph for each would be compiled anew
    def _forward_packed(
        self, packed: PackedSequence, hx: Any, generator: torch.Generator | None
    ) -> tuple[PackedSequence, Any]:
        """As padded input with lengths."""
        data, batch_sizes, sorting, unsorting = packed
        self._batch(data, "NI")
        T, B = len(batch_sizes), checked_batch_sizes(batch_sizes, data)[0]
        initial = self._initial(hx, (self.num_layers * self._directions, B), "L*D B", data)
        if sorting is not None:
            initial = [state if state is None else state.index_select(1, sorting) for state in initial]
        x, ends = pad_packed_sequence(PackedSequence(data, batch_sizes))
        ragged = PLAIN if len(data) == T * B else Call(lengths=ends.to(data.device, non_blocking=True))
        call = ragged if generator is None else ragged._replace(generator=generator)

        def as_torch_drops(x: Tensor, p: float) -> Tensor:
            rows = PackedSequence(dropped(pack_padded_sequence(x, ends).data, p), batch_sizes)
            return pad_packed_sequence(rows)[0]

        y, last = self._stack(x, initial, call, as_torch_drops)
        if unsorting is not None:
            last = [state.index_select(1, unsorting) for state in last]
        y = pack_padded_sequence(y, ends).data
        return PackedSequence(y, batch_sizes, sorting, unsorting), as_hx(last)

    def _stack(
        self, x: Tensor, initial: Sequence[Tensor | None], call: Call, drop: Callable[[Tensor, float], Tensor] = dropped
    ) -> tuple[Any, ...]:
        """Every layer in every direction.

        -> the last layer's outputs; the final states [L*D, B, P or H]; with return_states every instant's [L*D, T, ...]
        """
        if self.num_layers == 1 and not self.bidirectional:  # as below, but nothing is cut or put together
            alone = [state if state is None else state.squeeze(0) for state in initial]
            ((y, *groups),) = self._run(x, ["_l0"], [alone], call, 0)
            return y, *([state.unsqueeze(0) for state in group] for group in groups)
        D, suffixes = self._directions, self._suffixes
        first = [len(suffixes) * [None] if state is None else state.unbind(0) for state in initial]
        if self._options(call).layers > 1:
            at_once = self._stacked(x, first, call)
            if at_once is not None:
                return at_once
        found: list[tuple] = []  # by layer and direction: states after, and those of every instant
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = drop(x, self.dropout)
            ways = range(layer * D, layer * D + D)
            states = [[states[k] for states in first] for k in ways]
            results = self._run(x, suffixes[layer * D : layer * D + D], states, call, layer * D)
            outputs = [y for y, *_ in results]
            found += [tuple(groups) for _, *groups in results]
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        return x, *([torch.stack(states) for states in zip(*group)] for group in zip(*found))


class RNN(RecurrentLayer):
    """Elman's recurrent network, in the place of torch.nn.RNN.

    Every unit computes h_t = f(W x_t + b_ih + R h_{t-1} + b_hh) (Elman 1990), with f tanh or relu (Le, Jaitly & Hinton
    2015), then h_t <- w_hr h_t with P. Beside `nonlinearity`, arguments are those of `LSTM`.

    Input:   [T, B, I], and so on as for `LSTM`; h0 [L*D, B, P] or [L*D, P], zeros when None.
    Returns: y [T, B, D*P] and hT [L*D, B, P], in the layout of the input. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, *, proj_size: int = 0, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        super().__init__(
            functional.elman(nonlinearity).upper(), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, keywords,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(RecurrentLayer):
    """Long short-term memory, in the place of torch.nn.LSTM.

    Every unit computes, with a = W x_t + b_ih + R h_{t-1} + b_hh for each of the gates i, f, g, o:

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),    h_t = sigmoid(o) tanh(c_t),    then h_t <- w_hr h_t with P

    (Hochreiter & Schmidhuber 1997, Gers et al. 2000; projection: Sak et al. 2014; as torch.nn.LSTM and cuDNN.)

    Args:
        input_size: I. hidden_size: H. num_layers: L, each on the outputs of the one below. bias: whether there are
            b_ih and b_hh. batch_first: whether input and output are [B, T, .]; the states never are.
        dropout: probability of a zero in the outputs of all layers but the last, in training, with torch's RNG.
        bidirectional: whether a second set of weights reads every layer's input backwards: D = 2.
        proj_size: P, 0 < P < H, size of the projected output; 0 for none, then P = H below.
        device, dtype: of the parameters. float64 or float32; float16, bfloat16.
        backend, precision: keywords, as for `gpu_rnn.lstm`; precision="tf32" or "ieee" decides over the products of
            float32 on a GPU.

    Input, of the parameters' dtype and device, unless autocast makes everything of its own dtype:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] for a single sequence, or a PackedSequence.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B for a single sequence; zeros when None.

    Returns:
        y [T, B, D*P], forward before reverse, in the layout of the input; and (hT, cT) in the shapes of (h0, c0): what
        each layer and direction ended with, for packed input at every sequence's own end.

    Raises:
        ShapeError: shapes that don't fit, T = 0, wrong batch sizes of packed input; both a ValueError and a
            RuntimeError. TypeError: mixed or unknown dtypes or devices, an hx of another structure.
        BackendError: a backend was insisted on that can't run this. ValueError, TypeError: from the constructor.
    """

    keywords = LSTMKeywords

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: Any = None, dtype: Any = None, **keywords: Unpack[LSTMKeywords],
    ) -> None:  # fmt: skip
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, keywords,
        )  # fmt: skip


class GRU(RecurrentLayer):
    """Gated recurrent unit, with the reset gate after the recurrent product unless told, in the place of torch.nn.GRU.

    Every unit computes, with x = W x_t + b_ih and h = R h_{t-1} + b_hh for each of the gates r, z, n:

        h_t = (1 - z) n + z h_{t-1},    r = sigmoid(x_r + h_r),    z = sigmoid(x_z + h_z),    n = tanh(x_n + r h_n)

    (Cho et al. 2014; this form: cuDNN and torch.nn.GRU.) With reset_after=False n = tanh(x_n + R_n (r h_{t-1}) + b_hn).
    Arguments are those of `LSTM`. With `proj_size` the cell keeps a state s of its own, as the LSTM its c: s in the
    place of h in (1 - z) n + z s_{t-1}, and h_t = w_hr s_t, which the recurrent weights see.

    Input:   [T, B, I], and so on as for `LSTM`; h0 [L*D, B, H] or [L*D, H], zeros when None; with `proj_size`
             (h0 [L*D, B, P], s0 [L*D, B, H]).
    Returns: y [T, B, D*P] and hT, or (hT, sT), in the layout of the input. Raises as `LSTM`.
    """

    keywords = GRUKeywords

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, *, proj_size: int = 0, **keywords: Unpack[GRUKeywords],
    ) -> None:  # fmt: skip
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, keywords,
        )  # fmt: skip

    @property
    def page(self) -> str:
        return functional.PROJECTED if self.proj_size else "gru"


# ---- cells ----------------------------------------------------------------------------------------------------------


class RecurrentCell(Recurrent):
    """One layer for one instant."""

    shown: ClassVar = {"bias": True, "nonlinearity": "tanh"}

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True,
        device: Any = None, dtype: Any = None, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._set(keywords)
        self._register("", input_size, device, dtype)
        if not bias:
            self.register_parameter(NAMES.b_ih, None)
            self.register_parameter(NAMES.b_hh, None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None, *, generator: torch.Generator | None = None) -> Any:
        """Run one instant. Shapes and errors: see the class."""
        if generator is None:
            found = self._again(NAMES[:5], input, hx)
            if found is not None:
                return as_hx(found[1])
        batch, initial = self._taken(input, hx)
        if not batch:
            input, initial = input.unsqueeze(0), [state if state is None else state.unsqueeze(0) for state in initial]
        call = PLAIN if generator is None else Call(generator=generator)
        ((_, last, *_),) = self._run(input.unsqueeze(0), [""], [initial], call, 0)
        return as_hx(last if batch else [state.squeeze(0) for state in last])

    def _taken(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        batch = self._batch(input, "BI", "I")
        return batch, self._initial(hx, batch, "B" if batch else "", input)

    def _in_time(self, input: Tensor) -> Tensor:
        return input.unsqueeze(0)


class RNNCell(RecurrentCell):
    """One instant of `RNN`, in the place of torch.nn.RNNCell: h' = f(W x + b_ih + R h + b_hh), f tanh or relu.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Any = None, dtype: Any = None, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, **keywords)

    @property
    def page(self) -> str:
        return functional.elman(self.nonlinearity)


class LSTMCell(RecurrentCell):
    """One instant of `LSTM`, in the place of torch.nn.LSTMCell; the equations are there.

    Input: [B, I] or [I], and (h, c) both [B, H] or [H], zeros when None. Returns (h', c') likewise. Raises as `LSTM`.
    """

    page = "lstm"
    keywords = LSTMKeywords


class GRUCell(RecurrentCell):
    """One instant of `GRU`, in the place of torch.nn.GRUCell; the equations are there.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    page = "gru"
    keywords = GRUKeywords


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size <= 0:
            raise ValueError(f"{name} must be larger than 0, got {size}")


def checked_batch_sizes(batch_sizes: Tensor, data: Tensor) -> list[int]:
    """The batch size of every instant, or an error that repeats what doesn't fit."""
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] <= 0 or sum(sizes) != len(data) or sizes != sorted(sizes, reverse=True):
        raise ShapeError(
            f"packed data has shape {functional.shape(data)} and batch_sizes {sizes}; there must be at least one, all "
            f"positive and none larger than the one before, and their sum, {sum(sizes)}, must be the number of rows"
        )
    return sizes


def described(hx: Any) -> str:
    """Of what structure and shapes something is, for an error."""
    if isinstance(hx, (tuple, list)):
        return f"a {type(hx).__name__} of {', '.join(map(described, hx)) or 'nothing'}"
    return f"a tensor {functional.shape(hx)}" if isinstance(hx, Tensor) else type(hx).__name__


def drawn_seed(generator: torch.Generator | None, x: Tensor) -> Tensor:
    """A new one [1] int64 for every layer and direction, from torch's generator of the device, or the caller's."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


def as_hx(states: Any) -> Any:
    """One state alone, several as a tuple: torch.nn's structure."""
    return tuple(states) if len(states) > 1 else states[0]


Cast = tuple[Tensor, Weights, Sequence[Tensor | None]]


def cast(x: Tensor, weights: Weights, state: Sequence[Tensor | None]) -> Cast:
    """The arguments, of autocast's dtype where that is on; like torch it leaves float64 alone."""
    if not capturing() and not torch._C._is_any_autocast_enabled():
        return x, weights, state
    device = x.device.type
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return x, weights, state
    dtype = torch.get_autocast_dtype(device)
    cached = torch.is_autocast_cache_enabled() and torch.is_grad_enabled() and not capturing()

    def made(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (dtype, torch.float64):
            return tensor
        return once(tensor, dtype) if cached and isinstance(tensor, nn.Parameter) else tensor.to(dtype)

    return made(x), Weights(*map(made, weights)), [*map(made, state)]


CASTS = WeakTensorKeyDictionary()


def once(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The parameter in another dtype: the same tensor as long as a graph holds it, as where a cell is called in turn.

    torch's own cache is out of Python's reach. This one has no owner but the graphs, so it is empty after backward.
    """
    state = (dtype, parameter._version, parameter.data_ptr())
    before, made = CASTS.get(parameter, (None, None))
    tensor = made() if before == state else None
    if tensor is None:
        tensor = parameter.to(dtype)
        CASTS[parameter] = state, TensorWeakRef(tensor)
    return tensor


# ---- swapping -------------------------------------------------------------------------------------------------------

TWINS: dict[type, type[Recurrent]] = {
    getattr(nn, twin.__name__): twin for twin in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
CACHES = ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights")  # of torch.nn's layers


def replace_(model: nn.Module, **keywords: Unpack[Keywords]) -> nn.Module:
    """Swap every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model, in place; returns the model.

    The modules stay the same objects and only change their class, so that everything that refers to them or to their
    parameters goes on: optimizers, hooks, modules that are used twice, weight norms and other parametrizations. Only
    `isinstance(module, torch.nn.LSTM)` is no longer true. A model that is itself such a layer is swapped as well.

    Classes derived from torch.nn's are left alone, because nobody can know what they changed; a warning names them.

    Args:
        model: any module. backend, precision: keywords, those of every swapped layer, as for `LSTM`.
    """
    left = []
    for name, module in model.named_modules():
        if (ours := twin(module)) is not None:
            ours._checked(keywords, Keywords)  # may raise: before anything is changed
            for cache in CACHES:  # or they would keep weights alive that were replaced since
                module.__dict__.pop(cache, None)
            module.__class__ = ours
            module._set(keywords)
        elif isinstance(module, tuple(TWINS)):
            left.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if left:
        warnings.warn(f"replace_ left classes derived from torch.nn's alone: {', '.join(left)}", stacklevel=2)
    return model


def twin(module: nn.Module) -> type[Recurrent] | None:
    """The class to swap a module's for, if there is one."""
    theirs = type(module)
    if not parametrize.is_parametrized(module):
        return TWINS.get(theirs)
    # torch.nn.utils.parametrize derives a class for each module, with a property per parameter: derive its like
    ours = TWINS.get(theirs.__bases__[0])
    members = {key: value for key, value in vars(theirs).items() if key not in ("__dict__", "__weakref__")}
    return ours and type(theirs.__name__, (ours,), members)
