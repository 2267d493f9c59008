"""gpu_rnn: recurrent layers, forward and backward, as fused CUDA and Triton kernels, and C++ for the CPU.

    gpu_rnn.rnn, lstm, gru, vjp          functions on NumPy, torch and CuPy arrays
    gpu_rnn.RNN, LSTM, GRU, *Cell        drop-in replacements for torch.nn's layers (need torch)
    gpu_rnn.replace_(model)              uses them in a model; gpu_rnn.restore_(model) puts torch.nn's back
    gpu_rnn.cell(step)                   your own cell as a layer (docs/new_cell.md)
    gpu_rnn.cells                        published cells: MGU, JANET, coRNN and so on (docs/cells.md)
    gpu_rnn.flashrnn.flashrnn            the package flashrnn's function, on our backends
    gpu_rnn.tbptt(layer, x, k1, k2)      truncated backpropagation through time
    gpu_rnn.stream(layer)                a layer whose input comes one time step at a time
    gpu_rnn.explain, inspect             which backend would run, and the gates inside a cell
    gpu_rnn.warmup                       compile kernels beforehand

Letters, everywhere in code, comments and documentation:

    T time   B batch   I input size   H hidden size   P projected size   G gates   S states   K saved values
    L layers   D directions   N heads
    x input   h output   c cell state   y all outputs   W input weights   R recurrent weights   b bias
    h0 hT c0 cT first and last states   dx dW dR db dh0 gradients
"""

import sys as _sys
from contextlib import suppress as _suppress
from importlib import import_module as _import_module
from importlib import util as _util
from pathlib import Path as _Path
from typing import TYPE_CHECKING

if not (_Path(__file__).parent / "kernels").is_dir():  # a bare checkout: the folder kernels/ stands next to this one
    _folder = _Path(__file__).parents[1] / "kernels"
    _spec = _util.spec_from_file_location(
        "gpu_rnn.kernels", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    kernels = _sys.modules["gpu_rnn.kernels"] = _util.module_from_spec(_spec)  # type: ignore[arg-type]
    _spec.loader.exec_module(kernels)  # type: ignore[union-attr]

from .backends.dispatch import BackendError
from .core.optional_imports import require as _require
from .core.optional_imports import when_imported as _when_imported
from .core.validation import ShapeError
from .functional import gru, lstm, rnn, vjp
from .kernels.cells import LIBRARIES as _LIBRARIES
from .version import VERSION as __version__

if TYPE_CHECKING:
    from . import cells as cells
    from . import flashrnn as flashrnn
    from . import keras as keras
    from . import onnx as onnx
    from .nn.conversion import replace_, restore_
    from .nn.custom_cell import cell
    from .nn.layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from .nn.streaming import stream
    from .nn.tbptt import tbptt
    from .tools.explain import explain, warmup
    from .tools.inspect import inspect


__all__ = [
    "GRU", "LSTM", "RNN", "BackendError", "GRUCell", "LSTMCell", "RNNCell", "ShapeError",
    "__version__", "cell", "cells", "explain", "gru", "inspect", "lstm", "replace_", "restore_", "rnn", "stream",
    "tbptt", "vjp", "warmup",
]  # fmt: skip

_LAZY = dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), "nn.layers")
_LAZY |= dict.fromkeys(("replace_", "restore_"), "nn.conversion")
_LAZY |= {"cell": "nn.custom_cell", "stream": "nn.streaming", "tbptt": "nn.tbptt"}
_LAZY |= {"explain": "tools.explain", "warmup": "tools.explain", "inspect": "tools.inspect"}
_MODULES = ("cells", "flashrnn", "keras", "onnx")


def _custom_ops() -> None:
    """Register the operators that programs saved by torch.export and torch.jit name.

    Errors are kept for the layers, which need that module as well: importing torch must not fail by them.
    """
    with _suppress(Exception):
        _import_module(".autograd.custom_ops", __name__)


_when_imported("torch", _custom_ops)


def _published_cell(name: str) -> None:
    """Load the definition of a cell of gpu_rnn.cells, which a saved program knows by its name."""
    getattr(_import_module(".cells", __name__), name, None)


_LIBRARIES["cells"] = _published_cell


def _onnx_translation() -> None:
    """Tell torch.onnx.export how the operators are written in ONNX. Errors are kept, as above."""
    with _suppress(Exception):
        _import_module(".weights.onnx_export", __name__).register()


_when_imported("torch.onnx._internal.exporter._compat", _onnx_translation)  # what torch.onnx.export loads last


def __getattr__(name: str):
    if name in _MODULES:
        value = _import_module(f".{name}", __name__)
    elif name in _LAZY:
        if _LAZY[name].startswith("nn."):
            _require("torch", f"gpu_rnn.{name}")
        value = getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is public, loaded or not."""
    return sorted({*__all__, "kernels", *_MODULES, *(name for name in globals() if name.startswith("__"))})
