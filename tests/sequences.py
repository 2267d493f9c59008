"""One recurrent layer over one sequence: its arrays in a dtype, what is exact, and what torch makes of it."""

from typing import NamedTuple

import numpy as np
import torch

from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells

from . import calls, judge
from .conftest import sequence_arrays
from .tolerance import assert_close

LAYERS = {"rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


class Case(NamedTuple):
    """CPU tensors in `dtype`. All states and gradients are random, distinct and far from zero."""

    cell: cells.Cell
    dtype: str
    reverse: bool
    x: torch.Tensor
    weights: Weights
    state: tuple
    dy: torch.Tensor
    dlast: tuple

    @property
    def needs(self):
        never = {"flags", "seed"}
        return {"x", *(name for name, w in self.weights._asdict().items() if w is not None and name not in never)}

    def mapped(self, function):
        """The same case with other arrays."""
        weights = Weights(*(None if w is None else function(w) for w in self.weights))
        state, dlast = tuple(map(function, self.state)), tuple(map(function, self.dlast))
        return self._replace(x=function(self.x), weights=weights, state=state, dy=function(self.dy), dlast=dlast)

    def run(self, forward, backward, tf32=False):
        """-> every result by name, from one forward and two backward runs on the same saved arrays, which must agree.

        forward, backward: a backend's operations.
        """
        inputs = (self.cell, self.x, self.weights, self.state)
        y, last, saved = calls.forward(forward, *inputs, reverse=self.reverse, save=True, tf32=tf32)
        results = {"y": y} | {f"{letter}T": array for letter, array in zip(self.cell.states, last, strict=True)}
        how = {"reverse": self.reverse, "needs": self.needs, "tf32": tf32}
        gradients, again = (
            named(self, calls.backward(backward, *inputs, y, saved, self.dy, self.dlast, **how)) for _ in range(2)
        )
        for name, gradient in gradients.items():
            assert np.array_equal(wide(gradient), wide(again[name])), f"{name}: backward is repeatable"
        unsaved, unsaved_last, nothing = calls.forward(forward, *inputs, reverse=self.reverse, save=False, tf32=tf32)
        assert nothing == ()
        for ours, theirs in zip((y, *last), (unsaved, *unsaved_last), strict=True):
            assert np.array_equal(wide(ours), wide(theirs)), "inference and training agree bit for bit"
        return results | gradients


def draw(name, dtype, T, B, I, H, P=None, *, reverse=False, bias=True, seed=0):
    rng = np.random.default_rng([seed, T, B, I, H])
    x, weights, state = sequence_arrays(rng, name, T, B, I, H, P)
    if name == "rnn_relu":  # half precision can't tell on which side of its kink a small sum lies: keep away from there
        weights = Weights(*(None if w is None else 0.2 * w for w in weights))
        weights = weights._replace(b_ih=2 * np.sign(weights.b_ih))
    if not bias:
        weights = weights._replace(b_ih=None, b_hh=None)
    dy = rng.standard_normal((T, B, P or H))
    dlast = tuple(rng.standard_normal(array.shape) for array in state)
    case = Case(cells.get(name), dtype, reverse, x, weights, state, dy, dlast)
    return case.mapped(lambda array: torch.from_numpy(array).to(getattr(torch, dtype)))


def wide(array):
    """Any array as float64 on the CPU, in NumPy."""
    if hasattr(array, "detach"):
        return array.detach().cpu().double().numpy()
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)


def named(case, gradients):
    state = zip(case.cell.states, gradients["state"], strict=True)
    assert gradients.keys() == case.needs | {"state"}
    return {f"d{name}": gradients[name] for name in case.needs} | {f"d{letter}0": array for letter, array in state}


def exact(case):
    """By the judge, from the same rounded arrays, in long double."""
    cell, _, reverse, x, weights, state, dy, dlast = case.mapped(wide)
    y, last, dx, dweights, first = judge.run(cell.name, x, weights[:5], state, dy, dlast, reverse)
    results = {"y": y, "dx": dx} | {f"{letter}T": array for letter, array in zip(cell.states, last, strict=True)}
    results |= {f"d{name}": dw for name, dw in zip(Weights._fields, dweights, strict=False) if dw is not None}
    return results | {f"d{letter}0": array for letter, array in zip(cell.states, first, strict=True)}


def by_torch(case):
    """By torch.nn and its autograd, without cuDNN, in the dtype and on the device of the case."""
    weights = [w for w in case.weights if w is not None]
    H, I = case.weights.w_ih.shape[0] // case.cell.G, case.weights.w_ih.shape[1]
    options = {"bias": case.weights.b_ih is not None, "dtype": case.x.dtype, "device": case.x.device}
    if case.cell.name == "rnn_relu":
        options["nonlinearity"] = "relu"
    if case.weights.w_hr is not None:
        options["proj_size"] = case.weights.w_hr.shape[0]
    layer = LAYERS[case.cell.name](I, H, **options)
    with torch.no_grad():
        for parameter, w in zip(layer.parameters(), weights, strict=True):
            parameter.copy_(w)
    x, *state = (array.clone().requires_grad_() for array in (case.x, *case.state))
    first = tuple(array[None] for array in state)
    with torch.backends.cudnn.flags(enabled=False):
        y, last = layer(x.flip(0) if case.reverse else x, first if len(first) > 1 else first[0])
        y, last = y.flip(0) if case.reverse else y, last if len(first) > 1 else (last,)
        torch.autograd.backward((y, *last), (case.dy, *(gradient[None] for gradient in case.dlast)))
    names = [name for name, w in case.weights._asdict().items() if w is not None]
    results = {"y": y} | {f"{letter}T": array[0] for letter, array in zip(case.cell.states, last, strict=True)}
    results |= {"dx": x.grad} | {
        f"d{letter}0": array.grad for letter, array in zip(case.cell.states, state, strict=True)
    }
    return results | {f"d{name}": p.grad for name, p in zip(names, layer.parameters(), strict=True)}


def check(case, results, *, tf32=False):
    """Every result against the exact one, by the one rule. TF32 has float16's mantissa, so that is its peer.

    What is exact is told by the judge, or where the case is on a GPU, since that is faster there, by torch.nn.
    """
    dtype = "float16" if tf32 else case.dtype
    if case.x.is_cuda:
        truth = {name: wide(array) for name, array in by_torch(case.mapped(torch.Tensor.double)).items()}
    else:
        truth = exact(case)
    peer = by_torch(case.mapped(torch.Tensor.half) if tf32 else case)
    assert results.keys() == truth.keys() == peer.keys()
    for name in truth:
        assert_close(wide(results[name]), truth[name], wide(peer[name]), dtype, f"{case.cell.name} {name}")
