// The CUDA driver API as far as the engine calls it, in declarations of our own: no header of NVIDIA's is needed to build.
//
// The driver exports versioned symbols for good, so a table of (symbol, signature) is an ABI. tests/gpu holds it against
// the vendor's headers of CUDA 12 and 13.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridcomm::gpu {

struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
struct CUmod_st;
struct CUfunc_st;
struct CUgraph_st;
struct CUgraphExec_st;

using CUcontext = CUctx_st*;
using CUstream = CUstream_st*;
using CUevent = CUevent_st*;
using CUmodule = CUmod_st*;
using CUfunction = CUfunc_st*;
using CUgraph = CUgraph_st*;
using CUgraphExec = CUgraphExec_st*;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUresult = int32_t;  // enums of C, which the ABI passes as int

enum : int32_t {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_DEINITIALIZED = 4,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_IMAGE = 200,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
  CUDA_ERROR_ECC_UNCORRECTABLE = 214,
  CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_ILLEGAL_STATE = 401,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_LAUNCH_TIMEOUT = 702,
  CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
  CUDA_ERROR_ASSERT = 710,
  CUDA_ERROR_HARDWARE_STACK_ERROR = 714,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
  CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
  CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
  CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
  CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_CAPTURED_EVENT = 907,
  CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
};
enum : unsigned { CU_STREAM_NON_BLOCKING = 1, CU_EVENT_DISABLE_TIMING = 2 };
enum : int32_t {
  CU_STREAM_CAPTURE_MODE_GLOBAL = 0,
  CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
  CU_STREAM_CAPTURE_STATUS_NONE = 0,
  CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
  CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
};

}  // namespace hybridcomm::gpu

// X(symbol, result, arguments): all of them are in every driver of CUDA 12 and later.
#define CUDA_CALLS(X)                                                                                    \
  X(cuInit, CUresult, (unsigned))                                                                        \
  X(cuDriverGetVersion, CUresult, (int*))                                                                \
  X(cuGetErrorName, CUresult, (CUresult, const char**))                                                  \
  X(cuGetErrorString, CUresult, (CUresult, const char**))                                                \
  X(cuDeviceGetCount, CUresult, (int*))                                                                  \
  X(cuDeviceGet, CUresult, (CUdevice*, int))                                                             \
  X(cuDeviceGetAttribute, CUresult, (int*, int32_t, CUdevice))                                           \
  X(cuDevicePrimaryCtxRetain, CUresult, (CUcontext*, CUdevice))                                          \
  X(cuDevicePrimaryCtxRelease_v2, CUresult, (CUdevice))                                                  \
  X(cuCtxGetCurrent, CUresult, (CUcontext*))                                                             \
  X(cuCtxSetCurrent, CUresult, (CUcontext))                                                              \
  X(cuStreamCreateWithPriority, CUresult, (CUstream*, unsigned, int))                                    \
  X(cuStreamDestroy_v2, CUresult, (CUstream))                                                            \
  X(cuStreamQuery, CUresult, (CUstream))                                                                 \
  X(cuStreamSynchronize, CUresult, (CUstream))                                                           \
  X(cuStreamWaitEvent, CUresult, (CUstream, CUevent, unsigned))                                          \
  X(cuStreamIsCapturing, CUresult, (CUstream, int32_t*))                                                 \
  X(cuStreamBeginCapture_v2, CUresult, (CUstream, int32_t))                                              \
  X(cuStreamEndCapture, CUresult, (CUstream, CUgraph*))                                                  \
  X(cuGraphInstantiateWithFlags, CUresult, (CUgraphExec*, CUgraph, unsigned long long))                  \
  X(cuGraphLaunch, CUresult, (CUgraphExec, CUstream))                                                    \
  X(cuGraphDestroy, CUresult, (CUgraph))                                                                 \
  X(cuGraphExecDestroy, CUresult, (CUgraphExec))                                                         \
  X(cuEventCreate, CUresult, (CUevent*, unsigned))                                                       \
  X(cuEventDestroy_v2, CUresult, (CUevent))                                                              \
  X(cuEventRecord, CUresult, (CUevent, CUstream))                                                        \
  X(cuEventQuery, CUresult, (CUevent))                                                                   \
  X(cuEventSynchronize, CUresult, (CUevent))                                                             \
  X(cuMemAlloc_v2, CUresult, (CUdeviceptr*, size_t))                                                     \
  X(cuMemFree_v2, CUresult, (CUdeviceptr))                                                               \
  X(cuMemHostAlloc, CUresult, (void**, size_t, unsigned))                                                \
  X(cuMemFreeHost, CUresult, (void*))                                                                    \
  X(cuMemcpyHtoDAsync_v2, CUresult, (CUdeviceptr, const void*, size_t, CUstream))                        \
  X(cuMemcpyDtoHAsync_v2, CUresult, (void*, CUdeviceptr, size_t, CUstream))                              \
  X(cuMemcpyDtoDAsync_v2, CUresult, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                        \
  X(cuMemsetD8Async, CUresult, (CUdeviceptr, unsigned char, size_t, CUstream))                           \
  X(cuModuleLoadData, CUresult, (CUmodule*, const void*))                                                \
  X(cuModuleUnload, CUresult, (CUmodule))                                                                \
  X(cuModuleGetFunction, CUresult, (CUfunction*, CUmodule, const char*))                                 \
  X(cuFuncSetAttribute, CUresult, (CUfunction, int32_t, int))                                            \
  X(cuLaunchKernel, CUresult,                                                                            \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, \
     void**))
