#include "messages.h"

#include <algorithm>
#include <cstring>

namespace hybridcomm {
namespace {

constexpr uint64_t kFetchNbytes = 1 << 20;  // from a local peer's memory at a time, so that all else goes on

bool same_match(const Tag& a, const Tag& b) { return a.digest == b.digest && a.tensor == b.tensor; }

[[noreturn]] void refuse(int rank, const std::string& what) {
  throw Error(Code::mismatch, "rank " + std::to_string(rank) + " " + what, rank);
}

}  // namespace

Messages::Messages(Mesh& mesh, Node& node, WireCounters& counters)
    : mesh_(mesh), node_(node), counters_(counters) {
  for (int local = 0; local < mesh_.local_size(); ++local) {
    if (local != mesh_.local_rank()) peer(mesh_.global_rank(local));
  }
}

Messages::Peer& Messages::peer(int rank) {
  Peer& found = peers_[rank];
  found.rank = rank;
  found.local = mesh_.local_index(rank);
  return found;
}

void Messages::submit(std::vector<Message> messages, std::shared_ptr<void> owner) {
  const auto batch = std::make_shared<Message::Batch>();
  batch->open = messages.size();
  batch->owner = std::move(owner);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Message& message : messages) {
    message.batch = batch;
    message.since = Clock::now();
    inbox_.push_back(std::move(message));
  }
  open_.fetch_add(messages.size());
  waiting_.store(inbox_.size());
}

template <typename Visit>
void Messages::each_open(const Visit& visit) const {
  for (const auto& [rank, peer] : peers_) {
    for (const Message& message : peer.sends) visit(message);
    for (const auto& [id, message] : peer.announced) visit(message);
    for (const Message& message : peer.posted) visit(message);
    for (const auto& [id, message] : peer.granted) visit(message);
    for (const Fetch& fetch : peer.fetching) visit(fetch.receive);
  }
  for (const auto& [key, channel] : sockets_) {
    if (channel.under.sending) visit(*channel.under.sending);
  }
}

std::vector<int> Messages::waiting_for(Clock::duration longer_than) const {
  std::vector<int> ranks;
  const auto limit = Clock::now() - longer_than;
  each_open([&](const Message& message) {
    if (message.since <= limit) ranks.push_back(message.peer);
  });
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

std::string Messages::describe_waiting() const {
  std::string text;
  each_open([&text](const Message& message) {
    if (!text.empty()) return;
    text = std::string(message.send ? "sending" : "receiving") + " a " + describe(message.tag) +
           (message.send ? " to rank " : " from rank ") + std::to_string(message.peer);
  });
  return text.empty() ? "point-to-point messages" : text;
}

std::vector<std::shared_ptr<void>> Messages::abandon() {
  std::vector<std::shared_ptr<void>> owners;
  const auto note = [&owners](const Message& message) {
    if (std::find(owners.begin(), owners.end(), message.batch->owner) == owners.end()) {
      owners.push_back(message.batch->owner);
    }
  };
  each_open(note);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Message& message : inbox_) note(message);
  inbox_.clear();
  waiting_ = open_ = urgent_ = 0;
  peers_.clear();
  sockets_.clear();
  return owners;
}

// One by one: when one is an error, the others are still among those to abandon.
void Messages::take_inbox() {
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (inbox_.empty()) return;
    Message message = std::move(inbox_.front());
    inbox_.pop_front();
    waiting_ = inbox_.size();
    lock.unlock();
    Peer& at = peer(message.peer);
    if (message.send) {
      at.sends.push_back(std::move(message));
    } else {
      post_receive(at, std::move(message));
    }
  }
}

bool Messages::progress() {
  bool moved = waiting_.load() > 0;
  if (moved) take_inbox();
  wants_connection_ = false;
  for (auto& [rank, peer] : peers_) {
    moved |= drain_ring(peer);
    moved |= fetch_some(peer);
    moved |= flush(peer);
  }
  return moved;
}

bool Messages::drain() {
  bool moved = false;
  for (auto& [rank, peer] : peers_) moved |= drain_ring(peer);
  return moved;
}

bool Messages::drain_ring(Peer& peer) {
  if (peer.local < 0) return false;
  bool moved = false;
  while (const Descriptor* message = node_.next(Lane::message, peer.local)) {
    MessageFrame frame;
    frame.kind = static_cast<FrameKind>(message->kind);
    frame.id = message->id;
    frame.tag = message->tag;
    const Node::Pointer pointer{message->place, message->at};
    const bool holds_data = frame.kind == FrameKind::eager || frame.kind == FrameKind::data;
    const std::byte* data = nullptr;
    if (holds_data && frame.tag.nbytes > 0) {
      data = node_.open(pointer, frame.tag.nbytes, peer.local).direct;
    }
    handle(peer, frame, pointer, data);
    node_.take(Lane::message, peer.local);
    moved = true;
  }
  return moved;
}

void Messages::post_receive(Peer& peer, Message message) {
  const auto at = std::find_if(peer.unexpected.begin(), peer.unexpected.end(),
                               [&](const Arrived& a) { return same_match(a.frame.tag, message.tag); });
  const auto receive = peer.posted.insert(peer.posted.end(), std::move(message));
  if (at == peer.unexpected.end()) return;
  const Arrived arrived = std::move(*at);
  peer.unexpected.erase(at);
  match(peer, receive, arrived.frame, arrived.pointer, arrived.bytes.data());
}

// A receive stays posted until the frame is found right, so that an error ends it too.
void Messages::match(Peer& peer, std::list<Message>::iterator posted, const MessageFrame& frame,
                     Node::Pointer pointer, const std::byte* bytes) {
  if (frame.tag.numel != posted->tag.numel || frame.tag.dtype != posted->tag.dtype) {
    refuse(peer.rank, "sends a " + describe(frame.tag) + ", this rank (" + std::to_string(mesh_.rank()) +
                          ") receives a " + describe(posted->tag) +
                          ": both must give the same number of elements and dtype");
  }
  if (frame.kind == FrameKind::eager && frame.tag.nbytes != posted->nbytes) {
    refuse(peer.rank,
           "sends a " + describe(frame.tag) + " with " + std::to_string(frame.tag.nbytes) + " bytes");
  }
  if (frame.kind == FrameKind::announce && peer.granted.count(frame.id) != 0) {
    refuse(peer.rank, "announces a message again that is on its way");
  }
  Message receive = std::move(*posted);
  peer.posted.erase(posted);
  receive.since = Clock::now();
  if (frame.kind == FrameKind::eager) {
    if (receive.nbytes > 0) std::memcpy(receive.data, bytes, receive.nbytes);
    reply(peer, FrameKind::taken, frame.id, false);
    complete(receive);
  } else if (pointer.place == Place::slot) {
    peer.granted.emplace(frame.id, std::move(receive));
    reply(peer, FrameKind::go, frame.id, true);
  } else {
    peer.fetching.push_back({std::move(receive), frame.id, pointer});
  }
}

void Messages::handle(Peer& peer, const MessageFrame& frame, Node::Pointer pointer, const std::byte* data) {
  switch (frame.kind) {
    case FrameKind::eager:
    case FrameKind::announce: {
      const auto at = std::find_if(peer.posted.begin(), peer.posted.end(),
                                   [&](const Message& m) { return same_match(m.tag, frame.tag); });
      if (at != peer.posted.end()) {
        match(peer, at, frame, pointer, data);
      } else {
        Arrived arrived{frame, pointer, {}};
        if (data != nullptr) arrived.bytes.assign(data, data + frame.tag.nbytes);
        peer.unexpected.push_back(std::move(arrived));
      }
      return;
    }
    case FrameKind::go: {
      const auto at = peer.announced.find(frame.id);
      if (at == peer.announced.end() || at->second.wanted) break;
      at->second.wanted = true;
      peer.streaming.push_back(frame.id);
      return;
    }
    case FrameKind::data: {
      std::byte* to = destination(peer.rank, frame);
      if (data != nullptr) std::memcpy(to, data, frame.tag.nbytes);
      const auto at = peer.granted.find(frame.id);
      at->second.moved += frame.tag.nbytes;
      at->second.since = Clock::now();
      if (at->second.moved < at->second.nbytes) return;
      complete(at->second);
      peer.granted.erase(at);
      return;
    }
    case FrameKind::taken: {
      const auto eager = peer.eager.find(frame.id);
      if (eager != peer.eager.end()) {
        peer.window -= eager->second;
        peer.eager.erase(eager);
        return;
      }
      const auto at = peer.announced.find(frame.id);
      if (at == peer.announced.end() || at->second.wanted) break;
      take_over(reinterpret_cast<uint64_t>(at->second.data));
      complete(at->second);
      peer.announced.erase(at);
      return;
    }
    case FrameKind::none:
      break;
  }
  refuse(peer.rank, "answers a message that was never sent, or again");
}

std::byte* Messages::destination(int rank, const MessageFrame& frame) {
  Peer& from = peer(rank);
  const auto at = from.granted.find(frame.id);
  if (at == from.granted.end() || at->second.moved + frame.tag.nbytes > at->second.nbytes) {
    refuse(rank, "sends data that nobody asked for");
  }
  return at->second.data + at->second.moved;
}

void Messages::arrived(int rank, const MessageFrame& frame, const std::byte* data) {
  handle(peer(rank), frame, {Place::slot, 0}, data);
}

bool Messages::fetch_some(Peer& peer) {
  if (peer.fetching.empty()) return false;
  Fetch& front = peer.fetching.front();
  Message& receive = front.receive;
  const uint64_t nbytes = std::min(kFetchNbytes, receive.nbytes - receive.moved);
  if (!node_.touch(peer.local)) {
    node_.untouch(peer.local);
    throw Gone(peer.rank, false);
  }
  const PeerRegion region = node_.open(front.pointer, receive.nbytes, peer.local);
  std::byte* to = receive.data + receive.moved;
  const std::byte* bytes = fetch(region, receive.moved, nbytes, to);
  if (bytes != nullptr && bytes != to) std::memcpy(to, bytes, nbytes);
  node_.untouch(peer.local);
  if (bytes == nullptr) throw Gone(peer.rank, true);
  receive.moved += nbytes;
  receive.since = Clock::now();
  if (receive.moved < receive.nbytes) return true;
  if (node_.reach(peer.local) == Reach::same_process) hand_over(front.pointer.at);
  reply(peer, FrameKind::taken, front.id, true);
  complete(receive);
  peer.fetching.pop_front();
  return true;
}

void Messages::reply(Peer& peer, FrameKind kind, uint64_t id, bool urgent) {
  MessageFrame frame;
  frame.kind = kind;
  frame.id = id;
  peer.replies.push_back({frame, urgent});
  if (urgent) ++urgent_;
}

void Messages::complete(const Message& message) {
  --open_;
  if (--message.batch->open == 0) finished_(message.batch->owner);
}

}  // namespace hybridcomm
