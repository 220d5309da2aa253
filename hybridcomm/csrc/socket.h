// Sockets for the bootstrap: listeners and dialling. What is said first on a connection: handshake.h.
#pragma once

#include <functional>
#include <string>

#include "common.h"

namespace hybridcomm {

struct Endpoint {
  int rank = -1;
  std::string host;  // numeric address
  uint16_t port = 0;
};

// Accepting from either never blocks.
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

// Without waiting: a connection that may still be on its way, and how far it is. `failed`: errno says why.
enum class Dialled { pending, connected, failed };
Fd begin_dial_tcp(const Endpoint& endpoint);
Dialled dial_state(const Fd& socket);

void set_nonblocking(const Fd& socket);
void tune_tcp(const Fd& socket);

}  // namespace hybridcomm
