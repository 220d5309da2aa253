#include "mesh.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>

namespace hybridcomm {

Mesh::Mesh(const MeshConfig& config, const Listener& listener) : config_(config) {
  const auto& ranks = config_.local_ranks;
  local_rank_ = local_index(config_.rank);
  if (local_rank_ < 0) throw Error(Code::invalid, "local_ranks must hold this rank");
  segments_.resize(ranks.size());
  if (ranks.size() > 1) {
    segments_[static_cast<size_t>(local_rank_)] =
        Segment::create({local_size(), config_.slot_nbytes, config_.slots});
  }
  connect(listener);
}

int Mesh::local_index(int rank) const {
  const auto& ranks = config_.local_ranks;
  const auto at = std::find(ranks.begin(), ranks.end(), rank);
  return at == ranks.end() ? -1 : static_cast<int>(at - ranks.begin());
}

bool Mesh::is_remote_peer(int rank) const {
  const auto& peers = config_.remote_peers;
  return std::any_of(peers.begin(), peers.end(), [rank](const Endpoint& peer) { return peer.rank == rank; });
}

void Mesh::connect(const Listener& listener) {
  const Patience patience{Clock::now() + seconds(config_.timeout_s), config_.interrupted};
  Fd unix_listener;
  if (local_size() > 1) unix_listener = listen_unix(unix_name(config_.rank));
  dial_lower_peers(patience);
  accept_higher_peers(listener, unix_listener, patience);
  collect_answers(patience);
}

void Mesh::dial_lower_peers(const Patience& patience) {
  Hello hello;
  hello.token = config_.token;
  hello.rank = config_.rank;
  for (int rank : config_.local_ranks) {
    if (rank >= config_.rank) continue;
    hello.channel = 0;
    Fd socket = dial_unix(unix_name(rank), rank, patience);
    send_hello(socket, hello, own().fd());
    dialled_.push_back({std::move(socket), rank, 0, true});
  }
  for (const Endpoint& peer : config_.remote_peers) {
    if (peer.rank >= config_.rank) continue;
    for (int channel = 0; channel <= config_.data_sockets; ++channel) {
      hello.channel = channel;
      Fd socket = dial_tcp(peer, patience);
      send_hello(socket, hello);
      dialled_.push_back({std::move(socket), peer.rank, channel, false});
    }
  }
}

std::vector<int> Mesh::missing_peers() const {
  std::vector<int> missing;
  for (size_t i = 0; i < config_.local_ranks.size(); ++i) {
    if (config_.local_ranks[i] > config_.rank && !segments_[i]) missing.push_back(config_.local_ranks[i]);
  }
  for (const Endpoint& peer : config_.remote_peers) {
    if (peer.rank < config_.rank) continue;
    const auto link = links_.find(peer.rank);
    const bool data = link != links_.end() && link->second.size() == config_.data_sockets;
    const bool control = std::any_of(controls_.begin(), controls_.end(),
                                     [&](const ControlChannel& c) { return c.peer() == peer.rank; });
    if (!data || !control) missing.push_back(peer.rank);
  }
  return missing;
}

void Mesh::accept_higher_peers(const Listener& listener, const Fd& unix_listener, const Patience& patience) {
  for (auto missing = missing_peers(); !missing.empty(); missing = missing_peers()) {
    if (patience.over()) {
      throw Error(Code::bootstrap,
                  join_ranks(missing) + " did not connect to rank " + std::to_string(config_.rank) +
                      " within " + std::to_string(static_cast<int>(config_.timeout_s)) +
                      " s; look at the log of " + (missing.size() == 1 ? "that rank" : "those ranks"),
                  missing.front(), missing);
    }
    pollfd ready[2] = {{listener.tcp().get(), POLLIN, 0}, {unix_listener.get(), POLLIN, 0}};
    ::poll(ready, unix_listener ? 2 : 1, 100);
    for (const pollfd& entry : ready) {
      if ((entry.revents & POLLIN) == 0) continue;
      Fd socket(::accept4(entry.fd, nullptr, nullptr, SOCK_CLOEXEC));
      // A rank sends its hello right after connecting, so a silent stranger may cost the others two seconds.
      if (socket)
        admit(std::move(socket), entry.fd == unix_listener.get(),
              {Clock::now() + seconds(2), config_.interrupted});
    }
  }
}

bool Mesh::admit(Fd socket, bool local, const Patience& patience) {
  std::optional<ReceivedHello> received = receive_hello(socket, patience);
  if (!received || received->hello.token != config_.token) return false;
  const Hello& hello = received->hello;
  const bool known = local ? local_index(hello.rank) > local_rank_ && received->descriptor
                           : is_remote_peer(hello.rank) && hello.rank > config_.rank && hello.channel >= 0 &&
                                 hello.channel <= config_.data_sockets;
  if (!known) return false;
  Hello answer;
  answer.token = config_.token;
  answer.rank = config_.rank;
  answer.channel = hello.channel;
  send_hello(socket, answer, local ? own().fd() : -1);
  if (!local) tune_tcp(socket);
  keep(std::move(socket), hello, local, std::move(received->descriptor));
  return true;
}

void Mesh::collect_answers(const Patience& patience) {
  for (Dialled& dialled : dialled_) {
    std::optional<ReceivedHello> answer = receive_hello(dialled.socket, patience);
    const bool good = answer && answer->hello.token == config_.token && answer->hello.rank == dialled.rank &&
                      (!dialled.local || answer->descriptor);
    if (!good) {
      throw Error(Code::bootstrap,
                  "rank " + std::to_string(dialled.rank) + " did not answer the hello of rank " +
                      std::to_string(config_.rank) +
                      ": it died, runs another version or belongs to another job",
                  dialled.rank, {dialled.rank});
    }
    keep(std::move(dialled.socket), answer->hello, dialled.local, std::move(answer->descriptor));
  }
  dialled_.clear();
}

void Mesh::keep(Fd socket, const Hello& hello, bool local, Fd segment) {
  if (local) {
    const auto index = static_cast<size_t>(local_index(hello.rank));
    segments_[index] = Segment::map(std::move(segment), {local_size(), config_.slot_nbytes, config_.slots});
  }
  if (hello.channel == 0) {
    controls_.emplace_back(std::move(socket), hello.rank, local);
    return;
  }
  Link& link = links_.try_emplace(hello.rank, hello.rank).first->second;
  link.add(std::move(socket), hello.channel);
}

void Mesh::ring(int local) {
  Segment& peer = segment(local);
  const uint32_t mode = peer.sleeping().load(std::memory_order_seq_cst);
  if (mode == kAwake) return;
  peer.doorbell().fetch_add(1, std::memory_order_seq_cst);
  if (mode == kOnFutex) {
    futex_wake(peer.doorbell());
  } else {
    control(global_rank(local)).ring();
  }
}

Link& Mesh::link(int rank) {
  const auto at = links_.find(rank);
  if (at == links_.end()) {
    throw Error(Code::invalid, "the plan sends to rank " + std::to_string(rank) +
                                   ", which this rank has no link to: plan and topology disagree");
  }
  return at->second;
}

void Mesh::disconnect() {
  // A socket closed with unread bytes resets the connection, and what it sent last may be lost.
  for (auto& control : controls_) control.drain();
  links_.clear();
  controls_.clear();
}

ControlChannel& Mesh::control(int rank) {
  const auto at = std::find_if(controls_.begin(), controls_.end(),
                               [rank](const ControlChannel& c) { return c.peer() == rank; });
  if (at == controls_.end()) throw Error(Code::invalid, "no control channel to rank " + std::to_string(rank));
  return *at;
}

}  // namespace hybridcomm
