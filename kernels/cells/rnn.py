"""Elman's recurrent network (Elman 1990) with tanh, or with the rectifier (Le, Jaitly & Hinton 2015).

With x the input projection W x_t + b_ih and h the recurrent projection R h_{t-1} + b_hh:

    rnn_tanh    h' = tanh(x + h)
    rnn_relu    h' = max(x + h, 0)

Backwards, with dh' arriving:

    rnn_tanh    da = dh' (1 - h'^2)
    rnn_relu    da = dh' where h' > 0, else 0
    dh_{t-1} = R^T da, which is done by the time loop

Derived in docs/derivation.md.
"""

from ..mathematics import positive, relu, tanh, where

GATES, STATES = "a", "h"


def step_tanh(x, h, state):
    return (tanh(x[0] + h[0]),), ()


def grad_tanh(dnew, new, state, saved):
    da = dnew[0] * (1 - new[0] * new[0])
    return (da,), (da,), (0.0,)


def step_relu(x, h, state):
    return (relu(x[0] + h[0]),), ()


def grad_relu(dnew, new, state, saved):
    da = where(positive(new[0]), dnew[0], 0.0)
    return (da,), (da,), (0.0,)


CELLS = {"rnn_tanh": (step_tanh, grad_tanh), "rnn_relu": (step_relu, grad_relu)}
