"""docs/new_cell.md is true: its page, put where pages stand, runs everywhere with nothing else written."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_rnn import functional
from gpu_rnn.kernels import cells
from gpu_rnn.problem import Options, Weights

from .conftest import sequence_arrays
from .host import runtime

TEXT = (Path(__file__).parents[1] / "docs" / "new_cell.md").read_text()


@pytest.fixture
def mgu(tmp_path, monkeypatch):
    """The cell "mgu", from the document."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "mgu.py").write_text(block)
    monkeypatch.setattr(cells, "__path__", [*cells.__path__, str(tmp_path)])
    monkeypatch.setattr(cells, "NAMES", (*cells.NAMES, "mgu"))
    cells.get.cache_clear()
    importlib.invalidate_caches()
    yield cells.get("mgu")
    cells.get.cache_clear()
    sys.modules.pop(f"{cells.__name__}.mgu")


def test_its_facts_are_read_off_the_page(mgu):
    assert (mgu.G, mgu.S, mgu.K, mgu.separate) == (2, 1, 3, (False, True))


def test_its_gradient_can_be_derived(mgu, rng):
    derived = cells.made("derived", mgu.gates, mgu.states, lambda x, h, state: mgu.step(x, h, state)[0])
    assert (derived.K, derived.separate) == (mgu.K, mgu.separate)
    x, h, state, dnew = ([rng.standard_normal(7) for _ in range(n)] for n in (2, 2, 1, 1))
    results = []
    for cell in (mgu, derived):
        new, saved = cell.step(x, h, state)
        results.append([*new, *(g for group in cell.grad(dnew, new, state, saved) for g in group)])
    np.testing.assert_allclose(*results, rtol=1e-12)


def test_it_runs_with_gradients(mgu, rng):
    x, weights, (h0,) = sequence_arrays(rng, "mgu", 4, 3, 2, 5)
    y, _ = functional.sequence("mgu", x, weights, (h0,), Options())
    h, H = h0, 5
    for t in range(4):  # the published equations, by hand
        a, r = x[t] @ weights.w_ih.T + weights.b_ih, h @ weights.w_hh.T + weights.b_hh
        f = 1 / (1 + np.exp(-a[:, :H] - r[:, :H]))
        h = (1 - f) * h + f * np.tanh(a[:, H:] + f * r[:, H:])
        np.testing.assert_allclose(y[t], h, rtol=1e-12)

    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *weights[:4], h0)]

    def run(x, *rest):
        y, (hT,) = functional.sequence("mgu", x, Weights(*rest[:4]), (rest[4],), Options(reverse=True))
        return y, hT

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
@pytest.mark.parametrize("scope", ["block", "cluster"])
def test_the_resident_kernels_have_it_too(mgu, scope):
    from .resident import Case, errors, libraries, planned, wrong

    case = Case("mgu", "bfloat16", scope, T=3, B=5, H=40)
    plans = planned(case)
    found = errors(case, plans, libraries(case, plans), seed=1)
    assert not wrong(found), found
