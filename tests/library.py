"""The cells of `gpu_rnn.cells` as their papers have them, in plain torch, and their parameters as torchrecurrent's."""

import torch
from torch import relu, sigmoid, tanh
from torch.nn.functional import logsigmoid

from gpu_rnn import cells
from gpu_rnn.kernels import cells as definitions

from .reference_modifiers import drawn


def mgu(f, old, x, R):
    return ((1 - f) * old + f * tanh(x + R(f * old)),)


def published(name, x, h, state, recurrent=None, *, units=()):
    """The states after a time step. x, h, state, units: a tensor per gate, state and name; recurrent(k, value): of row
    block k. Where x or h of a gate is not read here, the cell has no weights for it."""
    old, step = state[0], EQUATIONS[name.removeprefix("cells.")]
    return step(x, h, old, state, recurrent, units)


def janet(x, h, old, state, R, u):
    s = x[0] + h[0]
    return (sigmoid(s) * old + (1 - sigmoid(s - 1)) * tanh(x[1] + h[1]),)


def minimal_rnn(x, h, old, state, R, u):
    z = tanh(x[0])
    gate = sigmoid(h[1] + R(2, z))
    return (gate * old + (1 - gate) * z,)


def cifg(x, h, old, state, R, u):
    i, g, o = (a + b for a, b in zip(x, h))
    c = (1 - sigmoid(i)) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def ran(x, h, old, state, R, u):
    c = sigmoid(x[1] + h[1]) * x[0] + sigmoid(x[2] + h[2]) * state[1]
    return tanh(c), c


def mut1(x, h, old, state, R, u):
    z, r = sigmoid(x[0]), sigmoid(x[1] + h[1])
    return (tanh(R(2, r * old) + tanh(x[2])) * z + old * (1 - z),)


def mut2(x, h, old, state, R, u):
    z, r = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
    return (tanh(R(2, r * old) + x[2]) * z + old * (1 - z),)


def bistable(a, c, n, old):
    a, c = 1 + tanh(a), sigmoid(c)
    return (c * old + (1 - c) * tanh(n + a * old),)


def fast_grnn(x, h, old, state, R, u):
    bias, zeta, nu = u
    a = x[0] + h[0]
    return ((zeta * (1 - sigmoid(a)) + nu) * tanh(a + bias) + sigmoid(a) * old,)


def scrn(x, h, old, state, R, u):
    s = (1 - u[0]) * x[0] + u[0] * state[1]
    return sigmoid(R(2, s) + x[1] + h[1]), s


def intersection(x, h, old, state, R, u):
    deep, recurrent, g_y, g_h = (x[k] + R(k, state[1]) for k in range(4))
    g_y, g_h = sigmoid(g_y), sigmoid(g_h)
    return g_y * x[4] + (1 - g_y) * relu(deep), g_h * state[1] + (1 - g_h) * tanh(recurrent)


def gated_antisymmetric(x, h, old, state, R, u):
    q = h[0] - u[1] * old
    return (old + u[0] * sigmoid(q + x[1]) * tanh(q + x[0]),)


def cornn(x, h, old, state, R, u):
    dt, gamma, epsilon = u
    y, z = state
    z = z + dt * tanh(h[0] + R(1, z) + x[0]) - dt * gamma * y - dt * epsilon * z
    return y + dt * z, z


def lem(x, h, old, state, R, u):
    y, z = state
    first, second = u[0] * sigmoid(h[0] + x[0]), u[0] * sigmoid(h[1] + x[1])
    z = (1 - first) * z + first * tanh(h[2] + x[2])
    return (1 - second) * y + second * tanh(R(3, z) + x[3]), z


def unicornn(x, h, old, state, R, u):
    w, c, dt, alpha = u
    y, z = state
    z = z - dt * sigmoid(c) * (tanh(w * y + x[0]) + alpha * y)
    return y + dt * sigmoid(c) * z, z


def tgru(x, h, old, state, R, u):
    z, f, o = (a + b for a, b in zip(x[:3], state[1:]))
    return sigmoid(f) * old + z * tanh(o), *x[3:]


def tlstm(x, h, old, state, R, u):
    z, f, o = (a + b for a, b in zip(x[:3], state[2:]))
    c = sigmoid(f) * state[1] + (1 - sigmoid(f)) * z
    return c * tanh(o), c, *x[3:]


def peephole_lstm(x, h, old, state, R, u, shown=lambda c: tanh(c)):
    i, f, g, o = (a + b for a, b in zip(x[:4], h))
    c = sigmoid(f + u[1] * state[1]) * state[1] + sigmoid(i + u[0] * state[1]) * tanh(g)
    return sigmoid(o + u[2] * c) * shown(c), c


def wmc_lstm(x, h, old, state, R, u):
    """The products of the cell state are the last two states."""
    i, f, g, o = (a + b for a, b in zip(x[:4], h))
    c = sigmoid(f + tanh(state[3])) * state[1] + sigmoid(i + tanh(state[2])) * tanh(g)
    return sigmoid(o + tanh(R(6, c))) * tanh(c), c, R(4, c), R(5, c)


def multiplicative_lstm(x, h, old, state, R, u):
    m = x[4] * h[4]
    c = sigmoid(x[1] + R(1, m)) * state[1] + sigmoid(x[0] + R(0, m)) * tanh(x[2] + R(2, m))
    return sigmoid(x[3] + R(3, m)) * tanh(c), c


def nas(x, h, old, state, R, u):
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    h0, h1, h2, h3, h4, h5, h6, h7 = h
    l0, l1, l2, l3 = sigmoid(x0 + h0), relu(x1 + h1), sigmoid(x2 + h2), relu(x3 * h3)
    l4, l5, l6, l7 = tanh(x4 + h4), sigmoid(x5 + h5), tanh(x6 + h6), sigmoid(x7 + h7)
    c = tanh(tanh(l0 * l1) + state[1]) * tanh(l2 + l3)
    return tanh(c * tanh(tanh(l4 * l5) + sigmoid(l6 + l7))), c


def slstm(x, h, old, state, R, u):
    z, i, f, o = (a + b for a, b in zip(x, h))
    _, c, n, m = state
    after = torch.maximum(logsigmoid(f) + m, i)
    i, f = torch.exp(i - after), torch.exp(logsigmoid(f) + m - after)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, after


EQUATIONS = {
    "MGU": lambda x, h, old, state, R, u: mgu(sigmoid(x[0] + h[0]), old, x[1], lambda v: R(1, v)),
    "MGU1": lambda x, h, old, state, R, u: mgu(sigmoid(h[0]), old, x[1], lambda v: R(1, v)),
    "MGU2": lambda x, h, old, state, R, u: mgu(sigmoid(h[0]), old, x[1], lambda v: R(1, v)),
    "MGU3": lambda x, h, old, state, R, u: mgu(sigmoid(u[0]), old, x[0], lambda v: R(0, v)),
    "JANET": janet,
    "LiGRU": lambda x, h, old, state, R, u: (
        sigmoid(x[0] + h[0]) * old + (1 - sigmoid(x[0] + h[0])) * relu(x[1] + h[1]),
    ),
    "LightRU": lambda x, h, old, state, R, u: (
        (1 - sigmoid(x[0] + h[0])) * old + sigmoid(x[0] + h[0]) * tanh(x[1]),
    ),
    "MinimalRNN": minimal_rnn,
    "UGRNN": lambda x, h, old, state, R, u: (
        sigmoid(x[1] + h[1]) * old + (1 - sigmoid(x[1] + h[1])) * tanh(x[0] + h[0]),
    ),
    "STAR": lambda x, h, old, state, R, u: (
        tanh((1 - sigmoid(x[1] + h[1])) * old + sigmoid(x[1] + h[1]) * tanh(x[0])),
    ),
    "SGRN": lambda x, h, old, state, R, u: (
        tanh((1 - sigmoid(x[0] + h[0])) * x[0] + sigmoid(x[0] + h[0]) * old),
    ),
    "ATR": lambda x, h, old, state, R, u: (sigmoid(x[0] + h[0]) * x[0] + sigmoid(x[0] - h[0]) * old,),
    "CIFG": cifg,
    "CFN": lambda x, h, old, state, R, u: (sigmoid(x[0] + h[0]) * tanh(old) + sigmoid(x[1] + h[1]) * tanh(x[2]),),
    "RAN": ran,
    "MUT1": mut1,
    "MUT2": mut2,
    "BRC": lambda x, h, old, state, R, u: bistable(x[0] + u[0] * old, x[1] + u[1] * old, x[2], old),
    "NBRC": lambda x, h, old, state, R, u: bistable(x[0] + h[0], x[1] + h[1], x[2], old),
    "FastRNN": lambda x, h, old, state, R, u: (u[0] * tanh(x[0] + h[0]) + u[1] * old,),
    "FastGRNN": fast_grnn,
    "SCRN": scrn,
    "IntersectionRNN": intersection,
    "AntisymmetricRNN": lambda x, h, old, state, R, u: (old + u[0] * tanh(x[0] + h[0] - u[1] * old),),
    "GatedAntisymmetricRNN": gated_antisymmetric,
    "CoRNN": cornn,
    "LEM": lem,
    "UnICORNN": unicornn,
    "IndRNN": lambda x, h, old, state, R, u: (relu(x[0] + u[0] * old),),
    "TRNN": lambda x, h, old, state, R, u: (sigmoid(x[1]) * old + (1 - sigmoid(x[1])) * x[0],),
    "TGRU": tgru,
    "TLSTM": tlstm,
    "PeepholeLSTM": peephole_lstm,
    "WMCLSTM": wmc_lstm,
    "MultiplicativeLSTM": multiplicative_lstm,
    "ResidualLSTM": lambda x, h, old, state, R, u: peephole_lstm(
        x, h, old, state, R, u, lambda c: R(4, tanh(c)) + x[5]
    ),
    "NAS": nas,
    "SLSTM": slstm,
}  # fmt: skip


def case(name, options, dtype, T, B, I, H, **more):
    """A case with modifiers; the sLSTM's normalizer is positive, as it is, and constants have their values."""
    layout = getattr(cells, name).layout
    made = drawn(getattr(cells, name).cell_name, options, dtype, T, B, I, H, **more)
    letters = made.plain.states
    for k, value in enumerate(layout.constants.values(), len(layout.units) + len(layout.scalars)):
        made.case.weights.units[k] = value
    state = [s.abs() + 0.5 if letter == "n" else s for letter, s in zip(letters, made.case.state)]
    return made._replace(case=made.case._replace(state=tuple(state)))


# Gates that see x or h alone and per-unit weights; a second product and constants; many states; many gates.
REPRESENTATIVE = ("BRC", "CoRNN", "TLSTM", "NAS")
TRANSFORMS = {
    "AntisymmetricRNN": {"weight_hh": lambda w: w - w.T}, "GatedAntisymmetricRNN": {"weight_hh": lambda w: w - w.T},
    "FastRNN": {"alpha": sigmoid, "beta": sigmoid}, "FastGRNN": {"zeta": sigmoid, "nu": sigmoid},
}  # fmt: skip


def loop(layer, x, state, suffix="_l0"):
    """y and the last states of one layer, by the papers and from its parameters; x [T, B, I], state: tensors [B, H]."""
    name, layout, gates = type(layer).__name__, layer.layout, definitions.get(layer.cell_name).gates

    def value(parameter):
        return TRANSFORMS.get(name, {}).get(parameter, lambda w: w)(getattr(layer, parameter + suffix))

    def blocks(parameter):
        there = layout.rows[parameter] if layer.bias or "bias" not in parameter else ""
        return dict(zip(there, value(parameter).split(layer.hidden_size))) if there else {}

    W, R, b, r = map(blocks, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    units = [value(f"weight_{unit}") for unit in layout.units] + [value(scalar) for scalar in layout.scalars]
    units += [getattr(layer, constant) for constant in layout.constants]

    def recurrent(k, v):
        return v @ R[gates[k]].T + r.get(gates[k], 0)

    outputs = []
    for row in x:
        a = [row @ W[gate].T + b.get(gate, 0) if gate in W else None for gate in gates]
        h = [recurrent(k, state[0]) if gate in R else None for k, gate in enumerate(gates)]
        state = published(name, a, h, state, recurrent, units=units)
        outputs.append(state[0])
    return torch.stack(outputs), state


def theirs(ih, hh="", kind=None, biases=None, **more):
    """torchrecurrent's layer: the gates in the order of its blocks; other parameters as ours, "name.gate" or "name"."""
    b_ih, b_hh = biases or (ih, hh)
    four = {"weight_ih": ih, "weight_hh": hh, "bias_ih": b_ih, "bias_hh": b_hh}
    return kind, {name: [f"{name}.{gate}" for gate in gates] for name, gates in four.items() if gates} | more


# Those that follow the paper. Others don't: SCRN's output goes through another matrix and a tanh, LEM's y sees z in
# place of z', and the NAS cell adds x_e and h_e that its authors' code multiplies. MGU1 to 3, CIFG and SLSTM it hasn't.
THEIRS = {
    "MGU": theirs("fn", "fn"), "JANET": theirs("fn", "fn"), "LiGRU": theirs("zn", "zn"), "LightRU": theirs("nf", "f"),
    "MinimalRNN": theirs("z", "u", weight_mm=["weight_hh.m"]), "UGRNN": theirs("cg", "cg"), "STAR": theirs("zk", "k"),
    "SGRN": theirs("f", "f"), "ATR": theirs("p", "p"), "CFN": theirs("fic", "fi"),
    "RAN": theirs("cif", "if", biases=("if", "if")), "MUT1": theirs("zrn", "rn"), "MUT2": theirs("zrn", "zrn"),
    "BRC": theirs("acn", kind="BR", weight_hh=["weight_a", "weight_c"]), "NBRC": theirs("acn", "ac", "NBR"),
    "FastRNN": theirs("n", "n", alpha=["alpha"], beta=["beta"]),
    "FastGRNN": theirs("z", "z", biases=("zz", "zz"), zeta=["zeta"], nu=["nu"]),
    "IntersectionRNN": theirs("chyg", "chyg"), "AntisymmetricRNN": theirs("n", "n"),
    "GatedAntisymmetricRNN": theirs("zn", "n"), "CoRNN": theirs("n", "n", "coRNN", weight_ch=["weight_hh.w"]),
    "UnICORNN": theirs("n", weight_hh=["weight_w"], weight_ch=["weight_c"]),
    "IndRNN": theirs("n", vector_u=["weight_u"]), "TRNN": theirs("zf"),
    "TGRU": theirs("zfo", weight_hh=["weight_ih.a", "weight_ih.b", "weight_ih.c"]),
    "TLSTM": theirs("zfo", weight_hh=["weight_ih.a", "weight_ih.b", "weight_ih.c"]),
    "PeepholeLSTM": theirs("ifgo", "ifgo", weight_ph=["weight_i", "weight_f", "weight_o"]),
    "WMCLSTM": theirs("ifgo", "ifgo", weight_mh=["weight_hh.a", "weight_hh.b", "weight_hh.c"]),
    "MultiplicativeLSTM": theirs(
        "mifgo", "m", weight_mh=[f"weight_hh.{gate}" for gate in "ifgo"], bias_mh=[f"bias_hh.{gate}" for gate in "ifgo"]
    ),
    "ResidualLSTM": theirs(
        "ifgo", "ifgo", "ResLSTM", weight_proj=["weight_hh.p"], weight_res=["weight_ih.r"],
        weight_ph=["weight_i", "weight_f", "weight_o"],
    ),
}  # fmt: skip
KEYWORDS = {"IndRNN": {"nonlinearity": "relu"}, "FastGRNN": {"nonlinearity": "sigmoid"}}


def torchrecurrent_layer(library, layer):
    """Its layer of the same name, constants and weights."""
    name, H = type(layer).__name__, layer.hidden_size
    kind, parameters = THEIRS[name]
    constants = {constant: getattr(layer, constant) for constant in layer.layout.constants}
    made = getattr(library, kind or name)(
        layer.input_size, H, layer.num_layers, dtype=torch.float64, **constants, **KEYWORDS.get(name, {})
    )

    def ours(label, suffix):
        parameter, _, gate = label.partition(".")
        rows = layer.layout.rows.get(parameter, "")
        if gate and gate not in rows:
            return torch.zeros(H, dtype=torch.float64)
        whole = getattr(layer, parameter + suffix).detach()
        return whole[rows.index(gate) * H : (rows.index(gate) + 1) * H] if gate else whole

    for k, cell in enumerate(made.cells):
        for label, sources in parameters.items():
            array = torch.cat([ours(source, f"_l{k}") for source in sources])
            if name == "FastGRNN" and label == "bias_ih":
                array[H:] += ours("weight_n", f"_l{k}")
            getattr(cell, label).data.copy_(array)
    return made
