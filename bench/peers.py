"""Other people's implementations, behind the interface of contenders.py, each imported only when it takes part.

Where a peer takes the input part instead of the input, the product that makes it is done here and counted; where it
has one bias, it gets the sum of ours, made once.
"""

from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .contenders import Contender, Run, differentiated
from .data import Data
from .problems import Case

LINE = "python -m pip install"


def lacking(package: str, install: str) -> str | None:
    return None if find_spec(package) else f"not installed ({LINE} {install})"


def one_bias(data: Data) -> dict[str, torch.Tensor]:
    """The weights as a peer with a single bias has them; its gradient goes by the name of b_ih and counts for b_hh."""
    weights = {name: value.clone() for name, value in data.weights.items() if name != "b_hh"}
    weights["b_ih"] += data.weights["b_hh"]
    return weights


def both_biases(run: Run) -> Run:
    def renamed(k: int) -> tuple:
        y, last, *gradients = run(k)
        return (y, last, {**gradients[0], "b_hh": gradients[0]["b_ih"]}) if gradients else (y, last)

    return renamed


class OnnxRuntime(Contender):
    """onnxruntime's LSTM, GRU and RNN operators on the CPU; inference only."""

    ORDER: ClassVar = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}  # i o f c and z r h

    def absent(self, case: Case) -> str | None:
        if case.device != "cpu" or case.dtype != "float32" or case.training or case.cell not in self.ORDER:
            return "takes part in float32 inference on the CPU"
        return lacking("onnxruntime", "onnxruntime onnx") or lacking("onnx", "onnx")

    def prepare(self, case: Case, data: Data) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3  # errors: it warns of every model that it didn't write itself
        model = self.model(case, data).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        x = data.x[0].numpy()

        def run(k: int) -> tuple:
            y, *last = session.run(None, {"x": x})
            return y, last

        return run

    def model(self, case: Case, data: Data) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        def reordered(name: str) -> np.ndarray:
            value = data.weights[name].numpy().reshape(case.gates, case.H, -1)
            return value[list(self.ORDER[case.cell])].reshape(case.gates * case.H, -1)

        constants = {
            "W": reordered("w_ih")[None],
            "R": reordered("w_hh")[None],
            "b": np.concatenate([reordered("b_ih"), reordered("b_hh")])[:, 0][None],
            **{name: value.numpy()[None] for name, value in data.state.items()},
        }
        kind, _, nonlinearity = case.cell.partition("_")
        attributes: dict[str, Any] = {"hidden_size": case.H}
        if kind == "gru":
            attributes["linear_before_reset"] = 1
        if nonlinearity:
            attributes["activations"] = [nonlinearity.capitalize()]
        last = [name[0] + "T" for name in data.state]
        node = helper.make_node(kind.upper(), ["x", "W", "R", "b", "", *data.state], ["y", *last], **attributes)
        graph = helper.make_graph(
            [node], case.cell,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.T, case.B, case.I])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", *last)],
            [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class FlashRNN(Contender):
    """flashrnn's fused CUDA kernels; its loop on a CPU. Its GRU silently runs on another backend, so it stays out."""

    FUNCTIONS: ClassVar = {"lstm": "lstm", "rnn_tanh": "elman"}

    def absent(self, case: Case) -> str | None:
        if case.cell not in self.FUNCTIONS:
            return f"has no fused {case.cell}"
        return lacking("flashrnn", "flashrnn")

    def prepare(self, case: Case, data: Data) -> Run:
        from flashrnn import flashrnn

        G, B, H, S = case.gates, case.B, case.H, len(data.state)
        weights = one_bias(data)
        state = {name: value.clone() for name, value in data.state.items()}
        options = {"function": self.FUNCTIONS[case.cell], "dtype": case.dtype}
        options["backend"] = "cuda_fused" if case.device == "cuda" else "vanilla"

        def call(x: torch.Tensor) -> tuple:
            Wx = F.linear(x, weights["w_ih"]).transpose(0, 1).reshape(B, case.T, G, 1, H)
            first = torch.stack(tuple(state.values())).reshape(S, B, 1, 1, H)
            R, b = weights["w_hh"].reshape(G, 1, H, H), weights["b_ih"].reshape(G, 1, H)
            states, last = flashrnn(Wx, R, b, states=first, **options)  # [S, B, T, 1, H], [S, B, 1, 1, H]
            return states[0].reshape(B, case.T, H).transpose(0, 1), tuple(last.reshape(S, B, H))

        return both_biases(differentiated(case, data, call, weights, state))


class Haste(Contender):
    """haste_pytorch's LSTM and GRU."""

    def absent(self, case: Case) -> str | None:
        if case.device != "cuda" or case.dtype != "float32" or case.cell not in ("lstm", "gru"):
            return "takes part in float32 LSTM and GRU on a GPU"
        return lacking("haste_pytorch", "haste_pytorch")

    def prepare(self, case: Case, data: Data) -> Run:
        import haste_pytorch

        module = getattr(haste_pytorch, case.cell.upper())(case.I, case.H)
        module.from_native_weights(*data.weights.values())
        module.train(case.training)
        state = {name: value[None].clone() for name, value in data.state.items()}
        h0 = next(iter(state.values())) if case.cell == "gru" else tuple(state.values())
        parameters = dict(module.named_parameters())
        run = differentiated(case, data, lambda x: module(x, h0), parameters, state)

        def renamed(k: int) -> tuple:
            y, last, *gradients = run(k)
            return (y, last, self.in_our_layout(case, gradients[0])) if gradients else (y, last)

        return renamed

    def in_our_layout(self, case: Case, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Its gates are i g f o, and z r n; its matrices are transposed. A copy of the weights, counted."""
        order = [0, 2, 1, 3] if case.cell == "lstm" else [1, 0, 2]

        def ours(value: torch.Tensor) -> torch.Tensor:
            return value.T.unflatten(0, (case.gates, case.H))[order].flatten(0, 1)

        found = {"w_ih": ours(gradients.pop("kernel")), "w_hh": ours(gradients.pop("recurrent_kernel"))}
        found["b_ih"] = ours(gradients.pop("bias"))
        found["b_hh"] = ours(gradients.pop("recurrent_bias")) if "recurrent_bias" in gradients else found["b_ih"]
        return {**gradients, **found}


class TorchRL(Contender):
    """The Triton kernels behind torchrl's LSTMModule and GRUModule, without its tensordicts; batch first."""

    def absent(self, case: Case) -> str | None:
        if case.device != "cuda" or case.dtype not in ("float32", "bfloat16") or case.cell not in ("lstm", "gru"):
            return "takes part in float32 and bfloat16 LSTM and GRU on a GPU"
        return lacking("torchrl", "torchrl")

    def prepare(self, case: Case, data: Data) -> Run:
        from torchrl.modules.tensordict_module import _rnn_triton

        kernel = getattr(_rnn_triton, f"{case.cell}_triton")
        weights = {name: value.clone() for name, value in data.weights.items()}
        state = {name: value.clone() for name, value in data.state.items()}
        resets = torch.zeros(case.B, case.T, dtype=torch.bool, device=case.device)
        compute = data.dy.dtype

        def call(x: torch.Tensor) -> tuple:
            per_step = [F.pad(value[:, None], (0, 0, 0, case.T - 1)) for value in state.values()]
            answer = kernel(x.transpose(0, 1).contiguous(), *per_step, *weights.values(), resets, compute)
            return answer[0].transpose(0, 1), tuple(answer[-len(state) :])

        return differentiated(case, data, call, weights, state)


class XLSTM(Contender):
    """xlstm's sLSTM cell with its `lstm` function in place of the exponential gates; its loop on a CPU."""

    def absent(self, case: Case) -> str | None:
        if case.cell != "lstm" or case.dtype == "float64":
            return "takes part in LSTM, not in float64"
        return lacking("xlstm", "xlstm")

    def prepare(self, case: Case, data: Data) -> Run:
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        G, B, H, S = case.gates, case.B, case.H, len(data.state)
        config = sLSTMCellConfig(
            hidden_size=H, num_heads=1, num_states=S, backend="cuda" if case.device == "cuda" else "vanilla",
            function="lstm", input_shape="SBGNH", output_shape="SBH", batch_size=B, dtype=case.dtype,
            dtype_b=case.dtype, bias_init="standard", enable_automatic_mixed_precision=False,
        )  # fmt: skip
        cell = sLSTMCell(config).to(case.device).train(case.training)
        given = one_bias(data)
        R = cell._recurrent_kernel_ext2int(given["w_hh"].reshape(G, H, H).permute(2, 0, 1)[None])
        cell._recurrent_kernel_ = torch.nn.Parameter(R.contiguous())
        cell._bias_ = torch.nn.Parameter(cell._bias_ext2int(given["b_ih"].reshape(1, G, H)).contiguous())
        weights = {"w_ih": given["w_ih"], "w_hh": cell._recurrent_kernel_, "b_ih": cell._bias_}
        state = {name: value.clone() for name, value in data.state.items()}

        def call(x: torch.Tensor) -> tuple:
            y, last = cell(F.linear(x, weights["w_ih"]), torch.stack(tuple(state.values())))
            return y, tuple(last.reshape(S, B, H))

        run = both_biases(differentiated(case, data, call, weights, state))
        if not case.training:
            return run

        def renamed(k: int) -> tuple:
            y, last, gradients = run(k)
            dR = cell._recurrent_kernel_int2ext(gradients["w_hh"])[0].permute(1, 2, 0).reshape(G * H, H)
            return y, last, {**gradients, "w_hh": dR}

        return renamed
