"""Which cuDNN algorithm torch.nn's recurrent layers ask for: a pure function, for explanations and benchmark rows.

From `get_algo` and what it calls in PyTorch's aten/src/ATen/native/cudnn/RNN.cpp (2.13), in its order. Above the small
sizes nearly everything is STANDARD: one matmul and one elementwise kernel per step.
"""

from gpu_rnn.kernels.modifiers import HOLD

from ..core.problem import Problem

SMALL_H = {  # the largest hidden size of PERSIST_STATIC_SMALL_H: in inference, in training
    "rnn_tanh": (384, 256),
    "rnn_relu": (384, 256),
    "lstm": (192, 128),
    "gru": (192, 128),
}


def algorithm(
    problem: Problem, *, layers: int = 1, directions: int = 1, packed: bool = False,
    capability: tuple[int, int] = (9, 0), multiprocessors: int = 132,
) -> str:  # fmt: skip
    """STANDARD, PERSIST_STATIC_SMALL_H or PERSIST_STATIC; "none" for what cuDNN lacks: a cell, a dtype, an input
    part that is there already.

    `capability` and `multiprocessors` describe the GPU (default: H100 and H200).
    """
    (cell, *modifiers), H, dtype = problem.cell.name.split("+"), problem.H, problem.dtype
    packed = packed or HOLD in modifiers  # what lengths are here
    if (
        problem.I is None
        or cell not in SMALL_H
        or set(modifiers) - {HOLD}
        or problem.heads > 1
        or dtype not in ("float64", "float32", "float16", "bfloat16")
    ):
        return "none"
    if problem.P is not None and cell != "lstm":
        return "none"
    if problem.P is not None or packed:
        return "STANDARD"
    if dtype != "float64" and SMALL_H[cell][problem.training] >= H:
        return "PERSIST_STATIC_SMALL_H"
    aligned = H <= 1024 and H % 128 == 0 and problem.I % 128 == 0
    if dtype == "float16" and layers == directions == 1 and aligned:
        ampere = capability[0] >= 8 and multiprocessors >= 98 and capability[1] != 6
        batch = problem.B % 8 == 0 and problem.B <= 128
        if ampere and batch and (cell == "lstm" or (cell.startswith("rnn") and (problem.B < 96 or H < 896))):
            return "PERSIST_STATIC"
    return "STANDARD"
