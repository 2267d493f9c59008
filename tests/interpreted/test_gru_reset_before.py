"""The GRU with its reset before the matmul in Triton, in two passes."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import config

from .. import reference_modifiers
from ..test_gru_reset_before import NAME, check


@pytest.mark.parametrize("option", ["plain", "reset_state", "all"])
@pytest.mark.parametrize(("how", "dtype"), [("stepwise", "float64"), ("stepwise", "bfloat16"), ("sequence", "float32")])
def test_triton(option, how, dtype, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    made = reference_modifiers.drawn(
        NAME, reference_modifiers.OPTIONS.get(option, {}), dtype, 4, 3, 4, 6, reverse=option == "reset_state"
    )
    check(made, triton.forward, triton.backward)
