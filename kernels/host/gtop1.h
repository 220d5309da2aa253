// Step 4 of 7: compress, a block at a time; and step 6 of 7: decompress. For gtop1: the largest of each strided group.
//
// Phases of a block of `rows` x `k` elements, row by row
//   1  select    acc = grad + e_in into a buffer that stays in L1; per column the largest magnitude and its row
//   2  quantise  power-of-two scale, a record per column, residual of the sent elements
//   3  write     buffer to e_out
// Columns lie side by side, so a vector holds as many groups as it has lanes and nothing is ever gathered.
#pragma once

#include "blocks.h"

namespace hybridcomm::kernels {
namespace {

struct Gtop1Scratch {
  alignas(64) float acc[kMaxBlock];
  alignas(64) float row[kMaxBlock];  // as bits: row of each column's largest
  Padding padding;
};

// Phase 1 for kTile columns from `column` on; returns the largest magnitude.
template <class V, uint32_t kTile, bool kResidual, bool kDecay>
uint32_t select_tile(const Block& in, float decay, uint32_t rows, uint32_t k, uint32_t column,
                     Gtop1Scratch& s) {
  constexpr uint32_t kVectors = kTile / V::kWidth;
  const typename V::I magnitude = V::set(int32_t{kMagnitude});
  const typename V::F by = V::set(decay);
  typename V::I best[kVectors], row[kVectors];
  for (uint32_t u = 0; u < kVectors; ++u) best[u] = row[u] = V::set(0);
  for (uint32_t r = 0; r < rows; ++r) {
    const typename V::I here = V::set(static_cast<int32_t>(r));
    for (uint32_t u = 0; u < kVectors; ++u) {
      const uint32_t i = r * k + column + u * V::kWidth;
      V::prefetch(in.grad + i);
      typename V::F x = V::load(in.grad + i);
      if constexpr (kResidual) {
        V::prefetch(in.e_in + i);
        const typename V::F e = V::load(in.e_in + i);
        x = V::add(x, kDecay ? V::mul(e, by) : e);
      }
      V::store(s.acc + i, x);
      const typename V::I key = V::both(V::bits(x), magnitude);
      row[u] = V::where_less(best[u], key, here, row[u]);
      best[u] = V::max(best[u], key);
    }
  }
  typename V::I top = best[0];
  for (uint32_t u = 0; u < kVectors; ++u) {
    V::store(s.row + column + u * V::kWidth, V::floats(row[u]));
    top = V::max(top, best[u]);
  }
  return V::largest(top);
}

template <class V, uint32_t kTile>
uint32_t select_columns(const Block& in, float decay, uint32_t rows, uint32_t k, Gtop1Scratch& s) {
  uint32_t largest = 0;
  for (uint32_t column = 0; column < k; column += kTile) {
    const uint32_t here = in.e_in == nullptr
                              ? select_tile<V, kTile, false, false>(in, decay, rows, k, column, s)
                          : decay == 1.0f ? select_tile<V, kTile, true, false>(in, decay, rows, k, column, s)
                                          : select_tile<V, kTile, true, true>(in, decay, rows, k, column, s);
    largest = here > largest ? here : largest;
  }
  return largest;
}

template <class V>
bool encode_gtop1(const EncodeArgs& a) {
  Gtop1Scratch s;
  const uint32_t block = a.params.block, k = a.params.k, rows = block / k, shift = 16 - a.params.value_bits;
  const int32_t qmax = (1 << (a.params.value_bits - 1)) - 1;
  uint8_t* scale_out = a.payload + a.layout.sections[0].offset;
  uint8_t* record_out = a.payload + a.layout.sections[1].offset;
  for (size_t begin = 0; begin < a.numel; begin += block) {
    const Block in = block_at(a, begin, block, s.padding);
    const uint32_t largest = k % 32 == 0 ? select_columns<V, 32>(in, a.decay, rows, k, s)
                                         : select_columns<V, 16>(in, a.decay, rows, k, s);
    if (largest >= kInfKey) return false;
    const uint32_t exponent = scale_exponent(largest, a.params.value_bits);
    const float scale = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
    *scale_out++ = static_cast<uint8_t>(exponent);
    for (uint32_t j = 0; j < k; ++j, record_out += 2) {
      const uint32_t row = bits_of(s.row[j]);
      float& acc = s.acc[row * k + j];
      const int32_t q = code_of(acc, inverse, qmax);
      acc = acc - static_cast<float>(q) * scale;
      const uint16_t record = static_cast<uint16_t>((static_cast<uint32_t>(q) << shift) | row);
      std::memcpy(record_out, &record, 2);
    }
    if (a.e_out != nullptr) write_block<V>(s.acc, a.e_out + begin, in.valid, a.stream);
  }
  V::fence();
  return true;
}

[[maybe_unused]] inline void decode_gtop1(const DecodeArgs& a) {
  const uint32_t block = a.params.block, k = a.params.k, shift = 16 - a.params.value_bits;
  const size_t scales = a.layout.sections[0].offset, records = a.layout.sections[1].offset;
  for (size_t b = 0; b < a.layout.nblocks; ++b) {
    float* out = a.out + b * block;
    const size_t left = a.numel - b * block;
    const uint32_t columns = left < k ? static_cast<uint32_t>(left) : k;
    if (a.clear) std::memset(out, 0, (left < block ? left : block) * sizeof(float));
    for (size_t p = 0; p < a.count; ++p) {
      const float scale = float_of(uint32_t{a.payloads[p][scales + b]} << 23);
      const uint8_t* from = a.payloads[p] + records + 2 * k * b;
      for (uint32_t j = 0; j < columns; ++j) {
        uint16_t record;
        std::memcpy(&record, from + 2 * j, 2);
        float& target = out[(record & ((1u << shift) - 1)) * k + j];
        target = target + (static_cast<float>(static_cast<int16_t>(record) >> shift) * scale) * a.weight;
      }
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels
