// The handshake's parser, both sides, under strangers that say anything in any pieces, descriptors included, and under
// a peer that knows the secret: only who proves it joins, and no descriptor stays behind.
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>

#include "fuzz.h"
#include "handshake.h"

namespace hybridcomm::test {
namespace {

using State = Handshake::State;

constexpr Token kToken{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
constexpr int kSelf = 3, kPeer = 5, kChannels = 3;
constexpr uint8_t kWelcome[4] = {'W', 'L', 'M', 'E'};

// The lowest free descriptor: the same before and after when none is kept.
int free_descriptor() {
  const int fd = ::fcntl(0, F_DUPFD_CLOEXEC, 0);
  ::close(fd);
  return fd;
}

// What is passed along; never a socket, whose cycles the kernel would have to search for.
int some_file() {
  static const int fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  return fd;
}

struct Stranger {
  Fd socket;

  void send(const void* data, size_t nbytes, int descriptors) {
    iovec part{const_cast<void*>(data), nbytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
    if (descriptors > 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(static_cast<size_t>(descriptors) * sizeof(int));
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(static_cast<size_t>(descriptors) * sizeof(int));
      const int own[4] = {some_file(), some_file(), some_file(), some_file()};
      std::memcpy(CMSG_DATA(header), own, static_cast<size_t>(descriptors) * sizeof(int));
    }
    [[maybe_unused]] const ssize_t n = ::sendmsg(socket.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  // What has come; a descriptor that came along is closed and counted.
  size_t receive(void* to, size_t nbytes, int& descriptors) const {
    iovec part{to, nbytes};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = ::recvmsg(socket.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n <= 0) return 0;
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
      ::close(fd);
      ++descriptors;
    }
    return static_cast<size_t>(n);
  }
};

Digest proof(const Hello& hello, const Nonce& nonce, uint8_t by_dialler, bool knows) {
  uint8_t text[sizeof(Hello) + sizeof(Nonce) + 1];
  std::memcpy(text, &hello, sizeof hello);
  std::memcpy(text + sizeof hello, nonce.data(), nonce.size());
  text[sizeof text - 1] = by_dialler;
  Token token = kToken;
  if (!knows) token[7] ^= 1;
  return blake2s(token.data(), token.size(), text, sizeof text);
}

bool expected(const Hello& hello) {
  return hello.rank == kPeer && hello.channel >= 0 && hello.channel < kChannels;
}

// One test: a handshake, the stranger at its other end, and how the input wants the talk to go.
struct Talk {
  Input input;
  bool local = false, knows = true, raw = false;
  bool spoilt = false, odd = false;  // other bytes, or other descriptors, than an honest peer's
  Stranger stranger;
  State state = State::open;

  explicit Talk(Input from) : input(from) {
    const uint8_t how = input.byte();
    local = how & 1;
    raw = (how & 6) == 2;
    knows = (how & 24) != 8;
  }
  // `data` as it should be, or bent; in pieces, with descriptors now and then.
  void say(Handshake& handshake, const void* data, size_t nbytes, bool with_descriptor) {
    std::vector<uint8_t> bytes(static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + nbytes);
    if (raw) {
      input.read(bytes.data(), nbytes);
    } else if (input.byte() % 8 == 1) {
      bytes[input.byte() % nbytes] ^= input.byte();
    }
    spoilt |= std::memcmp(bytes.data(), data, nbytes) != 0;
    const uint8_t extra = input.byte();
    for (size_t at = 0; at < nbytes && state == State::open;) {
      const size_t piece = std::min<size_t>(extra % 4 == 1 ? 1 + input.byte() % 32 : nbytes, nbytes - at);
      const int due = with_descriptor && at == 0 ? 1 : 0;
      const int descriptors = extra / 4 % 8 == 1 ? input.byte() % 4 : due;
      odd |= descriptors != due;
      stranger.send(bytes.data() + at, piece, descriptors);
      at += piece;
      state = handshake.progress(expected);
    }
  }
};

void check_answer(Talk& talk, const Handshake::Self& self, Fd end) {
  Handshake handshake = Handshake::answer(self, std::move(end), talk.local);
  require(handshake.progress(expected) == State::open, "nothing was said yet");
  Hello hello;
  hello.rank = kPeer;
  hello.peer = kSelf;
  hello.channel = talk.input.byte() % kChannels;
  talk.say(handshake, &hello, sizeof hello, false);
  const bool hello_spoilt = talk.spoilt;
  Challenge challenge;
  int leaked = 0;
  const size_t heard = talk.stranger.receive(&challenge, sizeof challenge, leaked);
  require(heard == (talk.state == State::open ? sizeof challenge : 0), "a challenge answers a good hello");
  require(leaked == 0, "no descriptor before the proof");
  if (talk.state != State::open) return;
  const Digest own = proof(handshake.hello(), challenge.nonce, 1, talk.knows);
  require(hello_spoilt || challenge.proof == proof(hello, challenge.nonce, 0, true), "the listener knows");
  talk.spoilt = false;
  talk.say(handshake, own.data(), own.size(), talk.local);
  if (talk.state == State::proven) {
    require(talk.knows && !talk.spoilt, "only who knows the secret joins");
    Connection made = handshake.take();
    require(made.rank == kPeer && expected(handshake.hello()), "as the rank it proved to be");
    require(static_cast<bool>(made.segment) == talk.local, "with its segment, inside a node");
  } else {
    require(talk.state == State::refused && (!talk.knows || talk.spoilt || talk.odd), "an honest peer joins");
  }
  uint8_t welcome[8];
  const size_t said = talk.stranger.receive(welcome, sizeof welcome, leaked);
  require(said == (talk.state == State::proven ? 4 : 0), "a welcome for who is proven");
  require(leaked == (talk.state == State::proven && talk.local ? 1 : 0), "and no descriptor for others");
}

void check_dial(Talk& talk, const Handshake::Self& self, Fd end) {
  Handshake handshake = Handshake::dial(self, std::move(end), kPeer, 1, talk.local);
  Hello hello;
  int leaked = 0;
  require(talk.stranger.receive(&hello, sizeof hello, leaked) == sizeof hello && leaked == 0, "a hello");
  require(hello.rank == kSelf && hello.peer == kPeer && hello.channel == 1, "who calls whom");
  Challenge challenge;
  talk.input.read(challenge.nonce.data(), challenge.nonce.size());
  challenge.proof = proof(hello, challenge.nonce, 0, talk.knows);
  talk.say(handshake, &challenge, sizeof challenge, false);
  const bool believed = talk.state == State::open;
  require(!believed || (talk.knows && !talk.spoilt), "only a listener that knows the secret gets a proof");
  Digest own;
  const size_t heard = talk.stranger.receive(own.data(), own.size(), leaked);
  require(heard == (believed ? own.size() : 0), "its proof, to a listener that gave one");
  require(leaked == (believed && talk.local ? 1 : 0), "and its segment");
  if (!believed) return;
  require(own == proof(hello, challenge.nonce, 1, true), "a true proof");
  talk.say(handshake, kWelcome, sizeof kWelcome, talk.local);
  if (talk.state != State::proven) {
    require(talk.state == State::refused && (talk.spoilt || talk.odd), "an honest listener is believed");
    return;
  }
  require(!talk.spoilt, "only a welcome ends it");
  require(static_cast<bool>(handshake.take().segment) == talk.local, "with a segment, inside a node");
}

void check_talk(const Input& input) {
  Talk talk(input);
  const bool dials = talk.input.byte() & 1;
  int ends[2];
  require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
  talk.stranger.socket = Fd(ends[1]);
  const Handshake::Self self{kToken, kSelf, some_file()};
  (dials ? check_dial : check_answer)(talk, self, Fd(ends[0]));
}

}  // namespace
}  // namespace hybridcomm::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t nbytes) {
  using namespace hybridcomm::test;
  some_file();
  const int before = free_descriptor();
  check_talk({data, nbytes});
  require(free_descriptor() == before, "no descriptor stays open");
  return 0;
}
