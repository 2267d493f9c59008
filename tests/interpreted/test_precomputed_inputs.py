"""Calls without w_ih in Triton."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.triton import config

from .. import sequences
from ..test_precomputed_inputs import check


@pytest.mark.parametrize("name", cells.NAMES)
@pytest.mark.parametrize("how", ["stepwise", "sequence"])
def test_triton(name, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    check(sequences.draw(name, "float32", 5, 3, 4, 6, reverse=name == "gru"), triton.forward, triton.backward)
