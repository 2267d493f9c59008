"""`stream`: a layer whose input comes one time step at a time, as in live audio or a control loop."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..autograd.custom_ops import refuse_if_observed
from ..autograd.torch_private import is_observed
from ..backends import native, numpy
from ..backends.dispatch import choose
from ..core.problem import Options, Problem, Run, Weights
from ..core.validation import shape, validate
from ..functional import ShapeError, refuse_script
from .base import record
from .conversion import as_gpu_rnn_layer, shallow_copy
from .layers import RecurrentLayer, as_hx


def stream(layer: nn.Module, batch: int = 1) -> "Stream":
    """Make a stream of a layer, which runs one time step per call and keeps its states.

        listen = gpu_rnn.stream(layer)
        for x in microphone:          # [1, I]
            y = listen(x)             # [1, P], the same tensor every time
        listen.reset()

    It computes what the layer does in eval mode, with a copy of the weights made now: whichever way the layer's change
    later, the stream's don't, on any device. For new ones make another stream and hand it `state`. There are no
    gradients. After it was made a call allocates no memory for arrays. On a CPU the weights are arranged once, which is
    most of what a call of the layer for one time step takes. On a GPU a time step is captured as a CUDA graph, which a
    call replays; while a graph is being captured, a call becomes part of that one. So it
    does under torch.compile. torch.jit.trace, make_fx and torch.func can't keep states: take `layer.step` there.

    The numbers are those of the layer over the whole sequence: bit for bit if it has step_exact=True, else to rounding,
    since a matmul for the inputs of many time steps adds in another order than one for one time step. A GRU with
    reset_after=False is to rounding on a CPU.

    Args:
        layer: an RNN, LSTM, GRU or a layer of `gpu_rnn.cell`, or torch.nn's; any number of layers, one direction.
        batch: B, how many streams there are side by side.

    Returns:
        A Stream, which has
            stream(x): x [B, I], of the dtype and device of the parameters -> y [B, P], overwritten by the next call.
            stream.state: hx as the layer has it, (h [L, B, P], c [L, B, H]) or h; a copy. Can be set; None for zeros.
            stream.reset(rows): zero states, of the rows alone if given: indices, perhaps none, or bool [B].
        A copy of it, pickled or not, goes on by itself from the same state, with the same weights. Several Python
        threads need a stream each.

    Raises:
        TypeError: not such a layer, another dtype or device, rows that are neither ints nor bools. ValueError: a
        bidirectional layer, which has to know the future, or a batch below 1. ShapeError: x, a state or rows that don't
        fit.
    """
    layer = as_gpu_rnn_layer(layer)
    if not isinstance(layer, RecurrentLayer):
        raise TypeError(f"stream takes a layer, not a cell: {layer!r}")
    if layer.bidirectional:
        raise ValueError(f"stream is not defined for a bidirectional layer: {layer!r}")
    if isinstance(batch, bool) or not isinstance(batch, Integral) or batch < 1:
        raise ValueError(f"batch must be an int larger than 0, got {batch!r}")
    layer = with_own_weights(layer)
    layer.training = False
    return Stream(layer, int(batch))


class Stream:
    """A layer that runs one time step per call and keeps its states; `stream` makes it."""

    @torch.inference_mode(False)  # tensors made in that mode can't be written outside of it
    def __init__(self, layer: RecurrentLayer, batch: int) -> None:
        like = next(layer.parameters()).detach()
        self._layer = layer
        self._x = like.new_zeros(batch, layer.input_size)
        self._kind = self._x.shape, self._x.dtype, self._x.device
        self._y = like.new_zeros(batch, layer.proj_size or layer.hidden_size)
        self._advance, self._states = make_advance(layer, self._x, self._y)

    def __prepare_scriptable__(self) -> NoReturn:
        """Tell what to do instead of torch.jit.script."""
        refuse_script("stream", "layer's step, which takes the states and returns them,")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of, also one that is pickled: its arrays are its own."""
        return {"layer": self._layer, "batch": len(self._x), "states": [[*map(torch.clone, s)] for s in self._states]}

    def __setstate__(self, copied: dict[str, Any]) -> None:
        self.__init__(copied["layer"], copied["batch"])  # type: ignore[misc]
        for own, states in zip(self._states, copied["states"]):
            for state, value in zip(own, states):
                state.copy_(value)

    def __call__(self, x: Tensor) -> Tensor:
        observed = is_observed()  # by torch.compile, too
        if observed and not torch.compiler.is_compiling():
            refuse_if_observed("a stream", "use layer.step, which takes the states and returns them")
        if (x.shape, x.dtype, x.device) != self._kind:
            self._refuse(x)
        if observed:
            return step_layers(self._layer, x, self._y, self._states)
        self._advance(x.detach() if x.requires_grad else x)
        return self._y

    def _refuse(self, x: Tensor) -> NoReturn:
        if x.shape != self._x.shape:
            raise ShapeError(f"x has shape {shape(x)}; expected [B, I] = {shape(self._x)}")
        raise TypeError(f"x is {x.dtype} on {x.device}; the stream is {self._x.dtype} on {self._x.device}")

    @property
    def state(self) -> Any:
        return as_hx([torch.stack(tuple(layers)).to(self._x.dtype) for layers in self._states])

    @state.setter
    def state(self, hx: Any) -> None:
        sizes = len(self._states[0]), len(self._x)
        for layers, initial in zip(self._states, self._layer._initial_states(hx, sizes, "L B", self._x)):
            for k, state in enumerate(layers):
                if initial is None:
                    state.zero_()
                else:
                    state.copy_(initial[k].detach())

    def reset(self, rows: Any = None) -> None:
        B, device = len(self._x), self._x.device
        which = torch.as_tensor(range(B) if rows is None else rows, device=device)
        if which.ndim != 1 or (which.dtype == torch.bool and len(which) != B):
            raise ShapeError(f"rows has shape {shape(which)}; expected indices [N] or bool [B] = [{B}]")
        if len(which) and (which.is_floating_point() or which.is_complex()):
            raise TypeError(f"rows must be ints, or bools, got {which.dtype}")
        which = which if which.dtype == torch.bool else which.long()
        for state in (state for layers in self._states for state in layers):
            if which.dtype == torch.bool:
                state.masked_fill_(which[:, None], 0)
            else:
                state.index_fill_(0, which, 0)


Advance = Callable[[Tensor], None]
States = Sequence[Sequence[Tensor]]  # for each of the cell's states, of each layer [B, .]; zero at first


def make_advance(layer: RecurrentLayer, x: Tensor, y: Tensor) -> tuple[Advance, States]:
    """Make what reads an input like x and the states, and writes y and the states -> it, and these."""
    calls: list[tuple[Problem, Weights]] = []

    def recorder(name: str, runs: Sequence[Run], options: Options) -> list[tuple[Tensor, tuple]]:
        problem = validate(name, runs, options, training=False)
        calls.append((problem, runs[0].weights))
        y = x.new_zeros(problem.T, problem.B, problem.P or problem.H)
        return [(y, (y[0], *[x.new_zeros(problem.B, problem.H)] * (problem.cell.S - 1)))]

    record(shallow_copy(layer), recorder, x.unsqueeze(1 if layer.batch_first else 0), None)
    names = {choose(problem, layer.backend).NAME for problem, _ in calls}
    simple = all(weights.w_ih is not None for _, weights in calls)
    if names == {"native"} and simple and all(problem.cell.lowered is None for problem, _ in calls):
        return on_native(calls, x, y)
    if names <= {"native", "numpy"} and simple and all(problem.heads == 1 for problem, _ in calls):
        return on_numpy([numpy.make_step(problem, weights) for problem, weights in calls], y)
    sizes = [y.shape[1], *[layer.hidden_size] * (calls[0][0].cell.S - 1)]
    states = [x.new_zeros(layer.num_layers, len(x), size) for size in sizes]

    layers = [state.unbind(0) for state in states]

    def advance() -> None:
        step_layers(layer, x, y, layers)

    run = capture_graph(advance, states) if x.is_cuda else advance

    def copy_and_run(value: Tensor) -> None:
        x.copy_(value)
        run()

    return copy_and_run, layers


@torch.no_grad()
def step_layers(layer: RecurrentLayer, x: Tensor, y: Tensor, states: States) -> Tensor:
    """Write y and the states after one time step, in torch's operations, which torch.compile and CUDA graphs record."""
    output, after = layer.step(x, as_hx([torch.stack(tuple(layers)) for layers in states]))
    for layers, new in zip(states, after if len(states) > 1 else (after,)):
        for k, state in enumerate(layers):
            state.copy_(new[k])
    return y.copy_(output)


def with_own_weights(layer: RecurrentLayer) -> RecurrentLayer:
    """The layer with weights of its own, also where a hook or a parametrization makes them of others."""
    own = shallow_copy(layer)
    made_of_others = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
    own.__dict__ |= {name: value.detach().clone() for name, value in made_of_others.items()}
    own._parameters, own._modules = deepcopy(layer._parameters), deepcopy(layer._modules)
    return own


def on_native(calls: list[tuple[Problem, Weights]], x: Tensor, y: Tensor) -> tuple[Advance, States]:
    """The layers by native code, each on the output of the one below, where it is."""
    outputs = [*(torch.empty_like(y) for _ in calls[1:]), y]
    pairs = zip([x, *outputs], outputs)
    states, steps = zip(*(native.make_step(*call, *pair) for call, pair in zip(calls, pairs)))
    if len(steps) == 1:
        return steps[0], [*zip(*states)]

    def advance(x: Tensor) -> None:
        for step, output in zip(steps, outputs):
            step(x)
            x = output

    return advance, [*zip(*states)]


def on_numpy(layers: list, y: Tensor) -> tuple[Advance, States]:
    """Between the layers everything is of the dtype of x, as it is in a whole sequence."""
    outputs = [*(torch.empty_like(y) for _ in layers[1:]), y]
    views = [(torch.from_numpy(a).t(), run, torch.from_numpy(b).t()) for a, b, _, run in layers]
    parts = list(zip(views, outputs))

    def advance(x: Tensor) -> None:
        for (step_input, run, step_output), output in parts:
            step_input.copy_(x)
            run()
            x = output.copy_(step_output)

    return advance, [[torch.from_numpy(state).t() for state in states] for states in zip(*(part[2] for part in layers))]


def capture_graph(advance: Callable[[], None], states: Sequence[Tensor]) -> Callable[[], None]:
    """The same as a CUDA graph. cuBLAS wants a first run before, which leaves the states changed."""
    with torch.cuda.device(states[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            advance()
    for state in states:
        state.zero_()

    def run() -> None:
        if torch.cuda.is_current_stream_capturing():
            advance()
        else:
            graph.replay()

    return run
