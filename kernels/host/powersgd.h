// Step 4 of 7: compress; and step 6 of 7: decompress. For powersgd: a region as a matrix of low rank.
//
// Phases
//   1  accumulate   acc = grad + e_in to e_out; the largest magnitude, whose power of two M is scaled by
//   2  start        Q of signs, by a hash of (seed, place)
//   3  left         P = M Q
//   4  orthonormal  each column of P against those before it, twice
//   5  right        Q = M^T P
//   6  residual     acc - P Q^T
// P and Q are formed where the payload wants them, so nothing is allocated; M is computed again in each pass. The
// order of every sum is part of the format and does not depend on the width of a vector.
// Source: Vogels et al. 2019, arXiv 1905.13727, algorithm 1, without the warm start.
#pragma once

#include <cmath>

#include "blocks.h"
#include "randk.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kMaxRank = 16;
constexpr uint32_t kPowersgdMaxScale = 226;  // magnitudes below 2^100
constexpr uint32_t kSumLanes = 16;
constexpr float kVanished = 0x1p-16f;

// Floats in a payload, which may begin at any byte.
[[maybe_unused]] inline float get(const uint8_t* from, size_t i) {
  float value;
  std::memcpy(&value, from + 4 * i, 4);
  return value;
}
[[maybe_unused]] inline void put(uint8_t* to, size_t i, float value) { std::memcpy(to + 4 * i, &value, 4); }

[[maybe_unused]] inline float sum_of(float (&partial)[kSumLanes]) {
  for (uint32_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (uint32_t l = 0; l < half; ++l) partial[l] = partial[l] + partial[l + half];
  }
  return partial[0];
}

// Sum of a[j] * b[j]: lane l sums elements l, l + 16, ..., then halves onto halves; n is a multiple of 16.
template <class V>
float dot(const float* a, const float* b, uint32_t n) {
  constexpr uint32_t kVectors = kSumLanes / V::kWidth;
  typename V::F sums[kVectors];
  for (uint32_t u = 0; u < kVectors; ++u) sums[u] = V::set(0.0f);
  for (uint32_t j = 0; j < n; j += kSumLanes) {
    for (uint32_t u = 0; u < kVectors; ++u) {
      const uint32_t i = j + u * V::kWidth;
      sums[u] = V::add(sums[u], V::mul(V::load(a + i), V::load(b + i)));
    }
  }
  alignas(64) float partial[kSumLanes];
  for (uint32_t u = 0; u < kVectors; ++u) V::store(partial + u * V::kWidth, sums[u]);
  return sum_of(partial);
}

// The same over two columns in a payload, of any length.
[[maybe_unused]] inline float dot_columns(const uint8_t* a, const uint8_t* b, size_t n) {
  float partial[kSumLanes] = {};
  for (size_t i = 0; i < n; ++i) {
    float& sum = partial[i % kSumLanes];
    sum = sum + get(a, i) * get(b, i);
  }
  return sum_of(partial);
}

// Phase 4.
[[maybe_unused]] inline void orthonormalise(uint8_t* left, size_t rows, uint32_t rank) {
  for (uint32_t c = 0; c < rank; ++c) {
    uint8_t* const column = left + 4 * rows * c;
    const float before = dot_columns(column, column, rows);
    for (uint32_t e = 0; e < 2 * c; ++e) {
      const uint8_t* const earlier = left + 4 * rows * (e % c);
      const float along = dot_columns(earlier, column, rows);
      for (size_t i = 0; i < rows; ++i) put(column, i, get(column, i) - along * get(earlier, i));
    }
    const float after = dot_columns(column, column, rows);
    const float factor = after > before * kVanished ? 1.0f / std::sqrt(after) : 0.0f;
    for (size_t i = 0; i < rows; ++i) put(column, i, get(column, i) * factor);
  }
}

struct PowersgdScratch {
  alignas(64) float acc[kMaxBlock];
  alignas(64) float row[kMaxBlock];
  alignas(64) float column[kMaxBlock];  // of Q, aligned
  Padding padding;
};

// Row `begin` of acc after phase 1, padded, to s.acc.
template <class V>
uint32_t acc_row(const EncodeArgs& a, size_t begin, PowersgdScratch& s) {
  EncodeArgs from = a;
  if (a.e_out != nullptr) {
    from.grad = a.e_out;
    from.e_in = nullptr;
  }
  const Block in = block_at(from, begin, a.params.block, s.padding);
  accumulate<V>(in.grad, in.e_in, a.decay, a.params.block, s.acc);
  return in.valid;
}

template <class V>
void scaled(const float* from, float factor, uint32_t n, float* to) {
  for (uint32_t j = 0; j < n; j += V::kWidth) V::store(to + j, V::mul(V::load(from + j), V::set(factor)));
}

// to += row * factor
template <class V>
void add_scaled(const float* row, float factor, uint32_t n, float* to) {
  for (uint32_t j = 0; j < n; j += V::kWidth) {
    V::store(to + j, V::add(V::load(to + j), V::mul(V::load(row + j), V::set(factor))));
  }
}

// Row i of P Q^T times scale, to `to`; right is Q with columns at any byte.
template <class V>
void product_row(const uint8_t* left, const uint8_t* right, size_t i, size_t rows, const CodecParams& params,
                 float scale, float* to) {
  const uint32_t n = params.block;
  for (uint32_t c = 0; c < params.k; ++c) {
    const float* q = reinterpret_cast<const float*>(right + size_t{4} * n * c);  // loads take any alignment
    const typename V::F p = V::set(get(left, rows * c + i));
    for (uint32_t j = 0; j < n; j += V::kWidth) {
      const typename V::F one = V::mul(p, V::load(q + j));
      V::store(to + j, c == 0 ? one : V::add(V::load(to + j), one));
    }
  }
  scaled<V>(to, scale, n, to);
}

template <class V>
bool encode_powersgd(const EncodeArgs& a) {
  PowersgdScratch s;
  if (a.numel == 0) return true;
  const uint32_t n = a.params.block, rank = a.params.k;
  const size_t rows = a.layout.nblocks;
  uint32_t largest = 0;
  for (size_t begin = 0; begin < a.numel; begin += n) {
    const Block in = block_at(a, begin, n, s.padding);
    const uint32_t here = accumulate<V>(in.grad, in.e_in, a.decay, n, s.acc);
    largest = here > largest ? here : largest;
    if (a.e_out != nullptr) write_block<V>(s.acc, a.e_out + begin, in.valid, false);
  }
  if (largest >= kInfKey) return false;
  uint8_t* const left = a.payload + a.layout.sections[1].offset;
  uint8_t* const right = a.payload + a.layout.sections[2].offset;
  const uint32_t exponent = largest >> 23 > 1 ? largest >> 23 : 1;
  if (exponent > kPowersgdMaxScale) {
    a.payload[a.layout.sections[0].offset] = 0;
    std::memset(left, 0, a.layout.sections[1].used);
    std::memset(right, 0, a.layout.sections[2].used);
    return true;
  }
  a.payload[a.layout.sections[0].offset] = static_cast<uint8_t>(exponent);
  const float scale = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
  for (uint32_t i = 0; i < rank * n; ++i) put(right, i, draw(a.seed, i) >> 31 != 0 ? -1.0f : 1.0f);
  for (size_t i = 0; i < rows; ++i) {
    acc_row<V>(a, i * n, s);
    scaled<V>(s.acc, inverse, n, s.row);
    for (uint32_t c = 0; c < rank; ++c) {
      put(left, rows * c + i, dot<V>(s.row, reinterpret_cast<const float*>(right + size_t{4} * n * c), n));
    }
  }
  orthonormalise(left, rows, rank);
  std::memset(right, 0, a.layout.sections[2].used);
  for (size_t i = 0; i < rows; ++i) {
    acc_row<V>(a, i * n, s);
    scaled<V>(s.acc, inverse, n, s.row);
    for (uint32_t c = 0; c < rank; ++c) {
      add_scaled<V>(s.row, get(left, rows * c + i), n, reinterpret_cast<float*>(right + size_t{4} * n * c));
    }
  }
  for (size_t i = 0; i < rows && a.e_out != nullptr; ++i) {
    const uint32_t valid = acc_row<V>(a, i * n, s);
    product_row<V>(left, right, i, rows, a.params, scale, s.row);
    for (uint32_t j = 0; j < n; j += V::kWidth) {
      V::store(s.acc + j, V::sub(V::load(s.acc + j), V::load(s.row + j)));
    }
    write_block<V>(s.acc, a.e_out + i * n, valid, false);
  }
  return true;
}

template <class V>
void decode_powersgd(const DecodeArgs& a) {
  alignas(64) float row[kMaxBlock];
  const uint32_t n = a.params.block;
  const size_t rows = a.layout.nblocks;
  for (size_t i = 0; i < rows; ++i) {
    float* out = a.out + i * n;
    const uint32_t valid = a.numel - i * n < n ? static_cast<uint32_t>(a.numel - i * n) : n;
    if (a.clear) std::memset(out, 0, valid * sizeof(float));
    for (size_t p = 0; p < a.count; ++p) {
      const uint32_t exponent = a.payloads[p][a.layout.sections[0].offset];
      if (exponent == 0) continue;
      product_row<V>(a.payloads[p] + a.layout.sections[1].offset, a.payloads[p] + a.layout.sections[2].offset,
                     i, rows, a.params, float_of(exponent << 23), row);
      for (uint32_t j = 0; j < valid; ++j) out[j] = out[j] + row[j] * a.weight;
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels
