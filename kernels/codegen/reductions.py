"""A page cut where units meet, for kernels that spread the units of a batch row over threads.

A level is a function of the page's arguments and of the means of the levels before. Its values are summed over all
units, and the means are the next level's, at last the page's own. Each level computes again what it needs of the page;
where that is cheaper a compiler keeps it.
"""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

from ..cells import Cell, grad_graph, step_graph
from ..trace import MEANS, Graph, Symbol


class Cut(NamedTuple):
    levels: tuple[Graph, ...]  # -> the values whose means are taken, in one group
    page: Graph  # with means for an argument

    @property
    def counts(self) -> tuple[int, ...]:
        """How many means there are of each level."""
        return tuple(len(level.outputs[0]) for level in self.levels)

    @property
    def before(self) -> tuple[int, ...]:
        """How many means there are before each level, and before the page."""
        return 0, *accumulate(self.counts)


@cache
def step_cut(cell: Cell) -> Cut:
    return cut(step_graph(cell))


@cache
def grad_cut(cell: Cell) -> Cut:
    return cut(grad_graph(cell))


def cut(graph: Graph) -> Cut:
    graph = graph.pruned()
    means = sorted((node for node in graph.nodes.values() if node.op == "mean"), key=lambda node: node.level)
    by_level = {level: [node for node in means if node.level == level] for level in sorted({n.level for n in means})}
    levels = [without(means, level, (tuple(node.operands[0] for node in met),)) for level, met in by_level.items()]
    return Cut(tuple(levels), without(means, len(means) + 1, graph.outputs))


def without(means: list[Symbol], depth: int, outputs: tuple[tuple[Symbol, ...], ...]) -> Graph:
    """The graph of the outputs, in which the means below a depth are inputs."""
    graph = Graph()
    known = {node: graph.node("input", MEANS, k) for k, node in enumerate(means) if node.level < depth}
    graph.outputs = tuple(tuple(graph.image(value, known) for value in group) for group in outputs)
    return graph
