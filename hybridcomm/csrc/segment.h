// Shared memory inside a node: one segment per rank, mapped by the node's other ranks.
//
// 1. A segment is a memfd, handed over by descriptor: no name, so kill -9 leaves nothing behind, and
//    /dev/shm's size does not bound it. Its pages are allocated at creation, so a full memory is an error,
//    not a SIGBUS.
// 2. It holds a control block; rings of descriptors for each local rank, which say where messages to that rank
//    lie; the tails of the rings that the owner reads; staging slots for what has to be copied, those of collectives
//    and those of point-to-point messages apart, since neither may wait for the other; and behind all that, allocated
//    as tensors ask for it, the arena (arena.h).
// 3. A descriptor fills a cache line and carries its own number, written last: a reader polls the line that it
//    needs anyway. Tails only grow, and each has one writer.
// 4. A sleeping rank says so; whoever writes what it may wait for rings its doorbell. Those words and
//    `sleeping` are written and read sequentially consistent (free for loads on x86): either the sleeper's
//    last look sees the word, or the writer sees the sleeper.
// 5. Other ranks may read and write an owner's tensors (peer_memory.h). One that fails revokes that, and waits
//    until none is at it: `touching` is raised before `revoked` is looked at.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common.h"
#include "tag.h"

namespace hybridcomm {

enum Sleep : uint32_t { kAwake = 0, kOnFutex = 1, kOnEpoll = 2 };

// Which of the rings to a rank: towards the owner of a region, back from it, small inputs to everybody, or
// point-to-point messages. Apart, so that none waits for another.
enum class Lane : uint32_t { reduce = 0, gather = 1, share = 2, message = 3 };
constexpr int kLanes = 4;
constexpr uint64_t kRing = 64;  // descriptors per ring

// Where a message's bytes lie: in a staging slot or in a tensor of the writer's arena (offsets of its segment), at
// an address of the writer's process, or in the reader's tensor already.
enum class Place : uint32_t { slot, arena, address, delivered };

struct alignas(64) Descriptor {
  std::atomic<uint64_t> number;  // 1 + its place in the ring's history
  Tag tag;
  uint64_t at;
  Place place;
  uint32_t kind;  // of a point-to-point frame, and its number (message_socket.h)
  uint64_t id;
};
static_assert(sizeof(Descriptor) == 64, "one cache line");

struct SegmentShape {
  int local_size = 1;
  size_t slot_nbytes = 0;
  int slots = 0;  // per staging area

  // Staging areas, one for each local rank: of collectives, and behind them of point-to-point messages.
  int message_area(int local) const { return local_size + local; }
  int areas() const { return 2 * local_size; }
  size_t message_slot_nbytes() const { return std::min(slot_nbytes, size_t{64} << 10); }
};

class Segment {
 public:
  static Segment create(const SegmentShape& shape);
  static Segment map(Fd fd, const SegmentShape& shape);

  int fd() const { return fd_.get(); }

  // What the owner posts to a local rank: the entry for message `index` of a lane.
  Descriptor& descriptor(Lane lane, int to, uint64_t index);
  // Messages of a lane from a local rank that the owner has read.
  std::atomic<uint64_t>& tail(Lane lane, int from) { return counter(static_cast<int>(lane), from); }
  // The owner is at local rank k's memory just now.
  std::atomic<uint64_t>& touching(int k) { return counter(kLanes, k); }
  // The owner has found that it can read and write local rank k's memory (1) or that it cannot (0).
  std::atomic<uint64_t>& reaches(int k) { return counter(kLanes + 1, k); }

  std::atomic<uint32_t>& doorbell() { return control().doorbell; }
  std::atomic<uint32_t>& sleeping() { return control().sleeping; }
  std::atomic<uint32_t>& revoked() { return control().revoked; }
  // The collective call that the owner entered last: tells a stalled rank who has not even arrived.
  std::atomic<uint64_t>& entered() { return control().entered; }
  // Who the owner is, for peers that try to read its memory: at `nonce_address` stands `nonce`.
  struct Identity {
    int64_t pid;
    uint64_t nonce_address;
    uint64_t nonce;
  };
  Identity& identity() { return control().identity; }

  // Slot `index` of the owner's staging area `area`, as an offset.
  uint64_t slot(int area, uint64_t index) const;
  // Bytes at an offset: of the slots, or of the owner's arena, which is mapped here as far as it is needed.
  std::byte* at(uint64_t offset, size_t nbytes);
  static size_t arena_offset(const SegmentShape& shape);

 private:
  struct alignas(64) Control {
    std::atomic<uint32_t> doorbell;
    std::atomic<uint32_t> sleeping;
    std::atomic<uint32_t> revoked;
    std::atomic<uint64_t> entered;
    Identity identity;
  };
  struct alignas(64) Counter {
    std::atomic<uint64_t> value;
  };
  static constexpr int kCounters = kLanes + 2;  // per local rank
  static size_t descriptors_offset(const SegmentShape& shape);
  static size_t slots_offset(const SegmentShape& shape);
  static size_t message_slots_offset(const SegmentShape& shape);

  Segment(Fd fd, Mapping mapping, const SegmentShape& shape)
      : fd_(std::move(fd)), mapping_(std::move(mapping)), shape_(shape) {}
  Control& control() { return *reinterpret_cast<Control*>(mapping_.data()); }
  std::atomic<uint64_t>& counter(int kind, int peer) {
    return reinterpret_cast<Counter*>(mapping_.data() + sizeof(Control))[kind * shape_.local_size + peer]
        .value;
  }

  Fd fd_;
  Mapping mapping_;
  Mapping arena_;
  SegmentShape shape_;
};

// Sleeps until `word` differs from `seen`, somebody wakes it, or the time is over.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, Clock::duration limit);
void futex_wake(std::atomic<uint32_t>& word);

// Room at `offset` of a memfd; a lack of memory is an error of Code::shared_memory that says `what_to_do`.
void allocate_shared(int fd, size_t offset, size_t nbytes, const std::string& what_to_do);
Mapping map_shared(int fd, size_t offset, size_t nbytes);

}  // namespace hybridcomm
