"""What layers and cells share: keywords, parameters, the way from a call to the functions, plans of plain calls."""

import math
import numbers
from collections.abc import Callable, Sequence
from operator import attrgetter
from types import NoneType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypedDict

import torch
from torch import Tensor, fx, nn

from gpu_rnn.kernels import cells

from .. import functional
from ..autograd.custom_ops import capturing, exporting_to_onnx
from ..autograd.derivatives import required, transformed
from ..autograd.eager import LOOK, followed, sequences, switches, unreal
from ..backends.call_cache import Plan, planned
from ..backends.dispatch import ORDER
from ..core.problem import Around, Direction, Options, Weights
from ..core.validation import PRECISIONS
from ..functional import NORMALIZED_STEP_EXACT, ShapeError
from ..modifiers.apply import Applied, apply, checked_place, dropout_mask, positive, probability

OURS = ("rnn_tanh", "rnn_relu", "lstm", "gru", functional.PROJECTED)
PAGES = {name: cells.get(name) for name in OURS}  # looked up as torch.compile can
PEEPHOLE = "weight_ch"
NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last two the LSTM's alone
NAMES = Weights("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # torch's, and in torch's order
FIRST = [name + "_l0" for name in NAMES[:5]]


class Keywords(TypedDict, total=False):
    """Keywords of every layer and cell in addition to torch.nn's arguments; they are attributes, too.

    backend, precision: as for `gpu_rnn.lstm`; precision="tf32" or "ieee" is that of float32 matmuls on a GPU.
    recompute: activation checkpointing: whether backward runs forward once more, layer by layer, to save memory.
    step_exact: whether a sequence equals, bit for bit, its time steps one at a time, by `step` or a `stream`; the input
        projection is then one matmul per time step. Not with layer_norm.
    zoneout: probability of keeping a state from the time step before, one per state or one for all; in training by a
        mask for every time step, else by its expectation (Krueger et al. 2017).
    recurrent_dropout, input_dropout: variational (locked) dropout: probability of a zero in h before the recurrent
        matmul, and in the input of every layer; one mask for a whole sequence (Gal & Ghahramani 2016).
    weight_dropout: probability of a zero in the recurrent weights (DropConnect; Merity et al. 2018).
    """

    backend: str | None
    precision: str | None
    recompute: bool
    step_exact: bool
    zoneout: float | tuple[float, ...]
    recurrent_dropout: float
    input_dropout: float
    weight_dropout: float


class GRUKeywords(Keywords, total=False):
    """Keywords of GRU and GRUCell, in addition to those of every layer.

    layer_norm: whether the input and the recurrent projection are normalized over the units (Ba, Kiros & Hinton 2016),
        with gains weight_ln_ih_l0 and weight_ln_hh_l0 [3*H], and so on; the biases stay what they are.
    reset_after: whether the reset gate is applied after the recurrent matmul, as in torch.nn and cuDNN, or before it
        (Cho et al. 2014); the equations are `gpu_rnn.gru`'s.
    recurrent_dropout_on: "h" drops h before the recurrent matmul; "candidate" drops the candidate: recurrent dropout
        without memory loss (Semeniuta et al. 2016).
    """

    layer_norm: bool
    reset_after: bool
    recurrent_dropout_on: str


class LSTMKeywords(Keywords, total=False):
    """Keywords of LSTM and LSTMCell, in addition to those of every layer; the equations are `gpu_rnn.lstm`'s.

    layer_norm: as for GRU, [4*H], and of the cell state in the output, with weight_ln_c_l0 and bias_ln_c_l0
        [H].
    peephole: whether the gates i, f, o read the cell state, with weights weight_ch_l0 [3*H], and so on.
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
    left_padding: Tensor | None = None
    generator: torch.Generator | None = None
    return_states: bool = False


PLAIN = Call()


SETTINGS = attrgetter(
    "cell_name", "input_size", "hidden_size", "proj_size", "bias", "backend", "precision", "recompute", "step_exact",
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
    recompute = step_exact = False
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
    def cell_name(self) -> str:
        """The name by which `gpu_rnn.kernels.cells.get` finds the cell."""
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
            many = name == "zoneout" and isinstance(value, tuple)
            for p in () if name not in PROBABILITIES else value if many else (value,):
                probability(name, p)
            if known.__annotations__[name] is bool and not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
            if name in CHOICES and (not isinstance(value, (str, NoneType)) or value not in CHOICES[name]):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}; got {value!r}")
            if name == "cell_clip" and value is not None:
                positive(name, value)
            if name == "forget_bias" and (isinstance(value, bool) or not isinstance(value, (numbers.Real, NoneType))):
                raise TypeError(f"forget_bias must be a number, got {value!r}")
        return dict(keywords)

    def _set(self, keywords: Any) -> None:
        for name, value in self._checked(keywords, self.keywords).items():
            setattr(self, name, value)
        checked_place("recurrent_dropout_on", self.recurrent_dropout_on)
        if self.layer_norm and self.step_exact:
            raise ValueError(NORMALIZED_STEP_EXACT)
        if (self.layer_norm or self.proj_size) and not self.reset_after:
            what = "layer_norm" if self.layer_norm else "proj_size"
            raise ValueError(f"{what} is not defined for a GRU with reset_after=False")
        if self.forget_bias is not None and (self.coupled or not self.bias):
            raise ValueError("forget_bias is for the bias of a forget gate: it needs bias=True, and not coupled=True")

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        """The parameters of one layer and direction, without values yet."""
        rows, H = (PAGES[self.cell_name].G - self.coupled) * self.hidden_size, self.hidden_size
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
        return [name for name in NORM if "c" in PAGES[self.cell_name].states or name in NORM[:2]][
            : None if self.bias else 3
        ]

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell what to do instead: torch.jit.script asks here for a module whose source it can compile."""
        raise NotImplementedError(
            f"torch.jit.script compiles Python, but gpu_rnn.{self._get_name()} calls kernels that aren't Python. "
            "Record the layer by torch.jit.trace, and script what is around the traced module; or use torch.export"
        )

    def _leaf(self, forward: Callable, input: fx.Proxy, hx: Any, **keywords: Any) -> fx.Proxy:
        """Record a call as one node of a torch.fx graph, as torch.fx does it for a layer of torch.nn.

        `forward` asks for it. The node calls the module, so what is around that method would be recorded a second time.
        """
        name = input.tracer.path_of_module(self)
        around = {
            "it is the root of what is traced": not name,
            "it has a forward of its own": type(self).forward is not forward or "forward" in vars(self),
            "it has hooks": self._forward_pre_hooks or self._forward_hooks,
        }
        for reason, holds in around.items():
            if holds:
                raise fx.proxy.TraceError(
                    f"gpu_rnn.{self._get_name()} {name!r} is no leaf for torch.fx, since {reason}; trace a model that "
                    "contains it, by a torch.fx.Tracer whose is_leaf_module says that it is one"
                )
        given = {label: value for label, value in keywords.items() if value is not None and value is not False}
        return input.tracer.create_proxy("call_module", name, (input,) if hx is None else (input, hx), given)

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
        states = PAGES[self.cell_name].states
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
        names = ", ".join(letter + "0" for letter in PAGES[self.cell_name].states)
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
            return self._sequences(self.cell_name, [Direction(*each, k > 0) for k, each in enumerate(given)], options)
        applied = [
            self._applied(x, suffix, state, call, first + k, reverse=k > 0)
            for k, (suffix, state) in enumerate(zip(suffixes, states))
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
        if capturing() or transformed() or torch._C._is_any_autocast_enabled() or not isinstance(input, Tensor):
            return None
        weights = self._named(names)
        state: Sequence[Tensor] = hx if type(hx) is tuple else () if hx is None else (hx,)
        settings = SETTINGS(self), layout, type(hx), *switches(input)
        plan = planned(settings, LOOK, (input, *state, *weights), self._plan, input, hx, weights)
        if plan is None:
            return None
        if plan.zeros:
            state = [input.new_zeros(shape) for shape in plan.zeros if shape]
        if plan.squeezed:
            state = [each.squeeze(0) for each in state]
        y, last = followed(plan, self._in_time(input), weights, state)
        return y, tuple([each.unsqueeze(0) for each in last]) if plan.squeezed else last

    def _plan(self, input: Tensor, hx: Any, weights: Weights) -> Plan | None:
        """Everything fits, or an error. None where there is more to do than the call of one backend."""
        batch, initial = self._taken(input, hx)
        if not batch or unreal(input) or self._around():
            return None
        x, flat = self._in_time(input), [None if s is None else s.reshape(s.shape[-2:]) for s in initial]
        plan = Plan.of(self.cell_name, x, weights, flat, self._options(PLAIN), required(input, *initial, *weights))
        if not self._layered:
            return plan
        zeros = [(1, *shape) for shape in plan.zeros if shape]
        return plan._replace(zeros=zeros, squeezed=not hasattr(plan.backend, "LAYERED"))

    def _taken(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        """-> the sizes that a state has before H; and the first states. An error where they don't fit."""
        raise NotImplementedError

    def _in_time(self, input: Tensor) -> Tensor:
        """Input with a batch, as [T, B, I]."""
        raise NotImplementedError

    def _applied(
        self, x: Tensor, suffix: str, state: Sequence[Tensor | None], call: Call, k: int, *, reverse: bool
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
            if capturing() and exporting_to_onnx():
                drawing = [name for name in PROBABILITIES if getattr(self, name)]
                raise NotImplementedError(
                    f"gpu_rnn.{self._get_name()} draws masks in training mode, by {', '.join(drawing)}, which ONNX "
                    "can't; call model.eval() before torch.onnx.export"
                )
            seed = drawn_seed(call.generator, x)
            if self.input_dropout:
                x = x * dropout_mask(seed, self.input_dropout, tuple(x.shape[1:]), x, which=1)
            if self.weight_dropout:
                mask = dropout_mask(seed, self.weight_dropout, tuple(weights.w_hh.shape), x, which=2)
                weights = weights._replace(w_hh=weights.w_hh * mask)
        around = Around(
            reset=call.reset, reset_state=tuple(resets) or None, lengths=call.lengths, left_padding=call.left_padding,
            zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout, seed=seed, training=self.training,
            coupled=self.coupled, cell_clip=self.cell_clip, reset_after=self.reset_after,
            recurrent_dropout_on=self.recurrent_dropout_on,
            layer_norm=own.pop("layer_norm", None), **{name: array for name, (array,) in own.items()},
        )  # fmt: skip
        return apply(self.cell_name, x, weights, around, reverse), state

    def _options(self, call: Call) -> Options:
        return Options(
            False, self.backend, self.precision, call.return_states, self.recompute, step_exact=self.step_exact
        )

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


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_sizes(**sizes: Any) -> list[int]:
    """Each as an int, also of NumPy's; or an error that names it."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size <= 0 and name != "proj_size":
            raise ValueError(f"{name} must be larger than 0, got {size}")
    return [*map(int, sizes.values())]


def described(hx: Any) -> str:
    """Of what structure and shapes something is, for an error."""
    if isinstance(hx, (tuple, list)):
        return f"a {type(hx).__name__} of {', '.join(map(described, hx)) or 'nothing'}"
    return f"a tensor {functional.shape(hx)}" if isinstance(hx, Tensor) else type(hx).__name__


def drawn_seed(generator: torch.Generator | None, x: Tensor) -> Tensor:
    """A new one [1] int64 for every layer and direction, from torch's generator of the device, or the caller's."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


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

    def made(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (dtype, torch.float64):
            return tensor
        narrow = tensor.to(dtype)  # at every call: a write to the weights, through `.data` too, is never missed
        if isinstance(tensor, nn.Parameter) and not capturing():
            narrow.cast_of = tensor  # type: ignore[attr-defined]  # what a graph keeps (`nodes.to_save`)
        return narrow

    return made(x), Weights(*map(made, weights)), [*map(made, state)]


def driven(layer: Any, run: Callable, x: Any, hx: Any) -> dict[str, Any]:
    """Call a layer with `run` in the place of its way down, without dropout.

    `run` takes what `autograd.sequence` takes, for one layer and direction, and gives a note, y and the last states.
    -> the notes by the ending of the parameters' names
    """
    notes = []

    def noting(name: str, directions: Sequence, options: Options) -> list[tuple]:
        results = []
        for *given, reverse in directions:
            note, *result = run(name, *given, options._replace(reverse=reverse, directions=len(directions)))
            notes.append(note)
            results.append(result)
        return results

    def no(*given: Any) -> None:
        return None

    layer.__dict__ |= {"_sequences": noting, "_stacked": no, "_again": no, "training": False}
    layer(x, hx)
    return dict(zip(getattr(layer, "_suffixes", [""]), notes, strict=True))
