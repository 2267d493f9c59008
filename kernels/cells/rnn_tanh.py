"""Elman's recurrent network (Elman 1990) with tanh.

With x the input part W x_t + b_ih and h the recurrent part R h_{t-1} + b_hh:

    h' = tanh(x + h)

Backwards, with dh' arriving: da = dh' (1 - h'^2), and dh_{t-1} = R^T da, which is the driver's part.
Derived in docs/derivation.md.
"""

from ..mathematics import tanh

GATES, STATES = "a", "h"


def step(x, h, state):
    return (tanh(x[0] + h[0]),), ()


def grad(dnew, new, state, saved):
    da = dnew[0] * (1 - new[0] * new[0])
    return (da,), (da,), (0.0,)
