"""recompute=True in Triton: recorded when the gradient is requested, or before, it is the same bit for bit."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import config

from .. import reference_modifiers
from ..test_recompute import again


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("how", ["stepwise", "sequence"])
def test_triton(option, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    again(triton, reference_modifiers.OPTIONS.get(option, {}))
