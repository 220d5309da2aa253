// Steps 3 and 7 of 7: reduce and gather, through the lanes of the node's shared memory.
//
// In: a region of the tensor on every rank of the node. Out: its sum on the owner, or the owner's on all.
#include <cstring>

#include "executor.h"

namespace hybridcomm {

void Executor::check_slot(const Segment::Slot& slot, int peer, const Tag& expected) const {
  if (same_message(slot.tag, expected)) return;
  const int rank = mesh_.global_rank(peer);
  throw Error(Code::mismatch, mismatch_text(rank, slot.tag, expected), rank);
}

bool Executor::start_put(const Op& op) {
  const int me = mesh_.local_rank();
  uint64_t& count = put_[static_cast<size_t>(op.peer)];
  if (count - mesh_.segment(op.peer).tail(me).load(std::memory_order_seq_cst) >=
      static_cast<uint64_t>(mesh_.slots())) {
    return false;
  }
  Segment& own = mesh_.own();
  const uint64_t nbytes = region_nbytes(op);
  own.slot(op.peer, count).tag = tag_of(op, nbytes);
  std::memcpy(own.slot_data(op.peer, count), tensor_at(op), nbytes);
  own.head(op.peer).store(++count, std::memory_order_seq_cst);
  counters_.shm_bytes.fetch_add(nbytes, std::memory_order_relaxed);
  mesh_.ring(op.peer);
  return true;
}

bool Executor::start_reduce(const Op& op) {
  const int me = mesh_.local_rank();
  const uint64_t nbytes = region_nbytes(op);
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) continue;
    const uint64_t at = reduced_[static_cast<size_t>(peer)];
    if (mesh_.segment(peer).head(me).load(std::memory_order_seq_cst) <= at) return false;
    check_slot(mesh_.segment(peer).slot(me, at), peer, tag_of(op, nbytes));
  }
  sources_.clear();
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    sources_.push_back(peer == me ? tensor_at(op)
                                  : mesh_.segment(peer).slot_data(me, reduced_[static_cast<size_t>(peer)]));
  }
  reduce_sources(op);
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) continue;
    mesh_.own().tail(peer).store(++reduced_[static_cast<size_t>(peer)], std::memory_order_seq_cst);
    mesh_.ring(peer);
  }
  return true;
}

bool Executor::start_publish(const Op& op) {
  const int me = mesh_.local_rank();
  for (int peer = 0; peer < mesh_.local_size(); ++peer) {
    if (peer != me && published_ - mesh_.segment(peer).shared_tail(me).load(std::memory_order_seq_cst) >=
                          static_cast<uint64_t>(mesh_.slots())) {
      return false;
    }
  }
  Segment& own = mesh_.own();
  const uint64_t nbytes = region_nbytes(op);
  own.slot(me, published_).tag = tag_of(op, nbytes);
  std::memcpy(own.slot_data(me, published_), tensor_at(op), nbytes);
  own.head(me).store(++published_, std::memory_order_seq_cst);
  counters_.shm_bytes.fetch_add(nbytes, std::memory_order_relaxed);
  for (int peer = 0; peer < mesh_.local_size(); ++peer) {
    if (peer != me) mesh_.ring(peer);
  }
  return true;
}

bool Executor::start_get(const Op& op) {
  uint64_t& count = got_[static_cast<size_t>(op.peer)];
  Segment& owner = mesh_.segment(op.peer);
  if (owner.head(op.peer).load(std::memory_order_seq_cst) <= count) return false;
  const uint64_t nbytes = region_nbytes(op);
  check_slot(owner.slot(op.peer, count), op.peer, tag_of(op, nbytes));
  std::memcpy(tensor_at(op), owner.slot_data(op.peer, count), nbytes);
  mesh_.own().shared_tail(op.peer).store(++count, std::memory_order_seq_cst);
  mesh_.ring(op.peer);
  return true;
}

}  // namespace hybridcomm
