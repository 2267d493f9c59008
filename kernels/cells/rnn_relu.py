"""Elman's recurrent network (Elman 1990) with the rectifier (Le, Jaitly & Hinton 2015).

With x the input part W x_t + b_ih and h the recurrent part R h_{t-1} + b_hh:

    h' = max(x + h, 0)

Backwards, with dh' arriving: da = dh' where h' > 0, else 0, and dh_{t-1} = R^T da, which is the driver's part.
Derived in docs/derivation.md.
"""

from ..mathematics import positive, relu

GATES, STATES = "a", "h"


def step(x, h, state):
    return (relu(x[0] + h[0]),), ()


def grad(dnew, new, state, saved):
    da = dnew[0] * positive(new[0])
    return (da,), (da,), (0.0,)
