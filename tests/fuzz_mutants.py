"""Bugs that the fuzz targets must find: tests/fuzz.py plants them in copies of the sources."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug to plant: ``before`` occurs once in the sources of ``folder``, and ``target`` must find the change."""

    what: str
    target: str
    folder: str
    before: str
    after: str


MUTANTS = (
    Mutant(
        what="a payload with records out of range is decoded",
        target="decode topk",
        folder="kernels/host",
        before="    if (status != Status::ok) {",
        after="    if (status != Status::ok && status != Status::bad_record) {",
    ),
    Mutant(
        what="indices of the last block are not checked",
        target="decode topk",
        folder="kernels/host",
        before="good &= (record & (params.block - 1)) < tail;",
        after="(void)record;",
    ),
    Mutant(
        what="a last group is read as a whole one",
        target="decode int4",
        folder="kernels/host",
        before="(left * Q::kBits + 7) / 8",
        after="group_bytes",
    ),
    Mutant(
        what="a byte too many is received",
        target="link",
        folder="hybridcomm/csrc",
        before="{front.data + data_received, front.expected.nbytes - data_received};",
        after="{front.data + data_received, front.expected.nbytes - data_received + 1};",
    ),
    Mutant(
        what="any proof will do",
        target="handshake",
        folder="hybridcomm/csrc",
        before="return same(proof(true), inbox_.data()) && expected(hello_)",
        after="return expected(hello_)",
    ),
    Mutant(
        what="the rest of a frame is read as a whole one",
        target="control",
        folder="hybridcomm/csrc",
        before="sizeof(Frame) - got_",
        after="sizeof(Frame)",
    ),
    Mutant(
        what="a message with too little data is taken for whole",
        target="messages",
        folder="hybridcomm/csrc",
        before="frame.tag.nbytes != posted->nbytes",
        after="frame.tag.nbytes > posted->nbytes",
    ),
    Mutant(
        what="a piece of a message may reach beyond it",
        target="messages",
        folder="hybridcomm/csrc",
        before=" || at->second.moved + frame.tag.nbytes > at->second.nbytes",
        after="",
    ),
    Mutant(
        what="data goes out again for every go",
        target="messages",
        folder="hybridcomm/csrc",
        before="if (at == peer.announced.end() || at->second.wanted) break;\n      at->second.wanted",
        after="if (at == peer.announced.end()) break;\n      at->second.wanted",
    ),
)
