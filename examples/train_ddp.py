"""Train the demo's character-level language model on several processes.

    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 100            DistributedDataParallel
    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 100 --shard    FSDP2: weights in shares, too

Every process reads its share of the streams of text, and the gradients are averaged: any number of processes that
divides the streams trains the same model, to rounding. On GPUs where there are some, else on the CPU with gloo.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gpu_rnn.tools.demo import LEARNING_RATE, B, Model, Text


def main(steps: int, text: Path | None, shard: bool) -> None:
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(steps, text, shard)  # its model goes before the process group does
    distributed.barrier()  # no process leaves while another one still communicates
    time.sleep(
        0.2
    )  # gloo's thread needs Python's lock to let go of its tensors, and leaving waits for it with the lock
    distributed.destroy_process_group()


def train(steps: int, text: Path | None, shard: bool) -> None:
    gpu = torch.cuda.is_available()
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if B % world:
        raise SystemExit(f"{world} processes can't share {B} streams of text evenly")
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights everywhere
    source = Text.read(text)
    model: torch.nn.Module = Model(len(source.alphabet)).to(device)
    if shard:
        mesh = init_device_mesh(device.type, (world,))
        fully_shard(model.lstm, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    state = None
    for step, (restart, codes, following) in zip(range(steps), source.batches()):
        codes, following = (whole[:, rank::world].to(device) for whole in (codes, following))
        scores, state = model(codes, None if restart else tuple(s.detach() for s in state))
        loss = cross_entropy(scores.flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world
        distributed.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1:5}, loss {mean.item():.5f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--text", type=Path, help="a UTF-8 file; Python's own standard library without it")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DistributedDataParallel")
    main(**vars(parser.parse_args()))
