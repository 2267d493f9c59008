"""What NumPy, torch and CuPy call differently, so that nothing else needs to know whose array it holds."""

from typing import Any

import numpy as np

from .compat import require

HALVES = ("float16", "bfloat16")
DTYPES = ("float64", "float32", *HALVES)


def library(array: Any) -> str:
    """ "numpy", "torch" or "cupy"; TypeError for anything else. Imports nothing."""
    if isinstance(array, np.ndarray):
        return "numpy"
    for kind in type(array).__mro__:  # torch.nn.Parameter and other subclasses too
        root = kind.__module__.partition(".")[0]
        if (root, kind.__name__) in (("torch", "Tensor"), ("cupy", "ndarray")):
            return root
    raise TypeError(f"expected a NumPy, torch or CuPy array, got {type(array).__name__}")


def dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def device(array: Any) -> str:
    """Where an array lives: "cpu", "cuda:0", "cuda:1", ..."""
    kind = library(array)
    if kind == "numpy":
        return "cpu"
    return f"cuda:{array.device.id}" if kind == "cupy" else str(array.device)


def zeros(shape: tuple[int, ...], like: Any) -> Any:
    """A new array of zeros, of the library, dtype and device of `like`."""
    kind = library(like)
    if kind == "torch":
        return like.new_zeros(shape)
    if kind == "cupy":
        return require("cupy", "a CuPy array").zeros(shape, like.dtype)
    return np.zeros(shape, like.dtype)


def to_numpy(array: Any) -> np.ndarray:
    """A CPU array as NumPy's, without a copy where its dtype allows; torch's halves become float32."""
    if library(array) == "numpy":
        return array
    array = array.detach()
    return (array.float() if dtype(array) in HALVES else array).numpy()


def from_numpy(array: np.ndarray, like: Any, keep_dtype: bool = False) -> Any:
    """A NumPy array as one of the library of `like`, and of its dtype unless `keep_dtype`."""
    if library(like) == "numpy":
        return array
    torch = require("torch", "a torch tensor")
    tensor = torch.from_numpy(array)
    return tensor if keep_dtype else tensor.to(like.dtype)
