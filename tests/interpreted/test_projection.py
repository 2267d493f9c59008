"""Projections of the GRU's and Elman's outputs in Triton."""

from gpu_rnn.backends import triton

from .. import woven
from ..test_projection import EVERY


@EVERY
def test_triton(name):
    made = woven.drawn(name, {"reset": True, "hold": True}, "float32", 4, 3, 4, 6, 3)
    woven.check(made, made.case.run(triton.forward, triton.backward))
