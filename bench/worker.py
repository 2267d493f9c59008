"""Cases run in a process of their own, so that a crash or a hung kernel costs one row.

The process reads a case per line and answers in lines: {"doing": name} before anything that could go wrong,
{"row": ...}, and {"done": true}. Whoever dies or is late is left out, and the case starts again without it. The
process lives on from case to case, because it takes seconds to start.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from . import supervise
from .problems import NN, Case

STRIKES = 3  # so many crashes or timeouts, and a contender is out for the rest of the run
SPIN = "24"  # for 2^24 cycles OpenBLAS's threads spin after a product, some ms; for 2^28 else, while a case waits
Row = dict[str, Any]


class Worker:
    def __init__(self, threads: int | None = None, command: list[str] | None = None) -> None:
        self.threads = threads
        self.command = command or [sys.executable, "-m", "bench.worker", str(threads or 0)]
        self.process: subprocess.Popen | None = None
        self.strikes: dict[str, int] = {}

    def measure(
        self, case: Case, contenders: tuple[str, ...], seconds: float, timeout: float, until: float = float("inf"),
        answers: str | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """One row for each contender, as soon as it is known; none for who isn't done by `until`.

        A process is given `timeout` seconds for a case, and none runs after `until`, a time of time.monotonic.
        `answers`: see `timing.measure`.
        """
        left = [name for name in dict.fromkeys((NN, *contenders)) if self.strikes.get(name, 0) < STRIKES]
        for name in contenders:
            if name not in left:
                yield {"contender": name, "status": "left out", "note": f"it crashed or hung {STRIKES} times"}
        while left:
            doing, end = "start", min(time.monotonic() + timeout, until)
            try:
                question = {"case": case.asdict(), "contenders": left, "seconds": seconds, "answers": answers}
                for message in self.ask(question, end):
                    doing = message.get("doing", doing)
                    if "row" in message:
                        left.remove(message["row"]["contender"])
                        yield message["row"]
                return
            except (Died, TimeoutError) as error:
                if time.monotonic() >= until:
                    return
                status = "timed out" if isinstance(error, TimeoutError) else "crashed"
                # Without data there is no measuring; and nobody is to blame who has its row already.
                guilty = list(left) if doing in ("start", "oracle") else [doing] * (doing in left)
                for name in guilty:
                    left.remove(name)
                    self.strikes[name] = self.strikes.get(name, 0) + (doing == name)
                    yield {"contender": name, "status": status, "note": str(error)}

    def ceilings(self, device: str, timeout: float = 60) -> dict[str, Any]:
        (answer,) = self.ask({"ceilings": device}, time.monotonic() + timeout)
        return answer

    def ask(self, question: dict[str, Any], end: float) -> Iterator[dict[str, Any]]:
        """Yield all answers. End the process if one is late or isn't read: the next question would be given it."""
        try:
            yield from self.answers(question, end)
        except BaseException:  # GeneratorExit, too: of a caller that went away
            self.close()
            raise

    def answers(self, question: dict[str, Any], end: float) -> Iterator[dict[str, Any]]:
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died between two cases: the answer will be that it did
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        while True:
            try:
                line = self.lines.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                raise TimeoutError("no answer in the time given") from None
            if line is None:
                raise Died(self.last_words())
            message = json.loads(line)
            if "done" in message:
                return
            yield message

    def start(self) -> None:
        environment = dict(os.environ)
        if self.threads is not None:
            names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
            environment |= dict.fromkeys(names, str(self.threads))
            environment["OPENBLAS_THREAD_TIMEOUT"] = SPIN
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = supervise.start(
            self.command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
        )  # fmt: skip
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=pump, args=(self.process.stdout, self.lines), daemon=True).start()

    def last_words(self) -> str:
        assert self.process is not None
        return supervise.told(supervise.death(self.process), self.errors)

    def close(self) -> None:
        if self.process is not None:
            supervise.end(self.process)
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):  # a question that it didn't live to read
                self.process.stdin.close()
            self.errors.close()
            self.process = None


class Died(Exception):
    """The process is gone; how it went."""


def pump(source: Any, lines: queue.SimpleQueue) -> None:
    with source:
        for line in source:
            lines.put(line)
    lines.put(None)


# ---- the process ----------------------------------------------------------------------------------------------------


def main(threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer

    def emit(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    import torch

    from . import timing

    if threads:
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[-threads:])  # also for those who make threads by the number of cores
        torch.set_num_threads(threads)
    for line in sys.stdin:
        question = json.loads(line)
        if "ceilings" in question:
            emit(timing.ceilings(question["ceilings"]))
        else:
            case = Case(**question["case"])
            timing.measure(case, question["contenders"], question["seconds"], emit, question["answers"])
            if case.device == "cuda":
                torch.cuda.synchronize()  # after an illegal access this raises, and a new process takes over
                torch.cuda.empty_cache()
        emit({"done": True})


if __name__ == "__main__":
    main(int(sys.argv[1]))
