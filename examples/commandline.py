"""What the examples' command lines have in common: whose layers, and whether compiled."""

import argparse
from collections.abc import Callable

import torch
from torch import nn


def choice(text: str | None) -> Callable[[nn.Module], Callable]:
    """What the command line wants done with a model before it runs."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="store_true", help="use gpu_rnn's layers instead of torch.nn's")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = parser.parse_args()

    def prepare(model: nn.Module) -> Callable:
        if options.ours:
            import gpu_rnn

            gpu_rnn.replace_(model)
        return torch.compile(model) if options.compile else model

    return prepare
