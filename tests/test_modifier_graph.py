"""Modifiers of a cell: the rules said twice, and every gradient against finite differences."""

import numpy as np
import pytest

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.autodiff import derive
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.mathematics import exp, log, maximum, minimum, sigmoid, tanh, where

EVERY = pytest.mark.parametrize("name", cells.NAMES)
OPTIONS = {
    "reset": {"reset": True},
    "reset_state": {"reset": True, "reset_state": True},
    "hold": {"hold": True},
    "dropout": {"dropout": True},
    "zoneout": {"zoneout": (0.4, 0.3)},
    "mean": {"zoneout": (0.4, 0.3), "mean": True},
    "all": {"reset": True, "reset_state": True, "hold": True, "dropout": True, "zoneout": (0.4, 0.3)},
}
MODIFIERS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def modified(name, options):
    cell = cells.get(name)
    if "zoneout" in options:
        options = options | {"zoneout": options["zoneout"][: cell.S]}
    return cell, apply_modifiers(cell, **options)


def drawn(rng, cell, n=60):
    """x, h, state, extra of n elements."""
    extra = [rng.standard_normal(n) for _ in cell.per_unit_params]
    extra += [rng.integers(0, 2, n).astype(float) for _ in cell.flags]
    extra += [rng.uniform(size=n) for _ in range(cell.uniforms)]
    x, h, state = ([rng.standard_normal(n) for _ in range(width)] for width in (cell.G, cell.G, cell.S))
    return x, h, state, extra


def more(cell, extra):
    return (extra,) if cell.E else ()


def by_the_rules(plain, options, x, h, state, extra):
    """Element by element, as modifiers.py has it."""
    extra, S, after = list(extra), plain.S, []
    resets = [extra.pop(0) for _ in range(S)] if "reset_state" in options else [np.zeros_like(x[0])] * S
    if "dropout" in options:
        extra.pop(0)
    reset = extra.pop(0) if "reset" in options else np.zeros_like(x[0])
    hold = extra.pop(0) if "hold" in options else np.zeros_like(x[0])
    for n in range(len(x[0])):
        s = [resets[k][n] if reset[n] else state[k][n] for k in range(S)]
        new = list(plain.step([a[n] for a in x], [a[n] for a in h], s)[0])
        for k in range(S):
            p = options.get("zoneout", (0, 0))[k]
            if "mean" in options:
                new[k] = p * s[k] + (1 - p) * new[k]
            elif p and extra[k][n] < p:
                new[k] = s[k]
        after.append([state[k][n] if hold[n] else new[k] for k in range(S)])
    return np.transpose(after)


@EVERY
@MODIFIERS
def test_the_rules(name, options, rng):
    plain, cell = modified(name, options)
    inputs = drawn(rng, cell)
    new, _ = cell.step(*inputs[:3], *more(cell, inputs[3]))
    np.testing.assert_allclose(new, by_the_rules(plain, options, *inputs), rtol=1e-14)
    if cell.recurrent_input is not None:
        _, _, state, extra = inputs
        names = dict(zip((*cell.per_unit_params, *cell.flags), extra))
        seen = np.where(names.get("reset", np.zeros(60)) > 0, names.get("h_reset", 0.0), state[0])
        np.testing.assert_array_equal(cell.recurrent_input(state[0], extra), seen * names.get("dropout", 1.0))


@EVERY
@MODIFIERS
def test_the_gradient(name, options, rng):
    check_gradient(modified(name, options)[1], rng)


def check_gradient(cell, rng):
    x, h, state, extra = drawn(rng, cell)
    new, saved = cell.step(x, h, state, *more(cell, extra))
    dnew = [rng.standard_normal(60) for _ in new]
    gradients = cell.grad(dnew, new, state, saved, *more(cell, extra))
    assert [len(group) for group in gradients] == [cell.G, cell.G, cell.S] + [cell.num_trainable] * bool(cell.E)
    inputs, delta = [x, h, state, *more(cell, extra)], 1e-6
    for group, (values, actual) in enumerate(zip(inputs, gradients)):
        for k, gradient in enumerate(actual):
            sides = []
            for by in (delta, -delta):
                moved = [list(values) for values in inputs]
                moved[group][k] = values[k] + by
                sides.append(sum(d * n for d, n in zip(dnew, cell.step(*moved)[0])))
            numeric = (sides[0] - sides[1]) / (2 * delta)
            np.testing.assert_allclose(np.broadcast_to(gradient, 60), numeric, rtol=1e-6, atol=1e-8)


@EVERY
def test_a_held_or_reset_past_may_be_anything(name, rng):
    """What a flag discards may be NaN."""
    cell = apply_modifiers(cells.get(name), reset=True, hold=True)
    x, h, state, _ = drawn(rng, cell)
    lost, on, off = [np.full(60, np.nan)] * cell.G, np.ones(60), np.zeros(60)
    new, _ = cell.step(lost, lost, state, [off, on])
    np.testing.assert_array_equal(new, state)
    new, saved = cell.step(x, h, [np.full(60, np.nan)] * cell.S, [on, off])
    assert np.isfinite(new).all()
    _, _, dstate, _ = cell.grad(new, new, [np.full(60, np.nan)] * cell.S, saved, [on, off])
    assert all(np.all(d == 0) for d in dstate)


@EVERY
def test_names_find_the_cell_again(name):
    for options in OPTIONS.values():
        _, cell = modified(name, options)
        assert cells.get(cell.name) is cell


@EVERY
def test_the_derived_gradient_is_that_of_the_definition(name, rng):
    cell = cells.get(name)
    step, grad = derive(cell.step, cell.G, cell.S)
    x, h, state, _ = drawn(rng, cell)
    dnew = [rng.standard_normal(60) for _ in range(cell.S)]
    (new, saved), (new_d, saved_d) = cell.step(x, h, state), step(x, h, state)
    assert len(saved_d) == cell.K, "it saves no more than the hand does"
    np.testing.assert_allclose(new, new_d, rtol=1e-14)
    for ours, theirs in zip(grad(dnew, new, state, saved_d), cell.grad(dnew, new, state, saved), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(np.broadcast_to(a, 60), np.broadcast_to(b, 60), rtol=1e-12, atol=1e-15)


VARIANTS = [
    {"peephole": True}, {"coupled": True}, {"clip": (0.3,)}, {"peephole": True, "coupled": True, "clip": (0.3,)},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "+".join(options))
def test_variants_of_the_lstm(options, rng):
    cell = apply_modifiers(cells.get("lstm"), **options)
    x, h, (h0, c), extra = drawn(rng, cell)
    s, p = (lambda a: 1 / (1 + np.exp(-a))), dict(zip(cell.per_unit_params, extra))
    a = {gate: x[k] + h[k] for k, gate in enumerate(cell.gates)}
    i = s(a["i"] + p.get("i", 0) * c)
    f = 1 - i if "coupled" in options else s(a["f"] + p.get("f", 0) * c)
    c_new = np.clip(f * c + i * np.tanh(a["g"]), -0.3, 0.3) if "clip" in options else f * c + i * np.tanh(a["g"])
    o = s(a["o"] + p.get("o", 0) * c_new)
    new, _ = cell.step(x, h, (h0, c), *more(cell, extra))
    np.testing.assert_allclose(new, (o * np.tanh(c_new), c_new), rtol=1e-13)
    assert cell.per_unit_params == (tuple(g for g in cell.gates if g != "g") if "peephole" in options else ())
    check_gradient(cell, rng)


def test_a_variant_takes_modifiers(rng):
    cell = apply_modifiers(cells.get("lstm+coupled+peephole"), reset=True, reset_state=True)
    assert (cell.gates, cell.per_unit_params, cell.num_trainable) == ("igo", ("i", "o", "h_reset", "c_reset"), 4)
    check_gradient(cell, rng)


def test_every_operation_has_its_derivative(rng):
    def step(x, h, state):
        a, b = x[0], h[0]
        c = exp(0.1 * a) / (2.0 + b * b) - log(1.5 + a * a)
        d = maximum(a, b) * minimum(b, 0.2) + where(a - b, tanh(a), sigmoid(-b))
        return (c + d * state[0],)

    cell = cells.make_cell("every", "a", "h", step)
    x, h, state, _ = drawn(rng, cell)
    new, saved = cell.step(x, h, state)
    one, delta = [np.ones(60)], 1e-6
    for k, actual in enumerate(cell.grad(one, new, state, saved)):
        moved = [[(v[0] + by * (k == j),) for j, v in enumerate((x, h, state))] for by in (delta, -delta)]
        sides = [cell.step(*values)[0][0] for values in moved]
        np.testing.assert_allclose(actual[0], (sides[0] - sides[1]) / (2 * delta), rtol=1e-6, atol=1e-8)


def test_a_step_that_gives_too_few_states_is_refused():
    with pytest.raises(ValueError, match="step gives 1 new states; the cell has 2"):
        cells.make_cell("short", "a", "hc", lambda x, h, state: (x[0] + h[0],))
