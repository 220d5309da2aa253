// Messages between the ranks of a node (steps 3 and 7 of 7): rings of descriptors, and what they point to.
//
// 1. A message is posted by writing where its bytes lie into the reader's ring. Which way is best is up to the
//    writer, message by message, so ranks may differ: a tensor in shared memory is pointed to; private memory is
//    too where the reader reaches it and the message is long enough; otherwise it is copied into a staging slot.
// 2. What is pointed to must stay as it is until the reader's tail has passed: only then is the operation that
//    posted it complete. A copied message is complete at once.
// 3. Whoever reads a region may write results straight back into it (`deliver`): its owner waits for the very
//    same region, and nobody else reads it.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "arena.h"
#include "link.h"
#include "mesh.h"
#include "message_socket.h"
#include "peer_memory.h"

namespace hybridcomm {

class Node {
 public:
  struct Message {
    uint32_t op = 0;  // reported complete when the message has been read
    Tag tag;
    const std::byte* data = nullptr;
    uint64_t nbytes = 0;
    bool copy = false;  // the operation changes the region right after: nobody may read it there
  };
  enum class Posted { no_room, complete, pending };

  Node(Mesh& mesh, bool single_copy);

  // To readers (local ranks; this one is left out); those of the bit mask `delivered` have the bytes already.
  Posted post(Lane lane, const Message& message, const std::vector<int64_t>& readers, uint64_t delivered = 0);
  // How a region may be pointed to for one reader; nothing: it has to be copied.
  struct Pointer {
    Place place;
    uint64_t at;
  };
  std::optional<Pointer> point_to(const std::byte* data, uint64_t nbytes, int reader);
  // A point-to-point frame, its data (may be null) copied into a slot; false: no room now.
  bool post_frame(int reader, const MessageFrame& frame, Pointer pointer, const std::byte* data);
  // Reports operations whose messages have all been read.
  bool progress(Completion& done);

  // The next message from a local rank, or null. It stays until take().
  const Descriptor* next(Lane lane, int from);
  PeerRegion open(const Descriptor& message, int from) {
    return open({message.place, message.at}, message.tag.nbytes, from);
  }
  PeerRegion open(const Pointer& pointer, uint64_t nbytes, int from);
  void take(Lane lane, int from);

  // Around every use of peers' regions. False: that peer has failed and withdrawn its memory.
  bool touch(int local);
  void untouch(int local);
  // Withdraws this rank's memory; returns when no peer is at it any more, or after 2 s.
  void revoke();

  // Who is waited for: peers that have not read all that was posted to them, peers that have posted nothing new,
  // and peers that have not read what was posted by reference.
  std::vector<int> unread(Lane lane, const std::vector<int64_t>& readers);
  std::vector<int> silent(Lane lane, const std::vector<int64_t>& writers);
  std::vector<int> pending_readers();
  Reach reach(int local) const { return reach_[static_cast<size_t>(local)]; }
  std::vector<std::pair<int, Reach>> reaches() const;  // of the node's other ranks
  const std::shared_ptr<Arena>& arena() const { return arena_; }
  int local_rank() const { return me_; }

 private:
  struct Use {  // of a staging slot, or of a region, by one reader
    Lane lane;
    int reader;
    uint64_t number;
  };
  struct Reference {
    uint32_t op;
    uint64_t address;
    std::vector<Use> uses;
  };
  size_t ring(Lane lane, int local) const {
    return static_cast<size_t>(lane) * static_cast<size_t>(locals_) + static_cast<size_t>(local);
  }
  bool full(Lane lane, int reader);
  bool used(const Use& use);
  bool by_reference(const Message& message, int reader, bool in_arena);
  std::vector<Use>* free_slot(int area, uint64_t* offset);
  void write(Lane lane, int reader, const MessageFrame& frame, Place place, uint64_t at,
             std::vector<Use>& uses);

  Mesh& mesh_;
  const int me_, locals_;
  std::shared_ptr<Arena> arena_;  // null: alone on this node
  std::vector<Reach> reach_;
  std::vector<uint64_t> posted_, taken_;  // by ring
  std::vector<uint64_t> staged_;          // messages so far, by staging area
  std::vector<std::vector<Use>> slots_;   // of all areas
  std::vector<Reference> references_;
};

}  // namespace hybridcomm
