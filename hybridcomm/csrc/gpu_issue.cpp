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

bool is_nccl(DeviceKind kind) { return kind >= DeviceKind::all_reduce; }

}  // namespace

bool GpuEngine::capturing(CUstream stream) const {
  int32_t status = CU_STREAM_CAPTURE_STATUS_NONE;
  cuda_->check(cuda_->cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  return status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

std::shared_ptr<GpuWork> GpuEngine::start(std::shared_ptr<const DeviceProgram> program, CUstream producer) {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  const bool capture = capturing(producer);
  {
    const std::lock_guard state(mutex_);
    capturing_ = capture;  // what the watchdog asks could break it
  }
  const std::shared_ptr<GpuWork> work(new GpuWork(std::move(program), pool_));
  work->captured_ = capture;
  // What is pending belongs before a capture that it is no part of, and before whoever needs its result.
  if (pending_ != nullptr && (pending_->captured_ != capture || pending_->program_->meets(*work->program_))) {
    finish_issue(pending_);
  }
  cuda_->check(cuda_->cuEventRecord(work->start_.get(), producer), "cuEventRecord");
  wait_for_earlier(*work);
  try {
    issue(*work, 0, work->program_->tail);
    if (pending_ != nullptr) finish_issue(pending_);
  } catch (const Error& error) {
    fail(error);  // half of a program is on the streams, and peers are in its other half
    throw;
  }
  if (work->program_->tail == work->program_->ops.size()) {
    work->issued_ = true;
  } else {
    pending_ = work;
  }
  const std::lock_guard state(mutex_);
  running_.push_back(work);
  changed_.notify_all();
  return work;
}

// Of those under way that touch the same memory, whoever has waited for them; streams keep the order of others.
void GpuEngine::wait_for_earlier(const GpuWork& work) {
  std::vector<std::shared_ptr<GpuWork>> earlier;
  {
    const std::lock_guard state(mutex_);
    if (!work.captured_) {
      const auto captured = [](const std::shared_ptr<GpuWork>& other) { return other->captured_; };
      running_.erase(std::remove_if(running_.begin(), running_.end(), captured), running_.end());
    }
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
  } catch (const Error& error) {
    fail(error);
    throw;
  }
  held->issued_ = true;
}

void GpuEngine::wait(const std::shared_ptr<GpuWork>& work, CUstream consumer) {
  const std::lock_guard lock(issuing_);
  check();
  make_current();
  finish_issue(work);
  for (const size_t end : work->program_->ends) {
    cuda_->check(cuda_->cuStreamWaitEvent(consumer, work->events_.at(end).get(), 0), "cuStreamWaitEvent");
  }
}

void GpuEngine::issue(GpuWork& work, size_t begin, size_t end) {
  const DeviceProgram& program = *work.program_;
  for (size_t first = begin; first < end;) {
    const size_t behind = program.end_of_group(first);
    for (size_t i = first; i < behind; ++i) wait_for(work, program.ops[i]);
    const bool grouped = program.ops[first].group != kNoGroup;
    std::set<int> comms;
    if (grouped) comms_.group_start();
    for (size_t i = first; i < behind; ++i) {
      const DeviceOp& op = program.ops[i];
      CUstream stream = streams_.at(static_cast<size_t>(op.stream));
      if (is_nccl(op.kind)) {
        issue_nccl(op);
        comms.insert(op.comm);
      } else if (op.kind == DeviceKind::launch) {
        launch(op);
      } else if (op.kind == DeviceKind::copy) {
        cuda_->check(cuda_->cuMemcpyDtoDAsync_v2(op.to, op.from, op.count, stream), "cuMemcpyDtoDAsync");
      } else {
        cuda_->check(cuda_->cuMemsetD8Async(op.to, op.value, op.count, stream), "cuMemsetD8Async");
      }
    }
    if (grouped) comms_.group_end({comms.begin(), comms.end()});
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

void GpuEngine::launch(const DeviceOp& op) {
  size_t nbytes = op.arguments.size();
  void* extra[] = {reinterpret_cast<void*>(kBufferPointer), const_cast<unsigned char*>(op.arguments.data()),
                   reinterpret_cast<void*>(kBufferSize), &nbytes, reinterpret_cast<void*>(kEnd)};
  cuda_->check(
      cuda_->cuLaunchKernel(functions_.at(static_cast<size_t>(op.function)), op.blocks, 1, 1, op.threads, 1,
                            1, op.shared_nbytes, streams_.at(static_cast<size_t>(op.stream)), nullptr, extra),
      "cuLaunchKernel");
}

void GpuEngine::issue_nccl(const DeviceOp& op) {
  const Nccl& nccl = *nccl_;
  ncclComm_t comm = comms_.at(op.comm);
  CUstream stream = streams_.at(static_cast<size_t>(op.stream));
  const void* from = pointer(op.from);
  void* to = mutable_pointer(op.to);
  const ncclRedOp_t reduction = op.divisor == 1 ? op.op : comms_.mean_of(op.comm, op.dtype, op.divisor);
  ncclResult_t result = ncclInternalError;
  switch (op.kind) {
    case DeviceKind::all_reduce:
      result = nccl.ncclAllReduce(from, to, op.count, op.dtype, reduction, comm, stream);
      break;
    case DeviceKind::reduce:
      result = nccl.ncclReduce(from, to, op.count, op.dtype, reduction, op.peer, comm, stream);
      break;
    case DeviceKind::reduce_scatter:
      result = nccl.ncclReduceScatter(from, to, op.count, op.dtype, reduction, comm, stream);
      break;
    case DeviceKind::all_gather:
      result = nccl.ncclAllGather(from, to, op.count, op.dtype, comm, stream);
      break;
    case DeviceKind::broadcast:
      result = nccl.ncclBroadcast(from, to, op.count, op.dtype, op.peer, comm, stream);
      break;
    case DeviceKind::send:
      result = nccl.ncclSend(from, op.count, op.dtype, op.peer, comm, stream);
      break;
    case DeviceKind::receive:
      result = nccl.ncclRecv(to, op.count, op.dtype, op.peer, comm, stream);
      break;
    default:
      break;
  }
  // Within a group nothing has been done yet: its end settles it.
  if (op.group == kNoGroup || (result != ncclSuccess && result != ncclInProgress)) {
    comms_.settle(op.comm, result, "an NCCL call");
  }
}

}  // namespace hybridcomm::gpu
