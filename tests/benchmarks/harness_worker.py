"""Run by test_harness on 2 ranks: our compressed line keeps the law, and a planted fault breaks the check."""

from __future__ import annotations

import gc
import os
import sys

import torch.distributed as dist

import hybridcomm
from benchmarks.ours import OursDense, OursTopK
from benchmarks.peers import DdpHook, GlooAllReduce, Peer, naive_topk_hook

_NUMEL = 4096


def _turns(peer: Peer, count: int) -> None:
    for turn in range(count):
        peer.rewrite(turn)
        peer.call()
        peer.check(turn)


def _expect_fault(peer: Peer) -> None:
    try:
        peer.finish()
    except AssertionError as error:
        print(f"caught: {error}")
        return
    sys.exit(f"{peer.name}: the planted fault was not caught")


def main() -> None:
    dist.init_process_group("gloo")
    context = hybridcomm.init()
    peers: list[Peer] = [GlooAllReduce(_NUMEL), OursDense(_NUMEL, context), OursTopK(_NUMEL, context)]
    peers.append(DdpHook("naive", _NUMEL, naive_topk_hook, 0.01))
    for peer in peers:
        _turns(peer, 3)
        peer.finish()

    forgetful = OursTopK(_NUMEL, context)
    _turns(forgetful, 2)
    forgetful.rewrite(2)
    forgetful.call()
    forgetful._residual.rollback()  # the fault: a sum was applied, its residual thrown away
    forgetful.check(2)
    _expect_fault(forgetful)

    wrong = OursDense(_NUMEL, context)
    _turns(wrong, 1)
    wrong._sums.tensors[0][17] += 1
    try:
        wrong.check(0)
    except AssertionError as error:
        print(f"caught: {error}")
    else:
        sys.exit("a wrong element was not caught")
    hybridcomm.shutdown()
    del peer, peers, forgetful, wrong
    gc.collect()  # DDP and its hook go before the process group they use
    dist.barrier()  # rank 0 hosts torch's store: nobody may still need it
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's store server now and then aborts the interpreter's exit on a busy machine


if __name__ == "__main__":
    main()
