"""gpu_rnn: recurrent layers, forward and backward, as fused CUDA and Triton kernels, with NumPy where there is no GPU.

    gpu_rnn.rnn, lstm, gru, vjp          functions on NumPy, torch and CuPy arrays
    gpu_rnn.RNN, LSTM, GRU, *Cell        drop-in replacements for torch.nn's layers (need torch)
    gpu_rnn.replace_(model)              uses them in a model; gpu_rnn.restore_(model) puts torch.nn's back
    gpu_rnn.cell(step)                   your own cell as a layer (docs/new_cell.md)
    gpu_rnn.tbptt(layer, x, k1, k2)      truncated backpropagation through time
    gpu_rnn.stream(layer)                a layer whose input comes one time step at a time
    gpu_rnn.explain, inspect             which backend would run, and the gates inside a cell
    gpu_rnn.warmup                       compile kernels beforehand

Letters, everywhere in code, comments and documentation:

    T time   B batch   I input size   H hidden size   P projected size   G gates   S states   K saved values
    L layers   D directions
    x input   h output   c cell state   y all outputs   W input weights   R recurrent weights   b bias
    h0 hT c0 cT first and last states   dx dW dR db dh0 gradients
"""

from contextlib import suppress as _suppress
from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

if not (_Path(__file__).parent / "kernels").is_dir():  # a bare checkout: the folder kernels/ stands beside this one
    __path__.append(str(_Path(__file__).parents[1]))

from .compat import when_imported as _when_imported
from .dispatch import BackendError
from .functional import ShapeError, gru, lstm, rnn, vjp
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .conversion import replace_, restore_
    from .custom import cell
    from .inspection import explain, inspect, warmup
    from .layers import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from .streaming import stream
    from .truncated import tbptt


__all__ = [
    "GRU", "LSTM", "RNN", "BackendError", "GRUCell", "LSTMCell", "RNNCell", "ShapeError",
    "__version__", "cell", "explain", "gru", "inspect", "lstm", "replace_", "restore_", "rnn", "stream", "tbptt", "vjp",
    "warmup",
]  # fmt: skip

_LAZY = dict.fromkeys(("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"), "layers")
_LAZY |= dict.fromkeys(("replace_", "restore_"), "conversion")
_LAZY |= dict.fromkeys(("explain", "inspect", "warmup"), "inspection") | {"cell": "custom", "stream": "streaming"}
_LAZY |= {"tbptt": "truncated"}


def _operators() -> None:
    """Register the operators that programs saved by torch.export and torch.jit name.

    Errors are kept for the layers, which need that module as well: importing torch must not fail by them.
    """
    with _suppress(Exception):
        _import_module(".operators", __name__)


_when_imported("torch", _operators)


def _translation() -> None:
    """Tell torch.onnx.export how the operators are written in ONNX. Errors are kept, as above."""
    with _suppress(Exception):
        _import_module(".onnx_export", __name__).register()


_when_imported("torch.onnx._internal.exporter._compat", _translation)  # what torch.onnx.export loads last


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] in ("conversion", "custom", "layers", "streaming", "truncated"):
        from .compat import require

        require("torch", f"gpu_rnn.{name}")
    value = getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What is public, loaded or not, and such modules that were imported."""
    modules = {"kernels", "keras", "onnx"} & globals().keys()
    return sorted({*__all__, *modules, *(name for name in globals() if name.startswith("__"))})
