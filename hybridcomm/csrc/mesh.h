// Everything a rank is connected to: its node's segments, and the links to its peers on other nodes.
//
// Bootstrap: 1. dial every lower peer, which says hello (a listener's backlog takes it before the peer looks);
// 2. carry all handshakes on side by side, dialled and accepted. No step waits for a later one of another rank, so it
// cannot deadlock; a peer that never comes is named when the time is over.
//
// Later: ranks of other nodes that are not connected from the start are when they are first needed (mesh_meet.cpp). The
// listener stays open; for a link the higher rank dials, for point-to-point messages the sender does.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <set>
#include <tuple>

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
  std::vector<Endpoint> others;        // the other ranks of other nodes
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
  std::deque<ControlChannel>& controls() { return controls_; }
  ControlChannel* find_control(int rank);  // null: not connected yet

  // Whether there is a whole link to a rank of another node; if not, this rank sees to its part of making one.
  bool want_link(int rank);
  // Sees to a connection that carries point-to-point messages to that rank.
  void want_messages(int rank);
  // Connections proven since the last call: links are kept here, message channels are the caller's. Never blocks;
  // throws Error naming a rank that cannot be reached.
  struct Met {
    std::vector<Connection> messages;
    std::vector<std::tuple<int, int, int>> kept;  // rank, channel, descriptor
  };
  Met meet();
  int handshakes_fd() const { return handshakes_.fd(); }
  bool dialling() const { return !dials_.empty(); }

  // Closes every connection; segments stay mapped until the end.
  void disconnect();

 private:
  struct Dial {
    Fd socket;
    int rank;
    int channel;
  };
  using Kept = std::tuple<int, int, bool>;  // rank, channel, dialled by this rank
  void connect();
  void dial_lower_peers(const Patience& patience);
  void dial_later(int rank, int channel);
  bool expects(const Hello& hello, bool local) const;
  bool is_missing(int rank, int channel, bool local) const;
  bool is_whole(int rank) const;
  void keep(Connection connection);
  std::string unix_name(int rank) const { return config_.name + "-" + std::to_string(rank); }
  std::vector<int> missing_peers() const;
  const Endpoint* endpoint(int rank) const;

  MeshConfig config_;
  int local_rank_ = 0;
  uint64_t nonce_ = 0;  // what peers read to find out whether they reach this process's memory
  std::vector<std::optional<Segment>> segments_;  // by local rank
  std::deque<ControlChannel> controls_;
  std::map<int, Link> links_;
  Fd listener_;
  Handshakes handshakes_;
  std::vector<Dial> dials_;
  std::set<Kept> asked_, kept_;  // dialled so far; connected
};

}  // namespace hybridcomm
