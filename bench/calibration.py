"""The best plans that a problem could have in each scope, timed: what the planner's constants are made from.

A plan is timed by one launch over the sequence, on random arrays; whether its results are right is the tests' affair.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gpu_rnn.backends import cuda
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import Unit

from .kernels import launch_plan
from .worker import Journal

T, LAUNCHES, MOST = 512, 5, 4  # time steps; timed launches of a plan; plans of a scope, the best ones by prediction
PROBLEMS = [  # cell, dtype, H, B
    ("lstm", "bfloat16", 128, 16), ("lstm", "bfloat16", 512, 16), ("lstm", "bfloat16", 1024, 16),
    ("lstm", "bfloat16", 1024, 64), ("gru", "bfloat16", 512, 16), ("lstm", "bfloat16", 256, 16),
    ("lstm", "bfloat16", 2048, 16), ("lstm", "float32", 512, 16),
]  # fmt: skip
Problem = tuple[str, str, int, int]


def plans() -> Iterator[tuple[Problem, persistent.PersistentConfig]]:
    """The most promising ones of each scope, forward and backward, in the order of the problems."""
    on = cuda.device()
    for problem in PROBLEMS:
        name, dtype, H, B = problem
        cell = cells.get(name)
        for backward in (False, True):
            cost = persistent.cell_cost(cell, dtype, backward=backward)
            for scope in on.scopes:
                candidates = persistent.candidates(scope, backward, cost, H, B, on)
                best = sorted(candidates, key=lambda plan: plan.waves * plan.launches * plan.predicted_us)
                yield from ((problem, plan) for plan in best[:MOST])


def units() -> list[Unit]:
    """What all of them compile."""
    units = (persistent.translation_unit(plan, cells.get(name), dtype) for (name, dtype, *_), plan in plans())
    return list(dict.fromkeys(units))


def measure(problem: Problem, plan: persistent.PersistentConfig) -> float:
    """Microseconds of a step."""
    import torch

    name, dtype, H, B = problem
    cell, kind = cells.get(name), getattr(torch, dtype)
    draw = partial(torch.randn, device="cuda")
    gates, states = draw(T, B, cell.G, H).to(kind), draw(T + 1, max(cell.S - 1, 0), B, H)
    y, saved = draw(T, B, H).to(kind), draw(T, B, max(cell.K, 1), H).to(kind).mul_(0.1)
    R, b_hh, h0 = (H**-0.5 * draw(cell.G, H, H)).to(kind), draw(cell.G, H).to(kind), draw(B, H).to(kind)
    args: tuple = (gates, R, b_hh, h0, states, saved, y, *[None] * 5)
    if plan.backward:
        dRh = gates.clone() if any(cell.separate) else None
        args = (y, draw(B, H), draw(max(cell.S - 1, 1), B, H), R, y, h0, states, saved, gates, dRh, *[None] * 6)
    launch = launch_plan(cuda.prepare_launch, plan, cell, dtype, T, B, H, args, like=y, save=True)
    times, (begin, end) = [], (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(LAUNCHES + 1):
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / T)
    return sorted(times[1:])[LAUNCHES // 2]


def run(emit: Callable[[dict[str, Any]], None], done: list[str]) -> None:
    """Emit the problem, the plan, the prediction and what a step took of each that isn't done; see `run_checks`."""
    import torch

    with cuda.stream_of(torch.empty(1, device="cuda")):
        for problem, plan in plans():
            line = {"problem": problem, "plan": asdict(plan), "predicted": plan.predicted_us, "measured": None}
            if (name := key(line)) in done:
                continue
            emit({"begin": name, **line})  # a plan without a time is where it hung
            held = partial(cuda.max_coresident, cells.get(problem[0]), problem[1])
            outcome = {"name": name, "outcome": "passed"}
            try:
                count, why = persistent.check_occupancy(plan, cuda.device(), held)
                took = None if why else measure(problem, plan)
                emit({**line, **outcome, "measured": took, "note": why, "held": count})
            except Exception as error:  # of one plan; after a trap all later calls fail, and a new process goes on
                emit({**line, **outcome, "note": f"{type(error).__name__}: {error}"})
                torch.cuda.synchronize()


def key(line: dict[str, Any]) -> str:
    return json.dumps([line["problem"], line["plan"]], sort_keys=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of each plan."""
    return {key(line): line for line in Journal(path).lines() if "problem" in line}


def table(path: Path) -> list[str]:
    """The plans of each problem, the fastest first."""
    lines = []
    for line in sorted(read(path).values(), key=lambda line: (line["problem"], line["plan"]["backward"],
                                                              line["measured"] or float("inf"))):  # fmt: skip
        plan = persistent.PersistentConfig(**line["plan"] | {"reductions": tuple(line["plan"]["reductions"])})
        took = f"{line['measured']:6.2f}" if line["measured"] else "  -   "
        shape = f"{plan.scope:7} {plan.blocks:3} x {plan.threads:3}, {plan.elements} each, k {plan.k_splits} "
        shape += f"{plan.k_registers:2}+{plan.k_shared:2}, rows {plan.rows:2}, chunks {plan.k_chunks}"
        name = "{} {} H={} B={}".format(*line["problem"]) + (" backward" if plan.backward else " forward")
        lines.append(f"{name:35} {shape}: {took} us, predicted {line['predicted']:.2f} {line.get('note') or ''}")
    return lines
