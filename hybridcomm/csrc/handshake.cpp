#include "handshake.h"

#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace hybridcomm {
namespace {

constexpr uint32_t kWelcome = 0x454D4C57;  // "WLME"

// A rank says hello as it connects. Who does not is a stranger, and strangers may not hoard descriptors.
constexpr auto kSilence = std::chrono::seconds(5);
constexpr auto kSilenceInACrowd = std::chrono::seconds(1);
constexpr int kCrowd = 64;
// However many come at once, some descriptors stay free for the rest of the process.
constexpr int kMostSilent = 128;
// Claims of one rank and channel that wait for their proof: so many others may come before a slow one has given its.
constexpr int kClaims = 16;

Nonce fresh_nonce() {
  Nonce nonce;
  size_t got = 0;
  while (got < nonce.size()) {
    const ssize_t n = ::getrandom(nonce.data() + got, nonce.size() - got, 0);
    if (n < 0 && errno != EINTR) throw Error(Code::bootstrap, errno_text("getrandom() failed"));
    if (n > 0) got += static_cast<size_t>(n);
  }
  return nonce;
}

// In constant time: how far two proofs agree must not be seen from outside.
bool same(const Digest& a, const uint8_t* b) {
  uint8_t different = 0;
  for (size_t i = 0; i < a.size(); ++i) different |= static_cast<uint8_t>(a[i] ^ b[i]);
  return different == 0;
}

}  // namespace

Handshake Handshake::dial(const Self& self, Fd socket, int peer, int channel, bool local) {
  Handshake handshake(self, std::move(socket), local, true);
  Hello& hello = handshake.hello_;
  hello.rank = self.rank;
  hello.peer = peer;
  hello.channel = channel;
  hello.nonce = fresh_nonce();
  handshake.stage_ = Stage::challenge;
  handshake.closed_ = !handshake.send(&hello, sizeof(hello), false);
  return handshake;
}

Handshake Handshake::answer(const Self& self, Fd socket, bool local) {
  return Handshake(self, std::move(socket), local, false);
}

Connection Handshake::take() {
  const int rank = dialled_ ? hello_.peer : hello_.rank;
  return {std::move(socket_), rank, hello_.channel, local_, std::move(segment_)};
}

Digest Handshake::proof(bool by_dialler) const {
  struct {
    Hello hello;
    Nonce nonce;
    uint8_t by_dialler;
  } said{hello_, nonce_, by_dialler};
  std::array<uint8_t, sizeof(Hello) + sizeof(Nonce) + 1> text;
  std::memcpy(text.data(), &said, text.size());
  return blake2s(self_.token.data(), self_.token.size(), text.data(), text.size());
}

// A short send counts as a failure: these messages always fit the buffer of a new socket.
bool Handshake::send(const void* data, size_t nbytes, bool with_segment) const {
  iovec part{const_cast<void*>(data), nbytes};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (with_segment && self_.segment >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &self_.segment, sizeof(int));
  }
  return ::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(nbytes);
}

size_t Handshake::wanted() const {
  switch (stage_) {
    case Stage::hello:
      return sizeof(Hello);
    case Stage::challenge:
      return sizeof(Challenge);
    case Stage::proof:
      return sizeof(Digest);
    case Stage::welcome:
      return sizeof(kWelcome);
    case Stage::over:
      break;
  }
  return 0;
}

// Whether the message that is waited for is complete. Reads no byte beyond it: what follows belongs to others.
bool Handshake::read_some() {
  while (got_ < wanted()) {
    iovec part{inbox_.data() + got_, wanted() - got_};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_LEN(sizeof(int));  // room for one descriptor: the kernel drops others
    const ssize_t n = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    would_block_ = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    if (n <= 0) {
      closed_ = !would_block_;
      return false;
    }
    const cmsghdr* header = CMSG_FIRSTHDR(&message);
    if (header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
      int descriptor = -1;
      std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
      segment_ = Fd(descriptor);
    }
    got_ += static_cast<size_t>(n);
  }
  got_ = 0;
  return true;
}

Handshake::State Handshake::progress(const std::function<bool(const Hello&)>& expected) {
  while (stage_ != Stage::over) {
    if (closed_ || (read_some() ? !step(expected) : closed_)) return State::refused;
    if (would_block_) return State::open;
  }
  return State::proven;
}

// The message in the inbox; false: refused.
bool Handshake::step(const std::function<bool(const Hello&)>& expected) {
  const Hello known;
  switch (stage_) {
    case Stage::hello: {
      std::memcpy(&hello_, inbox_.data(), sizeof(hello_));
      const bool ours = hello_.magic == known.magic && hello_.version == known.version &&
                        hello_.peer == self_.rank && hello_.reserved == 0;
      if (!ours || segment_ || !expected(hello_)) return false;
      nonce_ = fresh_nonce();
      const Challenge challenge{nonce_, proof(false)};
      stage_ = Stage::proof;
      return send(&challenge, sizeof(challenge), false);
    }
    case Stage::challenge: {
      std::memcpy(nonce_.data(), inbox_.data(), nonce_.size());
      if (segment_ || !same(proof(false), inbox_.data() + nonce_.size())) return false;
      const Digest own = proof(true);
      stage_ = Stage::welcome;
      return send(own.data(), own.size(), local_);
    }
    case Stage::proof:
      stage_ = Stage::over;
      return same(proof(true), inbox_.data()) && expected(hello_) && static_cast<bool>(segment_) == local_ &&
             send(&kWelcome, sizeof(kWelcome), local_);
    case Stage::welcome:
      stage_ = Stage::over;
      return std::memcmp(inbox_.data(), &kWelcome, sizeof(kWelcome)) == 0 &&
             static_cast<bool>(segment_) == local_;
    case Stage::over:
      break;
  }
  return false;
}

Handshakes::Handshakes(const Handshake::Self& self, Expected expected)
    : self_(self), expected_(std::move(expected)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) throw Error(Code::bootstrap, errno_text("epoll_create1() failed (descriptor limit?)"));
}

void Handshakes::watch(int fd, uint64_t id) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = id;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw Error(Code::bootstrap, errno_text("epoll_ctl() failed"));
  }
}

void Handshakes::listen(const Fd& listener, bool local) {
  listeners_[static_cast<uint64_t>(listener.get())] = local;
  watch(listener.get(), static_cast<uint64_t>(listener.get()));
}

void Handshakes::dial(Fd socket, int peer, int channel, bool local) {
  add(Handshake::dial(self_, std::move(socket), peer, channel, local));
}

void Handshakes::add(Handshake handshake) {
  watch(handshake.fd(), next_);
  open_.emplace(next_++, std::move(handshake));
}

void Handshakes::accept_from(int listener, bool local) {
  for (;;) {
    Fd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket) return;
    make_room();
    add(Handshake::answer(self_, std::move(socket), local));
  }
}

// Who has been silent for the longest goes, unless its hello has come by now.
void Handshakes::make_room() {
  const auto silent = [](const auto& entry) { return !entry.second.dialled() && !entry.second.introduced(); };
  if (std::count_if(open_.begin(), open_.end(), silent) < kMostSilent) return;
  const uint64_t oldest = std::find_if(open_.begin(), open_.end(), silent)->first;
  std::vector<Connection> proven;
  advance(oldest, proven);  // proves nothing yet: a proof answers a challenge
  const auto at = open_.find(oldest);
  if (at != open_.end() && silent(*at)) forget(at);
}

std::vector<Connection> Handshakes::progress() {
  std::vector<Connection> proven;
  epoll_event events[64];
  int count = 0;
  do {
    count = ::epoll_wait(epoll_.get(), events, 64, 0);
    for (int i = 0; i < count; ++i) {
      const uint64_t id = events[i].data.u64;
      const auto listener = listeners_.find(id);
      if (listener != listeners_.end()) {
        accept_from(static_cast<int>(id), listener->second);
      } else {
        advance(id, proven);
      }
    }
  } while (count == 64);
  drop_silent();
  return proven;
}

void Handshakes::advance(uint64_t id, std::vector<Connection>& proven) {
  const auto at = open_.find(id);
  if (at == open_.end()) return;  // pushed out by a later claim
  Handshake& handshake = at->second;
  const bool local = handshake.local();
  const auto state = handshake.progress([&](const Hello& hello) { return may_join(hello, local, id); });
  if (state == Handshake::State::open) return;
  if (state == Handshake::State::refused && handshake.dialled()) {
    const int rank = handshake.hello().peer;
    forget(at);
    throw Error(Code::bootstrap,
                "rank " + std::to_string(rank) + " did not answer the hello of rank " +
                    std::to_string(self_.rank) +
                    " with a proof: it died, runs another version or belongs to another job",
                rank, {rank});
  }
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, handshake.fd(), nullptr);
  if (state == Handshake::State::proven) proven.push_back(handshake.take());
  open_.erase(at);
}

// Closing alone would not do: a forked child may hold the descriptor, and epoll would go on reporting it.
Handshakes::Open::iterator Handshakes::forget(Open::iterator at) {
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->second.fd(), nullptr);
  return open_.erase(at);
}

bool Handshakes::may_join(const Hello& hello, bool local, uint64_t id) {
  if (!expected_(hello, local)) return false;
  int claims = 0;
  for (auto at = open_.rbegin(); at != open_.rend(); ++at) {
    const Handshake& other = at->second;
    const bool rival = at->first != id && !other.dialled() && other.introduced() && other.local() == local &&
                       other.hello().rank == hello.rank && other.hello().channel == hello.channel;
    if (rival && ++claims >= kClaims) {
      forget(open_.find(at->first));
      break;
    }
  }
  return true;
}

void Handshakes::drop_silent() {
  const auto silent = [](const auto& entry) { return !entry.second.dialled() && !entry.second.introduced(); };
  const bool crowd = std::count_if(open_.begin(), open_.end(), silent) > kCrowd;
  const auto limit = Clock::now() - (crowd ? kSilenceInACrowd : kSilence);
  for (auto at = open_.begin(); at != open_.end();) {
    at = silent(*at) && at->second.since() < limit ? forget(at) : std::next(at);
  }
}

}  // namespace hybridcomm
