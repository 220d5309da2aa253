// The functions of CUDA's driver and of NCCL, as tables that are filled at run time: one wheel for machines with a GPU
// and without, for CUDA 12 and 13, and for any NCCL from 2.18 on.
#pragma once

#include <string>
#include <vector>

#include "gpu_library.h"
#include "gpu_nccl_abi.h"

namespace hybridcomm::gpu {

struct Cuda {
#define MEMBER(symbol, result, arguments) result(*symbol) arguments = nullptr;
  CUDA_CALLS(MEMBER)
#undef MEMBER

  int version = 0;  // of the driver, as cuDriverGetVersion says it: 12040 for 12.4
  std::string path;

  // Raises Code::invalid: a symbol is missing (each is named), the driver is older than CUDA 12, or it does not start.
  static Cuda load(const SharedLibrary& library);
  // Raises Code::invalid with the call's name and the driver's word for what went wrong.
  void check(CUresult result, const char* call) const;
  int device_count() const;  // 0 where there is a driver, but no device
};

struct Nccl {
#define MEMBER(symbol, result, arguments, ...) result(*symbol) arguments = nullptr;
  NCCL_CALLS(MEMBER)
  NCCL_NEWER_CALLS(MEMBER)
#undef MEMBER

  int version = 0;  // as ncclGetVersion says it: 22703 for 2.27.3
  std::string path;

  // Raises Code::invalid: older than 2.18.1, or a symbol is missing (each is named).
  static Nccl load(const SharedLibrary& library);
  // What this copy has beyond 2.18, by name, in the table's order. Ranks whose lists differ must not use them: the
  // list is part of what they compare before the first collective.
  std::vector<std::string> newer() const;
};

}  // namespace hybridcomm::gpu
