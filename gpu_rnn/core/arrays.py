"""What NumPy, torch and CuPy call differently, so that nothing else needs to know whose array it holds."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from threading import RLock
from typing import Any

import numpy as np

from gpu_rnn.kernels.autodiff import OPERATIONS

HALF_DTYPES = ("float16", "bfloat16")
DTYPES = ("float64", "float32", *HALF_DTYPES)

TRACERS = {  # package and name of classes that stand for arrays while a library traces a call
    ("jax", "Tracer"): (
        ": a transformation of JAX (jit, grad, vmap) is tracing the call, but gpu_rnn computes with values. Call it "
        "through jax.pure_callback, and for gradients gpu_rnn.vjp in a jax.custom_vjp"
    ),
    ("torch.fx", "Proxy"): (
        ": torch.fx is tracing the call. Layers of gpu_rnn are leaves of its graphs; a function that calls gpu_rnn's "
        "functions becomes one by torch.fx.wrap"
    ),
}


def library(array: Any, label: str | None = None) -> str:
    """ "numpy", "torch" or "cupy"; TypeError for anything else, with the argument's name if given. Imports nothing."""
    kind: type = type(array)
    if label is None:
        return library_of_class(kind)
    try:
        return library_of_class(kind)
    except TypeError as error:
        raise TypeError(f"{label}: {error}") from None


def library_of_class(kind: type) -> str:
    """Of the class of an array. torch.compile takes it for a constant (`operators`); of a cache alone it would warn."""
    return library_of(kind)


@cache  # looked up at every matmul of every time step
def library_of(kind: type) -> str:
    for base in kind.__mro__:  # torch.nn.Parameter and other subclasses too
        root = base.__module__.partition(".")[0]
        if base.__name__ in ("MaskedArray", "MaskedTensor"):
            raise TypeError(
                f"expected a NumPy, torch or CuPy array without a mask, got {kind.__name__}; fill it, and say by "
                "lengths= or reset= what is to be left out"
            )
        if (root, base.__name__) in (("numpy", "ndarray"), ("torch", "Tensor"), ("cupy", "ndarray")):
            return root
    raise TypeError(f"gpu_rnn expected a NumPy, torch or CuPy array, got {kind.__name__}{advice(kind)}")


def advice(kind: type) -> str:
    """How to call gpu_rnn where a tracer's class stands for arrays; "" for any other class."""
    bases = [(base.__module__, base.__name__) for base in kind.__mro__]
    for (package, name), text in TRACERS.items():
        if any(module.startswith(package) and base == name for module, base in bases):
            return text
    return ""


def module(kind: str) -> Any:
    """NumPy, torch or CuPy itself. It is loaded where there is an array of it, and torch.compile can look this up."""
    return sys.modules[kind]


def dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def device(array: Any) -> str:
    """Where an array lives: "cpu", "cuda:0", "cuda:1", ..."""
    kind = library(array)
    if kind == "numpy":
        return "cpu"
    return f"cuda:{array.device.id}" if kind == "cupy" else str(array.device)


Signature = tuple[type, tuple[int, ...], Any, Any]


def array_signature(array: Any) -> Signature | None:
    """Type, shape, dtype and device: all that has to fit, at the cost of a look, and hashable. None stays None."""
    if array is None:
        return None
    kind: type = type(array)
    library = library_of(kind)
    where = array.device if library == "torch" else "cpu" if library == "numpy" else device(array)
    return kind, array.shape, array.dtype, where


def kind_to_str(kind: type, _shape: Any, dtype: Any, device: Any) -> tuple[str, str, str]:
    """What was array_signature -> library, dtype and device by name."""
    return library_of(kind), str(dtype).removeprefix("torch."), str(device)


TORCH_PRIVATE = __name__.removesuffix("core.arrays") + "autograd.torch_private"  # it imports torch alone


def torch_private() -> Any:
    """What is private in torch, which is loaded where there are tensors."""
    return sys.modules[TORCH_PRIVATE]


def is_readable(array: Any) -> bool:
    """Whether Python may read the values of an array on a CPU: they are there, and nothing of torch's watches."""
    return library(array) != "torch" or torch_private().is_readable(array)


def is_exporting(array: Any) -> bool:
    """Whether torch.export captures what happens to an array."""
    return library(array) == "torch" and module("torch").compiler.is_exporting()


def assert_async(condition: Any, message: str) -> None:
    """Raise a RuntimeError where a tensor on a CPU is false, once the program runs that this is traced for. torch.func
    has no such check."""
    if not torch_private().are_transforms_active():
        torch_private().assert_async(condition, message)


def unrecorded(check: Callable) -> Callable:
    """A function whose arithmetic with sizes torch.jit.trace doesn't record, nor warn about: of checks."""

    @wraps(check)
    def run(*args: Any, **keywords: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or not torch.jit.is_tracing():
            return check(*args, **keywords)
        with torch_private().without_jit_tracing():
            return check(*args, **keywords)

    return run


@unrecorded
def sizes(array: Any) -> tuple[int, ...]:
    """The shape of what has the same one in every call, as weights have."""
    return tuple(array.shape)


def zeros(shape: tuple[int, ...], like: Any, dtype: str | None = None) -> Any:
    """A new array of zeros, of the library and device of `like`, and of its dtype unless another is named."""
    kind = library(like)
    if kind == "torch":
        return like.new_zeros(shape, dtype=getattr(module(kind), dtype)) if dtype else like.new_zeros(shape)
    return module(kind).zeros(shape, dtype or like.dtype)


def empty(shape: tuple[int, ...], like: Any, dtype: str | None = None) -> Any:
    """A new array of anything, of the library and device of `like`, and of its dtype unless another is named."""
    kind = library(like)
    if kind == "torch":
        return like.new_empty(shape, dtype=getattr(module(kind), dtype)) if dtype else like.new_empty(shape)
    return module(kind).empty(shape, dtype or like.dtype)


def astype(array: Any, dtype: str) -> Any:
    """The array itself if it has that dtype, else a copy that does."""
    if str(array.dtype).removeprefix("torch.") == dtype:
        return array
    return array.to(getattr(module("torch"), dtype)) if library(array) == "torch" else array.astype(dtype)


def copied(array: Any) -> Any:
    return array.clone() if library(array) == "torch" else array.copy()


def stack(many: Any, axis: int) -> Any:
    return module(library(many[0])).stack(tuple(many), axis)


def concatenate(many: Any, axis: int) -> Any:
    return module(library(many[0])).concatenate(tuple(many), axis)


def unstack(array: Any, n: int) -> list[Any]:
    """[n, ...] -> its n parts, also before torch.jit.trace, which warns of iteration over a tensor."""
    return [array[k] for k in range(n)]


def broadcast(many: Sequence[Any]) -> Sequence[Any]:
    """Arrays as if all had the same shape."""
    xp = module(library(many[0]))
    return (xp.broadcast_tensors if xp.__name__ == "torch" else xp.broadcast_arrays)(*many)


def arange(n: int, like: Any) -> Any:
    """0 to n - 1 in int64, where `like` is."""
    if library(like) == "torch":
        return module("torch").arange(n, device=like.device)
    return module(library(like)).arange(n)


def int64_scalar(value: int, like: Any) -> Any:
    """[1] int64, written where `like` is: a copy from the host waits for the GPU, and no CUDA graph captures it."""
    if library(like) == "torch":
        return module("torch").full((1,), value, dtype=module("torch").int64, device=like.device)
    return module(library(like)).full((1,), value, "int64")


def constant(value: float, like: Any) -> float:
    """The number itself, which torch.compile(dynamic=True) would take for a variable, though it decides on the cell."""
    if library(like) != "torch" or not module("torch").compiler.is_compiling():
        return value
    return torch_private().guard_scalar(value)


def operations(array: Any) -> Mapping[str, Callable]:
    """The operations of a cell graph (`gpu_rnn.kernels.trace.ARITY`) on arrays of the library of `array`."""
    return TORCH_OPERATIONS if library(array) == "torch" else OPERATIONS


def of_torch(name: str) -> Callable:
    return lambda *arrays: getattr(module("torch"), name)(*arrays)


TORCH_OPERATIONS: Mapping[str, Callable] = OPERATIONS | {
    **{name: of_torch(name) for name in ("sigmoid", "tanh", "exp", "log", "rsqrt")},
    "maximum": lambda a, b: torch_maximum(a, b),
    "mean": lambda a: a.mean(-1, keepdim=True),
    "positive": lambda a: (a <= 0).logical_not().to(a.dtype),
    "where": lambda condition, a, b: torch_where(condition, a, b),
}


def torch_maximum(a: Any, b: Any) -> Any:
    """The larger of the two, one of which may be a number; NaN wins. What equals a number has gradient 0."""
    torch = module("torch")
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.maximum(a, b)
    tensor, number = (a, b) if isinstance(a, torch.Tensor) else (b, a)
    return torch.where((tensor > number) | (tensor != tensor), tensor, number)


def torch_where(condition: Any, a: Any, b: Any) -> Any:
    """a where condition > 0, else b; any of them may be a number, of which torch takes two for float32."""
    torch = module("torch")
    numbers = [not isinstance(value, torch.Tensor) for value in (condition, a, b)]
    if numbers[0]:
        return a if condition > 0 else b
    return torch.where(condition > 0, torch.full_like(condition, a) if all(numbers[1:]) else a, b)


def as_contiguous(*many: Any) -> list[Any]:
    """The same values as kernels want them: contiguous, and recorded by no autograd. None stays None, but not first."""
    xp = module(library(many[0]))
    if xp.__name__ != "torch":
        return [None if array is None else xp.ascontiguousarray(array) for array in many]
    recorded = xp.is_grad_enabled()
    return [None if a is None else (a.detach() if recorded and a.requires_grad else a).contiguous() for a in many]


def real_dtype(array: Any) -> str:
    """The dtype to compute in: float64 for float64, float32 for all others."""
    return "float64" if dtype(array) == "float64" else "float32"


def sum_rows(array: Any) -> Any:
    """[R, N] -> [N]. NumPy would add one row after the other, with an error that grows with R."""
    if library(array) == "numpy":
        return array.sum(0, dtype=np.float64).astype(array.dtype, copy=False)
    return array.sum(0)


def flip(array: Any) -> Any:
    """The first axis the other way round."""
    return array.flip(0) if library(array) == "torch" else array[::-1]


def product_dtype(kind: str, dtype: str) -> str:
    """The widest dtype that `matmul` can give for a library and a dtype: float32 for half precision in torch >= 2.8."""
    wide = kind == "torch" and dtype in HALF_DTYPES and hasattr(module(kind).ops.aten.mm, "dtype_out")
    return "float32" if wide else dtype


def default_precision(array: Any) -> str:
    """Of the matmuls of a recurrent layer, where none is forced: "tf32" or "ieee"."""
    if library(array) != "torch" or not array.is_cuda or dtype(array) != "float32":
        return "ieee"
    return torch_precision()


def torch_precision() -> str:
    """What torch's own recurrent layers follow on a GPU."""
    backends = module("torch").backends
    if not hasattr(backends.cudnn.rnn, "fp32_precision"):  # torch < 2.9
        return "tf32" if backends.cudnn.allow_tf32 else "ieee"
    settings = (holder.fp32_precision for holder in (backends.cudnn.rnn, backends.cudnn, backends))
    return next((word for word in settings if word != "none"), "ieee")


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
        else:  # torch has no such matmul on the CPU
            xp.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    elif add is out:
        out += a @ b
    else:
        xp.matmul(a, b, out=out)
        if add is not None:
            out += add


SETTING = RLock()


@contextmanager
def matmul_precision(like: Any, tf32: bool) -> Iterator[None]:
    """torch's float32 matmuls on a GPU, with or without TF32, whatever its setting for matmuls in general says.

    A matmul takes its precision from that setting, which is the whole process's, when it is enqueued. So it is changed
    meanwhile, by one sequence at a time, and put back. A matmul that another thread enqueues just then has it, too.
    """
    if library(like) != "torch" or not like.is_cuda or dtype(like) != "float32":
        yield
        return
    backends = module("torch").backends
    modern = hasattr(backends.cudnn.rnn, "fp32_precision")  # torch >= 2.9
    name, setting = ("fp32_precision", "tf32" if tf32 else "ieee") if modern else ("allow_tf32", tf32)
    with SETTING:
        before = getattr(backends.cuda.matmul, name)
        if modern and before == backends.cudnn.fp32_precision:
            before = "none"  # it follows that one, and shall go on to
        setattr(backends.cuda.matmul, name, setting)
        try:
            yield
        finally:
            setattr(backends.cuda.matmul, name, before)


def pointer(array: Any) -> int:
    """The address of the first element; 0 for None."""
    if array is None:
        return 0
    kind = library(array)
    if kind == "torch":
        return array.data_ptr()
    return array.ctypes.data if kind == "numpy" else array.data.ptr


def pointers(many: Sequence[Any], like: Any) -> tuple[int, ...]:
    """`pointer` of each, of the library of `like`."""
    if library(like) == "torch":
        return tuple([0 if array is None else array.data_ptr() for array in many])
    return tuple(map(pointer, many))


def from_numpy(array: np.ndarray, like: Any) -> Any:
    """A NumPy array as one of the library of `like`, and of its dtype."""
    if isinstance(like, np.ndarray):
        return array
    return module("torch").from_numpy(array).to(like.dtype)
