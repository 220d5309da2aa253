#include "socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <thread>

namespace hybridcomm {
namespace {

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

Address tcp_address(const std::string& host, uint16_t port) {
  Address address;
  auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
  if (::inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    address.size = sizeof(sockaddr_in);
  } else if (::inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    address.size = sizeof(sockaddr_in6);
  } else {
    throw Error(Code::bootstrap, "'" + host + "' is not a numeric IPv4 or IPv6 address");
  }
  return address;
}

Address unix_address(const std::string& name) {
  Address address;
  auto* un = reinterpret_cast<sockaddr_un*>(&address.storage);
  un->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof(un->sun_path))
    throw Error(Code::bootstrap, "unix socket name too long: " + name);
  std::memcpy(un->sun_path + 1, name.data(), name.size());  // leading NUL: abstract
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

Fd open_socket(int family) {
  Fd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) throw Error(Code::bootstrap, errno_text("socket() failed (descriptor limit?)"));
  return fd;
}

Fd dial(const Address& address, const std::string& who, int rank, const Patience& patience) {
  for (;;) {
    Fd fd = open_socket(address.storage.ss_family);
    if (::connect(fd.get(), address.get(), address.size) == 0) return fd;
    const bool may_come = errno == ECONNREFUSED || errno == ETIMEDOUT || errno == EAGAIN || errno == EINTR ||
                          errno == EHOSTUNREACH || errno == ENETUNREACH;
    const int failure = errno;
    if (!may_come || patience.over()) {
      errno = failure;
      throw Error(Code::bootstrap,
                  errno_text("no connection to rank " + std::to_string(rank) + " at " + who) +
                      "; is that rank alive, and is the address reachable? (HYBRIDCOMM_IFACE or "
                      "HYBRIDCOMM_HOST on that rank chooses another)",
                  rank, {rank});
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

}  // namespace

Fd listen_tcp(const std::string& host, uint16_t port, uint16_t* actual_port) {
  Address address = tcp_address(host, port);
  Fd fd = open_socket(address.storage.ss_family);
  const int on = 1;  // a fixed port may be used again while old connections linger; never by two listeners
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (::bind(fd.get(), address.get(), address.size) != 0) {
    throw Error(Code::bootstrap, errno_text("cannot listen on " + host + " port " + std::to_string(port)) +
                                     "; choose another with HYBRIDCOMM_PORT, or 0 for any free one");
  }
  if (::listen(fd.get(), 1024) != 0) throw Error(Code::bootstrap, errno_text("listen() failed"));
  set_nonblocking(fd);
  socklen_t size = sizeof(address.storage);
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address.storage), &size);
  const bool v4 = address.storage.ss_family == AF_INET;
  *actual_port = ntohs(v4 ? reinterpret_cast<sockaddr_in*>(&address.storage)->sin_port
                          : reinterpret_cast<sockaddr_in6*>(&address.storage)->sin6_port);
  return fd;
}

Fd listen_unix(const std::string& name) {
  const Address address = unix_address(name);
  Fd fd = open_socket(AF_UNIX);
  if (::bind(fd.get(), address.get(), address.size) != 0 || ::listen(fd.get(), 1024) != 0) {
    throw Error(Code::bootstrap, errno_text("cannot listen on the abstract unix socket " + name));
  }
  set_nonblocking(fd);
  return fd;
}

Fd dial_tcp(const Endpoint& endpoint, const Patience& patience) {
  const std::string who = endpoint.host + " port " + std::to_string(endpoint.port);
  Fd fd = dial(tcp_address(endpoint.host, endpoint.port), who, endpoint.rank, patience);
  tune_tcp(fd);
  return fd;
}

Fd dial_unix(const std::string& name, int rank, const Patience& patience) {
  return dial(unix_address(name), "unix socket " + name, rank, patience);
}

Fd begin_dial_tcp(const Endpoint& endpoint) {
  const Address address = tcp_address(endpoint.host, endpoint.port);
  Fd fd = open_socket(address.storage.ss_family);
  set_nonblocking(fd);
  tune_tcp(fd);
  while (::connect(fd.get(), address.get(), address.size) != 0 && errno == EINTR) {
  }
  return fd;
}

Dialled dial_state(const Fd& socket) {
  pollfd ready{socket.get(), POLLOUT, 0};
  if (::poll(&ready, 1, 0) != 1) return Dialled::pending;
  int failure = 0;
  socklen_t size = sizeof(failure);
  ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &failure, &size);
  if (failure == 0 && (ready.revents & POLLHUP) == 0) return Dialled::connected;
  errno = failure == 0 ? ECONNREFUSED : failure;
  return Dialled::failed;
}

void set_nonblocking(const Fd& socket) {
  ::fcntl(socket.get(), F_SETFL, ::fcntl(socket.get(), F_GETFL) | O_NONBLOCK);
}

void tune_tcp(const Fd& socket) {
  const int on = 1, idle_s = 5, interval_s = 2, probes = 4, unacknowledged_ms = 20000;
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  // A machine that vanishes sends no FIN: keepalive finds it on an idle link, the user timeout on a busy one.
  ::setsockopt(socket.get(), SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  ::setsockopt(socket.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged_ms, sizeof(unacknowledged_ms));
}

}  // namespace hybridcomm
