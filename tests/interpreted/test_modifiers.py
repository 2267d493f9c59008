"""Resets, holds, dropout and zoneout in Triton, against a loop in torch that follows the rules."""

import pytest

from gpu_rnn.backends import triton
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.triton import config

from .. import reference_modifiers

EVERY = pytest.mark.parametrize("name", cells.NAMES)
NORMED = pytest.mark.parametrize("options", reference_modifiers.NORMED.values(), ids=reference_modifiers.NORMED)
OPTIONS = pytest.mark.parametrize("options", reference_modifiers.OPTIONS.values(), ids=reference_modifiers.OPTIONS)


@pytest.fixture(params=["stepwise", "sequence"], autouse=True)
def how(request, monkeypatch):
    if request.param == "stepwise":
        monkeypatch.setattr(config, "sequence", lambda *_, **__: (None, "told not to"))
    return request.param


@EVERY
@OPTIONS
def test_every_option(name, options):
    made = reference_modifiers.drawn(name, options, "float32", 5, 3, 4, 6)
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))


@pytest.mark.parametrize("rows", [1, None], ids=["one row", "all rows"])
@pytest.mark.parametrize(("dtype", "H"), [("float64", 3), ("bfloat16", 8), ("float16", 5)])
def test_every_dtype_in_reverse(dtype, H, rows):
    made = reference_modifiers.drawn(
        "lstm", reference_modifiers.OPTIONS["all"], dtype, 6, 18, 3, H, rows=rows, reverse=True
    )
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))


@pytest.mark.parametrize("name", ["lstm", "gru"])
@NORMED
def test_layer_normalization(name, options):
    made = reference_modifiers.drawn(name, options, "float32" if "reset" in options else "bfloat16", 3, 3, 4, 5)
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))


def test_layer_normalization_of_rows_of_several_tiles(how):
    """Where a program goes through a row more than once."""
    if how == "sequence":
        pytest.skip("a row is one tile there")
    made = reference_modifiers.drawn("lstm", reference_modifiers.NORMED["norm"], "float32", 2, 2, 2, 515)
    assert config.step_config(515, "float32", whole=True).block_h < 515
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))
