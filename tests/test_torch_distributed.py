"""Several processes, or several replicas, train as one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gpu_rnn

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def torchrun(processes, *command, gpus=False):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ddp_and_fsdp2_have_the_gradients_of_one_process():
    torchrun(2, "-m", "tests.distributed", "cpu")


@pytest.mark.gpu
@two_gpus
def test_ddp_and_fsdp2_on_two_gpus():
    torchrun(2, "-m", "tests.distributed", "cuda", gpus=True)


def test_the_example_trains_the_same_model_on_any_number_of_processes(tmp_path):
    pytest.importorskip("rich")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)

    def losses(processes, *options):
        printed = torchrun(processes, "examples/train_ddp.py", "--steps=4", f"--text={text}", *options)
        return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]

    alone = losses(1)
    assert len(alone) == 4
    assert alone[-1] < alone[0]
    assert losses(2) == pytest.approx(alone, abs=3e-5)
    assert losses(2, "--shard") == pytest.approx(alone, abs=3e-5)


def test_replicas_of_data_parallel():
    """What nn.DataParallel makes of a module for every GPU: a shallow copy with plain tensors for parameters."""
    layer, x = gpu_rnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 1)
    assert not list(replica.parameters())
    y, expected = replica(x)[0], nn.DataParallel(layer)(x)[0]
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.gpu
@two_gpus
def test_data_parallel_on_two_gpus():
    layer, x = gpu_rnn.GRU(3, 4, batch_first=True).cuda(), torch.randn(4, 5, 3, device="cuda")
    torch.testing.assert_close(nn.DataParallel(layer, [0, 1])(x)[0], layer(x)[0])
