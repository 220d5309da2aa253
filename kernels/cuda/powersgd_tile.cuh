// What powersgd's kernels share: where factors lie in a payload, and a stretch of a region in a program's registers.
#pragma once

#include "common.cuh"

namespace hybridcomm {
namespace {

constexpr int kColumns = 512;        // of the matrix
constexpr int kThreads = 128;        // of a program, where nothing else is said
constexpr int kTileRows = 8;         // of the matrix, in a program's registers
constexpr int kSeed = 56;            // bytes before the seed
constexpr int kLeft = kHeader + 16;  // bytes before P; the scale stands alone in sixteen
constexpr uint32_t kMaxScale = 226;  // larger magnitudes are not sent: products could leave fp32's range

__device__ __forceinline__ long long rows_of(long long numel) { return (numel + kColumns - 1) / kColumns; }

__device__ __forceinline__ float* left_of(uint8_t* payload) {
  return reinterpret_cast<float*>(payload + kLeft);
}

// Bytes before Q.
template <int kRank>
__device__ __forceinline__ long long right_at(long long rows) {
  return kLeft + (4 * kRank * rows + 15) / 16 * 16;
}

// The scale's biased exponent, given the largest magnitude's bits; zero where nothing is sent.
__device__ __forceinline__ int exponent_of(uint32_t largest) {
  const uint32_t exponent = max(largest >> 23, 1u);
  return exponent > kMaxScale ? 0 : static_cast<int>(exponent);
}

__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// What is drawn for a place by the header's seed; places are below 2^32.
__device__ __forceinline__ uint32_t drawn(const uint8_t* payload, uint32_t place) {
  const uint32_t* const seed = reinterpret_cast<const uint32_t*>(payload + kSeed);
  return mixed(mixed(place ^ seed[0]) + seed[1]);
}

// A program's rows, which are neighbours in memory, a thread kEach elements of each kStep. A region's size is a
// multiple of 16, so what a thread has at a time is in it or not.
template <int kEach>
struct Tile {
  static constexpr int kSize = kTileRows * kColumns, kStep = kThreads * kEach, kCount = kSize / kStep;
  static constexpr int kRowStep = kStep / kColumns;
  const uint64_t begin;  // of the thread's elements
  const int here;        // elements of the region from there on, as far as the program's rows go
  float x[kCount][kEach];

  __device__ __forceinline__ explicit Tile(long long numel)
      : begin(static_cast<uint64_t>(blockIdx.x) * kSize + threadIdx.x * kEach),
        here(static_cast<int>(min(numel - static_cast<long long>(begin), static_cast<long long>(kSize)))) {}

  __device__ __forceinline__ bool has(int k) const { return k * kStep < here; }

  __device__ __forceinline__ void fill(float value) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[k][e] = value;
    }
  }

  template <class T>
  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Pack<T, kEach> pack = {};
      if (has(k)) pack = *reinterpret_cast<const Pack<T, kEach>*>(from + begin + k * kStep);
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[k][e] = widened(pack.at[e]);
    }
  }

  // x = x + factor * from
  template <class T>
  __device__ __forceinline__ void add(const T* from, float factor) {
    Tile other = *this;
    other.load(from);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) x[k][e] = __fadd_rn(x[k][e], __fmul_rn(factor, other.x[k][e]));
    }
  }

  template <class T>
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      Pack<T, kEach> pack;
#pragma unroll
      for (int e = 0; e < kEach; ++e) pack.at[e] = narrowed<T>(x[k][e]);
      if (has(k)) *reinterpret_cast<Pack<T, kEach>*>(to + begin + k * kStep) = pack;
    }
  }

  // From null, zeros.
  template <class T>
  __device__ __forceinline__ void copy(const T* from, T* to) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (!has(k)) continue;
      Pack<T, kEach> pack = {};
      if (from != nullptr) pack = *reinterpret_cast<const Pack<T, kEach>*>(from + begin + k * kStep);
      *reinterpret_cast<Pack<T, kEach>*>(to + begin + k * kStep) = pack;
    }
  }

  // Each x becomes use(x, value), the value being that of a payload there: P Q^T, column after column, times the scale.
  template <int kRank, class F>
  __device__ __forceinline__ void take(const uint8_t* payload, long long rows, F use) {
    const float* const left = reinterpret_cast<const float*>(payload + kLeft) + begin / kColumns;
    const float* const right =
        reinterpret_cast<const float*>(payload + right_at<kRank>(rows)) + begin % kColumns;
    const float scale = power_of(payload[kHeader]);
#pragma unroll
    for (int first = 0; first < kEach; first += 4) {
      Pack<float, 4> q[kRank];
#pragma unroll
      for (int c = 0; c < kRank; ++c) {
        q[c] = *reinterpret_cast<const Pack<float, 4>*>(right + c * kColumns + first);
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (!has(k)) continue;
        float p[kRank];
#pragma unroll
        for (int c = 0; c < kRank; ++c) p[c] = left[c * rows + k * kRowStep];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float value = __fmul_rn(p[0], q[0].at[e]);
#pragma unroll
          for (int c = 1; c < kRank; ++c) value = __fadd_rn(value, __fmul_rn(p[c], q[c].at[e]));
          x[k][first + e] = use(x[k][first + e], __fmul_rn(value, scale));
        }
      }
    }
  }
};

}  // namespace
}  // namespace hybridcomm
