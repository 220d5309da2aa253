// NCCL's C ABI as far as the engine calls it, from 2.18 on, in declarations of our own; see cuda_abi.h.
//
// A symbol keeps its signature once it is there. The configuration only grows at its end, and a library reads of it no
// more than it knows (parseCommConfig in NCCL's init.cc), so the longest layout serves all. tests/gpu holds both against
// the vendor's headers of many versions.
#pragma once

#include <climits>

#include "gpu_cuda_abi.h"

namespace hybridcomm::gpu {

struct NcclComm;
struct NcclWindow;

using ncclComm_t = NcclComm*;
using ncclWindow_t = NcclWindow*;
using ncclResult_t = int32_t;
using ncclDataType_t = int32_t;
using ncclRedOp_t = int32_t;
using ncclScalarResidence_t = int32_t;

struct ncclUniqueId {
  char internal[128];
};

// As ncclGetVersion says it.
constexpr int nccl_version(int major, int minor, int patch) { return major * 10000 + minor * 100 + patch; }
constexpr int kOldestNccl = nccl_version(2, 18, 1);

enum : int32_t {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
};
enum : int32_t {
  ncclInt8 = 0,
  ncclUint8 = 1,
  ncclInt32 = 2,
  ncclUint32 = 3,
  ncclInt64 = 4,
  ncclUint64 = 5,
  ncclFloat16 = 6,
  ncclFloat32 = 7,
  ncclFloat64 = 8,
  ncclBfloat16 = 9,
};
enum : int32_t { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 };
enum : int32_t { ncclScalarDevice = 0, ncclScalarHostImmediate = 1 };
constexpr int kNcclUndefined = INT_MIN;
constexpr unsigned kNcclMagic = 0xcafebeef;
constexpr int kNcclNoColor = -1;
constexpr int kNcclCtaPolicyZero = 2;
constexpr int kNcclCtaPolicyZeroSince = nccl_version(2, 28, 3);
constexpr int kNcclWindowSymmetric = 1;  // from 2.27 on

// Fields are followed by the version that brought them.
struct ncclConfig_t {
  size_t size = sizeof(ncclConfig_t);
  unsigned magic = kNcclMagic;
  unsigned version = kOldestNccl;
  int blocking = kNcclUndefined;
  int cgaClusterSize = kNcclUndefined;
  int minCTAs = kNcclUndefined;
  int maxCTAs = kNcclUndefined;
  const char* netName = nullptr;
  int splitShare = kNcclUndefined;
  int trafficClass = kNcclUndefined;   // 2.26
  const char* commName = nullptr;      // 2.27
  int collnetEnable = kNcclUndefined;  // 2.27
  int CTAPolicy = kNcclUndefined;      // 2.27
  int shrinkShare = kNcclUndefined;    // 2.27
  int nvlsCTAs = kNcclUndefined;       // 2.27
};

}  // namespace hybridcomm::gpu

// X(symbol, result, arguments), from 2.18 on.
#define NCCL_CALLS(X)                                                                                     \
  X(ncclGetVersion, ncclResult_t, (int*))                                                                 \
  X(ncclGetUniqueId, ncclResult_t, (ncclUniqueId*))                                                       \
  X(ncclGetErrorString, const char*, (ncclResult_t))                                                      \
  X(ncclGetLastError, const char*, (ncclComm_t))                                                          \
  X(ncclCommInitRankConfig, ncclResult_t, (ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*))           \
  X(ncclCommSplit, ncclResult_t, (ncclComm_t, int, int, ncclComm_t*, ncclConfig_t*))                      \
  X(ncclCommFinalize, ncclResult_t, (ncclComm_t))                                                         \
  X(ncclCommDestroy, ncclResult_t, (ncclComm_t))                                                          \
  X(ncclCommAbort, ncclResult_t, (ncclComm_t))                                                            \
  X(ncclCommGetAsyncError, ncclResult_t, (ncclComm_t, ncclResult_t*))                                     \
  X(ncclCommCount, ncclResult_t, (const ncclComm_t, int*))                                                \
  X(ncclCommUserRank, ncclResult_t, (const ncclComm_t, int*))                                             \
  X(ncclGroupStart, ncclResult_t, ())                                                                     \
  X(ncclGroupEnd, ncclResult_t, ())                                                                       \
  X(ncclAllReduce, ncclResult_t,                                                                          \
    (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, CUstream))                      \
  X(ncclReduce, ncclResult_t,                                                                             \
    (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, int, ncclComm_t, CUstream))                 \
  X(ncclReduceScatter, ncclResult_t,                                                                      \
    (const void*, void*, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, CUstream))                      \
  X(ncclAllGather, ncclResult_t, (const void*, void*, size_t, ncclDataType_t, ncclComm_t, CUstream))      \
  X(ncclBroadcast, ncclResult_t, (const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, CUstream)) \
  X(ncclSend, ncclResult_t, (const void*, size_t, ncclDataType_t, int, ncclComm_t, CUstream))             \
  X(ncclRecv, ncclResult_t, (void*, size_t, ncclDataType_t, int, ncclComm_t, CUstream))                   \
  X(ncclRedOpCreatePreMulSum, ncclResult_t,                                                               \
    (ncclRedOp_t*, void*, ncclDataType_t, ncclScalarResidence_t, ncclComm_t))                             \
  X(ncclRedOpDestroy, ncclResult_t, (ncclRedOp_t, ncclComm_t))

// X(symbol, result, arguments, version that brought it): null where the library that was found is older.
#define NCCL_NEWER_CALLS(X)                                                                             \
  X(ncclMemAlloc, ncclResult_t, (void**, size_t), nccl_version(2, 19, 1))                               \
  X(ncclMemFree, ncclResult_t, (void*), nccl_version(2, 19, 1))                                         \
  X(ncclCommRegister, ncclResult_t, (const ncclComm_t, void*, size_t, void**), nccl_version(2, 19, 1))  \
  X(ncclCommDeregister, ncclResult_t, (const ncclComm_t, void*), nccl_version(2, 19, 1))                \
  X(ncclCommInitRankScalable, ncclResult_t, (ncclComm_t*, int, int, int, ncclUniqueId*, ncclConfig_t*), \
    nccl_version(2, 23, 4))                                                                             \
  X(ncclCommWindowRegister, ncclResult_t, (ncclComm_t, void*, size_t, ncclWindow_t*, int),              \
    nccl_version(2, 27, 3))                                                                             \
  X(ncclCommWindowDeregister, ncclResult_t, (ncclComm_t, ncclWindow_t), nccl_version(2, 27, 3))         \
  X(ncclCommShrink, ncclResult_t, (ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int),             \
    nccl_version(2, 27, 3))                                                                             \
  X(ncclAlltoAll, ncclResult_t, (const void*, void*, size_t, ncclDataType_t, ncclComm_t, CUstream),     \
    nccl_version(2, 28, 3))                                                                             \
  X(ncclCommRevoke, ncclResult_t, (ncclComm_t, int), nccl_version(2, 29, 2))
