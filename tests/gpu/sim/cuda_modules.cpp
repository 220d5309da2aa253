// libcuda's modules, functions and launches, on the simulated machine.
#include <list>

#include "calls.h"
#include "kernels.h"

using namespace hybridcomm::gpu;
using sim::broken;
using sim::Finding;
using sim::locked;
using sim::on_a_device;
using sim::Operation;
using sim::Range;
using sim::world;

namespace {

constexpr size_t kUnasked = 48 * 1024;  // bytes of shared memory that a block gets without asking

struct Module;
struct Function {
  const sim::Kernel* kernel;
  const Module* module;
  size_t most;  // bytes of dynamic shared memory
};
struct Module {
  const sim::Image* image;
  int device;
  bool live;
  std::list<Function> functions;
};
std::list<Module>& modules() {
  static auto* const all = new std::list<Module>;  // of all rounds: handles stay what they are
  return *all;
}

Module* module_of(CUmodule handle) {
  for (Module& each : modules()) {
    if (reinterpret_cast<CUmodule>(&each) == handle && each.live) return &each;
  }
  world().reports.add(Finding::stranger, "a module that is none, or was unloaded");
  return nullptr;
}

Function* function_of(CUfunction handle) {
  for (Module& module : modules()) {
    for (Function& each : module.functions) {
      if (reinterpret_cast<CUfunction>(&each) == handle && module.live) return &each;
    }
  }
  world().reports.add(Finding::stranger, "a function that is none, or whose module was unloaded");
  return nullptr;
}

}  // namespace

// A module belongs to the context that loaded it.
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  const sim::Image* found = image == nullptr ? nullptr : sim::find_image(image);
  if (found == nullptr) return CUDA_ERROR_INVALID_IMAGE;
  modules().push_back({found, world().here().device, true, {}});
  *module = reinterpret_cast<CUmodule>(&modules().back());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule handle) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Module* module = module_of(handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  module->live = false;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* symbol) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Module* module = module_of(handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const sim::Kernel* kernel = sim::find_kernel(*module->image, symbol);
  if (kernel == nullptr) return CUDA_ERROR_NOT_FOUND;
  module->functions.push_back({kernel, module, kUnasked});
  *function = reinterpret_cast<CUfunction>(&module->functions.back());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction handle, int32_t attribute, int value) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  Function* function = function_of(handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    function->most = static_cast<size_t>(value);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                               unsigned threads_y, unsigned threads_z, unsigned shared, CUstream to,
                               void** parameters, void** extra) {
  const auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  const Function* function = function_of(handle);
  const sim::Stream* stream = world().stream(to);
  if (function == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const sim::Kernel& kernel = *function->kernel;
  const sim::Launch launch{{x, y, z}, {threads_x, threads_y, threads_z}, shared, parameters, extra};
  std::string reason;
  const auto arguments = sim::arguments_of(kernel, launch, reason);
  if (reason.empty() && shared > function->most)
    reason = "more shared memory than cuFuncSetAttribute has allowed";
  if (reason.empty() && stream->device != function->module->device)
    reason = "of another device than the stream";
  if (!reason.empty()) {
    world().reports.add(Finding::misuse, kernel.name + ": " + reason);
    return CUDA_ERROR_INVALID_VALUE;
  }
  Operation operation;
  operation.what = kernel.name;
  operation.look = [&kernel, arguments, x](std::vector<Range>& ranges) {
    return kernel.ranges(arguments->data(), x, [&ranges](uintptr_t begin, size_t nbytes, bool write) {
      ranges.push_back({begin, nbytes, write});
    });
  };
  operation.run = [&kernel, arguments, x, threads_x] { kernel.run(arguments->data(), x, threads_x); };
  return sim::submit(to, [operation] { return operation; });
}
