"""The function of the package `flashrnn` (1.0.8; Pöppel et al., FlashRNN, 2024), on the backends of this one.

    from gpu_rnn.flashrnn import flashrnn       # instead of: from flashrnn import flashrnn

It has the package's signature, layouts and gate orders. It needs neither nvcc nor a compilation for each batch size,
runs on CPUs too, and computes in the dtype of Wx, as the package's "vanilla" backend does. Letters of layouts are the
package's here: H is the number of heads, D and P the size of one.
"""

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn.kernels.mathematics import exp, log_sigmoid, maximum, sigmoid, tanh, where

from .core.problem import Options, Weights
from .core.validation import ShapeError, shape
from .functional import run
from .nn.custom_cell import cell

INPUT, RECURRENT, BIAS, OUTPUT = "BTGHD", "GHDP", "GHD", "SBTHD"  # layouts where no config says others
OUR_BACKENDS = ("numpy", "native", "triton")  # names that select one; the package's have other meanings
UNSUPPORTED = {"gradient_recurrent_cut": False, "gradient_recurrent_clipval": None, "forward_clipval": None}


@cell(gates="ifzo", states="ycnm", name="flashrnn.sLSTM")
def SLSTM(x: Any, h: Any, state: Any) -> tuple:
    """sLSTM as the package has it: the normalizer n is at least 1, and a state with n = 0 has no stabilizer m.

    m' = max(a_i, log f + m), a_i where n = 0,    i = exp(a_i - m'),    f' = exp(log f + m - m')    f = sigmoid(a_f)
    c' = f' c + i tanh(a_z),    n' = max(f' n + i, 1)
    y' = sigmoid(a_o) c' / n'
    """
    i, f, z, o = (a + b for a, b in zip(x, h))
    _, c, n, m = state
    carried = log_sigmoid(f) + m
    after = where(maximum(n, -n), maximum(i, carried), i)
    i, f = exp(i - after), exp(carried - after)
    c, n = f * c + i * tanh(z), f * n + i
    n = where(n - 1, n, where(1 - n, 1.0, 0.5 * (n + 1)))  # where it is 1 half of the gradient passes, as in torch
    return sigmoid(o) * c / n, c, n, after


class Function(NamedTuple):
    """A recurrent function of the package: its cell, and the gates of Wx, R and b."""

    cell: str
    input: int
    recurrent: int
    bias: int
    states: int


FUNCTIONS = {
    "lstm": Function("lstm", 4, 4, 4, 2),
    "gru": Function("gru", 3, 3, 4, 1),
    "elman": Function("rnn_tanh", 1, 1, 1, 1),
    "slstm": Function(SLSTM.cell_name, 4, 4, 4, 4),
}


def flashrnn(
    Wx: Tensor, R: Tensor, b: Tensor, states: Tensor | None = None, function: str = "lstm", config: Any = None,
    backend: str = "cuda_fused", dtype: str = "bfloat16",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a recurrent function with heads over a whole sequence, whose inputs are projected already.

    Args:
        Wx: [B, T, G, H, D] input projection, of the LSTM and the sLSTM of the gates i, f, z, o, of the GRU r, z, n.
        R: [G, H, D, P] recurrent weights, P = D: R[g, n] takes h of head n to gate g. Of the GRU n, r, z.
        b: [G, H, D] biases. Of the GRU four: that of R's n, then those of r, z, n.
        states: [S, B, 1, H, D] before the first time step: the output y first, then c; of the sLSTM y, c, n, m. None:
            zeros, or a config's `initial_val`.
        function: "lstm", "gru", "elman" or "slstm".
        config: the package's `FlashRNNConfig`, or anything with some of its attributes: `function`, `initial_val`, and
            the layouts `input_shape`, `recurrent_shape`, `bias_shape`, `output_shape`. Others are about its kernels.
        backend: "numpy", "native" or "triton" selects one of ours. The package's names select none.
        dtype: of the package's kernels; ours compute in the dtype of Wx, to which R, b and states are cast.

    Returns:
        states [S, B, T, H, D] after every time step, and the last ones [S, B, 1, H, D]; in `output_shape`.

    Raises:
        ShapeError: shapes that don't fit. ValueError: an unknown function. NotImplementedError: gradients that a config
        cuts or clips, clipped outputs, or constants.
    """
    layouts = {"input": INPUT, "recurrent": RECURRENT, "bias": BIAS, "output": OUTPUT}
    layouts = {name: getattr(config, f"{name}_shape", layout) for name, layout in layouts.items()}
    function = getattr(config, "function", function)
    if function not in FUNCTIONS:
        raise ValueError(f"unknown function {function!r}; there are {', '.join(FUNCTIONS)}")
    changed = [name for name, value in UNSUPPORTED.items() if getattr(config, name, value) != value]
    if changed := changed + ["constants"] * bool(getattr(config, "constants", None)):
        raise NotImplementedError(f"gpu_rnn's kernels don't have the config's {', '.join(changed)}")
    kind = FUNCTIONS[function]
    sizes = {"S": kind.states, "G": kind.input} | dict(zip(layouts["input"], Wx.shape))
    sizes |= {"P": sizes.get("D", 0), "G": kind.input}
    x = ordered("Wx", Wx, layouts["input"], "TBGHD", sizes).flatten(2)
    w_hh = ordered("R", R, layouts["recurrent"], "GHDP", sizes | {"G": kind.recurrent}).to(Wx.dtype)
    bias = ordered("b", b, layouts["bias"], "GHD", sizes | {"G": kind.bias}).to(Wx.dtype).flatten(1)
    first = initial_states(config, states, Wx, layouts["output"], sizes)
    b_ih, b_hh = bias, None
    if function == "gru":
        n, *gates = bias
        b_ih, b_hh = torch.stack(gates), torch.stack([torch.zeros_like(n), torch.zeros_like(n), n])
        w_hh = w_hh.roll(-1, 0)
    weights = Weights(None, w_hh.flatten(0, 2), b_ih.flatten(), None if b_hh is None else b_hh.flatten())
    options = Options(backend=backend if backend in OUR_BACKENDS else None, history=True, heads=sizes["H"])
    y, last, (_, *others) = run(kind.cell, x, weights, first, options)
    heads = sizes["H"], sizes["D"]
    after = torch.stack([y, *others]).unflatten(-1, heads), torch.stack(last).unsqueeze(1).unflatten(-1, heads)
    places = ["STBHD".index(letter) for letter in layouts["output"]]
    return after[0].permute(places), after[1].permute(places)


def initial_states(
    config: Any, states: Tensor | None, Wx: Tensor, layout: str, sizes: dict[str, int]
) -> tuple[Tensor | None, ...]:
    """[B, H*D] for each state; None for zeros."""
    S = sizes["S"]
    if states is not None:
        whole = ordered("states", states, layout, "STBHD", sizes | {"T": 1}).to(Wx.dtype)
        return whole[:, 0].flatten(2).unbind()
    value: Any = getattr(config, "initial_val", 0.0)
    values = [value] * S if isinstance(value, Real) else value
    return tuple(Wx.new_full((sizes["B"], sizes["H"] * sizes["D"]), v) if v else None for v in values)


def ordered(name: str, array: Tensor, layout: str, target: str, sizes: dict[str, int]) -> Tensor:
    """An array in another order of axes, or an error that repeats its shape."""
    expected = [sizes[letter] for letter in layout] if sizes.keys() >= {*layout} else None
    if list(array.shape) != expected:
        raise ShapeError(f"{name} has shape {shape(array)}; expected [{', '.join(layout)}] = {expected}")
    return array.permute([layout.index(letter) for letter in target])
