"""The judge: recurrent layers and their gradients as plain loops of torch.nn's equations, in long double.

Its 11 bits more than float64, where the processor has them, let it judge float64, too.
"""

import numpy as np
from numpy import exp, tanh


def sigmoid(a):
    return 1 / (1 + exp(-a))


def lstm(x, r, state):
    i, f, o = (sigmoid(x[k] + r[k]) for k in (0, 1, 3))
    g = tanh(x[2] + r[2])
    c = f * state[1] + i * g

    def grad(dh, dc):
        dc = dc + dh * o * (1 - tanh(c) ** 2)
        da = dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g * g), dh * tanh(c) * o * (1 - o)
        return da, da, (0, dc * f)

    return (o * tanh(c), c), grad


def gru(x, r, state):
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])

    def grad(dh):
        dn, dz = dh * (1 - z) * (1 - n * n), dh * (state[0] - n) * z * (1 - z)
        dreset = dn * r[2] * reset * (1 - reset)
        return (dreset, dz, dn), (dreset, dz, dn * reset), (dh * z,)

    return ((1 - z) * n + z * state[0],), grad


def elman(function, derivative):
    def step(x, r, state):
        h = function(x[0] + r[0])

        def grad(dh):
            da = (dh * derivative(h),)
            return da, da, (0,)

        return (h,), grad

    return step


STEPS = {
    "lstm": lstm,
    "gru": gru,
    "rnn_tanh": elman(tanh, lambda h: 1 - h * h),
    "rnn_relu": elman(lambda a: np.maximum(a, 0), lambda h: h > 0),
}


def run(name, x, weights, state, dy, dlast, reverse):
    """One layer in one direction, forward and back.

    Args:
        name: one of STEPS.
        x, weights, state, dy, dlast: NumPy arrays [T, B, I], (w_ih, w_hh, b_ih, b_hh, w_hr) with None for those that
            are absent, (h0 [B, P], c0 [B, H]), and the gradients of y and of the last state.
        reverse: whether the last time step is computed first.

    Returns:
        y, the last state, and the gradients of x, of each weight (None if absent) and of each first state.
    """

    def wide(array):
        return None if array is None else np.asarray(array, np.longdouble)

    x, dy, weights, state, dlast = wide(x), wide(dy), [*map(wide, weights)], [*map(wide, state)], [*map(wide, dlast)]
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    gates = w_ih.shape[0] // (w_hh if w_hr is None else w_hr.T).shape[1 if w_hr is None else 0]
    order = range(len(x))[:: -1 if reverse else 1]

    def projected(value, weight, bias):
        rows = value @ weight.T
        return np.split(rows if bias is None else rows + bias, gates, axis=-1)

    y, steps = np.empty_like(dy), {}
    for t in order:
        h, *others = state
        new, grad = STEPS[name](projected(x[t], w_ih, b_ih), projected(h, w_hh, b_hh), state)
        steps[t] = h, new[0], grad
        state = [new[0] if w_hr is None else new[0] @ w_hr.T, *new[1:]]
        y[t] = state[0]

    dx, dweights = np.empty_like(x), [None if w is None else np.zeros_like(w) for w in weights]
    dstate = dlast
    for t in reversed(order):
        h, hidden, grad = steps[t]
        dh, *dothers = dstate[0] + dy[t], *dstate[1:]
        if w_hr is not None:
            dweights[4] += dh.T @ hidden
            dh = dh @ w_hr
        da, dr, dstate = grad(dh, *dothers)
        da, dr = np.concatenate(da, -1), np.concatenate(dr, -1)
        dx[t] = da @ w_ih
        for k, gradient, operand in ((0, da, x[t]), (1, dr, h)):
            dweights[k] += gradient.T @ operand
            if dweights[k + 2] is not None:
                dweights[k + 2] += gradient.sum(0)
        dstate = [dr @ w_hh + dstate[0], *dstate[1:]]
    return y, state, dx, dweights, dstate
