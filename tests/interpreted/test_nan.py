"""NaN on its way forward and back, in Triton."""

import pytest

from gpu_rnn.kernels.triton import config

from .. import nan


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize("place", nan.PLACES)
def test_bounds(place, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    nan.relu(place, backend="triton").compare(place, "float32")
    nan.bounds(place, "triton").compare(place, "float32")
    nan.pairs(place, "triton").compare(place, "float32")
