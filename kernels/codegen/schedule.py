"""Schedules a graph as NumPy calls, each for as many rows as possible. The passes are

    lower_sigmoid         sigmoid as operations that NumPy has
    group_by_depth        operations that are the same and can run at the same time
    compute_in_place      temporaries into the rows of the results that they end in
    allocate_temporaries  the others by a linear scan over their live ranges
    pack_adjacent         rows of a group that lie side by side into one call (superword-level parallelism, SLP)
    compile_program       the calls as Python

None of them searches: trying all orders would save 3 % of the calls, and none of the plain LSTM, GRU and RNN.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..trace import Graph, Symbol, ascending, operands

WHOLE = -1
Place = tuple[str, int]  # an array's letter, and the row in it; WHOLE: the array is a single row
Outputs = dict[Place, Symbol]
Groups = list[list[Symbol]]


@dataclass(frozen=True)
class Program:
    """Calls, in order, on `arrays`."""

    calls: tuple[str, ...]
    rows: int  # temporaries ...
    shared: int  # ... and those that are the same for all units
    arrays: tuple[str, ...]
    constants: tuple[float, ...]

    def bind(
        self, row: tuple[int, int], dtype: np.dtype, **fixed: np.ndarray
    ) -> tuple[Callable[..., tuple], Callable[..., None]]:
        """-> make_views, execute: `execute(*make_views(*arrays))` makes the calls on rows of that shape. The views may
        be kept. `fixed` gives the arrays that stay the same ones from time step to time step, the others are the
        arguments of `make_views`, in the order of `arrays`."""
        return self._bind((), row, dtype, fixed)

    def execute_batched(self, row: tuple[int, int], dtype: np.dtype, **arrays: np.ndarray) -> None:
        """The calls for several time steps together: every array has these as a first axis."""
        make_views, execute = self._bind((len(next(iter(arrays.values()))),), row, dtype, {})
        execute(*make_views(*(arrays[name] for name in self.arrays)))

    def _bind(
        self, batch: tuple[int, ...], row: tuple[int, int], dtype: np.dtype, fixed: dict[str, np.ndarray]
    ) -> tuple[Callable[..., tuple], Callable[..., None]]:
        temporaries = (np.empty((*batch, *shape), dtype) for shape in ((self.rows, *row), (self.shared, 1, row[1])))
        constants = [np.array(value, dtype) for value in self.constants]  # a scalar would be made one at every call
        return compile_program(self, tuple(fixed), bool(batch))(*temporaries, *fixed.values(), *constants)


def schedule(
    outputs: Outputs, arrays: tuple[str, ...], scaled: Collection[Symbol] = (), sigmoid: str = "tanh"
) -> Program:
    outputs = lower_sigmoid(outputs, scaled, sigmoid)
    order = list(ascending(outputs.values()))
    constants = [node for node in order if node.op == "constant"]
    place: dict[Symbol, Place] = {constant: (f"c{k}", WHOLE) for k, constant in enumerate(constants)}
    place |= {node: node.operands for node in order if node.op == "input"}
    copies = []  # an output that is also an input, that stands in two places, or that is the same for all units
    for at, value in outputs.items():
        if value in place or value.is_broadcast:
            copies.append((at, value))
        else:
            place[value] = at
    groups = group_by_depth(order)
    compute_in_place(groups, place)
    rows, shared = allocate_temporaries(groups, place, [value for _, value in copies])
    calls = [
        f"{pack[0].op}({', '.join(block(column, place) for column in (*zip(*(node.operands for node in pack)), pack))})"
        for members in groups
        for pack in pack_adjacent(members, place)
    ]
    calls += [f"copy({block([value], place)}, {reference(*at)})" for at, value in copies]
    return Program(tuple(calls), rows, shared, arrays, tuple(value for node in constants for value in node.operands))


def lower_sigmoid(outputs: Outputs, scaled: Collection[Symbol], by: str) -> Outputs:
    """sigmoid(a) as 1/2 + 1/2 tanh(a/2), or as 1 / (1 + exp(-a)); symbols in `scaled` hold a/2 or -a already."""
    lowered = Graph()
    image: dict[Symbol, Symbol] = {}
    for node in ascending(outputs.values()):
        if node.op != "sigmoid":
            image[node] = lowered.node(node.op, *(image.get(operand, operand) for operand in node.operands))
            continue
        (a,) = node.operands
        if by == "tanh":
            image[node] = (image[a] if a in scaled else image[a] * 0.5).apply("tanh") * 0.5 + 0.5
        else:
            image[node] = 1.0 / (1.0 + (image[a] if a in scaled else -image[a]).apply("exp"))
    return {place: image[value] for place, value in outputs.items()}


def consumers(nodes: Iterable[Symbol]) -> dict[Symbol, list[Symbol]]:
    users: dict[Symbol, list[Symbol]] = defaultdict(list)
    for node in nodes:
        for operand in operands(node):
            users[operand].append(node)
    return users


def depths(nodes: Iterable[Symbol]) -> dict[Symbol, int]:
    """As soon as possible: after the last of its operands."""
    depth: dict[Symbol, int] = {}
    for node in nodes:
        depth[node] = max((depth[operand] for operand in operands(node)), default=-1) + 1
    return depth


def group_by_depth(order: list[Symbol]) -> Groups:
    depth = depths(order)
    groups: dict[tuple[int, str, bool], list[Symbol]] = defaultdict(list)
    for node in order:
        if operands(node):
            groups[depth[node], node.op, node.is_broadcast].append(node)
    return [groups[key] for key in sorted(groups)]


def compute_in_place(groups: Groups, place: dict[Symbol, Place]) -> None:
    """Let a value that only one operation reads live where that operation's result will stand; not one of two that one
    call can compute side by side."""
    uses = Counter(operand for members in groups for node in members for operand in node.operands)
    group_of = {node: at for at, members in enumerate(groups) for node in members}

    def can_pack(a: Symbol, b: Symbol) -> bool:
        steps = strides(a, b, place) if group_of[a] == group_of[b] else None
        return steps is not None and (set(steps) <= {0, 1} or set(steps) <= {0, -1})

    for node in (node for members in reversed(groups) for node in members if node in place):
        free = [o for o in node.operands if o not in place and not o.is_broadcast and uses[o] == 1]
        if free and not (len(free) == 2 and can_pack(*free)):
            place[free[0]] = place[node]


def allocate_temporaries(groups: Groups, place: dict[Symbol, Place], read_last: list[Symbol]) -> tuple[int, int]:
    """Give every temporary a row of w, or of u if it is the same for all units, by a linear scan over live ranges: the
    operands of a group stand side by side, and rows are used again. -> rows of each"""
    packs: list[list[Symbol]] = []

    def pack(values: Iterable[Symbol]) -> None:
        for uniform in (False, True):
            fresh = [value for value in values if value not in place and value.is_broadcast == uniform]
            place.update((value, (f"pack{len(packs)}", row)) for row, value in enumerate(fresh))
            if fresh:
                packs.append(fresh)

    pack(dict.fromkeys(read_last))
    for members in reversed(groups):
        for column in zip(*(node.operands for node in sorted(members, key=place.__getitem__))):
            pack(dict.fromkeys(column))
    made = {node: at for at, members in enumerate(groups) for node in members}
    live_end = {operand: at for at, members in enumerate(groups) for node in members for operand in node.operands}
    live_end |= dict.fromkeys(read_last, len(groups))

    def live_start(values: list[Symbol]) -> int:
        return min(made[value] for value in values)

    def by_start(values: list[Symbol]) -> tuple[int, list[Place]]:
        """Those of one time in the order of what they are made of."""
        return live_start(values), [place[operand] for operand in values[0].operands]

    live: dict[str, list[tuple[int, int, int]]] = {"w": [], "u": []}  # first row, past the last, live_end
    rows = {"w": 0, "u": 0}
    for values in sorted(packs, key=by_start):
        letter = "u" if values[0].is_broadcast else "w"
        live[letter] = sorted(each for each in live[letter] if each[2] >= live_start(values))
        row = 0
        for begin, past, _ in live[letter]:
            if row + len(values) <= begin:
                break
            row = max(row, past)
        live[letter].append((row, row + len(values), max(live_end[value] for value in values)))
        rows[letter] = max(rows[letter], row + len(values))
        place.update((value, (letter, row + k)) for k, value in enumerate(values))
    return rows["w"], rows["u"]


def strides(a: Symbol, b: Symbol, place: dict[Symbol, Place]) -> list[int] | None:
    """By operand, how many rows that of b is past that of a; None if they aren't in one array, or not placed yet."""
    steps = []
    for p, q in zip(a.operands, b.operands, strict=True):
        (array, row), (other, row_of_other) = place.get(p, (p, 0)), place.get(q, (q, 0))
        if array != other:
            return None
        steps.append(row_of_other - row)
    return steps


def pack_adjacent(members: list[Symbol], place: dict[Symbol, Place]) -> Iterator[list[Symbol]]:
    """Cut a group into packs that one call can do: every operand either the same row throughout or the next one."""
    members = sorted(members, key=place.__getitem__)
    pack, stride = members[:1], None
    for a, b in pairwise(members):
        steps, (array, row) = strides(a, b, place), place[a]
        if steps is not None and set(steps) <= {0, 1} and place[b] == (array, row + 1) and stride in (None, steps):
            pack.append(b)
            stride = steps
        else:
            yield pack
            pack, stride = [b], None
    yield pack


def block(column: Iterable[Symbol], place: dict[Symbol, Place]) -> str:
    """The text of one operand of a call, for a whole pack."""
    first, *others = dict.fromkeys(column)
    return reference(*place[first], 1 + len(others))


def reference(array: str, row: int, count: int = 1) -> str:
    if row == WHOLE:
        return array
    return f"{array}[{row}]" if count == 1 else f"{array}[{row}:{row + count}]"


@cache
def compile_program(program: Program, fixed: tuple[str, ...], batched: bool) -> Callable[..., tuple]:
    """The program as Python: a function of the arrays that stay, which slices them once. The LSTM's begins

        def bind(w, u, h, c0):
            h_0_4 = h[0:4]
            w_0 = w[0]
            def make_views(x, s, n, v, r):
                return x[0:4], v[0:4], v[0:3], ...
            def execute(x_0_4, v_0_4, v_0_3, ...):
                add(x_0_4, h_0_4, v_0_4)

    For several time steps together the views are x[:, 0:4], w[:, 0:1] and s[:, None].
    """
    stay = ("w", "u", *fixed)
    views: dict[str, str] = {}  # the name of each

    def name(operand: re.Match) -> str:
        array, rows, more = operand.groups()
        if not rows and array not in program.arrays:
            return array  # a constant
        axis = f"{rows}{more or f':{int(rows) + 1}'}" if rows else "None"
        view = f"{array}[:, {axis}]" if batched else operand[0]
        return views.setdefault(view, re.sub(r"\W+", "_", operand[0]).rstrip("_"))

    body = [re.sub(r"(?<=[( ])(\w+)(?:\[(\d+)(:\d+)?\])?", name, call) for call in program.calls]
    changing = {view: label for view, label in views.items() if view.partition("[")[0] not in stay}
    lines = [
        f"def bind({', '.join([*stay, *(f'c{k}' for k in range(len(program.constants)))])}):",
        *(f"    {label} = {view}" for view, label in views.items() if view not in changing and view != label),
        f"    def make_views({', '.join(array for array in program.arrays if array not in fixed)}):",
        f"        return {', '.join([*changing, ''])[:-1] or '()'}",
        f"    def execute({', '.join(changing.values())}):",
        *(f"        {call}" for call in body or ["pass"]),
        "    return make_views, execute",
    ]
    names: dict[str, Any] = dict(CALLABLES)
    exec(compile("\n".join(lines), "<cell program>", "exec"), names)
    return names["bind"]


ZERO = np.zeros((), np.float32)  # of a Python number NumPy would make an array at every call
CALLABLES: dict[str, Callable] = {  # operands first, the result's place last
    **{name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "negative", "tanh", "exp", "log")},
    "maximum": lambda a, b, out: np.maximum(a, b, out=out),  # the only one that NumPy wants to be told by keyword
    "positive": lambda a, out: np.subtract(1, np.less_equal(a, 0, out=out), out=out),  # NaN isn't <= 0
    "rsqrt": lambda a, out: np.divide(1, np.sqrt(a, out), out),
    "mean": lambda a, out: np.divide(np.add.reduce(a, -2, keepdims=True), a.shape[-2], out),
    "where": lambda c, a, b, out: np.copyto(out, np.where(np.greater(c, ZERO), a, b)),
    "copy": lambda a, out: np.copyto(out, a),
}
