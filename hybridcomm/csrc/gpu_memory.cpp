#include "gpu_memory.h"

#include <algorithm>

namespace hybridcomm::gpu {

GpuMemory::GpuMemory(std::shared_ptr<GpuEngine> engine, size_t nbytes, const std::vector<int>& windows)
    : engine_(std::move(engine)), nbytes_(nbytes) {
  engine_->make_current();
  const Nccl& nccl = engine_->nccl();
  from_nccl_ = nccl.ncclMemAlloc != nullptr && nccl.ncclMemFree != nullptr;
  if (from_nccl_) {
    void* data = nullptr;
    const ncclResult_t result = nccl.ncclMemAlloc(&data, nbytes);
    if (result != ncclSuccess) {
      throw nccl.cuda_failed("ncclMemAlloc", result,
                             std::to_string(nbytes) + " bytes, " + nccl.ncclGetErrorString(result));
    }
    address_ = reinterpret_cast<CUdeviceptr>(data);
    try {
      make_known(data, windows);
    } catch (...) {
      release();
      throw;
    }
  } else {
    const Cuda& cuda = engine_->cuda();
    cuda.check(cuda.cuMemAlloc_v2(&address_, nbytes), "cuMemAlloc");
  }
}

void GpuMemory::make_known(void* data, const std::vector<int>& windows) {
  for (int comm = 0; comm < engine_->comms().count(); ++comm) {
    const bool together = std::find(windows.begin(), windows.end(), comm) != windows.end();
    const ncclWindow_t window = together ? engine_->register_window(comm, data, nbytes_) : nullptr;
    if (window != nullptr) {
      windows_.emplace_back(comm, window);
      continue;
    }
    void* handle = engine_->comms().register_buffer(comm, data, nbytes_);
    if (handle != nullptr) handles_.emplace_back(comm, handle);
  }
}

GpuMemory::~GpuMemory() { release(); }

void GpuMemory::release() {
  for (const auto& [comm, handle] : handles_) engine_->comms().deregister_buffer(comm, handle);
  for (const auto& [comm, window] : windows_) engine_->comms().deregister_window(comm, window);
  try {
    engine_->make_current();
  } catch (const Error&) {
    return;  // the context has ended, and its memory with it
  }
  if (from_nccl_) {
    engine_->nccl().ncclMemFree(reinterpret_cast<void*>(address_));
  } else {
    engine_->cuda().cuMemFree_v2(address_);
  }
}

}  // namespace hybridcomm::gpu
