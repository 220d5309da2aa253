// Device memory for buckets: NCCL's own where it has some, registered with the communicators, so that its network and
// its copies within a node take it as it lies (user buffer registration, from 2.19 on; symmetric windows, from 2.27 on,
// where all ranks allocate together); else CUDA's.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "gpu_engine.h"

namespace hybridcomm::gpu {

class GpuMemory {
 public:
  // `windows`: communicators whose ranks all allocate as much now, in one order of communicators and memory; there it
  // becomes a window, elsewhere it is registered by this rank alone. Raises DeviceError where the device has no room.
  GpuMemory(std::shared_ptr<GpuEngine> engine, size_t nbytes, const std::vector<int>& windows);
  ~GpuMemory();
  GpuMemory(const GpuMemory&) = delete;
  GpuMemory& operator=(const GpuMemory&) = delete;

  CUdeviceptr address() const { return address_; }
  size_t nbytes() const { return nbytes_; }
  size_t windows() const { return windows_.size(); }

 private:
  void make_known(void* data, const std::vector<int>& windows);
  void release();

  std::shared_ptr<GpuEngine> engine_;
  size_t nbytes_;
  CUdeviceptr address_ = 0;
  bool from_nccl_ = false;
  std::vector<std::pair<int, void*>> handles_;
  std::vector<std::pair<int, ncclWindow_t>> windows_;
};

}  // namespace hybridcomm::gpu
