"""Run functions in a process of their own, which may crash or hang: a result is lost then, and not the run.

The process lives on from call to call, because it takes seconds to start. It gets (name of a function, arguments)
through a pipe and calls function(emit, *arguments); what that emits comes back, {"begin": name} before anything that
could go wrong. A process that dies or is late is ended with all that it started, and a new one goes on without what it
was at.
"""

import atexit
import contextlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .problems import NN, Case

ROOT = Path(__file__).parents[1]
MEASURE, CEILINGS = "bench.timing:measure", "bench.timing:ceilings"
MOST_FAILURES = 3  # so many crashes or timeouts, and an implementation is left out of the rest of the run
SPIN = "24"  # for 2^24 cycles OpenBLAS's threads spin after a matmul, some ms; for 2^28 else, while a case waits
ALIVE: set[subprocess.Popen] = set()
OUT_OF_TIME = "out of time"
LAST_LINES = 3  # that are kept of what a process said before it ended
Row = dict[str, Any]


class WorkerDied(Exception):
    """The process is gone; how it went."""


class Worker:
    def __init__(self, threads: int | None = None, **env: str) -> None:
        self.threads, self.env = threads, dict(env)
        if threads is not None:
            names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
            self.env |= dict.fromkeys(names, str(threads)) | {"OPENBLAS_THREAD_TIMEOUT": SPIN}
        self.process: subprocess.Popen | None = None
        self.failures: Counter[str] = Counter()

    def measure(
        self, case: Case, names: tuple[str, ...], seconds: float, timeout: float, until: float = float("inf"),
        folder: str | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """One row for each implementation, as soon as it is known; none for those that aren't done by `until`.

        The process has `timeout` seconds for a case, and until `until`, of time.monotonic. `folder`: see `timing`.
        """
        left = [name for name in dict.fromkeys((NN, *names)) if self.failures[name] < MOST_FAILURES]
        for name in names:
            if name not in left:
                note = f"it crashed or hung {MOST_FAILURES} times"
                yield {"implementation": name, "status": "left out", "note": note}
        while left:
            at, end = "start", min(time.monotonic() + timeout, until)
            try:
                for message in self.run(MEASURE, case, left[:], seconds, folder, until=end):
                    at = message.get("begin", at)
                    if "row" in message:
                        left.remove(message["row"]["implementation"])
                        yield message["row"]
                return
            except (WorkerDied, TimeoutError) as error:
                if time.monotonic() >= until:
                    return
                status = "timed out" if isinstance(error, TimeoutError) else "crashed"
                # Without exact outputs nothing can be measured; and no row is lost that is known already
                failed = list(left) if at in ("start", "exact") else [at] * (at in left)
                for name in failed:
                    left.remove(name)
                    self.failures[name] += at == name
                    yield {"implementation": name, "status": status, "note": str(error)}

    def ceilings(self, device: str, timeout: float = 60) -> dict[str, Any]:
        (rates,) = self.run(CEILINGS, device, until=time.monotonic() + timeout)
        return rates

    def run(
        self, function: str, *args: Any, patience: float = float("inf"), until: float = float("inf")
    ) -> Iterator[dict[str, Any]]:
        """What "module:function"(emit, *args) emits. WorkerDied, or TimeoutError: nothing for `patience` seconds, or
        not done by `until`. A process whose messages are not all read is ended: the next call would get them."""
        done = False
        try:
            pipe = self.pipe if self.process else self.start()
            with contextlib.suppress(BrokenPipeError):  # it died between two calls: what is read says so
                pipe.send((function, args))
            while True:
                if not pipe.poll(max(0, min(patience, until - time.monotonic(), 1e6))):
                    how = OUT_OF_TIME if time.monotonic() >= until else f"nothing happened for {patience:g} s"
                    raise TimeoutError(self.with_stderr_tail(how))
                message = pipe.recv()
                if message is None:
                    done = True
                    return
                yield message
        except (EOFError, ConnectionError):
            assert self.process is not None
            code = self.process.wait(5)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise WorkerDied(self.with_stderr_tail(how)) from None
        finally:
            if not done:
                self.close()

    def start(self) -> Connection:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-m", "bench.worker", str(theirs.fileno()), str(self.threads or 0)]
        self.process = start(
            command, pass_fds=(theirs.fileno(),), cwd=ROOT, env=os.environ | self.env, stdin=subprocess.DEVNULL,
            stdout=self.said, stderr=self.said,
        )  # fmt: skip
        theirs.close()
        return self.pipe

    def with_stderr_tail(self, how: str) -> str:
        """How the process ended, and the last that it said: of a fatal signal where it was, else the last lines."""
        self.said.seek(0)
        lines = [line.strip()[:200] for line in self.said.read()[-20000:].splitlines() if line.strip()]
        fatal = [n for n, line in enumerate(lines) if line.startswith("Fatal Python error")]
        last = lines[fatal[-1] : fatal[-1] + LAST_LINES + 1] if fatal else lines[-LAST_LINES:]
        return f"{how}: {' | '.join(last)}" if last else how

    def close(self) -> None:
        if self.process is not None:
            end(self.process)
            self.pipe.close()
            self.said.close()
            self.process = None


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


# ---- long lists of checks -------------------------------------------------------------------------------------------


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


def run_checks(
    worker: Worker, function: str, *args: Any, journal: Journal, done: Journal | None = None, patience: float,
    until: float,
) -> str:  # fmt: skip
    """Run the checks of function(emit, done, *args) until each has its outcome, and keep that in the journal.

    `done` are the names of those that have one, here or in the other journal. A check in which the process dies or goes
    quiet has that as its outcome, and a new process goes on. Returns why not all have one, empty where they do.
    """
    try:
        while True:
            begun, known = None, [*journal.outcomes(), *(done.outcomes() if done else ())]
            try:
                for message in worker.run(function, known, *args, patience=patience, until=until):
                    journal.write(**message)
                    begun = message.get("begin")
                return ""
            except (WorkerDied, TimeoutError) as error:
                if time.monotonic() >= until:
                    return OUT_OF_TIME
                if begun is None:  # it can't even begin
                    return str(error)
                outcome = "hung" if isinstance(error, TimeoutError) else "crashed"
                journal.write(name=begun, outcome=outcome, seconds=patience, note=str(error))  # next time, late
    finally:
        worker.close()


# ---- the process ----------------------------------------------------------------------------------------------------


def main(descriptor: int, threads: int) -> None:
    pipe = Connection(descriptor)
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])  # also for code that counts cores
        import torch

        torch.set_num_threads(threads)
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            pkgutil.resolve_name(function)(pipe.send, *args)
            pipe.send(None)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
