"""Who takes part, each behind the same two methods, imported only when asked for. Other people's packages: peers.py.

A contender's `prepare` returns a function of k that runs the case on the k-th input and returns (y, last states), in
training also the gradients by name, of x, the weights and the states. Autograd is switched on by whoever times.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

import gpu_rnn
from gpu_rnn import dispatch
from gpu_rnn.compat import missing, no_gpu
from gpu_rnn.problem import Weights

from . import problems
from .data import Data, function
from .problems import Case

Run = Callable[[int], tuple]


class Contender(Protocol):
    def absent(self, case: Case) -> str | None:
        """Why it can't take part, None when it can."""

    def prepare(self, case: Case, data: Data) -> Run: ...


def differentiated(
    case: Case, data: Data, call: Callable[[torch.Tensor], tuple], weights: dict[str, Any], state: dict[str, Any]
) -> Run:
    """`call` on the k-th input and, in training, torch's gradients of everything. The tensors are those `call` uses."""
    xs = data.x
    if not case.training:
        return lambda k: call(xs[k % len(xs)])
    for tensor in (*xs, *weights.values(), *state.values()):
        tensor.requires_grad_()
    leaves, names = (*weights.values(), *state.values()), ("x", *weights, *state)
    arriving = (data.dy, *(d.reshape(s.shape) for d, s in zip(data.dlast, state.values(), strict=True)))

    def run(k: int) -> tuple:
        x = xs[k % len(xs)]
        y, last = call(x)
        last = last if isinstance(last, tuple) else (last,)
        gradients = torch.autograd.grad((y, *last), (x, *leaves), arriving)
        return y, last, dict(zip(names, gradients, strict=True))

    return run


def module_run(library: Any, case: Case, data: Data) -> Run:
    """The layer of torch.nn, or of whoever has the same ones, with the weights of the case."""
    kind, _, nonlinearity = case.cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    module = getattr(library, kind.upper())(case.I, case.H, **options).to(data.dy.device, data.dy.dtype)
    module.train(case.training)
    parameters = dict(zip(data.weights, module.parameters(), strict=True))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(data.weights[name])
    state = {name: value[None].clone() for name, value in data.state.items()}
    h0 = next(iter(state.values())) if len(state) == 1 else tuple(state.values())
    return differentiated(case, data, lambda x: module(x, h0), parameters, state)


class Torch:
    """torch.nn: cuDNN on a GPU, oneDNN or ATen on a CPU."""

    def absent(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, data: Data) -> Run:
        return module_run(torch.nn, case, data)


class Layer:
    """gpu_rnn.LSTM, GRU, RNN: what a drop-in costs beside the function."""

    def absent(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, data: Data) -> Run:
        return module_run(gpu_rnn, case, data)


class TorchKernel:
    """The function that torch.nn's layer calls, with its arguments made beforehand."""

    def absent(self, case: Case) -> str | None:
        return "it is compared going forward" if case.training else None

    def prepare(self, case: Case, data: Data) -> Run:
        kernel = getattr(torch._VF, case.cell)
        weights, state = [*data.weights.values()], [value[None] for value in data.state.values()]
        first = state if len(state) > 1 else state[0]

        def call(k: int) -> tuple:
            y, *last = kernel(data.x[k % len(data.x)], first, weights, True, 1, 0.0, False, False, False)
            return y, tuple(last)

        return call


class Kernel:
    """The backend that our layer calls, with its arguments made beforehand."""

    absent = TorchKernel.absent

    def prepare(self, case: Case, data: Data) -> Run:
        problem, weights, state = case.problem(), Weights(**data.weights), tuple(data.state.values())
        backend = dispatch.choose(problem)

        def call(k: int) -> tuple:
            return dispatch.forward(backend, problem, data.x[k % len(data.x)], weights, state)[:2]

        return call


class Ours:
    """gpu_rnn's functions on torch tensors, with a backend insisted on."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def absent(self, case: Case) -> str | None:
        return missing("cupy" if self.backend == "cuda" else "triton") or no_gpu()

    def prepare(self, case: Case, data: Data) -> Run:
        ours, options = function(case.cell)
        weights = {name: value.clone() for name, value in data.weights.items()}
        state = {name: value.clone() for name, value in data.state.items()}

        def call(x: torch.Tensor) -> tuple:
            return ours(x, **weights, **state, **options, backend=self.backend)

        return differentiated(case, data, call, weights, state)


class OursNumpy:
    """gpu_rnn's functions on NumPy arrays, without torch."""

    def absent(self, case: Case) -> str | None:
        if case.device != "cpu" or case.dtype not in ("float32", "float64"):
            return "NumPy computes float32 and float64 on the CPU"
        return None

    def prepare(self, case: Case, data: Data) -> Run:
        ours, options = function(case.cell)
        xs = [x.detach().numpy() for x in data.x]
        given = {name: value.detach().numpy() for name, value in {**data.weights, **data.state}.items()}
        given |= {**options, "backend": "numpy"}
        if not case.training:
            return lambda k: ours(xs[k % len(xs)], **given)
        dy, dlast = data.dy.numpy(), tuple(d.numpy() for d in data.dlast)

        def run(k: int) -> tuple:
            (y, last), pullback = gpu_rnn.vjp(ours, xs[k % len(xs)], **given)
            return y, last, pullback((dy, dlast))

        return run


def step_lstm(xg: torch.Tensor, state: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
    i, f, g, o = (xg + F.linear(state[0], R, b)).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step_gru(xg: torch.Tensor, state: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
    (xr, xz, xn), (hr, hz, hn) = xg.chunk(3, 1), F.linear(state[0], R, b).chunk(3, 1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (n + z * (state[0] - n),)


def step_rnn_tanh(xg: torch.Tensor, state: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
    return (torch.tanh(xg + F.linear(state[0], R, b)),)


def step_rnn_relu(xg: torch.Tensor, state: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
    return (torch.relu(xg + F.linear(state[0], R, b)),)


STEPS = {"lstm": step_lstm, "gru": step_gru, "rnn_tanh": step_rnn_tanh, "rnn_relu": step_rnn_relu}


class Loop:
    """What people write themselves: one product for all inputs, then a Python loop; its step compiled, if asked."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled

    def absent(self, case: Case) -> str | None:
        return None if case.cell in STEPS else f"nobody wrote a loop for {case.cell}"

    def prepare(self, case: Case, data: Data) -> Run:
        step = torch.compile(STEPS[case.cell]) if self.compiled else STEPS[case.cell]
        weights = {name: value.clone() for name, value in data.weights.items()}
        state = {name: value.clone() for name, value in data.state.items()}

        def call(x: torch.Tensor) -> tuple:
            now, y = tuple(state.values()), []
            for xg in F.linear(x, weights["w_ih"], weights["b_ih"]):
                now = step(xg, now, weights["w_hh"], weights["b_hh"])
                y.append(now[0])
            return torch.stack(y), now

        return differentiated(case, data, call, weights, state)


def contender(name: str) -> Contender:
    from . import peers

    known: dict[str, Callable[[], Contender]] = {
        problems.NN: Torch,
        problems.CUDA: lambda: Ours("cuda"),
        problems.TRITON: lambda: Ours("triton"),
        problems.NUMPY: OursNumpy,
        problems.LAYER: Layer,
        problems.NN_KERNEL: TorchKernel,
        problems.KERNEL: Kernel,
        problems.EAGER: lambda: Loop(compiled=False),
        problems.COMPILED: lambda: Loop(compiled=True),
        problems.ONNX: peers.OnnxRuntime,
        problems.FLASHRNN: peers.FlashRNN,
        problems.HASTE: peers.Haste,
        problems.TORCHRL: peers.TorchRL,
        problems.XLSTM: peers.XLSTM,
    }
    return known[name]()
