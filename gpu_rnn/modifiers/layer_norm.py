"""Layer normalization (Ba, Kiros & Hinton 2016) of what there is before a sequence: the input part, and R.

The page of a normalized cell (`gpu_rnn.kernels.cells`) takes the input part as it is after that, with all biases in it
but those that a gate adds to its recurrent part alone, and recurrent parts whose mean over gates and units is zero. It
is for every h where it is for every column of R; so R is centred, once, and an instant takes a mean less.

The input part is made here by a product of the library's, of the precision that it is set to.
"""

from typing import Any, NamedTuple

from gpu_rnn.kernels.mathematics import EPSILON

from ..core import arrays
from ..core.problem import Weights


class Norm(NamedTuple):
    """A call of a normalized cell, and the way back to its arrays."""

    x: Any  # [T, B, I], or [T, B, G*H] without w_ih
    weights: Weights
    gains: tuple[Any, ...]  # of the input part [G*H], of the recurrent part [G*H], then what else the page has, [H]
    gates: str
    groups: tuple[slice, ...]  # rows of gates that are normalized together
    alone: str  # gates that add b_hh to their recurrent part alone

    @classmethod
    def of(cls, x: Any, weights: Weights, gains: tuple, gates: str, together: tuple[str, ...], units: tuple) -> "Norm":
        """By what a page says: gates that it normalizes `together`, the names of its `units`."""
        H = arrays.sizes(gains[0])[0] // len(gates)
        ends = ((gates.index(group[0]), gates.index(group[-1]) + 1) for group in together)
        alone = "".join(gate for gate in gates if f"{gate}_bias" in units)
        return cls(x, weights, gains, gates, tuple(slice(a * H, b * H) for a, b in ends), alone)

    def part(self) -> Any:
        """x of the call that is made: [T, B, G*H]."""
        bias = self.shared()
        if bias is None:
            bias = arrays.zeros((self.gains[0].shape[0],), like=self.gains[0])
        return self.by_group(affine, self.raw(), self.gains[0], bias)

    def called(self) -> Weights:
        """Its weights."""
        return self.weights._replace(w_ih=None, w_hh=self.centred(self.weights.w_hh), b_ih=None, b_hh=None)

    def units(self) -> list[Any]:
        """The page's values per unit, [1, H] each."""
        G, b_hh = len(self.gates), self.weights.b_hh
        H = arrays.sizes(self.gains[0])[0] // G
        zero = arrays.zeros((H,), like=self.gains[0])
        biases = [zero if b_hh is None else self.rows(b_hh, self.gates.index(gate)) for gate in self.alone]
        own = [*biases, *(zero if array is None else array for array in self.gains[2:])]
        return [*self.gains[1].reshape(G, 1, H), *(array.reshape(1, H) for array in own)]

    def pulled(self, gradients: dict[str, Any], dunits: Any) -> dict[str, Any]:
        """The gradients of the call's arrays by name, from those of the call that was made; its units' [n, R, H]."""
        G, dpart, dunits = len(self.gates), gradients["x"], dunits.sum(1)
        raw = self.raw()
        draw = self.by_group(standard_back, raw, dpart * self.gains[0])
        found = {"x": draw, "w_hh": self.centred(gradients["w_hh"])}
        if self.weights.w_ih is not None:
            found["x"] = draw @ self.weights.w_ih
            found["w_ih"] = draw.reshape(-1, draw.shape[-1]).T @ self.x.reshape(-1, self.x.shape[-1])
        dbias, of_alone = dpart.sum((0, 1)), dict(zip(self.alone, dunits[G:]))
        if self.weights.b_ih is not None:
            found["b_ih"] = dbias
        if self.weights.b_hh is not None:
            each = [of_alone.get(gate, self.rows(dbias, k)) for k, gate in enumerate(self.gates)]
            found["b_hh"] = arrays.concatenate(each, 0)
        gains = (dpart * self.by_group(standard, raw)).sum((0, 1)), dunits[:G].reshape(-1), *dunits[G + len(of_alone) :]
        found["layer_norm"] = tuple(None if array is None else d for array, d in zip(self.gains, gains))
        return gradients | found

    def raw(self) -> Any:
        return self.x if self.weights.w_ih is None else self.x @ self.weights.w_ih.T

    def shared(self) -> Any:
        """The biases [G*H] that are the input part's, or None."""
        b_ih, b_hh = self.weights.b_ih, self.weights.b_hh
        if b_hh is not None and self.alone:
            zero = arrays.zeros((b_hh.shape[0] // len(self.gates),), like=b_hh)
            gates = [zero if gate in self.alone else self.rows(b_hh, k) for k, gate in enumerate(self.gates)]
            b_hh = arrays.concatenate(gates, 0)
        return b_hh if b_ih is None else b_ih if b_hh is None else b_ih + b_hh

    def rows(self, array: Any, gate: int) -> Any:
        H = arrays.sizes(array)[0] // len(self.gates)
        return array[gate * H : (gate + 1) * H]

    def by_group(self, function: Any, *many: Any) -> Any:
        """Of arrays [.., G*H]."""
        found = [function(*(array[..., rows] for array in many)) for rows in self.groups]
        return found[0] if len(found) == 1 else arrays.concatenate(found, -1)

    def centred(self, R: Any) -> Any:
        """[G*H, P] -> the same with columns whose mean over the rows of a group is zero. It is its own gradient."""
        found = [R[rows] - R[rows].mean(0) for rows in self.groups]
        return found[0] if len(found) == 1 else arrays.concatenate(found, 0)


def affine(a: Any, gain: Any, bias: Any) -> Any:
    """The normalized a, times a gain, plus a bias; in the dtype of these."""
    if arrays.library(a) != "torch":
        return standard(a) * gain + bias
    layer_norm = arrays.module("torch").nn.functional.layer_norm
    return arrays.converted(layer_norm(a, tuple(gain.shape), gain, bias, EPSILON), arrays.dtype(gain))


def standard(a: Any) -> Any:
    """a less its mean over the last axis, divided by its standard deviation."""
    return arrays.converted(statistics(a)[0], arrays.dtype(a))


def standard_back(a: Any, d: Any) -> Any:
    """The gradient of a, given that of `standard`."""
    n, r = statistics(a)
    d = arrays.converted(d, arrays.dtype(n))
    return arrays.converted(r * (d - d.mean(-1)[..., None] - n * (n * d).mean(-1)[..., None]), arrays.dtype(a))


def statistics(a: Any) -> tuple[Any, Any]:
    """`standard`, and 1 / the standard deviation, in the dtype of computing."""
    wide = arrays.converted(a, arrays.real_dtype(a))
    e = wide - wide.mean(-1)[..., None]
    r = ((e * e).mean(-1)[..., None] + EPSILON) ** -0.5
    return e * r, r
