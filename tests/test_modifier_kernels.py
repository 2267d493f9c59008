"""Resets, holds, dropout and zoneout by every backend, against a loop in torch that follows the rules."""

from functools import partial

import pytest

from gpu_rnn.backends import cuda, per_step
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda import stepwise as plans

from . import cuda_on_cpu, reference_modifiers
from .cuda_emulator import runtime

EVERY = pytest.mark.parametrize("name", cells.NAMES)
NORMED = pytest.mark.parametrize("options", reference_modifiers.NORMED.values(), ids=reference_modifiers.NORMED)
OPTIONS = pytest.mark.parametrize("options", reference_modifiers.OPTIONS.values(), ids=reference_modifiers.OPTIONS)
on_host_runtime = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))


def by_steps(case):
    return case.run(
        *cuda_on_cpu.per_step_passes(),
    )


@pytest.fixture(params=persistent.SCOPES)
def persistent_run(request, monkeypatch):
    """A case's `run` by the persistent kernels of a scope."""
    monkeypatch.setattr(persistent, "select", partial(persistent.select, scope=request.param))
    on = persistent.DEVICES["h200"]
    cuda.config_of.cache_clear()
    yield lambda case: case.run(
        *cuda_on_cpu.passes(on),
    )
    cuda.config_of.cache_clear()


PERSISTENT = [("lstm", option) for option in reference_modifiers.OPTIONS] + [
    ("gru", "all"),
    ("rnn_tanh", "all"),
    ("rnn_relu", "reset_state"),
]
PERSISTENT += [(name, option) for name in ("lstm", "gru") for option in reference_modifiers.NORMED]


@on_host_runtime
@pytest.mark.parametrize(("name", "option"), PERSISTENT)
def test_cuda_persistent(name, option, persistent_run, monkeypatch):
    options = (reference_modifiers.OPTIONS | reference_modifiers.NORMED)[option]
    monkeypatch.setattr(per_step, "run_forward", None)  # which would be no test
    made = reference_modifiers.drawn(name, options, "bfloat16", 5, 9, 4, 20, reverse=name == "gru")
    reference_modifiers.check(made, persistent_run(made.case))


@on_host_runtime
def test_cuda_persistent_in_float32_with_one_row_for_all(persistent_run):
    made = reference_modifiers.drawn("lstm", reference_modifiers.OPTIONS["all"], "float32", 6, 3, 4, 18, rows=1)
    reference_modifiers.check(made, persistent_run(made.case))


@on_host_runtime
@EVERY
@OPTIONS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_cuda_stepwise(name, options, reverse):
    made = reference_modifiers.drawn(name, options, "float32", 5, 3, 4, 6, reverse=reverse)
    reference_modifiers.check(made, by_steps(made.case))


@on_host_runtime
@pytest.mark.parametrize("rows", [1, None], ids=["one row", "all rows"])
@pytest.mark.parametrize(("dtype", "H"), [("float64", 3), ("bfloat16", 8), ("float16", 5)])
def test_cuda_stepwise_in_every_dtype(dtype, H, rows):
    made = reference_modifiers.drawn("lstm", reference_modifiers.OPTIONS["all"], dtype, 6, 4, 3, H, rows=rows)
    reference_modifiers.check(made, by_steps(made.case))


@on_host_runtime
@pytest.mark.parametrize("options", ["reset", "reset_state", "hold", "dropout"])
def test_cuda_stepwise_with_a_projection(options):
    made = reference_modifiers.drawn("lstm", reference_modifiers.OPTIONS[options], "float64", 6, 4, 3, 5, P=2)
    reference_modifiers.check(made, by_steps(made.case))


@EVERY
@OPTIONS
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_numpy(name, options, reverse):
    projected = 4 if name == "lstm" and "zoneout" not in options else None
    for B, rows, P in ((3, None, None), (2, 1, None), (1, None, projected)):
        made = reference_modifiers.drawn(name, options, "float32", 5, B, 4, 6, P, rows=rows, reverse=reverse)
        reference_modifiers.check(made, made.case.run(numpy_backend.forward, numpy_backend.backward))


@pytest.mark.parametrize("name", ["lstm", "gru"])
@NORMED
def test_numpy_with_layer_normalization(name, options):
    for dtype, B, H, reverse in (("float32", 3, 6, False), ("float32", 1, 5, True), ("bfloat16", 2, 4, False)):
        made = reference_modifiers.drawn(name, options, dtype, 5, B, 4, H, reverse=reverse)
        reference_modifiers.check(made, made.case.run(numpy_backend.forward, numpy_backend.backward))


@on_host_runtime
@pytest.mark.parametrize("name", ["lstm", "gru"])
@NORMED
def test_cuda_stepwise_with_layer_normalization(name, options):
    for dtype, H in (("float32", 8), ("bfloat16", 3)) if name == "lstm" else (("float16", 66),):
        made = reference_modifiers.drawn(name, options, dtype, 4, 3, 4, H, reverse=name == "gru")
        reference_modifiers.check(made, by_steps(made.case))


@on_host_runtime
def test_rows_longer_than_a_block_can_see_at_once():
    made = reference_modifiers.drawn("gru", {"norm": True}, "float32", 2, 2, 3, 1030, rows=1)
    reference_modifiers.check(made, by_steps(made.case))


@on_host_runtime
@pytest.mark.parametrize("H", [6, 40])
def test_more_rows_than_blocks(H, monkeypatch):
    """A block takes several rows one after the other; no row reads the sums of another one."""
    monkeypatch.setattr(plans, "MAX_GRID_Y", 1)
    made = reference_modifiers.drawn("gru", {"norm": True}, "float32", 2, 70, 3, H)
    reference_modifiers.check(made, by_steps(made.case))
