"""What stands beside the codecs in the table of kernels does the same work: nothing is lost but into the residual."""

from __future__ import annotations

import pytest
import torch

from benchmarks.codec_peers import COLUMNS, PEERS, ROWS, Peer
from hybridcomm.kernels import parse
from tests.numerics import gamma

NUMEL = 50 * COLUMNS + 2 * COLUMNS  # a multiple of all groups, not of gtop1's and randk's
SPARSE = {"topk", "topk:0.01+int8", "topk:0.01+sign", "gtopk:0.01", "gtop1:0.01", "randk:0.01"}


def passed(peer: Peer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient and old residual, what arrives, new residual)."""
    torch.manual_seed(0)
    grad, e_in = torch.randn(NUMEL) ** 3, torch.randn(NUMEL)
    e_out, out = torch.full((NUMEL,), torch.nan), torch.zeros(NUMEL)
    code = peer.encode(grad, e_in, e_out)
    for _ in range(2):  # each adds half
        peer.decode_add(code, out)
    return grad + e_in, out, e_out


def lossless(want: torch.Tensor, got: torch.Tensor) -> None:
    largest = float(want.abs().max())  # scales and low-rank factors are rounded to parts of it
    torch.testing.assert_close(got, want, rtol=0.0, atol=gamma(2 * COLUMNS, "float32") * largest)


@pytest.mark.parametrize("codec", PEERS)
def test_what_is_not_sent_is_in_the_residual(codec: str) -> None:
    want, out, e_out = passed(PEERS[codec])
    lossless(want, out + e_out)
    assert 0 < float((want - out).norm()) < 1.05 * float(want.norm())
    if codec in SPARSE:
        assert NUMEL // ROWS <= int((out != 0).sum()) <= NUMEL // ROWS + 32  # of padded groups too


@pytest.mark.parametrize("codec", PEERS)
def test_control_a_lost_part_is_noticed(codec: str) -> None:
    want, out, e_out = passed(PEERS[codec])
    with pytest.raises(AssertionError):
        lossless(want, 0.9 * out + e_out)


@pytest.mark.parametrize("codec", PEERS)
def test_nothing_leaves_the_device(codec: str) -> None:
    """On torch's device without memory, which refuses tensors of others."""
    grad, e_in, e_out, out = (torch.empty(NUMEL, device="meta") for _ in range(4))
    code = PEERS[codec].encode(grad, e_in, e_out)
    PEERS[codec].decode_add(code, out)
    assert {each.device.type for each in (*code, out, e_out)} == {"meta"}


@pytest.mark.parametrize("codec", PEERS)
def test_every_row_is_a_codec_of_ours(codec: str) -> None:
    assert parse(codec).nbytes(1 << 20) < 1 << 22
