// NCCL's communicators: what ranks call is matched call by call, and moves when all have come.
//
// A collective is met by the ranks' calls of one number; a message by the sends and receives of a pair in their order.
// A rank comes when its stream does, and goes on when all that it called in one group has been met. Operations of one
// communicator run in the order of their calls, whatever their streams; no clock learns of that order, as data that
// relies on it relies on an accident. One operation runs on
// a device at a time, as kernels that wait for each other may fill it: two communicators that ranks use in different
// orders come to a deadlock under some seed, as they do on machines. So it is reported where nothing, neither a stream nor
// an event, orders operations of two communicators on a device. From 2.26 on NCCL may do that itself, in the order of the
// calls (NCCL_LAUNCH_ORDER_IMPLICIT=1); ranks have to call them in one order then.
//
// What goes wrong (faults.h) leaves the rank's operation stuck: it never comes, so its peers are stuck too, until each
// aborts. Some peers are told by ncclRemoteError, as a closed connection does, some are not.
//
// A communicator that is not blocking answers ncclInProgress, by dice, and has then to be asked for its state until that
// is ncclSuccess. What was called is enqueued no sooner, so an event that is recorded before is recorded too early.
#pragma once

#include <deque>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "faults.h"
#include "gpu_nccl_abi.h"
#include "world.h"

namespace sim {

enum class Kind { all_reduce, reduce, reduce_scatter, all_gather, broadcast, all_to_all, send, receive };

struct Comm;

// What one rank wants of a meeting.
struct Part {
  Kind kind;
  Comm* comm;  // null: of another process, which has no `to` here
  const unsigned char* from;
  unsigned char* to;
  size_t count;
  hybridcomm::gpu::ncclDataType_t type;
  hybridcomm::gpu::ncclRedOp_t op;
  int peer;  // or root; -1: none
  int rank = 0, ranks = 0;
  double factor = 1.0;  // of a pre-multiplied sum
  long number = -1;     // of the communicator's calls, or of the pair's messages
};

// Parts that belong together; a message has two.
struct Meeting {
  size_t wanted = 0;
  struct Come {
    Part part;
    int actor;
    Clock clock;
    int device;
  };
  std::vector<Come> come;
  bool met = false;
  Clock clock;  // of all that have come
  // Where ranks are in several processes: each has a meeting of its own, of which the others' parts come by the broker.
  std::string place;
  int own = 0;                    // the rank's number there
  std::vector<std::string> held;  // what others' parts read
  bool sound = true;
};

struct Clique {
  int size;
  std::string name;
  int joined = 0;
  bool complete = false;
  bool ready();  // whether all have joined
  std::vector<Comm*> members;
  std::map<long, std::shared_ptr<Meeting>> meetings;                                 // by number
  std::map<std::pair<int, int>, std::map<long, std::shared_ptr<Meeting>>> messages;  // by (source, target)
  std::map<long, std::map<int, std::pair<int, int>>>
      wishes;  // of one call that makes new ones: rank -> (color, key)
  std::map<std::pair<long, int>, std::shared_ptr<Clique>> children;
};

// What a communicator that is not blocking has still to do.
struct Job {
  int polls;                   // as often it is in progress, at least
  std::function<bool()> over;  // whether it can end
  std::function<void()> then;  // when it does; once, whoever of a group asks last
  bool done = false;
};

struct Comm {
  std::shared_ptr<Clique> clique;
  int rank, device;
  long ordinal;  // among those that were made on its device
  bool blocking;
  int policy = 0;  // NCCL_CTA_POLICY_*
  bool live = true, aborted = false;
  bool told = false;  // that a peer is lost, where it waits for one
  hybridcomm::gpu::ncclResult_t failure = 0;
  long calls = 0, makings = 0, operations = 0;
  int inside = 0;                              // operations that have begun and not ended
  std::set<int> heard;                         // lost ranks of other processes
  std::vector<std::shared_ptr<Meeting>> open;  // meetings that others come to by the broker
  std::shared_ptr<Job> job;
  std::shared_ptr<Record> last;  // operations of one communicator run in the order of their calls
  std::map<std::pair<bool, int>, long> messages;              // (sends?, peer) -> how many
  std::vector<double> factors;                                // of its own reductions,
  std::vector<hybridcomm::gpu::ncclDataType_t> factor_types;  // and of what elements they are
  bool ready() const { return clique->ready(); }
};

class Communicators {
 public:
  Communicators();

  std::shared_ptr<Clique> clique(const std::string& id, int size);
  Comm* join(const std::shared_ptr<Clique>& clique, int rank, bool blocking, int policy);
  Comm* find(void* handle);  // null (and a report) if it is none
  // Parts that one call or group of a thread makes on a stream: one operation. Captured, if the stream is.
  bool launch(Stream& stream, const std::vector<Part>& parts);
  // Frees what is stuck on it on this rank.
  void abort(Comm& comm);
  // Nothing comes of the rank any more: it is in no meeting, and some of its peers will hear of it.
  void leave(Comm& comm);
  // Ranks that make something together, by their calls of one number; `color` and `key` of this one.
  long wish(Comm& comm, int color, int key, size_t wanted);
  // Whether so many have said theirs.
  bool wished(Clique& clique, int rank, long number, size_t wanted);
  // This rank's part of what those with its color have made of it, in the order of their keys.
  Comm* child(Comm& comm, long number, int policy);
  // Live ones on a device whose collectives go by copy engines where they can.
  int by_copy_engines(int device) const;
  // What ncclCommGetAsyncError says.
  hybridcomm::gpu::ncclResult_t state(Comm& comm);

 private:
  // One operation while it runs.
  struct Running {
    long id;
    std::vector<Part> parts;
    std::vector<std::shared_ptr<Meeting>> meetings;
    std::shared_ptr<Record> record;
    bool begun = false, stuck = false;
    Comm& comm() const { return *parts.front().comm; }
  };
  Operation operation(std::vector<Part> parts);
  bool begin(Running& running, const Stream& on);
  void check_order(const Running& running, const Stream& on);
  void end(Running& running, Stream& on);
  std::shared_ptr<Meeting> meeting_of(const Part& part);
  void come(Meeting& meeting, const Part& part, const Stream& stream);
  std::shared_ptr<Meeting> send_part(const Part& part, const Stream& stream);
  bool arrived(Meeting& meeting, const Running& running);
  void hear(Comm& comm);
  std::string missing(const Running& running) const;
  void meet(Meeting& meeting);
  bool same(const Meeting& meeting);
  void check_windows(const Meeting& meeting);
  bool may_touch(const Meeting& meeting);

  std::map<std::string, std::shared_ptr<Clique>> cliques_;
  std::list<Comm> comms_;
  std::map<int, long> running_;  // device -> the operation that has it
  std::map<int, long> made_;     // device -> communicators
  struct Latest {
    std::string what;
    std::shared_ptr<Record> record;
  };
  std::map<int, std::map<const Comm*, Latest>> begun_;  // device -> the last that each communicator has begun
  std::map<int, std::shared_ptr<Record>> called_;       // device -> the last that was called
  long operations_ = 0;
};

Communicators& communicators();
std::string text_of(const Part& part);

}  // namespace sim
