#include "gpu_memory.h"

namespace hybridcomm::gpu {

GpuMemory::GpuMemory(std::shared_ptr<GpuEngine> engine, size_t nbytes)
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
      for (int comm = 0; comm < engine_->comms().count(); ++comm) {
        void* handle = engine_->comms().register_buffer(comm, data, nbytes);
        if (handle != nullptr) handles_.emplace_back(comm, handle);
      }
    } catch (...) {
      release();
      throw;
    }
  } else {
    const Cuda& cuda = engine_->cuda();
    cuda.check(cuda.cuMemAlloc_v2(&address_, nbytes), "cuMemAlloc");
  }
}

GpuMemory::~GpuMemory() { release(); }

void GpuMemory::release() {
  for (const auto& [comm, handle] : handles_) engine_->comms().deregister_buffer(comm, handle);
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
