"""A word-level language model with tied weights and dropout, after PyTorch's example of that name.

    python examples/word_language_model.py [--ours] [--compile]

prints the same losses with and without `--ours`: gpu_rnn's layers instead of torch.nn's.
"""

from collections.abc import Callable

import torch
from commandline import choice
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

T, B, WORDS, SIZE = 20, 8, 50, 32  # time steps, streams, vocabulary, embedded and hidden size


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(WORDS, SIZE)
        self.rnn = nn.LSTM(SIZE, SIZE, num_layers=2, dropout=0.2)
        self.decoder = nn.Linear(SIZE, WORDS)
        self.decoder.weight = self.encoder.weight  # tied, as in the original

    def forward(self, words: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.rnn(self.drop(self.encoder(words)), state)
        return self.decoder(self.drop(y)), state


def text(length: int) -> Tensor:
    """[length, B] words, each one or two after the word before: something to learn."""
    steps = torch.randint(1, 3, (length, B), generator=torch.Generator().manual_seed(1))
    return steps.cumsum(0) % WORDS


def train(steps: int, prepare: Callable[[nn.Module], Callable] = lambda model: model) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    run = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    words, losses = text(steps * T + 1), []
    state = tuple(torch.zeros(2, B, SIZE) for _ in range(2))
    for start in range(0, steps * T, T):
        scores, state = run(words[start : start + T], tuple(s.detach() for s in state))
        loss = cross_entropy(scores.flatten(0, 1), words[start + 1 : start + 1 + T].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(30, choice(__doc__)), sep="\n")
