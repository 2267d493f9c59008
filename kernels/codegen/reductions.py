"""A cell split at its reductions over hidden units, for kernels that spread the units of a batch row over threads.

A level is a function of the cell's arguments and of the means of the levels before. Its values are summed over all
units, and the means are arguments of the next level, at last of the cell itself. Each level recomputes what it needs;
where that is cheaper a compiler keeps it.
"""

from functools import cache
from itertools import accumulate
from typing import NamedTuple

from ..cells import Cell, grad_graph, step_graph
from ..trace import MEANS, Graph, Symbol


class ReductionSplit(NamedTuple):
    levels: tuple[Graph, ...]  # -> the values whose means are taken, in one group
    graph: Graph  # of the cell, with means for an argument

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of means of each level."""
        return tuple(len(level.outputs[0]) for level in self.levels)

    @property
    def means_before(self) -> tuple[int, ...]:
        """The number of means before each level, and in all."""
        return 0, *accumulate(self.counts)


@cache
def step_split(cell: Cell) -> ReductionSplit:
    return split_at_reductions(step_graph(cell))


@cache
def grad_split(cell: Cell) -> ReductionSplit:
    return split_at_reductions(grad_graph(cell))


def split_at_reductions(graph: Graph) -> ReductionSplit:
    graph = graph.pruned()
    means = sorted((node for node in graph.nodes.values() if node.op == "mean"), key=lambda node: node.reduction_depth)
    levels = []
    for level in sorted({node.reduction_depth for node in means}):
        values = tuple(node.operands[0] for node in means if node.reduction_depth == level)
        levels.append(with_mean_inputs(means, level, (values,)))
    return ReductionSplit(tuple(levels), with_mean_inputs(means, len(means) + 1, graph.outputs))


def with_mean_inputs(means: list[Symbol], depth: int, outputs: tuple[tuple[Symbol, ...], ...]) -> Graph:
    """Return the graph of the outputs, in which the means below a depth are inputs."""
    graph = Graph()
    known = {node: graph.node("input", MEANS, k) for k, node in enumerate(means) if node.reduction_depth < depth}
    graph.outputs = tuple(tuple(graph.copy_into(value, known) for value in group) for group in outputs)
    return graph
