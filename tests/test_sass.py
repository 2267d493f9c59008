"""What a time step of the persistent kernels executes: the table of `python -m bench sass`, and how it is read."""

import pytest

from bench import nvrtc, sass
from bench.sass import MachineCode
from gpu_rnn.backends import cuda

LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;                    /* 0x0000000000007919 */
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R9+URZ], R3 ;
        /*0040*/              @!P1 BRA 0x160 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*0060*/                   LDG.E.128.STRONG.GPU R4, desc[UR6][R8.64] ;
        /*0070*/               @P2 BRA 0x60 ;
        /*0080*/               @P3 BRA 0xc0 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/               @P4 STG.E desc[UR6][R8.64], R4 ;
        /*00b0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00c0*/               @P5 BRA 0x100 ;
        /*00d0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00e0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00f0*/                   BPT.TRAP 0x1 ;
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0110*/                   ISETP.GE.AND P6, PT, R7, RZ, PT ;
        /*0120*/              @!P6 BRA 0x30 ;
        /*0130*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0140*/               @P6 EXIT ;
        /*0150*/                   EXIT ;
        /*0160*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R9+URZ], R3 ;
        /*0170*/              @!P1 BRA 0x160 ;
        /*0180*/                   BRA 0x50 ;
        /*0190*/                   BRA 0x190 ;
"""
needs_compiler = pytest.mark.skipif(
    (nvrtc.why_not() or nvrtc.why_no_resources()) is not None, reason=f"{nvrtc.why_not()}; {nvrtc.why_no_resources()}"
)


def addresses(path):
    return [one.address for one in path]


def test_the_time_loop_is_found_and_a_warp_goes_through_it():
    """Waits count once, long ones and traps not at all; a warp without elements goes round their mathematics."""
    code = MachineCode(LISTING)
    assert code.time_loop == (3, 18)
    head = [0x30, 0x40, 0x50, 0x60, 0x70, 0x80]
    assert addresses(code.path(lambda one: False)) == [*head, 0x90, 0xA0, 0xB0, 0xC0, 0x100, 0x110, 0x120]
    assert addresses(code.path(sass.of_elements)) == [*head, 0xC0, 0x100, 0x110, 0x120]
    kinds = [one.kind for one in code.path(lambda one: False)]
    assert kinds == [
        "barrier", "predicate", "mma", "global", "predicate", "predicate", "special", "global", "integer", "predicate",
        "barrier", "predicate", "predicate",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no way through"):
        code.path(lambda one: one.base == "BAR")
    with pytest.raises(ValueError, match="no loop has a matmul"):
        MachineCode(LISTING.replace("HMMA", "IMAD")).time_loop  # noqa: B018


def test_the_busiest_scheduler_counts():
    code = MachineCode(LISTING)
    whole, short = code.path(lambda one: False), code.path(sass.of_elements)
    assert len(sass.busiest([short, whole, short, short, short])) == max(2 * len(short), len(whole))
    assert len(sass.busiest([short] * 4 + [whole] * 4)) == len(short) + len(whole)


def test_the_table_has_every_kernel_and_none_spills():
    table = sass.read()
    assert [sass.key(row) for row in table] == [kernel.key for kernel in sass.KERNELS]
    for row in table:
        assert row["spills"] == "0"
        assert int(row["issued"]) == sum(int(row[kind]) for kind in sass.CLASSES)
        assert float(row["bound_us"]) < float(row["predicted_us"])


def test_changes_are_told():
    row = sass.read()[0]
    assert sass.changes([row], [row]) == []
    more = row | {"issued": "999", "predicted_us": "9"}
    assert sass.changes([more], [row]) == [f"lstm bfloat16 H=128 forward: issued {row['issued']} -> 999"]
    assert sass.changes([row | {"nvrtc": "1.0"}], [row])[0].startswith("lstm bfloat16 H=128 forward: compiled by NVRTC")
    assert sass.changes([row], []) == ["lstm bfloat16 H=128 forward: not in the table"]


def table_row(kernel):
    """That of a kernel, if the same compiler has made it."""
    (row,) = [row for row in sass.read() if sass.key(row) == kernel.key]
    if row["nvrtc"] != nvrtc.version():
        pytest.skip(f"the table is by NVRTC {row['nvrtc']}, this is {nvrtc.version()}")
    return row


HELD = [  # a cluster, and a grid both ways
    sass.Kernel("lstm", "bfloat16", 512, False), sass.Kernel("lstm", "bfloat16", 1024, False),
    sass.Kernel("gru", "bfloat16", 512, True),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kernel", HELD, ids=str)
def test_a_time_step_issues_no_more_than_the_table_says(kernel):
    """If it is worth it: `python -m bench sass` writes the table anew, and `--check` compares all of it."""
    table = table_row(kernel)
    now = sass.row(kernel)
    assert int(now["issued"]) <= int(table["issued"]), sass.changes([now], [table])
    assert now["spills"] == "0"


@needs_compiler
def test_a_multiplied_address_in_the_time_loop_is_seen(monkeypatch):
    kernel, text = sass.Kernel("lstm", "bfloat16", 128, False), cuda.text
    table = table_row(kernel)
    advanced, multiplied = "= Wx_at.of(k)[g * H];", "= p.Wx[index.row(index.nth(n), e, G, g)];"

    def slower(unit):
        source, options = text(unit)
        assert source.count(advanced) == 1
        return source.replace(advanced, multiplied), options

    monkeypatch.setattr(cuda, "text", slower)
    assert int(sass.row(kernel)["issued"]) > int(table["issued"]) + 10
