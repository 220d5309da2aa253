// Runs a program: one thread, all streams, nothing that blocks but the wait for peers.
//
// 1. Pass over the streams; start every operation that can start; read and write sockets that are ready.
// 2. When a pass moves nothing: spin, then yield, then sleep (on a futex when only the node's memory can
//    bring news, on epoll when sockets can as well).
// 3. While asleep, look up every few milliseconds: has a peer died or given up, is the time over, was Ctrl-C
//    hit?
#pragma once

#include <sys/epoll.h>

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "mesh.h"
#include "messages.h"
#include "node.h"
#include "program.h"

namespace hybridcomm {

class Executor final : private Completion {
 public:
  // `crowded`: more ranks than cores share this host, so spinning would take the core from the rank waited
  // for.
  Executor(Mesh& mesh, double timeout_s, bool crowded);

  // Runs the program to its end. `interrupted` (may be empty) is called now and then on a long wait and may
  // throw.
  void run(const Program& program, const Buffers& buffers, const std::function<void()>& interrupted);
  // Works on point-to-point messages alone until none is open, or `stop` says so.
  void run_messages(const std::function<bool()>& stop, const std::function<void()>& interrupted);
  Messages& messages() { return messages_; }
  // Whether somebody must run messages. From any thread.
  bool wants_messages() const { return messages_.active() || messages_failed_.load(); }
  // From any thread, behind a message of its own: moves messages once if nobody works at the moment, so that a short
  // one is out, and a long one announced, without a wake-up of the thread that sleeps for them. What fails is thrown
  // where messages are run.
  void nudge_messages();
  // From any thread: owners of all messages that are not complete; nothing is worked on any more.
  std::vector<std::shared_ptr<void>> abandon_messages();
  // From any thread: there is something new to do, or to stop for.
  void wake();

  // Tells every peer that this rank gives up, and on whose account.
  void tell_abort(int culprit, Code reason);
  void tell_bye();
  // Between programs: raises what a peer has given up for, or that one is gone. What else was said is kept.
  void listen();
  void request_abort() { abort_requested_.store(true); }
  Clock::duration timeout() const { return default_timeout_; }
  bool abort_requested() const { return abort_requested_.load(); }
  const WireCounters& counters() const { return counters_; }
  const Node& node() const { return node_; }

 private:
  static constexpr size_t kRemembered = 64;
  void prepare(const Program& program);
  void note_call(const Program& program);
  template <typename Over>
  void wait_for_news(const Over& over);
  bool move_messages(const std::function<bool()>& move);
  // While it lives this thread blocks, and if it works for messages alone callers may move theirs.
  class Away {
   public:
    explicit Away(Executor& executor) : executor_(executor), lent_(executor.lent_) {
      if (lent_ == nullptr) return;
      ++executor_.away_;
      lent_->unlock();
    }
    Away(const Away&) = delete;
    Away& operator=(const Away&) = delete;
    ~Away() {
      if (lent_ == nullptr) return;
      lent_->lock();
      --executor_.away_;
    }

   private:
    Executor& executor_;
    std::unique_lock<std::mutex>* lent_;
  };
  bool sleeper_must_know() const;
  void meet_peers();
  bool pass();
  bool advance(uint32_t stream);
  // Whether an operation is under way, and whether that was all of it.
  enum class Started { no, issued, complete };
  Started start(uint32_t index);
  Started post(Lane lane, uint32_t index, const Op& op, const std::vector<int64_t>& readers);
  bool start_reduce(const Op& op);
  void start_encode(const Op& op);
  uint64_t seed_of(const Op& op) const;
  uint32_t encode(const Op& op, const kernels::EncodeInput& input);
  void encode_velocity(const Op& op, const kernels::EncodeInput& input);
  [[noreturn]] void compressor_failed(const Op& op, const Error& error) const;
  bool start_message(uint32_t index, const Op& op);
  void start_sum(const Op& op);
  void reduce_sources(const Op& op, std::byte* out, size_t count);
  void start_decode(const Op& op);
  bool start_decode_add(const Op& op);
  void check_payloads(const Op& op, kernels::Status status) const;
  bool start_get(const Op& op);
  bool start_collect(const Op& op);
  bool open_sources(Lane lane, const Op& op);
  void take_sources(Lane lane, const Op& op);
  void sum_pieces(const Op& op);
  void fetch_pieces(const Op& op, std::byte* own, uint64_t offset, uint64_t nbytes);
  // While it lives, the peers of regions_ do not let go of their memory.
  class Touching {
   public:
    explicit Touching(Executor& executor);
    Touching(const Touching&) = delete;
    Touching& operator=(const Touching&) = delete;
    ~Touching() { untouch(); }

   private:
    void untouch();
    Executor& executor_;
  };
  [[noreturn]] void lost(int local);
  void complete(uint32_t op) override;

  void watch(int fd, uint64_t key);
  void watch_sockets();
  int wait_for_sockets(epoll_event* events, int most, int timeout_ms);
  bool poll_sockets(int timeout_ms);
  bool progress_link(Link& link, int channel);
  bool sleep();
  void look_up();
  void check_departed();
  void check_peers();
  [[noreturn]] void blame(int peer);
  void answer(ControlChannel& control);
  std::string beside(const ControlChannel& control) const;
  static std::string name(const Question& call);
  void follow(const Chase& chase);
  void chase();
  bool waits(Clock::duration at_least) const;
  void check_overdue();
  std::string what() const;
  void suspect(Clock::duration idle);
  [[noreturn]] void give_up(const std::vector<int>& waiting, const std::vector<int>& silent) const;
  std::vector<int> waiting_for();
  void add_blockers(const Op& op, std::vector<int>& ranks);

  Tag tag_of(const Op& op, uint64_t nbytes) const;
  void check_message(const Descriptor& message, int local, const Tag& expected) const;
  std::byte* tensor_at(const Op& op) const { return element_at(op.begin); }
  std::byte* element_at(uint64_t index) const {
    if (buffers_.pieces.empty()) return buffers_.tensor + index * itemsize(program_->dtype);
    return element_in_pieces(index);
  }
  std::byte* element_in_pieces(uint64_t index) const;
  uint64_t region_nbytes(const Op& op) const { return op.count * itemsize(program_->dtype); }
  // Of a message inside the node: a payload or a region.
  uint64_t message_nbytes(const Op& op) const { return op.nbytes > 0 ? op.nbytes : region_nbytes(op); }

  Mesh& mesh_;
  std::mutex turn_;  // of the thread that works; one that sleeps for messages alone gives it away meanwhile
  std::unique_lock<std::mutex>* lent_ = nullptr;  // that thread's
  int away_ = 0;
  std::exception_ptr message_failure_;  // met by a caller
  std::atomic<bool> messages_failed_{false};
  const Clock::duration default_timeout_;
  Clock::duration timeout_;  // of the running program
  const Clock::duration spin_for_, yield_for_;
  const bool spare_cores_;  // one for each rank's progress thread
  Fd epoll_, alarm_;
  WireCounters counters_;
  std::atomic<bool> abort_requested_{false};
  std::vector<std::byte> scratch_;  // persistent: grows to the largest program

  Node node_;
  Messages messages_;
  std::deque<uint64_t> delivered_;  // per reduce whose publish is to come: who has the result already
  std::vector<std::byte> pieces_;   // of peers' regions that had to be fetched

  // The running program.
  const Program* program_ = nullptr;
  Buffers buffers_;
  std::vector<std::vector<uint32_t>> streams_;
  std::vector<size_t> next_;
  std::vector<uint8_t> complete_;
  std::vector<const void*> sources_;      // of the operation at hand
  std::vector<PeerRegion> regions_;       // likewise, of the other ranks among its sources
  size_t own_place_ = 0;                  // of this rank among them
  std::vector<const uint8_t*> payloads_;  // likewise
  std::vector<float> compensated_;        // likewise: what momentum correction encodes
  size_t remaining_ = 0;
  size_t in_flight_ = 0;     // messages posted and not complete
  bool wants_link_ = false;  // to a rank that is not connected yet
  Clock::time_point last_progress_, next_look_, asked_at_;
  uint64_t moves_ = 0, seen_moves_ = 0;                    // of the program, so far and at the last look
  std::unordered_map<uint64_t, uint64_t> calls_;           // begun so far, by group
  std::deque<Question> recent_;                            // the last calls; the running one is the last
  uint32_t round_ = 0, last_returned_ = 0, returned_ = 0;  // this rank's chases; returned: in this call
  Clock::time_point chased_at_;
  std::map<int, uint32_t> followed_;  // by asker: the last round
  const std::function<void()>* interrupted_ = nullptr;
  bool background_ = false;  // on the progress thread: nobody to interrupt
};

}  // namespace hybridcomm
