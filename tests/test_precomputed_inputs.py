"""Calls without w_ih, whose x is the input projection already: on every backend what the product before would
give, in every derivative, and x stays as it was."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import embedding, linear
from torch.utils._pytree import tree_leaves, tree_map

import gpu_rnn
from gpu_rnn import ShapeError
from gpu_rnn.backends import gpu_common, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import cuda_on_cpu, reference_modifiers
from .conftest import sequence_arrays
from .cuda_emulator import runtime
from .sequences import draw, wide
from .test_modifiers_functions import drawn, tensors

EVERY = pytest.mark.parametrize("name", cells.NAMES)
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


def without_product(case, *, bias):
    """The same case with its input projection for x, which still lacks b_ih if `bias`."""
    weights = case.weights if not bias else case.weights._replace(b_ih=None)
    rest = case.weights._replace(w_ih=None, b_ih=case.weights.b_ih if bias else None)
    return case._replace(x=gpu_common.input_projection(case.x, weights, step_exact=False), weights=rest)


def check(case, forward, backward, *, exact=True):
    """Against the case with w_ih: the same bits where the input projection is the same, with b_ih; dx is its own."""
    product, expected = without_product(case, bias=False), case.run(forward, backward)
    before = product.x.clone()
    actual = product.run(forward, backward)
    assert torch.equal(product.x, before)
    compare = np.testing.assert_array_equal if exact else partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for label in actual.keys() - {"dx"}:
        compare(wide(actual[label]), wide(expected[label]), err_msg=label)
    rows = actual["dx"].flatten(0, 1)
    assert actual["dx"].shape == product.x.shape
    close = {"rtol": 0, "atol": 0.02 * wide(expected["dw_ih"]).max()} if case.dtype == "bfloat16" else {"rtol": 1e-4}
    assert torch.allclose(rows.T @ case.x.flatten(0, 1), expected["dw_ih"], **{"atol": 1e-5} | close)

    biased = without_product(case, bias=True).run(forward, backward)
    for label in ("y", "db_ih", "dw_hh"):
        np.testing.assert_allclose(wide(biased[label]), wide(expected[label]), **{"atol": 1e-5} | close, err_msg=label)


# ---- backends -------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("T", "B"), [(5, 3), (3, 1), (40, 9)])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_numpy(name, T, B, reverse):
    """Also where the gates are put into another order, which a long sequence repays."""
    check(
        draw(name, "float64", T, B, 4, 6, reverse=reverse), numpy_backend.forward, numpy_backend.backward, exact=False
    )


def test_numpy_with_everything():
    made = reference_modifiers.drawn("lstm", reference_modifiers.OPTIONS["all"], "float32", 5, 3, 4, 6)
    check(made.case, numpy_backend.forward, numpy_backend.backward, exact=False)


@on_host_runtime
@EVERY
def test_cuda_stepwise(name):
    check(
        draw(name, "float32", 5, 3, 4, 6, reverse=name == "gru"),
        *cuda_on_cpu.per_step_passes(),
    )


@on_host_runtime
@pytest.mark.parametrize("name", ["lstm", "rnn_relu"])
def test_cuda_persistent(name, monkeypatch):
    """K = G, or not."""
    monkeypatch.setattr(per_step, "run_forward", None)
    on = persistent.DEVICES["h200"]
    check(
        draw(name, "bfloat16", 5, 3, 4, 20),
        *cuda_on_cpu.passes(on),
    )


# ---- functions ------------------------------------------------------------------------------------------------------


def both(rng, name, case, **more):
    """A function with everything it takes, and the same without w_ih, as functions of a dict of tensors."""
    function, kwargs = drawn(rng, name, case)
    kwargs = tensors(kwargs | more)
    whole = partial(function, **{k: v for k, v in kwargs.items() if k not in ("x", "w_ih")})

    def composed(x, w_ih):
        return whole(linear(x, w_ih), None)

    return whole, composed, (kwargs["x"], kwargs["w_ih"])


@pytest.mark.parametrize(("name", "case"), [("projected", "everything"), ("gru", "lengths"), ("rnn_relu", "reset")])
def test_derivatives_of_every_order(rng, name, case):
    whole, composed, inputs = both(rng, name, case)
    torch.testing.assert_close(whole(*inputs), composed(*inputs))
    first = [
        torch.autograd.grad(sum(o.sin().sum() for o in tree_leaves(f(*inputs))), inputs, create_graph=True)
        for f in (whole, composed)
    ]
    torch.testing.assert_close(*first)
    second = [torch.autograd.grad(sum(d.sin().sum() for d in gradients), inputs) for gradients in first]
    torch.testing.assert_close(*second)
    part = linear(*inputs).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tree_leaves(whole(x, None)), [part], fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: tree_leaves(whole(x, None))[0], [part], fast_mode=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_vjp_is_torchs_gradient(rng, recompute):
    function, kwargs = drawn(rng, "gru", "lengths")
    part = kwargs["x"] @ kwargs.pop("w_ih").T
    kwargs |= {"x": part, "w_ih": None, "recompute": recompute}
    before = part.copy()
    (y, hT), pullback = gpu_rnn.vjp(function, **kwargs)
    actual = pullback((np.ones_like(y), None))
    leaves = tensors(kwargs)
    function(**leaves)[0].sum().backward()
    assert actual.keys() == {"x", "w_hh", "b_ih", "b_hh", "h0"}
    for label, gradient in actual.items():
        np.testing.assert_allclose(gradient, leaves[label].grad, rtol=1e-12, atol=1e-14, err_msg=label)
    np.testing.assert_array_equal(part, before)


def test_transforms(rng):
    whole, composed, (x, w) = both(rng, "lstm", "states")
    x, w = x.detach(), w.detach()
    pushed = [tree_leaves(torch.func.jvp(f, (x, w), (x.cos(), w.sin()))) for f in (whole, composed)]
    torch.testing.assert_close(*pushed)
    many = torch.stack([x, 2 * x])
    pairs = [tree_leaves(torch.func.vmap(f, in_dims=(0, None))(many, w)) for f in (whole, composed)]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("case", ["states", "everything"])
def test_compile_and_export(rng, case):
    whole, composed, inputs = both(rng, "lstm", case)
    compiled = torch.compile(composed, fullgraph=True, backend="aot_eager")
    results = []
    for run in (composed, compiled):
        outputs = tree_leaves(run(*inputs))
        results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)

    constants = tree_map(lambda value: value.detach() if torch.is_tensor(value) else value, whole.keywords)

    class Module(torch.nn.Module):
        def forward(self, x, w):
            return whole(linear(x, w), None, **constants)

    with torch.no_grad():
        program = torch.export.export(Module(), inputs).module()
        torch.testing.assert_close(program(*inputs), composed(*inputs))


def test_an_embedding_is_looked_up():
    """W by its columns: what a product with one-hot rows would give."""
    layer = gpu_rnn.GRU(7, 4)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    tokens = torch.randint(7, (5, 3))
    y, hT = gpu_rnn.gru(embedding(tokens, w_ih.T), None, w_hh, b_ih, b_hh)
    expected, _ = layer(torch.nn.functional.one_hot(tokens, 7).float())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), w_ih)[0] for out in (y, expected)))


def test_a_cell_of_ones_own(rng):
    from .custom_cells import CELLS

    x, w_ih, w_hh = (rng.standard_normal(size) for size in ((5, 2, 3), (8, 3), (8, 4)))
    expected, _ = CELLS["MGU"].function(x, w_ih, w_hh)
    actual, _ = CELLS["MGU"].function(x @ w_ih.T, None, w_hh)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


# ---- around ---------------------------------------------------------------------------------------------------------


def test_inspect_and_explain(rng):
    x, weights, state = sequence_arrays(rng, "gru", 5, 2, 3, 4)
    whole = gpu_rnn.inspect(gpu_rnn.gru, x, *weights[:4], h0=state[0])
    part = gpu_rnn.inspect(gpu_rnn.gru, x @ weights.w_ih.T, None, *weights[1:4], h0=state[0])
    for letter in whole:
        np.testing.assert_allclose(part[letter], whole[letter], rtol=1e-12)
    options = {"T": 5, "B": 2, "H": 4, "input_projection": True, "device": "cpu"}
    for explained in (gpu_rnn.explain("gru", **options), gpu_rnn.explain("gru", (5, 2, 12), input_projection=True)):
        assert explained.problem.I is None
        assert "gru T=5 B=2 H=4 float32" in str(explained)
        assert "input projection: given as x" in explained.plan
        assert explained.cudnn == "none"


BAD = {
    "x": ({"x": np.ones((5, 3, 4))}, ShapeError, "x has shape [5, 3, 4]; expected [T, B, 4*H] = [5, 3, 24], with x"),
    "rank": ({"x": np.ones((5, 24))}, ShapeError, "x has shape [5, 24]; expected 3 dimensions"),
    "h0": ({"h0": np.ones((2, 6))}, ShapeError, "with x [5, 3, 24], w_ih None, w_hh [24, 6]"),
    "b_ih": ({"b_ih": np.ones(6)}, ShapeError, "b_ih has shape [6]; expected [4*H] = [24]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_shapes(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        gpu_rnn.lstm(**{"x": np.ones((5, 3, 24)), "w_ih": None, "w_hh": np.ones((24, 6))} | changes)
    with pytest.raises(ShapeError, match=re.escape("x has shape [5, 2, 13]; expected an input projection [T, B, 3*H]")):
        gpu_rnn.explain("gru", (5, 2, 13), input_projection=True)
    with pytest.raises(TypeError, match="input_projection=True excludes I; got I = 3"):
        gpu_rnn.explain("gru", T=5, B=2, I=3, H=4, input_projection=True)
