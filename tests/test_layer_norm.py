"""Layer normalization: layers and functions against the paper's equations in plain torch, and every derivative."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn.functional import ShapeError
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.autodiff import depth
from gpu_rnn.kernels.cells import apply_modifiers, grad_graph, step_graph

from .reference_layers import B, H, I, T, as_tuple, by_the_rules, inputs, layer

LAYERS = pytest.mark.parametrize("name", ["lstm", "gru"])
ALL = {"zoneout": 0.3, "recurrent_dropout": 0.2, "input_dropout": 0.3, "weight_dropout": 0.2}
VARIANTS = {"peephole": True, "coupled": True, "cell_clip": 0.3}
MARKS = ["reset", "reset_state", "left_padding", "lengths"]


def flat(results):
    return [tensor for group in results for tensor in as_tuple(group)]


@LAYERS
@pytest.mark.parametrize("shape", ["one", "stacked"])
@pytest.mark.parametrize("keywords", [{}, ALL], ids=["alone", "with everything"])
def test_layers_are_as_published(name, shape, keywords):
    """Values and gradients, in float64, with all that can be around a cell and without."""
    if name == "lstm" and shape == "stacked":
        keywords = keywords | VARIANTS
    made = layer(name, shape, layer_norm=True, **keywords)
    x, hx, marks = inputs(made, MARKS if ALL.items() <= keywords.items() else ())
    leaves = [x, *as_tuple(hx), *made.parameters(), *as_tuple(marks.get("reset_state", ()))]
    results = []
    for run in (partial(made, return_states=True), partial(by_the_rules, made)):
        outputs = flat(run(x, hx, generator=torch.Generator().manual_seed(3), **marks))
        total = sum((output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@LAYERS
def test_derivatives(name):
    """First and second ones against finite differences, of every parameter, too."""
    made = layer(name, layer_norm=True)
    x, hx, marks = inputs(made, ["reset"])
    names = [key for key, _ in made.named_parameters()]

    def run(x, *rest):
        states, parameters = rest[: len(as_tuple(hx))], dict(zip(names, rest[len(as_tuple(hx)) :]))
        states = states if len(states) > 1 else states[0]
        y, last = torch.func.functional_call(made, parameters, (x, states), marks)
        return y, *as_tuple(last)

    tensors = (x[:2].detach().requires_grad_(), *as_tuple(hx), *made.parameters())
    marks = {"reset": marks["reset"][:2], "lengths": torch.tensor([2, 0, 1])}
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@LAYERS
def test_functions_without_autograd(name, rng):
    """NumPy's pullback gives what torch's autograd does, for every array; with w_ih, and with the input projection."""
    made = layer(name, layer_norm=True)
    x, hx, marks = inputs(made, ["reset", "lengths"])
    weights = [p.detach() for p in made.parameters()]
    initial = dict(zip(("h0", "c0"), (s[0].detach() for s in as_tuple(hx))))
    function = getattr(gpu_rnn, name)
    as_numpy = {label: s.numpy() for label, s in initial.items()}
    numpy_marks = {label: m.numpy() for label, m in marks.items()}
    for part in (False, True):
        first = (x.detach() @ weights[0].T if part else x.detach()).requires_grad_()
        own = [w.clone().requires_grad_() for w in weights]
        own[0] = None if part else own[0]
        y, last = function(first, *own[:4], **initial, **marks, layer_norm=tuple(own[4:]))
        dy = torch.from_numpy(rng.standard_normal(y.shape))
        leaves = [first, *(w for w in own if w is not None)]
        expected = torch.autograd.grad((y * dy).sum() + sum(s.sum() for s in as_tuple(last)), leaves)

        arrays = [None if w is None else w.detach().numpy() for w in own]
        gains = tuple(arrays[4:])
        outputs, pullback = gpu_rnn.vjp(
            function, first.detach().numpy(), *arrays[:4], **as_numpy, **numpy_marks, layer_norm=gains
        )
        np.testing.assert_allclose(outputs[0], y.detach(), rtol=1e-12)
        ones = tuple(np.ones_like(s) for s in as_tuple(outputs[1]))
        gradients = pullback((dy.numpy(), ones if len(ones) > 1 else ones[0]))
        labels = ["x", *(["w_ih"] if not part else []), "w_hh", "b_ih", "b_hh"]
        ours = [*(gradients[label] for label in labels), *gradients["layer_norm"]]
        assert ("w_ih" in gradients) != part
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("B", [0, 2])
def test_inputs_may_have_no_columns(B):
    gains = np.ones(12), np.ones(12)
    x, w_ih, w_hh = np.ones((5, B, 0)), np.ones((12, 0)), np.ones((12, 4))
    (y, last), pullback = gpu_rnn.vjp(gpu_rnn.gru, x, w_ih, w_hh, layer_norm=gains)
    gradients = pullback((y, last))
    assert [gradients[key].shape for key in ("x", "w_ih")] == [x.shape, w_ih.shape]


@LAYERS
def test_without_biases(name):
    made = layer(name, layer_norm=True, bias=False)
    assert not any("bias" in key for key, _ in made.named_parameters())
    x, hx, _ = inputs(made)
    with_zeros = layer(name, layer_norm=True)
    zeros = {key: torch.zeros_like(value) for key, value in with_zeros.state_dict().items() if "bias" in key}
    with_zeros.load_state_dict(made.state_dict() | zeros)
    torch.testing.assert_close(flat(made(x, hx)), flat(with_zeros(x, hx)))
    flat(made(x, hx))[0].sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_first_values_and_the_others_stay_torchs():
    torch.manual_seed(0)
    made = gpu_rnn.LSTM(3, 4, layer_norm=True, forget_bias=1.0)
    torch.manual_seed(0)
    plain = gpu_rnn.LSTM(3, 4, forget_bias=1.0)
    state = made.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state.pop(key), value)
    assert {key: value.unique().tolist() for key, value in state.items()} == {
        "weight_ln_ih_l0": [1.0], "weight_ln_hh_l0": [1.0], "weight_ln_c_l0": [1.0], "bias_ln_c_l0": [0.0],
    }  # fmt: skip
    assert "layer_norm=True" in repr(made)


@LAYERS
def test_scales_of_the_weights_do_not_matter(name):
    """What the paper is after: a recurrent and an input matrix of any scale, and shifted, give the same outputs."""
    made = layer(name, layer_norm=True)
    x, hx, _ = inputs(made)
    other = copy.deepcopy(made)
    with torch.no_grad():
        for weight in (other.weight_ih_l0, other.weight_hh_l0):
            weight.mul_(3e3).add_(torch.randn(weight.shape[1]))
            made.get_parameter("weight_ih_l0" if weight is other.weight_ih_l0 else "weight_hh_l0").mul_(1e3)
    for ours, theirs in zip(flat(made(x, hx)), flat(other(x, hx))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_cells_are_layers_of_one_time_step(kind):
    cell = getattr(gpu_rnn, kind)(I, H, layer_norm=True, dtype=torch.float64)
    made = layer(kind.removesuffix("Cell").lower(), layer_norm=True)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in made.state_dict().items()})
    x, hx, _ = inputs(made)
    after = cell(x[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0])
    for ours, theirs in zip(as_tuple(after), as_tuple(made(x[:1], hx)[1])):
        torch.testing.assert_close(ours, theirs[0])


@LAYERS
def test_streams_recomputed_and_eval(name):
    made = layer(name, "one", num_layers=2, layer_norm=True, zoneout=0.2).eval()
    x, _, _ = inputs(made)
    y, last = made(x)
    listen = gpu_rnn.stream(made, batch=B)
    torch.testing.assert_close(torch.stack([listen(step.detach()).clone() for step in x]), y)
    (expected,) = torch.autograd.grad(y.sum(), x)
    made.recompute = True
    (actual,) = torch.autograd.grad(made(x)[0].sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@LAYERS
def test_compiled(name):
    made = layer(name, layer_norm=True, dtype=torch.float32)
    x, hx, marks = inputs(made, ["reset", "lengths"])
    eager = made(x, hx, **marks)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    outputs = compiled(x, hx, **marks)
    torch.testing.assert_close(flat(outputs), flat(eager))
    gradients = [torch.autograd.grad(y.square().sum(), list(made.parameters())) for y in (eager[0], outputs[0])]
    torch.testing.assert_close(*gradients)


@LAYERS
def test_autocast(name):
    made = layer(name, layer_norm=True, dtype=torch.float32)
    x, _, _ = inputs(made)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x)[0], rtol=0.05, atol=0.05)


def test_the_gradient_waits_for_means_once():
    """However many means a step takes one after the other, its gradient's own don't wait for each other."""
    for name, expected in {"lstm": (3, 1, 10), "gru": (1, 1, 7)}.items():
        plain = cells.get(name)
        for options in ({}, {"hold": True, "reset": True, "reset_state": True, "zoneout": (0.1, 0.1)[: plain.S]}):
            cell = apply_modifiers(plain, norm=True, **options)
            assert (depth(step_graph(cell)), depth(grad_graph(cell)), cell.K) == expected


WRONG = {
    "a number of arrays": (lambda gains: gains[:1], ValueError, r"layer_norm must be 2 arrays .*got 1 arrays"),
    "no arrays": (lambda gains: True, ValueError, r"layer_norm must be 2 arrays .*got bool"),
    "a shape": (
        lambda gains: (gains[0], gains[1][:-1]),
        ShapeError,
        r"recurrent projection has shape \[11\]; expected \[12\]",
    ),
    "a dtype": (
        lambda gains: (gains[0].astype("float32"), gains[1]),
        TypeError,
        "layer_norm of the input projection is numpy",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what, rng):
    change, error, message = WRONG[what]
    x, w_ih, w_hh = rng.standard_normal((T, B, I)), rng.standard_normal((3 * H, I)), rng.standard_normal((3 * H, H))
    with pytest.raises(error, match=message):
        gpu_rnn.gru(x, w_ih, w_hh, layer_norm=change((np.ones(3 * H), np.ones(3 * H))))


def test_weights_that_do_not_fit_are_named(rng):
    x, w_ih, w_hh = rng.standard_normal((T, B, I)), rng.standard_normal((3 * H, I + 1)), rng.standard_normal((3 * H, H))
    gains = np.ones(3 * H), np.ones(3 * H)
    with pytest.raises(ShapeError, match=r"w_ih has shape \[12, 3\]; expected \[12, 2\]"):
        gpu_rnn.gru(x, w_ih, w_hh, layer_norm=gains)
    with pytest.raises(ShapeError, match=r"x has shape \[6, 3, 2\]; expected .* \[6, 3, 12\]"):
        gpu_rnn.gru(x, None, w_hh, layer_norm=gains)
    with pytest.raises(TypeError, match="RNN got an unexpected keyword argument 'layer_norm'"):
        gpu_rnn.RNN(2, 3, layer_norm=True)
