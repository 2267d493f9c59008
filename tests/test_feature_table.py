"""docs/comparison.md: every row has a test that is there, and torch.nn gives the errors that it is said to."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "comparison.md"
QUOTED = re.compile(r'"([^"]+)"')


def rows():
    """Cells by the name of their column."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return [dict(zip(head, cells, strict=True)) for cells in body]


def test_every_row_is_tested_somewhere():
    assert len(rows()) > 30
    for row in rows():
        assert row["here"], row
        paths = re.findall(r"\]\(\.\./(tests/test_\w+\.py)\)", row["tested in"])
        assert paths, row
        assert all((ROOT / path).is_file() for path in paths), row


def layer(device, kind=nn.LSTM):
    return kind(3, 4, device=device), torch.randn(5, 2, 3, device=device)


def compiled(device):
    module, x = layer(device)
    torch.compile(module, fullgraph=True, backend="eager")(x)


def exported(device):
    module, x = layer(device)
    export(module, (x,), dynamic_shapes=({0: Dim("T", min=2), 1: Dim("B", min=2)},))


def mapped(device):
    module, x = layer(device)
    vmap(lambda a: module(a)[0])(x[None])


def pushed(device):
    module, x = layer(device)
    jvp(lambda a: module(a)[0], (x,), (x,))


def twice(device):
    module, x = layer(device)
    (slope,) = torch.autograd.grad(module(x.requires_grad_())[0].sum(), x, create_graph=True)
    slope.sum().backward()


def evaluated(device):
    module, x = layer(device)
    module.eval()(x)[0].sum().backward()


def strided(device):
    module, x = layer(device, nn.GRU)
    module(x, torch.zeros(1, 2, 8, device=device)[..., ::2])


def packed(*lengths, where):
    return lambda device: pack_padded_sequence(layer(device)[1], torch.tensor(lengths, device=where))


ERRORS = {  # what does it, and where
    "Attempted to wrap RNN, GRU, or LSTM": (compiled, "cpu"),
    "Constraints violated (T)!": (exported, "cpu"),
    "Batching rule not implemented for aten::lstm.input": (mapped, "cpu"),
    "Trying to use forward AD with mkldnn_rnn_layer that does not support it": (pushed, "cpu"),
    "'lengths' argument should be a 1D CPU int64 tensor": (packed(5, 3, where="meta"), "cpu"),
    "Length of all samples has to be greater than 0": (packed(5, 0, where="cpu"), "cpu"),
    "unexpected keyword argument 'zoneout'": (lambda device: nn.LSTM(3, 4, zoneout=0.1), "cpu"),
    "the derivative for '_cudnn_rnn_backward' is not implemented": (twice, "cuda"),
    "cudnn RNN backward can only be called in training mode": (evaluated, "cuda"),
    "rnn: hx is not contiguous": (strided, "cuda"),
}


def test_the_errors_are_those_of_the_table():
    assert {error for row in rows() for error in QUOTED.findall(row["torch.nn"])} == set(ERRORS)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")  # torch.nn's layers, exported
@pytest.mark.skipif(torch.__version__ < "2.13", reason="the table is of torch 2.13")
@pytest.mark.parametrize(
    "message", [pytest.param(m, marks=[pytest.mark.gpu] * (device == "cuda")) for m, (_, device) in ERRORS.items()]
)
def test_torch_nn_gives_the_error(message):
    """Where this fails, torch has learned it, and the table should say so."""
    run, device = ERRORS[message]
    with pytest.raises(Exception, match=re.escape(message)):
        run(device)
