"""Call a backend's two operations for one run, by its arrays alone; no torch needed."""

from gpu_rnn.core import arrays
from gpu_rnn.core.problem import Grads, Problem, Run


def problem_of(cell, x, weights, *, reverse=False, tf32=False, save=False, step_exact=False, **more):
    """The problem that a run of these arrays is."""
    (T, B, I), (GH, P), projected = x.shape, weights.w_hh.shape, weights.w_hr is not None
    return Problem(
        cell, T, B, None if weights.w_ih is None else I, GH // cell.G, P if projected else None, arrays.dtype(x),
        arrays.device(x).partition(":")[0], arrays.library(x), save, reverse, tf32, step_exact=step_exact, **more,
    )  # fmt: skip


def forward(operation, cell, x, weights, state, *, reverse=False, **options):
    """-> y, the states after, what was saved."""
    problem = problem_of(cell, x, weights, reverse=reverse, **options)
    ((y, last, _, saved),) = operation(problem, [Run(x, weights, state, reverse)])
    return y, last, saved


def backward(operation, cell, x, weights, state, y, saved, dy, dlast, dhistory=(), *, reverse=False, needs, **options):
    """-> the gradients in `needs` by name, and those of the states."""
    problem = problem_of(cell, x, weights, reverse=reverse, save=True, **options)
    run, grads = Run(x, weights, state, reverse), Grads(dy, dlast, dhistory)
    (gradients,) = operation(problem, [run], [(y, *saved)], [grads], [needs])
    return gradients
