"""Where the package is found, and what its import costs."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import gpu_rnn

ROOT = Path(__file__).parents[1]


def python(code, *, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=True
    ).stdout.split()


def test_the_import_costs_numpy_only():
    code = """
import sys, gpu_rnn, numpy as np
gpu_rnn.lstm(np.ones((2, 1, 1)), np.ones((4, 1)), np.ones((4, 1)))
optional = {'torch', 'triton', 'cupy', 'matplotlib', 'rich', 'click', 'onnx', 'keras', 'h5py'}
print(*sorted({m.partition('.')[0] for m in sys.modules} & optional))
"""
    assert python(code, cwd=ROOT) == []


def test_a_layer_without_torch_says_what_is_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    code = """
import gpu_rnn
try: gpu_rnn.LSTM
except ImportError as error: print(error)
"""
    message = " ".join(python(code, cwd=ROOT, PYTHONPATH=str(tmp_path)))
    assert "gpu_rnn.LSTM needs torch" in message
    assert "pip install '.[torch]' in a checkout" in message


def test_unknown_names_are_attribute_errors():
    import gpu_rnn

    with pytest.raises(AttributeError, match="no attribute 'Transformer'"):
        gpu_rnn.Transformer  # noqa: B018


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: building writes next to the sources
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "gpu_rnn", "kernels"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_source_and_no_toplevel_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in (("gpu_rnn", "gpu_rnn"), ("kernels", "gpu_rnn/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh"):
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpu_rnn"}
    assert wheel.name.endswith("py3-none-any.whl")


@pytest.mark.parametrize("how", ["checkout", "wheel"])
def test_works_from_a_bare_checkout_and_from_a_wheel(how, wheel, tmp_path):
    if how == "wheel":
        zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import gpu_rnn, gpu_rnn.kernels, numpy as np
print(gpu_rnn.kernels.__name__, gpu_rnn.kernels.__file__, gpu_rnn.__version__)
print(gpu_rnn.gru(np.ones((2, 1, 1)), np.ones((3, 1)), np.ones((3, 1)))[0].shape[0])
"""
    where = ROOT if how == "checkout" else tmp_path
    name, file, version, T = python(code, cwd=tmp_path, PYTHONPATH=str(where))
    assert (name, version, T) == ("gpu_rnn.kernels", "0.1.0", "2")
    assert Path(file).is_relative_to(where)


def test_completion_finds_what_is_public_and_nothing_else():
    code = "import gpu_rnn, json; before = dir(gpu_rnn); gpu_rnn.onnx; print(json.dumps([before, dir(gpu_rnn)]))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    before, after = ({name for name in names if not name.startswith("__")} for names in json.loads(printed))
    loaded_lazily = {"kernels", "flashrnn", "keras", "onnx"}
    assert before == {name for name in gpu_rnn.__all__ if not name.startswith("__")} | loaded_lazily
    assert {"LSTM", "stream", "cell", "replace_", "tbptt"} < before
    assert after == before


@pytest.mark.parametrize("module", ["gpu_rnn.nn.layers", "gpu_rnn.kernels.philox", "tests.test_package", "bench.gpu"])
def test_a_warning_of_ours_fails_a_test(module):
    with pytest.raises(RuntimeWarning):
        warnings.warn_explicit("overflow", RuntimeWarning, "file.py", 1, module=module)
