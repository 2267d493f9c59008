"""Triton's kernels and backend without a GPU: each file of tests/interpreted, in a process of its own.

The interpreter is chosen by an environment variable that Triton reads when a kernel is defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "interpreted").glob("test_*.py")), ids=lambda file: file.stem)
def test_under_the_interpreter(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
