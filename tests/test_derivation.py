"""docs/derivation.md: its equations are read as a small language, run, differentiated, and compared with the package.

    read_document() its equations by label: read_document()["lstm.step"]
    Model           one layer as the document has it: forward and backward over a few time steps, one batch row
    derivatives     of every quantity in it by complex steps, from the forward equations alone

Values stand in a dict under their LaTeX names, vectors as columns. At time step t the state that the step reads is
"h_{t-1}", in a reverse layer also "h_{t+1}".
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import pytest

import gpu_rnn
from gpu_rnn.kernels import cells, mathematics

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "derivation.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$\n\n(→.*?)\n\n", re.MULTILINE | re.DOTALL)
POINTER = re.compile(r"\[`([\w/.]+): (\w+)`\]\(([^)]+)\)")
STEP = 1e-30  # of the complex derivative: exact to rounding, since nothing is subtracted


# ---- the language ---------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"(?P<name>(?:\\hat|\\bar)?(?:\\delta\s*)?(?:\\tau\b|\\tau(?=_)|[A-Za-z])'?(?:_(?:\{[^{}]*\}|[A-Za-z]))?)"
    r"|(?P<number>\d+)"
    r"|(?P<sign>\\sum_\{t=1\}\^\{T\}|\\prod_\{t=k\+1\}\^\{T\}|\\mathrm\{diag\}|\\[a-z]+'?|[-+^(){}\[\],>])"
)
FUNCTIONS = {
    "\\sigma": lambda a: 1 / (1 + np.exp(-a)),
    "\\tanh": np.tanh,
    "\\mathrm{diag}": lambda a: np.diag(a[:, 0]),
}
for primitive in ("\\sigma", "\\tanh"):
    FUNCTIONS[primitive + "'"] = lambda a, f=FUNCTIONS[primitive]: (f(np.real(a) + 1j * STEP)).imag / STEP

Value = np.ndarray | float
Expression = Callable[[dict], Value]


@dataclass(frozen=True)
class Equation:
    name: str  # the left side
    sides: tuple[Expression, ...]
    text: str

    def __call__(self, env: dict) -> Value:
        """The value of the last side; all others have to agree with it."""
        *others, value = [side(env) for side in self.sides]
        for other in others:
            assert np.abs(other - value).max() < 1e-9, f"the sides differ in {self.text}"
        return value


def equation(line: str) -> Equation:
    name, *sides = line.split(" = ")
    assert sides, f"no equation: {line!r}"
    return Equation(canonical(name), tuple(Parser(side).whole() for side in sides), line)


def canonical(name: str) -> str:
    return " ".join(name.split())


class Parser:
    """Precedence, loosest first: sum, \\odot, juxtaposition (matrix product, or a number times something), powers."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            at += len(text[at:]) - len(text[at:].lstrip())
            match = TOKEN.match(text, at)
            assert match, f"can't read {text[at:]!r} in {text!r}"
            self.tokens.append((match.lastgroup or "", canonical(match.group())))
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> tuple[str, str]:
        kind, token = self.tokens[self.at]
        assert not expected or token in expected, f"{token} where {expected} is expected"
        self.at += 1
        return kind, token

    def whole(self) -> Expression:
        value = self.sum()
        assert self.at == len(self.tokens), f"left over: {self.tokens[self.at :]}"
        return value

    def sum(self) -> Expression:
        value = self.negated() if self.peek() == "-" else self.term()
        while self.peek() in ("+", "-"):
            value = binary(np.add if self.take()[1] == "+" else np.subtract, value, self.term())
        return value

    def negated(self) -> Expression:
        self.take("-")
        value = self.term()
        return lambda env: -value(env)

    def term(self) -> Expression:
        value = self.product()
        while self.peek() == "\\odot":
            self.take()
            value = binary(elementwise, value, self.product())
        return value

    def product(self) -> Expression:
        value = self.power()
        while self.peek() and self.peek() not in ("+", "-", "\\odot", ")", "]", "}", ",", ">"):
            value = binary(product, value, self.power())
        return value

    def power(self) -> Expression:
        is_e = self.peek() == "e"
        value = self.atom()
        while self.peek() == "^":
            self.take()
            if self.peek() == "2":
                self.take()
                value = partial(lambda base, env: base(env) ** 2, value)
            elif is_e:
                value = partial(lambda exponent, env: np.exp(exponent(env)), self.group("{", "}"))
            else:
                for token in ("{", "\\top", "}"):
                    self.take(token)
                value = partial(lambda base, env: base(env).T, value)
        return value

    def atom(self) -> Expression:
        kind, token = self.take()
        if kind == "number":
            return lambda env: float(token)
        if kind == "name":
            return lambda env: 0.0 if token == "e" else env[token]
        if token in ("\\frac", "\\tfrac"):
            return binary(np.divide, self.group("{", "}"), self.group("{", "}"))
        if token in FUNCTIONS:
            inner = self.group("(", ")")
            return lambda env: FUNCTIONS[token](inner(env))
        if token == "\\max":
            return binary(np.maximum, *self.pair("(", ",", ")"))
        if token == "[":
            self.at -= 1
            return binary(lambda a, b: (np.real(a) > b).astype(float), *self.pair("[", ">", "]"))
        if token.startswith("\\sum"):
            inner = self.term()
            return lambda env: sum(inner(env | step_env) for step_env in env["steps"])
        if token.startswith("\\prod"):
            inner = self.term()
            return lambda env: reduce(np.matmul, [inner(env | step_env) for step_env in reversed(env["steps"])])
        self.at -= 1
        return self.group("(", ")")

    def group(self, opening: str, closing: str) -> Expression:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def pair(self, opening: str, between: str, closing: str) -> tuple[Expression, Expression]:
        self.take(opening)
        first = self.sum()
        self.take(between)
        second = self.sum()
        self.take(closing)
        return first, second


def binary(operation: Callable, left: Expression, right: Expression) -> Expression:
    return lambda env: operation(left(env), right(env))


def elementwise(a: Value, b: Value) -> Value:
    assert np.shape(a) == np.shape(b), f"elementwise product of {np.shape(a)} and {np.shape(b)}"
    return a * b


def product(a: Value, b: Value) -> Value:
    return a * b if np.ndim(a) == 0 or np.ndim(b) == 0 else a @ b


Document = dict[str, list[Equation]]  # by label, in the document's order


@cache
def read_document() -> Document:
    document: Document = {}
    for label, line in lines(TEXT):
        document.setdefault(label, []).append(equation(line))
    return document


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Every displayed equation, with its block's label."""
    for formula, pointer in FORMULA.findall(text):
        label = re.search(r"<!-- ([\w.]+) -->", pointer)
        assert label, f"no label after {formula!r}"
        body = re.sub(r"\\(begin|end)\{aligned\}|&", "", formula)
        yield from ((label[1], line.strip()) for line in body.split("\\\\\n"))


def merged(equations: list[Equation], others: list[Equation]) -> list[Equation]:
    """`others` instead of the equations with the same left sides; t+1 stands where t-1 stood."""
    names = {e.name.replace("t+1", "t-1") for e in others}
    first = next(k for k, e in enumerate(equations) if e.name in names)
    rest = [e for e in equations[first:] if e.name not in names]
    return [*equations[:first], *others, *rest]


def chosen(equations: list[Equation], *names: str) -> list[Equation]:
    result = [e for e in equations if e.name in names]
    assert len(result) == len(names), f"{names} are not all there"
    return result


# ---- a layer, as the document has it --------------------------------------------------------------------------------

D, HAT, BAR = "\\delta ", "\\hat\\delta ", "\\bar\\delta "
T, B, I, H, P = 4, 2, 2, 3, 2


@dataclass
class Model:
    document: Document
    cell: cells.Cell
    reverse: bool = False
    projected: bool = False

    def __post_init__(self):
        document, name = self.document, self.cell.name
        self.step = document["driver.forward"] if self.cell.G > 0 else []
        self.leave, self.weights = document["driver.leave"], document["driver.weights"]
        if self.reverse:
            self.step = merged(self.step, chosen(document["reverse"], "q_t"))
            self.leave = merged(self.leave, chosen(document["reverse"], HAT + "h_{t+1}"))
            self.weights = merged(self.weights, chosen(document["reverse"], D + "R"))
        self.inside = document[f"{name}.step"]
        if self.projected:
            self.inside = merged(self.inside, chosen(document["projection"], "s_t", "h_t"))
            self.weights = [*self.weights, *chosen(document["projection"], D + "W_{hr}")]
        self.gates = self.cell.gates if self.cell.G > 1 else ""

    def pieces(self, name: str, stacked: np.ndarray) -> dict[str, np.ndarray]:
        """What W_f and u_{f,t} are: the gates' pieces of a stacked matrix or vector."""
        letter, subscript = name.partition("_")[::2]
        cut = np.split(stacked, len(self.gates)) if self.gates else []
        return {f"{letter}_{{{g},t}}" if subscript else f"{letter}_{g}": v for g, v in zip(self.gates, cut)}

    def forward(self, p: dict, x: np.ndarray, state: dict, nudge: tuple = (None, None, None)) -> list[dict]:
        """p: weights by name; x [T, I, 1]; state: h and c. nudge: add i STEP to (t, name, index). -> an env per t."""
        fixed = dict(p)
        for name in ("W", "R", "b", "b'"):
            fixed |= self.pieces(name, p[name])
        steps = [{} for _ in x]
        for t in self.order():
            env = steps[t]
            env |= fixed | {"x_t": x[t]}
            for letter, value in state.items():
                env[letter + "_{t-1}"] = env[letter + "_{t+1}"] = value
            for e in (*self.step, *self.inside):
                value = e(env)
                if nudge[:2] == (t, e.name):
                    value = value.astype(complex)
                    value[nudge[2]] += 1j * STEP
                env[e.name] = value
                if e.name in ("u_t", "q_t"):
                    for piece, part in self.pieces(e.name, value).items():
                        env[piece] = part.copy()
                        if nudge[:2] == (t, piece):
                            env[piece] = env[piece].astype(complex)
                            env[piece][nudge[2]] += 1j * STEP
            state = {letter: env[letter + "_t"] for letter in state}
        return steps

    def order(self) -> range:
        return range(T - 1, -1, -1) if self.reverse else range(T)

    def backward(self, steps: list[dict], dy: np.ndarray, dlast: dict) -> dict[str, np.ndarray]:
        """Adds each step's gradients. dlast: those of the last states. -> gradients of weights and initial states."""
        document, arriving = self.document, dict(dlast)
        before = "_{t+1}" if self.reverse else "_{t-1}"
        for t in reversed(self.order()):
            env = steps[t]
            env[D + "y_t"] = dy[t]
            env |= {f"{HAT}{letter}_t": value for letter, value in arriving.items()}
            run(document["driver.arrive"], env)
            whole = env[D + "h_t"]
            if self.projected:
                run(chosen(document["projection"], D + "s_t"), env)
                env[D + "h_t"] = env[D + "s_t"]
            run(document[f"{self.cell.name}.grad"], env)
            env[D + "h_t"] = whole
            env[BAR + "h" + before] = env.setdefault(BAR + "h_{t-1}", np.zeros_like(whole))
            if self.gates:
                for part in "uq":
                    parts = [env.get(f"{D}{part}_{{{g},t}}", env.get(f"{D}a_{{{g},t}}")) for g in self.gates]
                    env[f"{D}{part}_t"] = np.concatenate(parts)
            env.setdefault(D + "q_t", env[D + "u_t"])
            run(self.leave, env)
            arriving["h"] = env[f"{HAT}h{before}"]
            if "c" in arriving:
                arriving["c"] = env[HAT + "c_{t-1}"]
        total = {"steps": steps}
        run(self.weights, total)
        del total["steps"]
        return total | {f"{D}{letter}_0": value for letter, value in arriving.items()}


def run(equations: list[Equation], env: dict) -> None:
    for e in equations:
        env[e.name] = e(env)


@dataclass
class Example:
    """Random numbers for a layer, with a loss that weighs every output and the last states."""

    cell: cells.Cell
    projected: bool = False

    def __post_init__(self):
        rng = np.random.default_rng(5)
        G, shown = self.cell.G, P if self.projected else H
        self.p = {"W": rng.normal(size=(G * H, I)), "R": rng.normal(size=(G * H, shown)) / 2}
        self.p |= {"b": rng.normal(size=(G * H, 1)) / 2, "b'": rng.normal(size=(G * H, 1)) / 2}
        if self.projected:
            self.p["W_{hr}"] = rng.normal(size=(P, H))
        sizes = {letter: shown if letter == "h" else H for letter in self.cell.states}
        self.x, self.dy = rng.normal(size=(B, T, I, 1)), rng.normal(size=(B, T, shown, 1))
        self.state = {letter: rng.uniform(-0.8, 0.8, size=(B, n, 1)) for letter, n in sizes.items()}
        self.dlast = {letter: rng.normal(size=(B, n, 1)) for letter, n in sizes.items()}

    def row(self, k: int) -> tuple[dict, np.ndarray, dict]:
        return self.p, self.x[k], {letter: value[k] for letter, value in self.state.items()}

    def incoming(self, k: int) -> tuple[np.ndarray, dict]:
        return self.dy[k], {letter: value[k] for letter, value in self.dlast.items()}

    def loss(self, model: Model, steps: list[dict], k: int) -> complex:
        last = steps[model.order()[-1]]
        total = sum((self.dy[k, t] * steps[t]["h_t"]).sum() for t in range(T))
        return total + sum((value[k] * last[letter + "_t"]).sum() for letter, value in self.dlast.items())


def by_complex_step(shape: tuple[int, ...], loss: Callable[[tuple[int, ...]], complex]) -> np.ndarray:
    """loss(index): with that element disturbed by i STEP."""
    return np.array([loss(index).imag / STEP for index in np.ndindex(*shape)]).reshape(shape)


def disturbed(array: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    array = array.astype(complex)
    array[index] += 1j * STEP
    return array


EQUATIONS = read_document()
CASES = {name: (name, False) for name in cells.NAMES if f"{name}.step" in EQUATIONS} | {"projection": ("lstm", True)}
close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
case = pytest.mark.parametrize("name", CASES)
direction = pytest.mark.parametrize("reverse", [False, True], ids=["onward", "reverse"])


def built(document: Document, name: str, reverse: bool) -> tuple[Model, Example]:
    cell, projected = cells.get(CASES[name][0]), CASES[name][1]
    return Model(document, cell, reverse, projected), Example(cell, projected)


# ---- equations against differentiation ------------------------------------------------------------------------------


def check_gradients(document: Document, name: str, reverse: bool) -> None:
    """Every gradient that the document has, against the complex-step derivative of its forward equations."""
    model, example = built(document, name, reverse)
    p, x, state = example.row(0)
    steps = model.forward(p, x, state)
    gradients = model.backward(steps, *example.incoming(0))

    def loss(p=p, x=x, state=state, nudge=(None, None, None)) -> complex:
        return example.loss(model, model.forward(p, x, state, nudge), 0)

    for weight, value in p.items():
        numeric = by_complex_step(value.shape, lambda at, w=weight, v=value: loss(p=p | {w: disturbed(v, at)}))
        close(gradients[D + weight], numeric, err_msg=f"gradient of {weight}")
    for letter, value in state.items():
        numeric = by_complex_step(value.shape, lambda at, s=letter, v=value: loss(state=state | {s: disturbed(v, at)}))
        close(gradients[f"{D}{letter}_0"], numeric, err_msg=f"gradient of {letter}_0")
    numeric = by_complex_step(x.shape, lambda at: loss(x=disturbed(x, at)))
    close(np.stack([env[D + "x_t"] for env in steps]), numeric, err_msg="gradient of x")

    for t, env in enumerate(steps):
        for label in [key for key in env if key.startswith(D)]:
            value = label.removeprefix(D)
            if value in ("x_t", "y_t"):
                continue
            assert value in env, f"{label} is given, but no equation has {value}"
            numeric = by_complex_step(env[value].shape, lambda at, t=t, v=value: loss(nudge=(t, v, at)))
            close(env[label], numeric, err_msg=f"{label} at t = {t}")


@case
@direction
def test_gradients_are_the_derivatives(name, reverse):
    check_gradients(read_document(), name, reverse)


def check_jacobians(document: Document) -> None:
    tanh, (jacobian, chain, back) = built(document, "rnn_tanh", False), document["jacobian"]
    model, example = tanh
    p, x, state = example.row(0)
    steps = model.forward(p, x, state)

    def columns(letter: str, t: int, nudged: str, at: int, model=model, run=(p, x, state)) -> np.ndarray:
        """Derivative of a state at t with respect to a quantity at an earlier time step."""
        rows = [model.forward(*run, nudge=(at, nudged, (k, 0)))[t][letter + "_t"].imag / STEP for k in range(H)]
        return np.concatenate(rows, axis=1)

    assert jacobian.name == "\\frac{\\partial h_t}{\\partial h_{t-1}}"
    assert chain.name == "\\frac{\\partial h_T}{\\partial h_k}"
    close(jacobian(steps[2]), columns("h", 2, "h_t", 1))
    close(chain({"steps": steps[2:]}), columns("h", T - 1, "h_t", 1))

    env = steps[3] | {D + "h_t": example.dlast["h"][0]}
    assert back.name == D + "h_{t-1}"
    close(back(env), columns("h", 3, "h_t", 2).T @ env[D + "h_t"])

    model, example = built(document, "lstm", False)
    p, x, state = example.row(0)
    still = p | {"R": np.zeros_like(p["R"])}  # the gates don't see the state: what remains is the direct path
    steps = model.forward(still, x, state)
    (carousel,) = document["lstm.jacobian"]
    assert carousel.name == "\\frac{\\partial c_t}{\\partial c_{t-1}}"
    close(carousel(steps[2]), columns("c", 2, "c_t", 1, model, (still, x, state)))


def test_jacobians():
    check_jacobians(read_document())


def check_functions(document: Document) -> None:
    """The sigmoid's forms, and the three derivatives; the layer without memory."""
    a = np.array([[-3.0], [-0.2], [0.1], [2.5]])
    (sigmoid,) = document["sigmoid"]
    assert sigmoid.name == "\\sigma(a)"
    close(sigmoid({"a": a}), mathematics.sigmoid(a))
    functions = {
        "\\sigma'(a)": mathematics.sigmoid,
        "\\tanh'(a)": mathematics.tanh,
        "\\frac{d}{da} \\max(a, 0)": mathematics.relu,
    }
    assert [e.name for e in document["derivatives"]] == list(functions)
    for e in document["derivatives"]:
        numeric = by_complex_step(a.shape, lambda at, f=functions[e.name]: f(disturbed(a, at)).sum())
        close(e({"a": a}), numeric, err_msg=e.text)
    close(document["derivatives"][2]({"a": a}), mathematics.positive(a))

    (layer,) = document["layer"]
    rng = np.random.default_rng(0)
    env = {"W": rng.normal(size=(H, I)), "x_t": rng.normal(size=(I, 1)), "b": rng.normal(size=(H, 1))}
    y, _ = gpu_rnn.rnn(env["x_t"].T[None], env["W"], np.zeros((H, H)), env["b"][:, 0], np.zeros(H))
    close(layer(env)[:, 0], y[0, 0])


def test_functions():
    check_functions(read_document())


def check_reset_before(document: Document) -> None:
    """The GRU of the papers, over one time step: its forward formula by hand, its gradient by complex steps."""
    model, example = built(document, "gru", False)
    model.inside = merged(model.inside, chosen(document["gru_before"], "m_t", "a_{n,t}"))
    p, x, state = example.row(0)
    env = model.forward(p, x, state)[0]
    r, h, n = env["r_t"], state["h"], slice(2 * H, None)
    close(env["a_{n,t}"], p["W"][n] @ x[0] + p["b"][n] + p["R"][n] @ (r * h) + p["b'"][n])
    env[D + "h_t"] = example.dlast["h"][0]
    run(document["gru.grad"], env)
    run(chosen(document["gru_before"], D + "m_t", D + "r_t"), env)
    for name in ("m_t", "r_t"):
        numeric = by_complex_step(
            (H, 1), lambda at, v=name: (env[D + "h_t"] * model.forward(p, x, state, (0, v, at))[0]["h_t"]).sum()
        )
        close(env[D + name], numeric, err_msg=name)


def test_reset_gate_before_the_product():
    check_reset_before(read_document())


# ---- equations against the package ----------------------------------------------------------------------------------


def saved_names() -> dict[str, list[str]]:
    """The table of what is saved: cell -> LaTeX names, in order."""
    rows = re.findall(r"^\| `(\w+)` \| (\d) \| (\d) \| (\d)(?:: ([^|]*))? \|", TEXT, re.MULTILINE)
    for name, gates, states, count, _ in rows:
        cell = cells.get(name)
        assert [gates, states, count] == [str(n) for n in (cell.G, cell.S, cell.K)], name
    return {name: re.findall(r"\$([^$]+)\$", names) for name, *_, names in rows}


@case
@direction
def test_equations_are_the_definitions(name, reverse):
    model, example = built(read_document(), name, reverse)
    cell, saved = model.cell, saved_names()[model.cell.name]
    shown = "s" if model.projected else "h"
    for k in range(B):
        steps = model.forward(*example.row(k))
        model.backward(steps, *example.incoming(k))
        for env in steps:

            def gates(letter: str, env=env) -> tuple:
                return tuple(np.split(env[letter + "_t"], cell.G))

            before = tuple(env[s + "_{t-1}"] for s in cell.states)
            after = tuple(env[f"{shown if s == 'h' else s}_t"] for s in cell.states)
            new, kept = cell.step(gates("u"), gates("q"), before)
            close(new, after)
            assert len(kept) == len(saved)
            for value, label in zip(kept, saved):
                close(value, env[label], err_msg=label)
            dnew = (env[f"{D}{shown}_t"], *(env[f"{HAT}{s}_t"] for s in cell.states[1:]))
            du, dq, dstate = cell.grad(dnew, new, before, kept)
            close(du, gates(D + "u"))
            close(dq, gates(D + "q"))
            for value, s in zip(dstate, cell.states):
                expected = env[(BAR if s == "h" else HAT) + s + "_{t-1}"]
                close(np.zeros_like(expected) + value, expected, err_msg=s)


@case
@direction
def test_equations_are_the_functions(name, reverse):
    model, example = built(read_document(), name, reverse)
    rows = [model.forward(*example.row(k)) for k in range(B)]
    totals = [model.backward(row, *example.incoming(k)) for k, row in enumerate(rows)]

    arguments = {"w_ih": "W", "w_hh": "R", "b_ih": "b", "b_hh": "b'"} | ({"w_hr": "W_{hr}"} if model.projected else {})
    weights = {key: example.p[label] for key, label in arguments.items()}
    weights |= {key: weights[key][:, 0] for key in ("b_ih", "b_hh")}
    states = {f"{letter}0": value[..., 0] for letter, value in example.state.items()}
    extra = {"nonlinearity": model.cell.name.removeprefix("rnn_")} if model.cell.name.startswith("rnn") else {}
    function = getattr(gpu_rnn, model.cell.name.partition("_")[0])
    x = np.ascontiguousarray(example.x[..., 0].swapaxes(0, 1))
    (y, last), pullback = gpu_rnn.vjp(function, x, **weights, **states, **extra, reverse=reverse, backend="numpy")
    close(y, np.stack([[env["h_t"][:, 0] for env in row] for row in rows], axis=1))
    for value, letter in zip(last if isinstance(last, tuple) else (last,), model.cell.states):
        close(value, np.stack([row[model.order()[-1]][letter + "_t"][:, 0] for row in rows]), err_msg=letter)

    dy = np.ascontiguousarray(example.dy[..., 0].swapaxes(0, 1))
    got = pullback((dy, tuple(value[..., 0] for value in example.dlast.values())))
    close(got["x"], np.stack([[env[D + "x_t"][:, 0] for env in row] for row in rows], axis=1))
    for key, label in arguments.items():
        close(got[key], sum(total[D + label] for total in totals).reshape(got[key].shape), err_msg=key)
    for letter in model.cell.states:
        close(got[f"{letter}0"], np.stack([total[f"{D}{letter}_0"][:, 0] for total in totals]), err_msg=letter)


def test_what_is_said_about_rounding():
    rng = np.random.default_rng(2)
    W, x = rng.normal(size=(64, 48)).astype(np.float32), rng.normal(size=(32, 48)).astype(np.float32)
    half = np.float32(0.5)
    assert np.array_equal(x @ (half * W).T, half * (x @ W.T)), "folding the half must not change a bit"
    a = np.linspace(-120, 120, 100001, dtype=np.float32)
    exact = 1 / (1 + np.exp(-a.astype(np.float64)))
    assert np.abs(mathematics.sigmoid(a) - exact).max() < np.finfo(np.float32).eps
    ends = np.array([-120, 120], np.float32)
    assert mathematics.sigmoid(ends).tolist() == [0, 1]
    assert mathematics.tanh(ends).tolist() == [-1, 1]
    with np.errstate(over="ignore", invalid="ignore"):
        e, inverse = np.exp(np.float32(89)), np.exp(np.float32(-89))
        assert np.isnan((e - inverse) / (e + inverse))
        assert np.isfinite(np.exp(np.float32(88.7)))


# ---- the checks, checked --------------------------------------------------------------------------------------------


def check(document: Document, label: str) -> None:
    """The check in which the formulas of that label take part; raises if one is wrong."""
    first = label.partition(".")[0]
    if first in ("sigmoid", "derivatives", "layer"):
        check_functions(document)
    elif "jacobian" in label:
        check_jacobians(document)
    elif first == "gru_before":
        check_reset_before(document)
    else:
        check_gradients(document, first if first in CASES else "gru", reverse=first == "reverse")


def slips(line: str) -> Iterator[str]:
    """The equation with one error: a sign turned, a square or transpose forgotten, a factor 2 too many."""
    for match in re.finditer(r" \+ | - |\^2|\^\{\\top\}|(?<= = )|(?<=\\odot )", line):
        wrong = {" + ": " - ", " - ": " + ", "": "2 "}.get(match[0], "")
        yield line[: match.start()] + wrong + line[match.end() :]


@pytest.mark.parametrize("label", read_document())
def test_every_slip_is_caught(label):
    document = read_document()
    check(document, label)
    unnoticed = []
    for k, right in enumerate(document[label]):
        for slip in slips(right.text):
            try:
                check(document | {label: [*document[label][:k], equation(slip), *document[label][k + 1 :]]}, label)
            except (AssertionError, ValueError):  # a wrong number, or shapes that don't fit
                continue
            unnoticed.append(slip)
    assert not unnoticed


# ---- links, functions, quotations, figures --------------------------------------------------------------------------


def definitions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_equation_names_its_function():
    blocks = TEXT.split("\n$$\n")[2::2]  # what follows each block
    assert len(blocks) == len(FORMULA.findall(TEXT))
    for text in blocks:
        assert POINTER.search(text.strip().split("\n\n")[0]), text[:80]


def test_the_functions_exist():
    pointers = POINTER.findall(TEXT)
    for file, function, link in pointers:
        assert (DOCUMENT.parent / link).resolve() == ROOT / file, f"{file} is linked as {link}"
        assert function in definitions(ROOT / file), f"{file} has no {function}"
    assert len(pointers) == len(re.findall(r"`[\w/.]+: \w+`", TEXT)), "a pointer that isn't a link"


def test_the_links_exist():
    sections = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", TEXT, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        assert not target.startswith("http")
        assert (DOCUMENT.parent / path).exists(), target
        assert not anchor or anchor in sections, target


def test_the_figures_exist():
    shown = set(re.findall(r"!\[[^\]]+\]\(figures/([^)]+)\)", TEXT))
    there = {path.name: path.stat().st_size for path in (DOCUMENT.parent / "figures").iterdir()}
    assert shown <= set(there)
    assert max(there.values()) < 150_000


def test_quoted_code_is_the_code():
    quotations = re.findall(r"^```python\n(.*?)^```\n\n→ .*?\]\(([^)]+)\)", TEXT, re.MULTILINE | re.DOTALL)
    assert len(quotations) == TEXT.count("```python")
    for quotation, link in quotations:
        assert quotation in (DOCUMENT.parent / link).read_text(encoding="utf-8"), quotation


def test_the_mathematics_renders_on_github():
    """There, Markdown reads a formula before LaTeX does: it eats a backslash in front of punctuation."""
    prose = re.sub(r"^\$\$\n.*?\n\$\$$|^```.*?^```|`[^`\n]*`", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    for paragraph in prose.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
        for inline in paragraph.split("$")[1::2]:
            assert "\n" not in inline, f"a line break in {inline!r}"
            assert not re.search(r"\\[^a-zA-Z]", inline), inline
            assert inline == inline.strip(), inline
    for formula, _ in FORMULA.findall(TEXT):
        assert not re.search(r"\\[^a-zA-Z\n]", formula.replace("\\\\\n", "\n")), formula
