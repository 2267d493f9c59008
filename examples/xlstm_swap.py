"""An xLSTM whose sLSTM runs on gpu_rnn's kernels instead of the package's CUDA extension, which takes nvcc to build.

    python examples/xlstm_swap.py [--steps 200]

`swap_` changes a model of the package `xlstm` in place; parameters and checkpoints stay what they are. Here a stack of
sLSTM blocks learns to say which of the last tokens was marked; then both recurrences are timed.
"""

import argparse
import time
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from xlstm import sLSTMBlockConfig, sLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig
from xlstm.blocks.slstm.cell import sLSTMCell_vanilla

from gpu_rnn.cells import SLSTM

T, B, TOKENS, SIZE, HEADS = 32, 16, 8, 64, 4
GATES = [2, 0, 1, 3]  # of the package's i, f, z, o: z, i, f, o


def recurrence(cell: sLSTMCell_vanilla, training: bool, x: Tensor, states: Tensor) -> Tensor:
    """`sLSTMCell_vanilla._impl` -> y, c, n, m [4, T + 1, B, H]; x [T, B, 4*H], states [4, B, H], before the first step.

    The stabilizer m begins elsewhere than the package's, which changes c and n by the same factor, and y not at all.
    """
    N, D = cell.config.num_heads, cell.config.head_dim
    gates = x.unflatten(2, (4, N * D))[:, :, GATES].flatten(2)
    w_hh = cell._recurrent_kernel_.unflatten(1, (4, D)).transpose(0, 1)[GATES].flatten(0, 2)
    bias = cell._bias_.unflatten(0, (4, N * D))[GATES].flatten()
    first = dict(zip(("h0", "c0", "n0", "m0"), states.to(x.dtype)))
    _, _, after = SLSTM.function(gates, None, w_hh, bias, num_heads=N, return_states=True, **first)
    return torch.cat([states[:, None], torch.stack(after)], 1)


def swap_(model: nn.Module) -> nn.Module:
    """Have every sLSTM of a model with the package's backend "vanilla" run on gpu_rnn, on CPUs and GPUs."""
    for module in model.modules():
        if isinstance(module, sLSTMCell_vanilla):
            module._impl = partial(recurrence, module)
    return model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, conv1d_kernel_size=0)
        config = xLSTMBlockStackConfig(
            slstm_block=sLSTMBlockConfig(slstm=layer),
            context_length=T,
            num_blocks=2,
            embedding_dim=SIZE,
            slstm_at="all",
        )
        self.embedding, self.stack = nn.Embedding(2 * TOKENS, SIZE), xLSTMBlockStack(config)
        self.scores = nn.Linear(SIZE, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.stack(self.embedding(tokens)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], some of them marked, and at every time step the token that was marked last."""
    random = torch.Generator().manual_seed(step)
    tokens, marked = torch.randint(TOKENS, (B, T), generator=random), torch.rand(B, T, generator=random) < 0.2
    marked[:, 0] = True
    last = torch.where(marked, torch.arange(T), 0).cummax(1).values
    return tokens + TOKENS * marked, tokens.gather(1, last)


def train(steps: int, ours: bool = True) -> list[float]:
    torch.manual_seed(0)
    model = swap_(Model()) if ours else Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        tokens, targets = batch(step)
        loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    losses = train(steps)
    for step in range(0, steps, max(1, steps // 10)):
        print(f"step {step:4d}, loss {losses[step]:.3f}")
    for name, ours in (("xlstm, vanilla", False), ("gpu_rnn", True)):
        begin = time.perf_counter()
        train(5, ours)
        print(f"{name}: {(time.perf_counter() - begin) / 5 * 1000:.0f} ms a training step")
