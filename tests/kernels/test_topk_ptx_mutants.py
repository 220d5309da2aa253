"""Planted bugs in the top-k kernels' PTX: every deleted barrier, and a sample of changed instructions."""

from __future__ import annotations

import re

import pytest

from hybridcomm.kernels import TopKSpec
from tests.kernels.ptx_topk_mutants import check_of, entry_of
from tests.ptx.compiled import CompilerMissingError
from tests.ptx.mutate import (
    Verdict,
    barrier_mutants,
    judge,
    never_read,
    opcode_mutants,
    orders_nothing,
    tally,
)
from tests.ptx.parse import Entry

SPEC = TopKSpec(block=1024, k=10)
SAMPLES = {"encode": 150, "withdraw": 30, "decode": 30}
SEED = 1

# Survivors that are the same program in other words: what the mutant says, why it is. Others than these fail the test.
EQUIVALENT = (
    (r"and\.b64 .*, 4294967294 -> operand 2 plus one step", "the bit that is let through is set next"),
    (r"and\.b64 .*, -2 -> operand 2 plus one step", "offsets of records are even: the bit is zero"),
    (r"and\.b32 .*, 24 -> operand 2 plus one step", "eight times a number: the bit is zero"),
    (r"mov\.b32 .*, 0 -> operand 1 plus one step", "what a masked load leaves is never stored"),
)


def entries(role: str, arch: int) -> Entry:
    try:
        return entry_of(SPEC, role, arch)
    except CompilerMissingError as missing:
        pytest.skip(str(missing))


def excluded(verdict: Verdict) -> str | None:
    """Why a survivor cannot be noticed, None where it should have been."""
    if never_read(verdict.mutant):
        return "nobody reads the result"
    reasons = (reason for pattern, reason in EQUIVALENT if re.search(pattern, str(verdict.mutant)))
    return next(reasons, None)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("role", sorted(SAMPLES))
def test_every_deleted_barrier_is_noticed(role: str, arch: int) -> None:
    entry = entries(role, arch)
    verdicts = [judge(mutant, check_of(SPEC, role, arch)) for mutant in barrier_mutants(entry)]
    print(role, arch, tally(verdicts))
    for verdict in verdicts:
        # What orders nothing is proven from the text; the proof must never excuse a barrier that was missed.
        assert verdict.caught != orders_nothing(entry, verdict.mutant.index), str(verdict.mutant)


@pytest.mark.timeout(600)
def test_changed_instructions_are_noticed() -> None:
    verdicts = []
    for role, count in SAMPLES.items():
        check = check_of(SPEC, role, 90)
        verdicts += [judge(m, check) for m in opcode_mutants(entries(role, 90), count=count, seed=SEED)]
    survivors = [verdict for verdict in verdicts if not verdict.caught]
    same = {str(verdict.mutant): reason for verdict in survivors if (reason := excluded(verdict))}
    missed = [str(verdict.mutant) for verdict in survivors if not excluded(verdict)]
    print(len(verdicts), tally(verdicts), "equivalent:", same, "missed:", missed, sep="\n")
    assert len(verdicts) >= 200
    assert len(same) <= 0.05 * len(verdicts)
    assert len(missed) <= 0.05 * (len(verdicts) - len(same)), missed
