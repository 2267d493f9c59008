"""A plain call goes by the plan of those that look like it: whatever changes between two calls, the second has to see.

Expected is what the uncached path gives, which knows nothing of earlier calls.
"""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

import gpu_rnn
from gpu_rnn import BackendError, ShapeError, functional
from gpu_rnn.autograd import eager
from gpu_rnn.backends import call_cache, dispatch
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.nn import base

from . import cuda_on_cpu
from .cuda_emulator import runtime
from .test_layers import CELLS, LAYERS, flat

KINDS = [*LAYERS, *CELLS]
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(21)
    monkeypatch.setattr(call_cache, "CACHE", {})


def made(kind, dtype=torch.float32, **options):
    """A layer that has been called, its input and its first states."""
    layer = getattr(gpu_rnn, kind)(4, 4, dtype=dtype, **options)
    cell = kind.endswith("Cell")
    x = torch.randn(*([3, 4] if cell else [1, 3, 4]), dtype=dtype)
    h, c = torch.randn(2, *([3, 4] if cell else [1, 3, 4]), dtype=dtype)
    hx = (h, c) if kind.startswith("LSTM") else h
    layer(x, hx), layer(x)
    return layer, x, hx


def the_long_way(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "lookup", lambda *args: None)
        for module in (eager, functional):
            patch.setattr(module, "lookup", lambda settings, library, arrays, make, *args: make(*args))
        return call()


def without_checks(call):
    """A call that may neither check its arrays nor choose a backend."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (eager, functional):
            patch.setattr(module, "validate", lambda *args, **options: pytest.fail("it was checked again"))
        patch.setattr(dispatch, "choose", lambda *args: pytest.fail("a backend was chosen again"))
        return call()


def each(outputs):
    """The arrays in the nested outputs of a function or a layer."""
    return [y for part in outputs for y in each(part)] if isinstance(outputs, tuple) else [outputs]


def gone(call):
    """What comes out, or the error."""
    try:
        outputs = [torch.from_numpy(y) if isinstance(y, np.ndarray) else y for y in each(call())]
        return [(y.dtype, y.shape, y.requires_grad, y.detach()) for y in outputs]
    except Exception as error:
        return type(error), str(error)


def assert_seen(call):
    actual, expected = gone(call), the_long_way(lambda: gone(call))
    assert len(actual) == len(expected)
    for mine, true in zip(actual, expected, strict=True):
        if isinstance(mine, tuple):
            assert mine[:3] == true[:3]
            assert torch.equal(mine[3], true[3])
        else:
            assert mine == true
    return actual


def made_plans():
    return [plan for plan in call_cache.CACHE.values() if plan is not None]


@every
@pytest.mark.parametrize("has_states", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_second_call_skips_the_checks(kind, has_states, grad):
    layer, x, hx = made(kind)
    with torch.set_grad_enabled(grad):
        expected = flat(layer(x, hx if has_states else None))
        actual = flat(without_checks(lambda: layer(x, hx if has_states else None)))
    assert all(map(torch.equal, actual, expected))
    assert all(y.requires_grad == grad for y in actual)
    assert len({y.data_ptr() for y in [*actual, *expected]}) == len(actual) + len(expected)
    assert_seen(lambda: layer(x, hx if has_states else None))


# ---- weights --------------------------------------------------------------------------------------------------------


def parameter(layer, start="weight_hh"):
    return next((name, weight) for name, weight in layer.named_parameters() if name.startswith(start))


def stepped(layer):
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.1)


def swapped_data(change):
    def changed(layer):
        _, weight = parameter(layer)
        weight.data = change(weight.data)

    return changed


def replaced(layer):
    name, weight = parameter(layer)
    setattr(layer, name, nn.Parameter(2 * weight.detach()))


def loaded(**options):
    def changed(layer):
        layer.load_state_dict({name: 2 * weight for name, weight in layer.state_dict().items()}, **options)

    return changed


def frozen(*starts):
    def changed(layer):
        for name, weight in layer.named_parameters():
            weight.requires_grad_(not name.startswith(starts))

    return changed


def tied(layer):
    name, weight = parameter(layer)
    other, _ = parameter(layer, "weight_ih")
    setattr(layer, other, weight)


CHANGES = {
    "stepped": stepped,
    "other data": swapped_data(lambda w: 2 * w),
    "data in another layout": swapped_data(lambda w: w.reshape(4, -1).t().contiguous().reshape(w.shape)),
    "data at the same address": swapped_data(
        lambda w: w.view(-1, 2, 2).transpose(1, 2).as_strided(w.shape, (1, len(w)))
    ),
    "data of another dtype": swapped_data(torch.Tensor.double),
    "data of another shape": swapped_data(lambda w: w[:, :3]),
    "replaced": replaced,
    "loaded": loaded(),
    "assigned": loaded(assign=True),
    "tied": tied,
    "frozen": frozen("weight", "bias"),
    "frozen in part": frozen("weight"),
    "weight norm": lambda layer: parametrizations.weight_norm(layer, parameter(layer)[0]),
    "pruned": lambda layer: prune.random_unstructured(layer, parameter(layer)[0], 0.5),
    "all of another dtype": lambda layer: layer.double(),
    "without a bias": lambda layer: setattr(layer, "bias", False),
    "another size": lambda layer: setattr(layer, "input_size", 5),
    "another size of states": lambda layer: setattr(layer, "hidden_size", 5),
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change(kind, change):
    layer, x, hx = made(kind)
    CHANGES[change](layer)
    first = assert_seen(lambda: layer(x, hx))
    stepped(layer)
    if not isinstance(first[0], type):  # an error
        again = assert_seen(lambda: layer(x, hx))
        assert not torch.equal(first[0][3], again[0][3])


@pytest.mark.parametrize("kind", LAYERS)
def test_another_size_of_the_projection(kind):
    layer = getattr(gpu_rnn, kind)(4, 4, proj_size=2)
    x, hx = torch.randn(1, 3, 4), (torch.randn(1, 3, 2), torch.randn(1, 3, 4))
    hx = hx[0] if kind == "RNN" else hx
    assert len(assert_seen(lambda: layer(x, hx))[0]) == 4
    layer.proj_size = 3
    assert assert_seen(lambda: layer(x, hx))[0] is ShapeError


@every
def test_a_frozen_layer_thaws(kind):
    layer, x, hx = made(kind)
    layer.requires_grad_(False)
    call_cache.CACHE.clear()
    assert not any(y.requires_grad for y in flat(layer(x, hx)))
    parameter(layer)[1].requires_grad_()
    assert_seen(lambda: layer(x, hx))
    assert all(y.requires_grad for y in flat(layer(x, hx)))


@every
def test_parametrized_weights_follow_what_they_are_made_of(kind):
    layer, x, hx = made(kind)
    parametrizations.weight_norm(layer, parameter(layer)[0])
    layer(x, hx)
    stepped(layer)
    assert_seen(lambda: layer(x, hx))


@every
def test_a_functional_call_has_its_own_weights_and_gives_them_back(kind):
    layer, x, hx = made(kind)
    others = {name: torch.randn_like(weight) for name, weight in layer.named_parameters()}
    before = flat(layer(x, hx))
    assert_seen(lambda: torch.func.functional_call(layer, others, (x, hx)))
    assert all(map(torch.equal, flat(layer(x, hx)), before))


# ---- what is requested ----------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "backend": "cuda", "precision": "tf32", "recompute": True, "step_exact": True, "recurrent_dropout": 1.0,
    "zoneout": 1.0, "weight_dropout": 1.0, "input_dropout": 1.0, "cell_clip": 0.01, "coupled": True,
    "reset_after": False,
}  # fmt: skip


@every
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_change(kind, name):
    layer, x, hx = made(kind, torch.float64)
    before = gone(lambda: layer(x, hx))
    setattr(layer, name, ATTRIBUTES[name])
    torch.manual_seed(3)
    actual = gone(lambda: layer(x, hx))
    torch.manual_seed(3)
    expected = the_long_way(lambda: gone(lambda: layer(x, hx)))
    assert str(actual) == str(expected)
    if name in ("backend", "precision", "zoneout", "recurrent_dropout"):
        assert str(actual) != str(before)


def test_a_list_of_probabilities_is_no_key():
    layer, x, hx = made("GRU")
    layer.zoneout = [0.5]
    assert_seen(lambda: layer.eval()(x, hx))


@every
@pytest.mark.parametrize("name", ["recompute", "step_exact"])
def test_what_does_not_show_in_the_numbers(kind, name):
    layer, x, hx = made(kind)
    setattr(layer, name, True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x, hx)
    call = made_plans()[-1]
    last = call.problem
    assert last.step_exact == (name == "step_exact")
    assert last.training != (name == "recompute")
    saved = 1 + len(call.backend.saved_shapes(last)) if last.training else 0  # y and what the backend saves
    assert len(kept) == len(flat((x, hx))) + 4 + saved


def test_batch_first_and_the_nonlinearity():
    layer, x = gpu_rnn.RNN(4, 4), torch.randn(2, 5, 4)
    layer(x)
    layer.batch_first = True
    assert assert_seen(lambda: layer(x))[1][1] == (1, 2, 4)
    layer, _, _ = made("RNN")
    x, hx = torch.randn(3, 3, 4), torch.randn(1, 3, 4)
    before = flat(layer(x, hx))
    layer.batch_first = True
    assert_seen(lambda: layer(x, hx))
    layer.batch_first, layer.mode = False, "RNN_RELU"
    assert_seen(lambda: layer(x, hx))
    assert not torch.equal(flat(layer(x, hx))[0], before[0])
    cell, x, hx = made("RNNCell")
    cell.nonlinearity = "relu"
    assert_seen(lambda: cell(x, hx))


@every
def test_the_environment_is_read_every_time(kind, monkeypatch):
    layer, x, hx = made(kind)
    monkeypatch.setenv("GPU_RNN_BACKEND", "cuda")
    with pytest.raises(BackendError, match="cuda"):
        layer(x, hx)
    monkeypatch.setenv("GPU_RNN_BACKEND", "numpy")
    layer(x, hx)
    monkeypatch.delenv("GPU_RNN_BACKEND")
    layer(x, hx)


@every
def test_gradients_are_switched_on(kind):
    layer, x, hx = made(kind)
    call_cache.CACHE.clear()
    with torch.no_grad():
        layer(x, hx)
    assert all(requires for _, _, requires, _ in assert_seen(lambda: layer(x, hx)))


@every
def test_modes_of_torch(kind):
    layer, x, hx = made(kind)
    with torch.no_grad():
        assert not any(requires for _, _, requires, _ in assert_seen(lambda: layer(x, hx)))
    with torch.inference_mode():
        assert all(y.is_inference() for y in flat(layer(x, hx)))
    with torch.autocast("cpu", torch.bfloat16):
        assert {dtype for dtype, *_ in assert_seen(lambda: layer(x, hx))} == {torch.bfloat16}
    assert {dtype for dtype, *_ in assert_seen(lambda: layer(x, hx))} == {torch.float32}
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not any(requires for _, _, requires, _ in assert_seen(lambda: layer(x, hx)))
    assert all(requires for _, _, requires, _ in assert_seen(lambda: layer(x.requires_grad_(), hx)))


@every
def test_transforms_look_on(kind):
    layer, x, hx = made(kind, torch.float64)

    def loss(x):
        return sum(y.square().sum() for y in flat(layer(x, hx)))

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        _, slope = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), direction)))
    torch.testing.assert_close(slope, (expected * direction).sum())
    many = torch.randn(2, *x.shape, dtype=x.dtype)
    each = torch.stack([loss(member) for member in many])
    torch.testing.assert_close(torch.func.vmap(loss)(many), each)


# ---- input ----------------------------------------------------------------------------------------------------------


@every
def test_input_and_states_of_other_kinds(kind):
    layer, x, hx = made(kind)
    h = hx[0] if isinstance(hx, tuple) else hx
    odd = [
        (x.double(), hx), (x[..., :3], hx), (x[..., :0, :], hx), (x[0], hx), (x.numpy(), hx), (None, hx),
        (x, h[..., :3]), (x, h.double()), (x, (h,)), (x, [h, h]), (x, (h, h, h)), (x, (h, None)), (x, h.numpy()),
        (x.to("meta"), None), (x.to_sparse(), None), (x, ((h,), h)), (x[..., :2, :], None),
        (x.as_subclass(nn.Buffer), hx),
    ]  # fmt: skip
    for input, first in odd:
        actual, again = (gone(lambda i=input, f=first: layer(i, f)) for _ in range(2))
        expected = the_long_way(lambda i=input, f=first: gone(lambda: layer(i, f)))
        assert str(actual) == str(again) == str(expected)


@every
def test_shapes_alone(kind):
    layer, x, hx = made(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        for _ in range(2):
            assert [y.shape for y in flat(layer(fake))] == [y.shape for y in flat(the_long_way(lambda: layer(fake)))]
    assert_seen(lambda: layer(x, hx))


# ---- gradients ------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("recompute", [False, True])
def test_first_and_second_derivatives(kind, recompute):
    layer, x, hx = made(kind, torch.float64, recompute=recompute)
    leaves = [tensor.requires_grad_() for tensor in flat((x, hx))]

    def call(x, *state):
        return tuple(flat(layer(x, state if len(state) > 1 else state[0])))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    outputs, every_one = call(*leaves), [*leaves, *layer.parameters()]
    arriving = [torch.randn(2, *y.shape, dtype=y.dtype) for y in outputs]
    pullback = torch.func.vmap(lambda *d: torch.autograd.grad(outputs, every_one, d, retain_graph=True))
    together = pullback(*arriving)
    for k in range(2):
        alone = torch.autograd.grad(outputs, every_one, [d[k] for d in arriving], retain_graph=True)
        true = torch.autograd.grad(the_long_way(lambda: call(*leaves)), every_one, [d[k] for d in arriving])
        for a, b, c in zip(together, alone, true, strict=True):
            torch.testing.assert_close(a[k], c)
            assert torch.equal(b, c)


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize("kind", LAYERS)
def test_states_keep_their_axis_of_layers_on_a_gpu_backend(kind, monkeypatch):
    layer, x, hx = made(kind)
    expected = flat(layer(x, hx))
    cuda_on_cpu.in_place_of_numpy(monkeypatch, persistent.DEVICES["h200"])
    for first in (hx, None):
        assert_seen(lambda first=first: layer(x, first))
    for ours, numpys in zip(flat(layer(x, hx)), expected, strict=True):
        torch.testing.assert_close(ours, numpys)
    sum(y.sum() for y in flat(layer(x, hx))).backward()


# ---- nothing is kept ------------------------------------------------------------------------------------------------


@every
def test_a_call_leaves_nothing_on_the_layer(kind):
    layer = getattr(gpu_rnn, kind)(4, 4)
    before = pickle.dumps(layer)
    x = torch.randn(*([3, 4] if kind.endswith("Cell") else [1, 3, 4]))
    layer(x)
    assert pickle.dumps(layer) == before
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        stepped(other)
        assert_seen(lambda other=other: other(x))
        assert not torch.equal(flat(other(x))[0], flat(layer(x))[0])


@every
def test_layers_weights_and_inputs_are_let_go(kind):
    layer, x, hx = made(kind)
    layer(x.requires_grad_(), hx)
    watched = [weakref.ref(thing) for thing in (layer, x, *flat(hx), *layer.parameters())]
    assert made_plans()
    del layer, x, hx
    gc.collect()
    assert not any(ref() is not None for ref in watched)


def test_no_more_plans_are_kept_than_there_is_room_for(monkeypatch):
    layer, _, _ = made("GRU")
    monkeypatch.setattr(call_cache, "MAX_CALLS", 5)
    for B in range(1, 20):
        x = torch.randn(1, B, 4)
        assert_seen(lambda x=x: layer(x))
        assert len(call_cache.CACHE) <= 5


def test_a_refused_call_is_refused_again():
    layer, x, _ = made("GRU")
    for _ in range(2):
        with pytest.raises(ShapeError, match="input"):
            layer(x[..., :3])
    assert all(plan is not None for plan in call_cache.CACHE.values())


def test_threads_share_plans_and_nothing_else():
    several = [made("LSTM")[0] for _ in range(4)]
    inputs = [torch.randn(1, B, 4) for B in (1, 3, 5)]
    expected = [[flat(layer(x))[0] for x in inputs] for layer in several]

    def call(k):
        layer, x = several[k % 4], inputs[k % 3]
        with torch.set_grad_enabled(k % 2 == 0):
            y = flat(layer(x))[0]
        return torch.equal(y, expected[k % 4][k % 3]) and y.requires_grad == (k % 2 == 0)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(400)))


@pytest.mark.parametrize("kind", LAYERS)
def test_swapped_modules_and_hooks(kind):
    theirs = getattr(nn, kind)(4, 4)
    x = torch.randn(1, 3, 4)
    expected = flat(theirs(x))
    ours = gpu_rnn.replace_(theirs)
    for _ in range(2):
        for a, b in zip(flat(ours(x)), expected, strict=True):
            torch.testing.assert_close(a, b)
    ours.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))
    ours.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(flat(ours(x))[0], the_long_way(lambda: flat(ours(x)))[0])


def test_a_step_is_such_a_call():
    layer, x, hx = made("LSTM")
    expected = flat(layer(x, hx))
    y, after = without_checks(lambda: layer.step(x[0], hx))
    assert all(map(torch.equal, [y[None], *after], expected))


# ---- functions ------------------------------------------------------------------------------------------------------

function = pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
library = pytest.mark.parametrize("library", ["numpy", "torch"])
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def cached_call(kind, library, dtype="float32"):
    """The function, and its arguments by name, once called."""
    G, (T, B, I, H) = GATES[kind], (2, 3, 4, 4)
    shapes = {"x": (T, B, I), "w_ih": (G * H, I), "w_hh": (G * H, H), "b_ih": (G * H,), "b_hh": (G * H,), "h0": (B, H)}
    shapes |= {"c0": (B, H)} if kind == "lstm" else {}
    drawn = {name: torch.randn(shape, dtype=getattr(torch, dtype)) for name, shape in shapes.items()}
    named = {name: array.numpy() if library == "numpy" else array for name, array in drawn.items()}
    run = getattr(gpu_rnn, kind)
    run(**named)
    return run, named


@library
@function
@pytest.mark.parametrize("without", [(), ("h0",), ("b_ih", "b_hh"), ("c0",)], ids=" ".join)
def test_a_second_call_of_a_function_skips_the_checks(kind, library, without):
    run, named = cached_call(kind, library)
    named = {name: array for name, array in named.items() if name not in without}
    expected = each(run(**named))
    actual = each(without_checks(lambda: run(**named)))
    assert all((a == b).all() for a, b in zip(actual, expected, strict=True))
    outputs = [np.asarray(y) for y in [*actual, *expected]]
    assert not any(np.shares_memory(a, b) for k, a in enumerate(outputs) for b in outputs[:k])
    assert not any(np.shares_memory(a, np.asarray(b)) for a in outputs for b in named.values())
    assert_seen(lambda: run(**named))


@library
@function
def test_arrays_that_change(kind, library):
    run, named = cached_call(kind, library)
    before = assert_seen(lambda: run(**named))
    for name, array in named.items():
        array += 1
        assert not torch.equal(assert_seen(lambda: run(**named))[0][3], before[0][3]), name
        before = assert_seen(lambda: run(**named))
        mirrored = array[::-1].copy()[::-1] if library == "numpy" else array.t() if name == "h0" else array
        assert_seen(lambda name=name, mirrored=mirrored: run(**named | {name: mirrored}))


@library
@function
def test_arguments_of_other_kinds(kind, library):
    run, named = cached_call(kind, library)
    other = torch.from_numpy if library == "numpy" else torch.Tensor.numpy
    changes = [
        lambda a: a[..., :2], lambda a: a[None], lambda a: a[0], lambda a: a.tolist(), lambda a: None, other,
        lambda a: a.astype("d") if library == "numpy" else a.double(),
        lambda a: a.view(np.recarray) if library == "numpy" else a.as_subclass(nn.Buffer),
        lambda a: a.astype(complex) if library == "numpy" else a.to("meta"),
    ]  # fmt: skip
    for name in named:
        for change in changes:
            changed = named | {name: change(named[name])}
            actual, again = (gone(lambda changed=changed: run(**changed)) for _ in range(2))
            expected = the_long_way(lambda changed=changed: gone(lambda: run(**changed)))
            assert str(actual) == str(again) == str(expected), name
    assert_seen(lambda: run(**named))


OPTIONS = [
    {"backend": "cuda"}, {"backend": "numpy"}, {"backend": "none"}, {"backend": ["numpy"]}, {"precision": "tf32"},
    {"precision": "half"}, {"precision": []}, {"reverse": True}, {"recompute": True}, {"step_exact": True},
    {"return_states": True}, {"zoneout": 0.5, "training": False}, {"zoneout": 1.0, "seed": 3},
    {"recurrent_dropout": 0.5}, {"lengths": None}, {"unheard_of": 1},
]  # fmt: skip


@library
@function
@pytest.mark.parametrize("keywords", OPTIONS, ids=str)
def test_options_of_a_function(kind, library, keywords):
    run, named = cached_call(kind, library, "float64")
    actual, again = (gone(lambda: run(**named, **keywords)) for _ in range(2))
    expected = the_long_way(lambda: gone(lambda: run(**named, **keywords)))
    assert str(actual) == str(again) == str(expected)
    before = gone(lambda: run(**named))
    if keywords.keys() & {"reverse", "return_states", "unheard_of"} or keywords in OPTIONS[:1]:
        assert str(actual) != str(before)
    assert_seen(lambda: run(**named))


@library
@function
def test_a_function_reads_the_environment_every_time(kind, library, monkeypatch):
    run, named = cached_call(kind, library)
    monkeypatch.setenv("GPU_RNN_BACKEND", "cuda")
    with pytest.raises(BackendError, match="cuda"):
        run(**named)
    run(**named, backend="numpy")
    monkeypatch.setenv("GPU_RNN_BACKEND", "none")
    with pytest.raises(ValueError, match="none"):
        run(**named)
    monkeypatch.delenv("GPU_RNN_BACKEND")
    run(**named)


def test_an_activation_is_a_cell_of_its_own():
    run, named = cached_call("rnn", "numpy")
    before = assert_seen(lambda: run(**named))
    assert not torch.equal(assert_seen(lambda: run(**named, nonlinearity="relu"))[0][3], before[0][3])


@function
@pytest.mark.parametrize("recompute", [False, True])
def test_a_function_under_autograd(kind, recompute):
    run, named = cached_call(kind, "torch", "float64")
    names, tensors = [*named], [tensor.requires_grad_() for tensor in named.values()]

    def call(*tensors):
        return tuple(each(run(**dict(zip(names, tensors)), recompute=recompute)))

    call_cache.CACHE.clear()
    with torch.no_grad():
        call(*tensors)
    assert all(requires for _, _, requires, _ in assert_seen(lambda: call(*tensors)))
    assert [plan.problem.training for plan in made_plans()] == [False, not recompute]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    with torch.no_grad():
        assert not any(requires for _, _, requires, _ in assert_seen(lambda: call(*tensors)))
    with torch.inference_mode():
        assert all(y.is_inference() for y in call(*tensors))
    tensors[2].requires_grad_(False)
    sum(y.sum() for y in call(*tensors)).backward()
    assert [tensor.grad is None for tensor in tensors] == [k == 2 for k in range(len(tensors))]

    def loss(x):
        return sum(y.square().sum() for y in call(x, *tensors[1:]))

    x = tensors[0]
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    with forward_ad.dual_level():
        _, slope = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), x.detach())))
    torch.testing.assert_close(slope, (expected * x).sum())


@library
@function
def test_arrays_of_a_call_are_let_go(kind, library):
    run, named = cached_call(kind, library)
    watched = [weakref.ref(array) for array in [*named.values(), *each(run(**named))]]
    assert made_plans()
    del named
    gc.collect()
    assert not any(ref() is not None for ref in watched)


@library
@function
def test_threads_call_functions_at_once(kind, library):
    several = [cached_call(kind, library) for _ in range(6)]
    expected = [each(run(**named)) for run, named in several]

    def call(k):
        run, named = several[k % 6]
        return all((a == b).all() for a, b in zip(each(run(**named)), expected[k % 6], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(300)))
