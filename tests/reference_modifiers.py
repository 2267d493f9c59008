"""Modifiers of a cell, by the rules and in torch alone: the reference for every backend, and for autograd."""

from typing import NamedTuple

import numpy as np
import torch

from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.philox import uniforms

from .sequences import Case, draw, wide
from .tolerance import assert_close

OPTIONS = {
    "reset": {"reset": True},
    "reset_state": {"reset": True, "reset_state": True},
    "hold": {"hold": True},
    "dropout": {"dropout": True},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "mean": {"zoneout": (0.3, 0.2), "mean": True},
    "all": {"reset": True, "reset_state": True, "hold": True, "dropout": True, "zoneout": (0.3, 0.2)},
}

NORMED = {
    "norm": {"norm": True},
    "norm and all": OPTIONS["all"] | {"norm": True},
}  # of the LSTM and the GRU


class ModifiedCase(NamedTuple):
    case: Case  # its cell is the modified one, its weights have what that takes
    plain: cells.Cell
    options: dict


def drawn(name, options, dtype, T, B, I, H, P=None, *, rows=None, reverse=False, seed=0) -> ModifiedCase:
    """A case; values per unit have `rows` rows of the batch, all of them unless told."""
    case, rng = draw(name, dtype, T, B, I, H, P, reverse=reverse, seed=seed), np.random.default_rng([seed, 9])
    if "zoneout" in options:
        options = options | {"zoneout": options["zoneout"][: case.cell.S]}
    cell = apply_modifiers(case.cell, **options)
    real = getattr(torch, dtype)
    units = (
        torch.from_numpy(rng.standard_normal((len(cell.per_unit_params), rows or B, H))).to(real)
        if cell.per_unit_params
        else None
    )
    if units is not None and {"dropout", "candidate"} & options.keys():
        units[-1] = torch.from_numpy(rng.integers(0, 2, units.shape[1:]) * 2.0)
    flags = torch.from_numpy(rng.integers(0, 1 << len(cell.flags), (T, B)).astype(np.uint8)) if cell.flags else None
    seed_ = torch.tensor([rng.integers(1 << 62)]) if cell.uniforms else None
    weights = case.weights._replace(units=units, flags=flags, seed=seed_)
    return ModifiedCase(case._replace(cell=cell, weights=weights), case.cell, options)


def by_the_rules(modified: ModifiedCase, dtype: torch.dtype, history: bool = False) -> dict[str, np.ndarray]:
    """Every result by a loop in torch, and its gradients by torch's autograd."""
    case, plain, options = modified
    T, B, H = *case.x.shape[:2], case.weights.w_hh.shape[0] // plain.G

    def leaf(tensor):
        return None if tensor is None else tensor.to(dtype).clone().requires_grad_()

    x, weights = leaf(case.x), [leaf(w) for w in case.weights[:6]]
    initial = [leaf(s) for s in case.state]
    w_ih, w_hh, b_ih, b_hh, w_hr, units = weights
    P = initial[0].shape[1]
    rows = dict(zip(case.cell.per_unit_params, () if units is None else units))
    flags = {name: (case.weights.flags >> k & 1).bool() for k, name in enumerate(case.cell.flags)}
    reset_state = [rows.get(f"{letter}_reset", torch.zeros(1, H, dtype=dtype)) for letter in plain.states]
    reset_state[0] = reset_state[0][:, :P]
    state, y, others = list(initial), [None] * T, [None] * T
    for t in reversed(range(T)) if case.reverse else range(T):
        s = list(state)
        if "reset" in options:
            s = [torch.where(flags["reset"][t, :, None], r, old) for r, old in zip(reset_state, s)]
        seen = s[0] * rows["dropout"][:, :P] if "dropout" in options else s[0]
        a = x[t] @ w_ih.T + (0 if b_ih is None else b_ih)
        r = seen @ w_hh.T + (0 if b_hh is None else b_hh)

        def recurrent(gate, value):
            """Of a value of the cell's own."""
            value = value * rows["dropout"] if "dropout" in options else value
            return value @ w_hh.chunk(plain.G)[gate].T + (0 if b_hh is None else b_hh.chunk(plain.G)[gate])

        step_args = plain.name, a.chunk(plain.G, -1), r.chunk(plain.G, -1), s
        more = [recurrent] if plain.lowered else []
        if "candidate" in options:
            more = [recurrent, lambda candidate: candidate * rows["dropout"]]
        own = {"units": [rows[name] for name in plain.per_unit_params]} if plain.per_unit_params else {}
        new = list(normalized(*step_args, rows) if "norm" in options else published(*step_args, *more, **own))
        zoneout = options.get("zoneout", ())
        if options.get("mean"):
            new = [p * old + (1 - p) * n for p, old, n in zip(zoneout, s, new)]
        elif zoneout:
            b, unit = torch.arange(B)[:, None], torch.arange(H)
            drawn_at = t if plain.lowered is None else 2 * t + (not case.reverse)
            u = uniforms(case.weights.seed, torch.tensor([drawn_at]), b, unit, len(zoneout))
            new = [torch.where(v.to(dtype) < p, old, n) for v, p, old, n in zip(u, zoneout, s, new)]
        if w_hr is not None:
            new[0] = new[0] @ w_hr.T
        if "hold" in options:
            new = [torch.where(flags["hold"][t, :, None], old, n) for old, n in zip(state, new)]
        state = new
        y[t], others[t] = new[0], new[1:]
    y = torch.stack(y)
    results = {"y": y} | {f"{letter}T": array for letter, array in zip(plain.states, state)}
    torch.autograd.backward((y, *state), (case.dy.to(dtype), *(d.to(dtype) for d in case.dlast)))
    for tensor in (*weights, *initial):  # what a cell doesn't read
        if tensor is not None and tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    names = [name for name, w in zip(Weights._fields, weights) if w is not None]
    results |= {f"d{name}": w.grad for name, w in zip(names, filter(lambda w: w is not None, weights))}
    if units is not None:
        learned = torch.arange(len(units)) < case.cell.num_trainable
        results["dunits"] = torch.where(learned[:, None, None], units.grad, torch.zeros(()))
    results |= {f"d{letter}0": s.grad for letter, s in zip(plain.states, initial)} | {"dx": x.grad}
    return {name: wide(array) for name, array in results.items()}


def published(name, x, h, state, recurrent=None, kept=lambda candidate: candidate):
    """The equations of each cell, as its papers and torch.nn have them."""
    if name == "gru+projected":
        r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        return ((1 - z) * torch.tanh(x[2] + r * h[2]) + z * state[1],) * 2
    if name == "gru+before":
        r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        return ((1 - z) * kept(torch.tanh(x[2] + recurrent(2, r * state[0]))) + z * state[0],)
    if name.startswith("rnn"):
        return (getattr(torch, name.removeprefix("rnn_"))(x[0] + h[0]),)
    if name == "gru":
        r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        return ((1 - z) * kept(torch.tanh(x[2] + r * h[2])) + z * state[0],)
    i, f, g, o = x[0] + h[0], x[1] + h[1], x[2] + h[2], x[3] + h[3]
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * kept(torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def normalized(name, x, h, state, rows):
    """The same with layer normalization, where x is normalized already and the means of h are taken for zero."""

    def scaled(*values):
        together = torch.cat(values, -1)
        return (together / torch.sqrt((together * together).mean(-1, keepdim=True) + 1e-5)).chunk(len(values), -1)

    if name == "gru":
        (r, z), (n,) = scaled(*h[:2]), scaled(h[2])
        h = rows["r_gain"] * r, rows["z_gain"] * z, rows["n_gain"] * n + rows["n_bias"]
        return published(name, x, h, state)
    h = [rows[f"{gate}_gain"] * value for gate, value in zip("ifgo", scaled(*h))]
    _, c = published(name, x, h, state)
    shown = torch.nn.functional.layer_norm(c, c.shape[-1:]) * rows["c_gain"] + rows["c_bias"]
    return torch.sigmoid(x[3] + h[3]) * torch.tanh(shown), c


def check(modified: ModifiedCase, results: dict) -> None:
    truth, peer = by_the_rules(modified, torch.float64), by_the_rules(modified, modified.case.x.dtype)
    assert results.keys() == truth.keys()
    for name in truth:
        what = f"{modified.case.cell.name} {name}"
        assert_close(wide(results[name]), truth[name], peer[name], modified.case.dtype, what)
