"""CUDA graphs, and nothing that waits for the GPU. test_stream has the graph of a time step, test_gpu the backend's."""

import copy

import pytest
import torch

import gpu_rnn

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_nothing_waits_for_the_gpu_and_a_cuda_graph_captures_a_step(kind):
    layer = getattr(gpu_rnn, kind)(8, 16, num_layers=2, device="cuda")
    x = torch.randn(5, 4, 8, device="cuda")

    def step():
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x)[0].square().sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    graph = torch.cuda.CUDAGraph()
    for parameter in layer.parameters():
        parameter.grad = None
    with torch.cuda.graph(graph):
        layer(x)[0].square().sum().backward()
    captured = [parameter.grad for parameter in layer.parameters()]
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [gradient.clone() for gradient in captured]
    step()
    for actual, parameter in zip(replayed, layer.parameters(), strict=True):
        assert torch.equal(actual, parameter.grad)


@pytest.mark.parametrize(("kind", "keywords"), [("LSTM", {}), ("GRU", {"zoneout": 0.1, "recurrent_dropout": 0.1})])
def test_graphed_callables_train(kind, keywords):
    """Forward and backward as CUDA graphs, inside an ordinary loop; with masks, which a graph draws anew, by zoneout
    in eval mode."""
    plain = getattr(gpu_rnn, kind)(8, 16, num_layers=2, device="cuda", **keywords).train(not keywords)
    graphed = copy.deepcopy(plain)
    sample = torch.randn(5, 4, 8, device="cuda", requires_grad=True)
    run = torch.cuda.make_graphed_callables(graphed, (sample,))
    for x in torch.randn(3, 5, 4, 8, device="cuda"):
        gradients = []
        for call, layer in ((run, graphed), (plain, plain)):
            layer.zero_grad()
            call(x)[0].square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
        assert all(map(torch.equal, *gradients))
