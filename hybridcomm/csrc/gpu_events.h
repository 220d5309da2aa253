// Events of CUDA's, used again: a wait takes an event's record at the time of the call, so nobody minds a later one.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "gpu_tables.h"

namespace hybridcomm::gpu {

class EventPool {
 public:
  explicit EventPool(std::shared_ptr<const Cuda> cuda) : cuda_(std::move(cuda)) {}
  ~EventPool() {
    for (CUevent event : free_) cuda_->cuEventDestroy_v2(event);
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  CUevent take() {
    const std::lock_guard lock(mutex_);
    CUevent event = nullptr;
    if (free_.empty()) {
      cuda_->check(cuda_->cuEventCreate(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    } else {
      event = free_.back();
      free_.pop_back();
    }
    return event;
  }
  void give(CUevent event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(event);
  }

 private:
  std::shared_ptr<const Cuda> cuda_;
  std::mutex mutex_;
  std::vector<CUevent> free_;
};

// One event of a pool, given back with its owner.
class Event {
 public:
  explicit Event(std::shared_ptr<EventPool> pool) : pool_(std::move(pool)), event_(pool_->take()) {}
  Event(Event&& other) noexcept : pool_(std::move(other.pool_)), event_(other.event_) {}
  Event& operator=(Event&&) = delete;
  ~Event() {
    if (pool_ != nullptr) pool_->give(event_);
  }
  CUevent get() const { return event_; }

 private:
  std::shared_ptr<EventPool> pool_;
  CUevent event_;
};

}  // namespace hybridcomm::gpu
