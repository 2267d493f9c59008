"""Who takes part, each behind the same methods, imported only when asked for. Other people's packages: peers.py; what
is around a cell: around.py; our kernels alone: kernels.py.

A contender's `prepare` returns a function of k that runs the case on the k-th input and returns (y, last states), in
training also the gradients by name, of x, the weights and the states. Autograd is switched on by whoever times.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

import gpu_rnn
from gpu_rnn.backends import cuda, dispatch
from gpu_rnn.core.optional_imports import missing, no_gpu
from gpu_rnn.core.problem import Problem, Weights
from gpu_rnn.core.problem import Run as LayerRun

from . import machine, problems
from .data import Data, function
from .problems import Case

if TYPE_CHECKING:
    from .oracle import Judge

Run = Callable[[int], Any]


class Contender:
    compiles = False  # whether the first call on a CPU does more than the next ones

    def absent(self, case: Case) -> str | None:
        """Why it can't take part, None when it can."""
        return None

    def prepare(self, case: Case, data: Data) -> Run:
        raise NotImplementedError

    def answer(self, case: Case, data: Data, run: Run) -> Any:
        """What is checked."""
        return run(0)

    def judge(self, case: Case, data: Data, usual: "Callable[[], Judge]") -> "Judge":
        """Who checks it."""
        return usual()

    def plan(self, case: Case) -> str:
        """Which of several plans it runs by; empty for who has one only."""
        return ""


def plan_of(backend: Any, problem: Problem) -> str:
    """The kinds of plan that a backend has for a problem: forward, and where that differs the way back."""
    pattern = r"persistent kernel(?: \((\w+) scope\))?(?:: \d+ layers as a (\w+))?|per-step"
    ways = [re.search(pattern, way) for way in backend.plan(problem).splitlines()]
    words = {
        "persistent kernel": "sequence",
        "per-step": "stepwise",
    }  # of Triton's persistent kernel, which has no scope
    kinds = dict.fromkeys(found[2] or found[1] or words[found[0]] for found in ways if found)
    return ", back ".join(kinds)


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


def module_of(library: Any, case: Case, data: Data) -> torch.nn.Module:
    """The layer of torch.nn, or of whoever has the same ones, with the weights of the case."""
    kind, _, nonlinearity = case.cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    module = getattr(library, kind.upper())(case.I, case.H, case.L, **options).to(data.dy.device, data.dy.dtype)
    module.train(case.training)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), data.weights.values(), strict=True):
            parameter.copy_(value)
    return module


def first_states(case: Case, data: Data) -> dict[str, torch.Tensor]:
    """By name, in the shape that layers take."""
    return {name: value.reshape(case.L, case.B, case.H).clone() for name, value in data.state.items()}


def as_hx(state: dict[str, torch.Tensor]) -> Any:
    return next(iter(state.values())) if len(state) == 1 else tuple(state.values())


def module_run(library: Any, case: Case, data: Data, in_turn: bool = False) -> Run:
    module, state = module_of(library, case, data), first_states(case, data)
    if in_turn:
        module._run_wavefront = lambda *args: None
    parameters, h0 = dict(zip(data.weights, module.parameters(), strict=True)), as_hx(state)
    return differentiated(case, data, lambda x: module(x, h0), parameters, state)


class Torch(Contender):
    """torch.nn: cuDNN on a GPU, oneDNN or ATen on a CPU."""

    def prepare(self, case: Case, data: Data) -> Run:
        return module_run(torch.nn, case, data)


class Layer(Contender):
    """gpu_rnn.LSTM, GRU, RNN: what a drop-in costs beside the function."""

    def prepare(self, case: Case, data: Data) -> Run:
        return module_run(gpu_rnn, case, data)

    def plan(self, case: Case) -> str:
        problem = case.problem(machine.tf32(case))
        return plan_of(dispatch.choose(problem), problem)


class Streamed(Contender):
    """gpu_rnn.stream, an instant at a time: the states go on from call to call, and the answer is that of the first."""

    def absent(self, case: Case) -> str | None:
        return None if case.mode == "step" else "it takes one step at a time"

    def prepare(self, case: Case, data: Data) -> Run:
        self.listen = gpu_rnn.stream(module_of(gpu_rnn, case, data), case.B)
        xs = [x[0] for x in data.x]
        return lambda k: self.listen(xs[k % len(xs)])

    def answer(self, case: Case, data: Data, run: Run) -> Any:
        self.listen.state = as_hx(first_states(case, data))
        return run(0)[None], self.listen.state


class InTurn(Layer):
    """That with one layer after the other: what their wavefront is held against."""

    def prepare(self, case: Case, data: Data) -> Run:
        return module_run(gpu_rnn, case, data, in_turn=True)

    def plan(self, case: Case) -> str:
        return super().plan(replace(case, L=1))


class BackInTurn(Layer):
    """That with its wavefront forward alone: what the one back is held against."""

    def absent(self, case: Case) -> str | None:
        return None if case.training else "it differs in training"

    def prepare(self, case: Case, data: Data) -> Run:
        run = module_run(gpu_rnn, case, data)

        def forward_alone(k: int) -> Any:
            fuses = cuda.fuses_layers
            cuda.fuses_layers = lambda problem, backward: not backward and fuses(problem, backward)
            try:
                return run(k)
            finally:
                cuda.fuses_layers = fuses

        return forward_alone

    def plan(self, case: Case) -> str:
        there, back = super().plan(case).partition(", ")[0], super().plan(replace(case, L=1)).rpartition("back ")[2]
        return there if there == back else f"{there}, back {back}"


class TorchKernel(Contender):
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


class Kernel(Contender):
    """The backend that our layer calls, with its arguments made beforehand."""

    absent = TorchKernel.absent

    def prepare(self, case: Case, data: Data) -> Run:
        problem, weights, state = case.problem(), Weights(**data.weights), tuple(data.state.values())
        backend = dispatch.choose(problem)

        def call(k: int) -> tuple:
            (result,) = backend.forward(problem, [LayerRun(data.x[k % len(data.x)], weights, state)])
            return result.y, result.last

        return call


class Ours(Contender):
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

    def plan(self, case: Case) -> str:
        return plan_of(dispatch.backend(self.backend), case.problem(machine.tf32(case)))


class OursNative(Ours):
    """gpu_rnn's functions on torch tensors, by native code for the CPU."""

    def absent(self, case: Case) -> str | None:
        return next(iter(dispatch.backend("native").reasons(case.problem())), None)

    def plan(self, case: Case) -> str:
        return ""


class OursNumpy(Contender):
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


class Products(OursNumpy):
    """The matrix products of a case alone, by NumPy on arrays that stay: as many multiplications as the case has.

    What a fallback of NumPy can't be faster than. It has a time where the fallback's answer is right.
    """

    CHUNK = 2048  # rows of the large products: enough for full speed, few enough to stay in the cache

    def prepare(self, case: Case, data: Data) -> Run:
        self.whole = super().prepare(case, data)
        draw = np.random.default_rng(0).standard_normal
        T, B, I, H, N = case.T, case.B, case.I, case.H, case.gates * case.H
        m = max(1, min(T, self.CHUNK // B))  # instants of a chunk; the last may be shorter
        W, R, Rt = (draw(shape).astype(case.dtype) for shape in ((N, I), (N, H), (H, N)))
        x, h, a, dh = (draw(shape).astype(case.dtype) for shape in ((m * B, I), (H, B), (N, B), (H, B)))
        below, d = draw((m * B, H)).astype(case.dtype), draw((N, m * B)).astype(case.dtype)
        chunks = [slice(0, min(m, T - first) * B) for first in range(0, T, m)]

        def run(k: int) -> None:
            for rows in chunks:
                np.dot(W, x[rows].T)
            for _ in range(T):
                np.dot(R, h, a)
            for _ in range(T if case.training else 0):
                np.dot(Rt, a, dh)
            for rows in chunks if case.training else ():
                np.dot(d[:, rows].T, W)
                np.dot(d[:, rows], x[rows])
                np.dot(d[:, rows], below[rows])

        return run

    def answer(self, case: Case, data: Data, run: Run) -> Any:
        return self.whole(0)


def step_lstm(xg: torch.Tensor, hg: torch.Tensor, state: tuple) -> tuple:
    i, f, g, o = (xg + hg).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step_gru(xg: torch.Tensor, hg: torch.Tensor, state: tuple) -> tuple:
    (xr, xz, xn), (hr, hz, hn) = xg.chunk(3, 1), hg.chunk(3, 1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (n + z * (state[0] - n),)


def step_rnn_tanh(xg: torch.Tensor, hg: torch.Tensor, state: tuple) -> tuple:
    return (torch.tanh(xg + hg),)


def step_rnn_relu(xg: torch.Tensor, hg: torch.Tensor, state: tuple) -> tuple:
    return (torch.relu(xg + hg),)


STEPS = {"lstm": step_lstm, "gru": step_gru, "rnn_tanh": step_rnn_tanh, "rnn_relu": step_rnn_relu}


class Loop(Contender):
    """What people write themselves: one product for all inputs, then a Python loop; its step compiled, if asked."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = self.compiles = compiled

    def absent(self, case: Case) -> str | None:
        return None if case.cell in STEPS else f"nobody wrote a loop for {case.cell}"

    def prepare(self, case: Case, data: Data) -> Run:
        cell = STEPS[case.cell]

        def step(xg: torch.Tensor, now: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
            return cell(xg, F.linear(now[0], R, b), now)

        if self.compiled:
            step = torch.compile(step)
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
    from . import around, kernels, peers

    if name in problems.FEATURES:
        return around.Around(name)
    if name in problems.KERNELS:
        return kernels.Alone(*problems.KERNELS[name])
    known: dict[str, Callable[[], Contender]] = {
        problems.NN: Torch,
        problems.CUDA: lambda: Ours("cuda"),
        problems.TRITON: lambda: Ours("triton"),
        problems.NATIVE: lambda: OursNative("native"),
        problems.NUMPY: OursNumpy,
        problems.PRODUCTS: Products,
        problems.LAYER: Layer,
        problems.IN_TURN: InTurn,
        problems.BACK_IN_TURN: BackInTurn,
        problems.STREAM: Streamed,
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
