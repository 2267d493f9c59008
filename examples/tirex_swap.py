"""TiRex-2's sLSTM layer on gpu_rnn's kernels: `gpu_rnn.flashrnn` where it imports the package `flashrnn`.

    pip install tirex-2
    python examples/tirex_swap.py [--length 512] [--batch 1] [--heads 4] [--size 512] [--rounds 5]

The layer is the package's own, unchanged, with weights drawn at random; those of the published model come from a hub.
It takes the function from `flashrnn` at every call, so that `swap` is one assignment. On a CPU TiRex-2 runs flashrnn's
loop in torch, here as it is, and compiled.
"""

import argparse
import time
from collections.abc import Callable

import flashrnn
import torch
from tirex2.model.component.flashrnn_slstm import FlashRNNLayerConfig, sLSTMFlashRNNLayer
from torch import Tensor

import gpu_rnn.flashrnn

theirs = flashrnn.flashrnn


def swap(ours: bool = True) -> None:
    """Have TiRex-2 compute by gpu_rnn from now on, or by flashrnn again."""
    flashrnn.flashrnn = gpu_rnn.flashrnn.flashrnn if ours else theirs


def layer(size: int, heads: int) -> sLSTMFlashRNNLayer:
    torch.manual_seed(0)
    config = FlashRNNLayerConfig(
        embedding_dim=size, num_heads=heads, backend="vanilla", recurrent_shape="HPGD", bias_shape="HGD"
    )
    return sLSTMFlashRNNLayer(config, block_idx=0, num_blocks=1)


def seconds(call: Callable[[], Tensor], rounds: int) -> float:
    """The best of so many, after one that may compile."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"length": 512, "batch": 1, "heads": 4, "size": 512, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    module = layer(options.size, options.heads)
    x = torch.randn(options.batch, options.length, options.size)
    measured = {}
    with torch.inference_mode():
        for name, ours in (("flashrnn's loop", False), ("flashrnn's loop, compiled", False), ("gpu_rnn", True)):
            swap(ours)
            run = torch.compile(module) if "compiled" in name else module
            measured[name] = seconds(lambda run=run: run(x), options.rounds)
            y = module(x)
            print(f"{name}: {measured[name] * 1000:.1f} ms, y[0, -1, 0] = {y[0, -1, 0]:.6f}")
    for name in list(measured)[:2]:
        print(f"gpu_rnn is {measured[name] / measured['gpu_rnn']:.1f} times as fast as {name}")


if __name__ == "__main__":
    main()
