"""A stream over a backend that has no steps of its own: the layer's, on buffers that stay."""

import pytest
import torch

import gpu_rnn


@pytest.mark.parametrize(("kind", "options"), [("LSTM", {"num_layers": 2, "proj_size": 4}), ("GRU", {"zoneout": 0.2})])
def test_a_stream_of_triton(kind, options):
    layer = getattr(gpu_rnn, kind)(5, 6, **options, backend="triton").eval()
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(1))
    listen = gpu_rnn.stream(layer, 3)
    y = torch.stack([listen(now).clone() for now in x])
    with torch.no_grad():
        expected, last = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(listen.state, last)
    listen.reset([1])
    again = torch.stack([listen(now).clone() for now in x])
    assert torch.equal(again[:, 1], y[:, 1])
    assert not torch.equal(again[:, 0], y[:, 0])
    assert listen(x[0]) is listen(x[1])
