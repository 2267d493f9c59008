"""Sequence to sequence: read digits, write them backwards, with teacher forcing.

python examples/seq2seq.py [--ours] [--compile]
"""

from collections.abc import Callable

import torch
from commandline import choice
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

T, B, SYMBOLS, SIZE = 8, 16, 11, 48  # the last symbol starts the answer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, SIZE)
        self.encoder = nn.LSTM(SIZE, SIZE, batch_first=True)
        self.decoder = nn.LSTM(SIZE, SIZE, batch_first=True)
        self.scores = nn.Linear(SIZE, SYMBOLS)

    def forward(self, question: Tensor, answer: Tensor) -> Tensor:
        """question [B, T], answer so far [B, T'] -> scores of the next symbol [B, T', SYMBOLS]"""
        _, state = self.encoder(self.embedding(question))
        y, _ = self.decoder(self.embedding(answer), state)
        return self.scores(y)


def train(steps: int, prepare: Callable[[nn.Module], Callable] = lambda model: model) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    run = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    random, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        question = torch.randint(SYMBOLS - 1, (B, T), generator=random)
        answer = question.flip(1)
        teacher = torch.cat([torch.full((B, 1), SYMBOLS - 1), answer[:, :-1]], 1)
        loss = cross_entropy(run(question, teacher).flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(30, choice(__doc__)), sep="\n")
