// Step 5 of 7: exchange, over the sockets to other nodes; and the sum that ends a dense one.
//
// In: bytes of the tensor or of scratch. Out: the peers', received in place or into scratch.
#include <sys/epoll.h>

#include "executor.h"

namespace hybridcomm {
namespace {

constexpr uint64_t kControlEvent = uint64_t{1} << 63;

}  // namespace

void Executor::watch_sockets() {
  const auto add = [this](int fd, uint64_t key) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    event.data.u64 = key;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      throw Error(Code::bootstrap, errno_text("epoll_ctl failed"));
    }
  };
  for (auto& control : mesh_.controls())
    add(control.fd(), kControlEvent | static_cast<uint32_t>(control.peer()));
  for (auto& [rank, link] : mesh_.links()) {
    for (auto& [channel, socket] : link.sockets()) {
      add(socket.fd(), static_cast<uint64_t>(rank) << 16 | static_cast<uint64_t>(channel));
    }
  }
}

void Executor::start_message(uint32_t index, const Op& op) {
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

bool Executor::poll_sockets(int timeout_ms) {
  epoll_event events[64];
  const int count = ::epoll_wait(epoll_.get(), events, 64, timeout_ms);
  bool moved = false, news = false;
  for (int i = 0; i < count; ++i) {
    const uint64_t key = events[i].data.u64;
    if ((key & kControlEvent) != 0) {
      news |= (events[i].events & ~static_cast<uint32_t>(EPOLLOUT)) != 0;
      continue;
    }
    Link& link = mesh_.link(static_cast<int>(key >> 16));
    const int channel = static_cast<int>(key & 0xFFFF);
    const uint32_t bits = events[i].events;
    link.sockets().at(channel).set_ready((bits & ~static_cast<uint32_t>(EPOLLOUT)) != 0,
                                         (bits & EPOLLOUT) != 0);
    moved |= progress_link(link, channel);
  }
  if (news) check_peers();
  return moved;
}

}  // namespace hybridcomm
