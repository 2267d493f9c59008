"""Where compiled code is kept, and what can go wrong on the way there."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_rnn.backends import compiler, dispatch, native
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells

SOURCE = 'extern "C" int answer() { return 42; }\n'
FLAGS = ("-shared", "-fPIC")


def why_not():
    try:
        compiler.find()
    except compiler.CompileError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one, and nothing remembered."""
    place = tmp_path / "cache"
    monkeypatch.setenv(compiler.VARIABLE, str(place))
    monkeypatch.setattr(compiler, "LIBRARIES", {})
    compiler.own_folder.cache_clear()
    return place


def command(tmp_path, text):
    """A compiler of our own, as $CXX."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def answer(**more):
    return compiler.load("answer", SOURCE, FLAGS, **more).answer()


@needs_compiler
def test_it_is_compiled_once_and_kept_for_the_user_alone(cache, caplog):
    with caplog.at_level(logging.INFO, "gpu_rnn"):
        assert answer() == 42
        compiler.LIBRARIES.clear()
        assert answer() == 42
    assert sum("compiling answer" in message for message in caplog.messages) == 1
    (kept,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not kept.stat().st_mode & 0o077


@needs_compiler
def test_all_that_decides_is_in_the_key(cache):
    answer()
    compiler.load("answer", SOURCE + "// more", FLAGS)
    compiler.load("answer", SOURCE, (*FLAGS, "-DA"))
    assert len(list(cache.iterdir())) == 3


@needs_compiler
def test_what_is_no_library_is_made_again(cache):
    answer()
    (kept,) = cache.iterdir()
    fresh = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("GARBAGE", str(kept))], capture_output=True, text=True, check=True
    )
    assert fresh.stdout == "42\n"


PROGRAM = f"""
from pathlib import Path
from gpu_rnn.backends import compiler
Path("GARBAGE").write_text("nothing that can be loaded")
print(compiler.load("answer", {SOURCE!r}, {FLAGS!r}).answer())
"""


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_read(cache, caplog):
    cache.mkdir()
    cache.chmod(0o777)
    assert answer() == 42
    assert not list(cache.iterdir())
    assert any("others can write to it" in message for message in caplog.messages)


@needs_compiler
def test_a_folder_of_another_user_is_not_read(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert compiler.folder() != cache


@needs_compiler
def test_without_a_home_it_is_compiled_for_the_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(compiler.VARIABLE, str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("no folder")
    assert answer() == 42
    assert any("for this process alone" in message for message in caplog.messages)


@needs_compiler
def test_a_folder_that_is_deleted_meanwhile(cache):
    import shutil

    assert answer() == 42
    shutil.rmtree(cache)
    assert answer() == 42
    compiler.LIBRARIES.clear()
    assert answer() == 42


@needs_compiler
def test_processes_race(cache):
    program = f"from gpu_rnn.backends import compiler; print(compiler.load('answer', {SOURCE!r}, {FLAGS!r}).answer())"
    racing = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0] for process in racing] == [b"42\n"] * 3
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'internal error'; exit 3", "failed with 3: internal error"),
        ("exit 1", "it said nothing"),
        ('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"', "made no library that can be loaded"),
        ("exit 0", "made no library that can be loaded"),
    ],
)
def test_a_compiler_that_fails(cache, tmp_path, monkeypatch, text, said, caplog):
    monkeypatch.setenv("CXX", command(tmp_path, text))
    for _ in range(2):
        with pytest.raises(compiler.CompileError, match=said):
            answer()
    assert sum("no native code for answer" in message for message in caplog.messages) == 1
    assert not list(cache.iterdir())


def test_a_compiler_that_hangs_is_stopped_with_all_that_it_started(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "SECONDS", 0.5)
    monkeypatch.setenv("CXX", command(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child; wait"))
    with pytest.raises(compiler.CompileError, match=r"took more than 0.5 s"):
        answer()
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not running(child):
            break
        time.sleep(0.05)
    assert not running(child)
    assert not list(cache.iterdir())


def running(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_an_interrupt_leaves_nothing_and_is_not_remembered(cache, tmp_path, monkeypatch):
    slow = command(tmp_path, f"touch {tmp_path}/started; sleep 60")
    program = f"""
import os, signal, sys
from gpu_rnn.backends import compiler
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    compiler.load("answer", {SOURCE!r}, {FLAGS!r})
except KeyboardInterrupt:
    print(compiler.LIBRARIES)
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"CXX": slow}, stdout=subprocess.PIPE)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == b"{}\n"
    assert not list(cache.iterdir())


def test_a_full_disk(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler, "find", lambda: [sys.executable])
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(compiler.CompileError, match=r"can't be written: .*No space left on device"):
        answer()


def test_without_a_compiler_the_reason_says_so(monkeypatch):
    problem = Problem(cells.get("lstm"), 2, 1, 3, 4)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for remembered in (native.code, native.library):
        remembered.cache_clear()
    assert native.reasons(problem) == ["no C++ compiler: $CXX, c++, g++, clang++ not found"]
    explanation = dispatch.explain(problem)
    assert explanation.backend == "numpy"
    assert "not native: no C++ compiler: $CXX, c++, g++, clang++ not found" in str(explanation)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "$CXX is 'no-such-compiler', which is not found" in native.reasons(problem)[0]
    for remembered in (native.code, native.library):
        remembered.cache_clear()
