// A connection for point-to-point messages to a rank of another node: frames one after another, in both directions.
//
// 1. The sender of messages dials it. Announcements and data travel with the dialling, replies against it; two ranks
//    that send to each other have two.
// 2. One frame at a time is under way. A short one is copied, so its memory is free at once; the data of a long one
//    goes out from where it lies. Nothing blocks.
#pragma once

#include <vector>

#include "common.h"
#include "link.h"
#include "tag.h"
#include "wake_mark.h"

namespace hybridcomm {

// eager: a message with its data. announce: one that waits until it is wanted; in a node its descriptor may say where
// it lies. go: its receiver has room. data: a piece of it. taken: its receiver has it.
enum class FrameKind : uint32_t { none, eager, announce, go, data, taken };

// The tag of a message: digest of the group, numel of the whole, nbytes in this frame, `tensor` the caller's tag.
struct MessageFrame {
  uint32_t magic = 0x324D4348;  // "HCM2"
  FrameKind kind = FrameKind::none;
  uint64_t id = 0;  // of the message, counted by its sender for each receiver
  Tag tag;
};
static_assert(sizeof(MessageFrame) == 48, "the frame is part of the wire format");

constexpr uint64_t kEagerNbytes = 64 << 10;   // longer messages wait for their receiver
constexpr uint64_t kEagerWindow = 1 << 20;    // of short ones that a receiver has not asked for, per sender
constexpr uint64_t kPieceNbytes = 512 << 10;  // of a long message, so that others go in between

// Who takes frames in.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  // Where the data of a frame (kind data) belongs.
  virtual std::byte* destination(int peer, const MessageFrame& frame) = 0;
  // A frame has come, with its data (null: none, or at its destination already).
  virtual void arrived(int peer, const MessageFrame& frame, const std::byte* data) = 0;
};

class MessageSocket {
 public:
  // `dialled`: by this rank, so that replies come in.
  MessageSocket(Fd fd, bool dialled) : fd_(std::move(fd)), dialled_(dialled) {}
  int fd() const { return fd_.get(); }
  bool idle() const { return left_ == 0; }
  void set_ready(bool readable, bool writable) {
    readable_ |= readable;
    writable_ |= writable;
  }

  // Only when idle. Without `copy` the data must stay until the socket is idle again.
  void begin(const MessageFrame& frame, const std::byte* data, bool copy);
  enum class Result { nothing, moved, closed };
  Result progress_send(WireCounters& counters);
  Result progress_receive(int peer, FrameSink& sink, WireCounters& counters);
  // Before closing, since a connection that is closed and then spoken to is reset, and what is on its way is lost: reads
  // away what has come, and, after a moment, tells whether all has reached the peer's side.
  void drain();
  bool delivered() const;

 private:
  bool arrive(int peer, FrameSink& sink);

  Fd fd_;
  bool dialled_;
  bool readable_ = true, writable_ = true;
  WakeMark wake_mark_;
  MessageFrame sending_;
  const std::byte* data_ = nullptr;
  std::vector<std::byte> copy_;
  size_t left_ = 0;  // of the frame under way, header included
  MessageFrame arriving_;
  size_t received_ = 0;
  std::byte* target_ = nullptr;
  std::vector<std::byte> inbox_;
};

}  // namespace hybridcomm
