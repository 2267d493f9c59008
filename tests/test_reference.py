"""The plain reference, and the judge of the tests, judged by torch.nn."""

import numpy as np
import pytest
import torch

from gpu_rnn.core import reference
from gpu_rnn.kernels import cells

from .sequences import by_torch, draw, exact, wide


def by_reference(case):
    """With torch's autograd."""
    case = case.mapped(lambda array: array.clone().requires_grad_())
    steps = reference.run(case.cell, cells.step_graph(case.cell), case.x, case.weights, case.state, case.reverse)
    y, last = torch.stack([states[0] for states, _ in steps]), steps[0 if case.reverse else -1][0]
    torch.autograd.backward((y, *last), (case.dy, *case.dlast))
    results = {"y": y, "dx": case.x.grad} | dict(zip((f"{letter}T" for letter in case.cell.states), last, strict=True))
    results |= {f"d{name}": w.grad for name, w in case.weights._asdict().items() if w is not None}
    return results | {f"d{letter}0": array.grad for letter, array in zip(case.cell.states, case.state, strict=True)}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "P"), [*((name, None) for name in cells.NAMES), ("lstm", 3)])
def test_equals_torch_with_its_gradients(name, P, bias, reverse):
    case = draw(name, "float64", 6, 3, 4, 5, P, bias=bias, reverse=reverse)
    theirs = by_torch(case)
    for ours in (by_reference(case), exact(case)):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(wide(ours[key]), wide(theirs[key]), rtol=1e-12, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("name", "P"), [*((name, None) for name in cells.NAMES), ("lstm", 3)])
def test_runs_on_numpy_arrays(name, P, reverse):
    case = draw(name, "float64", 6, 3, 4, 5, P, reverse=reverse)
    theirs, arrays = by_torch(case), case.mapped(wide)
    steps = reference.run(case.cell, cells.step_graph(case.cell), arrays.x, arrays.weights, arrays.state, reverse)
    assert all(isinstance(array, np.ndarray) for states, _ in steps for array in states)
    np.testing.assert_allclose(np.stack([states[0] for states, _ in steps]), wide(theirs["y"]), rtol=1e-12, atol=1e-13)
    for letter, last in zip(case.cell.states, steps[0 if reverse else -1][0], strict=True):
        np.testing.assert_allclose(last, wide(theirs[f"{letter}T"]), rtol=1e-12, atol=1e-13)


def test_takes_the_input_projection_in_the_place_of_x():
    case = draw("gru", "float64", 4, 2, 3, 5)
    Wx = torch.nn.functional.linear(case.x, case.weights.w_ih)
    steps = reference.run(
        case.cell, cells.step_graph(case.cell), Wx, case.weights._replace(w_ih=None), case.state, False
    )
    torch.testing.assert_close(torch.stack([states[0] for states, _ in steps]), by_torch(case)["y"])
