"""What the machine would allow: the least time a case can take, from its measured ceilings and the scale R fits in.

The time loop is a chain: every step waits for the exchange of h at the smallest scale that holds the recurrent
weights, or for its product, or, where the weights don't fit the chip, for reading them again. Beside the chain are the
big products for all instants together, and every array crosses the memory bus once. With p the rate of the products
and m that of memory, forward:

    floor = T max(exchange, 2 B G H^2 / p, streamed R / m) + max(2 T B G H I / p, bytes / m)

A backward pass has the same chain again, and three such big products (dx, dW, dR). Nobody reaches it: it leaves out the
pointwise part, and that chain and products compete for the same units. It says how much there is left to gain.

A kernel alone has a floor of its own: the fused kernel of an instant crosses the memory bus once with each of its
arrays, so that floor over time is its fraction of the copy bandwidth; of the resident kernels it is the chain's part.
"""

from dataclasses import dataclass

from gpu_rnn.core import arrays
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import grad_graph

from .problems import FEATURES, KERNELS, WIDTH, Case


@dataclass(frozen=True)
class Scale:
    """A part of the machine that holds weights, and what it costs there to hand h to all who need it."""

    name: str
    bytes: float
    exchange_us: float


@dataclass(frozen=True)
class Ceilings:
    """What was measured on this machine, and the scales it has."""

    flops: dict[str, float]  # by dtype, per second, of a large matrix product
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


def least_us(contender: str, case: Case, ceilings: Ceilings) -> float | None:
    """The least microseconds for a row; None for a dtype whose ceiling wasn't measured, and for what changes a cell."""
    if case.dtype not in ceilings.flops or FEATURES.get(contender):
        return None
    if contender in KERNELS:
        return 1e6 * kernel_s(*KERNELS[contender][1:], case, ceilings)
    return floor_us(case, ceilings)


def floor_us(case: Case, ceilings: Ceilings) -> float:
    """The least microseconds for a case."""
    flops, L = ceilings.flops[case.dtype], case.L
    chain = L * max(waits(case, ceilings), multiplies(case, ceilings))
    once = 2 * case.T * case.B * case.gates * case.H / flops  # a column of inputs
    projection, recurrent = once * case.inputs, once * L * case.H
    traffic = case.bytes / ceilings.bandwidth
    if case.training:  # what is kept is written and read; dx, dW and y's gradient are as large as x, W and y
        return 1e6 * (2 * chain + max(3 * projection + recurrent, 2 * traffic))
    return 1e6 * (chain + max(projection, traffic))


def waits(case: Case, ceilings: Ceilings) -> float:
    """Seconds of all exchanges of a layer, one way through time."""
    return case.T * scale(case, ceilings).exchange_us * 1e-6


def multiplies(case: Case, ceilings: Ceilings) -> float:
    """Seconds of all its recurrent products, or of reading their weights where the chip doesn't hold them."""
    weights = case.gates * case.H**2
    streamed = weights * WIDTH[case.dtype] / ceilings.bandwidth if scale(case, ceilings) is STREAMED else 0.0
    return case.T * max(2 * case.B * weights / ceilings.flops[case.dtype], streamed)


# ---- kernels alone --------------------------------------------------------------------------------------------------


def kernel_s(way: str, part: str, case: Case, ceilings: Ceilings) -> float:
    """Seconds of one of our kernels alone, for all instants."""
    if part == "step":
        return case.T * instant_bytes(way, case) / ceilings.bandwidth
    parts = {"exchange": waits(case, ceilings), "product": multiplies(case, ceilings)}
    return parts.get(part, max(parts.values()))


def instant_bytes(way: str, case: Case) -> int:
    """What the fused kernel of an instant reads and writes; of what it is given back, what the page's gradient uses."""
    cell = cells.get(case.cell)
    stored, real = WIDTH[case.dtype], 8 if case.dtype == "float64" else 4
    product = WIDTH[arrays.product_dtype("torch", case.dtype)]
    if way == "forward":  # xg, y and what is saved; hg; the states before and after
        unit = stored * (cell.G + 1 + case.training * cell.K) + product * cell.G + real * 2 * cell.S
    else:  # dy and the gradients of the gates; back; gradients of the states before and after; the tape
        used = {node.operands for node in grad_graph(cell).pruned().nodes.values() if node.op == "input"}
        tape = [name for name, k in used if name == "saved" or (name in ("new", "state") and k == 0)]
        others = [name for name, k in used if name in ("new", "state") and k > 0]
        unit = stored * (1 + cell.G * (1 + any(cell.separate)) + len(tape)) + product + real * 2 * cell.S
        unit += real * len(others)
    return unit * case.B * case.H
