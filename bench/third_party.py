"""Other people's implementations, each imported only when it runs.

Where one takes the input projection instead of the input, the matmul that makes it is done here and counted; where it
has one bias, it gets the sum of ours, made once.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import problems
from .data import Data, Tensors, function
from .implementations import Run, as_hx, differentiated, implementation
from .problems import Case

ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}  # i o f c and z r h
FLASHRNN_CELLS = {"lstm": "lstm", "rnn_tanh": "elman"}


def package(name: str, imports: str, limits: str, supports: Callable[[Case], bool]) -> Callable[[Any], Any]:
    """Decorate the `prepare` of an implementation that needs these packages, and supports some cases only."""

    def skip_reason(case: Case) -> str | None:
        if not supports(case):
            return limits.format(case.cell)
        absent = [package for package in imports.split() if not find_spec(package)]
        return f"not installed (python -m pip install {' '.join(absent)})" if absent else None

    return implementation(name, skip_reason=skip_reason)


def one_bias(data: Data) -> tuple[Tensors, Tensors]:
    """Weights with one bias, b_ih, and the states; the gradient of b_ih counts for b_hh."""
    weights, state = data.copies()
    weights["b_ih"] += weights.pop("b_hh")
    return weights, state


def both_biases(grads: Tensors) -> Tensors:
    return {**grads, "b_hh": grads["b_ih"]}


def with_grads(run: Run, convert: Callable[[Tensors], Tensors]) -> Run:
    """`run`, its gradients put in our layout."""

    def converted(k: int) -> tuple:
        y, last, *grads = run(k)
        return y, last, *map(convert, grads)

    return converted


@package(
    problems.ONNX, "onnxruntime onnx", "takes part in float32 inference on the CPU",
    lambda case: (case.device, case.dtype) == ("cpu", "float32") and not case.training and case.cell in ONNX_ORDER,
)  # fmt: skip
def onnxruntime(case: Case, data: Data) -> Run:
    """onnxruntime's LSTM, GRU and RNN operators."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def reordered(name: str) -> np.ndarray:
        value = data.weights[name].numpy().reshape(case.gates, case.H, -1)
        return value[list(ONNX_ORDER[case.cell])].reshape(1, case.gates * case.H, -1)

    b = np.concatenate([reordered("b_ih"), reordered("b_hh")], 1)[..., 0]
    constants = {"W": reordered("w_ih"), "R": reordered("w_hh"), "b": b}
    constants |= {name: value.numpy()[None] for name, value in data.state.items()}
    attributes: dict[str, Any] = {"hidden_size": case.H} | ({"linear_before_reset": 1} if case.cell == "gru" else {})
    if nonlinearity := function(case.cell)[1].get("nonlinearity"):
        attributes["activations"] = [nonlinearity.capitalize()]
    last, kind = [name[0] + "T" for name in data.state], case.cell.partition("_")[0].upper()
    node = helper.make_node(kind, ["x", "W", "R", "b", "", *data.state], ["y", *last], **attributes)
    graph = helper.make_graph(
        [node], case.cell,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.T, case.B, case.I])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *last)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors: it warns of every model that it didn't write itself
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = data.x[0].numpy()

    def run(k: int) -> tuple:
        y, *last = session.run(None, {"x": x})
        return y, last

    return run


@package(problems.FLASHRNN, "flashrnn", "has no fused {}", lambda case: case.cell in FLASHRNN_CELLS)
def flashrnn(case: Case, data: Data) -> Run:
    """flashrnn's fused CUDA kernels; its loop on a CPU. Its GRU silently runs on another backend, so it stays out."""
    from flashrnn import flashrnn

    G, B, H, S = case.gates, case.B, case.H, len(data.state)
    weights, state = one_bias(data)
    options = {"function": FLASHRNN_CELLS[case.cell], "dtype": case.dtype}
    options["backend"] = "cuda_fused" if case.device == "cuda" else "vanilla"

    def call(x: torch.Tensor) -> tuple:
        Wx = F.linear(x, weights["w_ih"]).transpose(0, 1).reshape(B, case.T, G, 1, H)
        first = torch.stack(tuple(state.values())).reshape(S, B, 1, 1, H)
        R, b = weights["w_hh"].reshape(G, 1, H, H), weights["b_ih"].reshape(G, 1, H)
        states, last = flashrnn(Wx, R, b, states=first, **options)  # [S, B, T, 1, H], [S, B, 1, 1, H]
        return states[0].reshape(B, case.T, H).transpose(0, 1), tuple(last.reshape(S, B, H))

    return with_grads(differentiated(case, data, call, weights, state), both_biases)


@package(
    problems.HASTE, "haste_pytorch", "takes part in float32 LSTM and GRU on a GPU",
    lambda case: (case.device, case.dtype) == ("cuda", "float32") and case.cell in ("lstm", "gru"),
)  # fmt: skip
def haste(case: Case, data: Data) -> Run:
    """haste_pytorch's LSTM and GRU."""
    import haste_pytorch

    module = getattr(haste_pytorch, case.cell.upper())(case.I, case.H)
    module.from_native_weights(*data.weights.values())
    module.train(case.training)
    state = {name: value[None].clone() for name, value in data.state.items()}
    hx, order = as_hx(state), [0, 2, 1, 3] if case.cell == "lstm" else [1, 0, 2]  # its gates are i g f o, and z r n
    ours = {"kernel": "w_ih", "recurrent_kernel": "w_hh", "bias": "b_ih", "recurrent_bias": "b_hh"}

    def in_our_layout(grads: Tensors) -> Tensors:
        """Its matrices are transposed. A copy of the weights' size, counted."""
        sizes = case.gates, case.H
        moved = {ours[k]: v.T.unflatten(0, sizes)[order].flatten(0, 1) for k, v in grads.items() if k in ours}
        return {"b_hh": moved["b_ih"], **grads, **moved}

    parameters = dict(module.named_parameters())
    return with_grads(differentiated(case, data, lambda x: module(x, hx), parameters, state), in_our_layout)


@package(
    problems.TORCHRL, "torchrl", "takes part in float32 and bfloat16 LSTM and GRU on a GPU",
    lambda case: case.device == "cuda" and case.dtype in ("float32", "bfloat16") and case.cell in ("lstm", "gru"),
)  # fmt: skip
def torchrl(case: Case, data: Data) -> Run:
    """The Triton kernels behind torchrl's LSTMModule and GRUModule, without its tensordicts; batch first."""
    from torchrl.modules.tensordict_module import _rnn_triton

    kernel, (weights, state) = getattr(_rnn_triton, f"{case.cell}_triton"), data.copies()
    resets = torch.zeros(case.B, case.T, dtype=torch.bool, device=case.device)

    def call(x: torch.Tensor) -> tuple:
        per_step = [F.pad(value[:, None], (0, 0, 0, case.T - 1)) for value in state.values()]
        y, *rest = kernel(x.transpose(0, 1).contiguous(), *per_step, *weights.values(), resets, data.dy.dtype)
        return y.transpose(0, 1), tuple(rest[-len(state) :])

    return differentiated(case, data, call, weights, state)


@package(
    problems.XLSTM, "xlstm", "takes part in LSTM, not in float64",
    lambda case: case.cell == "lstm" and case.dtype != "float64",
)  # fmt: skip
def xlstm(case: Case, data: Data) -> Run:
    """xlstm's sLSTM cell with its `lstm` function instead of the exponential gates; its loop on a CPU."""
    from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

    G, B, H, S = case.gates, case.B, case.H, len(data.state)
    config = sLSTMCellConfig(
        hidden_size=H, num_heads=1, num_states=S, backend="cuda" if case.device == "cuda" else "vanilla",
        function="lstm", input_shape="SBGNH", output_shape="SBH", batch_size=B, dtype=case.dtype,
        dtype_b=case.dtype, bias_init="standard", enable_automatic_mixed_precision=False,
    )  # fmt: skip
    cell, (weights, state) = sLSTMCell(config).to(case.device).train(case.training), one_bias(data)
    R = cell._recurrent_kernel_ext2int(weights["w_hh"].reshape(G, H, H).permute(2, 0, 1)[None])
    b = cell._bias_ext2int(weights["b_ih"].reshape(1, G, H))
    weights["w_hh"] = cell._recurrent_kernel_ = torch.nn.Parameter(R.contiguous())
    weights["b_ih"] = cell._bias_ = torch.nn.Parameter(b.contiguous())

    def call(x: torch.Tensor) -> tuple:
        y, last = cell(F.linear(x, weights["w_ih"]), torch.stack(tuple(state.values())))
        return y, tuple(last.reshape(S, B, H))

    def in_our_layout(grads: Tensors) -> Tensors:
        dR = cell._recurrent_kernel_int2ext(grads["w_hh"])[0].permute(1, 2, 0).reshape(G * H, H)
        return both_biases({**grads, "w_hh": dR})

    return with_grads(differentiated(case, data, call, weights, state), in_our_layout)
