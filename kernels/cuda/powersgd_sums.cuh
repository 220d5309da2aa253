// The passes of powersgd whose sums have an order: left, orthonormal and right; see powersgd.cu.
#pragma once

#include "powersgd_tile.cuh"
#include "root.cuh"

namespace hybridcomm {
namespace {

constexpr int kWide = 256;                // threads of orthonormal and right, which have few programs
constexpr int kLanes = 16;                // partial sums of a dot product
constexpr int kStretch = 4 * kWide;       // products at a time
constexpr int kAcross = 32, kDeep = 128;  // columns of a program of right, rows at a time
constexpr int kAtOnce = 32;               // of those, between two branches
constexpr float kVanished = 0x1p-16f;     // a column of whose energy not more is left is a rounding error

// A thread has the columns 4 q to 4 q + 3 of each 16, which are four of the partial sums of its row.
template <int kRank>
__device__ __forceinline__ void left(const float* acc, uint8_t* payload, long long numel) {
  __shared__ alignas(16) float start[kRank * kColumns];  // read four at a time
  const int exponent = exponent_of(*flags_of(payload)), first = threadIdx.x % 4 * 4;
  const float inverse = power_of(254 - exponent);
  for (int at = threadIdx.x; at < kRank * kColumns; at += kThreads) {
    start[at] = drawn(payload, at) >> 31 != 0 ? -inverse : inverse;  // signs change no rounding
  }
  __syncthreads();
  const long long row = static_cast<long long>(blockIdx.x) * (kThreads / 4) + threadIdx.x / 4;
  const long long rows = rows_of(numel), here = numel - row * kColumns;
  float sums[kRank][4] = {};
#pragma unroll 8
  for (int at = first; at < kColumns; at += kLanes) {
    Pack<float, 4> x = {};
    if (at < here) x = *reinterpret_cast<const Pack<float, 4>*>(acc + row * kColumns + at);
#pragma unroll
    for (int c = 0; c < kRank; ++c) {
      const auto q = *reinterpret_cast<const Pack<float, 4>*>(start + c * kColumns + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[c][e] = __fadd_rn(sums[c][e], __fmul_rn(x.at[e], q.at[e]));
    }
  }
#pragma unroll
  for (int c = 0; c < kRank; ++c) {
#pragma unroll
    for (int d = 2; d > 0; d /= 2) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[c][e] = __fadd_rn(sums[c][e], __shfl_xor_sync(kAll, sums[c][e], d));
    }
    const float sum = __fadd_rn(__fadd_rn(sums[c][0], sums[c][2]), __fadd_rn(sums[c][1], sums[c][3]));
    if (first == 0 && row < rows) left_of(payload)[c * rows + row] = exponent == 0 ? 0.0f : sum;
  }
}

// A pass of phase 3: takes `along` times the column `taken`, if there is one, from a column, then returns its dot
// product with `other`. A thread has the same rows in every pass. Lane l of 16 adds products l, l + 16, ..., while the
// others go on to the next stretch.
__device__ __forceinline__ float passed(float (*products)[kStretch], float* result, long long rows,
                                        float* column, const float* taken, float along, const float* other) {
  constexpr int kEach = kStretch / kWide;
  float sum = 0.0f;
  int half = 0;
  for (long long first = 0; first < rows; first += kStretch, half ^= 1) {
    const int count = static_cast<int>(min(rows - first, static_cast<long long>(kStretch)));
    float p[kEach], t[kEach], q[kEach];
#pragma unroll
    for (int u = 0; u < kEach;
         ++u) {  // all loads before the stores, behind which the compiler would leave them
      const int at = u * kWide + threadIdx.x;
      p[u] = at < count ? column[first + at] : 0.0f;
      t[u] = at < count && taken != nullptr ? taken[first + at] : 0.0f;
      q[u] = at < count ? other[first + at] : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      const int at = u * kWide + threadIdx.x;
      if (taken != nullptr) {
        p[u] = __fsub_rn(p[u], __fmul_rn(along, t[u]));
        if (at < count) column[first + at] = p[u];
      }
      products[half][at] = __fmul_rn(other == column ? p[u] : q[u], p[u]);
    }
    __syncthreads();
    if (threadIdx.x < kLanes) {
#pragma unroll 16
      for (int at = threadIdx.x; at < count; at += kLanes) sum = __fadd_rn(sum, products[half][at]);
    }
  }
  if (threadIdx.x < 32) {
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAll, sum, d));
    if (threadIdx.x == 0) *result = sum;
  }
  __syncthreads();
  return *result;
}

template <int kRank>
__device__ __forceinline__ void orthonormal(uint8_t* payload, long long numel) {
  __shared__ float products[2][kStretch], result;
  const long long rows = rows_of(numel);
  const uint32_t largest = *flags_of(payload);
  const int exponent = exponent_of(largest);
  float* const left = left_of(payload);
  __syncthreads();  // all know the largest
  if (threadIdx.x == 0) *flags_of(payload) = largest >= kInfKey;
  if (threadIdx.x < 4)
    reinterpret_cast<uint32_t*>(payload + kHeader)[threadIdx.x] = threadIdx.x == 0 ? exponent : 0;
  if (threadIdx.x < (-kRank * rows & 3)) left[kRank * rows + threadIdx.x] = 0.0f;
  if (exponent == 0) return;
  unsigned long long share = threadIdx.x == 0 ? share_of(exponent, kHeader) : 0;
#pragma unroll 1
  for (int c = 0; c < kRank; ++c) {
    float* const column = left + c * rows;
    const float* taken = nullptr;
    float before = 0.0f, along = 0.0f;
#pragma unroll 1
    for (int e = c == 0 ? 0 : -1; e <= 2 * c; ++e) {  // energy, two times those before, energy
      const float* const other = e < 0 || e == 2 * c ? column : left + (e < c ? e : e - c) * rows;
      along = passed(products, &result, rows, column, taken, along, other);
      if (e < 0 || c == 0) before = along;
      if (e >= 0) taken = other;
    }
    float factor = 0.0f;
    if (along > __fmul_rn(before, kVanished)) {
      factor = __uint_as_float(reciprocal_root(__float_as_uint(along)));
    }
    for (long long i = threadIdx.x; i < rows; i += kWide) {
      const float p = __fmul_rn(column[i], factor);
      column[i] = p;
      share += share_of(__float_as_uint(p), kLeft + 4 * (c * rows + i));
    }
  }
  share = warp_sum(share);
  if (threadIdx.x % 32 == 0) atomicAdd(checksum_of(payload), share);
}

// A warp has 32 columns of Q of one rank; all warps bring the rows, a stretch ahead of those that add.
template <int kRank>
__device__ __forceinline__ void right(const float* acc, uint8_t* payload, long long numel) {
  constexpr int kLoads = kDeep * kAcross / 4 / kWide, kFactors = (kRank * kDeep + kWide - 1) / kWide;
  __shared__ Pack<float, 4> tile[2][kDeep * kAcross / 4];
  __shared__ alignas(
      16) float factors[2][kFactors * kWide];  // with room for zeros that threads bring for no rank
  const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int exponent = payload[kHeader];
  const long long rows = rows_of(numel), deep = exponent == 0 ? 0 : rows;
  const float inverse = power_of(254 - exponent);
  // Thread t has four columns of row t / 8 of each 32, and P's row t % 128 of each second rank.
  long long at = static_cast<long long>(thread / 8) * kColumns + blockIdx.x * kAcross + thread % 8 * 4;
  long long row = thread % kDeep;
  const float* const left = left_of(payload) + thread / kDeep * rows;
  Pack<float, 4> ahead[kLoads];
  float ahead_left[kFactors];
  const auto fetch = [&]() {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const long long here = at + u * (kWide / 8 * kColumns);
      ahead[u] = {};
      if (here < numel) ahead[u] = *reinterpret_cast<const Pack<float, 4>*>(acc + here);
    }
#pragma unroll
    for (int u = 0; u < kFactors; ++u) {
      const bool wanted = row < rows && thread / kDeep + u * (kWide / kDeep) < kRank;
      ahead_left[u] = wanted ? left[u * (kWide / kDeep) * rows + row] : 0.0f;
    }
    at += kDeep * kColumns;
    row += kDeep;
  };
  float sum = 0.0f;
  int half = 0;
  if (deep != 0) fetch();
  for (long long first = 0; first < deep; first += kDeep, half ^= 1) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      Pack<float, 4> scaled;
#pragma unroll
      for (int e = 0; e < 4; ++e) scaled.at[e] = __fmul_rn(ahead[u].at[e], inverse);
      tile[half][u * kWide + thread] = scaled;
    }
#pragma unroll
    for (int u = 0; u < kFactors; ++u) factors[half][u * kWide + thread] = ahead_left[u];
    __syncthreads();
    fetch();
    if (warp >= kRank) continue;
    const float* x = reinterpret_cast<const float*>(tile[half]) + lane;
    const float* p = factors[half] + warp * kDeep;
#pragma unroll 1
    for (const float* const end = p + kDeep; p != end; p += kAtOnce, x += kAtOnce * kAcross) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 4) {  // zeros behind the last row change no sum that began with zero
        const auto four = *reinterpret_cast<const Pack<float, 4>*>(p + i);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = __fadd_rn(sum, __fmul_rn(x[(i + e) * kAcross], four.at[e]));
      }
    }
  }
  if (warp >= kRank) return;
  const long long place = right_at<kRank>(rows) + 4 * (warp * kColumns + blockIdx.x * kAcross + lane);
  *reinterpret_cast<float*>(payload + place) = sum;
  const unsigned long long share = warp_sum(share_of(__float_as_uint(sum), place));
  if (lane == 0 && exponent != 0) atomicAdd(checksum_of(payload), share);
}

}  // namespace
}  // namespace hybridcomm
