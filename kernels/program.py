"""Compiles a cell's page into NumPy calls that allocate nothing and do as many rows as possible in one call.

`step_program(cell)` and `grad_program(cell)` each give a `Program`. The forward LSTM's is, in full,

    add(x[0:4], h[0:4], v[0:4])     the pre-activations of all gates
    tanh(v[0:4], v[0:4])            one tanh for all of them: sigmoid(a) = 1/2 + 1/2 tanh(a/2), and
    multiply(v[0:3], c0, v[0:3])    the inner half is already in the weights (`Layout.scale`)
    add(v[0:3], c0, v[0:3])         c0 = 1/2; the rows of v are now o, i, f and the candidate, behind it c
    multiply(v[1:3], v[3:5], w[0:2])
    add(w[1], w[0], r[4])           c' = f c + i g, in the record of the next instant
    tanh(r[4], n)
    multiply(v[0], n, n)            h'

A row is one gate or one temporary of one instant, an array [H, B]. Rows that meet the same operation at the same time
are placed next to each other, and the call takes the whole block. The arrays, by letter:

    x  [G, H, B]  input part, in `Layout.inputs` order     h  [G, H, B]  recurrent part, in `Layout.recurrent` order
    s  [H, B]     h before                                 n  [H, B]  h after
    v  [K+S-1, H, B]  the record of the instant: what step saves for grad, and the other states before
    r  [K+S-1, H, B]  that of the next one: the other states after
    b  [n, H, B]  recurrent bias of the n separate gates   m  [E, H, B]  what the page takes beside these
    q0 q1 ...     gradients of the states after            c  what they are multiplied by (`Gradient`)
    d  gate gradients: `d[:G]` those of x, in inputs order; `d[n:G+n]` those of h, in recurrent order; behind them
       gradients of the states before
    g  [learned, H, B]  gradients of the first of m
    w  temporaries                                         u  [rows, 1, B]  those that are the same for all units
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, pairwise, permutations, product
from typing import Any

import numpy as np

from .cells import Cell, step_graph
from .trace import Graph, Symbol, operands

Place = tuple[str, int | None]  # an array's letter, and the row in it; None: the array is a single row


@dataclass(frozen=True)
class Layout:
    """How the NumPy backend orders and scales the gates, so that equal work lies side by side.

    Separate gates stand first among the inputs and last in the recurrence: then the gradients of both parts are
    contiguous blocks of one array. Among the others, those that a sigmoid takes come first.
    """

    inputs: tuple[int, ...]  # gate at each row of x
    recurrent: tuple[int, ...]  # gate at each row of h
    separate: tuple[int, ...]  # gates whose two parts have different gradients
    scale: tuple[float, ...]  # by gate: 1/2 or -1 where only a sigmoid sees x + h, else 1
    saved: tuple[int, ...]  # at each row of v, the index into what `step` saves: gates computed together lie together
    sigmoid: str = (
        "tanh"  # what it is made of: "tanh", for fewer calls, or "exp", which takes half the time for a value
    )


@cache
def layout(cell: Cell) -> Layout:
    """Of the orders that there are for gates that a sigmoid takes, the one with the fewest calls."""
    return min(
        layouts(cell), key=lambda plan: len(step_program(cell, plan).calls) + len(gradient(cell, plan).grad.calls)
    )


def layouts(cell: Cell) -> Iterator[Layout]:
    graph = step_graph(cell)
    users = consumers(graph)
    met = [graph.nodes.get(("add", graph.node("input", "x", g), graph.node("input", "h", g))) for g in range(cell.G)]

    def squashed(g: int) -> bool:
        x, h, a = graph.node("input", "x", g), graph.node("input", "h", g), met[g]
        return a is not None and users[x] == users[h] == [a] and [user.op for user in users[a]] == ["sigmoid"]

    halved = [squashed(g) for g in range(cell.G)]
    separate = tuple(g for g in range(cell.G) if cell.separate[g])
    shared = [g for g in range(cell.G) if not cell.separate[g]]
    first, then = ([g for g in shared if halved[g] is half] for half in (True, False))
    for order in permutations(first) if len(first) < 4 else [first]:
        gates = (*order, *then)

        def place(k: int, gates: tuple[int, ...] = gates) -> tuple[bool, int]:
            value = graph.outputs[1][k]
            own = [row for row, g in enumerate(gates) if met[g] is not None and met[g] in operands(value)]
            return value.op != "sigmoid", own[0] if own else len(gates)

        yield Layout(
            separate + gates, gates + separate, separate, tuple(0.5 if half else 1.0 for half in halved),
            tuple(sorted(range(cell.K), key=place)),
        )  # fmt: skip


@cache
def natural(cell: Cell) -> Layout:
    """The gates as torch has them: for a few instants, which wouldn't repay a copy of the weights."""
    gates, plan = tuple(range(cell.G)), layout(cell)
    return Layout(gates, gates, plan.separate, (1.0,) * cell.G, plan.saved)


@cache
def by_exp(plan: Layout) -> Layout:
    return replace(plan, scale=tuple(1.0 if s == 1 else -1.0 for s in plan.scale), sigmoid="exp")


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
        """-> look, run: `run(*look(*arrays))` makes the calls on rows of that shape. What `look` gives are views of the
        arrays, which may be kept. `fixed` gives the arrays that stay the same ones from instant to instant, the others
        are the arguments of `look`, in the order of `arrays`."""
        return self.bound((), row, dtype, fixed)

    def at_once(self, row: tuple[int, int], dtype: np.dtype, **arrays: np.ndarray) -> None:
        """The calls for several instants together: every array has these as a first axis."""
        look, run = self.bound((len(next(iter(arrays.values()))),), row, dtype, {})
        run(*look(*(arrays[name] for name in self.arrays)))

    def bound(
        self, together: tuple[int, ...], row: tuple[int, int], dtype: np.dtype, fixed: dict[str, np.ndarray]
    ) -> tuple[Callable[..., tuple], Callable[..., None]]:
        shapes = (self.rows, *row), (self.shared, 1, row[1])
        temporaries = (np.empty((*together, *shape), dtype) for shape in shapes)
        constants = [np.array(value, dtype) for value in self.constants]  # a scalar would be made one at every call
        return factory(self, tuple(fixed), bool(together))(*temporaries, *fixed.values(), *constants)


@cache
def factory(program: Program, fixed: tuple[str, ...], together: bool) -> Callable[..., tuple[Callable, Callable]]:
    """The program as Python: a function of the arrays that stay, which slices them once. For the LSTM
    `factory(...).text` begins

        def bind(w, u, h, c0):
            h_0_4 = h[0:4]
            w_0 = w[0]
            def look(x, s, n, v, r):
                return x[0:4], v[0:4], v[0:3], ...
            def run(x_0_4, v_0_4, v_0_3, ...):
                add(x_0_4, h_0_4, v_0_4)

    For several instants together the views are x[:, 0:4], w[:, 0:1] and s[:, None].
    """
    stay = ("w", "u", *fixed)
    views: dict[str, str] = {}

    def name(operand: str) -> str:
        array, _, rows = operand.partition("[")
        if not rows and array not in program.arrays:
            return operand  # a constant
        rows = rows[:-1]
        axis = rows if ":" in rows else f"{rows}:{int(rows) + 1}" if rows else "None"
        name = f"{array}_{rows.replace(':', '_')}" if rows else array
        return views.setdefault(f"{array}[:, {axis}]" if together else operand, name)

    body = []
    for call in program.calls:
        operation, operands = call[:-1].split("(")
        body.append(f"        {operation}({', '.join(map(name, operands.split(', ')))})")
    changing = {view: given for view, given in views.items() if view.partition("[")[0] not in stay}
    lines = [
        f"def bind({', '.join([*stay, *(f'c{k}' for k in range(len(program.constants)))])}):",
        *(f"    {given} = {view}" for view, given in views.items() if view not in changing and view != given),
        f"    def look({', '.join(array for array in program.arrays if array not in fixed)}):",
        f"        return {', '.join([*changing, ''])[:-1] or '()'}",
        f"    def run({', '.join(changing.values())}):",
        *(body or ["        pass"]),
        "    return look, run",
    ]
    names: dict[str, Any] = dict(CALLABLES)
    exec(compile("\n".join(lines), "<cell program>", "exec"), names)
    names["bind"].text = "\n".join(lines)
    return names["bind"]


CALLABLES: dict[str, Callable] = {  # operands first, the result's place last
    **{name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "negative", "tanh", "exp", "log")},
    "maximum": lambda a, b, out: np.maximum(a, b, out=out),  # the only one that NumPy wants to be told by keyword
    "positive": lambda a, out: np.subtract(1, np.less_equal(a, 0, out=out), out=out),  # NaN isn't <= 0
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
    new, saved = (
        [graph.symbol(value) for value in group]
        for group in cell.step(x, h, states(graph, cell, "s", "v"), *extra(cell, graph))
    )
    scaled = {graph.node("add", x[g], h[g]) for g in range(cell.G) if plan.scale[g] != 1}
    places: dict[Place, Symbol] = {("n", None) if k == 0 else ("r", cell.K + k - 1): n for k, n in enumerate(new)}
    places |= {("v", row): saved[k] for row, k in enumerate(plan.saved)}
    graph, places = without_sigmoid(graph, places, scaled, plan.sigmoid)
    return schedule(graph, places, ("x", "h", "b", *"m" * bool(cell.E), "s", "n", "v", "r"))


def states(graph: Graph, cell: Cell, h: str, others: str) -> list[Symbol]:
    """h is an array of its own; the other states stand in a record, behind what is saved."""
    return [graph.node("input", h), *(graph.node("input", others, cell.K + k) for k in range(cell.S - 1))]


def extra(cell: Cell, graph: Graph) -> tuple[list[Symbol], ...]:
    """The page's argument beside gates and states, if it has one."""
    return ([graph.node("input", "m", row) for row in range(cell.E)],) if cell.E else ()


@dataclass(frozen=True)
class Gradient:
    """The gradient of a step is linear in what arrives. So what it is multiplied by comes first, for many instants at
    once, and little is left to do at each. For the LSTM that is

        multiply(q0, c[1], d[0])            the gradient of o
        multiply(q0, c[0], w[0])            what h' asks of c'; c[0] is o (1 - tanh(c')^2)
        add(q1, w[0], w[1])                 dc
        multiply(w[1], c[2:6], d[1:5])      the gradients of i, f, g and of c
    """

    coefficients: Program  # both states, v -> c
    grad: Program  # gradients of the states after, c -> d, g
    rows: int  # of c
    asked: tuple[int | None, ...]  # by state, the row of d that has the gradient of the state before; None: it is zero

    @property
    def width(self) -> int:
        """How many rows of d are gradients of states."""
        return sum(row is not None for row in self.asked)


@cache
def gradient(cell: Cell, plan: Layout | None = None) -> Gradient:
    plan = plan or layout(cell)
    graph = Graph()
    q = [graph.node("input", name) for name in each("q", cell.S)]
    n, s = states(graph, cell, "n", "r"), states(graph, cell, "s", "v")
    v = [graph.node("input", "v", plan.saved.index(k)) for k in range(cell.K)]
    dx, dh, dstate, *of_extra = cell.grad(q, n, s, v, *extra(cell, graph))
    zero, shift = graph.symbol(0.0), len(plan.separate)
    dstate = [graph.symbol(value) for value in dstate]
    rows = iter(range(cell.G + shift, cell.G + shift + cell.S))
    asked = tuple(None if value is zero else next(rows) for value in dstate)
    places: dict[Place, Symbol] = {("d", row): graph.symbol(dx[g]) for row, g in enumerate(plan.inputs)}
    places |= {("d", shift + row): graph.symbol(dh[g]) for row, g in enumerate(plan.recurrent)}
    places |= {("d", row): value for row, value in zip(asked, dstate) if row is not None}
    units = [graph.symbol(value) for value in (of_extra[0] if of_extra else ())]
    places |= {("g", row): value for row, value in enumerate(units) if value is not zero}
    step, places, factors = factored(graph, places)
    coefficients: dict[Place, Symbol] = {("c", row): factor for row, factor in enumerate(factors)}
    more = "m" * bool(cell.E)
    return Gradient(
        schedule(*without_sigmoid(graph, coefficients), ("n", "s", "v", "r", *more, "c")),
        schedule(*without_sigmoid(step, places), (*each("q", cell.S), "c", "d", *"g" * bool(cell.learned))),
        len(factors), asked,
    )  # fmt: skip


def factored(graph: Graph, places: dict[Place, Symbol]) -> tuple[Graph, dict[Place, Symbol], list[Symbol]]:
    """-> what depends on the inputs q, as a graph of its own, with its outputs; and the factors that are its inputs c.

    Such a value is a product of a value of that graph and a factor in the given one, to which factors are added.
    """
    step = Graph()
    factors: dict[Symbol, Symbol] = {}
    products: dict[Symbol, tuple[Symbol, Symbol]] = {}
    one = graph.symbol(1.0)

    def given(factor: Symbol) -> Symbol:
        if factor.op == "constant":
            return step.symbol(*factor.operands)
        if factor not in factors:
            factors[factor] = step.node("input", "c", len(factors))
        return factors[factor]

    def computed(value: Symbol) -> Symbol:
        if value not in products:
            return given(value)
        base, factor = products[value]
        return base if factor is one else base * given(factor)

    for node in list(graph.nodes.values()):
        arriving = [operand for operand in operands(node) if operand in products]
        bases = {products[operand][0] for operand in arriving}
        if node.op == "input" and node.operands[0].startswith("q"):
            products[node] = step.node("input", *node.operands), one
        elif not arriving:
            continue
        elif node.op == "negative" or (
            len(bases) == 1 and node.op in ("add", "subtract", "multiply", "divide") and linear(node, arriving)
        ):
            terms = [products[operand][1] if operand in products else operand for operand in node.operands]
            trivial = node.op == "multiply" and one in terms
            factor = terms[terms[0] is one] if trivial else terms[0].apply(node.op, *terms[1:])
            products[node] = bases.pop(), factor
        else:
            products[node] = step.node(node.op, *map(computed, node.operands)), one
    outputs = {place: computed(value) for place, value in sorted(places.items(), key=lambda item: key(item[0]))}
    return step, outputs, list(factors)


def linear(node: Symbol, arriving: list[Symbol]) -> bool:
    """Whether an operation takes its operands' common base out of the brackets."""
    if node.op in ("add", "subtract"):
        return len(arriving) == 2
    return arriving == [node.operands[0]] or (node.op == "multiply" and len(arriving) == 1)


def each(letter: str, count: int) -> tuple[str, ...]:
    return tuple(f"{letter}{k}" for k in range(count))


def consumers(graph: Graph) -> dict[Symbol, list[Symbol]]:
    users: dict[Symbol, list[Symbol]] = {node: [] for node in graph.nodes.values()}
    for node in graph.nodes.values():
        for operand in operands(node):
            users[operand].append(node)
    return users


# ---- from a graph to calls ----------------------------------------------------------------------------------------


def schedule(graph: Graph, places: dict[Place, Symbol], arrays: tuple[str, ...]) -> Program:
    """As soon as possible or as late; a sum's operands side by side, or one in the sum's place: the fewest calls."""
    candidates = [emit(graph, places, arrays, *ways) for ways in product((False, True), repeat=2)]
    return min(candidates, key=lambda program: (len(program.calls), program.rows))


def without_sigmoid(
    graph: Graph, places: dict[Place, Symbol], scaled: Collection[Symbol] = (), by: str = "tanh"
) -> tuple[Graph, dict[Place, Symbol]]:
    """The same graph with sigmoid(a) as 1/2 + 1/2 tanh(a/2), or as 1 / (1 + exp(-a)); the symbols in `scaled` hold a/2
    or -a already."""
    lowered = Graph()
    image: dict[Symbol, Symbol] = {}
    for node in graph.nodes.values():
        if node.op == "sigmoid":
            (a,) = node.operands
            if by == "tanh":
                image[node] = (image[a] if a in scaled else image[a] * 0.5).apply("tanh") * 0.5 + 0.5
            else:
                image[node] = 1.0 / (1.0 + (image[a] if a in scaled else -image[a]).apply("exp"))
        else:
            image[node] = lowered.node(node.op, *(image.get(o, o) for o in node.operands))
    return lowered, {place: image[value] for place, value in places.items()}


def emit(graph: Graph, places: dict[Place, Symbol], arrays: tuple[str, ...], late: bool, pairs: bool) -> Program:
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
    compute_in_place(groups, where, pairs)
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
    return Program(tuple(calls), rows, shared, arrays, tuple(constants))


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


def compute_in_place(groups: list[list[Symbol]], where: dict[Symbol, Place], pairs: bool) -> None:
    """Let a value that only one operation reads live where that operation's result will stand; not one of two that
    could be computed by one call, if `pairs`."""
    uses = Counter(operand for members in groups for node in members for operand in node.operands)
    for node in (node for members in reversed(groups) for node in members):
        free = [o for o in node.operands if o not in where and not o.uniform and uses[o] == 1]
        if node in where and free and not (pairs and len(free) == 2 and free[0].op == free[1].op):
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
    alive: dict[str, list[tuple[int, int, int]]] = {"w": [], "u": []}  # first row, past the last, last use
    rows = {"w": 0, "u": 0}

    def first(bundle: list[Symbol]) -> tuple:
        """When it is made; those of one time in the order of what they are made of."""
        return min(made[node] for node in bundle), [key(where[o]) for o in bundle[0].operands if o in where]

    for bundle in sorted(bundles, key=first):
        letter = "u" if bundle[0].uniform else "w"
        born, dead = min(made[node] for node in bundle), max(last_use[node] for node in bundle)
        alive[letter] = sorted(span for span in alive[letter] if span[2] >= born)
        row = 0
        for start, end, _ in alive[letter]:
            if row + len(bundle) <= start:
                break
            row = max(row, end)
        alive[letter].append((row, row + len(bundle), dead))
        rows[letter] = max(rows[letter], row + len(bundle))
        for k, node in enumerate(bundle):
            where[node] = (letter, row + k)
    return rows["w"], rows["u"]


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
