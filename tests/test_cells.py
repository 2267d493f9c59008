"""Each cell definition against finite differences, and its compiled NumPy program against it run as it stands."""

import re
import subprocess
import sys

import numpy as np
import pytest

from gpu_rnn.kernels import cells, mathematics
from gpu_rnn.kernels.codegen import numpy
from gpu_rnn.kernels.trace import ARITY, trace

EVERY = pytest.mark.parametrize("name", cells.NAMES)


def step_inputs(rng, cell, B=3, H=5):
    """Random x, h, state of one time step: tuples of [B, H]."""
    return tuple(tuple(rng.standard_normal((B, H)) for _ in range(count)) for count in (cell.G, cell.G, cell.S))


@EVERY
def test_grad_is_the_derivative_of_step(name, rng):
    """Perturb each input of one time step; central differences of a random functional of the new states."""
    cell = cells.get(name)
    x, h, state = step_inputs(rng, cell)
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
@pytest.mark.parametrize("by", ["tanh", "exp"])
@pytest.mark.parametrize("arrange", [numpy.layout, numpy.torch_layout])
def test_the_compiled_step_is_the_definition(name, arrange, by, rng):
    cell, B, H = cells.get(name), 3, 5
    order = numpy.with_exp_sigmoid(arrange(cell)) if by == "exp" else arrange(cell)
    x, h, state = step_inputs(rng, cell, B, H)
    bias = rng.standard_normal((len(order.separate), B, H))
    biased = [h[g] + bias[order.separate.index(g)] if g in order.separate else h[g] for g in range(cell.G)]
    expected, saved = cell.step(x, biased, state)

    rows_x = np.stack([x[g] * order.scale[g] for g in order.inputs])
    rows_h = np.stack([h[g] * order.scale[g] for g in order.recurrent])
    compiled = numpy.step_program(cell, order)
    first, *others = state
    h_after, record = np.full((B, H), np.nan), np.full((2, cell.K + cell.S - 1, B, H), np.nan)
    record[0, cell.K :] = np.reshape(others, (-1, B, H))
    look, run = compiled.bind((B, H), np.dtype("float64"), h=rows_h, b=bias)
    run(*look(rows_x, first, h_after, *record))
    for actual, exact in zip([h_after, *record[1, cell.K :]], expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-14, atol=1e-15)
    for row, k in enumerate(order.saved):
        np.testing.assert_allclose(record[0, row], saved[k], rtol=1e-14, atol=1e-15)


@EVERY
def test_the_compiled_grad_is_the_definition(name, rng):
    cell, B, H = cells.get(name), 3, 5
    order = numpy.layout(cell)
    x, h, state = step_inputs(rng, cell, B, H)
    new, saved = cell.step(x, h, state)
    dnew = tuple(rng.standard_normal((B, H)) for _ in range(cell.S))
    dx, dh, dstate = cell.grad(dnew, new, state, saved)

    compiled, n = numpy.gradient(cell), len(order.separate)
    record = np.full((2, cell.K + cell.S - 1, B, H), np.nan)
    record[0, : cell.K] = np.reshape([saved[k] for k in order.saved], (-1, B, H))
    for array, others in zip(record, (state[1:], new[1:])):
        array[cell.K :] = np.reshape(others, (-1, B, H))
    c, d = np.full((compiled.rows, B, H), np.nan), np.full((cell.G + n + compiled.width, B, H), np.nan)
    one_step = {"n": new[0][None], "s": state[0][None], "v": record[:1], "r": record[1:], "c": c[None]}
    compiled.coefficients.execute_batched((B, H), np.dtype("float64"), **one_step)
    look, run = compiled.grad.bind((B, H), np.dtype("float64"))
    run(*look(*dnew, c, d))
    np.testing.assert_allclose(d[: cell.G], np.stack([dx[g] for g in order.inputs]), rtol=1e-13)
    np.testing.assert_allclose(d[n : n + cell.G], np.stack([dh[g] for g in order.recurrent]), rtol=1e-13)
    for row, exact in zip(compiled.state_grad_rows, dstate):
        assert row is not None or exact == 0.0
        if row is not None:
            np.testing.assert_allclose(d[row], np.broadcast_to(exact, (B, H)), rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "rnn_tanh": (2, 2, 2, 1), "rnn_relu": (2, 2, 1, 1), "gru": (11, 12, 11, 1), "gru+before": (17, 20, 14, 8),
        "lstm": (8, 11, 12, 4), "lstm+peephole": (20, 20, 20, 8),
    }.items(),
)  # fmt: skip
def test_numbers_of_calls_do_not_grow(name, expected):
    """Forward, forward with the gates as torch has them, the gradient's coefficients, the gradient."""
    cell = cells.get(name).kernel_cell
    compiled, backward = numpy.step_program(cell), numpy.gradient(cell)
    in_torch_order = numpy.step_program(cell, numpy.torch_layout(cell))
    programs = compiled, in_torch_order, backward.coefficients, backward.grad
    assert all(len(program.calls) <= most for program, most in zip(programs, expected, strict=True))


def test_compiling_a_cell_searches_nothing():
    """It is part of every first call; a search over orders took 90,000 Python calls for the LSTM."""
    script = """
import sys
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.codegen import numpy as program
cell, calls = cells.get("lstm"), 0
cells.step_graph(cell)
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
program.step_program(cell), program.gradient(cell), program.step_program(cell, program.torch_layout(cell))
sys.setprofile(None)
print(calls)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) < 20_000


def test_the_gradient_of_the_lstm_takes_four_calls_a_time_step():
    calls = numpy.gradient(cells.get("lstm")).grad.calls
    assert calls == (
        "multiply(q0, c[1], d[0])",
        "multiply(q0, c[0], w[0])",
        "add(q1, w[0], w[1])",
        "multiply(w[1], c[2:6], d[1:5])",
    )
    assert all(call in numpy.Gradient.__doc__ for call in calls), "the documentation shows this very program"


def test_the_lstm_takes_one_tanh_for_all_gates():
    calls = numpy.step_program(cells.get("lstm")).calls
    assert calls == (
        "add(x[0:4], h[0:4], v[0:4])",
        "tanh(v[0:4], v[0:4])",
        "multiply(v[0:3], c0, v[0:3])",
        "add(v[0:3], c0, v[0:3])",
        "multiply(v[1:3], v[3:5], w[0:2])",
        "add(w[1], w[0], r[4])",
        "tanh(r[4], n)",
        "multiply(v[0], n, n)",
    )
    assert all(call in numpy.__doc__ for call in calls), "the documentation shows this very program"


def test_facts_follow_from_the_definition():
    facts = {name: (c.G, c.S, c.K, c.separate) for name, c in ((name, cells.get(name)) for name in cells.NAMES)}
    assert facts["lstm"] == (4, 2, 4, (False,) * 4)
    assert facts["gru"] == (3, 1, 4, (False, False, True))
    assert facts["rnn_tanh"] == facts["rnn_relu"] == (1, 1, 0, (False,))


@EVERY
def test_a_cell_definition_states_its_equations_and_source(name):
    definition = cells.MODULES[name].__doc__
    assert "Backwards" in definition
    assert "docs/derivation.md" in definition
    assert re.search(r"\b(19|20)\d\d\b", definition)


def test_unknown_cells_and_branches_are_refused():
    with pytest.raises(ValueError, match=f"unknown cell 'gpu'; there are {', '.join(cells.NAMES)}"):
        cells.get("gpu")

    def step_of_cell(x, h, state):
        return ((x[0] if x[0] else h[0]),), ()

    with pytest.raises(TypeError, match="can't branch"):
        trace(step_of_cell, x=1, h=1, state=1)


def test_every_operation_of_a_definition_compiles(rng):
    """Forward only: operators both ways round, and every function of mathematics."""

    def step_of_cell(x, h, state):
        a, b = x[0], h[0]
        m = mathematics
        values = (
            a + b, 1 + a, a - b, 1 - a, a * b, 2 * a, a / (3 + b * b), 1 / (3 + a * a), -a, m.sigmoid(a + b),
            m.tanh(a), m.exp(a), m.log(1 + a * a), m.maximum(a, b), m.maximum(0.5, a), m.relu(b), m.positive(a),
            m.where(a, b, 0.5), m.rsqrt(1 + a * a), m.mean(a), a * m.mean(a * b) - m.exp(m.mean(b)),
        )  # fmt: skip
        return values, (a, values[0], values[-2], m.sigmoid(m.mean(a)))

    cell = cells.Cell("everything", "a", "h" * 21, step_of_cell, step_of_cell, 4, (True,))
    x, h = rng.standard_normal((1, 2, 3)), rng.standard_normal((1, 2, 3))
    bias = rng.standard_normal((1, 2, 3))
    outputs = step_of_cell(np.swapaxes(x, 1, 2), np.swapaxes(h + bias, 1, 2), [None])  # units on the last axis
    expected, saved = ([np.broadcast_to(value, (3, 2)).T for value in group] for group in outputs)
    first, record = np.full((2, 3), np.nan), np.full((2, 4 + len(expected) - 1, 2, 3), np.nan)
    order = numpy.layout(cell)
    look, run = numpy.step_program(cell, order).bind((2, 3), np.dtype("float64"), h=h, b=bias)
    run(*look(x, np.nan, first, *record))
    for ours, exact in zip([first, *record[1, 4:]], expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-14)
    np.testing.assert_allclose(record[0, :4], [saved[k] for k in order.saved], rtol=1e-14)
    used = {node.op for node in trace(step_of_cell, x=1, h=1, state=1).nodes.values()} - {"input", "constant"}
    assert used == set(ARITY)
