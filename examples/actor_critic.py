"""Actor-critic with memory: an LSTMCell that acts in turn, and learns from what came of it.

    python examples/actor_critic.py [--ours] [--compile]

The world shows one of four signs, then nothing for some time steps; the action at the end that names the sign is paid.
"""

from collections.abc import Callable

import torch
from commandline import choice
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import one_hot, smooth_l1_loss

B, SIGNS, SIZE, WAIT, DISCOUNT = 16, 4, 32, 4, 0.95


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(SIGNS, SIZE)
        self.actor, self.critic = nn.Linear(SIZE, SIGNS), nn.Linear(SIZE, 1)

    def forward(self, seen: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        h, c = self.cell(seen, state)
        return self.actor(h), self.critic(h).squeeze(-1), (h, c)


def train(steps: int, prepare: Callable[[nn.Module], Callable] = lambda model: model) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    run = prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        signs = torch.randint(SIGNS, (B,))
        shown = one_hot(signs, SIGNS).to(model.actor.weight.dtype)
        state = (torch.zeros(B, SIZE), torch.zeros(B, SIZE))
        values, chances = [], []
        for t in range(WAIT):
            scores, value, state = run(shown if t == 0 else torch.zeros_like(shown), state)
            policy = Categorical(logits=scores)
            action = policy.sample()
            values.append(value)
            chances.append(policy.log_prob(action))
        paid = (action == signs).to(value.dtype)
        loss = torch.zeros(())
        for t, (value, chance) in enumerate(zip(values, chances)):
            worth = paid * DISCOUNT ** (WAIT - 1 - t)
            loss = loss - (chance * (worth - value.detach())).mean() + smooth_l1_loss(value, worth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(30, choice(__doc__)), sep="\n")
