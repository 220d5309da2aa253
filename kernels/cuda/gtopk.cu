// Steps 4 and 6 of 7 for gtopk, the exact top-k of a region: the oracle's bytes, in passes over the region.
//
// Phases of encode, a kernel each; sizes are fixed, so that no pass waits for the host
//   1  first       acc = grad + decay * e_in to memory; a histogram of the magnitudes' highest 11 bits
//   2  narrow      the bin in which the k-th largest lies, and its place in there: one program
//      histogram   of the next 10 bits of those in that bin; narrow, histogram and narrow again: the k-th largest key
//   3  count       per tile, how many exceed the k-th largest and how many equal it
//      scan        what comes before each tile: one program
//   4  collect     the kept values and their indices, in index order
//   5  pack        16 at a time: power-of-two scale, records, residual; counts per block in unary, bit by bit
//   6  withdraw    normally empty: where a value was not finite, clears the body and restores the residual
//   7  settle      where residuals are bf16, from acc, which then is not the residual itself
// Histograms are of integers and added atomically, so the order cannot matter. Keys of NaN are keys like others: no
// pass needs to know whether the flag is up.
//
// Of decode, for each payload in turn: ones (bits set per tile of the counts), scan, add.
#include "common.cuh"

namespace hybridcomm {
namespace {

using u64 = unsigned long long;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 8192;              // elements of a program of count and collect, 1024 of a warp
constexpr int kSpan = 2 * kTile;         // of first and histogram, which have bins to empty
constexpr int kBins = 2048, kLow = 10;   // 11 bits first, then twice 10
constexpr int kGroup = 16;               // records that share a scale
constexpr int kBlock = 1024, kBits = 6;  // gtopk:0.01

// Where narrow leaves what it found: the key so far, and the wanted one's place among those that begin with it.
struct Found {
  uint32_t key, wanted;
};

// Four neighbours of a program's `left` elements and their keys, which are -1 beyond. A region's size is a multiple of 16.
struct Four {
  float x[4];
  int key[4];

  __device__ __forceinline__ Four(const float* from, int at, int left) {
    Pack<float, 4> pack = {};
    if (at < left) pack = *reinterpret_cast<const Pack<float, 4>*>(from + at);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[c] = pack.at[c];
      key[c] = at < left ? key_of(x[c]) : -1;
    }
  }
};

// Elements of a program that begins there.
__device__ __forceinline__ int left_from(long long begin, long long numel, int most) {
  const long long left = numel - begin;
  return left < most ? static_cast<int>(left) : most;
}

// Inclusive over the warp.
__device__ __forceinline__ u64 scanned(u64 value, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u64 other = __shfl_up_sync(kAll, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// What the program's threads before this one have, and in `total` what all have. Ends behind a barrier.
__device__ __forceinline__ u64 before_in_program(u64 value, u64& total) {
  __shared__ u64 sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u64 up_to = scanned(value, lane);
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  u64 result = up_to - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) result += sums[w];
    total += sums[w];
  }
  __syncthreads();
  return result;
}

__device__ __forceinline__ void clear(uint32_t* bins) {
  for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
}

__device__ __forceinline__ void flush(const uint32_t* bins, uint32_t* to) {
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kThreads) {
    if (bins[b] != 0) atomicAdd(to + b, bins[b]);
  }
}

template <class G, class R>
__device__ __forceinline__ void first(const G* grad, const R* e_in, float* to_acc, uint8_t* payload,
                                      uint32_t* to, long long numel, float decay) {
  __shared__ uint32_t bins[kBins];
  constexpr int kChunk = 16 / (sizeof(G) < sizeof(R) ? sizeof(G) : sizeof(R));
  clear(bins);
  int largest = 0;
  const long long begin = static_cast<long long>(blockIdx.x) * kSpan;
  const int left = left_from(begin, numel, kSpan);
  for (int at = threadIdx.x * kChunk; at < left; at += kThreads * kChunk) {
    const auto g = *reinterpret_cast<const Pack<G, kChunk>*>(grad + begin + at);
    Pack<float, kChunk> acc;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) acc.at[c] = widened(g.at[c]);
    if (e_in != nullptr) {
      const auto e = *reinterpret_cast<const Pack<R, kChunk>*>(e_in + begin + at);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) acc.at[c] = __fadd_rn(acc.at[c], __fmul_rn(decay, widened(e.at[c])));
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      largest = max(largest, key_of(acc.at[c]));
      atomicAdd(bins + (key_of(acc.at[c]) >> 2 * kLow), 1u);
    }
    *reinterpret_cast<Pack<float, kChunk>*>(to_acc + begin + at) = acc;
  }
  if (__reduce_max_sync(kAll, largest) >= kInfKey && threadIdx.x % 32 == 0) atomicOr(flags_of(payload), 1u);
  flush(bins, to);
}

}  // namespace
}  // namespace hybridcomm

using namespace hybridcomm;

#define FIRST(NAME, G, R)                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                \
      NAME(const G* grad, const R* e_in, float* acc, uint8_t* payload, uint32_t* bins, long long numel, \
           float decay) {                                                                               \
    first<G, R>(grad, e_in, acc, payload, bins, numel, decay);                                          \
  }

FIRST(gtopk_first_fp32_fp32, float, float)
FIRST(gtopk_first_bf16_fp32, __nv_bfloat16, float)
FIRST(gtopk_first_fp16_fp32, __half, float)
FIRST(gtopk_first_fp32_bf16, float, __nv_bfloat16)
FIRST(gtopk_first_bf16_bf16, __nv_bfloat16, __nv_bfloat16)
FIRST(gtopk_first_fp16_bf16, __half, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_histogram(const float* acc, const Found* found, uint32_t* to, int shift, long long numel) {
  __shared__ uint32_t bins[kBins];
  clear(bins);
  const uint32_t key = found->key;
  const long long begin = static_cast<long long>(blockIdx.x) * kSpan;
  const int left = left_from(begin, numel, kSpan);
  for (int at = threadIdx.x * 4; at < left; at += kThreads * 4) {
    const Four here(acc + begin, at, left);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t bits = static_cast<uint32_t>(here.key[c]) >> shift;
      if (bits >> kLow == key) atomicAdd(bins + (bits & ((1 << kLow) - 1)), 1u);
    }
  }
  flush(bins, to);
}

// From the highest bin down, a thread eight of them. What was found before is null the first time, and `kept` wanted.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_narrow(const uint32_t* bins, const Found* from, Found* to, long long kept) {
  constexpr int kEach = kBins / kThreads;
  const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  uint32_t mine[kEach];
  u64 sum = 0, total;
#pragma unroll
  for (int b = 0; b < kEach; ++b) sum += mine[b] = bins[highest - b];
  u64 before = before_in_program(sum, total);
  const u64 wanted = from == nullptr ? static_cast<u64>(kept) : from->wanted;
  const uint32_t higher = from == nullptr ? 0 : from->key << kLow;
#pragma unroll
  for (int b = 0; b < kEach; ++b) {
    if (before < wanted && wanted <= before + mine[b]) {
      to->key = higher | static_cast<uint32_t>(highest - b);
      to->wanted = static_cast<uint32_t>(wanted - before);
    }
    before += mine[b];
  }
}

// Per tile: how many exceed the k-th largest, in the higher half, and how many equal it, in the lower.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_count(const float* acc, const Found* found, u64* counts, long long numel) {
  __shared__ u64 sums[kWarps];
  const int key = static_cast<int>(found->key);
  const long long begin = static_cast<long long>(blockIdx.x) * kTile;
  const int left = left_from(begin, numel, kTile);
  uint32_t above = 0, equal = 0;
#pragma unroll 4
  for (int at = threadIdx.x * 4; at < left; at += kThreads * 4) {
    const Four here(acc + begin, at, left);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      above += here.key[c] > key;
      equal += here.key[c] == key;
    }
  }
  above = __reduce_add_sync(kAll, above);
  equal = __reduce_add_sync(kAll, equal);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = static_cast<u64>(above) << 32 | equal;
  __syncthreads();
  if (threadIdx.x != 0) return;
  u64 sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += sums[w];
  counts[blockIdx.x] = sum;
}

// In place, from counts per tile to what comes before each.
extern "C" __global__ void __launch_bounds__(kThreads) gtopk_scan(u64* counts, int tiles) {
  u64 base = 0, total;
  for (int first = 0; first < tiles; first += kThreads) {
    const int t = first + static_cast<int>(threadIdx.x);
    const u64 before = before_in_program(t < tiles ? counts[t] : 0, total);
    if (t < tiles) counts[t] = base + before;
    base += total;
  }
}

// A warp has 1024 neighbours, a lane four of each 128.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_collect(const float* acc, const Found* found, const u64* counts, float* values, uint32_t* indices,
                  long long numel) {
  constexpr int kRows = kTile / (kWarps * 128);
  const int lane = threadIdx.x % 32, key = static_cast<int>(found->key);
  const uint32_t ties = found->wanted, earlier = (1u << lane) - 1;
  const long long begin = static_cast<long long>(blockIdx.x) * kTile;
  const int left = left_from(begin, numel, kTile), first = threadIdx.x / 32 * (kRows * 128) + lane * 4;
  uint32_t mine = 0;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const Four here(acc + begin, first + j * 128, left);
#pragma unroll
    for (int c = 0; c < 4; ++c) mine += here.key[c] > key ? 1u << 16 : here.key[c] == key;
  }
  const uint32_t of_warp = __reduce_add_sync(kAll, mine);  // at most 1024 of each
  // Lane 31 carries the warp's count, so that all of the warp get what the warps before have.
  u64 base = counts[blockIdx.x], total;
  base +=
      before_in_program(lane == 31 ? static_cast<u64>(of_warp >> 16) << 32 | (of_warp & 0xFFFF) : 0, total);
  if (of_warp == 0) return;
  uint32_t above = static_cast<uint32_t>(base >> 32), equal = static_cast<uint32_t>(base);
  for (int j = 0; j < kRows; ++j) {  // again: few warps have none, but few of their rows have some
    const Four here(acc + begin, first + j * 128, left);
    const int largest = max(max(here.key[0], here.key[1]), max(here.key[2], here.key[3]));
    if (!__any_sync(kAll, largest >= key)) continue;
    uint32_t a = above, e = equal;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t larger = __ballot_sync(kAll, here.key[c] > key);
      const uint32_t same = __ballot_sync(kAll, here.key[c] == key);
      a += __popc(larger & earlier), e += __popc(same & earlier);
      above += __popc(larger), equal += __popc(same);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool larger = here.key[c] > key, same = here.key[c] == key;
      if (larger || (same && e < ties)) {
        const uint32_t r = a + min(e, ties);
        values[r] = here.x[c];
        indices[r] = static_cast<uint32_t>(begin) + first + j * 128 + c;
      }
      a += larger, e += same;
    }
  }
}

// A thread has a record, half a warp those that share a scale.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_pack(const float* values, const uint32_t* indices, float* rest, uint8_t* payload, long long kept,
               long long records_at, long long counts_at) {
  __shared__ u64 shares[kWarps];
  const long long r = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  const bool real = r < kept;
  const float acc = real ? values[r] : 0.0f;
  int largest = key_of(acc);
#pragma unroll
  for (int d = kGroup / 2; d > 0; d /= 2) largest = max(largest, __shfl_xor_sync(kAll, largest, d));
  const int exponent = max((largest >> 23) + 2 - kBits, 1);
  u64 share = 0;
  if (real) {
    const uint32_t index = indices[r];
    const float q = code_of<kBits>(acc, exponent);
    const uint32_t record =
        (static_cast<uint32_t>(static_cast<int>(q)) << (16 - kBits) & 0xFFFF) | index % kBlock;
    rest[index] = __fsub_rn(acc, __fmul_rn(q, power_of(exponent)));
    *reinterpret_cast<uint16_t*>(payload + records_at + 2 * r) = static_cast<uint16_t>(record);
    share = share_of(record, records_at + 2 * r);
    if (r % kGroup == 0) {
      payload[kHeader + r / kGroup] = static_cast<uint8_t>(exponent);
      share += share_of(exponent, kHeader + r / kGroup);
    }
    const long long bit = r + index / kBlock, word = counts_at + bit / 32 * 4;
    atomicOr(reinterpret_cast<uint32_t*>(payload + word), 1u << bit % 32);
    share += share_of(1u << bit % 32, word);
  }
  share = warp_sum(share);
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) share += shares[w];
  atomicAdd(checksum_of(payload), share);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_withdraw(const float* e_in, float* e_out, uint8_t* payload, long long nbytes, long long numel,
                   u64 checksum) {
  if (*flags_of(payload) == 0) return;
  const long long begin = static_cast<long long>(blockIdx.x) * kTile;
  const int left = left_from(begin, numel, kTile);
  for (int at = threadIdx.x * 4; at < left; at += kThreads * 4) {
    Pack<float, 4> pack = {};
    if (e_in != nullptr) pack = *reinterpret_cast<const Pack<float, 4>*>(e_in + begin + at);
    *reinterpret_cast<Pack<float, 4>*>(e_out + begin + at) = pack;
  }
  // The body is shorter than the region: its words are shared out in the same way.
  for (long long i = begin + threadIdx.x; i < begin + kTile && kHeader + 4 * i < nbytes; i += kThreads) {
    reinterpret_cast<uint32_t*>(payload + kHeader)[i] = 0;
  }
  if (begin == 0 && threadIdx.x == 0) *checksum_of(payload) = checksum;
}

// Behind withdraw, which has not touched a residual: what is left of acc, or the residual as it was.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_settle(const float* acc, const __nv_bfloat16* e_in, __nv_bfloat16* e_out, const uint8_t* payload,
                 long long numel) {
  using Chunk = Pack<__nv_bfloat16, 8>;
  const bool flagged = *flags_of(const_cast<uint8_t*>(payload)) != 0;
  const long long begin = static_cast<long long>(blockIdx.x) * kTile;
  const int left = left_from(begin, numel, kTile);
  for (int at = threadIdx.x * 8; at < left; at += kThreads * 8) {
    Chunk chunk = {};
    if (!flagged) {
      const auto from = *reinterpret_cast<const Pack<float, 8>*>(acc + begin + at);
      chunk = narrowed<__nv_bfloat16>(from);
    } else if (e_in != nullptr) {
      chunk = *reinterpret_cast<const Chunk*>(e_in + begin + at);
    }
    *reinterpret_cast<Chunk*>(e_out + begin + at) = chunk;
  }
}

// Of a payload's counts: how many bits are set in each tile of words.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_ones(const uint8_t* payload, u64* counts, long long counts_at, int words) {
  uint32_t ones = 0;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(payload + counts_at);
  const int first = (blockIdx.x * kThreads + threadIdx.x) * 4;
  for (int w = first; w < first + 4 && w < words; ++w) ones += __popc(from[w]);
  u64 total;
  before_in_program(ones, total);
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// out = out + weight * payload; a payload has an element once, so no two threads meet.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_add(const uint8_t* payload, const u64* counts, float* out, long long records_at,
              long long counts_at, int words, float weight) {
  const uint32_t* from = reinterpret_cast<const uint32_t*>(payload + counts_at);
  const int first = (blockIdx.x * kThreads + threadIdx.x) * 4;
  uint32_t mine[4], ones = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    mine[w] = first + w < words ? from[first + w] : 0;
    ones += __popc(mine[w]);
  }
  u64 total;
  long long r = static_cast<long long>(counts[blockIdx.x] + before_in_program(ones, total));
  for (int w = 0; w < 4; ++w) {
    for (; mine[w] != 0; mine[w] &= mine[w] - 1, ++r) {
      const long long block = 32LL * (first + w) + __popc((mine[w] & -mine[w]) - 1) - r;
      const uint32_t record = *reinterpret_cast<const uint16_t*>(payload + records_at + 2 * r);
      const float q = static_cast<float>(static_cast<int16_t>(record) >> (16 - kBits));
      float& target = out[block * kBlock + record % kBlock];
      target = __fadd_rn(target, __fmul_rn(__fmul_rn(q, power_of(payload[kHeader + r / kGroup])), weight));
    }
  }
}

// Behind the last payload: NaN everywhere if one of them is flagged.
extern "C" __global__ void __launch_bounds__(kThreads)
    gtopk_spoil(const uint8_t* payloads, float* out, int count, long long stride, long long numel) {
  uint32_t flags = 0;
  for (int p = 0; p < count; ++p) flags |= *flags_of(const_cast<uint8_t*>(payloads) + p * stride);
  if (flags == 0) return;
  const long long begin = static_cast<long long>(blockIdx.x) * kTile;
  const float nan = __uint_as_float(kQuietNan);
  for (int at = threadIdx.x * 4; at < left_from(begin, numel, kTile); at += kThreads * 4) {
    *reinterpret_cast<Pack<float, 4>*>(out + begin + at) = {nan, nan, nan, nan};
  }
}
