"""What both GPU backends do around the time loop: buffers, the input projection before it, weight gradients after it.

The time loop of a pass is the backend's: per step (`per_step`), or in one launch by a persistent kernel. Either fills
the same buffers, so that forward may be one and backward the other:

    run_forward(problem, [ForwardBuffers(...), ...])        run_backward(problem, [BackwardBuffers(...), ...])

with buffers for each run of the problem: directions, or the layers of a stack that run as a wavefront.

Every array is contiguous and on one device. There are three dtypes: `storage`, the caller's; `real`, the dtype of
computing, float64 for float64, else float32; and, within a time loop, that of its recurrent matmuls. State index t,
from 0 to T, lies between the time steps t-1 and t: forward a time step leads from state index t to t+1, in reverse
from t+1 to t.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell, recurrent_input_graph

from ..core import arrays
from ..core.cell_inputs import NO_AUX, AuxInputs
from ..core.problem import Grads, Memory, Problem, Result, Run, Weights
from .protocol import Needs


class ForwardBuffers(NamedTuple):
    """What a time loop reads and writes, forward. P = H without projection."""

    Wx: Any  # [T, B, G*H] storage; input projection, b_ih included; it may be the caller's x
    w_hh: Any  # [G*H, P] storage
    b_hh: Any  # [G*H] storage, or None
    w_hr: Any  # [P, H] storage, or None
    h0: Any  # [B, P] or [1, B, P] storage
    cell_states: Any  # [T+1, S-1, B, H] real; the first is input, the rest written; [S-1, .., H] if nothing is saved,
    # in the shape of the first states, and overwritten with the last
    saved: Any  # [T, B, K, H] storage, written; None if nothing is saved; Wx's memory where K = G
    h_unprojected: Any  # [T, B, H] storage, written; y itself without projection
    y: Any  # [T, B, P] storage, written
    aux: AuxInputs
    reverse: bool
    w_ih: Any = None  # [G*H, H] storage, and
    b_ih: Any = None  # [G*H] storage, or None: of a layer that takes its input from the one below; then Wx is None

    def time_slice(self, begin: int, end: int) -> "ForwardBuffers":
        """The time steps `begin` to `end` of a layer of a stack, after those before have run."""
        Wx, saved, y = (None if array is None else array[begin:end] for array in (self.Wx, self.saved, self.y))
        states = self.cell_states if saved is None else self.cell_states[begin : end + 1]
        h0 = self.h0 if begin == 0 else self.y[begin - 1]
        return self._replace(Wx=Wx, saved=saved, y=y, h_unprojected=y, cell_states=states, h0=h0)


class BackwardBuffers(NamedTuple):
    """What a time loop reads and writes, backward."""

    dy: Any  # [T, B, P] storage; with a projection overwritten with the whole gradient of y; in a stack below the last
    # layer the caller's part of it, or None
    dh: Any  # [B, P] or [1, B, P] real; gradient of the last h, overwritten with that of the first
    dcell_states: Any  # [S-1, B, H] real; the same for the cell states
    w_hh: Any  # [G*H, P] storage
    w_hr: Any  # [P, H] storage, or None
    h0: Any  # [B, P] or [1, B, P] storage
    cell_states: Any  # [T+1, S-1, B, H] real
    saved: Any  # [T, B, K, H] storage
    h_unprojected: Any  # [T, B, H] storage
    y: Any  # [T, B, P] storage
    dWx: Any  # [T, B, G*H] storage, written
    dRh: Any  # [T, B, G*H] storage, written; None where it equals dWx (no gate is `separate`)
    dhistory: Any  # [T, S-1, B, H] storage; gradients of the cell states after every time step, or None for zero
    dunits: Any  # [trainable, B, H] real; zeros, accumulated; None if no per-unit parameter is trainable
    aux: AuxInputs
    reverse: bool
    w_ih: Any = None  # [G*H, H] storage, of a layer that takes its input from the one below

    def time_slice(self, begin: int, end: int) -> "BackwardBuffers":
        """The time steps `begin` to `end` of a layer of a stack, after those behind have run."""
        dy, saved, y, dWx, dRh = (
            None if array is None else array[begin:end] for array in (self.dy, self.saved, self.y, self.dWx, self.dRh)
        )
        states, h0 = self.cell_states[begin : end + 1], self.h0 if begin == 0 else self.y[begin - 1]
        return self._replace(dy=dy, saved=saved, y=y, h_unprojected=y, dWx=dWx, dRh=dRh, cell_states=states, h0=h0)


def forward(run_forward: Callable[..., None], problem: Problem, runs: Sequence[Run]) -> list[Result]:
    """`Backend.forward` by a time loop. Saved are (activations, cell states), and with a projection `h_unprojected`."""
    buffers: list[ForwardBuffers] = []
    for run in runs:
        below = buffers[-1].y if buffers and problem.layers > 1 else None
        buffers.append(allocate_forward(problem, as_contiguous(run, below), linked=below is not None))
    run_forward(problem, buffers)
    return [finalize(problem, filled, run) for filled, run in zip(buffers, runs)]


def backward(
    run_backward: Callable[..., None], problem: Problem, runs: Sequence[Run], saved: Sequence[tuple],
    grads: Sequence[Grads], needs: Sequence[Needs],
) -> list[dict[str, Any]]:  # fmt: skip
    """`Backend.backward` by a time loop."""
    contiguous, buffers = [], []
    for k, (run, arrays_saved, grad) in enumerate(zip(runs, saved, grads, strict=True)):
        linked = k > 0 and problem.layers > 1
        contiguous.append(as_contiguous(run, saved[k - 1][0] if linked else None))
        buffers.append(allocate_backward(problem, contiguous[-1], arrays_saved, grad, linked=linked))
    run_backward(problem, buffers)
    by_run = []
    for k, (run, filled, names) in enumerate(zip(contiguous, buffers, needs, strict=True)):
        names = {*names} - {"x"} if k > 0 and problem.layers > 1 else names  # x is the layer's below
        by_run.append(weight_gradients(problem, filled, run, names))
    return by_run


def as_contiguous(run: Run, below: Any = None) -> Run:
    """A run of contiguous arrays, on no autograd graph. below: x, where the run has none."""
    x, weights, state, reverse = run
    x, *flat = arrays.as_contiguous(x if below is None else below, *weights, *state)
    return Run(x, Weights(*flat[: len(weights)]), flat[len(weights) :], reverse)


def aux_inputs(weights: Weights) -> AuxInputs:
    plain = weights.units is weights.flags is weights.seed is None
    return NO_AUX if plain else AuxInputs.of(weights)


def aux_rows(aux: AuxInputs) -> int:
    """How many rows per-unit parameters have: B, or 1 for the whole batch."""
    return 1 if aux.units is None else aux.units.shape[1]


def allocate_forward(problem: Problem, run: Run, *, linked: bool = False) -> ForwardBuffers:
    """Buffers of a run, with its input projection, unless the time loop projects the y of the layer below (linked)."""
    x, weights, state, reverse = run
    cell, T, B, H, save = problem.cell, problem.T, problem.B, problem.H, problem.saves
    Wx: Any = None if linked else input_projection(x, weights, problem.step_exact)
    saved, real = None, arrays.real_dtype(x)
    if not save and cell.S > 1:
        cell_states = arrays.astype(arrays.stack(state[1:], 0), real)
    else:
        cell_states = arrays.empty((T + 1, cell.S - 1, B, H), like=x, dtype=real)
    if save:
        for s, initial in enumerate(state[1:]):
            cell_states[T if reverse else 0, s] = initial
        in_place = cell.K == cell.G and not linked and Wx is not x
        saved = Wx.reshape(T, B, cell.K, H) if in_place else arrays.empty((T, B, cell.K, H), like=x)
    y = arrays.empty((T, B, problem.P or H), like=x)
    h_unprojected = y if weights.w_hr is None else arrays.empty((T, B, H), like=x)
    return ForwardBuffers(
        Wx, weights.w_hh, weights.b_hh, weights.w_hr, state[0], cell_states, saved, h_unprojected, y,
        aux_inputs(weights), reverse, *((weights.w_ih, weights.b_ih) if linked else ()),
    )  # fmt: skip


def finalize(problem: Problem, buffers: ForwardBuffers, run: Run) -> Result:
    (h0, *others), y, states = run.state, buffers.y, buffers.cell_states
    end, copy = 0 if buffers.reverse else -1, problem.saves or len(others) > 1  # else the memory is shared with none
    rows = [states[end, at(s, initial)] if problem.saves else states[s] for s, initial in enumerate(others)]
    last = (to_storage(y[at(end, h0)], y), *[to_storage(row, y, copy) for row in rows])
    history: tuple = ()
    if problem.history:
        after = states[:-1] if buffers.reverse else states[1:]
        history = tuple([to_storage(after[:, s], like=y) for s in range(problem.cell.S - 1)])
    saved = (buffers.saved, states, *([] if problem.P is None else [buffers.h_unprojected])) if problem.training else ()
    return Result(y, last, history, saved)


def at(k: int, initial: Any) -> int | slice:
    """An index, which leaves an axis of one where the first state has it."""
    return k if len(initial.shape) == 2 else slice(k, k + 1 or None)


def allocate_backward(
    problem: Problem, run: Run, saved: tuple, grads: Grads, *, linked: bool = False
) -> BackwardBuffers:  # fmt: skip
    x, weights, state, reverse = run
    y, activations, cell_states, dy, *unprojected = arrays.as_contiguous(*saved[:3], grads.y, *saved[3:])
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    real = arrays.real_dtype(x)
    dWx = arrays.empty((T, B, cell.G * H), like=x)
    dRh = arrays.empty((T, B, cell.G * H), like=x) if any(cell.separate) else None
    dcell_states = arrays.empty((cell.S - 1, B, H), like=x, dtype=real)
    dh = to_storage(grads.last[0], like=dcell_states)
    for s, gradient in enumerate(grads.last[1:]):
        dcell_states[s] = gradient
    (h_unprojected,) = unprojected or (y,)
    if problem.P is not None:
        dy = to_storage(dy, like=x)  # the time loop writes to it
    dunits = arrays.zeros((cell.num_trainable, B, H), like=x, dtype=real) if cell.num_trainable else None
    dhistory = arrays.stack(grads.history, 1) if grads.history else None
    return BackwardBuffers(
        dy, dh, dcell_states, weights.w_hh, weights.w_hr, state[0], cell_states, activations, h_unprojected, y, dWx,
        dRh, dhistory, dunits, aux_inputs(weights), reverse, weights.w_ih if linked else None,
    )  # fmt: skip


def weight_gradients(problem: Problem, buffers: BackwardBuffers, run: Run, needs: Needs) -> dict[str, Any]:
    """The matmuls after the time loop."""
    x, weights, (h0, *others), reverse = run
    cell, T, B, H, P = problem.cell, problem.T, problem.B, problem.H, problem.P or problem.H
    dRh = buffers.dWx if buffers.dRh is None else buffers.dRh
    dcell_states = [to_storage(buffers.dcell_states[at(s, initial)], x, copy=False) for s, initial in enumerate(others)]
    gradients: dict[str, Any] = {"state": (to_storage(buffers.dh, x, copy=False).reshape(h0.shape), *dcell_states)}
    gradients |= input_projection_grad(buffers.dWx, x, weights, needs)
    if "w_hh" in needs:
        h_in = recurrent_inputs(cell, buffers.y, h0.reshape(B, P), buffers.aux, reverse)
        gradients["w_hh"] = recurrent_weight_grad(dRh, h_in, reverse)
    if "b_hh" in needs:
        same, GH = buffers.dRh is None and "b_ih" in gradients, cell.G * H
        gradients["b_hh"] = arrays.copied(gradients["b_ih"]) if same else arrays.sum_rows(dRh.reshape(T * B, GH))
    if "w_hr" in needs and weights.w_hr is not None:
        gradients["w_hr"] = matmul(buffers.dy.reshape(T * B, P).T, buffers.h_unprojected.reshape(T * B, H), like=x)
    if "units" in needs:
        gradients["units"], dunits = arrays.zeros(tuple(weights.units.shape), like=x), buffers.dunits
        if dunits is not None:
            whole = dunits if weights.units.shape[1] == B else dunits.sum(1, keepdims=True)
            gradients["units"][: cell.num_trainable] = whole
    return gradients


def input_projection(x: Any, weights: Weights, step_exact: bool) -> Any:
    """x [T, B, I] -> [T, B, G*H], b_ih included; x itself if it is that. step_exact: by a matmul per time step."""
    if weights.w_ih is None:
        return x if weights.b_ih is None else x + weights.b_ih
    (T, B, I), (GH, _) = x.shape, weights.w_ih.shape
    Wx = arrays.empty((T, B, GH), like=x)
    W, b = weights.w_ih.T, weights.b_ih
    if not step_exact:
        arrays.matmul(x.reshape(T * B, I), W, out=Wx.reshape(T * B, GH), add=b)
        return Wx
    x_t, Wx_t = arrays.empty((B, I), like=x), arrays.empty((B, GH), like=x)
    for source, target in zip(x, Wx):  # by the same two arrays: a library may add in another order for other addresses
        x_t[...] = source
        arrays.matmul(x_t, W, out=Wx_t, add=b)
        target[...] = Wx_t
    return Wx


def input_projection_grad(dWx: Any, x: Any, weights: Weights, needs: Needs) -> dict[str, Any]:
    """The gradient of `input_projection`: [T, B, G*H] -> those of x, w_ih and b_ih that are needed."""
    T, B, GH = dWx.shape
    rows, gradients = dWx.reshape(T * B, GH), {}
    if "x" in needs:
        gradients["x"] = dWx if weights.w_ih is None else matmul(rows, weights.w_ih, like=dWx).reshape(*x.shape)
    if "w_ih" in needs:
        gradients["w_ih"] = matmul(rows.T, x.reshape(T * B, x.shape[2]), like=dWx)
    if "b_ih" in needs:
        gradients["b_ih"] = arrays.sum_rows(rows)
    return gradients


def describe_projection(problem: Problem) -> str:
    """What a plan says of what comes before the time loop."""
    gemms = "one GEMM per time step" if problem.step_exact else "one GEMM for all time steps"
    return problem.projection or f"input projection: {gemms}"


def describe_per_step(problem: Problem) -> str:
    """What a plan says of the per-step kernels."""
    product = arrays.product_dtype(problem.library, problem.dtype)
    return f"per-step kernels: one GEMM (accumulated in {product}) and one fused elementwise kernel per time step"


def saved_shapes(problem: Problem) -> list[tuple[tuple, str]]:
    cell, T, B, H = problem.cell, problem.T, problem.B, problem.H
    real = "float64" if problem.dtype == "float64" else "float32"
    shapes: list[tuple[tuple, str]] = [((T, B, cell.K, H), problem.dtype), ((T + 1, cell.S - 1, B, H), real)]
    return shapes if problem.P is None else [*shapes, ((T, B, H), problem.dtype)]


def memory(problem: Problem, forward: int, backward: int) -> Memory:
    """What a run takes with these buffers. forward, backward: bytes that the time loop takes for itself."""
    cell, T, B, H, s, r = problem.cell, problem.T, problem.B, problem.H, problem.itemsize, problem.real_itemsize
    gates, row, save = T * B * cell.G * H * s, B * H, problem.saves
    projection = 0 if problem.I is None else gates
    in_place = cell.K == cell.G and projection > 0  # of the input projection
    saved = T * row * cell.K * s if save else 0
    cell_states = (T + 1 if save else 1) * (cell.S - 1) * row * r
    unprojected = T * row * s if problem.P else 0
    y = problem.output_elements * s
    states = problem.state_elements * s
    history = T * (cell.S - 1) * row * s if problem.history else 0
    whole = y + projection + (0 if in_place else saved) + cell_states + unprojected + states + history + forward
    if not problem.training:
        return Memory(0, whole, 0)
    back = gates * (1 + any(cell.separate)) + (y if problem.P else 0) + history
    back += (problem.state_elements + cell.num_trainable * row) * r + states + backward
    gradients = (problem.weight_elements + (problem.input_elements if projection else 0)) * s
    return Memory(y + saved + cell_states + unprojected, whole, back + gradients)


def gemm_operands(x: Any, weights: Weights) -> tuple[Any, Weights]:
    """`Backend.gemm_operands`: the caller's library multiplies."""
    return x, weights


def recurrent_inputs(cell: Cell, y: Any, h0: Any, aux: AuxInputs, reverse: bool) -> tuple[Any, Any]:
    """The inputs of the recurrent matmuls: at the first time step [B, P], at the later ones [T-1, B, P], by t."""
    first, later, before = (-1, slice(None, -1), slice(1, None)) if reverse else (0, slice(1, None), slice(None, -1))
    if cell.recurrent_input is None:
        return h0, y[before]
    return recurrent_input(cell, h0, aux, first), recurrent_input(cell, y[before], aux, later)


def recurrent_weight_grad(dRh: Any, h_in: tuple[Any, Any], reverse: bool) -> Any:
    """dRh [T, B, G*H] and the inputs of the recurrent matmuls -> [G*H, P]."""
    (T, B, GH), (first, rest), P = dRh.shape, h_in, h_in[0].shape[1]
    total = matmul(dRh[-1 if reverse else 0].T, first, like=first)
    if T > 1:
        later = dRh[:-1] if reverse else dRh[1:]
        arrays.matmul(later.reshape((T - 1) * B, GH).T, rest.reshape((T - 1) * B, P), out=total, add=total)
    return total


def recurrent_input(cell: Cell, h: Any, aux: AuxInputs, t: Any) -> Any:
    """What is multiplied by the recurrent weights instead of h [.., B, P], at the time step or time steps t."""
    ((h_in,),) = recurrent_input_graph(cell).run(arrays.operations(h), h=[h], extra=aux.at(cell, t, h.shape[-1]))
    return arrays.astype(h_in, arrays.dtype(h))


def matmul(a: Any, b: Any, like: Any) -> Any:
    """a @ b in a new array."""
    out = arrays.empty((a.shape[0], b.shape[1]), like=like)
    arrays.matmul(a, b, out=out)
    return out


def to_storage(array: Any, like: Any, copy: bool = True) -> Any:
    """A contiguous copy, in the dtype of `like`; without `copy` the array itself where it is that."""
    if arrays.library(array) != "torch":
        return array.astype(like.dtype, order="C", copy=copy)
    if array.dtype != like.dtype:
        return array.to(like.dtype).contiguous()
    return (array.clone() if copy else array).contiguous()
