// The control channel to one peer: doorbells, goodbyes, "are you there?" and who is to blame.
//
// Every peer that a rank works with has one (a unix socket inside a node, a TCP socket between nodes). Its
// end of file without a word before it is how a dead process is noticed; a rank that fails for another's sake
// says whose before it closes, so the blame reaches all ranks unchanged.
#pragma once

#include <optional>

#include "common.h"
#include "tag.h"

namespace hybridcomm {

struct Question {
  uint64_t call = 0;  // the calls of a context are numbered alike on all ranks
  Tag tag;
};

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
  // Asks whether the peer is in a call now (an engine reads its channels, and so answers, only then), and
  // whether its call of that number was the same. One question at a time: `asked` until the answer has come.
  void ask(const Question& question);
  void answer() { send(kHere, -1, Code::aborted); }
  bool asked() const { return asked_; }
  std::optional<Question> take_question() { return std::exchange(question_, std::nullopt); }

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
    Question question;
  };
  void send(Type type, int rank, Code reason, const Question& question = {});
  void take(const Frame& frame);

  Fd fd_;
  int peer_;
  bool local_;
  State state_ = State::open;
  bool aborted_ = false;
  bool asked_ = false;
  std::optional<Question> question_;
  int culprit_ = -1;
  Code reason_ = Code::aborted;
  Frame partial_;
  size_t got_ = 0;
};

}  // namespace hybridcomm
