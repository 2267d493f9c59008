"""torch.compile and torch.export: one operator per layer, and nothing lost on the way.

Plain stacks: test_wavefront.py.
"""

import subprocess
import sys
from itertools import combinations, product

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import gpu_rnn
import gpu_rnn.autograd.custom_ops  # registers the operators
from gpu_rnn.core.flat_runs import chunks
from gpu_rnn.kernels import cells
from gpu_rnn.modifiers.apply import cell_info

LAYERS = [
    ("LSTM", {}), ("LSTM", {"proj_size": 2, "bias": False}), ("RNN", {"nonlinearity": "relu"}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {"bias": False}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(20)


def operators(graph):
    return [node for node in graph.nodes if "gpu_rnn" in str(node.target)]


def results(layer, x):
    x = x.clone().requires_grad_()
    outputs = tree_leaves(layer(x))
    return outputs, torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *layer.parameters()])


@pytest.mark.parametrize(("kind", "arguments"), LAYERS, ids=str)
def test_compiled_is_eager_at_every_size_from_one_graph(kind, arguments):
    layer = getattr(gpu_rnn, kind)(3, 4, **arguments)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T, B in ((5, 2), (7, 3), (40, 6)):
        x = torch.randn(B, 3) if kind.endswith("Cell") else torch.randn(T, B, 3)
        (actual, gradients), (expected, expected_gradients) = results(compiled, x), results(layer, x)
        for ours, theirs in zip((*actual, *gradients), (*expected, *expected_gradients), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert ours.stride() == theirs.stride()
    (graph,) = [graph.graph for graph in counter.graphs if operators(graph.graph)]
    assert len(operators(graph)) == getattr(layer, "num_layers", 1)


@pytest.mark.parametrize("keywords", [{}, {"zoneout": 0.1}, {"layer_norm": True}, {"recurrent_dropout": 0.1}], ids=str)
def test_nothing_is_warned_of(keywords, recwarn):
    layer = torch.compile(gpu_rnn.LSTM(3, 4, **keywords), backend="eager")
    layer(torch.randn(5, 2, 3), lengths=torch.tensor([3, 5]), reset=torch.zeros(5, 2, dtype=torch.bool))
    assert not [str(warning.message) for warning in recwarn]


def test_sizes_become_dynamic_by_themselves():
    """Without being told: the second size compiles a second time, for good."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gpu_rnn.LSTM(3, 4), fullgraph=True, backend=counter)
    for T, B in ((5, 2), (7, 3), (9, 4), (11, 5)):
        compiled(torch.randn(T, B, 3))
    assert sum(bool(operators(graph.graph)) for graph in counter.graphs) == 2


def test_a_single_row_compiles():
    layer = gpu_rnn.GRU(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(5, 1, 3), torch.randn(1, 1, 3), torch.randn(5, 3)):
        torch.testing.assert_close(results(compiled, x), results(layer, x), rtol=0, atol=0)


def test_without_gradients_nothing_is_saved():
    layer, seen = gpu_rnn.LSTM(3, 4), []

    def look(graph, inputs):
        seen.extend(node.args[-1] for node in operators(graph.graph))
        return graph.forward

    for context in (torch.no_grad(), torch.enable_grad()):
        torch._dynamo.reset()
        with context:
            torch.compile(layer, fullgraph=True, backend=look)(torch.randn(5, 2, 3))
    assert seen == [False, True]


def test_packed_input_is_computed_between_graphs():
    """Its batch sizes are data. The graph is cut there, and no other lengths compile anything anew."""
    layer, counter = gpu_rnn.LSTM(3, 4, bidirectional=True), CompileCounterWithBackend("aot_eager")
    head = nn.Linear(8, 2)
    compiled = torch.compile(lambda packed: head(layer(packed)[0].data), backend=counter)
    for lengths in ((5, 3, 3), (4, 1), (7, 7, 6, 2), (3, 2, 1), (9,)):
        packed = pack_sequence([torch.randn(n, 3) for n in lengths])
        torch.testing.assert_close(compiled(packed), head(layer(packed)[0].data))
    assert counter.frame_count <= 2


def test_functions_compile_too():
    weights = [p.detach() for p in gpu_rnn.GRU(3, 4).parameters()]
    x = torch.randn(5, 2, 3)

    def run(a):
        return gpu_rnn.gru(a, *weights, reverse=True)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_bad_shapes_are_named_while_compiling():
    compiled = torch.compile(gpu_rnn.GRU(3, 4), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"input has shape|expected \[T, B, I\]|raised exception|ShapeError"):
        compiled(torch.randn(5, 2, 4))


@pytest.mark.native
def test_inductor():
    """The compiler users get, once: a model around the layer, trained for three steps."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = gpu_rnn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.Linear(8, 1)

        def forward(self, x):
            return self.head(self.rnn(x.tanh())[0].relu()).square().mean()

    def losses(run, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for x in torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            loss = run(x)
            loss.backward()
            optimizer.step()
            yield loss.item()

    plain = Model()
    compiled = Model()
    compiled.load_state_dict(plain.state_dict())
    expected = list(losses(plain, plain))
    assert list(losses(torch.compile(compiled, fullgraph=True), compiled)) == pytest.approx(expected, rel=1e-5)


# ---- dropout --------------------------------------------------------------------------------------------------------


def differs_between_calls(run, x):
    return not torch.equal(run(x)[0], run(x)[0])


def test_dropout_between_layers_is_kept_and_torchs_masks_are_drawn():
    layer, x = gpu_rnn.LSTM(3, 40, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert differs_between_calls(compiled, x)
    outputs = []
    for run in (compiled, layer):
        torch.manual_seed(1)
        outputs.append(run(x)[0])
    assert torch.equal(*outputs)


def test_torch_nn_loses_dropout_when_compiled():
    """Why the test above is there: torch 2.13's decomposition drops it. Where this fails, torch has mended it."""
    layer, x = nn.LSTM(3, 40, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    assert differs_between_calls(layer, x)
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
        assert not differs_between_calls(compiled, x)


# ---- operators ------------------------------------------------------------------------------------------------------

OPERANDS = [  # cell, T, B, P, dtype, reverse of each direction: every set of saved activations
    ("lstm", 3, 2, None, torch.float32, [False]), ("lstm", 3, 1, None, torch.float32, [True]),
    ("lstm", 1, 2, 2, torch.float64, [True]), ("gru", 3, 2, None, torch.bfloat16, [False, True]),
    ("rnn_relu", 2, 2, None, torch.float16, [False]), ("rnn_tanh", 2, 1, None, torch.float64, [False]),
    ("lstm", 5, 2, None, torch.float32, [False, True]),
    (cell_info("gru", reset=True, reset_state=True, zoneout=(0.3,)).name, 3, 2, None, torch.float32, [True]),
]  # fmt: skip


def operands(cell, T, B, P, dtype, reverse, device="cpu", I=3, H=4):
    known = cells.get(cell)

    def draw(*shape):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    shapes = {"w_ih": (known.G * H, I), "w_hh": (known.G * H, P or H)}
    if cell != "rnn_relu":
        shapes |= {"b_ih": (known.G * H,), "b_hh": (known.G * H,)}
    if P:
        shapes["w_hr"] = P, H
    tensors = []
    for _ in reverse:
        weights = {name: draw(*shape) for name, shape in shapes.items()}
        if known.E:
            weights["units"] = draw(len(known.per_unit_params), B, H)
            weights["flags"] = torch.randint(0, 2, (T, B), device=device).to(torch.uint8)
            weights["seed"] = torch.tensor([5], device=device)
        tensors += [draw(T, B, I), *weights.values(), draw(B, P or H), *(draw(B, H) for _ in known.states[1:])]
    return cell, tensors, " ".join(weights), reverse, "auto"


def check(*case, **where):
    cell, tensors, names, reverse, backend = operands(*case, **where)
    S = len(cells.get(cell).states)
    forward, backward = torch.ops.gpu_rnn.forward.default, torch.ops.gpu_rnn.backward.default
    for save, history in product((True, False), {False, S > 1}):
        options = reverse, False, backend, None, False, 1, history
        arguments = (cell, tensors, names, *options, save)
        tests = [name for name in torch.library._OPCHECK_DEFAULT_UTILS if save or "aot" not in name]
        torch.library.opcheck(forward, arguments, test_utils=tests)
        with torch.no_grad():
            runs = chunks(forward(*arguments), len(reverse))
        outputs = 1 + S + (S - 1) * history
        recorded = [tensor for y, *rest in runs for tensor in (y, *rest[outputs - 1 :])]
        douts = [torch.randn_like(tensor) for each in runs for tensor in each[:outputs]]
        needs = [tensor.requires_grad for tensor in tensors]
        detached = [tensor.detach() for tensor in tensors]
        torch.library.opcheck(backward, (cell, detached, names, douts, recorded, *options, needs))


@pytest.mark.parametrize("case", OPERANDS, ids=str)
def test_opcheck(case):
    check(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPERANDS, ids=str)
def test_opcheck_on_a_gpu(case):
    check(*case, device="cuda")


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_one_node_per_layer_and_runs_elsewhere(strict, tmp_path):
    layer = gpu_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(layer, (torch.randn(2, 5, 3),), dynamic_shapes=({0: B, 1: T},), strict=strict)
    assert len(operators(program.graph)) == 2
    for shape in ((3, 7, 3), (1, 1, 3), (2, 100, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)
    if strict:
        return
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, layer(x)[0].detach()), tmp_path / "data.pt")
    script = f"""
import gpu_rnn, torch
x, y = torch.load({str(tmp_path / "data.pt")!r})
assert torch.equal(torch.export.load({str(tmp_path / "model.pt2")!r}).module()(x)[0], y)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.native
def test_aot_inductor_packages_run_from_python_and_are_refused_elsewhere(tmp_path):
    T, B = torch.export.Dim("T", min=1, max=64), torch.export.Dim("B", min=1, max=64)
    torch.manual_seed(0)
    theirs, layer = nn.LSTM(3, 4, bidirectional=True), gpu_rnn.LSTM(3, 4, bidirectional=True)
    layer.load_state_dict(theirs.state_dict())
    program = torch.export.export(layer.eval(), (torch.randn(5, 2, 3),), dynamic_shapes=({0: T, 1: B},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = torch.randn(7, 3, 3)
    torch.save((x, theirs(x)[0].detach()), tmp_path / "data.pt")
    script = f"""
x, y = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(torch._inductor.aoti_load_package({str(tmp_path / "model.pt2")!r})(x)[0], y)
"""

    def run(imports):
        return subprocess.run([sys.executable, "-c", imports + script], capture_output=True, text=True)

    fresh, without = run("import torch, gpu_rnn"), run("import torch")
    assert fresh.returncode == 0, fresh.stderr
    assert "Could not find schema for gpu_rnn::forward" in without.stderr  # as in C++, where there is no Python


def test_an_exported_layer_still_trains():
    layer, x = gpu_rnn.GRU(3, 4), torch.randn(5, 2, 3)
    module = torch.export.export(layer, (x,)).module()
    module(x)[0].square().sum().backward()
    layer(x)[0].square().sum().backward()
    for actual, parameter in zip(module.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, parameter.grad)


# ---- every keyword --------------------------------------------------------------------------------------------------

SIZES = [(5, 2), (7, 3), (9, 4), (11, 5), (4, 6), (6, 7), (8, 8), (3, 9), (12, 10), (2, 11)]
KEYWORDS = {
    "LSTM": {
        "zoneout": 0.2, "recurrent_dropout": 0.3, "input_dropout": 0.2, "weight_dropout": 0.2, "recompute": True,
        "step_exact": True, "proj_size": 2, "layer_norm": True, "peephole": True, "coupled": True, "cell_clip": 0.5,
        "recurrent_dropout_on": "candidate", "forget_bias": 1.0, "num_layers": 2, "bidirectional": True,
        "batch_first": True,
    },
    "GRU": {"zoneout": (0.2,), "layer_norm": True, "reset_after": False, "recurrent_dropout": 0.3, "proj_size": 2},
    "RNN": {"zoneout": 0.2, "recurrent_dropout": 0.3, "nonlinearity": "relu"},
}  # fmt: skip
CALLS = ("reset", "reset_state", "lengths", "left_padding", "return_states", "hx")
ALONE = [(kind, (name,)) for kind, keywords in KEYWORDS.items() for name in (*keywords, *CALLS)]
PAIRS = [(kind, pair) for kind, keywords in KEYWORDS.items() for pair in combinations((*keywords, *CALLS), 2)][::5]


def drawn(layer, names, T, B):
    """x, and the keywords of a call."""
    lead = (B, T) if layer.batch_first else (T, B)
    many = layer.num_layers * (2 if layer.bidirectional else 1)

    def states():
        sizes = [layer.proj_size or 4, *[4] * (len(cells.get(layer._cell).states) - 1)]
        drawn = tuple(torch.randn(many, B, size) for size in sizes)
        return drawn if len(drawn) > 1 else drawn[0]

    keywords = {
        "reset": lambda: torch.rand(lead) < 0.3, "reset_state": states, "return_states": lambda: True, "hx": states,
        "lengths": lambda: torch.randint(1, T + 1, (B,)), "left_padding": lambda: torch.randint(0, T, (B,)),
    }  # fmt: skip
    drawn_names = {*names, "reset"} if "reset_state" in names else {*names}
    return torch.randn(*lead, 3), {name: draw() for name, draw in keywords.items() if name in drawn_names}


def one_graph(kind, names, dynamic, sizes, backend):
    torch._dynamo.reset()
    try:
        layer = getattr(gpu_rnn, kind)(3, 4, **{k: v for k, v in KEYWORDS[kind].items() if k in names})
        layer(*drawn(layer, names, 5, 2)[:1])
    except ValueError:
        return  # these two don't go together
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    for T, B in sizes:
        x, keywords = drawn(layer, names, T, B)
        results = []
        for run in (compiled, layer):
            torch.manual_seed(T)
            results.append(tree_leaves(run(x, **keywords)))
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("kind", "names"), ALONE, ids=str)
def test_every_keyword_is_one_graph_for_ten_sizes(kind, names, dynamic):
    """Compiled anew once at most, when sizes turn out to differ: what AOTAutograd sees then is what `dynamic` gives."""
    one_graph(kind, names, dynamic, SIZES, "eager" if dynamic else "aot_eager")


@pytest.mark.parametrize(
    ("kind", "names", "dynamic"), [(*pair, (None, True)[k % 2]) for k, pair in enumerate(PAIRS)], ids=str
)
def test_pairs_of_keywords_are_one_graph(kind, names, dynamic):
    """Every fifth pair: each keyword is in some. In turn by default and with dynamic sizes; alone, each is both."""
    one_graph(kind, names, dynamic, SIZES[:3], "eager")


# ---- torch.func, compiled -------------------------------------------------------------------------------------------


def loss(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x,))[0].square().sum()


TRANSFORMS = {
    "grad": lambda f, p, x: torch.func.grad(f)(p, x),
    "grad of x": lambda f, p, x: torch.func.grad(f, 1)(p, x),
    "vmap": lambda f, p, x: torch.vmap(f, (None, 0))(p, torch.stack([x, 2 * x, 3 * x])),
    "ensemble": lambda f, p, x: torch.vmap(f, (0, None))({k: torch.stack([w, 2 * w]) for k, w in p.items()}, x),
    "each one's gradient": lambda f, p, x: torch.vmap(torch.func.grad(f), (None, 0))(p, torch.stack([x, 2 * x])),
    "jacrev": lambda f, p, x: torch.func.jacrev(f, 1)(p, x),
    "hessian": lambda f, p, x: torch.func.grad(lambda x: torch.func.grad(f, 1)(p, x).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    ("kind", "arguments"), [("LSTM", {}), ("GRU", {"bidirectional": True}), ("RNN", {"num_layers": 2})], ids=str
)
def test_transforms_compile_as_torch_nn_is_transformed(kind, arguments, name):
    """Against torch.nn's layer on float64, member by member where it has no rule for vmap."""
    theirs = getattr(nn, kind)(3, 4, **arguments).double()
    ours = getattr(gpu_rnn, kind)(3, 4, **arguments).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    parameters = {key: weight.detach() for key, weight in theirs.named_parameters()}

    def run(parameters, x):
        return TRANSFORMS[name](lambda p, x: loss(ours, p, x), parameters, x)

    actual = tree_leaves(torch.compile(run, fullgraph=True, backend="aot_eager")(parameters, x))
    for each, expected in zip(actual, tree_leaves(by_torch_nn(name, theirs, parameters, x)), strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-9)


def by_torch_nn(name, model, parameters, x):
    def gradient(leaves, parameters, x, **options):
        return torch.autograd.grad(loss(model, parameters, x), leaves, **options)

    tracked = {key: weight.clone().requires_grad_() for key, weight in parameters.items()}
    xs, x = [x, 2 * x, 3 * x], x.clone().requires_grad_()
    if name == "grad":
        return dict(zip(tracked, gradient([*tracked.values()], tracked, x)))
    if name in ("grad of x", "jacrev"):
        return gradient(x, parameters, x)
    if name == "vmap":
        return torch.stack([loss(model, parameters, each) for each in xs])
    if name == "ensemble":
        return torch.stack([loss(model, {k: n * w for k, w in parameters.items()}, x) for n in (1, 2)]).detach()
    if name == "each one's gradient":
        rows = [gradient([*tracked.values()], tracked, each) for each in xs[:2]]
        return {key: torch.stack(each) for key, *each in zip(tracked, *rows)}
    (dx,) = gradient(x, parameters, x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), x)


def test_the_operators_are_differentiated_twice_by_torch_func_and_autograd_alike():
    theirs, x = nn.GRU(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    weights, zeros = [weight.detach() for weight in theirs.parameters()], x.new_zeros(2, 4)
    for save in (True, False):

        def run(x, save=save):
            options = "w_ih w_hh b_ih b_hh", [0], False, "auto", None, False, 1, False, save
            return torch.ops.gpu_rnn.forward("gru", [x, *weights, zeros], *options)[0].square().sum()

        def squared(x, run=run):
            return torch.func.grad(run)(x).square().sum()

        tracked = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(run(tracked), tracked, create_graph=True)
        expected = by_torch_nn("hessian", theirs, dict(theirs.named_parameters()), x)[0]
        torch.testing.assert_close(torch.func.grad(squared)(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(dx.square().sum(), tracked)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_stream_compiles_and_keeps_its_state(kind):
    theirs = getattr(nn, kind)(3, 4, num_layers=2)
    ours = getattr(gpu_rnn, kind)(3, 4, num_layers=2)
    ours.load_state_dict(theirs.state_dict())
    stream, x = gpu_rnn.stream(ours, 2), torch.randn(6, 2, 3)
    compiled = torch.compile(stream, fullgraph=True, backend="aot_eager")
    y = torch.stack([run(step).clone() for run, step in zip([compiled, compiled, stream] * 2, x)])
    expected, last = theirs(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(stream.state, last)
