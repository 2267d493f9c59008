"""A cell's page as a C++ struct, written from its graph: what the kernels call `Cell`."""

from functools import cache

from ..cells import Cell, grad_graph, operand_grad_graph, operand_graph, step_graph
from ..emit import assignments
from ..trace import Graph


@cache
def page(cell: Cell) -> str:
    """The LSTM's begins

    struct Cell {
        enum { G = 4, S = 2, K = 4, PER_UNIT = 0, LEARNED = 0, FLAGS = 0, UNIFORMS = 0, OPERAND = 0 };
        DEVICE static void step(const real* x, const real* h, real* state, real* saved,
                                const real* extra = nullptr) {
            const real x_0 = x[0];
    """
    sizes = {"G": cell.G, "S": cell.S, "K": cell.K, "PER_UNIT": len(cell.units), "LEARNED": cell.learned}
    sizes |= {"FLAGS": len(cell.flags), "UNIFORMS": cell.uniforms, "OPERAND": int(cell.operand is not None)}
    step = body(step_graph(cell), "state", "saved")
    grad = body(grad_graph(cell), "dx", "dh", "dstate", "dunits")
    operand, operand_grad = body(operand_graph(cell), "h"), body(operand_grad_graph(cell), "dnew", "dunits")
    lines = [
        "struct Cell {",
        f"    enum {{ {', '.join(f'{name} = {size}' for name, size in sizes.items())} }};",
        "    DEVICE static void step(const real* x, const real* h, real* state, real* saved,",
        "                            const real* extra = nullptr) {",
        *step,
        "    }",
        "    DEVICE static void grad(const real* dnew, const real* next, const real* state, const real* saved,",
        "                            real* dx, real* dh, real* dstate, real* dunits = nullptr,",
        "                            const real* extra = nullptr) {",
        *grad,
        "    }",
        "    DEVICE static void operand(real* h, const real* extra) {",
        *operand,
        "    }",
        "    DEVICE static void operand_grad(real* dnew, real* dunits, const real* extra) {",
        *operand_grad,
        "    }",
        "};\n",
    ]
    return "\n".join(lines)


def body(graph: Graph, *results: str) -> list[str]:
    lines, groups = assignments(graph, lambda value: f"real({value!r})")
    lines = [line.replace("= new[", "= next[") for line in lines]  # a word that C++ has taken
    stores = [f"{name}[{k}] = {value}" for name, group in zip(results, groups) for k, value in enumerate(group)]
    return [*(f"        const real {line};" for line in lines), *(f"        {store};" for store in stores)]
