// libnccl's communicators and groups, as far as the engine calls them, on the simulated machine.
#include "nccl.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "arithmetic.h"

using namespace hybridcomm::gpu;
using sim::Comm;
using sim::communicators;
using sim::Finding;
using sim::locked;
using sim::misuse;
using sim::Part;
using sim::world;

namespace {

int made = 0;
int roots = 0;
int version = nccl_version(2, 18, 5);

struct Call {
  sim::Stream* stream;
  Part part;
};
// Calls of this thread between ncclGroupStart and ncclGroupEnd.
struct Group {
  int depth = 0;
  std::vector<Call> calls;
};
thread_local Group group;

// Calls of one communicator on one stream go together; communicators follow each other in the order of their first calls.
bool launch_now(std::vector<Call> calls) {
  bool sound = true;
  while (!calls.empty()) {
    sim::Stream* stream = calls.front().stream;
    const Comm* comm = calls.front().part.comm;
    std::vector<Part> together;
    std::vector<Call> others;
    for (const Call& each : calls) {
      if (each.stream == stream && each.part.comm == comm) {
        together.push_back(each.part);
      } else {
        others.push_back(each);
      }
    }
    sound &= communicators().launch(*stream, together);
    calls.swap(others);
  }
  return sound;
}

ncclResult_t launch(const std::vector<Call>& calls) {
  const bool blocking =
      std::all_of(calls.begin(), calls.end(), [](const Call& each) { return each.part.comm->blocking; });
  const int polls = world().coin(50) ? 0 : world().coin(50) ? 1 : 2;
  if (blocking || polls == 0) return launch_now(calls) ? ncclSuccess : ncclUnhandledCudaError;
  const auto job = std::make_shared<sim::Job>();
  job->polls = polls;
  job->over = [] { return true; };
  job->then = [calls] {
    if (launch_now(calls)) return;
    for (const Call& each : calls) each.part.comm->failure = ncclUnhandledCudaError;
  };
  for (const Call& each : calls) each.part.comm->job = job;
  return ncclInProgress;
}

ncclResult_t joined(std::unique_lock<std::mutex>& lock, const char* what, Comm* comm) {
  if (!comm->blocking) return comm->ready() && world().coin(50) ? ncclSuccess : ncclInProgress;
  return sim::wait_for(lock, what, [comm] { return comm->ready(); });
}

// NCCL_CTA_POLICY_* of a configuration, whose field came with 2.27 and is read by its version; -1: this NCCL refuses it.
int policy_of(const ncclConfig_t* config) {
  if (config == nullptr || config->version < static_cast<unsigned>(nccl_version(2, 27, 0))) return 0;
  if (config->CTAPolicy == kNcclUndefined) return 0;
  const int most = version >= kNcclCtaPolicyZeroSince ? kNcclCtaPolicyZero : 1;
  if (config->CTAPolicy >= 0 && config->CTAPolicy <= most) return config->CTAPolicy;
  misuse("a CTA policy that the version has not");
  return -1;
}

ncclResult_t initialise(const char* what, ncclComm_t* comm, int ranks, const std::string& id, int rank,
                        const ncclConfig_t* config) {
  auto lock = locked();
  if (rank < 0 || rank >= ranks || world().here().device < 0) return ncclInvalidArgument;
  if (sim::broken()) return ncclUnhandledCudaError;
  const auto clique = communicators().clique(id, ranks);
  if (clique->size != ranks) return misuse(std::string(what) + ": ranks say different sizes");
  const bool blocking = config == nullptr || config->blocking != 0;
  const int policy = policy_of(config);
  if (policy < 0) return ncclInvalidArgument;
  Comm* made_one = communicators().join(clique, rank, blocking, policy);
  *comm = reinterpret_cast<ncclComm_t>(made_one);
  return joined(lock, what, made_one);
}

// Whether the host has waited for all that was called on it.
bool at_rest(const Comm& comm) {
  const bool done = comm.last == nullptr || comm.last->known(world().here().host->clock);
  return comm.aborted || world().broken(comm.device) || (done && (comm.job == nullptr || comm.job->done));
}

}  // namespace

namespace sim {

ncclResult_t misuse(const std::string& what) {
  world().reports.add(Finding::misuse, what);
  return ncclInvalidUsage;
}

Comm* usable(ncclComm_t handle, ncclResult_t& why) {
  Comm* comm = communicators().find(handle);
  why = ncclSuccess;
  if (comm == nullptr) {
    why = ncclInvalidArgument;
  } else if (world().broken(comm->device)) {
    why = ncclUnhandledCudaError;
  } else if (comm->aborted) {
    why = misuse("a call on a communicator that was aborted");
  } else if (!comm->ready() || (comm->job != nullptr && !comm->job->done)) {
    why = misuse("a call on a communicator that is still in progress");
  } else if (comm->failure != ncclSuccess && comm->failure != ncclInvalidUsage) {
    why = comm->failure;
  }
  return why == ncclSuccess ? comm : nullptr;
}

ncclResult_t wait_for(std::unique_lock<std::mutex>& lock, const char* what,
                      const std::function<bool()>& over) {
  return world().wait(lock, what, over) ? ncclSuccess : ncclSystemError;
}

ncclResult_t act(std::unique_lock<std::mutex>& lock, Comm& comm, const char* what,
                 const std::function<bool()>& over, const std::function<void()>& then) {
  if (comm.blocking) {
    const ncclResult_t result = wait_for(lock, what, over);
    if (result == ncclSuccess) then();
    return result;
  }
  comm.job = std::make_shared<Job>();
  comm.job->polls = world().coin(50) ? 0 : 1;
  comm.job->over = over;
  comm.job->then = then;
  return ncclInProgress;
}

ncclResult_t call(CUstream handle, ncclComm_t comm_handle, Part part) {
  const auto lock = locked();
  ncclResult_t why;
  Comm* comm = usable(comm_handle, why);
  if (comm == nullptr) return why;
  if (size_of(part.type) == 0 || part.peer >= comm->clique->size) return ncclInvalidArgument;
  Stream* stream = world().stream(handle);
  if (stream == nullptr) return ncclInvalidArgument;
  if (stream->device != comm->device) return misuse("a stream of another device than the communicator's");
  part.comm = comm;
  part.rank = comm->rank;
  part.ranks = comm->clique->size;
  if (part.op > ncclAvg) {  // a reduction of its own, which NCCL holds against the call
    const auto own = static_cast<size_t>(part.op - (ncclAvg + 1));
    if (own >= comm->factors.size()) return misuse("a reduction that was not made on this communicator");
    if (comm->factor_types[own] != part.type) return misuse("a reduction that was made for another type");
    part.factor = comm->factors[own];
  }
  if (group.depth > 0) {
    group.calls.push_back({stream, part});
    return ncclSuccess;
  }
  return launch({{stream, part}});
}

bool has(int since, const char* name) {
  if (version >= since) return true;
  misuse(std::string(name) + ": the version that ncclGetVersion says has none");
  return false;
}

bool implicit_order() {
  const char* wanted = std::getenv("NCCL_LAUNCH_ORDER_IMPLICIT");
  return version >= nccl_version(2, 26, 2) && wanted != nullptr && std::strcmp(wanted, "1") == 0;
}

}  // namespace sim

EXPORT void sim_nccl_version(int says) {
  const auto lock = locked();
  version = says;
}
// How many of a device's communicators leave collectives to copy engines.
EXPORT int sim_by_copy_engines(int device) {
  const auto lock = locked();
  return communicators().by_copy_engines(device);
}
// Of the last ncclCommInitRankScalable.
EXPORT int sim_roots() {
  const auto lock = locked();
  return roots;
}
EXPORT ncclResult_t ncclGetVersion(int* says) {
  *says = version;
  return ncclSuccess;
}
EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  constexpr const char* kTexts[] = {"no error",
                                    "unhandled cuda error",
                                    "unhandled system error",
                                    "internal error",
                                    "invalid argument",
                                    "invalid usage",
                                    "remote process exited or there was a network error",
                                    "NCCL operation in progress"};
  return result >= ncclSuccess && result <= ncclInProgress ? kTexts[result] : "unknown result code";
}
EXPORT const char* ncclGetLastError(ncclComm_t) { return "simulated"; }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const auto lock = locked();
  std::memset(id, 0, sizeof(*id));
  std::snprintf(id->internal, sizeof(id->internal), "simulated %d of %d", ++made,
                static_cast<int>(::getpid()));
  return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t* config) {
  return initialise("ncclCommInitRankConfig", comm, ranks, id.internal, rank, config);
}
EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int count,
                                             ncclUniqueId* ids, ncclConfig_t* config) {
  std::set<std::string> found;
  std::string all;  // ranks that say other ids, or another order, do not meet
  {
    const auto lock = locked();
    if (!sim::has(nccl_version(2, 23, 4), "ncclCommInitRankScalable")) return ncclInvalidUsage;
    if (count < 1 || count > ranks) return ncclInvalidArgument;
    for (int i = 0; i < count; ++i) {
      const std::string id = ids[i].internal;
      all += (i == 0 ? "" : ", ") + id;
      if (id.rfind("simulated", 0) != 0)
        return misuse("ncclCommInitRankScalable: an id that nobody has made");
      if (!found.insert(id).second) return misuse("ncclCommInitRankScalable: an id twice");
    }
    roots = count;
  }
  return initialise("ncclCommInitRankScalable", comm, ranks, all, rank, config);
}

namespace {

// The handle is there when the parent's call has ended; the child may still be in progress then.
ncclResult_t make(std::unique_lock<std::mutex>& lock, const char* what, Comm& comm, long number,
                  size_t wanted, ncclComm_t* child, const ncclConfig_t* config) {
  *child = nullptr;
  const int policy = policy_of(config);
  if (policy < 0) return ncclInvalidArgument;
  const auto clique = comm.clique;
  const ncclResult_t result = sim::act(
      lock, comm, what,
      [clique, number, wanted, rank = comm.rank] {
        return communicators().wished(*clique, rank, number, wanted);
      },
      [&comm, number, child, policy] {
        *child = reinterpret_cast<ncclComm_t>(communicators().child(comm, number, policy));
      });
  if (result != ncclSuccess || *child == nullptr) return result;
  return joined(lock, what, reinterpret_cast<Comm*>(*child));
}

}  // namespace

// All ranks have said their colors when the last one comes.
EXPORT ncclResult_t ncclCommSplit(ncclComm_t handle, int color, int key, ncclComm_t* child,
                                  ncclConfig_t* config) {
  auto lock = locked();
  ncclResult_t why;
  Comm* comm = sim::usable(handle, why);
  if (comm == nullptr) return why;
  const auto wanted = static_cast<size_t>(comm->clique->size);
  const long number = communicators().wish(*comm, color, key, wanted);
  return make(lock, "ncclCommSplit", *comm, number, wanted, child, config);
}
EXPORT ncclResult_t ncclCommShrink(ncclComm_t handle, int* excluded, int count, ncclComm_t* child,
                                   ncclConfig_t* config, int flags) {
  auto lock = locked();
  if (!sim::has(nccl_version(2, 27, 3), "ncclCommShrink")) return ncclInvalidUsage;
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  if (std::find(excluded, excluded + count, comm->rank) != excluded + count)
    return misuse("ncclCommShrink without oneself");
  constexpr int kAbort = 1;
  if (flags == kAbort && !comm->aborted) communicators().abort(*comm);
  if (!comm->aborted && !at_rest(*comm)) return misuse("ncclCommShrink while operations are queued");
  const auto wanted = static_cast<size_t>(comm->clique->size - count);
  const long number = communicators().wish(*comm, 0, comm->rank, wanted);
  return make(lock, "ncclCommShrink", *comm, number, wanted, child, config);
}

EXPORT ncclResult_t ncclCommFinalize(ncclComm_t handle) {
  auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  if (!at_rest(*comm))
    return misuse("ncclCommFinalize while operations are queued that nobody has waited for");
  return sim::act(lock, *comm, "ncclCommFinalize", [] { return true; }, [] {});
}
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  if (!at_rest(*comm)) misuse("ncclCommDestroy while operations are queued that nobody has waited for");
  comm->live = false;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  communicators().abort(*comm);
  comm->live = false;
  return world().broken(comm->device) ? ncclUnhandledCudaError : ncclSuccess;
}
// As ncclCommAbort, but what is left can be shrunk.
EXPORT ncclResult_t ncclCommRevoke(ncclComm_t handle, int) {
  const auto lock = locked();
  if (!sim::has(nccl_version(2, 29, 2), "ncclCommRevoke")) return ncclInvalidUsage;
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  communicators().abort(*comm);
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* result) {
  auto lock = locked();
  Comm* comm = communicators().find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  const bool patient = world().poll(lock);
  *result = communicators().state(*comm);
  if (!patient && *result == ncclInProgress) *result = ncclInternalError;
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
  std::vector<Call> calls;
  calls.swap(group.calls);
  return calls.empty() ? ncclSuccess : launch(calls);
}
