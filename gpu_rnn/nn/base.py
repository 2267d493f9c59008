"""What layers and cells share: keywords, parameters, the modifiers of a call, cached calls."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from types import NoneType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypedDict

import torch
from torch import Tensor, fx, nn

from gpu_rnn.kernels import cells

from .. import functional
from ..autograd import eager
from ..autograd.custom_ops import is_exporting_to_onnx, refuse_torchscript_onnx
from ..autograd.functions import run_cached
from ..autograd.torch_private import Traced, is_any_autocast_enabled, is_capturing, is_meta_or_fake, is_observed
from ..backends.call_cache import CachedCall, lookup
from ..backends.dispatch import ORDER
from ..core.arrays import default_precision, unrecorded
from ..core.problem import Modifiers, Options, Run, Weights
from ..core.validation import PRECISIONS, as_count, check_heads
from ..functional import NORMALIZED_STEP_EXACT, ShapeError
from ..modifiers.apply import (
    ModifiedCall,
    apply,
    check_choices,
    check_norm_over,
    check_positive,
    check_probability,
    dropout_mask,
)

BUILTIN_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", functional.PROJECTED)
CELLS = {name: cells.get(name) for name in BUILTIN_CELLS}  # looked up as torch.compile can
PEEPHOLE = "weight_ch"
NORM_PARAM_NAMES = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # the last two the LSTM's alone
PARAM_NAMES = Weights("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # torch's, and in torch's order
FIRST_LAYER_PARAMS = [name + "_l0" for name in PARAM_NAMES[:5]]


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
    num_heads: N blocks on the diagonal of the recurrent weights: weight_hh_l0 [G*H, H/N] and so on have for each unit
        its row of the block of its head, and first values as without heads. N must divide hidden_size; not with
        proj_size.
    """

    backend: str | None
    precision: str | None
    recompute: bool
    step_exact: bool
    zoneout: float | tuple[float, ...]
    recurrent_dropout: float
    input_dropout: float
    weight_dropout: float
    num_heads: int


class GRUKeywords(Keywords, total=False):
    """Keywords of GRU and GRUCell, in addition to those of every layer.

    layer_norm: whether the input and the recurrent projection are normalized over the units (Ba, Kiros & Hinton 2016),
        with gains weight_ln_ih_l0 and weight_ln_hh_l0 [3*H], and so on; the biases stay what they are.
    layer_norm_over: "units", all of them, or "head": each head's by themselves, as num_heads > 1 asks for.
    reset_after: whether the reset gate is applied after the recurrent matmul, as in torch.nn and cuDNN, or before it
        (Cho et al. 2014); the equations are `gpu_rnn.gru`'s.
    recurrent_dropout_on: "h" drops h before the recurrent matmul; "candidate" drops the candidate: recurrent dropout
        without memory loss (Semeniuta et al. 2016).
    """

    layer_norm: bool
    layer_norm_over: str
    reset_after: bool
    recurrent_dropout_on: str


class LSTMKeywords(Keywords, total=False):
    """Keywords of LSTM and LSTMCell, in addition to those of every layer; the equations are `gpu_rnn.lstm`'s.

    layer_norm: as for GRU, [4*H], and of the cell state in the output, with weight_ln_c_l0 and bias_ln_c_l0
        [H].
    layer_norm_over: as for GRU.
    peephole: whether the gates i, f, o read the cell state, with weights weight_ch_l0 [3*H], and so on.
    coupled: whether f = 1 - i; then the gates are i, g, o and all weights have 3*H rows.
    cell_clip: bound of the cell state.
    recurrent_dropout_on: as for GRU.
    forget_bias: first value of the forget gate's bias_ih, that of bias_hh being 0 (Jozefowicz et al. 2015).
    """

    layer_norm: bool
    layer_norm_over: str
    recurrent_dropout_on: str
    peephole: bool
    coupled: bool
    cell_clip: float | None
    forget_bias: float | None


PROBABILITIES = ("zoneout", "recurrent_dropout", "input_dropout", "weight_dropout")
CHOICES = {"backend": (None, "auto", *ORDER), "precision": (None, *PRECISIONS)}


class CallModifiers(NamedTuple):
    """The modifiers of a call, for every layer and direction together: `functional.ModifierKeywords`."""

    reset: Tensor | None = None  # [T, B]
    reset_state: tuple[Tensor, ...] | None = None  # per state [L*D, ...]
    lengths: Tensor | None = None
    left_padding: Tensor | None = None
    generator: torch.Generator | None = None
    return_states: bool = False


NO_MODIFIERS = CallModifiers()


CACHE_KEY_ATTRS = attrgetter(
    "cell_name", "input_size", "hidden_size", "proj_size", "bias", "backend", "precision", "recompute", "step_exact",
    *PROBABILITIES, "peephole", "coupled", "layer_norm", "reset_after", "cell_clip", "num_heads",
)  # fmt: skip


# name of the cell, runs, options -> of each run y, and the states after
Recorder = Callable[[str, Sequence[Run], Options], list[tuple[Tensor, tuple]]]


class Recurrent(Traced):
    """What layers and cells share. Not an nn.RNNBase, because Dynamo refuses those."""

    input_size: int
    hidden_size: int
    bias: bool
    repr_defaults: ClassVar[dict[str, Any]]  # what repr shows in addition to the sizes, where it isn't this
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
    num_heads = 1
    layer_norm_over = "units"
    _recorder: Recorder | None = None  # where to look into a layer's calls: `record`
    keywords: ClassVar[type] = Keywords

    @property
    def cell_name(self) -> str:
        """The cell's name: "lstm", "gru", "rnn_tanh", "rnn_relu", or that of a custom cell."""
        raise NotImplementedError

    @property
    def _cell(self) -> str:
        """The name by which `gpu_rnn.kernels.cells.get` finds the cell without its modifiers."""
        return self.cell_name

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-k, k), k = 1 / sqrt(hidden_size), in torch.nn's order; but a normalization's
        gains are 1 and its biases 0."""
        k = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith(tuple(NORM_PARAM_NAMES)):
                nn.init.constant_(parameter, float(name.startswith("weight")))
            else:
                nn.init.uniform_(parameter, -k, k)
        if self.forget_bias is not None:
            gate = slice(self.hidden_size, 2 * self.hidden_size)
            for name, parameter in self.named_parameters():
                if name.startswith((PARAM_NAMES.b_ih, PARAM_NAMES.b_hh)):
                    nn.init.constant_(parameter[gate], self.forget_bias if name.startswith(PARAM_NAMES.b_ih) else 0.0)

    def check_tracer(self) -> None:
        refuse_torchscript_onnx()

    def extra_repr(self) -> str:
        defaults = {**self.repr_defaults, **{name: getattr(Recurrent, name) for name in self.keywords.__annotations__}}
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
                check_probability(name, p)
            if known.__annotations__[name] is bool and not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
            if name in CHOICES and (not isinstance(value, (str, NoneType)) or value not in CHOICES[name]):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}; got {value!r}")
            if name == "cell_clip" and value is not None:
                check_positive(name, value)
            if name == "forget_bias" and (isinstance(value, bool) or not isinstance(value, (numbers.Real, NoneType))):
                raise TypeError(f"forget_bias must be a number, got {value!r}")
        return {name: as_count(name, value) if name == "num_heads" else value for name, value in keywords.items()}

    def _set(self, keywords: Any) -> None:
        for name, value in self._checked(keywords, self.keywords).items():
            setattr(self, name, value)
        check_choices(self.recurrent_dropout_on, self.layer_norm_over)
        check_heads(self.num_heads, self.hidden_size, self.proj_size)
        if self.layer_norm:
            check_norm_over(self.layer_norm_over, self.num_heads)
        if self.layer_norm and self.step_exact:
            raise ValueError(NORMALIZED_STEP_EXACT)
        if (self.layer_norm or self.proj_size) and not self.reset_after:
            what = "layer_norm" if self.layer_norm else "proj_size"
            raise ValueError(f"{what} is not defined for a GRU with reset_after=False")
        if self.forget_bias is not None and (self.coupled or not self.bias):
            raise ValueError("forget_bias is for the bias of a forget gate: it needs bias=True, and not coupled=True")

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        """The parameters of one layer and direction, without values yet."""
        rows, H = (CELLS[self._cell].G - self.coupled) * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            PARAM_NAMES.w_ih: (rows, I),
            PARAM_NAMES.w_hh: (rows, self.proj_size or H // self.num_heads),
        }
        if self.bias:
            shapes |= {PARAM_NAMES.b_ih: (rows,), PARAM_NAMES.b_hh: (rows,)}
        if self.proj_size:
            shapes[PARAM_NAMES.w_hr] = (self.proj_size, H)
        if self.peephole:
            shapes[PEEPHOLE] = (rows - H,)  # all gates but g
        if self.layer_norm:
            shapes |= {name: (rows,) if name in NORM_PARAM_NAMES[:2] else (H,) for name in self._norm_params()}
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _norm_params(self) -> list[str]:
        """The names of a normalization's parameters."""
        if "c" not in CELLS[self._cell].states:
            return [*NORM_PARAM_NAMES[:2]]
        return [*NORM_PARAM_NAMES[: None if self.bias else 3]]

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell what to do instead: torch.jit.script asks here for a module whose source it can compile."""
        functional.refuse_script(self._get_name(), "layer")

    def _leaf(self, forward: Callable, input: fx.Proxy, hx: Any, **keywords: Any) -> fx.Proxy:
        """Record a call as one node of a torch.fx graph, as torch.fx does it for a layer of torch.nn.

        `forward` is the method that calls it. The node calls the module, so what wraps that method would be recorded
        a second time.
        """
        name = input.tracer.path_of_module(self)
        obstacles = {
            "it is the root of what is traced": not name,
            "it has a forward of its own": type(self).forward is not forward or "forward" in vars(self),
            "it has hooks": self._forward_pre_hooks or self._forward_hooks,
        }
        for reason, holds in obstacles.items():
            if holds:
                raise fx.proxy.TraceError(
                    f"gpu_rnn.{self._get_name()} {name!r} is no leaf for torch.fx, since {reason}; trace a model that "
                    "contains it, by a torch.fx.Tracer whose is_leaf_module says that it is one"
                )
        present = {label: value for label, value in keywords.items() if value is not None and value is not False}
        return input.tracer.create_proxy("call_module", name, (input,) if hx is None else (input, hx), present)

    def _weights(self, suffix: str) -> Weights:
        return self._get_weights([name + suffix for name in PARAM_NAMES[:5]])

    def _get_weights(self, names: Sequence[str]) -> Weights:
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

    @unrecorded
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

    @unrecorded
    def _initial_states(self, hx: Any, sizes: tuple[int, ...], letters: str, input: Tensor) -> Sequence[Tensor | None]:
        """hx as one tensor [*sizes, P or H] per state of the cell; as None, for zeros. `letters` name the sizes."""
        states = CELLS[self._cell].states
        if hx is None:
            return [None] * len(states)
        initial = hx if len(states) > 1 else (hx,)
        if not isinstance(initial, (tuple, list)) or len(initial) != len(states):
            raise self._states_error(hx)
        size = self.proj_size or self.hidden_size
        for letter, state in zip(states, initial):
            if not isinstance(state, Tensor):
                raise self._states_error(hx)
            if state.shape != (*sizes, size):
                symbols = [*letters.split(), "P" if size == self.proj_size else "H"]
                raise ShapeError(
                    f"{self._get_name()}: {letter}0 has shape {functional.shape(state)}; expected "
                    f"[{', '.join(symbols)}] = {[*sizes, size]}, with input {functional.shape(input)}"
                )
            size = self.hidden_size
        return initial

    def _states_error(self, hx: Any) -> TypeError:
        names = ", ".join(letter + "0" for letter in CELLS[self._cell].states)
        return TypeError(f"{self._get_name()}: hx must be the tensors ({names}); got {describe(hx)}")

    def _run_layer(
        self, x: Tensor, suffixes: Sequence[str], states: Sequence[Sequence[Tensor | None]], call: CallModifiers,
        first: int,
    ) -> list[tuple[Any, ...]]:  # fmt: skip
        """Run x [T, B, I] through one layer in all directions, whose parameters' names end in `suffixes`.

        Their numbers go on from `first`. -> for each y [T, B, P], the states after it; with return_states also the
        states after every time step
        """
        options = self._options(call)
        if call is NO_MODIFIERS and not self._has_modifiers():
            runs = [Run(*cast(x, self._weights(s), state), k > 0) for k, (s, state) in enumerate(zip(suffixes, states))]
            return self._execute(self._cell, runs, options)
        modified, runs = [], []
        for k, (suffix, state) in enumerate(zip(suffixes, states)):
            this, cast_state = self._apply_modifiers(x, suffix, state, call, first + k, reverse=k > 0)
            modified.append(this)
            runs.append(Run(this.x, this.weights, cast_state, k > 0))
        outputs = self._execute(modified[0].name, runs, options)
        S = len(runs[0].state)
        return [this.unpack(y, after, S, options.history) for this, (y, after) in zip(modified, outputs)]

    def _execute(self, name: str, runs: Sequence[Run], options: Options) -> list[tuple[Tensor, tuple]]:
        """The one place where a layer computes, or shows what it would compute to its recorder."""
        return (self._recorder or eager.run)(name, runs, options)

    def _try_cached(self, names: Sequence[str], input: Tensor, hx: Any, *layout: Any) -> tuple[Tensor, tuple] | None:
        """Run a plain call of one layer in one direction by its cached decisions -> y [T, B, P], the states after.

        None where there are none. `names`: of its weights. `layout`: what else decides how the input lies.
        """
        if is_observed() or self._recorder or is_any_autocast_enabled() or not isinstance(input, Tensor):
            return None
        weights = self._get_weights(names)
        if hx is None:
            state: Sequence[Any] = ()
        elif isinstance(hx, Tensor):
            state = (hx,)
        elif type(hx) is tuple:
            state = hx
        else:
            return None
        precision = input.is_cuda and default_precision(input)
        settings = CACHE_KEY_ATTRS(self), layout, type(hx), torch.is_grad_enabled(), precision
        call = lookup(settings, "torch", (input, *state, *weights), self._make_cached_call, input, hx, weights)
        if call is None:
            return None
        if hx is None:
            state = (None,) * call.layout.S
        return run_cached(call, [Run(self._time_major(input), weights, state)])[0]

    def _make_cached_call(self, input: Tensor, hx: Any, weights: Weights) -> CachedCall | None:
        """Check that everything fits. None where there is more to do than the call of one backend."""
        batch, initial = self._check_inputs(input, hx)
        if not batch or is_meta_or_fake(input) or self._has_modifiers():
            return None
        flat = [None if state is None else state.reshape(state.shape[-2:]) for state in initial]
        run = Run(self._time_major(input), weights, flat)
        call = eager.make_call(self._cell, [run], self._options(NO_MODIFIERS)._replace(layers=1))
        if call is None or not call.zeros or not hasattr(self, "num_layers"):
            return call
        return replace(call, zeros=(tuple([shape and (1, *shape) for shape in call.zeros[0]]),))

    def _check_inputs(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        """-> the sizes that a state has before H; and the first states. Raise where they don't fit."""
        raise NotImplementedError

    def _time_major(self, input: Tensor) -> Tensor:
        """Input with a batch, as [T, B, I]."""
        raise NotImplementedError

    def _apply_modifiers(
        self, x: Tensor, suffix: str, state: Sequence[Tensor | None], call: CallModifiers, k: int, *, reverse: bool
    ) -> tuple[ModifiedCall, Sequence[Tensor | None]]:
        """Apply the modifiers in layer and direction number k -> the modified call, and its first states."""
        weights, own = self._weights(suffix), self._per_unit_params(suffix)
        resets = [] if call.reset_state is None else [states[k] for states in call.reset_state]
        flat = [array for arrays in own.values() for array in arrays]
        S, N = len(state), len(state) + len(flat)
        x, weights, tensors = cast(x, weights, [*state, *flat, *resets])
        state, resets, taken = tensors[:S], [*tensors[N:]], iter(tensors[S:N])
        own = {name: tuple(next(taken) for _ in arrays) for name, arrays in own.items()}
        seed = None
        if self.training and self._draws_masks():
            if is_capturing() and is_exporting_to_onnx():
                drawing = [name for name in PROBABILITIES if getattr(self, name)]
                raise NotImplementedError(
                    f"gpu_rnn.{self._get_name()} draws masks in training mode, by {', '.join(drawing)}, which ONNX "
                    "can't; call model.eval() before torch.onnx.export"
                )
            seed = draw_seed(call.generator, x)
            if self.input_dropout:
                x = x * dropout_mask(seed, self.input_dropout, tuple(x.shape[1:]), x, which=1)
            if self.weight_dropout:
                mask = dropout_mask(seed, self.weight_dropout, tuple(weights.w_hh.shape), x, which=2)
                weights = weights._replace(w_hh=weights.w_hh * mask)
        modifiers = Modifiers(
            reset=call.reset, reset_state=tuple(resets) or None, lengths=call.lengths, left_padding=call.left_padding,
            zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout, seed=seed, training=self.training,
            coupled=self.coupled, cell_clip=self.cell_clip, reset_after=self.reset_after,
            recurrent_dropout_on=self.recurrent_dropout_on,
            layer_norm=own.pop("layer_norm", None), layer_norm_over=self.layer_norm_over,
            **{name: array for name, (array,) in own.items()},
        )  # fmt: skip
        return apply(self._cell, x, weights, modifiers, reverse, self.num_heads), state

    def _options(self, call: CallModifiers) -> Options:
        return Options(
            False, self.backend, self.precision, call.return_states, self.recompute, step_exact=self.step_exact,
            heads=self.num_heads,
        )  # fmt: skip

    def _per_unit_params(self, suffix: str) -> dict[str, tuple[Any, ...]]:
        """The per-unit parameters of one layer and direction, by their name in `Modifiers`."""
        own: dict[str, tuple[Any, ...]] = {}
        if self.peephole:
            own["peephole"] = (getattr(self, PEEPHOLE + suffix),)
        if self.layer_norm:
            names = self._norm_params()
            own["layer_norm"] = (*(getattr(self, name + suffix) for name in names), *[None] * (len(names) == 3))
        return own

    def _draws_masks(self) -> bool:
        """Whether masks are drawn in training."""
        zoneout = any(self.zoneout) if isinstance(self.zoneout, tuple) else self.zoneout
        return bool(zoneout or self.recurrent_dropout or self.input_dropout or self.weight_dropout)

    def _has_modifiers(self) -> bool:
        """Whether every call has modifiers."""
        variant = self.peephole or self.coupled or self.layer_norm or not self.reset_after or self.cell_clip is not None
        return self._draws_masks() or variant


# ---- arguments ------------------------------------------------------------------------------------------------------


def check_sizes(**sizes: Any) -> list[int]:
    """Each as an int, also of NumPy's; or an error that names it."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size <= 0 and name != "proj_size":
            raise ValueError(f"{name} must be larger than 0, got {size}")
    return [*map(int, sizes.values())]


def describe(hx: Any) -> str:
    """The structure and shapes of something, for an error."""
    if isinstance(hx, (tuple, list)):
        return f"a {type(hx).__name__} of {', '.join(map(describe, hx)) or 'nothing'}"
    return f"a tensor {functional.shape(hx)}" if isinstance(hx, Tensor) else type(hx).__name__


def draw_seed(generator: torch.Generator | None, x: Tensor) -> Tensor:
    """Draw one [1] int64 for a layer and direction, from torch's generator of the device, or the caller's."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


Cast = tuple[Tensor, Weights, Sequence[Tensor | None]]


def cast(x: Tensor, weights: Weights, state: Sequence[Tensor | None]) -> Cast:
    """The arguments, of autocast's dtype where that is on; like torch it leaves float64 alone."""
    if not is_capturing() and not is_any_autocast_enabled():
        return x, weights, state
    device = x.device.type
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return x, weights, state
    dtype = torch.get_autocast_dtype(device)

    def cast_one(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (dtype, torch.float64):
            return tensor
        narrow = tensor.to(dtype)  # at every call: a write to the weights, through `.data` too, is never missed
        if isinstance(tensor, nn.Parameter) and not is_capturing():
            narrow.cast_of = tensor  # type: ignore[attr-defined]  # what a graph keeps (`functions.without_casts`)
        return narrow

    return cast_one(x), Weights(*map(cast_one, weights)), [*map(cast_one, state)]


def record(layer: Recurrent, recorder: Recorder, x: Any, hx: Any) -> None:
    """Call a layer in eval mode with a recorder, which takes the place of `eager.run` at every layer of it.

    The layer is a copy that stays so (`conversion.as_gpu_rnn_layer`).
    """
    layer._recorder, layer.training = recorder, False
    layer(x, hx)
