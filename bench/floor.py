"""What the machine would allow: the least time a case can take, from its measured ceilings and the scale R fits in.

The time loop is a chain: every step waits for the exchange of h at the smallest scale that holds the recurrent
weights, or for its product, or, where the weights don't fit the chip, for reading them again. Beside the chain are the
big products for all instants together, and every array crosses the memory bus once. With p the rate of the products
and m that of memory, forward:

    floor = T max(exchange, 2 B G H^2 / p, streamed R / m) + max(2 T B G H I / p, bytes / m)

A backward pass has the same chain again, and three such big products (dx, dW, dR). Nobody reaches it: it leaves out the
pointwise part, and that chain and products compete for the same units. It says how much there is left to gain.
"""

from dataclasses import dataclass

from .problems import WIDTH, Case


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


def floor_us(case: Case, ceilings: Ceilings) -> float | None:
    """The least microseconds for a case; None for a dtype whose ceiling wasn't measured."""
    if case.dtype not in ceilings.flops:
        return None
    width, G, T, B, I, H = WIDTH[case.dtype], case.gates, case.T, case.B, case.I, case.H
    flops, where = ceilings.flops[case.dtype], scale(case, ceilings)
    streamed = G * H * H * width / ceilings.bandwidth if where is STREAMED else 0.0
    chain = T * max(where.exchange_us * 1e-6, 2 * B * G * H * H / flops, streamed)
    projection, recurrent = 2 * T * B * G * H * I / flops, 2 * T * B * G * H * H / flops
    traffic = case.bytes / ceilings.bandwidth
    if case.training:  # what is kept is written and read; dx, dW and y's gradient are as large as x, W and y
        return 1e6 * (2 * chain + max(3 * projection + recurrent, 2 * traffic))
    return 1e6 * (chain + max(projection, traffic))
