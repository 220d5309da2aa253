// Shared memory inside a node: one segment per rank, mapped by the node's other ranks.
//
// 1. A segment is a memfd, handed over by descriptor: no name, so kill -9 leaves nothing behind, and
//    /dev/shm's size does not bound it. Its pages are allocated at creation, so a full memory is an error,
//    not a SIGBUS.
// 2. It holds a control block and one lane per local rank: lane j of rank i carries chunks from i to j, lane
//    i of rank i is read by all others. A lane is a ring of slots; head and tails only grow, and each counter
//    has one writer.
// 3. A sleeping rank says so; whoever moves a counter it may wait for rings its doorbell. Counters and
//    `sleeping` are written and read sequentially consistent (free for loads on x86): either the sleeper's
//    last look sees the counter, or the mover sees the sleeper.
#pragma once

#include <atomic>
#include <cstdint>

#include "common.h"
#include "tag.h"

namespace hybridcomm {

enum Sleep : uint32_t { kAwake = 0, kOnFutex = 1, kOnEpoll = 2 };

struct SegmentShape {
  int local_size = 1;
  size_t slot_nbytes = 0;
  int slots = 0;
};

class Segment {
 public:
  // The slot header; padded so that data starts on its own cache line.
  struct alignas(64) Slot {
    Tag tag;
  };

  static Segment create(const SegmentShape& shape);
  static Segment map(Fd fd, const SegmentShape& shape);

  int fd() const { return fd_.get(); }

  // Slots written so far to a lane by the segment's owner.
  std::atomic<uint64_t>& head(int lane) { return counter(lane); }
  // Slots that the segment's owner has read so far from local rank `from`, of its point-to-point lane ...
  std::atomic<uint64_t>& tail(int from) { return counter(shape_.local_size + from); }
  // ... and of its shared lane.
  std::atomic<uint64_t>& shared_tail(int from) { return counter(2 * shape_.local_size + from); }

  std::atomic<uint32_t>& doorbell() { return control().doorbell; }
  std::atomic<uint32_t>& sleeping() { return control().sleeping; }
  // Collective calls the owner has entered: tells a stalled rank who has not even arrived.
  std::atomic<uint64_t>& entered() { return control().entered; }

  Slot& slot(int lane, uint64_t index);
  std::byte* slot_data(int lane, uint64_t index) {
    return reinterpret_cast<std::byte*>(&slot(lane, index)) + sizeof(Slot);
  }

 private:
  struct alignas(64) Control {
    std::atomic<uint32_t> doorbell;
    std::atomic<uint32_t> sleeping;
    std::atomic<uint64_t> entered;
  };
  struct alignas(64) Counter {
    std::atomic<uint64_t> value;
  };
  static size_t total_nbytes(const SegmentShape& shape);

  Segment(Fd fd, Mapping mapping, const SegmentShape& shape)
      : fd_(std::move(fd)), mapping_(std::move(mapping)), shape_(shape) {}
  Control& control() { return *reinterpret_cast<Control*>(mapping_.data()); }
  std::atomic<uint64_t>& counter(int index) {
    return reinterpret_cast<Counter*>(mapping_.data() + sizeof(Control))[index].value;
  }

  Fd fd_;
  Mapping mapping_;
  SegmentShape shape_;
};

// Sleeps until `word` differs from `seen`, somebody wakes it, or the time is over.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, Clock::duration limit);
void futex_wake(std::atomic<uint32_t>& word);

}  // namespace hybridcomm
