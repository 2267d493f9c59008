"""Compile kernels for a GPU that is not there, and look at what came out.

    cubin = compile(join([device, kernel]), "sm_90", ["-DSCALAR=float"])
    resources(cubin)["forward"].spills == 0

NVRTC is CuPy's, its headers are found by NVIDIA's cuda-pathfinder; cuobjdump and nvdisasm come with Triton.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gpu_rnn.core.optional_imports import missing


class CompileError(RuntimeError):
    """NVRTC refused the source; the text is its log."""


class Cubin(bytes):
    """A compiled module, with what the compiler had to say about it."""

    log: str = ""


class Resources(NamedTuple):
    """What one kernel uses."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory in the code
    shared: int  # static, bytes per block, without the 1 KiB that the system takes on sm_90 and later
    mma: int  # tensor core instructions
    trap: bool  # there is a trap: the kernel's own, or all that the compiler left of one that does not fit


@cache
def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if reason := missing("cupy"):
        return reason
    try:
        return None if version() and headers() else "no cuda_bf16.h: pip install nvidia-cuda-runtime"
    except Exception as error:  # CuPy's, of many kinds
        return f"no NVRTC: pip install nvidia-cuda-nvrtc ({error})"


def why_no_resources() -> str | None:
    """Why the code cannot be inspected here, or None."""
    return missing("triton")


@cache
def headers() -> str | None:
    """The folder of cuda_bf16.h: of wheels, or of the toolkit that CuPy finds."""
    import cupy
    from cuda import pathfinder  # CuPy needs it itself

    toolkit = cupy.cuda.get_cuda_path()
    return pathfinder.find_nvidia_header_directory("cudart") or (f"{toolkit}/include" if toolkit else None)


def version() -> str:
    """Of NVRTC, as 13.0: other versions give other machine code."""
    from cupy.cuda import nvrtc

    return "{}.{}".format(*nvrtc.getVersion())


def compile(source: str, arch: str, options: Sequence[str] = (), name: str = "kernel.cu") -> Cubin:
    """Compile `source` for `arch` (sm_90, sm_90a, ...) with C++17."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, [f"-arch={arch}", "-std=c++17", f"-I{headers()}", *options])
        cubin = Cubin(nvrtc.getCUBIN(program) + b"\0")  # CuPy drops the last byte
        cubin.log = nvrtc.getProgramLog(program).strip()
        return cubin
    except nvrtc.NVRTCError:
        raise CompileError(f"{arch}: {nvrtc.getProgramLog(program).strip()}") from None
    finally:
        nvrtc.destroyProgram(program)


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of `cubin` uses, by name."""
    usage, listing = cuobjdump(cubin, "--dump-resource-usage"), cuobjdump(cubin, "--dump-sass")
    reserved = 1024 if int(re.findall(r"EF_CUDA_SM(\d+)", listing)[0]) >= 90 else 0
    used, code = {}, functions(listing)

    def count(name: str, instruction: str) -> int:
        pattern = rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?{instruction}\b"
        return len(re.findall(pattern, code[name], re.MULTILINE))

    for name, line in re.findall(r"^\s*Function (\S+):\s*\n\s*(.*)$", usage, re.MULTILINE):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
        used[name] = Resources(
            numbers["REG"], numbers["STACK"], count(name, r"(?:LDL|STL)"), numbers["SHARED"] - reserved,
            count(name, r"(?:HMMA|HGMMA|QGMMA|IGMMA|DMMA|UTCHMMA)"), count(name, r"BPT\.TRAP") > 0,
        )  # fmt: skip
    return used


def parameters(cubin: bytes) -> dict[str, list[int]]:
    """The bytes of each kernel's parameters, in their order."""
    parts = re.split(r"^\.(\S+)$", cuobjdump(cubin, "--dump-elf"), flags=re.MULTILINE)
    sizes = {
        section.removeprefix("nv.info."): re.findall(r"Ordinal\s*:\s*(\w+)\s.*Size\s*:\s*(\w+)", text)
        for section, text in zip(parts[1::2], parts[2::2], strict=True) if section.startswith("nv.info.")
    }  # fmt: skip
    return {k: [int(size, 16) for _, size in sorted(v, key=lambda one: int(one[0], 16))] for k, v in sizes.items()}


def sass(cubin: bytes) -> dict[str, str]:
    """The machine code of each kernel, as text."""
    return functions(cuobjdump(cubin, "--dump-sass"))


def functions(listing: str) -> dict[str, str]:
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@lru_cache(maxsize=2)  # the disassembler takes half a second to start, and a listing is read more than once
def cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tools: Any = triton.knobs.nvidia
    path = f"{Path(tools.nvdisasm.path).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools.cuobjdump.path, option, file.name]
        env = os.environ | {"PATH": path}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
