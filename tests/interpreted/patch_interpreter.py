"""Triton's interpreter, mended where it computes something else than a GPU.

It runs a kernel in NumPy, which has no bfloat16: it keeps bit patterns in uint16. Casts between it and float32 cut
instead of rounding, `tl.dot` multiplies the patterns as whole numbers, and so does any other arithmetic, all without a
word (triton-lang/triton#11584). Every function that a kernel calls patches `triton.language` anew, which the launch has
done: a quarter of all time. Import this before the first launch; Triton 3.6 and 3.7.
"""

import numpy as np
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(pattern: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, which has the same first 16 bits."""
    return (np.ascontiguousarray(pattern).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16, to the nearest and to even between two, as the hardware does it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def is_bfloat16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def mended_cast(original):
    def cast(self, source, dtype, *rounding):
        kinds = (source.dtype.scalar, dtype.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        if tl.bfloat16 in kinds and kinds[0] != kinds[1]:
            raise TypeError(f"the interpreter has no cast from {kinds[0]} to {kinds[1]}: go by way of float32")
        return original(self, source, dtype, *rounding)

    return cast


def mended_dot(original):
    def dot(self, a, b, *rest):
        a, b = (TensorHandle(widened(side.data), tl.float32) if is_bfloat16(side) else side for side in (a, b))
        return original(self, a, b, *rest)

    return dot


def refusing_bfloat16(original):
    def operation(self, *operands):
        if any(map(is_bfloat16, operands)):
            raise TypeError("the interpreter has no bfloat16 arithmetic: cast to float32 first")
        return original(self, *operands)

    return operation


def mended_tensors(original):
    """For Triton 3.6 with NumPy >= 2.4, where an array of one element is no index any more: `for t in range(T)`."""

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch


def patched_once(original, scopes=interpreter._LangPatchScope):
    """Patch each module once in a launch, at whose end its scope restores them; the scopes of calls are dropped."""
    patched: set[frozenset] = set()

    class Scope(scopes):
        def restore(self):
            patched.clear()
            super().restore()

    def patch(fn):
        modules = frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return Scope()
        patched.add(modules)
        return original(fn)

    interpreter._LangPatchScope = Scope
    return patch


InterpreterBuilder.cast_impl = mended_cast(InterpreterBuilder.cast_impl)
InterpreterBuilder.create_fp_to_fp = mended_cast(InterpreterBuilder.create_fp_to_fp)
InterpreterBuilder.create_dot = mended_dot(InterpreterBuilder.create_dot)
for _name in ("binary_op", "unary_op", "create_fma"):
    setattr(InterpreterBuilder, _name, refusing_bfloat16(getattr(InterpreterBuilder, _name)))
interpreter._patch_lang_tensor = mended_tensors(interpreter._patch_lang_tensor)
interpreter._patch_lang = patched_once(interpreter._patch_lang)
