// What the functions of the simulated driver share.
#pragma once

#include <mutex>

#include "gpu_cuda_abi.h"
#include "world.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace sim {

// Every call begins with it: the thread takes part from then on.
inline std::unique_lock<std::mutex> locked() {
  std::unique_lock<std::mutex> lock(world().mutex);
  world().here();
  return lock;
}

inline bool on_a_device() { return world().here().device >= 0; }
// Whether the calling thread's context is lost.
inline bool broken() { return world().broken(world().here().device); }

// What a test wants this call to answer on the thread's device, once; CUDA_SUCCESS: it works.
hybridcomm::gpu::CUresult planted(const char* call);

inline uintptr_t address(hybridcomm::gpu::CUdeviceptr pointer) { return static_cast<uintptr_t>(pointer); }

// Onto the stream, or into what captures it.
hybridcomm::gpu::CUresult submit(hybridcomm::gpu::CUstream handle, const Make& make);

}  // namespace sim
