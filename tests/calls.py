"""Call a backend's two operations by arrays alone; no torch needed."""

from types import SimpleNamespace

from gpu_rnn.backends import dispatch, gpu_common
from gpu_rnn.core import arrays
from gpu_rnn.core.problem import Grads, Problem, Run


def problem_of(cell, x, weights, *, reverse=False, tf32=False, save=False, step_exact=False, **more):
    """The problem that a run of these arrays is."""
    (T, B, I), (GH, P), projected = x.shape, weights.w_hh.shape, weights.w_hr is not None
    return Problem(
        cell, T, B, None if weights.w_ih is None else I, GH // cell.G, P if projected else None, arrays.dtype(x),
        arrays.device(x).partition(":")[0], arrays.library(x), save, reverse, tf32, step_exact=step_exact, **more,
    )  # fmt: skip


def operations(forward, backward, REPEATS_INPUTS=False):
    """As much of a backend as `TwoPass` and `Heads` call."""
    return SimpleNamespace(
        forward=forward, backward=backward, gemm_operands=gpu_common.gemm_operands, REPEATS_INPUTS=REPEATS_INPUTS
    )


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


def forward_many(operation, cases, *, save=True, tf32=False, linked=False):
    """Run the directions of a layer, or the layers of a stack -> the results of each."""
    runs, problem = many(cases, save, tf32, linked)
    return operation(problem, runs)


def backward_many(operation, cases, results, *, tf32=False, linked=False, dys=None, needs=None):
    """Their gradients, of each by name."""
    runs, problem = many(cases, True, tf32, linked)
    saved = [(result.y, *result.saved) for result in results]
    dys = [case.dy for case in cases] if dys is None else dys
    grads = [Grads(dy, case.dlast) for dy, case in zip(dys, cases)]
    return operation(problem, runs, saved, grads, needs or [case.needs for case in cases])


def many(cases, save, tf32, linked):
    runs = [Run(None if linked and k else case.x, *case[4:6], case.reverse) for k, case in enumerate(cases)]
    count = {"layers" if linked else "directions": len(cases)}
    first = cases[0]
    return runs, problem_of(first.cell, first.x, first.weights, reverse=first.reverse, save=save, tf32=tf32, **count)


def backward_of(backend, problem, run, y, saved, dy, dlast, needs):
    """`dispatch.backward` of one run; without `saved` it is recomputed."""
    kept = (y, *saved) if saved else ()
    (gradients,) = dispatch.backward(backend, problem, [run], [kept], [Grads(dy, dlast)], [needs])
    return gradients
