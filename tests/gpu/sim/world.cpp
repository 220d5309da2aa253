#include "world.h"

#include <algorithm>
#include <thread>

namespace sim {

// A host thread takes part from its first call to its end.
struct Leaver {
  Thread* thread = nullptr;
  unsigned round = 0;
  ~Leaver() {
    if (thread == nullptr) return;
    World& all = world();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (all.round_ != round) return;
    all.active_ -= thread->counted;
    all.changed_.notify_all();
  }
};

namespace {
thread_local Leaver leaver;
}

World& world() {
  static World* const one = new World;  // threads may end after static destructors
  return *one;
}

void World::reset(unsigned seed, int eager_percent, int threads) {
  reports.clear();
  memory.clear();
  streams_.clear(), events_.clear(), legacies_.clear(), threads_.clear();
  dice_.seed(seed);
  eager_ = eager_percent;
  actors_ = 0;
  active_ = threads;
  awaited_ = threads;
  published_ = Clock();
  shared_ = gave_up_ = false;
  hosts_.clear(), broken_.clear(), breaks_.clear();
  moved_ = std::chrono::steady_clock::now();
  ++round_;
  for (const auto& each : also_reset) each();
}

// What nobody has waited for may still be wrong, whether or not somebody else's waiting has run it. It is not run any more:
// memory of the host that it touches may be gone.
void World::check_left() {
  const auto plain = [this](Stream& stream) {
    if (stream.queue.empty() || broken(stream.device)) return false;
    const Operation& head = stream.queue.front();
    return !head.look && !head.admit && ready(stream);
  };
  for (bool again = true; again;) {
    again = false;
    for (Stream& each : streams_) {
      while (plain(each)) {
        each.queue.front().run = nullptr;
        run_head(each);
        again = true;
      }
    }
  }
}

int World::finish() {
  size_t streams = 0, events = 0, left = 0;
  for (const Stream& each : streams_) {
    if (broken(each.device)) continue;
    streams += each.live && !each.legacy && !each.hidden;
    left += each.queue.size();
  }
  for (const Event& each : events_) events += each.live && !broken(each.device);
  if (streams != 0) reports.add(Finding::leak, std::to_string(streams) + " streams");
  if (events != 0) reports.add(Finding::leak, std::to_string(events) + " events");
  if (left != 0) reports.add(Finding::leak, std::to_string(left) + " operations that nobody waited for");
  for (const auto& each : also_finish) each();
  check_left();
  memory.finish(broken_);
  return static_cast<int>(reports.lines().size());
}

void World::enter(bool counted) {
  threads_.push_back({std::make_shared<Host>(Host{actors_++, published_}), -1, counted, nullptr});
  leaver.thread = &threads_.back();
  leaver.round = round_;
  if (!counted) return;
  if (awaited_ > 0) {
    --awaited_;
  } else {
    ++active_;
  }
}

Thread& World::here() {
  if (leaver.thread == nullptr || leaver.round != round_) enter(true);
  return *leaver.thread;
}

void World::stand_by() {
  if (leaver.thread == nullptr || leaver.round != round_) return enter(false);
  active_ -= leaver.thread->counted;
  leaver.thread->counted = false;
  changed_.notify_all();
}

void World::publish() { published_.join(here().host->clock); }

void World::use(int device) {
  Thread& thread = here();
  thread.device = device;
  if (!shared_ || device < 0) return;
  std::shared_ptr<Host>& host = hosts_[device];
  if (host == nullptr) host = std::make_shared<Host>(Host{actors_++, {}});
  host->clock.join(thread.host->clock);
  thread.host = host;
}

Stream* World::make_stream(int device, bool blocking, bool hidden) {
  streams_.push_back({actors_++, device, false, blocking, true, hidden, {}, {}, nullptr, nullptr});
  return &streams_.back();
}

Stream& World::legacy(int device) {
  Stream*& found = legacies_[device];
  if (found == nullptr) {
    found = make_stream(device, true);
    found->legacy = true;
  }
  return *found;
}

Stream* World::stream(void* handle) {
  if (handle == nullptr) return &legacy(here().device);
  for (Stream& each : streams_) {
    if (&each == handle && each.live) return &each;
  }
  reports.add(Finding::stranger, "a stream that is none, or was destroyed");
  return nullptr;
}

Event* World::make_event() {
  events_.push_back({nullptr, here().device, true, nullptr, {}});
  return &events_.back();
}

Event* World::event(void* handle) {
  for (Event& each : events_) {
    if (&each == handle && each.live) return &each;
  }
  reports.add(Finding::stranger, "an event that is none, or was destroyed");
  return nullptr;
}

// CUDA lets what is enqueued finish, and frees the stream then.
void World::destroy(Stream& stream) { stream.live = false; }

void World::enqueue(Stream& stream, Operation operation) {
  Host& host = *here().host;
  host.clock.tick(host.actor);
  operation.issued = host.clock;
  moved_ = std::chrono::steady_clock::now();
  if (operation.issue) operation.issue();
  if (operation.record == nullptr) operation.record = std::make_shared<Record>();
  for (Stream& other : streams_) {
    const bool ordered = stream.legacy ? other.blocking : (stream.blocking && other.legacy);
    if (&other != &stream && other.device == stream.device && ordered && other.last != nullptr) {
      operation.waits.push_back(other.last);
    }
  }
  stream.last = operation.record;
  stream.queue.push_back(std::move(operation));
  while (static_cast<int>(dice_() % 100) < eager_ && run_one()) {
  }
  changed_.notify_all();
}

// Whether the head may run; it begins when all that it waits for is done.
bool World::ready(Stream& stream) {
  Operation& head = stream.queue.front();
  const auto done = [](const std::shared_ptr<Record>& record) { return record->done; };
  if (!head.begun) {
    if (!std::all_of(head.waits.begin(), head.waits.end(), done)) return false;
    if (!std::all_of(head.after.begin(), head.after.end(), done)) return false;
    head.begun = true;
    stream.clock.join(head.issued);
    for (const auto& record : head.waits) stream.clock.join(record->clock);
    stream.clock.tick(stream.actor);
  }
  return !head.admit || head.admit(stream);
}

void World::run_head(Stream& stream) {
  const Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  bool sound = true;
  std::vector<Range> ranges = operation.ranges;
  if (operation.look) sound = operation.look(ranges);
  for (const Range& range : ranges) {
    sound &= memory.access(range.begin, range.nbytes, range.write, stream.actor, stream.clock, stream.device,
                           operation.what);
  }
  if (sound && operation.run) operation.run();
  if (operation.meet) operation.meet(stream);
  operation.record->clock = stream.clock;
  operation.record->actor = stream.actor;
  operation.record->done = true;
}

bool World::run_one() {
  std::vector<Stream*> heads;
  for (Stream& each : streams_) {
    if (!each.queue.empty() && !broken(each.device)) heads.push_back(&each);
  }
  std::shuffle(heads.begin(), heads.end(),
               dice_);  // collectives begin when they are asked whether they are ready
  heads.erase(std::remove_if(heads.begin(), heads.end(), [this](Stream* each) { return !ready(*each); }),
              heads.end());
  if (heads.empty()) return false;
  Stream& chosen = *heads[dice_() % heads.size()];
  run_head(chosen);
  moved_ = std::chrono::steady_clock::now();
  const auto left = breaks_.find(chosen.device);
  if (left != breaks_.end() && --left->second <= 0) break_now(chosen.device);
  return true;
}

void World::break_now(int device) {
  broken_.insert(device);
  breaks_.erase(device);
  for (const auto& each : also_break) each(device);
  memory.lose(device);
  changed_.notify_all();
}

bool World::poll(std::unique_lock<std::mutex>& lock) {
  if (run_one()) {
    changed_.notify_all();
  } else {
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    lock.lock();
  }
  return patient();
}

std::string World::standstill() const {
  std::string text;
  for (const Stream& each : streams_) {
    if (each.queue.empty()) continue;
    const Operation& head = each.queue.front();
    text += (text.empty() ? ": " : "; ") + head.what + " on device " + std::to_string(each.device) +
            (head.begun ? " has begun" : " waits for others") +
            (head.begun && head.missing ? head.missing() : "");
  }
  return text;
}

bool World::patient() {
  if (!gave_up_ && std::chrono::steady_clock::now() - moved_ > patience_) {
    reports.add(Finding::deadlock,
                "nothing has moved for " + std::to_string(patience_.count()) + " ms" + standstill());
    gave_up_ = true;
    changed_.notify_all();
  }
  return !gave_up_;
}

// Asleep for good: nothing can run, and no thread is awake or has what it waits for.
bool World::stuck() const {
  if (remote_) return false;
  int asleep = 0;
  for (const Thread& thread : threads_) {
    if (thread.over == nullptr) continue;
    if ((*thread.over)()) return false;
    asleep += thread.counted;
  }
  return asleep >= active_;
}

bool World::wait(std::unique_lock<std::mutex>& lock, const std::string& what,
                 const std::function<bool()>& over) {
  Thread& thread = here();
  thread.over = &over;
  bool reached = true;
  while (!over()) {
    if (run_one()) {
      changed_.notify_all();
    } else if (stuck()) {
      reports.add(Finding::deadlock, "every host thread waits, this one in " + what +
                                         ", and no stream can go on" + standstill());
      reached = false;
      break;
    } else if (!patient()) {
      reached = false;
      break;
    } else {
      changed_.wait_for(lock, std::chrono::milliseconds(remote_ ? 1 : 100));
    }
  }
  thread.over = nullptr;
  changed_.notify_all();
  return reached;
}

}  // namespace sim
