"""A cell's page as a C++ struct, written from its graph: what the kernels call `Cell`."""

from functools import cache

from ..cells import Cell, extra, grad_graph, step_graph
from ..emit import assignments
from ..trace import Graph


@cache
def page(cell: Cell) -> str:
    """The LSTM's begins

    struct Cell {
        enum { G = 4, S = 2, K = 4 };
        DEVICE static void step(const real* x, const real* h, real* state, real* saved) {
            const real x_0 = x[0];
    """
    more = "".join(f", const real* {name}" for name in extra(cell))
    return "\n".join(
        [
            "struct Cell {",
            f"    enum {{ G = {cell.G}, S = {cell.S}, K = {cell.K} }};",
            f"    DEVICE static void step(const real* x, const real* h, real* state, real* saved{more}) {{",
            *body(step_graph(cell), "state", "saved"),
            "    DEVICE static void grad(const real* dnew, const real* next, const real* state, const real* saved,",
            f"                            real* dx, real* dh, real* dstate{more}) {{",
            *body(grad_graph(cell), "dx", "dh", "dstate"),
            "};\n",
        ]
    ).replace("= new[", "= next[")


def body(graph: Graph, *results: str) -> list[str]:
    lines, groups = assignments(graph, lambda value: f"real({value!r})")
    stores = [f"{name}[{k}] = {value}" for name, group in zip(results, groups) for k, value in enumerate(group)]
    return [*(f"        const real {line};" for line in lines), *(f"        {store};" for store in stores), "    }"]
