"""examples/serve_streaming.py, by real websocket clients: each gets what torch.nn computes of all that it has sent."""

import asyncio
import importlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

for needed in ("fastapi", "uvicorn", "websockets", "click"):
    pytest.importorskip(needed)
import uvicorn
import websockets

from tests.tolerance import assert_close

FILE = Path(__file__).parents[1] / "examples" / "serve_streaming.py"


@pytest.fixture
def serving(monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    module = importlib.import_module(FILE.stem)
    monkeypatch.setattr(module, "HIDDEN", 8)
    torch.manual_seed(0)
    return module


@contextmanager
def served(app):
    """-> the url"""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/stream"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def service(serving, slots=16, budget=0.002, way="gpu_rnn"):
    """-> the url, a model of torch.nn with the same weights, and a list of the sizes of the calls"""
    peer, model, sizes = serving.Denoiser().eval(), serving.Denoiser().eval(), []
    model.load_state_dict(peer.state_dict())
    compute = serving.WAYS[way](model, slots)
    app = serving.application(lambda requests: sizes.append(len(requests)) or compute(requests), slots, budget)
    with served(app) as url:
        yield url, peer, sizes


async def ask(client, x):
    """-> y [n, FEATURES]"""
    await client.send(x.astype("<f4").tobytes())
    answer = await asyncio.wait_for(client.recv(), 20)
    assert isinstance(answer, bytes), answer
    return np.frombuffer(answer, "<f4").reshape(x.shape)


def check(peer, frames, outputs, label=""):
    x = torch.from_numpy(np.concatenate(frames))[:, None]
    with torch.no_grad():
        same = peer(x)[0][:, 0].double().numpy()
        exact = peer.double()(x.double())[0][:, 0].numpy()
    peer.float()
    assert_close(np.concatenate(outputs).astype("float64"), exact, same, "float32", label)


def frames(rng, serving, *lengths):
    return [rng.standard_normal((n, serving.FEATURES), "float32") for n in lengths]


@pytest.mark.parametrize("way", ["gpu_rnn", "torch"])
def test_every_client_has_the_answers_to_its_own_sequence(serving, way):
    """Twelve at a time, with messages of different lengths, which leave and come again, half of the times abruptly."""

    async def come_and_go(url, seed):
        rng, runs = np.random.default_rng(seed), []
        for visit in range(3):
            sent = frames(rng, serving, *rng.integers(1, serving.STEPS + 1, size=rng.integers(2, 9)))
            async with websockets.connect(url) as client:
                runs.append((sent, [await ask(client, x) for x in sent]))
                if (seed + visit) % 2:
                    client.transport.abort()
        return runs

    async def everybody(url):
        return await asyncio.gather(*(come_and_go(url, seed) for seed in range(12)))

    with service(serving, way=way) as (url, peer, sizes):
        for seed, runs in enumerate(asyncio.run(everybody(url))):
            for visit, run in enumerate(runs):
                check(peer, *run, label=f"client {seed}, visit {visit}")
    assert max(sizes) > 1


async def connect_to_a_free_slot(url):
    """The server learns a little later that a client has left."""
    for _ in range(200):
        client = await websockets.connect(url)
        try:
            await asyncio.wait_for(client.recv(), 0.05)
        except TimeoutError:
            return client
        except websockets.ConnectionClosed:
            await asyncio.sleep(0.02)
    raise AssertionError("no slot came free")


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_reused_slot_begins_with_zero_states(serving, rng, abrupt):
    first, second = frames(rng, serving, 3, 1, 2), frames(rng, serving, 1, 4)

    async def in_turn(url):
        async with websockets.connect(url) as client:
            outputs = [await ask(client, x) for x in first]
            async with websockets.connect(url) as other:
                with pytest.raises(websockets.ConnectionClosed, match=r"1013.*all 1 slots are taken; try again later"):
                    await ask(other, first[0])
            if abrupt:
                await client.send(first[0].tobytes())  # its answer will not be read
                client.transport.abort()
        client = await connect_to_a_free_slot(url)
        async with client:
            return outputs, [await ask(client, x) for x in second]

    with service(serving, slots=1) as (url, peer, _):
        outputs, again = asyncio.run(in_turn(url))
    check(peer, first, outputs)
    check(peer, second, again)


def test_a_client_begins_a_new_sequence(serving, rng):
    first, second, others = frames(rng, serving, 3, 1), frames(rng, serving, 1, 2), frames(rng, serving, 3, 1, 1, 2)

    async def both(url):
        async with websockets.connect(url) as client, websockets.connect(url) as other:
            outputs = []
            for k, (x, theirs) in enumerate(zip([*first, *second], others, strict=True)):
                if k == len(first):
                    await client.send("reset")
                outputs.append(await asyncio.gather(ask(client, x), ask(other, theirs)))
        return outputs

    with service(serving, budget=0.05) as (url, peer, sizes):
        outputs, theirs = zip(*asyncio.run(both(url)))
    assert 2 in sizes
    check(peer, first, outputs[:2])
    check(peer, second, outputs[2:])
    check(peer, others, theirs)


def test_bad_input_is_told_to_its_sender_alone(serving, rng):
    good, theirs = frames(rng, serving, 2, 1), frames(rng, serving, *[1] * 5)
    bad = {
        "hello": r'expected a binary message, or the text "reset"; got another text',
        b"": r"float32 \[n, 16\] with n = 1 \.\. 16, 64 bytes for each n; got 0 bytes",
        b"abc": r"float32 \[n, 16\] with n = 1 \.\. 16, 64 bytes for each n; got 3 bytes",
        bytes(64 * 17): r"float32 \[n, 16\] with n = 1 \.\. 16, 64 bytes for each n; got 1088 bytes",
        np.full(16, np.nan, "<f4").tobytes(): "expected finite numbers; got NaN or infinity",
    }

    async def both(url):
        async with websockets.connect(url) as client, websockets.connect(url) as other:
            outputs, others = [await ask(client, good[0])], []
            for (message, error), x in zip(bad.items(), theirs, strict=True):
                await client.send(message)
                others.append(await ask(other, x))
                assert re.search(error, await client.recv())
            return [*outputs, await ask(client, good[1])], others

    with service(serving) as (url, peer, _):
        outputs, others = asyncio.run(both(url))
    check(peer, good, outputs)
    check(peer, theirs, others)


def test_a_failing_call_closes_its_clients_and_no_others(serving, rng):
    def compute(requests):
        if any(r.x.abs().max() > 1e6 for r in requests):
            raise RuntimeError("out of memory")
        return [r.x for r in requests]

    async def both(url):
        async with websockets.connect(url) as client, websockets.connect(url) as other:
            x = rng.standard_normal((1, serving.FEATURES), "float32")
            with pytest.raises(websockets.ConnectionClosed, match=r"1011.*the model failed"):
                await ask(client, 1e9 * x)
            np.testing.assert_array_equal(await ask(other, x), x)

    with served(serving.application(compute, 2, 0)) as url:
        asyncio.run(both(url))


def test_training_learns(serving):
    losses = serving.fit(serving.Denoiser(), 30)
    assert losses[-1] < 0.9 * losses[0]


def run(*arguments):
    return [sys.executable, str(FILE), *map(str, arguments)]


def test_from_a_trained_model_to_a_measured_server(tmp_path):
    """The three commands, the server in a process of its own."""
    path = tmp_path / "model.pt"
    environment = {"cwd": FILE.parents[1], "env": os.environ | {"PYTHONPATH": "."}}
    said = subprocess.run(run("train", path, "--steps", 2), check=True, capture_output=True, text=True, **environment)
    assert "mean squared error" in said.stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(run("serve", path, "--port", port), **environment)
    try:
        for _ in range(600):
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        load = run("load", "--url", f"ws://127.0.0.1:{port}/stream", "--clients", 5, "--seconds", 3, "--life", 0.5)
        table = subprocess.run(load, check=True, capture_output=True, text=True, timeout=100, **environment).stdout
    finally:
        server.terminate()
        server.wait(20)
    row = re.search(r"\| ws://\S+ \| 5 \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", table)
    answers, p50, p99 = map(float, row.groups())
    assert 0 < answers < 110  # at most what the clients send; how many depends on the machine
    assert 0 < p50 <= p99
