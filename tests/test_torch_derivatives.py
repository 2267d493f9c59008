"""Derivatives of every kind and order, against torch's numerical ones, torch.nn's on the CPU, and each other."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import gpu_rnn
from gpu_rnn import functional
from gpu_rnn.autograd import functions
from gpu_rnn.core.problem import Options, Weights
from gpu_rnn.kernels import cells

from .conftest import sequence_arrays
from .test_layers import LAYERS, twins

EVERY = [*((name, None) for name in cells.NAMES), ("lstm", 2)]
every_cell = pytest.mark.parametrize(("name", "P"), EVERY)
every_layer = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


def as_function(rng, name, P=None, reverse=False, T=3, B=2, I=2, H=3):
    """A cell as a function of tensors alone, and the tensors."""
    x, weights, state = sequence_arrays(rng, name, T, B, I, H, P)
    inputs = [torch.from_numpy(a).requires_grad_() for a in (x, *weights, *state) if a is not None]
    count = len(inputs) - len(state)

    def run(*tensors):
        y, last = functional.run(name, tensors[0], Weights(*tensors[1:count]), tensors[count:], Options(reverse))
        return y, *last

    return run, inputs


def penalized(layer, x):
    """The loss of a WGAN-GP critic: the norm of the gradient by its input should be 1."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(layer(x)[0].mean(-1).sum(), x, create_graph=True)
    loss = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return torch.autograd.grad(loss, list(layer.parameters()))


# ---- second and higher ----------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_second_derivatives_are_the_numerical_ones(rng, name, P, reverse):
    run, inputs = as_function(rng, name, P, reverse)
    assert gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_every_entry_of_a_second_derivative(rng):
    run, inputs = as_function(rng, "gru", T=2, B=1, I=1, H=2)
    assert gradgradcheck(run, inputs)


@every_cell
def test_third_derivatives(rng, name, P):
    """Along a line: the value's Taylor series and the derivatives agree."""
    run, inputs = as_function(rng, name, P)
    directions = [torch.randn_like(tensor) for tensor in inputs]

    def along(t):
        return sum(output.sin().sum() for output in run(*(a + t * d for a, d in zip(inputs, directions))))

    def derivatives(t):
        t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        first = along(t)
        for _ in range(3):
            (first,) = torch.autograd.grad(first, t, create_graph=True)
            yield first.item()

    step = 1e-4
    at, before, after = (list(derivatives(t)) for t in (0.0, -step, step))
    assert at[2] == pytest.approx((after[1] - before[1]) / (2 * step), rel=1e-5)


def test_relu_has_no_curvature_where_it_is_flat():
    """All pre-activations zero, as with zero states: torch.nn's relu, and ours, have slope 0 there."""
    layer = gpu_rnn.RNN(2, 3, nonlinearity="relu", bias=False, dtype=torch.float64)
    x = torch.zeros(3, 1, 2, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    gradients = torch.autograd.grad(dx.sum() + 0 * layer.weight_hh_l0.sum(), list(layer.parameters()))
    assert not any(gradient.any() for gradient in (dx, *gradients))


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_gradient_penalty_is_torchs(kind, training):
    theirs, ours = (
        m.train(training) for m in twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True)
    )
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for actual, expected in zip(penalized(ours, x), penalized(theirs, x), strict=True):
        torch.testing.assert_close(actual, expected)


@every_layer
def test_hessian_vector_products(kind):
    """By reverse over reverse and by forward over reverse, on torch.nn's numbers."""
    theirs, ours = twins(kind, input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(layer):
        return lambda weights: functional_call(layer, weights, (x,))[0].square().sum()

    slope = torch.autograd.grad(
        loss(theirs)(dict(theirs.named_parameters())), list(theirs.parameters()), create_graph=True
    )
    product = sum((s * direction[name]).sum() for s, name in zip(slope, parameters))
    expected = torch.autograd.grad(product, list(theirs.parameters()))
    reverse = grad(lambda w: sum((s * direction[n]).sum() for n, s in grad(loss(ours))(w).items()))(parameters)
    _, forward = jvp(grad(loss(ours)), (parameters,), (direction,))
    for name, expected_product in zip(parameters, expected):
        torch.testing.assert_close(reverse[name], expected_product)
        torch.testing.assert_close(forward[name], expected_product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_derivatives_of_other_dtypes(dtype):
    """As close to float64's as the dtype allows."""
    layer = gpu_rnn.LSTM(3, 4, dtype=dtype)
    exact = gpu_rnn.LSTM(3, 4, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3).to(dtype)
    for ours, truth in zip(penalized(layer, x), penalized(exact, x.double()), strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).abs().max() <= 40 * torch.finfo(dtype).eps * truth.abs().max()


def test_autocast_does_not_reach_into_second_derivatives():
    layer, x = gpu_rnn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    loss = slope.square().sum()
    expected = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(loss, list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


# ---- torch.func -----------------------------------------------------------------------------------------------------

SOME = [("LSTM", {}), ("GRU", {"num_layers": 2, "bidirectional": True}), ("RNN", {"batch_first": True}),
        ("LSTM", {"proj_size": 2, "bias": False})]  # fmt: skip
some_layers = pytest.mark.parametrize(("kind", "arguments"), SOME, ids=str)


def layer_and_loss(kind, arguments):
    layer = getattr(gpu_rnn, kind)(3, 4, dtype=torch.float64, **arguments)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(weights, x):
        y, last = functional_call(layer, weights, (x,))
        return y.square().sum() + (last[0] if isinstance(last, tuple) else last).sum()

    def plain(x):
        gradients = torch.autograd.grad(loss(dict(layer.named_parameters()), x), list(layer.parameters()))
        return dict(zip(parameters, gradients))

    return layer, parameters, loss, plain


@some_layers
def test_grad_vjp_and_per_sample_gradients(kind, arguments):
    layer, parameters, loss, plain = layer_and_loss(kind, arguments)
    samples = torch.randn(6, 5, 3, dtype=torch.float64)  # each a sequence [T, I]
    batches = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(grad(loss)(parameters, batches[0]), plain(batches[0]))
    _, pullback = vjp(loss, parameters, batches[0])
    torch.testing.assert_close(pullback(torch.ones((), dtype=torch.float64))[0], plain(batches[0]))
    for inputs in (samples, batches):
        actual = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
        for k, x in enumerate(inputs):
            torch.testing.assert_close({name: gradient[k] for name, gradient in actual.items()}, plain(x))


@some_layers
def test_vmap_over_inputs_is_one_call(kind, arguments, monkeypatch):
    layer, *_ = layer_and_loss(kind, arguments)
    x = torch.randn(5, 6, 2, 3, dtype=torch.float64)
    expected = torch.stack([layer(x[:, k])[0] for k in range(6)], 1)
    calls, run = [], functions.forward
    monkeypatch.setattr(functions, "forward", lambda *args: calls.append(1) or run(*args))
    torch.testing.assert_close(vmap(lambda a: layer(a)[0], 1, 1)(x), expected)
    assert len(calls) == layer.num_layers * (1 + layer.bidirectional)
    nested = vmap(vmap(lambda a: layer(a)[0], 1, 1))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(nested[0], expected)


@some_layers
def test_vmap_over_an_ensemble(kind, arguments):
    layer, _, loss, _ = layer_and_loss(kind, arguments)
    models = [getattr(gpu_rnn, kind)(3, 4, dtype=torch.float64, **arguments) for _ in range(3)]
    stacked, _ = stack_module_state(models)
    stacked = {name: weight.detach() for name, weight in stacked.items()}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    actual = vmap(lambda weights: functional_call(layer, weights, (x,))[0])(stacked)
    torch.testing.assert_close(actual, torch.stack([model(x)[0] for model in models]))
    gradients = vmap(grad(loss), in_dims=(0, None))(stacked, x)
    for k, model in enumerate(models):
        alone = grad(loss)({name: p.detach() for name, p in model.named_parameters()}, x)
        torch.testing.assert_close({name: gradient[k] for name, gradient in gradients.items()}, alone)


@some_layers
def test_jacobians_and_hessians(kind, arguments):
    layer, *_ = layer_and_loss(kind, arguments)
    x = torch.randn(3, 2, 3, dtype=torch.float64)

    def sums(a):
        return layer(a)[0].tanh().sum(-1)

    jacobian = jacrev(sums)(x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(sums, x))
    torch.testing.assert_close(jacfwd(sums)(x), jacobian)
    torch.testing.assert_close(jvp(sums, (x,), (torch.ones_like(x),))[1], jacobian.sum((2, 3, 4)))
    torch.testing.assert_close(
        hessian(lambda a: sums(a).sum())(x), torch.autograd.functional.hessian(lambda a: sums(a).sum(), x)
    )


def test_batched_gradients_of_a_plain_graph():
    layer = gpu_rnn.GRU(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    dy = torch.randn(4, *y.shape, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    together = vmap(lambda d: torch.autograd.grad(y, inputs, d, retain_graph=True))(dy)
    for k in range(4):
        alone = torch.autograd.grad(y, inputs, dy[k], retain_graph=True)
        torch.testing.assert_close([gradient[k] for gradient in together], list(alone))


# ---- forward mode ---------------------------------------------------------------------------------------------------


def test_forward_mode_without_any_gradient_required():
    """Nothing here requires a gradient: a function that looks at that alone would give no tangent, hence zero."""
    layer = gpu_rnn.LSTM(3, 4, dtype=torch.float64).requires_grad_(False)
    x, direction = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    expected = (layer(x + 1e-6 * direction)[0] - layer(x - 1e-6 * direction)[0]) / 2e-6
    for grad_mode in (torch.no_grad, torch.enable_grad):
        with grad_mode(), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction))[0]).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


def test_forward_mode_through_the_operators_is_refused():
    layer = gpu_rnn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    weights, names = [parameter.detach() for parameter in layer.parameters()], "w_ih w_hh b_ih b_hh"

    def run(a):
        options = ([False], False, "auto", None, False, 1, False, False)
        return torch.ops.gpu_rnn.forward("gru", [a, *weights, torch.zeros(2, 4)], names, *options)[0]

    with pytest.raises(NotImplementedError, match="eager mode only"):
        jvp(run, (x,), (x,))
    with pytest.raises(Exception, match="eager mode only"):
        torch.compile(lambda a: jvp(lambda b: layer(b)[0], (a,), (a,))[1], backend="eager", fullgraph=True)(x)


# ---- torch's old vmap, over gradients -------------------------------------------------------------------------------


@every_layer
def test_batched_gradients_are_each_ones(kind):
    """As torch.nn's on the CPU are; of directions that go together, too."""
    _, layer = twins(kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    inputs = [x, *layer.parameters()]
    dy = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    for v, d in enumerate(dy):
        for ours, alone in zip(batched, torch.autograd.grad(y, inputs, d, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[v], alone, rtol=1e-12, atol=1e-12)


def test_vectorized_jacobians_and_hessians(rng):
    run, inputs = as_function(rng, "lstm", T=2, B=1, I=2, H=2)
    for which in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):

        def function(*tensors, which=which):
            y, *_ = run(*tensors)
            return y if "jacobian" in which.__name__ else (y * y).sum()

        results = [which(function, tuple(inputs), vectorize=v) for v in (True, False)]
        for ours, plain in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
