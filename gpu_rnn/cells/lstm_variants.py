"""Variants of the LSTM; notation: `gpu_rnn.cells`. Their gates are in the order i, f, g, o."""

from torch import nn

from gpu_rnn.kernels.mathematics import exp, log_sigmoid, maximum, recurrent, relu, sigmoid, tanh

from .definition import published

FORGET = {"bias_ih.f": 1.0, "bias_hh.f": 0.0}


@published(gates="ifgo", states="hc", units=("i", "f", "o"), initial=FORGET)
def PeepholeLSTM(x, h, state, peepholes):
    """LSTM with peepholes (Gers, Schraudolph & Schmidhuber, Learning Precise Timing with LSTM Recurrent Networks,
    2002).

    i  = sigmoid(x_i + h_i + p_i c),    f = sigmoid(x_f + h_f + p_f c)
    c' = f c + i tanh(x_g + h_g)
    h' = sigmoid(x_o + h_o + p_o c') tanh(c')

    p_i, p_f, p_o: weight_i, weight_f, weight_o [H]. First values: bias_ih of f 1, its bias_hh 0.
    """
    (i, f, g, o), c, (p_i, p_f, p_o) = (a + b for a, b in zip(x, h)), state[1], peepholes
    c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
    return sigmoid(o + p_o * c) * tanh(c), c


@published(gates="ifgoabc", states="hcpq", biases="ifgo", initial=FORGET)
def WMCLSTM(x, h, state):
    """LSTM with working memory connections (Landi et al., Working Memory Connections for LSTM, 2021).

    i  = sigmoid(x_i + h_i + tanh(p)),    f = sigmoid(x_f + h_f + tanh(q))
    c' = f c + i tanh(x_g + h_g)
    h' = sigmoid(x_o + h_o + tanh(R_c(c'))) tanh(c')
    (p', q') = (R_a(c'), R_b(c'))                     which the next time step takes; a c0 comes with its p0, q0

    First values: bias_ih of f 1, its bias_hh 0.
    """
    (i, f, g, o), (_, c, p, q) = (a + b for a, b in zip(x[:4], h)), state
    c = sigmoid(f + tanh(q)) * c + sigmoid(i + tanh(p)) * tanh(g)
    return sigmoid(o + tanh(recurrent(6, c))) * tanh(c), c, recurrent(4, c), recurrent(5, c)


@published(gates="ifgom", states="hc", biases="ifgo", initial={"bias_ih.f": 1.0, "bias_hh.f": 0.0})
def MultiplicativeLSTM(x, h, state):
    """Multiplicative LSTM (Krause et al., Multiplicative LSTM for sequence modelling, 2016).

    m  = (W_m x) (R_m h)
    c' = sigmoid(x_f + R_f(m)) c + sigmoid(x_i + R_i(m)) tanh(x_g + R_g(m))
    h' = sigmoid(x_o + R_o(m)) tanh(c')

    First values: bias_ih of f 1, its bias_hh 0.
    """
    m = x[4] * h[4]
    i, f, g, o = (x[k] + recurrent(k, m) for k in range(4))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@published(gates="ifgopr", states="hc", units=("i", "f", "o"), biases="ifgo",
           initial={**FORGET, "weight_ih.r": nn.init.eye_})  # fmt: skip
def ResidualLSTM(x, h, state, peepholes):
    """Residual LSTM (Kim, El-Khamy & Lee, Residual LSTM: Design of a Deep Recurrent Architecture, 2017).

    i  = sigmoid(x_i + h_i + p_i c),    f = sigmoid(x_f + h_f + p_f c)
    c' = f c + i tanh(x_g + h_g)
    h' = sigmoid(x_o + h_o + p_o c') (R_p(tanh(c')) + W_r x)

    p_i, p_f, p_o: weight_i, weight_f, weight_o [H]. First values: W_r 1; bias_ih of f 1, its bias_hh 0.
    """
    (i, f, g, o), c, (p_i, p_f, p_o) = (a + b for a, b in zip(x[:4], h)), state[1], peepholes
    c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
    return sigmoid(o + p_o * c) * (recurrent(4, tanh(c)) + x[5]), c


@published(gates="abdefghk", states="yc")
def NAS(x, h, state):
    """NAS cell (Zoph & Le, Neural Architecture Search with Reinforcement Learning, 2017; as its authors' TensorFlow
    code).

    p  = tanh(sigmoid(a) relu(b)),    q = tanh(sigmoid(d) + relu(x_e h_e))
    r  = tanh(tanh(f) sigmoid(g)),    s = sigmoid(tanh(h) + sigmoid(k))        a = x_a + h_a, and so on
    c' = tanh(p + c) q
    y' = tanh(c' tanh(r + s))
    """
    a, b, d, _, f, g, i, k = (p + q for p, q in zip(x, h))
    p, q = tanh(sigmoid(a) * relu(b)), tanh(sigmoid(d) + relu(x[3] * h[3]))
    r, s = tanh(tanh(f) * sigmoid(g)), sigmoid(tanh(i) + sigmoid(k))
    c = tanh(p + state[1]) * q
    return tanh(c * tanh(r + s)), c


@published(gates="zifo", states="hcnm")
def SLSTM(x, h, state):
    """sLSTM with one recurrent matrix (Beck et al., xLSTM: Extended Long Short-Term Memory, 2024).

    m' = max(log f + m, a_i),    i = exp(a_i - m'),    f' = exp(log f + m - m')     a_i = x_i + h_i, f = sigmoid(a_f)
    c' = f' c + i tanh(a_z),    n' = f' n + i
    h' = sigmoid(a_o) c' / n'
    """
    z, i, f, o = (a + b for a, b in zip(x, h))
    _, c, n, m = state
    log_f = log_sigmoid(f)
    after = maximum(log_f + m, i)
    i, f = exp(i - after), exp(log_f + m - after)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, after
