"""Triton: the kernels of kernels/triton, on torch tensors and torch's current stream.

Where one program can hold the recurrent weights a whole sequence is one launch; else `stepwise` walks through time with
one product and one launch per instant. Both leave the same tape.

With TRITON_INTERPRET=1 in the environment Triton runs its kernels in NumPy, and this backend takes CPU tensors.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.triton import config as plans

from ..core import arrays, optional_imports
from ..core.problem import Memory, Problem, Weights
from . import gpu_common, per_step
from .gpu_common import factors as factors
from .gpu_common import history as history

NAME = "triton"
LARGEST_SHARED_MEMORY = 232448  # bytes; that of sm_90 and sm_100, which the interpreter stands for


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons(problem: Problem) -> list[str]:
    why = [reason for reason in map(optional_imports.missing, ("torch", "triton")) if reason is not None]
    if problem.library != "torch":
        why.append(f"takes torch tensors, not {problem.library} arrays (torch.from_dlpack converts without a copy)")
    if problem.dtype not in arrays.DTYPES:
        why.append(f"has no kernel for {problem.dtype}, only for {', '.join(arrays.DTYPES)}")
    if not interpreted():
        if problem.device != "cuda":
            why.append(problem.elsewhere)
        why += unfit()
    return why


@cache
def unfit() -> list[str]:
    """Why the current GPU can't run the kernels, or that there is none."""
    reason = optional_imports.no_gpu()
    if reason is not None:
        return [reason]
    if optional_imports.missing("torch") is not None:
        return []  # said before
    import torch

    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    capability = torch.cuda.get_device_capability()
    if capability < plans.OLDEST:
        return [f"the GPU has compute capability {capability}; the kernels need at least {plans.OLDEST}"]
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # its driver is built where it runs, by a C compiler that needn't be there
        return [f"Triton's driver for the GPU doesn't start: {type(error).__name__}: {error}"]
    return []


def plan(problem: Problem) -> str:
    chosen, why = sequence_plan(problem)
    ways = "forward and backward" if problem.training else "forward"
    if chosen is None:
        return f"{gpu_common.projection(problem)}\n{ways}: {gpu_common.per_step(problem)}; no persistent kernel: {why}"
    programs = -(-problem.B // chosen.rows)
    return (
        f"{gpu_common.projection(problem)}\n{ways}: persistent kernel: {programs} x {32 * chosen.num_warps} threads, "
        f"{chosen.rows} sequences per block, tiles of {chosen.tile} hidden units; recurrent weights on-chip; inputs in "
        f"{chosen.stages} stages"
    )


def method(problem: Problem, backward: bool, stacked: bool = False) -> str:
    per_step = sequence_plan(replace(problem, training=backward))[0] is None
    return f"triton {'per-step' if per_step else 'persistent'}"


def memory(problem: Problem) -> Memory:
    workspace, own = per_step.memory(problem), []
    for backward in (False, True):
        persistent = sequence_plan(replace(problem, training=backward))[0]
        own.append(0 if persistent else workspace[backward])
    return gpu_common.memory(problem, *own)


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, tf32: bool = False, save: bool,
    step_exact: bool = False,
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    x, weights, state = aligned(x), Weights(*map(aligned, weights)), tuple(map(aligned, state))
    with device_of(x), arrays.products(x, tf32):
        return gpu_common.forward(
            walk, cell, x, weights, state, reverse=reverse, tf32=tf32, save=save, step_exact=step_exact
        )


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    dhistory: tuple = (), *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    x, weights, state, dy = aligned(x), Weights(*map(aligned, weights)), tuple(map(aligned, state)), aligned(dy)
    with device_of(x), arrays.products(x, tf32):
        return gpu_common.backward(
            walk_back, cell, x, weights, state, y, tape, dy, dlast, dhistory, reverse=reverse, tf32=tf32, needs=needs
        )


def warmup(problem: Problem) -> tuple[str, ...]:
    """Compile what a problem needs, for the current device, by running it on zeros. -> the kernels.

    Triton specializes on sizes that are 1 or divisible by 16, so that a few instants stand for all, and on whether
    there is a bias.
    """
    torch = optional_imports.require("torch", "the triton backend")
    cell, B, H, I = problem.cell, problem.B, problem.H, problem.I
    T, P = 1 if problem.T == 1 else 2 if problem.T % 16 else 16, problem.P or H

    def zeros(*shape: int, dtype: str = problem.dtype) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=problem.device)

    weights = Weights(
        None if I is None else zeros(cell.G * H, I), zeros(cell.G * H, P), zeros(cell.G * H), zeros(cell.G * H),
        w_hr=zeros(P, H) if problem.P else None,
        units=zeros(len(cell.units), 1, H) if cell.units else None,
        flags=zeros(T, B, dtype="uint8") if cell.flags else None,
        seed=zeros(1, dtype="int64") if cell.uniforms else None,
    )  # fmt: skip
    x, state = zeros(T, B, cell.G * H if I is None else I), (zeros(B, P), *(zeros(B, H) for _ in cell.states[1:]))
    how: dict[str, Any] = {"reverse": problem.reverse, "tf32": problem.tf32}
    for given in (weights, weights._replace(b_ih=None, b_hh=None)):
        y, last, tape = forward(cell, x, given, state, **how, save=problem.training)
        if problem.training:
            backward(cell, x, given, state, y, tape, y, last, **how, needs={"x", "w_hh"})
    name = "stepwise" if sequence_plan(problem)[0] is None else "sequence"
    return tuple(f"{name}_{way}" for way in ("forward", "backward")[: 1 + problem.training])


def aligned(array: Any) -> Any:
    """The array, or a copy where it doesn't begin at a multiple of 16 bytes; None stays None.

    For others Triton compiles anew, and where the state of a layer begins among those of all depends on B.
    """
    if array is None or array.data_ptr() % 16 == 0:
        return array
    return array.clone(memory_format=optional_imports.require("torch", "the triton backend").contiguous_format)


def device_of(x: Any) -> Any:
    """Triton launches on the current device, which needn't be that of x."""
    return optional_imports.require("torch", "the triton backend").cuda.device_of(x)


# ---- the walk: in one launch where a program can hold the weights, else an instant at a time ------------------------


def walk(cell: Cell, given: gpu_common.Forward) -> None:
    chosen = planned(cell, given.xg, given.w_hr, backward=False)
    if chosen is None:
        per_step.walk(bind, cell, given)
        return
    from gpu_rnn.kernels.triton.persistent import forward_kernel

    whole = (given.xg, given.w_hh, given.b_hh, given.h0, given.others, given.saved, given.y)
    launch(forward_kernel, stepping(cell), chosen, whole, given, given.xg.shape)


def walk_back(cell: Cell, given: gpu_common.Backward) -> None:
    chosen = planned(cell, given.dxg, given.w_hr, backward=True)
    if chosen is None:
        per_step.walk_back(bind, cell, given)
        return
    from gpu_rnn.kernels.triton.persistent import backward_kernel

    whole = (
        given.w_hh, given.dy, given.dh, given.dothers, given.y, given.h0, given.others, given.saved, given.dxg,
        given.dhg, given.dhistory, given.dunits,
    )  # fmt: skip
    launch(backward_kernel, differentiating(cell), chosen, whole, given, given.dxg.shape)


def launch(
    kernel: Any, page: tuple, chosen: plans.Sequence, whole: tuple, given: gpu_common.Forward | gpu_common.Backward,
    shape: tuple,
) -> None:  # fmt: skip
    T, B, _, H = shape
    precision = "tf32" if given.tf32 else "ieee"  # of float32 products; others have one only
    kernel[(-(-B // chosen.rows),)](
        *whole, *given.extra, T, B, given.extra.rows, int(given.reverse), *page, H, chosen.rows, chosen.tile, precision,
        chosen.stages, num_warps=chosen.num_warps, maxnreg=chosen.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


def stepping(cell: Cell) -> tuple:
    """What a kernel that goes forward is specialized on: functions and sizes of the page."""
    from gpu_rnn.kernels.triton.cell_functions import page

    of = page(cell)
    return of.step, of.step_level, of.step_means, of.operand, *sizes(cell)


def differentiating(cell: Cell) -> tuple:
    """The same of one that goes back."""
    from gpu_rnn.kernels.triton.cell_functions import page

    of = page(cell)
    operand_grad = None if cell.operand is None else of.operand_grad
    return of.grad, of.grad_level, of.grad_means, operand_grad, *sizes(cell), cell.learned


def sizes(cell: Cell) -> tuple[int, ...]:
    return cell.G, cell.S, cell.K, len(cell.units), len(cell.flags), cell.uniforms


def planned(cell: Cell, gates: Any, w_hr: Any, *, backward: bool) -> plans.Sequence | None:
    """The plan for arrays; gates [T, B, G, H]."""
    T, B, _, H = gates.shape
    P = None if w_hr is None else w_hr.shape[0]
    return sequence_plan(Problem(cell, T, B, 0, H, P, arrays.dtype(gates), training=backward))[0]


def sequence_plan(problem: Problem) -> tuple[plans.Sequence | None, str]:
    """The plan for a whole sequence in one launch on the current GPU, or why there is none."""
    if problem.P is not None:
        return None, "a projection (w_hr) takes a second matmul per time step"
    return plans.sequence(problem.cell, problem.H, problem.dtype, shared_memory(), backward=problem.training)


def shared_memory() -> int:
    """Bytes that one program can have on the current GPU."""
    if interpreted():
        return LARGEST_SHARED_MEMORY
    from triton.runtime import driver

    return shared_memory_of(driver.active.get_current_device())


@cache
def shared_memory_of(device: int) -> int:
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


# ---- an instant in one launch ---------------------------------------------------------------------------------------


def bind(cell: Cell, given: per_step.Step | per_step.Grad) -> Callable[..., None]:
    """Either kernel on its arrays. The first call finds or makes the binary for them, the others launch just that."""
    from triton import language as tl

    from gpu_rnn.kernels.triton.stepwise import grad_kernel, step_kernel

    if isinstance(given, per_step.Step):
        kernel, page, gates, real = step_kernel, stepping(cell), given.xg, given.h
    else:
        kernel, page, gates, real = grad_kernel, differentiating(cell), given.dxg, given.dh
    _, B, _, H = gates.shape
    R = 1 if given.units is None else given.units.shape[1]
    block_b, block_h, num_warps, maxnreg = plans.instant(H, arrays.dtype(real), whole=cell.meets)
    grid = (-(-B // block_b), 1 if cell.meets else -(-H // block_h), 1)
    constants = (*page, getattr(tl, arrays.dtype(real)), block_b, block_h)
    binary = None

    def repeat(*instant: int) -> None:
        nonlocal binary
        arguments = (*given, *instant, B, H, R, *constants)
        if binary is None:
            binary = kernel[grid](*arguments, num_warps=num_warps, maxnreg=maxnreg, enable_fp_fusion=True)
        else:
            binary[grid](*arguments)

    return repeat
