// The simulated machine: devices whose streams run late and in seeded order, and the host threads that drive them.
//
// Nothing runs when it is enqueued, unless a seeded coin says so: a stream's operations run when somebody waits, one at a
// time, in an order among the streams' heads that the seed chooses. So every order that CUDA allows may come, and what
// only works in one order breaks under some seed; the clocks report it under all of them.
//
// Rules kept (CUDA C++ Programming Guide, "Asynchronous Concurrent Execution"; driver API, "Stream synchronization"):
//   streams are queues; a wait takes the event's last record at the time of the call, and one that was never recorded is
//   complete; the legacy stream orders itself with all streams of its device that are not CU_STREAM_NON_BLOCKING.
// Every function needs the lock.
//
// The lock is held while kernels run, and they may be functions of Python, which take the interpreter's lock: so nobody who
// has that lock may wait for this one. ctypes.CDLL gives it up around every call, and so must everyone who calls from an
// extension. A kernel's function calls nothing of the simulation but what says that it may (controls.cpp).
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "clock.h"
#include "device_memory.h"
#include "reports.h"

namespace sim {

struct Range {
  uintptr_t begin;
  size_t nbytes;
  bool write;
};

// One record of an event: what was known when the stream came to it.
struct Record {
  bool done = false;
  Clock clock;
};

struct Stream;

struct Operation {
  std::string what;
  bool begun = false;  // it is at the head, and its stream's clock has what it waited for
  Clock issued;        // what the host thread knew
  std::vector<Range> ranges;
  std::function<bool(std::vector<Range>&)> look;  // more of them, once it is about to run; false: it must not
  std::function<bool(const Stream&)> admit;       // once begun, asked again and again: may it run? Empty: yes
  std::function<void(Stream&)> meet;              // before it is done: what it has learned of others
  std::function<void()> run;                      // may be empty
  std::vector<std::shared_ptr<Record>> waits;     // has to be done before it runs
  std::vector<std::shared_ptr<Record>> after;     // likewise, but nothing is learned by it
  std::shared_ptr<Record> record;                 // done when it has run
};

struct Stream {
  int actor, device;
  bool legacy, blocking;  // blocking: ordered with the legacy stream
  bool live = true;
  Clock clock;
  std::deque<Operation> queue;
  std::shared_ptr<Record> last;  // of the operation enqueued last
};

struct Event {
  std::shared_ptr<Record> record;  // null: never recorded
  bool live = true;
};

struct Thread {
  int actor;
  Clock clock;
  int device = -1;
  bool counted = true;                          // a standstill without it is none
  const std::function<bool()>* over = nullptr;  // while it waits: what for
};

class World {
 public:
  World() : memory(reports) {}

  std::mutex mutex;
  Reports reports;
  DeviceMemory memory;
  int devices = 8;

  // `threads`: host threads that will come. Until they have ended, those that have not come yet are not at a standstill.
  void reset(unsigned seed, int eager_percent, int threads);
  // Leaks are reported; how many lines there are.
  int finish();
  std::function<void()> also_reset, also_finish;  // of what is built on it
  void wake() { changed_.notify_all(); }

  Thread& here();  // this thread
  // This thread is there, but has nothing to do that others could wait for: it need not be waited for.
  void stand_by();
  // What this thread knows, threads know that come from now on, or that ask.
  void publish();
  void learn() { here().clock.join(published_); }
  Stream* make_stream(int device, bool blocking);
  Stream& legacy(int device);
  Stream* stream(void* handle);  // null (and a report) if it is none; the null handle is the legacy stream
  void destroy(Stream& stream);
  Event* make_event();
  Event* event(void* handle);

  void enqueue(Stream& stream, Operation operation);
  // Runs until `over`; false: it never will be (reported).
  bool wait(std::unique_lock<std::mutex>& lock, const std::string& what, const std::function<bool()>& over);
  // Who asks again and again must see things go on.
  void step() {
    if (run_one()) wake();
  }

 private:
  void enter(bool counted);
  bool ready(Stream& stream);
  void run_head(Stream& stream);
  bool run_one();  // a head that is ready; false: there is none
  bool stuck() const;

  std::mt19937 dice_;
  int eager_ = 0, actors_ = 0;
  int awaited_ = 0;  // of the host threads that are expected, those that have not come yet
  Clock published_;
  unsigned round_ = 0;
  std::condition_variable changed_;
  std::list<Stream> streams_;
  std::list<Event> events_;
  std::map<int, Stream*> legacies_;
  std::list<Thread> threads_;
  int active_ = 0;  // host threads that are expected, or have come, and have not ended
  friend struct Leaver;
};

World& world();

}  // namespace sim
