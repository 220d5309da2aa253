// A rank's NCCL communicators: made, divided, watched and aborted; all of them non-blocking, so that abort always works.
//
// Nothing here waits without a limit: what NCCL does in the background is polled (ncclCommGetAsyncError), and who aborts
// from another thread ends the wait.
#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "gpu_program.h"
#include "gpu_tables.h"

namespace hybridcomm::gpu {

// NCCL's group on this thread. One that is left by an exception is closed, since calls would gather in it for ever.
class NcclGroup {
 public:
  NcclGroup(const Nccl& nccl, bool wanted);
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  ncclResult_t end();  // success where none was wanted

 private:
  const Nccl& nccl_;
  bool open_;
};

class Comms {
 public:
  // `copy_engines`: they take the place of kernels where they can (windows), and leave the processors to who computes.
  // `interrupted` is called now and then in waits, and may throw. Raises Code::invalid: this NCCL is too old.
  Comms(const Nccl& nccl, double timeout_s, bool copy_engines, std::function<void()> interrupted);
  ~Comms();
  Comms(const Comms&) = delete;
  Comms& operator=(const Comms&) = delete;

  std::string unique_id() const;
  // Each returns the index of a communicator. Raises Code::bootstrap where the others do not come in time.
  // `unique_ids`: one, or several one behind the other, among whose makers NCCL shares the ranks out.
  int join(const std::string& unique_ids, int rank, int size);
  // Collective on `parent`; -1: this rank has no part in it (color kNcclNoColor).
  int split(int parent, int color, int key);

  ncclComm_t at(int comm) const { return comms_.at(static_cast<size_t>(comm)); }
  int count() const { return static_cast<int>(comms_.size()); }
  // The sum of inputs times 1 / divisor, or times this rank's own factor, for elements of `dtype`; made once.
  ncclRedOp_t mean_of(int comm, int32_t dtype, uint32_t divisor);
  ncclRedOp_t scaled_sum(int comm, int32_t dtype, double factor);
  // While none of them is about to be used: factors that change with every step must not gather for ever.
  void trim_reductions();

  // While this is held nobody aborts, so that calls may take communicators. Raises Code::aborted where that is over.
  std::unique_lock<std::mutex> hold() const;
  // Of a call under `hold`. Raises if it has failed.
  void check(int comm, ncclResult_t result, const char* call) const;
  // After a call that may return before it is done, without `hold`: until it is, or has failed.
  void settle(int comm, ncclResult_t result, const char* call);

  // What NCCL reports of itself in the background; null: all is well.
  std::exception_ptr async_error();
  // From any thread. What is stuck in a communicator comes back; they are of no more use.
  void abort();
  bool aborted() const { return aborted_; }
  // Says goodbye, once nothing is queued any more.
  void close();

  void* register_buffer(int comm, void* data, size_t nbytes);  // null: this NCCL cannot
  void deregister_buffer(int comm, void* handle);
  // As a symmetric window, of memory that is NCCL's own and as large on all ranks, which call it together. Null: this NCCL,
  // or this communicator, has none. Taking one back is a matter of this rank alone.
  ncclWindow_t register_window(int comm, void* data, size_t nbytes);
  void deregister_window(int comm, ncclWindow_t window);

 private:
  ncclConfig_t config() const;
  int add(ncclComm_t comm);
  std::string words(ncclComm_t comm, ncclResult_t result) const;
  // A peer's, CUDA's, NCCL's own, or else of that code.
  std::exception_ptr failure(ncclComm_t comm, ncclResult_t result, const char* call, Code otherwise) const;
  [[noreturn]] void fail(ncclComm_t comm, ncclResult_t result, const char* call) const;
  void settle(ncclComm_t comm, ncclResult_t result, const char* call);

  const Nccl& nccl_;
  double timeout_s_;
  bool copy_engines_;
  std::function<void()> interrupted_;
  mutable std::mutex mutex_;  // of the list, which the watchdog reads
  std::vector<ncclComm_t> comms_;
  std::vector<std::pair<int, void*>> registered_;  // (communicator, handle)
  // Likewise; a list, since NCCL writes a handle when a window is made, be that after an error here.
  std::list<std::pair<int, ncclWindow_t>> windows_;
  std::map<std::tuple<int, int32_t, uint64_t>, ncclRedOp_t> reductions_;
  std::atomic<bool> aborted_{false};
};

}  // namespace hybridcomm::gpu
