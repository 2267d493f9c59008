"""gpu_rnn.flashrnn against the package's own backend in torch, and the sLSTM with heads against xlstm's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_rnn
from gpu_rnn.flashrnn import FUNCTIONS, flashrnn

EQUAL = {"rtol": 1e-10, "atol": 1e-12}
EXAMPLES = Path(__file__).parents[1] / "examples"


def arguments(function, N, B=3, T=5, D=4):
    torch.manual_seed(N)
    kind = FUNCTIONS[function]

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = [draw(B, T, kind.input, N, D), draw(kind.recurrent, N, D, D), draw(kind.bias, N, D)]
    return [*inputs, draw(kind.states, B, 1, N, D)]


def checked(ours, theirs, inputs):
    """The results of both, and the gradients of a random weighting of them all."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EQUAL)
    weights = [torch.randn_like(a) for a in ours]
    for a, b in zip(*(torch.autograd.grad(results, inputs, weights) for results in (ours, theirs))):
        torch.testing.assert_close(a, b, **EQUAL)


@pytest.mark.parametrize("N", [1, 2, 3])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_the_package(function, N):
    peer = pytest.importorskip("flashrnn").flashrnn
    *inputs, states = arguments(function, N)
    how = {"function": function, "backend": "vanilla"}
    checked(flashrnn(*inputs, states, **how), peer(*inputs, states, **how), [*inputs, states])
    checked(flashrnn(*inputs, **how), peer(*inputs, **how), inputs)
    zeros = torch.zeros_like(states).requires_grad_()
    checked(flashrnn(*inputs, zeros, **how), peer(*inputs, zeros, **how), [*inputs, zeros])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_in_the_layouts_of_a_config(function):
    package = pytest.importorskip("flashrnn")
    layouts = {"input_shape": "TBGHD", "output_shape": "STBHD", "recurrent_shape": "HPGD", "bias_shape": "HGD"}
    config = package.FlashRNNConfig(
        "vanilla", function, hidden_dim=12, num_heads=3, dtype="float32", **layouts, initial_val=0.5
    )
    Wx, R, b, states = arguments(function, 3)
    inputs = [Wx.transpose(0, 1), R.permute(1, 3, 0, 2), b.transpose(0, 1)]
    for more in ((), (states.transpose(1, 2),)):
        checked(flashrnn(*inputs, *more, config=config), package.flashrnn(*inputs, *more, config=config), [Wx, R, b])


def test_it_compiles():
    inputs = arguments("slstm", 2)
    compiled = torch.compile(flashrnn, fullgraph=True, backend="aot_eager")
    checked(compiled(*inputs, function="slstm"), flashrnn(*inputs, function="slstm"), inputs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"function": "janet"}, ValueError, "unknown function 'janet'; there are lstm, gru, elman, slstm"),
        ({"R": torch.ones(4, 2, 4, 3)}, gpu_rnn.ShapeError, r"R has shape \[4, 2, 4, 3\]; expected \[G, H, D, P\] = "),
        ({"b": torch.ones(3, 2, 4)}, gpu_rnn.ShapeError, r"b has shape \[3, 2, 4\]; expected \[G, H, D\] = \[4, 2"),
        ({"Wx": torch.ones(3, 5, 8)}, gpu_rnn.ShapeError, r"Wx has shape \[3, 5, 8\]; expected \[B, T, G, H, D\]"),
        ({"states": torch.ones(2, 3, 5, 2, 4)}, gpu_rnn.ShapeError, r"states has .* = \[2, 3, 1, 2, 4\]"),
        ({"config": SimpleNamespace(forward_clipval=1.0)}, NotImplementedError, "the config's forward_clipval"),
        ({"config": SimpleNamespace(constants={"k": 1})}, NotImplementedError, "the config's constants"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, error, words):
    inputs = dict(zip(("Wx", "R", "b", "states"), (a.detach() for a in arguments("lstm", 2))))
    with pytest.raises(error, match=words):
        flashrnn(**inputs | change)


@pytest.mark.parametrize("N", [1, 2, 3])
def test_slstm_is_that_of_xlstm(N):
    """Its stabilizer begins otherwise, which cancels out: compared are y, and c and n without it."""
    package = pytest.importorskip("xlstm.blocks.slstm.src.vanilla")
    T, B, D, (Wx, R, b, _) = 5, 3, 4, arguments("slstm", N)
    H = N * D
    order = [2, 0, 1, 3]  # of i, f, z, o, as ours
    x = Wx.transpose(0, 1)[:, :, order].reshape(T, B, 4 * H)
    w_hh, bias = R[order].reshape(4 * H, D), b[order].reshape(4 * H)
    y, last = gpu_rnn.cells.SLSTM.function(x, None, w_hh, bias, num_heads=N)
    theirs, after, _ = package.slstm_forward(
        Wx.transpose(0, 1).reshape(T, B, 4 * H), Wx.new_zeros(4, B, H), R.transpose(0, 1).reshape(N, 4 * D, D),
        b.reshape(4 * H), package.slstm_pointwise_function_registry["slstm"],
    )  # fmt: skip
    _, c, n, m = last
    _, their_c, their_n, their_m = after
    ours = y, c * m.exp(), n * m.exp()
    checked(ours, (theirs[0, 1:], their_c * their_m.exp(), their_n * their_m.exp()), [Wx, R, b])


def test_an_xlstm_trains_the_same():
    """Its stack of blocks, in float64, so that rounding can't grow into a difference."""
    pytest.importorskip("xlstm")
    train = runpy.run_path(str(EXAMPLES / "xlstm_swap.py"))["train"]
    torch.set_default_dtype(torch.float64)
    try:
        losses = train(4)
        assert losses == pytest.approx(train(4, ours=False), rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_tirex_runs_unchanged(heads):
    """A layer of its own, forward and backward, with states that are carried on."""
    pytest.importorskip("tirex2")
    example = runpy.run_path(str(EXAMPLES / "tirex_swap.py"))
    layer, x = example["layer"](24, heads).double(), torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(layer._recurrent_kernel_)
    results = []
    for ours in (False, True):
        example["swap"](ours)
        try:
            y = layer(x)
            first, carried = layer.step(x[:, :1])
            second, _ = layer.step(x[:, 1:2], **carried)
        finally:
            example["swap"](False)
        parts = y, first, second
        results.append(
            [*parts, *torch.autograd.grad([part.square().sum() for part in parts], [x, *layer.parameters()])]
        )
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EQUAL)
