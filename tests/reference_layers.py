"""Layers with every modifier of a cell, by the published rules, in a loop over time steps in plain torch."""

import numpy as np
import torch
from torch.nn.functional import layer_norm

import gpu_rnn
from gpu_rnn.kernels.philox import uniforms

LAYERS = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "projected": ("LSTM", {"proj_size": 2}),
}
VARIED = LAYERS | {"gru before": ("GRU", {"reset_after": False})}  # torch.nn has no twin of
PROJECTED = {"gru projected": ("GRU", {"proj_size": 2}), "rnn projected": ("RNN", {"proj_size": 2})}
SHAPES = {"one": {}, "stacked": {"num_layers": 2, "bidirectional": True}}
T, B, I, H = 6, 3, 2, 4
NORM = "weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c"

# Keywords of a layer, and what its calls take besides x and hx.
FEATURES = {
    "reset": ({}, ["reset"]),
    "reset state": ({}, ["reset", "reset_state"]),
    "lengths": ({}, ["lengths"]),
    "left_padding": ({}, ["left_padding"]),
    "both ends": ({}, ["left_padding", "lengths"]),
    "zoneout": ({"zoneout": 0.4}, []),
    "recurrent dropout": ({"recurrent_dropout": 0.4}, []),
    "input dropout": ({"input_dropout": 0.4}, []),
    "weight dropout": ({"weight_dropout": 0.4}, []),
    "everything": (
        {"zoneout": 0.3, "recurrent_dropout": 0.2, "input_dropout": 0.3, "weight_dropout": 0.2},
        ["reset", "reset_state", "left_padding", "lengths"],
    ),
}
VARIANTS = {
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "coupled peephole": {"coupled": True, "peephole": True},
    "cell_clip": {"cell_clip": 0.2},
    "all variants": {"peephole": True, "coupled": True, "cell_clip": 0.3},
}


def layer(name, shape="one", seed=0, **keywords):
    """In float64, with parameters large enough to matter."""
    torch.manual_seed(seed)
    kind, arguments = (VARIED | PROJECTED)[name]
    if "projected" in name and keywords.get("zoneout"):
        keywords["zoneout"] = (0.0, keywords["zoneout"])  # h itself isn't there to be kept
    made = getattr(gpu_rnn, kind)(I, H, **{"dtype": torch.float64} | SHAPES[shape] | arguments | keywords)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if name == "relu" else 0.8))
    return made


def inputs(made, names=(), seed=1):
    """x, hx and what else a call takes, all random; gradients are requested where there are any."""
    rng = np.random.default_rng(seed)

    def draw(*sizes):
        return torch.from_numpy(rng.standard_normal(sizes)).to(next(made.parameters()).dtype).requires_grad_()

    many = made.num_layers * (2 if made.bidirectional else 1)
    two = made.mode == "LSTM" or (made.mode == "GRU" and made.proj_size > 0)
    sizes = [made.proj_size or H, *[H] * two]
    drawn = {
        "reset": torch.from_numpy(rng.random((T, B)) < 0.4),
        "reset_state": as_hx([draw(many, size) for size in sizes]),
        "lengths": torch.tensor([4, 0, 6]),
        "left_padding": torch.tensor([1, 3, 0]),
    }
    return draw(T, B, I), as_hx([draw(many, B, size) for size in sizes]), {name: drawn[name] for name in names}


def as_hx(states):
    return tuple(states) if len(states) > 1 else states[0]


def as_tuple(hx):
    return hx if isinstance(hx, tuple) else (hx,)


def by_the_rules(made, x, hx, generator=None, reset=None, reset_state=None, lengths=None, left_padding=None):
    """x [T, B, I] -> y, states after (h [L*D, B, .], ...), states after every time step (h [L*D, T, B, .], ...)."""
    zoneout = made.zoneout if isinstance(made.zoneout, tuple) else (made.zoneout,) * 2
    drops = made.zoneout, made.recurrent_dropout, made.input_dropout, made.weight_dropout
    last, every, k = [], [], 0
    for level in range(made.num_layers):
        outputs = []
        for end in ("", "_reverse")[: 1 + made.bidirectional]:
            seed = drawn(generator) if made.training and any(drops) else None
            weight = {
                name: getattr(made, f"{name}_l{level}{end}", None)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_ch", *NORM)
            }
            seen, R = x, weight["weight_hh"]
            if seed is not None:
                seen = x * kept(seed, 1, made.input_dropout, *x.shape[1:])
                R = R * kept(seed, 2, made.weight_dropout, *R.shape)
            state, history = [s[k] for s in as_tuple(hx)], [None] * len(x)
            P = state[0].shape[1]
            instead = [torch.zeros_like(s) if reset_state is None else None for s in state]
            if reset_state is not None:
                instead = [r[k].expand_as(s) for r, s in zip(as_tuple(reset_state), state)]
            for t in reversed(range(len(x))) if end else range(len(x)):
                s = state
                if reset is not None and (not end or t + 1 < len(x)):
                    first = reset[t + 1] if end else reset[t]
                    if end and lengths is not None:
                        first = first & (t + 1 < lengths)
                    s = [torch.where(first[:, None], r, old) for r, old in zip(instead, s)]
                shown = made.recurrent_dropout if made.recurrent_dropout_on == "h" else 0.0
                h = s[0] if seed is None else s[0] * kept(seed, 0, shown, len(s[0]), P)
                spared = 1.0
                if seed is not None and not shown:
                    spared = kept(seed, 0, made.recurrent_dropout, len(s[0]), H)
                of_x, of_h, *of_c = (weight[name] for name in NORM)

                def recurrent(gate, value, R=R, seed=seed, bias=weight["bias_hh"], shown=shown):
                    value = value if seed is None else value * kept(seed, 0, shown, *value.shape)
                    return value @ R.chunk(3)[gate].T + bias.chunk(3)[gate]

                new = published(
                    made,
                    normalized(made, seen[t] @ weight["weight_ih"].T, of_x, weight["bias_ih"]),
                    normalized(made, h @ R.T, of_h, weight["bias_hh"]),
                    s,
                    weight["weight_ch"],
                    of_c,
                    recurrent,
                    spared,
                )
                for j, p in enumerate(zoneout[: len(new)]):
                    if not made.training:
                        new[j] = p * s[j] + (1 - p) * new[j] if p else new[j]
                    elif p:  # random numbers are for the states that have a probability, in their order
                        drawn_at = t if made.reset_after else 2 * t + (not end)
                        u = uniform(seed, drawn_at, *new[j].shape, count=sum(q > 0 for q in zoneout[: len(new)]))
                        new[j] = torch.where(u[sum(q > 0 for q in zoneout[:j])] < p, s[j], new[j])
                if made.proj_size:
                    new[0] = new[0] @ weight["weight_hr"].T
                there = torch.ones(len(s[0]), dtype=torch.bool)
                if left_padding is not None:
                    there &= t >= left_padding
                if lengths is not None:
                    there &= t < lengths
                state = [torch.where(there[:, None], n, old) for n, old in zip(new, state)]
                history[t] = [torch.where(there[:, None], n, 0.0) for n in state]
            outputs.append(torch.stack([states[0] for states in history]))
            last.append(state)
            every.append([torch.stack(states) for states in zip(*history)])
            k += 1
        x = torch.cat(outputs, -1)
    return x, *(as_hx([torch.stack(states) for states in zip(*group)]) for group in (last, every))


def normalized(made, part, gain, bias):
    """One part of all gates, as Ba, Kiros & Hinton 2016 have it: the GRU's candidate by itself."""
    if not made.layer_norm:
        return part + (0 if bias is None else bias)
    sizes = [2 * H, H] if made.mode == "GRU" else [part.shape[-1]]
    bias = torch.zeros_like(gain) if bias is None else bias
    split = zip(sizes, *(array.split(sizes, -1) for array in (part, gain, bias)))
    return torch.cat([layer_norm(a, (n,), g, b) for n, a, g, b in split], -1)


def published(made, x, h, state, p, of_c, recurrent, spared):
    """The states after a time step, from the input and recurrent projections of all gates, biases included; `recurrent`
    gives a gate's part of another value than h, `spared` is the candidate's mask."""
    if made.mode.startswith("RNN"):
        return [getattr(torch, made.nonlinearity)(x + h)]
    if made.mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + (r * hn if made.reset_after else recurrent(2, r * state[0])))
        new = (1 - z) * n * spared + z * state[-1]
        return [new, new] if made.proj_size else [new]
    names = "igo" if made.coupled else "ifgo"
    a, seeing = dict(zip(names, (x + h).chunk(len(names), -1))), names.replace("g", "")
    p = dict(zip(seeing, [0.0] * len(seeing) if p is None else p.chunk(len(seeing))))
    i = torch.sigmoid(a["i"] + p["i"] * state[1])
    f = 1 - i if made.coupled else torch.sigmoid(a["f"] + p["f"] * state[1])
    c = f * state[1] + i * torch.tanh(a["g"]) * spared
    if made.cell_clip is not None:
        c = c.clamp(-made.cell_clip, made.cell_clip)
    shown = layer_norm(c, (H,), *of_c) if made.layer_norm else c
    return [torch.sigmoid(a["o"] + p["o"] * c) * torch.tanh(shown), c]


# ---- masks ----------------------------------------------------------------------------------------------------------


def drawn(generator):
    """The seed of the next layer and direction."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)


def uniform(seed, t, rows, columns, count=1):
    return uniforms(seed, torch.tensor([t]), torch.arange(rows)[:, None], torch.arange(columns), count)


def kept(seed, which, p, rows, columns):
    """A mask for a whole sequence: of h, of x, of the recurrent weights."""
    (u,) = uniform(seed, 2**32 - 1 - which, rows, columns)
    return (u >= p).double() / (1 - p)
