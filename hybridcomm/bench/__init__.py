"""``python -m hybridcomm.bench``: times the collectives in the columns of nccl-tests, and checks every result.

    python -m hybridcomm.bench --nproc 4 --nodes 2                      starts its own ranks
    torchrun --nproc-per-node 4 -m hybridcomm.bench -b 1M -e 64M -f 4   under any launcher
    python -m hybridcomm.bench --nproc 2 --nodes 2 --compress topk:0.01

A compressed run has no busbw: fewer bytes cross the wire than the tensor has, so it would not be a speed of
the wire. It prints wirebytes, ratio, effbw and err instead.
"""
