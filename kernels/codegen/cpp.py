"""Renders a cell as a C++ struct: what the CUDA and the native kernels call `Cell`."""

from functools import cache
from math import copysign, isfinite, isnan

from ..cells import Cell, recurrent_input_grad_graph, recurrent_input_graph
from ..emit import assignments
from ..trace import Graph
from .reductions import ReductionSplit, grad_split, step_split


@cache
def render_cell(cell: Cell) -> str:
    """The LSTM's begins

    struct Cell {
        enum { G = 4, S = 2, K = 4, PER_UNIT = 0, TRAINABLE = 0, FLAGS = 0, UNIFORMS = 0, RECURRENT_INPUT = 0 };
        enum { SEPARATE = 0, COUNT_SEPARATE = 0 };
        enum { STEP_LEVELS = 0, STEP_MEANS = 0, GRAD_LEVELS = 0, GRAD_MEANS = 0 };
        DEVICE static void step(const real* x, const real* h, real* state, real* saved,
                                const real* extra = nullptr, const real* means = nullptr) {
            const real x_0 = x[0];
    """
    sizes = {"G": cell.G, "S": cell.S, "K": cell.K}
    sizes |= {"PER_UNIT": len(cell.per_unit_params), "TRAINABLE": cell.num_trainable, "FLAGS": len(cell.flags)}
    sizes |= {"UNIFORMS": cell.uniforms, "RECURRENT_INPUT": int(cell.recurrent_input is not None)}
    separate = {"SEPARATE": sum(1 << gate for gate, own in enumerate(cell.separate) if own)}  # a bit for each gate
    separate["COUNT_SEPARATE"] = sum(cell.separate)
    step, grad = step_split(cell), grad_split(cell)
    levels = {"STEP_LEVELS": len(step.levels), "STEP_MEANS": step.means_before[-1]}
    levels |= {"GRAD_LEVELS": len(grad.levels), "GRAD_MEANS": grad.means_before[-1]}
    constants = sizes, separate, levels
    lines = [
        "struct Cell {",
        *(f"    enum {{ {', '.join(f'{name} = {n}' for name, n in group.items())} }};" for group in constants),
        "    DEVICE static void step(const real* x, const real* h, real* state, real* saved,",
        "                            const real* extra = nullptr, const real* means = nullptr) {",
        *(line.replace("tanh(", "forward_tanh(") for line in body(step.graph, "state", "saved")),
        "    }",
        "    DEVICE static void grad(const real* dnew, const real* next, const real* state, const real* saved,",
        "                            real* dx, real* dh, real* dstate, real* dunits = nullptr,",
        "                            const real* extra = nullptr, const real* means = nullptr) {",
        *body(grad.graph, "dx", "dh", "dstate", "dunits"),
        "    }",
        *reduction_levels("step", "const real* x, const real* h, const real* state", step),
        *reduction_levels("grad", "const real* dnew, const real* next, const real* state, const real* saved", grad),
        "    DEVICE static void recurrent_input(real* h, const real* extra) {",
        *body(recurrent_input_graph(cell), "h"),
        "    }",
        "    DEVICE static void recurrent_input_grad(real* dnew, real* dunits, const real* extra) {",
        *body(recurrent_input_grad_graph(cell), "dnew", "dunits"),
        "    }",
        "};\n",
    ]
    return "\n".join(lines)


def reduction_levels(name: str, arguments: str, split: ReductionSplit) -> list[str]:
    """Of a cell's step or grad: the values of a level, and the number of means before it."""
    lines = [f"    DEVICE static constexpr int {name}_before(int level) {{"]
    lines += [f"        if (level == {level}) return {count};" for level, count in enumerate(split.means_before[:-1])]
    lines += [f"        return {split.means_before[-1]};", "    }"]
    lines += [f"    DEVICE static void {name}_level(int level, {arguments},"]
    lines += ["                                  const real* extra, const real* means, real* values) {"]
    for level, graph in enumerate(split.levels):
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
