"""What a time step of the persistent kernels executes, read from their machine code: no GPU is needed.

The kernels are those that an H200 would run, compiled by NVRTC for sm_90. What a warp executes is read from nvdisasm's
text and nothing else, so it knows what branches there are and not which are taken. It assumes

- the time loop is the outermost loop that has the matmul (HMMA, or FFMA where there is none);
- a warp takes the longest way through it, except through instructions that the caller knows it has no part in;
- an inner loop goes round once; if it is a wait that can be passed by, that isn't entered, and neither is what lies
  behind the time loop, which is for waits that take long;
- a trap isn't executed.

The issue bound is the time that the busiest of a multiprocessor's four schedulers needs to issue the instructions of
its warps, one a cycle: a step can't take less. What is measured was so on the day of its file in bench/results.
"""

import csv
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cache, cached_property
from itertools import chain
from os import sched_getaffinity
from pathlib import Path
from typing import NamedTuple

import networkx

from gpu_rnn.backends import cuda
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent

from . import calibration, nvrtc, results

TABLE = Path(__file__).parent / "sass.csv"
DEVICE, ARCHITECTURE, SCHEDULERS = replace(persistent.DEVICES["h200"], proven_only=True), "sm_90", 4
B, T = 16, 512  # sequences; the number of time steps doesn't change a kernel
SIZES = [
    *((cell, "bfloat16", H) for cell in ("lstm", "gru") for H in (128, 512, 1024)),
    ("lstm", "float32", 512),  # multiplied as TF32
]
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", re.MULTILINE)
# By how an opcode begins; the first that fits. Loading a constant or a special register is address arithmetic, mostly.
CLASSES = {
    "mma": r"\w*MMA$",
    "special": r"MUFU$",
    "conversion": r"(F2|I2|FRND)",
    "barrier": r"(BAR|SYNCS|WARPSYNC|\w*MEMBAR|FENCE|DEPBAR|ERRBAR|YIELD|UCGABAR)",
    "predicate": r"(U?ISETP|FSETP|U?PLOP3|P2R|R2P|BRA|BSSY|BSYNC|BREAK|EXIT|CALL|RET|VOTE)",
    "shared": r"(LDS|STS|STAS|ATOMS)",
    "global": r"(LDG?$|STG?$|LDL|STL|RED|ATOM|CCTL|LDGSTS|UBLKCP)",
    "float": r"(F(ADD|MUL|FMA|SEL|MNMX|CHK|SWZADD)|H(ADD|MUL|FMA|SET|MNMX)2|D(ADD|MUL|FMA|SETP))",
    "integer": r"U?(IMAD|IADD3?|IABS|IMNMX|LEA|LOP3|SHF|SEL|PRMT|MOV|MOV32I|BREV|FLO|POPC|LDC|VOTEU)$"
    r"|(V|CS2R|S2R|S2UR|R2UR|SGXT|BMSK|LDC)",
    "other": r"",
}
FACTS = ("registers", "spills", *CLASSES, "issued")  # what the code is, and not what is predicted of its speed
Row = dict[str, str]


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate that it is executed under, or nothing
    opcode: str  # with its modifiers
    arguments: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        return next(kind for kind, begin in CLASSES.items() if re.match(begin, self.base))

    @property
    def shared(self) -> bool:
        """Whether it accesses global memory that blocks share."""
        return "STRONG" in self.opcode

    @property
    def waits(self) -> bool:
        """Whether a wait looks at it: a barrier in shared memory, or memory that blocks share."""
        return self.base == "SYNCS" or (self.base == "LDG" and self.shared)

    def __str__(self) -> str:
        return f"{self.address:5x}  {f'@{self.guard} ' if self.guard else ''}{self.opcode} {self.arguments}"


class MachineCode:
    """The control flow of a kernel: a graph of the numbers of its instructions."""

    def __init__(self, text: str) -> None:
        self.instructions = [Instruction(int(address, 16), *rest) for address, *rest in LINE.findall(text)]
        strange = {one.base for one in self.instructions} & {"BRX", "BRXU", "JMP", "JMX", "CALL", "RET"}
        if strange or not self.instructions:
            raise ValueError(f"no machine code that can be followed: {', '.join(sorted(strange)) or 'it is empty'}")
        at, self.flow = {one.address: n for n, one in enumerate(self.instructions)}, networkx.DiGraph()
        self.flow.add_nodes_from(range(len(at)))
        for n, one in enumerate(self.instructions):
            if (one.guard or one.base not in ("BRA", "EXIT")) and n + 1 < len(at):
                self.flow.add_edge(n, n + 1)
            if one.base == "BRA":
                self.flow.add_edge(n, at[int(one.arguments.split()[-1], 16)])

    @cached_property
    def time_loop(self) -> tuple[int, int]:
        """The numbers of its first instruction and of the last branch back to it."""
        loops = list(networkx.strongly_connected_components(self.flow))
        for matmul in ("HMMA", "FFMA"):
            candidates = [
                loop for loop in loops if len(loop) > 1 and any(self.instructions[n].base == matmul for n in loop)
            ]
            if candidates:
                loop = max(candidates, key=len)
                begin = min(n for n in loop if not loop.issuperset(self.flow.predecessors(n)))  # where it is entered
                return begin, max(n for n in self.flow.predecessors(begin) if n in loop)
        raise ValueError("no loop has a matmul")

    @cached_property
    def waits(self) -> list[int]:
        """The first instructions of inner loops that wait."""
        begin, end = self.time_loop
        back = [(first, n) for n, first in self.flow.edges if begin < first <= n < end]
        return [first for first, n in back if any(one.waits for one in self.instructions[first : n + 1])]

    def path(self, avoided: Callable[[Instruction], bool]) -> list[Instruction]:
        """What a warp executes in a time step that has no part in the instructions avoided, but under a predicate."""
        begin, end = self.time_loop
        left = [
            n for n in range(begin, end + 1)
            if self.instructions[n].base != "BPT" and (self.instructions[n].guard or not avoided(self.instructions[n]))
        ]  # fmt: skip
        forward = networkx.DiGraph((a, b) for a, b in self.flow.subgraph(left).edges if a < b)

        def longest(without: set[int]) -> list[int]:
            """Ways on lead forward: the ways back are those of inner loops."""
            graph = forward.subgraph(forward.nodes - without)
            ends = [n for n in self.flow.predecessors(begin) if begin <= n <= end and n in graph]
            if begin not in graph or not any(networkx.has_path(graph, begin, n) for n in ends):
                return []
            between = networkx.descendants(graph, begin) | {begin}
            between &= set().union(*(networkx.ancestors(graph, n) | {n} for n in ends))
            return networkx.dag_longest_path(graph.subgraph(between))

        def matmuls(path: list[int]) -> int:
            return sum(self.instructions[n].kind == "mma" for n in path)

        passed_by, best = set[int](), longest(set())
        if not best:
            raise ValueError("no way through the time loop has none of the instructions avoided")
        for wait in self.waits:
            other = longest({*passed_by, wait})
            if other and matmuls(other) == matmuls(best):
                best, passed_by = other, {*passed_by, wait}
        return [self.instructions[n] for n in best]


class Kernel(NamedTuple):
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
    def plan(self) -> persistent.PersistentConfig:
        problem = Problem(cells.get(self.cell), T, B, self.H, self.H, None, self.dtype, "cuda", "torch", tf32=True)
        plan, why = cuda.persistent_config(problem, DEVICE, self.backward)
        if plan is None:
            raise ValueError(f"{self} has no persistent kernel: {'; '.join(why)}")
        return plan

    def compiled(self) -> tuple[nvrtc.Resources, MachineCode]:
        source, options = cuda.text(persistent.translation_unit(self.plan, cells.get(self.cell), self.dtype))
        cubin, name = nvrtc.compile(source, ARCHITECTURE, options), persistent.kernel_name(self.plan)
        return nvrtc.resources(cubin)[name], MachineCode(nvrtc.sass(cubin)[name])


KERNELS = [Kernel(*sizes, backward) for sizes in SIZES for backward in (False, True)]


def of_elements(one: Instruction) -> bool:
    """Whether only warps that have elements execute it: of the cell's mathematics, or a store of its results."""
    return one.base in ("MUFU", "FMUL") or (one.base == "STG" and not one.shared)


def paths(plan: persistent.PersistentConfig, code: MachineCode) -> list[list[Instruction]]:
    """What each warp of a block executes in a time step."""
    words = plan.round_bytes // 16 // plan.blocks if plan.scope == "grid" else plan.threads

    @cache
    def path(elements: bool, publishes: bool) -> list[Instruction]:
        return code.path(
            lambda one: (of_elements(one) and not elements)
            or (one.base == "STG" and one.shared and not publishes)
        )  # fmt: skip

    return [path(first < plan.units * plan.rows, first < words) for first in range(0, plan.threads, 32)]


def busiest(warps: Sequence[list[Instruction]]) -> list[Instruction]:
    """What the scheduler issues that has most to issue."""
    return max((list(chain(*warps[first::SCHEDULERS])) for first in range(SCHEDULERS)), key=len)


# ---- the table ------------------------------------------------------------------------------------------------------


def row(kernel: Kernel) -> Row:
    plan, (used, code) = kernel.plan, kernel.compiled()
    issued = busiest(paths(plan, code))
    count, bound = Counter(one.kind for one in issued), len(issued) / persistent.CYCLES_PER_MICROSECOND
    problem = {"problem": [kernel.cell, kernel.dtype, kernel.H, B], "plan": asdict(plan)}
    took = measured().get(calibration.key(problem))
    return {
        **dict(zip(("cell", "dtype", "H", "way"), kernel.key)),
        "scope": plan.scope, "blocks": str(plan.blocks), "threads": str(plan.threads),
        "registers": str(used.registers), "spills": str(used.spills),
        **{kind: str(count[kind]) for kind in CLASSES}, "issued": str(len(issued)),
        "bound_us": f"{bound:.3f}", "predicted_us": f"{plan.predicted_us:.3f}",
        "predicted_of_bound": f"{plan.predicted_us / bound:.2f}",
        "measured_us": f"{took:.3f}" if took else "",
        "measured_of_bound": f"{took / bound:.2f}" if took else "",
        "measured_of_predicted": f"{took / plan.predicted_us:.2f}" if took else "",
        "nvrtc": nvrtc.version(),
    }  # fmt: skip


@cache
def measured() -> dict[str, float]:
    """By problem and plan, microseconds of a step: the latest that a GPU took."""
    lines = (calibration.read(path) for path in sorted(results.FOLDER.glob("*-plans.jsonl")))
    return {key: line["measured"] for file in lines for key, line in file.items() if line["measured"]}


def read(path: Path = TABLE) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    return row["cell"], row["dtype"], row["H"], row["way"]


def changes(now: Sequence[Row], table: Sequence[Row]) -> list[str]:
    """What the kernels have that isn't in the table, or is another number there."""
    known, differences = {key(row): row for row in table}, []
    for row in now:
        name, before = "{} {} H={} {}".format(*key(row)), known.get(key(row))
        if before is None:
            differences.append(f"{name}: not in the table")
        elif before["nvrtc"] != row["nvrtc"]:
            differences.append(f"{name}: compiled by NVRTC {row['nvrtc']}, in the table by {before['nvrtc']}")
        elif differ := [f"{fact} {before[fact]} -> {row[fact]}" for fact in FACTS if before[fact] != row[fact]]:
            differences.append(f"{name}: {', '.join(differ)}")
    return differences


def command(options: Namespace) -> int:
    """Print the table; write it, compare with it, or print what a warp with elements executes."""
    if why := nvrtc.why_not() or nvrtc.why_no_resources():
        raise ValueError(why)
    words = (options.filter or "").split()
    kernels = [kernel for kernel in KERNELS if {*words} <= {*str(kernel).split()}]
    if not kernels:
        raise ValueError(f"no kernel has the words {options.filter!r}; there are {', '.join(map(str, KERNELS))}")
    if options.code:
        for kernel in kernels:
            print(kernel, *paths(kernel.plan, kernel.compiled()[1])[0], sep="\n")
        return 0
    with ThreadPoolExecutor(len(sched_getaffinity(0))) as pool:
        rows = list(pool.map(row, kernels))
    import pandas

    print(pandas.DataFrame(rows).drop(columns="nvrtc").to_string(index=False))
    known = {key(row): row for row in read()} if TABLE.exists() else {}
    if options.check:
        differ = changes(rows, [*known.values()])
        print("\n".join(differ) or "as in the table")
        return 1 if differ else 0
    known |= {key(row): row for row in rows}
    table = pandas.DataFrame([known[kernel.key] for kernel in KERNELS if kernel.key in known])
    table.to_csv(TABLE, index=False, lineterminator="\n")
    return 0
