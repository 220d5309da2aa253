// Meetings with ranks of other processes, by the broker: parts go there with their data and clocks, and come from there.
#include <algorithm>
#include <cstring>

#include "broker.h"
#include "communicators.h"
#include "movement.h"

namespace sim {
namespace {

using namespace hybridcomm::gpu;

// `data`: what the part reads.
std::string packed(const Part& part, const Clock& clock, uint32_t process, bool sound,
                   const std::string& data) {
  Packer packer;
  uint64_t factor = 0;
  std::memcpy(&factor, &part.factor, sizeof(factor));
  packer.number(static_cast<uint64_t>(part.kind)).number(part.count).number(static_cast<uint32_t>(part.type));
  packer.number(static_cast<uint32_t>(part.op)).number(static_cast<uint32_t>(part.peer));
  packer.number(static_cast<uint32_t>(part.rank)).number(factor).number(sound);
  const auto ticks = clock.told(process);
  packer.number(ticks.size());
  for (const auto& [actor, tick] : ticks) packer.number(actor).number(tick);
  packer.text(data);
  return packer.bytes();
}

// The part's data goes to `held`.
Part unpacked(const std::string& bytes, uint32_t process, Clock& clock, bool& sound, std::string& held) {
  Unpacker unpacker(bytes);
  Part part{};
  part.kind = static_cast<Kind>(unpacker.number());
  part.count = static_cast<size_t>(unpacker.number());
  part.type = static_cast<int>(unpacker.number());
  part.op = static_cast<int>(unpacker.number());
  part.peer = static_cast<int>(unpacker.number());
  part.rank = static_cast<int>(unpacker.number());
  const uint64_t factor = unpacker.number();
  std::memcpy(&part.factor, &factor, sizeof(factor));
  sound = unpacker.number() != 0;
  std::map<uint64_t, uint32_t> ticks;
  for (uint64_t left = unpacker.number(); left > 0; --left) {
    const uint64_t actor = unpacker.number();
    ticks[actor] = static_cast<uint32_t>(unpacker.number());
  }
  clock = Clock::heard(ticks, process);
  held = unpacker.text();
  return part;
}

std::string place_of(const Part& part) {
  const std::string& name = part.comm->clique->name;
  const std::string number = std::to_string(part.number);
  if (!is_message(part)) return name + " call " + number;
  const bool sends = part.kind == Kind::send;
  return name + " from " + std::to_string(sends ? part.rank : part.peer) + " to " +
         std::to_string(sends ? part.peer : part.rank) + " message " + number;
}

}  // namespace

bool Clique::ready() {
  if (complete) return true;
  std::map<int, std::string> all;
  Broker* broker = Broker::get();
  complete = broker == nullptr
                 ? joined >= size
                 : !members.empty() && broker->found(name + " join", members.front()->rank, all);
  return complete;
}

std::shared_ptr<Meeting> Communicators::send_part(const Part& part, const Stream& stream) {
  auto meeting = std::make_shared<Meeting>();
  meeting->place = place_of(part);
  meeting->own = is_message(part) ? part.kind == Kind::receive : part.rank;
  meeting->wanted = is_message(part) ? 2 : static_cast<size_t>(part.ranks);
  meeting->come.push_back({part, stream.actor, stream.clock, stream.device});
  const size_t reads = touched(part).first;
  const auto from = reinterpret_cast<uintptr_t>(part.from);
  const bool sound =
      world().memory.access(from, reads, false, stream.actor, stream.clock, stream.device, text_of(part));
  const std::string data =
      sound && reads != 0 ? std::string(reinterpret_cast<const char*>(part.from), reads) : "";
  Broker& broker = *Broker::get();
  broker.put(meeting->place, meeting->wanted, meeting->own,
             packed(part, stream.clock, broker.process(), sound, data));
  return meeting;
}

// Each rank moves what it gets itself.
bool Communicators::arrived(Meeting& meeting, const Running& running) {
  std::map<int, std::string> all;
  Broker* broker = Broker::get();
  if (broker == nullptr || !broker->found(meeting.place, meeting.own, all)) return false;
  meeting.met = true;
  bool sound = true;
  meeting.held.resize(all.size());  // before anything points into it
  size_t i = 0;
  for (const auto& [who, bytes] : all) {
    Clock clock;
    bool fine = true;
    Part part = unpacked(bytes, broker->process(), clock, fine, meeting.held[i]);
    sound &= fine;
    meeting.clock.join(clock);
    part.from = reinterpret_cast<const unsigned char*>(meeting.held[i++].data());
    part.ranks = running.parts.front().ranks;
    if (who == meeting.own) {
      meeting.come.front().part.from = part.from;
    } else {
      meeting.come.push_back({part, -1, clock, -1});
    }
  }
  const Meeting::Come& own = meeting.come.front();
  const bool alike = same(meeting);
  if (!alike) own.part.comm->failure = ncclInvalidUsage;
  const auto to = reinterpret_cast<uintptr_t>(own.part.to);
  const size_t writes = touched(own.part).second;
  sound &= world().memory.access(to, writes, true, own.actor, own.clock, own.device, text_of(own.part));
  if (alike && sound) move(meeting);
  meeting.held.clear();
  return true;
}

void Communicators::hear(Comm& comm) {
  Broker* broker = Broker::get();
  if (broker == nullptr || comm.inside == 0) return;
  for (int rank : broker->lost(comm.clique->name)) {
    if (rank != comm.rank && comm.heard.insert(rank).second) comm.told |= world().coin(50);
  }
}

std::string Communicators::missing(const Running& running) const {
  std::string text;
  for (const auto& meeting : running.meetings) {
    if (meeting->met) continue;
    std::map<int, std::string> come;
    if (Broker* broker = Broker::get()) {
      broker->found(meeting->place, meeting->own, come);
    } else {
      for (const Meeting::Come& each : meeting->come)
        come[is_message(each.part) ? each.part.kind == Kind::receive : each.part.rank];
    }
    for (int rank = 0; rank < static_cast<int>(meeting->wanted); ++rank) {
      if (come.count(rank) != 0) continue;
      const Part& part = running.parts.front();
      text += (text.empty() ? " without " : ", ") + std::string(is_message(part) ? "peer" : "rank") + " " +
              std::to_string(is_message(part) ? part.peer : rank);
    }
  }
  return text;
}

}  // namespace sim
