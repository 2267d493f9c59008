"""The demo: a character-level LSTM language model, trained on real text on the spot, and a look inside it.

check   gpu_rnn.LSTM against torch.nn.LSTM on the same weights: the largest difference, both speeds
train   for a given time, on streams of text whose state goes on from batch to batch
write   a sample of text, character by character
draw    the loss curve, and every gate while a line is read
"""

import math
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from sysconfig import get_path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..core.optional_imports import require
from ..nn.layers import LSTM
from .explain import explain
from .inspect import inspect

T, B, I, H = 64, 32, 64, 128  # time steps, streams, embedded and hidden size
LARGEST_TEXT = 1 << 24  # characters; there is no time to read more
ALPHABET = 128
RARE = "\N{REPLACEMENT CHARACTER}"  # stands for every character outside the alphabet
LEARNING_RATE = 3e-3
TEMPERATURE = 0.7
SAMPLE = 500  # characters
COMPARED_S = 3.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}  # of the largest value; gradients of weights sum over T*B


class TextError(ValueError):
    """A text that nothing can be learned from; the message says why."""


def run(path: Path | None, seconds: float, out: Path, console: Console) -> list[float]:
    """The whole demo, on the GPU if torch sees one. -> the loss of every step. TextError: not with this text."""
    started = perf_counter()
    require("matplotlib", "the demo")
    text = Text.read(path)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say = partial(console.out, highlight=False)  # as it is: no markup, no wrapping

    console.rule("gpu_rnn.LSTM against torch.nn.LSTM on the same weights")
    check(device, say)

    console.rule("training")
    torch.manual_seed(0)
    model = Model(len(text.alphabet)).to(device)
    say(f"{text.source}: {len(text.codes):,} characters, {len(text.alphabet)} different ones")
    say(str(explain(model.lstm, (T, B, I))))
    losses = train(model, text, seconds, console)

    console.rule(f"what it writes, at temperature {TEMPERATURE}")
    for character in model.write(text, SAMPLE):
        say(character, end="")
    say("")

    console.rule("what happens inside")
    line = text.line()
    draw_loss(losses, text, out / "loss.png")
    draw_gates(model, text, line, out / "gates.png")
    say(f"{out / 'loss.png'}   the loss of every step")
    say(f"{out / 'gates.png'}  the gates while it reads {text.characters[line]!r}")
    say(f"{perf_counter() - started:.0f} seconds in all")
    return losses


# ---- text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    source: str
    characters: str
    alphabet: str
    codes: Tensor  # [characters] the place of each in the alphabet

    @classmethod
    def read(cls, path: Path | None) -> "Text":
        """A UTF-8 file, or for None the sources of Python's own standard library."""
        if path is None:
            folder = Path(get_path("stdlib"))
            source, characters = "Python's standard library", "".join(map(program, sorted(folder.glob("*.py"))))
        else:
            try:
                with path.open(encoding="utf-8") as file:
                    source, characters = str(path), file.read(LARGEST_TEXT)
            except UnicodeDecodeError as error:
                raise TextError(f"{path} is not UTF-8 text: {error}") from error
        if len(characters) < B * (T + 1):
            raise TextError(f"{source} has {len(characters)} characters; one batch alone takes {B * (T + 1)}")
        counted = Counter(characters)
        readable = [c for c in counted if c != RARE and (c.isprintable() or c in "\n\t")]  # nothing a terminal obeys
        alphabet = RARE + "".join(sorted(sorted(readable, key=counted.__getitem__)[1 - ALPHABET :]))
        code = {character: k for k, character in enumerate(alphabet)}
        return cls(source, characters, alphabet, torch.tensor([code.get(c, 0) for c in characters]))

    def batches(self) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """Without end: whether the streams begin anew, characters [T, B], and those that follow each of them [T, B]."""
        streams = self.codes[: len(self.codes) // B * B].view(B, -1).t()
        while True:
            for start in range(0, len(streams) - T, T):
                yield start == 0, streams[start : start + T], streams[start + 1 : start + 1 + T]

    def entropy(self) -> float:
        """The loss of knowing how frequent each character is and nothing else, in nats."""
        return float(torch.special.entr(torch.bincount(self.codes) / len(self.codes)).sum())

    def line(self) -> slice:
        """Where a line that suits a figure stands, far into the text."""
        start = len(self.characters) * 9 // 10
        for line in self.characters[start:].splitlines(keepends=True):
            if 40 <= len(line) <= 64 and not line[0].isspace():
                return slice(start, start + len(line))
            start += len(line)
        return slice(len(self.characters) - 60, len(self.characters))


def program(path: Path) -> str:
    with tokenize.open(path) as file:  # in the encoding that the program declares
        return file.read()


# ---- model ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """What comes next? codes [T, B] -> scores [T, B, characters of the alphabet], and the state after them."""

    def __init__(self, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, I)
        self.lstm = LSTM(I, H)
        self.scores = nn.Linear(H, characters)

    def forward(self, codes: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        y, state = self.lstm(self.embedding(codes), state)
        return self.scores(y), state

    @torch.no_grad()
    def write(self, text: Text, length: int) -> Iterator[str]:
        """Draw a character from what is expected, read it, expect the next one."""
        first = max(text.alphabet.find("\n"), 0)
        code, state = torch.tensor([[first]], device=self.scores.weight.device), None
        for _ in range(length):
            scores, state = self(code, state)
            scores[..., 0] = -math.inf  # not RARE
            code = torch.multinomial(torch.softmax(scores[0] / TEMPERATURE, -1), 1)
            yield text.alphabet[int(code)]


def train(model: Model, text: Text, seconds: float, console: Console) -> list[float]:
    """Adam, a batch at a time: the state goes on from batch to batch, gradients don't. -> the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    device = model.scores.weight.device
    losses: list[float] = []
    columns = (BarColumn(), TextColumn("step {task.fields[step]}, loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=1.0, step=0, loss=math.nan)
        started, reported = perf_counter(), 0
        state: tuple = ()
        for restart, codes, following in text.batches():
            scores, state = model(codes.to(device), None if restart else tuple(s.detach() for s in state))
            loss = cross_entropy(scores.flatten(0, 1), following.to(device).flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

            spent = min((perf_counter() - started) / seconds, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - 0.95 * spent)  # the time is the schedule
            recent = mean(losses[-25:])
            progress.update(bar, completed=spent, step=len(losses), loss=recent)
            if spent * 8 >= reported:  # lines that stay, for eyes and for files
                reported = int(spent * 8) + 1
                console.out(f"step {len(losses):5}, loss {recent:.3f}", highlight=False)
            if spent == 1:
                break
    read = len(losses) * T * B
    summary = f"{read:,} characters read, {read / len(text.codes):.2f} times the text; losses in nats per character"
    console.out(summary, highlight=False)
    return losses


# ---- against torch.nn -----------------------------------------------------------------------------------------------


def check(device: torch.device, say: Callable) -> None:
    """RuntimeError: the two differ by more than rounding."""
    torch.manual_seed(1)
    differences = []
    for dtype, tolerance in TOLERANCE.items():
        theirs, ours = (kind(I, H, device=device, dtype=dtype) for kind in (nn.LSTM, LSTM))
        ours.load_state_dict(theirs.state_dict())
        x, h0, c0 = (torch.randn(n, B, size, device=device, dtype=dtype) for n, size in ((T, I), (1, H), (1, H)))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            actual, expected = everything(ours, x, h0, c0), everything(theirs, x, h0, c0)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))
        differences.append(f"{difference:.1e} in {str(dtype).removeprefix('torch.')}")
        if not difference <= tolerance:
            raise RuntimeError(f"gpu_rnn.LSTM differs from torch.nn.LSTM by {differences[-1]}")
    say(f"T={T} B={B} I={I} H={H} on {device}; outputs, last states and all gradients")
    say(f"largest difference, relative to the largest value: {', '.join(differences)}")
    ours_ms, theirs_ms = alternating(lambda: everything(ours, x, h0, c0), lambda: everything(theirs, x, h0, c0))
    say(
        f"forward and backward, float32: gpu_rnn {ours_ms:.2f} ms, torch.nn {theirs_ms:.2f} ms "
        f"({theirs_ms / ours_ms:.2f} times as fast)"
    )


def everything(layer: nn.Module, x: Tensor, h0: Tensor, c0: Tensor) -> list[Tensor]:
    """Outputs, last states, and the gradients of all inputs and weights."""
    inputs = [tensor.requires_grad_() for tensor in (x, h0, c0)]
    y, (hT, cT) = layer(x, (h0, c0))
    loss = (y * y).sum() + (hT * cT).sum()
    outputs = [tensor.detach() for tensor in (y, hT, cT)]
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *layer.parameters()])]


def alternating(*calls: Callable) -> list[float]:
    """The median time of each call in ms, taken in turn, so that what slows the machine slows all of them."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[list[float]] = [[] for _ in calls]
    stop = perf_counter() + COMPARED_S
    while perf_counter() < stop or len(times[0]) < 3:
        for call, taken in zip(calls, times):
            synchronize()
            start = perf_counter()
            call()
            synchronize()
            taken.append(1e3 * (perf_counter() - start))
    return [median(taken) for taken in times]


# ---- figures --------------------------------------------------------------------------------------------------------


def draw_loss(losses: list[float], text: Text, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = max(1, len(losses) // 50)
    smooth = torch.tensor(losses).unfold(0, width, 1).mean(-1)
    axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(range(width // 2, width // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {width} steps")
    axes.axhline(
        text.entropy(), color="gray", linestyle="--", linewidth=1, label="knowing only each character's frequency"
    )
    axes.set(xlabel="step", ylabel="loss, nats per character", xlim=(0, len(losses)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def draw_gates(model: Model, text: Text, line: slice, path: Path) -> None:
    codes = text.codes[max(0, line.start - 500) : line.stop, None].to(model.scores.weight.device)
    before, read = codes.split([len(codes) - line.stop + line.start, line.stop - line.start])
    _, state = model(before)  # as if it had read up to here
    inside = inspect(model.lstm, model.embedding(read), state)
    inside.plot(path, units=24, labels=text.characters[line])
