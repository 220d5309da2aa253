#include "gpu_tables.h"

namespace hybridcomm::gpu {
namespace {

constexpr int kOldestDriver = 12000;

// Fills a member, or notes that the symbol is missing.
template <class Function>
void fill(Function& member, const SharedLibrary& library, const char* name, std::string& missing) {
  member = reinterpret_cast<Function>(library.find(name));
  if (member == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(name);
}

std::string on(int device) { return device < 0 ? "" : " on device " + std::to_string(device); }

// Errors that stay: every later call in the context answers likewise.
bool is_lost(CUresult result) {
  return result == CUDA_ERROR_ECC_UNCORRECTABLE || result == CUDA_ERROR_ILLEGAL_ADDRESS ||
         result == CUDA_ERROR_LAUNCH_TIMEOUT ||
         (result >= CUDA_ERROR_CONTEXT_IS_DESTROYED && result <= CUDA_ERROR_ASSERT) ||
         (result >= CUDA_ERROR_HARDWARE_STACK_ERROR && result <= CUDA_ERROR_LAUNCH_FAILED);
}

const char* advice(CUresult result) {
  if (is_lost(result)) {
    return "the device's context is lost, so end this process; if it happens again, look for Xid in dmesg, "
           "and run it under compute-sanitizer";
  }
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY:
      return "the device's memory is full: make buckets or batches smaller, and see who else is on it in "
             "nvidia-smi";
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_INVALID_DEVICE:
      return "see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
      return "no shipped kernel runs here: install a newer driver, or a version of hybridcomm for this GPU";
    default:
      break;
  }
  if (result >= CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED && result <= CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD) {
    return "a graph was being captured that allows no such call: make it before or behind the capture";
  }
  return "look for an earlier error, and for Xid in dmesg";
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
  const char *word = nullptr, *text = nullptr;
  if (cuGetErrorName(result, &word) != CUDA_SUCCESS || word == nullptr) word = "an unknown error";
  if (cuGetErrorString(result, &text) != CUDA_SUCCESS) text = nullptr;
  const std::string why = text == nullptr ? "" : std::string(", ") + text;
  throw DeviceError(
      call + on(device) + ": " + word + " (" + std::to_string(result) + ")" + why + ": " + advice(result),
      call, word, result, device, is_lost(result));
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

DeviceError Nccl::cuda_failed(const char* call, ncclResult_t result, const std::string& words) const {
  return {call + on(device) + ": " + words + ": look for an earlier error, and for Xid in dmesg",
          call,
          "ncclUnhandledCudaError",
          result,
          device,
          false};
}

}  // namespace hybridcomm::gpu
