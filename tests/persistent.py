"""Run the persistent kernels on the CPU, with their configurations, next to the NumPy backend. What tests share, and by

    python -m tests.persistent --sanitizer thread lstm bfloat16 grid

what a sanitizer watches.
"""

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import nvrtc
from gpu_rnn.backends import numpy as numpy_backend
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.codegen import cpp as cpp
from gpu_rnn.kernels.cuda import persistent
from gpu_rnn.kernels.cuda.launch import HERE, OPTIONS

from . import calls, cuda_on_cpu
from .cuda_emulator import runtime

CUDA = HERE
SOURCE = "".join(file.read_text() for file in (*persistent.HEADERS, persistent.KERNELS))
EPSILON = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8, "ieee": 2.0**-22}  # of an operand


# ---- Half precision as NumPy has it: bfloat16 as its bits -------------------------------------------------------


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(x, dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return x.astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def zeros(count: int) -> np.ndarray:
    """Bytes, at an address that is a multiple of 16."""
    spare = np.zeros(count + 16, np.uint8)
    start = -spare.ctypes.data % 16
    return spare[start : start + count]


def poison(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """All NaN."""
    return np.full(shape, 0xFFFF, np.uint16) if dtype == "bfloat16" else np.full(shape, np.nan, dtype)


# ---- One problem, both ways -------------------------------------------------------------------------------------


class Case(NamedTuple):
    cell: str
    dtype: str  # float32 is multiplied as TF32, "ieee" is float32 that isn't
    scope: str
    T: int = 3
    B: int = 5
    H: int = 20
    reverse: bool = False
    save: bool = True

    @property
    def ieee(self) -> bool:
        return self.dtype == "ieee"

    @property
    def storage(self) -> str:
        return "float32" if self.ieee else self.dtype


Plans = tuple[persistent.PersistentConfig, ...]  # forward and, if the case saves anything, backward


def planned(case: Case, device: persistent.Device = persistent.DEVICES["h200"]) -> Plans:
    cell = cells.get(case.cell)
    made = []
    for backward in (False, True) if case.save else (False,):
        options = {"backward": backward, "ieee": case.ieee, "scope": case.scope}
        options["reductions"] = persistent.reductions(cell, backward=backward)
        element = persistent.registers_per_element(cell, backward=backward)
        plan, reasons = persistent.select(cell.G, element, case.storage, case.H, case.B, device, **options)
        assert plan is not None, reasons
        made.append(plan)
    return tuple(made)


def forced(case: Case, *, k_chunks=(1, 1), blocks, unit_tiles, k_splits, k_shared=0, batch_tiles=1) -> Plans:
    """Plans that the planner gives to a larger problem."""
    size = persistent.ITEMSIZE[case.storage]
    k_tiles = -(-blocks * 16 * unit_tiles * size // (32 * k_splits))
    held = {"k_registers": k_tiles - k_shared, "k_shared": k_shared}
    shape = {"blocks": blocks, "unit_tiles": unit_tiles, "k_splits": k_splits, "batch_tiles": batch_tiles, **held}
    cell = cells.get(case.cell)
    stored = {"gates": cell.G, "itemsize": size, "ieee": case.ieee}
    rows = batch_tiles * (2 if case.ieee else 8)
    launch = {"groups": -(-case.B // rows), "launches": 1, "waves": 1}
    return tuple(
        persistent.PersistentConfig(
            backward, case.scope, **shape, **stored, **launch, k_chunks=k_chunks[backward],
            reductions=persistent.reductions(cell, backward=backward),
        )
        for backward in (False, True)
    )  # fmt: skip


def variants(cell: str, dtype: str, scope: str) -> list[tuple[Case, Plans]]:
    """Cases that run every statement of a scope."""
    case = Case(cell, dtype, scope, T=4, B=5, H=40)
    result = [(case, planned(case))]
    if scope == "grid":  # a team of several warps, and of one; the operand in pieces
        result.append((case, forced(case, k_chunks=(2, 4), blocks=2, unit_tiles=2, k_splits=2)))
        case = case._replace(dtype="ieee")
        result.append((case, forced(case, k_chunks=(2, 4), blocks=3, unit_tiles=1, k_splits=2)))
    return result


def check_machine_code(plan: persistent.PersistentConfig, cell: cells.Cell, dtype: str, arch: str) -> nvrtc.Resources:
    """Compile for a GPU: it fits the registers, spills none, and exchanges words of data and flag in one access each.

    ptxas loads a word in parts where the kernel needs only some of it; data may then be older than their flag.
    """
    unit = persistent.translation_unit(plan, cell, dtype)
    cubin = nvrtc.compile(unit.source, arch, [*OPTIONS[1:], *(f"-D{name}={value}" for name, value in unit.defines)])
    assert not cubin.log
    name = persistent.kernel_name(plan)
    kernel, code = nvrtc.resources(cubin)[name], nvrtc.sass(cubin)[name]
    assert (kernel.stack, kernel.spills, kernel.trap) == (0, 0, False), (kernel, str(plan))
    assert kernel.registers * plan.threads <= persistent.REGISTER_FILE
    words = {"block": [], "cluster": ["STAS.128"], "grid": ["LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU"]}[plan.scope]
    dx = ["LDG.E.64.STRONG.GPU", "STG.E.64.STRONG.GPU"] if plan.layers > 1 and plan.backward else []
    means = ["STAS"] if plan.scope == "cluster" and plan.reductions else []  # counted by an mbarrier, without a flag
    if plan.blocks == 1 and plan.backward:
        words = []
    accesses = Counter(re.findall(r"\b(?:(?:LD|ST)G?\.\S*STRONG|STAS)\S*", code))
    assert {*accesses} == {*words, *dx, *means}, (accesses, str(plan))
    assert all(accesses[access] <= 4 * plan.elements for access in dx), (accesses, "a word in two parts")
    return kernel


def sources(cell: str, kernel: runtime.Source | None = None) -> list:
    cell_code = runtime.Source(f"cell {cell}", cpp.render_cell(cells.get(cell)))
    kernels = [kernel] if kernel else [*persistent.HEADERS, persistent.KERNELS]
    return [CUDA / "device.cuh", CUDA / "mathematics.cuh", cell_code, CUDA / "cell_inputs.cuh", *kernels]


def libraries(case: Case, plans: Plans, sanitizer=None, kernel=None) -> list[runtime.Library]:
    units = [persistent.translation_unit(plan, cells.get(case.cell), case.storage) for plan in plans]
    return [runtime.compile(sources(case.cell, kernel), dict(unit.defines), sanitizer) for unit in units]


def errors(case: Case, plans: Plans, kernels: list[runtime.Library], seed: int = 0, **options) -> dict[str, float]:
    """Run it; by result, the largest error over what the operands' rounding allows: right when below 1."""
    cell = cells.get(case.cell)
    (G, S, K), (T, B, H, dtype) = (cell.G, cell.S, cell.K), (case.T, case.B, case.H, case.storage)
    rng = np.random.default_rng(5)

    def draw(*shape, scale=1.0):  # exactly what the dtype can store
        return decode(encode(scale * rng.standard_normal(shape), dtype), dtype)

    Wx, R, b_hh = draw(T, B, G, H), draw(G * H, H, scale=H**-0.5), draw(G * H)
    h0, others0 = draw(B, H), draw(S - 1, B, H)
    dy, dh, dothers = draw(T, B, H), draw(B, H), draw(S - 1, B, H)
    units = (1 + 0.3 * draw(len(cell.per_unit_params), 1, H)).astype(np.float32) if cell.per_unit_params else None

    def run(arrays, *, backward):
        plan = plans[backward]
        exchange = zeros(plan.launches * plan.exchange_bytes(T))
        addresses = tuple(0 if a is None else a.ctypes.data for a in arrays)
        words = persistent.kernel_params([persistent.Instance(addresses, case.reverse)])
        for k, launch in enumerate(persistent.launches(plan, cell, dtype, T, B, H, 1, save=case.save)):
            at = exchange.ctypes.data + k * plan.exchange_bytes(T)
            cuda_on_cpu.execute(kernels[backward], launch, words, at, seed=seed, **options)

    stored = encode(R, dtype)
    others = np.full((T + 1 if case.save else 1, S - 1, B, H), np.nan, np.float32)
    others[T if case.save and case.reverse else 0] = others0
    y = poison((T, B, H), dtype)
    saved = poison((T, B, K, H), dtype) if case.save else None
    step = [encode(Wx, dtype), stored, encode(b_hh, dtype), encode(h0, dtype), others, saved, y]
    step += [units, *[None] * 4]
    run(step, backward=False)

    weights = Weights(np.eye(G * H), R, None, b_hh, units=None if units is None else units.astype(float))
    x, state = Wx.reshape(T, B, G * H), (h0, *others0)
    exact, last, exact_saved = calls.forward(
        numpy_backend.forward, cell, x, weights, state, reverse=case.reverse, save=True
    )
    scale = EPSILON[case.dtype] * math.sqrt(T)
    result = {"y": np.abs(decode(y, dtype) - exact).max() / (4 * scale)}
    final = others[(0 if case.reverse else T) if case.save else 0]
    for letter, ours, theirs in zip(cell.states[1:], final, last[1:]):
        result[letter + "T"] = np.abs(ours - theirs).max() / (8 * scale)
    if not case.save:
        return result

    dWx, dRh = poison((T, B, G, H), dtype), poison((T, B, G, H), dtype) if any(cell.separate) else None
    dh_ours, dothers_ours = dh.astype(np.float32), dothers.astype(np.float32)
    saved_before = [a.copy() for a in (y, others, saved)]
    back = [encode(dy, dtype), dh_ours, dothers_ours, stored, y, encode(h0, dtype), others, saved]
    dunits = np.zeros((cell.num_trainable, B, H), np.float32)
    run([*back, dWx, dRh, None, dunits, units, None, None, None], backward=True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(saved_before, (y, others, saved))), (
        "backward wrote the saved activations"
    )

    gradients = calls.backward(
        numpy_backend.backward,
        cell,
        x,
        weights,
        state,
        exact,
        exact_saved,
        dy,
        (dh, *dothers),
        reverse=case.reverse,
        needs={"x", "b_hh"} | ({"units"} if cell.per_unit_params else set()),
    )
    bound = 8 * scale * max(1.0, np.abs(gradients["x"]).max())
    result["dWx"] = np.abs(decode(dWx, dtype).reshape(x.shape) - gradients["x"]).max() / bound
    for letter, ours, exact0 in zip(cell.states, (dh_ours, *dothers_ours), gradients["state"]):
        result[f"d{letter}0"] = np.abs(ours - exact0).max() / (2 * bound)
    if dRh is not None:
        total = decode(dRh, dtype).sum((0, 1)).ravel()
        result["dRh"] = np.abs(total - gradients["b_hh"]).max() / (bound * math.sqrt(T * B))
    if cell.per_unit_params:
        result["dunits"] = np.abs(dunits.sum(1) - gradients["units"][:, 0]).max() / (bound * math.sqrt(T * B))
    return result


def wrong(result: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in result.items() if not error < 1}  # NaN is wrong, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitizer", choices=("thread", "address"))
    parser.add_argument("--source", help="another persistent.cu, with its headers")
    parser.add_argument("cell")
    parser.add_argument("dtype")
    parser.add_argument("scope")
    options = parser.parse_args()
    kernel = runtime.Source("persistent.cu", Path(options.source).read_text()) if options.source else None
    failed = False
    for case, plans in variants(options.cell, options.dtype, options.scope):
        result = errors(case, plans, libraries(case, plans, options.sanitizer, kernel), seed=1)
        print(case, "wrong:", wrong(result))
        failed = failed or bool(wrong(result))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
