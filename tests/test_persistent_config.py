"""Configurations of persistent kernels, for thousands of problems, without a GPU: every plan fits, and covers all."""

import dataclasses
from functools import partial
from itertools import product
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import nvrtc
from gpu_rnn.backends import cuda, gpu_common
from gpu_rnn.backends.per_step import AuxInputs
from gpu_rnn.core import arrays, optional_imports
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import OPTIONS

from . import reference_modifiers, test_gpu
from .persistent import check_machine_code

DEVICES = persistent.DEVICES
DTYPES = (*sorted(persistent.ITEMSIZE), "ieee")  # which is float32 not as TF32
problems = st.tuples(
    st.sampled_from(cells.NAMES),
    st.sampled_from(DTYPES),
    st.one_of(st.integers(1, 2304), st.sampled_from([128, 256, 512, 768, 1024, 1536, 2048])),
    st.one_of(st.integers(1, 1100), st.sampled_from([1, 8, 32, 64, 128])),
    st.sampled_from(sorted(DEVICES)),
    st.booleans(),
    st.sampled_from([None, *persistent.SCOPES]),
)


def planned(cell, dtype, H, B, device, backward=True, scope=None):
    definition, ieee = cells.get(cell).kernel_cell, dtype == "ieee"
    counts = persistent.registers_per_element, persistent.reductions
    element, reductions = (count_of(definition, backward=backward) for count_of in counts)
    options = {"backward": backward, "ieee": ieee, "scope": scope, "reductions": reductions}
    return persistent.select(definition.G, element, stored(dtype), H, B, device, **options)


def stored(dtype):
    return "float32" if dtype == "ieee" else dtype


@settings(max_examples=4000, deadline=None, derandomize=True)
@given(problems)
def test_every_plan_fits_and_covers(problem):
    cell, dtype, H, B, name, backward, scope = problem
    device = DEVICES[name]
    plan, reasons = planned(cell, dtype, H, B, device, backward, scope)
    if plan is None:
        assert reasons
        return
    assert not reasons
    assert scope in (None, plan.scope)

    # every hidden unit and batch row once: block r of a group has units [r U, (r+1) U), group g rows [g NB, (g+1) NB)
    if plan.scope != "cluster":  # whose size is a power of two
        assert (plan.blocks - 1) * plan.units < H
    assert plan.blocks * plan.units >= H
    rows_per_launch = plan.groups * plan.rows
    assert (plan.launches - 1) * rows_per_launch < B <= plan.launches * rows_per_launch
    k_step = 32 // plan.itemsize
    assert plan.k_splits * plan.k_tiles * k_step >= plan.blocks * plan.values * plan.units
    assert plan.ieee == (dtype == "ieee")

    # fits: threads, registers, shared memory
    assert plan.threads <= 512
    G = cells.get(cell).G
    assert (
        plan.threads * 4 * G * plan.k_registers
        <= persistent.REGISTER_FILE - plan.threads * persistent.WORK_REGISTERS[plan.scope]
    )
    assert plan.shared_bytes <= device.shared_bytes
    assert (plan.k_chunks - 1) * -(-plan.k_tiles // plan.k_chunks) < plan.k_tiles, "no chunk is empty"
    assert plan.k_chunks == 1 or plan.scope == "grid"

    # co-resident
    if plan.scope == "block":
        assert plan.blocks == 1
    elif plan.scope == "cluster":
        assert 2 <= plan.blocks <= device.cluster_blocks
    else:
        assert plan.grid <= device.multiprocessors
        assert all(launch.cooperative for launch in launches(plan, cell, stored(dtype), B, H))
    assert plan.predicted_us > 0
    assert plan.scope in str(plan)


def launches(plan, cell, dtype, B, H):
    return persistent.launches(plan, cells.get(cell), dtype, 1, B, H, 1, save=True)


def test_cupy_takes_the_arguments(monkeypatch):
    """It refuses arrays of several elements, and words it doesn't know, before it needs a driver or the kernel."""
    function = pytest.importorskip("cupy.cuda.function").Function
    plan = persistent.select(4, 16, "bfloat16", 64, 8, DEVICES["h200"], backward=False)[0]
    member = persistent.Instance((1 << 40, *range(16)), True)
    kernel = partial(function.__new__(function), stream=SimpleNamespace(ptr=0))
    monkeypatch.setattr(cuda, "prepare_kernel", lambda *launch: SimpleNamespace(kernel=kernel))
    kernel.ptr, most = 0, iter((0, 132, 132))
    monkeypatch.setattr(cuda, "coresident", lambda *kernel: next(most))
    (launch,) = persistent.launches(plan, cells.get("lstm"), "bfloat16", 1, 8, 64, 1, save=True)
    with pytest.raises(RuntimeError, match=r"cooperative launch of \d+ blocks of \d+ threads, .* holds 0 at once"):
        cuda.prepare_launch(launch._replace(cooperative=True))
    for members in ([member], [member, member]):
        words = persistent.kernel_params(members)
        for how in (launch, launch._replace(cooperative=True)):
            with pytest.raises(RuntimeError, match=r"cuda|CUDA"):  # as there is none
                cuda.prepare_launch(how)(words, 1 << 40)
        assert words.tobytes() == np.array([(*m.addresses, 1) for m in members], np.uint64).tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "RawModule.get_function", "RawKernel.kernel", "RawKernel.max_dynamic_shared_size_bytes",
        "cuda.function.Function.ptr", "cuda.Device.id", "cuda.Device.use", "cuda.runtime.getDeviceProperties",
    ],
)  # fmt: skip
def test_cupy_has_what_is_called_of_it(name):
    """What tests without a GPU put a stand-in for."""
    assert attrgetter(name)(pytest.importorskip("cupy")) is not None


def test_small_layers_take_a_cluster_or_a_block_and_large_ones_the_grid():
    scopes = [planned("lstm", "bfloat16", H, 8, DEVICES["h200"], False)[0].scope for H in (32, 64, 128, 512, 1024)]
    assert scopes == ["cluster", "cluster", "cluster", "cluster", "grid"]
    assert planned("lstm", "bfloat16", 32, 8, DEVICES["a100"], False)[0].scope == "block"
    many = planned("lstm", "bfloat16", 32, 2048, DEVICES["h200"], False)[0]
    assert many.scope == "block", "a cluster for each of 256 tiles would wait for its turn"


def test_the_plan_does_not_depend_on_time_and_little_on_batch():
    """What is compiled is the same for batches that differ by rows of a tile."""
    plans = [planned("gru", "float16", 512, B, DEVICES["h200"])[0] for B in range(1, 9)]
    units = {persistent.translation_unit(plan, cells.get("gru"), "float16") for plan in plans}
    assert len(units) == 1


@pytest.mark.parametrize(
    ("problem", "change", "reason"),
    [
        (("lstm", "float64", 64, 8), {}, "there is no persistent kernel for float64"),
        (("lstm", "bfloat16", 64, 8), {"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        (("lstm", "bfloat16", 4096, 8), {}, "grid scope: the recurrent weights (128.0 MiB) exceed"),
        (("lstm", "bfloat16", 1024, 8), {"cooperative": False}, "grid scope: this GPU has no cooperative launch"),
        (
            ("lstm", "bfloat16", 1024, 8),
            {"clusters": (), "cooperative": False},
            "cluster scope: this GPU has no thread",
        ),
    ],
)
def test_what_does_not_fit_has_its_reasons(problem, change, reason):
    plan, reasons = planned(*problem, dataclasses.replace(DEVICES["h200"], **change))
    assert plan is None
    assert any(reason in text for text in reasons), reasons


def test_a_batch_that_takes_many_launches_is_left_to_one_product_per_step():
    plan, reasons = planned("lstm", "bfloat16", 1536, 256, DEVICES["h200"])
    assert plan is None
    assert "by per-step kernels" in reasons[0]
    assert planned("lstm", "bfloat16", 1536, 256, DEVICES["h200"], scope="grid")[0].launches > 1


@pytest.mark.parametrize("H", [1536, 1792, 2048])
def test_large_layers_train_on_the_chip(H):
    """Backward's operand comes in pieces."""
    plan, _ = planned("lstm", "bfloat16", H, 8, DEVICES["h200"])
    assert plan.scope == "grid"
    assert plan.k_shared > 0
    assert planned("lstm", "bfloat16", 2048, 8, DEVICES["h200"])[0].k_chunks > 1


MODIFIED = [(test_gpu.MODIFIED, option) for option in reference_modifiers.OPTIONS.values()]
MODIFIED += [(test_gpu.NORMALIZED, option) for option in reference_modifiers.NORMED.values()]


def only(scope, device):
    return dataclasses.replace(DEVICES[device], scopes=tuple({scope} & {*persistent.SCOPES}))


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_the_gpu_tests_have_what_they_are_for(device):
    """They run unattended, so what they expect of plans is compared with these beforehand."""
    for name, dtype in product(cells.NAMES, persistent.ITEMSIZE):
        for size in test_gpu.PERSISTENT:
            problem = test_gpu.problem_of(name, dtype, size)
            assert None not in test_gpu.plans(problem, DEVICES[device]), problem
        for scope, size in test_gpu.BOTH_AT_ONCE.items():
            problem, on = test_gpu.problem_of(name, dtype, size, directions=2), only(scope, device)
            assert [plan.directions for plan in test_gpu.plans(problem, on)] == [2, 2], problem
    for scope, H in test_gpu.LONG.items():
        problem = test_gpu.problem_of("gru", "float16", (3000, 4, 3, H))
        assert None not in test_gpu.plans(problem, only(scope, device)), problem
    for dtype, (cases, options) in product(("bfloat16", "float32"), MODIFIED):
        for scope, (name, T, B, H) in cases.items():
            cell = reference_modifiers.drawn(name, options, dtype, T, B, 7, H).case.cell
            problem = Problem(cell, T, B, 7, H, dtype=dtype, device="cuda", library="torch", training=True)
            expected = [scope if scope in persistent.SCOPES else None] * 2
            assert [plan and plan.scope for plan in test_gpu.plans(problem, only(scope, device))] == expected, problem
    for case in test_gpu.SEVERAL_LAUNCHES:
        assert test_gpu.plans(test_gpu.problem_of(*case), DEVICES[device])[0].launches > 1, case
    grid = test_gpu.plans(test_gpu.problem_of(*test_gpu.MOST_OF_THE_GRID), DEVICES[device])[0].grid
    assert 2 * grid > DEVICES[device].multiprocessors


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    ("scope", "fill"), [(scope, fill) for scope, fills in test_gpu.FILLS.items() for fill in fills]
)
def test_the_causes_that_gpu_tests_tell_apart(scope, fill, directions):
    """Each plan is what the name of its case says."""
    for precision, name in product(test_gpu.PRECISIONS, cells.NAMES):
        problem, on = test_gpu.isolated(name, precision, directions, scope, fill, DEVICES["h200"])
        for plan in test_gpu.plans(problem, on):
            assert plan, problem
            assert (plan.scope, plan.directions, plan.ieee) == (scope, directions, precision == "ieee")
            assert (plan.launches > 1) == (fill == "launches"), plan
            weights = plan.threads * max(1, 4 * plan.gates * plan.k_registers)
            at_once = min(
                2048 // plan.threads, persistent.REGISTER_FILE // weights, on.shared_bytes // plan.shared_bytes
            )
            beyond = plan.grid > at_once * DEVICES["h200"].multiprocessors
            assert beyond == (fill in ("waves", "crowded")), (plan, at_once)


def test_an_older_or_shared_device_falls_to_the_next_scale():
    problem = ("lstm", "bfloat16", 256, 8)
    assert planned(*problem, DEVICES["h200"])[0].scope == "cluster"
    assert planned(*problem, DEVICES["a100"])[0].scope == "grid"


# ---- The driver has the last word -------------------------------------------------------------------------------


def verified(H, device, occupancy):
    definition = cells.get("lstm")
    options = {"backward": True, "ieee": False, "occupancy": occupancy}
    registers = persistent.registers_per_element(definition, backward=True)
    return persistent.select_verified(definition.G, registers, "bfloat16", H, 8, DEVICES[device], **options)


def test_a_driver_that_agrees_is_queried_once():
    for H in (64, 512, 1024):
        queried = []
        plan, reasons = verified(H, "h200", lambda plan: queried.append(plan) or 1000)  # noqa: B023
        assert plan == planned("lstm", "bfloat16", H, 8, DEVICES["h200"])[0]
        assert (len(queried), reasons) == (0 if plan.scope == "block" else 1, ())


def test_fewer_clusters_than_thought_change_the_plan():
    """Down to none of a size: then another size, then the grid."""
    plan, reasons = verified(256, "h200", lambda plan: 0 if plan.scope == "cluster" else 132)
    assert plan.scope == "grid"
    assert "cluster scope: needs 8 clusters of 16 blocks co-resident, but the CUDA driver reports 0" in reasons
    plan, reasons = verified(256, "h200", lambda plan: 1)  # queues for one place
    assert plan.scope == "cluster"
    assert "the CUDA driver reports 1" in reasons[0]


@pytest.mark.parametrize("count", [0, 20, 63, 64, 66, 131])
def test_a_grid_never_has_more_blocks_than_the_driver_holds(count):
    """A part of a device: as long as the weights fit it, on fewer multiprocessors; else not persistent."""
    plan, reasons = verified(1024, "h200", lambda plan: count if plan.scope == "grid" else 0)
    assert plan is None or plan.grid <= count
    assert (plan is None) == (count < 32)
    if plan is None:
        assert reasons


def test_another_plan_than_announced_is_no_secret():
    cuda.config_of.cache_clear()
    arguments = (cells.get("lstm"), "bfloat16", 512, 8, 1, DEVICES["h200"], False, False)
    with pytest.warns(RuntimeWarning, match=r"the CUDA driver reports 0; using persistent kernel \(grid"):
        plan, _ = cuda.config_of(*arguments, lambda cell, dtype, plan: 0 if plan.scope == "cluster" else 132)
    assert plan.scope == "grid"
    with pytest.warns(RuntimeWarning, match="the CUDA driver reports 0; .*; using per-step kernels instead"):
        assert cuda.config_of(*arguments, lambda cell, dtype, plan: 0)[0] is None


class Library:
    """libcuda, as much as is called of it."""

    def __init__(self, count=0, status=0):
        self.count, self.status, self.calls = count, status, []

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, count, function, threads, shared):
        count._obj.value = self.count
        self.calls.append((function.value, threads, shared.value))
        return self.status

    def cuOccupancyMaxActiveClusters(self, count, function, launch):
        config = launch._obj
        count._obj.value = self.count
        self.calls.append((function.value, config.grid_x, config.block_x, config.shared, config.attribute_count))
        return self.status

    def cuFuncSetAttribute(self, function, attribute, value):
        self.calls.append((function.value, attribute, value))
        return self.status


def driver(library):
    made = object.__new__(cuda.Driver)
    made.library = library
    return made


def test_queries_of_the_driver():
    library = Library(count=3)
    assert driver(library).blocks(7, 256, 1000) == 3
    assert driver(library).clusters(7, 16, 256, 1000) == 3
    driver(library).allow_large_clusters(7)
    assert library.calls == [(7, 256, 1000), (7, 16, 256, 1000, 0), (7, 14, 1)]
    assert driver(Library(count=3, status=cuda.Driver.INVALID_CLUSTER_SIZE)).clusters(7, 16, 256, 1000) == 0
    for question in ("blocks", "clusters"):
        with pytest.raises(RuntimeError, match="CUresult 1"):
            getattr(driver(Library(status=1)), question)(7, *([16] if question == "clusters" else []), 256, 1000)


def test_a_part_of_a_device_has_its_own_numbers(monkeypatch):
    """As MIG and MPS report them: fewer multiprocessors, and clusters of 16 fit nowhere."""
    properties = {
        "major": 9, "minor": 0, "multiProcessorCount": 60, "sharedMemPerBlockOptin": 232448, "cooperativeLaunch": 1,
    }  # fmt: skip

    class Driver:
        def allow_large_clusters(self, function):
            assert function == 16

        def blocks(self, function, threads, shared):
            return 1

        def clusters(self, function, blocks, threads, shared):
            return 60 // blocks if blocks < 16 else 0

    def function(name):
        return SimpleNamespace(kernel=SimpleNamespace(ptr=int(name.removeprefix("cluster_of_"))))

    cupy = SimpleNamespace(
        RawModule=lambda code, options: SimpleNamespace(get_function=function),
        cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceProperties=lambda index: properties)),
    )
    monkeypatch.setattr(optional_imports, "require", lambda name, why: cupy)
    monkeypatch.setattr(cuda, "driver", Driver)
    on = cuda.device_of.__wrapped__(0, persistent.SCOPES, False)
    assert on == persistent.Device((9, 0), 60, 232448, ((2, 30), (4, 15), (8, 7)))
    assert planned("lstm", "bfloat16", 512, 8, on)[0].blocks <= 60


# ---- What the compiler makes of the plans -----------------------------------------------------------------------

WITH_MODIFIERS = "lstm+dropout+hold+reset+reset_state+zoneout(0.1,0.05)"
BEFORE = "gru+before+dropout+hold+reset+reset_state+zoneout(0.1)"
NORMED = "lstm+dropout+hold+norm+peephole+reset+reset_state+zoneout(0.1,0.05)"
COMPILED = [  # cell, dtype, H, B: each scope, registers alone and with shared memory, one and more batch tiles
    ("lstm", "bfloat16", 64, 8), ("lstm", "bfloat16", 128, 8), ("lstm", "bfloat16", 512, 16),
    ("lstm", "bfloat16", 1024, 8), ("lstm", "bfloat16", 1024, 64), ("lstm", "float16", 512, 128),
    ("lstm", "float32", 768, 64), ("lstm", "bfloat16", 2048, 32),  # in chunks
    ("lstm", "float32", 256, 8), ("lstm", "float32", 512, 32), ("gru", "bfloat16", 128, 8),
    ("gru", "bfloat16", 2048, 1), ("gru", "float16", 768, 32), ("gru", "float32", 1024, 64),
    ("rnn_tanh", "bfloat16", 1024, 8), ("rnn_tanh", "float32", 512, 64), ("rnn_relu", "float16", 256, 1),
    ("lstm", "bfloat16", 2048, 8), ("lstm", "ieee", 64, 4), ("lstm", "ieee", 256, 8), ("lstm", "ieee", 1024, 8),
    ("gru", "ieee", 512, 32), ("rnn_tanh", "ieee", 256, 16),
    (WITH_MODIFIERS, "bfloat16", 128, 8), (WITH_MODIFIERS, "bfloat16", 512, 32), (WITH_MODIFIERS, "float32", 512, 8),
    ("gru+hold+reset", "bfloat16", 1024, 8), (WITH_MODIFIERS, "ieee", 256, 8),
    ("gru+before", "bfloat16", 512, 8), (BEFORE, "float32", 256, 8), (BEFORE, "bfloat16", 1024, 8),
    ("lstm+norm", "bfloat16", 64, 8), ("lstm+norm", "bfloat16", 512, 16), ("gru+norm", "float32", 512, 32),
    (NORMED, "bfloat16", 256, 8), ("gru+norm", "bfloat16", 1024, 64), ("lstm+norm", "ieee", 256, 8),
    # 3 n + 1 rows in a batch tile of the grid: the last word has data of one
    ("gru", "bfloat16", 1024, 64), ("lstm", "float32", 512, 100), ("rnn_tanh", "bfloat16", 2048, 64),
    ("rnn_relu", "float32", 1024, 100), ("rnn_relu", "ieee", 2048, 7), ("gru", "ieee", 512, 100),
    ("lstm", "ieee", 512, 100),
]  # fmt: skip
ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}


def any_plan(problem, arch, backward):
    """The plan, also where one product per step is predicted to be faster; None where R doesn't fit the chip."""
    device = DEVICES[ARCHITECTURES[arch]]
    return planned(*problem, device, backward)[0] or planned(*problem, device, backward, scope="grid")[0]


OTHERS = ("sm_80", "sm_100", "sm_120")  # each problem is compiled for one of them in turn, and for sm_90
COMPILATIONS = [
    (problem, arch, backward)
    for k, problem in enumerate(COMPILED)
    for backward in (False, True)
    for arch in ("sm_90", OTHERS[(k + backward) % 3])
    if any_plan(problem, arch, backward)
]


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize(
    ("problem", "arch", "backward"),
    COMPILATIONS,
    ids=lambda p: "-".join(map(str, p)) if isinstance(p, tuple) else {False: "forward", True: "backward"}.get(p, p),
)
def test_compiles_without_spills(problem, arch, backward):
    cell, dtype, *_ = problem
    plan = any_plan(problem, arch, backward)
    kernel = check_machine_code(plan, cells.get(cell).kernel_cell, stored(dtype), arch)
    assert (kernel.mma > 0) == (dtype != "ieee")
    assert kernel.shared + plan.shared_bytes <= DEVICES[ARCHITECTURES[arch]].shared_bytes


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rows", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm+norm"])
def test_data_and_flag_are_one_access(name, rows, backward):
    """In small kernels, for batch tiles with and without rows for all data of the last word."""
    cell, ieee, dtype = cells.get(name).kernel_cell, rows < 8, "float32" if rows < 8 else "bfloat16"
    cost = persistent.cell_cost(cell, dtype, backward=backward, ieee=ieee)
    plans = persistent.candidates("grid", backward, cost, 128, 32, DEVICES["h200"])
    check_machine_code(next(plan for plan in plans if plan.rows == rows), cell, dtype, "sm_90")


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("members", ["one direction", "both", "layers"])
def test_arguments_are_as_large_as_the_parameters(members, backward):
    """A launch copies as many bytes from where an argument lies as the parameter has, whatever it was given."""
    cell, on = cells.get("lstm"), DEVICES["h200"]
    element, T, B, H = persistent.registers_per_element(cell, backward=backward), 256, 8, 512
    plan, _ = persistent.select(cell.G, element, "bfloat16", H, B, on, backward=backward)
    if members == "both":
        plan, _ = persistent.fuse_runs(plan, 2, B, on)
    elif members == "layers":
        plan, _ = persistent.select_wavefront(cell.G, element, "bfloat16", H, T, B, 3, on, backward=backward)
    kind, ordered = (
        (gpu_common.BackwardBuffers, cuda.backward_args) if backward else (gpu_common.ForwardBuffers, cuda.forward_args)
    )
    blank = kind(*[None] * len(kind._fields))._replace(aux=AuxInputs())
    member = persistent.Instance(tuple(map(arrays.pointer, ordered(blank))), reverse=False)
    (launch,) = persistent.launches(plan, cell, "bfloat16", T, B, H, 1, save=True)
    arguments = *launch.arguments, persistent.kernel_params([member] * plan.instances), 0
    options = [*OPTIONS, *(f"-D{name}={value}" for name, value in launch.unit.defines)]
    sizes = nvrtc.parameters(nvrtc.compile(launch.unit.source, "sm_90", options))
    assert sizes[launch.kernel] == [8 if isinstance(a, int) else a.nbytes for a in arguments]


def test_benchmarks_compile_the_exchange_alone_and_the_product_alone():
    plan, _ = planned("lstm", "bfloat16", 1024, 8, DEVICES["h200"])
    instructions = {}
    for only in ("exchange", "product"):
        unit = persistent.translation_unit(plan, cells.get("lstm"), "bfloat16", only)
        options = [*OPTIONS[1:], *(f"-D{name}={value}" for name, value in unit.defines)]
        code = nvrtc.sass(nvrtc.compile(unit.source, "sm_90", options))["persistent_backward"]
        instructions[only] = "HMMA" in code, "STRONG.GPU" in code
    assert instructions == {"exchange": (False, True), "product": (True, False)}
