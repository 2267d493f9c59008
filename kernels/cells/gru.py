"""GRU (Cho et al. 2014) with the reset gate after the recurrent product: cuDNN's and torch's form.

With x the input part W x_t + b_ih and h the recurrent part R h_{t-1} + b_hh, one of each per gate:

    r  = sigmoid(x_r + h_r)      reset gate: how much of the past the candidate sees
    z  = sigmoid(x_z + h_z)      update gate: how much of the past is kept
    n  = tanh(x_n + r h_n)       candidate
    h' = (1 - z) n + z h_{t-1} = n + z (h_{t-1} - n)

Backwards, with dh' arriving:

    da_n = dh' (1 - z) (1 - n^2)
    da_r = da_n h_n r (1 - r)
    da_z = dh' (h_{t-1} - n) z (1 - z)
    the recurrent part of the candidate gets r da_n, so its two parts differ
    dh_{t-1} = dh' z, and R^T (da_r, da_z, r da_n), which is the driver's part

Derived in docs/derivation.md.
"""

from ..mathematics import sigmoid, tanh

GATES, STATES = "rzn", "h"


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
