#include "control.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

namespace hybridcomm {

void ControlChannel::ask(const Question& question) {
  asked_ = true;
  send(kProbe, -1, Code::aborted, question);
}

void ControlChannel::chase(const Chase& chase) {
  Frame frame;
  frame.type = kChase;
  frame.rank = chase.other;
  frame.round = chase.round;
  frame.question = chase.other_call;
  frame.group = chase.group;
  frame.call = chase.call;
  frame.from_group = chase.from_group;
  frame.from_call = chase.from_call;
  frame.asker = chase.asker;
  send(frame);
}

void ControlChannel::send(Type type, int rank, Code reason, const Question& question) {
  Frame frame;
  frame.type = type;
  frame.rank = rank;
  frame.reason = static_cast<uint32_t>(reason);
  frame.question = question;
  send(frame);
}

void ControlChannel::send(const Frame& frame) {
  // Best effort: a full socket already holds doorbells, and a closed one is noticed by drain().
  [[maybe_unused]] const ssize_t n = ::send(fd_.get(), &frame, sizeof(frame), MSG_DONTWAIT | MSG_NOSIGNAL);
}

void ControlChannel::take(const Frame& frame) {
  if (frame.type == kAbort) {
    aborted_ = true;
    culprit_ = frame.rank;
    reason_ = static_cast<Code>(frame.reason);
    aborted_call_ = frame.question;
    aborted_call_.members[sizeof(aborted_call_.members) - 1] = 0;
  } else if (frame.type == kBye) {
    state_ = State::left;
  } else if (frame.type == kProbe) {
    question_ = frame.question;
    question_->members[sizeof(question_->members) - 1] = 0;
  } else if (frame.type == kHere) {
    asked_ = false;
  } else if (frame.type == kChase) {
    Chase chase;
    chase.asker = frame.asker;
    chase.round = frame.round;
    chase.group = frame.group;
    chase.call = frame.call;
    chase.from_group = frame.from_group;
    chase.from_call = frame.from_call;
    chase.other = frame.rank;
    chase.other_call = frame.question;
    chase.other_call.members[sizeof(chase.other_call.members) - 1] = 0;
    chases_.push_back(chase);
  }
}

void ControlChannel::drain() {
  while (state_ != State::lost) {
    char* at = reinterpret_cast<char*>(&partial_) + got_;
    const ssize_t n = ::recv(fd_.get(), at, sizeof(Frame) - got_, MSG_DONTWAIT);
    if (n > 0) {
      got_ += static_cast<size_t>(n);
      if (got_ == sizeof(Frame)) {
        got_ = 0;
        take(partial_);
      }
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return;
    } else {
      if (state_ == State::open) state_ = State::lost;
      return;
    }
  }
}

void ControlChannel::drain_to_the_end(Clock::duration limit) {
  const auto deadline = Clock::now() + limit;
  for (drain(); state_ == State::open && !aborted_ && Clock::now() < deadline; drain()) {
    pollfd ready{fd_.get(), POLLIN, 0};
    ::poll(&ready, 1, 20);
  }
}

}  // namespace hybridcomm
