"""The cells that docs/new_cell.md defines by `gpu_rnn.cell`, from its text, and what their papers say of a step."""

import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.functional import logsigmoid

from .reference_modifiers import drawn

TEXT = (Path(__file__).parents[1] / "docs" / "new_cell.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
DEFINITIONS = [block for block in BLOCKS if "@gpu_rnn.cell" in block]
USE = next(block for block in BLOCKS if "MGU.function" in block)
MODULE = next(block for block in BLOCKS if "GATES" in block)
USE_OF_MODULE = next(block for block in BLOCKS if 'run("mgu"' in block)

document = sys.modules["document"] = ModuleType("document")  # where pickle finds the classes
for definition in DEFINITIONS:
    exec(definition, vars(document))

CELLS = {"MGU": document.MGU, "SLSTM": document.SLSTM}


def published(name, x, h, state):
    """In torch; the sLSTM with its stabilizer, so that all four states can be compared."""
    if name == "MGU":
        f = torch.sigmoid(x[0] + h[0])
        return ((1 - f) * state[0] + f * torch.tanh(x[1] + f * h[1]),)
    z, i, f, o = (a + r for a, r in zip(x, h))
    _, c, n, m = state
    after = torch.maximum(logsigmoid(f) + m, i)
    i, f = torch.exp(i - after), torch.exp(logsigmoid(f) + m - after)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, after


def case(name, options, dtype, T, B, I, H, **more):
    """A case with modifiers. The sLSTM's normalizer is positive, as it is. In half precision only its h has a gradient,
    which doesn't see m: where its two candidates are almost equal, rounding may take the other one, and the other
    states see that.
    """
    made = drawn(name, options, dtype, T, B, I, H, **more)
    case, letters = made.case, made.case.cell.states
    state = [s.abs() + 0.5 if letter == "n" else s for letter, s in zip(letters, case.state)]
    half = dtype in ("float16", "bfloat16")
    dlast = [0 * d if half and letter in "cnm" else d for letter, d in zip(letters, case.dlast)]
    return made._replace(case=case._replace(state=tuple(state), dlast=tuple(dlast)))
