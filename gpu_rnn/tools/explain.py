"""Which backend would run a call and how, and compiling its kernels beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from gpu_rnn.kernels.cells import Cell, get

from ..backends import cudnn, dispatch
from ..backends.dispatch import Explanation
from ..core import arrays
from ..core.optional_imports import installed, no_gpu, require
from ..core.problem import Memory, Options, Problem, Run
from ..core.validation import ShapeError, as_count, check_flags, check_heads, check_words, validate
from ..functional import PROJECTED, gru, lstm, rnn, rnn_cell_name

FUNCTIONS = (lstm, gru, rnn)


class Explanations(tuple[Explanation, ...]):
    """One Explanation for each direction of each layer, in torch's order; prints equal ones once.

    saved: bytes that a call of the whole layer keeps for backward besides its input, its parameters and given states,
    as saved-tensor hooks count them: those of the parts, and what is between them (outputs of both directions as one
    input, padded and cast copies, masks); without dropout between layers. 0 in inference.
    """

    saved = 0

    def __str__(self) -> str:
        lines = [text for text, _ in groupby(str(replace(each, memory=None)) for each in self)]
        known = [each.memory for each in self if each.memory is not None]
        if known:
            memory = replace(self[0], memory=Memory(self.saved, *map(max, [*zip(*known)][1:]))).memory_to_str()
            lines.append(f"memory{' of the largest part' if len(self) > 1 else ''}: {memory}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    what: str | Callable, x: Any = None, *, T: int | None = None, B: int | None = None, I: int | None = None,
    H: int | None = None, P: int | None = None, num_heads: int = 1, input_projection: bool = False, dtype: Any = None,
    device: Any = None, library: str | None = None, training: bool | None = None, backend: str | None = None,
) -> Explanation | Explanations:  # fmt: skip
    """Explain which backend runs a call and how, why not the others, and which cuDNN algorithm torch.nn would use.

        print(gpu_rnn.explain("lstm", T=256, B=64, I=512, H=512, dtype="float16", training=True))
        print(gpu_rnn.explain(layer, x))

    Nothing is computed. The attributes: `backend` (None: no backend supports the call), `plan`, `reasons`, `cudnn`, and
    `memory`, the bytes of a call: `memory.saved` for backward (y included), and the most that is allocated at once,
    `memory.forward` in forward and `memory.backward` in backward, gradients included.

    Args:
        what: "lstm", "gru", "rnn_tanh" or "rnn_relu"; one of the functions gpu_rnn.lstm, gru, rnn; or a layer.
        x: the input or its shape, [T, B, I]; for a layer whatever it takes, also a PackedSequence.
        T, B, I: instead of x. H, P: hidden and projected size; num_heads: of the H units. A layer knows them.
        input_projection: whether x is the input projection, [T, B, G*H], as with w_ih=None; excludes I.
        dtype, device, library: those of x or the layer, if given; else float32, this machine's GPU if it has one, torch
            if it is installed.
        training: whether the backward pass is included. None: for a layer what autograd would say now, otherwise no.
        backend: selects one, as for `gpu_rnn.lstm`.

    Returns:
        An Explanation; for a layer Explanations, a tuple of one for each direction of each of its layers, with the
        bytes that all of it keeps for backward as `saved`.

    Raises:
        ShapeError: a size that isn't a positive whole number, or that doesn't fit. TypeError: a size is missing or
        given twice. ValueError: unknown cell, dtype, device, library or backend.
    """
    check_words(backend=backend, library=library)
    check_flags(input_projection=input_projection, training=bool(training) if training is None else training)
    sizes = {"T": T, "B": B, "I": I, "H": H, "P": P, "dtype": dtype, "device": device, "library": library}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    sizes |= {"num_heads": num_heads} if num_heads != 1 else {}
    if not isinstance(what, str) and what not in FUNCTIONS:
        if x is None or sizes:
            superfluous = f"; got {', '.join(sizes)} too" if sizes else ""
            raise TypeError(f"explain(layer, x) takes the input or its shape and no other sizes{superfluous}")
        return explain_layer(what, x, training, backend)
    cell = named_cell(what)
    if x is not None:
        shape, of_x = size_and_kind(x)
        if len(shape) != 3:
            raise ShapeError(f"x has shape {list(shape)}; expected [T, B, I]")
        of_x |= dict(zip("TBI", shape))
        if input_projection:
            of_x["H"], rest = divmod(of_x.pop("I"), cell.G)
            if rest:
                raise ShapeError(f"x has shape {list(shape)}; expected an input projection [T, B, {cell.G}*H]")
        if twice := of_x.keys() & sizes.keys():
            raise TypeError(f"x already has {', '.join(sorted(twice))}")
        sizes |= of_x
    if input_projection and I is not None:
        raise TypeError(f"input_projection=True excludes I; got I = {I}")
    if absent := [letter for letter in "TBIH" if letter not in sizes and not (letter == "I" and input_projection)]:
        raise TypeError(f"explaining {cell.label} takes the sizes T, B, I and H; missing: {', '.join(absent)}")
    return dispatch.explain(problem(cell, **sizes, training=bool(training)), backend)


def named_cell(what: str | Callable) -> Cell:
    return get(rnn_cell_name("tanh") if what in (rnn, "rnn") else what if isinstance(what, str) else what.__name__)


def explain_layer(layer: Any, x: Any, training: bool | None, backend: str | None) -> Explanations:
    from ..nn.conversion import as_gpu_rnn_layer

    layer, packed = as_gpu_rnn_layer(layer), hasattr(x, "batch_sizes")
    largest, between = problems_of(layer, x, training)
    if hasattr(layer, "num_layers"):
        directions = 1 + layer.bidirectional
        algorithm = cudnn.algorithm(largest[0], layers=layer.num_layers, directions=directions, packed=packed)
    else:
        algorithm = "none: torch.nn's cells don't use cuDNN"
    single = [dispatch.explain(problem, backend or layer.backend) for problem in largest]
    if layer.recompute:
        single = [replace(each, memory=recomputed(each, backend or layer.backend)) for each in single]
    explanations = Explanations(replace(explanation, cudnn=algorithm) for explanation in single)
    if any(problem.training for problem in largest):
        explanations.saved = between + sum(explanation.memory.saved for explanation in single if explanation.memory)
    return explanations


def recomputed(explanation: Explanation, backend: str | None) -> Memory | None:
    """What a call takes that saves nothing, and backward runs forward once more."""
    problem, memory = explanation.problem, explanation.memory
    if memory is None or not problem.training:
        return memory
    inference = dispatch.explain(replace(problem, training=False), backend).memory
    return inference and inference._replace(backward=memory.forward + memory.backward)


def warmup(
    what: str | Callable, *, T: int = 1, B: int = 1, I: int | None = None, H: int | None = None, P: int | None = None,
    num_heads: int = 1, dtype: Any = None, device: Any = None, training: bool = False, backend: str | None = None,
) -> list[str]:  # fmt: skip
    """Compile the kernels that calls of a layer, a cell or a function will need.

        gpu_rnn.warmup(layer, T=128, B=16, training=True)
        gpu_rnn.warmup(gpu_rnn.lstm, T=128, B=16, I=64, H=512, dtype=torch.bfloat16)

    Before the capture of a CUDA graph, run the layer once besides: cuBLAS, whose matmuls are part of it, makes its
    handle and workspace in its first call on a stream.

    Args:
        what: a layer or cell, torch.nn's are taken for ours; or a name or function, as for `explain`.
        T, B: of the calls to come. A cell has no T. The kernels may be others for other sizes; `explain` tells.
        I, H, P, num_heads, dtype, device: of a function's arrays, torch tensors. A layer knows them, and under autocast
            its dtype.
        training: whether the backward pass is included. backend: selects one, as for `gpu_rnn.lstm`.

    Returns:
        A line for each problem for which something was compiled, with the backend and its kernels; empty where
        NumPy runs, which compiles nothing. Raises as `explain`, and BackendError where nothing can run.
    """
    check_words(backend=backend)
    check_flags(training=training)
    sizes = {"I": I, "H": H, "P": P, "dtype": dtype, "device": device}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    sizes |= {"num_heads": num_heads} if num_heads != 1 else {}
    torch = require("torch", "gpu_rnn.warmup")
    if isinstance(what, str) or what in FUNCTIONS:
        if absent := [letter for letter in "IH" if letter not in sizes]:
            raise TypeError(f"warming up {what!r} takes the sizes T, B, I and H; missing: {', '.join(absent)}")
        problems = [problem(named_cell(what), T=T, B=B, **sizes, library="torch", training=training)]
        where = torch.device(device or problems[0].device)
    else:
        if sizes:
            raise TypeError(f"a layer knows {', '.join(sizes)}; warmup(layer, T=..., B=..., training=...)")
        from ..nn.conversion import as_gpu_rnn_layer

        layer = as_gpu_rnn_layer(what)
        whole = hasattr(layer, "num_layers")
        shape = (B, T) if whole and layer.batch_first else (T, B) if whole else (B,)
        problems, _ = problems_of(layer, (*shape, layer.input_size), training)
        where, backend = next(layer.parameters()).device, backend or layer.backend
    lines: dict[str, None] = {}  # as a set that keeps its order: both directions have the same
    with torch.cuda.device(where if where.type == "cuda" else -1):
        for each in dict.fromkeys(problems):
            chosen = dispatch.choose(each, backend)
            if kernels := chosen.warmup(each):
                lines[f"{each}: {chosen.NAME}, {', '.join(kernels)}"] = None
    return list(lines)


def problems_of(layer: Any, x: Any, training: bool | None) -> tuple[list[Problem], int]:
    """The problems that a layer's own forward poses, for each direction of each layer: for packed input, the largest.

    -> and the bytes of what it allocates for these calls and keeps: their inputs, as far as they aren't the caller's or
    the outputs of another, and what torch saves between them
    """
    packed = hasattr(x, "batch_sizes")
    from torch.autograd.graph import saved_tensors_hooks

    from ..autograd.derivatives import may_need_grad
    from ..autograd.functions import without_casts
    from ..nn.base import record

    problems: list[Problem] = []
    kept: dict[int, Any] = {}  # storages, by identity
    others: set[int] = set()  # of the caller's, and of outputs

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    def recorder(name: str, runs: Sequence[Run], options: Options) -> list[tuple[Any, tuple]]:
        outputs: list[tuple[Any, tuple]] = []
        zeros: dict[tuple, Any] = {}
        for run in runs:
            needed = may_need_grad(run.x, *run.weights, *run.state) if training is None else training
            this = validate(name, [run], options, needed)
            problems.append(replace(this, directions=len(runs), layers=options.layers))
            sizes = [(this.B, this.P or this.H), *[(this.B, this.H)] * (this.cell.S - 1)]
            new = [zeros.setdefault(size, run.x.new_zeros(size)) for size in sizes]  # as `run_cached` has them
            state = [zero if s is None else s for s, zero in zip(run.state, new)]
            for tensor in without_casts((run.x, *run.weights, *state)):
                if tensor is not None:
                    keep(tensor)
            y = keep(run.x.new_empty((this.T, this.B, this.P or this.H), requires_grad=needed))
            others.add(y.untyped_storage()._cdata)
            outputs.append((y, tuple(state)))
        return outputs

    if isinstance(x, (tuple, list)) and not packed:
        for size in x:
            check_size("x", size, f" in its shape {list(x)}")
        x = next(layer.parameters()).new_empty(x)
    values = x.data if packed else x.values() if getattr(x, "is_nested", False) else x
    others |= {tensor.untyped_storage()._cdata for tensor in (values, *layer.parameters())}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        record(layer, recorder, x, None)
    return problems, sum(storage.nbytes() for key, storage in kept.items() if key not in others)


def size_and_kind(x: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of an array, and its library, dtype and device; of a shape itself nothing more."""
    if isinstance(x, (tuple, list)):
        return tuple(x), {}
    return tuple(x.shape), {"library": arrays.library(x), "dtype": arrays.dtype(x), "device": arrays.device(x)}


def problem(
    cell: Cell, *, T: int, B: int, I: int | None = None, H: int, P: int | None = None, num_heads: int = 1,
    dtype: Any = "float32", device: Any = None, library: str | None = None, training: bool, reverse: bool = False,
) -> Problem:  # fmt: skip
    """A Problem, with its sizes and words checked."""
    letters = zip("TBIHP", (T, B, I, H, P))
    sizes = {letter: check_size(letter, size) for letter, size in letters if size is not None}
    T, B, H, I, P = sizes["T"], sizes["B"], sizes["H"], sizes.get("I"), sizes.get("P")
    heads = as_count("num_heads", num_heads)
    check_heads(heads, H, P)
    if P is not None and P >= H:
        raise ShapeError(f"P = {P}, H = {H}; a projection needs P < H")
    if P is not None and cell.name == "gru":
        cell = get(PROJECTED)
    dtype = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")  # "float32", np.float32, torch.float32
    device = str(device or ("cpu" if no_gpu() else "cuda")).partition(":")[0]
    library = library or ("torch" if installed("torch") else "numpy" if device == "cpu" else "cupy")
    check_words(library=library)
    choices = {"dtype": (dtype, arrays.DTYPES), "device": (device, ("cpu", "cuda"))}
    for name, (word, words) in (choices | {"library": (library, ("numpy", "torch", "cupy"))}).items():
        if word not in words:
            raise ValueError(f"{name}: {word!r} is none of {', '.join(words)}")
    if (library, device) in (("numpy", "cuda"), ("cupy", "cpu")):
        raise ValueError(f"{library} has no arrays on {device}")
    follows = (library, device, dtype) == ("torch", "cuda", "float32")
    tf32 = follows and arrays.torch_precision() == "tf32"
    return Problem(cell, T, B, I, H, P, dtype, device, library, training, reverse, tf32, heads=heads)


def check_size(name: str, size: Any, where: str = "") -> int:
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ShapeError(f"{name} has the size {size!r}{where}; sizes are whole numbers, 1 or larger")
    return int(size)  # NumPy's may be small
