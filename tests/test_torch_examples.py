"""The examples train the same with torch.nn's layers, with ours, and with ours compiled."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

import gpu_rnn

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = ("word_language_model", "tagger", "seq2seq", "actor_critic")
PACKED = ("tagger",)  # batch sizes are data: the graph is cut there


@pytest.fixture(autouse=True)
def double():
    """So that rounding can't grow into a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / f"{name}.py"))["train"]


@pytest.mark.parametrize("name", NAMES)
def test_the_curve_is_the_same_with_our_layers(name, monkeypatch):
    train, replaced = load(name, monkeypatch), []

    def ours(model):
        before = [type(module) for module in model.modules()]
        gpu_rnn.replace_(model)
        replaced.append(before != [type(module) for module in model.modules()])
        return model

    def compiled(model):
        return torch.compile(ours(model), backend="aot_eager", fullgraph=name not in PACKED)

    expected = train(4)
    assert train(4, ours) == pytest.approx(expected, rel=1e-10)
    assert train(4, compiled) == pytest.approx(expected, rel=1e-10)
    assert replaced == [True, True]


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["seq2seq.py", "--ours"])
    torch.set_default_dtype(torch.float32)
    runpy.run_path(str(FOLDER / "seq2seq.py"), run_name="__main__")
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30
    assert losses[-1] < losses[0]
