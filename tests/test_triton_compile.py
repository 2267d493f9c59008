"""Triton's kernels compiled for GPUs that aren't here: they fit, don't spill, and use tensor cores."""

import os
import re
from itertools import product

import numpy as np
import pytest
import torch

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.mathematics import mean, tanh
from gpu_rnn.kernels.triton import config as plans

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

from triton.runtime.jit import MockTensor

from gpu_rnn.backends import triton as backend
from gpu_rnn.backends.per_step import Step
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels.triton import persistent, stepwise

from . import calls, constants, fake_gpu

STORED = {name: MockTensor(getattr(torch, name)) for name in ("float64", "float32", "float16", "bfloat16")}
LARGE = 1 << 33  # elements: more than int32 counts


def extra(cell, real):
    """units, flags, seed, where the cell takes them."""
    return (
        real if cell.per_unit_params else None,
        MockTensor(torch.uint8) if cell.flags else None,
        MockTensor(torch.int64) if cell.uniforms else None,
    )


def compiled_step(monkeypatch, capability, name, dtype, H, backward):
    cell, array = cells.get(name).kernel_cell, STORED[dtype]
    real = STORED["float64" if dtype == "float64" else "float32"]
    block_b, block_h, num_warps, maxnreg = plans.step_config(H, dtype, whole=cell.has_reduction)
    language = getattr(triton.language, "float64" if dtype == "float64" else "float32")
    if backward:
        kernel, cell_constants = stepwise.grad_kernel, backend.backward_constexprs(cell)
        separate, history = array if any(cell.separate) else None, array if cell.E else None
        args = (array, real, real, real, array, array, real, array, array, separate, history, real)
        args = (*args, *extra(cell, real), 5, 4, 5, 6, 6)
    else:
        kernel, cell_constants = stepwise.step_kernel, backend.forward_constexprs(cell)
        operand = array if cell.recurrent_input else None
        args = (array, real, array, real, real, array, array, operand, *extra(cell, real), 5, 5, 6, 6)
    constants = (*cell_constants, language, block_b, block_h)
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": True}
    return fake_gpu.compiled(monkeypatch, capability, kernel, *args, 33, H, 33, *constants, **options)


def compiled_sequence(monkeypatch, capability, name, dtype, H, backward, precision="ieee"):
    cell, array, real = cells.get(name).kernel_cell, STORED[dtype], STORED["float32"]
    chosen, _ = plans.sequence(cell, H, dtype, fake_gpu.SHARED_MEMORY[capability], backward=backward)
    if backward:
        kernel, cell_constants = persistent.backward_kernel, backend.backward_constexprs(cell)
        separate, history = array if any(cell.separate) else None, array if cell.E else None
        args = (array, array, real, real, array, array, real, array, array, separate, history, real)
    else:
        kernel, cell_constants = persistent.forward_kernel, backend.forward_constexprs(cell)
        args = (array, array, array, array, real, array, array)
    constants = (*cell_constants, H, chosen.rows, chosen.tile, precision, chosen.stages)
    binary = fake_gpu.compiled(
        monkeypatch, capability, kernel, *args, *extra(cell, real), 1000, 33, 33, 0, *constants,
        num_warps=chosen.num_warps, maxnreg=chosen.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip
    most = plans.sequence_bytes(cell, chosen.tile, dtype, chosen.rows, chosen.stages, backward=backward)
    assert binary.metadata.shared <= most, "the plan knows how much shared memory it needs"
    return binary


BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@BACKWARD
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [*product(cells.NAMES, ["bfloat16"], [90]), *product(["lstm"], STORED, [80, 100]), ("gru", "float64", 90)],
)
def test_a_time_step(monkeypatch, name, dtype, capability, backward):
    for H in (512, 33) if capability == 90 else (100,):
        binary = compiled_step(monkeypatch, capability, name, dtype, H, backward)
        fake_gpu.check(binary, capability, products=False)


ALL = "lstm+dropout+hold+reset+reset_state+zoneout(0.1,0.05)"
BEFORE = "gru+before+dropout+hold+reset+reset_state+zoneout(0.1)"


MOST = "lstm+clip(1.0)+dropout+hold+norm+peephole+reset+reset_state+zoneout(0.1,0.05)"


@BACKWARD
@pytest.mark.parametrize(
    ("name", "dtype", "capability", "H"),
    [
        (ALL, "bfloat16", 90, 100),
        (ALL, "float64", 90, 100),
        ("gru+hold+reset", "float32", 90, 100),
        (BEFORE, "bfloat16", 90, 100),
        # Of cells that take means; all H of several tiles share a binary, but for those that aren't divisible.
        ("lstm+norm", "bfloat16", 90, 100),
        ("lstm+norm", "float64", 100, 1001),
        ("gru+norm", "float32", 90, 512),
        (MOST, "bfloat16", 100, 100),
        (MOST, "float32", 90, 2048),
        (MOST, "float64", 80, 4096),
        (MOST, "float64", 120, 4095),
    ],
)
def test_a_time_step_with_modifiers(monkeypatch, name, dtype, capability, H, backward):
    binary = compiled_step(monkeypatch, capability, name, dtype, H, backward)
    fake_gpu.check(binary, capability, products=False)


@BACKWARD
@pytest.mark.parametrize(("name", "dtype", "H"), [("lstm", "bfloat16", 512), ("rnn_tanh", "float32", 33)])
def test_a_time_step_has_read_what_it_overwrites(monkeypatch, name, dtype, H, backward):
    """By whichever thread; the interpreter has but one."""
    code = compiled_step(monkeypatch, 90, name, dtype, H, backward).asm["ttgir"]
    reading, writing = re.split(r"\b(?:ttg|gpu)\.barrier\b", code)
    assert ("tt.load" in reading, "tt.store" in reading) == (True, False)
    assert ("tt.load" in writing, "tt.store" in writing) == (False, True)
    assert H % 16 or "convert_layout" not in code, "threads exchange nothing"


def test_a_flag_is_found_beyond_int32(monkeypatch):
    """T B may be more than int32 counts."""
    code = compiled_step(monkeypatch, 90, "rnn_tanh+reset", "float32", 64, False).asm["ttir"]
    assert not re.search(r"arith\.muli %\w+, %B : i32", code)


def test_nan_survives_a_maximum(monkeypatch):
    """On a GPU, unlike in the interpreter, that is an instruction of its own."""
    binary = compiled_step(monkeypatch, 90, "rnn_relu", "float32", 64, False)
    assert "max.NaN.f32" in binary.asm["ptx"]
    assert "max.f32" not in binary.asm["ptx"]


@BACKWARD
def test_a_constant_has_the_precision_of_what_is_computed(monkeypatch, backward):
    """Also where Triton would take it for float32, as in a maximum."""
    constants.define(monkeypatch)
    for name in ("constants", "lstm+clip(0.7)"):
        code = compiled_step(monkeypatch, 90, name, "float64", 33, backward).asm["ttir"]
        written = {
            abs(float(value)) for value in re.findall(r"arith\.constant (?:dense<)?(-?[\d.eE+-]+)>? : .*f64", code)
        }
        assert 0.7 in written or backward  # which has what was decided by a bound, and not the bound
        for value in (0.1, 0.37, 0.7, 1.1, 2.1):
            assert float(np.float32(value)) not in written


@BACKWARD
@pytest.mark.parametrize("shared", [False, True], ids=["a constant", "the same for all units"])
def test_a_sequence_with_a_state_that_is_no_tile(monkeypatch, shared, backward):
    def step(x, h, state):
        return tanh(x[0] + h[0] + state[1]), mean(tanh(x[0])) if shared else 0.7

    monkeypatch.setattr(cells, "REGISTERED", dict(cells.REGISTERED))
    name = cells.register(cells.make_cell("flat" if shared else "fixed", "a", "hc", step)).name
    binary = compiled_sequence(monkeypatch, 90, name, "float32", 32, backward)
    fake_gpu.check(binary, 90, products=False)


# The largest H of a row of the plan, or a ragged one in the same tile, so that every row has both.
SEQUENCES = [
    ("lstm", "bfloat16", {80: 128, 90: 100, 100: 128}), ("lstm", "float32", {80: 50, 90: 33, 100: 64}),
    ("gru", "bfloat16", {80: 100, 90: 128, 100: 128}), ("gru", "float32", {80: 64, 90: 50, 100: 64}),
    ("rnn_tanh", "bfloat16", {80: 256, 90: 256, 100: 252}), ("rnn_tanh", "float32", {80: 128, 90: 100, 100: 128}),
    ("lstm", "float16", {90: 128, 89: 64}), ("rnn_relu", "float16", {90: 16}),
]  # fmt: skip


@BACKWARD
@pytest.mark.parametrize(
    ("name", "dtype", "capability", "H"),
    [(name, dtype, capability, H) for name, dtype, sizes in SEQUENCES for capability, H in sizes.items()],
)
def test_a_sequence(monkeypatch, name, dtype, capability, H, backward):
    binary = compiled_sequence(monkeypatch, capability, name, dtype, H, backward)
    fake_gpu.check(binary, capability, products=dtype != "float32")


@BACKWARD
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        (ALL, "bfloat16", 80),
        ("lstm+hold+reset", "float32", 90),
        ("lstm+reset", "bfloat16", 100),
        ("rnn_tanh+dropout+zoneout(0.1)", "float16", 100),
        ("gru+hold+reset", "bfloat16", 90),
        ("gru+before+dropout+hold+reset", "bfloat16", 90),
        ("lstm+norm", "bfloat16", 100),
        ("gru+hold+norm", "bfloat16", 80),
        ("gru+norm", "float32", 90),
    ],
)
def test_the_largest_sequences_with_modifiers(monkeypatch, name, dtype, capability, backward):
    """The largest H that the plan takes, and the largest that is ragged; larger ones spill."""
    memory = fake_gpu.SHARED_MEMORY[capability]
    fits = [
        H for H in range(1, 600) if plans.sequence(cells.get(name).kernel_cell, H, dtype, memory, backward=backward)[0]
    ]
    for H in (max(fits), max(H for H in fits if H % 16)):
        binary = compiled_sequence(monkeypatch, capability, name, dtype, H, backward)
        fake_gpu.check(binary, capability, products=dtype != "float32")


@pytest.mark.parametrize(("dtype", "H"), [("bfloat16", 15), ("float32", 16)], ids=["loaded", "copied ahead"])
def test_a_sequence_has_read_what_it_overwrites(monkeypatch, dtype, H):
    """`saved` may be `Wx`, and another thread may write an element than the one that read it."""
    reading = compiled_sequence(monkeypatch, 90, "lstm", dtype, H, False).asm["ptx"].partition("st.global")[0]
    assert "bar.sync" in re.split(r"ld\.global|cp\.async\.c", reading)[-1]


@BACKWARD
@pytest.mark.parametrize(("name", "H", "capability"), [("lstm", 64, 90), ("lstm", 33, 80), ("rnn_tanh", 100, 100)])
def test_float32_on_tensor_cores(monkeypatch, name, H, capability, backward):
    binary = compiled_sequence(monkeypatch, capability, name, "float32", H, backward, precision="tf32")
    fake_gpu.check(binary, capability, products=True)


def test_what_a_gpu_can_hold():
    def chosen(name, H, dtype, capability, backward):
        return plans.sequence(cells.get(name), H, dtype, fake_gpu.SHARED_MEMORY[capability], backward=backward)[0]

    largest = {"bfloat16": [256, 128, 128], "float32": [128, 64, 64], "float64": [0, 0, 0]}
    for backward, capability, dtype in product((False, True), (80, 90, 100), largest):
        for name, H in zip(("rnn_tanh", "gru", "lstm"), largest[dtype], strict=True):
            fits = [n for n in range(1, 600) if chosen(name, n, dtype, capability, backward)]
            assert max(fits, default=0) == H
            assert set(range(1, min(H, 64) + 1)) | set(range(4, H + 1, 4)) == set(fits)
    assert chosen("lstm", 128, "bfloat16", 90, True).stages == 3
    assert chosen("lstm", 128, "bfloat16", 80, True).stages == 1
    assert chosen("lstm", 128, "bfloat16", 89, True) is None


def test_what_a_gpu_can_hold_beside_the_gates():
    def largest(name, dtype):
        cell = cells.get(name).kernel_cell
        fits = [n for n in range(1, 600) if plans.sequence(cell, n, dtype, 232448, backward=True)[0]]
        step = 16 // plans.ITEM_BYTES[dtype]
        assert fits == [*range(step, max(fits, default=0) + 1, step)]
        return max(fits, default=0)

    assert [largest(f"{name}+hold+reset", "bfloat16") for name in ("rnn_tanh", "gru", "lstm")] == [128, 128, 128]
    assert [largest("rnn_tanh+reset", dtype) for dtype in ("float16", "float32")] == [256, 64]
    assert [largest(name, "bfloat16") for name in (ALL, BEFORE, "gru+norm", "lstm+norm", MOST)] == [64, 0, 64, 64, 0]
    assert [largest(name, "float32") for name in (ALL, BEFORE, "gru+norm", "lstm+norm", MOST)] == [0, 0, 32, 32, 0]
    for name, H, why in (
        ("lstm+reset", 100, "lstm[reset] with rows of 100 bfloat16 numbers, no multiple of 16 bytes"),
        ("lstm+reset", 256, "lstm[reset] has 7 live values per time step at H = 256"),
        ("lstm+hold+norm", 64, "lstm[lengths, layer_norm] has 13 live values per time step plus reductions at H = 64"),
    ):
        result = plans.sequence(cells.get(name), H, "bfloat16", 232448, backward=True)
        assert result == (None, f"too many registers: {why}")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("H", [1, 2, 3, 16, 100, 128, 1000])
def test_the_threads_of_a_time_step_hold_16_bytes(H, dtype):
    """Or half of that, where rows are whole."""
    item = {"float64": 8, "float32": 4}[dtype]
    for whole in (False, True):
        block_b, block_h, num_warps, _ = plans.step_config(H, dtype, whole=whole)
        assert block_b * block_h * item == (8 if whole else 16) * 32 * num_warps
        assert block_h < 2 * H


def test_a_driver_that_does_not_start_is_a_reason(monkeypatch):
    """Triton builds it, and needs a C compiler and Python's headers."""

    class Broken(fake_gpu.Driver):
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("gpu_rnn.core.optional_imports.no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for driver, reasons in (
        (fake_gpu.Driver, []),
        (Broken, ["Triton's driver for the GPU doesn't start: RuntimeError: Failed to find C compiler"]),
    ):
        monkeypatch.setattr(triton.runtime.driver, "_active", driver(90))
        assert backend.unsupported_reasons.__wrapped__() == reasons


@pytest.mark.parametrize("H", [12, 300], ids=["sequence", "time step"])
def test_no_length_and_no_batch_compiles_anything(monkeypatch, H):
    """Nor where in a larger tensor the caller's begin, which is a matter of B."""
    monkeypatch.setattr(triton.runtime.driver, "_active", fake_gpu.Driver(90, []))
    kernels = persistent.forward_kernel, persistent.backward_kernel, stepwise.step_kernel, stepwise.grad_kernel
    for kernel in kernels:
        kernel.device_caches.clear()
    cell = cells.get("rnn_tanh+hold+zoneout(0.1)")
    w_hh, b_hh = torch.zeros(H, H), torch.zeros(H)
    for T, B, at in ((1, 1, 0), (16, 16, 0), (3, 5, 0), (2, 3, 1)):
        whole, flags = torch.zeros(at + T * B * H), torch.zeros(at + T * B, dtype=torch.uint8)
        x, h0 = whole[at:].view(T, B, H), whole[at : at + B * H].view(B, H)
        seed = torch.zeros(2, dtype=torch.int64)[at : at + 1]
        weights = Weights(None, w_hh, None, b_hh, flags=flags[at:].view(T, B), seed=seed)
        y, last, saved = calls.forward(backend.forward, cell, x, weights, (h0,), reverse=False, save=True)
        calls.backward(backend.backward, cell, x, weights, (h0,), y, saved, x, last, reverse=False, needs={"w_hh"})
    compiled = [len(kernel.device_caches[0][0]) for kernel in kernels if kernel.device_caches[0][0]]
    assert compiled == [1, 1]


def test_later_launches_pass_what_the_first_one_passed(monkeypatch):
    """They go around Triton's own launcher, which looks at every argument again."""
    launches = []
    monkeypatch.setattr(triton.runtime.driver, "_active", fake_gpu.Driver(90, launches))
    stepwise.step_kernel.device_caches.clear()
    cell, (T, B, H) = cells.get("lstm"), (3, 5, 7)
    buffers = Step(
        Wx=torch.empty(T, B, 4, H), Rh=torch.empty(B, 4, H), b_hh=None, h=torch.empty(B, H),
        cell_states=torch.empty(T + 1, 1, B, H), saved=torch.empty(T, B, 4, H), y=torch.empty(T, B, H),
        recurrent_input=None, units=None, flags=None, seed=None,
    )  # fmt: skip
    step = backend.bind(cell, buffers)
    for t in range(T):
        step(t, t, t + 1, t + 1)
    kernel, constants = stepwise.step_kernel, len(Step._fields)  # then t state_in state_out t_next, then B H ...
    first, second, third = ([*launch[:3], *launch[9:]] for launch in launches)
    at = 3 + constants
    assert first[:at] == second[:at] == third[:at]
    assert [launch[at : at + 4] for launch in (first, second, third)] == [[0, 0, 1, 1], [1, 1, 2, 2], [2, 2, 3, 3]]
    assert first[at + 4 :] == second[at + 4 :] == third[at + 4 :]
    assert len(first) == 3 + len(kernel.arg_names)
