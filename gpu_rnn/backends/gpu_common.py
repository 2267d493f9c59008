"""A sequence on a GPU: its arrays, the product for all inputs before the walk through time, the gradients after it.

How the walk is made is the backend's: an instant at a time (`stepwise`), or the whole sequence in one launch. Whichever
it is, it fills the same arrays, so that one may go forward and another back:

    walk(cell, Forward(...))        walk_back(cell, Backward(...))

What is given several times is to be walked at once: several directions by `forwards` and `backwards`, layers by
`stack` and `stack_back`.

Every array is contiguous and on one device. Three dtypes meet: `storage`, the caller's; `real`, what is computed in,
float64 for float64, else float32; and, within a walk, that of its products. Boundary t lies between the instants t-1
and t: going forward an instant leads from boundary t to t+1, in reverse from t+1 to t.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from gpu_rnn.kernels.cells import Cell, operand_graph

from ..core import arrays
from ..core.cell_inputs import Extra
from ..core.problem import Direction, Memory, Problem, Weights


class Forward(NamedTuple):
    """What a walk reads and writes. P = H without projection."""

    xg: Any  # [T, B, G, H] storage; input part, b_ih included; it may be the caller's x
    w_hh: Any  # [G*H, P] storage
    b_hh: Any  # [G*H] storage, or None
    w_hr: Any  # [P, H] storage, or None
    h0: Any  # [B, P] storage
    others: Any  # [T+1, S-1, B, H] real; the first boundary given, the rest written; [1, S-1, B, H] if nothing is saved
    saved: Any  # [T, B, K, H] storage, written; None if nothing is saved; xg itself where K = G
    shown: Any  # [T, B, H] storage, written; h before its projection, y itself without one
    y: Any  # [T, B, P] storage, written
    extra: Extra
    reverse: bool
    tf32: bool  # float32 products may be rounded to TF32
    step_exact: bool  # the walk may not depend on T
    w_ih: Any = None  # [G*H, H] storage, and
    b_ih: Any = None  # [G*H] storage, or None: of a layer that takes its input from the one below; then xg is None

    def between(self, begin: int, end: int) -> "Forward":
        """The instants `begin` to `end` of a layer of a stack, after those before have been walked."""
        xg, saved, y = (None if array is None else array[begin:end] for array in (self.xg, self.saved, self.y))
        others = self.others if saved is None else self.others[begin : end + 1]
        h0 = self.h0 if begin == 0 else self.y[begin - 1]
        return self._replace(xg=xg, saved=saved, y=y, shown=y, others=others, h0=h0)


class Backward(NamedTuple):
    """What a walk back reads and writes."""

    dy: Any  # [T, B, P] storage; with a projection overwritten with all that is asked of y, by later instants, too; of
    # a layer under another what is asked beside that, or None
    dh: Any  # [B, P] real; gradient of the last h, overwritten with that of the first
    dothers: Any  # [S-1, B, H] real; the same for the other states
    w_hh: Any  # [G*H, P] storage
    w_hr: Any  # [P, H] storage, or None
    h0: Any  # [B, P] storage
    others: Any  # [T+1, S-1, B, H] real
    saved: Any  # [T, B, K, H] storage
    shown: Any  # [T, B, H] storage
    y: Any  # [T, B, P] storage
    dxg: Any  # [T, B, G, H] storage, written
    dhg: Any  # [T, B, G, H] storage, written; None where it equals dxg (no gate is `separate`)
    dhistory: Any  # [T, S-1, B, H] storage; gradients of the other states after every instant, or None for zero
    dunits: Any  # [learned, B, H] real; zeros, to be added to
    extra: Extra
    reverse: bool
    tf32: bool  # as in Forward
    w_ih: Any = None  # [G*H, H] storage, of a layer that takes its input from the one below

    def between(self, begin: int, end: int) -> "Backward":
        """The instants `begin` to `end` of a layer of a stack, after those behind have been walked."""
        dy, saved, y, dxg, dhg = (
            None if array is None else array[begin:end] for array in (self.dy, self.saved, self.y, self.dxg, self.dhg)
        )
        others, h0 = self.others[begin : end + 1], self.h0 if begin == 0 else self.y[begin - 1]
        return self._replace(dy=dy, saved=saved, y=y, shown=y, dxg=dxg, dhg=dhg, others=others, h0=h0)


Recorded = tuple[Any, tuple, Any, tuple, tuple]  # y, the tape, the gradients of y, the last states and the history


def forward(
    walk: Callable[..., None], cell: Cell, x: Any, weights: Weights, state: tuple,
    *, reverse: bool, tf32: bool = False, save: bool, step_exact: bool = False,
) -> tuple[Any, tuple, tuple]:  # fmt: skip
    """As a backend's `forward`, with the walk to make. The tape is (saved, others), and with a projection `shown`."""
    direction = Direction(x, weights, state, reverse)
    (result,) = forwards(walk, cell, [direction], tf32=tf32, save=save, step_exact=step_exact)
    return result


def forwards(
    walk: Callable[..., None],
    cell: Cell,
    directions: Sequence[Direction],
    *,
    tf32: bool,
    save: bool,
    step_exact: bool = False,
) -> list[tuple[Any, tuple, tuple]]:
    given = [begun(cell, *plain(direction), tf32, save, step_exact) for direction in directions]
    walk(cell, *given)
    return [*map(done, given)]


def stack(
    walk: Callable[..., None], cell: Cell, x: Any, layers: Sequence[tuple[Weights, Sequence[Any]]],
    *, tf32: bool, save: bool,
) -> list[tuple[Any, tuple, tuple]]:  # fmt: skip
    """`forward` of each layer, from the weights and states of each; only the first one's inputs are a product here."""
    given: list[Forward] = []
    for weights, state in layers:
        layer = plain(Direction(given[-1].y if given else x, weights, state, reverse=False))
        given.append(begun(cell, *layer, tf32, save, above=bool(given)))
    walk(cell, *given)
    return [*map(done, given)]


def stack_back(
    walk_back: Callable[..., None], cell: Cell, x: Any, layers: Sequence[tuple[Weights, Sequence[Any]]],
    recorded: Sequence[Recorded], *, tf32: bool, needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """`backward` of each layer, as of `stack`; dy is None where nothing but the layer above asks for y."""
    directions: list[Direction] = []
    given: list[Backward] = []
    for (weights, state), each in zip(layers, recorded, strict=True):
        below = recorded[len(given) - 1][0] if given else x
        directions.append(plain(Direction(below, weights, state, reverse=False)))
        back = begun_back(cell, *directions[-1], *each, tf32)
        given.append(back._replace(w_ih=directions[-1].weights.w_ih) if len(given) else back)
    walk_back(cell, *given)
    own = [needs[0], *({*names} - {"x"} for names in needs[1:])]  # what is asked of x stays on the way down
    return [gradients(cell, back, d.x, d.weights, n) for back, d, n in zip(given, directions, own, strict=True)]


def plain(direction: Direction) -> Direction:
    x, weights, state, reverse = direction
    return Direction(arrays.plain(x), Weights(*map(arrays.plain, weights)), tuple(map(arrays.plain, state)), reverse)


def begun(
    cell: Cell, x: Any, weights: Weights, state: Sequence[Any], reverse: bool, tf32: bool, save: bool,
    step_exact: bool = False, above: bool = False,
) -> Forward:  # fmt: skip
    """The product for all inputs, unless the walk makes it of the layer below."""
    (T, B, _), (GH, P), G = x.shape, weights.w_hh.shape, cell.G
    H = GH // G
    part = x if above else input_part(x, weights, step_exact)
    xg = None if above else part.reshape(T, B, G, H)
    first = T if save and reverse else 0
    others = arrays.empty((T + 1 if save else 1, cell.S - 1, B, H), like=x, dtype=arrays.real_dtype(x))
    for row, initial in zip(others[first], state[1:]):
        row[...] = initial
    saved = None
    if save:
        saved = xg if cell.K == G and part is not x else arrays.empty((T, B, cell.K, H), like=x)
    y = arrays.empty((T, B, P), like=x)
    shown = y if weights.w_hr is None else arrays.empty((T, B, H), like=x)
    return Forward(
        xg, weights.w_hh, weights.b_hh, weights.w_hr, state[0], others, saved, shown, y, Extra.of(weights), reverse,
        tf32, step_exact, *((weights.w_ih, weights.b_ih) if above else ()),
    )  # fmt: skip


def done(given: Forward) -> tuple[Any, tuple, tuple]:
    y, others, save = given.y, given.others, given.saved is not None
    final = (y[0 if given.reverse else -1], *others[-1 if save and not given.reverse else 0])
    tape = (given.saved, others, *([] if given.shown is y else [given.shown])) if save else ()
    return y, tuple(stored(array, like=y) for array in final), tape


def backward(
    walk_back: Callable[..., None], cell: Cell, x: Any, weights: Weights, state: tuple, y: Any,
    tape: tuple, dy: Any, dlast: tuple, dhistory: tuple = (),
    *, reverse: bool, tf32: bool = False, needs: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """As a backend's `backward`, with the walk to make."""
    direction, recorded = Direction(x, weights, state, reverse), (y, tape, dy, dlast, dhistory)
    (gradients,) = backwards(walk_back, cell, [direction], [recorded], tf32=tf32, needs=[needs])
    return gradients


def backwards(
    walk_back: Callable[..., None], cell: Cell, directions: Sequence[Direction], recorded: Sequence[Recorded],
    *, tf32: bool, needs: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    directions = [*map(plain, directions)]
    given = [begun_back(cell, *d, *each, tf32) for d, each in zip(directions, recorded, strict=True)]
    walk_back(cell, *given)
    return [gradients(cell, back, d.x, d.weights, n) for back, d, n in zip(given, directions, needs, strict=True)]


def begun_back(
    cell: Cell, x: Any, weights: Weights, state: Sequence[Any], reverse: bool, y: Any, tape: tuple, dy: Any,
    dlast: tuple, dhistory: tuple, tf32: bool,
) -> Backward:  # fmt: skip
    y, dy, (saved, others, *hidden) = arrays.plain(y), arrays.plain(dy), map(arrays.plain, tape)
    (T, B, _), (GH, P), G = y.shape, weights.w_hh.shape, cell.G
    H, real = GH // G, arrays.real_dtype(x)
    dxg = arrays.empty((T, B, G, H), like=x)
    dhg = arrays.empty((T, B, G, H), like=x) if any(cell.separate) else None
    dh = arrays.empty((B, P), like=x, dtype=real)
    dothers = arrays.empty((cell.S - 1, B, H), like=x, dtype=real)
    for row, gradient in zip((dh, *dothers), dlast):
        row[...] = gradient
    (shown,) = hidden or (y,)
    if weights.w_hr is not None:
        dy = stored(dy, like=x)  # the walk writes to it
    extra, dunits = Extra.of(weights), arrays.zeros((cell.learned, B, H), like=x, dtype=real)
    histories = arrays.stack(dhistory, 1) if dhistory else None
    return Backward(
        dy, dh, dothers, weights.w_hh, weights.w_hr, state[0], others, saved, shown, y, dxg, dhg, histories, dunits,
        extra, reverse, tf32,
    )  # fmt: skip


def gradients(cell: Cell, given: Backward, x: Any, weights: Weights, needs: Collection[str]) -> dict[str, Any]:
    """The products after the walk."""
    (T, B, _), (GH, P) = given.y.shape, weights.w_hh.shape
    H = GH // cell.G
    dpart, recurrent = ((given.dxg if d is None else d).reshape(T, B, GH) for d in (given.dxg, given.dhg))
    found: dict[str, Any] = {"state": tuple(stored(array, like=x) for array in (given.dh, *given.dothers))}
    found |= of_input(dpart, x, weights, needs)
    if "w_hh" in needs:
        seen = seen_by_weights(cell, given.y, given.h0, given.extra, given.reverse)
        found["w_hh"] = recurrent_gradient(recurrent, seen, given.reverse)
    if "b_hh" in needs:
        found["b_hh"] = recurrent.reshape(T * B, GH).sum(0)
    if "w_hr" in needs and weights.w_hr is not None:
        found["w_hr"] = product(given.dy.reshape(T * B, P).T, given.shown.reshape(T * B, H), like=x)
    if "units" in needs:
        units = arrays.zeros(tuple(weights.units.shape), like=x)
        units[: cell.learned] = given.dunits if units.shape[1] == B else given.dunits.sum(1, keepdims=True)
        found["units"] = units
    return found


def input_part(x: Any, weights: Weights, step_exact: bool) -> Any:
    """x [T, B, I] -> [T, B, G*H], b_ih included; x itself if that is all. step_exact: by a product per instant."""
    if weights.w_ih is None:
        return x if weights.b_ih is None else x + weights.b_ih
    (T, B, I), (GH, _) = x.shape, weights.w_ih.shape
    part = arrays.empty((T, B, GH), like=x)
    W, b = weights.w_ih.T, weights.b_ih
    if not step_exact:
        arrays.matmul(x.reshape(T * B, I), W, out=part.reshape(T * B, GH), add=b)
        return part
    at, product = arrays.empty((B, I), like=x), arrays.empty((B, GH), like=x)
    for now, out in zip(x, part):  # by the same two arrays: a library may add in another order where others lie
        at[...] = now
        arrays.matmul(at, W, out=product, add=b)
        out[...] = product
    return part


def of_input(dpart: Any, x: Any, weights: Weights, needs: Collection[str]) -> dict[str, Any]:
    """The gradient of `input_part`: [T, B, G*H] -> those of x, w_ih and b_ih that are needed."""
    T, B, GH = dpart.shape
    rows, found = dpart.reshape(T * B, GH), {}
    if "x" in needs:
        found["x"] = dpart if weights.w_ih is None else product(rows, weights.w_ih, like=dpart).reshape(*x.shape)
    if "w_ih" in needs:
        found["w_ih"] = product(rows.T, x.reshape(T * B, x.shape[2]), like=dpart)
    if "b_ih" in needs:
        found["b_ih"] = rows.sum(0)
    return found


def projection(problem: Problem) -> str:
    """The line of a plan on what comes before the time loop."""
    gemms = "one GEMM per time step" if problem.step_exact else "one GEMM for all time steps"
    return problem.projection or f"input projection: {gemms}"


def per_step(problem: Problem) -> str:
    """What a plan says of the per-step kernels."""
    product = arrays.product_dtype(problem.library, problem.dtype)
    return f"per-step kernels: one GEMM (accumulated in {product}) and one fused elementwise kernel per time step"


def memory(problem: Problem, forward: int, backward: int) -> Memory:
    """What a walk on these arrays takes. forward, backward: bytes that the walk takes for itself."""
    cell, T, B, H, s, r = problem.cell, problem.T, problem.B, problem.H, problem.itemsize, problem.real_itemsize
    gates, row, save = T * B * cell.G * H * s, B * H, problem.training or problem.history
    part = 0 if problem.I is None else gates
    in_place = cell.K == cell.G and part > 0  # of the input part
    saved = T * row * cell.K * s if save else 0
    others = (T + 1 if save else 1) * (cell.S - 1) * row * r
    shown = T * row * s if problem.P else 0
    y = problem.output_elements * s
    states = problem.state_elements * s
    history = T * (cell.S - 1) * row * s if problem.history else 0
    whole = y + part + (0 if in_place else saved) + others + shown + states + history + forward
    if not problem.training:
        return Memory(0, whole, 0)
    back = gates * (1 + any(cell.separate)) + (y if problem.P else 0) + history
    back += (problem.state_elements + cell.learned * row) * r + states + backward
    gradients = (problem.weight_elements + (problem.input_elements if part else 0)) * s
    return Memory(y + saved + others + shown, whole, back + gradients)


def history(cell: Cell, tape: tuple, *, reverse: bool, like: Any) -> tuple:
    """The other states after every instant, each [T, B, H], in the dtype of `like`."""
    _, others, *_ = tape
    after = others[:-1] if reverse else others[1:]
    return tuple(stored(after[:, s], like) for s in range(after.shape[1]))


def factors(x: Any, weights: Weights) -> tuple[Any, Weights]:
    """As the library has them by which a backend multiplies: here the caller's."""
    return x, weights


def seen_by_weights(cell: Cell, y: Any, h0: Any, extra: Extra, reverse: bool) -> tuple[Any, Any]:
    """What the recurrent weights saw: at the first instant [B, P], at the later ones [T-1, B, P], in order of t."""
    first, later, before = (-1, slice(None, -1), slice(1, None)) if reverse else (0, slice(1, None), slice(None, -1))
    if cell.operand is None:
        return h0, y[before]
    return operand(cell, h0, extra, first), operand(cell, y[before], extra, later)


def recurrent_gradient(da: Any, seen: tuple[Any, Any], reverse: bool) -> Any:
    """da [T, B, G*H] and what the recurrent weights saw -> [G*H, P]."""
    (T, B, GH), (first, rest), P = da.shape, seen, seen[0].shape[1]
    total = product(da[-1 if reverse else 0].T, first, like=first)
    if T > 1:
        later = da[:-1] if reverse else da[1:]
        arrays.matmul(later.reshape((T - 1) * B, GH).T, rest.reshape((T - 1) * B, P), out=total, add=total)
    return total


def operand(cell: Cell, h: Any, extra: Extra, t: Any) -> Any:
    """What the recurrent weights see in the place of h [.., B, P], at the instant or instants t."""
    given = extra.at(cell, t, h.shape[-1])
    ((seen,),) = operand_graph(cell).run(arrays.operations(h), h=[h], extra=given)
    return arrays.converted(seen, arrays.dtype(h))


def product(a: Any, b: Any, like: Any) -> Any:
    """a @ b in a new array."""
    out = arrays.empty((a.shape[0], b.shape[1]), like=like)
    arrays.matmul(a, b, out=out)
    return out


def stored(array: Any, like: Any) -> Any:
    """A copy, in the storage dtype."""
    copy = arrays.empty(tuple(array.shape), like)
    copy[...] = array
    return copy
