"""Recurrent layers (RNN, LSTM, GRU), forward and backward, as Triton kernels: gpu_rnn's edition for the kernels hub.

RNN, LSTM, GRU, *Cell    drop-in replacements for torch.nn's, parameters and all; `replace_` puts them into a model, and
                         `restore_` torch.nn's
rnn, lstm, gru           functions of tensors
layers                   what `kernels.kernelize` puts into the torch.nn modules that a model has
"""

from . import layers
from .backends.dispatch import BackendError
from .core.validation import ShapeError
from .functional import gru, lstm, rnn
from .nn.conversion import replace_, restore_
from .nn.layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .version import VERSION as __version__

__all__ = [
    "GRU", "LSTM", "RNN", "BackendError", "GRUCell", "LSTMCell", "RNNCell", "ShapeError",
    "__version__", "gru", "layers", "lstm", "replace_", "restore_", "rnn",
]  # fmt: skip
