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

// A call of a group, which its ranks number alike.
struct Question {
  uint64_t group = 0;  // digest of its ranks
  uint64_t call = 0;
  Tag tag;
  char members[24] = {};  // of the group, as text, cut short
  bool same_call(const Question& other) const { return group == other.group && call == other.call; }
};

// "Am I in a circle of ranks that wait for each other?" The asker sends it to those it waits for, they send it on to
// those they wait for, and so on; if it comes back, it is.
struct Chase {
  int asker = -1;
  uint32_t round = 0;  // an asker's chases are counted
  uint64_t group = 0;  // the asker's call
  uint64_t call = 0;
  uint64_t from_group = 0;  // the call that the one who sends it on waits in
  uint64_t from_call = 0;
  int other = -1;       // a rank on the way that is in another call ...
  Question other_call;  // ... and which
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
  const Question& aborted_call() const { return aborted_call_; }

  void ring() { send(kDoorbell, -1, Code::aborted); }
  // With the call that this rank gave up in.
  void send_abort(int culprit, Code reason, const Question& call) { send(kAbort, culprit, reason, call); }
  void send_bye() { send(kBye, -1, Code::aborted); }
  // Asks whether the peer is in a call now (an engine reads its channels, and so answers, only then), and
  // whether its call of that number was the same. One question at a time: `asked` until the answer has come.
  void ask(const Question& question);
  void chase(const Chase& chase);
  std::vector<Chase> take_chases() { return std::exchange(chases_, {}); }
  void answer() { send(kHere, -1, Code::aborted); }
  bool asked() const { return asked_; }
  std::optional<Question> take_question() { return std::exchange(question_, std::nullopt); }

  // Reads what has arrived; never blocks.
  void drain();
  // Reads until the peer has explained itself (abort, bye) or is gone; `limit` at most.
  void drain_to_the_end(Clock::duration limit);

 private:
  enum Type : uint32_t { kDoorbell = 1, kAbort = 2, kBye = 3, kProbe = 4, kHere = 5, kChase = 6 };
  struct Frame {
    uint32_t type = 0;
    int32_t rank = -1;
    uint32_t reason = 0;
    uint32_t round = 0;
    Question question;
    uint64_t group = 0, call = 0;            // chase: the asker's
    uint64_t from_group = 0, from_call = 0;  // chase: the sender's
    int32_t asker = -1;
    uint32_t reserved = 0;
  };
  static_assert(sizeof(Frame) == 128, "the frame is part of the wire format");
  void send(Type type, int rank, Code reason, const Question& question = {});
  void send(const Frame& frame);
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
  Question aborted_call_;
  std::vector<Chase> chases_;
  Frame partial_;
  size_t got_ = 0;
};

}  // namespace hybridcomm
