"""The stepwise kernels as NVRTC compiles them, for GPUs that are not here: no warning, no spill, no narrow access."""

import re
from io import StringIO
from types import SimpleNamespace

import pytest

from bench import nvrtc
from gpu_rnn.backends import cuda
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent, stepwise
from gpu_rnn.kernels.cuda.launch import OPTIONS

pytestmark = pytest.mark.skipif(
    (nvrtc.why_not() or nvrtc.why_no_resources()) is not None, reason=f"{nvrtc.why_not()}; {nvrtc.why_no_resources()}"
)
DTYPES = [  # of storage and of products
    ("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32"),
]  # fmt: skip
BEFORE = "gru+before+dropout+hold+reset+reset_state+zoneout(0.1)"
OTHERS = ("sm_80", "sm_100", "sm_120")
MOST_REGISTERS = 128  # 16 warps on a multiprocessor, each with ten wide loads under way, keep its memory busy


def in_turn(names, dtypes):
    """Each cell in each dtype for sm_90 and for one other: all cells and all dtypes are for every architecture."""
    return [
        (arch, name, *dtype)
        for i, name in enumerate(names) for j, dtype in enumerate(dtypes) for arch in ("sm_90", OTHERS[(i + j) % 3])
    ]  # fmt: skip


def check(arch, name, storage, product, H, record_property, most=MOST_REGISTERS):
    """H decides how many units a thread has."""
    launch = stepwise.launch(
        "stepwise_forward", cells.get(name).kernel_cell, B=4, H=H, R=1, storage=storage, product=product, addresses=()
    )
    options = [*OPTIONS, *(f"-D{macro}={value}" for macro, value in launch.unit.defines)]
    cubin = nvrtc.compile(launch.unit.source, arch, options)
    assert cubin.log == ""
    used = nvrtc.resources(cubin)
    assert used.keys() == {"stepwise_forward", "stepwise_backward"}
    for kernel, resources in used.items():
        record_property(f"{kernel} registers", resources.registers)
        assert (resources.spills, resources.stack, resources.trap) == (0, 0, False), kernel
        assert resources.registers <= most, kernel
    return cubin


@pytest.mark.parametrize(("arch", "name", "storage", "product"), in_turn(cells.NAMES, DTYPES))
def test_aligned(arch, name, storage, product, record_property):
    cubin = check(arch, name, storage, product, 64, record_property)
    if arch != "sm_90":
        return
    narrowest = 64 if storage in ("float16", "bfloat16") else 128
    for kernel, code in nvrtc.sass(cubin).items():
        accesses = re.findall(r"\b(?:LDG|STG)\.E\S*", code)
        widths = [re.search(r"\.(64|128)\b", access) for access in accesses]
        assert accesses, kernel
        assert all(width and int(width[1]) >= narrowest for width in widths), (kernel, accesses)


@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.parametrize(("storage", "product"), [*DTYPES, ("float16", "float16")])
def test_ragged(name, storage, product, record_property):
    check("sm_90", name, storage, product, 63, record_property)


MODIFIED = ["lstm+dropout+hold+reset+reset_state+zoneout(0.1,0.05)", "gru+hold+reset", "lstm+peephole", BEFORE]


@pytest.mark.parametrize(("arch", "name", "storage", "product"), in_turn(MODIFIED, DTYPES[1:]))
def test_modifiers(arch, name, storage, product, record_property):
    check(arch, name, storage, product, 64, record_property)


# Of all dtypes and combinations, aligned and ragged, those that the compiler likes least.
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(
    ("name", "storage", "product", "H"),
    [
        ("lstm+norm", "float64", "float64", 64),
        ("lstm+norm", "float32", "float32", 63),
        ("lstm+norm", "bfloat16", "float32", 63),
        ("gru+dropout+hold+norm+reset+reset_state+zoneout(0.1)", "float16", "float16", 63),
        ("lstm+clip(1.0)+dropout+hold+norm+peephole+reset+reset_state+zoneout(0.1,0.05)", "float32", "float32", 64),
        ("lstm+clip(1.0)+dropout+hold+norm+peephole+reset+reset_state+zoneout(0.1,0.05)", "bfloat16", "float32", 63),
        ("lstm+clip(1.0)+dropout+hold+peephole+reset+reset_state+zoneout(0.1,0.05)", "float64", "float64", 64),
    ],
)
def test_with_most_values(arch, name, storage, product, H, record_property):
    check(arch, name, storage, product, H, record_property, most=255)


def test_errors_name_the_file():
    """Files are joined for the compiler, yet its messages have the name and the line of each."""
    launch = stepwise.launch(
        "stepwise_forward", cells.get("gru"), B=1, H=1, R=1, storage="float32", product="float32", addresses=()
    )
    source = launch.unit.source.replace("const real t8 = forward_tanh(", "const real t8 = tanh_of(")
    with pytest.raises(nvrtc.CompileError, match=r'cell gru\(15\).*"tanh_of" is undefined'):
        nvrtc.compile(source, "sm_90", [*OPTIONS, *(f"-D{macro}={value}" for macro, value in launch.unit.defines)])


def test_as_cupy_compiles_it(monkeypatch, tmp_path):
    """All of CuPy's way from the source to the driver, but that it can't ask a GPU for its architecture.

    It adds options and finds the headers by itself. It drops the last byte of what comes out, and the driver finds the
    zero in its place that Python has behind all bytes.
    """
    cupy = pytest.importorskip("cupy")
    compiler, core = cupy.cuda.compiler, cupy._core.core
    compiled = []
    takes = SimpleNamespace(load=compiled.append, _set_mapping=lambda names: None)
    monkeypatch.setattr(compiler, "_get_arch", lambda: "90")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin"))
    monkeypatch.setattr(compiler, "function", SimpleNamespace(Module=lambda: takes))
    monkeypatch.setattr(compiler, "_kernel_cache_backend", compiler._DiskKernelCacheBackend(str(tmp_path)))
    cell, on = cells.get("lstm").kernel_cell, persistent.DEVICES["h100"]
    plans = [persistent.select(4, 16, "bfloat16", H, 8, on, backward=True)[0] for H in (64, 512, 1024)]
    units = [
        stepwise.launch("", cell, B=4, H=64, R=1, storage="bfloat16", product="float32", addresses=()).unit,
        *(persistent.translation_unit(plan, cell, "bfloat16") for plan in plans),
    ]
    for raw in (*map(cuda.module.__wrapped__, units), cuda.cluster_probe_module()):
        log = StringIO()
        options = core.assemble_cupy_compiler_options(raw.options)
        compiler._compile_module_with_cache(raw.code, options, log_stream=log)
        assert log.getvalue() == ""
        ours = nvrtc.compile(raw.code, "sm_90", raw.options)
        assert (len(compiled[-1]), ours[-1]) == (len(ours) - 1, 0)
        assert nvrtc.resources(compiled[-1] + b"\0") == nvrtc.resources(ours)
