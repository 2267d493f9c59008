"""Compile kernels for a GPU that is not there, and look at what came out.

    cubin = compile(join([device, kernel]), "sm_90", ["-DSCALAR=float"])
    resources(cubin)["forward"].spills == 0

NVRTC and the headers come from the nvidia-cuda-nvrtc and nvidia-cuda-runtime wheels, or from the CUDA toolkit
of $CUDA_PATH, $CUDA_HOME, the nvcc on the PATH, or /usr/local/cuda; cuobjdump and nvdisasm from the Triton wheel.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class CompileError(RuntimeError):
    """NVRTC refused the source; the text is its log."""


class Cubin(bytes):
    """A compiled module, with what the compiler had to say about it."""

    log: str = ""


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel uses."""

    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory in the code
    shared: int  # static, bytes per block, without the 1 KiB that the system takes on sm_90 and later
    mma: int  # tensor core instructions
    trap: bool  # there is a trap: the kernel's own, or all that the compiler left of one that does not fit


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if _library_path() is None:
        return "no libnvrtc: pip install nvidia-cuda-nvrtc, or set CUDA_PATH"
    if _include_directory() is None:
        return "no cuda_bf16.h: pip install nvidia-cuda-runtime, or set CUDA_PATH"
    return None


def why_no_resources() -> str | None:
    """Why the code cannot be inspected here, or None."""
    if _tool("cuobjdump") is None or _tool("nvdisasm") is None:
        return "no cuobjdump and nvdisasm: pip install triton"
    return None


def version() -> str:
    """Of NVRTC, as 13.0: other versions give other machine code."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def compile(source: str, arch: str, options: Sequence[str] = (), name: str = "kernel.cu") -> Cubin:
    """Compile `source` for `arch` (sm_90, sm_90a, ...) with C++17."""
    include = _include_directory()
    library = _nvrtc()
    program = ctypes.c_void_p()
    arguments = [f"-arch={arch}", "-std=c++17", f"-I{include}", *options]
    encoded = (ctypes.c_char_p * len(arguments))(*[argument.encode() for argument in arguments])
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(arguments), encoded)
        log = _output(program, "ProgramLog").rstrip(b"\0").decode().strip()
        if status:
            raise CompileError(f"{arch}: {log or _error_name(status)}")
        cubin = Cubin(_output(program, "CUBIN"))
        cubin.log = log
        return cubin
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of `cubin` uses, by name."""
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    listing = _cuobjdump(cubin, "--dump-sass")
    code = dict(_functions(listing))
    reserved = 1024 if int(re.findall(r"EF_CUDA_SM(\d+)", listing)[0]) >= 90 else 0
    found = {}
    for name, line in re.findall(r"^\s*Function (\S+):\s*\n\s*(.*)$", usage, re.MULTILINE):
        numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
        found[name] = Resources(
            registers=numbers["REG"],
            stack=numbers["STACK"],
            spills=_count(code[name], r"(?:LDL|STL)"),
            shared=numbers["SHARED"] - reserved,
            mma=_count(code[name], r"(?:HMMA|HGMMA|QGMMA|IGMMA|DMMA|UTCHMMA)"),
            trap=_count(code[name], r"BPT\.TRAP") > 0,
        )
    return found


def parameters(cubin: bytes) -> dict[str, list[int]]:
    """The bytes of each kernel's parameters, in their order."""
    parts = re.split(r"^\.(\S+)$", _cuobjdump(cubin, "--dump-elf"), flags=re.MULTILINE)
    found = {}
    for section, text in zip(parts[1::2], parts[2::2], strict=True):
        if section.startswith("nv.info."):
            sizes = re.findall(r"Ordinal\s*:\s*(\w+)\s.*Size\s*:\s*(\w+)", text)
            found[section.removeprefix("nv.info.")] = [int(size, 16) for _, size in sorted(sizes, key=_ordinal)]
    return found


def _ordinal(parameter: tuple[str, str]) -> int:
    return int(parameter[0], 16)


def sass(cubin: bytes) -> dict[str, str]:
    """The machine code of each kernel, as text."""
    return dict(_functions(_cuobjdump(cubin, "--dump-sass")))


def _count(code: str, instruction: str) -> int:
    return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?{instruction}\b", code, re.MULTILINE))


def _functions(listing: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool, disassembler = _tool("cuobjdump"), _tool("nvdisasm")
    if tool is None or disassembler is None:
        raise RuntimeError(why_no_resources())
    path = f"{disassembler.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


# ---- Finding things ----------------------------------------------------------------------------------------


def _package_directories(name: str) -> list[Path]:
    """Where package `name` lies, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def _toolkits() -> list[Path]:
    """Where a CUDA toolkit may lie, with its lib64 and include."""
    named = [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    return [*named, *([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]


def _search(in_wheels: Sequence[str], in_toolkits: Sequence[str]) -> Path | None:
    """The first match: in the CUDA wheels, the highest version first, then in the toolkits."""
    for roots, patterns in ((_package_directories("nvidia"), in_wheels), (_toolkits(), in_toolkits)):
        for root, pattern in itertools.product(roots, patterns):
            matches = sorted(root.glob(pattern), key=_version, reverse=True)
            if matches:
                return matches[0]
    return None


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


@functools.cache
def _library_path() -> Path | None:
    library = "libnvrtc.so.*[0-9]"
    wheels = [f"cu[0-9]*/lib/{library}", f"cuda_nvrtc/lib/{library}"]
    return _search(wheels, [f"lib64/{library}", f"lib/{library}", f"targets/*/lib/{library}"])


@functools.cache
def _include_directory() -> Path | None:
    wheels = ["cu[0-9]*/include/cuda_bf16.h", "cuda_runtime/include/cuda_bf16.h"]
    header = _search(wheels, ["include/cuda_bf16.h", "targets/*/include/cuda_bf16.h"])
    return header.parent if header else None


@functools.cache
def _tool(name: str) -> Path | None:
    for directory in _package_directories("triton"):
        tool = directory / "backends" / "nvidia" / "bin" / name
        if tool.exists():
            return tool
    found = shutil.which(name)
    return Path(found) if found else None


# ---- NVRTC through ctypes ----------------------------------------------------------------------------------


@functools.cache
def _nvrtc() -> Any:
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    path = _library_path()
    assert path is not None
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by its bare name
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _error_name(status: int) -> str:
    return _nvrtc().nvrtcGetErrorString(status).decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC: {_error_name(status)}")


def _output(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw[: size.value]
