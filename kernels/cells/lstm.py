"""LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; torch's and cuDNN's form).

With x the input projection W x_t + b_ih and h the recurrent projection R h_{t-1} + b_hh, one of each per gate:

    i  = sigmoid(x_i + h_i)      input gate: how much of the candidate is written
    f  = sigmoid(x_f + h_f)      forget gate: how much of the cell state is kept
    g  = tanh(x_g + h_g)         candidate
    o  = sigmoid(x_o + h_o)      output gate: how much of the cell state is shown
    c' = f c + i g               state update
    h' = o tanh(c')              output

Backwards, with dh' and dc' arriving:

    dc = dc' + dh' o (1 - tanh(c')^2)
    da_i = dc g i (1 - i)     da_f = dc c f (1 - f)     da_g = dc i (1 - g^2)     da_o = dh' tanh(c') o (1 - o)
    dc_{t-1} = dc f           dh_{t-1} = R^T da, added by the time loop

Derived in docs/derivation.md.
"""

from ..mathematics import center, maximum, minimum, rms_normalize, sigmoid, tanh

GATES, STATES = "ifgo", "hc"
VARIANTS = ("peephole", "coupled", "clip", "norm")
CANDIDATE = "g"
TOGETHER = (GATES,)  # gates that are normalized together


def step(x, h, state):
    i = sigmoid(x[0] + h[0])
    f = sigmoid(x[1] + h[1])
    g = tanh(x[2] + h[2])
    o = sigmoid(x[3] + h[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def grad(dnew, new, state, saved):
    i, f, g, o = saved
    t = tanh(new[1])
    dc = dnew[1] + dnew[0] * o * (1 - t * t)
    da = (
        dc * g * (i * (1 - i)),
        dc * state[1] * (f * (1 - f)),
        dc * i * (1 - g * g),
        dnew[0] * t * (o * (1 - o)),
    )
    return da, da, (0.0, dc * f)


def variant(peephole=False, coupled=False, clip=(), norm=False):
    """Make a variant, with any of

    peephole  gates that see the cell state (Gers & Schmidhuber 2000), by weights p of which every unit has its own:
              i = sigmoid(x_i + h_i + p_i c), f = sigmoid(x_f + h_f + p_f c), o = sigmoid(x_o + h_o + p_o c')
    coupled   one gate for two (CIFG; Greff et al. 2017): f = 1 - i, and neither weights nor p for f
    clip      a bound for the cell state, before anything sees it (Sak et al. 2014): c' = min(max(c', -clip), clip)
    norm      layer normalization (Ba, Kiros & Hinton 2016): each unit's h over the standard deviation of all gates' and
              units', times a gain; and h' = o tanh(LN(c')). x is normalized already, with all biases in it. The mean of
              h over all gates and units is zero, as it is where every column of R has mean zero.

    -> gates, names of what there is per unit, step; its gradient is derived
    """
    gates = "igo" if coupled else "ifgo"
    units = tuple(gate for gate in gates if gate != "g") if peephole else ()
    units += (*(f"{gate}_gain" for gate in gates), "c_gain", "c_bias") if norm else ()

    def step(x, h, state, extra=()):
        p = dict(zip(units, extra))
        if norm:
            h = [p[f"{gate}_gain"] * value for gate, value in zip(gates, rms_normalize(*h))]
        a = {gate: x[k] + h[k] for k, gate in enumerate(gates)}

        def gate(name, c):
            return sigmoid(a[name] + p[name] * c if peephole else a[name])

        i = gate("i", state[1])
        f = 1 - i if coupled else gate("f", state[1])
        c = f * state[1] + i * tanh(a["g"])
        for bound in clip:
            c = minimum(maximum(c, -bound), bound)
        shown = c
        if norm:
            (shown,) = rms_normalize(center(c))
            shown = p["c_gain"] * shown + p["c_bias"]
        return gate("o", c) * tanh(shown), c

    return gates, units, step
