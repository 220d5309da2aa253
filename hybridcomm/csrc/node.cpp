#include "node.h"

#include <fcntl.h>
#include <sched.h>

#include <algorithm>
#include <cstring>

namespace hybridcomm {
namespace {

// Below these, two copies through a slot cost less than the wait for the reader, and than the system calls for
// private memory beside it (measured: 64 KiB are even on cores that share a third-level cache).
constexpr uint64_t kCopyShared = 4 << 10;
constexpr uint64_t kCopyPrivate = 64 << 10;
constexpr int kMaskBits = 64;
constexpr auto kRevokeLimit = std::chrono::seconds(2);  // no message takes that long; a stopped peer might

}  // namespace

Node::Node(Mesh& mesh, bool single_copy) : mesh_(mesh), me_(mesh.local_rank()), locals_(mesh.local_size()) {
  const auto locals = static_cast<size_t>(locals_);
  reach_.resize(locals, Reach::staged);
  posted_.resize(kLanes * locals);
  taken_.resize(kLanes * locals);
  const auto areas = static_cast<size_t>(mesh_.segment_shape().areas());
  staged_.resize(areas);
  slots_.resize(areas * static_cast<size_t>(mesh_.slots()));
  if (locals_ == 1) return;
  Fd fd(::fcntl(mesh_.own().fd(), F_DUPFD_CLOEXEC, 0));
  if (!fd) throw Error(Code::shared_memory, errno_text("no descriptor left for the shared arena"));
  arena_ = std::make_shared<Arena>(std::move(fd), Segment::arena_offset(mesh_.segment_shape()));
  for (int peer = 0; peer < locals_; ++peer) {
    if (peer == me_) continue;
    reach_[static_cast<size_t>(peer)] = find_reach(mesh_.segment(peer), single_copy);
    mesh_.own().reaches(peer).store(reach(peer) != Reach::staged, std::memory_order_seq_cst);
  }
}

std::vector<std::pair<int, Reach>> Node::reaches() const {
  std::vector<std::pair<int, Reach>> found;
  for (int peer = 0; peer < locals_; ++peer) {
    if (peer != me_) found.emplace_back(mesh_.global_rank(peer), reach(peer));
  }
  return found;
}

bool Node::full(Lane lane, int reader) {
  const uint64_t read = mesh_.segment(reader).tail(lane, me_).load(std::memory_order_seq_cst);
  return posted_[ring(lane, reader)] - read >= kRing;
}

bool Node::used(const Use& use) {
  return mesh_.segment(use.reader).tail(use.lane, me_).load(std::memory_order_seq_cst) > use.number;
}

std::vector<Node::Use>* Node::free_slot(int area, uint64_t* offset) {
  const uint64_t turn = staged_[static_cast<size_t>(area)];
  const auto slots = static_cast<uint64_t>(mesh_.slots());
  auto& uses = slots_[static_cast<size_t>(area) * slots + turn % slots];
  if (!std::all_of(uses.begin(), uses.end(), [this](const Use& use) { return used(use); })) return nullptr;
  *offset = mesh_.own().slot(area, turn);
  return &uses;
}

bool Node::by_reference(const Message& message, int reader, bool in_arena) {
  if (message.copy || message.nbytes < (in_arena ? kCopyShared : kCopyPrivate)) return false;
  return in_arena || mesh_.segment(reader).reaches(me_).load(std::memory_order_relaxed) != 0;
}

void Node::write(Lane lane, int reader, const MessageFrame& frame, Place place, uint64_t at,
                 std::vector<Use>& uses) {
  uint64_t& posted = posted_[ring(lane, reader)];
  uses.push_back({lane, reader, posted});
  Descriptor& entry = mesh_.own().descriptor(lane, reader, posted);
  entry.tag = frame.tag;
  entry.at = at;
  entry.place = place;
  entry.kind = static_cast<uint32_t>(frame.kind);
  entry.id = frame.id;
  entry.number.store(++posted, std::memory_order_seq_cst);
  mesh_.ring(reader);
}

Node::Posted Node::post(Lane lane, const Message& message, const std::vector<int64_t>& readers,
                        uint64_t delivered) {
  const std::optional<uint64_t> shared =
      message.copy ? std::nullopt : arena_->find(message.data, message.nbytes);
  const auto is_delivered = [delivered](int reader) { return (delivered >> reader & 1) != 0; };
  bool copies = false;
  for (const int64_t local : readers) {
    const int reader = static_cast<int>(local);
    if (reader == me_) continue;
    if (full(lane, reader)) return Posted::no_room;
    copies |= !is_delivered(reader) && !by_reference(message, reader, shared.has_value());
  }
  // One area per reader for what goes to owners; what several may read is copied once, into this rank's own.
  const int area = lane == Lane::reduce ? static_cast<int>(readers.front()) : me_;
  uint64_t slot = 0;
  std::vector<Use>* slot_uses = copies ? free_slot(area, &slot) : nullptr;
  if (copies && slot_uses == nullptr) return Posted::no_room;
  if (copies) {
    slot_uses->clear();
    ++staged_[static_cast<size_t>(area)];
    std::memcpy(mesh_.own().at(slot, message.nbytes), message.data, message.nbytes);
  }
  std::vector<Use> references, forgotten;
  MessageFrame frame;
  frame.tag = message.tag;
  for (const int64_t local : readers) {
    const int reader = static_cast<int>(local);
    if (reader == me_) continue;
    if (is_delivered(reader)) {
      write(lane, reader, frame, Place::delivered, 0, forgotten);
    } else if (!by_reference(message, reader, shared.has_value())) {
      write(lane, reader, frame, Place::slot, slot, *slot_uses);
    } else if (shared) {
      write(lane, reader, frame, Place::arena, *shared, references);
    } else {
      hand_over(reinterpret_cast<uint64_t>(message.data));
      write(lane, reader, frame, Place::address, reinterpret_cast<uint64_t>(message.data), references);
    }
  }
  if (references.empty()) return Posted::complete;
  references_.push_back({message.op, reinterpret_cast<uint64_t>(message.data), std::move(references)});
  return Posted::pending;
}

bool Node::progress(Completion& done) {
  const auto read = [this](const Reference& reference) {
    return std::all_of(reference.uses.begin(), reference.uses.end(),
                       [this](const Use& use) { return used(use); });
  };
  size_t kept = 0;
  for (size_t i = 0; i < references_.size(); ++i) {
    if (read(references_[i])) {
      take_over(references_[i].address);
      done.complete(references_[i].op);
    } else {
      if (kept != i) references_[kept] = std::move(references_[i]);
      ++kept;
    }
  }
  const bool moved = kept != references_.size();
  references_.resize(kept);
  return moved;
}

const Descriptor* Node::next(Lane lane, int from) {
  const uint64_t taken = taken_[ring(lane, from)];
  const Descriptor& entry = mesh_.segment(from).descriptor(lane, me_, taken);
  return entry.number.load(std::memory_order_seq_cst) == taken + 1 ? &entry : nullptr;
}

PeerRegion Node::open(const Pointer& pointer, uint64_t nbytes, int from) {
  PeerRegion region;
  region.local = from;
  region.writable = pointer.place != Place::slot && from < kMaskBits;
  if (pointer.place == Place::slot || pointer.place == Place::arena) {
    region.direct = mesh_.segment(from).at(pointer.at, nbytes);
  } else if (reach(from) == Reach::same_process) {
    take_over(pointer.at);
    region.direct = reinterpret_cast<std::byte*>(pointer.at);
  } else {
    region.pid = mesh_.segment(from).identity().pid;
    region.address = pointer.at;
  }
  return region;
}

std::optional<Node::Pointer> Node::point_to(const std::byte* data, uint64_t nbytes, int reader) {
  const std::optional<uint64_t> shared = arena_->find(data, nbytes);
  if (!by_reference({0, {}, data, nbytes, false}, reader, shared.has_value())) return std::nullopt;
  if (shared) return Pointer{Place::arena, *shared};
  hand_over(reinterpret_cast<uint64_t>(data));
  return Pointer{Place::address, reinterpret_cast<uint64_t>(data)};
}

bool Node::post_frame(int reader, const MessageFrame& frame, Pointer pointer, const std::byte* data) {
  if (full(Lane::message, reader)) return false;
  std::vector<Use> forgotten;
  std::vector<Use>* uses = &forgotten;
  if (data != nullptr && frame.tag.nbytes > 0) {
    const int area = mesh_.segment_shape().message_area(reader);
    uses = free_slot(area, &pointer.at);
    if (uses == nullptr) return false;
    uses->clear();
    ++staged_[static_cast<size_t>(area)];
    std::memcpy(mesh_.own().at(pointer.at, frame.tag.nbytes), data, frame.tag.nbytes);
  }
  write(Lane::message, reader, frame, pointer.place, pointer.at, *uses);
  return true;
}

void Node::take(Lane lane, int from) {
  uint64_t& taken = taken_[ring(lane, from)];
  if (reach(from) == Reach::same_process) hand_over(mesh_.segment(from).descriptor(lane, me_, taken).at);
  mesh_.own().tail(lane, from).store(++taken, std::memory_order_seq_cst);
  mesh_.ring(from);
}

bool Node::touch(int local) {
  mesh_.own().touching(local).store(1, std::memory_order_seq_cst);
  return mesh_.segment(local).revoked().load(std::memory_order_seq_cst) == 0;
}

void Node::untouch(int local) { mesh_.own().touching(local).store(0, std::memory_order_release); }

void Node::revoke() {
  if (locals_ == 1) return;
  mesh_.own().revoked().store(1, std::memory_order_seq_cst);
  const auto limit = Clock::now() + kRevokeLimit;
  for (int peer = 0; peer < locals_; ++peer) {
    if (peer == me_) continue;
    while (mesh_.segment(peer).touching(me_).load(std::memory_order_seq_cst) != 0 && Clock::now() < limit) {
      ::sched_yield();
    }
  }
}

std::vector<int> Node::unread(Lane lane, const std::vector<int64_t>& readers) {
  std::vector<int> found;
  for (const int64_t reader : readers) {
    const int local = static_cast<int>(reader);
    if (local == me_) continue;
    if (mesh_.segment(local).tail(lane, me_).load() < posted_[ring(lane, local)]) found.push_back(local);
  }
  return found;
}

std::vector<int> Node::silent(Lane lane, const std::vector<int64_t>& writers) {
  std::vector<int> found;
  for (const int64_t writer : writers) {
    if (writer != me_ && next(lane, static_cast<int>(writer)) == nullptr) {
      found.push_back(static_cast<int>(writer));
    }
  }
  return found;
}

std::vector<int> Node::pending_readers() {
  std::vector<int> found;
  for (const Reference& reference : references_) {
    for (const Use& use : reference.uses) {
      if (!used(use)) found.push_back(use.reader);
    }
  }
  return found;
}

}  // namespace hybridcomm
