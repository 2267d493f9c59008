"""Layers in the place of torch.nn's: RNN, LSTM, GRU and their cells; and `replace_`, which puts them there.

Arguments, attributes, names, shapes, order and first values of the parameters are torch.nn's, so that state_dicts go
both ways with strict=True:

    ours = gpu_rnn.LSTM(64, 128, num_layers=2)
    ours.load_state_dict(torch.nn.LSTM(64, 128, num_layers=2).state_dict())
    torch.nn.LSTM(64, 128, num_layers=2).load_state_dict(ours.state_dict())

Beyond torch.nn's: gradients in eval mode, on every device; and the argument `backend`.
"""

import math
import numbers
import warnings
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as dropped
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from gpu_rnn.kernels import cells

from . import functional
from .autograd import captured, capturing
from .functional import ShapeError
from .problem import Weights

PAGES = {name: cells.get(name) for name in ("rnn_tanh", "rnn_relu", "lstm", "gru")}  # looked up as torch.compile can
NAMES = Weights("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # torch's, and in torch's order


class Recurrent(nn.Module):
    """What layers and cells share. Not an nn.RNNBase, because Dynamo refuses those."""

    input_size: int
    hidden_size: int
    bias: bool
    shown: ClassVar[dict[str, Any]]  # what repr tells, beside the sizes, where it isn't this
    proj_size = 0
    backend: str | None = None

    @property
    def page(self) -> str:
        """The name of the cell's page."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-k, k), k = 1 / sqrt(hidden_size), in torch.nn's order."""
        k = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -k, k)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name, default) for name, default in self.shown.items()}
        differing = [f"{name}={value}" for name, value in values.items() if value != self.shown[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *differing])

    def _register(self, suffix: str, I: int, device: Any, dtype: Any) -> None:
        """The parameters of one layer and direction, without values yet."""
        rows, H = PAGES[self.page].G * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {NAMES.w_ih: (rows, I), NAMES.w_hh: (rows, self.proj_size or H)}
        if self.bias:
            shapes |= {NAMES.b_ih: (rows,), NAMES.b_hh: (rows,)}
        if self.proj_size:
            shapes[NAMES.w_hr] = (self.proj_size, H)
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def _weights(self, suffix: str) -> Weights:
        return Weights(*(getattr(self, name + suffix, None) for name in NAMES))

    def _sizes(self, input: Tensor, *layouts: str) -> dict[str, int]:
        """The input's size by letter, by the layout of its rank; or an error that repeats its shape."""
        if not isinstance(input, Tensor):
            raise TypeError(f"{self._get_name()} takes a torch tensor, got {type(input).__name__}")
        layout = next((layout for layout in layouts if len(layout) == input.dim()), None)
        if layout is None or input.shape[-1] != self.input_size:
            expected = " or ".join(f"[{', '.join(layout)}]" for layout in layouts)
            raise ShapeError(
                f"{self._get_name()}: input has shape {functional.shape(input)}; "
                f"expected {expected} with I = input_size = {self.input_size}"
            )
        sizes = dict(zip(layout, input.shape))
        if sizes.get("T") == 0:
            raise ShapeError(
                f"{self._get_name()}: the sequence is empty: input has shape {functional.shape(input)}, "
                f"[{', '.join(layout)}], and T must be larger than 0"
            )
        return sizes

    def _initial(self, hx: Any, leading: dict[str, int], input: Tensor) -> list[Tensor]:
        """hx as a list of one tensor [*leading, P or H] per state of the cell; zeros for None."""
        H, names = {"H": self.hidden_size}, [letter + "0" for letter in PAGES[self.page].states]
        shown = {"P": self.proj_size} if self.proj_size else H
        expected = [leading | size for size in (shown, H)[: len(names)]]
        if hx is None:
            return [input.new_zeros(list(sizes.values())) for sizes in expected]
        given = hx if len(names) > 1 else [hx]
        listed = isinstance(given, (tuple, list)) and len(given) == len(names)
        if not listed or not all(isinstance(state, Tensor) for state in given):
            raise TypeError(f"{self._get_name()}: hx must be the tensors ({', '.join(names)}); got {described(hx)}")
        for name, state, sizes in zip(names, given, expected):
            if list(state.shape) != list(sizes.values()):
                raise ShapeError(
                    f"{self._get_name()}: {name} has shape {functional.shape(state)}; expected "
                    f"[{', '.join(sizes)}] = {list(sizes.values())}, with input {functional.shape(input)}"
                )
        return list(given)

    def _run(self, x: Tensor, weights: Weights, initial: list[Tensor], reverse: bool) -> tuple[Tensor, tuple]:
        """The way down: x [T, B, I] through one layer in one direction -> y [T, B, P], the states after it."""
        cast = autocast(x.device.type)
        state = dict(zip([letter + "0" for letter in PAGES[self.page].states], map(cast, initial)))
        run = captured if capturing() else functional.sequence
        return run(self.page, cast(x), Weights(*map(cast, weights)), state, reverse, self.backend)


# ---- layers ---------------------------------------------------------------------------------------------------------


class RecurrentLayer(Recurrent):
    """Several layers in one or two directions over a whole sequence, padded or packed."""

    shown: ClassVar = {
        "proj_size": 0,
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0,
        "bidirectional": False,
        "backend": None,
    }
    mode: str
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __init__(
        self, mode: str, input_size: int, hidden_size: int, num_layers: int, bias: bool, batch_first: bool,
        dropout: float, bidirectional: bool, proj_size: int, device: Any, dtype: Any, backend: str | None,
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
        self.backend = backend
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
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ("", "_reverse")[: self._directions]]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of every layer and direction."""
        return [[weight for weight in self._weights(suffix) if weight is not None] for suffix in self._suffixes]

    def flatten_parameters(self) -> None:
        """Nothing: the kernels take the weights from where they are."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run the layers. Shapes and errors: see the class."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        sizes = self._sizes(input, "BTI" if self.batch_first else "TBI", "TI")
        batch = {"B": sizes["B"]} if "B" in sizes else {}
        transposed = self.batch_first and bool(batch)
        initial = self._initial(hx, {"L*D": len(self._suffixes), **batch}, input)
        x = input.transpose(0, 1) if transposed else input
        if not batch:
            x, initial = x.unsqueeze(1), [state.unsqueeze(1) for state in initial]
        y, last = self._stack(x, initial, self._run)
        if not batch:
            y, last = y.squeeze(1), [state.squeeze(1) for state in last]
        return y.transpose(0, 1) if transposed else y, as_hx(last)

    @torch.compiler.disable  # batch sizes are data, and a graph for each would be compiled anew
    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorting, unsorting = packed
        self._sizes(data, "NI")
        runs = [(len(list(same)), B) for B, same in groupby(checked_batch_sizes(batch_sizes, data))]
        initial = self._initial(hx, {"L*D": len(self._suffixes), "B": runs[0][1]}, data)
        if sorting is not None:
            initial = [state.index_select(1, sorting) for state in initial]
        y, last = self._stack(data, initial, partial(chain, self._run, runs))
        if unsorting is not None:
            last = [state.index_select(1, unsorting) for state in last]
        return PackedSequence(y, batch_sizes, sorting, unsorting), as_hx(last)

    def _stack(self, x: Tensor, initial: list[Tensor], run: Callable) -> tuple[Tensor, list[Tensor]]:
        """Every layer in every direction -> the last layer's outputs, and the final states [L*D, B, P or H]."""
        suffixes = self._suffixes
        last: list[tuple] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = dropped(x, self.dropout)
            outputs = []
            for reverse in (False, True)[: self._directions]:
                k = len(last)
                y, after = run(x, self._weights(suffixes[k]), [state[k] for state in initial], reverse=reverse)
                outputs.append(y)
                last.append(after)
            x = torch.cat(outputs, -1) if self.bidirectional else y
        return x, [torch.stack(states) for states in zip(*last)]


def chain(
    run: Callable, runs: list[tuple[int, int]], data: Tensor, weights: Weights, initial: list[Tensor], reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """Packed data [N, I] through one layer in one direction -> y [N, P], every row's states after its own last instant.

    `runs` are the stretches of equal batch size B, as (instants, B): each is a plain sequence [instants, B, I], without
    padding. The rows are sorted by length, so that forwards the last rows leave between two runs, and their states
    are final; in reverse they enter, with their initial states.
    """
    pieces = [piece.unflatten(0, size) for piece, size in zip(data.split([n * B for n, B in runs]), runs)]
    outputs, left = [], []
    state = [whole[: runs[-1][1]] for whole in initial] if reverse else initial
    for x in reversed(pieces) if reverse else pieces:
        B, running = x.shape[1], len(state[0])
        if running > B:
            left.append([rows[B:] for rows in state])
            state = [rows[:B] for rows in state]
        elif running < B:
            state = [torch.cat([rows, whole[running:B]]) for rows, whole in zip(state, initial)]
        y, state = run(x, weights, state, reverse=reverse)
        outputs.append(y.flatten(0, 1))
    if left:
        state = [torch.cat(rows) for rows in zip(state, *reversed(left))]
    return torch.cat(outputs[::-1] if reverse else outputs), list(state)


class RNN(RecurrentLayer):
    """Elman's recurrent network, in the place of torch.nn.RNN.

    Every unit computes h_t = f(W x_t + b_ih + R h_{t-1} + b_hh) (Elman 1990), with f tanh or relu (Le, Jaitly & Hinton
    2015). Beside `nonlinearity`, arguments are those of `LSTM`, without `proj_size`.

    Input:   [T, B, I], and so on as for `LSTM`; h0 [L*D, B, H] or [L*D, H], zeros when None.
    Returns: y [T, B, D*H] and hT [L*D, B, H], in the layout of the input. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, *, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            functional.elman(nonlinearity).upper(), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, device, dtype, backend,
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
        backend: "numpy", "triton" or "cuda" insists on one; None or "auto" takes $GPU_RNN_BACKEND or the fastest.

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

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: Any = None, dtype: Any = None, *, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, device, dtype, backend,
        )  # fmt: skip


class GRU(RecurrentLayer):
    """Gated recurrent unit with the reset gate after the recurrent product, in the place of torch.nn.GRU.

    Every unit computes, with x = W x_t + b_ih and h = R h_{t-1} + b_hh for each of the gates r, z, n:

        h_t = (1 - z) n + z h_{t-1},    r = sigmoid(x_r + h_r),    z = sigmoid(x_z + h_z),    n = tanh(x_n + r h_n)

    (Cho et al. 2014; this form: cuDNN and torch.nn.GRU.) Arguments are those of `LSTM`, without `proj_size`.

    Input:   [T, B, I], and so on as for `LSTM`; h0 [L*D, B, H] or [L*D, H], zeros when None.
    Returns: y [T, B, D*H] and hT [L*D, B, H], in the layout of the input. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, *, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, device, dtype, backend,
        )  # fmt: skip


# ---- cells ----------------------------------------------------------------------------------------------------------


class RecurrentCell(Recurrent):
    """One layer for one instant."""

    shown: ClassVar = {"bias": True, "nonlinearity": "tanh", "backend": None}

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True,
        device: Any = None, dtype: Any = None, *, backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.bias, self.backend = input_size, hidden_size, bias, backend
        self._register("", input_size, device, dtype)
        if not bias:
            self.register_parameter(NAMES.b_ih, None)
            self.register_parameter(NAMES.b_hh, None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one instant. Shapes and errors: see the class."""
        sizes = self._sizes(input, "BI", "I")
        batch = {"B": sizes["B"]} if "B" in sizes else {}
        initial = self._initial(hx, batch, input)
        if not batch:
            input, initial = input.unsqueeze(0), [state.unsqueeze(0) for state in initial]
        _, last = self._run(input.unsqueeze(0), self._weights(""), initial, reverse=False)
        return as_hx(last if batch else [state.squeeze(0) for state in last])


class RNNCell(RecurrentCell):
    """One instant of `RNN`, in the place of torch.nn.RNNCell: h' = f(W x + b_ih + R h + b_hh), f tanh or relu.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Any = None, dtype: Any = None, *, backend: str | None = None,
    ) -> None:  # fmt: skip
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)

    @property
    def page(self) -> str:
        return functional.elman(self.nonlinearity)


class LSTMCell(RecurrentCell):
    """One instant of `LSTM`, in the place of torch.nn.LSTMCell; the equations are there.

    Input: [B, I] or [I], and (h, c) both [B, H] or [H], zeros when None. Returns (h', c') likewise. Raises as `LSTM`.
    """

    page = "lstm"


class GRUCell(RecurrentCell):
    """One instant of `GRU`, in the place of torch.nn.GRUCell; the equations are there.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    page = "gru"


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


def as_hx(states: Any) -> Any:
    """One state alone, several as a tuple: torch.nn's structure."""
    return tuple(states) if len(states) > 1 else states[0]


def autocast(device: str) -> Callable[[Tensor | None], Tensor | None]:
    """What makes a tensor of autocast's dtype, where that is on; like torch it leaves float64 alone."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (dtype, torch.float64):
            return tensor
        cached = torch.is_autocast_cache_enabled() and torch.is_grad_enabled() and not capturing()
        return once(tensor, dtype) if cached and isinstance(tensor, nn.Parameter) else tensor.to(dtype)

    return cast


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

TWINS = {getattr(nn, twin.__name__): twin for twin in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
CACHES = ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights")  # of torch.nn's layers


def replace_(model: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Swap every torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell of a model, in place; returns the model.

    The modules stay the same objects and only change their class, so that everything that refers to them or to their
    parameters goes on: optimizers, hooks, modules that are used twice, weight norms and other parametrizations. Only
    `isinstance(module, torch.nn.LSTM)` is no longer true. A model that is itself such a layer is swapped as well.

    Classes derived from torch.nn's are left alone, because nobody can know what they changed; a warning names them.

    Args:
        model: any module. backend: that of every swapped layer, as for `LSTM`.
    """
    left = []
    for name, module in model.named_modules():
        if (ours := twin(module)) is not None:
            for cache in CACHES:  # or they would keep weights alive that were replaced since
                module.__dict__.pop(cache, None)
            module.__class__ = ours
            module.backend = backend
        elif isinstance(module, tuple(TWINS)):
            left.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if left:
        warnings.warn(f"replace_ left classes derived from torch.nn's alone: {', '.join(left)}", stacklevel=2)
    return model


def twin(module: nn.Module) -> type | None:
    """The class to swap a module's for, if there is one."""
    theirs = type(module)
    if not parametrize.is_parametrized(module):
        return TWINS.get(theirs)
    # torch.nn.utils.parametrize derives a class for each module, with a property per parameter: derive its like
    ours = TWINS.get(theirs.__bases__[0])
    members = {key: value for key, value in vars(theirs).items() if key not in ("__dict__", "__weakref__")}
    return ours and type(theirs.__name__, (ours,), members)
