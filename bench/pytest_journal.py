"""Tests in a worker: fastest first, each outcome emitted, those that have one left out; see `worker.run_checks`."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest


def run(
    emit: Callable[[dict[str, Any]], None], done: list[str], arguments: list[str], share: tuple[int, int],
    seconds: dict[str, float],
) -> None:  # fmt: skip
    """Run pytest with these arguments. share: (n, of how many) processes; seconds: what tests took before."""
    if (status := pytest.main(arguments, plugins=[Plugin(emit, done, share, seconds)])) not in (0, 1, 5):
        sys.exit(int(status))  # it is none of: all passed, some failed, none found


class Plugin:
    def __init__(self, emit: Callable, done: list[str], share: tuple[int, int], seconds: dict[str, float]) -> None:
        self.emit, self.done, self.share, self.seconds = emit, set(done), share, seconds
        self.began, self.bad, self.skipped = 0.0, "", False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """New tests first, every function's first case before the second of any: the time may end before the list."""
        seen: Counter[str] = Counter()
        turns = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            turns[item.nodeid] = seen[function]
            seen[function] += 1
        n, count = self.share
        items[:] = [item for k, item in enumerate(items) if k % count == n and item.nodeid not in self.done]
        items.sort(key=lambda item: (self.seconds.get(item.nodeid, 0), turns[item.nodeid]))  # stable otherwise

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.emit({"name": report.nodeid, "outcome": "failed", "seconds": 0, "note": shortened(report)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began, self.bad, self.skipped = time.monotonic(), "", False
        self.emit({"begin": nodeid})

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.bad = self.bad or (shortened(report) if report.failed else "")
        self.skipped = self.skipped or report.skipped
        if report.when == "teardown":
            if self.bad:
                leave_when_poisoned(self.bad)
            outcome = "failed" if self.bad else "skipped" if self.skipped else "passed"
            seconds = round(time.monotonic() - self.began, 3)
            self.emit({"name": report.nodeid, "outcome": outcome, "seconds": seconds, "note": self.bad})

    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        """Nothing on the screen: what is there last says why a process ended."""
        return "", "", ""


def shortened(report: Any) -> str:
    return " ".join(str(report.longrepr)[-600:].split()) or "failed"


def leave_when_poisoned(note: str) -> None:
    """After an illegal access or a trap every later call of this process fails: the test crashed, a new one goes on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"the GPU was lost: {note}", file=sys.stderr, flush=True)
            os._exit(1)
