"""A batch without rows on Triton's kernels."""

import pytest
import torch

from ..reference_layers import FEATURES, layer
from ..test_empty_batch import check


@pytest.mark.parametrize("keywords", [{"recurrent_dropout": 0.3}, {"layer_norm": True}, {"zoneout": 0.2}], ids=str)
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_every_keyword(name, keywords):
    check(layer(name, bidirectional=True, dtype=torch.float32, backend="triton", **keywords), FEATURES["everything"][1])
