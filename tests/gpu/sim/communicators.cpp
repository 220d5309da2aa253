#include "communicators.h"

#include <algorithm>
#include <cstring>

#include "broker.h"
#include "graphs.h"
#include "movement.h"
#include "nccl.h"

namespace sim {
using namespace hybridcomm::gpu;

Communicators::Communicators() {
  world().also_reset.push_back([this] {
    cliques_.clear(), comms_.clear(), running_.clear(), made_.clear(), begun_.clear(), called_.clear();
  });
  world().also_finish.push_back([this] {
    size_t left = 0;
    for (const Comm& comm : comms_) left += comm.live && !world().broken(comm.device);
    if (left != 0) world().reports.add(Finding::leak, std::to_string(left) + " communicators");
  });
  world().also_break.push_back([this](int device) {
    for (Comm& comm : comms_) {
      if (comm.device == device && comm.live && !comm.aborted) leave(comm);
    }
  });
}

Communicators& communicators() {
  static Communicators* const one = new Communicators;
  return *one;
}

std::shared_ptr<Clique> Communicators::clique(const std::string& id, int size) {
  std::shared_ptr<Clique>& found = cliques_[id];
  if (found == nullptr) {
    found = std::make_shared<Clique>();
    found->size = size;
    found->name = id;
  }
  return found;
}

Comm* Communicators::join(const std::shared_ptr<Clique>& clique, int rank, bool blocking, int policy) {
  const int device = world().here().device;
  Comm made;
  made.clique = clique;
  made.rank = rank;
  made.device = device;
  made.ordinal = made_[device]++;
  made.blocking = blocking;
  made.policy = policy;
  for (const Comm* other : clique->members) {
    if (other->policy == policy) continue;
    world().reports.add(Finding::mismatch, "ranks of a communicator with different CTA policies");
  }
  comms_.push_back(std::move(made));
  clique->members.push_back(&comms_.back());
  ++clique->joined;
  if (Broker* broker = Broker::get()) {
    world().be_remote();
    broker->put(clique->name + " join", static_cast<size_t>(clique->size), rank, "");
  }
  world().wake();
  return &comms_.back();
}

Comm* Communicators::find(void* handle) {
  for (Comm& each : comms_) {
    if (&each == handle && each.live) return &each;
  }
  world().reports.add(Finding::stranger, "a communicator that is none, or was destroyed");
  return nullptr;
}

std::shared_ptr<Meeting> Communicators::meeting_of(const Part& part) {
  Clique& clique = *part.comm->clique;
  const bool sends = part.kind == Kind::send;
  const std::pair<int, int> pair = sends ? std::pair(part.rank, part.peer) : std::pair(part.peer, part.rank);
  std::shared_ptr<Meeting>& found =
      is_message(part) ? clique.messages[pair][part.number] : clique.meetings[part.number];
  if (found == nullptr) {
    found = std::make_shared<Meeting>();
    found->wanted = is_message(part) ? 2 : static_cast<size_t>(clique.size);
  }
  return found;
}

// What ranks must agree on; a reduction of one's own only by its kind.
bool Communicators::same(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  for (const Meeting::Come& each : meeting.come) {
    const Part& part = each.part;
    const bool alike =
        part.count == first.count && part.type == first.type &&
        (is_message(part) || (part.kind == first.kind && part.peer == first.peer &&
                              std::min<int>(part.op, ncclAvg + 1) == std::min<int>(first.op, ncclAvg + 1)));
    if (!alike) {
      world().reports.add(Finding::mismatch, text_of(part) + ", but " + text_of(first));
      return false;
    }
  }
  return true;
}

// Ranks must use symmetric windows at one offset: what all reach of each other. A gathered part, or a scattered one, is a
// rank's own place.
void Communicators::check_windows(const Meeting& meeting) {
  const Kind kind = meeting.come.front().part.kind;
  const bool reads = kind == Kind::all_reduce || kind == Kind::reduce_scatter || kind == Kind::all_to_all;
  const bool writes = kind == Kind::all_reduce || kind == Kind::all_gather || kind == Kind::all_to_all;
  long from = -1, to = -1;
  for (const Meeting::Come& each : meeting.come) {
    const Part& part = each.part;
    if (part.comm == nullptr) continue;
    const long source = reads ? in_window(*part.comm, part.from) : -1;
    const long target = writes ? in_window(*part.comm, part.to) : -1;
    if ((from >= 0 && source >= 0 && from != source) || (to >= 0 && target >= 0 && to != target)) {
      misuse(text_of(part) + ": at another offset of its window than other ranks");
    }
    from = source >= 0 ? source : from;
    to = target >= 0 ? target : to;
  }
}

bool Communicators::may_touch(const Meeting& meeting) {
  bool sound = true;
  for (const Meeting::Come& each : meeting.come) {
    const auto [reads, writes] = touched(each.part);
    const std::string what = text_of(each.part);
    const auto from = reinterpret_cast<uintptr_t>(each.part.from),
               to = reinterpret_cast<uintptr_t>(each.part.to);
    sound &= world().memory.access(from, reads, false, each.actor, each.clock, each.device, what);
    sound &= world().memory.access(to, writes, true, each.actor, each.clock, each.device, what);
  }
  return sound;
}

void Communicators::meet(Meeting& meeting) {
  for (const Meeting::Come& each : meeting.come) meeting.clock.join(each.clock);
  meeting.met = true;
  const bool alike = same(meeting);
  if (alike) check_windows(meeting);
  if (alike && may_touch(meeting)) return move(meeting);
  for (const Meeting::Come& each : meeting.come) {
    if (!alike && each.part.comm != nullptr) each.part.comm->failure = ncclInvalidUsage;
  }
}

void Communicators::come(Meeting& meeting, const Part& part, const Stream& stream) {
  meeting.come.push_back({part, stream.actor, stream.clock, stream.device});
  if (meeting.come.size() == meeting.wanted) meet(meeting);
}

// By what the stream knows, so whether or not they have met in this order of things.
void Communicators::check_order(const Running& running, const Stream& on) {
  for (const auto& [comm, latest] : begun_[on.device]) {
    if (comm == &running.comm() || comm->aborted || latest.record->known(on.clock)) continue;
    const std::string what = text_of(running.parts.front());
    world().reports.add(Finding::unordered, what + " beside " + latest.what + " of another communicator");
  }
}

bool Communicators::begin(Running& running, const Stream& on) {
  if (running.begun) return true;
  if (!implicit_order()) check_order(running, on);
  long& busy = running_[on.device];
  if (busy != 0) return false;
  busy = running.id;
  running.begun = true;
  begun_[on.device][&running.comm()] = {text_of(running.parts.front()), running.record};
  Comm& comm = running.comm();
  ++comm.inside;
  const Fault fault = faults().at(comm.device, comm.ordinal, comm.operations++);
  running.stuck = fault != kNone;
  if (fault == kBreaks) world().break_now(comm.device);
  if (fault != kNone && fault < kHangs) comm.failure = fault;
  if (fault != kNone && fault != kHangs && fault != kBreaks) leave(comm);
  if (running.stuck) return true;
  for (const Part& part : running.parts) {
    if (Broker::get() != nullptr) {
      running.meetings.push_back(send_part(part, on));
      comm.open.push_back(running.meetings.back());
      continue;
    }
    running.meetings.push_back(meeting_of(part));
    come(*running.meetings.back(), part, on);
  }
  return true;
}

// Of one that was aborted, nobody can say what its targets hold.
void Communicators::end(Running& running, Stream& on) {
  Comm& comm = running.comm();
  if (running_[on.device] == running.id) running_[on.device] = 0;
  if (!running.begun) return;
  --comm.inside;
  comm.open.clear();  // operations of a communicator follow each other
  for (const auto& meeting : running.meetings) {
    if (meeting->met) on.clock.join(meeting->clock);
  }
  if (!comm.aborted) return;
  for (const Part& part : running.parts) {
    const auto to = reinterpret_cast<uintptr_t>(part.to);
    const size_t writes = touched(part).second;
    const std::string what = text_of(part) + ", aborted";
    if (writes != 0 && world().memory.access(to, writes, true, on.actor, on.clock, on.device, what)) {
      std::memset(part.to, kPoison, writes);
    }
  }
}

Operation Communicators::operation(std::vector<Part> parts) {
  for (Part& part : parts) {
    const bool message = is_message(part);
    part.number = message ? part.comm->messages[{part.kind == Kind::send, part.peer}]++ : part.comm->calls++;
  }
  const auto running = std::make_shared<Running>();
  running->id = ++operations_;
  running->parts = std::move(parts);
  Comm& comm = running->comm();
  Operation made;
  made.what = text_of(running->parts.front());
  if (!comm.live) {  // launches of a graph come later than calls
    world().reports.add(Finding::stranger, made.what + ": its communicator was destroyed");
    return made;
  }
  made.record = std::make_shared<Record>();
  if (comm.last != nullptr) made.after.push_back(comm.last);
  comm.last = made.record;
  running->record = made.record;
  std::shared_ptr<Record>& before = called_[comm.device];
  if (implicit_order() && before != nullptr) made.after.push_back(before);
  before = made.record;
  made.admit = [this, running](const Stream& on) {
    if (running->comm().aborted) return true;
    if (!begin(*running, on) || running->stuck) return false;
    bool met = true;
    for (const auto& meeting : running->meetings) met &= meeting->met || arrived(*meeting, *running);
    return met;
  };
  made.meet = [this, running](Stream& on) { end(*running, on); };
  made.missing = [this, running] { return missing(*running); };
  return made;
}

bool Communicators::launch(Stream& stream, const std::vector<Part>& parts) {
  return graphs().add(stream, [this, parts] { return operation(parts); }) == CUDA_SUCCESS;
}

void Communicators::abort(Comm& comm) {
  comm.aborted = true;
  leave(comm);
  world().wake();
}

void Communicators::leave(Comm& comm) {
  const auto withdraw = [&comm](Meeting& meeting) {
    if (meeting.met) return;
    std::vector<Meeting::Come> others;
    for (Meeting::Come& each : meeting.come) {
      if (each.part.comm != &comm) others.push_back(std::move(each));
    }
    meeting.come.swap(others);
  };
  for (auto& [number, meeting] : comm.clique->meetings) withdraw(*meeting);
  for (auto& [pair, all] : comm.clique->messages) {
    for (auto& [number, meeting] : all) withdraw(*meeting);
  }
  if (Broker* broker = Broker::get()) {
    for (const auto& meeting : comm.open) {
      if (!meeting->met) broker->withdraw(meeting->place, meeting->own);
    }
    return broker->lose(comm.clique->name, comm.rank);
  }
  for (Comm* peer : comm.clique->members) {
    if (peer != &comm && peer->live && !peer->aborted) peer->told |= world().coin(50);
  }
}

long Communicators::wish(Comm& comm, int color, int key, size_t wanted) {
  const long number = comm.makings++;
  if (Broker* broker = Broker::get()) {
    const std::string place = comm.clique->name + " wish " + std::to_string(number);
    broker->put(place, wanted, comm.rank,
                Packer().number(static_cast<uint32_t>(color)).number(static_cast<uint32_t>(key)).bytes());
  } else {
    comm.clique->wishes[number][comm.rank] = {color, key};
    world().wake();
  }
  return number;
}

bool Communicators::wished(Clique& clique, int rank, long number, size_t wanted) {
  auto& wishes = clique.wishes[number];
  std::map<int, std::string> all;
  Broker* broker = Broker::get();
  if (wishes.size() >= wanted || broker == nullptr) return wishes.size() >= wanted;
  if (!broker->found(clique.name + " wish " + std::to_string(number), rank, all)) return false;
  for (const auto& [who, what] : all) {
    Unpacker unpacker(what);
    const auto color = static_cast<int>(unpacker.number());
    wishes[who] = {color, static_cast<int>(unpacker.number())};
  }
  return true;
}

int Communicators::by_copy_engines(int device) const {
  return static_cast<int>(std::count_if(comms_.begin(), comms_.end(), [device](const Comm& comm) {
    return comm.live && comm.device == device && comm.policy == kNcclCtaPolicyZero;
  }));
}

Comm* Communicators::child(Comm& comm, long number, int policy) {
  const auto& wishes = comm.clique->wishes[number];
  const auto [color, key] = wishes.at(comm.rank);
  if (color == kNcclNoColor) return nullptr;
  std::vector<std::pair<int, int>> members;  // (key, rank)
  for (const auto& [rank, wish] : wishes) {
    if (wish.first == color) members.emplace_back(wish.second, rank);
  }
  std::sort(members.begin(), members.end());
  auto& made = comm.clique->children[{number, color}];
  if (made == nullptr) {
    made = std::make_shared<Clique>();
    made->size = static_cast<int>(members.size());
    made->name = comm.clique->name + " " + std::to_string(number) + " " + std::to_string(color);
  }
  const auto self = std::find(members.begin(), members.end(), std::pair(key, comm.rank));
  return join(made, static_cast<int>(self - members.begin()), comm.blocking, policy);
}

ncclResult_t Communicators::state(Comm& comm) {
  if (world().broken(comm.device)) return ncclUnhandledCudaError;
  hear(comm);
  if (comm.failure == ncclSuccess && comm.told && comm.inside > 0) comm.failure = ncclRemoteError;
  if (comm.failure != ncclSuccess) return comm.failure;
  if (!comm.ready()) return ncclInProgress;
  const std::shared_ptr<Job> job = comm.job;
  if (job == nullptr) return ncclSuccess;
  if (!job->done && (job->polls-- > 0 || !job->over())) return ncclInProgress;
  comm.job = nullptr;
  if (!job->done) {
    job->done = true;
    job->then();
  }
  return comm.failure;
}

}  // namespace sim
