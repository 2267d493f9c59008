"""These tests run Triton's interpreter, which is chosen by the environment, once per process.

`tests/test_triton_interpreted.py` starts them. By hand: TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    from . import patch_interpreter  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _quiet():
    """The interpreter computes both sides of a selection, also the side that overflows."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What was not written is NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _as_many_registers_as_it_takes(monkeypatch):
    """Whole sequences also of what a GPU has too few for; the smallest sizes are ragged."""
    from gpu_rnn.kernels.triton import config

    monkeypatch.setattr(config, "spilling", lambda *_: None)


def poisoned(make):
    def empty(*args, **kwargs):
        array = make(*args, **kwargs)
        return array.fill_(float("nan")) if array.is_floating_point() else array

    return empty
