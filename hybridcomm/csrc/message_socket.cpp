#include "message_socket.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

namespace hybridcomm {
namespace {

constexpr size_t kHeader = sizeof(MessageFrame);

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

}  // namespace

void MessageSocket::begin(const MessageFrame& frame, const std::byte* data, bool copy) {
  sending_ = frame;
  data_ = data;
  if (copy && frame.tag.nbytes > 0) {
    copy_.assign(data, data + frame.tag.nbytes);
    data_ = copy_.data();
  }
  left_ = kHeader + frame.tag.nbytes;
}

MessageSocket::Result MessageSocket::progress_send(WireCounters& counters) {
  Result result = Result::nothing;
  while (writable_ && left_ > 0) {
    const size_t sent = kHeader + sending_.tag.nbytes - left_;
    iovec parts[2];
    size_t count = 0;
    if (sent < kHeader) parts[count++] = {reinterpret_cast<char*>(&sending_) + sent, kHeader - sent};
    const size_t data_sent = sent > kHeader ? sent - kHeader : 0;
    if (sending_.tag.nbytes > data_sent) {
      parts[count++] = {const_cast<std::byte*>(data_) + data_sent, sending_.tag.nbytes - data_sent};
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = count;
    const ssize_t n = ::sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      writable_ = false;
      return would_block() ? result : Result::closed;
    }
    result = Result::moved;
    counters.tx_bytes.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    counters.message_tx_bytes.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    left_ -= static_cast<size_t>(n);
  }
  return result;
}

MessageSocket::Result MessageSocket::progress_receive(int peer, FrameSink& sink, WireCounters& counters) {
  Result result = Result::nothing;
  while (readable_) {
    const bool header = received_ < kHeader;
    void* at = header ? static_cast<void*>(reinterpret_cast<char*>(&arriving_) + received_)
                      : static_cast<void*>(target_ + (received_ - kHeader));
    const size_t wanted = (header ? kHeader : kHeader + arriving_.tag.nbytes) - received_;
    const ssize_t n = ::recv(fd_.get(), at, wanted, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      readable_ = false;
      if (n == 0 || !would_block()) return Result::closed;
      wake_mark_.set(fd_.get(), header ? 0 : wanted);
      return result;
    }
    result = Result::moved;
    counters.rx_bytes.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    received_ += static_cast<size_t>(n);
    if (received_ < kHeader || !arrive(peer, sink)) continue;
    received_ = 0;
  }
  return result;
}

// Whether the frame is complete; called when its header is.
bool MessageSocket::arrive(int peer, FrameSink& sink) {
  const size_t nbytes = arriving_.tag.nbytes;
  // Data of one message by two ways would land in memory that is no longer its own.
  const bool is_reply = arriving_.kind == FrameKind::go || arriving_.kind == FrameKind::taken;
  const bool good = arriving_.magic == MessageFrame{}.magic && is_reply == dialled_ &&
                    (nbytes == 0 || (arriving_.kind == FrameKind::eager && nbytes <= kEagerNbytes) ||
                     (arriving_.kind == FrameKind::data && nbytes <= kPieceNbytes));
  if (!good) {
    throw Error(Code::mismatch, "rank " + std::to_string(peer) + " sent what is no frame of a message", peer);
  }
  if (received_ == kHeader && nbytes > 0) {
    if (arriving_.kind == FrameKind::eager) inbox_.resize(nbytes);
    target_ = arriving_.kind == FrameKind::eager ? inbox_.data() : sink.destination(peer, arriving_);
  }
  if (received_ < kHeader + nbytes) return false;
  sink.arrived(peer, arriving_, arriving_.kind == FrameKind::eager ? inbox_.data() : nullptr);
  return true;
}

void MessageSocket::drain() {
  char away[4096];
  while (::recv(fd_.get(), away, sizeof(away), MSG_DONTWAIT) > 0) {
  }
}

bool MessageSocket::delivered() const {
  int unacknowledged = 0;
  if (::ioctl(fd_.get(), SIOCOUTQ, &unacknowledged) != 0 || unacknowledged == 0) return true;
  pollfd ended{fd_.get(), 0, 0};
  return ::poll(&ended, 1, 1) > 0;
}

}  // namespace hybridcomm
