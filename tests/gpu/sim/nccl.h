// What the functions of the simulated NCCL share.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "calls.h"
#include "communicators.h"

namespace sim {

hybridcomm::gpu::ncclResult_t misuse(const std::string& what);
// The communicator, if calls may be made on it now; else null, and why not.
Comm* usable(hybridcomm::gpu::ncclComm_t handle, hybridcomm::gpu::ncclResult_t& why);
hybridcomm::gpu::ncclResult_t wait_for(std::unique_lock<std::mutex>& lock, const char* what,
                                       const std::function<bool()>& over);
// Waits and then acts; or, where the communicator does not block, later.
hybridcomm::gpu::ncclResult_t act(std::unique_lock<std::mutex>& lock, Comm& comm, const char* what,
                                  const std::function<bool()>& over, const std::function<void()>& then);
// One call on a stream: now, or when the thread's group ends.
hybridcomm::gpu::ncclResult_t call(hybridcomm::gpu::CUstream stream, hybridcomm::gpu::ncclComm_t handle,
                                   Part part);
// Where an address lies in a window of the communicator; -1: in none.
long in_window(const Comm& comm, const void* address);
// Whether the version that is simulated has what came with `since`.
bool has(int since, const char* name);
// Whether operations of all communicators of a device run in the order of their calls.
bool implicit_order();

}  // namespace sim
