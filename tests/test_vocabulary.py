"""What users read (docstrings, explanations, documents, help) says things in the field's words, and in no others."""

import ast
import inspect
import re
from itertools import product
from pathlib import Path

import click
import pytest

import gpu_rnn
from gpu_rnn import __main__ as command_line
from gpu_rnn import keras, onnx
from gpu_rnn.backends import cuda, dispatch, triton
from gpu_rnn.core import arrays
from gpu_rnn.core.problem import Problem
from gpu_rnn.kernels import cells
from gpu_rnn.kernels.cuda.persistent import DEVICES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "examples/README")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
RETIRED = {
    r"instants?": "time step",
    r"pages?": "cell definition",
    r"wove[n]?|weav(e|ing)": "modifiers",
    r"(?<!co-)residen(t|ce)": "persistent",
    r"units (that )?(meet|met)": "reduce over hidden units",
    r"in the place of": "drop-in replacement for; instead of",
    r"halves(?! the)": "half precision",
    r"nobody|whoever|somebody|he|him": "the component's name",
    r"insists?": "selects, forces",
    r"asked (for|of)": "requested",
    r"(input|recurrent) parts?": "input projection, recurrent projection",
    r"contenders?|oracles?": "implementation, reference implementation",
    r"on the chip": "on-chip",
    r"starts=|bitwise=": "left_padding=, step_exact=",
    r"(lstm|gru|rnn_tanh|rnn_relu)\+\w+": "the caller's keywords",
}
# Names of files and of what the code is called, which a later rename changes.
FILE = re.compile(r"\[[\w.]+\](?:\[\w+\]|\([^)]*\))|\]\([^)]*\)|[\w/]+\.(?:py|cuh?|md)\b|\[\w+\]: \S+|the code says .*")


# What no variable, parameter, attribute, function or class is called: whole names, and parts of names.
RETIRED_NAMES = {"asked", "found", "given", "page", "pages", "tape", "wanted"}
RETIRED_PARTS = {
    "contender", "contenders", "dhg", "dxg", "floor", "hg", "instant", "instants", "numpied", "oracle", "taped",
    "verdict", "weave", "weaving", "woven", "xg",
}  # fmt: skip
SOURCES = [
    path for folder in ("gpu_rnn", "kernels", "bench", "tests", "examples") for path in (ROOT / folder).rglob("*.py")
]
# What no kernel source says outside of comments; `its` and `Given` were what a thread has loaded.
RETIRED_IN_KERNELS = (
    RETIRED_NAMES | RETIRED_PARTS | {"EXTRA", "Given", "Handed", "LEARNED", "Meeting", "OPERAND", "TWIN", "its"}
)
KERNELS = [
    path for folder in ("kernels", "tests/cuda_emulator") for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".cu", ".cuh", ".cpp", ".h")
]  # fmt: skip


def retired(text):
    text = FILE.sub("", text)
    return {
        match[0]: word for old, word in RETIRED.items() for match in re.finditer(rf"(?<![\w-])(?:{old})(?!\w)", text)
    }


def public():
    """Everything of the package with a docstring that users are shown, by its name."""
    for name in sorted({*dir(gpu_rnn), "functional.LSTMKeywords"} - {"kernels", "keras", "onnx"}):
        value = getattr(gpu_rnn, name, None)
        if callable(value):
            yield name, value
            members = vars(value).items() if inspect.isclass(value) else ()
            yield from ((f"{name}.{key}", member) for key, member in members if not key.startswith("_"))
    for module in (gpu_rnn, keras, onnx, gpu_rnn.functional, gpu_rnn.nn.base):
        yield module.__name__, module
    for module in (keras, onnx):
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in ("load", "weights", "save"))
    for module in (gpu_rnn.functional, gpu_rnn.nn.base):
        names = [name for name in vars(module) if name.endswith("Keywords")]
        yield from ((f"{module.__name__}.{name}", getattr(module, name)) for name in names)


def bound(source):
    """Every name that Python code binds, but for those of imports."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def retired_names(source):
    return {
        name for name in bound(source)
        if name.strip("_") in RETIRED_NAMES or RETIRED_PARTS & set(name.lower().split("_"))
    }  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names(path):
    assert not retired_names(path.read_text())


def retired_in_kernels(source):
    return RETIRED_IN_KERNELS & set(re.findall(r"\w+", re.sub(r"//.*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"", "", source)))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_kernels(path):
    assert not retired_in_kernels(path.read_text())


def test_a_retired_name_is_found():
    source = (
        "def f(given, *, page=1):\n    for found in given: self.tape = lambda asked: found\nclass Woven: at_instant = 1"
    )
    assert retired_names(source) == {"given", "page", "found", "tape", "asked", "Woven", "at_instant"}
    assert not retired_names("from hypothesis import given\nbest = given.page(found=1)")
    assert retired_in_kernels('TWIN(x = its.h);  // Given\nprintf("xg");') == {"TWIN", "its"}


def test_docstrings():
    words_of = {name: words for name, value in public() if (words := retired(getattr(value, "__doc__", None) or ""))}
    assert not words_of


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents(path):
    assert not retired(path.read_text())


def test_help():
    context = click.Context(command_line.main, info_name="gpu-rnn")
    texts = [command.get_help(context) for command in (command_line.main, *command_line.main.commands.values())]
    assert not retired("\n".join(texts))


NAMES = [
    *cells.NAMES, "gru+before", "gru+norm", "lstm+norm", "lstm+coupled+peephole", "gru+projected",
    "lstm+clip(1.0)+dropout+hold+peephole+reset+reset_state+zoneout(0.1,0.05)",
    "gru+before+dropout+hold+reset+zoneout(0.1)",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_explanations(name, monkeypatch):
    monkeypatch.setattr(cuda, "device", lambda: DEVICES["h200"])
    monkeypatch.setattr(triton, "shared_memory", lambda: 232448)
    cell, texts = cells.get(name), []
    sizes = product((1, 100), (1, 64), (64, 1024, 4096), ("float32", "bfloat16", "float64"), (False, True))
    for T, B, H, dtype, training in sizes:
        P = 8 if "projected" in name else None
        problem = Problem(cell, T, B, 32, H, P, dtype, "cuda", "torch", training)
        texts += [dispatch.backend_for(backend, problem).plan(problem) for backend in ("cuda", "triton")]
        texts += [str(dispatch.explain(problem)), str(problem)]
    stack = Problem(cell, 100, 8, 32, 512, dtype="bfloat16", device="cuda", library="torch", training=True, layers=4)
    texts += [dispatch.backend_for("cuda", stack).plan(stack)]
    texts += [str(dispatch.explain(Problem(cell, 5, 2, 3, 4, dtype=dtype))) for dtype in arrays.DTYPES]
    assert not retired("\n".join(texts))


def test_a_retired_word_is_found():
    assert retired("a page, woven at every instant (gru+before); see weave.py") == {
        "page": "cell definition", "woven": "modifiers", "instant": "time step", "gru+before": "the caller's keywords",
    }  # fmt: skip


def test_a_cell_is_named_by_the_keywords_of_its_caller():
    names = {
        "lstm": "lstm", "gru+before": "gru[reset_after=False]",
        "lstm+clip(1.0)+hold+zoneout(0.1,0.05)": "lstm[cell_clip=1.0, lengths, zoneout=(0.1, 0.05)]",
    }  # fmt: skip
    assert {name: cells.label(name) for name in names} == names
