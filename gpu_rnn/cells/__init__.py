"""Published recurrent cells, as layers and as functions that every backend runs.

    layer = gpu_rnn.cells.JANET(64, 128, num_layers=2)
    y, hT = layer(x)                                                        # torch
    y, hT = gpu_rnn.cells.JANET.function(x, w_ih, w_hh, b_ih, b_hh)         # NumPy, CuPy and torch arrays

Arguments, keywords, layouts and parameters are those of the layers that `gpu_rnn.cell` makes (docs/new_cell.md); all
cells, with their papers and speeds: docs/cells.md. In the equations x_f stands for W_f x_t + b, h_f for R_f h + b with
the output h of the time step before, and R_f(v) for the recurrent weights of gate f applied to another value; all else
is elementwise. Parameters are drawn from U(-1/sqrt(H), 1/sqrt(H)) where a cell says nothing else.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

_MODULES = {
    "minimal": "MGU MGU1 MGU2 MGU3 JANET LiGRU LightRU MinimalRNN UGRNN STAR SGRN ATR CIFG",
    "gated": "CFN RAN MUT1 MUT2 BRC NBRC FastRNN FastGRNN SCRN IntersectionRNN",
    "physical": "AntisymmetricRNN GatedAntisymmetricRNN CoRNN LEM UnICORNN IndRNN TRNN TGRU TLSTM",
    "lstm_variants": "PeepholeLSTM WMCLSTM MultiplicativeLSTM ResidualLSTM NAS SLSTM",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its cells are {', '.join(__all__)}")
    from ..core.optional_imports import require

    require("torch", f"gpu_rnn.cells.{name}")
    value = getattr(_import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
