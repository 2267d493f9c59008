"""What is compared. Other packages: third_party.py; modifiers: modifiers.py; our kernels alone: kernels.py."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import gpu_rnn
from gpu_rnn.backends import cuda, dispatch
from gpu_rnn.core.arrays import torch_precision
from gpu_rnn.core.optional_imports import missing, no_gpu
from gpu_rnn.core.problem import Problem, Weights
from gpu_rnn.core.problem import Run as LayerRun

from . import problems
from .correctness import AccuracyCheck
from .data import Data, Tensors, function
from .problems import Case

Run = Callable[[int], Any]


@dataclass(frozen=True)
class Implementation:
    """`prepare` returns a function of k that runs a case on the k-th input and returns (y, last states), in training
    also the gradients by name, of x, the weights and the states; or a pair: that, and a function that returns what is
    to be checked. The caller switches autograd on."""

    prepare: Callable[[Case, Data], Run | tuple[Run, Callable[[], Any]]]
    skip_reason: Callable[[Case], str | None] = lambda case: None  # None where it can run a case
    plan: Callable[[Case], str] = lambda case: ""  # the kind of its kernels; empty where there is one kind only
    check: Callable[[Case, Data, AccuracyCheck], AccuracyCheck] = lambda case, data, default: default
    compiles: bool = False  # whether the first call on a CPU does more than the next ones


IMPLEMENTATIONS: dict[str, Implementation] = {}


def implementation(name: str, **more: Any) -> Callable[[Any], Any]:
    """Decorate its `prepare`."""

    def add(prepare: Any) -> Any:
        IMPLEMENTATIONS[name] = Implementation(prepare, **more)
        return prepare

    return add


def plan_of(backend: Any, problem: Problem) -> str:
    """The kinds of kernels that a backend has for a problem: forward, and where that differs backward."""
    pattern = r"persistent kernel(?: \((\w+) scope\))?(?:: \d+ layers as a (\w+))?|per-step"
    matches = filter(None, (re.search(pattern, line) for line in backend.plan(problem).splitlines()))
    words = {"persistent kernel": "sequence", "per-step": "stepwise"}  # Triton's persistent kernel has no scope
    return ", back ".join(dict.fromkeys(match[2] or match[1] or words[match[0]] for match in matches))


def chosen_plan(case: Case) -> str:
    problem = case.problem(tf32(case))
    return plan_of(dispatch.choose(problem), problem)


def tf32(case: Case) -> bool:
    """Whether torch.nn's recurrent layers, and so ours, round the matmuls of a case."""
    return (case.device, case.dtype) == ("cuda", "float32") and torch_precision() == "tf32"


def differentiated(case: Case, data: Data, call: Callable, weights: Tensors, state: Tensors) -> Run:
    """`call` on the k-th input and, in training, torch's gradients of everything. The tensors are those `call` uses."""
    xs = data.x
    if not case.training:
        return lambda k: call(xs[k % len(xs)])
    for tensor in (*xs, *weights.values(), *state.values()):
        tensor.requires_grad_()
    leaves, names = (*weights.values(), *state.values()), ("x", *weights, *state)
    grad_outputs = (data.dy, *(d.reshape(s.shape) for d, s in zip(data.dlast, state.values(), strict=True)))

    def run(k: int) -> tuple:
        x = xs[k % len(xs)]
        y, last = call(x)
        last = last if isinstance(last, tuple) else (last,)
        grads = torch.autograd.grad((y, *last), (x, *leaves), grad_outputs)
        return y, last, dict(zip(names, grads, strict=True))

    return run


# ---- layers ---------------------------------------------------------------------------------------------------------


def module_of(library: Any, case: Case, data: Data) -> torch.nn.Module:
    """The layer of torch.nn, or of a library with the same layers, with the weights of the case."""
    kind, options = case.cell.partition("_")[0].upper(), function(case.cell)[1]
    module = getattr(library, kind)(case.I, case.H, case.L, **options).to(data.dy.device, data.dy.dtype)
    module.train(case.training)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), data.weights.values(), strict=True):
            parameter.copy_(value)
    return module


def layer_states(case: Case, data: Data) -> Tensors:
    """By name, in the shape that layers take."""
    return {name: value.reshape(case.L, case.B, case.H).clone() for name, value in data.state.items()}


def as_hx(state: Tensors) -> Any:
    return next(iter(state.values())) if len(state) == 1 else tuple(state.values())


def module_run(library: Any, case: Case, data: Data) -> Run:
    module, state = module_of(library, case, data), layer_states(case, data)
    parameters, hx = dict(zip(data.weights, module.parameters(), strict=True)), as_hx(state)

    def in_a_model(x: torch.Tensor) -> tuple:
        y, last = module(F.linear(x, data.embedding), hx)
        return F.linear(y, data.head), last

    call = in_a_model if case.mode == "model" else lambda x: module(x, hx)
    return differentiated(case, data, call, parameters, state)


implementation(problems.NN)(partial(module_run, torch.nn))  # cuDNN on a GPU, oneDNN or ATen on a CPU
implementation(problems.LAYER, plan=chosen_plan)(partial(module_run, gpu_rnn))


@implementation(problems.PER_LAYER, plan=lambda case: chosen_plan(replace(case, L=1)))
def per_layer(case: Case, data: Data, forward: bool = False) -> Run:
    """The layer without its wavefront, or with that forward alone."""
    run, fuses = module_run(gpu_rnn, case, data), cuda.fuses_layers

    def without(problem: Problem, backward: bool) -> bool:
        return forward and not backward and fuses(problem, backward)

    def patched(k: int) -> Any:
        with mock.patch.object(cuda, "fuses_layers", without):
            return run(k)

    return patched


def per_layer_backward_plan(case: Case) -> str:
    forward, backward = chosen_plan(case).partition(", ")[0], chosen_plan(replace(case, L=1)).rpartition("back ")[2]
    return forward if forward == backward else f"{forward}, back {backward}"


implementation(
    problems.PER_LAYER_BACKWARD, plan=per_layer_backward_plan,
    skip_reason=lambda case: None if case.training else "it differs in training",
)(partial(per_layer, forward=True))  # fmt: skip


@implementation(
    problems.STREAM, skip_reason=lambda case: None if case.mode == "step" else "it takes one step at a time"
)
def stream(case: Case, data: Data) -> tuple[Run, Callable]:
    """gpu_rnn.stream, a time step at a time: states go on from call to call; the outputs of the first are checked."""
    layer = gpu_rnn.stream(module_of(gpu_rnn, case, data), case.B)
    xs = [x[0] for x in data.x]

    def first() -> tuple:
        layer.state = as_hx(layer_states(case, data))
        return layer(xs[0])[None], layer.state

    return lambda k: layer(xs[k % len(xs)]), first


def forward_alone(case: Case) -> str | None:
    return "it is compared going forward" if case.training else None


@implementation(problems.NN_KERNEL, skip_reason=forward_alone)
def torch_kernel(case: Case, data: Data) -> Run:
    """The function that torch.nn's layer calls, with its arguments made beforehand."""
    kernel, weights = getattr(torch._VF, case.cell), [*data.weights.values()]
    hx = as_hx({name: value[None] for name, value in data.state.items()})

    def call(k: int) -> tuple:
        y, *last = kernel(data.x[k % len(data.x)], hx, weights, True, 1, 0.0, False, False, False)
        return y, tuple(last)

    return call


@implementation(problems.KERNEL, skip_reason=forward_alone)
def kernel(case: Case, data: Data) -> Run:
    """The backend that our layer calls, with its arguments made beforehand."""
    problem, weights, state = case.problem(), Weights(**data.weights), tuple(data.state.values())
    backend = dispatch.choose(problem)

    def call(k: int) -> tuple:
        (result,) = backend.forward(problem, [LayerRun(data.x[k % len(data.x)], weights, state)])
        return result.y, result.last

    return call


# ---- functions ------------------------------------------------------------------------------------------------------


def by_backend(backend: str, case: Case, data: Data) -> Run:
    """Our function on torch tensors."""
    (ours, options), (weights, state) = function(case.cell), data.copies()

    def call(x: torch.Tensor) -> tuple:
        return ours(x, **weights, **state, **options, backend=backend)

    return differentiated(case, data, call, weights, state)


def absent_backend(backend: str, case: Case) -> str | None:
    if backend == "native":
        return next(iter(dispatch.backend(backend).reasons(case.problem())), None)
    return missing("cupy" if backend == "cuda" else "triton") or no_gpu()


def plan_by_backend(backend: str, case: Case) -> str:
    return plan_of(dispatch.backend(backend), case.problem(tf32(case)))


for name, backend in {problems.CUDA: "cuda", problems.TRITON: "triton", problems.NATIVE: "native"}.items():
    implementation(name, skip_reason=partial(absent_backend, backend), plan=partial(plan_by_backend, backend))(
        partial(by_backend, backend)
    )


def beyond_numpy(case: Case) -> str | None:
    supported = case.device == "cpu" and case.dtype in ("float32", "float64")
    return None if supported else "NumPy computes float32 and float64 on the CPU"


@implementation(problems.NUMPY, skip_reason=beyond_numpy)
def ours_numpy(case: Case, data: Data) -> Run:
    """Our function on NumPy arrays, without torch."""
    ours, options = function(case.cell)
    xs = [x.detach().numpy() for x in data.x]
    args = {name: value.detach().numpy() for name, value in {**data.weights, **data.state}.items()}
    args |= {**options, "backend": "numpy"}
    if not case.training:
        return lambda k: ours(xs[k % len(xs)], **args)
    dy, dlast = data.dy.numpy(), tuple(d.numpy() for d in data.dlast)

    def run(k: int) -> tuple:
        (y, last), pullback = gpu_rnn.vjp(ours, xs[k % len(xs)], **args)
        return y, last, pullback((dy, dlast))

    return run


@implementation(problems.MATMULS, skip_reason=beyond_numpy)
def matmuls(case: Case, data: Data) -> tuple[Run, Callable]:
    """The matmuls of a case alone, by NumPy: no NumPy backend can be faster. Ours is checked in their place."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(case.dtype)

    T, B, I, H, N = case.T, case.B, case.I, case.H, case.gates * case.H
    m = max(1, min(T, 2048 // B))  # time steps of a chunk: enough rows for full speed, few enough for the cache
    W, R, Rt, x, h = draw(N, I), draw(N, H), draw(H, N), draw(m * B, I), draw(H, B)
    a, dh, h_prev, d = draw(N, B), draw(H, B), draw(m * B, H), draw(N, m * B)
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
            np.dot(d[:, rows], h_prev[rows])

    return run, partial(ours_numpy(case, data), 0)


# ---- loops that people write themselves -----------------------------------------------------------------------------


def step_lstm(Wx: torch.Tensor, Rh: torch.Tensor, state: tuple) -> tuple:
    i, f, g, o = (Wx + Rh).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step_gru(Wx: torch.Tensor, Rh: torch.Tensor, state: tuple) -> tuple:
    (xr, xz, xn), (hr, hz, hn) = Wx.chunk(3, 1), Rh.chunk(3, 1)
    z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return (n + z * (state[0] - n),)


STEPS: dict[str, Callable[..., tuple]] = {
    "lstm": step_lstm, "gru": step_gru, "rnn_tanh": lambda Wx, Rh, state: (torch.tanh(Wx + Rh),),
    "rnn_relu": lambda Wx, Rh, state: (torch.relu(Wx + Rh),),
}  # fmt: skip


@implementation(problems.EAGER)
def loop(case: Case, data: Data, compile: Callable = lambda step: step) -> Run:
    """One matmul for all inputs, then a Python loop."""
    cell, (weights, state) = STEPS[case.cell], data.copies()

    @compile
    def step(Wx: torch.Tensor, now: tuple, R: torch.Tensor, b: torch.Tensor) -> tuple:
        return cell(Wx, F.linear(now[0], R, b), now)

    def call(x: torch.Tensor) -> tuple:
        now, y = tuple(state.values()), []
        for Wx in F.linear(x, weights["w_ih"], weights["b_ih"]):
            now = step(Wx, now, weights["w_hh"], weights["b_hh"])
            y.append(now[0])
        return torch.stack(y), now

    return differentiated(case, data, call, weights, state)


implementation(problems.COMPILED, compiles=True)(partial(loop, compile=torch.compile))
