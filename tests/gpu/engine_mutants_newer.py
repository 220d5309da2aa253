"""Bugs to plant in the GPU engine's source where it uses what NCCL got after 2.18, or a factor of each rank's own.

As in `tests.gpu.engine_mutants`, which has them among all.
"""

# ruff: noqa: E501  (what is changed stands as the formatter of the source has it)
from __future__ import annotations

from typing import NamedTuple

__all__ = ["NEWER", "Mutant"]


class Mutant(NamedTuple):
    file: str
    scenarios: tuple[str, ...]
    changes: dict[str, str]


NEWER: dict[str, Mutant] = {
    "an all-to-all takes one element too few": Mutant(
        "gpu_issue.cpp",
        ("all-to-alls of the newest NCCL",),
        {"nccl.ncclAlltoAll(from, to, op.count,": "nccl.ncclAlltoAll(from, to, op.count - 1,"},
    ),
    "an all-to-all takes the whole for a part": Mutant(
        "gpu_issue.cpp",
        ("all-to-alls of the newest NCCL",),
        {"nccl.ncclAlltoAll(from, to, op.count,": "nccl.ncclAlltoAll(from, to, op.count * 3,"},
    ),
    "windows are left": Mutant(
        "gpu_memory.cpp",
        ("windows",),
        {
            "  for (const auto& [comm, window] : windows_) engine_->comms().deregister_window(comm, window);\n": ""
        },
    ),
    "windows are left to the end": Mutant(
        "gpu_comms.cpp",
        ("reducer of the newest NCCL", "windows"),
        {
            "    if (window != nullptr) nccl_.ncclCommWindowDeregister(at(comm), window);": "    (void)window, (void)comm;"
        },
    ),
    "a window is of CUDA's memory": Mutant(
        "gpu_memory.cpp",
        ("windows",),
        {
            "    const ncclResult_t result = nccl.ncclMemAlloc(&data, nbytes);": "    CUdeviceptr plain = 0;\n"
            "    const ncclResult_t result = engine_->cuda().cuMemAlloc_v2(&plain, nbytes);\n"
            "    data = reinterpret_cast<void*>(plain);"
        },
    ),
    "divided communicators have kernels copy": Mutant(
        "gpu_comms.cpp",
        ("copy engines",),
        {
            "  ncclConfig_t wanted = config();\n  ncclComm_t comm = nullptr;\n  const ncclResult_t result = nccl_.ncclCommSplit": ""
            "  ncclConfig_t wanted = config();\n  wanted.CTAPolicy = kNcclUndefined;\n  ncclComm_t comm = nullptr;\n"
            "  const ncclResult_t result = nccl_.ncclCommSplit"
        },
    ),
    "copy engines are not asked for": Mutant(
        "gpu_comms.cpp",
        ("copy engines",),
        {"  if (copy_engines_) config.CTAPolicy = kNcclCtaPolicyZero;\n": ""},
    ),
    "the first of several roots takes all": Mutant(
        "gpu_comms.cpp",
        ("several roots",),
        {"  const size_t count = unique_ids.size() / sizeof(ncclUniqueId);": "  const size_t count = 1;"},
    ),
    "every root's id is the first's": Mutant(
        "gpu_comms.cpp",
        ("several roots",),
        {"sizeof(ncclUniqueId), i * sizeof(ncclUniqueId));": "sizeof(ncclUniqueId), 0);"},
    ),
    "a window counts as made before it is": Mutant(
        "gpu_comms.cpp",
        ("windows",),
        {'  settle(comm, result, "ncclCommWindowRegister");\n': "  (void)result;\n"},
    ),
    "a factor is left out": Mutant(
        "gpu_issue.cpp",
        ("scaled",),
        {"  if (op.factor) return comms_.scaled_sum(op.comm, op.dtype, *op.factor);\n": ""},
    ),
    "one factor for all": Mutant(
        "gpu_comms.cpp",
        ("scaled",),
        {"  std::memcpy(&bits, &factor, sizeof bits);\n": ""},
    ),
    "integers are scaled by a part of their factor": Mutant(
        "gpu_comms.cpp",
        ("scaled",),
        {
            "return as_bits(static_cast<int64_t>(value));": "return as_bits(static_cast<uint8_t>(static_cast<int64_t>(value)));"
        },
    ),
    "a factor of one is a plain sum": Mutant(
        "gpu_issue.cpp",
        ("scaled",),
        {"  if (op.factor) return": "  if (op.factor && *op.factor != 1) return"},
    ),
    "factors are given back while they are used": Mutant(
        "gpu_issue.cpp",
        ("scaled",),
        {
            "    reductions.push_back(reduction_of(op));": "    reductions.push_back(reduction_of(op));\n"
            "    if (op.factor) nccl_->ncclRedOpDestroy(reductions.back(), comms_.at(op.comm));"
        },
    ),
}
