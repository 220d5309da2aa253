// Everything a rank is connected to: its node's segments, and the links to its peers on other nodes.
//
// Bootstrap: 1. dial every lower peer, which says hello (a listener's backlog takes it before the peer looks);
// 2. carry all handshakes on side by side, dialled and accepted. No step waits for a later one of another rank, so it
// cannot deadlock; a peer that never comes is named when the time is over.
#pragma once

#include <map>
#include <optional>

#include "control.h"
#include "handshake.h"
#include "link.h"
#include "segment.h"
#include "socket.h"

namespace hybridcomm {

struct MeshConfig {
  int rank = 0;
  std::vector<int> local_ranks;        // of this rank's node, ascending, this rank included
  std::vector<Endpoint> remote_peers;  // the owners and leaders this rank works with on other nodes
  Token token{};                       // shared secret of the job
  std::string name;                    // unique per job: prefix of the unix sockets' names
  size_t slot_nbytes = 1 << 20;
  int slots = 4;
  int data_sockets = 2;
  bool single_copy = true;  // reach other ranks' private memory where the kernel allows it
  double timeout_s = 300;
  std::function<void()> interrupted;  // called now and then while connecting; may be empty, may throw
};

class Listener {
 public:
  Listener(const std::string& host, uint16_t port) : tcp_(listen_tcp(host, port, &port_)) {}
  uint16_t port() const { return port_; }
  const Fd& tcp() const { return tcp_; }

 private:
  uint16_t port_ = 0;
  Fd tcp_;
};

class Mesh {
 public:
  Mesh(const MeshConfig& config, const Listener& listener);

  int rank() const { return config_.rank; }
  int local_rank() const { return local_rank_; }
  int local_size() const { return static_cast<int>(config_.local_ranks.size()); }
  int global_rank(int local) const { return config_.local_ranks[static_cast<size_t>(local)]; }
  int local_index(int rank) const;  // -1: on another node
  SegmentShape segment_shape() const { return {local_size(), config_.slot_nbytes, config_.slots}; }
  bool single_copy() const { return config_.single_copy; }
  int slots() const { return config_.slots; }
  size_t slot_nbytes() const { return config_.slot_nbytes; }

  Segment& own() { return *segments_[static_cast<size_t>(local_rank_)]; }
  Segment& segment(int local) { return *segments_[static_cast<size_t>(local)]; }
  // Wakes a local rank that may be waiting for what this rank just published.
  void ring(int local);

  std::map<int, Link>& links() { return links_; }
  Link& link(int rank);
  std::vector<ControlChannel>& controls() { return controls_; }
  ControlChannel& control(int rank);

  // Closes every connection; segments stay mapped until the end.
  void disconnect();

 private:
  void connect(const Listener& listener);
  void dial_lower_peers(Handshakes& handshakes, const Patience& patience);
  bool is_missing(int rank, int channel, bool local) const;
  void keep(Connection connection);
  std::string unix_name(int rank) const { return config_.name + "-" + std::to_string(rank); }
  std::vector<int> missing_peers() const;
  bool is_remote_peer(int rank) const;

  MeshConfig config_;
  int local_rank_ = 0;
  uint64_t nonce_ = 0;  // what peers read to find out whether they reach this process's memory
  std::vector<std::optional<Segment>> segments_;  // by local rank
  std::vector<ControlChannel> controls_;
  std::map<int, Link> links_;
};

}  // namespace hybridcomm
