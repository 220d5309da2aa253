"""Schedules as values: the text form reads back, the digest sees every change, what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.pipeline.builders import schedules, with_list
from train.errors import ScheduleError
from train.pipeline import Instruction, PipelineSchedule, lower, make_schedule
from train.pipeline.instructions import OPS

FULL = lower(make_schedule("zbv", 2, 3), head=True, buckets=[1, 0, 2, 1, 1])


@given(schedules())
def test_the_text_form_reads_back(schedule: PipelineSchedule) -> None:
    again = PipelineSchedule.parse(schedule.text)
    assert again == schedule
    assert again.digest == schedule.digest
    assert 0 <= again.digest < 2**64


@given(schedules(), st.data())
def test_the_digest_sees_every_change(schedule: PipelineSchedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    entries = list(schedule.lists[rank])
    place = data.draw(st.integers(0, len(entries) - 1))
    field = data.draw(st.sampled_from(("op", "microbatch", "stage")))
    entry = entries[place]
    if field == "op":
        entries[place] = entry._replace(op=next(op for op in OPS if op != entry.op))
    else:
        entries[place] = entry._replace(**{field: getattr(entry, field) + 1})
    for other in (entries, entries[:place] + entries[place + 1 :], [*entries, entry]):
        if other[place : place + 1] != [entry] or len(other) != len(schedule.lists[rank]):
            assert with_list(schedule, rank, other).digest != schedule.digest or str(entries[place]) == str(
                entry
            )


@pytest.mark.parametrize(
    "facts", [{"name": "x"}, {"communicates": False}, {"buckets": (1, 0, 2, 1, 3)}, {"microbatches": 4}]
)
def test_the_digest_sees_the_facts(facts: dict[str, object]) -> None:
    assert replace(FULL, **facts).digest != FULL.digest


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("F0.3", Instruction("F", 0, 3)),
        ("SEND_F2.0>1", Instruction("SEND_F", 2, 0, peer=1)),
        ("RECV_I2.11<3", Instruction("RECV_I", 2, 11, peer=3)),
        ("REDUCE4/2", Instruction("REDUCE", 4, bucket=2)),
        ("HEAD_S8.1", Instruction("HEAD_S", 8, 1)),
    ],
)
def test_instructions_are_written_as_they_are_read(text: str, instruction: Instruction) -> None:
    assert str(instruction) == text
    assert Instruction.parse(text) == instruction


@pytest.mark.parametrize(
    "text", ["", "F", "F1", "F1.2>3", "SEND_F1.2", "SEND_F1.2<3", "REDUCE1.2", "G1.2", "F01.2"]
)
def test_other_texts_are_no_instructions(text: str) -> None:
    with pytest.raises(ScheduleError, match="not an instruction"):
        Instruction.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hybridcomm-pipeline/1", "hybridcomm-pipeline/2"), "line 1"),
        (("ranks=2", "ranks=3"), "each of 3 ranks"),
        (("\n1:", "\n2:"), "line 3: expected the list of rank 1"),
        (("F0.2", "F0,2"), "line 2: not an instruction: 'F0,2'"),
        (("buckets=1,0,2,1,1", "buckets=1,0"), "give a count for each stage"),
        (("microbatches=3", "microbatches=0"), "a microbatch"),
    ],
)
def test_texts_with_an_error_name_the_line(change: tuple[str, str], message: str) -> None:
    assert change[0] in FULL.text
    with pytest.raises(ScheduleError, match=message):
        PipelineSchedule.parse(FULL.text.replace(*change, 1))


def test_names_are_one_word() -> None:
    with pytest.raises(ScheduleError, match="name"):
        replace(FULL, name="a b")
