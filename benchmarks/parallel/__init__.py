"""What `benchmarks.bench_parallel` runs: one model under pipeline, tensor and data parallelism, ours and peers'.

case.py        the model, its batches, and what equal losses are
plain.py       the same model in torch's own layers, with the same weights, for peers
ours.py        a replica on a mesh (`train.replica`)
pipelines.py   the peers' pipelines; dtensor.py and ddp.py are the other two
splits.py      which splits of the layers are worth running
worker.py      what each rank does: all competitors in turn in every round
"""
