"""The launch plan of stepwise.cu: a pure function of sizes, dtypes and addresses."""

from collections.abc import Sequence

from ..cells import Cell
from .launch import C_TYPES, HERE, Launch, unit

KERNELS = HERE / "stepwise.cu"
THREADS = 128  # of a block: small, so that the few threads of a small batch are spread over many multiprocessors
REDUCTION_THREADS = 256  # of a block that owns whole rows
MAX_GRID_Y = 65535  # what the hardware takes; beyond, a thread does several rows


def launch(
    kernel: str, cell: Cell, *, B: int, H: int, R: int, storage: str, product: str, addresses: Sequence[int]
) -> Launch:
    """Of `stepwise_forward` or `stepwise_backward`, without the arguments of the time step.

    storage, product: dtypes of what the caller has and of the recurrent matmuls. addresses: of the kernel's arrays. R:
    batch rows of the values per unit, B or 1.
    """
    real = "float64" if storage == "float64" else "float32"
    wide = {"float64": 2, "float32": 4}[real]  # units whose `real` fill 16 bytes, the widest load
    aligned = H % wide == 0 and all(address % 16 == 0 for address in addresses)
    units = 1 if not aligned else wide // 2 if cell.has_reduction else wide
    types = {"SCALAR": storage, "PRODUCT": product, "REAL": real}
    defines = {name: C_TYPES[dtype] for name, dtype in types.items()} | {"VEC": units}
    across = max(1, -(-H // units))  # threads that a row needs
    threads = REDUCTION_THREADS if cell.has_reduction else THREADS
    x = min(threads, 1 << (across - 1).bit_length())  # a power of two divides the block into whole rows
    y = threads // x
    grid = (1 if cell.has_reduction else -(-across // x), max(1, min(-(-B // y), MAX_GRID_Y)), 1)
    return Launch(unit(KERNELS, cell, defines), kernel, grid, (x, y, 1), (*addresses, B, H, R))
