"""A bidirectional tagger: sentences of different lengths, packed.

    python examples/tagger.py [--ours] [--compile]

The tag of a word is whether the same word occurs earlier, later, both or neither: it takes both directions.
"""

from collections.abc import Callable

import torch
from commandline import choice
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_sequence

B, WORDS, SIZE, TAGS, LONGEST = 16, 20, 32, 4, 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.rnn = nn.GRU(SIZE, SIZE, bidirectional=True)
        self.scores = nn.Linear(2 * SIZE, TAGS)

    def forward(self, words: PackedSequence) -> Tensor:
        """-> [words in all, TAGS], in the order of the packed words"""
        y, _ = self.rnn(PackedSequence(self.embedding(words.data), *words[1:]))
        return self.scores(y.data)


def tagged(sentence: list[int]) -> list[int]:
    return [2 * (word in sentence[:k]) + (word in sentence[k + 1 :]) for k, word in enumerate(sentence)]


def batch(step: int) -> tuple[PackedSequence, PackedSequence]:
    random = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, LONGEST + 1, (B,), generator=random).tolist()
    sentences = [torch.randint(WORDS, (n,), generator=random).tolist() for n in lengths]
    words = pack_sequence([torch.tensor(s) for s in sentences], enforce_sorted=False)
    return words, pack_sequence([torch.tensor(tagged(s)) for s in sentences], enforce_sorted=False)


def train(steps: int, prepare: Callable[[nn.Module], Callable] = lambda model: model) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    run = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        words, tags = batch(step)
        loss = cross_entropy(run(words), tags.data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(30, choice(__doc__)), sep="\n")
