"""GRU (Cho et al. 2014) with the reset gate after the recurrent product: cuDNN's and torch's form.

With x the input projection W x_t + b_ih and h the recurrent projection R h_{t-1} + b_hh, one of each per gate:

    r  = sigmoid(x_r + h_r)      reset gate: how much of the past the candidate sees
    z  = sigmoid(x_z + h_z)      update gate: how much of the past is kept
    n  = tanh(x_n + r h_n)       candidate
    h' = (1 - z) n + z h_{t-1} = n + z (h_{t-1} - n)

Backwards, with dh' arriving:

    da_n = dh' (1 - z) (1 - n^2)
    da_r = da_n h_n r (1 - r)
    da_z = dh' (h_{t-1} - n) z (1 - z)
    the recurrent projection of the candidate gets r da_n, so its two parts differ
    dh_{t-1} = dh' z, and R^T (da_r, da_z, r da_n), added by the time loop

Derived in docs/derivation.md.
"""

from ..mathematics import recurrent, rms_normalize, sigmoid, tanh

GATES, STATES = "rzn", "h"
VARIANTS = ("before", "norm", "projected")
CANDIDATE = "n"
TOGETHER = ("rz", "n")  # gates that are normalized together


def step(x, h, state):
    r = sigmoid(x[0] + h[0])
    z = sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return (n + z * (state[0] - n),), (r, z, n, h[2])


def grad(dnew, new, state, saved):
    r, z, n, q = saved
    dh = dnew[0]
    dn = dh * (1 - z) * (1 - n * n)
    dr = dn * q * (r * (1 - r))
    dz = dh * (state[0] - n) * (z * (1 - z))
    return (dr, dz, dn), (dr, dz, dn * r), (dh * z,)


def variant(before=False, norm=False, projected=False):
    """Make a variant: one of the first two, and the last

    before    the reset gate before the recurrent product, as Cho et al. had it: n = tanh(x_n + R_n (r h_{t-1}) + b_hn)
    norm      layer normalization (Ba, Kiros & Hinton 2016): each unit's h over the standard deviation of all units',
              for r and z together, times a gain; that of n with its bias, which r multiplies as well. x is normalized
              already, with all other biases in it. The mean of h over the same gates and all units is zero, as it is
              where every column of their rows of R has mean zero.
    projected a state s of its own; h is what it shows of it: s' = (1 - z) n + z s, h' = s'. So h' may
              be projected afterwards, and the recurrent weights see that; as Sak et al. (2014) have it for the LSTM

    -> gates, names of what there is per unit, step, and the states if they are others; its gradient is derived
    """
    if before and (norm or projected):
        raise ValueError("a GRU is normalized or projected with its reset gate after the recurrent product alone")

    def plain(x, h, state, extra=()):
        new, _ = step(x, h, state)
        return new

    def first(x, h, state, extra=()):
        r = sigmoid(x[0] + h[0])
        z = sigmoid(x[1] + h[1])
        n = tanh(x[2] + recurrent(2, r * state[0]))
        return (n + z * (state[0] - n),)

    def normalized(x, h, state, extra):
        of_r, of_z, of_n, bias = extra
        (h_r, h_z), (h_n,) = rms_normalize(*h[:2]), rms_normalize(h[2])
        return plain(x, (of_r * h_r, of_z * h_z, of_n * h_n + bias), state)

    def whole(x, h, state, extra=()):
        (new,) = run(x, h, state[1:], extra)
        return new, new

    units = ("r_gain", "z_gain", "n_gain", "n_bias") if norm else ()
    run = first if before else normalized if norm else plain
    return (GATES, units, whole, "hs") if projected else (GATES, units, run)
