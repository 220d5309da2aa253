// The watchdog: what failed in the background, or was not done in time, ends everything with a typed error.
#include "gpu_engine.h"

namespace hybridcomm::gpu {

void GpuEngine::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_ != nullptr) return;
    failure_ = std::move(error);
    changed_.notify_all();
  }
  host_.failed();  // first: an abort may take a while, and tells the peers less, if anything
  comms_.abort();  // what is stuck comes back, and the peers hear of it
}

// Of what NCCL reports: CUDA's own error where the device is lost, and what the host has heard where it is a peer that
// is gone, since NCCL says neither which nor why.
std::exception_ptr GpuEngine::cause_of(const std::exception_ptr& error) const {
  try {
    const CUresult result = cuda_->cuStreamQuery(streams_.front());
    if (result != CUDA_ERROR_NOT_READY) cuda_->check(result, "cuStreamQuery");
  } catch (const DeviceError& found) {
    if (found.lost) return std::current_exception();
  }
  try {
    std::rethrow_exception(error);
  } catch (const Error& reported) {
    const std::optional<Error> heard = host_.heard();
    if (reported.code == Code::peer_lost && heard) return std::make_exception_ptr(*heard);
  }
  return error;
}

// What is wrong, if anything is. Works that are over are forgotten.
std::exception_ptr GpuEngine::look() {
  if (std::exception_ptr error = comms_.async_error()) return cause_of(error);
  // A host that is idle, as its rank waits for the device alone, would not hear of a peer before the next call.
  if (const std::optional<Error> heard = host_.heard()) return std::make_exception_ptr(*heard);
  const std::lock_guard lock(mutex_);
  if (capturing_) return nullptr;  // asking for an event would break another thread's capture
  while (!running_.empty() && !running_.front()->captured_) {
    GpuWork& work = *running_.front();
    if (work.over_) {
      running_.pop_front();
      continue;
    }
    // What is not issued to its end yet waits for its caller, not for the device.
    if (!work.issued_) return nullptr;
    try {
      if (poll(work)) continue;
    } catch (const Error&) {
      return std::current_exception();
    }
    if (hybridcomm::Clock::now() < work.since_ + seconds(config_.timeout_s)) return nullptr;
    return std::make_exception_ptr(
        Error(Code::stall, work.program_->name + ": not done on the device after " +
                               std::to_string(config_.timeout_s) +
                               " s; a rank did not come to it, or its link is down"));
  }
  return nullptr;
}

void GpuEngine::watch() {
  try {
    make_current();
    while (true) {
      {
        std::unique_lock lock(mutex_);
        if (changed_.wait_for(lock, seconds(config_.watch_s),
                              [this] { return closed_ || failure_ != nullptr; }))
          return;
      }
      if (std::exception_ptr error = look()) {
        fail(std::move(error));
        return;
      }
    }
  } catch (const Error&) {
    fail(std::current_exception());
  }
}

}  // namespace hybridcomm::gpu
