// The data link to one peer on another node: several TCP sockets, messages dealt to them in turn.
//
// 1. Both ends follow the same plan, so message i of a link is the same on both and goes through socket i mod
//    n.
// 2. A send is queued and written as far as the kernel takes it (header and data in one gather write, no
//    copy); a receive is posted with its destination before or after the bytes arrive, and read straight into
//    it.
// 3. Nothing blocks. Sockets are registered edge-triggered once; `readable` and `writable` remember the
//    edges.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>

#include "common.h"
#include "tag.h"
#include "wake_mark.h"

namespace hybridcomm {

struct FrameHeader {
  uint32_t magic = 0x314D4348;  // "HCM1"
  uint32_t reserved = 0;
  Tag tag;
};
static_assert(sizeof(FrameHeader) == 40, "the header is part of the wire format");

struct WireCounters {
  std::atomic<uint64_t> tx_bytes{0};
  std::atomic<uint64_t> message_tx_bytes{0};  // of them those of point-to-point messages: no collective's
  std::atomic<uint64_t> rx_bytes{0};
  std::atomic<uint64_t> shm_bytes{0};
  std::atomic<uint64_t> calls{0};  // begun, by all ranks of the job
};

// Where finished messages are reported: one flag per operation of the running program.
class Completion {
 public:
  virtual ~Completion() = default;
  virtual void complete(uint32_t op) = 0;
};

class DataSocket {
 public:
  explicit DataSocket(Fd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  bool idle() const { return out_.empty() && in_.empty(); }
  bool receiving() const { return !in_.empty(); }

  void post_send(uint32_t op, const Tag& tag, const std::byte* data);
  void post_receive(uint32_t op, const Tag& tag, std::byte* data);

  void set_ready(bool readable, bool writable) {
    readable_ |= readable;
    writable_ |= writable;
  }
  enum class Result { nothing, moved, closed };
  Result progress_send(Completion& done, WireCounters& counters);
  Result progress_receive(int peer, Completion& done, WireCounters& counters);
  void forget() {
    out_.clear();
    in_.clear();
  }

 private:
  struct Outgoing {
    uint32_t op;
    FrameHeader header;
    const std::byte* data;
  };
  struct Incoming {
    uint32_t op;
    Tag expected;
    std::byte* data;
  };
  Fd fd_;
  bool readable_ = true, writable_ = true;
  WakeMark wake_mark_;
  std::deque<Outgoing> out_;
  size_t sent_ = 0;  // of the front message, header included
  std::deque<Incoming> in_;
  FrameHeader arriving_;
  size_t received_ = 0;
};

class Link {
 public:
  explicit Link(int peer) : peer_(peer) {}
  int peer() const { return peer_; }
  // Channels may arrive in any order; both ends must number them alike.
  void add(Fd fd, int channel) { sockets_.emplace(channel, std::move(fd)); }
  int size() const { return static_cast<int>(sockets_.size()); }
  std::map<int, DataSocket>& sockets() { return sockets_; }
  const std::map<int, DataSocket>& sockets() const { return sockets_; }
  DataSocket& next_for_send() { return nth(sends_++); }
  DataSocket& next_for_receive() { return nth(receives_++); }
  bool receiving() const;

 private:
  DataSocket& nth(uint64_t count) { return sockets_.at(1 + static_cast<int>(count % sockets_.size())); }
  int peer_;
  std::map<int, DataSocket> sockets_;  // by channel, from 1
  uint64_t sends_ = 0, receives_ = 0;
};

}  // namespace hybridcomm
