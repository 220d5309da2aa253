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

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
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
  int actor = -1;
  Clock clock;
  // Whether somebody who knows so much has waited for it.
  bool known(const Clock& other) const { return done && other.at(actor) >= clock.at(actor); }
};

struct Stream;
struct Capture;

struct Operation {
  std::string what;
  bool begun = false;           // it is at the head, and its stream's clock has what it waited for
  Clock issued;                 // what the host thread knew
  std::function<void()> issue;  // when it is enqueued; may be empty
  std::vector<Range> ranges;
  std::function<bool(std::vector<Range>&)> look;  // more of them, once it is about to run; false: it must not
  std::function<bool(const Stream&)> admit;       // once begun, asked again and again: may it run? Empty: yes
  std::function<void(Stream&)> meet;              // before it is done: what it has learned of others
  std::function<std::string()> missing;           // what it waits for, once begun; may be empty
  std::function<void()> run;                      // may be empty
  std::vector<std::shared_ptr<Record>> waits;     // has to be done before it runs
  std::vector<std::shared_ptr<Record>> after;     // likewise, but nothing is learned by it
  std::shared_ptr<Record> record;                 // done when it has run
};
// Makes an operation each time it is enqueued: once, or with every launch of a graph.
using Make = std::function<Operation()>;

struct Stream {
  int actor, device;
  bool legacy, blocking;  // blocking: ordered with the legacy stream
  bool live = true;
  bool hidden = false;  // of a graph, no handle of anyone's
  Clock clock;
  std::deque<Operation> queue;
  std::shared_ptr<Record> last;      // of the operation enqueued last
  std::shared_ptr<Capture> capture;  // while it is captured
};

struct Event {
  std::shared_ptr<Record> record;  // null: never recorded
  int device = -1;
  bool live = true;
  std::shared_ptr<Capture> capture;  // it was recorded last while this was made,
  std::vector<size_t> nodes;         // behind these of its nodes
};

// Host threads that know what any of them knows; one thread, unless they share.
struct Host {
  int actor;
  Clock clock;
};

struct Thread {
  std::shared_ptr<Host> host;
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
  // Others may move what stands still here: ranks are in several processes.
  void be_remote() { remote_ = true; }

  // `threads`: host threads that will come. Until they have ended, those that have not come yet are not at a standstill.
  void reset(unsigned seed, int eager_percent, int threads);
  // Leaks are reported; how many lines there are.
  int finish();
  std::vector<std::function<void()>> also_reset, also_finish;  // of what is built on it
  std::vector<std::function<void(int device)>> also_break;
  void wake() { changed_.notify_all(); }

  Thread& here();  // this thread
  // This thread is there, but has nothing to do that others could wait for: it need not be waited for.
  void stand_by();
  // What this thread knows, threads know that come from now on, or that ask.
  void publish();
  void learn() { here().host->clock.join(published_); }
  // Host threads of one device are from now on taken for well ordered among themselves: what one of them has waited for,
  // all know. For engines whose threads hand work to each other by means that are not seen here.
  void share_hosts() { shared_ = true; }
  void use(int device);  // by this thread
  Stream* make_stream(int device, bool blocking, bool hidden = false);
  Stream& legacy(int device);
  Stream* stream(void* handle);  // null (and a report) if it is none; the null handle is the legacy stream
  void destroy(Stream& stream);
  Event* make_event();
  Event* event(void* handle);

  void enqueue(Stream& stream, Operation operation);
  // Runs until `over`; false: it never will be (reported).
  bool wait(std::unique_lock<std::mutex>& lock, const std::string& what, const std::function<bool()>& over);
  // Who asks again and again must see things go on. False: nothing has moved for so long that nobody should wait.
  bool poll(std::unique_lock<std::mutex>& lock);
  bool coin(int percent) { return static_cast<int>(dice_() % 100) < percent; }

  // After so many more operations that have run on a device, nothing does any more, as after an illegal access.
  void break_after(int device, long operations) { breaks_[device] = operations; }
  void break_now(int device);
  bool broken(int device) const { return broken_.count(device) != 0; }
  // How long nothing may move while somebody waits, in milliseconds of real time.
  void be_patient(long milliseconds) { patience_ = std::chrono::milliseconds(milliseconds); }

 private:
  void enter(bool counted);
  bool ready(Stream& stream);
  void run_head(Stream& stream);
  void check_left();
  bool run_one();  // a head that is ready; false: there is none
  bool stuck() const;
  bool patient();
  std::string standstill() const;  // what could not go on

  std::mt19937 dice_;
  int eager_ = 0, actors_ = 0;
  int awaited_ = 0;  // of the host threads that are expected, those that have not come yet
  Clock published_;
  bool shared_ = false, gave_up_ = false, remote_ = false;
  std::map<int, std::shared_ptr<Host>> hosts_;  // by device, where they share
  std::set<int> broken_;
  std::map<int, long> breaks_;
  std::chrono::steady_clock::time_point moved_;
  std::chrono::milliseconds patience_{60000};
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
