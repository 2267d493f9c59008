"""Triton without a GPU: compile a kernel for any of NVIDIA's, and see what it takes; or record its launches."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # of one program, in bytes
TENSOR_MEMORY = 512  # columns


class Driver:
    """As much of Triton's driver as it takes to compile for a compute capability and to call a launcher."""

    def __init__(self, capability, launches=None):
        self.target = GPUTarget("cuda", capability, 32)
        self.launches = launches  # a list: takes the arguments of every launch
        self.utils = self

    def is_active(self):
        return True

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_MEMORY[self.target.arch], "multiprocessor_count": 132}

    def load_binary(self, name, binary, shared, device):
        return None, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, source, metadata):
        def launch(*arguments):
            self.launches.append(arguments)

        return launch


class Resources(NamedTuple):
    """What one program takes."""

    registers: int  # per thread
    threads: int
    stack: int
    spills: int  # instructions that load or store them
    shared: int
    tensor: int
    products: int  # tensor-core instructions
    trap: bool  # compiled to nothing but an error: it would not have fitted


def compiled(monkeypatch, capability, kernel, *arguments, **options):
    """Compile as a launch with these arguments would: `MockTensor(torch.float16)` is an aligned pointer."""
    monkeypatch.setattr(driver, "_active", Driver(capability))
    kernel.device_caches.clear()
    return kernel.warmup(*arguments, grid=(1,), **options)


def resources(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = output_of("cuobjdump", "--dump-resource-usage", file.name)
        code = output_of("nvdisasm", "-c", file.name)
    return Resources(
        registers=int(re.search(r"\bREG:(\d+)", usage)[1]),
        threads=binary.metadata.num_warps * 32,
        stack=int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=binary.metadata.shared,
        tensor=getattr(binary.metadata, "tmem_size", 0) or 0,
        products=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code)),
        trap="BPT.TRAP" in code,
    )


def output_of(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def check(binary, capability, *, products):
    """It would launch, and at full speed; `products`: whether it has tensor-core instructions."""
    takes = resources(binary)
    assert not takes.trap, takes
    assert takes.stack == takes.spills == 0, takes
    assert takes.registers * takes.threads <= 65536, takes
    assert takes.shared <= SHARED_MEMORY[capability], takes
    assert takes.tensor <= TENSOR_MEMORY, takes
    assert bool(takes.products) == products, takes
