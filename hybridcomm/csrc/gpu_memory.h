// Device memory for buckets: NCCL's own where it has some, registered with the communicators, so that its network and
// its copies within a node take it as it lies (user buffer registration, from 2.19 on); else CUDA's.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "gpu_engine.h"

namespace hybridcomm::gpu {

class GpuMemory {
 public:
  // Raises Code::invalid where the device has no room.
  GpuMemory(std::shared_ptr<GpuEngine> engine, size_t nbytes);
  ~GpuMemory();
  GpuMemory(const GpuMemory&) = delete;
  GpuMemory& operator=(const GpuMemory&) = delete;

  CUdeviceptr address() const { return address_; }
  size_t nbytes() const { return nbytes_; }
  bool registered() const { return !handles_.empty(); }

 private:
  void release();

  std::shared_ptr<GpuEngine> engine_;
  size_t nbytes_;
  CUdeviceptr address_ = 0;
  bool from_nccl_ = false;
  std::vector<std::pair<int, void*>> handles_;
};

}  // namespace hybridcomm::gpu
