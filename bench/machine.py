"""Where and with what something was measured: the columns that say so."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .problems import Case

ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "torch", "triton", "cupy", "onnxruntime")
DISTRIBUTIONS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}


@cache
def describe() -> dict[str, str]:
    gpu, driver = nvidia()
    found = {"machine": f"{processor()}, {os.cpu_count()} cores", "gpu": gpu, "driver": driver}
    found |= {"python": platform.python_version(), **{name: package(name) for name in PACKAGES}}
    return found | {"cudnn": cudnn() if gpu else "", "commit": commit(), "source": source()}


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.M)
    width = " AVX-512" if " avx512f" in text else ""
    return (names[0] if names else platform.machine()) + width


def nvidia() -> tuple[str, str]:
    """Name and driver of the first GPU; empty where there is none."""
    said = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, _, driver = (said.splitlines() or [""])[0].partition(", ")
    return (name, driver) if driver else ("", "")


def package(name: str) -> str:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return ""


def cudnn() -> str:
    import torch

    return str(torch.backends.cudnn.version() or "")


def commit() -> str:
    """The commit, with a + when the tree differs from it; "unknown" outside a repository."""
    head = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip()
    if not head:
        return "unknown"
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--", "gpu_rnn", "kernels", "bench")
    return head + "+" * any(not row.endswith(".csv") for row in changed.splitlines())


def source() -> str:
    """A hash of the package's files: what was measured, also where there is no repository."""
    digest = hashlib.sha1()
    for folder in ("gpu_rnn", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except subprocess.TimeoutExpired:
        return ""


def slug() -> str:
    """A file name for this machine."""
    name = describe()["gpu"] or describe()["machine"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tf32(case: Case) -> bool:
    """Whether torch.nn's recurrent layers round the products of a case. The old flag raises where the new is set."""
    if case.device != "cuda" or case.dtype != "float32":
        return False
    import torch

    new = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    return new == "tf32" if new not in (None, "none") else torch.backends.cudnn.allow_tf32
