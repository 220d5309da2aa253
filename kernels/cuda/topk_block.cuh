// A block of top-k in a warp's registers: phases 1 to 5 of topk.cu.
#pragma once

#include "common.cuh"

namespace hybridcomm {
namespace {

// Descending over the warp's lanes (Batcher 1968).
__device__ __forceinline__ int sorted(int value, int lane) {
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int d = size / 2; d > 0; d /= 2) {
      const int other = __shfl_xor_sync(kAll, value, d);
      const bool larger = ((lane & d) == 0) == ((lane & size) == 0);
      value = larger ? max(value, other) : min(value, other);
    }
  }
  return value;
}

template <int kCount>
__device__ __forceinline__ int reached(const int (&key)[kCount], int threshold) {
  int n = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) n += key[i] >= threshold;
  return __reduce_add_sync(kAll, n);
}

// Lanes before this one, and this one's own, of which some are in `votes`.
__device__ __forceinline__ int before(uint32_t votes, int lane) { return __popc(votes & ((1u << lane) - 1)); }

// A block of kBlock elements in a warp's registers. G: the gradient's type, R: the residual's.
template <class G, class R, int kBlock, int kK, int kBits>
struct TopK {
  static constexpr int kChunk = 16 / (sizeof(G) < sizeof(R) ? sizeof(G) : sizeof(R));
  static constexpr int kChunks = kBlock / (32 * kChunk);  // of a lane
  static_assert(kChunks >= 1 && kK <= 16, "see gather(): 2 k - 1 chunks, one per lane");
  using Chunk = Pack<float, kChunk>;

  struct Shared {
    Chunk chunk[32];
    int place[32];
  };

  Chunk acc[kChunks];

  __device__ __forceinline__ static int index_of(int chunk, int lane) { return (chunk * 32 + lane) * kChunk; }

  // Phase 1. `from`: the gradient, in global or shared memory; of a block that is not whole, `left` elements are there.
  template <bool kWhole>
  __device__ __forceinline__ void load(const G* from, const R* e_in, float decay, int left, int lane) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int i = index_of(j, lane);
      const auto g = read<kWhole>(from, i, left);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) acc[j].at[c] = widened(g.at[c]);
    }
    if (e_in == nullptr) return;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const auto r = read<kWhole>(e_in, index_of(j, lane), left);
#pragma unroll
      for (int c = 0; c < kChunk; ++c)
        acc[j].at[c] = __fadd_rn(acc[j].at[c], __fmul_rn(decay, widened(r.at[c])));
    }
  }

  // The region's size is a multiple of 16: a chunk is inside or outside as a whole.
  template <bool kWhole, class T>
  __device__ __forceinline__ static Pack<T, kChunk> read(const T* from, int i, int left) {
    Pack<T, kChunk> pack = {};
    if (kWhole || i < left) pack = *reinterpret_cast<const Pack<T, kChunk>*>(from + i);
    return pack;
  }

  // Of each chunk the largest magnitude.
  __device__ __forceinline__ void maximise(int (&maxima)[kChunks]) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      maxima[j] = key_of(acc[j].at[0]);
#pragma unroll
      for (int c = 1; c < kChunk; ++c) maxima[j] = max(maxima[j], key_of(acc[j].at[c]));
    }
  }

  // Phases 2 and 3: leaves in `shared` the chunks that may hold one of the k, in index order, in `slot` where each of the
  // lane's is (-1: nowhere), and in `threshold` a key that at least k of their elements reach; returns how many
  // there are. They fit: fewer than k have a maximum above the k-th largest one, and of those equal to it the
  // first k hold all ties that can be chosen.
  __device__ __forceinline__ int gather(const int (&maxima)[kChunks], int lane_maximum, int largest, int lane,
                                        Shared& shared, int (&slot)[kChunks], int& threshold) const {
    int lo = __shfl_sync(kAll, sorted(lane_maximum, lane), kK - 1), hi = largest + 1;
    int n = reached(maxima, lo);
    while (n > 32 && hi - lo > 1) {
      const int middle = lo + (hi - lo) / 2, m = reached(maxima, middle);
      (m >= kK ? lo : hi) = middle;
      n = m >= kK ? m : n;
    }
    threshold = lo;
    const bool ties = n > 32;
    int base = 0, equals = 0;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      bool goes = maxima[j] >= lo;
      if (ties) {
        const uint32_t votes = __ballot_sync(kAll, maxima[j] == lo);
        goes = maxima[j] > lo || (maxima[j] == lo && equals + before(votes, lane) < kK);
        equals += __popc(votes);
      }
      const uint32_t votes = __ballot_sync(kAll, goes);
      slot[j] = goes ? base + before(votes, lane) : -1;
      if (goes) {
        shared.chunk[slot[j]] = acc[j];
        shared.place[slot[j]] = index_of(j, lane);
      }
      base += __popc(votes);
    }
    __syncwarp();
    return base;
  }

  // Phase 4 on a lane's chunk of keys: which are kept, as bits, and how many of the block's come before the lane's.
  __device__ __forceinline__ static uint32_t select(const int (&key)[kChunk], int lo, int largest, int lane,
                                                    int& position) {
    int hi = largest + 1, n = reached(key, lo);
    while (n != kK && hi - lo > 1) {
      const int middle = lo + (hi - lo) / 2, m = reached(key, middle);
      (m >= kK ? lo : hi) = middle;
      n = m >= kK ? m : n;
    }
    uint32_t kept = 0;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) kept |= static_cast<uint32_t>(key[c] >= lo) << c;
    if (n != kK) {  // lo is the k-th largest itself, and more are equal to it than are wanted
      int rank = kK - reached(key, lo + 1);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) rank -= before(__ballot_sync(kAll, key[c] == lo), lane);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (key[c] != lo) continue;
        if (rank <= 0) kept &= ~(1u << c);
        --rank;
      }
    }
    position = 0;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) position += before(__ballot_sync(kAll, kept >> c & 1), lane);
    return kept;
  }

  // Phase 5 on a lane's chunk, of which `kept` are sent, from `position` on of the block's records; `records` is the
  // first one's byte in the payload. Leaves in the chunk what is not sent; returns the records' share of the checksum.
  __device__ __forceinline__ static unsigned long long send(Chunk& chunk, uint32_t kept, int place,
                                                            int exponent, int position, uint8_t* payload,
                                                            long long records) {
    unsigned long long share = 0;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      if ((kept >> c & 1) == 0) continue;
      const float q = code_of<kBits>(chunk.at[c], exponent);
      chunk.at[c] = __fsub_rn(chunk.at[c], __fmul_rn(q, power_of(exponent)));
      const uint32_t code = static_cast<uint32_t>(static_cast<int>(q)) << (16 - kBits) & 0xFFFF;
      const long long byte = records + 2 * position++;
      *reinterpret_cast<uint16_t*>(payload + byte) = static_cast<uint16_t>(code | (place + c));
      share += share_of(code | (place + c), byte);
    }
    return share;
  }

  // The residual: chunks that went through shared memory come back from there.
  __device__ __forceinline__ void settle(R* e_out, const int (&slot)[kChunks], const Shared& shared, int left,
                                         int lane) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (slot[j] >= 0) acc[j] = shared.chunk[slot[j]];
      const Pack<R, kChunk> pack = narrowed<R>(acc[j]);
      if (index_of(j, lane) < left) *reinterpret_cast<Pack<R, kChunk>*>(e_out + index_of(j, lane)) = pack;
    }
  }

  // All phases for block number `block`; returns its share of the checksum.
  __device__ __forceinline__ unsigned long long encode(const G* from, const R* e_in, R* e_out,
                                                       uint8_t* payload, long long block, int left,
                                                       long long records_at, float decay, int lane,
                                                       Shared& shared) {
    if (left == kBlock)
      load<true>(from, e_in, decay, left, lane);
    else
      load<false>(from, e_in, decay, left, lane);
    int maxima[kChunks], slot[kChunks], key[kChunk], lane_maximum = 0, threshold = 0, position = 0;
    maximise(maxima);
#pragma unroll
    for (int j = 0; j < kChunks; ++j) lane_maximum = max(lane_maximum, maxima[j]);
    const int largest = __reduce_max_sync(kAll, lane_maximum);
    if (largest >= kInfKey) {
      if (lane == 0) atomicOr(flags_of(payload), 1u);
      return 0;
    }
    const int chunks = gather(maxima, lane_maximum, largest, lane, shared, slot, threshold);
    const int mine = lane < chunks ? lane : 0;
    Chunk chunk = shared.chunk[mine];
#pragma unroll
    for (int c = 0; c < kChunk; ++c) key[c] = lane < chunks ? key_of(chunk.at[c]) : -1;
    const uint32_t kept = select(key, threshold, largest, lane, position);
    const int exponent = max((largest >> 23) + 2 - kBits, 1);
    unsigned long long share =
        send(chunk, kept, shared.place[mine], exponent, position, payload, records_at + 2 * block * kK);
    __syncwarp();
    if (kept != 0) shared.chunk[lane] = chunk;
    __syncwarp();
    if (e_out != nullptr) settle(e_out, slot, shared, left, lane);
    if (lane == 0) {
      payload[kHeader + block] = static_cast<uint8_t>(exponent);
      share += share_of(exponent, kHeader + block);
    }
    return warp_sum(share);
  }
};

}  // namespace
}  // namespace hybridcomm
