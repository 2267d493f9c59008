"""Which of the optional libraries are here, and what to tell the user about one that is not.

The one place that tries an import; `import gpu_rnn` itself loads NumPy only.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

EXTRAS = {
    "torch": "torch",
    "triton": "triton",
    "cupy": "cuda13",
    "matplotlib": "demo",
    "click": "demo",
    "rich": "demo",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "h5py": "keras",
    "keras": "keras",
    "sklearn": "cells",
}


def install(name: str) -> str:
    """Return the command that brings the library `name`; an extra needs a checkout, as no index has this package."""
    return f"pip install '.[{EXTRAS[name]}]' in a checkout of gpu-rnn" if name in EXTRAS else f"pip install {name}"


def installed(name: str) -> bool:
    """Whether `name` could be imported; doesn't import it."""
    return find_spec(name) is not None


def require(name: str, purpose: str) -> ModuleType:
    """The module, or an ImportError that says what it is needed for and how to get it."""
    try:
        return sys.modules.get(name) or importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}, which could not be imported ({error}); {install(name)}") from error


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Run `then` now if the module is loaded, else right after it has been; don't load it."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, Watch(name, then))


class Watch(MetaPathFinder):
    """Find a module as the others do, and run something once it is loaded."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # a new one in every call: some only ask, as `installed`
            load = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                del loader.exec_module
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.then()

            loader.exec_module = exec_module
        return spec


@cache
def missing(name: str) -> str | None:
    """Why `name` can't be used here, or None when it can. The answer is kept."""
    if not installed(name):
        return f"{name} is not installed ({install(name)})"
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken CUDA installation raises nearly anything
        return f"{name} is installed but can't be imported: {type(error).__name__}: {error}"
    return None


@cache
def no_gpu() -> str | None:
    """Why no NVIDIA GPU can be used here through torch or CuPy, or None when one can."""
    tried = []
    if missing("torch") is None:
        import torch

        if torch.cuda.is_available():
            return None
        tried.append("torch " + ("sees no GPU" if torch.version.cuda else "is a build without CUDA"))
    if missing("cupy") is None:
        import cupy

        if cupy.is_available():
            return None
        tried.append("CuPy sees no GPU")
    return "no NVIDIA GPU: " + (", ".join(tried) or "neither torch nor CuPy is installed")
