// libcuda's functions, as far as the engine calls them, on the simulated machine.
#include <cstring>

#include "gpu_cuda_abi.h"
#include "kernels.h"
#include "world.h"

using namespace hybridcomm::gpu;
using sim::Finding;
using sim::Operation;
using sim::Range;
using sim::world;

namespace {

std::unique_lock<std::mutex> locked() {
  std::unique_lock<std::mutex> lock(world().mutex);
  world().here();
  return lock;
}

bool on_a_device() { return world().here().device >= 0; }

uintptr_t address(CUdeviceptr pointer) { return static_cast<uintptr_t>(pointer); }

CUresult enqueue(CUstream handle, Operation operation) {
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  sim::Stream* stream = world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  world().enqueue(*stream, std::move(operation));
  return CUDA_SUCCESS;
}

// What the host has waited for, it knows.
CUresult wait_for(std::unique_lock<std::mutex>& lock, const char* call,
                  const std::shared_ptr<sim::Record>& record) {
  if (record == nullptr) return CUDA_SUCCESS;
  if (!world().wait(lock, call, [&record] { return record->done; })) return CUDA_ERROR_LAUNCH_FAILED;
  world().here().clock.join(record->clock);
  return CUDA_SUCCESS;
}

CUresult query(const std::shared_ptr<sim::Record>& record) {
  if (record == nullptr) return CUDA_SUCCESS;
  if (!record->done) world().step();
  if (!record->done) return CUDA_ERROR_NOT_READY;
  world().here().clock.join(record->clock);
  return CUDA_SUCCESS;
}

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

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 12080;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = result == CUDA_SUCCESS ? "CUDA_SUCCESS" : "a simulated error";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int* count) {
  const auto lock = locked();
  *count = world().devices;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  const auto lock = locked();
  *device = ordinal;
  return ordinal >= 0 && ordinal < world().devices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, int32_t attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
  return CUDA_SUCCESS;
}

// A context is its device; 0 is none.
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const auto lock = locked();
  if (device < 0 || device >= world().devices) return CUDA_ERROR_INVALID_DEVICE;
  *context = reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device) + 1);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  const auto lock = locked();
  *context = reinterpret_cast<CUcontext>(static_cast<uintptr_t>(world().here().device + 1));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  const auto lock = locked();
  world().here().device = static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  const auto lock = locked();
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  *stream = reinterpret_cast<CUstream>(
      world().make_stream(world().here().device, (flags & CU_STREAM_NON_BLOCKING) == 0));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
  const auto lock = locked();
  sim::Stream* stream = handle == nullptr ? nullptr : world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  world().destroy(*stream);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamQuery(CUstream handle) {
  const auto lock = locked();
  sim::Stream* stream = world().stream(handle);
  return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : query(stream->last);
}
EXPORT CUresult cuStreamSynchronize(CUstream handle) {
  auto lock = locked();
  sim::Stream* stream = world().stream(handle);
  return stream == nullptr ? CUDA_ERROR_INVALID_HANDLE : wait_for(lock, "cuStreamSynchronize", stream->last);
}
EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent waited, unsigned) {
  const auto lock = locked();
  sim::Event* event = world().event(waited);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->record == nullptr) {
    world().reports.add(Finding::never_recorded, "cuStreamWaitEvent");
    return CUDA_SUCCESS;
  }
  Operation operation;
  operation.what = "cuStreamWaitEvent";
  operation.waits.push_back(event->record);
  return enqueue(handle, std::move(operation));
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned) {
  const auto lock = locked();
  *event = reinterpret_cast<CUevent>(world().make_event());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
  const auto lock = locked();
  sim::Event* event = world().event(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  event->live = false;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecord(CUevent handle, CUstream stream) {
  const auto lock = locked();
  sim::Event* event = world().event(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  Operation operation;
  operation.what = "cuEventRecord";
  operation.record = std::make_shared<sim::Record>();
  event->record = operation.record;
  return enqueue(stream, std::move(operation));
}
EXPORT CUresult cuEventQuery(CUevent handle) {
  const auto lock = locked();
  sim::Event* event = world().event(handle);
  return event == nullptr ? CUDA_ERROR_INVALID_HANDLE : query(event->record);
}
EXPORT CUresult cuEventSynchronize(CUevent handle) {
  auto lock = locked();
  sim::Event* event = world().event(handle);
  return event == nullptr ? CUDA_ERROR_INVALID_HANDLE : wait_for(lock, "cuEventSynchronize", event->record);
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t nbytes) {
  const auto lock = locked();
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  if (nbytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *pointer = world().memory.allocate(nbytes, world().here().device);
  return CUDA_SUCCESS;
}
// CUDA's may wait for the device, this one does not: what relies on that wait is a bug on a pool of memory.
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  const auto lock = locked();
  return world().memory.release(address(pointer), world().here().clock) ? CUDA_SUCCESS
                                                                        : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuMemHostAlloc(void** pointer, size_t nbytes, unsigned) {
  *pointer = std::malloc(nbytes);
  return *pointer == nullptr ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
EXPORT CUresult cuMemFreeHost(void* pointer) {
  std::free(pointer);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  Operation operation;
  operation.what = "cuMemcpyHtoDAsync";
  operation.ranges.push_back({address(to), nbytes, true});
  operation.run = [=] { std::memcpy(reinterpret_cast<void*>(address(to)), from, nbytes); };
  return enqueue(stream, std::move(operation));
}
// The target is poisoned at once, so that a host that reads before the copy has run sees no old value that may be right.
EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  std::memset(to, sim::kPoison, nbytes);
  Operation operation;
  operation.what = "cuMemcpyDtoHAsync";
  operation.ranges.push_back({address(from), nbytes, false});
  operation.run = [=] { std::memcpy(to, reinterpret_cast<const void*>(address(from)), nbytes); };
  return enqueue(stream, std::move(operation));
}
EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  Operation operation;
  operation.what = "cuMemcpyDtoDAsync";
  operation.ranges = {{address(from), nbytes, false}, {address(to), nbytes, true}};
  operation.run = [=] {
    std::memmove(reinterpret_cast<void*>(address(to)), reinterpret_cast<const void*>(address(from)), nbytes);
  };
  return enqueue(stream, std::move(operation));
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t nbytes, CUstream stream) {
  const auto lock = locked();
  Operation operation;
  operation.what = "cuMemsetD8Async";
  operation.ranges.push_back({address(to), nbytes, true});
  operation.run = [=] { std::memset(reinterpret_cast<void*>(address(to)), value, nbytes); };
  return enqueue(stream, std::move(operation));
}

// A module belongs to the context that loaded it.
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const auto lock = locked();
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  const sim::Image* found = image == nullptr ? nullptr : sim::find_image(image);
  if (found == nullptr) return CUDA_ERROR_INVALID_IMAGE;
  modules().push_back({found, world().here().device, true, {}});
  *module = reinterpret_cast<CUmodule>(&modules().back());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule handle) {
  const auto lock = locked();
  Module* module = module_of(handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  module->live = false;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* symbol) {
  const auto lock = locked();
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
  const Function* function = function_of(handle);
  sim::Stream* stream = on_a_device() ? world().stream(to) : nullptr;
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
  world().enqueue(*stream, std::move(operation));
  return CUDA_SUCCESS;
}

// Capture comes with what captures: none of it is called yet.
EXPORT CUresult cuStreamIsCapturing(CUstream, int32_t* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamBeginCapture_v2(CUstream, int32_t) { return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
EXPORT CUresult cuStreamEndCapture(CUstream, CUgraph*) { return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec*, CUgraph, unsigned long long) {
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec, CUstream) { return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
EXPORT CUresult cuGraphDestroy(CUgraph) { return CUDA_SUCCESS; }
EXPORT CUresult cuGraphExecDestroy(CUgraphExec) { return CUDA_SUCCESS; }
