"""Layers with heads, judged by the matrix of all units in plain torch: zero outside of the blocks of the heads."""

import numpy as np
import torch

from gpu_rnn.backends.heads import Heads
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.kernels.philox import uniforms

from . import custom_cells, library, reference_modifiers
from .sequences import wide
from .tolerance import assert_close


def blocks(rows, N, G):
    """Which elements of [rows, H] are in a block."""
    H = rows // G
    head = torch.arange(H) // (H // N)
    return (head[:, None] == head).repeat(G, 1)


def dense(R, N, G):
    """[G*H, H/N] -> [G*H, H], differentiable."""
    return torch.where(blocks(len(R), N, G), R.repeat(1, N), 0)


def compact(R, N, G):
    """[G*H, H] -> its blocks, [G*H, H/N]."""
    return R[blocks(len(R), N, G)].reshape(len(R), -1)


def by_head(function, N, unit_arrays):
    """A function of arrays [.., H] on those of each head -> its results, put together."""
    D = unit_arrays[0].shape[-1] // N
    parts = [function(*(a[..., n * D : (n + 1) * D] for a in unit_arrays)) for n in range(N)]
    return [torch.cat(group, -1) for group in zip(*parts)]


def head_uniforms(N):
    """Those of the rules: a head numbers its own units, and its seed is the golden ratio's bits from the next one's."""

    def draw(seed, t, row, unit, count):
        D = unit.shape[-1] // N
        seeds = [torch.from_numpy(np.array([int(seed)]) + np.array([n * 0x9E3779B97F4A7C15 % 2**64]).astype(np.int64))
                 for n in range(N)]  # fmt: skip
        parts = [uniforms(own, t, row, unit[..., :D], count) for own in seeds]
        return [torch.cat(group, -1) for group in zip(*parts)]

    return draw


def head_norm(N):
    """Layer normalization of each head by itself."""
    whole = reference_modifiers.normalized

    def normalized(name, x, h, state, rows):
        G, S, names = len(x), len(state), list(rows)

        def of_head(*arrays):
            own = dict(zip(names, arrays[2 * G + S :]))
            return whole(name, arrays[:G], arrays[G : 2 * G], arrays[2 * G : 2 * G + S], own)

        B, H = x[0].shape
        return by_head(of_head, N, [a.expand(B, H) for a in (*x, *h, *state, *rows.values())])

    return normalized


def operations(backend, cell, N):
    """The two operations of a backend for problems of N heads."""
    backend = TwoPass(backend) if cell.lowered else backend
    heads = backend if N == 1 or getattr(backend, "RUNS_HEADS", False) else Heads(backend)
    return (
        lambda problem, runs: heads.forward(problem.variant(heads=N), runs),
        lambda problem, *args: heads.backward(problem.variant(heads=N), *args),
    )


CUSTOM = dict.fromkeys(custom_cells.CELLS, custom_cells) | dict.fromkeys(library.REPRESENTATIVE, library)


def check(monkeypatch, backend, name, N, dtype, T, B, I, H, *, options=None, **more):
    """Every result of a backend, against the reference of the dense matrix."""
    if name in CUSTOM:
        monkeypatch.setattr(reference_modifiers, "published", CUSTOM[name].published)
    monkeypatch.setattr(reference_modifiers, "uniforms", head_uniforms(N))
    monkeypatch.setattr(reference_modifiers, "normalized", head_norm(N))
    drawn = CUSTOM[name].case if name in CUSTOM else reference_modifiers.drawn
    made = drawn(name, options or {}, dtype, T, B, I, H, **more)
    case, G = made.case, made.plain.G
    ours = case._replace(weights=case.weights._replace(w_hh=compact(case.weights.w_hh, N, G)))
    judge = case._replace(weights=case.weights._replace(w_hh=dense(ours.weights.w_hh, N, G)))
    results = ours.run(*operations(backend, case.cell, N))
    truth, peer = (
        reference_modifiers.by_the_rules(made._replace(case=judge), kind) for kind in (torch.float64, case.x.dtype)
    )
    assert results.keys() == truth.keys()
    for key in truth:
        both = truth[key], peer[key]
        if key == "dw_hh":
            both = [compact(torch.from_numpy(array), N, G).numpy() for array in both]
        assert_close(wide(results[key]), *both, dtype, f"{case.cell.name}, {N} heads, {key}")
