#include "communicators.h"

#include <cstring>

#include "arithmetic.h"

namespace sim {
namespace {

using namespace hybridcomm::gpu;

const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"ncclAllReduce", "ncclReduce", "ncclReduceScatter", "ncclAllGather",
                                    "ncclBroadcast", "ncclSend",   "ncclRecv"};
  return kNames[static_cast<size_t>(kind)];
}

bool is_message(const Part& part) { return part.kind == Kind::send || part.kind == Kind::receive; }

// Bytes that a part reads and writes.
std::pair<size_t, size_t> touched(const Part& part) {
  const size_t nbytes = part.count * size_of(part.type);
  const auto ranks = static_cast<size_t>(part.comm->clique->size);
  const bool root = part.peer == part.comm->rank;
  switch (part.kind) {
    case Kind::all_reduce:
      return {nbytes, nbytes};
    case Kind::reduce:
      return {nbytes, root ? nbytes : 0};
    case Kind::reduce_scatter:
      return {nbytes * ranks, nbytes};
    case Kind::all_gather:
      return {nbytes, nbytes * ranks};
    case Kind::broadcast:
      return {root ? nbytes : 0, nbytes};
    case Kind::send:
      return {nbytes, 0};
    case Kind::receive:
      return {0, nbytes};
  }
  return {0, 0};
}

const Part& of_rank(const Meeting& meeting, int rank) {
  for (const Meeting::Come& each : meeting.come) {
    if (each.part.comm->rank == rank) return each.part;
  }
  return meeting.come.front().part;
}

double factor_of(const Part& part) {
  const auto own = static_cast<size_t>(part.op - (ncclAvg + 1));
  return part.op > ncclAvg && own < part.comm->factors.size() ? part.comm->factors[own] : 1.0;
}

void move_reduction(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  const int ranks = first.comm->clique->size;
  const size_t pieces = first.kind == Kind::reduce_scatter ? static_cast<size_t>(ranks) : 1;
  const size_t nbytes = first.count * size_of(first.type);
  std::vector<const unsigned char*> inputs;
  std::vector<double> factors;
  for (int rank = 0; rank < ranks; ++rank) {
    inputs.push_back(of_rank(meeting, rank).from);
    factors.push_back(factor_of(of_rank(meeting, rank)));
  }
  std::vector<unsigned char> result(nbytes * pieces);
  reduce(result.data(), inputs, first.count * pieces, first.type, first.op, factors);
  for (const Meeting::Come& each : meeting.come) {
    const Part& part = each.part;
    if (part.kind == Kind::reduce && part.peer != part.comm->rank) continue;
    const size_t piece = pieces == 1 ? 0 : static_cast<size_t>(part.comm->rank);
    std::memcpy(part.to, result.data() + piece * nbytes, nbytes);
  }
}

void move_copies(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  const size_t nbytes = first.count * size_of(first.type);
  std::vector<unsigned char> whole;
  if (first.kind == Kind::all_gather) {
    for (int rank = 0; rank < first.comm->clique->size; ++rank) {
      const unsigned char* from = of_rank(meeting, rank).from;
      whole.insert(whole.end(), from, from + nbytes);
    }
  } else {
    const Part& root = of_rank(meeting, first.peer);
    whole.assign(root.from, root.from + nbytes);
  }
  for (const Meeting::Come& each : meeting.come) std::memcpy(each.part.to, whole.data(), whole.size());
}

void move(const Meeting& meeting) {
  const Part& first = meeting.come.front().part;
  if (is_message(first)) {
    const Part& last = meeting.come.back().part;
    const Part &from = first.kind == Kind::send ? first : last, &to = first.kind == Kind::send ? last : first;
    std::memcpy(to.to, from.from, from.count * size_of(from.type));
  } else if (first.kind == Kind::all_gather || first.kind == Kind::broadcast) {
    move_copies(meeting);
  } else {
    move_reduction(meeting);
  }
}

}  // namespace

std::string text_of(const Part& part) {
  std::string text = std::string(name_of(part.kind)) + " of " + std::to_string(part.count) + " of type " +
                     std::to_string(part.type);
  if (part.peer >= 0) text += (is_message(part) ? " with " : " at ") + std::to_string(part.peer);
  return text + " by rank " + std::to_string(part.comm->rank);
}

Communicators::Communicators() {
  world().also_reset = [this] { cliques_.clear(), comms_.clear(), running_.clear(); };
  world().also_finish = [this] {
    size_t left = 0;
    for (const Comm& comm : comms_) left += comm.live;
    if (left != 0) world().reports.add(Finding::leak, std::to_string(left) + " communicators");
  };
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
  }
  return found;
}

Comm* Communicators::join(const std::shared_ptr<Clique>& clique, int rank, bool blocking) {
  Comm made{clique, rank, world().here().device, blocking, true, false, 0, 0, 0, nullptr, {}, {}};
  comms_.push_back(std::move(made));
  ++clique->joined;
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
  const std::pair<int, int> pair =
      sends ? std::pair(part.comm->rank, part.peer) : std::pair(part.peer, part.comm->rank);
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
  if (alike && may_touch(meeting)) return move(meeting);
  for (const Meeting::Come& each : meeting.come) {
    if (!alike) each.part.comm->failure = ncclInvalidUsage;
  }
}

void Communicators::come(Meeting& meeting, const Part& part, const Stream& stream) {
  meeting.come.push_back({part, stream.actor, stream.clock, stream.device});
  if (meeting.come.size() == meeting.wanted) meet(meeting);
}

void Communicators::launch(Stream& stream, std::vector<Part> parts) {
  const long id = ++operations_;
  const auto meetings = std::make_shared<std::vector<std::shared_ptr<Meeting>>>();
  const auto shared = std::make_shared<std::vector<Part>>(std::move(parts));
  Operation operation;
  operation.what = text_of(shared->front());
  operation.record = std::make_shared<Record>();
  std::shared_ptr<Record>& last = shared->front().comm->last;
  if (last != nullptr) operation.after.push_back(last);
  last = operation.record;
  operation.admit = [this, id, meetings, shared](const Stream& on) {
    long& running = running_[on.device];
    if (running != 0 && running != id) return false;
    if (meetings->empty()) {
      running = id;
      for (const Part& part : *shared) {
        meetings->push_back(meeting_of(part));
        come(*meetings->back(), part, on);
      }
    }
    bool met = true, aborted = false;
    for (const auto& meeting : *meetings) met &= meeting->met;
    for (const Part& part : *shared) aborted |= part.comm->aborted;
    return met || aborted;
  };
  operation.meet = [this, meetings](Stream& on) {
    for (const auto& meeting : *meetings) on.clock.join(meeting->clock);
    running_[on.device] = 0;
  };
  world().enqueue(stream, std::move(operation));
}

void Communicators::abort(Comm& comm) {
  comm.aborted = true;
  world().wake();
}

}  // namespace sim
