// Point-to-point messages from a rank of another node: frames of any kind, honest, bent or raw, in any pieces, between
// this rank's own sends and receives, against a model of who waits for what.
//
// The model knows which frame is an error, what this rank answers, which messages are complete and what they hold.
// Buffers have exact sizes, so that AddressSanitizer sees a byte too many.
#include <sys/socket.h>

#include <algorithm>

#include "fuzz.h"
#include "fuzz_messages.h"

namespace hybridcomm::test {
namespace {

constexpr int kSelf = 0, kPeer = 1;
constexpr size_t kSteps = 24, kLongSends = 2;
constexpr uint32_t kSizes[] = {0, 1, 8,  40,  300, 2000, 16,           0,
                               1, 8, 40, 300, 64,  5,    kEagerNbytes, kEagerNbytes + 9};

// Of a job of two ranks on two nodes; the connections for messages are the target's own.
struct Rank {
  Listener listener{"127.0.0.1", 0};
  Mesh mesh{config(), listener};
  Node node{mesh, false};
  static MeshConfig config() {
    MeshConfig config;
    config.rank = kSelf;
    config.local_ranks = {kSelf};
    config.others = {{kPeer, "127.0.0.1", 1}};
    return config;
  }
};

// Data, otherwise for each seed; it is copied, since loops are slow under the sanitizers.
const uint8_t* bytes_from(uint8_t seed) {
  static const std::vector<uint8_t> bytes = [] {
    std::vector<uint8_t> out(kEagerNbytes + 512);
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<uint8_t>(i * i >> 3);
    return out;
  }();
  return bytes.data() + seed;
}

HalfPtr make_half(Input& input, bool send) {
  auto half = std::make_shared<Half>();
  half->nbytes = kSizes[input.byte() % 16];
  const uint8_t kind = input.byte();
  half->tag.tensor = kind % 2;
  half->tag.digest = kind / 2 % 2;
  half->tag.dtype = kind / 4 % 4 == 3;
  half->tag.numel = half->nbytes;
  half->tag.collective = kMessageCollective;
  half->data.reset(new uint8_t[half->nbytes]);
  if (half->nbytes > 0) std::memcpy(half->data.get(), bytes_from(send ? kind : 0), half->nbytes);
  return half;
}

class Peer {
 public:
  explicit Peer(Rank& rank) : messages_(rank.mesh, rank.node, counters_) {
    messages_.on_finished(
        [](const std::shared_ptr<void>& owner) { ++static_cast<Half*>(owner.get())->done; });
    for (const bool dialled : {true, false}) {
      int ends[2];
      require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
      Connection connection;
      connection.socket = Fd(ends[0]);
      connection.rank = kPeer;
      connection.dialled = dialled;
      messages_.adopt(std::move(connection));
      wires_[dialled].end = Fd(ends[1]);
      wires_[dialled].dialled = dialled;
    }
  }

  bool post(Input& input, bool send) {
    const HalfPtr half = make_half(input, send);
    if (send && half->nbytes > kEagerNbytes && ++long_sends_ > kLongSends) return true;
    Message message;
    message.send = send;
    message.peer = kPeer;
    message.tag = half->tag;
    message.data = reinterpret_cast<std::byte*>(half->data.get());
    message.nbytes = half->nbytes;
    if (send) model_.send(half);
    const bool good = send || model_.receive(half);
    halves_.push_back(half);
    messages_.submit({message}, half);
    return run(good, [this] { work(); });
  }

  // Bytes on one of the connections, in two pieces.
  bool put(bool dialled, const std::vector<uint8_t>& bytes, size_t cut) {
    const size_t first = std::min(cut, bytes.size());
    return put(dialled, bytes.data(), first) && put(dialled, bytes.data() + first, bytes.size() - first);
  }

  void hang_up(bool dialled) {
    for (const HalfPtr& half : halves_) {
      require(std::equal(half->want.begin(), half->want.end(), half->data.get()), "data, as it was sent");
    }
    wires_[dialled].end.reset();
    const bool waits = model_.waits();
    bool gone = false;
    try {
      messages_.set_ready(kPeer, dialled, true, true);
      messages_.progress_socket(kPeer, dialled);
    } catch (const Messages::Gone& error) {
      require(error.rank == kPeer, "the peer that has gone is named");
      gone = true;
    }
    require(gone == waits, "an end is bad news when somebody waits, and only then");
    const std::vector<int> waiting = messages_.waiting_for();
    require(waiting.empty() == !waits, "who is waited for");
  }

 private:
  template <class Body>
  bool run(bool good, const Body& body) {
    bool failed = false;
    try {
      body();
    } catch (const Error& error) {
      require(error.code == Code::mismatch && error.rank == kPeer, "the only error, and it names the peer");
      failed = true;
    }
    require(failed == !good, "a wrong frame is an error, and only that");
    if (good) {
      check();
    } else {
      check_abandoned();
    }
    return good;
  }

  bool put(bool dialled, const uint8_t* bytes, size_t nbytes) {
    if (nbytes == 0) return true;
    Wire& wire = wires_[dialled];
    require(::send(wire.end.get(), bytes, nbytes, MSG_DONTWAIT) == static_cast<ssize_t>(nbytes),
            "there is room");
    wire.stream.insert(wire.stream.end(), bytes, bytes + nbytes);
    bool good = true;
    MessageFrame frame;
    std::vector<uint8_t> data;
    while (good && wire.next(model_, frame, data)) good = model_.take(frame, data);
    return run(good && wire.good, [&] {
      messages_.set_ready(kPeer, dialled, true, true);
      messages_.progress_socket(kPeer, dialled);
      work();
    });
  }

  // Until there is nothing left to do.
  void work() {
    for (bool moved = true; moved;) {
      moved = messages_.progress();
      for (const bool dialled : {true, false}) {
        messages_.set_ready(kPeer, dialled, false, true);
        moved |= messages_.progress_socket(kPeer, dialled);
        moved |= listen(wires_[dialled]);
      }
    }
  }

  static bool listen(Wire& wire) {
    bool heard = false;
    static uint8_t piece[1 << 16];
    for (ssize_t n; (n = ::recv(wire.end.get(), piece, sizeof piece, MSG_DONTWAIT)) > 0; heard = true) {
      wire.read.insert(wire.read.end(), piece, piece + n);
    }
    return heard;
  }

  void check() {
    check_answers();
    check_sends();
    for (const HalfPtr& half : halves_)
      require(half->done == half->due, "complete when it must be, and once");
  }

  // After an error all that is open can be told so.
  void check_abandoned() {
    const std::vector<std::shared_ptr<void>> owners = messages_.abandon();
    for (const HalfPtr& half : halves_) {
      const auto found = std::count(owners.begin(), owners.end(), half);
      require(half->done + found == 1, "every message is complete or abandoned, and once");
    }
  }

  void check_answers() {
    std::vector<uint8_t>& read = wires_[false].read;
    require(read.size() == model_.answers.size() * sizeof(MessageFrame),
            "an answer for each message, no more");
    for (size_t i = 0; i < model_.answers.size(); ++i) {
      MessageFrame frame;
      std::memcpy(static_cast<void*>(&frame), read.data() + i * sizeof frame, sizeof frame);
      require(frame.magic == MessageFrame{}.magic && frame.kind == model_.answers[i].kind &&
                  frame.id == model_.answers[i].id && frame.tag.nbytes == 0,
              "the right answer");
    }
    read.clear();
    model_.answers.clear();
  }

  void check_sends() {
    std::vector<uint8_t>& read = wires_[true].read;
    size_t at = 0;
    while (at < read.size()) {
      MessageFrame frame;
      require(read.size() - at >= sizeof frame, "frames go out whole");
      std::memcpy(static_cast<void*>(&frame), read.data() + at, sizeof frame);
      at += sizeof frame;
      require(frame.magic == MessageFrame{}.magic && frame.id < model_.sends.size(), "a frame of a message");
      Half& half = *model_.sends[frame.id];
      require(same_match(frame.tag, half.tag) && same_size(frame.tag, half.tag), "under its tag");
      const bool begins = frame.kind != FrameKind::data;
      require(begins ? frame.id == begun_++ : half.wanted, "begun in order; long data only after a go");
      const FrameKind first = half.eager ? FrameKind::eager : FrameKind::announce;
      require(!begins || frame.kind == first, "with its data, or announced");
      require(!begins || frame.tag.nbytes == (half.eager ? half.nbytes : 0), "all of it, or nothing yet");
      require(half.moved + frame.tag.nbytes <= half.nbytes && read.size() - at >= frame.tag.nbytes,
              "no more");
      require(std::equal(read.begin() + static_cast<ptrdiff_t>(at),
                         read.begin() + static_cast<ptrdiff_t>(at + frame.tag.nbytes),
                         half.data.get() + half.moved),
              "its own bytes");
      half.moved += frame.tag.nbytes;
      at += frame.tag.nbytes;
    }
    read.clear();
    require(begun_ == model_.sends.size(), "every send is begun");
    for (const HalfPtr& half : model_.sends) {
      require(!half->wanted || half->moved == half->nbytes, "all that was asked for has gone");
    }
  }

  WireCounters counters_;
  Messages messages_;
  Model model_;
  Wire wires_[2];  // by `dialled`
  std::vector<HalfPtr> halves_;
  size_t begun_ = 0, long_sends_ = 0;
};

// A frame as a peer might send it: small numbers, so that they meet what is there; `bent` fields spoil it.
std::vector<uint8_t> make_frame(Input& input, bool reply) {
  constexpr FrameKind kReplies[] = {FrameKind::go, FrameKind::taken};
  constexpr FrameKind kMessages[] = {FrameKind::eager, FrameKind::announce, FrameKind::data, FrameKind::data};
  MessageFrame frame;
  const uint8_t kind = input.byte(), tag = input.byte(), bent = input.byte();
  frame.kind = reply ? kReplies[kind % 2] : kMessages[kind % 4];
  frame.id = kind / 4 % 4;
  frame.tag.tensor = tag % 2;
  frame.tag.digest = tag / 2 % 2;
  frame.tag.dtype = tag / 4 % 4 == 3;
  frame.tag.collective = kMessageCollective;
  frame.tag.numel = kSizes[tag / 16];
  const bool holds = frame.kind == FrameKind::eager || frame.kind == FrameKind::data;
  if (holds) frame.tag.nbytes = static_cast<uint32_t>(frame.tag.numel);
  if (bent % 4 == 1) frame.tag.nbytes = input.take<uint16_t>();
  if (bent % 64 == 3) frame.kind = static_cast<FrameKind>(kind / 16);
  if (bent % 16 == 2) frame.magic ^= 1u << bent / 16;
  if (bent % 16 == 6) frame.id = input.take<uint64_t>();
  if (bent % 16 == 10) frame.tag.nbytes = input.take<uint32_t>();
  const size_t nbytes = std::min<size_t>(frame.tag.nbytes, kEagerNbytes + 16);
  std::vector<uint8_t> bytes(sizeof frame + nbytes);
  std::memcpy(bytes.data(), &frame, sizeof frame);
  if (nbytes > 0) std::memcpy(bytes.data() + sizeof frame, bytes_from(tag), nbytes);
  if (bent % 16 == 14) bytes.resize(bent / 16 * bytes.size() / 16);
  return bytes;
}

}  // namespace
}  // namespace hybridcomm::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  using namespace hybridcomm::test;
  static Rank rank;
  Input input(data, nbytes);
  Peer peer(rank);
  bool good = true;
  for (size_t step = 0; good && step < kSteps && input.left() > 0; ++step) {
    const uint8_t what = input.byte();
    if (what % 8 < 2) {
      good = peer.post(input, what % 8 == 0);
    } else if (what % 8 < 7) {
      const size_t cut = what / 8 % 2 == 0 ? SIZE_MAX : input.byte();
      const bool reply = what % 8 == 2 || what % 8 == 3;
      std::vector<uint8_t> bytes = make_frame(input, reply);
      if (reply && what / 64 % 2 == 0) {  // two at once: before anything is done about the first
        const std::vector<uint8_t> second = make_frame(input, reply);
        bytes.insert(bytes.end(), second.begin(), second.end());
      }
      good = peer.put(reply != (what / 16 == 0), bytes, cut);
    } else {
      std::vector<uint8_t> raw(std::min<size_t>(input.left(), what / 16));
      if (!raw.empty()) input.read(raw.data(), raw.size());
      good = peer.put(what / 8 % 2 == 0, raw, raw.size());
    }
  }
  if (good) peer.hang_up(input.byte() % 2 == 0);
  return 0;
}
