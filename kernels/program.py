"""Compiles a cell's page into NumPy calls that allocate nothing and do as many rows as possible in one call.

`step_program(cell)` and `grad_program(cell)` each give a `Program`. The forward LSTM's is, in full,

    add(x[0:4], h[0:4], v[0:4])     the pre-activations of all gates
    tanh(v[0:4], v[0:4])            one tanh for all of them: sigmoid(a) = 1/2 + 1/2 tanh(a/2), and
    multiply(v[0:3], c0, v[0:3])    the inner half is already in the weights (`Layout.scale`)
    add(v[0:3], c0, v[0:3])         c0 = 1/2; the rows of v are now i, f, o and the candidate
    multiply(v[1], s1, n1)          f c
    multiply(v[0], v[3], w[0])      i g
    add(n1, w[0], n1)               c'
    tanh(n1, n0)
    multiply(v[2], n0, n0)          h'

A row is one gate or one temporary of one instant, an array [H, B]. Rows that meet the same operation at the same time
are placed next to each other, and the call takes the whole block. The arrays, by letter:

    x  [G, H, B]  input part, in `Layout.inputs` order     h  [G, H, B]  recurrent part, in `Layout.recurrent` order
    s0 s1 ...     states before, [H, B] each               n0 n1 ...     states after
    v  [K, H, B]  what step saves for grad                 b  [n, H, B]  recurrent bias of the n separate gates
    q0 q1 ...     gradients of the states after            e0 e1 ...     gradients of the states before
    d  [G+n, H, B]  gate gradients: `d[:G]` those of x, in inputs order; `d[n:]` those of h, in recurrent order
    m  [E, H, B]  what the page takes beside these         g  [learned, H, B]  gradients of the first of them
    w             temporaries                              u  [rows, 1, B]  those that are the same for all units
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from .cells import Cell, step_graph
from .trace import Graph, Symbol


@dataclass(frozen=True)
class Layout:
    """How the NumPy backend orders and scales the gates, so that equal work lies side by side.

    Separate gates stand first among the inputs and last in the recurrence: then the gradients of both parts are
    contiguous blocks of one array. Among the others, those that a sigmoid takes come first.
    """

    inputs: tuple[int, ...]  # gate at each row of x
    recurrent: tuple[int, ...]  # gate at each row of h
    separate: tuple[int, ...]  # gates whose two parts have different gradients
    scale: tuple[float, ...]  # by gate: 1/2 where only a sigmoid sees x + h, else 1


@cache
def layout(cell: Cell) -> Layout:
    graph = step_graph(cell)
    users = consumers(graph)

    def squashed(g: int) -> bool:
        x, h = graph.node("input", "x", g), graph.node("input", "h", g)
        met = graph.nodes.get(("add", x, h))
        return met is not None and users[x] == users[h] == [met] and [u.op for u in users[met]] == ["sigmoid"]

    halved = [squashed(g) for g in range(cell.G)]
    separate = tuple(g for g in range(cell.G) if cell.separate[g])
    shared = tuple(sorted((g for g in range(cell.G) if not cell.separate[g]), key=lambda g: not halved[g]))
    return Layout(separate + shared, shared + separate, separate, tuple(0.5 if half else 1.0 for half in halved))


@cache
def natural(cell: Cell) -> Layout:
    """The gates as torch has them: for a few instants, which wouldn't repay a copy of the weights."""
    gates = tuple(range(cell.G))
    return Layout(gates, gates, layout(cell).separate, (1.0,) * cell.G)


@dataclass(frozen=True)
class Program:
    """Calls, in order, on `arrays`."""

    calls: tuple[str, ...]
    rows: int  # temporaries ...
    shared: int  # ... and those that are the same for all units
    arrays: tuple[str, ...]
    constants: tuple[float, ...]
    written: frozenset[str]  # which of the arrays the calls write, e.g. {"e1"}: a zero gradient writes nothing

    def bind(self, row: tuple[int, int], dtype: np.dtype, **fixed: np.ndarray) -> Callable[..., None]:
        """A function that runs the calls on rows of that shape. `fixed` gives the arrays that stay the same ones from
        instant to instant; the others are the function's arguments, in the order of `arrays`."""
        temporaries = np.empty((self.rows, *row), dtype), np.empty((self.shared, 1, row[1]), dtype)
        constants = [np.array(value, dtype) for value in self.constants]  # a scalar would be made one at every call
        return factory(self, tuple(fixed))(*temporaries, *fixed.values(), *constants)


@cache
def factory(program: Program, fixed: tuple[str, ...]) -> Callable[..., Callable[..., None]]:
    """The program as Python: a function of the arrays that stay, which slices them once and gives one of those that
    change. For the LSTM `factory(...).text` begins

        def bind(w, u, h, b, v, c0):
            h_0_4 = h[0:4]
            v_0_4 = v[0:4]
            ...
            def run(x, s0, s1, n0, n1):
                add(x[0:4], h_0_4, v_0_4)
    """
    stay = ("w", "u", *fixed)
    views: dict[str, str] = {}

    def name(operand: str) -> str:
        array, _, rows = operand.partition("[")
        if array not in stay or not rows:
            return operand
        return views.setdefault(operand, f"{array}_{rows[:-1].replace(':', '_')}")

    body = []
    for call in program.calls:
        operation, operands = call[:-1].split("(")
        body.append(f"        {operation}({', '.join(map(name, operands.split(', ')))})")
    lines = [
        f"def bind({', '.join([*stay, *(f'c{k}' for k in range(len(program.constants)))])}):",
        *(f"    {view} = {operand}" for operand, view in views.items()),
        f"    def run({', '.join(array for array in program.arrays if array not in fixed)}):",
        *(body or ["        pass"]),
        "    return run",
    ]
    names: dict[str, Any] = dict(CALLABLES)
    exec(compile("\n".join(lines), "<cell program>", "exec"), names)
    names["bind"].text = "\n".join(lines)
    return names["bind"]


CALLABLES: dict[str, Callable] = {  # operands first, the result's place last
    **{name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "negative", "tanh", "exp", "log")},
    "maximum": lambda a, b, out: np.maximum(a, b, out=out),  # the only one that NumPy wants to be told by keyword
    "positive": lambda a, out: np.greater(a, 0, out=out),
    "rsqrt": lambda a, out: np.divide(1, np.sqrt(a, out), out),
    "mean": lambda a, out: np.divide(np.add.reduce(a, -2, keepdims=True), a.shape[-2], out),
    "where": lambda c, a, b, out: np.copyto(out, np.where(np.greater(c, 0), a, b)),
    "copy": lambda a, out: np.copyto(out, a),
}


@cache
def step_program(cell: Cell, plan: Layout | None = None) -> Program:
    """x, h, states -> states after, and v. In the order of `layout`, unless another plan is given."""
    plan = plan or layout(cell)
    graph = Graph()
    x, h = [[graph.node("input", name, order.index(g)) for g in range(cell.G)]
            for name, order in (("x", plan.inputs), ("h", plan.recurrent))]  # fmt: skip
    for row, g in enumerate(plan.separate):
        h[g] = h[g] + graph.node("input", "b", row)
    state = [graph.node("input", f"s{k}") for k in range(cell.S)]
    new, saved = cell.step(x, h, state, *extra(cell, graph))
    halved = {graph.node("add", x[g], h[g]) for g in range(cell.G) if plan.scale[g] != 1}
    places: dict[Place, Symbol] = {(f"n{k}", None): value for k, value in enumerate(new)}
    places |= {("v", row): saved[k] for row, k in enumerate(saved_order(cell))}
    return schedule(
        graph, places, halved, ("x", "h", "b", *"m" * bool(cell.E), *each("s", cell.S), *each("n", cell.S), "v")
    )


def extra(cell: Cell, graph: Graph) -> tuple[list[Symbol], ...]:
    """The page's argument beside gates and states, if it has one."""
    return ([graph.node("input", "m", row) for row in range(cell.E)],) if cell.E else ()


@cache
def saved_order(cell: Cell) -> tuple[int, ...]:
    """Row -> index into what `step` saves: gates that are computed together are saved together."""
    graph = step_graph(cell)
    sigmoids_first = [value.op != "sigmoid" for value in graph.outputs[1]]
    return tuple(sorted(range(cell.K), key=sigmoids_first.__getitem__))


@cache
def grad_program(cell: Cell) -> Program:
    """Gradients of the states after, both states, v -> d, g, and gradients of the states before."""
    plan, rows = layout(cell), saved_order(cell)
    graph = Graph()
    q, n, s = ([graph.node("input", name) for name in each(letter, cell.S)] for letter in "qns")
    v = [graph.node("input", "v", rows.index(k)) for k in range(cell.K)]
    dx, dh, dstate, *of_extra = cell.grad(q, n, s, v, *extra(cell, graph))
    shift = len(plan.separate)
    places: dict[Place, Symbol] = {("d", row): graph.symbol(dx[g]) for row, g in enumerate(plan.inputs)}
    places |= {("d", shift + row): graph.symbol(dh[g]) for row, g in enumerate(plan.recurrent)}
    places |= {(f"e{k}", None): graph.symbol(value) for k, value in enumerate(dstate)}
    places |= {("g", row): graph.symbol(value) for row, value in enumerate(of_extra[0] if of_extra else ())}
    zero = graph.symbol(0.0)
    places = {place: value for place, value in places.items() if value is not zero}
    letters = (*each("q", cell.S), *each("n", cell.S), *each("s", cell.S), "v", "d", *each("e", cell.S))
    letters += (*"m" * bool(cell.E), *"g" * bool(cell.learned))
    return schedule(graph, places, frozenset(), letters)


def each(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{k}" for k in range(count))


def consumers(graph: Graph) -> dict[Symbol, list[Symbol]]:
    users: dict[Symbol, list[Symbol]] = {node: [] for node in graph.nodes.values()}
    for node in graph.nodes.values():
        for operand in operands(node):
            users[operand].append(node)
    return users


def operands(node: Symbol) -> Sequence[Symbol]:
    return () if node.op in ("input", "constant") else node.operands


# ---- from a graph to calls ----------------------------------------------------------------------------------------

Place = tuple[str, int | None]  # an array's letter, and the row in it; None: the array is a single row


def schedule(graph: Graph, places: dict[Place, Symbol], halved: frozenset | set, arrays: tuple[str, ...]) -> Program:
    """As soon as possible suits forward, all gates at once; as late as possible, backward: the one with fewer calls."""
    graph, places = without_sigmoid(graph, places, halved)
    candidates = [emit(graph, places, arrays, late) for late in (False, True)]
    return min(candidates, key=lambda program: (len(program.calls), program.rows))


def without_sigmoid(graph: Graph, places: dict[Place, Symbol], halved) -> tuple[Graph, dict[Place, Symbol]]:
    """The same graph with sigmoid(a) as 1/2 + 1/2 tanh(a/2); the symbols in `halved` hold a/2 already."""
    lowered = Graph()
    image: dict[Symbol, Symbol] = {}
    for node in graph.nodes.values():
        if node.op == "sigmoid":
            (a,) = node.operands
            half = image[a] if a in halved else image[a] * 0.5
            image[node] = half.apply("tanh") * 0.5 + 0.5
        else:
            image[node] = lowered.node(node.op, *(image.get(o, o) for o in node.operands))
    return lowered, {place: image[value] for place, value in places.items()}


def emit(graph: Graph, places: dict[Place, Symbol], arrays: tuple[str, ...], late: bool) -> Program:
    where: dict[Symbol, Place] = {}  # each symbol's place
    for node in graph.nodes.values():
        if node.op == "input":
            where[node] = (node.operands[0], node.operands[1] if len(node.operands) > 1 else None)
    copies = []  # an input that is also an output, an output that stands in two places, or one for all units
    for place, value in places.items():
        if value in where or value.uniform:
            copies.append((place, value))
        else:
            where[value] = place
    groups = [members for _, members in sorted(levels(graph, set(places.values()), late).items())]
    compute_in_place(groups, where)
    copied = [value for _, value in copies if value not in where and value.op != "constant"]
    rows, shared = place_temporaries(groups, where, copied)
    constants: list[float] = []
    calls = []
    for members in groups:
        for run in runs(sorted(members, key=lambda node: key(where[node])), where):
            columns = [[node.operands[j] for node in run] for j in range(len(run[0].operands))]
            arguments = [block(column, where, constants) for column in columns]
            calls.append(f"{run[0].op}({', '.join([*arguments, block(run, where, constants)])})")
    for place, value in copies:
        calls.append(f"copy({block([value], where, constants)}, {reference(place)})")
    written = frozenset(array for array, _ in places)
    return Program(tuple(calls), rows, shared, arrays, tuple(constants), written)


def levels(graph: Graph, wanted: set[Symbol], late: bool) -> dict[tuple[int, str, bool], list[Symbol]]:
    """Operations that can be done at the same time and are the same, as groups in an order that computes."""
    needed = set()
    for node in reversed(graph.nodes.values()):
        if node in wanted or node in needed:
            needed |= {node, *operands(node)}
    users = consumers(graph)
    level: dict[Symbol, int] = {}
    if late:
        for node in reversed(graph.nodes.values()):
            level[node] = min((level[user] for user in users[node] if user in needed), default=0) - 1
    else:
        for node in graph.nodes.values():
            level[node] = max((level[operand] for operand in operands(node)), default=0) + 1
    grouped: dict[tuple[int, str, bool], list[Symbol]] = {}
    for node in graph.nodes.values():
        if node in needed and operands(node):
            grouped.setdefault((level[node], node.op, node.uniform), []).append(node)
    return grouped


def compute_in_place(groups: list[list[Symbol]], where: dict[Symbol, Place]) -> None:
    """Let a value that only one operation reads live where that operation's result will stand."""
    uses = Counter(operand for members in groups for node in members for operand in node.operands)
    for node in (node for members in reversed(groups) for node in members):
        free = [o for o in node.operands if o not in where and not o.uniform and uses[o] == 1]
        if node in where and free:
            where[free[0]] = where[node]


def place_temporaries(groups: list[list[Symbol]], where: dict[Symbol, Place], copied: list[Symbol]) -> tuple[int, int]:
    """Give every temporary a row of w, or of u if it is the same for all units: operands of one group side by side,
    rows of the dead used again. `copied` are read at the end. -> rows of each
    """
    bundles: list[list[Symbol]] = []

    def place(values: Iterable[Symbol]) -> None:
        for uniform in (False, True):
            bundle = [o for o in values if o not in where and o.op != "constant" and o.uniform == uniform]
            for row, node in enumerate(bundle):
                where[node] = (f"bundle{len(bundles)}", row)
            if bundle:
                bundles.append(bundle)

    place(copied)
    for members in reversed(groups):
        members = sorted(members, key=lambda node: key(where[node]))
        for j in range(len(members[0].operands)):
            place(dict.fromkeys(node.operands[j] for node in members))
    made = {node: at for at, members in enumerate(groups) for node in members}
    last_use = {operand: at for at, members in enumerate(groups) for node in members for operand in node.operands}
    last_use |= dict.fromkeys(copied, len(groups))
    placed: dict[str, list[tuple[int, int, int, int]]] = {"w": [], "u": []}  # first row, past the last, born, dead
    for bundle in sorted(bundles, key=lambda bundle: min(made[node] for node in bundle)):
        letter = "u" if bundle[0].uniform else "w"
        born, dead = min(made[node] for node in bundle), max(last_use[node] for node in bundle)
        taken = sorted(span[:2] for span in placed[letter] if span[2] <= dead and born <= span[3])
        row = 0
        for start, end in taken:
            if row + len(bundle) <= start:
                break
            row = max(row, end)
        placed[letter].append((row, row + len(bundle), born, dead))
        for k, node in enumerate(bundle):
            where[node] = (letter, row + k)
    rows, shared = (max((end for _, end, _, _ in spans), default=0) for spans in placed.values())
    return rows, shared


def runs(members: list[Symbol], where: dict[Symbol, Place]) -> Iterator[list[Symbol]]:
    """Cut a group into blocks that one call can do: every operand either the same row throughout or the next one."""

    def follows(a: Place, b: Place) -> bool:
        return a[0] == b[0] and a[1] is not None and b[1] == a[1] + 1

    def pattern(a: Symbol, b: Symbol) -> tuple | None:
        if not follows(where[a], where[b]):
            return None
        steps = []
        for p, q in zip(a.operands, b.operands, strict=True):
            if p is q:
                steps.append("same")
            elif p in where and q in where and follows(where[p], where[q]):
                steps.append("next")
            else:
                return None
        return tuple(steps)

    run, joined = [members[0]], None
    for a, b in pairwise(members):
        steps = pattern(a, b)
        if steps is not None and joined in (None, steps):
            run.append(b)
            joined = steps
        else:
            yield run
            run, joined = [b], None
    yield run


def key(place: Place) -> tuple[str, int]:
    return place[0], -1 if place[1] is None else place[1]


def constant(value: float, constants: list[float]) -> str:
    if value not in constants:
        constants.append(value)
    return f"c{constants.index(value)}"


def reference(place: Place, count: int = 1) -> str:
    array, row = place
    if row is None:
        return array
    return f"{array}[{row}]" if count == 1 else f"{array}[{row}:{row + count}]"


def block(column: Sequence[Symbol], where: dict[Symbol, Place], constants: list[float]) -> str:
    """The text of one operand of a call, for a whole run."""
    if column[0].op == "constant":
        return constant(column[0].operands[0], constants)
    return reference(where[column[0]], len(list(groupby(column))))
