"""Bugs to plant in the GPU engine's source: (file, scenarios that should notice, what becomes of what stands there)."""

# ruff: noqa: E501  (what is changed stands as the formatter of the source has it)
from __future__ import annotations

from tests.gpu.engine_mutants_newer import NEWER, Mutant

__all__ = ["MUTANTS", "QUICK", "Mutant"]


MUTANTS: dict[str, Mutant] = {
    **NEWER,
    # -- waits -------------------------------------------------------------------------------------------------
    "operations do not wait for those of other streams": Mutant(
        "gpu_issue.cpp",
        ("two-stage", "buckets"),
        {
            "  for (const int before : op.after) {": "  for (const int before : op.after) {\n    if (before != kStart) continue;"
        },
    ),
    "operations do not wait for the caller's stream": Mutant(
        "gpu_issue.cpp",
        ("streams", "buckets"),
        {
            "  for (const int before : op.after) {": "  for (const int before : op.after) {\n    if (before == kStart) continue;"
        },
    ),
    "only the first of a group waits": Mutant(
        "gpu_issue.cpp",
        ("two-stage", "buckets"),
        {
            "for (size_t i = first; i < behind; ++i) wait_for(work, program.ops[i]);": "wait_for(work, program.ops[first]);"
        },
    ),
    "an event is waited for before it is recorded": Mutant(
        "gpu_issue.cpp",
        ("two-stage", "buckets"),
        {
            "    if (is_nccl(program.ops[first].kind)) {": "    for (size_t i = first; i < behind; ++i) {\n"
            "      if (!program.awaited[i]) continue;\n"
            "      CUevent early = work.events_.try_emplace(i, pool_).first->second.get();\n"
            '      cuda_->check(cuda_->cuEventRecord(early, streams_.at(static_cast<size_t>(program.ops[i].stream))), "");\n'
            "    }\n    if (is_nccl(program.ops[first].kind)) {",
            "      if (!program.awaited[i]) continue;\n      CUevent event": "      if (true) continue;\n      CUevent event",
        },
    ),
    "events are recorded on the first stream": Mutant(
        "gpu_issue.cpp",
        ("two-stage", "buckets"),
        {
            "cuda_->cuEventRecord(event, streams_.at(static_cast<size_t>(program.ops[i].stream)))": "cuda_->cuEventRecord(event, streams_.at(0))"
        },
    ),
    "the start is recorded on the engine's stream": Mutant(
        "gpu_issue.cpp",
        ("streams", "buckets"),
        {
            "cuda_->cuEventRecord(work->start_.get(), producer)": "cuda_->cuEventRecord(work->start_.get(), streams_.at(0))"
        },
    ),
    "a caller's stream waits for the first end alone": Mutant(
        "gpu_issue.cpp",
        ("unequal", "two-stage", "buckets"),
        {
            '    cuda_->check(cuda_->cuStreamWaitEvent(consumer, work->events_.at(end).get(), 0), "cuStreamWaitEvent");': '    cuda_->check(cuda_->cuStreamWaitEvent(consumer, work->events_.at(end).get(), 0), "");\n    break;'
        },
    ),
    "a caller's stream does not wait": Mutant(
        "gpu_issue.cpp",
        ("streams", "buckets"),
        {"cuda_->cuStreamWaitEvent(consumer, work->events_.at(end).get(), 0)": "CUDA_SUCCESS"},
    ),
    "a wait is for whichever stream is the engine's": Mutant(
        "gpu_issue.cpp",
        ("streams",),
        {"cuda_->cuStreamWaitEvent(consumer, work": "cuda_->cuStreamWaitEvent(streams_.at(0), work"},
    ),
    # -- what is under way -------------------------------------------------------------------------------------
    "nobody waits for earlier programs of the same memory": Mutant(
        "gpu_issue.cpp",
        ("overlap", "again"),
        {"    wait_for_earlier(*work);\n": ""},
    ),
    "earlier programs count as other memory": Mutant(
        "gpu_program.cpp",
        ("overlap", "again"),
        {
            "      if (one.overlaps(its)) return true;": "      if (one.begin == its.begin && one.end == its.end && false) return true;"
        },
    ),
    "only the same range counts as the same memory": Mutant(
        "gpu_program.cpp",
        ("overlap",),
        {
            "      if (one.overlaps(its)) return true;": "      if (one.begin == its.begin && one.end == its.end) return true;"
        },
    ),
    "the pending tail is put behind a head that needs its result": Mutant(
        "gpu_issue.cpp",
        ("overlap", "again"),
        {" || pending_->program_->meets(*work->program_))": ")"},
    ),
    "a pending tail is forgotten": Mutant(
        "gpu_issue.cpp",
        ("buckets",),
        {"  if (pending_ != nullptr) finish_issue(pending_);\n": "  pending_.reset();\n"},
    ),
    "a tail that somebody waits for is not put on": Mutant(
        "gpu_issue.cpp",
        ("buckets", "streams"),
        {"  finish_issue(work);\n  for (const size_t end": "  for (const size_t end"},
    ),
    "tails are put on twice": Mutant(
        "gpu_issue.cpp",
        ("buckets",),
        {"  held->issued_ = true;": ""},
    ),
    "a capture waits for what happened before it": Mutant(
        "gpu_issue.cpp",
        ("captured",),
        {"other->captured_ == work.captured_ && ": ""},
    ),
    "a capture waits for the one before": Mutant(
        "gpu_issue.cpp",
        ("captured",),
        {"  const bool same = capture && in_capture();": "  const bool same = capture;"},
    ),
    "a work is looked at during a capture": Mutant(
        "gpu_engine.cpp",
        ("captured",),
        {"  if (in_capture()) return work.over_;": "  if (false) return work.over_;"},
    ),
    # -- NCCL --------------------------------------------------------------------------------------------------
    "groups are not grouped": Mutant(
        "gpu_issue.cpp",
        ("two-stage", "messages", "pipeline"),
        {"program.ops[first].group != kNoGroup);": "false);"},
    ),
    "a group is left open": Mutant(
        "gpu_comms.cpp",
        ("messages",),
        {
            "return std::exchange(open_, false) ? nccl_.ncclGroupEnd() : ncclSuccess;": "open_ = false;\n  return ncclSuccess;"
        },
    ),
    "a group that an error leaves stays open": Mutant(
        "gpu_comms.cpp",
        ("refused",),
        {"  if (open_) nccl_.ncclGroupEnd();": ""},
    ),
    "a wrong root": Mutant(
        "gpu_issue.cpp",
        ("messages",),
        {"reduction, op.peer, comm, stream);": "reduction, (op.peer + 1) % 2, comm, stream);"},
    ),
    "a wrong count": Mutant(
        "gpu_issue.cpp",
        ("messages", "buckets"),
        {"nccl.ncclAllGather(from, to, op.count,": "nccl.ncclAllGather(from, to, op.count - 1,"},
    ),
    "a send takes one element too few": Mutant(
        "gpu_issue.cpp",
        ("messages",),
        {"nccl.ncclSend(from, op.count,": "nccl.ncclSend(from, op.count - 1,"},
    ),
    "a sum is no mean": Mutant(
        "gpu_issue.cpp",
        ("unequal", "buckets"),
        {"op.divisor == 1 ? op.op : comms_.mean_of(op.comm, op.dtype, op.divisor)": "op.op"},
    ),
    "one mean for all dtypes": Mutant(
        "gpu_comms.cpp",
        ("means",),
        {"std::make_tuple(comm, dtype, bits)": "std::make_tuple(comm, 0, bits)"},
    ),
    "a communicator counts as made before it is": Mutant(
        "gpu_comms.cpp",
        ("again", "messages"),
        {"  settle(comm, result, call);\n": ""},
    ),
    "one mean for all communicators": Mutant(
        "gpu_comms.cpp",
        ("means",),
        {"std::make_tuple(comm, dtype, bits)": "std::make_tuple(0, dtype, bits)"},
    ),
    "communicators are ordered by color": Mutant(
        "gpu_comms.cpp",
        ("unequal", "again", "buckets"),
        {"ncclCommSplit(at(parent), color, key,": "ncclCommSplit(at(parent), color, -key,"},
    ),
    "communicators are left": Mutant(
        "gpu_comms.cpp",
        ("messages",),
        {"nccl_.ncclCommDestroy(*comm);": "(void)*comm;"},
    ),
    "registered buffers are left": Mutant(
        "gpu_comms.cpp",
        ("memory",),
        {"  nccl_.ncclCommDeregister(at(comm), handle);\n  registered_.erase(found);": ""},
    ),
    # -- kernels and memory ------------------------------------------------------------------------------------
    "a fill writes ones": Mutant(
        "gpu_issue.cpp",
        ("buckets", "two-stage"),
        {"op.to, op.value, op.count, stream": "op.to, 1, op.count, stream"},
    ),
    "kernels run on the second stream": Mutant(
        "gpu_issue.cpp",
        ("buckets", "streams"),
        {
            "op.shared_nbytes, streams_.at(static_cast<size_t>(op.stream)), nullptr, extra)": "op.shared_nbytes, streams_.at(1), nullptr, extra)"
        },
    ),
    "a kernel has a block too few": Mutant(
        "gpu_issue.cpp",
        ("buckets",),
        {"op.blocks, 1, 1, op.threads": "op.blocks > 1 ? op.blocks - 1 : 1, 1, 1, op.threads"},
    ),
    "memory is given back before it is used": Mutant(
        "gpu_memory.cpp",
        ("memory",),
        {
            "    address_ = reinterpret_cast<CUdeviceptr>(data);": "    address_ = reinterpret_cast<CUdeviceptr>(data);\n    nccl.ncclMemFree(data);"
        },
    ),
    "memory is not given back": Mutant(
        "gpu_memory.cpp",
        ("memory",),
        {"    engine_->nccl().ncclMemFree(reinterpret_cast<void*>(address_));": ""},
    ),
    "streams are not given back": Mutant(
        "gpu_engine.cpp",
        ("messages",),
        {"cuda_->cuStreamDestroy_v2(stream);\n  modules_": ";\n  modules_"},
    ),
    "a program's last operation is not awaited": Mutant(
        "gpu_program.cpp",
        ("buckets", "messages"),
        {"  for (const size_t end : ends) awaited[end] = true;": ""},
    ),
    "the end of a group is where it begins": Mutant(
        "gpu_program.cpp",
        ("two-stage", "messages"),
        {"  while (end < ops.size() && ops[end].group == ops[first].group) ++end;": ""},
    ),
    # -- the host ----------------------------------------------------------------------------------------------
    "the host does not wait": Mutant(
        "gpu_engine.cpp",
        ("host reads",),
        {"      if (ended(*work)) return true;": "      return true;"},
    ),
    "a work is done with the first of its streams": Mutant(
        "gpu_engine.cpp",
        ("host reads",),
        {
            '    cuda_->check(result, "cuEventQuery");': '    cuda_->check(result, "cuEventQuery");\n    break;'
        },
    ),
    "a work that is not put on to its end counts as done": Mutant(
        "gpu_engine.cpp",
        ("dropped", "host reads"),
        {"return work.issued_ && ended(work);": "return !work.issued_ || ended(work);"},
    ),
    "who closes does not wait": Mutant(
        "gpu_engine.cpp",
        ("closed", "dropped"),
        {"    if (!failed) drain();": ""},
    ),
    "a failure of NCCL in the background is not heard": Mutant(
        "gpu_watch.cpp",
        ("lost",),
        {"if (std::exception_ptr error = comms_.async_error()) return cause_of(error);": ""},
    ),
    "nobody looks at the clock": Mutant(
        "gpu_watch.cpp",
        ("hangs",),
        {
            "if (hybridcomm::Clock::now() < work.since_ + seconds(config_.timeout_s)) return nullptr;": "return nullptr;"
        },
    ),
    "a failure leaves the communicators as they are": Mutant(
        "gpu_watch.cpp",
        ("hangs", "lost"),
        {"  comms_.abort();  // what is stuck comes back, and the peers hear of it": ""},
    ),
    "a failure is kept to oneself": Mutant(
        "gpu_watch.cpp",
        ("hangs",),
        {"    failure_ = std::move(error);": ""},
    ),
    "nobody listens to the host": Mutant(
        "gpu_watch.cpp",
        ("told",),
        {
            "  if (const std::optional<Error> heard = host_.heard()) return std::make_exception_ptr(*heard);\n": ""
        },
    ),
    "a failure is not told to the host": Mutant(
        "gpu_watch.cpp",
        ("broken",),
        {"  host_.failed();  ": "  "},
    ),
    "a lost device is kept to oneself": Mutant(
        "gpu_issue.cpp",
        ("broken",),
        {"  if (error.lost) fail(std::current_exception());": ""},
    ),
    "no error of CUDA's leaves a device lost": Mutant(
        "gpu_tables.cpp",
        ("broken",),
        {"word, result, device, is_lost(result));": "word, result, device, false);"},
    ),
}

QUICK = (
    "operations do not wait for those of other streams",
    "the pending tail is put behind a head that needs its result",
    "groups are not grouped",
    "a failure of NCCL in the background is not heard",
    "nobody listens to the host",
)
"""Of them, those that every run of the tests plants."""
