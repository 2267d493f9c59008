"""The cells of docs/new_cell.md, and some of `gpu_rnn.cells`, in Triton."""

import numpy as np
import pytest

from gpu_rnn.backends import numpy, triton
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.mathematics import exp, mean, tanh
from gpu_rnn.kernels.triton import config

from .. import custom_cells, library, reference_modifiers
from ..sequences import draw, wide


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", custom_cells.CELLS)
def test_every_result_is_as_good_as_torchs(name, dtype, how, monkeypatch):
    monkeypatch.setattr(reference_modifiers, "published", custom_cells.published)
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    made = custom_cells.case(name, {}, dtype, 5, 3, 4, 6, reverse=dtype == "float32")
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize("name", library.REPRESENTATIVE)
def test_published_cells(name, how, monkeypatch):
    monkeypatch.setattr(reference_modifiers, "published", library.published)
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    made = library.case(name, {}, "float32", 4, 3, 4, 6, reverse=how == "stepwise")
    backend = TwoPass(triton) if made.plain.lowered else triton
    reference_modifiers.check(made, made.case.run(backend.forward, backend.backward))


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
def test_reductions_are_those_of_numpy(how, monkeypatch):
    """A softmax over the units, whose gradient is derived."""

    def step(x, h, state):
        e = exp(tanh(x[0] + h[0]))
        return (e / mean(e) + 0.5 * state[0],)

    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))
    cells.register(cells.make_cell("competing", "a", "h", step))
    if how == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    case = draw("competing", "float32", 4, 3, 2, 5)
    ours, exact = case.run(triton.forward, triton.backward), case.mapped(wide).run(numpy.forward, numpy.backward)
    for name, array in exact.items():
        np.testing.assert_allclose(wide(ours[name]), array, rtol=1e-4, atol=1e-5, err_msg=name)
    cells.get.cache_clear()
