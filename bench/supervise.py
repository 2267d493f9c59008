"""Processes that may crash or hang: started, watched, and ended in time, with all that they started.

A long list of checks runs in one process, because starting one takes seconds. The process writes a journal, a line
before and a line after each check. Dies it or goes quiet, then the check it was at has that as its outcome, and a new
process goes on with those that have none.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ALIVE: set[subprocess.Popen] = set()
OUT_OF_TIME = "out of time"
WORDS = 3  # lines that are kept of what a process said before it ended


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process in a session of its own: Ctrl-C is its parent's, and it can be ended with everything it started."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    ALIVE.add(process)
    return process


def end(process: subprocess.Popen) -> None:
    """At once. One that hangs in the driver is left behind after a few seconds."""
    ALIVE.discard(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


@atexit.register
def end_all() -> None:
    for process in list(ALIVE):
        end(process)


def death(process: subprocess.Popen) -> str:
    """How a process went, in a word or two."""
    code = process.wait(5)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def told(how: str, said: IO[str]) -> str:
    """How a process went, and why, by the last that it said: of a fatal signal where it was, else the last lines."""
    said.seek(0)
    lines = [line.strip()[:200] for line in said.read()[-20000:].splitlines() if line.strip()]
    fatal = [n for n, line in enumerate(lines) if line.startswith("Fatal Python error")]
    last = lines[fatal[-1] : fatal[-1] + WORDS + 1] if fatal else lines[-WORDS:]
    return f"{how}: {' | '.join(last)}" if last else how


class Journal:
    """Lines of JSON: {"begin": name}, then {"name", "outcome", "seconds", "note"}. Outcome: passed, failed, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """The last outcome of each."""
        return {line["name"]: line for line in self.lines() if "outcome" in line}

    def open(self) -> str | None:
        """What was begun and has no outcome."""
        lines = self.lines()
        return lines[-1]["begin"] if lines and "begin" in lines[-1] else None


def supervise(
    command: list[str], journal: Journal, patience: float, until: float, fine: tuple[int, ...] = (0,), **options: Any
) -> str | None:
    """Run `command` until every check has its outcome; None, or why not all have.

    The command is to skip what the journal has an outcome for, and to end with an exit status in `fine`. `patience`:
    seconds without a new line before it counts as hung. `until`: a time of time.monotonic. What a process said before
    it was cut short is in the note of the check that it was at, or in what is returned.
    """
    while True:
        with tempfile.TemporaryFile("w+") as said:
            process = start(command, stdout=said, stderr=said, **options)
            reason = watch(process, journal, patience, until)
            outcome = "hung" if reason else "crashed"
            note = reason or death(process)
            end(process)
            if reason == OUT_OF_TIME:
                return reason
            note = told(note, said)
        at = journal.open()
        if at is None:  # nothing was cut short: it came to its end, or can't even begin
            return None if not reason and process.returncode in fine else note
        journal.write(name=at, outcome=outcome, seconds=patience, note=note)  # next time, late


def watch(process: subprocess.Popen, journal: Journal, patience: float, until: float) -> str:
    """Wait for its end, or say why not any longer."""
    size, seen = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        grown = journal.path.stat().st_size if journal.path.exists() else 0
        if grown != size:
            size, seen = grown, now
        if now > until:
            return OUT_OF_TIME
        if now - seen > patience:
            return f"nothing happened for {patience:.0f} s"
    return ""
