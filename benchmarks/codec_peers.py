"""What one would write in torch for each codec: compensate, code, new residual; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["PEERS", "Peer"]

GROUP = 128  # of int8 and int4; sign1 takes 256, as ours do
SIGN_GROUP = 256
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)

Code = tuple[Any, ...]


class Peer(NamedTuple):
    """``encode(grad, e_in, e_out) -> code``; ``decode_add(code, out)`` adds half of it. Tensors (numel,) fp32."""

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
    return (negative.view(-1, 8).to(torch.uint8) * _BITS).sum(1, dtype=torch.uint8), scale


def _sign_decode(code: Code, out: torch.Tensor) -> None:
    bits, scale = code
    negative = (bits[:, None] & _BITS).bool().view(-1, SIGN_GROUP)
    out.view(-1, SIGN_GROUP).add_(torch.where(negative, -scale, scale), alpha=0.5)


PEERS = {
    "topk": Peer("torch.topk", _topk_encode, _topk_decode),
    "fp16": _cast(torch.float16),
    "bf16": _cast(torch.bfloat16),
    "fp8": Peer("torch scaled cast", _fp8_encode, _fp8_decode),
    "int8": _integers(127, pack=False),
    "int4": _integers(7, pack=True),
    "sign1": Peer("torch 1-bit", _sign_encode, _sign_decode),
}
"""By codec, in the order of the table."""
