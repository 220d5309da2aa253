"""The block study computes what the kernels compute, and its figures notice a worse rule."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.block_topk import Rule, compress, score
from hybridcomm.kernels import TopKSpec, reference


def _gradients(steps: int, numel: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    mean = rng.standard_normal(numel) * np.exp(rng.standard_normal(numel))
    return [(mean + rng.standard_normal(numel)).astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize("block", [64, 1024, 4096])
def test_a_rule_sends_what_the_kernels_send(block: int) -> None:
    spec = TopKSpec(block=block, ratio=0.02)
    grad = _gradients(1, 3 * block + 77)[0]
    payload, decoded = np.zeros(spec.nbytes(grad.size), np.uint8), np.zeros_like(grad)
    reference.encode(spec, grad, None, None, payload)
    reference.decode_add(spec, [payload], decoded)
    rule = Rule(block=block, ratio=0.02, bits=spec.layout[2])
    assert (compress(grad, rule) == decoded).all()
    assert not (compress(grad, Rule(block=block, ratio=0.02, bits=spec.layout[2] - 1)) == decoded).all()


def test_the_global_rule_keeps_most() -> None:
    gradients = _gradients(8, 20 * 256)
    by_block = score(gradients, Rule(block=256, ratio=4 / 256))
    everywhere = score(gradients, Rule(block=0, ratio=4 / 256))
    fewer = score(gradients, Rule(block=256, ratio=3 / 256))
    assert everywhere.single >= by_block.single > fewer.single
    assert fewer.exact < by_block.exact


def test_compression_counts_the_payload() -> None:
    spec = TopKSpec()
    dense = 4 * (1 << 22)
    counted = dense / (spec.nbytes(1 << 22) - 64)
    assert Rule(block=1024, bits=6).compression(1 << 22) == pytest.approx(
        counted, rel=1e-3
    )  # sections' padding
