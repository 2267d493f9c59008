"""`reset` on Triton's kernels, in both directions, by torch.nn on every episode alone."""

import pytest
import torch

from gpu_rnn.kernels.triton import config

from .. import episodes
from ..reference_layers import inputs, layer


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize(("name", "call"), [("lstm", "padded"), ("gru", "plain"), ("relu", "reset_state")])
def test_every_episode_is_as_if_it_were_alone(name, call, how, monkeypatch):
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    made = layer(name, bidirectional=True, dtype=torch.float32, backend="triton")
    episodes.check(made, *inputs(made, episodes.CALLS[call]))
