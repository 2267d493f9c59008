"""examples/ppo_lstm.py: one call over many episodes learns what the loops learn, from the states of acting."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("gymnasium")
from gymnasium.utils.env_checker import check_env

FILE = Path(__file__).parents[1] / "examples" / "ppo_lstm.py"
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def ppo(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield importlib.import_module(FILE.stem)
    torch.set_default_dtype(torch.float32)


def test_the_world(ppo):
    world = ppo.Recall()
    check_env(world, skip_render_check=True)
    waits = set()
    for episode in range(100):
        sights, done = [world.reset()[0]], False
        while not done:
            question, action = sights[-1][ppo.QUESTION], (world.sign + episode) % ppo.SIGNS
            sight, paid, done, cut, _ = world.step(action)
            sights.append(sight)
            assert (done, cut, paid) == (question, False, question and action == world.sign)
        waits.add(len(sights) - 2)
        assert [sight.argmax() for sight in sights if sight.any()] == [world.sign, ppo.QUESTION]
    assert waits == {*range(ppo.DELAY[0], ppo.DELAY[1] + 1)}


@pytest.mark.parametrize("way", ["CallPerInstant", "CallPerEnd"])
def test_the_gradients_are_those_of_the_loops(ppo, way):
    model = ppo.Model()
    _, rollout = ppo.train(2, model)  # the second rollout begins in the middle of episodes
    assert 0 < rollout.reset[0].sum() < ppo.B
    assert rollout.reset.any(0).all()
    assert rollout.state[0].any()
    loop = ppo.Model(getattr(ppo, way))
    loop.load_state_dict(model.state_dict())
    model.zero_grad()

    def learned(model):
        state = tuple(s.clone().requires_grad_() for s in rollout.state)
        loss = ppo.loss(model, rollout._replace(state=state))
        loss.backward()
        return loss, [tensor.grad for tensor in (*state, *model.parameters())]

    assert_close(learned(model), learned(loop), **CLOSE)


def test_acting_and_learning_have_the_same_states(ppo):
    model, acted = ppo.Model(), []
    living = ppo.rollouts(model)
    next(living)
    with model.lstm.register_forward_hook(lambda *call: acted.append(call[-1][1])):
        rollout = next(living)
    _, _, learned = model.lstm(rollout.seen, rollout.state, reset=rollout.reset, return_states=True)
    for acting, learning in zip(zip(*acted[: ppo.T]), learned):
        assert_close(torch.stack(acting, 1), learning, **CLOSE)
    policy, _, after = model(rollout.seen, rollout.state, rollout.reset)
    assert_close(policy.log_prob(rollout.action), rollout.chance, **CLOSE)
    assert_close(after, next(living).state, **CLOSE)


def test_reset_marks_the_first_time_step_of_each_episode(ppo):
    rollout = next(ppo.rollouts(ppo.Model()))
    assert torch.equal(rollout.reset, rollout.seen[..., : ppo.SIGNS].any(-1))


def test_advantages(ppo):
    T, B = 7, 3
    paid, value, done = torch.rand(T, B), torch.rand(T + 1, B), torch.rand(T, B) < 0.3
    expected = torch.zeros(T, B)
    for t in range(T):
        weight = torch.ones(B)
        for s in range(t, T):
            expected[t] += weight * (paid[s] + ppo.DISCOUNT * ~done[s] * value[s + 1] - value[s])
            weight = weight * ppo.DISCOUNT * ppo.TRACE * ~done[s]
    assert_close(ppo.advantages(paid, value, done), expected)


def test_the_forgetful_cannot_remember(ppo):
    """What it does at the question is independent of the sign; a memory's is not."""
    seen = torch.as_tensor(ppo.sight([[0, 1], [ppo.NOTHING, ppo.NOTHING], [ppo.QUESTION, ppo.QUESTION]])).double()
    state, reset = (torch.zeros(1, 2, ppo.SIZE),) * 2, torch.tensor([[True], [False], [False]]).expand(3, 2)
    for forgetful in (True, False):
        policy, _, _ = ppo.Model(forgetful=forgetful)(seen, state, reset)
        assert torch.equal(policy.logits[2, 0], policy.logits[2, 1]) is forgetful


@pytest.mark.parametrize("memory", ["lstm", "none"])
def test_the_choice_of_memory(ppo, memory, monkeypatch):
    compared = []
    monkeypatch.setattr(ppo, "compare", lambda model, rollout: compared.append(model.forgetful))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # or the tests that follow would have one
    ppo.main(["--memory", memory, "--updates", "1", "--device", "cpu"], standalone_mode=False)
    assert compared == [memory == "none"]


def test_the_command_line():
    command = [sys.executable, FILE, "--updates", "2", "--device", "cpu"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert re.fullmatch(r"update   2: an episode is paid 0\.\d\d", lines[0])
    assert re.fullmatch(r"a training pass over 128 time steps of 16 environments, where \d+ episodes begin:", lines[1])
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["one call", "a call per step", "a call per end"]
    assert all(re.search(r": +\d+\.\d\d ms, +\d+\.\d\d times as fast$", line) for line in lines[2:])
