"""Which backend is chosen, which are refused, and what `explain` says about it."""

import inspect

import numpy as np
import pytest

import gpu_rnn
from gpu_rnn.backends import cudnn, dispatch, native
from gpu_rnn.backends.protocol import Backend
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.codegen import numpy


def problem(cell="lstm", T=8, B=4, I=16, H=32, **options):
    return Problem(cells.get(cell), T, B, I, H, **options)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_cpu_arrays_go_to_native_code_and_to_numpy_without_a_compiler(library, monkeypatch, tmp_path):
    called = problem(library=library)
    if not native.reasons(called):
        assert dispatch.choose(called).NAME == dispatch.explain(called).backend == "native"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    native.library.cache_clear(), native.code.cache_clear()
    called = problem(library=library)
    assert dispatch.choose(called).NAME == "numpy"
    explanation = dispatch.explain(called)
    assert explanation.backend == "numpy"
    assert "not native: no C++ compiler: $CXX is" in str(explanation)


def test_a_forced_backend_raises_all_its_reasons(monkeypatch):
    with pytest.raises(gpu_rnn.BackendError) as error:
        dispatch.choose(problem(), "cuda")
    for reason in dispatch.backend("cuda").reasons(problem()):
        assert f"cuda: {reason}" in str(error.value)
    assert "backend 'cuda' was requested but does not support lstm T=8 B=4 I=16 H=32 float32 on cpu (numpy)" in str(
        error.value
    )
    monkeypatch.setenv("GPU_RNN_BACKEND", "triton")
    with pytest.raises(gpu_rnn.BackendError, match="backend 'triton' was requested"):
        dispatch.choose(problem())
    assert dispatch.choose(problem(), "numpy").NAME == "numpy", "an argument overrules the environment"
    with pytest.raises(gpu_rnn.BackendError, match="backend 'triton' was requested"):
        dispatch.choose(problem(), "auto")  # as captured calls name it
    monkeypatch.setenv("GPU_RNN_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        gpu_rnn.lstm(np.ones((1, 1, 1)), np.ones((4, 1)), np.ones((4, 1)))


def test_nothing_is_moved_to_another_device():
    with pytest.raises(gpu_rnn.BackendError, match="numpy: not available for arrays on the GPU"):
        dispatch.choose(problem(device="cuda", library="torch"), "numpy")


def test_the_explanation_is_complete():
    text = str(dispatch.explain(problem(H=512), "numpy"))
    assert "backend: numpy (requested)" in text
    assert " elementwise NumPy calls per time step" in text
    explanation = dispatch.explain(problem(H=512))
    assert explanation.backend == dispatch.choose(problem(H=512)).NAME
    text = str(explanation)
    assert f"backend: {explanation.backend} (first available for numpy arrays on this device)" in text
    assert "cuDNN would use: STANDARD" in text
    for name in ("cuda", "triton"):
        assert explanation.reasons[name]
        assert f"not {name}: {explanation.reasons[name][0]}" in text
    nowhere = dispatch.explain(problem(device="cuda", library="torch"), "numpy")
    assert nowhere.backend is None
    assert "backend: none, numpy was requested and does not support this call" in str(nowhere)


def test_the_plan_tells_the_program_that_runs():
    """A few time steps take the weights as they lie, and more calls for it."""
    for T, arrangement in ((4, numpy.torch_layout), (512, numpy.layout)):
        cell = cells.get("lstm")
        calls = len(numpy.step_program(cell, arrangement(cell)).calls)
        assert f" {calls} elementwise NumPy calls" in dispatch.explain(problem(T=T), "numpy").plan
    assert calls == 8


def test_backends_have_one_signature():
    modules = [dispatch.backend(name) for name in dispatch.ORDER]
    for name in (name for name in vars(Backend) if not name.startswith("_") and not name.isupper()):
        signatures = [inspect.signature(getattr(module, name)).parameters.values() for module in modules]
        first, *others = [[(p.name, p.kind) for p in parameters] for parameters in signatures]
        assert all(other == first for other in others), name
    assert [module.NAME for module in modules] == list(dispatch.ORDER)
    assert all(isinstance(flag, bool) for module in modules for flag in (module.RUNS_HEADS, module.REPEATS_INPUTS))


CUDNN = [
    # cell, options, expected; the rules of FIELD: projection, packed, small hidden sizes, the fp16 corner
    ("lstm", {"H": 128, "P": 64}, {}, "STANDARD"),
    ("lstm", {"H": 64}, {"packed": True}, "STANDARD"),
    ("lstm", {"H": 192}, {}, "PERSIST_STATIC_SMALL_H"),
    ("lstm", {"H": 193}, {}, "STANDARD"),
    ("lstm", {"H": 192, "training": True}, {}, "STANDARD"),
    ("lstm", {"H": 128, "training": True}, {"layers": 3, "directions": 2}, "PERSIST_STATIC_SMALL_H"),
    ("gru", {"H": 128, "training": True}, {}, "PERSIST_STATIC_SMALL_H"),
    ("rnn_tanh", {"H": 384}, {}, "PERSIST_STATIC_SMALL_H"),
    ("rnn_relu", {"H": 257, "training": True}, {}, "STANDARD"),
    ("lstm", {"H": 64, "dtype": "float64"}, {}, "STANDARD"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {}, "PERSIST_STATIC"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "bfloat16"}, {}, "STANDARD"),
    ("lstm", {"H": 512, "I": 500, "B": 64, "dtype": "float16"}, {}, "STANDARD"),
    ("lstm", {"H": 520, "I": 512, "B": 64, "dtype": "float16"}, {}, "STANDARD"),
    ("lstm", {"H": 1024, "I": 512, "B": 128, "dtype": "float16"}, {}, "PERSIST_STATIC"),
    ("lstm", {"H": 1152, "I": 512, "B": 128, "dtype": "float16"}, {}, "STANDARD"),
    ("lstm", {"H": 1024, "I": 512, "B": 136, "dtype": "float16"}, {}, "STANDARD"),
    ("lstm", {"H": 1024, "I": 512, "B": 12, "dtype": "float16"}, {}, "STANDARD"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {"layers": 2}, "STANDARD"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {"directions": 2}, "STANDARD"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {"multiprocessors": 80}, "STANDARD"),
    ("lstm", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {"capability": (8, 6)}, "STANDARD"),
    ("gru", {"H": 512, "I": 512, "B": 64, "dtype": "float16"}, {}, "STANDARD"),
    ("rnn_tanh", {"H": 896, "I": 512, "B": 88, "dtype": "float16"}, {}, "PERSIST_STATIC"),
    ("rnn_tanh", {"H": 896, "I": 512, "B": 96, "dtype": "float16"}, {}, "STANDARD"),
    ("rnn_tanh", {"H": 768, "I": 512, "B": 96, "dtype": "float16"}, {}, "PERSIST_STATIC"),
]


@pytest.mark.parametrize(("cell", "sizes", "options", "expected"), CUDNN)
def test_the_algorithm_torch_asks_cudnn_for(cell, sizes, options, expected):
    assert cudnn.algorithm(problem(cell, **sizes), **options) == expected
