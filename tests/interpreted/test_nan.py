"""NaN on its way forward and back, in Triton."""

import pytest
import torch

from gpu_rnn.kernels.triton import config

from .. import nan


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize("place", nan.PLACES)
def test_bounds(place, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    nan.compare(*nan.relu(place, "stacked", torch.float32, backend="triton"))
    nan.compare(*nan.bounds(place, torch.float32, "triton"))
