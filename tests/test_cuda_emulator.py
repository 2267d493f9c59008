"""The CUDA runtime on fibers (tests/cuda_emulator): it computes what the hardware does, and notices what is wrong."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bench import nvrtc

from .cuda_emulator import features, mutate, runtime, sanitize
from .cuda_emulator.runtime import DEVICE, HostError, Launcher, Library, Source

KERNELS = DEVICE.parents[1]
FAULTS = runtime.HERE / "faults.cu"
SEEDS = range(20)

needs_gpp = pytest.mark.skipif(runtime.why_not() is not None, reason=str(runtime.why_not()))
needs_nvrtc = pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
needs_sass = pytest.mark.skipif(nvrtc.why_no_resources() is not None, reason=str(nvrtc.why_no_resources()))


def needs(sanitizer: runtime.Sanitizer) -> pytest.MarkDecorator:
    reason = sanitize.why_not(sanitizer)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@cache
def correct() -> Library:
    return runtime.compile([DEVICE, features.SOURCE])


@cache
def mutants() -> Library:
    text = mutate.switchable(features.SOURCE.read_text())
    return runtime.compile([DEVICE, Source("features.cu", text)])


@cache
def faults() -> Library:
    return runtime.compile([DEVICE, FAULTS])


def failing_seeds(check: str, library: Library, without: int | None = None) -> list[int]:
    failing = []
    for seed in SEEDS:
        try:
            features.CHECKS[check](Launcher(library, seed, without=without))
        except (AssertionError, HostError):
            failing.append(seed)
    return failing


# ---- Features ----------------------------------------------------------------------------------------------


@needs_gpp
@pytest.mark.parametrize("name", features.CHECKS)
def test_feature(name):
    for seed in SEEDS if not name.startswith("mma") else range(2):
        features.CHECKS[name](Launcher(correct(), seed))


@needs_gpp
@pytest.mark.parametrize("name", ["mma_bf16", "named_barriers", "async_stores"])
def test_feature_with_ucontext(name):
    """On processors other than x86-64 contexts are switched by the C library."""
    library = runtime.compile([DEVICE, features.SOURCE], flags=["-DHOST_UCONTEXT=1"])
    features.CHECKS[name](Launcher(library, seed=1))


# These change nothing that a schedule of the host could show: collectives of the host meet anyway.
UNSEEN_BY_SCHEDULES = {("ldmatrix", "__syncwarp()")}
BARRIERS = mutate.barriers(features.SOURCE.read_text())


@needs_gpp
def test_missing_barriers_are_caught(record_property):
    shares = {}
    for n, barrier in enumerate(BARRIERS):
        if (barrier.function, barrier.text) not in UNSEEN_BY_SCHEDULES:
            failing = failing_seeds(barrier.function, mutants(), without=n)
            shares[f"{barrier.function}:{barrier.line} {barrier.text}"] = len(failing) / len(SEEDS)
    for what, share in shares.items():
        record_property(what, share)
    assert not [what for what, share in shares.items() if share == 0]
    assert np.mean(list(shares.values())) > 0.85, shares


@needs_gpp
def test_switchable_kernels_are_right_with_all_barriers():
    for name in features.CHECKS:
        features.CHECKS[name](Launcher(mutants(), seed=1))


# ---- Sanitizers --------------------------------------------------------------------------------------------


@needs("thread")
def test_no_race_in_the_features():
    checks = [name for name in features.CHECKS if not name.startswith("mma")]
    outcome = sanitize.run("thread", ["-m", "tests.cuda_emulator", "--sanitizer", "thread", *checks])
    assert (outcome.returncode, outcome.reports) == (0, []), outcome.output


@needs("thread")
def test_missing_barriers_are_races():
    """What schedules see rarely or never is a race all the same, at the first run."""
    checks = ["ldmatrix", "block_sum", "named_barriers", "async_stores"]
    outcome = sanitize.run("thread", ["-m", "tests.cuda_emulator", "--sanitizer", "thread", "--mutants", *checks])
    runs = re.split(r"^== ", outcome.output, flags=re.MULTILINE)[1:]
    assert len(runs) == sum(barrier.function in checks for barrier in BARRIERS)
    unnoticed = [run for run in runs if "ThreadSanitizer: data race" not in run and "HostError" not in run]
    assert not unnoticed


@needs("address")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param(0, "use-after-poison", id="static shared memory"),
        pytest.param(1, "use-after-poison", id="dynamic shared memory"),
        pytest.param(2, "heap-buffer-overflow", id="global memory"),
        pytest.param(3, "runtime error", id="misaligned vector"),
        pytest.param(4, "runtime error", id="undefined arithmetic"),
    ],
)
def test_overruns(kind, expected, tmp_path):
    script = tmp_path / "overrun.py"
    script.write_text(
        "import numpy as np\n"
        "from tests.cuda_emulator import runtime\n"
        f"library = runtime.compile([runtime.DEVICE, runtime.HERE / 'faults.cu'], sanitizer='address')\n"
        "y = np.zeros(64, np.float32)\n"
        f"library.launch('overrun', (1, 1, 1), (64, 1, 1), [np.int32({kind}), y], shared=128)\n"
    )
    outcome = sanitize.run("address", [str(script)])
    assert expected in {report.kind for report in outcome.reports}, outcome.output
    line = line_of("overrun(int kind") + 6 + kind
    assert any(f"faults.cu:{line}" in report.places for report in outcome.reports), outcome.output


@needs("address")
def test_features_stay_in_bounds():
    checks = [name for name in features.CHECKS if not name.startswith("mma")]
    outcome = sanitize.run("address", ["-m", "tests.cuda_emulator", "--sanitizer", "address", *checks])
    assert (outcome.returncode, outcome.reports) == (0, []), outcome.output


@needs("thread")
def test_a_sanitizer_must_be_loaded_first():
    with pytest.raises(HostError, match=r"sanitize\.run"):
        runtime.compile([DEVICE, FAULTS], sanitizer="thread")


# ---- What the runtime notices ------------------------------------------------------------------------------


def error_of(name: str, grid: int, block: int, args: list, **options) -> str:
    with pytest.raises(HostError) as caught:
        faults().launch(name, (grid, 1, 1), (block, 1, 1), args, **options)
    return str(caught.value)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FAULTS.read_text().splitlines(), 1) if text in line)


@needs_gpp
def test_deadlock_says_where_everyone_waits():
    text = error_of("half_a_barrier", 2, 64, [np.zeros(64, np.float32)])
    assert text.startswith("half_a_barrier, seed 0: deadlock: no thread can run")
    line = line_of("named_barrier_sync(3, 64)")
    lanes = "lanes 0fffffff of ffffffff arrived"
    assert text.splitlines()[1:] == [
        f"  block 0-1 thread 60-63: waits at __syncthreads, 4 of 64 arrived at faults.cu:{line + 4}",
        f"  block 0-1 thread 0-31: waits at named barrier 3, 32 of 64 arrived at faults.cu:{line}",
        f"  block 0-1 thread 32-59: waits in __syncwarp, {lanes} at faults.cu:{line + 2}",
    ]


@needs_gpp
@pytest.mark.parametrize("seed", range(4))
def test_livelock_ends(seed):
    text = error_of("nobody_sets_the_flag", 2, 64, [np.zeros(2, np.uint32)], seed=seed)
    assert "livelock" in text
    assert f"thread 0-31: polls memory at faults.cu:{line_of('ld_relaxed_gpu(flag)')}" in text
    assert "thread 32-63: waits at __syncthreads, 32 of 64 arrived" in text


@needs_gpp
def test_an_endless_loop_ends():
    text = error_of("endless_loop", 1, 1, [np.zeros(1, np.float32)], seed=1, max_switches=10_000)
    assert "livelock: more than 10000 switches" in text


@needs_gpp
def test_mbarriers_say_what_they_lack():
    text = error_of("waits_for_bytes", 1, 32, [])
    assert "waits at mbarrier_wait_cluster, phase of parity 0 lacks 0 of 1 arrivals and 16 bytes" in text


@needs_gpp
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "invalid address"),
        (1, "invalid address 0x8"),
        (2, "division by zero"),
        (3, "trap"),
        (4, "40 threads is not a positive multiple of 32"),
        (5, "called with 32 threads, by others with 64"),
        (6, "cluster_wait: without cluster_arrive"),
        (7, "cluster_arrive: twice without cluster_wait"),
        (8, "mbarrier_arrive_expect_tx: the mbarrier is not initialized"),
        (9, "more arrivals in a phase than it was initialized for"),
        (10, "the address of a row is not a multiple of 16"),
        (11, "the address of a row is not in this block's shared memory"),
        (12, "st_async: the address is not a multiple of 16"),
        (13, "no block 5 in a cluster of 1"),
        (14, "reads lane 9, which takes no part"),
        (15, "leaves out the calling lane"),
        (16, "exits while a store to its shared memory is in flight"),
        (17, "ldmatrix: needs a whole warp"),
    ],
)
def test_faults(kind, message):
    y = np.zeros(64, np.float32)
    text = error_of("fault", 1, 64, [np.int32(kind), y])
    assert re.search(message, text)
    if kind not in (9, 16):
        line = line_of(f"case {kind}:") + {7: 2, 17: 2}.get(kind, 0)  # the faulty call may stand further down
        assert f"faults.cu:{line}" in text


@needs_gpp
@pytest.mark.parametrize("seed", range(4))
def test_stack_overflow(seed):
    assert "overflow" in error_of("large_frame", 1, 64, [np.zeros(64, np.float32)], seed=seed)


@needs_gpp
def test_a_device_too_small_for_the_grid():
    here = np.zeros((8, 2), np.uint32)
    faults().launch("needs_all_blocks", (8, 1, 1), (64, 1, 1), [here], seed=1, resident_blocks=8)
    here[:] = 0
    text = error_of("needs_all_blocks", 8, 64, [here], seed=1, resident_blocks=6)
    assert "livelock" in text
    assert "2 of 8 blocks have not started: the device holds 6 at once" in text


@needs_gpp
@pytest.mark.parametrize("seed", range(3))
def test_blocks_take_turns(seed):
    """Blocks that do not wait for each other need not be co-resident."""
    total, count = np.zeros(1, np.float32), np.zeros(1, np.uint32)
    x = np.ones(20 * 128, np.float32)
    args = [x, total, count]
    correct().launch("block_sum", (20, 1, 1), (128, 1, 1), args, shared=64, seed=seed, resident_blocks=3)
    assert (total[0], count[0]) == (2560, 2560)


@needs_gpp
def test_shared_memory_starts_as_nan():
    y = np.zeros((2, 32), np.float32)
    faults().launch("reads_shared_memory", (1, 1, 1), (32, 1, 1), [y], shared=128)
    assert np.isnan(y).all()
    assert (y.view(np.uint32) == 0xFFFFFFFF).all()


@needs_gpp
def test_a_seed_is_a_schedule():
    """Sums by atomics depend on the order of the threads, bit by bit: the same for one seed, different for
    others."""

    def run(seed: int) -> tuple[float, int]:
        x = np.random.default_rng(0).standard_normal(20 * 128).astype(np.float32)
        total, count = np.zeros(1, np.float32), np.zeros(1, np.uint32)
        correct().launch("block_sum", (20, 1, 1), (128, 1, 1), [x, total, count], shared=64, seed=seed)
        return float(total[0]), correct().switches

    runs = [run(seed) for seed in range(6)]
    assert runs == [run(seed) for seed in range(6)]
    assert len(set(runs)) == 6
    assert len({total for total, _ in runs}) > 1


@needs_gpp
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "not a whole number of clusters"),
        ({"block": (1025, 1, 1)}, "more than 1024 threads"),
        ({"grid": (32, 1, 1), "cluster": (32, 1, 1)}, "more than 16 blocks in a cluster"),
        ({"shared": (227 << 10) + 1}, "more than 227 KiB"),
        ({"grid": (4, 1, 1), "cluster": (4, 1, 1), "resident_blocks": 3}, "cannot hold one cluster"),
        ({"block": (0, 1, 1)}, "zero"),
    ],
)
def test_plans_that_no_device_takes(plan, message):
    y = np.zeros((2, 32), np.float32)
    plan = {"grid": (1, 1, 1), "block": (32, 1, 1), **plan}
    with pytest.raises(HostError, match=message):
        faults().launch("reads_shared_memory", args=[y], **plan)


@needs_gpp
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([np.int32(0)], "1 arguments for 2 parameters"),
        ([np.int64(0), np.zeros(64, np.float32)], "argument 0: the kernel declares i4, not i8"),
        ([np.float32(0), np.zeros(64, np.float32)], "argument 0: the kernel declares i4, not f4"),
        ([np.int32(0), np.int64(0)], "argument 1: the kernel declares p8, not i8"),
        ([0, np.zeros(64, np.float32)], "argument 0: int is neither an array nor"),
        ([np.int32(0), np.zeros((64, 2), np.float32)[:, 0]], "not C-contiguous"),
    ],
)
def test_arguments_are_checked(args, message):
    with pytest.raises(HostError, match=re.escape(message)):
        faults().launch("fault", (1, 1, 1), (64, 1, 1), args)


@needs_gpp
def test_an_unknown_kernel():
    with pytest.raises(HostError, match=r"EXPORT\(missing\)"):
        faults().launch("missing", (1, 1, 1), (1, 1, 1), [])


@needs_gpp
def test_compile_errors_name_the_file():
    with pytest.raises(HostError, match=r"wrong\.cu:2:"):
        runtime.compile([DEVICE, Source("wrong.cu", "\nnonsense;\n")])


# ---- Mutations ---------------------------------------------------------------------------------------------

SOURCE = """
struct Helper {
    DEVICE void exchange() { __syncthreads(); }  // __syncthreads();
};
#define UNUSED __syncthreads();
extern "C" __global__ void kernel(float* x) {
    if (x) named_barrier_sync(1, 64);
    else
        mbarrier_wait_cluster(&bar[f(1, (2))],
                              parity);
    while (!mbarrier_try_wait_cluster(&bar, 0)) {
    }
    /* cluster_sync(); */ const char* s = "cluster_sync();";
    cluster_sync();
}
"""


def test_barriers_of_a_source():
    barriers = [(b.line, b.text.split("(")[0], b.function) for b in mutate.barriers(SOURCE)]
    assert barriers == [
        (3, "__syncthreads", "exchange"),
        (7, "named_barrier_sync", "kernel"),
        (9, "mbarrier_wait_cluster", "kernel"),
        (14, "cluster_sync", "kernel"),
    ]


def test_without_a_barrier():
    text = mutate.without(SOURCE, 1)
    assert f"    if (x) {' ' * len('named_barrier_sync(1, 64)')};\n" in text
    assert [b.line for b in mutate.barriers(text)] == [3, 9, 14]
    assert mutate.without(SOURCE, 2).count("\n") == SOURCE.count("\n")


def test_switchable_barriers():
    text = mutate.switchable(SOURCE)
    assert "    if (x) (host::without == 1 ? void() : void(named_barrier_sync(1, 64)));\n" in text
    assert text.count("\n") == SOURCE.count("\n")


# ---- Hardware in one file ----------------------------------------------------------------------------------


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def wrappers() -> dict[str, str]:
    """The functions of device.cuh, by name, with their bodies; overloads together."""
    text = without_comments(DEVICE.read_text())
    bodies: dict[str, str] = {}
    definition = r"^DEVICE [^\n]*?\b(\w+)(?:<\w+>)?\([^{]*\) \{(.*?)(?:\n\}|\}$)"
    for match in re.finditer(definition, text, re.MULTILINE | re.DOTALL):
        bodies[match[1]] = bodies.get(match[1], "") + match[2]
    return bodies


def test_inline_asm_stands_in_device_cuh_alone():
    sources = [path for ending in ("cu", "cuh") for path in KERNELS.rglob(f"*.{ending}")]
    assert DEVICE in sources
    elsewhere = [
        f"{path}:{n}"
        for path in sources
        if path != DEVICE
        for n, line in enumerate(without_comments(path.read_text()).splitlines(), 1)
        if re.search(r"\b(asm|__asm__|__asm)\b", line)
    ]
    assert not elsewhere


def test_every_wrapper_has_both_bodies():
    assert len(wrappers()) > 20
    for name, body in wrappers().items():
        assert ("PTX(" in body) == ("EMULATED(" in body), name
        assert body.count("PTX(") == body.count("EMULATED("), name
        assert len(re.findall(r"\basm\b", body)) <= body.count("PTX("), name
    inside = sum(len(re.findall(r"\basm\b", body)) for body in wrappers().values())
    assert inside == len(re.findall(r"\basm\b", without_comments(DEVICE.read_text())))


def test_every_wrapper_is_tried():
    """In a kernel that both g++ and NVRTC compile."""
    used = without_comments(features.SOURCE.read_text())
    called_by_others = "".join(wrappers().values())
    assert not {name for name in wrappers() if not re.search(rf"\b{name}\b", used + called_by_others)}


def test_every_wrapper_is_used():
    """By a kernel, or by another."""
    kernels = [path for path in KERNELS.rglob("*") if path.suffix in (".cu", ".cuh", ".py") and path != DEVICE]
    used = "".join(without_comments(path.read_text()) for path in kernels) + "".join(wrappers().values())
    assert not {name for name in wrappers() if not re.search(rf"\b{name}\b", used)}


# ---- NVRTC -------------------------------------------------------------------------------------------------

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


@needs_nvrtc
@needs_sass
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_features_compile_and_what_they_use(arch):
    cubin = nvrtc.compile(runtime.join([DEVICE, features.SOURCE]), arch)
    assert cubin.log == ""
    used = nvrtc.resources(cubin)
    hopper = arch != "sm_80"
    assert set(used) == {name for name in features.CHECKS if hopper or name not in features.HOPPER}
    assert {name: kernel.mma for name, kernel in used.items() if kernel.mma} == dict.fromkeys(
        ["mma_bf16", "mma_f16", "mma_tf32"], 1
    )
    assert not any(kernel.spills for kernel in used.values())
    assert not any(kernel.trap for kernel in used.values())
    assert all(8 <= kernel.registers <= 64 for kernel in used.values())
    assert used["named_barriers"].shared == 512
    assert used["mma_f16"].shared == 0


@needs_nvrtc
@needs_sass
def test_resources_sees_spills_and_traps():
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
    float kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = kept[(i * 7) % 64] * kept[63 - i];
}
extern "C" __global__ void traps() { __trap(); }
"""
    used = nvrtc.resources(nvrtc.compile(source, "sm_90"))
    assert used["spills"].spills > 0
    assert used["spills"].stack > 0
    assert not used["spills"].trap
    assert used["traps"].trap


@needs_nvrtc
def test_nvrtc_errors_have_the_log():
    with pytest.raises(nvrtc.CompileError, match=r"sm_90: wrong\.cu\(2\): error"):
        nvrtc.compile(runtime.join([Source("wrong.cu", "\nnonsense;\n")]), "sm_90")


def test_joined_sources_keep_their_names(tmp_path: Path):
    path = tmp_path / "a.cuh"
    path.write_text("int a;\n\n")
    text = runtime.join([path, Source("b.cu", "int b;")])
    assert text == f'#line 1 "{path}"\nint a;\n#line 1 "b.cu"\nint b;\n'
