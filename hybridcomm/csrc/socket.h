// Sockets for the bootstrap: listeners, dialling, and the hello that every connection starts with.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string>

#include "common.h"

namespace hybridcomm {

using Token = std::array<uint8_t, 16>;

// The first bytes of every connection. A connection whose hello is not right is closed and forgotten, so that
// a stray client (a port scanner, another job) can neither join nor stop a bootstrap.
struct Hello {
  uint32_t magic = 0x43425948;  // "HYBC"
  uint32_t version = 1;
  Token token{};
  int32_t rank = -1;
  int32_t channel = -1;  // 0: control, 1..: data
};
static_assert(sizeof(Hello) == 32, "the hello is part of the wire format");

struct Endpoint {
  int rank = -1;
  std::string host;  // numeric address
  uint16_t port = 0;
};

Fd listen_tcp(const std::string& host, uint16_t port, uint16_t* actual_port);
Fd listen_unix(const std::string& name);  // abstract namespace: leaves no file

// How long to wait, and what to call now and then meanwhile (may be empty; may throw, on Ctrl-C).
struct Patience {
  Clock::time_point deadline;
  std::function<void()> interrupted;
  bool over() const {
    if (interrupted) interrupted();
    return Clock::now() > deadline;
  }
};

// Both retry while nobody listens yet.
Fd dial_tcp(const Endpoint& endpoint, const Patience& patience);
Fd dial_unix(const std::string& name, int rank, const Patience& patience);

// A hello with, on unix sockets, a descriptor beside it. Small enough never to be split in practice: a short
// send is an error.
void send_hello(const Fd& socket, const Hello& hello, int descriptor = -1);
struct ReceivedHello {
  Hello hello;
  Fd descriptor;
};
// Waits for one hello; nullopt if the peer closed, timed out or sent something else.
std::optional<ReceivedHello> receive_hello(const Fd& socket, const Patience& patience);

void set_nonblocking(const Fd& socket);
void tune_tcp(const Fd& socket);

}  // namespace hybridcomm
