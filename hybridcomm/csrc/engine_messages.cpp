// Point-to-point messages of an engine: who works on them.
//
// While a program runs, its thread does. Else a caller that blocks in `exchange` does, and for all others the progress
// thread, until a program is queued: that goes first.
#include "engine.h"

namespace hybridcomm {

std::shared_ptr<Work> Engine::take_in(std::vector<Message> messages) {
  std::shared_ptr<Work> work(new Work());
  work->done_ = messages.empty();
  executor_->messages().submit(std::move(messages), work);
  return work;
}

void Engine::hand_over() {
  start_progress();
  if (busy_) executor_->wake();
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
  bool here = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    fail_if_broken();
    work = take_in(std::move(messages));
    here = !busy_ && queue_.empty();
    if (here) {
      busy_ = on_messages_ = true;
    } else {
      hand_over();
    }
  }
  if (here) {
    const auto stop = [this, &work] { return work->is_completed() || queued_.load() > 0; };
    if (const auto failure = execute_messages(stop, interrupted)) std::rethrow_exception(failure);
  }
  wait_in_queue(*work, interrupted);
  return work;
}

// Called with busy_ set by the caller and the mutex free.
std::exception_ptr Engine::execute_messages(const std::function<bool()>& stop,
                                            const std::function<void()>& interrupted) {
  std::exception_ptr failure = guarded([&] { executor_->run_messages(stop, interrupted); });
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure && executor_->abort_requested()) executor_->tell_abort(mesh_->rank(), Code::aborted);
  release();
  return failure;
}

void Engine::drop_messages() {
  for (const auto& owner : executor_->messages().abandon()) {
    finish(*std::static_pointer_cast<Work>(owner), std::make_exception_ptr(*broken_));
  }
}

}  // namespace hybridcomm
