"""The command line: what it prints, what it writes, and how it refuses."""

import csv
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import gpu_rnn
from gpu_rnn.__main__ import main
from gpu_rnn.backends import dispatch
from gpu_rnn.tools import demo

PNG = b"\x89PNG\r\n\x1a\n"
SIZES = ["-T", "7", "-B", "3", "-I", "4", "-H", "6"]
ROOT = Path(__file__).parents[1]


def call(*arguments, **env):
    return CliRunner(env=env).invoke(main, [str(argument) for argument in arguments])


def refused(result, message):
    """Exit status 2, a last line that says why, and no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def process(*arguments, **env):
    return subprocess.run(
        [sys.executable, "-m", "gpu_rnn", *map(str, arguments)],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture
def text(tmp_path):
    """Easy to learn: a loss far below its characters' entropy within a few steps."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog [once];\n" * 400, encoding="utf-8")
    return path


# ---- info, explain, bench -------------------------------------------------------------------------------------------


def test_info_tells_every_backend_and_why_not():
    result = process("info", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    for word in (gpu_rnn.__version__, torch.__version__, "CPUs", *dispatch.ORDER):
        assert word in result.stdout
    assert "forward: float32, one recurrent matmul" in result.stdout
    assert "no: not available for arrays on the GPU" in result.stdout
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU: torch" in result.stdout


def test_explain_prints_the_explanation():
    result = call("explain", "gru", *SIZES, "--device", "cpu", "--library", "numpy", "--training")
    assert result.exit_code == 0, result.output
    options = dict(zip("TBIH", (7, 3, 4, 6)), device="cpu", library="numpy", training=True)
    assert result.stdout == f"{gpu_rnn.explain('gru', **options)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "lstm", "-T", "7"], "Missing option '-B'"),
        (["explain", "lstm", *SIZES, "-H", "0"], "Invalid value for '-H': 0 is not in the range"),
        (["explain", "lstm", *SIZES, "-H", "many"], "'many' is not a valid integer"),
        (["explain", "lstm", *SIZES, "-P", "6"], "P = 6, H = 6; a projection needs P < H"),
        (["explain", "lstm", *SIZES, "--library", "numpy", "--device", "cuda"], "numpy has no arrays on cuda"),
        (["explain", "transformer", *SIZES], "'transformer' is not one of 'gru', 'lstm', 'rnn_relu', 'rnn_tanh'"),
        (["explain", "lstm", *SIZES, "--backend", "fast"], "'fast' is not one of 'cuda', 'triton', 'native', 'numpy'"),
        (["demo", "--seconds", "0"], "0.* is not in the range"),
        (["demo", "--seconds", "-1"], "-1.* is not in the range"),
        (["demo", "--seconds", "nan"], "'--seconds': nan is not a finite number"),
        (["demo", "--seconds", "inf"], "'--seconds': inf is not a finite number"),
        (["demo", "--text", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["train"], "No such command 'train'"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message):
    refused(call(*arguments), message)


COMMANDS = [["info"], ["explain", "lstm", *SIZES, "--device", "cpu"], ["--help"], ["--version"], ["bench", "list"]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device without room")
@pytest.mark.parametrize("arguments", [*COMMANDS, ["demo", "--seconds", "1"]], ids=" ".join)
def test_output_without_room_is_one_clear_line(arguments, tmp_path):
    arguments = [*arguments, "--out", str(tmp_path)] if "demo" in arguments else arguments
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gpu_rnn", *arguments], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode in (1, 2)
    assert re.fullmatch(r"(no native code.*\n)?(Error|python -m bench): .*No space left on device\n", result.stderr)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_output_that_is_not_read_to_its_end(arguments):
    run = subprocess.Popen(
        [sys.executable, "-m", "gpu_rnn", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    assert re.fullmatch(rb"(no native code.*\n)?", run.stderr.read())
    assert run.wait(60) == 1


def test_a_backend_that_does_not_exist_is_refused():
    refused(call("info", GPU_RNN_BACKEND="fast"), r"\$GPU_RNN_BACKEND: unknown backend 'fast'; there are cuda")


def test_without_click_the_extra_is_named(tmp_path):
    code = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name in ("click", "rich"): raise ModuleNotFoundError(name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("click", "rich") else find_spec(name, *rest)
import gpu_rnn.__main__
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    command = "pip install '.[demo]' in a checkout of gpu-rnn"
    assert result.stderr == f"Error: gpu-rnn's commands need click and rich: {command}\n"


def test_bench_belongs_to_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr("gpu_rnn.__main__.__file__", str(tmp_path / "gpu_rnn" / "__main__.py"))
    refused(call("bench", "run", "--quick"), "the benchmarks are not installed; they are in the repository's folder")


def test_bench_gets_all_its_arguments(tmp_path):
    """In a checkout of its own, because a process has room for one package of that name."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    for name in ("gpu_rnn", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = subprocess.run(
        [sys.executable, "-m", "gpu_rnn", "bench", "run", "--help", "-x"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (3, "['run', '--help', '-x']\n"), result.stderr


# ---- demo -----------------------------------------------------------------------------------------------------------


def test_the_demo_end_to_end(text, tmp_path):
    out = tmp_path / "figures"
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # other tests run at the same time
    result = process("demo", "--text", text, "--seconds", 3, "--out", out, **alone)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    losses = [float(loss) for loss in re.findall(r"^step +\d+, loss (\d\.\d+)", result.stdout, re.MULTILINE)]
    assert losses[-1] < losses[0]
    differences = re.search(r"largest difference.*: (\S+) in float64, (\S+) in float32", result.stdout).groups()
    assert float(differences[0]) < 1e-12
    assert float(differences[1]) < 1e-4
    assert re.search(r"gpu_rnn [\d.]+ ms, torch.nn [\d.]+ ms", result.stdout)
    for name in ("loss.png", "gates.png"):
        assert (out / name).read_bytes().startswith(PNG)
        assert str(out / name) in result.stdout
    assert "backend: " in result.stdout
    assert "[once];" in result.stdout, "the text's own brackets are no markup"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"text.txt has 0 characters; one batch alone takes 2080"),
        (b"short", r"text.txt has 5 characters"),
        (b"\xff\xfe" * 2000, r"text.txt is not UTF-8 text: .*can't decode byte 0xff in position 0"),
    ],
)
def test_texts_that_cannot_be_learned(content, message, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    refused(call("demo", "--text", tmp_path / "text.txt", "--out", tmp_path), message)


def test_an_output_folder_that_cannot_be(text, tmp_path):
    refused(call("demo", "--text", text, "--out", text / "figures"), "Not a directory")


@pytest.mark.parametrize("library", ["torch", "matplotlib"])
def test_the_demo_without_its_libraries(library, monkeypatch):
    monkeypatch.setattr("gpu_rnn.__main__.missing", lambda name: f"no {name}" if name == library else None)
    refused(call("demo"), rf"the demo needs {library}: no {library}; pip install '\.\[demo\]' in a checkout")


def test_the_default_text_is_the_standard_library():
    text = demo.Text.read(None)
    assert "def heappush(" in text.characters
    assert len(text.alphabet) == demo.ALPHABET
    assert len(text.codes) == len(text.characters)


def test_characters_and_codes(text):
    text.write_text("\x1b[31m rare\n" + "ab" * 2000, encoding="utf-8")
    read = demo.Text.read(text)
    assert read.alphabet == demo.RARE + "\n" + " 13[abemr"
    back = "".join(read.alphabet[k] for k in read.codes[:11])
    assert back == demo.RARE + "[31m rare\n", "what a terminal would obey is not learned"
    assert 40 <= len(read.characters[read.line()]) <= 64
    assert 0.6 < read.entropy() < 0.8, "two characters, equally frequent: log 2 nats"


def test_batches_follow_each_other(text):
    read = demo.Text.read(text)
    length = len(read.codes) // demo.B
    batches = read.batches()
    restart, codes, following = next(batches)
    assert restart
    assert codes.shape == following.shape == (demo.T, demo.B)
    assert torch.equal(codes[:, 1], read.codes[length : length + demo.T])
    assert torch.equal(following[:, 1], read.codes[length + 1 : length + demo.T + 1])
    again, later, _ = next(batches)
    assert not again
    assert torch.equal(later[0], following[-1])
    count = (length - 1) // demo.T
    restarts = [restart, again, *(next(batches)[0] for _ in range(2 * count - 2))]
    assert [k for k, begun in enumerate(restarts) if begun] == [0, count]


def test_a_difference_from_torch_stops_the_demo(monkeypatch):
    right = demo.everything

    def wrong(layer, *inputs):
        return [tensor * (1 + 1e-9 * isinstance(layer, gpu_rnn.LSTM)) for tensor in right(layer, *inputs)]

    monkeypatch.setattr(demo, "everything", wrong)
    with pytest.raises(RuntimeError, match=r"gpu_rnn.LSTM differs from torch.nn.LSTM by 1.0e-09 in float64"):
        demo.check(torch.device("cpu"), print)


# ---- compare-cells --------------------------------------------------------------------------------------------------


def test_cells_are_compared(tmp_path):
    out = tmp_path / "out"
    tasks = "--task", "adding", "--task", "copy"
    result = call("compare-cells", "JANET", "CoRNN", "GRU", *tasks, "--steps", 3, "-T", 5, "-H", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "curves.png").read_bytes().startswith(PNG)
    rows = list(csv.DictReader((out / "curves.csv").read_text().splitlines()))
    assert {(row["task"], row["cell"]) for row in rows} == set(product(("adding", "copy"), ("JANET", "CoRNN", "GRU")))
    assert [int(row["step"]) for row in rows][:3] == [1, 2, 3]
    for row in rows[2::3]:
        assert f"{float(row['score']):.4f}" in result.stdout, "the table has the last scores"


@pytest.mark.parametrize(("task", "cell", "below"), [("adding", "JANET", 0.06), ("digits", "LightRU", 0.8)])
def test_a_compared_cell_learns(task, cell, below):
    if task == "digits":
        pytest.importorskip("sklearn")
    from gpu_rnn.tools import compare_cells

    settings = compare_cells.Settings(steps=120, length=4, hidden=24, rate=1e-2, batch=16)
    made = compare_cells.TASKS[task](settings.length, settings.seed)
    steps = []
    result = compare_cells.train(cell, task, made, settings, "cpu", lambda: steps.append(1))
    assert (len(steps), len(result.curve)) == (120, 20)
    assert result.curve[-1][1] < below < made.chance


def test_an_unknown_cell_is_refused(tmp_path):
    refused(call("compare-cells", "Transformer", "--out", tmp_path), "unknown cell Transformer; there are RNN, .*JANET")
    assert not list(tmp_path.iterdir())
