#include "link.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>

namespace hybridcomm {
namespace {

constexpr size_t kHeader = sizeof(FrameHeader);

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK; }

}  // namespace

void DataSocket::post_send(uint32_t op, const Tag& tag, const std::byte* data) {
  FrameHeader header;
  header.tag = tag;
  out_.push_back({op, header, data});
}

void DataSocket::post_receive(uint32_t op, const Tag& tag, std::byte* data) {
  in_.push_back({op, tag, data});
}

DataSocket::Result DataSocket::progress_send(Completion& done, WireCounters& counters) {
  Result result = Result::nothing;
  while (writable_ && !out_.empty()) {
    Outgoing& front = out_.front();
    const size_t total = kHeader + front.header.tag.nbytes;
    iovec parts[2];
    int count = 0;
    if (sent_ < kHeader) parts[count++] = {reinterpret_cast<char*>(&front.header) + sent_, kHeader - sent_};
    const size_t data_sent = sent_ > kHeader ? sent_ - kHeader : 0;
    if (front.header.tag.nbytes > data_sent) {
      parts[count++] = {const_cast<std::byte*>(front.data) + data_sent, front.header.tag.nbytes - data_sent};
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t n = ::sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      writable_ = false;
      return would_block() ? result : Result::closed;
    }
    result = Result::moved;
    counters.tx_bytes.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    sent_ += static_cast<size_t>(n);
    if (sent_ == total) {
      sent_ = 0;
      done.complete(front.op);
      out_.pop_front();
    }
  }
  return result;
}

DataSocket::Result DataSocket::progress_receive(int peer, Completion& done, WireCounters& counters) {
  Result result = Result::nothing;
  while (readable_ && !in_.empty()) {
    Incoming& front = in_.front();
    const size_t total = kHeader + front.expected.nbytes;
    iovec parts[2];
    int count = 0;
    if (received_ < kHeader) {
      parts[count++] = {reinterpret_cast<char*>(&arriving_) + received_, kHeader - received_};
    }
    const size_t data_received = received_ > kHeader ? received_ - kHeader : 0;
    // Before the header is checked its data may already be read: never more than the destination holds.
    parts[count++] = {front.data + data_received, front.expected.nbytes - data_received};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t n = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0 || !would_block()) return Result::closed;
      readable_ = false;
      // Of a message whose header has not been checked, anything: it may be another, and shorter.
      wake_mark_.set(fd_.get(), received_ < kHeader ? 0 : total - received_);
      return result;
    }
    result = Result::moved;
    counters.rx_bytes.fetch_add(static_cast<uint64_t>(n), std::memory_order_relaxed);
    const bool header_was_open = received_ < kHeader;
    received_ += static_cast<size_t>(n);
    if (header_was_open && received_ >= kHeader &&
        (arriving_.magic != FrameHeader{}.magic || !same_message(arriving_.tag, front.expected))) {
      throw Error(Code::mismatch, mismatch_text(peer, arriving_.tag, front.expected), peer);
    }
    if (received_ == total) {
      received_ = 0;
      done.complete(front.op);
      in_.pop_front();
    }
  }
  return result;
}

bool Link::receiving() const {
  return std::any_of(sockets_.begin(), sockets_.end(),
                     [](const auto& entry) { return entry.second.receiving(); });
}

}  // namespace hybridcomm
