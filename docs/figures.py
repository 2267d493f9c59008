"""Makes the figures of docs/derivation.md: `python docs/figures.py`, in under a minute.

Two of them are drawings. The others are measured: every number comes from a run of gpu_rnn on NumPy arrays with a
fixed seed, and nothing is smoothed unless the label says so.
"""

import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the products are small: a second thread only waits

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

import gpu_rnn
from gpu_rnn import kernels

HERE = Path(__file__).parent / "figures"
INK, PALE, BACK = "#24292f", "#eef1f4", "#c2341d"
HUES = {"i": "#1f6fb2", "f": "#d9730d", "g": "#2e8b57", "o": "#7d4bb0", "r": "#1f6fb2", "z": "#d9730d", "n": "#2e8b57"}

plt.switch_backend("Agg")
plt.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
    "mathtext.fontset": "cm", "svg.fonttype": "none", "figure.facecolor": "white",
})  # fmt: skip


def save(figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=130, bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)


# ---- drawings -------------------------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple:
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def box(ax: Axes, x: float, y: float, text: str, width=1.0, height=0.6, fill=PALE, edge=INK) -> None:
    corner = (x - width / 2, y - height / 2)
    patch = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.1", fc=fill, ec=edge, lw=1.3)
    ax.add_patch(patch).set_zorder(3)
    ax.text(x, y, text, ha="center", va="center", fontsize=13, zorder=4)


def operator(ax: Axes, x: float, y: float, text: str) -> None:
    ax.add_patch(Circle((x, y), 0.19, fc="white", ec=INK, lw=1.3, zorder=3))
    ax.text(x, y, text, ha="center", va="center", fontsize=12, zorder=4)


def wire(ax: Axes, *points: tuple[float, float], color=INK, tip=True) -> None:
    """A line through the points, with an arrow head at the last one."""
    xs, ys = zip(*points, strict=True)
    last = len(points) - 1 if tip else len(points)
    ax.plot(xs[:last], ys[:last], color=color, lw=1.3, solid_capstyle="round", zorder=2)
    if tip:
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=2)


def dot(ax: Axes, x: float, y: float) -> None:
    """Where a wire branches."""
    ax.plot([x], [y], "o", color=INK, ms=4, zorder=4)


def draw_unrolled() -> None:
    figure, ax = canvas(11.4, 3.4)
    box(ax, 1.3, 1.75, "cell", fill="#dfe9f3")
    wire(ax, (1.3, 0.55), (1.3, 1.45))
    wire(ax, (1.3, 2.05), (1.3, 2.95))
    dot(ax, 1.3, 2.35)
    wire(ax, (1.3, 2.35), (2.15, 2.35), (2.15, 1.75), (1.8, 1.75))
    ax.text(1.3, 0.3, "$x_t$", ha="center", va="center", fontsize=14)
    ax.text(1.3, 3.2, "$h_t$", ha="center", va="center", fontsize=14)
    ax.text(2.27, 2.1, "$h_{t-1}$", ha="left", va="center", fontsize=14)
    ax.text(3.5, 1.75, "=", ha="center", va="center", fontsize=22)
    ax.text(4.35, 1.75, "$h_0$", ha="center", va="center", fontsize=14)
    steps = [(5.6, "1"), (7.2, "2"), (8.8, "3"), (10.7, "T")]
    for place, (x, t) in enumerate(steps):
        box(ax, x, 1.75, "cell", fill="#dfe9f3")
        wire(ax, (x, 0.55), (x, 1.45))
        wire(ax, (x, 2.05), (x, 2.95))
        ax.text(x, 0.3, f"$x_{t}$", ha="center", va="center", fontsize=14)
        ax.text(x, 3.2, f"$h_{t}$", ha="center", va="center", fontsize=14)
        dot(ax, x, 2.35) if t != "T" else None
        if place < 3:
            bend, stop = x + 0.72, steps[place + 1][0] - 0.5
            if t == "3":
                wire(ax, (x, 2.35), (bend, 2.35), (bend, 1.75), (9.62, 1.75), tip=False)
                ax.plot([9.73, 9.83, 9.93], [1.75] * 3, "o", color=INK, ms=2)
                wire(ax, (9.98, 1.75), (stop, 1.75))
            else:
                wire(ax, (x, 2.35), (bend, 2.35), (bend, 1.75), (stop, 1.75))
    wire(ax, (4.62, 1.75), (5.1, 1.75))
    save(figure, "unrolled")


def draw_backward() -> None:
    figure, ax = canvas(9.6, 3.9)
    for x, t, before, w in ((2.6, "t-1", "t-2", 0), (5.2, "t", "t-1", 1), (7.8, "t+1", "t", 2)):
        box(ax, x, 1.7, "grad", width=1.1, fill="#fbe6e1", edge=BACK)
        operator(ax, x, 2.65, "$+$")
        wire(ax, (x, 3.45), (x, 2.84), color=BACK)
        wire(ax, (x, 2.46), (x, 2.0), color=BACK)
        wire(ax, (x, 1.4), (x, 0.5), color=BACK)
        ax.text(x, 3.65, f"$\\delta y_{{{t}}}$", ha="center", va="center", fontsize=14)
        ax.text(x + 0.1, 2.22, f"$\\delta h_{{{t}}}$", ha="left", va="center", fontsize=13)
        ax.text(x + 0.1, 1.0, f"$\\delta u_{{{t}}}$", ha="left", va="center", fontsize=13)
        ax.text(
            x, 0.25, f"$\\delta x_{{{t}}} = W^{{\\!\\top}} \\delta u_{{{t}}}$", ha="center", va="center", fontsize=13
        )
        left = (x - 1.3, 1.7)
        wire(ax, (x - 0.55, 1.7), left, (x - 1.3, 2.65), (x - 2.41 if w else x - 2.1, 2.65), color=BACK)
        ax.text(x - 1.38, 2.9, f"$\\hat\\delta h_{{{before}}}$", ha="center", va="center", fontsize=13)
        ax.text(x - 0.92, 1.45, f"$\\delta q_{{{t}}}$", ha="center", va="center", fontsize=13)
        ax.text(x - 1.22, 2.17, "$R^{\\!\\top}$", ha="left", va="center", fontsize=13)
    wire(ax, (9.2, 2.65), (7.99, 2.65), color=BACK)
    ax.text(8.95, 2.9, "$\\hat\\delta h_{t+1}$", ha="center", va="center", fontsize=13)
    save(figure, "backward")


def draw_lstm() -> None:
    figure, ax = canvas(10.6, 4.9)
    frame = FancyBboxPatch(
        (1.15, 0.95), 8.25, 3.75, boxstyle="round,pad=0,rounding_size=0.2", fc="#f7f9fb", ec="#b6bec7"
    )
    ax.add_patch(frame).set_zorder(0)
    top, bus = 4.15, 1.35
    wire(ax, (0.75, top), (2.21, top))  # c: f, + , out
    operator(ax, 2.4, top, "$\\odot$")
    wire(ax, (2.59, top), (4.71, top))
    operator(ax, 4.9, top, "$+$")
    wire(ax, (5.09, top), (9.75, top))
    gates = (2.4, "f", "\\sigma"), (4.1, "i", "\\sigma"), (5.7, "g", "\\tanh"), (7.3, "o", "\\sigma")
    for x, gate, function in gates:
        box(ax, x, 2.1, f"${function}$", width=0.86, height=0.56, fill=HUES[gate] + "33", edge=HUES[gate])
        wire(ax, (x, bus), (x, 1.82))
        if gate != "o":
            dot(ax, x, bus)
    wire(ax, (0.75, bus), (7.3, bus), tip=False)
    wire(ax, (1.7, 0.55), (1.7, bus), tip=False)
    dot(ax, 1.7, bus)
    wire(ax, (2.4, 2.38), (2.4, top - 0.19))
    operator(ax, 4.9, 3.0, "$\\odot$")
    wire(ax, (4.1, 2.38), (4.1, 3.0), (4.71, 3.0))
    wire(ax, (5.7, 2.38), (5.7, 3.0), (5.09, 3.0))
    wire(ax, (4.9, 3.19), (4.9, top - 0.19))
    dot(ax, 8.35, top)
    box(ax, 8.35, 3.4, "$\\tanh$", width=0.86, height=0.5)
    wire(ax, (8.35, top), (8.35, 3.65))
    operator(ax, 8.35, 2.6, "$\\odot$")
    wire(ax, (8.35, 3.15), (8.35, 2.79))
    wire(ax, (7.3, 2.38), (7.3, 2.6), (8.16, 2.6))
    wire(ax, (8.35, 2.41), (8.35, bus), (9.75, bus))
    labels = (
        (0.4, top, "$c_{t-1}$", INK), (10.05, top, "$c_t$", INK), (0.4, bus, "$h_{t-1}$", INK),
        (10.05, bus, "$h_t$", INK), (1.7, 0.3, "$x_t$", INK), (8.62, 2.97, "$\\tau_t$", INK),
        (2.2, 2.7, "$f_t$", HUES["f"]), (3.9, 2.7, "$i_t$", HUES["i"]), (5.92, 2.7, "$g_t$", HUES["g"]),
        (7.55, 2.8, "$o_t$", HUES["o"]),
    )  # fmt: skip
    for x, y, text, color in labels:
        ax.text(x, y, text, ha="center", va="center", fontsize=14, color=color)
    names = (2.4, "forget", "f"), (4.1, "input", "i"), (5.7, "candidate", "g"), (7.3, "output", "o")
    for x, text, gate in names:
        ax.text(x, 1.11, text, ha="center", va="center", fontsize=9, color=HUES[gate])
    save(figure, "lstm_cell")


def draw_gru() -> None:
    figure, ax = canvas(10.6, 4.9)
    frame = FancyBboxPatch(
        (1.15, 0.95), 8.25, 3.75, boxstyle="round,pad=0,rounding_size=0.2", fc="#f7f9fb", ec="#b6bec7"
    )
    ax.add_patch(frame).set_zorder(0)
    top, bus = 4.15, 1.35
    wire(ax, (0.75, top), (7.61, top))
    operator(ax, 7.8, top, "$\\odot$")
    wire(ax, (7.99, top), (8.61, top))
    operator(ax, 8.8, top, "$+$")
    wire(ax, (8.99, top), (9.75, top))
    dot(ax, 1.5, top)
    wire(ax, (1.5, top), (1.5, bus), (7.4, bus), tip=False)
    wire(ax, (1.9, 0.55), (1.9, bus), tip=False)
    dot(ax, 1.9, bus)
    for x, gate in ((2.7, "r"), (7.4, "z")):
        box(ax, x, 2.1, "$\\sigma$", width=0.86, height=0.56, fill=HUES[gate] + "33", edge=HUES[gate])
        wire(ax, (x, bus), (x, 1.82))
    dot(ax, 2.7, bus)
    operator(ax, 4.0, 2.75, "$\\odot$")
    wire(ax, (2.7, 2.38), (2.7, 2.75), (3.81, 2.75))
    dot(ax, 4.0, bus)
    wire(ax, (4.0, bus), (4.0, 2.56))
    operator(ax, 5.0, 2.75, "$+$")
    wire(ax, (4.19, 2.75), (4.81, 2.75))
    dot(ax, 5.0, bus)
    wire(ax, (5.0, bus), (5.0, 2.56))
    box(ax, 5.95, 2.75, "$\\tanh$", width=0.86, height=0.5, fill=HUES["n"] + "33", edge=HUES["n"])
    wire(ax, (5.19, 2.75), (5.52, 2.75))
    operator(ax, 8.8, 2.75, "$\\odot$")
    wire(ax, (6.38, 2.75), (8.61, 2.75))
    wire(ax, (8.8, 2.94), (8.8, top - 0.19))
    wire(ax, (7.4, 2.38), (7.4, 3.35), (7.8, 3.35), (7.8, top - 0.19))
    wire(ax, (7.83, 2.1), (8.8, 2.1), (8.8, 2.56))
    labels = (
        (0.4, top, "$h_{t-1}$", INK), (10.05, top, "$h_t$", INK), (1.9, 0.3, "$x_t$", INK),
        (2.5, 2.95, "$r_t$", HUES["r"]), (6.65, 2.95, "$n_t$", HUES["n"]), (7.55, 3.62, "$z_t$", HUES["z"]),
        (8.45, 1.82, "$1 - z_t$", HUES["z"]), (3.68, 2.1, "$q_{n,t}$", INK), (5.36, 2.1, "$u_{n,t}$", INK),
    )  # fmt: skip
    for x, y, text, color in labels:
        ax.text(x, y, text, ha="center", va="center", fontsize=14, color=color)
    for x, y, text, gate in ((2.7, 1.11, "reset", "r"), (5.95, 2.33, "candidate", "n"), (7.4, 1.11, "update", "z")):
        ax.text(x, y, text, ha="center", va="center", fontsize=9, color=HUES[gate])
    save(figure, "gru_cell")


# ---- gradients through time -----------------------------------------------------------------------------------------


def chained_norms(function, x, weights: dict, H: int) -> np.ndarray:
    """Norms of the gradient that a unit gradient of h_T becomes at every earlier time step; [T+1], index t.

    Each time step is a call of its own, so that its pullback passes the gradient of the state before it.
    """
    names = ("h0", "c0") if function is gpu_rnn.lstm else ("h0",)
    state = {name: np.zeros((1, H)) for name in names}
    pullbacks = []
    for t in range(len(x)):
        (_, last), pullback = gpu_rnn.vjp(function, x[t : t + 1], **weights, **state)
        pullbacks.append(pullback)
        state = dict(zip(names, last if isinstance(last, tuple) else (last,), strict=True))
    gradient = [np.full((1, H), H**-0.5), *(np.zeros((1, H)) for _ in names[1:])]
    norms = [1.0]
    for pullback in reversed(pullbacks):
        back = pullback((None, tuple(gradient)))
        gradient = [back[name] for name in names]
        norms.append(float(np.sqrt(sum((g**2).sum() for g in gradient))))
    return np.array(norms[::-1])


def draw_gradient_norm(T=100, H=64, I=8) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, 1, I))
    noise = {G: rng.normal(size=(G * H, H)) / np.sqrt(H) for G in (1, 4)}
    w_ih = {G: 0.1 * rng.normal(size=(G * H, I)) for G in (1, 4)}
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    distance = np.arange(T, -1, -1)
    reds = plt.get_cmap("Reds")(np.linspace(0.45, 0.95, 4))
    for gain, color in zip((0.5, 0.9, 1.5, 3.0), reds, strict=True):
        norms = chained_norms(gpu_rnn.rnn, x, {"w_ih": w_ih[1], "w_hh": gain * noise[1]}, H)
        axes[0].semilogy(distance, norms, color=color, label=f"$R$ scaled by {gain}")
    blues = plt.get_cmap("Blues")(np.linspace(0.45, 0.95, 4))
    for bias, color in zip((0.0, 1.0, 3.0, 5.0), blues, strict=True):
        b = np.zeros(4 * H)
        b[H : 2 * H] = bias
        norms = chained_norms(gpu_rnn.lstm, x, {"w_ih": w_ih[4], "w_hh": 0.5 * noise[4], "b_ih": b}, H)
        kept = 1 / (1 + np.exp(-bias))
        axes[1].semilogy(distance, norms, color=color, label=f"$b_f$ = {bias:.0f}")
        axes[1].semilogy(distance, norms[-2] * kept ** np.maximum(distance - 1, 0), ":", color=color, lw=1)
    axes[1].plot([], [], ":", color="gray", lw=1, label="$\\sigma(b_f)^{\\,k}$")
    for ax, title in zip(axes, ("RNN with tanh", "LSTM, $R$ scaled by 0.5"), strict=True):
        ax.set(title=title, xlabel="time steps back from the loss, $T - t$", ylim=(1e-16, 1e12))
        ax.grid(alpha=0.25)
        ax.legend(loc="upper left", fontsize=9, ncols=2)
    axes[0].set_ylabel("norm of the gradient of the state")
    save(figure, "gradient_norm")


# ---- training -------------------------------------------------------------------------------------------------------


def fresh(G: int, I: int, H: int, rng, forget: float | None = None) -> dict[str, np.ndarray]:
    """torch's initial distribution, zero biases; `forget` sets the forget gate's. v and b read the output."""
    k = H**-0.5
    p = {"w_ih": rng.uniform(-k, k, (G * H, I)), "w_hh": rng.uniform(-k, k, (G * H, H)), "b_ih": np.zeros(G * H)}
    if forget is not None:
        p["b_ih"][H : 2 * H] = forget
    p |= {"v": rng.uniform(-k, k, (1, H)), "b": np.zeros(1)}
    return {name: array.astype(np.float32) for name, array in p.items()}


class Adam:
    def __init__(self, parameters: dict[str, np.ndarray], rate: float):
        self.parameters, self.rate, self.count = parameters, rate, 0
        self.mean = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: np.zeros_like(p) for name, p in parameters.items()}

    def update(self, gradients: dict[str, np.ndarray]) -> None:
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        self.count += 1
        for name, p in self.parameters.items():
            g = gradients[name] * min(1.0, 1.0 / norm)
            self.mean[name] += 0.1 * (g - self.mean[name])
            self.square[name] += 0.001 * (g**2 - self.square[name])
            mean, square = self.mean[name] / (1 - 0.9**self.count), self.square[name] / (1 - 0.999**self.count)
            p -= self.rate * mean / (np.sqrt(square) + 1e-8)


def descend(function, p: dict, optimizer: Adam, x: np.ndarray, target: np.ndarray, last_only: bool) -> float:
    """One update on the mean squared error of v h_t + b at all time steps, or at the last. -> the error before it."""
    (y, _), pullback = gpu_rnn.vjp(function, x, p["w_ih"], p["w_hh"], p["b_ih"])
    shown = y[-1:] if last_only else y
    error = (shown @ p["v"].T)[..., 0] + p["b"] - target
    d = 2 * error[..., None] / error.size
    dy = np.zeros_like(y)
    dy[len(y) - len(shown) :] = d * p["v"]
    g = pullback((dy, (None,) * (2 if function is gpu_rnn.lstm else 1)))
    g = {name: g[name] for name in ("w_ih", "w_hh", "b_ih")}
    optimizer.update(g | {"v": (d * shown).sum((0, 1))[None], "b": d.sum((0, 1))})
    return float((error**2).mean())


def latch(T: int, B: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Inputs: a bit, "write", "read". Target: at a read the bit that stood at the last write, else 0."""
    bit = rng.choice([-1.0, 1.0], (T, B))
    write = rng.random((T, B)) < 0.12
    write[0] = True
    read = (rng.random((T, B)) < 0.2) & ~write
    held = np.zeros((T, B))
    for t in range(T):
        held[t] = np.where(write[t], bit[t], held[t - 1])
    return np.stack([bit, write, read], -1).astype(np.float32), (held * read).astype(np.float32)


def draw_gates(H=1, updates=1000, T=32) -> None:
    rng = np.random.default_rng(3)
    p = fresh(4, 3, H, rng, forget=1.0)
    optimizer = Adam(p, 0.03)
    for _ in range(updates):
        descend(gpu_rnn.lstm, p, optimizer, *latch(30, 64, rng), last_only=False)

    x, target = latch(T, 1, np.random.default_rng(7))
    cell, state, rows = kernels.cells.get("lstm"), (np.zeros(H, np.float32),) * 2, []
    for t in range(T):
        u, q = p["w_ih"] @ x[t, 0] + p["b_ih"], p["w_hh"] @ state[0]
        state, gates = cell.step(u.reshape(4, H), q.reshape(4, H), state)
        rows.append([float(value[0]) for value in (*gates, state[1], p["v"] @ state[0] + p["b"])])
    i, f, g, o, c, out = np.array(rows).T

    figure, axes = plt.subplots(6, 1, figsize=(9.2, 7.4), sharex=True)
    steps = np.arange(1, T + 1)
    bit, write, read = x[:, 0].T
    marks = [(write > 0, INK, "write"), (read > 0, BACK, "read")]
    axes[0].vlines(steps, 0, bit, color="#b6bec7", lw=5)
    for chosen, color, label in marks:
        axes[0].vlines(steps[chosen], 0, bit[chosen], color=color, lw=5, label=label)
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.1), fontsize=9)
    for ax, values, gate in zip(axes[1:5], (f, i, g, o), "figo", strict=True):
        ax.step(steps, values, where="mid", color=HUES[gate], lw=1.8)
        ax.fill_between(steps, values, step="mid", color=HUES[gate], alpha=0.15)
    axes[5].step(steps, c, where="mid", color=INK, lw=1.5, label="$c_t$")
    axes[5].plot(steps, out, "o", color=BACK, ms=4, label="output")
    axes[5].plot(steps, target[:, 0], "o", mfc="none", mec=INK, ms=8, label="target")
    axes[5].legend(loc="upper left", bbox_to_anchor=(1.0, 1.1), fontsize=9)
    names = ("bit $x_t$", "forget $f_t$", "input $i_t$", "candidate $g_t$", "output $o_t$", "state")
    for k, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.set_ylim((-0.05, 1.1) if k in (1, 2, 4) else (-1.25, 1.25))
        ax.set_yticks([0, 1] if k in (1, 2, 4) else [-1, 0, 1])
        for chosen, color, _ in marks:
            ax.vlines(steps[chosen], *ax.get_ylim(), color=color, lw=0.7, alpha=0.35, zorder=0)
    axes[5].set(xlabel="time step $t$", xlim=(0.4, T + 0.6))
    figure.align_ylabels()
    save(figure, "gates")


def adding(T: int, B: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Inputs: a number from [0, 1), a mark. Two numbers are marked, one in each half; target: their sum at the end."""
    x = np.zeros((T, B, 2), np.float32)
    x[..., 0] = rng.random((T, B))
    rows = np.arange(B)
    x[rng.integers(0, T // 2, B), rows, 1] = 1
    x[rng.integers(T // 2, T, B), rows, 1] = 1
    return x, x.prod(-1).sum(0)[None]


def draw_adding(T=30, H=32, B=64, updates=900, window=20) -> None:
    figure, ax = plt.subplots(figsize=(7.6, 3.4))
    layers = {"RNN": (gpu_rnn.rnn, 1, None, BACK), "LSTM, $b_f = 1$": (gpu_rnn.lstm, 4, 1.0, HUES["i"]),
              "GRU": (gpu_rnn.gru, 3, None, HUES["g"])}  # fmt: skip
    for label, (function, G, forget, color) in layers.items():
        for seed, style in ((1, "-"), (2, "--")):
            rng = np.random.default_rng(seed)
            p = fresh(G, 2, H, rng, forget)
            optimizer = Adam(p, 0.01)
            errors = [descend(function, p, optimizer, *adding(T, B, rng), last_only=True) for _ in range(updates)]
            smooth = np.convolve(errors, np.full(window, 1 / window), "valid")
            at = np.arange(len(smooth)) + window
            ax.semilogy(at, smooth, style, color=color, lw=1.4, label=label if seed == 1 else None)
    ax.axhline(1 / 6, color="gray", lw=1, ls=":", label="always answering 1")
    ax.set(xlabel="updates", ylabel=f"squared error, mean of {window} updates", xlim=(0, updates), ylim=(8e-5, 1))
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    save(figure, "adding")


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for draw in (draw_unrolled, draw_backward, draw_lstm, draw_gru, draw_gradient_norm, draw_gates, draw_adding):
        draw()


if __name__ == "__main__":
    main()
