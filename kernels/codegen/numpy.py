"""Compiles a cell into NumPy calls that allocate nothing and do as many rows as possible in one call.

`step_program(cell)` and `gradient(cell)` trace the cell, and `schedule` makes calls of its graph. The forward LSTM's
program is, in full,

    add(x[0:4], h[0:4], v[0:4])     the pre-activations of all gates
    tanh(v[0:4], v[0:4])            one tanh for all of them: sigmoid(a) = 1/2 + 1/2 tanh(a/2), and
    multiply(v[0:3], c0, v[0:3])    the inner half is already in the weights (`GateLayout.scale`)
    add(v[0:3], c0, v[0:3])         c0 = 1/2; the rows of v are now o, i, f and the candidate, behind it c
    multiply(v[1:3], v[3:5], w[0:2])
    add(w[1], w[0], r[4])           c' = f c + i g, in the record of the next time step
    tanh(r[4], n)
    multiply(v[0], n, n)            h'

A row is one gate or one temporary of one time step, an array [H, B]. The arrays, by letter:

    x  [G, H, B]  input gates, in `GateLayout.inputs` order     h  [G, H, B]  recurrent ones, in `recurrent` order
    s  [H, B]     h before                                      n  [H, B]  h after
    v  [K+S-1, H, B]  the record of the time step: what step saves for grad, and the other states before
    r  [K+S-1, H, B]  that of the next one: the other states after
    b  [n, H, B]  recurrent bias of the n separate gates        m  [E, H, B]  auxiliary inputs of the cell
    q0 q1 ...     gradients of the states after                 c  what they are multiplied by (`Gradient`)
    d  gate gradients: `d[:G]` those of x, in inputs order; `d[n:G+n]` those of h, in recurrent order; behind them
       gradients of the states before
    g  [trainable, H, B]  gradients of the first of m
    w  temporaries                                              u  [rows, 1, B]  those that are the same for all units
"""

from dataclasses import dataclass, replace
from functools import cache

from ..cells import Cell, step_graph
from ..trace import Graph, Symbol, ascending, operands
from .schedule import WHOLE, Outputs, Program, consumers, depths, schedule


@dataclass(frozen=True)
class GateLayout:
    """How the NumPy backend orders and scales the gates, so that equal work lies side by side.

    Separate gates stand first among the inputs and last in the recurrence: then the gradients of both parts are
    contiguous blocks of one array. Among the others, those that only a sigmoid takes come first: what the candidate
    waits for, as the GRU's r; then what is used last, as the LSTM's o: i, f, the candidate and c are neighbours.
    """

    inputs: tuple[int, ...]  # gate at each row of x
    recurrent: tuple[int, ...]  # gate at each row of h
    separate: tuple[int, ...]  # gates whose two parts have different gradients
    scale: tuple[float, ...]  # by gate: 1/2 or -1 where only a sigmoid sees x + h, else 1
    saved: tuple[int, ...]  # at each row of v, the index into what `step` saves: gates computed together lie together
    sigmoid: str = "tanh"  # what it is made of: "tanh" takes fewer calls, "exp" half the time for a value


@cache
def layout(cell: Cell) -> GateLayout:
    graph = step_graph(cell)
    users, depth = consumers(graph.nodes.values()), depths(graph.nodes.values())
    x, h = ([graph.node("input", name, g) for g in range(cell.G)] for name in "xh")
    sums = [graph.nodes.get(("add", *pair)) for pair in zip(x, h)]
    first_use: dict[int, int] = {}  # by gate that only a sigmoid takes, the depth of the first operation that reads it
    for g, a in enumerate(sums):
        if a is not None and users[x[g]] == users[h[g]] == [a] and [user.op for user in users[a]] == ["sigmoid"]:
            first_use[g] = min((depth[user] for user in users[users[a][0]]), default=0)
    separate = tuple(g for g in range(cell.G) if cell.separate[g])
    shared = [g for g in range(cell.G) if not cell.separate[g]]
    ready = max((depth[user] for g in range(cell.G) if g not in first_use for user in users[x[g]]), default=0)
    gates = tuple(sorted(shared, key=lambda g: (g not in first_use, first_use.get(g, 0) > ready, -first_use.get(g, 0))))

    def row(k: int) -> tuple[bool, int]:
        value = graph.outputs[1][k]
        own = [row for row, g in enumerate(gates) if sums[g] is not None and sums[g] in operands(value)]
        return value.op != "sigmoid", own[0] if own else len(gates)

    scale = tuple(0.5 if g in first_use else 1.0 for g in range(cell.G))
    return GateLayout(separate + gates, gates + separate, separate, scale, tuple(sorted(range(cell.K), key=row)))


@cache
def torch_layout(cell: Cell) -> GateLayout:
    """The gates as torch has them: for a few time steps, which wouldn't repay a copy of the weights."""
    gates, chosen = tuple(range(cell.G)), layout(cell)
    return GateLayout(gates, gates, chosen.separate, (1.0,) * cell.G, chosen.saved)


@cache
def with_exp_sigmoid(gates: GateLayout) -> GateLayout:
    return replace(gates, scale=tuple(1.0 if s == 1 else -1.0 for s in gates.scale), sigmoid="exp")


@cache
def step_program(cell: Cell, gates: GateLayout | None = None) -> Program:
    """x, h, states -> states after, and v. In the order of `layout`, unless another one is given."""
    gates = gates or layout(cell)
    graph = Graph()
    x, h = ([graph.node("input", name, order.index(g)) for g in range(cell.G)]
            for name, order in (("x", gates.inputs), ("h", gates.recurrent)))  # fmt: skip
    for row, g in enumerate(gates.separate):
        h[g] = h[g] + graph.node("input", "b", row)
    new, saved = cell.step(x, h, states(graph, cell, "s", "v"), *auxiliary(graph, cell))
    outputs = {("n", WHOLE) if k == 0 else ("r", cell.K + k - 1): graph.symbol(value) for k, value in enumerate(new)}
    outputs |= {("v", row): graph.symbol(saved[k]) for row, k in enumerate(gates.saved)}
    scaled = {graph.node("add", x[g], h[g]) for g in range(cell.G) if gates.scale[g] != 1}
    return schedule(outputs, ("x", "h", "b", *"m" * bool(cell.E), "s", "n", "v", "r"), scaled, gates.sigmoid)


def states(graph: Graph, cell: Cell, h: str, others: str) -> list[Symbol]:
    """h is an array of its own; the other states stand in a record, behind what is saved."""
    return [graph.node("input", h, WHOLE), *(graph.node("input", others, cell.K + k) for k in range(cell.S - 1))]


def auxiliary(graph: Graph, cell: Cell) -> tuple[list[Symbol], ...]:
    """The cell's argument besides gates and states, if it has one."""
    return ([graph.node("input", "m", row) for row in range(cell.E)],) if cell.E else ()


@dataclass(frozen=True)
class Gradient:
    """The gradient of a step is linear in the upstream gradients. So what they are multiplied by is computed first, for
    many time steps at once, and little is left to do at each. For the LSTM that is

        multiply(q0, c[1], d[0])            the gradient of o
        multiply(q0, c[0], w[0])            the part of dc' that comes through h'; c[0] is o (1 - tanh(c')^2)
        add(q1, w[0], w[1])                 dc'
        multiply(w[1], c[2:6], d[1:5])      the gradients of i, f, g and of c
    """

    coefficients: Program  # both states, v -> c
    grad: Program  # gradients of the states after, c -> d, g
    rows: int  # of c
    state_grad_rows: tuple[int | None, ...]  # of d, the gradient of each state before; None: it is zero

    @property
    def width(self) -> int:
        """How many rows of d are gradients of states."""
        return sum(row is not None for row in self.state_grad_rows)


@cache
def gradient(cell: Cell) -> Gradient:
    gates, graph, upstream = layout(cell), Graph(), [f"q{k}" for k in range(cell.S)]
    q = [graph.node("input", name, WHOLE) for name in upstream]
    n, s = states(graph, cell, "n", "r"), states(graph, cell, "s", "v")
    v = [graph.node("input", "v", gates.saved.index(k)) for k in range(cell.K)]
    dx, dh, dstate, *dm = ([graph.symbol(value) for value in group]
                           for group in cell.grad(q, n, s, v, *auxiliary(graph, cell)))  # fmt: skip
    zero, shift = graph.symbol(0.0), len(gates.separate)
    rows = iter(range(cell.G + shift, cell.G + shift + cell.S))
    state_grad_rows = tuple(None if value is zero else next(rows) for value in dstate)
    outputs = {("d", row): dx[g] for row, g in enumerate(gates.inputs)}
    outputs |= {("d", shift + row): dh[g] for row, g in enumerate(gates.recurrent)}
    outputs |= {("d", row): value for row, value in zip(state_grad_rows, dstate) if row is not None}
    outputs |= {("g", row): value for group in dm for row, value in enumerate(group) if value is not zero}
    outputs, factors = factor_out_upstream(graph, dict(sorted(outputs.items())))
    coefficients = {("c", row): factor for row, factor in enumerate(factors)}
    return Gradient(
        schedule(coefficients, ("n", "s", "v", "r", *"m" * bool(cell.E), "c")),
        schedule(outputs, (*upstream, "c", "d", *"g" * bool(cell.num_trainable))),
        len(factors),
        state_grad_rows,
    )


def factor_out_upstream(graph: Graph, outputs: Outputs) -> tuple[Outputs, list[Symbol]]:
    """-> what depends on the upstream gradients q, in a graph of its own; and the factors that are its inputs c.

    Such a value is a product of a value of that graph and a factor in the given one, to which factors are added.
    """
    step, one = Graph(), graph.symbol(1.0)
    factors: dict[Symbol, Symbol] = {}
    products: dict[Symbol, tuple[Symbol, Symbol]] = {}

    def loaded(factor: Symbol) -> Symbol:
        if factor.op == "constant":
            return step.symbol(*factor.operands)
        return factors.setdefault(factor, step.node("input", "c", len(factors)))

    def value_of(value: Symbol) -> Symbol:
        if value not in products:
            return loaded(value)
        base, factor = products[value]
        return base if factor is one else base * loaded(factor)

    for node in list(ascending(outputs.values())):
        dependent = [operand for operand in operands(node) if operand in products]
        bases = {products[operand][0] for operand in dependent}
        if node.op == "input" and node.operands[0].startswith("q"):
            products[node] = step.node("input", *node.operands), one
        elif len(bases) == 1 and is_linear_op(node, dependent):
            terms = [products[operand][1] if operand in products else operand for operand in node.operands]
            trivial = node.op == "multiply" and one in terms
            products[node] = bases.pop(), terms[terms[0] is one] if trivial else terms[0].apply(node.op, *terms[1:])
        elif dependent:
            products[node] = step.node(node.op, *map(value_of, node.operands)), one
    return {place: value_of(value) for place, value in outputs.items()}, list(factors)


def is_linear_op(node: Symbol, dependent: list[Symbol]) -> bool:
    """Whether an operation takes its operands' common base out of the brackets."""
    if node.op in ("add", "subtract"):
        return len(dependent) == 2
    return node.op == "negative" or (node.op == "multiply" and len(dependent) == 1) or (
        node.op == "divide" and dependent == [node.operands[0]])  # fmt: skip
