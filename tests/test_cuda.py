"""The CUDA backend on a CPU: its kernels under the host runtime, with the driver, plans and arguments of the GPU."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_rnn.backends import cuda
from gpu_rnn.core import arrays, optional_imports
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda import stepwise as plans

from . import calls, cell_struct, cuda_on_cpu, sequences
from .cuda_emulator import runtime, sanitize

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
EVERY = pytest.mark.parametrize("name", cells.NAMES)
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True])
# In half precision, NumPy rounds products and torch doesn't, so both kinds of kernel run. NumPy has no bfloat16.
ARRAYS = pytest.mark.parametrize(
    ("library", "dtype"),
    [("numpy", "float64"), ("numpy", "float32"), ("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16")],
)
SIZES = [  # T, B, I, H: aligned, ragged and degenerate
    (1, 1, 1, 1), (3, 2, 5, 3), (3, 5, 4, 31), (2, 2, 3, 64), (1, 5, 2, 100), (3, 1, 7, 8),
]  # fmt: skip

forward, backward = cuda_on_cpu.per_step_passes()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What was not written is NaN."""
    empty = arrays.empty

    def poisoned(*args, **kwargs):
        array = empty(*args, **kwargs)
        if isinstance(array, np.ndarray):
            array.reshape(-1).view(np.uint8)[...] = 0xFF
        else:
            array.view(-1).view(torch.uint8).fill_(0xFF)
        return array

    monkeypatch.setattr(arrays, "empty", poisoned)


def compare(library, case):
    inputs = case.mapped(torch.Tensor.numpy) if library == "numpy" else case
    sequences.check(case, inputs.run(forward, backward))


@EVERY
@ARRAYS
@BOTH_WAYS
def test_every_result_is_as_good_as_torchs(name, library, dtype, reverse):
    for size in SIZES:
        compare(library, sequences.draw(name, dtype, *size, reverse=reverse))


@ARRAYS
@BOTH_WAYS
def test_projection(library, dtype, reverse):
    for *size, P in ((3, 2, 5, 3, 1), (1, 1, 1, 2, 1), (3, 5, 2, 32, 12)):
        compare(library, sequences.draw("lstm", dtype, *size, P, reverse=reverse))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_is_contiguous(dtype):
    """Gradients neither."""
    case = sequences.draw("lstm", dtype, 3, 2, 5, 4)
    compare("torch", case.mapped(lambda array: array if array.ndim == 1 else array.mT.contiguous().mT))


@EVERY
@pytest.mark.parametrize(
    ("library", "dtype"),
    [("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16"), ("torch", "float32"), ("torch", "tf32")],
)
@BOTH_WAYS
def test_persistent_kernels_are_as_good_as_torch(name, library, dtype, reverse):
    """The weights stay on-chip: in a block, in a cluster, and on a device that has no clusters in the grid."""
    tf32 = dtype == "tf32"
    for device, size in (("h200", (4, 3, 5, 20)), ("h200", (5, 9, 3, 70)), ("a100", (4, 2, 3, 70))):
        launches = []

        def ready(launch):
            launches.append(launch.kernel)  # noqa: B023
            return cuda_on_cpu.prepare_launch(launch)

        forward, backward = cuda_on_cpu.passes(persistent.DEVICES[device], ready)
        case = sequences.draw(name, "float32" if tf32 else dtype, *size, reverse=reverse)
        inputs = case.mapped(torch.Tensor.numpy) if library == "numpy" else case
        sequences.check(case, inputs.run(forward, backward, tf32), tf32=tf32)
        assert set(launches) == {"persistent_forward", "persistent_backward"}


@EVERY
def test_without_biases(name):
    compare("numpy", sequences.draw(name, "float32", 3, 2, 5, 8, bias=False))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_empty_batch(dtype):
    """It trains, as in torch.nn: there are no rows, and the weights' gradients are zero."""
    case, on = sequences.draw("lstm", dtype, 5, 0, 3, 8), persistent.DEVICES["h200"]
    ran = case.run(
        *cuda_on_cpu.passes(on),
    )
    assert ran["y"].shape == (5, 0, 8)
    assert ran["dx"].shape == case.x.shape
    assert not ran["dw_hh"].any()
    for layers in (1, 3):
        problem = Problem(case.cell, 5, 0, 8, 8, dtype=dtype, device="cuda", library="torch", layers=layers)
        plan, why = (cuda.persistent_config if layers == 1 else cuda.wavefront_config)(problem, on, False)
        assert plan is None
        assert "the batch is empty" in why


def test_a_thread_takes_several_rows_of_a_large_batch(monkeypatch):
    monkeypatch.setattr(plans, "MAX_GRID_Y", 1)
    compare("numpy", sequences.draw("lstm", "float32", 2, 70, 3, 8))


def test_arrays_that_are_not_aligned(monkeypatch):
    """An array may begin anywhere: one unit per thread, then."""
    case = sequences.draw("lstm", "float32", 3, 2, 5, 8)
    size = case.dy.numel()
    odd = torch.empty(size + 1)[1:].view(case.dy.shape).copy_(case.dy)
    assert odd.data_ptr() % 16 == 4
    launches = []

    def ready(launch):
        launches.append(launch)
        return cuda_on_cpu.prepare_launch(launch)

    _, backward = cuda_on_cpu.per_step_passes(ready)
    sequences.check(case, case._replace(dy=odd).run(forward, backward))
    assert {dict(launch.unit.defines)["VEC"] for launch in launches} == {"1"}


def test_arrays_that_are_not_contiguous():
    case = sequences.draw("gru", "float32", 3, 2, 5, 8)
    spread = case.mapped(lambda a: torch.stack([a, torch.full_like(a, torch.nan)], -1)[..., 0])
    assert not spread.x.is_contiguous()
    sequences.check(case, spread.run(forward, backward))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_access_outside_an_array_and_no_race(sanitizer):
    """AddressSanitizer watches every access, UBSan its alignment, ThreadSanitizer the order of any two."""
    if (reason := sanitize.why_not(sanitizer)) is not None:
        pytest.skip(reason)
    outcome = sanitize.run(sanitizer, ["-m", "tests.cuda_on_cpu", sanitizer])
    assert not outcome.reports, outcome.output
    assert outcome.returncode == 0, outcome.output


# ---- The cells ------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_cell_struct_equals_the_definition(name, dtype):
    cell_struct.check_cell(cuda_on_cpu.prepare_launch, np.copy, np.asarray, name, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_functions(dtype):
    cell_struct.check_functions(cuda_on_cpu.prepare_launch, np.copy, np.asarray, dtype)


# ---- The plan -------------------------------------------------------------------------------------------------------


@given(
    B=st.integers(0, 10**6),
    H=st.integers(1, 10**5),
    storage=st.sampled_from(arrays.DTYPES),
    offset=st.sampled_from([0, 8]),
)
def test_plan_covers_every_unit(B, H, storage, offset):
    launch = plans.launch(
        "stepwise_forward",
        cells.get("lstm"),
        B=B,
        H=H,
        R=1,
        storage=storage,
        product=storage,
        addresses=(256, offset),
    )
    units = int(dict(launch.unit.defines)["VEC"])
    x, y, _ = launch.block
    assert x * y == plans.THREADS
    assert H <= launch.grid[0] * x * units < H + x * units, "no block without work"
    assert H % units == 0
    assert units == 1 or offset % 16 == 0
    assert launch.grid[1] == max(1, min(-(-B // y), plans.MAX_GRID_Y))
    assert launch.arguments == (256, offset, B, H, 1)


# ---- The backend ----------------------------------------------------------------------------------------------------


STREAM = SimpleNamespace(__cuda_stream__=lambda: (0, 7))  # the caller's


class Cupy:
    """What the backend needs of CuPy, with the host runtime behind it. `entered` is what it has current."""

    def __init__(self):
        self.entered, self.modules = [], []
        self.has_context = False
        properties = {
            "major": 9, "minor": 0, "multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448,
            "cooperativeLaunch": 1,
        }  # fmt: skip
        self.cuda = SimpleNamespace(
            Stream=SimpleNamespace(from_external=self.current),
            Device=self.device,
            runtime=SimpleNamespace(getDeviceProperties=lambda index: properties),
        )

    def device(self, index=None):
        device = self.current("device")
        device.id, device.use = 0, self.use
        return device

    def use(self):
        self.has_context = True

    def queried(self, answer):
        """What the driver says of a kernel, where there is a context."""
        assert self.has_context
        return answer

    @contextmanager
    def current(self, what):
        self.entered.append(what)
        yield
        self.entered.remove(what)

    def RawModule(self, code, options):
        defines = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        library = runtime.compile([runtime.Source("kernels.cu", code)], defines)
        self.modules.append(defines)
        return SimpleNamespace(get_function=partial(self.get_function, library, defines))

    def get_function(self, library, defines, name):
        in_cluster = defines.get("SCOPE") == "1"
        cluster = (int(defines["BLOCKS"]) if in_cluster else 1, 1, 1)  # as the kernel declares it
        function = SimpleNamespace(max_dynamic_shared_size_bytes=48 << 10)

        def kernel(grid, block, arguments, *, shared_mem, enable_cooperative_groups):
            assert self.entered == ["device", STREAM]
            assert shared_mem <= function.max_dynamic_shared_size_bytes
            assert enable_cooperative_groups == (defines.get("SCOPE") == "2")
            kinds = [parameter.kind for parameter in library.parameters(name)]
            values = list(map(cuda_on_cpu.passed, kinds, arguments))
            library.launch(name, grid, block, values, shared=shared_mem, cluster=cluster)

        kernel.ptr = 0
        function.kernel = kernel
        return function


@pytest.fixture
def cupy(monkeypatch):
    """The backend believes in a GPU with CuPy."""
    stand_in, require = Cupy(), optional_imports.require
    monkeypatch.setattr(optional_imports, "no_gpu", lambda: None)
    monkeypatch.setattr(optional_imports, "missing", lambda name: None)
    monkeypatch.setattr(
        optional_imports, "require", lambda name, why: stand_in if name == "cupy" else require(name, why)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    driver = SimpleNamespace(
        blocks=lambda *launch: stand_in.queried(1),
        clusters=lambda *launch: stand_in.queried(99),
        allow_large_clusters=lambda function: stand_in.queried(None),
    )
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "max_active_clusters", lambda shared: persistent.DEVICES["h200"].clusters)
    caches = (
        cuda.module,
        cuda.loaded,
        cuda.device_of,
        cuda.config_of,
        cuda.launcher_of,
    )
    for cached in caches:
        cached.cache_clear()
    yield stand_in
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "T", "H", "kernels"),
    [
        ("float32", 3, 8, "per-step"),
        ("bfloat16", 5, 20, "persistent kernel (cluster"),
        ("bfloat16", 4, 96, "persistent kernel ("),
    ],
)
def test_from_cupy_to_kernel(dtype, T, H, kernels, cupy):
    """All of the backend but CuPy itself and the GPU."""
    case = sequences.draw("lstm", dtype, T, 2, 5, H)
    for training in (True, False):
        problem = Problem(case.cell, T, 2, 5, H, dtype=dtype, device="cuda", library="torch", training=training)
        assert kernels in cuda.plan(problem)
        cuda.warmup(problem)
    compiled = len(cupy.modules)
    sequences.check(case, case.run(cuda.forward, cuda.backward))
    assert len(cupy.modules) == compiled, "warmup has compiled what was needed"
    assert cupy.entered == []


def test_several_at_once_from_cupy_to_kernel(cupy, monkeypatch):
    """Both directions of a layer, and the layers of a stack: chosen, compiled beforehand, and launched with structs."""
    monkeypatch.setattr(cuda, "PROVEN_ONLY", False)
    T, B, H = 6, 2, 140
    cases = [sequences.draw("lstm", "bfloat16", T, B, H, H, reverse=k == 1, seed=k) for k in range(4)]
    cell, options = cases[0].cell, {"dtype": "bfloat16", "device": "cuda", "library": "torch", "training": True}
    both, stack = (Problem(cell, T, B, H, H, **options, **n) for n in ({"directions": 2}, {"layers": 4}))
    assert "2 runs in one launch" in cuda.plan(both)
    assert cuda.plan(stack).count("4 layers as a wavefront") == 2
    assert cuda.fuses_layers(stack, backward=False)
    assert cuda.fuses_layers(stack, backward=True)
    for problem in (both, stack):
        cuda.warmup(problem)
    compiled = len(cupy.modules)
    outputs = calls.forward_many(cuda.forward, cases[:2])
    gradients = calls.backward_many(cuda.backward, cases[:2], outputs)
    for case, (y, last, *_), of_case in zip(cases, outputs, gradients):
        states = {f"{letter}T": state for letter, state in zip(cell.states, last)}
        sequences.check(case, {"y": y} | states | sequences.named(case, of_case))
    ran = calls.forward_many(cuda.forward, cases, linked=True)
    assert torch.allclose(ran[0].y, outputs[0].y, atol=1e-6), "the first layer computes as it does alone"
    *_, last = calls.backward_many(cuda.backward, cases, ran, linked=True, dys=[None, None, None, cases[3].dy])
    case, needs = cases[3], cases[3].needs - {"x"}
    args = cell, ran[2].y, case.weights, case.state, ran[3].y, ran[3].saved, case.dy, case.dlast
    alone = calls.backward(cuda.backward, *args, needs=needs)
    assert all(torch.allclose(last[what], alone[what], atol=0.02) for what in needs), "and so does the last, back"
    assert len(cupy.modules) == compiled, "warmup has compiled what was needed"
    assert cupy.entered == []


def test_every_reason_in_order(monkeypatch):
    monkeypatch.setattr(optional_imports, "no_gpu", lambda: "no GPU")
    monkeypatch.setattr(optional_imports, "missing", lambda name: f"{name} is missing")
    why = cuda.reasons(Problem(cells.get("lstm"), 1, 1, 1, 1, dtype="int8", device="cpu"))
    assert why[:2] == ["no GPU", "cupy is missing"]
    assert ["CPU" in why[2], "int8" in why[3], len(why)] == [True, True, 4]


def test_no_reason_on_a_gpu(cupy):
    for name in cells.NAMES:
        for dtype in arrays.DTYPES:
            problem = Problem(cells.get(name), 5, 4, 3, 2, dtype=dtype, device="cuda", library="torch")
            assert cuda.reasons(problem) == []
            assert ("per-step" if dtype == "float64" else "persistent kernel") in cuda.plan(problem)
            assert bool(cuda.reasons(replace(problem, library="cupy"))) == (dtype == "bfloat16")


def test_why_not_persistent(cupy):
    problem = Problem(cells.get("lstm"), 50, 4, 3, 64, dtype="float32", device="cuda", library="torch")
    assert "persistent kernel" in cuda.plan(problem)
    for changes, reason in (
        ({"P": 3}, "a projection (w_hr) takes a second matmul"),
        ({"T": 2}, "T = 2: fewer than 4 time steps"),
        ({"dtype": "float64"}, "there is no persistent kernel for float64"),
        ({"H": 4096, "tf32": True}, "exceed the on-chip memory"),
    ):
        assert reason in cuda.plan(replace(problem, **changes))
    assert "IEEE float32 matmuls" in cuda.plan(problem)
    assert "TF32 matmuls" in cuda.plan(replace(problem, tf32=True))
