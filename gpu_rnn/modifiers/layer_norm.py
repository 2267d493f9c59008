"""Layer normalization (Ba, Kiros & Hinton 2016) of what is computed before a sequence: the input projection, and R.

A normalized cell (`gpu_rnn.kernels.cells`) takes the input projection after that, with all biases in it but those that
a gate adds to its recurrent projection alone, and recurrent projections whose mean over gates and units is zero. That
mean is zero for every h if it is for every column of R; so R is centered, once, and a time step takes one mean less.
With heads all of this is done for the units of each head by themselves.

The input projection is a matmul of the library's, of the precision that it is set to.
"""

from typing import Any, NamedTuple

from gpu_rnn.kernels.mathematics import EPSILON

from ..core import arrays
from ..core.heads import join, split
from ..core.problem import Weights


class Norm(NamedTuple):
    """A call of a normalized cell, and the way back to its arrays."""

    x: Any  # [T, B, I], or [T, B, G*H] without w_ih
    weights: Weights
    gains: tuple[Any, ...]  # of the input projection [G*H], of the recurrent one [G*H], then of the cell state [H]
    gates: str
    groups: tuple[slice, ...]  # rows of gates that are normalized together, of a head
    recurrent_bias: str  # gates that add b_hh to their recurrent projection alone
    heads: int

    @classmethod
    def of(
        cls, x: Any, weights: Weights, gains: tuple, gates: str, norm_groups: tuple[str, ...], units: tuple, heads: int
    ) -> "Norm":
        """By what a cell says: gates that it normalizes together, the names of its per-unit parameters."""
        D = arrays.sizes(gains[0])[0] // (len(gates) * heads)
        ends = ((gates.index(group[0]), gates.index(group[-1]) + 1) for group in norm_groups)
        recurrent_bias = "".join(gate for gate in gates if f"{gate}_bias" in units)
        return cls(x, weights, gains, gates, tuple(slice(a * D, b * D) for a, b in ends), recurrent_bias, heads)

    def input_projection(self) -> Any:
        """x of the modified call: [T, B, G*H]."""
        bias = self.shared_bias()
        if bias is None:
            bias = arrays.zeros((self.gains[0].shape[0],), like=self.gains[0])
        return self.by_group(affine, self.projection(), self.gains[0], bias)

    def weights_of_call(self) -> Weights:
        """The weights of the modified call."""
        return self.weights._replace(w_ih=None, w_hh=self.center(self.weights.w_hh), b_ih=None, b_hh=None)

    def units(self) -> list[Any]:
        """The cell's per-unit parameters, [1, H] each."""
        G, b_hh = len(self.gates), self.weights.b_hh
        H = arrays.sizes(self.gains[0])[0] // G
        zero = arrays.zeros((H,), like=self.gains[0])
        biases = [zero if b_hh is None else self.rows(b_hh, self.gates.index(gate)) for gate in self.recurrent_bias]
        own = [*biases, *(zero if array is None else array for array in self.gains[2:])]
        return [*arrays.unstack(self.gains[1].reshape(G, 1, H), G), *(array.reshape(1, H) for array in own)]

    def vjp(self, gradients: dict[str, Any], dunits: Any) -> dict[str, Any]:
        """The gradients of the call's arrays by name, from those of the modified call; of its units [n, R, H]."""
        G, dWx, dunits = len(self.gates), gradients["x"], dunits.sum(1)
        projection = self.projection()
        dprojection = self.by_group(standardize_backward, projection, dWx * self.gains[0])
        own = {"x": dprojection, "w_hh": self.center(gradients["w_hh"])}
        if self.weights.w_ih is not None:
            own["x"] = dprojection @ self.weights.w_ih
            T, B, I = self.x.shape
            own["w_ih"] = dprojection.reshape(T * B, dprojection.shape[-1]).T @ self.x.reshape(T * B, I)
        dbias, of_recurrent_bias = dWx.sum((0, 1)), dict(zip(self.recurrent_bias, dunits[G:]))
        if self.weights.b_ih is not None:
            own["b_ih"] = dbias
        if self.weights.b_hh is not None:
            each = [of_recurrent_bias.get(gate, self.rows(dbias, k)) for k, gate in enumerate(self.gates)]
            own["b_hh"] = arrays.concatenate(each, 0)
        dgain = (dWx * self.by_group(standardize, projection)).sum((0, 1))
        dgains = dgain, dunits[:G].reshape(-1), *dunits[G + len(of_recurrent_bias) :]
        own["layer_norm"] = tuple(None if array is None else d for array, d in zip(self.gains, dgains))
        return gradients | own

    def projection(self) -> Any:
        return self.x if self.weights.w_ih is None else self.x @ self.weights.w_ih.T

    def shared_bias(self) -> Any:
        """The biases [G*H] of the input projection, or None."""
        b_ih, b_hh = self.weights.b_ih, self.weights.b_hh
        if b_hh is not None and self.recurrent_bias:
            zero = arrays.zeros((b_hh.shape[0] // len(self.gates),), like=b_hh)
            gates = [zero if gate in self.recurrent_bias else self.rows(b_hh, k) for k, gate in enumerate(self.gates)]
            b_hh = arrays.concatenate(gates, 0)
        return b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh

    def rows(self, array: Any, gate: int) -> Any:
        H = arrays.sizes(array)[0] // len(self.gates)
        return array[gate * H : (gate + 1) * H]

    def by_group(self, function: Any, *many: Any) -> Any:
        """Of arrays [.., G*H]."""
        if self.heads > 1:
            by_head = zip(*(split(array, self.heads, len(self.gates)) for array in many))
            return join([self.of_head(function, *parts) for parts in by_head], len(self.gates))
        return self.of_head(function, *many)

    def of_head(self, function: Any, *many: Any) -> Any:
        """Of arrays [.., G*D]."""
        parts = [function(*(array[..., rows] for array in many)) for rows in self.groups]
        return parts[0] if len(parts) == 1 else arrays.concatenate(parts, -1)

    def center(self, R: Any) -> Any:
        """[G*H, P] -> the same with columns whose mean over the rows of a group is zero. It is its own gradient."""
        if self.heads > 1:
            blocks = split(R, self.heads, len(self.gates), axis=0)
            return join([*map(self.center_head, blocks)], len(self.gates), axis=0)
        return self.center_head(R)

    def center_head(self, R: Any) -> Any:
        """Of a head [G*D, P]."""
        parts = [R[rows] - R[rows].mean(0) for rows in self.groups]
        return parts[0] if len(parts) == 1 else arrays.concatenate(parts, 0)


def affine(a: Any, gain: Any, bias: Any) -> Any:
    """The normalized a, times a gain, plus a bias; in the dtype of these."""
    if arrays.library(a) != "torch":
        return standardize(a) * gain + bias
    layer_norm = arrays.module("torch").nn.functional.layer_norm
    return arrays.astype(layer_norm(a, tuple(gain.shape), gain, bias, EPSILON), arrays.dtype(gain))


def standardize(a: Any) -> Any:
    """a less its mean over the last axis, divided by its standard deviation."""
    return arrays.astype(statistics(a)[0], arrays.dtype(a))


def standardize_backward(a: Any, d: Any) -> Any:
    """The gradient of a, given that of `standardize`."""
    n, r = statistics(a)
    d = arrays.astype(d, arrays.dtype(n))
    return arrays.astype(r * (d - d.mean(-1)[..., None] - n * (n * d).mean(-1)[..., None]), arrays.dtype(a))


def statistics(a: Any) -> tuple[Any, Any]:
    """`standardize`, and 1 / the standard deviation, in the dtype of computing."""
    wide = arrays.astype(a, arrays.real_dtype(a))
    e = wide - wide.mean(-1)[..., None]
    r = ((e * e).mean(-1)[..., None] + EPSILON) ** -0.5
    return e * r, r
