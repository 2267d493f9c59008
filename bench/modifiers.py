"""Our functions with their modifiers (`problems.MODIFIERS`): what does each cost?

The same data, the backend that would be chosen anyway, and torch's autograd. Their outputs are judged by the plain
reference (gpu_rnn/core/reference.py): in float64 it is exact, in the case's own dtype the measure of what is allowed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_rnn.core import reference
from gpu_rnn.core.problem import Modifiers, Weights
from gpu_rnn.kernels import cells
from gpu_rnn.modifiers import apply

from .correctness import AccuracyCheck
from .data import Data, Tensors, function
from .implementations import Run, chosen_plan, implementation, tf32
from .problems import MODIFIERS, Case

TRAINABLE = ("peephole", "w_hr")  # arrays that have gradients
MASKED = {"input_dropout": ("x", 1), "weight_dropout": ("w_hh", 2)}  # of the layers alone: a mask before the call
NORM = "layer_norm"  # several arrays that have gradients, numbered here
OF = {
    "lstm": ("peephole", "coupled", "cell_clip", NORM, "recurrent_dropout_on", "w_hr"),
    "gru": ("reset_after", NORM, "recurrent_dropout_on", "w_hr"),
}  # what not all cells have


def skip_reason(keywords: dict[str, Any], case: Case) -> str | None:
    others = {keyword for keywords in OF.values() for keyword in keywords} - set(OF.get(case.cell, ()))
    if unknown := sorted(others & keywords.keys()):
        return f"a {case.cell} has no {', '.join(unknown)}"
    return "its reference is in IEEE float32, not in TF32" if tf32(case) else None


def ours(keywords: dict[str, Any], case: Case, data: Data) -> Run:
    call, options = function(case.cell)
    return prepared(keywords, case, data, lambda x, arrays, fixed: call(x, **arrays, **fixed, **options))


def check(keywords: dict[str, Any], case: Case, data: Data, default: AccuracyCheck) -> AccuracyCheck:
    def outputs(data: Data) -> Tensors:
        return prepared(keywords, case, data, partial(by_reference, case))(0)

    check = AccuracyCheck(case, outputs(data.double()))
    check.set_baseline(check.errors(outputs(data)))
    return check


for name, keywords in MODIFIERS.items():
    implementation(name, skip_reason=partial(skip_reason, keywords), plan=chosen_plan, check=partial(check, keywords))(
        partial(ours, keywords)
    )


def prepared(keywords: dict[str, Any], case: Case, data: Data, call: Callable[..., tuple]) -> Run:
    """`call` of x, of the arrays that have gradients and of all else, by name, with all gradients in training."""
    drawn = draw(case, data, [*keywords])
    coupled, H, P = "coupled" in keywords, case.H, case.H
    weights = {name: torch.cat((w[:H], w[2 * H :])) if coupled else w for name, w in data.weights.items()}
    letters, state = cells.get(case.cell).states, data.state
    if "w_hr" in keywords:  # a projected GRU has a state of its own next to h
        P, letters = len(drawn["w_hr"]), "hs" if case.cell == "gru" else letters
        weights["w_hh"] = weights["w_hh"][:, :P]
        state = {"h0": state["h0"][:, :P], f"{letters[1:]}0": [*state.values()][-1]}
    xs = data.x
    if "w_ih" in keywords:  # its matmul is not counted
        xs = [F.linear(x, weights["w_ih"]) for x in xs]
        del weights["w_ih"]
    arrays = weights | state | {name: a for name, a in drawn.items() if name.startswith((*TRAINABLE, NORM))}
    arrays = {name: array.clone().requires_grad_(case.training) for name, array in arrays.items()}
    gains = [name for name in arrays if name.startswith(NORM)]
    masks = {name: keywords[name] for name in MASKED if name in keywords}
    fixed = {name: drawn.get(name, value) for name, value in keywords.items()
             if name not in (*TRAINABLE, *MASKED, NORM)}  # fmt: skip
    seed = torch.tensor([fixed.pop("seed")], device=case.device) if masks else None
    xs = [x.requires_grad_(case.training) for x in xs]
    grad_of = {"y": data.dy[..., :P], "hT": data.dlast[0][:, :P]}
    grad_of |= {f"{s}T": data.dlast[-1] for s in letters[1:]} | dict.fromkeys(letters, data.dy)

    def run(k: int) -> Tensors:
        leaves = {"x": xs[k % len(xs)], **arrays}
        args: dict[str, Any] = dict(leaves)
        for name, p in masks.items():
            what, which = MASKED[name]
            args[what] = args[what] * apply.dropout_mask(seed, p, tuple(args[what].shape[-2:]), leaves["x"], which)
        if gains:
            args[NORM] = tuple(args.pop(name) for name in gains)
        y, last, *history = call(args.pop("x"), args, fixed)
        outputs = {"y": y} | {f"{s}T": array for s, array in zip(letters, as_tuple(last))}
        if history:
            outputs |= dict(zip(letters[1:], as_tuple(history[0])[1:]))
        if not case.training:
            return outputs
        douts = [grad_of[name] for name in outputs]
        grads = torch.autograd.grad((*outputs.values(),), (*leaves.values(),), douts)
        return {k: v.detach() for k, v in outputs.items()} | {f"d{k}": v for k, v in zip(leaves, grads)}

    return run


def as_tuple(states: Any) -> tuple:
    return states if isinstance(states, tuple) else (states,)


def draw(case: Case, data: Data, names: list[str]) -> Tensors:
    """The arrays of these keywords: one each, of layer_norm several."""
    T, B, H, generator = case.T, case.B, case.H, torch.Generator(case.device).manual_seed(21)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = scale * torch.randn(shape, generator=generator, device=case.device)
        return drawn.to(getattr(torch, case.dtype)).to(data.dy.dtype)

    def lengths() -> torch.Tensor:  # from half of T to T
        return torch.randint((T + 1) // 2, T + 1, (B,), generator=generator, device=case.device)

    arrays: dict[str, Callable[[], torch.Tensor]] = {
        "reset": lambda: torch.rand(T, B, generator=generator, device=case.device) < 1 / 16,
        "lengths": lengths,
        "left_padding": lambda: T - lengths(),
        "peephole": lambda: normal(3 * H),
        "w_hr": lambda: normal((H + 1) // 2, H, scale=H**-0.5),
    }
    drawn = {name: array() for name, array in arrays.items() if name in names}
    if NORM in names:  # gains of both projections; the LSTM's gain and bias of its cell state
        sizes = [case.gates * H] * 2 + [H] * (2 * (case.cell == "lstm"))
        drawn |= {f"{NORM} {k}": normal(size) for k, size in enumerate(sizes)}
    return drawn


def by_reference(case: Case, x: torch.Tensor, arrays: Tensors, fixed: dict[str, Any]) -> tuple:
    """What our functions return, by the plain reference in the dtype of x."""
    states = tuple(arrays[name] for name in ("h0", "c0", "s0") if name in arrays)
    weights = Weights._make(arrays.get(name) for name in Weights._fields)
    keywords = {name: value for name, value in (arrays | fixed).items() if name in Modifiers._fields}
    name = "gru+projected" if case.cell == "gru" and "w_hr" in arrays else case.cell
    applied = apply.apply(name, x, weights, Modifiers(**keywords), reverse=False)
    cell = cells.get(applied.name)
    steps = reference.run(cell, cells.step_graph(cell), applied.x, applied.weights, states, reverse=False)
    y, *others = (torch.stack(values) for values in zip(*(states for states, _ in steps)))
    y, last, *history = applied.unpack(y, (*steps[-1][0], *others), cell.S, fixed.get("return_states", False))
    return y, last, *history
