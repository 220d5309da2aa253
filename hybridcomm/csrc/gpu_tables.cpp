#include "gpu_tables.h"

#include "common.h"

namespace hybridcomm::gpu {
namespace {

constexpr int kOldestDriver = 12000;

// Fills a member, or notes that the symbol is missing.
template <class Function>
void fill(Function& member, const SharedLibrary& library, const char* name, std::string& missing) {
  member = reinterpret_cast<Function>(library.find(name));
  if (member == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
}

std::string nccl_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

}  // namespace

Cuda Cuda::load(const SharedLibrary& library) {
  Cuda cuda;
  cuda.path = library.path();
  std::string missing;
#define FILL(symbol, result, arguments) fill(cuda.symbol, library, #symbol, missing);
  CUDA_CALLS(FILL)
#undef FILL
  if (!missing.empty()) {
    throw Error(Code::invalid,
                cuda.path + " has no " + missing + ": install a driver for CUDA 12 or later (525 or later)");
  }
  cuda.check(cuda.cuDriverGetVersion(&cuda.version), "cuDriverGetVersion");
  if (cuda.version < kOldestDriver) {
    throw Error(Code::invalid, cuda.path + " is a driver for CUDA " + std::to_string(cuda.version / 1000) +
                                   ": install one for CUDA 12 or later (525 or later)");
  }
  return cuda;
}

void Cuda::check(CUresult result, const char* call) const {
  if (result == CUDA_SUCCESS) return;
  const char* word = nullptr;
  if (cuGetErrorName(result, &word) != CUDA_SUCCESS || word == nullptr) word = "an unknown error";
  throw Error(Code::invalid, std::string(call) + ": " + word + " (" + std::to_string(result) + ")");
}

int Cuda::device_count() const {
  const CUresult started = cuInit(0);
  if (started == CUDA_ERROR_NO_DEVICE) return 0;
  check(started, "cuInit");
  int count = 0;
  check(cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

Nccl Nccl::load(const SharedLibrary& library) {
  Nccl nccl;
  nccl.path = library.path();
  std::string missing;
#define FILL(symbol, result, arguments) fill(nccl.symbol, library, #symbol, missing);
  NCCL_CALLS(FILL)
#undef FILL
  if (nccl.ncclGetVersion != nullptr && nccl.ncclGetVersion(&nccl.version) != ncclSuccess) nccl.version = 0;
  if (nccl.version < kOldestNccl || !missing.empty()) {
    const std::string what = nccl.version == 0 ? "of an unknown version" : nccl_text(nccl.version);
    throw Error(Code::invalid,
                nccl.path + " is NCCL " + what + (missing.empty() ? "" : ", without " + missing) + ": " +
                    nccl_text(kOldestNccl) + " or later is needed, pip install -U nvidia-nccl-cu12");
  }
  // A symbol alone is no proof: what a version exports before it is announced may still change.
#define FILL(symbol, result, arguments, since)                                    \
  if (nccl.version >= (since)) {                                                  \
    nccl.symbol = reinterpret_cast<decltype(nccl.symbol)>(library.find(#symbol)); \
  }
  NCCL_NEWER_CALLS(FILL)
#undef FILL
  return nccl;
}

std::vector<std::string> Nccl::newer() const {
  std::vector<std::string> names;
#define NAME(symbol, result, arguments, since) \
  if (symbol != nullptr) names.emplace_back(#symbol);
  NCCL_NEWER_CALLS(NAME)
#undef NAME
  return names;
}

}  // namespace hybridcomm::gpu
