// The least an in-host all-reduce of fp32 can cost here: every input byte read once, every result byte written once,
// in one address space, by one thread per core, with no hand-off but the start and the end.
//
// usage: floor RANKS BYTES...   one line "BYTES MS REWRITTEN_MS" per size: medians of 21 rounds, with ordinary or
// non-temporal stores, whichever is faster. For the second, each tensor's owner (a rank, and so a core) has rewritten
// it before every call, as a training step does: the first finds what the last call left in the core's own cache.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kRounds = 21;
constexpr size_t kLane = 8;  // floats of a vector

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Tensor = std::unique_ptr<float, Free>;

Tensor make(size_t count) {
  Tensor tensor(static_cast<float*>(std::aligned_alloc(4096, (count * sizeof(float) + 4095) / 4096 * 4096)));
  std::fill_n(tensor.get(), count, 1.0f);
  return tensor;
}

// Sums to 0 each time: inputs stay small and equal work is done in every round.
void pass(const std::vector<Tensor>& tensors, size_t begin, size_t end, bool stream) {
#if defined(__AVX2__)
  for (size_t i = begin; i < end; i += kLane) {
    __m256 sum = _mm256_load_ps(tensors[0].get() + i);
    for (size_t t = 1; t < tensors.size(); ++t)
      sum = _mm256_add_ps(sum, _mm256_load_ps(tensors[t].get() + i));
    for (const Tensor& tensor : tensors) {
      if (stream) {
        _mm256_stream_ps(tensor.get() + i, sum);
      } else {
        _mm256_store_ps(tensor.get() + i, sum);
      }
    }
  }
  if (stream) _mm_sfence();
#else
  (void)stream;
  for (size_t i = begin; i < end; ++i) {
    float sum = tensors[0].get()[i];
    for (size_t t = 1; t < tensors.size(); ++t) sum += tensors[t].get()[i];
    for (const Tensor& tensor : tensors) tensor.get()[i] = sum;
  }
#endif
}

using Clock = std::chrono::steady_clock;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

double median_ms(const std::vector<Tensor>& tensors, size_t count, unsigned threads, bool stream,
                 bool rewrite) {
  const size_t calls = std::max<size_t>(1, (size_t{1} << 18) / count);
  std::atomic<unsigned> arrived{0};
  const auto meet = [&](unsigned turn) {
    arrived.fetch_add(1);
    while (arrived.load() < turn * threads) std::this_thread::yield();
  };
  std::vector<double> ms;
  const auto work = [&](unsigned me) {
    unsigned turn = 0;
    const size_t begin = count * me / threads / kLane * kLane;
    const size_t end = me + 1 == threads ? count : count * (me + 1) / threads / kLane * kLane;
    for (int round = 0; round < kRounds; ++round) {
      double passed = 0;
      for (size_t call = 0; call < (rewrite ? calls : 1); ++call) {
        for (size_t rank = me; rewrite && rank < tensors.size(); rank += threads) {
          std::fill_n(tensors[rank].get(), count, 1.0f);
        }
        meet(++turn);
        const auto start = Clock::now();
        for (size_t again = 0; again < (rewrite ? 1 : calls); ++again) pass(tensors, begin, end, stream);
        meet(++turn);
        passed += std::chrono::duration<double, std::milli>(Clock::now() - start).count();
      }
      if (me == 0) ms.push_back(passed / static_cast<double>(calls));
    }
  };
  std::vector<std::thread> others;
  for (unsigned me = 1; me < threads; ++me) others.emplace_back(work, me);
  work(0);
  for (auto& thread : others) thread.join();
  return median(ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: floor RANKS BYTES...\n"), 2;
  const auto ranks = static_cast<size_t>(std::atoi(argv[1]));
  const unsigned threads =
      std::max(1u, std::min(static_cast<unsigned>(ranks), std::thread::hardware_concurrency()));
  for (int arg = 2; arg < argc; ++arg) {
    const size_t nbytes = std::strtoull(argv[arg], nullptr, 10),
                 count = nbytes / sizeof(float) / kLane * kLane;
    std::vector<Tensor> tensors;
    for (size_t rank = 0; rank < ranks; ++rank) tensors.push_back(make(count));
    const auto best = [&](bool rewrite) {
      return std::min(median_ms(tensors, count, threads, false, rewrite),
                      median_ms(tensors, count, threads, true, rewrite));
    };
    std::printf("%zu %.6f %.6f\n", nbytes, best(false), best(true));
    std::fflush(stdout);
  }
  return 0;
}
