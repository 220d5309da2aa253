#include "engine.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace hybridcomm {
namespace {

// The progress thread runs seldom and briefly, beside threads that compute. A short time slice (Linux 6.12 and
// later; earlier kernels ignore it) gives it an early deadline, so that a wake-up does not wait for theirs to end.
void ask_for_short_slices() {
  if (::sched_getscheduler(0) != SCHED_OTHER) return;  // somebody has chosen already
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
  } attributes{};
  attributes.size = sizeof(attributes);
  attributes.nice = ::getpriority(PRIO_PROCESS, 0);
  attributes.runtime_ns = 100000;
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace

bool Work::is_completed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

double Work::seconds() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_ ? seconds_ : 0;
}

uint64_t Work::wire_nbytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_ ? wire_nbytes_ : 0;
}

bool Work::wait(double limit_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!finished_.wait_for(lock, hybridcomm::seconds(limit_s), [this] { return done_; })) return false;
  if (failure_) std::rethrow_exception(failure_);
  return true;
}

Engine::Engine(const MeshConfig& config, const Listener& listener, bool crowded)
    : mesh_(std::make_unique<Mesh>(config, listener)),
      executor_(std::make_unique<Executor>(*mesh_, config.timeout_s, crowded)) {
  executor_->messages().on_finished(
      [this](const std::shared_ptr<void>& work) { finish(*std::static_pointer_cast<Work>(work), nullptr); });
}

Engine::~Engine() { close(); }

void Engine::check(const Program& program) const {
  for (const Op& op : program.ops) {
    const bool slot = op.kind == Kind::put || op.kind == Kind::reduce || op.kind == Kind::publish ||
                      op.kind == Kind::get || op.kind == Kind::share || op.kind == Kind::collect ||
                      op.kind == Kind::decode_add;
    const bool payload = op.kind == Kind::decode_add || op.memory == Memory::scratch;
    const uint64_t nbytes = payload ? op.nbytes : op.count * itemsize(program.dtype);
    if (slot && (mesh_->local_size() == 1 || nbytes > mesh_->slot_nbytes())) {
      throw Error(Code::invalid, "a chunk of the plan does not fit a shared-memory slot");
    }
    if (op.stream >= program.stream_count)
      throw Error(Code::invalid, "an operation's stream is out of range");
    if (op.nbytes > UINT32_MAX) throw Error(Code::invalid, "a message of the plan is larger than 4 GiB");
  }
}

void Engine::fail_if_broken() const {
  if (broken_) throw Error(*broken_);
  if (closing_) throw Error(Code::aborted, "the context is closed: call hybridcomm.init() again");
}

std::shared_ptr<Work> Engine::run(std::shared_ptr<const Program> program, const Buffers& buffers,
                                  const std::function<void()>& interrupted) {
  check(*program);
  std::shared_ptr<Work> work(new Work(std::move(program), buffers));
  {
    std::unique_lock<std::mutex> lock(mutex_);
    fail_if_broken();
    if (busy_ || !queue_.empty()) {
      enqueue(work);
      lock.unlock();
      wait_in_queue(*work, interrupted);
      return work;
    }
    busy_ = true;
  }
  execute(*work, interrupted);
  work->wait(0);  // raises what it failed with
  return work;
}

void Engine::start_progress() {
  if (!progress_.joinable()) progress_ = std::thread([this] { serve(); });
}

void Engine::enqueue(const std::shared_ptr<Work>& work) {
  start_progress();
  queue_.push_back(work);
  queued_ = queue_.size();
  if (on_messages_) executor_->wake();
  changed_.notify_all();
}

void Engine::wait_in_queue(Work& work, const std::function<void()>& interrupted) {
  try {
    work.wait(kForever, interrupted);
  } catch (const Error&) {
    throw;
  } catch (...) {  // the caller's tensor may go once this returns, so the work must have ended by then
    abort();
    while (!work.is_completed()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    throw;
  }
}

std::shared_ptr<Work> Engine::submit(std::shared_ptr<const Program> program, const Buffers& buffers) {
  check(*program);
  std::shared_ptr<Work> work(new Work(std::move(program), buffers));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    fail_if_broken();
    enqueue(work);
  }
  return work;
}

uint64_t Engine::collective_tx_bytes() const {
  const WireCounters& now = counters();
  return now.tx_bytes.load(std::memory_order_relaxed) - now.message_tx_bytes.load(std::memory_order_relaxed);
}

// Called with busy_ set by the caller and the mutex free.
void Engine::execute(Work& work, const std::function<void()>& interrupted) {
  const auto begin = Clock::now();
  const uint64_t before = collective_tx_bytes();
  std::exception_ptr failure = guarded([&] { executor_->run(*work.program_, work.buffers_, interrupted); });
  work.seconds_ = std::chrono::duration<double>(Clock::now() - begin).count();
  work.wire_nbytes_ = collective_tx_bytes() - before;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // An abort that came too late for the executor to notice: the peers must learn of it all the same.
    if (!failure && executor_->abort_requested()) executor_->tell_abort(mesh_->rank(), Code::aborted);
    release();
  }
  finish(work, failure);
}

// The thread that was busy is no more; with the mutex held.
void Engine::release() {
  busy_ = on_messages_ = false;
  if (broken_) drop_messages();
  if (executor_->wants_messages()) start_progress();
  changed_.notify_all();
}

// What `run` fails with. Everybody is told, and later calls raise it too.
std::exception_ptr Engine::guarded(const std::function<void()>& run) {
  try {
    run();
    return nullptr;
  } catch (const Error& error) {
    executor_->tell_abort(error.rank, error.code);
    remember_failure(error);
    return std::current_exception();
  } catch (...) {  // an interrupt: a Python exception on its way to the caller
    executor_->tell_abort(mesh_->rank(), Code::aborted);
    remember_failure(Error(Code::aborted, "an earlier call on this rank was interrupted", mesh_->rank()));
    return std::current_exception();
  }
}

void Engine::finish(Work& work, std::exception_ptr failure) {
  {
    const std::lock_guard<std::mutex> lock(work.mutex_);
    work.failure_ = std::move(failure);
    work.done_ = true;
  }
  work.finished_.notify_all();
}

void Engine::remember_failure(const Error& error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!broken_) broken_ = error;
}

void Engine::serve() {
  ask_for_short_slices();
  const std::function<void()> nobody;
  for (;;) {
    std::shared_ptr<Work> work;
    std::optional<Error> broken;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] {
        const bool messages = executor_->wants_messages();
        return !busy_ && (!queue_.empty() || (messages ? !helping_ : closing_));
      });
      if (broken_) drop_messages();
      if (!queue_.empty()) {
        work = std::move(queue_.front());
        queue_.pop_front();
        queued_ = queue_.size();
        broken = broken_;
        busy_ = !broken;
      } else if (executor_->wants_messages()) {
        busy_ = on_messages_ = true;
      } else if (closing_) {
        return;
      } else {
        continue;
      }
    }
    if (!work) {
      execute_messages([this] { return queued_.load() > 0 || helping_; }, nobody);
    } else if (broken) {
      finish(*work, std::make_exception_ptr(*broken));
      changed_.notify_all();
    } else {
      execute(*work, nobody);
    }
  }
}

void Engine::close() {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closing_) return;
    closing_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] {
      const bool idle = queue_.empty() && !executor_->wants_messages();
      return !busy_ && (idle || !progress_.joinable());
    });
  }
  if (progress_.joinable()) progress_.join();
  executor_->tell_bye();
  executor_->messages().disconnect(executor_->timeout());
  mesh_->disconnect();
}

void Engine::abort() {
  executor_->request_abort();
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool told = broken_.has_value();  // a second word would take the blame from the first
  if (!told) broken_ = Error(Code::aborted, "the context was aborted on this rank", mesh_->rank());
  if (busy_) return;  // the running call notices, and tells the peers
  // With the mutex held, so that close() cannot take the connections away meanwhile.
  if (!told && !closing_) executor_->tell_abort(mesh_->rank(), Code::aborted);
}

// With the mutex held, as in abort().
std::optional<Error> Engine::listen() {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock || busy_ || closing_) return std::nullopt;
  if (broken_) return broken_;
  try {
    executor_->listen();
  } catch (const Error& error) {
    executor_->tell_abort(error.rank, error.code);
    broken_ = error;
    changed_.notify_all();
  }
  return broken_;
}

}  // namespace hybridcomm
