"""All shapes and modifiers by native kernels that are compiled with a sanitizer; without torch, slow to load there.

python -m tests.native_sanitized address|thread [text of a source, what stands in its place]
"""

import sys

import numpy as np

from gpu_rnn.backends import native
from gpu_rnn.backends.two_pass import TwoPass
from gpu_rnn.core.problem import Weights
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cells import apply_modifiers
from gpu_rnn.kernels.mathematics import recurrent, sigmoid, tanh
from gpu_rnn.kernels.native import isa

from . import calls
from .conftest import sequence_arrays

SANITIZERS = {"address": ("-fsanitize=address,undefined",), "thread": ("-fsanitize=thread",)}
EVERYTHING = {"reset": True, "reset_state": True, "hold": True, "dropout": True, "zoneout": (0.3, 0.2)}
CASES = [  # cell, modifiers, T, B, I, H, P, heads where there are several
    ("lstm", {}, 3, 1, 5, 37, None), ("lstm", {}, 2, 14, 3, 8, None), ("lstm", {}, 2, 2, 130, 131, None),
    ("lstm", EVERYTHING, 3, 2, 4, 19, None), ("lstm", {"norm": True}, 2, 3, 4, 21, None),
    ("gru", {}, 3, 1, 4, 35, None), ("gru+before", {}, 3, 1, 4, 35, None), ("gru+before", {}, 2, 50, 3, 38, None, 2),
    ("late", {}, 3, 3, 4, 70, None), ("late", {}, 2, 1, 4, 70, None), ("lstm", {}, 3, 1, 4, 38, None, 2),
    ("lstm", EVERYTHING, 3, 5, 4, 57, None, 3),
    ("lstm", {"hold": True, "reset": True}, 3, 1, 4, 30, 11), ("rnn_relu", {}, 3, 5, 1, 1, None),
    ("lstm", {}, 1, 1, 130, 131, None), ("gru", {}, 1, 50, 3, 21, None), ("lstm", {"hold": True}, 1, 3, 4, 30, 11),
    ("lstm", {"hold": True}, 1, 2, 4, 30, 11), ("lstm", {"norm": True}, 1, 1, 4, 21, None),
]  # fmt: skip
# Of 32 registers, as AVX-512 and NEON have, 3 rows have twice as many blocks side by side as 4.
MANY_REGISTERS = isa.PLAIN._replace(registers=32), ("lstm", {}, 3, 7, 4, 60, 40)


def late(x, h, state):
    """A step whose first pass reads no gate of R h, and the second a single one of four."""
    return (tanh(x[1] + recurrent(1, sigmoid(x[0]) * state[0])) * x[2] + x[3],)


cells.register(cells.make_cell("late", "abcd", "h", late))


def run(reverse, name, options, T, B, I, H, P, heads=1):
    rng = np.random.default_rng(0)
    x, weights, state = sequence_arrays(rng, name, T, B, I, H, P, dtype=np.float32)
    if reverse:  # rows of x before its time steps
        x = np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    cell = apply_modifiers(cells.get(name), **options)
    weights = weights._replace(w_hh=np.ascontiguousarray(weights.w_hh[:, : weights.w_hh.shape[1] // heads]))
    weights = Weights(
        *weights[:5],
        rng.standard_normal((len(cell.per_unit_params), B, H)).astype("f") if cell.per_unit_params else None,
        rng.integers(0, 1 << len(cell.flags), (T, B)).astype(np.uint8) if cell.flags else None,
        np.array([7]) if cell.uniforms else None,
    )
    how = {"reverse": reverse, "heads": heads}
    backend = TwoPass(native) if cell.lowered else native
    y, last, saved = calls.forward(backend.forward, cell, x, weights, state, save=True, **how)
    calls.forward(backend.forward, cell, x, weights, state, save=False, **how)
    calls.backward(backend.backward, cell, x, weights, state, y, saved, y, last, needs={"b_ih", "w_hh", "w_ih"}, **how)


def main():
    sanitizer, *mutation = sys.argv[1:]
    # Runs take milliseconds: unoptimized code is made three times as fast.
    native.FLAGS = (*native.FLAGS, "-O0", "-g1", "-fno-omit-frame-pointer", *SANITIZERS[sanitizer])
    native.threads, native.WORTH_A_THREAD = lambda: 2, 0
    if mutation:
        text, (old, new) = native.text, mutation
        source = text("simd.h", "sequence.h", "sequence.cpp")
        assert old in source, old
        native.text = lambda *names: text(*names).replace(old, new, 1)
    for case in CASES[:1] if mutation else CASES:
        for reverse in (False, True):
            run(reverse, *case)
    if not mutation:
        instruction_set, case = MANY_REGISTERS
        native.instruction_set = lambda: instruction_set
        native.code.cache_clear(), native.library.cache_clear()
        run(False, *case)


if __name__ == "__main__":
    main()
