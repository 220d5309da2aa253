// What an executor does when nothing moves: look after its peers, and say who is to blame.
#include <algorithm>

#include "executor.h"

namespace hybridcomm {
namespace {

constexpr auto kGrace = std::chrono::seconds(1);  // to answer a probe
constexpr auto kChase =
    std::chrono::milliseconds(400);  // between chases, and without progress before the first
constexpr uint32_t kRounds = 2;      // that must come back: one may have met a passing state

}  // namespace

std::string Executor::what() const {
  if (program_ != nullptr) return describe(program_->tag);
  return messages_.active() ? messages_.describe_waiting() : "work on the GPU";
}

void Executor::look_up() {
  if (abort_requested()) throw Error(Code::aborted, "the context was aborted on this rank", mesh_.rank());
  if (*interrupted_) (*interrupted_)();
  meet_peers();
  const bool moved = pass();
  const auto now = Clock::now();
  if (moves_ != seen_moves_) last_progress_ = now;
  seen_moves_ = moves_;
  check_peers();
  check_overdue();
  if (moved) return;
  check_departed();
  if (program_ == nullptr) return;
  chase();
  suspect(now - last_progress_);
}

// A local peer that has left published all it ever will; what one on another node sent may still be on its
// way, and ends with the end of its data sockets (progress_link blames then).
void Executor::check_departed() {
  const auto left = [this](int rank) {
    const ControlChannel* control = mesh_.find_control(rank);
    return control != nullptr && control->state() == ControlChannel::State::left;
  };
  for (int rank : waiting_for()) {
    if (left(rank) && mesh_.local_index(rank) >= 0 && !pass()) blame(rank);
  }
  for (int rank : messages_.waiting_for()) {
    const bool silent = mesh_.local_index(rank) >= 0 || !messages_.receives_over_network(rank);
    if (left(rank) && silent && !pass()) blame(rank);
  }
}

void Executor::check_peers() {
  for (auto& control : mesh_.controls()) {
    control.drain();
    answer(control);
    for (const Chase& chase : control.take_chases()) follow(chase);
    const bool lost = control.state() == ControlChannel::State::lost;
    if (control.aborted() || lost) blame(control.peer());
  }
}

void Executor::listen() {
  program_ = nullptr;
  check_peers();
}

// A point-to-point message that has not moved for the time of a timeout.
void Executor::check_overdue() {
  const std::vector<int> missing = messages_.waiting_for(timeout_);
  if (missing.empty()) return;
  throw Error(Code::stall,
              "no progress for " +
                  std::to_string(std::chrono::duration_cast<std::chrono::seconds>(timeout_).count()) +
                  " s in " + messages_.describe_waiting() + " on rank " + std::to_string(mesh_.rank()) +
                  ": waiting for " + join_ranks(missing) +
                  "; does it make the matching call, with the same group, tag, numel and dtype?",
              missing.front(), missing);
}

void Executor::blame(int peer) {
  ControlChannel* found = nullptr;  // there may be two; one tells more
  for (auto& control : mesh_.controls()) {
    if (control.peer() != peer) continue;
    control.drain_to_the_end(seconds(2));
    if (found == nullptr || control.aborted()) found = &control;
  }
  const bool aborted = found != nullptr && found->aborted();
  if (!aborted && found != nullptr && found->state() == ControlChannel::State::left) {
    throw Error(Code::peer_lost,
                "rank " + std::to_string(peer) + " has closed its context, but " + what() + " on rank " +
                    std::to_string(mesh_.rank()) + " still needs it: all ranks must make the same calls",
                peer);
  }
  if (!aborted) {
    throw Error(Code::peer_lost,
                "rank " + std::to_string(peer) +
                    " is gone (its connection closed without a goodbye) during " + what() + " on rank " +
                    std::to_string(mesh_.rank()) + ": look at that rank's log",
                peer);
  }
  const ControlChannel& control = *found;
  const int culprit = control.culprit();
  const std::string told = " (told by rank " + std::to_string(peer) + ")";
  switch (control.reason()) {
    case Code::peer_lost:
      throw Error(Code::peer_lost, "rank " + std::to_string(culprit) + " is gone" + told, culprit);
    case Code::stall:
      throw Error(Code::stall,
                  "rank " + std::to_string(peer) + " waited for rank " + std::to_string(culprit) +
                      " until its timeout" + told,
                  culprit, {culprit});
    case Code::mismatch:
      throw Error(Code::mismatch,
                  "ranks disagree about the collective to run: rank " + std::to_string(culprit) + " differs" +
                      told + beside(control),
                  culprit);
    case Code::compressor:
      throw Error(Code::compressor,
                  "the custom compressor of rank " + std::to_string(culprit) + " raised an error" + told +
                      ": look at that rank's log",
                  culprit);
    default:
      throw Error(Code::aborted, "rank " + std::to_string(culprit) + " stopped the job" + told, culprit);
  }
}

// Both calls, where a peer that gave up over a disagreement says which one it was in.
std::string Executor::beside(const ControlChannel& control) const {
  const Question& theirs = control.aborted_call();
  if (theirs.call == 0 || program_ == nullptr) return "";
  return ": that rank runs " + name(theirs) + ", this rank " + name(recent_.back());
}

std::string Executor::name(const Question& call) {
  const std::string members = call.members;
  return describe(call.tag) + (members.empty() ? "" : " over ranks " + members);
}

// A peer waits for this rank and asks: are both in the same call? Silence would tell it that this rank is not
// in any.
void Executor::answer(ControlChannel& control) {
  if (program_ == nullptr) return;
  const std::optional<Question> question = control.take_question();
  if (!question) return;
  control.answer();
  for (const Question& mine : recent_) {
    const bool same = mine.tag.digest == question->tag.digest && mine.tag.tensor == question->tag.tensor;
    if (mine.same_call(*question) && !same) {
      throw Error(Code::mismatch, mismatch_text(control.peer(), question->tag, mine.tag), control.peer());
    }
  }
}

bool Executor::waits(Clock::duration at_least) const {
  return program_ != nullptr && moves_ == seen_moves_ && Clock::now() - last_progress_ >= at_least;
}

// This rank waits; so may those it waits for, in other calls, and in the end for this one.
void Executor::chase() {
  const auto now = Clock::now();
  if (!waits(kChase) || now - chased_at_ < kChase) return;
  chased_at_ = now;
  const Question& mine = recent_.back();
  Chase question;
  question.asker = mesh_.rank();
  question.round = ++round_;
  question.group = question.from_group = mine.group;
  question.call = question.from_call = mine.call;
  for (int rank : waiting_for()) {
    if (ControlChannel* control = mesh_.find_control(rank)) control->chase(question);
  }
}

// A chase of another rank goes on to those this one waits for, with the last call on the way that is not the asker's.
void Executor::follow(const Chase& chase) {
  if (!waits(kChase / 2)) return;
  const Question& mine = recent_.back();
  const bool same = mine.group == chase.from_group && mine.call == chase.from_call;
  const auto entered = calls_.find(chase.from_group);
  // This rank has done its part: what the sender waits for is on its way.
  if (!same && entered != calls_.end() && entered->second >= chase.from_call) return;
  if (chase.asker == mesh_.rank()) {
    const bool current = mine.group == chase.group && mine.call == chase.call;
    if (!current || chase.other < 0 || chase.round == last_returned_) return;
    last_returned_ = chase.round;
    if (++returned_ < kRounds) return;
    throw Error(Code::mismatch,
                "ranks make their calls in contradicting orders and wait for each other: rank " +
                    std::to_string(chase.other) + " runs " + name(chase.other_call) + ", this rank (" +
                    std::to_string(mesh_.rank()) + ") " + name(mine) +
                    ": all ranks must issue the calls of groups that share ranks in one order",
                chase.other);
  }
  uint32_t& last = followed_[chase.asker];
  if (last == chase.round) return;
  last = chase.round;
  Chase next = chase;
  next.from_group = mine.group;
  next.from_call = mine.call;
  if (mine.group != chase.group || mine.call != chase.call) {
    next.other = mesh_.rank();
    next.other_call = mine;
  }
  for (int rank : waiting_for()) {
    if (ControlChannel* control = mesh_.find_control(rank)) control->chase(next);
  }
}

// Nothing has moved for a while. The ranks this one waits for may themselves be waiting, or wait for another
// call: ask them. When the time is over, a rank that did not answer is the culprit; while all answer, the
// rank that misses a silent one will say so.
void Executor::suspect(Clock::duration idle) {
  const auto now = Clock::now();
  if (idle < kGrace || now - asked_at_ < kGrace) return;
  const std::vector<int> waiting = waiting_for();
  if (idle > timeout_ && asked_at_ > last_progress_) {
    std::vector<int> silent;
    for (int rank : waiting) {
      const ControlChannel* control = mesh_.find_control(rank);
      if (control == nullptr || control->asked()) silent.push_back(rank);
    }
    if (!silent.empty() || idle > 2 * timeout_ + 2 * kGrace) give_up(waiting, silent);
  }
  asked_at_ = now;
  for (int rank : waiting) {
    ControlChannel* control = mesh_.find_control(rank);
    if (control != nullptr && !control->asked()) control->ask(recent_.back());
  }
}

void Executor::give_up(const std::vector<int>& waiting, const std::vector<int>& silent) const {
  std::string text = "no progress for " +
                     std::to_string(std::chrono::duration_cast<std::chrono::seconds>(timeout_).count()) +
                     " s in " + name(recent_.back()) + " on rank " + std::to_string(mesh_.rank()) +
                     ": waiting for " + join_ranks(waiting);
  for (int rank : silent) {
    const int local = mesh_.local_index(rank);
    const bool known = local >= 0;
    const bool entered = known && mesh_.segment(local).entered().load() == mesh_.own().entered().load();
    text += "; rank " + std::to_string(rank) +
            (entered ? " is stopped"
             : known ? " never entered this call"
                     : " never entered this call, or is stopped");
  }
  if (silent.empty()) text += "; all of them are in a call: look at the other ranks' errors";
  const std::vector<int>& culprits = silent.empty() ? waiting : silent;
  throw Error(Code::stall, text, culprits.empty() ? -1 : culprits.front(), culprits);
}

std::vector<int> Executor::waiting_for() {
  std::vector<int> ranks;
  for (int local : node_.pending_readers()) ranks.push_back(mesh_.global_rank(local));
  for (size_t stream = 0; stream < streams_.size(); ++stream) {
    if (next_[stream] < streams_[stream].size())
      add_blockers(program_->ops[streams_[stream][next_[stream]]], ranks);
  }
  for (auto& [rank, link] : mesh_.links()) {
    for (auto& [channel, socket] : link.sockets()) {
      if (!socket.idle()) ranks.push_back(rank);
    }
  }
  std::sort(ranks.begin(), ranks.end());
  ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  return ranks;
}

void Executor::add_blockers(const Op& op, std::vector<int>& ranks) {
  const auto pending = [this](uint32_t i) { return complete_[i] == 0; };
  if (std::any_of(op.after.begin(), op.after.end(), pending)) return;
  std::vector<int> locals;
  if (op.kind == Kind::put) locals = node_.unread(Lane::reduce, {op.peer});
  if (op.kind == Kind::publish) locals = node_.unread(Lane::gather, op.sources);
  if (op.kind == Kind::share) locals = node_.unread(Lane::share, op.sources);
  if (op.kind == Kind::reduce || op.kind == Kind::decode_add) locals = node_.silent(Lane::reduce, op.sources);
  if (op.kind == Kind::collect) locals = node_.silent(Lane::share, op.sources);
  if (op.kind == Kind::get) locals.push_back(op.peer);
  if (op.kind == Kind::send || op.kind == Kind::receive) ranks.push_back(op.peer);  // no link to it yet
  for (int local : locals) ranks.push_back(mesh_.global_rank(local));
}

void Executor::tell_abort(int culprit, Code reason) {
  node_.revoke();
  const Question call = program_ == nullptr || recent_.empty() ? Question{} : recent_.back();
  for (auto& control : mesh_.controls()) {
    control.send_abort(culprit < 0 ? mesh_.rank() : culprit, reason, call);
  }
}

void Executor::tell_bye() {
  for (auto& control : mesh_.controls()) control.send_bye();
}

}  // namespace hybridcomm
