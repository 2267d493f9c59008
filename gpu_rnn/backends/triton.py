"""Triton: the kernels of kernels/triton, on torch tensors and torch's current stream.

Where one program can hold the recurrent weights a whole pass is one launch of a persistent kernel; else the `per_step`
loop runs one matmul and one launch per time step. Both save the same activations.

With TRITON_INTERPRET=1 in the environment Triton runs its kernels in NumPy, and this backend takes CPU tensors.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from gpu_rnn.kernels.cells import Cell
from gpu_rnn.kernels.triton import config

from ..core import arrays, optional_imports
from ..core.problem import Grads, Memory, Problem, Result, Run, Weights
from . import gpu_common, per_step
from .gpu_common import BackwardBuffers, ForwardBuffers
from .gpu_common import gemm_operands as gemm_operands
from .gpu_common import saved_shapes as saved_shapes
from .protocol import Needs, backward_in_turn, forward_in_turn
from .protocol import never_fuses_layers as fuses_layers  # noqa: F401

NAME = "triton"
RUNS_HEADS = REPEATS_INPUTS = False
LARGEST_SHARED_MEMORY = 232448  # bytes; that of sm_90 and sm_100, which the interpreter stands for


@cache
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
        why += unsupported_reasons()
    return why


@cache
def unsupported_reasons() -> list[str]:
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
    if capability < config.OLDEST:
        return [f"the GPU has compute capability {capability}; the kernels need at least {config.OLDEST}"]
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # its driver is built where it runs, by a C compiler that needn't be there
        return [f"Triton's driver for the GPU doesn't start: {type(error).__name__}: {error}"]
    return []


def plan(problem: Problem) -> str:
    chosen, why = persistent_config(problem, problem.training)
    ways = "forward and backward" if problem.training else "forward"
    projection = gpu_common.describe_projection(problem)
    if chosen is None:
        return f"{projection}\n{ways}: {gpu_common.describe_per_step(problem)}; no persistent kernel: {why}"
    programs = -(-problem.B // chosen.rows)
    return (
        f"{projection}\n{ways}: persistent kernel: {programs} x {32 * chosen.num_warps} threads, "
        f"{chosen.rows} sequences per block, tiles of {chosen.tile} hidden units; recurrent weights on-chip; inputs in "
        f"{chosen.stages} stages"
    )


def method(problem: Problem, backward: bool) -> str:
    return f"triton {'per-step' if persistent_config(problem, backward)[0] is None else 'persistent'}"


def memory(problem: Problem) -> Memory:
    workspace, own = per_step.memory(problem), []
    for backward in (False, True):
        own.append(0 if persistent_config(problem, backward)[0] else workspace[backward])
    return gpu_common.memory(problem, *own)


def forward(problem: Problem, runs: Sequence[Run]) -> list[Result]:
    if len(runs) > 1:
        return forward_in_turn(forward, problem, runs)
    run = aligned_run(*runs)
    with device_of(run.x), arrays.matmul_precision(run.x, problem.tf32):
        return gpu_common.forward(run_forward, problem, [run])


def backward(
    problem: Problem, runs: Sequence[Run], saved: Sequence[tuple], grads: Sequence[Grads], needs: Sequence[Needs]
) -> list[dict[str, Any]]:
    if len(runs) > 1:
        return backward_in_turn(backward, problem, runs, saved, grads, needs)
    run, grad = aligned_run(*runs), grads[0]._replace(y=aligned(grads[0].y)[0])
    with device_of(run.x), arrays.matmul_precision(run.x, problem.tf32):
        return gpu_common.backward(run_backward, problem, [run], saved, [grad], needs)


def warmup(problem: Problem) -> tuple[str, ...]:
    """Compile what a problem needs, for the current device, by running it on zeros. -> the kernels.

    Triton specializes on sizes that are 1 or divisible by 16, so that a few time steps stand for all, and on whether
    there is a bias.
    """
    torch = optional_imports.require("torch", "the triton backend")
    cell, B, H, I = problem.cell, problem.B, problem.H, problem.I
    T, P = 1 if problem.T == 1 else 2 if problem.T % 16 else 16, problem.P or H
    problem = problem.variant(T=T).single(0, problem.reverse)

    def zeros(*shape: int, dtype: str = problem.dtype) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=problem.device)

    weights = Weights(
        None if I is None else zeros(cell.G * H, I), zeros(cell.G * H, P), zeros(cell.G * H), zeros(cell.G * H),
        w_hr=zeros(P, H) if problem.P else None,
        units=zeros(len(cell.per_unit_params), 1, H) if cell.per_unit_params else None,
        flags=zeros(T, B, dtype="uint8") if cell.flags else None,
        seed=zeros(1, dtype="int64") if cell.uniforms else None,
    )  # fmt: skip
    x, state = zeros(T, B, cell.G * H if I is None else I), (zeros(B, P), *(zeros(B, H) for _ in cell.states[1:]))
    for present in (weights, weights._replace(b_ih=None, b_hh=None)):
        run = Run(x, present, state, problem.reverse)
        (result,) = forward(problem, [run])
        if problem.training:
            grads = Grads(result.y, result.last, result.history)
            backward(problem, [run], [(result.y, *result.saved)], [grads], [{"x", "w_hh"}])
    name = "stepwise" if persistent_config(problem, problem.training)[0] is None else "sequence"
    return tuple(f"{name}_{way}" for way in ("forward", "backward")[: 1 + problem.training])


def aligned_run(run: Run) -> Run:
    x, weights, state, reverse = run
    x, *flat = aligned(x, *weights, *state)
    return Run(x, Weights(*flat[: len(weights)]), flat[len(weights) :], reverse)


def aligned(*many: Any) -> list[Any]:
    """The arrays, or copies of those that don't begin at a multiple of 16 bytes; None stays None.

    For others Triton compiles anew, and where the state of a layer begins among those of all depends on B.
    """
    return [a if a is None or a.data_ptr() % 16 == 0 else gpu_common.to_storage(a, like=a) for a in many]


def device_of(x: Any) -> Any:
    """Triton launches on the current device, which needn't be that of x."""
    return arrays.module("torch").cuda.device_of(x)


# ---- The time loop: in one launch where a program can hold the weights, else per step -------------------------------


def run_forward(problem: Problem, buffers: Sequence[ForwardBuffers]) -> None:
    (b,), cell = buffers, problem.cell
    chosen = config_for(problem, backward=False)
    if chosen is None:
        per_step.run_forward(bind, problem, buffers)
        return
    from gpu_rnn.kernels.triton.persistent import forward_kernel

    args = b.Wx, b.w_hh, b.b_hh, b.h0, b.cell_states, b.saved, b.y
    launch(forward_kernel, forward_constexprs(cell), chosen, args, b, problem)


def run_backward(problem: Problem, buffers: Sequence[BackwardBuffers]) -> None:
    (b,), cell = buffers, problem.cell
    chosen = config_for(problem, backward=True)
    if chosen is None:
        per_step.run_backward(bind, problem, buffers)
        return
    from gpu_rnn.kernels.triton.persistent import backward_kernel

    args = (
        b.w_hh, b.dy, b.dh, b.dcell_states, b.y, b.h0, b.cell_states, b.saved, b.dWx, b.dRh, b.dhistory, b.dunits
    )  # fmt: skip
    launch(backward_kernel, backward_constexprs(cell), chosen, args, b, problem)


def launch(
    kernel: Any, constexprs: tuple, chosen: config.Sequence, args: tuple, buffers: ForwardBuffers | BackwardBuffers,
    problem: Problem,
) -> None:  # fmt: skip
    T, B, H = problem.T, problem.B, problem.H
    precision = "tf32" if problem.tf32 else "ieee"  # of float32 matmuls; others have one only
    kernel[(-(-B // chosen.rows),)](
        *args, *buffers.aux, T, B, gpu_common.aux_rows(buffers.aux), int(buffers.reverse), *constexprs, H,
        chosen.rows, chosen.tile,
        precision, chosen.stages, num_warps=chosen.num_warps, maxnreg=chosen.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip


@cache
def forward_constexprs(cell: Cell) -> tuple:
    """What a forward kernel is specialized on: functions and sizes of the cell."""
    from gpu_rnn.kernels.triton.cell_functions import compile_cell as compile_cell

    functions = compile_cell(cell)
    return functions.step, functions.step_level, functions.step_means, functions.recurrent_input, *sizes(cell)


@cache
def backward_constexprs(cell: Cell) -> tuple:
    """What a backward kernel is specialized on: functions and sizes of the cell."""
    from gpu_rnn.kernels.triton.cell_functions import compile_cell as compile_cell

    functions = compile_cell(cell)
    of_input = None if cell.recurrent_input is None else functions.recurrent_input_grad
    return functions.grad, functions.grad_level, functions.grad_means, of_input, *sizes(cell), cell.num_trainable


def sizes(cell: Cell) -> tuple[int, ...]:
    return cell.G, cell.S, cell.K, len(cell.per_unit_params), len(cell.flags), cell.uniforms


def persistent_config(problem: Problem, backward: bool) -> tuple[config.Sequence | None, str]:
    """The configuration of a pass in one launch on the current GPU, or why there is none."""
    if problem.P is not None:
        return None, "a projection (w_hr) takes a second matmul per time step"
    return config.sequence(problem.cell, problem.H, problem.dtype, shared_memory(), backward=backward)


def config_for(problem: Problem, *, backward: bool) -> config.Sequence | None:
    """The configuration of a pass, decided once for a problem and a GPU."""
    return problem.decide(("triton", backward, shared_memory()), persistent_config, problem, backward)[0]


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


# ---- A time step in one launch --------------------------------------------------------------------------------------


def bind(cell: Cell, buffers: per_step.Step | per_step.Grad) -> Callable[..., None]:
    """Bind a per-step kernel to its arrays. Its first call compiles it or finds the binary; the others only launch."""
    from triton import language as tl

    from gpu_rnn.kernels.triton.stepwise import grad_kernel, step_kernel

    if isinstance(buffers, per_step.Step):
        kernel, constexprs, real = step_kernel, forward_constexprs(cell), buffers.h
    else:
        kernel, constexprs, real = grad_kernel, backward_constexprs(cell), buffers.dh_direct
    _, B, H = buffers.y.shape
    R = 1 if buffers.units is None else buffers.units.shape[1]
    block_b, block_h, num_warps, maxnreg = config.step_config(H, arrays.dtype(real), whole=cell.has_reduction)
    grid = (-(-B // block_b), 1 if cell.has_reduction else -(-H // block_h), 1)
    constants = (*constexprs, getattr(tl, arrays.dtype(real)), block_b, block_h)
    binary = None

    def launch_again(*index: int) -> None:
        nonlocal binary
        args = (*buffers, *index, B, H, R, *constants)
        if binary is None:
            binary = kernel[grid](*args, num_warps=num_warps, maxnreg=maxnreg, enable_fp_fusion=True)
        else:
            binary[grid](*args)

    return launch_again
