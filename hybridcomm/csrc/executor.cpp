#include "executor.h"

#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cstring>

namespace hybridcomm {
namespace {

constexpr uint64_t kControlEvent = uint64_t{1} << 63;
constexpr int kLookUpMs = 20;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Executor::Executor(Mesh& mesh, double timeout_s, bool crowded)
    : mesh_(mesh),
      timeout_(seconds(timeout_s)),
      spin_for_(std::chrono::microseconds(crowded ? 2 : 100)),
      yield_for_(std::chrono::microseconds(crowded ? 100 : 300)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  const auto locals = static_cast<size_t>(mesh_.local_size());
  put_.resize(locals);
  reduced_.resize(locals);
  got_.resize(locals);
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

void Executor::run(const Program& program, const Buffers& buffers, const std::function<void()>& interrupted) {
  buffers_ = buffers;
  interrupted_ = &interrupted;
  background_ = !interrupted;
  prepare(program);
  if (mesh_.local_size() > 1) mesh_.own().entered().fetch_add(1, std::memory_order_relaxed);
  while (remaining_ > 0) {
    bool moved = in_flight_ > 0 && poll_sockets(0);
    moved |= pass();
    if (!moved) wait_for_news();
  }
}

// Bounded by time, not by rounds: beside a busy neighbour one yield may take a whole time slice. In the background
// the neighbour is the caller's own computation, so there is no yielding at all: a sleeper is woken ahead of it.
void Executor::wait_for_news() {
  const auto begin = last_progress_ = Clock::now();
  const auto yield_for = background_ ? spin_for_ : yield_for_;
  while (remaining_ > 0) {
    const auto idle = Clock::now() - begin;
    if (idle < spin_for_) {
      pause_cpu();
    } else if (idle < yield_for) {
      ::sched_yield();
    } else if (sleep()) {
      return;
    }
    if ((in_flight_ > 0 && poll_sockets(0)) || pass()) return;
  }
}

void Executor::prepare(const Program& program) {
  program_ = &program;
  if (scratch_.size() < program.scratch_nbytes) scratch_.resize(program.scratch_nbytes);
  streams_.assign(program.stream_count, {});
  for (uint32_t i = 0; i < program.ops.size(); ++i) streams_[program.ops[i].stream].push_back(i);
  next_.assign(program.stream_count, 0);
  complete_.assign(program.ops.size(), 0);
  remaining_ = program.ops.size();
  in_flight_ = 0;
  recent_[++calls_ % kRemembered] = program.tag;
  recent_[calls_ % kRemembered].tensor = buffers_.name;
  last_progress_ = Clock::now();
}

bool Executor::pass() {
  bool moved = false;
  for (uint32_t stream = 0; stream < streams_.size(); ++stream) moved |= advance(stream);
  return moved;
}

bool Executor::advance(uint32_t stream) {
  const auto& order = streams_[stream];
  bool moved = false;
  // Messages are only posted here, so a stream of them is issued as far as it goes; work is done one by one,
  // so that sockets are looked after in between.
  while (next_[stream] < order.size()) {
    const uint32_t index = order[next_[stream]];
    const Op& op = program_->ops[index];
    const auto is_complete = [this](uint32_t i) { return complete_[i] != 0; };
    if (!std::all_of(op.after.begin(), op.after.end(), is_complete) || !start(index)) return moved;
    ++next_[stream];
    moved = true;
    if (op.kind != Kind::send && op.kind != Kind::receive) {
      complete(index);
      return true;
    }
  }
  return moved;
}

void Executor::complete(uint32_t op) {
  complete_[op] = 1;
  --remaining_;
  const Kind kind = program_->ops[op].kind;
  if (kind == Kind::send || kind == Kind::receive) --in_flight_;
}

bool Executor::start(uint32_t index) {
  const Op& op = program_->ops[index];
  switch (op.kind) {
    case Kind::put:
      return start_put(op);
    case Kind::reduce:
      return start_reduce(op);
    case Kind::encode:
      start_encode(op);
      return true;
    case Kind::send:
    case Kind::receive:
      start_message(index, op);
      return true;
    case Kind::sum:
      start_sum(op);
      return true;
    case Kind::decode:
      start_decode(op);
      return true;
    case Kind::publish:
      return start_publish(op);
    case Kind::get:
      return start_get(op);
  }
  return false;
}

Tag Executor::tag_of(const Op& op, uint64_t nbytes) const {
  Tag tag = program_->tag;
  tag.step = op.step;
  tag.tensor = buffers_.name;
  tag.nbytes = static_cast<uint32_t>(nbytes);
  return tag;
}

void Executor::check_slot(const Segment::Slot& slot, int peer, const Tag& expected) const {
  if (same_message(slot.tag, expected)) return;
  const int rank = mesh_.global_rank(peer);
  throw Error(Code::mismatch, mismatch_text(rank, slot.tag, expected), rank);
}

bool Executor::start_put(const Op& op) {
  const int me = mesh_.local_rank();
  uint64_t& count = put_[static_cast<size_t>(op.peer)];
  if (count - mesh_.segment(op.peer).tail(me).load(std::memory_order_seq_cst) >=
      static_cast<uint64_t>(mesh_.slots())) {
    return false;
  }
  Segment& own = mesh_.own();
  const uint64_t nbytes = region_nbytes(op);
  own.slot(op.peer, count).tag = tag_of(op, nbytes);
  std::memcpy(own.slot_data(op.peer, count), tensor_at(op), nbytes);
  own.head(op.peer).store(++count, std::memory_order_seq_cst);
  counters_.shm_bytes.fetch_add(nbytes, std::memory_order_relaxed);
  mesh_.ring(op.peer);
  return true;
}

bool Executor::start_reduce(const Op& op) {
  const int me = mesh_.local_rank();
  const uint64_t nbytes = region_nbytes(op);
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) continue;
    const uint64_t at = reduced_[static_cast<size_t>(peer)];
    if (mesh_.segment(peer).head(me).load(std::memory_order_seq_cst) <= at) return false;
    check_slot(mesh_.segment(peer).slot(me, at), peer, tag_of(op, nbytes));
  }
  sources_.clear();
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    sources_.push_back(peer == me ? tensor_at(op)
                                  : mesh_.segment(peer).slot_data(me, reduced_[static_cast<size_t>(peer)]));
  }
  sum_sources(op);
  for (int64_t source : op.sources) {
    const int peer = static_cast<int>(source);
    if (peer == me) continue;
    mesh_.own().tail(peer).store(++reduced_[static_cast<size_t>(peer)], std::memory_order_seq_cst);
    mesh_.ring(peer);
  }
  return true;
}

void Executor::start_encode(const Op& op) {
  const float* in = buffers_.residual_in == nullptr ? nullptr : buffers_.residual_in + op.residual;
  float* out = buffers_.residual_out == nullptr ? nullptr : buffers_.residual_out + op.residual;
  kernels::topk_encode(program_->codec, reinterpret_cast<const float*>(tensor_at(op)), in, out,
                       reinterpret_cast<uint8_t*>(scratch_.data() + op.offset), op.count,
                       program_->tag.digest);
}

void Executor::start_message(uint32_t index, const Op& op) {
  std::byte* data = (op.memory == Memory::tensor ? buffers_.tensor : scratch_.data()) + op.offset;
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
  sum_sources(op);
}

void Executor::sum_sources(const Op& op) {
  sum(program_->dtype, tensor_at(op), sources_.data(), static_cast<int>(sources_.size()), op.count,
      op.divisor);
}

void Executor::start_decode(const Op& op) {
  payloads_.clear();
  for (int64_t source : op.sources) {
    payloads_.push_back(reinterpret_cast<const uint8_t*>(scratch_.data() + source));
  }
  auto* out = reinterpret_cast<float*>(tensor_at(op));
  uint32_t flags = 0;
  const float weight = 1.0f / static_cast<float>(op.divisor);
  const kernels::Status status = kernels::topk_decode(program_->codec, payloads_.data(), payloads_.size(),
                                                      out, op.count, weight, program_->tag.digest, &flags);
  if (status != kernels::Status::ok) {
    throw Error(Code::payload, "step " + std::to_string(op.step) + " of " + describe(program_->tag) +
                                   ": a payload is not what the plan says (status " +
                                   std::to_string(static_cast<int>(status)) + ")");
  }
}

bool Executor::start_publish(const Op& op) {
  const int me = mesh_.local_rank();
  for (int peer = 0; peer < mesh_.local_size(); ++peer) {
    if (peer != me && published_ - mesh_.segment(peer).shared_tail(me).load(std::memory_order_seq_cst) >=
                          static_cast<uint64_t>(mesh_.slots())) {
      return false;
    }
  }
  Segment& own = mesh_.own();
  const uint64_t nbytes = region_nbytes(op);
  own.slot(me, published_).tag = tag_of(op, nbytes);
  std::memcpy(own.slot_data(me, published_), tensor_at(op), nbytes);
  own.head(me).store(++published_, std::memory_order_seq_cst);
  counters_.shm_bytes.fetch_add(nbytes, std::memory_order_relaxed);
  for (int peer = 0; peer < mesh_.local_size(); ++peer) {
    if (peer != me) mesh_.ring(peer);
  }
  return true;
}

bool Executor::start_get(const Op& op) {
  uint64_t& count = got_[static_cast<size_t>(op.peer)];
  Segment& owner = mesh_.segment(op.peer);
  if (owner.head(op.peer).load(std::memory_order_seq_cst) <= count) return false;
  const uint64_t nbytes = region_nbytes(op);
  check_slot(owner.slot(op.peer, count), op.peer, tag_of(op, nbytes));
  std::memcpy(tensor_at(op), owner.slot_data(op.peer, count), nbytes);
  mesh_.own().shared_tail(op.peer).store(++count, std::memory_order_seq_cst);
  mesh_.ring(op.peer);
  return true;
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

bool Executor::sleep() {
  bool moved = false;
  if (mesh_.local_size() == 1) {
    moved = poll_sockets(kLookUpMs);
  } else {
    Segment& own = mesh_.own();
    const bool network = in_flight_ > 0;
    const uint32_t seen = own.doorbell().load(std::memory_order_seq_cst);
    // Said before the last look: a peer that moves a counter after this look sees it and rings.
    own.sleeping().store(network ? kOnEpoll : kOnFutex, std::memory_order_seq_cst);
    moved = pass();
    if (!moved) {
      if (network) {
        moved = poll_sockets(kLookUpMs);
      } else {
        futex_wait(own.doorbell(), seen, std::chrono::milliseconds(kLookUpMs));
      }
    }
    own.sleeping().store(kAwake, std::memory_order_seq_cst);
  }
  const auto now = Clock::now();
  if (moved) last_progress_ = now;
  // Also when a slow link keeps bringing a little: an abort or Ctrl-C must not wait for its end.
  if (!moved || now >= next_look_) {
    next_look_ = now + std::chrono::milliseconds(kLookUpMs);
    look_up();
  }
  return moved;
}

}  // namespace hybridcomm
