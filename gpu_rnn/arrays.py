"""What NumPy, torch and CuPy call differently, so that nothing else needs to know whose array it holds."""

from functools import cache
from typing import Any

import numpy as np

from .compat import require

HALVES = ("float16", "bfloat16")
DTYPES = ("float64", "float32", *HALVES)


def library(array: Any) -> str:
    """ "numpy", "torch" or "cupy"; TypeError for anything else. Imports nothing."""
    kind: type = type(array)
    return library_of(kind)


@cache  # asked at every product of every instant
def library_of(kind: type) -> str:
    for base in kind.__mro__:  # torch.nn.Parameter and other subclasses too
        root = base.__module__.partition(".")[0]
        if (root, base.__name__) in (("numpy", "ndarray"), ("torch", "Tensor"), ("cupy", "ndarray")):
            return root
    raise TypeError(f"expected a NumPy, torch or CuPy array, got {kind.__name__}")


@cache
def module(kind: str) -> Any:
    """NumPy, torch or CuPy itself."""
    return require(kind, f"a {kind} array")


def dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def device(array: Any) -> str:
    """Where an array lives: "cpu", "cuda:0", "cuda:1", ..."""
    kind = library(array)
    if kind == "numpy":
        return "cpu"
    return f"cuda:{array.device.id}" if kind == "cupy" else str(array.device)


def zeros(shape: tuple[int, ...], like: Any, dtype: str | None = None) -> Any:
    """A new array of zeros, of the library and device of `like`, and of its dtype unless another is named."""
    kind = library(like)
    if kind == "torch":
        return like.new_zeros(shape, dtype=getattr(module(kind), dtype) if dtype else like.dtype)
    return module(kind).zeros(shape, dtype or like.dtype)


def empty(shape: tuple[int, ...], like: Any, dtype: str | None = None) -> Any:
    """A new array of anything, of the library and device of `like`, and of its dtype unless another is named."""
    kind = library(like)
    if kind == "torch":
        return like.new_empty(shape, dtype=getattr(module(kind), dtype) if dtype else like.dtype)
    return module(kind).empty(shape, dtype or like.dtype)


def plain(array: Any) -> Any:
    """The same values as kernels want them: contiguous, and no part of an autograd graph. None stays None."""
    if array is None:
        return None
    kind = library(array)
    return array.detach().contiguous() if kind == "torch" else module(kind).ascontiguousarray(array)


def real_dtype(array: Any) -> str:
    """The dtype to compute in: float64 for float64, float32 for all others."""
    return "float64" if dtype(array) == "float64" else "float32"


def product_dtype(kind: str, dtype: str) -> str:
    """The widest dtype that `matmul` can give for arrays of a library and dtype: float32 for halves in torch >= 2.8."""
    wide = kind == "torch" and dtype in HALVES and hasattr(module(kind).ops.aten.mm, "dtype_out")
    return "float32" if wide else dtype


def tf32(kind: str) -> bool:
    """Whether float32 products of recurrent layers may be TF32: what torch's own layers follow; not for others."""
    if kind != "torch":
        return False
    cudnn = module(kind).backends.cudnn
    if not hasattr(cudnn.rnn, "fp32_precision"):  # torch < 2.9
        return cudnn.allow_tf32
    asked = (cudnn.rnn.fp32_precision, getattr(cudnn, "fp32_precision", "none"), module(kind).backends.fp32_precision)
    return next((precision for precision in asked if precision != "none"), "ieee") == "tf32"


def matmul(a: Any, b: Any, out: Any, add: Any = None) -> None:
    """out = a @ b + add, for matrices. `out` may have the product dtype; `add` may be `out`. Without it nothing is
    allocated."""
    kind = library(out)
    xp = module(kind)
    if kind == "torch":
        if add is not None:
            xp.addmm(add, a, b, out=out)
        elif a.dtype == out.dtype:
            xp.mm(a, b, out=out)
        elif out.is_cuda:
            xp.mm(a, b, out_dtype=out.dtype, out=out)
        else:  # torch has no such product on the CPU
            xp.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    elif add is out:
        out += a @ b
    else:
        xp.matmul(a, b, out=out)
        if add is not None:
            out += add


def pointer(array: Any) -> int:
    """The address of the first element; 0 for None."""
    if array is None:
        return 0
    kind = library(array)
    if kind == "torch":
        return array.data_ptr()
    return array.ctypes.data if kind == "numpy" else array.data.ptr


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
    tensor = module("torch").from_numpy(array)
    return tensor if keep_dtype else tensor.to(like.dtype)
