"""C++ compiled by the system's compiler for this machine, once: libraries are kept in the user's cache.

A library's name has a hash of all that decides on it: source, flags, compiler and CPU. It is written under another name
and renamed when it has been loaded, so that processes can race and nothing half-written is ever found. A cache folder
that others can write to is not read; without a folder of the user's own, one for this process alone takes its place.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock

VARIABLE = "GPU_RNN_CACHE"
NAMES = ("c++", "g++", "clang++")
SECONDS = 120  # that a compiler may take; it takes 1 to 3
MOST_WORDS = 600  # of what it says when it fails
LOG = logging.getLogger("gpu_rnn")

LIBRARIES: dict[tuple, "ctypes.CDLL | CompileError"] = {}
BUILDING = Lock()


class CompileError(RuntimeError):
    """There is no compiler, or it didn't make a library; the message says why."""


def load(name: str, source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a source, from the cache or compiled now.

    Raises:
        CompileError: the same one again at every further call, without another attempt.
    """
    key = name, source, tuple(flags), os.environ.get("CXX")
    result = LIBRARIES.get(key)
    if result is None:
        with BUILDING:
            if key not in LIBRARIES:
                try:
                    LIBRARIES[key] = build(name, source, flags)
                except CompileError as error:
                    LOG.warning("no native code for %s: %s", name, error)
                    LIBRARIES[key] = error
            result = LIBRARIES[key]
    if isinstance(result, CompileError):
        raise CompileError(*result.args)
    return result


def find() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of NAMES that there is."""
    requested = os.environ.get("CXX")
    if requested:
        command = shlex.split(requested)
        path = shutil.which(command[0])
        if path is None:
            raise CompileError(f"no C++ compiler: $CXX is {requested!r}, which is not found")
        return [path, *command[1:]]
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return [path]
    raise CompileError(f"no C++ compiler: $CXX, {', '.join(NAMES)} not found")


def build(name: str, source: str, flags: Sequence[str]) -> ctypes.CDLL:
    command = find()
    status = os.stat(command[0])
    model, features = cpu()
    decides = source, *flags, *command, status.st_size, status.st_mtime_ns, model, *sorted(features)
    key = hashlib.sha256("\0".join(map(str, decides)).encode()).hexdigest()[:32]
    try:
        place = folder()
        kept = place / f"{''.join(c if c.isalnum() else '_' for c in name)[:40]}-{key}.so"
        if kept.exists() and is_private(kept):
            with contextlib.suppress(OSError):  # not a library any more: make it again
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(prefix="compiling-", dir=place) as room:
            made = Path(room) / "library.so"
            text = Path(room) / "source.cpp"
            text.write_text(source)
            LOG.info("compiling %s with %s, once; it is kept in %s", name, command[0], place)
            run([*command, *flags, str(text), "-o", str(made)])
            try:
                library = ctypes.CDLL(str(made))
            except OSError as error:
                raise CompileError(f"{command[0]} made no library that can be loaded: {error}") from error
            os.chmod(made, 0o700)
            os.replace(made, kept)
            return library
    except OSError as error:  # a full disk, a folder that was removed meanwhile
        raise CompileError(f"compiled code can't be written: {error}") from error


def run(command: Sequence[str]) -> None:
    """The compiler, in a process group of its own: whatever ends this ends all that it has started."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompileError(f"{command[0]} took more than {SECONDS} s and was stopped") from error
            raise
    if process.returncode != 0:
        words = said.decode(errors="replace").strip()
        raise CompileError(f"{command[0]} failed with {process.returncode}: {words[:MOST_WORDS] or 'it said nothing'}")


# ---- Where libraries are kept ---------------------------------------------------------------------------------------


def requested_folder() -> Path:
    if requested := os.environ.get(VARIABLE):
        return Path(requested)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gpu_rnn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu_rnn"


def folder() -> Path:
    """The user's cache, if it can be written, and by no other user; or one for this process."""
    try:
        path = requested_folder()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(path) and os.access(path, os.W_OK | os.X_OK):
            return path
        why = "others can write to it" if os.access(path, os.W_OK | os.X_OK) else "it can't be written"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        why = str(error)
    return own_folder(os.getpid(), why)


@cache
def own_folder(_process: int, why: str) -> Path:
    LOG.warning("the cache of compiled code isn't used: %s; it is compiled for this process alone", why)
    room = tempfile.TemporaryDirectory(prefix="gpu_rnn-")
    ROOMS.append(room)  # removed with the process
    return Path(room.name)


ROOMS: list[tempfile.TemporaryDirectory] = []


def is_private(path: Path) -> bool:
    """Whether it is this user's and no other can write to it."""
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# ---- What the CPU is ------------------------------------------------------------------------------------------------


@cache
def cpu() -> tuple[str, frozenset[str]]:
    """Architecture and model, and the features that instruction sets are chosen by."""
    machine, model, features = platform.machine(), platform.processor(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            label, _, value = (part.strip() for part in line.partition(":"))
            if label in ("flags", "Features"):
                features = set(value.split())
            elif label in ("model name", "CPU part"):
                model = value
            elif not line and features:
                break
    if machine in ("arm64", "aarch64"):
        features.add("asimd")
    return f"{machine} {model}", frozenset(features)
