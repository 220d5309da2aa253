// The control channel to one peer: doorbells, goodbyes, "are you there?" and who is to blame.
//
// Every peer that a rank works with has one (a unix socket inside a node, a TCP socket between nodes). Its
// end of file without a word before it is how a dead process is noticed; a rank that fails for another's sake
// says whose before it closes, so the blame reaches all ranks unchanged.
#pragma once

#include "common.h"

namespace hybridcomm {

class ControlChannel {
 public:
  enum class State { open, left, lost };

  ControlChannel(Fd fd, int peer, bool local) : fd_(std::move(fd)), peer_(peer), local_(local) {}

  int fd() const { return fd_.get(); }
  int peer() const { return peer_; }
  bool local() const { return local_; }
  State state() const { return state_; }
  bool aborted() const { return aborted_; }
  int culprit() const { return culprit_; }
  Code reason() const { return reason_; }

  void ring() { send(kDoorbell, -1, Code::aborted); }
  void send_abort(int culprit, Code reason) { send(kAbort, culprit, reason); }
  void send_bye() { send(kBye, -1, Code::aborted); }
  // Asks whether the peer is in a call now: an engine reads its channels, and so answers, only then.
  void probe() {
    answered_ = false;
    send(kProbe, -1, Code::aborted);
  }
  bool answered() const { return answered_; }

  // Reads what has arrived; never blocks.
  void drain();
  // Reads until the peer has explained itself (abort, bye) or is gone; `limit` at most.
  void drain_to_the_end(Clock::duration limit);

 private:
  enum Type : uint32_t { kDoorbell = 1, kAbort = 2, kBye = 3, kProbe = 4, kHere = 5 };
  struct Frame {
    uint32_t type = 0;
    int32_t rank = -1;
    uint32_t reason = 0;
    uint32_t reserved = 0;
  };
  void send(Type type, int rank, Code reason);
  void take(const Frame& frame);

  Fd fd_;
  int peer_;
  bool local_;
  State state_ = State::open;
  bool aborted_ = false;
  bool answered_ = false;
  int culprit_ = -1;
  Code reason_ = Code::aborted;
  Frame partial_;
  size_t got_ = 0;
};

}  // namespace hybridcomm
