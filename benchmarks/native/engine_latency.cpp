// A small in-host all-reduce in the engine alone, without Python: ranks are processes, calls back to back, each on a
// rewritten input, results checked.
//
// usage: engine_latency RANKS BYTES   prints the median ms per call on rank 0, rewriting taken off
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "engine.h"

namespace hybridcomm {
namespace {

constexpr int kCalls = 200, kRounds = 41;
using Seconds = std::chrono::duration<double>;

// What lower.py makes of reduce_all: hand the input out to all, then sum everybody's.
std::shared_ptr<const Program> one_shot(int ranks, uint64_t count) {
  auto program = std::make_shared<Program>();
  program->tag.digest = 1;
  program->tag.numel = count;
  program->stream_count = 2;
  Op op;
  op.kind = Kind::share;
  op.count = count;
  for (int rank = 0; rank < ranks; ++rank) op.sources.push_back(rank);
  program->ops.push_back(op);
  op.kind = Kind::collect;
  op.stream = 1;
  op.after = {0};
  program->ops.push_back(op);
  return program;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

int run(int rank, int ranks, size_t nbytes, const Listener& listener, const std::string& name) {
  MeshConfig config;
  config.rank = rank;
  config.name = name;
  config.timeout_s = 30;
  for (int other = 0; other < ranks; ++other) config.local_ranks.push_back(other);
  const auto cores = static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
  Engine engine(config, listener, ranks > cores);
  const size_t count = nbytes / sizeof(float);
  const auto program = one_shot(ranks, count);
  std::vector<float> own(count, static_cast<float>(rank + 1)), tensor(count);
  Buffers buffers;
  buffers.tensor = reinterpret_cast<std::byte*>(tensor.data());
  const std::function<void()> nobody = [] {};
  std::vector<double> timed, rewriting;
  for (int round = 0; round < kRounds; ++round) {
    auto begin = Clock::now();
    for (int call = 0; call < kCalls; ++call) {
      std::copy(own.begin(), own.end(), tensor.begin());
      engine.run(program, buffers, nobody);
    }
    timed.push_back(Seconds(Clock::now() - begin).count());
    const auto want = static_cast<float>(ranks * (ranks + 1) / 2);
    if (std::any_of(tensor.begin(), tensor.end(), [want](float got) { return got != want; })) return 1;
    begin = Clock::now();
    for (int call = 0; call < kCalls; ++call) {
      std::copy(own.begin(), own.end(), tensor.begin());
      __asm__ volatile("" : : "r"(tensor.data()) : "memory");  // all of them, not the last alone
    }
    rewriting.push_back(Seconds(Clock::now() - begin).count());
  }
  if (rank == 0) std::printf("%.6f\n", (median(timed) - median(rewriting)) / kCalls * 1e3);
  std::fflush(stdout);
  engine.close();
  return 0;
}

}  // namespace
}  // namespace hybridcomm

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: engine_latency RANKS BYTES\n"), 2;
  const int ranks = std::atoi(argv[1]);
  const size_t nbytes = std::strtoull(argv[2], nullptr, 10);
  const std::string name = "hybridcomm-bench-" + std::to_string(::getpid());
  std::vector<std::unique_ptr<hybridcomm::Listener>> listeners;
  for (int rank = 0; rank < ranks; ++rank)
    listeners.push_back(std::make_unique<hybridcomm::Listener>("127.0.0.1", uint16_t{0}));
  for (int rank = 1; rank < ranks; ++rank) {
    if (::fork() == 0) ::_exit(hybridcomm::run(rank, ranks, nbytes, *listeners[static_cast<size_t>(rank)], name));
  }
  int failed = hybridcomm::run(0, ranks, nbytes, *listeners[0], name);
  for (int rank = 1; rank < ranks; ++rank) {
    int status = 0;
    ::wait(&status);
    failed |= status != 0;
  }
  return failed;
}
