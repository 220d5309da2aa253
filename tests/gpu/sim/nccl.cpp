// libnccl's functions, as far as the engine calls them, on the simulated machine.
#include "gpu_nccl_abi.h"

#include <cstdio>
#include <cstring>

#include "arithmetic.h"
#include "communicators.h"

using namespace hybridcomm::gpu;
using sim::Comm;
using sim::communicators;
using sim::Finding;
using sim::Kind;
using sim::Part;
using sim::world;

namespace {

int made = 0;

// Calls of this thread between ncclGroupStart and ncclGroupEnd.
struct Group {
  int depth = 0;
  std::vector<std::pair<CUstream, Part>> parts;
};
thread_local Group group;

std::unique_lock<std::mutex> locked() {
  std::unique_lock<std::mutex> lock(world().mutex);
  communicators();
  world().here();
  return lock;
}

ncclResult_t misuse(const std::string& what) {
  world().reports.add(Finding::misuse, what);
  return ncclInvalidUsage;
}

// Calls are numbered when they are made, parts of one communicator on one stream go together.
ncclResult_t launch(std::vector<std::pair<CUstream, Part>> parts) {
  while (!parts.empty()) {
    const CUstream handle = parts.front().first;
    const Comm* comm = parts.front().second.comm;
    std::vector<Part> together;
    std::vector<std::pair<CUstream, Part>> others;
    for (auto& [stream, part] : parts) {
      if (stream == handle && part.comm == comm) {
        together.push_back(part);
      } else {
        others.emplace_back(stream, part);
      }
    }
    sim::Stream* stream = world().stream(handle);
    if (stream == nullptr) return ncclInvalidArgument;
    if (stream->device != comm->device) return misuse("a stream of another device than the communicator's");
    communicators().launch(*stream, std::move(together));
    parts.swap(others);
  }
  return ncclSuccess;
}

ncclResult_t call(Kind kind, const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                  int peer, ncclComm_t handle, CUstream stream) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr || sim::size_of(type) == 0) return ncclInvalidArgument;
  if (comm->aborted) return misuse("a call on a communicator that was aborted");
  if (!comm->ready()) return misuse("a call on a communicator that is still in progress");
  if (peer >= comm->clique->size) return ncclInvalidArgument;
  const bool message = kind == Kind::send || kind == Kind::receive;
  const long number = message ? comm->messages[{kind == Kind::send, peer}]++ : comm->calls++;
  const Part part{
      kind, comm,  static_cast<const unsigned char*>(from), static_cast<unsigned char*>(to), count, type, op,
      peer, number};
  if (group.depth > 0) {
    group.parts.emplace_back(stream, part);
    return ncclSuccess;
  }
  return launch({{stream, part}});
}

ncclResult_t wait_for(std::unique_lock<std::mutex>& lock, const char* what,
                      const std::function<bool()>& over) {
  return world().wait(lock, what, over) ? ncclSuccess : ncclSystemError;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT ncclResult_t ncclGetVersion(int* version) {
  *version = nccl_version(2, 18, 5);
  return ncclSuccess;
}
EXPORT const char* ncclGetErrorString(ncclResult_t) { return "a simulated error"; }
EXPORT const char* ncclGetLastError(ncclComm_t) { return "simulated"; }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const auto lock = locked();
  std::memset(id, 0, sizeof(*id));
  std::snprintf(id->internal, sizeof(id->internal), "simulated %d", ++made);
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t* config) {
  auto lock = locked();
  if (rank < 0 || rank >= ranks || world().here().device < 0) return ncclInvalidArgument;
  const auto clique = communicators().clique(id.internal, ranks);
  if (clique->size != ranks) return misuse("ncclCommInitRankConfig: ranks say different sizes");
  const bool blocking = config == nullptr || config->blocking != 0;
  Comm* joined = communicators().join(clique, rank, blocking);
  *comm = reinterpret_cast<ncclComm_t>(joined);
  if (!blocking) return joined->ready() ? ncclSuccess : ncclInProgress;
  return wait_for(lock, "ncclCommInitRankConfig", [joined] { return joined->ready(); });
}

// All ranks have said their colors when the last one comes; those of one color are ordered by key, then by rank.
EXPORT ncclResult_t ncclCommSplit(ncclComm_t handle, int color, int key, ncclComm_t* child, ncclConfig_t*) {
  auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  const auto clique = comm->clique;
  const long number = comm->splits++;
  auto& said = clique->splits[number];
  said[comm->rank] = {color, key};
  world().wake();
  const auto all = [&said, &clique] { return static_cast<int>(said.size()) == clique->size; };
  const ncclResult_t result = wait_for(lock, "ncclCommSplit", all);
  *child = nullptr;
  if (result != ncclSuccess || color == kNcclNoColor) return result;
  std::vector<std::pair<int, int>> members;  // (key, rank)
  for (const auto& [rank, wish] : said) {
    if (wish.first == color) members.emplace_back(wish.second, rank);
  }
  std::sort(members.begin(), members.end());
  auto& made_of = clique->children[{number, color}];
  if (made_of == nullptr) {
    made_of = std::make_shared<sim::Clique>();
    made_of->size = static_cast<int>(members.size());
  }
  const auto self = std::find(members.begin(), members.end(), std::pair(key, comm->rank));
  Comm* joined = communicators().join(made_of, static_cast<int>(self - members.begin()), comm->blocking);
  *child = reinterpret_cast<ncclComm_t>(joined);
  if (!joined->blocking) return joined->ready() ? ncclSuccess : ncclInProgress;
  return wait_for(lock, "ncclCommSplit", [joined] { return joined->ready(); });
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t handle) {
  const auto lock = locked();
  return communicators().find(handle) == nullptr ? ncclInvalidArgument : ncclSuccess;
}
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  comm->live = false;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  communicators().abort(*comm);
  comm->live = false;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* result) {
  const auto lock = locked();
  const Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *result = comm->failure != ncclSuccess ? comm->failure : comm->ready() ? ncclSuccess : ncclInProgress;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommCount(const ncclComm_t handle, int* count) {
  const auto lock = locked();
  const Comm* comm = communicators().find(handle);
  if (comm != nullptr) *count = comm->clique->size;
  return comm == nullptr ? ncclInvalidArgument : ncclSuccess;
}
EXPORT ncclResult_t ncclCommUserRank(const ncclComm_t handle, int* rank) {
  const auto lock = locked();
  const Comm* comm = communicators().find(handle);
  if (comm != nullptr) *rank = comm->rank;
  return comm == nullptr ? ncclInvalidArgument : ncclSuccess;
}

EXPORT ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclGroupEnd() {
  const auto lock = locked();
  if (group.depth == 0) return misuse("ncclGroupEnd without ncclGroupStart");
  if (--group.depth > 0) return ncclSuccess;
  std::vector<std::pair<CUstream, Part>> parts;
  parts.swap(group.parts);
  return launch(std::move(parts));
}

EXPORT ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, CUstream stream) {
  return call(Kind::all_reduce, from, to, count, type, op, -1, comm, stream);
}
EXPORT ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               int root, ncclComm_t comm, CUstream stream) {
  return call(Kind::reduce, from, to, count, type, op, root, comm, stream);
}
EXPORT ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t comm, CUstream stream) {
  return call(Kind::reduce_scatter, from, to, count, type, op, -1, comm, stream);
}
EXPORT ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, CUstream stream) {
  return call(Kind::all_gather, from, to, count, type, ncclSum, -1, comm, stream);
}
EXPORT ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                                  ncclComm_t comm, CUstream stream) {
  return call(Kind::broadcast, from, to, count, type, ncclSum, root, comm, stream);
}
EXPORT ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             CUstream stream) {
  return call(Kind::send, from, nullptr, count, type, ncclSum, peer, comm, stream);
}
EXPORT ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             CUstream stream) {
  return call(Kind::receive, nullptr, to, count, type, ncclSum, peer, comm, stream);
}

// The factor is read now, or (ncclScalarDevice) would be while a collective runs, which nothing of ours asks for.
EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type,
                                             ncclScalarResidence_t residence, ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr || residence != ncclScalarHostImmediate) return ncclInvalidArgument;
  double factor = 0;
  if (type == ncclFloat32) {
    float value;
    std::memcpy(&value, scalar, sizeof(value));
    factor = static_cast<double>(value);
  } else if (type == ncclFloat64) {
    std::memcpy(&factor, scalar, sizeof(factor));
  } else {
    return ncclInvalidArgument;
  }
  comm->factors.push_back(factor);
  *op = ncclAvg + static_cast<int>(comm->factors.size());
  return ncclSuccess;
}
EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }
