"""A cell's page as a C++ struct, written from its graph: what the CUDA and the native kernels call `Cell`."""

from functools import cache
from math import copysign, isfinite, isnan

from ..cells import Cell, operand_grad_graph, operand_graph
from ..emit import assignments
from ..trace import Graph
from .reductions import Cut, grad_cut, step_cut


@cache
def page(cell: Cell) -> str:
    """The LSTM's begins

    struct Cell {
        enum { G = 4, S = 2, K = 4, PER_UNIT = 0, LEARNED = 0, FLAGS = 0, UNIFORMS = 0, OPERAND = 0 };
        enum { SEPARATE = 0, COUNT_SEPARATE = 0 };
        enum { STEP_LEVELS = 0, STEP_MEANS = 0, GRAD_LEVELS = 0, GRAD_MEANS = 0 };
        DEVICE static void step(const real* x, const real* h, real* state, real* saved,
                                const real* extra = nullptr, const real* means = nullptr) {
            const real x_0 = x[0];
    """
    sizes = {"G": cell.G, "S": cell.S, "K": cell.K, "PER_UNIT": len(cell.units), "LEARNED": cell.learned}
    sizes |= {"FLAGS": len(cell.flags), "UNIFORMS": cell.uniforms, "OPERAND": int(cell.operand is not None)}
    apart = {"SEPARATE": sum(1 << gate for gate, own in enumerate(cell.separate) if own)}  # a bit for each gate
    apart["COUNT_SEPARATE"] = sum(cell.separate)
    step, grad = step_cut(cell), grad_cut(cell)
    meeting = {"STEP_LEVELS": len(step.levels), "STEP_MEANS": step.before[-1]}
    meeting |= {"GRAD_LEVELS": len(grad.levels), "GRAD_MEANS": grad.before[-1]}
    operand, operand_grad = body(operand_graph(cell), "h"), body(operand_grad_graph(cell), "dnew", "dunits")
    lines = [
        "struct Cell {",
        *(
            f"    enum {{ {', '.join(f'{name} = {size}' for name, size in numbers.items())} }};"
            for numbers in (sizes, apart, meeting)
        ),
        "    DEVICE static void step(const real* x, const real* h, real* state, real* saved,",
        "                            const real* extra = nullptr, const real* means = nullptr) {",
        *(line.replace("tanh(", "forward_tanh(") for line in body(step.page, "state", "saved")),
        "    }",
        "    DEVICE static void grad(const real* dnew, const real* next, const real* state, const real* saved,",
        "                            real* dx, real* dh, real* dstate, real* dunits = nullptr,",
        "                            const real* extra = nullptr, const real* means = nullptr) {",
        *body(grad.page, "dx", "dh", "dstate", "dunits"),
        "    }",
        *meeting_units("step", "const real* x, const real* h, const real* state", step),
        *meeting_units("grad", "const real* dnew, const real* next, const real* state, const real* saved", grad),
        "    DEVICE static void operand(real* h, const real* extra) {",
        *operand,
        "    }",
        "    DEVICE static void operand_grad(real* dnew, real* dunits, const real* extra) {",
        *operand_grad,
        "    }",
        "};\n",
    ]
    return "\n".join(lines)


def meeting_units(name: str, arguments: str, cut: Cut) -> list[str]:
    """A level's values, and how many means there are before it."""
    lines = [f"    DEVICE static constexpr int {name}_before(int level) {{"]
    lines += [f"        if (level == {level}) return {count};" for level, count in enumerate(cut.before[:-1])]
    lines += [f"        return {cut.before[-1]};", "    }"]
    lines += [f"    DEVICE static void {name}_level(int level, {arguments},"]
    lines += ["                                  const real* extra, const real* means, real* values) {"]
    for level, graph in enumerate(cut.levels):
        lines += [f"        if (level == {level}) {{", *(f"    {line}" for line in body(graph, "values")), "        }"]
    return [*lines, "    }"]


def body(graph: Graph, *results: str) -> list[str]:
    lines, groups = assignments(graph, constant)
    lines = [line.replace("= new[", "= next[") for line in lines]  # a word that C++ has taken
    stores = [f"{name}[{k}] = {value}" for name, group in zip(results, groups) for k, value in enumerate(group)]
    return [*(f"        const real {line};" for line in lines), *(f"        {store};" for store in stores)]


def constant(value: float) -> str:
    """C++ has no literal for what isn't finite."""
    if isfinite(value):
        return f"real({value!r})"
    return "(real(0) / real(0))" if isnan(value) else f"(real({copysign(1, value)}) / real(0))"
