"""On a GPU: the instructions that the CUDA emulator (tests/cuda_emulator) imitates do what it says they do.

Launches the kernels of tests/cuda_emulator/features.cu through CuPy and holds them against the same expectations as the
CPU tests. One that fails here means a wrong emulation: then the CPU tests prove nothing.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_rnn.backends.cuda import Driver

CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
Size = tuple[int, int, int]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: the id, padding, and a union of 64 bytes, here three sizes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("size", ctypes.c_uint * 3), ("rest", ctypes.c_byte * 52))


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
        copies = {n: self.cupy.asarray(arg) for n, arg in enumerate(args) if isinstance(arg, np.ndarray)}
        values = [
            ctypes.c_void_p(copies[n].data.ptr) if n in copies
            else np.ctypeslib.as_ctypes_type(arg.dtype)(arg.item()) for n, arg in enumerate(args)
        ]  # fmt: skip
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute, stream = Attribute(id=CLUSTER_DIMENSION, size=cluster), self.cupy.cuda.get_current_stream()
        at, count = ctypes.addressof(attribute), int(cluster != (1, 1, 1))
        config = Driver.Configuration(*grid, *block, shared, stream.ptr, at, count)
        function = ctypes.c_void_p(self.module.get_function(name).ptr)
        status = self.driver.cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
        Driver.check("cuLaunchKernelEx", status)
        stream.synchronize()
        for n, copy in copies.items():
            args[n][...] = copy.get()


def names() -> list[str]:
    """The checks that this GPU has the instructions for; on another machine, all."""
    from tests.cuda_emulator import features

    return [name for name in features.CHECKS if name not in features.HOPPER or capability() >= 90]


def capability() -> int:
    import cupy

    return int(cupy.cuda.Device().compute_capability) if cupy.is_available() else 90


def run(emit: Callable[[dict[str, Any]], None], done: list[str]) -> None:
    """Emit the outcome of every check that isn't done; see `worker.run_checks`."""
    from tests.cuda_emulator import features, runtime

    from . import nvrtc

    compilation = "compilation"
    if done == [compilation] or not (left := [name for name in names() if name not in done]):
        return  # it did not compile, or all is done
    emit({"begin": compilation})
    launch = Launcher(nvrtc.compile(runtime.join([runtime.DEVICE, features.SOURCE]), f"sm_{capability()}"))
    emit({"name": compilation, "outcome": "passed", "seconds": 0, "note": ""})
    for name in left:
        emit({"begin": name})
        began, outcome, note = time.monotonic(), "passed", ""
        try:
            features.CHECKS[name](launch)
        except AssertionError as error:
            outcome, note = "failed", " ".join(str(error).split())[:300]
        emit({"name": name, "outcome": outcome, "seconds": round(time.monotonic() - began, 3), "note": note})
