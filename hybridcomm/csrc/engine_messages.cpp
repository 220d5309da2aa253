// Point-to-point messages of an engine: who works on them.
//
// While a program runs, its thread does. Else a caller that waits for some does, and for all others the progress
// thread, until a program is queued: that goes first. Who posts one moves what can be moved at once itself.
#include "engine.h"

namespace hybridcomm {
namespace {

constexpr auto kAskAgain = std::chrono::milliseconds(100);  // whether a long wait is to end

}  // namespace

std::shared_ptr<Work> Engine::take_in(std::vector<Message> messages) {
  std::shared_ptr<Work> work(new Work(weak_from_this()));
  work->done_ = messages.empty();
  executor_->messages().submit(std::move(messages), work);
  executor_->nudge_messages();
  return work;
}

// To the progress thread, where nobody works on them.
void Engine::hand_over() {
  if (busy_ || helping_ || !executor_->wants_messages()) return;
  start_progress();
  changed_.notify_all();
}

std::shared_ptr<Work> Engine::post(std::vector<Message> messages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  fail_if_broken();
  std::shared_ptr<Work> work = take_in(std::move(messages));
  hand_over();
  return work;
}

std::shared_ptr<Work> Engine::exchange(std::vector<Message> messages,
                                       const std::function<void()>& interrupted) {
  std::shared_ptr<Work> work;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    fail_if_broken();
    work = take_in(std::move(messages));
  }
  wait_in_queue(*work, interrupted);
  return work;
}

bool Work::wait(double limit_s, const std::function<void()>& interrupted) {
  const auto deadline = Clock::now() + hybridcomm::seconds(limit_s);
  const std::shared_ptr<Engine> engine = engine_.lock();
  for (;;) {
    const auto until = std::min(deadline, Clock::now() + kAskAgain);
    if (engine && limit_s > 0 && !is_completed()) engine->wait_on_messages(*this, until);
    if (wait(std::chrono::duration<double>(until - Clock::now()).count())) return true;
    if (Clock::now() >= deadline) return false;
    if (interrupted) interrupted();
  }
}

// Works on messages on this thread until those of `work` are complete, a program is queued, or it is `until`; returns
// at once where somebody else has to work on them.
void Engine::wait_on_messages(Work& work, Clock::time_point until) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (helping_ || (busy_ && !on_messages_) || !queue_.empty() || broken_) return;
  helping_ = true;
  if (busy_) executor_->wake();
  changed_.wait_until(lock, until, [this, &work] { return !on_messages_ || work.is_completed(); });
  if (!busy_ && queue_.empty() && !work.is_completed() && !broken_) {
    busy_ = on_messages_ = true;
    lock.unlock();
    const auto stop = [this, &work, until] {
      return work.is_completed() || queued_.load() > 0 || Clock::now() >= until;
    };
    const std::function<void()> in_the_foreground = [] {};
    execute_messages(stop, in_the_foreground);
    lock.lock();
  }
  helping_ = false;
  hand_over();
}

// Called with busy_ set by the caller and the mutex free. What fails is what the messages' works fail with.
void Engine::execute_messages(const std::function<bool()>& stop, const std::function<void()>& interrupted) {
  const std::exception_ptr failure = guarded([&] { executor_->run_messages(stop, interrupted); });
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure && executor_->abort_requested()) executor_->tell_abort(mesh_->rank(), Code::aborted);
  release();
}

void Engine::drop_messages() {
  for (const auto& owner : executor_->abandon_messages()) {
    finish(*std::static_pointer_cast<Work>(owner), std::make_exception_ptr(*broken_));
  }
}

}  // namespace hybridcomm
