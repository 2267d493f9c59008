"""Each page against finite differences, and its compiled NumPy program against the page run as it stands."""

import numpy as np
import pytest

from gpu_rnn.kernels import cells, mathematics, program
from gpu_rnn.kernels.trace import ARITY, trace

EVERY = pytest.mark.parametrize("name", cells.NAMES)


def instant(rng, cell, B=3, H=5):
    """Random x, h, state of one instant: tuples of [B, H]."""
    return tuple(tuple(rng.standard_normal((B, H)) for _ in range(count)) for count in (cell.G, cell.G, cell.S))


@EVERY
def test_grad_is_the_derivative_of_step(name, rng):
    """Perturb each input of one instant; central differences of a random functional of the new states."""
    cell = cells.get(name)
    x, h, state = instant(rng, cell)
    dnew = tuple(rng.standard_normal(state[0].shape) for _ in range(cell.S))
    new, saved = cell.step(x, h, state)
    gradients = cell.grad(dnew, new, state, saved)

    def objective(x, h, state):
        return sum(d * n for d, n in zip(dnew, cell.step(x, h, state)[0]))  # every element on its own

    inputs, delta = (x, h, state), 1e-6
    for which, group in enumerate(inputs):
        for k in range(len(group)):

            def moved(by, which=which, k=k):
                changed = [list(g) for g in inputs]
                changed[which][k] = changed[which][k] + by
                return objective(*changed)

            numeric = (moved(delta) - moved(-delta)) / (2 * delta)
            analytic = np.broadcast_to(gradients[which][k], numeric.shape)
            argument = f"{('x', 'h', 'state')[which]}[{k}]"
            np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-8, err_msg=argument)


@EVERY
@pytest.mark.parametrize("arrange", [program.layout, program.natural])
def test_the_compiled_step_is_the_page(name, arrange, rng):
    cell, B, H = cells.get(name), 3, 5
    order = arrange(cell)
    x, h, state = instant(rng, cell, B, H)
    bias = rng.standard_normal((len(order.separate), B, H))
    met = [h[g] + bias[order.separate.index(g)] if g in order.separate else h[g] for g in range(cell.G)]
    expected, saved = cell.step(x, met, state)

    rows_x = np.stack([x[g] * order.scale[g] for g in order.inputs])
    rows_h = np.stack([h[g] * order.scale[g] for g in order.recurrent])
    compiled = program.step_program(cell, order)
    after = [np.full((B, H), np.nan) for _ in range(cell.S)]
    v = np.full((cell.K, B, H), np.nan)
    compiled.bind((B, H), np.dtype("float64"), h=rows_h, b=bias, v=v)(rows_x, *state, *after)
    for k in range(cell.S):
        np.testing.assert_allclose(after[k], expected[k], rtol=1e-14, atol=1e-15)
    for row, k in enumerate(program.saved_order(cell)):
        np.testing.assert_allclose(v[row], saved[k], rtol=1e-14, atol=1e-15)


@EVERY
def test_the_compiled_grad_is_the_page(name, rng):
    cell, B, H = cells.get(name), 3, 5
    order = program.layout(cell)
    x, h, state = instant(rng, cell, B, H)
    new, saved = cell.step(x, h, state)
    dnew = tuple(rng.standard_normal((B, H)) for _ in range(cell.S))
    dx, dh, dstate = cell.grad(dnew, new, state, saved)

    compiled, n = program.grad_program(cell), len(order.separate)
    d = np.full((cell.G + n, B, H), np.nan)
    before = [np.zeros((B, H)) for _ in range(cell.S)]
    v = np.stack([saved[k] for k in program.saved_order(cell)]) if cell.K else np.empty((0, B, H))
    compiled.bind((B, H), np.dtype("float64"), v=v, d=d)(*dnew, *new, *state, *before)
    np.testing.assert_allclose(d[: cell.G], np.stack([dx[g] for g in order.inputs]), rtol=1e-13)
    np.testing.assert_allclose(d[n:], np.stack([dh[g] for g in order.recurrent]), rtol=1e-13)
    for k in range(cell.S):
        np.testing.assert_allclose(before[k], np.broadcast_to(dstate[k], (B, H)), rtol=1e-13)


def test_the_lstm_takes_one_tanh_for_all_gates():
    calls = program.step_program(cells.get("lstm")).calls
    assert calls == (
        "add(x[0:4], h[0:4], v[0:4])",
        "tanh(v[0:4], v[0:4])",
        "multiply(v[0:3], c0, v[0:3])",
        "add(v[0:3], c0, v[0:3])",
        "multiply(v[1], s1, n1)",
        "multiply(v[0], v[3], w[0])",
        "add(n1, w[0], n1)",
        "tanh(n1, n0)",
        "multiply(v[2], n0, n0)",
    )
    assert all(call in program.__doc__ for call in calls), "the documentation shows this very program"


def test_facts_follow_from_the_page():
    facts = {name: (c.G, c.S, c.K, c.separate) for name, c in ((name, cells.get(name)) for name in cells.NAMES)}
    assert facts["lstm"] == (4, 2, 4, (False,) * 4)
    assert facts["gru"] == (3, 1, 4, (False, False, True))
    assert facts["rnn_tanh"] == facts["rnn_relu"] == (1, 1, 0, (False,))


@EVERY
def test_a_page_states_its_equations_and_source(name):
    page = cells.importlib.import_module(f"gpu_rnn.kernels.cells.{name}")
    assert "Backwards" in page.__doc__
    assert "docs/derivation.md" in page.__doc__
    assert any(year in page.__doc__ for year in ("1990", "1997", "2014", "2015"))


def test_unknown_cells_and_branches_are_refused():
    with pytest.raises(ValueError, match="unknown cell 'gpu'; there are gru, lstm, rnn_relu, rnn_tanh"):
        cells.get("gpu")

    def page(x, h, state):
        return ((x[0] if x[0] else h[0]),), ()

    with pytest.raises(TypeError, match="can't branch"):
        trace(page, x=1, h=1, state=1)


def test_every_operation_of_a_page_compiles(rng):
    """A page that uses all of them, forward only: operators both ways round, and every function of mathematics."""

    def page(x, h, state):
        a, b = x[0], h[0]
        m = mathematics
        values = (
            a + b, 1 + a, a - b, 1 - a, a * b, 2 * a, a / (3 + b * b), 1 / (3 + a * a), -a, m.sigmoid(a + b),
            m.tanh(a), m.exp(a), m.log(1 + a * a), m.maximum(a, b), m.maximum(0.5, a), m.relu(b), m.positive(a),
            m.where(a, b, 0.5), m.rsqrt(1 + a * a), m.mean(a), a * m.mean(a * b) - m.exp(m.mean(b)),
        )  # fmt: skip
        return values, (a, values[0], values[-2], m.sigmoid(m.mean(a)))

    cell = cells.Cell("everything", "a", "h" * 21, page, page, 4, (True,))
    x, h = rng.standard_normal((1, 2, 3)), rng.standard_normal((1, 2, 3))
    bias = rng.standard_normal((1, 2, 3))
    outputs = page(np.swapaxes(x, 1, 2), np.swapaxes(h + bias, 1, 2), [None])  # units on the last axis
    expected, saved = ([np.broadcast_to(value, (3, 2)).T for value in group] for group in outputs)
    after, v = [np.full((2, 3), np.nan) for _ in expected], np.full((4, 2, 3), np.nan)
    compiled = program.step_program(cell)
    compiled.bind((2, 3), np.dtype("float64"), h=h, b=bias, v=v)(x, *[np.nan] * 21, *after)
    for ours, exact in zip([*after, *v], [*expected, *(saved[k] for k in program.saved_order(cell))]):
        np.testing.assert_allclose(ours, exact, rtol=1e-14)
    used = {node.op for node in trace(page, x=1, h=1, state=1).nodes.values()} - {"input", "constant"}
    assert used == set(ARITY)
