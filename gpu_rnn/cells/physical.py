"""Cells from dynamical systems, and cells without recurrent matrices; notation: `gpu_rnn.cells`."""

from torch import Tensor, nn

from gpu_rnn.kernels.mathematics import recurrent, relu, sigmoid, tanh

from .definition import lerp, published


def antisymmetric(weight: Tensor) -> Tensor:
    return weight - weight.mT


@published(gates="n", states="h", constants={"epsilon": 0.1, "gamma": 0.01}, transforms={"weight_hh": antisymmetric})
def AntisymmetricRNN(x, h, state, constants):
    """AntisymmetricRNN (Chang et al., AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks, 2019).

    h' = h + epsilon tanh(x_n + h_n - gamma h)        h_n = (R - R^T) h + b

    Constants: epsilon = 0.1, gamma = 0.01.
    """
    epsilon, gamma = constants
    return (state[0] + epsilon * tanh(x[0] + h[0] - gamma * state[0]),)


@published(gates="nz", states="h", constants={"epsilon": 0.1, "gamma": 0.01}, biases="nz",
           transforms={"weight_hh": antisymmetric})  # fmt: skip
def GatedAntisymmetricRNN(x, h, state, constants):
    """Gated AntisymmetricRNN (Chang et al., AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks,
    2019).

    q  = h_n - gamma h                                h_n = (R - R^T) h + b
    h' = h + epsilon sigmoid(x_z + q) tanh(x_n + q)

    Constants: epsilon = 0.1, gamma = 0.01.
    """
    epsilon, gamma = constants
    q = h[0] - gamma * state[0]
    return (state[0] + epsilon * sigmoid(x[1] + q) * tanh(x[0] + q),)


@published(gates="nw", states="yz", biases="n", constants={"dt": 0.05, "gamma": 1.0, "epsilon": 1.0})
def CoRNN(x, h, state, constants):
    """Coupled oscillatory RNN, coRNN (Rusch & Mishra, Coupled Oscillatory Recurrent Neural Network, 2021).

    z' = z + dt (tanh(x_n + h_n + R_w(z)) - gamma y - epsilon z)
    y' = y + dt z'

    Constants: dt = 0.05, gamma = 1, epsilon = 1. Output, and h: y.
    """
    dt, gamma, epsilon = constants
    y, z = state
    z = z + dt * (tanh(x[0] + h[0] + recurrent(1, z)) - gamma * y - epsilon * z)
    return y + dt * z, z


@published(gates="tuzy", states="yz", constants={"dt": 1.0})
def LEM(x, h, state, constants):
    """Long expressive memory (Rusch et al., Long Expressive Memory for Sequence Modeling, 2022).

    s  = dt sigmoid(x_t + h_t),    r = dt sigmoid(x_u + h_u)
    z' = (1 - s) z + s tanh(x_z + h_z)
    y' = (1 - r) y + r tanh(x_y + R_y(z'))

    Constant: dt = 1. Output, and h: y.
    """
    (dt,) = constants
    z = lerp(state[1], tanh(x[2] + h[2]), dt * sigmoid(x[0] + h[0]))
    return lerp(state[0], tanh(x[3] + recurrent(3, z)), dt * sigmoid(x[1] + h[1])), z


@published(gates="n", states="yz", units=("w", "c"), constants={"dt": 0.05, "alpha": 1.0},
           initial={"weight_w": nn.init.uniform_, "weight_c": lambda c: c.uniform_(-0.1, 0.1)})  # fmt: skip
def UnICORNN(x, h, state, extra):
    """Undamped independent controlled oscillatory RNN (Rusch & Mishra, UnICORNN: A recurrent model for learning
    very long time dependencies, 2021).

    z' = z - dt sigmoid(c) (tanh(w y + x_n) + alpha y)
    y' = y + dt sigmoid(c) z'

    w: weight_w [H] and c: weight_c [H]. First values: U(0, 1) and U(-0.1, 0.1). Constants: dt = 0.05, alpha = 1.
    """
    w, c, dt, alpha = extra
    dt, (y, z) = dt * sigmoid(c), state
    z = z - dt * (tanh(w * y + x[0]) + alpha * y)
    return y + dt * z, z


@published(gates="n", states="h", units=("u",), initial={"weight_u": nn.init.uniform_})
def IndRNN(x, h, state, units):
    """Independently recurrent network (Li et al., Independently Recurrent Neural Network (IndRNN), 2018).

    h' = relu(x_n + u h)                 u: weight_u [H]

    First values: u U(0, 1).
    """
    return (relu(x[0] + units[0] * state[0]),)


@published(gates="zf", states="h", biases="f")
def TRNN(x, h, state):
    """Strongly-typed RNN (Balduzzi & Ghifary, Strongly-Typed Recurrent Neural Networks, 2016).

    h' = f h + (1 - f) W_z x,    f = sigmoid(x_f)
    """
    return (lerp(x[0], state[0], sigmoid(x[1])),)


@published(gates="zfoabc", states="hpqr", biases="zfo")
def TGRU(x, h, state):
    """Strongly-typed GRU (Balduzzi & Ghifary, Strongly-Typed Recurrent Neural Networks, 2016).

    z  = x_z + p,    f = sigmoid(x_f + q),    o = tanh(x_o + r)
    h' = f h + z o
    (p', q', r') = (W_a x, W_b x, W_c x)              which are the paper's V x_{t-1} in the next time step
    """
    _, p, q, r = state
    return (sigmoid(x[1] + q) * state[0] + (x[0] + p) * tanh(x[2] + r), *x[3:])


@published(gates="zfoabc", states="hcpqr", biases="zfo")
def TLSTM(x, h, state):
    """Strongly-typed LSTM (Balduzzi & Ghifary, Strongly-Typed Recurrent Neural Networks, 2016).

    z  = x_z + p,    f = sigmoid(x_f + q),    o = tanh(x_o + r)
    c' = f c + (1 - f) z
    h' = c' o
    (p', q', r') = (W_a x, W_b x, W_c x)              which are the paper's V x_{t-1} in the next time step
    """
    _, c, p, q, r = state
    c = lerp(x[0] + p, c, sigmoid(x[1] + q))
    return (c * tanh(x[2] + r), c, *x[3:])
