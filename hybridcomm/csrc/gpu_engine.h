// A rank's GPU: its streams and events, the programs that are issued on them, and a watchdog.
//
// One thread at a time issues, in one order for the device: NCCL's communicators must be used in the same order on all
// ranks, and a program's order is its plan's. A program has two halves. The head, up to the slow exchange, is issued when
// it is started; the tail, from the decoding on, when the next one's head was, or when somebody waits for it. So the
// in-node reduction of a bucket does not queue behind the in-node gather of the one before it, which waits for the slow
// link. This, too, is a function of the calls alone, and so the same on all ranks.
//
// Nothing on this path waits on the host. All of it can be captured into a CUDA graph: then a wait for what happened
// before the capture is left out, and whoever replays graphs orders them himself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "gpu_comms.h"
#include "gpu_events.h"
#include "gpu_program.h"
#include "gpu_tables.h"

namespace hybridcomm::gpu {

struct GpuConfig {
  int device = 0;
  int streams = 1;
  double timeout_s = 300;
  double watch_s = 0.1;  // how often the watchdog looks; 0: there is none
  bool copy_engines = false;
};

// The host's engine, as far as failures go. `failed`: called once, by whoever finds one here. `heard`: what it has failed
// with, or a peer has told it; never waits. Both may be called from any thread.
struct HostSide {
  std::function<void()> failed;
  std::function<std::optional<Error>()> heard;
};

// A program that was started.
class GpuWork {
 public:
  bool captured() const { return captured_; }

 private:
  friend class GpuEngine;
  GpuWork(std::shared_ptr<const DeviceProgram> program, const std::shared_ptr<EventPool>& pool)
      : program_(std::move(program)), start_(pool) {}
  std::shared_ptr<const DeviceProgram> program_;
  Event start_;
  std::map<size_t, Event> events_;   // of the operations that are awaited
  std::atomic<bool> issued_{false};  // to its end: its events are settled then, for the watchdog to ask
  std::atomic<bool> over_{false};    // on the device, as far as was asked
  bool captured_ = false;            // into a graph: it never is over
  hybridcomm::Clock::time_point since_ = hybridcomm::Clock::now();
};

class GpuEngine {
 public:
  // `interrupted` is called now and then in waits, and may throw. Raises Code::invalid: there is no such device.
  GpuEngine(Cuda cuda, Nccl nccl, const GpuConfig& config, std::function<void()> interrupted, HostSide host);
  ~GpuEngine();
  GpuEngine(const GpuEngine&) = delete;
  GpuEngine& operator=(const GpuEngine&) = delete;

  const Cuda& cuda() const { return *cuda_; }
  const Nccl& nccl() const { return *nccl_; }
  Comms& comms() { return comms_; }
  bool copy_engines() const { return config_.copy_engines; }
  void make_current() const;       // the device's context, on this thread
  int compute_capability() const;  // 80: 8.0
  bool capturing(CUstream stream) const;

  // A kernel's function of an image, cubin or PTX; loaded once.
  int load(const std::string& image, const std::string& symbol, unsigned shared_nbytes);

  // As Comms::register_window, between programs. A rank that fails in it ends everything: the others wait for it.
  ncclWindow_t register_window(int comm, void* data, size_t nbytes);

  // Issues the program's head behind what `producer` holds, then the tail of the one before.
  std::shared_ptr<GpuWork> start(std::shared_ptr<const DeviceProgram> program, CUstream producer);
  // `consumer` goes on when it is done; issues its tail, if that is still to come.
  void wait(const std::shared_ptr<GpuWork>& work, CUstream consumer);
  // The host waits, at most so long; false: it is not done. Raises what the device or a peer failed with.
  bool synchronize(const std::shared_ptr<GpuWork>& work, double limit_s);
  bool done(GpuWork& work);
  // Waits until nothing is under way any more, then says goodbye. Idempotent.
  void close();
  // Ends what is under way: every communicator is aborted, and all later calls raise.
  void fail(std::exception_ptr error);
  void check() const;  // raises what it has failed with

 private:
  void wait_for_earlier(const GpuWork& work);
  void forget(bool capture);
  void issue(GpuWork& work, size_t begin, size_t end);
  void wait_for(GpuWork& work, const DeviceOp& op);
  void issue_one(const DeviceOp& op);
  void issue_nccl(const DeviceProgram& program, size_t first, size_t behind);
  ncclRedOp_t reduction_of(const DeviceOp& op);
  ncclResult_t call_nccl(const DeviceOp& op, ncclRedOp_t reduction);
  void launch(const DeviceOp& op);
  void fail_by_current();
  void fail_if_lost(const DeviceError& error);
  void finish_issue(const std::shared_ptr<GpuWork>& work);
  bool in_capture() const;
  bool poll(GpuWork& work) const;
  bool ended(GpuWork& work) const;
  void watch();
  std::exception_ptr look();
  std::exception_ptr cause_of(const std::exception_ptr& error) const;
  void drain();
  void let_streams_end() const;

  std::shared_ptr<const Cuda> cuda_;
  std::shared_ptr<const Nccl> nccl_;
  GpuConfig config_;
  std::function<void()> interrupted_;
  HostSide host_;
  Comms comms_;
  std::shared_ptr<EventPool> pool_;
  CUcontext context_ = nullptr;
  CUdevice device_ = 0;
  std::vector<CUstream> streams_;
  std::vector<CUmodule> modules_;
  std::vector<CUfunction> functions_;
  std::map<std::pair<std::string, std::string>, int> loaded_;

  std::mutex issuing_;                // one order for the device
  std::shared_ptr<GpuWork> pending_;  // whose tail is to be issued

  mutable std::mutex mutex_;  // of what the watchdog reads
  std::condition_variable changed_;
  std::deque<std::shared_ptr<GpuWork>> running_;
  std::exception_ptr failure_;
  bool capturing_ = false, closed_ = false;
  std::thread watchdog_;
};

}  // namespace hybridcomm::gpu
