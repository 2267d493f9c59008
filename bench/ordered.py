"""A pytest plugin (`-p bench.ordered`): fastest first, each outcome in a journal, those that have one left out.

$BENCH_JOURNAL is the journal; $BENCH_DONE, one of tests that are done as well; $BENCH_EARLIER, older ones, separated by
colons, from which it knows what is fast. Of tests that it doesn't know every function's first case comes before the
second of any: the time may end before the list.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .supervise import Journal

SHARD, SHARDS = map(int, os.environ.get("BENCH_SHARD", "0/1").split("/"))  # one of several processes for the tests
JOURNAL = Journal(Path(os.environ.get("BENCH_JOURNAL", os.devnull)))
began: dict[str, float] = {}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    known: dict[str, float] = {}
    for path in filter(None, os.environ.get("BENCH_EARLIER", "").split(":")):
        known |= {name: line["seconds"] for name, line in Journal(Path(path)).outcomes().items()}
    done = JOURNAL.outcomes() | Journal(Path(os.environ.get("BENCH_DONE", os.devnull))).outcomes()
    met: Counter[str] = Counter()
    turns = {}
    for item in items:
        function, _, _ = item.nodeid.partition("[")
        turns[item.nodeid] = met[function]
        met[function] += 1
    items[:] = [item for n, item in enumerate(items) if n % SHARDS == SHARD and item.nodeid not in done]
    items.sort(key=lambda item: (known.get(item.nodeid, 0), turns[item.nodeid]))  # new ones first; stable otherwise


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        JOURNAL.write(name=report.nodeid, outcome="failed", seconds=0, note=shortened(report))


def pytest_runtest_logstart(nodeid: str) -> None:
    began[nodeid] = time.monotonic()
    JOURNAL.write(begin=nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    item.bad = getattr(item, "bad", None) or (report if report.failed else None)
    item.skipped = getattr(item, "skipped", False) or report.skipped
    if report.when != "teardown":
        return
    outcome = "failed" if item.bad else "skipped" if item.skipped else "passed"
    note = shortened(item.bad) if item.bad else ""
    if item.bad:
        leave_when_poisoned(note)
    seconds = round(time.monotonic() - began[item.nodeid], 3)
    JOURNAL.write(name=item.nodeid, outcome=outcome, seconds=seconds, note=note)


def pytest_report_teststatus() -> tuple[str, str, str]:
    """Nothing on the screen: what is there last says why a process ended."""
    return "", "", ""


def shortened(report: Any) -> str:
    return " ".join(str(report.longrepr)[-600:].split())


def leave_when_poisoned(note: str) -> None:
    """After an illegal access or a trap every later call of this process fails: the test crashed, a new one goes on."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"the GPU was lost: {note}", file=sys.stderr, flush=True)
            os._exit(1)
