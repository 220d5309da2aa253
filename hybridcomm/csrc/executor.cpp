#include "executor.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

namespace hybridcomm {
namespace {

constexpr int kLookUpMs = 20;

int cores() {
  cpu_set_t allowed;
  return ::sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
}

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Executor::Executor(Mesh& mesh, double timeout_s, bool crowded)
    : mesh_(mesh),
      default_timeout_(seconds(timeout_s)),
      timeout_(default_timeout_),
      spin_for_(std::chrono::microseconds(crowded ? 0 : 100)),
      yield_for_(std::chrono::microseconds(300)),
      spare_cores_(!crowded && cores() >= 2 * mesh.local_size()),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      alarm_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      node_(mesh, mesh.single_copy()),
      messages_(mesh, node_, counters_) {
  watch_sockets();
}

void Executor::run(const Program& program, const Buffers& buffers, const std::function<void()>& interrupted) {
  const std::lock_guard<std::mutex> turn(turn_);
  buffers_ = buffers;
  lent_ = nullptr;
  interrupted_ = &interrupted;
  background_ = !interrupted;
  timeout_ = buffers.timeout_s > 0 ? seconds(buffers.timeout_s) : default_timeout_;
  prepare(program);
  note_call(program);
  const auto over = [this] { return remaining_ == 0; };
  while (!over()) {
    bool moved = in_flight_ > 0 && poll_sockets(0);
    moved |= pass();
    if (!moved) wait_for_news(over);
  }
  program_ = nullptr;
}

void Executor::run_messages(const std::function<bool()>& stop, const std::function<void()>& interrupted) {
  std::unique_lock<std::mutex> turn(turn_);
  lent_ = nullptr;
  interrupted_ = &interrupted;
  background_ = !interrupted;
  program_ = nullptr;
  streams_.clear();
  remaining_ = in_flight_ = 0;
  timeout_ = default_timeout_;
  const auto over = [this, &stop] { return !wants_messages() || stop(); };
  while (!over()) {
    bool moved = messages_.over_network() && poll_sockets(0);
    moved |= pass();
    if (moved) continue;
    lent_ = &turn;
    wait_for_news(over);
    lent_ = nullptr;
  }
}

void Executor::nudge_messages() {
  std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
  if (turn) {
    try {
      move_messages([this] { return messages_.progress(); });
    } catch (...) {
      message_failure_ = std::current_exception();
      messages_failed_ = true;
    }
    if (!sleeper_must_know()) return;
    turn.unlock();
  }
  wake();
}

// Whether what a caller did changes what the thread that sleeps for messages sleeps on.
bool Executor::sleeper_must_know() const {
  if (away_ == 0) return false;
  const bool on_futex = mesh_.local_size() > 1 && mesh_.own().sleeping().load() == kOnFutex;
  return !messages_.active() || messages_failed_ || mesh_.dialling() ||
         (on_futex && messages_.over_network());
}

std::vector<std::shared_ptr<void>> Executor::abandon_messages() {
  const std::lock_guard<std::mutex> turn(turn_);
  messages_failed_ = false;
  return messages_.abandon();
}

void Executor::wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(alarm_.get(), &one, sizeof(one));
  if (mesh_.local_size() == 1) return;
  mesh_.own().doorbell().fetch_add(1, std::memory_order_seq_cst);
  futex_wake(mesh_.own().doorbell());
}

// Bounded by time, not by rounds: beside a busy neighbour one yield may take a whole time slice. In the background
// the neighbour is the caller's own computation, so there is no yielding at all, and no spinning on its core: a
// sleeper is woken ahead of it.
template <typename Over>
void Executor::wait_for_news(const Over& over) {
  const auto begin = Clock::now();
  const auto spin_for = background_ && !spare_cores_ ? Clock::duration(0) : spin_for_;
  const auto yield_for = background_ ? spin_for : yield_for_;
  while (!over()) {
    const auto idle = Clock::now() - begin;
    if (idle < spin_for) {
      pause_cpu();
    } else if (idle < yield_for) {
      ::sched_yield();
    } else if (sleep()) {
      return;
    }
    const bool network = in_flight_ > 0 || (messages_.active() && messages_.over_network());
    if ((network && poll_sockets(0)) || pass()) return;
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
  last_progress_ = Clock::now();
  ++moves_;
}

// What this rank is in from now on, for those who ask.
void Executor::note_call(const Program& program) {
  Question call;
  call.group = program.group;
  call.call = ++calls_[program.group];
  if (program.group == 0) counters_.calls.store(call.call, std::memory_order_relaxed);
  call.tag = program.tag;
  call.tag.tensor = buffers_.name;
  program.members.copy(call.members, sizeof(call.members) - 1);
  recent_.push_back(call);
  if (recent_.size() > kRemembered) recent_.pop_front();
  returned_ = 0;
  if (mesh_.local_size() > 1) {
    mesh_.own().entered().store(call.group ^ call.call * 0x9E3779B97F4A7C15u, std::memory_order_relaxed);
  }
}

bool Executor::pass() {
  bool moved = false;
  wants_link_ = false;
  for (uint32_t stream = 0; stream < streams_.size(); ++stream) moved |= advance(stream);
  moved |= node_.progress(*this);
  if (moved) ++moves_;
  if (wants_messages()) moved |= move_messages([this] { return messages_.progress(); });
  return moved;
}

bool Executor::move_messages(const std::function<bool()>& move) {
  if (messages_failed_.exchange(false)) std::rethrow_exception(std::exchange(message_failure_, nullptr));
  try {
    return move();
  } catch (const Messages::Gone& gone) {
    if (gone.memory) lost(mesh_.local_index(gone.rank));
    blame(gone.rank);
  }
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
    if (!std::all_of(op.after.begin(), op.after.end(), is_complete)) return moved;
    const Started started = start(index);
    if (started == Started::no) return moved;
    ++next_[stream];
    moved = true;
    if (started == Started::complete) {
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

Executor::Started Executor::start(uint32_t index) {
  const Op& op = program_->ops[index];
  const auto all_or_nothing = [](bool done) { return done ? Started::complete : Started::no; };
  switch (op.kind) {
    case Kind::put:
      return post(Lane::reduce, index, op, {op.peer});
    case Kind::reduce:
      return all_or_nothing(start_reduce(op));
    case Kind::decode_add:
      return all_or_nothing(start_decode_add(op));
    case Kind::encode:
      start_encode(op);
      return Started::complete;
    case Kind::send:
    case Kind::receive:
      return start_message(index, op) ? Started::issued : Started::no;
    case Kind::sum:
      start_sum(op);
      return Started::complete;
    case Kind::decode:
      start_decode(op);
      return Started::complete;
    case Kind::publish:
      return post(Lane::gather, index, op, op.sources);
    case Kind::get:
      return all_or_nothing(start_get(op));
    case Kind::share:
      return post(Lane::share, index, op, op.sources);
    case Kind::collect:
      return all_or_nothing(start_collect(op));
  }
  return Started::no;
}

std::byte* Executor::element_in_pieces(uint64_t index) const {
  const auto& pieces = buffers_.pieces;
  const auto after = [](uint64_t at, const Piece& piece) { return at < piece.begin; };
  const Piece& piece = *(std::upper_bound(pieces.begin(), pieces.end(), index, after) - 1);
  return piece.data + (index - piece.begin) * itemsize(program_->dtype);
}

Tag Executor::tag_of(const Op& op, uint64_t nbytes) const {
  Tag tag = program_->tag;
  tag.step = op.step;
  tag.tensor = buffers_.name;
  tag.nbytes = static_cast<uint32_t>(nbytes);
  return tag;
}

bool Executor::sleep() {
  bool moved = false;
  const int limit = mesh_.dialling() ? 1 : kLookUpMs;
  if (mesh_.local_size() == 1) {
    moved = poll_sockets(limit);
  } else {
    Segment& own = mesh_.own();
    const bool network = in_flight_ > 0 || wants_link_ || messages_.over_network() || mesh_.dialling();
    const uint32_t seen = own.doorbell().load(std::memory_order_seq_cst);
    // Said before the last look: a peer that moves a counter after this look sees it and rings.
    own.sleeping().store(network ? kOnEpoll : kOnFutex, std::memory_order_seq_cst);
    moved = pass() || move_messages([this] { return messages_.drain(); });
    if (!moved) {
      if (network) {
        moved = poll_sockets(limit);
      } else {
        const Away away(*this);
        futex_wait(own.doorbell(), seen, std::chrono::milliseconds(limit));
        moved = own.doorbell().load(std::memory_order_seq_cst) != seen;
      }
    }
    own.sleeping().store(kAwake, std::memory_order_seq_cst);
  }
  const auto now = Clock::now();
  // Also when a slow link keeps bringing a little: an abort or Ctrl-C must not wait for its end.
  if (!moved || now >= next_look_) {
    next_look_ = now + std::chrono::milliseconds(kLookUpMs);
    look_up();
  }
  return moved;
}

}  // namespace hybridcomm
