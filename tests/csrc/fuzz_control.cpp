// The control channel: any bytes, in any pieces, against a model of the frames.
#include <sys/socket.h>

#include <algorithm>

#include "control.h"
#include "fuzz.h"

namespace hybridcomm::test {
namespace {

// docs/wire-format.md has the fields.
struct Frame {
  uint32_t type;
  int32_t rank;
  uint32_t reason, round;
  Question question;
  uint64_t group, call, from_group, from_call;
  int32_t asker;
  uint32_t reserved;
};
static_assert(sizeof(Frame) == 128, "the frame is part of the wire format");

struct Model {
  bool aborted = false, left = false, asked = true;
  int culprit = -1, reason = static_cast<int>(Code::aborted);
  bool question = false;
  Question last;
  std::vector<Frame> chases;

  void take(const Frame& frame) {
    if (frame.type == 2) {
      aborted = true;
      culprit = frame.rank;
      reason = static_cast<int>(frame.reason);
    }
    if (frame.type == 3) left = true;
    if (frame.type == 4) {
      question = true;
      last = frame.question;
      last.members[sizeof(last.members) - 1] = 0;
    }
    if (frame.type == 5) asked = false;
    if (frame.type == 6) chases.push_back(frame);
  }
};

// Mostly frames of a known type; else the input as it is.
std::vector<uint8_t> make_stream(Input& input) {
  std::vector<uint8_t> stream;
  const uint8_t kind = input.byte();
  if (kind % 4 == 0) return {input.rest(), input.rest() + std::min<size_t>(input.left(), 4096)};
  while (input.left() > 0 && stream.size() < 4096) {
    const uint8_t type = input.byte() % 8;
    auto frame = input.take<Frame>();
    if (type < 7) frame.type = type;
    const auto* bytes = reinterpret_cast<const uint8_t*>(&frame);
    stream.insert(stream.end(), bytes, bytes + sizeof frame);
  }
  if (kind % 4 == 1 && !stream.empty()) stream.resize(stream.size() - kind % sizeof(Frame));
  return stream;
}

void check(ControlChannel& channel, const Model& model, bool ended) {
  using State = ControlChannel::State;
  const State want = model.left ? State::left : ended ? State::lost : State::open;
  require(channel.state() == want, "open, left after a bye, lost after an end without one");
  require(channel.aborted() == model.aborted, "an abort is noticed");
  require(channel.culprit() == model.culprit && static_cast<int>(channel.reason()) == model.reason,
          "whose fault, and which");
  require(channel.asked() == model.asked, "an answer ends the question");
  const auto question = channel.take_question();
  require(question.has_value() == model.question, "a probe is a question");
  if (question) require(std::memcmp(&*question, &model.last, sizeof(Question)) == 0, "the last question");
  require(!channel.take_question(), "asked once");
  const std::vector<Chase> chases = channel.take_chases();
  require(chases.size() == model.chases.size(), "every chase, once");
  for (size_t i = 0; i < chases.size(); ++i) {
    const Frame& want = model.chases[i];
    const Chase& got = chases[i];
    require(got.asker == want.asker && got.round == want.round && got.other == want.rank, "whose chase");
    require(got.group == want.group && got.call == want.call && got.from_group == want.from_group &&
                got.from_call == want.from_call,
            "in which calls");
    require(got.other_call.members[sizeof(got.other_call.members) - 1] == 0, "text ends");
  }
}

}  // namespace
}  // namespace hybridcomm::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  using namespace hybridcomm;
  using namespace hybridcomm::test;
  Input input(data, nbytes), cuts(data, nbytes);
  const std::vector<uint8_t> stream = make_stream(input);
  int ends[2];
  require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
  ControlChannel channel(Fd(ends[0]), 1, true);
  Fd peer(ends[1]);
  channel.ask({});
  Model model;
  size_t whole = 0;
  for (size_t at = 0; at < stream.size();) {
    const size_t piece = cuts.piece(stream.size() - at);
    require(::send(peer.get(), stream.data() + at, piece, MSG_DONTWAIT) == static_cast<ssize_t>(piece),
            "there is room");
    at += piece;
    channel.drain();
    for (; whole + sizeof(Frame) <= at; whole += sizeof(Frame)) {
      Frame frame;
      std::memcpy(static_cast<void*>(&frame), stream.data() + whole, sizeof frame);
      model.take(frame);
    }
    check(channel, model, false);
    model.question = false;
    model.chases.clear();
  }
  Frame probe;
  require(::recv(peer.get(), &probe, sizeof probe, MSG_DONTWAIT) == sizeof probe && probe.type == 4,
          "what a channel sends is a frame");
  peer.reset();
  channel.drain_to_the_end(seconds(5));  // whoever looks at the process's descriptors may hold the end up
  check(channel, model, true);
  return 0;
}
