"""The one rule for results in floating point: |ours - exact| <= 2 |torch in the same dtype - exact| + a few ulp.

Errors are largest ones over an array, and an ulp is that of its largest element: torch may be right at an element by
chance, but not at all of them.
"""

import numpy as np

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
ULPS = 4


def allowed(exact, peer, dtype):
    """The largest error that `dtype` excuses, given what torch makes of the same problem."""
    if exact.size == 0:
        return 0.0
    return 2 * np.abs(peer - exact).max() + ULPS * EPS[dtype] * np.abs(exact).max()


def assert_close(ours, exact, peer, dtype, what):
    """ours, exact, peer: NumPy arrays of one shape, in float64 or longer."""
    assert ours.shape == exact.shape == peer.shape, f"{what}: {ours.shape}, not {exact.shape}"
    assert np.isfinite(ours).all(), f"{what}: not finite"
    error, limit = np.abs(ours - exact).max(initial=0.0), allowed(exact, peer, dtype)
    assert error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g} ({dtype})"
