"""Triton's kernels and backend without a GPU: the files of tests/interpreted, in processes of their own.

The interpreter is chosen by an environment variable that Triton reads when a kernel is defined. A process has several
files, as most take less time than it takes to start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "interpreted").glob("test_*.py"))


@pytest.mark.first
@pytest.mark.parametrize("files", [FILES[k::4] for k in range(4)], ids=lambda files: " ".join(f.stem for f in files))
def test_under_the_interpreter(files):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
