"""The cells of docs/new_cell.md in Triton."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels.triton import plan

from .. import own, woven


@pytest.mark.parametrize("how", ["stepwise", "sequence"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", own.CELLS)
def test_every_result_is_as_good_as_torchs(name, dtype, how, monkeypatch):
    monkeypatch.setattr(woven, "published", own.published)
    if how == "stepwise":
        monkeypatch.setattr(plan, "sequence", lambda *_, **__: (None, "told not to"))
    made = own.case(name, {}, dtype, 5, 3, 4, 6, reverse=dtype == "float32")
    woven.check(made, made.case.run(triton.forward, triton.backward))
