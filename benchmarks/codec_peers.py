"""What one would write in torch for each codec: compensate, code, new residual; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["PEERS", "Peer"]

GROUP = 128  # of int8 and int4; sign1 takes 256, as ours do
SIGN_GROUP = 256
ROWS = 100  # of which gtop1 and randk send one
COLUMNS = 512  # of powersgd's matrix
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

Code = tuple[Any, ...]


class Peer(NamedTuple):
    """``encode(grad, e_in, e_out) -> code``; ``decode_add(code, out)`` adds half of it. Tensors (numel,) fp32, on
    any device."""

    name: str
    encode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Code]
    decode_add: Callable[[Code, torch.Tensor], None]


def _topk_encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
    acc = grad + e_in
    index = torch.topk(acc.abs(), grad.numel() // 100, sorted=False).indices
    sent = acc[index]
    e_out.copy_(acc)
    e_out[index] = 0.0
    return index, sent


def _topk_decode(code: Code, out: torch.Tensor) -> None:
    out.index_add_(0, code[0], code[1], alpha=0.5)


def _cast(dtype: torch.dtype) -> Peer:
    def encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
        acc = grad + e_in
        code = acc.to(dtype)
        torch.sub(acc, code.float(), out=e_out)
        return (code,)

    def decode(code: Code, out: torch.Tensor) -> None:
        out.add_(code[0].float(), alpha=0.5)

    return Peer("torch cast", encode, decode)


def _fp8_encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
    acc = grad + e_in
    scale = acc.abs().max() / 448
    code = (acc / scale).to(torch.float8_e4m3fn)
    torch.sub(acc, code.float().mul_(scale), out=e_out)
    return code, scale


def _fp8_decode(code: Code, out: torch.Tensor) -> None:
    out.add_(code[0].float().mul_(code[1]), alpha=0.5)


def _integers(qmax: int, pack: bool) -> Peer:
    def encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
        acc = (grad + e_in).view(-1, GROUP)
        scale = acc.abs().amax(1, keepdim=True).div_(qmax).clamp_(min=1e-30)
        code = (acc / scale).round_().clamp_(-qmax, qmax)
        torch.sub(acc, code * scale, out=e_out.view(-1, GROUP))
        code = code.to(torch.int8)
        if pack:
            code = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
        return code, scale

    def decode(code: Code, out: torch.Tensor) -> None:
        codes, scale = code
        if pack:
            codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=2).view(-1, GROUP)
        out.view(-1, GROUP).add_(codes.float() * scale, alpha=0.5)

    return Peer(f"torch int{4 if pack else 8}", encode, decode)


def _sign_encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
    acc = (grad + e_in).view(-1, SIGN_GROUP)
    scale = acc.abs().mean(1, keepdim=True)
    negative = acc < 0
    torch.sub(acc, torch.where(negative, -scale, scale), out=e_out.view(-1, SIGN_GROUP))
    bits = _BITS.to(grad.device)
    return (negative.view(-1, 8).to(torch.uint8) * bits).sum(1, dtype=torch.uint8), scale


def _sign_decode(code: Code, out: torch.Tensor) -> None:
    bits, scale = code
    negative = (bits[:, None] & _BITS.to(bits.device)).bool().view(-1, SIGN_GROUP)
    out.view(-1, SIGN_GROUP).add_(torch.where(negative, -scale, scale), alpha=0.5)


def _one_of_each(pick: Callable[[torch.Tensor], torch.Tensor], lanes: int) -> Peer:
    """One element of each group of ROWS, ``lanes`` apart; ``pick(groups [n, ROWS, lanes]) -> rows [n, 1, lanes]``."""

    def groups(values: torch.Tensor) -> torch.Tensor:
        size = ROWS * lanes
        return F.pad(values, (0, -values.numel() % size)).view(-1, ROWS, lanes)

    def encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
        acc = groups(grad + e_in)
        rows = pick(acc)
        sent = acc.gather(1, rows)
        acc.scatter_(1, rows, 0.0)
        e_out.copy_(acc.view(-1)[: grad.numel()])
        return rows, sent

    def decode(code: Code, out: torch.Tensor) -> None:
        rows, sent = code
        dense = sent.new_zeros(len(rows), ROWS, lanes).scatter_(1, rows, sent)
        out.add_(dense.view(-1)[: out.numel()], alpha=0.5)

    return Peer("torch max of groups" if lanes > 1 else "torch.randint", encode, decode)


def _draw(groups: torch.Tensor) -> torch.Tensor:
    return torch.randint(ROWS, (len(groups), 1, groups.shape[-1]), device=groups.device)


def _low_rank(rank: int) -> Peer:
    def encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
        matrix = (grad + e_in).view(-1, COLUMNS)
        left = torch.linalg.qr(matrix @ torch.randn(COLUMNS, rank, device=grad.device)).Q
        right = matrix.T @ left
        torch.addmm(matrix, left, right.T, alpha=-1, out=e_out.view(-1, COLUMNS))
        return left, right

    def decode(code: Code, out: torch.Tensor) -> None:
        left, right = code
        out.view(-1, COLUMNS).addmm_(left, right.T, alpha=0.5)

    return Peer("torch matmul, qr", encode, decode)


def _coarse_topk(name: str, quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Peer:
    """``torch.topk`` whose values go as ``quantise(values) -> (code, scale)``."""

    def encode(grad: torch.Tensor, e_in: torch.Tensor, e_out: torch.Tensor) -> Code:
        index, sent = _topk_encode(grad, e_in, e_out)
        code, scale = quantise(sent)
        e_out[index] = sent - code.float() * scale
        return index, code, scale

    def decode(code: Code, out: torch.Tensor) -> None:
        out.index_add_(0, code[0], code[1].float() * code[2], alpha=0.5)

    return Peer(name, encode, decode)


def _int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = values.abs().max() / 127
    return (values / scale).round_().to(torch.int8), scale


def _sign(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.sign().to(torch.int8), values.abs().mean()


PEERS = {
    "topk": Peer("torch.topk", _topk_encode, _topk_decode),
    "topk:0.01+int8": _coarse_topk("torch.topk, int8", _int8),
    "topk:0.01+sign": _coarse_topk("torch.topk, sign", _sign),
    "gtopk:0.01": Peer("torch.topk", _topk_encode, _topk_decode),
    "gtop1:0.01": _one_of_each(lambda groups: groups.abs().argmax(1, keepdim=True), 32),
    "randk:0.01": _one_of_each(_draw, 1),
    "powersgd:1": _low_rank(1),
    "powersgd:4": _low_rank(4),
    "fp16": _cast(torch.float16),
    "bf16": _cast(torch.bfloat16),
    "fp8": Peer("torch scaled cast", _fp8_encode, _fp8_decode),
    "int8": _integers(127, pack=False),
    "int4": _integers(7, pack=True),
    "sign1": Peer("torch 1-bit", _sign_encode, _sign_decode),
}
"""By codec, in the order of the table."""
