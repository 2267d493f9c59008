"""How the Triton kernels are launched: pure functions of sizes, every number with its reason."""

from typing import NamedTuple

from ..cells import Cell

OLDEST = (8, 0)  # compute capability: bfloat16, asynchronous copies, and what the tests compile for
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}  # what a sequence kernel takes
REAL_BYTES = 4  # of what it computes in
FLOAT32_WEIGHTS = 64 << 10  # bytes; see `spilling`


class StepConfig(NamedTuple):
    """Of a stepwise kernel. T and B don't matter, so that new ones compile nothing."""

    block_b: int
    block_h: int
    num_warps: int
    maxnreg: int | None  # registers per thread, where ptxas would rather spill some, or its own choice


def step_config(H: int, dtype: str, *, whole: bool = False) -> StepConfig:
    """16 bytes of what is computed in for each of 128 threads, side by side: one access.

    Fewer would leave the memory waiting, more would leave multiprocessors empty: 64 rows of 512 units are 64 programs.
    At most a warp's units of a row, so that a ragged H wastes little.

    A cell that takes means has more values at hand, and gets half of that for each thread; of a row up to the units of
    8 warps, as the threads of more have too few registers. Through a longer row a program goes tile by tile.
    """
    each = (8 if whole else 16) // (8 if dtype == "float64" else REAL_BYTES)
    warp = 32 * each
    block_h = min(power_of_two(H), 8 * warp if whole else warp)
    maxnreg = 255 if whole else None
    return StepConfig(max(1, 4 * warp // block_h), block_h, max(4, block_h // warp), maxnreg)


class Sequence(NamedTuple):
    """Of a sequence kernel."""

    rows: int
    tile: int
    stages: int  # time steps whose input is on its way or in use at the same time
    num_warps: int
    maxnreg: int  # registers per thread


def sequence(cell: Cell, H: int, dtype: str, shared_memory: int, *, backward: bool) -> tuple[Sequence | None, str]:
    """The plan, or None and why there is none; `shared_memory` is what the GPU lets one program have, in bytes.

    rows       16, the height of a tensor core's matmul. More would use fewer multiprocessors.
    tile       at least 16, the shortest sum of a tensor core's matmul.
    stages     3, so that a time step's input is loaded two time steps ahead; fewer where shared memory is scarce.
    num_warps  as many as there are 8 columns, the width of a tensor core's matmul, up to 8: with more, each would read
               all of h again. IEEE float32 matmuls have no tensor cores; split twice as far, operands don't spill.
    maxnreg    all that there are: one program per multiprocessor is the rule. Left to itself ptxas prefers to spill.

    Shared memory is what limits half precision, and registers the rest (`spilling`). Plain cells up to these H:

                sm_90, sm_100 (227 KiB)        sm_80 (163 KiB)
                rnn     gru     lstm           rnn     gru     lstm
    float16     256     128     128            256     128     128 with fewer stages
    float32     128      64      64            128      64      64
    """
    if dtype not in ITEM_BYTES:
        return None, f"{dtype} matmuls have no tensor cores and need too many registers"
    rows, tile = 16, max(32 if cell.has_reduction else 16, power_of_two(H))
    why = spilling(cell, H, tile, dtype)
    if why is not None:
        return None, f"too many registers: {why}"
    num_warps = min(tile // 4, 16) if dtype == "float32" else min(tile // 8, 8)
    for stages in (3, 2, 1):
        if sequence_bytes(cell, tile, dtype, rows, stages, backward=backward) <= shared_memory:
            return Sequence(rows, tile, stages, num_warps, maxnreg=min(65536 // (32 * num_warps), 255)), ""
    weights = cell.G * tile * tile * ITEM_BYTES[dtype] >> 10
    return None, f"the recurrent weights ({weights} KiB) exceed the shared memory ({shared_memory >> 10} KiB)"


def spilling(cell: Cell, H: int, tile: int, dtype: str) -> str | None:
    """What takes more registers than there are, or None. Nothing else was seen to spill with Triton 3.6.0 and 3.7.1.

    In float32 it is the matmul, all of it unrolled: with 64 KiB of weights it takes 96 registers of 128, with 96 KiB
    it spills; and with more than 32 KiB where a cell takes anything besides gates and states. Else it is the addresses,
    one for each small access: above 64 units rows must be made of fours, and with anything else, of 16 bytes.

    What a time step has to keep fills registers, too: a state twice, as it was and as it is made, what is trainable,
    and three values for a flag, a mask or a random number, with which a state is one thing or another. Up to 64 units
    there may be 21 such values, and half as many for twice the units. In float32, too, there may be half as many, and
    in a cell that takes means, as all gates are at hand until these are known: in a tile of 16 it would spill even so.
    """
    more = cell.E > 0 or cell.has_reduction
    weights = cell.G * tile * tile * ITEM_BYTES[dtype]
    if dtype == "float32" and weights > FLOAT32_WEIGHTS // (1 + more):
        return f"a matmul with {weights >> 10} KiB of float32 weights"
    if tile > 64 and H % 4:
        return f"H = {H} is above 64 and no multiple of 4"
    if more and H * ITEM_BYTES[dtype] % 16:
        return f"{cell.label} with rows of {H} {dtype} numbers, no multiple of 16 bytes"
    values = 2 * cell.S + cell.num_trainable + 3 * (cell.E - cell.num_trainable)
    most = 10 if cell.has_reduction or dtype == "float32" else 21
    if values * max(tile, 64) > most * 64:
        return (
            f"{cell.label} has {values} live values per time step{' plus reductions' * cell.has_reduction} at H = {H}"
        )
    return None


def sequence_bytes(cell: Cell, tile: int, dtype: str, rows: int, stages: int, *, backward: bool) -> int:
    """The most shared memory that a sequence kernel takes; less if the cell ignores some of its arguments."""
    item = ITEM_BYTES[dtype]
    weights = cell.G * tile * tile * item
    streamed = cell.G * item  # Wx
    if backward:  # dy, y, the h before, saved; and the other states before and after
        streamed = (3 + cell.K) * item + 2 * (cell.S - 1) * REAL_BYTES
    exchanged = REAL_BYTES  # between the layouts of matmuls and of memory, one tile at a time
    return weights + rows * tile * ((stages - 1) * streamed + exchanged)


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()
