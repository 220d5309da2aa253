#include "mesh.h"

#include <poll.h>

#include <algorithm>
#include <random>

#include "peer_memory.h"

namespace hybridcomm {

Mesh::Mesh(const MeshConfig& config, const Listener& listener) : config_(config) {
  const auto& ranks = config_.local_ranks;
  local_rank_ = local_index(config_.rank);
  if (local_rank_ < 0) throw Error(Code::invalid, "local_ranks must hold this rank");
  segments_.resize(ranks.size());
  if (ranks.size() > 1) {
    segments_[static_cast<size_t>(local_rank_)] = Segment::create(segment_shape());
    nonce_ = std::random_device()() | uint64_t{std::random_device()()} << 32 | 1;
    introduce(own(), nonce_, config_.single_copy);
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
  const int segment = local_size() > 1 ? own().fd() : -1;
  Handshakes handshakes({config_.token, config_.rank, segment}, [this](const Hello& hello, bool local) {
    return hello.rank > config_.rank && is_missing(hello.rank, hello.channel, local);
  });
  Fd unix_listener;
  if (local_size() > 1) {
    unix_listener = listen_unix(unix_name(config_.rank));
    handshakes.listen(unix_listener, true);
  }
  handshakes.listen(listener.tcp(), false);
  dial_lower_peers(handshakes, patience);
  for (auto missing = missing_peers(); !missing.empty(); missing = missing_peers()) {
    if (patience.over()) {
      throw Error(Code::bootstrap,
                  join_ranks(missing) + " did not connect to rank " + std::to_string(config_.rank) +
                      " within " + std::to_string(static_cast<int>(config_.timeout_s)) +
                      " s; look at the log of " + (missing.size() == 1 ? "that rank" : "those ranks"),
                  missing.front(), missing);
    }
    pollfd ready{handshakes.fd(), POLLIN, 0};
    ::poll(&ready, 1, 100);
    for (Connection& connection : handshakes.progress()) keep(std::move(connection));
  }
}

void Mesh::dial_lower_peers(Handshakes& handshakes, const Patience& patience) {
  for (int rank : config_.local_ranks) {
    if (rank < config_.rank) handshakes.dial(dial_unix(unix_name(rank), rank, patience), rank, 0, true);
  }
  for (const Endpoint& peer : config_.remote_peers) {
    if (peer.rank >= config_.rank) continue;
    for (int channel = 0; channel <= config_.data_sockets; ++channel) {
      handshakes.dial(dial_tcp(peer, patience), peer.rank, channel, false);
    }
  }
}

bool Mesh::is_missing(int rank, int channel, bool local) const {
  if (local) {
    const int index = local_index(rank);
    return index >= 0 && index != local_rank_ && channel == 0 && !segments_[static_cast<size_t>(index)];
  }
  if (!is_remote_peer(rank) || channel < 0 || channel > config_.data_sockets) return false;
  if (channel == 0) {
    return std::none_of(controls_.begin(), controls_.end(),
                        [rank](const ControlChannel& control) { return control.peer() == rank; });
  }
  const auto link = links_.find(rank);
  return link == links_.end() || link->second.sockets().count(channel) == 0;
}

std::vector<int> Mesh::missing_peers() const {
  std::vector<int> missing;
  for (int rank : config_.local_ranks) {
    if (is_missing(rank, 0, true)) missing.push_back(rank);
  }
  for (const Endpoint& peer : config_.remote_peers) {
    bool whole = true;
    for (int channel = 0; channel <= config_.data_sockets; ++channel) {
      whole = whole && !is_missing(peer.rank, channel, false);
    }
    if (!whole) missing.push_back(peer.rank);
  }
  return missing;
}

void Mesh::keep(Connection connection) {
  const int rank = connection.rank;
  if (connection.local) {
    segments_[static_cast<size_t>(local_index(rank))] =
        Segment::map(std::move(connection.segment), segment_shape());
  } else {
    tune_tcp(connection.socket);
  }
  if (connection.channel == 0) {
    controls_.emplace_back(std::move(connection.socket), rank, connection.local);
    return;
  }
  Link& link = links_.try_emplace(rank, rank).first->second;
  link.add(std::move(connection.socket), connection.channel);
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
