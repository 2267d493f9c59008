"""Episodes within a batch, and what torch.nn makes of every one of them alone: the judge of `reset`."""

from itertools import pairwise

import torch
from torch import nn

from .reference_layers import T, as_hx, as_tuple

# By row. An episode begins at some time steps of x, some before a row's start and behind its end.
STARTS = torch.tensor([0, 2, 1])
LENGTHS = torch.tensor([6, 6, 4])
RESET = torch.zeros(T, 3, dtype=torch.bool)
RESET[[2, 5], 0] = RESET[[0, 1, 2, 3], 1] = RESET[[1, 2, 4], 2] = True


def twin(made):
    """torch.nn's layer with the same parameters."""
    relu = {"nonlinearity": "relu"} if made.mode == "RNN_RELU" else {}
    theirs = getattr(nn, made.mode.partition("_")[0])(
        made.input_size, made.hidden_size, made.num_layers, bidirectional=made.bidirectional,
        dtype=next(made.parameters()).dtype, **relu | ({"proj_size": made.proj_size} if made.proj_size else {}),
    )  # fmt: skip
    theirs.load_state_dict(made.state_dict())
    return theirs


def by_episodes(made, theirs, x, hx, *, reset=RESET, reset_state=None, lengths=None, left_padding=None):
    """What `made(x, hx, reset=...)` should be, by `theirs` on every episode of every row: y, the states after.

    hx enters a row's first episode going forward and its last one in reverse, which have the states after. reset_state,
    or zero, enters all others.
    """
    D = 2 if made.bidirectional else 1
    rows, lasts = [], []
    for b in range(x.shape[1]):
        start, end = int(0 if left_padding is None else left_padding[b]), int(T if lengths is None else lengths[b])
        first, instead = [s[:, b] for s in as_tuple(hx)], as_tuple(reset_state)
        instead = [torch.zeros_like(s) if r is None else r for s, r in zip(first, (instead * 2)[: len(first)])]
        cuts = [start, *(t for t in range(start + 1, end) if reset[t, b]), end]
        forward = torch.tensor([k % D == 0 for k in range(len(first[0]))])[:, None]
        y, after = [x.new_zeros(start, D * (made.proj_size or made.hidden_size))], []
        for n, (begin, stop) in enumerate(pairwise(cuts)):
            cut = torch.tensor([(n > 0) or bool(reset[start, b]), n < len(cuts) - 2])  # forward, in reverse
            entering = [torch.where(torch.where(forward, *cut), r, s) for r, s in zip(instead, first)]
            out, last = theirs(x[begin:stop, b], as_hx(entering))
            y.append(out)
            after.append(as_tuple(last))
        lasts.append([torch.where(forward, last, first) for first, last in zip(after[0], after[-1])])
        rows.append(torch.cat([*y, x.new_zeros(T - end, y[0].shape[1])]))
    return torch.stack(rows, 1), as_hx([torch.stack(states, 1) for states in zip(*lasts)])


CALLS = {"plain": [], "reset_state": ["reset_state"], "padded": ["left_padding", "lengths", "reset_state"]}


def check(made, x, hx, call):
    """Outputs, states after and all gradients."""
    call = {"reset": RESET, **{name: value for name, value in call.items() if name == "reset_state"}} | {
        name: {"left_padding": STARTS, "lengths": LENGTHS}[name] for name in call if name in ("left_padding", "lengths")
    }
    theirs, leaves = twin(made), [x, *as_tuple(hx), *as_tuple(call.get("reset_state", ()))]
    results = []
    for layer, (y, last) in ((made, made(x, hx, **call)), (theirs, by_episodes(made, theirs, x, hx, **call))):
        outputs = [y, *as_tuple(last)]
        loss = sum((torch.linspace(1, 2, out.numel()).reshape(out.shape) * out.square()).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])])
    close = {"rtol": 1e-10, "atol": 1e-11} if x.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[0], results[1], **close)
