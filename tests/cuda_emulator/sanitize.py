"""Run Python under ThreadSanitizer, or under AddressSanitizer with UBSan.

    outcome = run("thread", ["-m", "tests.cuda_emulator", "--sanitizer", "thread", "cluster_exchange"])
    outcome.reports

A sanitizer must be loaded before all else, so kernels compiled with one work only in a process started like
this. Each fiber is a thread to ThreadSanitizer: it reports two accesses that no barrier orders even if they
came in the right order this time."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import runtime

ROOT = Path(__file__).parents[2]


class Report(NamedTuple):
    kind: str  # data race, stack-buffer-overflow, runtime error, ...
    places: list[str]  # file:line of the kernel, innermost first
    text: str


class Outcome(NamedTuple):
    returncode: int
    reports: list[Report]
    output: str


def why_not(sanitizer: runtime.Sanitizer) -> str | None:
    """Why this sanitizer cannot be used here, or None."""
    return runtime.why_not(sanitizer)


def run(
    sanitizer: runtime.Sanitizer,
    arguments: Sequence[str],
    *,
    stop_at_first: bool = True,
    timeout: float = 300,
) -> Outcome:
    """Run `python arguments...` in the root of the repository, with the sanitizer loaded.

    The process ends at the first report of ThreadSanitizer, unless told otherwise: one mistake can make
    thousands."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime.sanitizer_library(sanitizer)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONMALLOC": "malloc",  # so that AddressSanitizer sees the bounds of small arrays
        "OPENBLAS_NUM_THREADS": "1",
        "TSAN_OPTIONS": f"halt_on_error={int(stop_at_first)} exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0 detect_stack_use_after_return=0 exitcode=67",
        "UBSAN_OPTIONS": "halt_on_error=0 print_stacktrace=1",
    }
    # Without address randomization: ThreadSanitizer needs the usual memory layout.
    fixed_layout = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    result = subprocess.run(
        [*fixed_layout, sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    return Outcome(result.returncode, _reports(result.stdout), result.stdout)


def _reports(output: str) -> list[Report]:
    heads = re.compile(
        r"WARNING: ThreadSanitizer: (?P<tsan>[\w -]+?) \(pid|"
        r"ERROR: AddressSanitizer: (?P<asan>[\w-]+)|"
        r"^\S+?:\d+(?::\d+)?: (?P<ubsan>runtime error): ",
        re.MULTILINE,
    )
    matches = list(heads.finditer(output))
    bounds = [*(match.start() for match in matches), len(output)]
    reports = []
    for match, end in zip(matches, bounds[1:], strict=True):
        text = output[match.start() : end]
        kind = match["tsan"] or match["asan"] or match["ubsan"]
        reports.append(Report(kind, re.findall(r"([^\s/]+\.cuh?:\d+)", text), text))
    return reports
