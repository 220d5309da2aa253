// The functions of CUDA's driver and of NCCL, as tables that are filled at run time: one wheel for machines with a GPU
// and without, for CUDA 12 and 13, and for any NCCL from 2.18 on.
#pragma once

#include <string>
#include <vector>

#include "common.h"
#include "gpu_library.h"
#include "gpu_nccl_abi.h"

namespace hybridcomm::gpu {

// A GPU failed, or CUDA refused a call: hybridcomm.errors.DeviceError.
class DeviceError : public Error {
 public:
  DeviceError(const std::string& what, std::string call, std::string name, int result, int device, bool lost)
      : Error(Code::aborted, what),
        call(std::move(call)),
        name(std::move(name)),
        result(result),
        device(device),
        lost(lost) {}
  std::string call, name;  // CUDA's
  int result, device;      // -1: of no device yet
  bool lost;               // the device's context: nothing works there any more
};

struct Cuda {
#define MEMBER(symbol, result, arguments) result(*symbol) arguments = nullptr;
  CUDA_CALLS(MEMBER)
#undef MEMBER

  int version = 0;  // of the driver, as cuDriverGetVersion says it: 12040 for 12.4
  int device = -1;  // whose calls these are, for messages
  std::string path;

  // Raises Code::invalid: a symbol is missing (each is named), the driver is older than CUDA 12, or it does not start.
  static Cuda load(const SharedLibrary& library);
  // Raises DeviceError with the call, the driver's words for what went wrong, and what to do.
  void check(CUresult result, const char* call) const;
  int device_count() const;  // 0 where there is a driver, but no device
};

struct Nccl {
#define MEMBER(symbol, result, arguments, ...) result(*symbol) arguments = nullptr;
  NCCL_CALLS(MEMBER)
  NCCL_NEWER_CALLS(MEMBER)
#undef MEMBER

  int version = 0;  // as ncclGetVersion says it: 22703 for 2.27.3
  int device = -1;  // as in Cuda
  std::string path;

  // Raises Code::invalid: older than 2.18.1, or a symbol is missing (each is named).
  static Nccl load(const SharedLibrary& library);
  // What this copy has beyond 2.18, by name, in the table's order. Ranks whose lists differ must not use them: the
  // list is part of what they compare before the first collective.
  std::vector<std::string> newer() const;
  // Of a result that says that CUDA failed; `words`: what else is known.
  DeviceError cuda_failed(const char* call, ncclResult_t result, const std::string& words) const;
};

}  // namespace hybridcomm::gpu
