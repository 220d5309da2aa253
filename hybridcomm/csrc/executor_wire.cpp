// Step 5 of 7: exchange, over the sockets to other nodes; and the sum that ends a dense one.
//
// In: bytes of the tensor or of scratch. Out: the peers', received in place or into scratch.
#include <sys/epoll.h>

#include "executor.h"

namespace hybridcomm {
namespace {

// What an event is for: a data socket's is its rank and channel alone.
constexpr uint64_t kControlEvent = uint64_t{1} << 63;
constexpr uint64_t kMessageEvent = uint64_t{1} << 62;
constexpr uint64_t kMeetingEvent = uint64_t{1} << 61;
constexpr uint64_t kAlarmEvent = uint64_t{1} << 60;

uint64_t data_key(int rank, int channel) {
  return static_cast<uint64_t>(rank) << 16 | static_cast<uint64_t>(channel);
}

}  // namespace

void Executor::watch(int fd, uint64_t key) {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  if ((key & (kMeetingEvent | kAlarmEvent)) != 0) event.events = EPOLLIN | EPOLLET;
  event.data.u64 = key;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    throw Error(Code::bootstrap, errno_text("epoll_ctl failed"));
  }
}

void Executor::watch_sockets() {
  watch(alarm_.get(), kAlarmEvent);
  watch(mesh_.handshakes_fd(), kMeetingEvent);
  for (auto& control : mesh_.controls())
    watch(control.fd(), kControlEvent | static_cast<uint32_t>(control.peer()));
  for (auto& [rank, link] : mesh_.links()) {
    for (auto& [channel, socket] : link.sockets()) watch(socket.fd(), data_key(rank, channel));
  }
}

// Ranks that connect only now, and those that this rank has dialled.
void Executor::meet_peers() {
  Mesh::Met met = mesh_.meet();
  for (const auto& [rank, channel, fd] : met.kept) {
    const bool control = channel == kControl || channel == kMessageControl;
    watch(fd, control ? kControlEvent | static_cast<uint32_t>(rank) : data_key(rank, channel));
  }
  for (Connection& connection : met.messages) {
    const uint64_t key = data_key(connection.rank, connection.dialled ? 1 : 0);
    watch(messages_.adopt(std::move(connection)), kMessageEvent | key);
  }
}

bool Executor::start_message(uint32_t index, const Op& op) {
  if (!mesh_.want_link(op.peer)) {
    wants_link_ = true;
    return false;
  }
  std::byte* data = op.memory == Memory::tensor ? element_at(op.offset / itemsize(program_->dtype))
                                                : scratch_.data() + op.offset;
  Link& link = mesh_.link(op.peer);
  ++in_flight_;
  if (op.kind == Kind::send) {
    DataSocket& socket = link.next_for_send();
    socket.post_send(index, tag_of(op, op.nbytes), data);
    if (socket.progress_send(*this, counters_) == DataSocket::Result::closed) blame(op.peer);
  } else {
    DataSocket& socket = link.next_for_receive();
    socket.post_receive(index, tag_of(op, op.nbytes), data);
    if (socket.progress_receive(op.peer, *this, counters_) == DataSocket::Result::closed) blame(op.peer);
  }
  return true;
}

void Executor::start_sum(const Op& op) {
  sources_.clear();
  for (int64_t source : op.sources) {
    sources_.push_back(source == kOwnRegion ? tensor_at(op) : scratch_.data() + source);
  }
  reduce_sources(op, tensor_at(op), op.count);
}

void Executor::reduce_sources(const Op& op, std::byte* out, size_t count) {
  reduce(program_->dtype, program_->op, out, sources_.data(), static_cast<int>(sources_.size()), count,
         op.divisor);
}

bool Executor::progress_link(Link& link, int channel) {
  DataSocket& socket = link.sockets().at(channel);
  const auto received = socket.progress_receive(link.peer(), *this, counters_);
  const auto sent = socket.progress_send(*this, counters_);
  if (received == DataSocket::Result::closed || sent == DataSocket::Result::closed) blame(link.peer());
  return received == DataSocket::Result::moved || sent == DataSocket::Result::moved;
}

int Executor::wait_for_sockets(epoll_event* events, int most, int timeout_ms) {
  if (timeout_ms == 0) return ::epoll_wait(epoll_.get(), events, most, 0);
  const Away away(*this);
  return ::epoll_wait(epoll_.get(), events, most, timeout_ms);
}

bool Executor::poll_sockets(int timeout_ms) {
  epoll_event events[64];
  const int count = wait_for_sockets(events, 64, timeout_ms);
  bool moved = false, news = false, meeting = mesh_.dialling();
  for (int i = 0; i < count; ++i) {
    const uint64_t key = events[i].data.u64;
    const uint32_t bits = events[i].events;
    const bool readable = (bits & ~static_cast<uint32_t>(EPOLLOUT)) != 0, writable = (bits & EPOLLOUT) != 0;
    const int rank = static_cast<int>((key & 0xFFFFFFFFFFFF) >> 16), channel = static_cast<int>(key & 0xFFFF);
    if ((key & kControlEvent) != 0) {
      news |= readable;
    } else if ((key & (kMeetingEvent | kAlarmEvent)) != 0) {
      meeting = true;
    } else if ((key & kMessageEvent) != 0) {
      messages_.set_ready(rank, channel == 1, readable, writable);
      moved |= move_messages([&] { return messages_.progress_socket(rank, channel == 1); });
    } else {
      Link& link = mesh_.link(rank);
      link.sockets().at(channel).set_ready(readable, writable);
      const bool program_moved = progress_link(link, channel);
      if (program_moved) ++moves_;
      moved |= program_moved;
    }
  }
  if (news) check_peers();
  if (meeting) meet_peers();
  return moved;
}

}  // namespace hybridcomm
