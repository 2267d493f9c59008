"""Run by torchrun in `test_torch_distributed.py`, with the device to run on: every process takes its share of a batch,
and compares the gradients with those of the whole batch in one process."""

import copy
import sys
import time

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpu_rnn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = gpu_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
        self.gru = gpu_rnn.GRU(8, 6, dtype=torch.float64)
        self.cell = gpu_rnn.RNNCell(6, 4, dtype=torch.float64)

    def forward(self, x):
        y, _ = self.gru(self.lstm(x)[0])
        h = None
        for step in y:
            h = self.cell(step, h)
        return h


def ours(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(device):
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    if device == "cuda":
        torch.cuda.set_device(distributed.get_rank())
    compare(device)  # its models go before the process group does
    distributed.barrier()  # no process leaves while another still communicates
    time.sleep(
        0.2
    )  # gloo's thread needs Python's lock to let go of its tensors, and leaving waits for it with the lock
    distributed.destroy_process_group()


def compare(device):
    rank, world = distributed.get_rank(), distributed.get_world_size()
    assert world == 2
    torch.manual_seed(0)
    plain, x = Model().to(device), torch.randn(5, 6, 3, dtype=torch.float64).to(device)
    sharded, replicated = copy.deepcopy(plain), DistributedDataParallel(copy.deepcopy(plain))
    mesh = init_device_mesh(device, (world,))
    for part in (*sharded.children(), sharded):
        fully_shard(part, mesh=mesh)
    for _ in range(2):  # twice: what is kept between steps must not be stale
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (plain, replicated, sharded)]
        for model, input in ((plain, x), (replicated, x[:, rank::world]), (sharded, x[:, rank::world])):
            model.zero_grad()
            model(input).square().mean().backward()
        expected = dict(plain.named_parameters())
        for model in (replicated.module, sharded):
            actual = dict(model.named_parameters())
            assert actual.keys() == expected.keys()
            for name, parameter in expected.items():
                torch.testing.assert_close(ours(actual[name].grad), parameter.grad, rtol=1e-12, atol=1e-14)
        for optimizer in optimizers:
            optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
