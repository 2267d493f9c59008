"""Cells with one gate, or two that share weights; notation: `gpu_rnn.cells`."""

from gpu_rnn.kernels.mathematics import recurrent, relu, sigmoid, tanh

from .definition import lerp, published


@published(gates="fn", states="h")
def MGU(x, h, state):
    """Minimal gated unit (Zhou et al., Minimal Gated Unit for Recurrent Neural Networks, 2016).

    f  = sigmoid(x_f + h_f)
    n  = tanh(x_n + R_n(f h))
    h' = (1 - f) h + f n
    """
    f = sigmoid(x[0] + h[0])
    return (lerp(state[0], tanh(x[1] + recurrent(1, f * state[0])), f),)


@published(gates="fn", states="h")
def MGU1(x, h, state):
    """Minimal gated unit, variant 1: its gate doesn't see x (Heck & Salem, Simplified Minimal Gated Unit
    Variations, 2017).

    f  = sigmoid(h_f)
    n  = tanh(x_n + R_n(f h))
    h' = (1 - f) h + f n
    """
    f = sigmoid(h[0])
    return (lerp(state[0], tanh(x[1] + recurrent(1, f * state[0])), f),)


@published(gates="fn", states="h", biases="n")
def MGU2(x, h, state):
    """Minimal gated unit, variant 2: its gate has no bias either (Heck & Salem, Simplified Minimal Gated Unit
    Variations, 2017).

    f  = sigmoid(R_f h)
    n  = tanh(x_n + R_n(f h))
    h' = (1 - f) h + f n
    """
    f = sigmoid(h[0])
    return (lerp(state[0], tanh(x[1] + recurrent(1, f * state[0])), f),)


@published(gates="n", states="h", units=("f",))
def MGU3(x, h, state, units):
    """Minimal gated unit, variant 3: its gate is a bias alone (Heck & Salem, Simplified Minimal Gated Unit
    Variations, 2017).

    f  = sigmoid(b_f)                    b_f: weight_f [H]
    n  = tanh(x_n + R_n(f h))
    h' = (1 - f) h + f n
    """
    f = sigmoid(units[0])
    return (lerp(state[0], tanh(x[0] + recurrent(0, f * state[0])), f),)


@published(gates="fn", states="h", initial={"bias_ih.f": 1.0, "bias_hh.f": 0.0})
def JANET(x, h, state):
    """LSTM with just a forget gate (van der Westhuizen & Lasenby, The Unreasonable Effectiveness of the Forget
    Gate, 2018).

    s  = x_f + h_f
    n  = tanh(x_n + h_n)
    h' = sigmoid(s) h + (1 - sigmoid(s - 1)) n

    First values: bias_ih of f 1, its bias_hh 0.
    """
    s = x[0] + h[0]
    return (sigmoid(s) * state[0] + (1 - sigmoid(s - 1)) * tanh(x[1] + h[1]),)


@published(gates="zn", states="h")
def LiGRU(x, h, state):
    """Light gated recurrent unit (Ravanelli et al., Light Gated Recurrent Units for Speech Recognition, 2018).

    z  = sigmoid(x_z + h_z)
    n  = relu(x_n + h_n)
    h' = z h + (1 - z) n

    The paper's batch normalization of x_z and x_n is left to the input.
    """
    return (lerp(relu(x[1] + h[1]), state[0], sigmoid(x[0] + h[0])),)


@published(gates="fn", states="h")
def LightRU(x, h, state):
    """Light recurrent unit (Ye et al., Light Recurrent Unit: Towards an Interpretable Recurrent Neural Network, 2024).

    f  = sigmoid(x_f + h_f)
    h' = (1 - f) h + f tanh(x_n)
    """
    return (lerp(state[0], tanh(x[1]), sigmoid(x[0] + h[0])),)


@published(gates="zum", states="h", biases="zu")
def MinimalRNN(x, h, state):
    """MinimalRNN (Chen, MinimalRNN: Toward More Interpretable and Trainable Recurrent Neural Networks, 2017).

    z  = tanh(x_z)
    u  = sigmoid(h_u + R_m(z))
    h' = u h + (1 - u) z
    """
    z = tanh(x[0])
    return (lerp(z, state[0], sigmoid(h[1] + recurrent(2, z))),)


@published(gates="cg", states="h", initial={"bias_ih.g": 1.0, "bias_hh.g": 0.0})
def UGRNN(x, h, state):
    """Update gate RNN (Collins et al., Capacity and Trainability in Recurrent Neural Networks, 2017).

    g  = sigmoid(x_g + h_g)
    h' = g h + (1 - g) tanh(x_c + h_c)

    First values: bias_ih of g 1, its bias_hh 0.
    """
    return (lerp(tanh(x[0] + h[0]), state[0], sigmoid(x[1] + h[1])),)


@published(gates="zk", states="h")
def STAR(x, h, state):
    """Stackable recurrent cell (Turkoglu et al., Gating Revisited: Deep Multi-layer RNNs That Can Be Trained, 2019).

    k  = sigmoid(x_k + h_k)
    h' = tanh((1 - k) h + k tanh(x_z))
    """
    return (tanh(lerp(state[0], tanh(x[0]), sigmoid(x[1] + h[1]))),)


@published(gates="f", states="h")
def SGRN(x, h, state):
    """Simple gated recurrent network (A simple gated recurrent network for detection of power quality disturbances,
    doi 10.1049/gtd2.12056, 2021).

    f  = sigmoid(x_f + h_f)
    h' = tanh((1 - f) x_f + f h)
    """
    return (tanh(lerp(x[0], state[0], sigmoid(x[0] + h[0]))),)


@published(gates="p", states="h")
def ATR(x, h, state):
    """Addition-subtraction twin-gated recurrent network (Zhang et al., Simplifying Neural Machine Translation with
    ATR, 2018).

    i  = sigmoid(x_p + h_p)
    f  = sigmoid(x_p - h_p)
    h' = i x_p + f h
    """
    return (sigmoid(x[0] + h[0]) * x[0] + sigmoid(x[0] - h[0]) * state[0],)


@published(gates="igo", states="hc")
def CIFG(x, h, state):
    """LSTM with coupled input and forget gates (Greff et al., LSTM: A Search Space Odyssey, 2017).

    i  = sigmoid(x_i + h_i),    o = sigmoid(x_o + h_o)
    c' = (1 - i) c + i tanh(x_g + h_g)
    h' = o tanh(c')
    """
    c = lerp(state[1], tanh(x[1] + h[1]), sigmoid(x[0] + h[0]))
    return sigmoid(x[2] + h[2]) * tanh(c), c
