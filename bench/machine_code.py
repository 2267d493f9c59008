"""The machine code of a kernel, as far as its time loop: which instructions a warp executes in a time step.

    code = MachineCode(nvrtc.sass(cubin)["resident_forward"])
    code.path(lambda instruction: False)  # -> instructions, in their order

Read from nvdisasm's text and nothing else, so it knows what branches there are and not which are taken. It assumes

- the time loop is the outermost loop that has the product (HMMA, or FFMA where there is none);
- a warp takes the longest way through it, except through instructions that the caller knows it has no part in;
- an inner loop goes round once; if it is a wait that can be passed by, that isn't entered, and neither is what lies
  behind the time loop, which is for waits that take long;
- a trap isn't executed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate that it is executed under, or nothing
    opcode: str  # with its modifiers
    arguments: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """Its class, one of `CLASSES`."""
        return next(kind for kind, begin in CLASSES.items() if re.match(begin, self.base))

    @property
    def waits(self) -> bool:
        """Whether it is what a wait looks at: a barrier in shared memory, or memory that blocks share."""
        return self.base == "SYNCS" or (self.base == "LDG" and self.shared)

    @property
    def shared(self) -> bool:
        """Whether it is an access to global memory that blocks share."""
        return "STRONG" in self.opcode

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        return int(self.arguments.split()[-1], 16) if self.base == "BRA" else None

    def __str__(self) -> str:
        return f"{self.address:5x}  {f'@{self.guard} ' if self.guard else ''}{self.opcode} {self.arguments}"


class NoWay(ValueError):
    pass


class MachineCode:
    def __init__(self, text: str) -> None:
        self.instructions = [
            Instruction(int(address, 16), guard, opcode, arguments)
            for address, guard, opcode, arguments in LINE.findall(text)
        ]
        strange = {one.base for one in self.instructions} & {"BRX", "BRXU", "JMP", "JMX", "CALL", "RET"}
        if strange or not self.instructions:
            raise ValueError(f"no machine code that can be followed: {', '.join(sorted(strange)) or 'it is empty'}")
        self.at = {one.address: n for n, one in enumerate(self.instructions)}
        self.followers = [self._followers(n) for n in range(len(self.instructions))]

    def _followers(self, n: int) -> list[int]:
        one = self.instructions[n]
        leads_on = bool(one.guard) or one.base not in ("BRA", "EXIT")
        found = [n + 1] if leads_on and n + 1 < len(self.instructions) else []
        return found if one.target is None else [*found, self.at[one.target]]

    @cached_property
    def time_loop(self) -> tuple[int, int]:
        """The numbers of its first instruction and of the last branch back to it."""
        before: list[list[int]] = [[] for _ in self.instructions]
        for n, onward in enumerate(self.followers):
            for next in onward:
                before[next].append(n)
        branches = {min(onward) for n, onward in enumerate(self.followers) if onward and min(onward) < n}
        loops = {frozenset(reached(first, self.followers) & reached(first, before)) for first in branches}
        for product in ("HMMA", "FFMA"):
            found = [loop for loop in loops if any(self.instructions[n].base == product for n in loop)]
            if found:
                loop = max(found, key=len)
                begin = min(n for n in loop if not loop.issuperset(before[n]))  # where it is entered
                return begin, max(n for n in before[begin] if n in loop)
        raise ValueError("no loop has a product")

    @cached_property
    def waits(self) -> list[Instruction]:
        """The first instructions of inner loops that wait."""
        begin, end = self.time_loop
        found = []
        for n in range(begin, end):
            target = self.instructions[n].target
            first = n + 1 if target is None else self.at[target]
            if begin < first <= n and any(one.waits for one in self.instructions[first : n + 1]):
                found.append(self.instructions[first])
        return found

    def path(self, avoided: Callable[[Instruction], bool]) -> list[Instruction]:
        """What a warp executes that has no part in the instructions avoided."""
        passed_by: set[Instruction] = set()
        found = self.longest(avoided)
        for wait in self.waits:
            without = {*passed_by, wait}
            try:
                other = self.longest(lambda one: avoided(one) or one in without)  # noqa: B023
            except NoWay:
                continue
            if products(other) == products(found):
                found, passed_by = other, without
        return found

    def longest(self, avoided: Callable[[Instruction], bool]) -> list[Instruction]:
        """The longest way through the time loop that has none of the instructions avoided but under a predicate."""
        begin, end = self.time_loop
        best: dict[int, tuple[int, int]] = {}  # from here to the end: how many, and which comes next
        # Ways on lead forward: the ways back are those of inner loops.
        for n in range(end, begin - 1, -1):
            one = self.instructions[n]
            if one.base == "BPT" or (avoided(one) and not one.guard):
                continue
            onward = [next for next in self.followers[n] if n < next <= end and next in best]
            if begin in self.followers[n]:
                best[n] = 1, -1
            if onward:
                longest = max(onward, key=lambda next: best[next][0])
                best[n] = max(best.get(n, (0, -1)), (1 + best[longest][0], longest))
        if begin not in best:
            raise NoWay("no way through the time loop has none of the instructions avoided")
        found, n = [], begin
        while n >= 0:
            found.append(self.instructions[n])
            n = best[n][1]
        return found


def products(path: list[Instruction]) -> int:
    """How many there are in it."""
    return sum(one.kind == "mma" for one in path)


def reached(first: int, onward: list[list[int]]) -> set[int]:
    """`first` and what can come after it."""
    found, left = {first}, [first]
    while left:
        new = set(onward[left.pop()]) - found
        found |= new
        left += new
    return found
