"""A trained LSTM behind a websocket: clients come and go, all that are waiting are computed in one call.

    python examples/serve_streaming.py train model.pt
    python examples/serve_streaming.py serve model.pt --port 8000
    python examples/serve_streaming.py load --clients 64 --url ws://127.0.0.1:8000/stream

A client sends binary messages of float32, [n, FEATURES] with n = 1 .. STEPS time steps, and gets as many back, for each
message one, computed from all that it has sent before. The text "reset" begins a new sequence. Any other message is
answered by a text that says what is wrong with it, and leaves the client's state as it was.

The states of all clients lie in one table. What arrives within `--budget` milliseconds becomes one call: the rows of
these clients are taken from the table, `lengths` says how many time steps each of them has sent, `reset` which begin a
sequence. `serve --layers torch` calls torch.nn.LSTM for each client instead; examples/README.md compares the two.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from time import perf_counter
from typing import NamedTuple

import click
import numpy as np
import torch
import uvicorn
import websockets
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import pad_sequence

import gpu_rnn

FEATURES, HIDDEN, LAYERS = 16, 256, 2
STEPS = 16  # time steps in a message, at most: a call takes as long as the longest of its messages
INTERNAL_ERROR, TRY_AGAIN_LATER = 1011, 1013  # of RFC 6455's registry


class Denoiser(nn.Module):
    """Noisy frames of a signal [T, B, FEATURES] -> the frames without noise, each from those up to it; the states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, HIDDEN, LAYERS)
        self.head = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, **modifiers: Tensor) -> tuple:
        y, hx = self.rnn(x, hx, **modifiers)
        return self.head(y), hx


def signals(T: int, B: int) -> Tensor:
    """[T, B, FEATURES]: sines of random frequencies and phases, in frames."""
    t = torch.arange(T * FEATURES)[:, None]
    return torch.sin((0.02 + 0.2 * torch.rand(B)) * t + 6.3 * torch.rand(B)).unflatten(0, (T, FEATURES)).mT


def fit(model: Denoiser, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        clean = signals(T=32, B=16)
        loss = mse_loss(model(clean + 0.5 * torch.randn_like(clean))[0], clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- the computation ------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a client has sent: x [n, FEATURES]. slot: its row of the states; fresh: whether it begins a sequence."""

    slot: int
    x: Tensor
    fresh: bool


class Together:
    """All requests in one call of the model with gpu_rnn's layers."""

    def __init__(self, model: Denoiser, slots: int) -> None:
        self.model = gpu_rnn.replace_(model)
        self.states = [torch.zeros(LAYERS, slots, HIDDEN) for _ in "hc"]

    @torch.inference_mode()
    def __call__(self, requests: list[Request]) -> list[Tensor]:
        """-> for each request its y [n, FEATURES]"""
        slots, steps = torch.tensor([r.slot for r in requests]), [len(r.x) for r in requests]
        x = pad_sequence([r.x for r in requests])  # [T, B, FEATURES]
        modifiers = {}  # each costs something, so only where there is anything to say
        if min(steps) < len(x):
            modifiers["lengths"] = torch.tensor(steps)
        if any(r.fresh for r in requests):
            modifiers["reset"] = torch.zeros(x.shape[:2], dtype=torch.bool)
            modifiers["reset"][0] = torch.tensor([r.fresh for r in requests])
        y, after = self.model(x, tuple(state[:, slots] for state in self.states), **modifiers)
        for state, new in zip(self.states, after, strict=True):
            state[:, slots] = new
        return [y[:n, k] for k, n in enumerate(steps)]


class OneByOne:
    """One call of torch.nn.LSTM per request."""

    def __init__(self, model: Denoiser, slots: int) -> None:
        self.model, self.states = model, [None] * slots

    @torch.inference_mode()
    def __call__(self, requests: list[Request]) -> list[Tensor]:
        answers = []
        for slot, x, fresh in requests:
            y, self.states[slot] = self.model(x, None if fresh else self.states[slot])
            answers.append(y)
        return answers


WAYS = {"gpu_rnn": Together, "torch": OneByOne}


class Batcher:
    """Collects requests and computes them together."""

    def __init__(self, compute: Callable[[list[Request]], list[Tensor]], slots: int, budget: float) -> None:
        """budget: seconds that the first request of a call waits for others."""
        self.compute, self.slots, self.budget = compute, slots, budget
        self.free = list(range(slots))
        self.thread = ThreadPoolExecutor(1)  # while it computes, messages are read, which make the next batch
        self.queue: asyncio.Queue[tuple[Request, asyncio.Future[Tensor]]] = asyncio.Queue()

    async def answer(self, request: Request) -> Tensor:
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((request, answer))
        return await asyncio.shield(answer)  # shielded: it is set even if this handler is cancelled

    async def run(self) -> None:
        while True:
            batch = [await self.queue.get()]
            if len(self.free) < self.slots - 1:  # others are there
                await asyncio.sleep(self.budget)
            while not self.queue.empty():
                batch.append(self.queue.get_nowait())
            requests = [request for request, _ in batch]
            try:
                outputs = await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, requests)
            except Exception as error:  # closes the connections of these clients, not of others
                for _, answer in batch:
                    answer.set_exception(error)
            else:
                for (_, answer), y in zip(batch, outputs, strict=True):
                    answer.set_result(y)


# ---- the server -----------------------------------------------------------------------------------------------------


def decoded(message: dict) -> Tensor:
    """A message -> x [n, FEATURES]. Raises ValueError for anything else."""
    data, frame = message.get("bytes"), 4 * FEATURES
    if data is None:
        raise ValueError('expected a binary message, or the text "reset"; got another text')
    if len(data) % frame or not 0 < len(data) <= STEPS * frame:
        raise ValueError(
            f"expected float32 [n, {FEATURES}] with n = 1 .. {STEPS}, {frame} bytes for each n; got {len(data)} bytes"
        )
    x = np.frombuffer(data, "<f4").reshape(-1, FEATURES)
    if not np.isfinite(x).all():
        raise ValueError("expected finite numbers; got NaN or infinity")
    return torch.from_numpy(x.copy())


def application(compute: Callable[[list[Request]], list[Tensor]], slots: int, budget: float) -> FastAPI:
    batcher = Batcher(compute, slots, budget)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    def clients() -> dict[str, int]:
        return {"slots": slots, "free": len(batcher.free)}

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        if not batcher.free:
            await socket.close(TRY_AGAIN_LATER, f"all {slots} slots are taken; try again later")
            return
        slot, fresh = batcher.free.pop(), True
        try:
            while (message := await socket.receive())["type"] != "websocket.disconnect":
                if message.get("text") == "reset":
                    fresh = True
                    continue
                try:
                    x = decoded(message)
                except ValueError as error:
                    await socket.send_text(str(error))
                    continue
                try:
                    y = await batcher.answer(Request(slot, x, fresh))
                except Exception:
                    await socket.close(INTERNAL_ERROR, "the model failed")
                    raise  # into the server's log
                fresh = False
                await socket.send_bytes(y.numpy().astype("<f4").tobytes())
        except WebSocketDisconnect:
            pass  # it left before it had its answer
        finally:
            batcher.free.append(slot)  # nothing of it is waiting any more

    return app


# ---- the load -------------------------------------------------------------------------------------------------------


async def client(url: str, rate: float, life: float, begin: float, end: float) -> list[float]:
    """Send a frame `rate` times a second, for about `life` seconds; then leave, half of the times without a word, and
    come again -> latencies in seconds since `begin`, each from when the frame was due, not from when it was sent."""
    latencies = []
    frame = np.random.default_rng().standard_normal(FEATURES, "float32").tobytes()
    while perf_counter() < end:
        async with websockets.connect(url, compression=None) as socket:
            leaving = min(end, perf_counter() + random.expovariate(1 / life))
            due = perf_counter() + random.random() / rate
            while due < leaving and perf_counter() < end:
                await asyncio.sleep(due - perf_counter())
                await socket.send(frame)
                answer = await socket.recv()
                if len(answer) != len(frame):
                    raise RuntimeError(f"the server says: {answer!r}")
                if due > begin:
                    latencies.append(perf_counter() - due)
                due += 1 / rate
            if random.random() < 0.5:
                socket.transport.abort()
    return latencies


async def measure(url: str, clients: int, rate: float, seconds: float, life: float) -> list[float]:
    begin = perf_counter() + 2  # when all of them are there
    each = [client(url, rate, life, begin, begin + seconds) for _ in range(clients)]
    return [latency for latencies in await asyncio.gather(*each) for latency in latencies]


# ---- the command line -----------------------------------------------------------------------------------------------


@click.group(help=__doc__.partition("\n")[0])
def main() -> None:
    pass


@main.command()
@click.argument("path")
@click.option("--steps", default=300, show_default=True)
def train(path: str, steps: int) -> None:
    """Train with torch.nn.LSTM and save the weights."""
    torch.manual_seed(0)
    model = Denoiser()
    losses = fit(model, steps)
    torch.save(model.state_dict(), path)
    click.echo(f"mean squared error: {losses[0]:.3f} at first, {losses[-1]:.3f} at last; that of the noise is 0.250")


@main.command()
@click.argument("path")
@click.option("--port", default=8000, show_default=True)
@click.option("--slots", default=1024, show_default=True, help="clients at a time")
@click.option("--budget", default=2.0, show_default=True, help="milliseconds that a request waits for others")
@click.option("--layers", type=click.Choice([*WAYS]), default="gpu_rnn", show_default=True)
@click.option("--threads", default=1, show_default=True, help="of a matmul")
def serve(path: str, port: int, slots: int, budget: float, layers: str, threads: int) -> None:
    """Serve the trained model."""
    torch.set_num_threads(threads)
    model = Denoiser()
    model.load_state_dict(torch.load(path, weights_only=True))
    app = application(WAYS[layers](model.eval(), slots), slots, budget / 1000)
    limits = {"ws_max_size": 8 * STEPS * FEATURES, "ws_per_message_deflate": False}
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", **limits)


@main.command()
@click.option("--url", "urls", multiple=True, default=["ws://127.0.0.1:8000/stream"], show_default=True)
@click.option("--clients", multiple=True, type=int, default=[64], show_default=True)
@click.option("--rate", default=20.0, show_default=True, help="frames a second, of each client")
@click.option("--seconds", default=10.0, show_default=True, help="of each measurement")
@click.option("--rounds", default=1, show_default=True, help="measurements of each, in turn")
@click.option("--life", default=5.0, show_default=True, help="mean seconds until a client leaves, and comes again")
def load(urls: list[str], clients: list[int], rate: float, seconds: float, rounds: int, life: float) -> None:
    """Measure servers under load, in turn: latency from when a frame was due to its answer."""
    click.echo("| server | clients | answers per second | p50 ms | p99 ms |\n| --- | ---: | ---: | ---: | ---: |")
    for count in clients:
        for url in [*urls] * rounds:
            latencies = asyncio.run(measure(url, count, rate, seconds, life))
            p50, p99 = np.percentile(latencies, (50, 99)) * 1000
            click.echo(f"| {url} | {count} | {len(latencies) / seconds:.0f} | {p50:.1f} | {p99:.1f} |")


if __name__ == "__main__":
    main()
