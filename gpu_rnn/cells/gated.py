"""Cells with two gates or more, and with shared or trainable mixing; notation: `gpu_rnn.cells`."""

import torch
from torch import nn

from gpu_rnn.kernels.mathematics import recurrent, relu, sigmoid, tanh

from .definition import lerp, published


@published(gates="fic", states="h", biases="fi", initial={"bias_ih.f": 1.0, "bias_hh.f": 0.0})
def CFN(x, h, state):
    """Chaos-free network (Laurent & von Brecht, A recurrent neural network without chaos, 2017).

    f  = sigmoid(x_f + h_f),    i = sigmoid(x_i + h_i)
    h' = f tanh(h) + i tanh(W_c x)

    First values: bias_ih of f 1, its bias_hh 0.
    """
    return (sigmoid(x[0] + h[0]) * tanh(state[0]) + sigmoid(x[1] + h[1]) * tanh(x[2]),)


@published(gates="cif", states="hc", biases="if")
def RAN(x, h, state):
    """Recurrent additive network (Lee, Levy & Zettlemoyer, Recurrent Additive Networks, 2017).

    i  = sigmoid(x_i + h_i),    f = sigmoid(x_f + h_f)
    c' = i W_c x + f c
    h' = tanh(c')
    """
    c = sigmoid(x[1] + h[1]) * x[0] + sigmoid(x[2] + h[2]) * state[1]
    return tanh(c), c


@published(gates="zrn", states="h")
def MUT1(x, h, state):
    """Mutation 1 of the GRU (Jozefowicz, Zaremba & Sutskever, An Empirical Exploration of Recurrent Network
    Architectures, 2015).

    z  = sigmoid(x_z),    r = sigmoid(x_r + h_r)
    h' = z tanh(R_n(r h) + tanh(x_n)) + (1 - z) h

    The paper's tanh(x), which takes I = H, is W_n = 1.
    """
    r = sigmoid(x[1] + h[1])
    return (lerp(state[0], tanh(recurrent(2, r * state[0]) + tanh(x[2])), sigmoid(x[0])),)


@published(gates="zrn", states="h")
def MUT2(x, h, state):
    """Mutation 2 of the GRU (Jozefowicz, Zaremba & Sutskever, An Empirical Exploration of Recurrent Network
    Architectures, 2015).

    z  = sigmoid(x_z + h_z),    r = sigmoid(x_r + h_r)
    h' = z tanh(R_n(r h) + x_n) + (1 - z) h

    The paper's r = sigmoid(x + h_r), which takes I = H, is W_r = 1.
    """
    z, r = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    return (lerp(state[0], tanh(recurrent(2, r * state[0]) + x[2]), z),)


@published(gates="acn", states="h", units=("a", "c"))
def BRC(x, h, state, units):
    """Bistable recurrent cell (Vecoven, Ernst & Drion, A bio-inspired bistable recurrent cell, 2021).

    a  = 1 + tanh(x_a + w_a h)           w_a: weight_a [H]
    c  = sigmoid(x_c + w_c h)            w_c: weight_c [H]
    h' = c h + (1 - c) tanh(x_n + a h)
    """
    a, c = 1 + tanh(x[0] + units[0] * state[0]), sigmoid(x[1] + units[1] * state[0])
    return (lerp(tanh(x[2] + a * state[0]), state[0], c),)


@published(gates="acn", states="h")
def NBRC(x, h, state):
    """Recurrently neuromodulated bistable cell (Vecoven, Ernst & Drion, A bio-inspired bistable recurrent cell, 2021).

    a  = 1 + tanh(x_a + h_a),    c = sigmoid(x_c + h_c)
    h' = c h + (1 - c) tanh(x_n + a h)
    """
    a, c = 1 + tanh(x[0] + h[0]), sigmoid(x[1] + h[1])
    return (lerp(tanh(x[2] + a * state[0]), state[0], c),)


@published(gates="n", states="h", scalars={"alpha": -3.0, "beta": 3.0},
           transforms={"alpha": torch.sigmoid, "beta": torch.sigmoid})  # fmt: skip
def FastRNN(x, h, state, mix):
    """FastRNN (Kusupati et al., FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent Network,
    2018).

    h' = sigmoid(alpha) tanh(x_n + h_n) + sigmoid(beta) h

    First values: alpha [1] -3, beta [1] 3.
    """
    alpha, beta = mix
    return (alpha * tanh(x[0] + h[0]) + beta * state[0],)


@published(gates="z", states="h", units=("n",), scalars={"zeta": 1.0, "nu": -4.0},
           transforms={"zeta": torch.sigmoid, "nu": torch.sigmoid})  # fmt: skip
def FastGRNN(x, h, state, extra):
    """FastGRNN (Kusupati et al., FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent
    Network, 2018).

    z  = sigmoid(x_z + h_z)
    n  = tanh(x_z + h_z + b)             b: weight_n [H], bias of n less that of z
    h' = (sigmoid(zeta) (1 - z) + sigmoid(nu)) n + z h

    First values: zeta [1] 1, nu [1] -4.
    """
    bias, zeta, nu = extra
    z = sigmoid(x[0] + h[0])
    return ((zeta * (1 - z) + nu) * tanh(x[0] + h[0] + bias) + z * state[0],)


@published(gates="bap", states="hs", biases="a", constants={"alpha": 0.95})
def SCRN(x, h, state, constants):
    """Structurally constrained recurrent network (Mikolov et al., Learning Longer Memory in Recurrent Neural
    Networks, 2014).

    s' = (1 - alpha) W_b x + alpha s
    h' = sigmoid(x_a + h_a + R_p(s'))

    Constant: alpha = 0.95.
    """
    s = lerp(x[0], state[1], constants[0])
    return sigmoid(x[1] + h[1] + recurrent(2, s)), s


@published(gates="chygp", states="yh", biases="chyg", initial={"weight_ih.p": nn.init.eye_})
def IntersectionRNN(x, h, state):
    """Intersection RNN, +RNN (Collins et al., Capacity and Trainability in Recurrent Neural Networks, 2017).

    g_y = sigmoid(x_y + R_y(h)),    g_h = sigmoid(x_g + R_g(h))
    y'  = g_y W_p x + (1 - g_y) relu(x_c + R_c(h))
    h'  = g_h h + (1 - g_h) tanh(x_h + R_h(h))

    First values: W_p, the block p of weight_ih, is 1, which stands for the paper's x, where I = H. Output: y.
    """
    c, n, y, g = (x[k] + recurrent(k, state[1]) for k in range(4))
    return lerp(relu(c), x[4], sigmoid(y)), lerp(tanh(n), state[1], sigmoid(g))
