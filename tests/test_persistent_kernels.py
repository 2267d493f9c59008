"""Persistent kernels on the CPU: every scope, cell and dtype against the NumPy backend; races; every barrier needed."""

import ctypes
from functools import cache

import numpy as np
import pytest

from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import cuda_on_cpu
from .cuda_emulator import mutate, runtime, sanitize
from .persistent import SOURCE, Case, errors, forced, libraries, planned, sources, variants, wrong, zeros

pytestmark = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
EVERY_CELL = pytest.mark.parametrize("cell", cells.NAMES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [*persistent.ITEMSIZE, "ieee"])
EVERY_SCOPE = pytest.mark.parametrize("scope", persistent.SCOPES)


@EVERY_CELL
@EVERY_DTYPE
@EVERY_SCOPE
def test_equals_the_numpy_backend(cell, dtype, scope):
    """Ragged in H and B, both directions of time, training and inference, several schedules."""
    H = {"block": 20, "cluster": 50, "grid": 35}[scope]
    for reverse, save in ((False, True), (True, True), (True, False)):
        case = Case(cell, dtype, scope, T=3, B=5, H=H, reverse=reverse, save=save)
        plans = planned(case)
        kernels = libraries(case, plans)
        for seed in (0, 1, 2) if save else (3,):
            result = errors(case, plans, kernels, seed)
            assert not wrong(result), (case, seed, result)


@EVERY_SCOPE
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 17), (4, 16, 32), (2, 19, 70), (7, 1, 33)])
def test_shapes(scope, T, B, H):
    """One time step, full tiles, several batch tiles, one row."""
    if scope == "block":
        H = min(H, 40)
    case = Case("lstm", "bfloat16", scope, T, B, H)
    plans = planned(case)
    result = errors(case, plans, libraries(case, plans), seed=1)
    assert not wrong(result), result


@pytest.mark.parametrize("name", ["lstm+norm", "gru+norm"])
@EVERY_SCOPE
def test_reductions_over_units(name, scope):
    """Layer normalization, whose groups reduce several times within a time step; ragged, and several rows a group."""
    H = 40 if scope == "block" else 70
    for dtype, B, reverse, seed in (("bfloat16", 5, False, 1), ("float32", 11, True, 2), ("ieee", 3, False, 3)):
        case = Case(name, dtype, scope, T=4, B=B, H=H, reverse=reverse)
        plans = planned(case)
        result = errors(case, plans, libraries(case, plans), seed)
        assert not wrong(result), (case, result)


@EVERY_SCOPE
def test_reductions_of_many_tiles_and_rows(scope):
    shape = {"blocks": 1 if scope == "block" else 18 if scope == "grid" else 4, "k_splits": 2, "batch_tiles": 2}
    H = 16 * shape["blocks"] * 2 - 3
    case = Case("lstm+norm", "float16", scope, T=3, B=19, H=H)
    plans = forced(case, unit_tiles=2, k_shared=1, **shape)
    result = errors(case, plans, libraries(case, plans), seed=4)
    assert not wrong(result), result


@pytest.mark.parametrize("dtype", ["bfloat16", "ieee"])
@pytest.mark.parametrize(
    "shape",
    [
        {"blocks": 2, "unit_tiles": 2, "k_splits": 2, "k_shared": 1, "batch_tiles": 3},
        {"blocks": 4, "unit_tiles": 1, "k_splits": 1, "k_shared": 3, "batch_tiles": 2},
        {"blocks": 4, "unit_tiles": 1, "k_splits": 2, "batch_tiles": 1},
        {"blocks": 2, "unit_tiles": 2, "k_splits": 8, "batch_tiles": 1},
    ],
)
def test_weights_in_shared_memory_many_rows_a_group_and_operands_in_pieces(dtype, shape):
    for scope, pieces in (("cluster", (1, 1)), ("grid", (1, 2)), ("grid", (2, 4))):
        case = Case("lstm", dtype, scope, T=3, B=20, H=48)
        plans = forced(case, k_chunks=pieces, **shape)
        if plans[0].k_tiles < pieces[0]:
            continue
        result = errors(case, plans, libraries(case, plans), seed=2)
        assert not wrong(result), (plans, result)


def test_a_grid_that_does_not_fit_takes_several_launches():
    small = persistent.Device((9, 0), 4, 232448)
    case = Case("gru", "float16", "grid", T=3, B=100, H=20)
    plans = planned(case, small)
    for plan in plans:
        assert plan.launches > 1
        assert plan.grid <= small.multiprocessors
    result = errors(case, plans, libraries(case, plans), seed=1, resident_blocks=small.multiprocessors)
    assert not wrong(result), result


def test_a_grid_that_is_not_co_resident_would_hang_and_is_reported():
    case = Case("gru", "float16", "grid", T=3, B=8, H=40)
    plans = planned(case)
    with pytest.raises(runtime.HostError, match="have not started"):
        errors(case, plans, libraries(case, plans), resident_blocks=plans[0].blocks - 1)


@pytest.mark.parametrize(("name", "scope"), [("gru", "cluster"), ("lstm+norm", "cluster"), ("gru+norm", "grid")])
def test_two_runs_are_bitwise_equal(name, scope):
    """Under different schedules: no sum depends on which block comes first."""
    case = Case(name, "bfloat16", scope, T=4, B=9, H=40)
    plans = planned(case)
    kernels = libraries(case, plans)
    assert errors(case, plans, kernels, seed=1) == errors(case, plans, kernels, seed=9)


@EVERY_SCOPE
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_sanitizers_find_nothing(scope, sanitizer):
    if (reason := sanitize.why_not(sanitizer)) is not None:
        pytest.skip(reason)
    outcome = sanitize.run(
        sanitizer, ["-m", "tests.persistent", "--sanitizer", sanitizer, "lstm+norm", "bfloat16", scope]
    )
    assert not outcome.reports, outcome.reports[0].text
    assert outcome.returncode == 0, outcome.output


NAMES = (*mutate.BARRIERS, "receive", "recurrent.send", "team_sync")
BARRIERS = mutate.barriers(SOURCE, NAMES)
REDUCTION = "mean"  # the function that reduces over hidden units


def scopes_of(barrier: mutate.Barrier) -> list[str]:
    """The scopes whose code has this barrier: by the preprocessor's conditions around it."""
    active: list[tuple[str, ...]] = [persistent.SCOPES]
    for line in SOURCE.splitlines()[: barrier.line]:
        words = line.split()
        if line.startswith("#if SCOPE =="):
            active.append((words[3].lower(),))
        elif line.startswith("#elif SCOPE =="):
            active[-1] = (words[3].lower(),)
        elif line.startswith("#else"):
            active[-1] = tuple(s for s in persistent.SCOPES if s not in active[-1])
        elif line.startswith("#if"):
            active.append(persistent.SCOPES)
        elif line.startswith("#endif"):
            active.pop()
    if barrier.text.startswith("receive"):
        active.append(("cluster", "grid"))  # a single block has nothing to wait for
    if "team_sync" in (barrier.function, barrier.text.split("(")[0]):
        active.append(("grid",))
    return [scope for scope in persistent.SCOPES if all(scope in allowed for allowed in active)]


@cache
def switchable(cell: str, scope: str) -> list:
    """Compile once for all barriers, which a launch leaves out one of; with all of them the kernels are right."""
    kernel = runtime.Source("persistent.cu", mutate.switchable(SOURCE, NAMES))
    compiled = [(*case, libraries(*case, kernel=kernel)) for case in variants(cell, "bfloat16", scope)]
    assert not any(wrong(errors(*case, seed=1)) for case in compiled)
    return compiled


@pytest.mark.parametrize("n", range(len(BARRIERS)), ids=[f"line{b.line}-{b.text.split('(')[0]}" for b in BARRIERS])
def test_every_barrier_is_needed(n, tmp_path):
    """Without it some schedule gives wrong numbers, hangs, or races, in every scope that has it."""
    for scope in scopes_of(BARRIERS[n]):
        cell = "lstm+norm" if BARRIERS[n].function == REDUCTION else "lstm"
        assert caught(cell, scope, n, tmp_path), f"{scope} doesn't need {BARRIERS[n]}"


def caught(cell: str, scope: str, n: int, tmp_path) -> bool:
    for case in switchable(cell, scope):
        for seed in range(1, 9):
            try:
                if wrong(errors(*case, seed, max_switches=2_000_000, without=n)):
                    return True
            except runtime.HostError:
                return True
    if sanitize.why_not("thread") is not None:
        return False
    path = tmp_path / "persistent.cu"
    path.write_text(mutate.without(SOURCE, n, NAMES))
    arguments = ["-m", "tests.persistent", "--sanitizer", "thread", "--source", str(path), cell, "bfloat16", scope]
    return bool(sanitize.run("thread", arguments).reports)


def test_swapped_fragments_are_caught():
    """Exchange two registers of an operand: the results must be wrong."""
    swaps = {
        "the halves of a row": ("const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;",
                                "const int row = lane / 4 + i / 2 * 8, k = lane % 4 * 2 + i % 2 * 8;"),
        "the columns of two k tiles": ("&b[n][2 * next]", "&b[n][2 - 2 * next]"),
        "rows and columns of the sums":
            ("give(r, i / 2 * 8, n * 8 + i % 2, sum)", "give(r, i % 2 * 8, n * 8 + i / 2, sum)"),
        "the lanes that have the same k": ("k = lane / LANES * (4 / LANE_ROWS)", "k = lane % 2 * (4 / LANE_ROWS)"),
        "the sums of two rows": ("return {lane % 16, lane / 16};", "return {lane % 16, 1 - lane / 16};"),
    }  # fmt: skip
    cases = [Case("lstm", dtype, "block") for dtype in ("bfloat16", "ieee")]
    for what, (right, swapped) in swaps.items():
        assert right in SOURCE, what
        broken = runtime.Source("persistent.cu", SOURCE.replace(right, swapped))
        result = [errors(case, planned(case), libraries(case, planned(case), kernel=broken)) for case in cases]
        assert any(map(wrong, result)), what


@EVERY_SCOPE
def test_the_exchange_alone_and_the_product_alone_run(scope):
    """For benchmarks. Where no block waits, a device that holds a block at a time will do."""
    for only in ("exchange", "product"):
        case = Case("lstm", "float16", scope, T=4, B=5, H=40, save=False)
        (plan,) = planned(case)
        unit = persistent.translation_unit(plan, cells.get(case.cell), "float16", only)
        kernels = runtime.compile(sources(case.cell), dict(unit.defines))
        launch, params, _ = inference(case, plan, np.random.default_rng(0), only)
        waits = plan.blocks if only == "exchange" or scope == "cluster" else 1
        cuda_on_cpu.execute(kernels, launch, *params, seed=1, resident_blocks=waits)


# ---- Two layers on two streams --------------------------------------------------------------------------------------

TOGETHER = """
struct Layer {
    long long T; int B, H, rows, first_row, save; KernelParams params; uint4* exchange;
};

extern "C" __global__ void PERSISTENT_KERNEL persistent_together(Layer one, Layer other, unsigned blocks) {
    const Layer l = blockIdx.x < blocks ? one : other;
    blockIdx.x %= blocks;
    persistent_forward(l.T, l.B, l.H, l.rows, l.first_row, l.save, l.params, l.exchange);
}
EXPORT(persistent_together)
"""


class Layer(ctypes.Structure):
    """TOGETHER has the same fields."""

    _fields_ = (
        ("T", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("B", "H", "rows", "first_row", "save")),
        ("params", ctypes.c_ulonglong * 13),
        ("exchange", ctypes.c_void_p),
    )


def two_layers(seed: int, *, share_exchange: bool = False) -> None:
    """Two cooperative launches, each with all of its blocks co-resident, on one schedule: what two streams may give."""
    case = Case("gru", "float16", "grid", B=5, H=40, save=False)
    plans = planned(case)
    (plan,), (kernels,) = plans, libraries(case, plans, kernel=runtime.Source("persistent.cu", SOURCE + TOGETHER))
    exchange = zeros(plan.exchange_bytes(case.T))
    inputs = [inference(case._replace(T=T), plan, np.random.default_rng(T)) for T in (7, 4)]
    alone = []
    for launch, params, arrays in inputs:
        cuda_on_cpu.execute(kernels, launch, *params)
        alone.append(arrays["y"].copy())
        arrays["y"][...] = np.nan
        arrays["exchange"][...] = 0
    layers = []
    for launch, (words, at), _ in inputs:
        layers.append(Layer(*map(int, launch.arguments), tuple(map(int, words.view(np.uint64))), at))
    if share_exchange:
        for layer in layers:
            layer.exchange = exchange.ctypes.data
    launch, *_ = inputs[0]
    arguments = [*layers, np.uint32(plan.grid)]
    grid = (2 * plan.grid, 1, 1)
    kernels.launch("persistent_together", grid, launch.block, arguments, shared=launch.shared, seed=seed)
    for y, (*_, arrays) in zip(alone, inputs):
        np.testing.assert_array_equal(arrays["y"], y)


def test_two_layers_on_two_streams_do_not_disturb_each_other():
    for seed in range(8):
        two_layers(seed)


def test_two_layers_that_shared_their_exchange_would():
    for seed in range(8):
        with pytest.raises((AssertionError, runtime.HostError)):
            two_layers(seed, share_exchange=True)


def inference(case, plan, rng, only=None):
    """A forward launch, the arguments that follow its own, and its arrays; float16."""
    cell, (T, B, H) = cells.get(case.cell), (case.T, case.B, case.H)
    arrays = {
        "Wx": rng.standard_normal((T, B, cell.G, H)).astype(np.float16),
        "weights": (rng.standard_normal((cell.G * H, H)) * H**-0.5).astype(np.float16),
        "h0": np.zeros((B, H), np.float16),
        "others": np.zeros((1, cell.S - 1, B, H), np.float32),
        "y": np.full((T, B, H), np.nan, np.float16),
        "exchange": zeros(plan.exchange_bytes(T)),
    }
    at = {name: array.ctypes.data for name, array in arrays.items()}
    addresses = (at["Wx"], at["weights"], 0, at["h0"], at["others"], 0, at["y"], 0, 0, 0, 0, 0)
    words = persistent.kernel_params([persistent.Instance(addresses, reverse=False)])
    (launch,) = persistent.launches(plan, cell, "float16", T, B, H, 1, save=False, only=only)
    return launch, (words, at["exchange"]), arrays


def test_nan_travels():
    """A NaN in one batch row of x reaches that row's outputs from then on, and no other row."""
    case = Case("lstm", "float16", "cluster", T=3, B=4, H=40, save=False)
    plans = planned(case)
    (plan,), (kernels,) = plans, libraries(case, plans)
    launch, params, arrays = inference(case, plan, np.random.default_rng(0))
    arrays["Wx"][1, 2, 0, 7] = np.nan
    cuda_on_cpu.execute(kernels, launch, *params, seed=1)
    expected = np.zeros((3, 4, 40), bool)
    expected[1, 2, 7] = True  # its own unit at once, all units of the row a time step later
    expected[2, 2] = True
    assert (np.isnan(arrays["y"]) == expected).all()
