"""Truncated backpropagation through time (Williams & Peng 1990), for any recurrent layer of torch."""

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd import torch_private  # noqa: F401  (check_bound looks into it)
from ..core.validation import ShapeError, describe_value, shape
from ..modifiers.apply import check_bound

BOUNDS = ("lengths", "left_padding")


def tbptt(
    layer: nn.Module, x: Tensor, k1: int, k2: int, hx: Any = None, **modifiers: Tensor | None
) -> Iterator[tuple[Tensor, Any]]:
    """Run a layer over a long sequence, k1 time steps at a time, with gradients through the last k2.

    This is TBPTT(k1, k2), the BPTT(h; h') of Williams & Peng with h = k2 and h' = k1:

        time steps . . . . . . . . . . . . . . . . .
                       |~~~~~~~ k2 ~~~~~~~|
                                   |= k1 =|            yielded; the loss of these ...
                       ^                               ... reaches back to here

        for (y, hx), target in zip(gpu_rnn.tbptt(layer, x, 20, 60), targets.split(20)):
            loss(y, target).backward()
            optimizer.step()
            optimizer.zero_grad()

    The k2 - k1 time steps before the new ones are computed again, with the current weights and from a stored state, so
    that weights may change in between; the new ones are computed when the iterator reaches them. With
    k1 = k2 nothing is computed twice. Every window is two calls of the layer, cut where the next one starts, or one:
    each call draws masks of its own, of dropout and zoneout.

    Args:
        layer: an RNN, LSTM or GRU, of this package or of torch.nn; one direction, any number of layers.
        x: [T, B, I], [B, T, I] with batch_first, or [T, I]. The last window may have fewer time steps than k1.
        k1, k2: ints, 0 < k1 <= k2.
        hx: the states before the first time step, as the layer takes them. Gradients reach them from the windows that
            start there.
        modifiers: reset, reset_state, lengths, left_padding, generator, as the layer takes them, of the whole sequence.

    Yields:
        y: outputs of the k1 new time steps, in the layout of x; hx: the states after them, as the layer gives them.
        Both carry the graph of their window.

    Raises:
        TypeError: layer is not a recurrent layer, or x no tensor. ValueError: not 0 < k1 <= k2, or a bidirectional
        layer. ShapeError: x has no time steps, reset isn't one for each, or lengths or left_padding are outside of [0,
        T]. What the layer raises.
    """
    if not (isinstance(k1, Integral) and isinstance(k2, Integral) and 0 < k1 <= k2):
        raise ValueError(f"k1 and k2 must be ints with 0 < k1 <= k2, got k1={k1!r} and k2={k2!r}")
    if not hasattr(layer, "bidirectional"):
        raise TypeError(f"tbptt takes a layer, not a cell: {layer!r}")
    if layer.bidirectional:
        raise ValueError(f"tbptt is not defined for a bidirectional layer: {layer}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch tensor, got {describe_value(x)}")
    axis = 1 if layer.batch_first and x.ndim == 3 else 0
    T, reset = x.shape[axis] if x.ndim > 1 else 0, modifiers.get("reset")
    if T == 0:
        raise ShapeError(f"x has shape {shape(x)}: the sequence is empty, and T must be larger than 0")
    if reset is not None and reset.shape != x.shape[:-1]:
        raise ShapeError(f"reset has shape {shape(reset)}; expected {list(x.shape[:-1])}, with x {shape(x)}")
    present = {name: value for name, value in modifiers.items() if value is not None}
    for name in BOUNDS:
        if name in present:
            check_bound(name, present[name], tuple(x.shape[1 - axis : x.ndim - 1 - axis]), T, x)
    return windows(layer, x, int(k1), int(k2), hx, present, T, axis)


def windows(
    layer: nn.Module, x: Tensor, k1: int, k2: int, hx: Any, modifiers: dict[str, Any], T: int, axis: int
) -> Iterator[tuple[Tensor, Any]]:
    def run(first: int, end: int, hx: Any) -> tuple[Tensor, Any]:
        bounds = {name: modifiers[name].long().clamp(first, end) - first for name in BOUNDS if name in modifiers}
        part = modifiers | bounds
        if "reset" in part:
            part["reset"] = part["reset"].narrow(axis, first, end - first)
        return layer(x.narrow(axis, first, end - first), hx, **part)

    state, start = hx, 0  # of the window
    for first in range(0, T, k1):
        end = min(first + k1, T)
        following = start if end == T else max(min(end + k1, T) - k2, 0)  # where the next window starts
        outputs, after = [], state
        for a, b in ((start, following), (following, end)):
            if a < b:
                y, after = run(a, b, after)
                outputs.append(y)
            if a < b == following:
                state = detached(after)
        start = following
        yield torch.cat(outputs, axis).narrow(axis, -(end - first), end - first), after


def detached(states: Any) -> Any:
    return tuple(map(detached, states)) if isinstance(states, tuple) else states.detach()
