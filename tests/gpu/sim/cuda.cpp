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

// A module is whatever was registered under its entry points' names.
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
  return image == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  const auto lock = locked();
  *function = reinterpret_cast<CUfunction>(const_cast<sim::Kernel*>(sim::find_kernel(name)));
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, int32_t, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned blocks, unsigned, unsigned, unsigned threads,
                               unsigned, unsigned, unsigned, CUstream stream, void** parameters,
                               void** extra) {
  const auto lock = locked();
  const auto* kernel = reinterpret_cast<const sim::Kernel*>(function);
  Operation operation;
  operation.what = kernel->name;
  const auto arguments = sim::arguments_of(*kernel, parameters, extra);
  if (arguments == nullptr) return CUDA_ERROR_INVALID_VALUE;
  kernel->ranges(arguments->data(), [&operation](uintptr_t begin, size_t nbytes, bool write) {
    operation.ranges.push_back({begin, nbytes, write});
  });
  operation.run = [kernel, arguments, blocks, threads] { kernel->run(arguments->data(), blocks, threads); };
  return enqueue(stream, std::move(operation));
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

// For tests.
EXPORT void sim_reset(unsigned seed, int eager_percent, int threads) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  world().reset(seed, eager_percent, threads);
}
EXPORT void sim_register(const char* name, const size_t* sizes, int count,
                         void (*run)(const unsigned char*, unsigned, unsigned),
                         void (*ranges)(const unsigned char*, const sim::Touch&)) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  sim::register_kernel({name, {sizes, sizes + count}, run, ranges});
}
EXPORT int sim_finish() {
  const std::lock_guard<std::mutex> lock(world().mutex);
  return world().finish();
}
EXPORT const char* sim_report(int i) { return world().reports.lines()[static_cast<size_t>(i)].c_str(); }
