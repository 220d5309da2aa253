// The watchdog: what failed in the background, or was not done in time, ends everything with a typed error.
#include "gpu_engine.h"

namespace hybridcomm::gpu {

void GpuEngine::fail(const Error& error) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    failure_ = error;
    changed_.notify_all();
  }
  comms_.abort();  // what is stuck comes back, and the peers hear of it
  on_failure_();
}

// What is wrong, if anything is. Works that are over are forgotten.
std::optional<Error> GpuEngine::look() {
  if (const std::optional<Error> error = comms_.async_error()) return error;
  const std::lock_guard lock(mutex_);
  if (capturing_) return std::nullopt;  // asking for an event would break another thread's capture
  while (!running_.empty() && !running_.front()->captured_) {
    GpuWork& work = *running_.front();
    if (work.over_) {
      running_.pop_front();
      continue;
    }
    // What is not issued to its end yet waits for its caller, not for the device.
    if (!work.issued_) return std::nullopt;
    try {
      if (poll(work)) continue;
    } catch (const Error& error) {
      return error;
    }
    if (hybridcomm::Clock::now() < work.since_ + seconds(config_.timeout_s)) return std::nullopt;
    return Error(Code::stall, work.program_->name + ": not done on the device after " +
                                  std::to_string(config_.timeout_s) +
                                  " s; a rank did not come to it, or its link is down");
  }
  return std::nullopt;
}

void GpuEngine::watch() {
  try {
    make_current();
    while (true) {
      {
        std::unique_lock lock(mutex_);
        if (changed_.wait_for(lock, seconds(config_.watch_s),
                              [this] { return closed_ || failure_.has_value(); }))
          return;
      }
      if (const std::optional<Error> error = look()) {
        fail(*error);
        return;
      }
    }
  } catch (const Error& error) {
    fail(error);
  }
}

}  // namespace hybridcomm::gpu
