"""On a GPU: the instructions do what the CUDA emulator (tests/cuda_emulator) says they do.

`python -m bench.features JOURNAL` launches the kernels of tests/cuda_emulator/features.cu through CuPy and
holds them against the same expectations as the CPU tests. One that fails here means a wrong
emulation: then the CPU tests prove nothing.
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .supervise import Journal

CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
Size = tuple[int, int, int]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: the id, padding, and a union of 64 bytes, here three sizes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("size", ctypes.c_uint * 3), ("rest", ctypes.c_byte * 52))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Launcher:
    """Launches kernels of one module on NumPy arrays, which it changes in place, and waits for their end."""

    def __init__(self, cubin: bytes) -> None:
        import cupy

        self.cupy, self.driver = cupy, ctypes.CDLL("libcuda.so.1")
        cupy.zeros(1)  # makes the context that a module is loaded into
        self.module = cupy.cuda.Module()
        self.module.load(bytes(cubin))  # CuPy refuses subclasses of bytes

    def __call__(
        self, name: str, grid: Size, block: Size, args: Sequence[Any], *, shared: int = 0, cluster: Size = (1, 1, 1)
    ) -> None:
        arrays = [argument for argument in args if isinstance(argument, np.ndarray)]
        copies = [self.cupy.asarray(array) for array in arrays]
        there = iter(copies)
        values = [
            ctypes.c_void_p(next(there).data.ptr)
            if isinstance(argument, np.ndarray)
            else np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
            for argument in args
        ]
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute = Attribute(id=CLUSTER_DIMENSION, size=cluster)
        stream = self.cupy.cuda.get_current_stream().ptr
        count = int(cluster != (1, 1, 1))
        config = Config(grid, block, shared, stream, ctypes.pointer(attribute), count)
        function = ctypes.c_void_p(self.module.get_function(name).ptr)
        status = self.driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        if status:
            raise RuntimeError(f"cuLaunchKernelEx returned {status}")
        self.cupy.cuda.get_current_stream().synchronize()
        for array, copy in zip(arrays, copies, strict=True):
            array[...] = copy.get()


def names() -> list[str]:
    """The checks that this GPU has the instructions for; on another machine, all."""
    from tests.cuda_emulator import features

    return [name for name in features.CHECKS if name not in features.HOPPER or capability() >= 90]


def capability() -> int:
    import cupy

    return int(cupy.cuda.Device().compute_capability) if cupy.is_available() else 90


def main(journal: Journal) -> None:
    from tests.cuda_emulator import features, runtime

    from . import nvrtc

    done = journal.outcomes()
    left = [name for name in names() if name not in done]
    if not left or done.get("compilation", {}).get("outcome", "passed") != "passed":
        return
    journal.write(begin="compilation")
    launch = Launcher(nvrtc.compile(runtime.join([runtime.DEVICE, features.SOURCE]), f"sm_{capability()}"))
    journal.write(name="compilation", outcome="passed", seconds=0, note="")
    for name in left:
        journal.write(begin=name)
        began = time.monotonic()
        try:
            features.CHECKS[name](launch)
        except AssertionError as error:
            outcome, note = "failed", " ".join(str(error).split())[:300]
        else:
            outcome, note = "passed", ""
        journal.write(name=name, outcome=outcome, seconds=round(time.monotonic() - began, 3), note=note)


if __name__ == "__main__":
    main(Journal(Path(sys.argv[1])))
