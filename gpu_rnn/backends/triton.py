"""Triton: the kernels of kernels/triton, on torch tensors and torch's current stream.

Where one program can hold the recurrent weights a whole sequence is one launch; else `stepwise` walks through time with
one product and one launch per instant. Both leave the same tape.

With TRITON_INTERPRET=1 in the environment Triton runs its kernels in NumPy, and this backend takes CPU tensors.
"""

import os
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.triton import plan as plans

from .. import arrays, compat
from ..problem import Problem, Weights
from . import sequence, stepwise

NAME = "triton"
LARGEST_SHARED_MEMORY = 232448  # bytes; that of sm_90 and sm_100, which the interpreter stands for


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons(problem: Problem) -> list[str]:
    why = [reason for reason in map(compat.missing, ("torch", "triton")) if reason is not None]
    if problem.library != "torch":
        why.append(f"its kernels take torch tensors, not {problem.library} arrays; see torch.from_dlpack")
    if problem.dtype not in arrays.DTYPES:
        why.append(f"{problem.dtype} has no kernel; there are {', '.join(arrays.DTYPES)}")
    if not interpreted():
        if problem.device != "cuda":
            why.append(f"the arrays are on {problem.device}; Triton computes on the GPU and nothing is moved silently")
        why += unfit()
    return why


@cache
def unfit() -> list[str]:
    """Why the current GPU can't run the kernels, or that there is none."""
    reason = compat.no_gpu()
    if reason is not None:
        return [reason]
    if compat.missing("torch") is not None:
        return []  # said before
    import torch

    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    capability = torch.cuda.get_device_capability()
    if capability < plans.OLDEST:
        return [f"the GPU has compute capability {capability}; the kernels need {plans.OLDEST}"]
    return []


def plan(problem: Problem) -> str:
    chosen, why = sequence_plan(problem)
    if chosen is None:
        return f"stepwise: one product for all inputs; one product and one fused kernel per step; {why}"
    programs = -(-problem.B // chosen.rows)
    return f"sequence: one product for all inputs; all steps in one launch of {programs} programs, {chosen}"


def forward(
    cell: Cell, x: Any, weights: Weights, state: tuple, *, reverse: bool, save: bool
) -> tuple[Any, tuple, tuple]:
    with device_of(x):
        return sequence.forward(walk, cell, x, weights, state, reverse=reverse, save=save)


def backward(
    cell: Cell, x: Any, weights: Weights, state: tuple, y: Any, tape: tuple, dy: Any, dlast: tuple,
    *, reverse: bool, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    with device_of(x):
        return sequence.backward(walk_back, cell, x, weights, state, y, tape, dy, dlast, reverse=reverse, needs=needs)


def device_of(x: Any) -> Any:
    """Triton launches on the current device, which needn't be that of x."""
    return compat.require("torch", "the triton backend").cuda.device_of(x)


# ---- the walk: in one launch where a program can hold the weights, else an instant at a time ------------------------


def walk(cell: Cell, given: sequence.Forward) -> None:
    chosen = planned(cell, given.xg, given.w_hr, backward=False)
    if chosen is None:
        stepwise.walk(bind, cell, given)
        return
    from gpu_rnn.kernels.triton.page import page
    from gpu_rnn.kernels.triton.sequence import forward_kernel

    whole = (given.xg, given.w_hh, given.b_hh, given.h0, given.others, given.saved, given.y)
    launch(forward_kernel, page(cell).step, chosen, cell, whole, given.xg.shape, given.reverse)


def walk_back(cell: Cell, given: sequence.Backward) -> None:
    chosen = planned(cell, given.dxg, given.w_hr, backward=True)
    if chosen is None:
        stepwise.walk_back(bind, cell, given)
        return
    from gpu_rnn.kernels.triton.page import page
    from gpu_rnn.kernels.triton.sequence import backward_kernel

    whole = (
        given.w_hh, given.dy, given.dh, given.dothers, given.y, given.h0, given.others, given.saved, given.dxg,
        given.dhg,
    )  # fmt: skip
    launch(backward_kernel, page(cell).grad, chosen, cell, whole, given.dxg.shape, given.reverse)


def launch(
    kernel: Any, function: Callable, chosen: plans.Sequence, cell: Cell, whole: tuple, shape: tuple, reverse: bool
) -> None:
    T, B, G, H = shape
    precision = "tf32" if arrays.tf32("torch") else "ieee"  # of float32 products; others have one only
    kernel[(-(-B // chosen.rows),)](
        *whole, T, B, int(reverse), function, G, cell.S, cell.K, H, chosen.rows, chosen.tile, precision, chosen.stages,
        num_warps=chosen.num_warps, maxnreg=chosen.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


def planned(cell: Cell, gates: Any, w_hr: Any, *, backward: bool) -> plans.Sequence | None:
    """The plan for arrays; gates [T, B, G, H]."""
    T, B, _, H = gates.shape
    P = None if w_hr is None else w_hr.shape[0]
    return sequence_plan(Problem(cell, T, B, 0, H, P, arrays.dtype(gates), training=backward))[0]


def sequence_plan(problem: Problem) -> tuple[plans.Sequence | None, str]:
    """The plan for a whole sequence in one launch on the current GPU, or why there is none."""
    if problem.P is not None:
        return None, "a projection is one more product per step"
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


def bind(cell: Cell, given: stepwise.Step | stepwise.Grad) -> Callable[..., None]:
    """Either kernel on its arrays. The first call finds or makes the binary for them, the others launch just that."""
    from triton import language as tl

    from gpu_rnn.kernels.triton.page import page
    from gpu_rnn.kernels.triton.stepwise import grad_kernel, step_kernel

    if isinstance(given, stepwise.Step):
        kernel, function, gates, real = step_kernel, page(cell).step, given.xg, given.h
    else:
        kernel, function, gates, real = grad_kernel, page(cell).grad, given.dxg, given.dh
    _, B, G, H = gates.shape
    block_b, block_h, num_warps = plans.instant(H)
    grid = (-(-B // block_b), -(-H // block_h), 1)
    constants = (function, G, cell.S, cell.K, getattr(tl, arrays.dtype(real)), block_b, block_h)
    binary = None

    def repeat(*instant: int) -> None:
        nonlocal binary
        arguments = (*given, *instant, B, H, *constants)
        if binary is None:
            binary = kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True)
        else:
            binary[grid](*arguments)

    return repeat
