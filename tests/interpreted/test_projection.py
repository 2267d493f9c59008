"""Projections of the GRU's and Elman's outputs in Triton."""

from gpu_rnn.backends import triton

from .. import reference_modifiers
from ..test_projection import EVERY


@EVERY
def test_triton(name):
    made = reference_modifiers.drawn(name, {"reset": True, "hold": True}, "float32", 4, 3, 4, 6, 3)
    reference_modifiers.check(made, made.case.run(triton.forward, triton.backward))
