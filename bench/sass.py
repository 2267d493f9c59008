"""What a time step of the persistent kernels executes, read from their machine code: no GPU is needed.

The kernels are those that an H200 would run, compiled by NVRTC for sm_90 (bench/nvrtc.py) and read by
bench/machine_code.py. The issue floor is the time that the busiest of a multiprocessor's four schedulers needs to issue
the instructions of its warps, one a cycle: a step can't take less, whatever else it waits for. What is measured was so
on the day of its file in bench/results, with the kernels of that day.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from os import sched_getaffinity
from pathlib import Path

from gpu_rnn.backends import cuda
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import nvrtc, results
from .machine_code import CLASSES, Instruction, MachineCode

TABLE = Path(__file__).parent / "sass.csv"
DEVICE, ARCHITECTURE, SCHEDULERS = replace(persistent.DEVICES["h200"], proven_only=True), "sm_90", 4
B, T = 16, 512  # batch rows; the number of time steps doesn't change a kernel
SIZES = [
    *((cell, "bfloat16", H) for cell in ("lstm", "gru") for H in (128, 512, 1024)),
    ("lstm", "float32", 512),  # multiplied as TF32
]
FACTS = ("registers", "spills", *CLASSES, "issued")  # what the code is, and not what is thought of its speed
Row = dict[str, str]


@dataclass(frozen=True)
class Kernel:
    cell: str
    dtype: str
    H: int
    backward: bool

    @property
    def key(self) -> tuple[str, ...]:
        return self.cell, self.dtype, str(self.H), "backward" if self.backward else "forward"

    def __str__(self) -> str:
        return "{} {} H={} {}".format(*self.key)

    @property
    def plan(self) -> persistent.Residence:
        problem = Problem(cells.get(self.cell), T, B, self.H, self.H, None, self.dtype, "cuda", "torch", tf32=True)
        plan, why = cuda.persistent_config(problem, DEVICE, self.backward)
        if plan is None:
            raise ValueError(f"{self} has no persistent kernel: {'; '.join(why)}")
        return plan

    def compiled(self) -> tuple[nvrtc.Resources, MachineCode]:
        plan = self.plan
        source, options = cuda.text(persistent.compiled(plan, cells.get(self.cell), self.dtype))
        cubin, name = nvrtc.compile(source, ARCHITECTURE, options), persistent.name(plan)
        return nvrtc.resources(cubin)[name], MachineCode(nvrtc.sass(cubin)[name])


KERNELS = [Kernel(*sizes, backward) for sizes in SIZES for backward in (False, True)]


# ---- What is executed ---------------------------------------------------------------------------------------------


def of_elements(one: Instruction) -> bool:
    """Whether only warps that have elements execute it: of the cell's mathematics, or a store of its results."""
    return one.base in ("MUFU", "FMUL") or (one.base == "STG" and not one.shared)


def of_publication(one: Instruction) -> bool:
    return one.base == "STG" and one.shared


def paths(plan: persistent.Residence, code: MachineCode) -> list[list[Instruction]]:
    """What each warp of a block executes in a time step."""
    words = plan.exchanged // 16 // plan.blocks if plan.scope == "grid" else plan.threads

    @cache
    def path(elements: bool, publishes: bool) -> list[Instruction]:
        return code.path(lambda one: (of_elements(one) and not elements) or (of_publication(one) and not publishes))

    elements = plan.units * plan.rows
    return [path(first < elements, first < words) for first in range(0, plan.threads, 32)]


def busiest(warps: Sequence[list[Instruction]]) -> list[Instruction]:
    """What the scheduler issues that has most to issue."""
    each = [[one for warp in warps[first::SCHEDULERS] for one in warp] for first in range(SCHEDULERS)]
    return max(each, key=len)


# ---- The table ----------------------------------------------------------------------------------------------------


def row(kernel: Kernel) -> Row:
    plan = kernel.plan
    used, code = kernel.compiled()
    issued = busiest(paths(plan, code))
    count = Counter(one.kind for one in issued)
    floor = len(issued) / persistent.CYCLES_PER_MICROSECOND
    took = measured().get(json.dumps([[kernel.cell, kernel.dtype, kernel.H, B], asdict(plan)]))
    cell, dtype, H, way = kernel.key
    return {
        "cell": cell, "dtype": dtype, "H": H, "way": way,
        "scope": plan.scope, "blocks": str(plan.blocks), "threads": str(plan.threads),
        "registers": str(used.registers), "spills": str(used.spills),
        **{kind: str(count[kind]) for kind in CLASSES}, "issued": str(len(issued)),
        "floor_us": f"{floor:.3f}", "predicted_us": f"{plan.microseconds:.3f}",
        "predicted_of_floor": f"{plan.microseconds / floor:.2f}",
        "measured_us": f"{took:.3f}" if took else "",
        "measured_of_floor": f"{took / floor:.2f}" if took else "",
        "measured_of_predicted": f"{took / plan.microseconds:.2f}" if took else "",
        "nvrtc": nvrtc.version(),
    }  # fmt: skip


@cache
def measured() -> dict[str, float]:
    """By problem and plan, microseconds of a step: the latest that a GPU took (bench/plans.py)."""
    lines = [
        json.loads(line)
        for path in sorted(results.FOLDER.glob("*-plans.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {json.dumps([line["problem"], line["plan"]]): line["measured"] for line in lines if line["measured"]}


def rows(kernels: Sequence[Kernel]) -> Iterator[Row]:
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        yield from pool.map(row, kernels)


def read(path: Path = TABLE) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(table: Sequence[Row], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def key(row: Row) -> tuple[str, ...]:
    return row["cell"], row["dtype"], row["H"], row["way"]


def changes(now: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """What the kernels have that isn't in the table, or is another number there."""
    known = {key(row): row for row in table}
    found = []
    for row in now:
        before = known.get(key(row))
        name = "{} {} H={} {}".format(*key(row))
        if before is None:
            found.append(f"{name}: not in the table")
        elif before["nvrtc"] != row["nvrtc"]:
            found.append(f"{name}: compiled by NVRTC {row['nvrtc']}, in the table by {before['nvrtc']}")
        elif differ := [f"{fact} {before[fact]} -> {row[fact]}" for fact in FACTS if before[fact] != row[fact]]:
            found.append(f"{name}: {', '.join(differ)}")
    return found


def lines(table: Sequence[Row]) -> Iterator[str]:
    """As text, in columns."""
    heads = {"predicted_of_floor": "/floor", "measured_of_floor": "/floor", "measured_of_predicted": "/predicted"}
    columns = [name for name in table[0] if name != "nvrtc"]
    text = [[heads.get(name, name.removesuffix("_us")) for name in columns]]
    text += [[row[name] or "-" for name in columns] for row in table]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    yield from (" ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in text)


def tell(words: str | None, *, check: bool, code: bool) -> int:
    """The command: print the table; write it, compare with it, or print what a warp with elements executes."""
    if why := nvrtc.why_not() or nvrtc.why_no_resources():
        raise ValueError(why)
    kernels = [kernel for kernel in KERNELS if not words or all(word in str(kernel).split() for word in words.split())]
    if not kernels:
        raise ValueError(f"no kernel has the words {words!r}; there are {', '.join(map(str, KERNELS))}")
    if code:
        for kernel in kernels:
            print(kernel, *paths(kernel.plan, kernel.compiled()[1])[0], sep="\n")
        return 0
    found = list(rows(kernels))
    print("\n".join(lines(found)))
    if check:
        differ = changes(found, read())
        print("\n".join(differ) or "as in the table")
        return 1 if differ else 0
    fresh = {key(row): row for row in found}
    kept = {key(row): row for row in read()} if TABLE.exists() else {}
    order = [kernel.key for kernel in KERNELS]
    write([(kept | fresh)[name] for name in order if name in kept or name in fresh])
    return 0
