"""The edition for the kernels hub: what `python -m hub` writes, loaded as the hub's loader loads it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILDS = ("_gpu_rnn_1", "_gpu_rnn_2")

# What the hub's builder adds to a build, and how the hub's loader imports one: under the build's own name.
OPS = """
import torch
ops = torch.ops.{build}
def add_op_namespace_prefix(name): return "{build}::" + name
"""
LOAD = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import torch

def load(build):
    spec = spec_from_file_location(build, f"{build}/__init__.py")
    sys.modules[build] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[build])
    return sys.modules[build]

first = load("_gpu_rnn_1")
"""
AGREE = """
def agree(ours, theirs, *sizes):
    x = torch.randn(*sizes)
    for module in (ours, theirs):
        x.grad = None
        module.zero_grad()
        y, last = module(x.requires_grad_())
        last = last if isinstance(last, tuple) else (last,)
        (y.sin().sum() + sum(state.cos().sum() for state in last)).backward()
        found = [y, *last, x.grad, *(parameter.grad for parameter in module.parameters())]
        if module is theirs:
            torch.testing.assert_close(kept, found)
        kept = found

theirs = torch.nn.LSTM(8, 16)
"""


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "-m", "hub", "--out", out, "--repo", "somebody/gpu-rnn"], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def package(edition):
    return edition / "torch-ext" / "gpu_rnn"


@pytest.fixture(scope="module")
def builds(package, tmp_path_factory):
    """Two builds, in one folder."""
    folder = tmp_path_factory.mktemp("builds")
    for build in BUILDS:
        shutil.copytree(package, folder / build)
        (folder / build / "_ops.py").write_text(OPS.format(build=build))
    return folder


@pytest.fixture
def only(builds, tmp_path):
    """Run code where these distributions, and what they require, are all that Python can import besides its own."""
    pytest.importorskip("triton")

    def run(names, code, *paths, **env):
        for name in required(names):
            for file in distribution(name).files:
                top = tmp_path / file.parts[0]
                if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                    top.symlink_to(distribution(name).locate_file(file.parts[0]))
        env |= {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, *paths))), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-S", "-W", "ignore", "-c", LOAD + code],
            cwd=builds, env=os.environ | env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def required(names):
    """With all that they require in turn, as far as it is installed; without their extras."""
    result, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        try:
            lines = distribution(name).requires or ()
        except PackageNotFoundError:
            continue
        if name not in result:
            result.add(name)
            waiting += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return result


def sources(package):
    return {path: ast.parse(path.read_text()) for path in package.rglob("*.py")}


def test_build_toml(edition):
    build = tomllib.loads((edition / "build.toml").read_text())
    assert build == {
        "general": {
            "name": "gpu-rnn", "version": 0, "edition": 5, "license": "MIT", "backends": ["cuda"],
            "hub": {"repo-id": "somebody/gpu-rnn"},
        },
        "torch-noarch": {},
    }  # fmt: skip
    assert (edition / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (edition / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\nlicense: mit\n")


def test_every_import_is_relative_or_of_what_the_hub_has(package):
    """optional_imports.py looks for CuPy, and functions that are given NumPy's arrays ask for it."""
    for path, tree in sources(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                allowed = sys.stdlib_module_names | {"torch", "triton"}
                if node not in tree.body:
                    allowed |= {"cupy", "numpy"}
                assert {name.partition(".")[0] for name in names} <= allowed, f"{path}:{node.lineno}"


def test_every_relative_import_leads_somewhere(package):
    for path, tree in sources(package).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and node.module != "_ops":
                target = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert target.with_suffix(".py").exists() or (target / "__init__.py").exists(), f"{path}:{node.lineno}"


def test_other_backends_stay_out(package):
    assert {path.stem for path in (package / "backends").glob("*.py")} == {
        "__init__", "adapter", "call_cache", "cudnn", "dispatch", "gpu_common", "heads", "per_step", "protocol",
        "triton", "two_pass",
    }  # fmt: skip
    assert not [path for path in package.rglob("*") if "cuda" in path.name]


def test_an_old_edition_leaves_nothing_behind(edition, package):
    (package / "old.py").touch()
    subprocess.run([sys.executable, "-m", "hub", "--out", edition, "--repo", "somebody/gpu-rnn"], cwd=ROOT, check=True)
    assert not (package / "old.py").exists()


def test_imports_where_there_are_only_torch_and_triton(only):
    code = """
for absent in ("numpy", "cupy", "click", "gpu_rnn"):
    try: __import__(absent)
    except ImportError: continue
    raise AssertionError(f"{absent} is there: this shows nothing")

try: first.LSTM(8, 16)(torch.zeros(1, 1, 8))
except first.BackendError as error: print(error)
"""
    printed = only(["torch", "triton"], code)
    assert "no backend supports lstm T=1 B=1 I=8 H=16 float32 on cpu (torch):" in printed
    assert "triton: not available for arrays on the CPU" in printed
    assert "numpy" not in printed


@pytest.fixture
def interpreted(only):
    """Triton's interpreter takes NumPy, and some of its versions take mending."""
    return lambda code: only(
        ["torch", "triton", "numpy"],
        "import patch_interpreter\n" + AGREE + code,
        ROOT / "tests" / "interpreted",
        TRITON_INTERPRET="1",
    )


def test_computes_what_torch_does(interpreted):
    interpreted("""
ours = first.LSTM(8, 16)
ours.load_state_dict(theirs.state_dict())
agree(ours, theirs, 5, 3, 8)
""")


def test_compiles_without_a_graph_break(interpreted):
    interpreted("""
ours = first.LSTM(8, 16)
ours.load_state_dict(theirs.state_dict())
agree(torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs, 5, 3, 8)
""")


def test_kernelized_modules_stay_torchs(interpreted):
    """As `kernels.kernelize` does it: a bound method in the instance."""
    interpreted("""
from copy import deepcopy
from types import MethodType

for name in ("RNN", "LSTM", "GRU"):
    theirs = getattr(torch.nn, name)(8, 16, 2, bidirectional=True, batch_first=True)
    ours = deepcopy(theirs)
    ours.forward = MethodType(getattr(first.layers, name).forward, ours)
    agree(ours, theirs, 3, 5, 8)
    assert type(ours) is type(theirs)

    theirs = getattr(torch.nn, name + "Cell")(8, 16)
    x = torch.randn(3, 8)
    expected = theirs(x)
    theirs.forward = MethodType(getattr(first.layers, name + "Cell").forward, theirs)
    torch.testing.assert_close(theirs(x), expected)

torch.nn.utils.parametrizations.weight_norm(theirs, "weight_hh")
try: theirs(x)
except NotImplementedError as error: assert "replace_" in str(error)
else: raise AssertionError("computed without its parametrization")
""")


def test_layers_are_pure(only):
    """What `kernels.kernelize` demands of a layer and the module that it is for."""
    only(["torch", "triton"], """
import inspect
layers = [value for value in vars(first.layers).values() if inspect.isclass(value)]
assert len(layers) == 6
for layer in layers:
    assert layer.__init__ is torch.nn.Module.__init__
    assert set(dir(layer)) - set(dir(torch.nn.Module)) <= {"has_backward", "can_torch_compile"}
    theirs = getattr(torch.nn, layer.__name__)
    kinds = [[p.kind for p in inspect.signature(of.forward).parameters.values()] for of in (layer, theirs)]
    assert kinds[0] == kinds[1]
""")  # fmt: skip


def test_two_builds_and_the_package_live_side_by_side(interpreted):
    """Three sets of operators, and three of Triton functions."""
    interpreted(f"""
sys.path.append({str(ROOT)!r})
import gpu_rnn
second = load("_gpu_rnn_2")
ours = [gpu_rnn.LSTM(8, 16, backend="triton"), first.GRU(8, 16), second.LSTM(8, 16)]
for module in ours:
    module(torch.zeros(1, 1, 8, requires_grad=True))
for module in ours:
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    theirs = getattr(torch.nn, type(module).__name__)(8, 16)
    module.load_state_dict(theirs.state_dict())
    agree(compiled, theirs, 2, 1, 8)

operators = {{}}  # torch would let one replace another
for name in torch._C._dispatch_get_all_op_names():
    operators.setdefault(name.partition("::")[0], set()).add(name.partition("::")[2])
assert operators["gpu_rnn"] == operators["_gpu_rnn_1"] == operators["_gpu_rnn_2"]
""")
