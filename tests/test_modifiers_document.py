"""docs/modifiers.md is true: its Python runs, and every keyword that it names is there."""

import inspect
import re
from pathlib import Path

import torch

from gpu_rnn import functional
from gpu_rnn.nn import layers

TEXT = (Path(__file__).parents[1] / "docs" / "modifiers.md").read_text(encoding="utf-8")


def test_its_python_runs():
    names = {}
    with torch.random.fork_rng():
        for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
            exec(compile(block, "docs/modifiers.md", "exec"), names)


def test_it_names_every_keyword():
    call = inspect.signature(layers.RecurrentLayer.forward).parameters.keys() - {"self", "input", "hx"}
    constructor = layers.LSTMKeywords.__annotations__.keys() - {"backend", "precision", "recompute"}
    function = functional.LSTMKeywords.__annotations__.keys()
    assert not {name for name in call | constructor | function if f"`{name}" not in TEXT}
