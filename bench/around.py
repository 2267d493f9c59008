"""What is around a cell (`problems.FEATURES`), beside the plain function: what does each cost?

The same data, the backend that would be taken anyway, and torch's autograd; `reference` is the same by the published
rules, an instant at a time. In float64 it is the exact answer, in the case's own dtype the measure of what is allowed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpu_rnn.backends import dispatch
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.philox import uniforms
from gpu_rnn.modifiers.apply import dropout_mask

from . import machine
from .contenders import STEPS, Contender, Run, plan_of
from .data import Data, function
from .oracle import Judge
from .problems import FEATURES, Case

Tensors = dict[str, torch.Tensor]
LEARNED = ("peephole", "w_hr")  # arrays that have gradients
MASKED = {"input_dropout": ("x", 1), "weight_dropout": ("w_hh", 2)}  # of the layers alone: a product before the call
NORM = "layer_norm"  # several arrays that have gradients, numbered here
OF = {
    "lstm": ("peephole", "coupled", "cell_clip", NORM, "recurrent_dropout_on", "w_hr"),
    "gru": ("reset_after", NORM, "recurrent_dropout_on", "w_hr"),
}  # what not all cells have


class Around(Contender):
    def __init__(self, name: str) -> None:
        self.keywords = FEATURES[name]

    def absent(self, case: Case) -> str | None:
        others = {keyword for keywords in OF.values() for keyword in keywords} - set(OF.get(case.cell, ()))
        if lacking := sorted(others & self.keywords.keys()):
            return f"a {case.cell} has no {', '.join(lacking)}"
        if machine.tf32(case):
            return "its reference is in IEEE float32, not in TF32"
        return None

    def prepare(self, case: Case, data: Data) -> Run:
        ours, options = function(case.cell)
        return self.run(case, data, lambda x, given, fixed: ours(x, **given, **fixed, **options))

    def judge(self, case: Case, data: Data, usual: Callable[[], Judge]) -> Judge:
        def answer(data: Data) -> Tensors:
            return self.run(case, data, lambda x, given, fixed: reference(case, x, given, fixed))(0)

        judge = Judge(case, answer(data.double()))
        judge.baseline(judge.errors(answer(data)))
        return judge

    def plan(self, case: Case) -> str:
        problem = case.problem()
        return plan_of(dispatch.choose(problem), problem)

    def run(self, case: Case, data: Data, call: Callable[..., tuple]) -> Run:
        """`call` of x, of what has gradients and of what hasn't, by name, with all its gradients in training."""
        arrays = {name: draw(case, data) for name, draw in DRAWN.items() if self.keywords.get(name) is ...}
        coupled = "coupled" in self.keywords
        weights = {
            name: torch.cat((w[: case.H], w[2 * case.H :])) if coupled else w for name, w in data.weights.items()
        }
        state, P = data.state, case.H
        if "w_hr" in self.keywords:
            P = projected(case)
            weights["w_hh"] = weights["w_hh"][:, :P]
            state = {"h0": state["h0"][:, :P], f"{letters_of(case, arrays)[1]}0": [*state.values()][-1]}
        inputs = data.x
        if "w_ih" in self.keywords:  # the product is somebody else's
            inputs = [F.linear(x, weights["w_ih"]) for x in inputs]
            del weights["w_ih"]
        gains = {f"{NORM} {k}": gain for k, gain in enumerate(layer_norm(case, data) if NORM in self.keywords else ())}
        given = weights | state | gains | {name: array for name, array in arrays.items() if name in LEARNED}
        given = {name: value.clone().requires_grad_(case.training) for name, value in given.items()}
        fixed = {
            name: value for name, value in (self.keywords | arrays).items() if name not in (*LEARNED, *MASKED, NORM)
        }
        masked = {what: (self.keywords[name], k) for name, (what, k) in MASKED.items() if name in self.keywords}
        seed = torch.tensor([fixed.pop("seed")], device=case.device) if masked else None
        letters, xs = letters_of(case, given), [x.requires_grad_(case.training) for x in inputs]
        arriving = {
            "y": data.dy[..., :P],
            "hT": data.dlast[0][:, :P],
            **{f"{s}T": data.dlast[-1] for s in letters[1:]},
            **dict.fromkeys(letters, data.dy),
        }

        def run(k: int) -> Tensors:
            x = xs[k % len(xs)]
            called = {"x": x, **given}
            for what, (p, which) in masked.items():
                called[what] = called[what] * dropout_mask(seed, p, tuple(called[what].shape[-2:]), x, which)
            if gains:
                called[NORM] = tuple(called.pop(name) for name in gains)
            y, last, *history = call(called.pop("x"), called, fixed)
            outputs = {"y": y} | {f"{s}T": array for s, array in zip(letters, several(last))}
            if history:
                outputs |= dict(zip(letters[1:], several(history[0])[1:]))
            if not case.training:
                return outputs
            leaves, wanted = {"x": x, **given}, [arriving[name] for name in outputs]
            gradients = torch.autograd.grad((*outputs.values(),), (*leaves.values(),), wanted)
            found = {name: array.detach() for name, array in outputs.items()}
            return found | {f"d{name}": array for name, array in zip(leaves, gradients)}

        return run


def letters_of(case: Case, given: Tensors) -> str:
    """One letter each; a projected GRU has a state of its own beside h."""
    return "hs" if case.cell == "gru" and "w_hr" in given else cells.get(case.cell).states


def several(states: Any) -> tuple:
    return states if isinstance(states, tuple) else (states,)


# ---- arrays that features take --------------------------------------------------------------------------------------


def generator(case: Case) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(21)


def reset(case: Case, data: Data) -> torch.Tensor:
    """[T, B], true at an instant of 16."""
    return torch.rand(case.T, case.B, generator=generator(case), device=case.device) < 1 / 16


def lengths(case: Case, data: Data) -> torch.Tensor:
    """[B], from half of T to T."""
    return torch.randint((case.T + 1) // 2, case.T + 1, (case.B,), generator=generator(case), device=case.device)


def peephole(case: Case, data: Data) -> torch.Tensor:
    """[3*H]"""
    drawn = torch.randn(3 * case.H, generator=generator(case), device=case.device)
    return drawn.to(getattr(torch, case.dtype)).to(data.dy.dtype)


def projected(case: Case) -> int:
    return (case.H + 1) // 2


def projection(case: Case, data: Data) -> torch.Tensor:
    """[P, H]"""
    drawn = torch.randn(projected(case), case.H, generator=generator(case), device=case.device) / case.H**0.5
    return drawn.to(getattr(torch, case.dtype)).to(data.dy.dtype)


def layer_norm(case: Case, data: Data) -> list[torch.Tensor]:
    """Gains [G*H] of both parts; the LSTM's gain and bias [H] of its cell state."""
    cell, drawing = cells.get(case.cell), generator(case)
    sizes = [cell.G * case.H] * 2 + [case.H] * (2 * ("c" in cell.states))
    drawn = [torch.randn(n, generator=drawing, device=case.device) for n in sizes]
    return [array.to(getattr(torch, case.dtype)).to(data.dy.dtype) for array in drawn]


def left_padding(case: Case, data: Data) -> torch.Tensor:
    """[B], from 0 to half of T."""
    return case.T - lengths(case, data)


DRAWN: dict[str, Callable[[Case, Data], torch.Tensor]] = {
    "reset": reset, "lengths": lengths, "left_padding": left_padding, "peephole": peephole, "w_hr": projection,
}  # fmt: skip


# ---- by the published rules -----------------------------------------------------------------------------------------


def reference(case: Case, x: torch.Tensor, given: Tensors, fixed: dict[str, Any]) -> tuple:
    """What our functions return, in torch, an instant at a time. `docs/modifiers.md` has the equations."""
    letters, (B, H) = letters_of(case, given), (case.B, case.H)
    state: Any = [given[f"{letter}0"] for letter in letters]
    seed = torch.tensor([fixed.get("seed", 0)], device=x.device)
    row, unit = torch.arange(B, device=x.device)[:, None], torch.arange(H, device=x.device)
    mask = dropout_mask(seed, fixed["recurrent_dropout"], (B, H), x) if "recurrent_dropout" in fixed else 1.0
    mask, spared = (1.0, mask) if fixed.get("recurrent_dropout_on") == "candidate" else (mask, 1.0)
    shown, history = [], []
    part = F.linear(x, given["w_ih"]) if "w_ih" in given else x
    of_x, of_h, *of_c = given.get(NORM, (None, None))
    for t, xg in enumerate(normalized(case, part, of_x, given["b_ih"])):
        held, before = state, state
        if "reset" in fixed:
            before = [torch.where(fixed["reset"][t][:, None], 0.0, old) for old in state]
        hg = normalized(case, F.linear(before[0] * mask, given["w_hh"]), of_h, given["b_hh"])
        if of_c:
            i, f, g, o = (xg + hg).chunk(4, 1)
            c = torch.sigmoid(f) * before[1] + torch.sigmoid(i) * torch.tanh(g)
            state = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), *of_c)), c
        elif {"peephole", "coupled", "cell_clip", "recurrent_dropout_on"} & (given.keys() | fixed.keys()):
            gates, clip = "igo" if "coupled" in fixed else "ifgo", fixed.get("cell_clip", float("inf"))
            if case.cell == "lstm":
                state = lstm(xg, hg, before[1], given.get("peephole"), gates, clip, spared)
            else:
                state = gru(xg, hg, before[0], spared)
        elif "reset_after" in fixed:
            state = gru(xg, hg, before[0], spared, given)
        else:
            state = STEPS[case.cell](xg, hg, before[-len(cells.get(case.cell).states) :])  # a projected GRU sees s
        if "w_hr" in given:
            state = F.linear(state[0], given["w_hr"]), state[-1]
        if "zoneout" in fixed:
            drawn = uniforms(seed, torch.tensor([t], device=x.device), row, unit, len(letters))
            state = [torch.where(u < fixed["zoneout"], old, new) for u, old, new in zip(drawn, before, state)]
        y = state[0]
        if fixed.keys() & {"left_padding", "lengths"}:
            inside = ((fixed.get("left_padding", 0) <= t) & (t < fixed.get("lengths", case.T)))[:, None]
            state = [torch.where(inside, new, old) for old, new in zip(held, state)]
            y = torch.where(inside, y, 0.0)
        shown.append(y)
        history.append(state)
    states = tuple(torch.stack(each) for each in zip(*history))
    return torch.stack(shown), tuple(state), *([states] if "return_states" in fixed else [])


def normalized(case: Case, part: torch.Tensor, gain: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """One part of all gates, its bias added; with a gain layer-normalized, the GRU's candidate by itself."""
    if gain is None:
        return part + bias
    sizes = [2 * case.H, case.H] if case.cell == "gru" else [len(gain)]
    split = zip(sizes, *(array.split(sizes, -1) for array in (part, gain, bias)))
    return torch.cat([F.layer_norm(a, (n,), g, b) for n, a, g, b in split], -1)


def gru(
    xg: torch.Tensor, hg: torch.Tensor, h: torch.Tensor, spared: Any, given: Tensors | None = None
) -> list[torch.Tensor]:  # fmt: skip
    """The GRU with a mask of its candidate, and with `given` weights with its reset gate before the product."""
    (x_r, x_z, x_n), (h_r, h_z, h_n), H = xg.chunk(3, 1), hg.chunk(3, 1), h.shape[1]
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    met = r * h_n if given is None else F.linear(r * h, given["w_hh"][2 * H :], given["b_hh"][2 * H :])
    return [(1 - z) * torch.tanh(x_n + met) * spared + z * h]


def lstm(
    xg: torch.Tensor, hg: torch.Tensor, c: torch.Tensor, p: torch.Tensor | None, gates: str, clip: float, spared: Any
) -> tuple:
    """The LSTM with gates that see the cell state by weights p, f = 1 - i where there is no gate f, bounds of c, and a
    mask of its candidate."""
    a = dict(zip(gates, (xg + hg).chunk(len(gates), 1)))
    seen: dict[str, Any] = dict.fromkeys(gates, 0.0)
    if p is not None:
        seen |= zip(gates.replace("g", ""), p.chunk(len(gates) - 1))
    i = torch.sigmoid(a["i"] + seen["i"] * c)
    f = torch.sigmoid(a["f"] + seen["f"] * c) if "f" in gates else 1 - i
    c = (f * c + i * torch.tanh(a["g"]) * spared).clamp(-clip, clip)
    return torch.sigmoid(a["o"] + seen["o"] * c) * torch.tanh(c), c
