"""Compile CUDA kernels with g++ and launch them on the CPU, with the launch plan of the GPU.

    library = compile([device, cell, kernel], {"SCALAR": "__nv_bfloat16"}) library.launch("forward", grid=(4,
    1, 1), block=(128, 1, 1), args=[x, y, np.int32(T)], shared=4096, seed=7)

Every CUDA thread is a fiber (scheduler.cpp); which one runs when is a function of `seed`. Shared memory
starts as NaN; fill the outputs with NaN before a launch, too. Whatever a kernel does wrong that the runtime
notices is a HostError."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

HERE = Path(__file__).parent
DEVICE = HERE.parents[1] / "kernels" / "cuda" / "device.cuh"

Sanitizer = Literal["thread", "address"]
Size = tuple[int, int, int]

_RUNTIME = ("scheduler.cpp", "collectives.cpp", "copies.cpp", "context.cpp")
_HEADERS = ("language.h", "runtime.h", "sanitizers.h", "context.h")
_COMMON = ("-std=c++20", "-pipe", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
# The usual linker takes a quarter of the time that a kernel takes to build, gold a twentieth.
_LINKER = ("-fuse-ld=gold",) if shutil.which("ld.gold") else ()
_RUNTIME_FLAGS: dict[Sanitizer | None, tuple[str, ...]] = {
    None: ("-O2",),
    "thread": ("-O2", "-DHOST_TSAN=1", "-fno-omit-frame-pointer"),
    "address": ("-O2", "-DHOST_ASAN=1", "-fno-omit-frame-pointer"),
}
# Return addresses name the place in the kernel, so calls must stay calls. trace-pc calls the scheduler at
# every basic block, so that a seeded schedule can switch between any two; a sanitizer does not need it to see
# a race, and takes longer to compile optimized code than to run the other.
_KERNEL_FLAGS: dict[Sanitizer | None, tuple[str, ...]] = {
    None: ("-O1", "-fsanitize-coverage=trace-pc"),
    "thread": ("-O0", "-fsanitize=thread", "-fno-omit-frame-pointer"),
    "address": ("-O0", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"),
}
_KERNEL_COMMON = (
    *("-fno-optimize-sibling-calls", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-but-set-variable"),
)

# A launch has as many blocks alive at once as have this many threads in all, unless it says otherwise. More
# than an H200 holds would be of no use, and ThreadSanitizer ends a process that has over 8128 threads, copy
# engines included.
_RESIDENT_THREADS: dict[Sanitizer | None, int] = {None: 1 << 17, "thread": 1 << 11, "address": 1 << 11}


class HostError(RuntimeError):
    """A launch that went wrong: what, and where in the kernel."""


class Source(NamedTuple):
    """A part of a translation unit: the name for messages, and the text."""

    name: str
    text: str


class Parameter(NamedTuple):
    kind: str  # p pointer, f floating, i signed, u unsigned, s struct
    bytes: int


def read(source: Path | Source) -> Source:
    return source if isinstance(source, Source) else Source(str(source), source.read_text())


def join(sources: Iterable[Path | Source]) -> str:
    """One text of several, with #line directives so that messages name the right file."""
    parts = [read(source) for source in sources]
    return "".join(f'#line 1 "{name}"\n{text.rstrip()}\n' for name, text in parts)


def compile(
    sources: Sequence[Path | Source],
    defines: Mapping[str, object] | None = None,
    sanitizer: Sanitizer | None = None,
    flags: Sequence[str] = (),
) -> Library:
    """Compile `sources` as one translation unit, or find it compiled already.

    `sources` begins with device.cuh, as for NVRTC. A library built with a sanitizer only works in a process
    that sanitize.run started. `flags` go to g++, for the kernel and the runtime."""
    text = join(sources)
    settings = [f"-D{name}={value}" for name, value in (defines or {}).items()]
    options = [*_COMMON, *_KERNEL_FLAGS[sanitizer], *_KERNEL_COMMON, *settings, *flags]
    runtime = _runtime_objects(sanitizer, tuple(flags))
    objects = [obj.name for obj in runtime]
    key = _hash(text, *options, *objects, (HERE / "language.h").read_text(), _compiler_version())
    library = _build_directory() / f"kernel-{key}.so"
    if not library.exists():
        with _scratch(library) as scratch:
            unit = scratch.with_suffix(".cu")
            unit.write_text(text)
            kernel = scratch.with_suffix(".o")
            include = ["-I", _header((*_COMMON, *_KERNEL_FLAGS[sanitizer], *_KERNEL_COMMON, *flags)), "-I", HERE]
            _gpp(*options, *include, "-include", "language.h", "-x", "c++", "-c", unit, "-o", kernel)
            link = [flag for flag in _KERNEL_FLAGS[sanitizer] if flag.startswith("-fsanitize=")]
            _gpp("-shared", *_LINKER, "-Wl,-Bsymbolic", *link, "-o", scratch, kernel, *runtime, "-ldl")
    return Library(library, sanitizer)


class Library:
    """The kernels of one translation unit."""

    def __init__(self, path: Path, sanitizer: Sanitizer | None = None) -> None:
        self.path = path
        self.sanitizer = sanitizer
        self.switches = 0  # of fibers, in the last launch
        self._lock = threading.Lock()  # the runtime has one launch at a time
        if sanitizer and str(sanitizer_library(sanitizer)) not in os.environ.get("LD_PRELOAD", ""):
            raise HostError(f"a kernel built with the {sanitizer} sanitizer needs a process of sanitize.run")
        self._library = ctypes.CDLL(str(path))
        self._library.host_error.restype = ctypes.c_char_p
        self._library.host_switches.restype = ctypes.c_uint64

    def parameters(self, name: str) -> list[Parameter]:
        """The parameters of kernel `name`."""
        described = (_Parameter * 64)()
        try:
            count = self._library[f"host_describe_{name}"](described)
        except AttributeError:
            raise HostError(f"no kernel {name} in {self.path}: is there an EXPORT({name})?") from None
        return [Parameter(p.kind.decode(), p.bytes) for p in described[:count]]

    def launch(
        self,
        name: str,
        grid: Size,
        block: Size,
        args: Sequence[Any],
        *,
        shared: int = 0,
        cluster: Size = (1, 1, 1),
        seed: int = 0,
        preempt: int | None = None,
        resident_blocks: int | None = None,
        max_switches: int = 100_000_000,
        without: int | None = None,
    ) -> None:
        """Run a kernel to its end.

        args: a NumPy array for each pointer (the kernel works on it in place), a NumPy or ctypes scalar of
            exactly the parameter's type for the rest.
        shared: bytes of dynamic shared memory.
        seed: 0 is first in, first out; any other is a random schedule of its own.
        preempt: how many of 1000 basic blocks end in a switch; 20 for a random schedule, unless given.
        resident_blocks: how many blocks the device holds at once. The next starts when a whole cluster has
        ended.
        max_switches: a launch that takes more is given up as a livelock.
        without: leave out this barrier; the kernel's text comes from mutate.switchable.
        """
        values = _check_arguments(name, self.parameters(name), args)
        threads = max(math.prod(block), 1)
        fit = max(math.prod(cluster), _RESIDENT_THREADS[self.sanitizer] // threads)
        plan = _Plan(
            grid=tuple(grid),
            block=tuple(block),
            cluster=tuple(cluster),
            resident_blocks=resident_blocks or fit,
            shared_bytes=shared,
            seed=seed,
            max_switches=max_switches,
            without=-1 if without is None else without,
            preempt_permille=preempt if preempt is not None else 20 if seed and not self.sanitizer else 0,
        )
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        with self._lock:
            failed = self._library[f"host_launch_{name}"](ctypes.byref(plan), pointers)
            self.switches = self._library.host_switches()
            if failed:
                text = self._library.host_error().decode()
                raise HostError(f"{name}, seed {seed}: {self._name_places(text)}")

    def _name_places(self, text: str) -> str:
        """Replace addresses <123,456> by the place in the kernel that the first of them to lie there
        means."""
        for addresses in set(re.findall(r"<([0-9a-f,]+)>", text)):
            text = text.replace(f"<{addresses}>", _place(self.path, tuple(addresses.split(","))))
        return text


# ---- Arguments ---------------------------------------------------------------------------------------------


class _Parameter(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("bytes", ctypes.c_uint)]


class _Plan(ctypes.Structure):  # language.h has the same fields
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("resident_blocks", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("max_switches", ctypes.c_uint64),
        ("preempt_permille", ctypes.c_uint),
        ("without", ctypes.c_int),
    ]


def _check_arguments(name: str, parameters: list[Parameter], args: Sequence[Any]) -> list[Any]:
    """`args` as ctypes objects, of the sizes and kinds that the kernel declares."""
    if len(args) != len(parameters):
        raise HostError(f"{name}: {len(args)} arguments for {len(parameters)} parameters")
    pairs = enumerate(zip(parameters, args, strict=True))
    return [_argument(f"{name}, argument {i}", parameter, value) for i, (parameter, value) in pairs]


_KINDS = {"i": "i", "u": "u", "f": "f", "b": "u"}  # of a NumPy dtype


def _argument(where: str, parameter: Parameter, value: Any) -> Any:
    argument: Any
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise HostError(f"{where}: the array is not C-contiguous")
        kind, argument = "p", ctypes.c_void_p(value.ctypes.data)
    elif value is None:
        kind, argument = "p", ctypes.c_void_p(None)
    elif isinstance(value, np.generic):
        kind = _KINDS.get(value.dtype.kind, "?")
        argument = (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
    elif isinstance(value, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)):
        kind, argument = parameter.kind, value
    else:
        raise HostError(f"{where}: {type(value).__name__} is neither an array nor a NumPy or ctypes scalar")
    if (kind, ctypes.sizeof(argument)) != (parameter.kind, parameter.bytes):
        declared, passed = f"{parameter.kind}{parameter.bytes}", f"{kind}{ctypes.sizeof(argument)}"
        raise HostError(f"{where}: the kernel declares {declared}, not {passed} (kind and bytes)")
    return argument


# ---- Building ----------------------------------------------------------------------------------------------


def why_not(sanitizer: Sanitizer | None = None) -> str | None:
    """Why kernels cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if sanitizer and not sanitizer_library(sanitizer).is_absolute():
        return f"g++ has no {sanitizer} sanitizer"
    return None


def sanitizer_library(sanitizer: Sanitizer) -> Path:
    """The shared library that a process must load first; a bare name if g++ has none."""
    name = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
    return Path(_gpp(f"-print-file-name={name}").strip())


def _gpp(*arguments: object) -> str:
    command = ["g++", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise HostError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout


@functools.cache
def _compiler_version() -> str:
    return _gpp("--version")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _build_directory() -> Path:
    directory = HERE / ".build"
    try:
        directory.mkdir(exist_ok=True)
        (directory / ".gitignore").write_text("*\n")
    except OSError:  # a read-only checkout
        directory = Path(tempfile.mkdtemp(prefix="gpu-rnn-host-"))
    return directory


class _scratch:
    """A private file that replaces `target` at the end, so that processes building the same do not
    clash."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.directory = tempfile.TemporaryDirectory(dir=self.target.parent)
        self.file = Path(self.directory.name) / self.target.name
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.file, self.target)
        self.directory.cleanup()


@functools.cache
def _header(options: tuple[str, ...]) -> Path:
    """The folder of language.h, precompiled: otherwise it takes g++ half as long again as most kernels."""
    header = HERE / "language.h"
    folder = _build_directory() / f"header-{_hash(header.read_text(), *options, _compiler_version())}"
    target = folder / "language.h.gch"
    if not target.exists():
        folder.mkdir(exist_ok=True)
        with _scratch(target) as scratch:
            _gpp(*options, "-x", "c++-header", header, "-o", scratch)
    return folder


@functools.cache
def _runtime_objects(sanitizer: Sanitizer | None, flags: tuple[str, ...]) -> list[Path]:
    headers = [(HERE / name).read_text() for name in _HEADERS]
    objects = []
    for name in _RUNTIME:
        options = [*_COMMON, *_RUNTIME_FLAGS[sanitizer], *flags]
        key = _hash((HERE / name).read_text(), *headers, *options, _compiler_version())
        target = _build_directory() / f"{Path(name).stem}-{key}.o"
        if not target.exists():
            with _scratch(target) as scratch:
                _gpp(*options, "-c", HERE / name, "-o", scratch)
        objects.append(target)
    return objects


@functools.cache
def _place(library: Path, addresses: tuple[str, ...]) -> str:
    """`at features.cu:12, called from features.cu:30`, leaving out the runtime and the emulations."""
    if shutil.which("addr2line") is None:
        return f"at {addresses[0]}"
    ours = tuple(f"{name}:" for name in (*_RUNTIME, *_HEADERS, DEVICE.name, "??"))
    for address in addresses:
        command = ["addr2line", "-i", "-e", str(library), address]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        places = [match[1] for line in lines if (match := re.search(r"([^/]+:\d+)( \(.*\))?$", line))]
        kernel = [place for place in places if not place.startswith(ours)]
        if kernel:
            return "at " + ", called from ".join(kernel)
    return "at an unknown place"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """`launch(name, grid, block, args, shared=..., cluster=...)` on the host, with the rest fixed."""

    library: Library
    seed: int = 0
    preempt: int | None = None
    without: int | None = None

    def __call__(
        self,
        name: str,
        grid: Size,
        block: Size,
        args: Sequence[Any],
        *,
        shared: int = 0,
        cluster: Size = (1, 1, 1),
    ) -> None:
        options: dict[str, Any] = {"seed": self.seed, "preempt": self.preempt, "without": self.without}
        self.library.launch(name, grid, block, args, shared=shared, cluster=cluster, **options)
