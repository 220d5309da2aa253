// Issuing: a program's operations, put on the device's streams in their order.
#include <algorithm>
#include <set>

#include "gpu_engine.h"

namespace hybridcomm::gpu {
namespace {

// CU_LAUNCH_PARAM_*: how arguments are given as one buffer.
constexpr uintptr_t kBufferPointer = 1, kBufferSize = 2, kEnd = 0;

const void* pointer(CUdeviceptr address) { return reinterpret_cast<const void*>(address); }
void* mutable_pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

}  // namespace

bool GpuEngine::capturing(CUstream stream) const {
  int32_t status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuda_->check(cuda_->cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  return status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

// Streams that have joined a capture are captured until it ends.
bool GpuEngine::in_capture() const {
  return std::any_of(streams_.begin(), streams_.end(), [this](CUstream stream) { return capturing(stream); });
}

std::shared_ptr<GpuWork> GpuEngine::start(std::shared_ptr<const DeviceProgram> program,
                                          CUstream producer) try {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  const bool capture = capturing(producer);
  forget(capture);
  const std::shared_ptr<GpuWork> work(new GpuWork(std::move(program), pool_));
  work->captured_ = capture;
  // What is pending belongs before a capture that it is no part of, and before whoever needs its result.
  if (pending_ != nullptr && (pending_->captured_ != capture || pending_->program_->meets(*work->program_))) {
    finish_issue(pending_);
  }
  cuda_->check(cuda_->cuEventRecord(work->start_.get(), producer), "cuEventRecord");
  try {
    wait_for_earlier(*work);
    issue(*work, 0, work->program_->tail);
  } catch (...) {
    fail_by_current();
    throw;
  }
  if (pending_ != nullptr) finish_issue(pending_);
  if (work->program_->tail == work->program_->ops.size()) {
    work->issued_ = true;
  } else {
    pending_ = work;
  }
  const std::lock_guard state(mutex_);
  running_.push_back(work);
  changed_.notify_all();
  return work;
} catch (const DeviceError& error) {
  fail_if_lost(error);
  throw;
}

// Before a start: works that are over, and those of a capture that has ended, which nothing may wait for.
void GpuEngine::forget(bool capture) {
  const bool same = capture && in_capture();
  if (pending_ != nullptr && pending_->captured_ && !same) pending_.reset();
  const std::lock_guard state(mutex_);
  capturing_ = capture;  // what the watchdog asks could break it
  if (!same) {
    const auto captured = [](const std::shared_ptr<GpuWork>& other) { return other->captured_; };
    running_.erase(std::remove_if(running_.begin(), running_.end(), captured), running_.end());
  }
  if (capture) return;
  try {
    while (!running_.empty() && running_.front()->issued_ && poll(*running_.front())) running_.pop_front();
  } catch (const Error&) {
    // The device is lost: what is put on it next says so, and ends everything.
  }
}

// Raised in the middle of a program, anything ends everything: half of it is on the streams, and peers are in its other
// half.
void GpuEngine::fail_by_current() {
  try {
    throw;
  } catch (const Error&) {
    fail(std::current_exception());
  } catch (...) {
    fail(std::make_exception_ptr(
        Error(Code::aborted, "a collective was interrupted while it was put on the streams")));
  }
}

// Of a device on which nothing works any more the peers must hear, wherever that came up.
void GpuEngine::fail_if_lost(const DeviceError& error) {
  if (error.lost) fail(std::current_exception());
}

// Of those under way that touch the same memory, whoever has waited for them; streams keep the order of others.
void GpuEngine::wait_for_earlier(const GpuWork& work) {
  std::vector<std::shared_ptr<GpuWork>> earlier;
  {
    const std::lock_guard state(mutex_);
    for (const std::shared_ptr<GpuWork>& other : running_) {
      if (!other->over_ && other->captured_ == work.captured_ && other->program_->meets(*work.program_)) {
        earlier.push_back(other);
      }
    }
  }
  std::set<int> streams;
  for (const DeviceOp& op : work.program_->ops) streams.insert(op.stream);
  for (const std::shared_ptr<GpuWork>& other : earlier) {
    for (const size_t end : other->program_->ends) {
      for (const int stream : streams) {
        if (stream == other->program_->ops[end].stream) continue;
        cuda_->check(cuda_->cuStreamWaitEvent(streams_.at(static_cast<size_t>(stream)),
                                              other->events_.at(end).get(), 0),
                     "cuStreamWaitEvent");
      }
    }
  }
}

void GpuEngine::finish_issue(const std::shared_ptr<GpuWork>& work) {
  if (work->issued_) return;
  const std::shared_ptr<GpuWork> held = work;  // it may be the pending one
  if (pending_ == held) pending_.reset();
  try {
    issue(*held, held->program_->tail, held->program_->ops.size());
  } catch (...) {
    fail_by_current();
    throw;
  }
  held->issued_ = true;
}

void GpuEngine::wait(const std::shared_ptr<GpuWork>& work, CUstream consumer) try {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  if (capturing(consumer) != work->captured_) {
    throw Error(Code::invalid,
                work->program_->name + (work->captured_
                                            ? ": was captured into a graph: wait for it within the capture"
                                            : ": was started before the capture: wait for it before that"));
  }
  finish_issue(work);
  for (const size_t end : work->program_->ends) {
    cuda_->check(cuda_->cuStreamWaitEvent(consumer, work->events_.at(end).get(), 0), "cuStreamWaitEvent");
  }
} catch (const DeviceError& error) {
  fail_if_lost(error);
  throw;
}

ncclWindow_t GpuEngine::register_window(int comm, void* data, size_t nbytes) {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  try {
    return comms_.register_window(comm, data, nbytes);
  } catch (...) {
    fail_by_current();
    throw;
  }
}

void GpuEngine::issue(GpuWork& work, size_t begin, size_t end) {
  const DeviceProgram& program = *work.program_;
  for (size_t first = begin; first < end;) {
    const size_t behind = program.end_of_group(first);
    for (size_t i = first; i < behind; ++i) wait_for(work, program.ops[i]);
    if (is_nccl(program.ops[first].kind)) {
      issue_nccl(program, first, behind);
    } else {
      issue_one(program.ops[first]);
    }
    for (size_t i = first; i < behind; ++i) {
      if (!program.awaited[i]) continue;
      CUevent event = work.events_.try_emplace(i, pool_).first->second.get();
      cuda_->check(cuda_->cuEventRecord(event, streams_.at(static_cast<size_t>(program.ops[i].stream))),
                   "cuEventRecord");
    }
    first = behind;
  }
}

void GpuEngine::wait_for(GpuWork& work, const DeviceOp& op) {
  CUstream stream = streams_.at(static_cast<size_t>(op.stream));
  for (const int before : op.after) {
    CUevent event = before == kStart ? work.start_.get() : work.events_.at(static_cast<size_t>(before)).get();
    cuda_->check(cuda_->cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent");
  }
}

void GpuEngine::issue_one(const DeviceOp& op) {
  CUstream stream = streams_.at(static_cast<size_t>(op.stream));
  if (op.kind == DeviceKind::launch) {
    launch(op);
  } else if (op.kind == DeviceKind::copy) {
    cuda_->check(cuda_->cuMemcpyDtoDAsync_v2(op.to, op.from, op.count, stream), "cuMemcpyDtoDAsync");
  } else {
    cuda_->check(cuda_->cuMemsetD8Async(op.to, op.value, op.count, stream), "cuMemsetD8Async");
  }
}

void GpuEngine::launch(const DeviceOp& op) {
  size_t nbytes = op.arguments.size();
  void* extra[] = {reinterpret_cast<void*>(kBufferPointer), const_cast<unsigned char*>(op.arguments.data()),
                   reinterpret_cast<void*>(kBufferSize), &nbytes, reinterpret_cast<void*>(kEnd)};
  cuda_->check(
      cuda_->cuLaunchKernel(functions_.at(static_cast<size_t>(op.function)), op.blocks, 1, 1, op.threads, 1,
                            1, op.shared_nbytes, streams_.at(static_cast<size_t>(op.stream)), nullptr, extra),
      "cuLaunchKernel");
}

// One call, or the calls of one group. The watchdog aborts before or after them, not in between.
void GpuEngine::issue_nccl(const DeviceProgram& program, size_t first, size_t behind) {
  std::set<int> comms;
  comms_.trim_reductions();
  std::vector<ncclRedOp_t> reductions;  // made before, since that may have to wait
  for (size_t i = first; i < behind; ++i) {
    const DeviceOp& op = program.ops[i];
    reductions.push_back(reduction_of(op));
    comms.insert(op.comm);
  }
  {
    const auto held = comms_.hold();
    NcclGroup group(*nccl_, program.ops[first].group != kNoGroup);
    for (size_t i = first; i < behind; ++i) {
      comms_.check(program.ops[i].comm, call_nccl(program.ops[i], reductions[i - first]), "an NCCL call");
    }
    comms_.check(program.ops[first].comm, group.end(), "ncclGroupEnd");
  }
  for (const int comm : comms) comms_.settle(comm, ncclInProgress, "an NCCL call");
}

ncclRedOp_t GpuEngine::reduction_of(const DeviceOp& op) {
  if (op.factor) return comms_.scaled_sum(op.comm, op.dtype, *op.factor);
  return op.divisor == 1 ? op.op : comms_.mean_of(op.comm, op.dtype, op.divisor);
}

ncclResult_t GpuEngine::call_nccl(const DeviceOp& op, ncclRedOp_t reduction) {
  const Nccl& nccl = *nccl_;
  ncclComm_t comm = comms_.at(op.comm);
  CUstream stream = streams_.at(static_cast<size_t>(op.stream));
  const void* from = pointer(op.from);
  void* to = mutable_pointer(op.to);
  switch (op.kind) {
    case DeviceKind::all_reduce:
      return nccl.ncclAllReduce(from, to, op.count, op.dtype, reduction, comm, stream);
    case DeviceKind::reduce:
      return nccl.ncclReduce(from, to, op.count, op.dtype, reduction, op.peer, comm, stream);
    case DeviceKind::reduce_scatter:
      return nccl.ncclReduceScatter(from, to, op.count, op.dtype, reduction, comm, stream);
    case DeviceKind::all_gather:
      return nccl.ncclAllGather(from, to, op.count, op.dtype, comm, stream);
    case DeviceKind::broadcast:
      return nccl.ncclBroadcast(from, to, op.count, op.dtype, op.peer, comm, stream);
    case DeviceKind::all_to_all:
      if (nccl.ncclAlltoAll == nullptr) return ncclInvalidUsage;
      return nccl.ncclAlltoAll(from, to, op.count, op.dtype, comm, stream);
    case DeviceKind::send:
      return nccl.ncclSend(from, op.count, op.dtype, op.peer, comm, stream);
    case DeviceKind::receive:
      return nccl.ncclRecv(to, op.count, op.dtype, op.peer, comm, stream);
    default:
      return ncclInternalError;
  }
}

}  // namespace hybridcomm::gpu
