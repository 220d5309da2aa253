"""Bugs planted in the shipped PTX: what the checks of conformance notice, and what is the same program in other words.

Each barrier deleted, and a seeded sample of changed instructions. By default of few kernels, as it takes long; with
``HYBRIDCOMM_MUTANTS`` (`make verify`: 25) the barriers of every kernel, and so many instructions in each of sixteen.
A mutant that nobody notices has to be proven equivalent, or listed with its reason in `equivalent_mutants.txt`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernels.device_checks import ARCH, TARGETS, Target
from tests.ptx.conformance import executable
from tests.ptx.mutate import Mutant, barrier_mutants, never_read, opcode_mutants, orders_nothing

COUNT = int(os.environ.get("HYBRIDCOMM_MUTANTS", "0"))
FEW = {"int8_encode_fp32_fp32", "topk_encode_fp32_fp32", "gtopk_scan"}
FULL = 25
LISTED = Path(__file__).with_name("equivalent_mutants.txt")
SAMPLED = (
    *(f"{codec}_encode_fp32_fp32" for codec in ("int8", "int4", "fp8", "sign1", "bf16", "gtop1", "topk")),
    *("int8_decode", "sign1_reencode_fp32", "topk_decode_add", "gtopk_collect"),
    *(
        "powersgd2_left",
        "powersgd2_orthonormal",
        "powersgd2_right",
        "powersgd4_right",
        "powersgd2_reencode_fp32",
    ),
)
"""Kernels in which instructions are changed."""


def listed() -> dict[tuple[str, str], str]:
    """Survivors with their reasons: kernel, mutant (without its line's number), reason, by tabs."""
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    fields = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {(kernel, mutant): reason for kernel, mutant, reason in fields}


def named(mutant: Mutant) -> str:
    return str(mutant).split(": ", 1)[1]


CHOSEN = [target for target in TARGETS if COUNT or target.kernel.name in FEW]


@pytest.mark.parametrize("target", CHOSEN, ids=str)
def test_a_deleted_barrier_is_noticed(target: Target) -> None:
    entry = executable(target.kernel, ARCH).program.entry
    mutants = barrier_mutants(entry)
    survivors = [
        str(mutant)
        for number, mutant in enumerate(mutants)
        if not orders_nothing(entry, mutant.index)
        and (target.kernel.name, f"barrier {number}") not in listed()
        and target.judge(mutant) == "survived"
    ]
    assert not survivors
    print(f"{target}: {len(mutants)} barriers")


@pytest.mark.timeout(600)  # each of the sample may take a whole check
@pytest.mark.parametrize("target", [target for target in CHOSEN if target.kernel.name in SAMPLED], ids=str)
def test_a_changed_instruction_is_noticed(target: Target) -> None:
    """Those that are not proven to change nothing."""
    entry, known = executable(target.kernel, ARCH).program.entry, listed()
    survivors = []
    for mutant in opcode_mutants(entry, count=COUNT or 2, seed=1):
        if never_read(mutant) or (target.kernel.name, named(mutant)) in known:
            continue
        outcome = target.judge(mutant)
        print(f"{target}: {mutant}: {outcome}", flush=True)
        if outcome == "survived":
            survivors.append(str(mutant))
    assert not survivors


def test_few_mutants_are_excluded() -> None:
    """5 % of the full sample at most, and each is in it: the list names nothing that is gone."""
    sample = {
        (target.kernel.name, named(mutant))
        for target in TARGETS
        if target.kernel.name in SAMPLED
        for mutant in opcode_mutants(executable(target.kernel, ARCH).program.entry, count=FULL, seed=1)
    }
    excluded = {(kernel, what) for kernel, what in listed() if not what.startswith("barrier ")}
    assert len(SAMPLED) * FULL >= 200
    assert excluded <= sample
    assert len(excluded) <= 0.05 * len(SAMPLED) * FULL
