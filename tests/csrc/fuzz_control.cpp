// The control channel: any bytes, in any pieces, against a model of the frames.
#include <sys/socket.h>

#include <algorithm>

#include "control.h"
#include "fuzz.h"

namespace hybridcomm::test {
namespace {

// What every frame begins with (docs/wire-format.md); a question follows, and perhaps more.
struct Head {
  uint32_t type;
  int32_t rank;
  uint32_t reason, other;
};
static_assert(sizeof(Head) == 16, "the frame is part of the wire format");

struct Pair {
  Pair() {
    int ends[2];
    require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    near = Fd(ends[0]);
    far = Fd(ends[1]);
  }
  Fd near, far;
};

// The length of a frame: of what a goodbye puts on the wire.
size_t frame_nbytes() {
  static const size_t nbytes = [] {
    Pair pair;
    ControlChannel(std::move(pair.near), 1, true).send_bye();
    uint8_t bytes[4096];
    return static_cast<size_t>(::recv(pair.far.get(), bytes, sizeof bytes, MSG_DONTWAIT));
  }();
  require(nbytes >= sizeof(Head) + sizeof(Question) && nbytes < 1024, "a frame has room for a question");
  return nbytes;
}

struct Model {
  bool aborted = false, left = false, asked = true;
  int culprit = -1, reason = static_cast<int>(Code::aborted);
  bool question = false;
  Question last;

  void take(const uint8_t* bytes) {
    Head frame;
    std::memcpy(&frame, bytes, sizeof frame);
    if (frame.type == 2) {
      aborted = true;
      culprit = frame.rank;
      reason = static_cast<int>(frame.reason);
    }
    if (frame.type == 3) left = true;
    if (frame.type == 4) {
      question = true;
      std::memcpy(static_cast<void*>(&last), bytes + sizeof frame, sizeof last);
    }
    if (frame.type == 5) asked = false;
  }
};

// Mostly frames of a known type; else the input as it is.
std::vector<uint8_t> make_stream(Input& input) {
  std::vector<uint8_t> stream;
  const uint8_t kind = input.byte();
  if (kind % 4 == 0) return {input.rest(), input.rest() + std::min<size_t>(input.left(), 4096)};
  while (input.left() > 0 && stream.size() < 4096) {
    const uint8_t type = input.byte() % 8;
    std::vector<uint8_t> frame(frame_nbytes());
    input.read(frame.data(), frame.size());
    if (type < 7) frame[0] = type, frame[1] = frame[2] = frame[3] = 0;
    stream.insert(stream.end(), frame.begin(), frame.end());
  }
  if (kind % 4 == 1 && !stream.empty()) stream.resize(stream.size() - kind % frame_nbytes());
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
  if (question) {
    const bool same = question->call == model.last.call && question->tag.digest == model.last.tag.digest &&
                      question->tag.numel == model.last.tag.numel;
    require(same, "the last question");
  }
  require(!channel.take_question(), "asked once");
}

}  // namespace
}  // namespace hybridcomm::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  using namespace hybridcomm;
  using namespace hybridcomm::test;
  Input input(data, nbytes), cuts(data, nbytes);
  const std::vector<uint8_t> stream = make_stream(input);
  Pair pair;
  ControlChannel channel(std::move(pair.near), 1, true);
  Fd peer = std::move(pair.far);
  channel.ask({});
  Model model;
  size_t whole = 0;
  for (size_t at = 0; at < stream.size();) {
    const size_t piece = cuts.piece(stream.size() - at);
    require(::send(peer.get(), stream.data() + at, piece, MSG_DONTWAIT) == static_cast<ssize_t>(piece),
            "there is room");
    at += piece;
    channel.drain();
    for (; whole + frame_nbytes() <= at; whole += frame_nbytes()) model.take(stream.data() + whole);
    check(channel, model, false);
    model.question = false;
  }
  uint8_t probe[1024];
  const ssize_t sent = ::recv(peer.get(), probe, sizeof probe, MSG_DONTWAIT);
  require(sent == static_cast<ssize_t>(frame_nbytes()) && probe[0] == 4, "a question is one frame");
  peer.reset();
  channel.drain_to_the_end(seconds(0));
  check(channel, model, true);
  return 0;
}
