#include "mesh.h"

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <random>

#include "peer_memory.h"

namespace hybridcomm {

Mesh::Mesh(const MeshConfig& config, const Listener& listener)
    : config_(config),
      listener_(::fcntl(listener.tcp().get(), F_DUPFD_CLOEXEC, 0)),
      handshakes_({config.token, config.rank, -1},
                  [this](const Hello& hello, bool local) { return expects(hello, local); }) {
  if (!listener_) throw Error(Code::bootstrap, errno_text("no descriptor left for the listener"));
  const auto& ranks = config_.local_ranks;
  local_rank_ = local_index(config_.rank);
  if (local_rank_ < 0) throw Error(Code::invalid, "local_ranks must hold this rank");
  segments_.resize(ranks.size());
  if (ranks.size() > 1) {
    segments_[static_cast<size_t>(local_rank_)] = Segment::create(segment_shape());
    nonce_ = std::random_device()() | uint64_t{std::random_device()()} << 32 | 1;
    introduce(own(), nonce_, config_.single_copy);
  }
  connect();
}

int Mesh::local_index(int rank) const {
  const auto& ranks = config_.local_ranks;
  const auto at = std::find(ranks.begin(), ranks.end(), rank);
  return at == ranks.end() ? -1 : static_cast<int>(at - ranks.begin());
}

const Endpoint* Mesh::endpoint(int rank) const {
  for (const auto* list : {&config_.remote_peers, &config_.others}) {
    for (const Endpoint& peer : *list) {
      if (peer.rank == rank) return &peer;
    }
  }
  return nullptr;
}

void Mesh::connect() {
  const Patience patience{Clock::now() + seconds(config_.timeout_s), config_.interrupted};
  Fd unix_listener;
  if (local_size() > 1) {
    handshakes_.hand_out(own().fd());
    unix_listener = listen_unix(unix_name(config_.rank));
    handshakes_.listen(unix_listener, true);
  }
  handshakes_.listen(listener_, false);
  dial_lower_peers(patience);
  for (auto missing = missing_peers(); !missing.empty(); missing = missing_peers()) {
    if (patience.over()) {
      throw Error(Code::bootstrap,
                  join_ranks(missing) + " did not connect to rank " + std::to_string(config_.rank) +
                      " within " + std::to_string(static_cast<int>(config_.timeout_s)) +
                      " s; look at the log of " + (missing.size() == 1 ? "that rank" : "those ranks"),
                  missing.front(), missing);
    }
    pollfd ready{handshakes_.fd(), POLLIN, 0};
    ::poll(&ready, 1, 100);
    for (Connection& connection : handshakes_.progress()) keep(std::move(connection));
  }
  if (unix_listener) handshakes_.ignore(unix_listener);
}

void Mesh::dial_lower_peers(const Patience& patience) {
  for (int rank : config_.local_ranks) {
    if (rank < config_.rank) handshakes_.dial(dial_unix(unix_name(rank), rank, patience), rank, 0, true);
  }
  for (const Endpoint& peer : config_.remote_peers) {
    if (peer.rank >= config_.rank) continue;
    for (int channel = 0; channel <= config_.data_sockets; ++channel) {
      asked_.emplace(peer.rank, channel, true);
      handshakes_.dial(dial_tcp(peer, patience), peer.rank, channel, false);
    }
  }
}

// Whether a connection that a rank dials is one that this rank still lacks.
bool Mesh::expects(const Hello& hello, bool local) const {
  if (!local && (hello.channel == kMessages || hello.channel == kMessageControl)) {
    return endpoint(hello.rank) != nullptr && kept_.count({hello.rank, hello.channel, false}) == 0;
  }
  return hello.rank > config_.rank && is_missing(hello.rank, hello.channel, local);
}

bool Mesh::is_missing(int rank, int channel, bool local) const {
  if (local) {
    const int index = local_index(rank);
    return index >= 0 && index != local_rank_ && channel == 0 && !segments_[static_cast<size_t>(index)];
  }
  if (endpoint(rank) == nullptr || channel < 0 || channel > config_.data_sockets) return false;
  return kept_.count({rank, channel, rank < config_.rank}) == 0;
}

bool Mesh::is_whole(int rank) const {
  for (int channel = 0; channel <= config_.data_sockets; ++channel) {
    if (is_missing(rank, channel, false)) return false;
  }
  return true;
}

std::vector<int> Mesh::missing_peers() const {
  std::vector<int> missing;
  for (int rank : config_.local_ranks) {
    if (is_missing(rank, 0, true)) missing.push_back(rank);
  }
  for (const Endpoint& peer : config_.remote_peers) {
    if (!is_whole(peer.rank)) missing.push_back(peer.rank);
  }
  return missing;
}

void Mesh::keep(Connection connection) {
  const int rank = connection.rank;
  if (connection.local) {
    segments_[static_cast<size_t>(local_index(rank))] =
        Segment::map(std::move(connection.segment), segment_shape());
  } else {
    kept_.emplace(rank, connection.channel, connection.dialled);
    tune_tcp(connection.socket);
  }
  if (connection.channel == kControl || connection.channel == kMessageControl) {
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
    find_control(global_rank(local))->ring();
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
  dials_.clear();
  handshakes_.close();
  listener_.reset();
}

ControlChannel* Mesh::find_control(int rank) {
  const auto at = std::find_if(controls_.begin(), controls_.end(),
                               [rank](const ControlChannel& c) { return c.peer() == rank; });
  return at == controls_.end() ? nullptr : &*at;
}

}  // namespace hybridcomm
