"""The planner of the resident kernels, for thousands of problems and without a GPU: every plan fits, and covers all."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import residence
from gpu_rnn.kernels.cuda.launch import OPTIONS

from .host import nvrtc

DEVICES = residence.DEVICES
problems = st.tuples(
    st.sampled_from(cells.NAMES),
    st.sampled_from(sorted(residence.SIZES)),
    st.one_of(st.integers(1, 2304), st.sampled_from([128, 256, 512, 768, 1024, 1536, 2048])),
    st.one_of(st.integers(1, 1100), st.sampled_from([1, 8, 32, 64, 128])),
    st.sampled_from(sorted(DEVICES)),
    st.booleans(),
    st.sampled_from([None, *residence.SCOPES]),
)


def planned(cell, dtype, H, B, device, training=True, scope=None):
    page = cells.get(cell)
    return residence.plan(page.G, page.S, dtype, H, B, device, training=training, scope=scope)


@settings(max_examples=4000, deadline=None, derandomize=True)
@given(problems)
def test_every_plan_fits_and_covers(problem):
    cell, dtype, H, B, name, training, scope = problem
    device = DEVICES[name]
    plan, reasons = planned(cell, dtype, H, B, device, training, scope)
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
    k_step = 32 // plan.size
    assert plan.k_splits * (plan.k_registers + plan.k_shared) * k_step >= plan.blocks * plan.units

    # fits: threads, registers, shared memory
    assert plan.threads <= 512
    G = cells.get(cell).G
    assert plan.threads * 4 * G * plan.k_registers <= residence.REGISTER_FILE - plan.threads * residence.WORK_REGISTERS
    for backward in {False, training}:
        assert plan.shared_bytes(backward=backward) <= device.shared_bytes

    # co-resident
    if plan.scope == "block":
        assert plan.blocks == 1
    elif plan.scope == "cluster":
        assert 2 <= plan.blocks <= device.cluster_blocks
    else:
        assert plan.grid <= device.multiprocessors
        assert all(launch.cooperative for launch in launches(plan, cell, dtype, B, H))
    assert plan.microseconds > 0
    assert plan.scope in str(plan)


def launches(plan, cell, dtype, B, H):
    options = {"reverse": False, "save": True, "backward": False}
    return residence.sequence(plan, cells.get(cell), dtype, (), 0, 0, 1, B, H, **options)


def test_small_layers_need_one_block_and_large_ones_the_grid():
    scopes = [planned("lstm", "bfloat16", H, 8, DEVICES["h200"])[0].scope for H in (32, 64, 128, 512, 1024)]
    assert scopes == ["block", "block", "block", "cluster", "grid"]


def test_the_plan_does_not_depend_on_time_and_little_on_batch():
    """What is compiled is the same for batches that differ by rows of a tile."""
    units = {residence.compiled(planned("gru", "float16", 512, B, DEVICES["h200"])[0], cells.get("gru"), "float16")
             for B in range(1, 9)}  # fmt: skip
    assert len(units) == 1


@pytest.mark.parametrize(
    ("problem", "change", "reason"),
    [
        (("lstm", "float64", 64, 8), {}, "float64 has no resident kernel"),
        (("lstm", "bfloat16", 64, 8), {"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        (("lstm", "bfloat16", 4096, 8), {}, "grid: R, 128.0 MiB, does not fit the registers"),
        (("lstm", "bfloat16", 1024, 8), {"cooperative": False}, "grid: this device has no cooperative launch"),
        (
            ("lstm", "bfloat16", 1024, 8),
            {"cluster_blocks": 1, "cooperative": False},
            "cluster: this device has no thread",
        ),
    ],
)
def test_what_does_not_fit_has_its_reasons(problem, change, reason):
    plan, reasons = planned(*problem, dataclasses.replace(DEVICES["h200"], **change))
    assert plan is None
    assert any(reason in text for text in reasons), reasons


def test_a_batch_that_takes_many_launches_is_left_to_one_product_per_step():
    plan, reasons = planned("lstm", "bfloat16", 1536, 128, DEVICES["h200"])
    assert plan is None
    assert "one product per step" in reasons[0]
    assert planned("lstm", "bfloat16", 1536, 128, DEVICES["h200"], scope="grid")[0].launches > 1


def test_an_older_or_shared_device_falls_to_the_next_scale():
    problem = ("lstm", "bfloat16", 256, 8)
    assert planned(*problem, DEVICES["h200"])[0].scope == "cluster"
    assert planned(*problem, DEVICES["a100"])[0].scope == "grid"


# ---- What the compiler makes of the plans -----------------------------------------------------------------------

COMPILED = [  # cell, dtype, H, B: each scope, registers alone and with shared memory, one and more batch tiles
    ("lstm", "bfloat16", 64, 8), ("lstm", "bfloat16", 128, 8), ("lstm", "bfloat16", 512, 16),
    ("lstm", "bfloat16", 1024, 8), ("lstm", "bfloat16", 1024, 64), ("lstm", "float16", 512, 128),
    ("lstm", "float32", 256, 8), ("lstm", "float32", 512, 32), ("gru", "bfloat16", 128, 8),
    ("gru", "bfloat16", 2048, 1), ("gru", "float16", 768, 32), ("gru", "float32", 1024, 64),
    ("rnn_tanh", "bfloat16", 1024, 8), ("rnn_tanh", "float32", 512, 64), ("rnn_relu", "float16", 256, 1),
]  # fmt: skip
ARCHITECTURES = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200", "sm_120": "rtx5090"}


def any_plan(problem, arch):
    """The plan, also where one product per step is predicted to be faster; None where R doesn't fit the chip."""
    device = DEVICES[ARCHITECTURES[arch]]
    return planned(*problem, device)[0] or planned(*problem, device, scope="grid")[0]


COMPILATIONS = [(problem, arch) for problem in COMPILED for arch in ARCHITECTURES if any_plan(problem, arch)]


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))
@pytest.mark.parametrize(
    ("problem", "arch"), COMPILATIONS, ids=lambda p: p if isinstance(p, str) else "-".join(map(str, p))
)
def test_compiles_without_spills(problem, arch):
    cell, dtype, *_ = problem
    plan = any_plan(problem, arch)
    unit = residence.compiled(plan, cells.get(cell), dtype)
    cubin = nvrtc.compile(unit.source, arch, [*OPTIONS[1:], *(f"-D{name}={value}" for name, value in unit.defines)])
    assert not cubin.log
    found = nvrtc.resources(cubin)
    for name in ("resident_forward", "resident_backward"):
        kernel = found[name]
        assert (kernel.stack, kernel.spills, kernel.trap) == (0, 0, False), (name, kernel, str(plan))
        assert kernel.registers * plan.threads <= residence.REGISTER_FILE
        assert kernel.mma > 0
        assert kernel.shared + plan.shared_bytes(backward=True) <= DEVICES[ARCHITECTURES[arch]].shared_bytes
