// What goes out of a rank as point-to-point messages, and the connections to other nodes.
#include <algorithm>

#include "messages.h"

namespace hybridcomm {
namespace {

constexpr uint64_t kOverhead = 64;  // of a message in a window: empty ones count too

}  // namespace

bool Messages::flush(Peer& peer) {
  bool moved = false;
  while (!peer.replies.empty() && send_reply(peer)) moved = true;
  while (!peer.sends.empty() && begin_send(peer)) moved = true;
  while (!peer.streaming.empty() && send_piece(peer)) moved = true;
  return moved;
}

// Hands a frame to the ring or the socket; false: no room, or no connection, now.
bool Messages::push(const Peer& peer, bool reply, const Outgoing& outgoing, Under under) {
  if (peer.local >= 0) {
    if (!node_.post_frame(peer.local, outgoing.frame, outgoing.pointer, outgoing.data)) return false;
    counters_.shm_bytes.fetch_add(outgoing.frame.tag.nbytes, std::memory_order_relaxed);
    settle(peer.rank, under);
    return true;
  }
  const auto at = sockets_.find({peer.rank, !reply});
  if (at == sockets_.end()) {
    if (!reply) mesh_.want_messages(peer.rank);
    wants_connection_ = true;
    return false;
  }
  Channel& channel = at->second;
  if (!channel.socket.idle()) return false;
  channel.socket.begin(outgoing.frame, outgoing.data, under.sending.has_value());
  channel.under = std::move(under);
  pump(peer.rank, !reply);
  return true;
}

bool Messages::pump(int rank, bool dialled) {
  Channel& channel = sockets_.at({rank, dialled});
  const MessageSocket::Result result = channel.socket.progress_send(counters_);
  if (result == MessageSocket::Result::moved && channel.socket.idle()) settle(rank, channel.under);
  // A closed one is noticed by its end of file, behind what the peer still had to say.
  return result == MessageSocket::Result::moved;
}

// What a frame that is out means for its message.
void Messages::settle(int rank, Under& under) {
  if (under.urgent) --urgent_;
  if (under.sending) complete(*under.sending);
  if (under.piece) piece_is_out(peer(rank), *under.piece, under.nbytes);
  under = {};
}

bool Messages::send_reply(Peer& peer) {
  const Reply& front = peer.replies.front();
  Under under;
  under.urgent = front.urgent;
  if (!push(peer, true, {front.frame}, std::move(under))) return false;
  peer.replies.pop_front();
  return true;
}

bool Messages::begin_send(Peer& peer) {
  const Message& message = peer.sends.front();
  Outgoing outgoing;
  outgoing.frame.id = peer.next_id;
  outgoing.frame.tag = message.tag;
  outgoing.frame.kind = FrameKind::announce;
  Under under;
  std::optional<Node::Pointer> pointer;
  if (peer.local >= 0 && message.nbytes > 0)
    pointer = node_.point_to(message.data, message.nbytes, peer.local);
  const uint64_t slot_nbytes = mesh_.segment_shape().message_slot_nbytes();
  const uint64_t most = peer.local >= 0 ? std::min(kEagerNbytes, slot_nbytes) : kEagerNbytes;
  if (pointer) {
    outgoing.pointer = *pointer;
  } else if (message.nbytes <= most && peer.window + message.nbytes + kOverhead <= kEagerWindow) {
    outgoing.frame.kind = FrameKind::eager;
    outgoing.frame.tag.nbytes = static_cast<uint32_t>(message.nbytes);
    outgoing.data = message.data;
    under.sending = message;
  }
  if (!push(peer, false, outgoing, std::move(under))) return false;
  if (outgoing.frame.kind == FrameKind::eager) {
    peer.eager[peer.next_id] = message.nbytes + kOverhead;
    peer.window += message.nbytes + kOverhead;
  } else {
    peer.announced.emplace(peer.next_id, message);
  }
  ++peer.next_id;
  peer.sends.pop_front();
  return true;
}

bool Messages::send_piece(Peer& peer) {
  const uint64_t id = peer.streaming.front();
  const Message& message = peer.announced.at(id);
  const uint64_t most = peer.local >= 0 ? mesh_.segment_shape().message_slot_nbytes() : kPieceNbytes;
  Outgoing outgoing;
  outgoing.frame.kind = FrameKind::data;
  outgoing.frame.id = id;
  outgoing.frame.tag = message.tag;
  outgoing.frame.tag.nbytes = static_cast<uint32_t>(std::min(most, message.nbytes - message.moved));
  outgoing.data = message.data + message.moved;
  Under under;
  under.piece = id;
  under.nbytes = outgoing.frame.tag.nbytes;
  if (!push(peer, false, outgoing, std::move(under))) return false;
  peer.streaming.pop_front();
  return true;
}

void Messages::piece_is_out(Peer& peer, uint64_t id, uint64_t nbytes) {
  const auto at = peer.announced.find(id);
  at->second.moved += nbytes;
  at->second.since = Clock::now();
  if (at->second.moved < at->second.nbytes) {
    peer.streaming.push_back(id);
    return;
  }
  complete(at->second);
  peer.announced.erase(at);
}

int Messages::adopt(Connection connection) {
  const Key key{connection.rank, connection.dialled};
  peer(connection.rank);
  sockets_.erase(key);  // of a peer that had closed it
  Channel channel{MessageSocket(std::move(connection.socket), connection.dialled), {}};
  return sockets_.emplace(key, std::move(channel)).first->second.socket.fd();
}

void Messages::set_ready(int rank, bool dialled, bool readable, bool writable) {
  const auto at = sockets_.find({rank, dialled});
  if (at != sockets_.end()) at->second.socket.set_ready(readable, writable);
}

bool Messages::progress_socket(int rank, bool dialled) {
  const auto at = sockets_.find({rank, dialled});
  if (at == sockets_.end()) return false;
  const auto received = at->second.socket.progress_receive(rank, *this, counters_);
  if (received == MessageSocket::Result::closed) {
    ended(rank, dialled);
    return true;
  }
  return pump(rank, dialled) || received == MessageSocket::Result::moved;
}

void Messages::ended(int rank, bool dialled) {
  const auto other = sockets_.find({rank, !dialled});  // what came before the end may lie there
  if (other != sockets_.end()) other->second.socket.progress_receive(rank, *this, counters_);
  const std::vector<int> waiting = waiting_for();
  if (std::find(waiting.begin(), waiting.end(), rank) != waiting.end()) throw Gone(rank, false);
  peer(rank).replies.clear();
  sockets_.erase({rank, dialled});
}

void Messages::disconnect(Clock::duration limit) {
  const auto deadline = Clock::now() + limit;
  for (auto& [key, channel] : sockets_) {
    do {
      channel.socket.drain();
    } while (!channel.socket.delivered() && Clock::now() < deadline);
  }
  sockets_.clear();
}

}  // namespace hybridcomm
