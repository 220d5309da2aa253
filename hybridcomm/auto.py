"""``compress="auto"``: compress a tensor between nodes only where measured figures say that it pays.

    compress="auto"                    top-k 1 %, or dense
    compress="auto:int8"               int8, or dense
    compress="auto:topk:0.01,int8"     the faster of both, or dense

1. The first call of a context with such a text probes the links and the kernels (`hybridcomm.probe`, about a
   second per link class); all ranks get rank 0's figures.
2. A decision is a pure function of those figures and of the call's size, dtype and op, so it is the same on all
   ranks: the predicted time of each compressed plan against that of the dense one (`hybridcomm.cost`).
3. How payloads are exchanged is decided likewise, unless the call says it: in two stages where that is predicted
   to take less than `policy.EXCHANGE_GAIN` of a gather.
4. "Do not compress" is an answer, with its reason; `Policy.table` prints requested -> active.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from hybridcomm import collective_plans, policy
from hybridcomm import compress as compressors
from hybridcomm.compress import Compress, Compressor
from hybridcomm.errors import CompressorError
from hybridcomm.probe import CANDIDATES, Figures, probe

if TYPE_CHECKING:
    from hybridcomm.collectives import Collectives
    from hybridcomm.device_context import DeviceContext

__all__ = ["AUTO", "GAIN", "Decision", "Policy", "is_auto", "policy_of", "resolve"]

AUTO = "auto"

GAIN = 0.9
"""Compressing has to take less than this part of the dense time: it loses information, and predictions err."""

_REMEMBERED = 1024
"""Decisions. A job has a few sizes, and each is simulated: milliseconds on a few nodes, a second on 8 nodes of 8 ranks,
a minute on 32 of them."""

_LARGEST = (
    1 << 24
)  # elements: a larger tensor is decided as this one, at which times are proportional to size


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a call does and why. ``active``: a compressor's text, or "none". ``seconds``: predicted, by text.

    ``exchanges``: "gather" or "two_stage", how each candidate's payloads would be exchanged, by text.
    """

    numel: int
    dtype: str
    active: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    exchanges: Mapping[str, str] = field(default_factory=dict)

    @property
    def exchange(self) -> str:
        """Of the active compressor's payloads; "none": dense."""
        return self.exchanges.get(self.active, "none")

    @property
    def what(self) -> str:
        """``active`` as tables have it, with the exchange where it is the less common one."""
        return _name(self.active) + (" in two stages" if self.exchange == "two_stage" else "")

    def __str__(self) -> str:
        return f"{self.numel} {self.dtype}: {self.what}, {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Decides by ``figures`` between dense and ``candidates``; equal on all ranks.

    ``chunk_nbytes``: the context's, which bounds the chunks of the plans that are compared.
    """

    figures: Figures
    requested: str = AUTO
    candidates: tuple[Compressor, ...] = ()
    chunk_nbytes: int = policy.MAX_CHUNK_NBYTES
    _decided: dict[tuple[int, str, str, str], Decision] = field(
        default_factory=dict, compare=False, repr=False
    )

    def decide(
        self, numel: int, *, dtype: str = "float32", op: str = "sum", exchange: str = "auto"
    ) -> Decision:
        """What an all-reduce of ``numel`` elements does; ``exchange`` as the call has it."""
        key = (numel, dtype, op, exchange)
        if key not in self._decided:
            if len(self._decided) >= _REMEMBERED:
                self._decided.clear()
            self._decided[key] = self._decide(*key)
        return self._decided[key]

    def _decide(self, numel: int, dtype: str, op: str, exchange: str) -> Decision:
        why_not = self._cannot_act(numel, dtype, op)
        if why_not:
            return Decision(numel=numel, dtype=dtype, active="none", reason=why_not)
        seconds = {"none": self._predict(numel, None)}
        exchanges = {}
        for codec in self.candidates:
            exchanges[str(codec)], seconds[str(codec)] = self._exchange(numel, codec, exchange)
        best = min((text for text in seconds if text != "none"), key=lambda text: seconds[text])
        faster = seconds["none"] / seconds[best] if seconds[best] else float("inf")
        if seconds[best] < GAIN * seconds["none"]:
            active, reason = best, f"{faster:.3g} times as fast as dense"
        else:
            active, reason = (
                "none",
                f"compressed it would be {faster:.3g} times as fast, below {1 / GAIN:.3g}",
            )
        return Decision(
            numel=numel,
            dtype=dtype,
            active=active,
            reason=reason,
            seconds=seconds,
            exchanges=exchanges,
        )

    def compressor(self, decision: Decision) -> Compressor | None:
        """The candidate that was decided on; None: dense."""
        return next((codec for codec in self.candidates if str(codec) == decision.active), None)

    def table(self, sizes: Sequence[int]) -> str:
        """Requested -> active for float32 sums of ``sizes`` bytes, per link class, with predicted ms."""
        texts = ["none", *map(str, self.candidates)]
        head = ["link", "size (B)", "requested", "active", *(f"{_name(text)} ms" for text in texts), "reason"]
        rows = [["intra_node", "any", self.requested, "dense", *("-" for _ in texts)]]
        rows[0].append("compression acts between nodes" if self.figures.topology.K > 1 else "no such link")
        for nbytes in sizes:
            found = self.decide(nbytes // 4)
            times = (f"{found.seconds[text] * 1e3:.3f}" if found.seconds else "-" for text in texts)
            row = ["inter_node", str(nbytes), self.requested, found.what, *times, found.reason]
            rows.append(row)
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in [head, *rows]
        )
        return "\n".join(line.rstrip() for line in lines)

    def _cannot_act(self, numel: int, dtype: str, op: str) -> str:
        if len(self.figures.topology.nodes) == 1:
            return "one node: nothing crosses a slow link"
        if dtype != "float32":
            return f"{dtype} cannot be compressed, only float32"
        if op not in ("sum", "mean"):
            return f"op {op} cannot be compressed, only sum and mean"
        return "" if numel else "no elements"

    def _exchange(self, numel: int, codec: Compressor, asked: str) -> tuple[str, float]:
        """How ``codec``'s payloads are exchanged, and the predicted s of that."""
        if asked != "auto":
            return asked, self._predict(numel, codec, asked)
        seconds = self._predict(numel, codec, "gather")
        if len(self.figures.topology.nodes) > policy.GATHERING_NODES:
            stages = self._predict(numel, codec, "two_stage")
            if stages < policy.EXCHANGE_GAIN * seconds:
                return "two_stage", stages
        return "gather", seconds

    def _predict(self, numel: int, codec: Compressor | None, exchange: str = "auto") -> float:
        topology, most = self.figures.topology, min(numel, _LARGEST)
        plan = collective_plans.allreduce(
            topology, most, compressor=codec, exchange=exchange, chunk_nbytes=self.chunk_nbytes
        )
        return plan.cost(topology, kernels=self.figures.kernels) * (numel / most)


def _name(text: str) -> str:
    return "dense" if text == "none" else text


def is_auto(compress: object) -> bool:
    """Whether ``compress=`` leaves the choice to policy."""
    return isinstance(compress, str) and compress.partition(":")[0] == AUTO


def policy_of(context: Collectives | DeviceContext, requested: str = AUTO) -> Policy:
    """The context's policy, of hosts or GPUs, for a text such as "auto:int8"; the first call of each text probes.

    Collective: all ranks call it alike, with nothing else in flight. Raises `CompressorError` for a text that
    names no codec.
    """
    found = context.policies.get(requested)
    if found is None:
        _, colon, names = requested.partition(":")
        texts = tuple(names.split(",")) if colon else CANDIDATES
        candidates = tuple(codec for codec in map(compressors.resolve, texts) if codec is not None)
        if not candidates:
            raise CompressorError(f"compress={requested!r}: name codecs after the colon, such as 'auto:int8'")
        if hasattr(context, "provider"):
            from hybridcomm.device_auto import device_policy

            found = device_policy(cast("DeviceContext", context), requested, candidates)
        else:
            found = Policy(
                figures=probe(context, codecs=candidates),
                requested=requested,
                candidates=candidates,
                chunk_nbytes=context.chunk_nbytes,
            )
        context.policies[requested] = found
    return found


def resolve(
    context: Collectives | DeviceContext,
    compress: Compress,
    *,
    numel: int,
    dtype: str,
    op: str,
    exchange: str = "auto",
) -> tuple[Compressor | None, str]:
    """(compressor, exchange) of a call: what it says, and for "auto" what the context's policy decides on."""
    if not is_auto(compress):
        return compressors.resolve(compress), exchange
    chosen = policy_of(context, str(compress))
    decision = chosen.decide(numel, dtype=dtype, op=op, exchange=exchange)
    compressor = chosen.compressor(decision)
    return compressor, "auto" if compressor is None else decision.exchange
