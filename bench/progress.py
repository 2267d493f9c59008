"""How far a run is and how long it still takes: a bar where rich is installed, else now and then a line."""

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Counts work, not cases: a large case is worth many small ones. A unit of work is to take about a second."""

    def __init__(self, work: float) -> None:
        self.work, self.done, self.began = work, 0.0, time.monotonic()
        self.said = self.began
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            self.bar = progress.Progress(
                progress.BarColumn(), progress.TaskProgressColumn(), progress.TimeRemainingColumn(),
                progress.TextColumn("left  {task.description}", markup=False), console=Console(stderr=True),
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.work)
            self.bar.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.__exit__(kind, error, trace)

    @property
    def pace(self) -> float:
        """Seconds for a unit of work, as found so far."""
        return (time.monotonic() - self.began) / self.done if self.done else 1.0

    def doing(self, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def did(self, work: float) -> None:
        self.done += work
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif time.monotonic() - self.said > 20:
            self.said = time.monotonic()
            spent, left = self.said - self.began, self.pace * (self.work - self.done)
            print(f"[{100 * self.done / self.work:.0f} %] {spent:.0f} s, about {left:.0f} s left", flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
