// libnccl's collectives, messages and registrations, on the simulated machine.
#include <cstring>
#include <iterator>
#include <list>
#include <map>

#include "arithmetic.h"
#include "nccl.h"

using namespace hybridcomm::gpu;
using sim::Comm;
using sim::communicators;
using sim::Finding;
using sim::Kind;
using sim::locked;
using sim::misuse;
using sim::world;

namespace {

ncclResult_t call(Kind kind, const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                  int peer, ncclComm_t comm, CUstream stream) {
  return sim::call(stream, comm,
                   {kind, nullptr, static_cast<const unsigned char*>(from), static_cast<unsigned char*>(to),
                    count, type, op, peer});
}

// Memory that a communicator knows; NCCL asks that it is forgotten before it is freed.
struct Registration {
  const Comm* comm;
  uintptr_t begin;
  size_t nbytes;
  bool window;
  bool live = true;
};
std::list<Registration>& registrations() {
  static auto* const all = [] {
    auto* made = new std::list<Registration>;
    world().also_reset.push_back([made] { made->clear(); });
    world().also_finish.push_back([made] {
      size_t left = 0;
      for (const Registration& each : *made) {  // an abort lets go of all that its communicator knows
        left += each.live && !each.comm->aborted && !world().broken(each.comm->device);
      }
      if (left != 0) world().reports.add(Finding::leak, std::to_string(left) + " registered buffers");
    });
    return made;
  }();
  return *all;
}

// What ncclMemAlloc has given and not got back: address -> bytes.
std::map<uintptr_t, size_t>& own_memory() {
  static auto* const all = [] {
    auto* made = new std::map<uintptr_t, size_t>;
    world().also_reset.push_back([made] { made->clear(); });
    return made;
  }();
  return *all;
}

bool symmetric = true;  // whether communicators have windows at all

void* registered(const Comm& comm, void* buffer, size_t nbytes, bool window) {
  const auto begin = reinterpret_cast<uintptr_t>(buffer);
  if (!world().memory.readable(begin, nbytes)) {
    world().reports.add(Finding::stranger, "a buffer to register that is no device memory");
    return nullptr;
  }
  const auto block = own_memory().upper_bound(begin);
  const bool ours =
      block != own_memory().begin() && begin + nbytes <= std::prev(block)->first + std::prev(block)->second;
  if (window && !ours) {
    misuse("a window of memory that is not ncclMemAlloc's");
    return nullptr;
  }
  registrations().push_back({&comm, begin, nbytes, window});
  return &registrations().back();
}

ncclResult_t forget(const Comm& comm, const void* handle, bool window) {
  for (Registration& each : registrations()) {
    if (&each != handle || !each.live || each.comm != &comm || each.window != window) continue;
    each.live = false;
    if (!world().memory.readable(each.begin, each.nbytes)) {
      world().reports.add(Finding::freed, "a registered buffer was freed before it was deregistered");
    }
    return ncclSuccess;
  }
  world().reports.add(Finding::stranger, "a registration that is none");
  return ncclInvalidArgument;
}

}  // namespace

long sim::in_window(const Comm& comm, const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const Registration& each : registrations()) {
    if (!each.live || !each.window || each.comm != &comm) continue;
    if (at >= each.begin && at < each.begin + each.nbytes) return static_cast<long>(at - each.begin);
  }
  return -1;
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
  } else if (type == ncclFloat16) {
    _Float16 value;
    std::memcpy(&value, scalar, sizeof(value));
    factor = static_cast<double>(value);
  } else if (type == ncclBfloat16) {
    uint16_t upper;
    std::memcpy(&upper, scalar, sizeof(upper));
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    factor = static_cast<double>(value);
  } else if (sim::size_of(type) == 1) {
    factor = static_cast<double>(*static_cast<const int8_t*>(scalar));
  } else if (sim::size_of(type) == 4) {
    int32_t value;
    std::memcpy(&value, scalar, sizeof(value));
    factor = static_cast<double>(value);
  } else if (sim::size_of(type) == 8) {
    int64_t value;
    std::memcpy(&value, scalar, sizeof(value));
    factor = static_cast<double>(value);
  } else {
    return ncclInvalidArgument;
  }
  comm->factors.push_back(factor);
  comm->factor_types.push_back(type);
  *op = ncclAvg + static_cast<int>(comm->factors.size());
  return ncclSuccess;
}
EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  const auto own = static_cast<size_t>(op - (ncclAvg + 1));
  if (comm == nullptr || op <= ncclAvg || own >= comm->factors.size()) return ncclInvalidArgument;
  comm->factor_types[own] = -1;  // no call's
  return ncclSuccess;
}
EXPORT ncclResult_t ncclAlltoAll(const void* from, void* to, size_t count, ncclDataType_t type,
                                 ncclComm_t comm, CUstream stream) {
  {
    const auto lock = locked();
    if (!sim::has(nccl_version(2, 28, 3), "ncclAlltoAll")) return ncclInvalidUsage;
  }
  return call(Kind::all_to_all, from, to, count, type, ncclSum, -1, comm, stream);
}

EXPORT ncclResult_t ncclMemAlloc(void** pointer, size_t nbytes) {
  const auto lock = locked();
  if (!sim::has(nccl_version(2, 19, 1), "ncclMemAlloc")) return ncclInvalidUsage;
  if (!sim::on_a_device() || sim::broken()) return ncclUnhandledCudaError;
  const uintptr_t begin = world().memory.allocate(nbytes, world().here().device);
  own_memory()[begin] = nbytes;
  *pointer = reinterpret_cast<void*>(begin);
  return ncclSuccess;
}
EXPORT ncclResult_t ncclMemFree(void* pointer) {
  const auto lock = locked();
  if (!sim::has(nccl_version(2, 19, 1), "ncclMemFree")) return ncclInvalidUsage;
  if (sim::broken()) return ncclUnhandledCudaError;
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  own_memory().erase(begin);
  return world().memory.release(begin, world().here().host->clock) ? ncclSuccess : ncclInvalidArgument;
}
EXPORT ncclResult_t ncclCommRegister(const ncclComm_t handle, void* buffer, size_t nbytes, void** to) {
  const auto lock = locked();
  if (!sim::has(nccl_version(2, 19, 1), "ncclCommRegister")) return ncclInvalidUsage;
  const Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *to = registered(*comm, buffer, nbytes, false);
  return *to == nullptr ? ncclInvalidArgument : ncclSuccess;
}
EXPORT ncclResult_t ncclCommDeregister(const ncclComm_t handle, void* registration) {
  const auto lock = locked();
  const Comm* comm = communicators().find(handle);
  return comm == nullptr ? ncclInvalidArgument : forget(*comm, registration, false);
}
EXPORT void sim_symmetric(int yes) {
  const auto lock = locked();
  symmetric = yes != 0;
}
// All ranks register together, and the same number of bytes by the same flags. The handle is there when all have.
EXPORT ncclResult_t ncclCommWindowRegister(ncclComm_t handle, void* buffer, size_t nbytes,
                                           ncclWindow_t* window, int flags) {
  auto lock = locked();
  if (!sim::has(nccl_version(2, 27, 3), "ncclCommWindowRegister")) return ncclInvalidUsage;
  ncclResult_t why;
  Comm* comm = sim::usable(handle, why);
  if (comm == nullptr) return why;
  *window = nullptr;
  if (!symmetric) return ncclSuccess;
  const auto made = static_cast<ncclWindow_t>(registered(*comm, buffer, nbytes, true));
  if (made == nullptr) return ncclInvalidArgument;
  const auto clique = comm->clique;
  const auto wanted = static_cast<size_t>(clique->size);
  const long number = communicators().wish(*comm, static_cast<int>(nbytes), flags, wanted);
  const auto all = [clique, number, wanted, rank = comm->rank] {
    return communicators().wished(*clique, rank, number, wanted);
  };
  return sim::act(lock, *comm, "ncclCommWindowRegister", all, [clique, number, made, window] {
    *window = made;
    for (const auto& [rank, wish] : clique->wishes[number]) {
      if (wish != clique->wishes[number].begin()->second) {
        world().reports.add(Finding::mismatch, "ncclCommWindowRegister of different sizes or flags");
      }
    }
  });
}
EXPORT ncclResult_t ncclCommWindowDeregister(ncclComm_t handle, ncclWindow_t window) {
  const auto lock = locked();
  const Comm* comm = communicators().find(handle);
  return comm == nullptr ? ncclInvalidArgument : forget(*comm, window, true);
}
