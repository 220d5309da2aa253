// The engine of one rank: one queue of collectives, in call order, whoever runs them.
//
// A blocking call runs on its caller's thread when nothing is queued or running (handing work to another core
// costs a futex wake, some 33 us); otherwise it queues up like an asynchronous one. One progress thread,
// started by the first asynchronous call, serves the queue. It touches no Python.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>

#include "executor.h"

namespace hybridcomm {

class Engine;

constexpr double kForever = 1e9;  // s

// The handle of one collective, or of messages.
class Work {
 public:
  bool is_completed() const;
  // True when done; false when `limit_s` passed first. Rethrows what the collective failed with.
  bool wait(double limit_s);
  // The same; `interrupted` is called now and then, and may throw. Who waits for messages works on them meanwhile, if
  // nobody has to: what comes then wakes the one that waits for it, and not another thread first.
  bool wait(double limit_s, const std::function<void()>& interrupted);
  double seconds() const;        // spent running it; 0 until it is done
  uint64_t wire_nbytes() const;  // sent to other nodes for it; 0 until it is done

 private:
  friend class Engine;
  explicit Work(std::weak_ptr<Engine> engine) : engine_(std::move(engine)) {}  // of messages
  Work(std::shared_ptr<const Program> program, const Buffers& buffers)
      : program_(std::move(program)), buffers_(buffers) {}
  std::weak_ptr<Engine> engine_;
  std::shared_ptr<const Program> program_;
  Buffers buffers_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  std::exception_ptr failure_;
  double seconds_ = 0;
  uint64_t wire_nbytes_ = 0;
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(const MeshConfig& config, const Listener& listener, bool crowded);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Runs to the end on this thread, or after what is queued. `interrupted` as in Executor::run.
  std::shared_ptr<Work> run(std::shared_ptr<const Program> program, const Buffers& buffers,
                            const std::function<void()>& interrupted);
  std::shared_ptr<Work> submit(std::shared_ptr<const Program> program, const Buffers& buffers);

  // Point-to-point messages, one work for all of them. They wait for no collective, and no collective for them.
  std::shared_ptr<Work> post(std::vector<Message> messages);
  // The same, and until they are complete.
  std::shared_ptr<Work> exchange(std::vector<Message> messages, const std::function<void()>& interrupted);

  // Ends the queue, says goodbye to the peers and closes every connection. Idempotent.
  void close();
  // Makes the running and all later calls fail, here and on every peer.
  void abort();
  // For whoever waits for the peers by other means than this engine: what it has failed with, or, where no call is under
  // way to read them, what its control channels say. Nothing: all is well, or another thread is in here and hears of it
  // itself. Waits for nobody, unless a peer is gone.
  std::optional<Error> listen();

  // Of the collectives so far, in their order, on a set of ranks: whatever handles its callers hold. Not locked: the
  // caller sees to the order of calls, and so to this.
  uint64_t& history(uint64_t group) { return histories_[group]; }

  const WireCounters& counters() const { return executor_->counters(); }
  const Node& node() const { return executor_->node(); }

 private:
  friend class Work;
  void check(const Program& program) const;
  void enqueue(const std::shared_ptr<Work>& work);  // with the mutex held
  void wait_in_queue(Work& work, const std::function<void()>& interrupted);
  uint64_t collective_tx_bytes() const;
  void execute(Work& work, const std::function<void()>& interrupted);
  void execute_messages(const std::function<bool()>& stop, const std::function<void()>& interrupted);
  void wait_on_messages(Work& work, Clock::time_point until);
  std::exception_ptr guarded(const std::function<void()>& run);
  // With the mutex held:
  void start_progress();
  void release();
  std::shared_ptr<Work> take_in(std::vector<Message> messages);
  void hand_over();
  void drop_messages();
  void finish(Work& work, std::exception_ptr failure);
  void serve();
  void fail_if_broken() const;
  void remember_failure(const Error& error);

  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<Executor> executor_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Work>> queue_;
  std::atomic<size_t> queued_{0};  // its length, to be looked at without the mutex
  bool busy_ = false;
  bool on_messages_ = false;          // busy with them alone
  std::atomic<bool> helping_{false};  // somebody who waits works on messages, or is about to
  bool closing_ = false;
  std::optional<Error> broken_;
  std::thread progress_;
  std::unordered_map<uint64_t, uint64_t> histories_;
};

}  // namespace hybridcomm
