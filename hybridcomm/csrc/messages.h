// Point-to-point messages: matched by (peer, group, tag), beside whatever collective runs.
//
// 1. A caller's thread puts its sends and receives into an inbox; whoever has the executor's turn takes them from
//    there, and it alone works on them. That is the caller, where nobody else does.
// 2. A short message goes out at once, up to a window of them per receiver, who keeps what nobody has asked for yet.
//    A long one, or one beyond the window, is announced and waits at its sender: that is the backpressure.
// 3. A receive takes the oldest message of its peer, group and tag; messages of other tags may be overtaken. In a
//    node the receiver then copies it from the sender's memory, if it reaches that; else, and between nodes, it says
//    go, and the data comes in pieces.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>

#include "mesh.h"
#include "message_socket.h"
#include "node.h"
#include "reduce.h"

namespace hybridcomm {

// One send or receive. When all of a batch are complete, `done` is called once by the thread that notices.
struct Message {
  struct Batch {
    std::atomic<size_t> open{0};
    std::shared_ptr<void> owner;
  };
  bool send = false;
  int peer = -1;
  Tag tag;  // digest: of the group; tensor: the caller's tag; numel and dtype: of the message
  std::byte* data = nullptr;
  uint64_t nbytes = 0;
  std::shared_ptr<Batch> batch;
  Clock::time_point since;  // posted, or moved last
  uint64_t moved = 0;       // bytes that have come or gone
  bool wanted = false;      // its receiver has said go
};

// A whole tensor to or from `peer`; `group` and `tag` are what both ends go by.
inline Message message_of(bool send, int peer, uint64_t group, uint32_t tag, uint8_t dtype, uint64_t numel,
                          uintptr_t address) {
  Message message;
  message.send = send;
  message.peer = peer;
  message.tag.digest = group;
  message.tag.tensor = tag;
  message.tag.numel = numel;
  message.tag.collective = kMessageCollective;
  message.tag.dtype = dtype;
  message.data = reinterpret_cast<std::byte*>(address);
  message.nbytes = numel * itemsize(static_cast<Dtype>(dtype));
  return message;
}

class Messages final : private FrameSink {
 public:
  using Finished = std::function<void(const std::shared_ptr<void>& owner)>;
  Messages(Mesh& mesh, Node& node, WireCounters& counters);
  void on_finished(Finished finished) { finished_ = std::move(finished); }

  // From any thread. `owner` is handed to `finished` when all are complete.
  void submit(std::vector<Message> messages, std::shared_ptr<void> owner);
  // Anything left to do for this rank? From any thread.
  bool active() const { return open_.load() > 0 || urgent_.load() > 0; }
  // Owners of all that is not complete; nothing is worked on any more.
  std::vector<std::shared_ptr<void>> abandon();

  // From the thread that has the executor's turn:
  bool progress();
  // Rings are emptied even when this rank waits for no message: what lies there may fill slots that others need.
  bool drain();
  bool over_network() const { return !sockets_.empty() || wants_connection_; }
  bool receives_over_network(int rank) const { return sockets_.count({rank, false}) != 0; }
  // The descriptor to watch.
  int adopt(Connection connection);
  void set_ready(int rank, bool dialled, bool readable, bool writable);
  bool progress_socket(int rank, bool dialled);
  // Ranks whose messages, or whose taking of this rank's, are waited for; with `longer_than` only those so old.
  std::vector<int> waiting_for(Clock::duration longer_than = {}) const;
  std::string describe_waiting() const;
  // Once all that was sent has reached the peers, or `limit` has passed.
  void disconnect(Clock::duration limit);

  // A peer that is needed has gone: its connection has ended, or its memory cannot be reached.
  struct Gone : public std::exception {
    Gone(int rank, bool memory) : rank(rank), memory(memory) {}
    int rank;
    bool memory;
  };

 private:
  struct Arrived {  // before it was asked for
    MessageFrame frame;
    Node::Pointer pointer{Place::slot, 0};
    std::vector<std::byte> bytes;
  };
  struct Fetch {
    Message receive;
    uint64_t id;
    Node::Pointer pointer;
  };
  struct Reply {
    MessageFrame frame;
    bool urgent;  // its receiver waits for it
  };
  struct Peer {
    int rank = -1, local = -1;
    uint64_t next_id = 0;
    uint64_t window = 0;                    // bytes of short messages that were not taken yet
    std::deque<Message> sends;              // not begun
    std::map<uint64_t, Message> announced;  // by id
    std::map<uint64_t, uint64_t> eager;     // id -> nbytes, sent and not taken
    std::deque<uint64_t> streaming;         // ids of `announced` whose receivers said go
    std::list<Message> posted;              // receives
    std::list<Arrived> unexpected;
    std::map<uint64_t, Message> granted;  // receives whose data may come
    std::deque<Fetch> fetching;
    std::deque<Reply> replies;
  };
  using Key = std::pair<int, bool>;  // rank, dialled by this one
  struct Under {                     // what a frame under way stands for
    bool urgent = false;
    std::optional<Message> sending;  // complete when it is out
    std::optional<uint64_t> piece;   // id of a long message
    uint64_t nbytes = 0;             // of the piece
  };
  struct Channel {
    MessageSocket socket;
    Under under;
  };

  Peer& peer(int rank);
  void take_inbox();
  void post_receive(Peer& peer, Message message);
  void match(Peer& peer, std::list<Message>::iterator posted, const MessageFrame& frame,
             Node::Pointer pointer, const std::byte* bytes);
  bool flush(Peer& peer);
  bool send_reply(Peer& peer);
  bool begin_send(Peer& peer);
  bool send_piece(Peer& peer);
  struct Outgoing {
    MessageFrame frame;
    const std::byte* data = nullptr;
    Node::Pointer pointer{Place::slot, 0};
  };
  bool push(const Peer& peer, bool reply, const Outgoing& outgoing, Under under);
  bool pump(int rank, bool dialled);
  void settle(int rank, Under& under);
  void piece_is_out(Peer& peer, uint64_t id, uint64_t nbytes);
  void ended(int rank, bool dialled);
  bool drain_ring(Peer& peer);
  bool fetch_some(Peer& peer);
  void reply(Peer& peer, FrameKind kind, uint64_t id, bool urgent);
  void handle(Peer& peer, const MessageFrame& frame, Node::Pointer pointer, const std::byte* data);
  void complete(const Message& message);
  std::byte* destination(int rank, const MessageFrame& frame) override;
  void arrived(int rank, const MessageFrame& frame, const std::byte* data) override;
  template <typename Visit>
  void each_open(const Visit& visit) const;

  Mesh& mesh_;
  Node& node_;
  WireCounters& counters_;
  Finished finished_;
  mutable std::mutex mutex_;  // of the inbox
  std::deque<Message> inbox_;
  std::atomic<size_t> waiting_{0};  // in the inbox
  std::atomic<size_t> open_{0};     // messages of this rank that are not complete
  std::atomic<size_t> urgent_{0};   // replies that others wait for
  std::map<int, Peer> peers_;
  std::map<Key, Channel> sockets_;
  bool wants_connection_ = false;
};

}  // namespace hybridcomm
