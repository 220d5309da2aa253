// Steps 3 and 7 of 7: reduce and gather, between the ranks of a node.
//
// In: a region of the tensor on every rank of the group. Out: its sum on the owner, or the owner's on all.
//
// Phases of a reduce: 1. all messages are there and are what the plan says; 2. piece by piece, small enough to
// stay in the cache: fetch the peers' piece (nothing to do where it can be addressed), sum, and, if the plan
// gathers the same region next, hand the result straight to the peers that let it; 3. tell them.
#include <algorithm>
#include <cstring>

#include "executor.h"

namespace hybridcomm {
namespace {

constexpr uint64_t kDirectPiece = 16 << 10;  // bytes: source and result pieces stay in the first-level cache
constexpr uint64_t kFetchedPieces =
    256 << 10;  // of scratch for all peers' pieces: a share of the second-level one
constexpr uint64_t kLongestPiece = 128 << 10;

}  // namespace

void Executor::check_message(const Descriptor& message, int local, const Tag& expected) const {
  if (same_message(message.tag, expected)) return;
  const int rank = mesh_.global_rank(local);
  throw Error(Code::mismatch, mismatch_text(rank, message.tag, expected), rank);
}

Executor::Started Executor::post(Lane lane, uint32_t index, const Op& op,
                                 const std::vector<int64_t>& readers) {
  const uint64_t nbytes = message_nbytes(op);
  uint64_t delivered = 0;
  if (op.deliver) delivered = delivered_.front();
  const std::byte* data = op.memory == Memory::scratch ? scratch_.data() + op.offset : tensor_at(op);
  const Node::Message message{index, tag_of(op, nbytes), data, nbytes, op.kind == Kind::share};
  const Node::Posted posted = node_.post(lane, message, readers, delivered);
  if (posted == Node::Posted::no_room) return Started::no;
  if (op.deliver) delivered_.pop_front();
  counters_.shm_bytes.fetch_add(nbytes, std::memory_order_relaxed);
  return posted == Node::Posted::complete ? Started::complete : Started::issued;
}

// The messages of all sources but this rank itself, as regions_ in the same order; false: not all are there.
bool Executor::open_sources(Lane lane, const Op& op) {
  const Tag expected = tag_of(op, message_nbytes(op));
  const int me = node_.local_rank();
  for (const int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) continue;
    const Descriptor* message = node_.next(lane, peer);
    if (message == nullptr) return false;
    check_message(*message, peer, expected);
  }
  regions_.clear();
  own_place_ = op.sources.size();
  for (const int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) {
      own_place_ = regions_.size();
    } else {
      regions_.push_back(node_.open(*node_.next(lane, peer), peer));
    }
  }
  return true;
}

void Executor::take_sources(Lane lane, const Op& op) {
  for (const int64_t source : op.sources) {
    if (source != node_.local_rank()) node_.take(lane, static_cast<int>(source));
  }
}

bool Executor::start_reduce(const Op& op) {
  if (!open_sources(Lane::reduce, op)) return false;
  const Touching touching(*this);
  sum_pieces(op);
  if (op.deliver) {
    uint64_t delivered = 0;
    for (const PeerRegion& region : regions_) {
      if (region.writable) delivered |= uint64_t{1} << region.local;
    }
    delivered_.push_back(delivered);
  }
  take_sources(Lane::reduce, op);
  return true;
}

void Executor::sum_pieces(const Op& op) {
  const size_t item = itemsize(program_->dtype);
  const bool fetched = std::any_of(regions_.begin(), regions_.end(),
                                   [](const PeerRegion& region) { return region.direct == nullptr; });
  const uint64_t share = std::min(kFetchedPieces / std::max<size_t>(regions_.size(), 1), kLongestPiece);
  uint64_t piece = op.count;
  if (fetched) {
    piece = share / 64 * 64 / item;
    if (pieces_.empty()) pieces_.resize(kFetchedPieces);
  } else if (op.deliver) {
    piece = kDirectPiece / item;
  }
  for (uint64_t begin = 0; begin < op.count; begin += piece) {
    const uint64_t count = std::min(piece, op.count - begin);
    std::byte* own = tensor_at(op) + begin * item;
    fetch_pieces(op, own, begin * item, count * item);
    reduce_sources(op, own, count);
    if (!op.deliver) continue;
    for (size_t turn = 0; turn < regions_.size(); ++turn) {
      const PeerRegion& region = regions_[(turn + own_place_) % regions_.size()];
      if (region.writable && !store(region, begin * item, own, count * item)) lost(region.local);
    }
  }
}

// Sets sources_, in group order. Fetched in another one, beginning behind this rank: the ranks of a node would
// otherwise all be at the same peer's page tables at a time.
void Executor::fetch_pieces(const Op& op, std::byte* own, uint64_t offset, uint64_t nbytes) {
  const size_t stride = pieces_.size() / std::max<size_t>(regions_.size(), 1) / 64 * 64;
  sources_.assign(op.sources.size(), own);
  for (size_t turn = 0; turn < regions_.size(); ++turn) {
    const size_t peer = (turn + own_place_) % regions_.size();
    const PeerRegion& region = regions_[peer];
    const std::byte* bytes = fetch(region, offset, nbytes, pieces_.data() + peer * stride);
    if (bytes == nullptr) lost(region.local);
    sources_[peer < own_place_ ? peer : peer + 1] = bytes;
  }
}

bool Executor::start_get(const Op& op) {
  const Descriptor* message = node_.next(Lane::gather, op.peer);
  if (message == nullptr) return false;
  const uint64_t nbytes = region_nbytes(op);
  check_message(*message, op.peer, tag_of(op, nbytes));
  if (message->place != Place::delivered) {
    regions_.assign(1, node_.open(*message, op.peer));
    const Touching touching(*this);
    const std::byte* bytes = fetch(regions_[0], 0, nbytes, tensor_at(op));
    if (bytes == nullptr) lost(op.peer);
    if (bytes != tensor_at(op)) std::memcpy(tensor_at(op), bytes, nbytes);
  }
  node_.take(Lane::gather, op.peer);
  return true;
}

// Every rank copies all inputs before any result is written, so the own region is summed in place.
bool Executor::start_collect(const Op& op) {
  if (!open_sources(Lane::share, op)) return false;
  sum_pieces(op);
  take_sources(Lane::share, op);
  return true;
}

Executor::Touching::Touching(Executor& executor) : executor_(executor) {
  for (const PeerRegion& region : executor_.regions_) {
    if (!executor_.node_.touch(region.local)) {
      untouch();
      executor_.blame(executor_.mesh_.global_rank(region.local));
    }
  }
}

void Executor::Touching::untouch() {
  for (const PeerRegion& region : executor_.regions_) executor_.node_.untouch(region.local);
}

// A peer's memory could not be reached: it died, or it let go of a tensor that is in use.
void Executor::lost(int local) {
  const std::string why = errno_text("its memory could not be reached");
  const int rank = mesh_.global_rank(local);
  ControlChannel& control = *mesh_.find_control(rank);
  control.drain_to_the_end(std::chrono::milliseconds(500));
  if (control.aborted() || control.state() != ControlChannel::State::open) blame(rank);
  throw Error(Code::shared_memory, "rank " + std::to_string(rank) + " is there, but " + why + " in " +
                                       what() + "; pass single_copy=False to init() on all ranks");
}

}  // namespace hybridcomm
