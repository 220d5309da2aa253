// How two ranks prove to each other that they belong to the same job, without telling the job's secret.
//
// 1. dialler to listener: hello: who speaks to whom, on which channel, and a nonce.
// 2. listener to dialler: challenge: a nonce of its own, and its proof.
// 3. dialler to listener: its proof; inside a node its segment's descriptor rides along.
// 4. listener to dialler: welcome; inside a node with its segment's descriptor.
// A proof is BLAKE2s, keyed with the secret, over hello, both nonces and the side: it cannot be replayed, sent back to its
// maker or used at another rank. A connection that does not follow is closed and forgotten, so that a stray client
// (a port scanner, another job) can neither join nor stop a job; nor does it ever see a descriptor.
#pragma once

#include <functional>
#include <map>
#include <optional>

#include "blake2s.h"
#include "socket.h"

namespace hybridcomm {

using Token = std::array<uint8_t, 16>;
using Nonce = std::array<uint8_t, 16>;

struct Hello {
  uint32_t magic = 0x43425948;  // "HYBC"
  uint32_t version = 2;
  int32_t rank = -1;
  int32_t peer = -1;     // the rank that is dialled
  int32_t channel = -1;  // 0: control, 1..: data
  uint32_t reserved = 0;
  Nonce nonce{};
};
static_assert(sizeof(Hello) == 40, "the hello is part of the wire format");

struct Challenge {
  Nonce nonce{};
  Digest proof{};
};
static_assert(sizeof(Challenge) == 48, "the challenge is part of the wire format");

// A connection whose other end is proven to be `rank`; inside a node with that rank's segment.
struct Connection {
  Fd socket;
  int rank = -1;
  int channel = -1;
  bool local = false;
  Fd segment;
};

// One side of one handshake. Nothing blocks.
class Handshake {
 public:
  enum class State { open, proven, refused };
  struct Self {
    Token token{};
    int rank = -1;
    int segment = -1;  // descriptor for peers inside the node
  };

  // Sends the hello: a listener's backlog takes it before the peer looks.
  static Handshake dial(const Self& self, Fd socket, int peer, int channel, bool local);
  static Handshake answer(const Self& self, Fd socket, bool local);

  // Reads what has come. `expected` is asked whether a hello may be answered at all.
  State progress(const std::function<bool(const Hello&)>& expected);

  int fd() const { return socket_.get(); }
  bool dialled() const { return dialled_; }
  bool local() const { return local_; }
  bool introduced() const { return stage_ > Stage::hello; }
  const Hello& hello() const { return hello_; }
  Clock::time_point since() const { return since_; }
  Connection take();  // once proven

 private:
  enum class Stage { hello, challenge, proof, welcome, over };  // what it waits for
  Handshake(const Self& self, Fd socket, bool local, bool dialled)
      : self_(self), socket_(std::move(socket)), local_(local), dialled_(dialled), since_(Clock::now()) {}
  size_t wanted() const;
  bool read_some();
  bool step(const std::function<bool(const Hello&)>& expected);
  Digest proof(bool by_dialler) const;
  bool send(const void* data, size_t nbytes, bool with_segment) const;

  Self self_;
  Fd socket_;
  bool local_, dialled_;
  Clock::time_point since_;
  Stage stage_ = Stage::hello;
  Hello hello_;
  Nonce nonce_{};  // the listener's
  Fd segment_;
  std::array<uint8_t, sizeof(Challenge)> inbox_{};
  size_t got_ = 0;
  bool closed_ = false, would_block_ = false;
};

// All handshakes of a rank, dialled and accepted, side by side: a stranger that says nothing delays nobody.
class Handshakes {
 public:
  // `expected`: is a connection by that rank on that channel still missing?
  using Expected = std::function<bool(const Hello& hello, bool local)>;
  Handshakes(const Handshake::Self& self, Expected expected);

  void listen(const Fd& listener, bool local);
  void dial(Fd socket, int peer, int channel, bool local);
  // The connections proven since the last call. Never blocks. Throws Error when a rank that this one dialled
  // fails to prove itself.
  std::vector<Connection> progress();
  // Readable when progress() has something to do.
  int fd() const { return epoll_.get(); }
  size_t waiting() const { return open_.size(); }

 private:
  using Open = std::map<uint64_t, Handshake>;  // by id, oldest first
  void watch(int fd, uint64_t id);
  void accept_from(int listener, bool local);
  void add(Handshake handshake);
  void advance(uint64_t id, std::vector<Connection>& proven);
  bool may_join(const Hello& hello, bool local, uint64_t id);
  void make_room();
  void drop_silent();
  Open::iterator forget(Open::iterator at);

  Handshake::Self self_;
  Expected expected_;
  Fd epoll_;
  std::map<uint64_t, bool> listeners_;  // id (the descriptor) -> local
  Open open_;
  uint64_t next_ = uint64_t{1} << 32;  // ids of handshakes: above all descriptors
};

}  // namespace hybridcomm
