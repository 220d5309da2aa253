// The wire's framing: any bytes, in any pieces, against posted receives; and what a DataSocket sends, bent on the way.
//
// A model knows what must come of every stream: which messages are complete, what their buffers hold, whether a header
// was wrong. Buffers have exact sizes, so that AddressSanitizer sees a byte too many.
#include <sys/socket.h>

#include <algorithm>
#include <memory>

#include "fuzz.h"
#include "link.h"

namespace hybridcomm::test {
namespace {

constexpr size_t kMaxMessages = 4;
constexpr uint8_t kUntouched = 0xA5;

struct Pair {
  Pair() {
    int ends[2];
    require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    near = Fd(ends[0]);
    far = Fd(ends[1]);
  }
  Fd near, far;
};

class Done : public Completion {
 public:
  void complete(uint32_t op) override { ops.push_back(op); }
  std::vector<uint32_t> ops;
};

struct Message {
  Tag tag;
  std::unique_ptr<std::byte[]> sent, received;
};

std::vector<Message> make_messages(Input& input) {
  std::vector<Message> messages(1 + input.byte() % kMaxMessages);
  for (auto& message : messages) {
    message.tag.digest = input.byte();
    message.tag.numel = input.byte();
    message.tag.step = input.byte();
    message.tag.nbytes = input.byte() % 8 == 0 ? 0 : input.take<uint16_t>() % 800;
    message.tag.tensor = input.byte();
    message.sent = std::make_unique<std::byte[]>(message.tag.nbytes);
    message.received = std::make_unique<std::byte[]>(message.tag.nbytes);
    for (uint32_t i = 0; i < message.tag.nbytes; ++i) message.sent[i] = static_cast<std::byte>(i * 7 + 3);
    std::fill_n(message.received.get(), message.tag.nbytes, std::byte{kUntouched});
  }
  return messages;
}

// All that `from` has queued, read off the other end in pieces.
std::vector<uint8_t> drain(DataSocket& from, const Fd& end, size_t count, Input& input) {
  std::vector<uint8_t> stream;
  Done done;
  WireCounters counters;
  uint8_t piece[4096];
  while (!from.idle()) {
    from.set_ready(false, true);
    require(from.progress_send(done, counters) != DataSocket::Result::closed, "the other end is open");
    const ssize_t n = ::recv(end.get(), piece, input.piece(sizeof piece), MSG_DONTWAIT);
    if (n > 0) stream.insert(stream.end(), piece, piece + n);
  }
  for (ssize_t n; (n = ::recv(end.get(), piece, sizeof piece, MSG_DONTWAIT)) > 0;) {
    stream.insert(stream.end(), piece, piece + n);
  }
  require(done.ops.size() == count, "every message is reported as sent, once");
  require(counters.tx_bytes.load() == stream.size(), "bytes are counted");
  return stream;
}

std::vector<uint8_t> make_stream(const std::vector<Message>& messages, Input& input) {
  const uint8_t kind = input.byte();
  if (kind % 4 == 0) return {input.rest(), input.rest() + input.left()};
  Pair pair;
  DataSocket sender(std::move(pair.near));
  uint32_t op = 0;
  size_t total = 0;
  for (const auto& message : messages) {
    sender.post_send(op++, message.tag, message.sent.get());
    total += sizeof(FrameHeader) + message.tag.nbytes;
  }
  std::vector<uint8_t> stream = drain(sender, pair.far, messages.size(), input);
  require(stream.size() == total, "headers and data are sent whole");
  if (kind % 4 == 1) return stream;
  for (int i = 0; i <= kind % 3; ++i) stream[input.take<uint16_t>() % total] ^= input.byte();
  if (kind % 4 == 3) stream.resize(input.take<uint16_t>() % (total + 1));
  return stream;
}

// What a receiver must make of a stream.
struct Model {
  size_t complete = 0, consumed = 0;
  bool mismatch = false;
};

Model model_of(const std::vector<Message>& messages, const std::vector<uint8_t>& stream) {
  Model model;
  for (const auto& message : messages) {
    const size_t left = stream.size() - model.consumed;
    if (left < sizeof(FrameHeader)) break;
    FrameHeader header;
    std::memcpy(static_cast<void*>(&header), stream.data() + model.consumed, sizeof header);
    const Tag& tag = header.tag;
    model.mismatch = header.magic != 0x314D4348 || tag.digest != message.tag.digest ||
                     tag.step != message.tag.step || tag.nbytes != message.tag.nbytes ||
                     tag.tensor != message.tag.tensor;
    if (model.mismatch || left < sizeof header + tag.nbytes) break;
    model.consumed += sizeof header + tag.nbytes;
    ++model.complete;
  }
  return model;
}

void check_buffers(const std::vector<Message>& messages, const std::vector<uint8_t>& stream,
                   const Model& model) {
  size_t at = 0;
  for (size_t m = 0; m < messages.size(); ++m) {
    const auto* received = reinterpret_cast<const uint8_t*>(messages[m].received.get());
    const size_t nbytes = messages[m].tag.nbytes;
    at += sizeof(FrameHeader);
    if (m < model.complete) {
      require(nbytes == 0 || std::memcmp(received, stream.data() + at, nbytes) == 0, "data, as it was sent");
    } else if (m > model.complete) {
      require(std::all_of(received, received + nbytes, [](uint8_t b) { return b == kUntouched; }),
              "a message that did not come leaves its buffer alone");
    }
    at += nbytes;
  }
}

void check_receiver(const std::vector<Message>& messages, const std::vector<uint8_t>& stream, Input& input) {
  Pair pair;
  DataSocket receiver(std::move(pair.near));
  Done done;
  WireCounters counters;
  uint32_t op = 0;
  const size_t early = input.byte() % (messages.size() + 1);  // the others are posted when bytes are there
  const auto post = [&](size_t until) {
    for (; op < until; ++op) receiver.post_receive(op, messages[op].tag, messages[op].received.get());
  };
  post(early);
  const Model model = model_of(messages, stream);
  bool mismatch = false, closed = false;
  const auto progress = [&] {
    receiver.set_ready(true, false);
    try {
      closed = receiver.progress_receive(1, done, counters) == DataSocket::Result::closed;
    } catch (const Error& error) {
      require(error.code == Code::mismatch && error.rank == 1, "the only error, and it names the peer");
      mismatch = true;
    }
  };
  for (size_t at = 0; at < stream.size() && !mismatch;) {
    const size_t piece = input.piece(stream.size() - at);
    const ssize_t n = ::send(pair.far.get(), stream.data() + at, piece, MSG_DONTWAIT);
    if (n > 0) at += static_cast<size_t>(n);
    if (n <= 0) post(messages.size());  // the socket is full until somebody reads
    progress();
    if (!mismatch && at > stream.size() / 2) post(messages.size());
  }
  post(messages.size());
  pair.far.reset();
  if (!mismatch) progress();
  require(mismatch == model.mismatch, "a wrong header is an error, and only that");
  require(mismatch || closed == (model.complete < messages.size()), "an end before the last message is seen");
  require(done.ops.size() == model.complete, "every whole message is reported, once");
  for (uint32_t i = 0; i < done.ops.size(); ++i) require(done.ops[i] == i, "in the order they were posted");
  require(mismatch || closed || receiver.idle(), "nothing is left over");
  check_buffers(messages, stream, model);
}

}  // namespace
}  // namespace hybridcomm::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  using namespace hybridcomm::test;
  Input input(data, nbytes);
  const auto messages = make_messages(input);
  Input pieces = input;  // raw bytes are the stream and say how it is cut
  const auto stream = make_stream(messages, input);
  check_receiver(messages, stream, pieces);
  return 0;
}
