"""Layers for `kernels.kernelize`, which takes their `forward` for that of a torch.nn module and leaves the rest alone.

The hub wants them pure: no constructor, no state, no method but `forward`, whose `self` is the torch.nn module.
"""

from torch import nn
from torch.nn.utils import parametrize

from .nn import layers as modules


class RNN(nn.Module):
    """For torch.nn.RNN."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.RNN, self, input, hx)


class LSTM(nn.Module):
    """For torch.nn.LSTM."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.LSTM, self, input, hx)


class GRU(nn.Module):
    """For torch.nn.GRU."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.GRU, self, input, hx)


class RNNCell(nn.Module):
    """For torch.nn.RNNCell."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.RNNCell, self, input, hx)


class LSTMCell(nn.Module):
    """For torch.nn.LSTMCell."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.LSTMCell, self, input, hx)


class GRUCell(nn.Module):
    """For torch.nn.GRUCell."""

    has_backward: bool = True

    def forward(self, input, hx=None):
        return run(modules.GRUCell, self, input, hx)


def run(ours, module, input, hx):
    """One of our classes on the parameters and attributes of another module, which stay where they are."""
    if parametrize.is_parametrized(module):
        raise NotImplementedError(f"{type(module).__name__} has parametrized weights: use `replace_` on the model")
    lent = ours.__new__(ours)
    lent.__dict__ = module.__dict__
    return ours.forward(lent, input, hx)
