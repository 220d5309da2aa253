"""Bugs planted in the engine's source: its own test program must notice each (built once, then file by file)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import native
from tests.hybridcomm.test_sanitizers import needs_time

MUTANTS: dict[str, tuple[str, dict[str, str]]] = {
    "a reference is complete before it was read": (
        "node.cpp",
        {"if (references.empty()) return Posted::complete;": "return Posted::complete;"},
    ),
    "a message is handed back before it was read": (
        "executor_node.cpp",
        {
            "  sum_pieces(op);\n  if (op.deliver) {": "  take_sources(Lane::reduce, op);\n  ::usleep(500);\n"
            "  sum_pieces(op);\n  if (op.deliver) {",
            "    delivered_.push_back(delivered);\n  }\n  take_sources(Lane::reduce, op);\n": ""
            "    delivered_.push_back(delivered);\n  }\n",
        },
    ),
    "withdrawn memory is used": (
        "node.cpp",
        {"return mesh_.segment(local).revoked().load(std::memory_order_seq_cst) == 0;": "return true;"},
    ),
    "a sum is said to be delivered, and is not": (
        "executor_node.cpp",
        {
            "if (region.writable && !store(region, begin * item, own, count * item)) "
            "lost(region.local);": "(void)region;"
        },
    ),
    "a slot is used again while it is read": (
        "node.cpp",
        {
            "if (!std::all_of(uses.begin(), uses.end(), [this](const Use& use) { return used(use); })) "
            "return nullptr;": ""
        },
    ),
    "messages wait for slots that collectives hold": (
        "segment.h",
        {
            "int message_area(int local) const { return local_size + local; }": "int message_area(int local) const "
            "{ return local; }"
        },
    ),
    "messages of other tags are taken": (
        "messages.cpp",
        {"return a.digest == b.digest && a.tensor == b.tensor;": "return a.digest == b.digest;"},
    ),
    "the newest message of a tag is taken, not the oldest": (
        "messages.cpp",
        {"peer.unexpected.push_back(std::move(arrived));": "peer.unexpected.push_front(std::move(arrived));"},
    ),
    "a message is said to be taken before it was read": (
        "messages.cpp",
        {
            "    peer.fetching.push_back({std::move(receive), frame.id, pointer});": ""
            "    reply(peer, FrameKind::taken, frame.id, true);\n"
            "    peer.fetching.push_back({std::move(receive), frame.id, pointer});",
            "  reply(peer, FrameKind::taken, front.id, true);\n": "",
            # Every other rank is slow to read, so that its peer is done with everything else by then.
            "    moved |= fetch_some(peer);\n    moved |= flush(peer);\n": "    moved |= flush(peer);\n"
            "    if (!peer.fetching.empty() && peer.rank % 2 == 1) ::usleep(50000);\n    moved |= fetch_some(peer);\n",
        },
    ),
    "a message is sent as often as it is asked for": (
        "messages.cpp",
        {"      at->second.wanted = true;\n": ""},
    ),
    "open messages are forgotten when a rank gives up": (
        "engine_messages.cpp",
        {
            "finish(*std::static_pointer_cast<Work>(owner), std::make_exception_ptr(*broken_));": "(void)owner;"
        },
    ),
    "who has waited leaves the other messages to nobody": (
        "engine_messages.cpp",
        {"  helping_ = false;\n  hand_over();": "  helping_ = false;"},
    ),
    "who listens hears nothing": ("engine.cpp", {"    executor_->listen();\n": ""}),
    "who hears of another's failure and gives up takes the blame": (
        "engine.cpp",
        {"  if (!told && !closing_) executor_": "  if (!closing_) executor_"},
    ),
    "nobody chases": ("executor_faults.cpp", {"if (++returned_ < kRounds) return;": "return;"}),
    "the lower rank waits for a link that nobody dials": (
        "mesh_meet.cpp",
        {"for (int channel = 0; channel <= config_.data_sockets; ++channel) dial_later(rank, channel);": ";"},
    ),
}


RUNS = 5
"""Of the program: a bug that is a race is not lost every time, so it survives if none of them notices it."""


def passes(folder: Path) -> bool:
    try:
        code, _ = native.run_program(folder / "hybridcomm_engine_test", limit=150)
    except subprocess.TimeoutExpired:
        return False
    return code == 0


@needs_time
@pytest.mark.timeout(1800)
def test_planted_bugs_are_noticed(tmp_path: Path) -> None:
    source, folder = native.copy_sources(tmp_path / "source"), tmp_path / "build"
    native.configure(folder, source=source)
    native.build(folder, "hybridcomm_engine_test")
    assert passes(folder)
    survivors = []
    for what, (name, changes) in MUTANTS.items():
        path = source / "hybridcomm/csrc" / name
        text = changed = path.read_text()
        for before, after in changes.items():
            assert changed.count(before) == 1, f"{what}: {name} has changed"
            changed = changed.replace(before, after)
        path.write_text(changed)
        native.build(folder, "hybridcomm_engine_test")
        if all(passes(folder) for _ in range(RUNS)):
            survivors.append(what)
        path.write_text(text)
    assert survivors == []
