"""Drop-in replacements for torch.nn's layers: RNN, LSTM, GRU and their cells.

Arguments, attributes, names, shapes, order and first values of the parameters are torch.nn's, so that state_dicts go
both ways with strict=True:

    ours = gpu_rnn.LSTM(64, 128, num_layers=2)
    ours.load_state_dict(torch.nn.LSTM(64, 128, num_layers=2).state_dict())
    torch.nn.LSTM(64, 128, num_layers=2).load_state_dict(ours.state_dict())

Beyond torch.nn's: gradients in eval mode, on every device; and the keywords of `Keywords`.
"""

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import functional
from ..autograd import eager
from ..autograd.torch_private import FakeTensor, disable_dynamo, is_capturing, is_meta_or_fake, is_observed
from ..core.arrays import unrecorded
from ..core.problem import Options, Run
from ..core.validation import check_flags, describe_value
from ..functional import ShapeError
from .base import (
    CELLS,
    FIRST_LAYER_PARAMS,
    NO_MODIFIERS,
    PARAM_NAMES,
    CallModifiers,
    GRUKeywords,
    Keywords,
    LSTMKeywords,
    Recurrent,
    cast,
    check_sizes,
    describe,
)

DIRECTION_SUFFIXES = ("", "_reverse")  # of the names of parameters


class RecurrentLayer(Recurrent):
    """Several layers in one or two directions over a whole sequence, padded, packed or nested."""

    repr_defaults: ClassVar = {
        "proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False,
    }  # fmt: skip
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
        input_size, hidden_size, num_layers, proj_size = check_sizes(
            input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, proj_size=proj_size
        )
        check_flags(bias=bias, batch_first=batch_first, bidirectional=bidirectional)
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
    def cell_name(self) -> str:
        return self.mode.lower()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _suffixes(self) -> list[str]:
        """The ends of the parameters' names: layer after layer, forward before reverse, as the states are stacked."""
        ends = DIRECTION_SUFFIXES[: self._directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _options(self, call: CallModifiers) -> Options:
        """With how many layers may run at once: all, where each is a plain one on the outputs of the one below."""
        options = super()._options(call)
        if self.num_layers == 1 or self.bidirectional or self.proj_size or self.step_exact or call is not NO_MODIFIERS:
            return options
        single = self._has_modifiers() or (self.dropout and self.training) or self.num_heads > 1
        return options if single else options._replace(layers=self.num_layers)

    def _run_wavefront(self, x: Tensor, initial: Sequence[Sequence[Tensor | None]]) -> tuple[Any, ...] | None:
        """As `_run_layers`, all layers at once; None where the backend wouldn't. initial: by state, of each layer."""
        cast_all = [cast(x, self._weights(suffix), state) for suffix, state in zip(self._suffixes, zip(*initial))]
        runs = [Run(None if k else first, weights, state) for k, (first, weights, state) in enumerate(cast_all)]
        outputs = eager.run_stack(self._cell, runs, self._options(NO_MODIFIERS))
        if outputs is None:
            return None
        return outputs[-1][0], [torch.stack(states) for states in zip(*(last for _, last in outputs))]

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of every layer and direction."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    # torch.nn's layers have these three, and much code that initializes, drops or prunes weights reads them

    @property
    def _all_weights(self) -> list[list[str]]:
        """The names of the parameters of every layer and direction."""
        present = True, True, self.bias, self.bias, self.proj_size
        names = [name for name, is_present in zip(PARAM_NAMES, present) if is_present]
        return [[name + suffix for name in names] for suffix in self._suffixes]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return FlatWeights(self)

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        names = self._flat_weights_names
        if len(weights) != len(names):
            raise ValueError(f"_flat_weights must be {len(names)} tensors ({', '.join(names)}), got {len(weights)}")
        for name, weight in zip(names, weights):
            if getattr(self, name, None) is not weight:
                setattr(self, name, weight)

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the weights where they are."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, reset: Tensor | None = None, reset_state: Any = None,
        lengths: Tensor | None = None, left_padding: Tensor | None = None, return_states: bool = False,
        generator: torch.Generator | None = None, mask: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Run the layers on input [T, B, I], or as the class says -> y and the final states; errors are those of the
        class.

        reset, reset_state, lengths, left_padding, return_states: as for `gpu_rnn.lstm`, with states of all layers,
        [L*D, ...]. generator: of the random masks. mask: [T, B] bool in the layout of input, instead of lengths.
        """
        packed = isinstance(input, PackedSequence)
        if packed or (isinstance(input, Tensor) and input.is_nested):
            if any(m is not None for m in (reset, reset_state, lengths, left_padding, mask)) or return_states:
                raise TypeError(
                    f"{self._get_name()}: {'packed' if packed else 'nested'} input has its own lengths; for reset, "
                    "reset_state, lengths, left_padding, mask or return_states pass padded input"
                )
            return (self._forward_packed if packed else self._forward_nested)(input, hx, generator)
        plain = reset is reset_state is lengths is left_padding is mask is generator is None and not return_states
        if plain and self.num_layers == 1 and not self.bidirectional:
            outputs = self._try_cached(FIRST_LAYER_PARAMS, input, hx, self.batch_first)
            if outputs is not None:
                y, last = outputs
                return y.transpose(0, 1) if self.batch_first else y, as_hx(last)
        if isinstance(input, fx.Proxy):
            keywords = {"lengths": lengths, "left_padding": left_padding, "return_states": return_states}
            keywords["generator"] = generator
            return self._leaf(RecurrentLayer.forward, input, hx, reset=reset, reset_state=reset_state, **keywords)  # type: ignore[return-value]
        batch, initial = self._check_inputs(input, hx)
        transposed = self.batch_first and bool(batch)
        call = NO_MODIFIERS
        if not plain:
            check_flags(return_states=return_states)
            if generator is not None and not isinstance(generator, torch.Generator):
                raise TypeError(
                    f"{self._get_name()}: generator must be a torch.Generator, got {describe_value(generator)}"
                )
            if mask is not None:
                lengths = self._lengths(mask, lengths, input)
            self._check_marks(input, batch, reset=reset, lengths=lengths, left_padding=left_padding)
            if not batch:
                marks = reset, lengths, left_padding
                reset, lengths, left_padding = (None if mark is None else mark.unsqueeze(-1) for mark in marks)
            elif transposed and reset is not None:
                reset = reset.t()
            resets = None if reset_state is None else self._reset_states(reset_state)
            call = CallModifiers(reset, resets, lengths, left_padding, generator, return_states)
        x = input.transpose(0, 1) if transposed else input
        if not batch:
            x, initial = x.unsqueeze(1), [state if state is None else state.unsqueeze(1) for state in initial]
        y, *groups = self._run_layers(x, initial, call)
        if not batch:  # B is axis 1 of states, and axis 2 of states of every time step
            y, groups = y.squeeze(1), [[s.squeeze(1 + n) for s in states] for n, states in enumerate(groups)]
        if transposed:
            y, groups[1:] = y.transpose(0, 1), [[s.transpose(1, 2) for s in states] for states in groups[1:]]
        return y, *map(as_hx, groups)

    def _check_inputs(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        batch = self._batch(input, "BTI" if self.batch_first else "TBI", "TI")
        sizes = (self.num_layers * self._directions, *batch)
        return batch, self._initial_states(hx, sizes, "L*D B" if batch else "L*D", input)

    @unrecorded
    def _check_marks(self, input: Tensor, batch: tuple[int, ...], **marks: Any) -> None:
        for name, mark in marks.items():
            expected = input.shape[:-1] if name == "reset" else batch
            if mark is not None and (not isinstance(mark, Tensor) or mark.shape != expected):
                raise (ShapeError if isinstance(mark, Tensor) else TypeError)(
                    f"{self._get_name()}: {name} is {describe(mark)}; expected a tensor {list(expected)}, "
                    f"with input {functional.shape(input)}"
                )

    def _time_major(self, input: Tensor) -> Tensor:
        return input.transpose(0, 1) if self.batch_first else input

    def _lengths(self, mask: Tensor, lengths: Tensor | None, input: Tensor) -> Tensor:
        """[B] or [], from a mask in the layout of the input: true for the time steps of a sequence, then false.

        TorchRL's modules mask the end of a trajectory so, where the layer that they have isn't torch.nn's.
        """
        if lengths is not None:
            raise TypeError(f"{self._get_name()}: mask and lengths exclude each other; pass one of them")
        self._check_mask(mask, input)
        time = 1 if self.batch_first and input.ndim == 3 else 0
        readable = mask.device.type == "cpu" and not (is_observed() or is_meta_or_fake(mask))
        if readable and (mask.int().diff(dim=time) > 0).any():
            raise ValueError(f"{self._get_name()}: mask must be true for the first time steps of a row alone")
        return mask.sum(time)

    @unrecorded
    def _check_mask(self, mask: Tensor, input: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != input.shape[:-1]:
            actual = f"{describe(mask)} of {mask.dtype}" if isinstance(mask, Tensor) else describe(mask)
            expected = f"a bool tensor {list(input.shape[:-1])}, with input {functional.shape(input)}"
            raise ShapeError(f"{self._get_name()}: mask is {actual}; expected {expected}")

    def step(self, input: Tensor, hx: Any = None) -> tuple[Any, ...]:
        """Run one time step of a layer with one direction: input [B, I] or [I], hx as in `forward` -> y [B, P] or [P],
        hx.

        As `forward` for a sequence of length 1, gradients included. For live input use `gpu_rnn.stream`.
        """
        if self.bidirectional:
            raise ValueError(f"step() is not defined for a bidirectional layer: {self!r}")
        self._batch(input, "BI", "I")
        time = 1 if self.batch_first and input.ndim == 2 else 0
        y, hx = self(input.unsqueeze(time), hx)
        return y.squeeze(time), hx

    @unrecorded
    def _reset_states(self, reset_state: Any) -> tuple[Tensor, ...]:
        """One per state, [L*D, B, .] or [L*D, .]; their other sizes are checked with the rest."""
        states, many = CELLS[self._cell].states, self.num_layers * self._directions
        arrays = reset_state if len(states) > 1 else (reset_state,)
        sizes = [getattr(state, "shape", (0,))[0] for state in arrays] if isinstance(arrays, (tuple, list)) else None
        if sizes != [many] * len(states):
            raise ShapeError(
                f"{self._get_name()}: reset_state must be one tensor [L*D, B, .] or [L*D, .] per state "
                f"({', '.join(states)}), with L*D = {many}; got {describe(reset_state)}"
            )
        return tuple(arrays)

    # Batch sizes are data, and a graph for each would be compiled anew. torch.compiler.disable would load the compiler.
    @disable_dynamo
    def _forward_packed(
        self, packed: PackedSequence, hx: Any, generator: torch.Generator | None
    ) -> tuple[PackedSequence, Any]:
        """As padded input with lengths."""
        data, batch_sizes, sorting, unsorting = packed
        if isinstance(batch_sizes, FakeTensor):
            raise NotImplementedError(
                f"{self._get_name()}: torch.export and torch.onnx.export don't know the batch sizes of packed input, "
                "which are data; give padded input and lengths=, by which the layer computes the same"
            )
        self._batch(data, "NI")
        sizes = checked_batch_sizes(batch_sizes, data)
        B = sizes[0]
        initial = self._initial_states(hx, (self.num_layers * self._directions, B), "L*D B", data)
        if sorting is not None:
            initial = [state if state is None else state.index_select(1, sorting) for state in initial]
        x, ends = pad_packed_sequence(PackedSequence(data, batch_sizes))
        call = ragged(ends.to(data.device, non_blocking=True), sizes[-1] == B, generator)

        def packed_dropout(x: Tensor, p: float) -> Tensor:
            rows = PackedSequence(F.dropout(pack_padded_sequence(x, ends).data, p), batch_sizes)
            return pad_packed_sequence(rows)[0]

        y, last = self._run_layers(x, initial, call, packed_dropout)
        if unsorting is not None:
            last = [state.index_select(1, unsorting) for state in last]
        y = pack_padded_sequence(y, ends).data
        return PackedSequence(y, batch_sizes, sorting, unsorting), as_hx(last)

    def _forward_nested(self, nested: Tensor, hx: Any, generator: torch.Generator | None) -> tuple[Tensor, Any]:
        """As padded input with lengths. nested: [B, *, I], sequences [., I] one after the other in its values."""
        name = self._get_name()
        if nested.layout != torch.jagged:
            raise TypeError(
                f"{name}: a nested tensor must have the layout torch.jagged, got {nested.layout}; "
                "torch.nested.as_nested_tensor(input.unbind(), layout=torch.jagged) has it"
            )
        shape = list(nested.shape)
        if len(shape) != 3 or shape[2] != self.input_size:
            raise ShapeError(
                f"{name}: nested input has shape {shape}; expected [B, *, I] with I = input_size = {self.input_size}"
            )
        nested = nested.contiguous()  # without holes between its sequences
        values, offsets = nested.values(), nested.offsets()
        x = torch.nested.to_padded_tensor(nested, 0.0).transpose(0, 1)
        (T, B, _), N = x.shape, len(values)
        if T == 0:
            raise ShapeError(f"{name}: every sequence of the nested input, of shape {shape}, is empty")
        initial = self._initial_states(hx, (self.num_layers * self._directions, B), "L*D B", values)
        lengths = offsets.diff()
        y, last = self._run_layers(x, initial, ragged(lengths, N == T * B, generator))
        row = torch.repeat_interleave(lengths, output_size=N)
        t = torch.arange(N, device=row.device) - offsets[row]
        return torch.nested.nested_tensor_from_jagged(y[t, row], offsets, max_seqlen=T), as_hx(last)

    def _run_layers(
        self, x: Tensor, initial: Sequence[Tensor | None], call: CallModifiers,
        drop: Callable[[Tensor, float], Tensor] = F.dropout,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Run every layer in every direction.

        -> the last layer's outputs; the final states [L*D, B, P or H]; with return_states those of every time step,
        [L*D, T, ...]
        """
        if self.num_layers == 1 and not self.bidirectional:  # as below, but nothing is split or put together
            single = [state if state is None else state.squeeze(0) for state in initial]
            ((y, *groups),) = self._run_layer(x, ["_l0"], [single], call, 0)
            return y, *([state.unsqueeze(0) for state in group] for group in groups)
        D, suffixes = self._directions, self._suffixes
        by_layer = [len(suffixes) * [None] if state is None else state.unbind(0) for state in initial]
        if self._recorder is None and self._options(call).layers > 1:
            outputs = self._run_wavefront(x, by_layer)
            if outputs is not None:
                return outputs
        after: list[tuple] = []  # by layer and direction: states after, and those of every time step
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = drop(x, self.dropout)
            numbers_of_layer = range(layer * D, layer * D + D)
            states = [[states[k] for states in by_layer] for k in numbers_of_layer]
            results = self._run_layer(x, suffixes[layer * D : layer * D + D], states, call, layer * D)
            ys = [y for y, *_ in results]
            after += [tuple(groups) for _, *groups in results]
            x = torch.cat(ys, -1) if self.bidirectional else ys[0]
        return x, *([torch.stack(states) for states in zip(*group)] for group in zip(*after))


class RNN(RecurrentLayer):
    """Elman's recurrent network, a drop-in replacement for torch.nn.RNN.

    Every unit computes h_t = f(W x_t + b_ih + R h_{t-1} + b_hh) (Elman 1990), with f tanh or relu (Le, Jaitly & Hinton
    2015), then h_t <- w_hr h_t with P. Arguments are `nonlinearity` and those of `LSTM`.

    Input:   [T, B, I], and so on as for `LSTM`; h0 [L*D, B, P] or [L*D, P], zeros when None.
    Returns: y [T, B, D*P] and hT [L*D, B, P], in the layout of the input. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: Any = None, dtype: Any = None, *, proj_size: int = 0, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        super().__init__(
            functional.rnn_cell_name(nonlinearity).upper(), input_size, hidden_size, num_layers, bias, batch_first,
            dropout, bidirectional, proj_size, device, dtype, keywords,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


class LSTM(RecurrentLayer):
    """Long short-term memory, a drop-in replacement for torch.nn.LSTM.

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
        keywords: modifiers, variants, backend, precision and so on: `LSTMKeywords`.

    Input, of the parameters' dtype and device; under autocast, which casts everything, of any dtype:
        input: [T, B, I], [B, T, I] with batch_first, [T, I] for a single sequence, a PackedSequence, or a nested tensor
            [B, *, I] with the layout torch.jagged, whatever batch_first says.
        hx: (h0 [L*D, B, P], c0 [L*D, B, H]), without B for a single sequence; zeros when None.

    Returns:
        y [T, B, D*P], forward before reverse, in the layout of the input; and (hT, cT) in the shapes of (h0, c0), with
        which each layer and direction ended, for packed and nested input at every sequence's own end.

    Raises:
        ShapeError: shapes that don't fit, T = 0, wrong batch sizes of packed input; both a ValueError and a
            RuntimeError. TypeError: mixed or unknown dtypes or devices, an hx of another structure.
        BackendError: the requested backend does not support this call. ValueError, TypeError: from the constructor.
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
    """Gated recurrent unit, a drop-in replacement for torch.nn.GRU: its reset gate is applied after the recurrent
    matmul.

    Every unit computes, with x = W x_t + b_ih and h = R h_{t-1} + b_hh for each of the gates r, z, n:

        h_t = (1 - z) n + z h_{t-1},    r = sigmoid(x_r + h_r),    z = sigmoid(x_z + h_z),    n = tanh(x_n + r h_n)

    (Cho et al. 2014; this form: cuDNN and torch.nn.GRU.) With reset_after=False n = tanh(x_n + R_n (r h_{t-1}) + b_hn).
    Arguments are those of `LSTM`. With `proj_size` the cell has a second state s, as the LSTM has c:
    s_t = (1 - z) n + z s_{t-1}, and h_t = w_hr s_t is the input of the recurrent matmul.

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
    def _cell(self) -> str:
        return functional.PROJECTED if self.proj_size else self.cell_name


class FlatWeights(list):
    """The weights of a layer; an item that is assigned becomes the layer's weight, or raises, but is never ignored."""

    def __init__(self, layer: RecurrentLayer) -> None:
        super().__init__(getattr(layer, name, None) for name in layer._flat_weights_names)
        self.layer = layer

    def __setitem__(self, index: Any, weight: Any) -> None:
        super().__setitem__(index, weight)
        self.layer._flat_weights = self


# ---- cells ----------------------------------------------------------------------------------------------------------


class RecurrentCell(Recurrent):
    """One layer for one time step."""

    repr_defaults: ClassVar = {"bias": True, "nonlinearity": "tanh"}

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True,
        device: Any = None, dtype: Any = None, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        super().__init__()
        input_size, hidden_size = check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_flags(bias=bias)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._set(keywords)
        self._register("", input_size, device, dtype)
        if not bias:
            self.register_parameter(PARAM_NAMES.b_ih, None)
            self.register_parameter(PARAM_NAMES.b_hh, None)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: Any = None, *, generator: torch.Generator | None = None) -> Any:
        """Run one time step on input [B, I] or [I] -> the states after it; errors are those of the class."""
        if generator is None:
            outputs = self._try_cached(PARAM_NAMES[:5], input, hx)
            if outputs is not None:
                return as_hx(outputs[1])
        if isinstance(input, fx.Proxy):
            return self._leaf(RecurrentCell.forward, input, hx, generator=generator)
        batch, initial = self._check_inputs(input, hx)
        if not batch:
            input, initial = input.unsqueeze(0), [state if state is None else state.unsqueeze(0) for state in initial]
        call = NO_MODIFIERS if generator is None else CallModifiers(generator=generator)
        ((_, last, *_),) = self._run_layer(input.unsqueeze(0), [""], [initial], call, 0)
        return as_hx(last if batch else [state.squeeze(0) for state in last])

    def _check_inputs(self, input: Tensor, hx: Any) -> tuple[tuple[int, ...], Sequence[Tensor | None]]:
        batch = self._batch(input, "BI", "I")
        return batch, self._initial_states(hx, batch, "B" if batch else "", input)

    def _time_major(self, input: Tensor) -> Tensor:
        return input.unsqueeze(0)


class RNNCell(RecurrentCell):
    """One time step of `RNN`, a drop-in replacement for torch.nn.RNNCell:

    h' = f(W x + b_ih + R h + b_hh), f tanh or relu.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Any = None, dtype: Any = None, **keywords: Unpack[Keywords],
    ) -> None:  # fmt: skip
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, **keywords)

    @property
    def cell_name(self) -> str:
        return functional.rnn_cell_name(self.nonlinearity)


class LSTMCell(RecurrentCell):
    """One time step of `LSTM`, a drop-in replacement for torch.nn.LSTMCell; the equations are those of `LSTM`.

    Input: [B, I] or [I], and (h, c) both [B, H] or [H], zeros when None. Returns (h', c') likewise. Raises as `LSTM`.
    """

    cell_name = "lstm"
    keywords = LSTMKeywords


class GRUCell(RecurrentCell):
    """One time step of `GRU`, a drop-in replacement for torch.nn.GRUCell; the equations are those of `GRU`.

    Input: [B, I] or [I], and h [B, H] or [H], zeros when None. Returns h' in the shape of h. Raises as `LSTM`.
    """

    cell_name = "gru"
    keywords = GRUKeywords


# ---- arguments ------------------------------------------------------------------------------------------------------


@unrecorded
def checked_batch_sizes(batch_sizes: Tensor, data: Tensor) -> list[int]:
    """The batch size of every time step, or an error that repeats what doesn't fit."""
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] <= 0 or sum(sizes) != len(data) or sizes != sorted(sizes, reverse=True):
        raise ShapeError(
            f"packed data has shape {functional.shape(data)} and batch_sizes {sizes}; there must be at least one, all "
            f"positive and none larger than the one before, and their sum, {sum(sizes)}, must be the number of rows"
        )
    return sizes


def ragged(lengths: Tensor, full: bool, generator: torch.Generator | None) -> CallModifiers:
    """The call for sequences of these lengths [B]; full: all are as long as the longest."""
    plain = full and not is_capturing()  # a program that is recorded may be run with other lengths
    call = NO_MODIFIERS if plain else CallModifiers(lengths=lengths)
    return call if generator is None else call._replace(generator=generator)


def as_hx(states: Any) -> Any:
    """One state alone, several as a tuple: torch.nn's structure."""
    return tuple(states) if len(states) > 1 else states[0]
