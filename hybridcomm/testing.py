"""Does an own compressor keep the protocol? `check_compressor` says, without ranks, network or pytest.

    from hybridcomm.testing import check_compressor
    check_compressor(MyCompressor())              # raises ConformanceError with all that is wrong

Each check is a function below; an author reads what it demands in its docstring.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridcomm.custom import CustomCompressor, CustomSpec
from hybridcomm.errors import HybridCommError

__all__ = ["ConformanceError", "check_compressor"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_ROUNDOFF = 2.0**-24
_GUARD = 64  # bytes, or elements, around what a compressor may write
_DIGEST = 0x0123456789ABCDEF


class ConformanceError(HybridCommError, AssertionError):
    """A compressor breaks its protocol; ``findings`` has a line for each breach."""

    def __init__(self, compressor: object, findings: tuple[str, ...]) -> None:
        super().__init__(f"{compressor} does not conform:\n" + "\n".join(f"  {line}" for line in findings))
        self.findings = findings


def check_compressor(compressor: CustomCompressor, *, seed: int = 0) -> None:
    """Raises `ConformanceError` listing every breach of the protocol that is found; takes about a second."""
    try:
        case = _Case(spec=CustomSpec(compressor), rng=np.random.default_rng(seed))
    except HybridCommError as error:
        raise ConformanceError(type(compressor).__name__, (f"settings: {error}",)) from error
    findings = []
    for check in _CHECKS:
        try:
            findings += [f"{check.__name__.strip('_')}: {what}" for what in dict.fromkeys(check(case))]
        except Exception as error:  # an author's code may raise anything
            findings.append(f"{check.__name__.strip('_')}: raised {error!r}")
    if findings:
        raise ConformanceError(compressor, tuple(findings))


@dataclass(frozen=True, kw_only=True)
class _Case:
    spec: CustomSpec
    rng: np.random.Generator

    @property
    def own(self) -> CustomCompressor:
        return self.spec.compressor

    def sizes(self) -> list[int]:
        block = self.own.block
        return sorted({1, 2, max(block - 1, 1), block, block + 1, 3 * block + 5, 1000, 4096})

    def normal(self, numel: int) -> Floats:
        return self.rng.standard_normal(numel).astype(np.float32)

    def inputs(self, numel: int) -> Iterator[tuple[str, Floats]]:
        yield "normal", self.normal(numel)
        yield "heavy-tailed", self.normal(numel) ** 5
        yield "constant", np.full(numel, -0.75, np.float32)
        yield "one element", np.eye(1, numel, numel // 2, np.float32)[0]
        yield "zeros", np.zeros(numel, np.float32)
        yield "tiny", self.normal(numel) * np.float32(1e-42)
        yield "large", self.normal(numel) * np.float32(1e15)

    def encode(self, grad: Floats, e_in: Floats | None = None) -> tuple[Bytes, Floats]:
        """(body, e_out) on copies, as the engine would call it."""
        body, e_out = np.zeros(self.own.nbytes(grad.size), np.uint8), np.empty_like(grad)
        before = np.zeros_like(grad) if e_in is None else e_in.copy()
        self.own.encode(grad.copy(), before, e_out, body)
        return body, e_out

    def decode(self, *bodies: Bytes, numel: int, weight: float = 1.0, onto: Floats | None = None) -> Floats:
        out = np.zeros(numel, np.float32) if onto is None else onto.copy()
        self.own.decode_add([body.copy() for body in bodies], out, weight)
        return out


def _sizes(case: _Case) -> Iterator[str]:
    """nbytes is a pure function of numel, an int >= 0, and never more for fewer elements."""
    sizes = [1, *case.sizes()]
    found = [case.spec.nbytes(numel) for numel in sizes]
    for numel in sizes:
        case.encode(case.normal(numel))
    if found != [case.spec.nbytes(numel) for numel in sizes]:
        yield "nbytes(numel) changes from call to call: receivers post their buffers before anything is sent"
    if found != sorted(found):
        yield "nbytes(numel) falls as numel grows"


def _deterministic(case: _Case) -> Iterator[str]:
    """Equal input, equal bytes and residual, whatever was encoded in between and whichever copy does it."""
    grad, e_in = case.normal(1000), case.normal(1000)
    first = case.encode(grad, e_in)
    case.encode(case.normal(1000))
    other = copy.deepcopy(case)
    for who, again in (("a second call", case.encode(grad, e_in)), ("a copy", other.encode(grad, e_in))):
        if not (np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])):
            yield f"{who} gives other bytes or another residual: no state, no clock, no global random numbers"
    sums = [each.decode(first[0], numel=1000) for each in (case, other, copy.deepcopy(case))]
    if not all(np.array_equal(sums[0], each) for each in sums):
        yield "a copy decodes a payload otherwise: all that a receiver needs must be in it"


def _writes(case: _Case) -> Iterator[str]:
    """Only e_out, payload and out are written, completely and within their bounds."""
    for numel in case.sizes():
        grad, e_in, size = case.normal(numel), case.normal(numel), case.own.nbytes(numel)
        kept = grad.copy(), e_in.copy()
        residual = np.full(numel + 2 * _GUARD, np.nan, np.float32)
        payload = np.full(size + 2 * _GUARD, 0xA5, np.uint8)
        body = payload[_GUARD : _GUARD + size]
        body[:] = 0
        case.own.encode(grad, e_in, residual[_GUARD:-_GUARD], body)
        if not (np.array_equal(grad, kept[0]) and np.array_equal(e_in, kept[1])):
            yield "encode changes grad or e_in"
        if np.isnan(residual[_GUARD:-_GUARD]).any():
            yield f"encode leaves elements of e_out unwritten (numel {numel})"
        if not np.isnan(np.r_[residual[:_GUARD], residual[-_GUARD:]]).all():
            yield f"encode writes beyond e_out (numel {numel})"
        if (np.r_[payload[:_GUARD], payload[_GUARD + size :]] != 0xA5).any():
            yield f"encode writes beyond the payload (numel {numel})"
        read_only, out = body.copy(), np.full(numel + 2 * _GUARD, 7, np.float32)
        case.own.decode_add([read_only], out[_GUARD:-_GUARD], 1.0)
        if not np.array_equal(read_only, body):
            yield "decode_add changes a payload"
        if (np.r_[out[:_GUARD], out[-_GUARD:]] != 7).any():
            yield f"decode_add writes beyond out (numel {numel})"


def _conserves(case: _Case) -> Iterator[str]:
    """grad + e_in = decoded + e_out, up to one rounding of each element, for every size and kind of input."""
    for numel in case.sizes():
        for kind, grad in case.inputs(numel):
            e_in = grad[::-1] * np.float32(0.5)
            body, e_out = case.encode(grad, e_in)
            decoded = case.decode(body, numel=numel).astype(np.float64)
            if not (np.isfinite(decoded).all() and np.isfinite(e_out).all()):
                yield f"{kind} input of {numel} elements: what is decoded or left is not finite"
                continue
            acc = (grad + e_in).astype(np.float64)
            gap = np.abs(acc - decoded - e_out)
            if (gap > 2 * _ROUNDOFF * (np.abs(acc) + np.abs(decoded)) + 2.0**-149).any():
                yield f"{kind} input of {numel} elements: grad + e_in is not decoded + e_out (off by {gap.max():.3g})"


def _contracts(case: _Case) -> Iterator[str]:
    """|x - C(x)|^2 <= (1 - contraction) |x|^2 where claimed; never more energy lost than there is; never none sent."""
    claim = case.own.contraction or 0.0
    sent = 0.0
    for numel in case.sizes():
        for kind, grad in case.inputs(numel):
            energy = float((grad.astype(np.float64) ** 2).sum())
            if kind in ("zeros", "tiny") or not energy:
                continue
            decoded = case.decode(case.encode(grad)[0], numel=numel)
            lost = float(((grad.astype(np.float64) - decoded) ** 2).sum())
            sent = max(sent, 1 - lost / energy)
            if case.own.contraction is not None and lost > (1 - claim) * energy * (1 + 1e-6):
                share = f"{lost / energy:.4f} of the energy is lost, claimed {1 - claim:.4f}"
                yield f"{kind} input of {numel} elements: {share}"
    if sent <= 0:
        yield "no input is approximated better than by zeros: nothing would ever be learnt"


def _adds(case: _Case) -> Iterator[str]:
    """decode_add adds, in list order, each payload times weight; an empty list changes nothing."""
    numel = 3 * case.own.block + 5
    bodies = [case.encode(case.normal(numel))[0] for _ in range(3)]
    base = case.normal(numel)
    together = case.decode(*bodies, numel=numel, onto=base)
    one_by_one = base
    for body in bodies:
        one_by_one = case.decode(body, numel=numel, onto=one_by_one)
    if not np.array_equal(together, one_by_one):
        yield "several payloads give other bits than one after another: add them to out in list order"
    single = case.decode(bodies[0], numel=numel)
    if not np.array_equal(case.decode(numel=numel, onto=base), base):
        yield "an empty list changes out"
    if not np.array_equal(case.decode(bodies[0], numel=numel, weight=0.25), np.float32(0.25) * single):
        yield "weight does not scale what is added"
    if not np.allclose(case.decode(bodies[0], numel=numel, onto=base), base + single, rtol=1e-6, atol=1e-6):
        yield "decode_add does not add to what is in out"


def _wrapped(case: _Case) -> Iterator[str]:
    """In the engine's wrapping: in place, memoryless and non-finite calls; a damaged payload is refused."""
    numel = case.own.block + 1
    grad, e_in = case.normal(numel), case.normal(numel)
    payload, in_place = np.zeros(case.spec.nbytes(numel), np.uint8), e_in.copy()
    flags = case.spec.encode_payload(grad, in_place, in_place, payload, _DIGEST)
    if flags or not np.array_equal(in_place, case.encode(grad, e_in)[1]):
        yield "e_out being e_in changes the result"
    case.spec.encode_payload(grad, None, None, payload, _DIGEST)
    out = np.ones(numel, np.float32)
    case.spec.decode_payloads([payload, payload], out, 0.5, _DIGEST)
    body = case.encode(grad)[0]
    if not np.array_equal(out, case.decode(body, body, numel=numel, weight=0.5)):
        yield "a memoryless call is not one with a residual of zeros"
    grad[0], kept = np.nan, e_in.copy()
    if not case.spec.encode_payload(grad, e_in, in_place, payload, _DIGEST) or not np.array_equal(
        in_place, kept
    ):
        yield "a NaN does not leave the residual as it was"


_CHECKS: tuple[Callable[[_Case], Iterator[str]], ...] = (
    _sizes,
    _deterministic,
    _writes,
    _conserves,
    _contracts,
    _adds,
    _wrapped,
)
