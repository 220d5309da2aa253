// libcuda's devices, contexts, streams and events, as far as the engine calls them, on the simulated machine.
#include "calls.h"
#include "graphs.h"

using namespace hybridcomm::gpu;
using sim::broken;
using sim::graphs;
using sim::locked;
using sim::on_a_device;
using sim::world;

namespace {

// What the host has waited for, it knows.
CUresult wait_for(std::unique_lock<std::mutex>& lock, const char* call,
                  const std::shared_ptr<sim::Record>& record) {
  if (record == nullptr) return CUDA_SUCCESS;
  const int device = world().here().device;  // others ask as well whether it is over
  const bool over =
      world().wait(lock, call, [&record, device] { return record->done || world().broken(device); });
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!over) return CUDA_ERROR_LAUNCH_FAILED;
  world().here().host->clock.join(record->clock);
  return CUDA_SUCCESS;
}

CUresult query(std::unique_lock<std::mutex>& lock, const std::shared_ptr<sim::Record>& record) {
  if (record == nullptr) return CUDA_SUCCESS;
  if (!record->done && !world().poll(lock)) return CUDA_ERROR_LAUNCH_FAILED;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!record->done) return CUDA_ERROR_NOT_READY;
  world().here().host->clock.join(record->clock);
  return CUDA_SUCCESS;
}

}  // namespace

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 12080;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult result, const char** name) {
#define NAME(each) \
  case each:       \
    *name = #each; \
    return CUDA_SUCCESS;
  switch (result) {
    NAME(CUDA_SUCCESS)
    NAME(CUDA_ERROR_INVALID_VALUE)
    NAME(CUDA_ERROR_OUT_OF_MEMORY)
    NAME(CUDA_ERROR_INVALID_DEVICE)
    NAME(CUDA_ERROR_INVALID_IMAGE)
    NAME(CUDA_ERROR_INVALID_CONTEXT)
    NAME(CUDA_ERROR_INVALID_HANDLE)
    NAME(CUDA_ERROR_ILLEGAL_STATE)
    NAME(CUDA_ERROR_NOT_FOUND)
    NAME(CUDA_ERROR_NOT_READY)
    NAME(CUDA_ERROR_ILLEGAL_ADDRESS)
    NAME(CUDA_ERROR_LAUNCH_FAILED)
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
    NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
    NAME(CUDA_ERROR_STREAM_CAPTURE_MERGE)
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED)
    NAME(CUDA_ERROR_STREAM_CAPTURE_UNJOINED)
    NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
    NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
    NAME(CUDA_ERROR_CAPTURED_EVENT)
    NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)
    default:
      *name = nullptr;
      return CUDA_ERROR_INVALID_VALUE;
  }
#undef NAME
}
EXPORT CUresult cuGetErrorString(CUresult result, const char** text) {
  *text = result == CUDA_ERROR_OUT_OF_MEMORY     ? "out of memory"
          : result == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
                                                 : nullptr;
  return *text == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
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
  world().use(static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  const auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  *stream = reinterpret_cast<CUstream>(
      world().make_stream(world().here().device, (flags & CU_STREAM_NON_BLOCKING) == 0));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Stream* stream = handle == nullptr ? nullptr : world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr) graphs().spoil(*stream->capture, CUDA_SUCCESS);
  world().destroy(*stream);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamQuery(CUstream handle) {
  auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Stream* stream = world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr)
    return graphs().spoil(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  return query(lock, stream->last);
}
EXPORT CUresult cuStreamSynchronize(CUstream handle) {
  auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Stream* stream = world().stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr)
    return graphs().spoil(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  return wait_for(lock, "cuStreamSynchronize", stream->last);
}
EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent waited, unsigned) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  sim::Event* event = world().event(waited);
  sim::Stream* stream = world().stream(handle);
  if (event == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return graphs().wait(*stream, *event);
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  *event = reinterpret_cast<CUevent>(world().make_event());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventDestroy_v2(CUevent handle) {
  const auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Event* event = world().event(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  event->live = false;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecord(CUevent handle, CUstream to) {
  const auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (!on_a_device()) return CUDA_ERROR_INVALID_CONTEXT;
  sim::Event* event = world().event(handle);
  sim::Stream* stream = world().stream(to);
  if (event == nullptr || stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return graphs().record(*stream, *event);
}
EXPORT CUresult cuEventQuery(CUevent handle) {
  auto lock = locked();
  if (const CUresult planted = sim::planted(__func__)) return planted;
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Event* event = world().event(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture != nullptr) return graphs().spoil(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
  if (const CUresult refused = graphs().unsafe(); refused != CUDA_SUCCESS) return refused;
  return query(lock, event->record);
}
EXPORT CUresult cuEventSynchronize(CUevent handle) {
  auto lock = locked();
  if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
  sim::Event* event = world().event(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture != nullptr) return graphs().spoil(*event->capture, CUDA_ERROR_CAPTURED_EVENT);
  return wait_for(lock, "cuEventSynchronize", event->record);
}
