"""Heads in Triton."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import config

from .. import heads
from ..reference_modifiers import OPTIONS


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize(
    ("name", "options"), [("lstm", {}), ("SLSTM", {}), ("gru", OPTIONS["all"]), ("gru+before", {})]
)
def test_heads(name, options, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    heads.check(monkeypatch, triton, name, 2, "float32", 5, 3, 4, 12, options=options, reverse=how == "stepwise")
