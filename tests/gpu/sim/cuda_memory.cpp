// libcuda's memory and copies, on the simulated machine.
#include <cstdlib>
#include <cstring>

#include "calls.h"
#include "graphs.h"

using namespace hybridcomm::gpu;
using sim::address;
using sim::broken;
using sim::graphs;
using sim::locked;
using sim::on_a_device;
using sim::Operation;
using sim::world;

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t nbytes) {
  const auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  if (const CUresult refused = graphs().unsafe(); refused != CUDA_SUCCESS) return refused;
  if (nbytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *pointer = world().memory.allocate(nbytes, world().here().device);
  return CUDA_SUCCESS;
}
// CUDA's may wait for the device, this one does not: what relies on that wait is a bug on a pool of memory.
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (const CUresult refused = graphs().unsafe(); refused != CUDA_SUCCESS) return refused;
  return world().memory.release(address(pointer), world().here().host->clock) ? CUDA_SUCCESS
                                                                              : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuMemHostAlloc(void** pointer, size_t nbytes, unsigned) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (const CUresult refused = graphs().unsafe(); refused != CUDA_SUCCESS) return refused;
  *pointer = std::malloc(nbytes);
  return *pointer == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
EXPORT CUresult cuMemFreeHost(void* pointer) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (const CUresult refused = graphs().unsafe(); refused != CUDA_SUCCESS) return refused;
  std::free(pointer);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Operation operation;
  operation.what = "cuMemcpyHtoDAsync";
  operation.ranges.push_back({address(to), nbytes, true});
  operation.run = [=] { std::memcpy(reinterpret_cast<void*>(address(to)), from, nbytes); };
  return sim::submit(stream, [operation] { return operation; });
}
// The target is poisoned at once, so that a host that reads before the copy has run sees no old value that may be right.
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Operation operation;
  operation.what = "cuMemcpyDtoHAsync";
  operation.issue = [=] { std::memset(to, sim::kPoison, nbytes); };
  operation.ranges.push_back({address(from), nbytes, false});
  operation.run = [=] { std::memcpy(to, reinterpret_cast<const void*>(address(from)), nbytes); };
  return sim::submit(stream, [operation] { return operation; });
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Operation operation;
  operation.what = "cuMemcpyDtoDAsync";
  operation.ranges = {{address(from), nbytes, false}, {address(to), nbytes, true}};
  operation.run = [=] {
    std::memmove(reinterpret_cast<void*>(address(to)), reinterpret_cast<const void*>(address(from)), nbytes);
  };
  return sim::submit(stream, [operation] { return operation; });
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Operation operation;
  operation.what = "cuMemsetD8Async";
  operation.ranges.push_back({address(to), nbytes, true});
  operation.run = [=] { std::memset(reinterpret_cast<void*>(address(to)), value, nbytes); };
  return sim::submit(stream, [operation] { return operation; });
}
