"""The resident kernels on the CPU: every scope, cell and dtype against the oracle; races; every barrier needed."""

import numpy as np
import pytest

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import residence

from . import on_host
from .host import mutate, runtime, sanitize
from .resident import CUDA, Case, errors, library, planned, wrong

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
SOURCE = (CUDA / "resident.cu").read_text()
EVERY_CELL = pytest.mark.parametrize("cell", cells.NAMES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", residence.SIZES)
EVERY_SCOPE = pytest.mark.parametrize("scope", residence.SCOPES)


@EVERY_CELL
@EVERY_DTYPE
@EVERY_SCOPE
def test_equals_the_oracle(cell, dtype, scope):
    """Ragged in H and B, both directions of time, training and inference, several schedules."""
    H = {"block": 20, "cluster": 50, "grid": 35}[scope]
    for reverse, save in ((False, True), (True, True), (True, False)):
        case = Case(cell, dtype, scope, T=3, B=5, H=H, reverse=reverse, save=save)
        plan = planned(case)
        kernels = library(case, plan)
        for seed in (0, 1, 2) if save else (3,):
            found = errors(case, plan, kernels, seed)
            assert not wrong(found), (case, seed, found)


@EVERY_SCOPE
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 17), (4, 16, 32), (2, 19, 70), (7, 1, 33)])
def test_shapes(scope, T, B, H):
    """One instant, full tiles, several batch tiles, one row."""
    if scope == "block":
        H = min(H, 40)
    case = Case("lstm", "bfloat16", scope, T, B, H)
    plan = planned(case)
    found = errors(case, plan, library(case, plan), seed=1)
    assert not wrong(found), found


def test_weights_in_shared_memory_and_many_rows_a_group():
    """Plans that the planner gives to larger problems, forced onto a small one."""
    case = Case("lstm", "bfloat16", "cluster", T=3, B=20, H=48)
    for numbers in (
        {"blocks": 2, "unit_tiles": 2, "k_splits": 2, "k_registers": 1, "k_shared": 1, "batch_tiles": 3},
        {"blocks": 4, "unit_tiles": 1, "k_splits": 1, "k_registers": 0, "k_shared": 5, "batch_tiles": 2},
        {"blocks": 4, "unit_tiles": 1, "k_splits": 4, "k_registers": 1, "k_shared": 0, "batch_tiles": 1},
    ):
        groups = -(-case.B // (8 * numbers["batch_tiles"]))
        for scope in ("cluster", "grid"):
            plan = residence.Residence(
                scope=scope, **numbers, gates=4, size=2, groups=groups, launches=1, waves=1, microseconds=0.0
            )
            found = errors(case, plan, library(case, plan), seed=2)
            assert not wrong(found), (plan, found)


def test_a_grid_that_does_not_fit_takes_several_launches():
    small = residence.Device((9, 0), 4, 232448)
    case = Case("gru", "float16", "grid", T=3, B=100, H=20)
    plan = planned(case, small)
    assert plan.launches > 1
    assert plan.grid <= small.multiprocessors
    found = errors(case, plan, library(case, plan), seed=1, resident_blocks=small.multiprocessors)
    assert not wrong(found), found


def test_a_grid_that_is_not_resident_would_hang_and_is_reported():
    case = Case("gru", "float16", "grid", T=3, B=8, H=40)
    plan = planned(case)
    with pytest.raises(runtime.HostError, match="have not started"):
        errors(case, plan, library(case, plan), resident_blocks=plan.blocks - 1)


def test_two_runs_are_bitwise_equal():
    """Under different schedules: no sum depends on who comes first."""
    case = Case("gru", "bfloat16", "cluster", T=4, B=9, H=40)
    plan = planned(case)
    kernels = library(case, plan)
    assert errors(case, plan, kernels, seed=1) == errors(case, plan, kernels, seed=9)


@EVERY_SCOPE
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(scope, sanitizer):
    if (reason := sanitize.why_not(sanitizer)) is not None:
        pytest.skip(reason)
    outcome = sanitize.run(sanitizer, ["-m", "tests.resident", "--sanitizer", sanitizer, "lstm", "bfloat16", scope])
    assert not outcome.reports, outcome.reports[0].text
    assert outcome.returncode == 0, outcome.output


NAMES = (*mutate.BARRIERS, "home.await", "home.publish")
BARRIERS = mutate.barriers(SOURCE, NAMES)


def scopes_of(barrier: mutate.Barrier) -> list[str]:
    """The scopes whose code has this barrier: by the preprocessor's conditions around it."""
    active: list[tuple[str, ...]] = [residence.SCOPES]
    for line in SOURCE.splitlines()[: barrier.line]:
        words = line.split()
        if line.startswith("#if SCOPE =="):
            active.append((words[3].lower(),))
        elif line.startswith("#elif SCOPE =="):
            active[-1] = (words[3].lower(),)
        elif line.startswith("#else"):
            active[-1] = tuple(s for s in residence.SCOPES if s not in active[-1])
        elif line.startswith("#if"):
            active.append(residence.SCOPES)
        elif line.startswith("#endif"):
            active.pop()
    if barrier.text.startswith("home.await"):
        active.append(("cluster", "grid"))  # a block alone has nothing to wait for
    return [scope for scope in residence.SCOPES if all(scope in allowed for allowed in active)]


@pytest.mark.parametrize("n", range(len(BARRIERS)), ids=[f"line{b.line}-{b.text.split('(')[0]}" for b in BARRIERS])
def test_every_barrier_is_needed(n, tmp_path):
    """Without it some schedule gives wrong numbers, hangs, or races, in every scope that has it."""
    broken = runtime.Source("resident.cu", mutate.without(SOURCE, n, NAMES))
    for scope in scopes_of(BARRIERS[n]):
        assert caught(scope, broken, tmp_path), f"{scope} doesn't need {BARRIERS[n]}"


def caught(scope: str, broken: runtime.Source, tmp_path) -> bool:
    case = Case("lstm", "bfloat16", scope, T=4, B=5, H=40)
    plan = planned(case)
    kernels = library(case, plan, kernel=broken)
    for seed in range(1, 9):
        try:
            if wrong(errors(case, plan, kernels, seed, max_switches=2_000_000)):
                return True
        except runtime.HostError:
            return True
    if sanitize.why_not("thread") is not None:
        return False
    path = tmp_path / "resident.cu"
    path.write_text(broken.text)
    arguments = ["-m", "tests.resident", "--sanitizer", "thread", "--source", str(path), "lstm", "bfloat16", scope]
    return bool(sanitize.run("thread", arguments).reports)


def test_swapped_fragments_are_caught():
    """Exchange two registers of an operand: the results must be wrong."""
    swaps = {
        "the halves of a row": ("const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;",
                                "const int row = lane / 4 + i / 2 * 8, k = lane % 4 * 2 + i % 2 * 8;"),
        "the columns of two k tiles": ("&b[n][2 * next]", "&b[n][2 - 2 * next]"),
        "rows and columns of the sums": ("lane / 4 + i / 2 * 8, row = n * 8 + lane % 4 * 2 + i % 2",
                                         "lane / 4 + i % 2 * 8, row = n * 8 + lane % 4 * 2 + i / 2"),
    }  # fmt: skip
    case = Case("lstm", "bfloat16", "block")
    for what, (right, swapped) in swaps.items():
        assert right in SOURCE, what
        broken = runtime.Source("resident.cu", SOURCE.replace(right, swapped))
        plan = planned(case)
        assert wrong(errors(case, plan, library(case, plan, kernel=broken))), what


def test_nan_travels():
    """A NaN in one batch row of x reaches that row's outputs from then on, and no other row."""
    case = Case("lstm", "float16", "cluster", T=3, B=4, H=40)
    plan = planned(case)
    cell, kernels = cells.get("lstm"), library(case, plan)
    rng = np.random.default_rng(0)
    xg = rng.standard_normal((3, 4, 4, 40)).astype(np.float16)
    xg[1, 2, 0, 7] = np.nan
    fragments = np.empty((plan.fragments, 4), np.uint32)
    R = (rng.standard_normal((160, 40)) / 6).astype(np.float16)
    y, others = np.zeros((3, 4, 40), np.float16), np.zeros((1, 1, 4, 40), np.float32)
    h0 = np.zeros((4, 40), np.float16)
    pack = residence.pack(plan, cell, "float16", R.ctypes.data, fragments.ctypes.data, 40, backward=False)
    on_host.execute(kernels, pack, seed=1)
    addresses = (xg.ctypes.data, fragments.ctypes.data, 0, h0.ctypes.data, others.ctypes.data, 0, y.ctypes.data)
    options = {"reverse": False, "save": False, "backward": False}
    (launch,) = residence.sequence(plan, cell, "float16", addresses, 0, 0, 3, 4, 40, **options)
    on_host.execute(kernels, launch, seed=1)
    expected = np.zeros((3, 4, 40), bool)
    expected[1, 2, 7] = True  # its own unit at once, all units of the row an instant later
    expected[2, 2] = True
    assert (np.isnan(y) == expected).all()
