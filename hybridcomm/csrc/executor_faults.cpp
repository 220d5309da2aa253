// What an executor does when nothing moves: look after its peers, and say who is to blame.
#include <algorithm>

#include "executor.h"

namespace hybridcomm {
namespace {

constexpr auto kGrace = std::chrono::seconds(1);  // to answer a probe

}  // namespace

void Executor::look_up() {
  if (abort_requested()) throw Error(Code::aborted, "the context was aborted on this rank", mesh_.rank());
  if (*interrupted_) (*interrupted_)();
  if (pass()) {
    last_progress_ = Clock::now();
    return;
  }
  check_peers();
  check_departed();
  suspect(Clock::now() - last_progress_);
}

// A local peer that has left published all it ever will; what one on another node sent may still be on its
// way, and ends with the end of its data sockets (progress_link blames then).
void Executor::check_departed() {
  for (int rank : waiting_for()) {
    const ControlChannel& control = mesh_.control(rank);
    if (control.local() && control.state() == ControlChannel::State::left && !pass()) blame(rank);
  }
}

void Executor::check_peers() {
  for (auto& control : mesh_.controls()) {
    control.drain();
    answer(control);
    if (control.aborted() || control.state() == ControlChannel::State::lost) blame(control.peer());
  }
}

void Executor::blame(int peer) {
  ControlChannel& control = mesh_.control(peer);
  control.drain_to_the_end(seconds(2));
  if (!control.aborted() && control.state() == ControlChannel::State::left) {
    throw Error(Code::peer_lost,
                "rank " + std::to_string(peer) + " has closed its context, but " + describe(program_->tag) +
                    " on rank " + std::to_string(mesh_.rank()) +
                    " still needs it: all ranks must make the same calls",
                peer);
  }
  if (!control.aborted()) {
    throw Error(Code::peer_lost,
                "rank " + std::to_string(peer) +
                    " is gone (its connection closed without a goodbye) during " + describe(program_->tag) +
                    " on rank " + std::to_string(mesh_.rank()) + ": look at that rank's log",
                peer);
  }
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
      throw Error(
          Code::mismatch,
          "ranks disagree about the collective to run: rank " + std::to_string(culprit) + " differs" + told,
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

// A peer waits for this rank and asks: are both in the same call? Silence would tell it that this rank is not
// in any.
void Executor::answer(ControlChannel& control) const {
  const std::optional<Question> question = control.take_question();
  if (!question) return;
  control.answer();
  if (question->call > calls_ || calls_ - question->call >= kRemembered) return;
  const Tag& mine = recent_[question->call % kRemembered];
  if (mine.digest != question->tag.digest || mine.tensor != question->tag.tensor) {
    throw Error(Code::mismatch, mismatch_text(control.peer(), question->tag, mine), control.peer());
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
      if (mesh_.control(rank).asked()) silent.push_back(rank);
    }
    if (!silent.empty() || idle > 2 * timeout_ + 2 * kGrace) give_up(waiting, silent);
  }
  asked_at_ = now;
  for (int rank : waiting) {
    ControlChannel& control = mesh_.control(rank);
    if (!control.asked()) control.ask({calls_, recent_[calls_ % kRemembered]});
  }
}

void Executor::give_up(const std::vector<int>& waiting, const std::vector<int>& silent) const {
  std::string text = "no progress for " +
                     std::to_string(std::chrono::duration_cast<std::chrono::seconds>(timeout_).count()) +
                     " s in " + describe(program_->tag) + " on rank " + std::to_string(mesh_.rank()) +
                     ": waiting for " + join_ranks(waiting);
  for (int rank : silent) {
    const int local = mesh_.local_index(rank);
    const bool known = local >= 0;
    const bool entered = known && mesh_.segment(local).entered().load() >= mesh_.own().entered().load();
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
  for (int local : locals) ranks.push_back(mesh_.global_rank(local));
}

void Executor::tell_abort(int culprit, Code reason) {
  node_.revoke();
  for (auto& control : mesh_.controls()) control.send_abort(culprit < 0 ? mesh_.rank() : culprit, reason);
}

void Executor::tell_bye() {
  for (auto& control : mesh_.controls()) control.send_bye();
}

}  // namespace hybridcomm
