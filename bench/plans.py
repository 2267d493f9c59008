"""The best plans that a problem could have in each scope, timed: what the planner's constants are made from.

`python -m bench.plans FILE SECONDS` appends a line of JSON for each: the problem, the plan, what the planner predicts
and what a step took. A plan is timed by one launch over the sequence, on random arrays; whether its results are right
is the tests' affair.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rnn.backends import cuda
from gpu_rnn.core import arrays
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import Unit

T, LAUNCHES, MOST = 512, 5, 4  # time steps; timed launches of a plan; plans of a scope, the best ones by prediction
PROBLEMS = [  # cell, dtype, H, B
    ("lstm", "bfloat16", 128, 16), ("lstm", "bfloat16", 512, 16), ("lstm", "bfloat16", 1024, 16),
    ("lstm", "bfloat16", 1024, 64), ("gru", "bfloat16", 512, 16), ("lstm", "bfloat16", 256, 16),
    ("lstm", "bfloat16", 2048, 16), ("lstm", "float32", 512, 16),
]  # fmt: skip
Problem = tuple[str, str, int, int]


def plans() -> Iterator[tuple[Problem, persistent.Residence]]:
    """The most promising ones of each scope, forward and backward, in the order of the problems."""
    on = cuda.device()
    for problem in PROBLEMS:
        name, dtype, H, B = problem
        cell, ieee = cells.get(name), False
        for backward in (False, True):
            element = persistent.element(cell, backward=backward)
            page = (cell.G, element, persistent.SIZES[dtype], ieee, persistent.meetings(cell, backward=backward))
            for scope in on.scopes:
                found = persistent.candidates(scope, backward, page, H, B, on)
                best = sorted(found, key=lambda plan: plan.waves * plan.launches * plan.microseconds)
                yield from ((problem, plan) for plan in best[:MOST])


def units() -> list[Unit]:
    """What all of them compile."""
    return list(dict.fromkeys(persistent.compiled(plan, cells.get(name), dtype) for (name, dtype, *_), plan in plans()))


def measure(problem: Problem, plan: persistent.Residence) -> float:
    """Microseconds of a step."""
    import torch

    name, dtype, H, B = problem
    cell, kind = cells.get(name), getattr(torch, dtype)
    draw = partial(torch.randn, device="cuda")
    gates, states = draw(T, B, cell.G, H).to(kind), draw(T + 1, max(cell.S - 1, 0), B, H)
    y, saved = draw(T, B, H).to(kind), draw(T, B, max(cell.K, 1), H).to(kind).mul_(0.1)
    R, b_hh, h0 = (H**-0.5 * draw(cell.G, H, H)).to(kind), draw(cell.G, H).to(kind), draw(B, H).to(kind)
    exchange = torch.zeros(max(1, plan.launches * plan.exchange_bytes(T)), dtype=torch.uint8, device="cuda")
    if plan.backward:
        dh, dothers = draw(B, H), draw(max(cell.S - 1, 1), B, H)
        dhg = gates.clone() if any(cell.separate) else None
        given = (y, dh, dothers, R, y, h0, states, saved, gates, dhg, None, None, None, None, None, None)
    else:
        given = (gates, R, b_hh, h0, states, saved, y, None, None, None, None, None)
    words = persistent.words([persistent.Member(arrays.pointers(given, y), reverse=False)])
    launches = [cuda.prepare_launch(part) for part in persistent.sequence(plan, cell, dtype, T, B, H, 1, save=True)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(LAUNCHES + 1):
        exchange.zero_()
        begin.record()
        for k, launch in enumerate(launches):
            launch(words, exchange.data_ptr() + k * plan.exchange_bytes(T))
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / T)
    return sorted(times[1:])[LAUNCHES // 2]


def main(path: Path, seconds: float) -> None:
    import torch

    until = time.monotonic() + seconds
    done = set(map(key, read(path)))
    with cuda.stream_of(torch.empty(1, device="cuda")), path.open("a") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for problem, plan in plans():
            about = {"problem": problem, "plan": asdict(plan), "predicted": plan.microseconds}
            if time.monotonic() > until:
                break
            if key(about) in done:
                continue
            write(**about, measured=None)  # whoever reads a plan without a time knows where it hung
            try:
                count, why = persistent.holds(
                    plan, cuda.device(), partial(cuda.max_coresident, cells.get(problem[0]), problem[1])
                )
                write(**about, measured=None if why else measure(problem, plan), note=why, held=count)
            except Exception as error:  # of one plan; after a trap all later calls fail, and a new process goes on
                write(**about, measured=None, note=f"{type(error).__name__}: {error}")
                torch.cuda.synchronize()


def key(line: dict[str, Any]) -> str:
    return json.dumps([line["problem"], line["plan"]], sort_keys=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(path: Path) -> list[str]:
    """The plans of each problem, the fastest first."""

    def order(line: dict[str, Any]) -> tuple:
        return line["problem"], line["plan"]["backward"], line["measured"] or float("inf")

    lines = []
    for line in sorted({key(line): line for line in read(path)}.values(), key=order):
        plan = persistent.Residence(**{**line["plan"], "meetings": tuple(line["plan"]["meetings"])})
        took = f"{line['measured']:6.2f}" if line["measured"] else "  -   "
        way = "backward" if plan.backward else "forward "
        shape = f"{plan.scope:7} {plan.blocks:3} x {plan.threads:3}, {plan.elements} each, k {plan.k_splits}"
        shape += f" {plan.k_registers:2}+{plan.k_shared:2}, rows {plan.rows:2}, pieces {plan.pieces}"
        name = "{} {} H={} B={}".format(*line["problem"])
        lines.append(f"{name:26} {way} {shape}: {took} us, predicted {line['predicted']:.2f} {line.get('note') or ''}")
    return lines


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
