"""Dropout of the candidate in Triton."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import config

from .. import reference_modifiers
from ..test_candidate_dropout import EVERY, OPTIONS, check


@EVERY
@pytest.mark.parametrize("how", ["stepwise", "sequence"])
def test_triton(name, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    check(reference_modifiers.drawn(name, OPTIONS, "float32", 4, 3, 4, 6), triton.forward, triton.backward)
