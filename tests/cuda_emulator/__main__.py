"""Run the checks of features.py on the host: `python -m tests.cuda_emulator [options] [CHECK ...]`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

from . import features, mutate, runtime


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_emulator", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="all, unless some are named")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="schedules 0 to N - 1")
    parser.add_argument("--sanitizer", choices=["thread", "address"], help="in a process of sanitize.run")
    parser.add_argument("--mutants", action="store_true", help="each barrier of features.cu removed in turn")
    options = parser.parse_args()

    text = features.SOURCE.read_text()
    checks = options.checks or list(features.CHECKS)
    removable = mutate.barriers(text) if options.mutants else []
    source = runtime.Source(features.SOURCE.name, mutate.switchable(text) if options.mutants else text)
    library = runtime.compile([runtime.DEVICE, source], sanitizer=options.sanitizer)
    failures = 0
    if not options.mutants:
        for check in checks:
            failures += run_check(library, check, check, options.seeds)
    for n, barrier in enumerate(removable):
        if barrier.function in checks:
            title = f"{barrier.function} without {barrier.text} in line {barrier.line}"
            print(f"== {title}", flush=True)
            run = functools.partial(run_check, library, barrier.function, title, options.seeds, n)
            failures += in_child(run)
    return int(failures > 0)


def run_check(
    library: runtime.Library,
    check: str,
    title: str,
    seeds: int,
    without: int | None = None,
) -> bool:
    """Whether any seed fails. Prints how many do, and how the first does."""
    wrong: list[str] = []
    for seed in range(seeds):
        try:
            features.CHECKS[check](runtime.Launcher(library, seed, without=without))
        except (AssertionError, runtime.HostError) as error:
            wrong.append(f"  seed {seed}: {type(error).__name__}: {error}")
    print(f"{title}: {seeds - len(wrong)} of {seeds} seeds right", *wrong[:1], sep="\n", flush=True)
    return bool(wrong)


def in_child(run: Callable[[], bool]) -> bool:
    """`run` in a process of its own, which ThreadSanitizer may end at its first report."""
    child = os.fork()
    if child == 0:
        os._exit(int(run()))
    return os.waitpid(child, 0)[1] != 0


if __name__ == "__main__":
    sys.exit(main())
