"""Ranks of torch DDP over gloo; rank 0 saves the gradients of each step. Run by test_ddp_equality."""

from __future__ import annotations

import multiprocessing
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.hybridcomm.exact_models import ExactNet


class Whole(torch.nn.Module):
    """DDP prepares its reducer in forward, so the loss is computed inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ExactNet()

    def forward(self, rank: int, step: int) -> torch.Tensor:
        return self.net.loss(rank, step)


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = Whole()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    saved = []
    for step in range(3):
        model.zero_grad()
        if step == 1:
            with ddp.no_sync():
                ddp(rank, 10 + step).backward()
        ddp(rank, step).backward()
        saved.append({name: p.grad.clone() for name, p in model.net.named_parameters() if p.grad is not None})
    if rank == 0:
        torch.save(saved, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    world, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    forked = multiprocessing.get_context("fork")  # torch is imported once; no autograd thread runs yet
    ranks = [forked.Process(target=main, args=(rank, world, store, out)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
