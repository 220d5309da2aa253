"""When a compressor acts: phases counted in optimizer steps, as data.

    Schedule((0, None), (100, "topk:0.1"), (500, "topk:0.01"))      a warm-up (Lin et al. 2018, arXiv 1712.01887)
    "none,topk:0.1@100,topk:0.01@500"                               the same as text

Steps are those that were applied, which all ranks count alike. The residual belongs to elements and not to a codec:
all codecs of a schedule cut a tensor at the same places (`Compressor.align`), so it stays where it is when the codec
changes, and a dense phase delivers what it holds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise

from hybridcomm import policy
from hybridcomm.compress import Compress, Compressor, resolve
from hybridcomm.errors import CompressorError

__all__ = ["Schedule"]


@dataclass(frozen=True, init=False)
class Schedule:
    """``(step, compress)`` pairs: from optimizer step ``step`` on (the first is step 0), ``compress`` acts.

    ``compress`` is what `allreduce` takes, but not "auto". Raises `CompressorError` unless the steps ascend from 0.
    """

    phases: tuple[tuple[int, Compressor | None], ...]

    def __init__(self, *phases: tuple[int, Compress]) -> None:
        steps = [step for step, _ in phases]
        if not steps or steps[0] != 0 or any(before >= after for before, after in pairwise(steps)):
            raise CompressorError(f"a schedule's steps must ascend from 0, got {steps}")
        codecs = [resolve(compress) for _, compress in phases]
        align = math.lcm(*(codec.block for codec in codecs if codec is not None))
        aligned = (
            codec and replace(codec, align=align if len(phases) > 1 else codec.align) for codec in codecs
        )
        object.__setattr__(self, "phases", tuple(zip(steps, aligned, strict=True)))

    @classmethod
    def of(cls, compress: Compress | Schedule) -> Schedule:
        """``compress`` as a schedule: a text with several phases is parsed, all else acts from step 0 on."""
        if isinstance(compress, Schedule):
            return compress
        if isinstance(compress, str) and re.search("[,@]", compress):
            return cls.parse(compress)
        return cls((0, compress))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule whose ``str`` is ``text``: phases between commas, each ``codec@step`` (the first: ``codec``)."""
        phases = []
        for part in text.split(","):
            codec, _, step = part.strip().partition("@")
            if step and not step.isdecimal():
                raise CompressorError(
                    f"compress={text!r}: {part!r} needs a step behind the @, as topk:0.1@100"
                )
            phases.append((int(step or 0), codec))
        return cls(*phases)

    def at(self, step: int) -> Compressor | None:
        """What acts in optimizer step ``step``; None: dense."""
        return next(codec for first, codec in reversed(self.phases) if first <= step)

    @property
    def codecs(self) -> tuple[Compressor, ...]:
        """All that ever act."""
        return tuple(codec for _, codec in self.phases if codec is not None)

    @property
    def dense_later(self) -> bool:
        """Whether a phase is dense although others are not: one that may have to deliver a residual."""
        return bool(self.codecs) and len(self.codecs) < len(self.phases)

    @property
    def align(self) -> int:
        """Elements on whose multiples shards begin in every phase."""
        return self.codecs[0].block if self.codecs else policy.DENSE_ALIGN

    def __str__(self) -> str:
        return ",".join(f"{codec or 'none'}{f'@{step}' if step else ''}" for step, codec in self.phases)
