"""A lower bound of the time that a case takes, from the machine's ceilings and the scale that its R fits in.

The time loop is a chain: every step waits for the exchange of h at the smallest scale that holds the recurrent weights,
or for its matmul, or, where the weights don't fit on-chip, for reading them again. Next to the chain are the large
matmuls for all time steps together, and every array crosses the memory bus once. With p the rate of matmuls and m that
of memory, forward:

    bound = T max(exchange, 2 B G H^2 / p, streamed R / m) + max(2 T B G H I / p, bytes / m)

A backward pass has the same chain again, and three such large matmuls (dx, dW, dR). The bound leaves out the pointwise
part, and that chain and matmuls compete for the same units. A kernel alone has a bound of its own: the fused kernel of
a time step crosses the memory bus once with each of its arrays; of the persistent kernels it is the chain's part.
"""

from typing import NamedTuple

from gpu_rnn.core import arrays
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import grad_graph

from .problems import KERNELS, MODIFIERS, WIDTH, Case


class Scale(NamedTuple):
    """A part of the machine that holds weights, and what it costs there to hand h to all that need it."""

    name: str
    bytes: float
    exchange_us: float


class Ceilings(NamedTuple):
    """What was measured on this machine, and the scales it has."""

    flops: dict[str, float]  # by dtype, per second, of a large matmul
    bandwidth: float  # bytes per second, read and written, of a large copy
    scales: tuple[Scale, ...]


# Shared memory of one SM, of a cluster of 16, of 132 SMs; exchange: the targets set before anything was measured.
HOPPER = (Scale("SM", 227 << 10, 0.6), Scale("cluster", 16 * 227 << 10, 0.8), Scale("grid", 132 * 227 << 10, 1.3))
STREAMED = Scale("streamed", float("inf"), 1.3)
CPU = (Scale("cache", float("inf"), 0.0),)


def scale(case: Case, ceilings: Ceilings) -> Scale:
    """The smallest part of the machine that holds R."""
    weights = case.gates * case.H**2 * WIDTH[case.dtype]
    return next((scale for scale in ceilings.scales if weights <= scale.bytes), STREAMED)


def bound_us(name: str, case: Case, ceilings: Ceilings) -> float | None:
    """Of a row, in microseconds; None for a dtype whose ceiling wasn't measured, and for modified cells."""
    if case.dtype not in ceilings.flops or MODIFIERS.get(name):
        return None
    exchange, matmul = exchange_s(case, ceilings), matmul_s(case, ceilings)
    if name in KERNELS:
        _, way, part = KERNELS[name]
        parts = {"exchange": exchange, "product": matmul, "sequence": max(exchange, matmul)}
        parts["step"] = case.T * step_bytes(way, case) / ceilings.bandwidth
        return 1e6 * parts[part]
    chain = case.L * max(exchange, matmul)
    once = 2 * case.T * case.B * case.gates * case.H / ceilings.flops[case.dtype]  # a column of inputs
    projection, recurrent, traffic = once * case.inputs, once * case.L * case.H, case.bytes / ceilings.bandwidth
    if case.training:  # what is saved is written and read; dx, dW and y's gradient are as large as x, W and y
        return 1e6 * (2 * chain + max(3 * projection + recurrent, 2 * traffic))
    return 1e6 * (chain + max(projection, traffic))


def exchange_s(case: Case, ceilings: Ceilings) -> float:
    """Seconds of all exchanges of a layer, one way through time."""
    return case.T * scale(case, ceilings).exchange_us * 1e-6


def matmul_s(case: Case, ceilings: Ceilings) -> float:
    """Seconds of all its recurrent matmuls, or of reading their weights where the chip doesn't hold them."""
    weights = case.gates * case.H**2
    streamed = weights * WIDTH[case.dtype] / ceilings.bandwidth if scale(case, ceilings) is STREAMED else 0.0
    return case.T * max(2 * case.B * weights / ceilings.flops[case.dtype], streamed)


def step_bytes(way: str, case: Case) -> int:
    """What the fused kernel of a time step reads and writes; backward, what the cell's gradient uses."""
    cell = cells.get(case.cell)
    stored, real = WIDTH[case.dtype], 8 if case.dtype == "float64" else 4
    matmul = WIDTH[arrays.product_dtype("torch", case.dtype)]
    if way == "forward":  # Wx, y and what is saved; Rh; the states before and after
        unit = stored * (cell.G + 1 + case.training * cell.K) + matmul * cell.G + real * 2 * cell.S
    else:  # dy and the gradients of the gates; what came back; gradients of the states before and after; what is saved
        used = {node.operands for node in grad_graph(cell).pruned().nodes.values() if node.op == "input"}
        saved = [name for name, k in used if name == "saved" or (name in ("new", "state") and k == 0)]
        others = [name for name, k in used if name in ("new", "state") and k > 0]
        unit = stored * (1 + cell.G * (1 + any(cell.separate)) + len(saved)) + matmul
        unit += real * (2 * cell.S + len(others))
    return unit * case.B * case.H
