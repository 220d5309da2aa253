// Step 4 of 7: compress, a block at a time; and step 6 of 7: decompress. For randk: one random element per stratum.
//
// Phases of a block of k strata, `rows` neighbouring elements each
//   1  accumulate  acc = grad + e_in into a buffer that stays in L1
//   2  draw        one element of each stratum, by a hash of (seed, number of the stratum)
//   3  quantise    power-of-two scale of what was drawn, a byte each, residual of the sent elements
//   4  write       buffer to e_out
// Variant 1 is unbiased: codes are rounded at random and decoded values are `rows` times as large.
#pragma once

#include <cstddef>

#include "blocks.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kUnbiasedMaxScale = 239;  // 127 * 256 * 2^(239 - 127) is finite

[[maybe_unused]] inline uint32_t mix(uint32_t x) {  // a bijection without short cycles: C. Wellons' lowbias32
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

[[maybe_unused]] inline uint32_t draw(uint64_t seed, uint64_t number) {
  const uint32_t low = mix(static_cast<uint32_t>(number) ^ static_cast<uint32_t>(seed));
  return mix(low + (static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(number >> 32) * 0x9E3779B9u));
}

// The element of a stratum that a hash means.
[[maybe_unused]] inline uint32_t element_of(uint32_t hash, uint32_t rows) {
  return static_cast<uint32_t>((uint64_t{hash} * rows) >> 32);
}

// round(acc * inverse) up with the probability of the part that is cut off, to 16 bits.
[[maybe_unused]] inline int32_t random_code(float acc, float inverse, uint32_t hash) {
  const float x = acc * inverse;
  const float clamped = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
  return (static_cast<int32_t>(clamped * 65536.0f) + static_cast<int32_t>(mix(hash) >> 16)) >> 16;
}

struct RandkScratch {
  alignas(64) float acc[kMaxBlock];
  uint32_t hash[kMaxBlock], place[kMaxBlock];
  Padding padding;
};

template <class V>
bool encode_randk(const EncodeArgs& a) {
  RandkScratch s;
  const uint32_t block = a.params.block, k = a.params.k, rows = block / k;
  const bool unbiased = a.params.variant == 1;
  const float times = unbiased ? static_cast<float>(rows) : 1.0f;
  uint8_t* scale_out = a.payload + a.layout.sections[0].offset;
  uint8_t* code_out = a.payload + a.layout.sections[1].offset;
  uint64_t number = 0;
  for (size_t begin = 0; begin < a.numel; begin += block) {
    const Block in = block_at(a, begin, block, s.padding);
    if (accumulate<V>(in.grad, in.e_in, a.decay, block, s.acc) >= kInfKey) return false;
    uint32_t largest = 0;
    for (uint32_t j = 0; j < k; ++j) {
      s.hash[j] = draw(a.seed, number++);
      s.place[j] = j * rows + element_of(s.hash[j], rows);
      const uint32_t key = bits_of(s.acc[s.place[j]]) & kMagnitude;
      largest = key > largest ? key : largest;
    }
    uint32_t exponent = scale_exponent(largest, unbiased ? 7 : 8);
    if (unbiased && exponent > kUnbiasedMaxScale) exponent = kUnbiasedMaxScale;
    const float scale = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
    *scale_out++ = static_cast<uint8_t>(exponent);
    for (uint32_t j = 0; j < k; ++j) {
      float& acc = s.acc[s.place[j]];
      const int32_t q = unbiased ? random_code(acc, inverse, s.hash[j]) : code_of(acc, inverse, 127);
      acc = acc - (static_cast<float>(q) * times) * scale;
      *code_out++ = static_cast<uint8_t>(q);
    }
    if (a.e_out != nullptr) write_block<V>(s.acc, a.e_out + begin, in.valid, a.stream);
  }
  V::fence();
  return true;
}

[[maybe_unused]] inline void decode_randk(const DecodeArgs& a) {
  const uint32_t block = a.params.block, k = a.params.k, rows = block / k;
  const float times = a.params.variant == 1 ? static_cast<float>(rows) : 1.0f;
  const size_t scales = a.layout.sections[0].offset, codes = a.layout.sections[1].offset;
  for (size_t b = 0; b < a.layout.nblocks; ++b) {
    float* out = a.out + b * block;
    const size_t left = a.numel - b * block;
    if (a.clear) std::memset(out, 0, (left < block ? left : block) * sizeof(float));
    for (size_t p = 0; p < a.count; ++p) {
      uint64_t seed;
      std::memcpy(&seed, a.payloads[p] + offsetof(Header, seed), sizeof seed);
      const float scale = float_of(uint32_t{a.payloads[p][scales + b]} << 23);
      const uint8_t* from = a.payloads[p] + codes + k * b;
      for (uint32_t j = 0; j < k; ++j) {
        const uint32_t place = j * rows + element_of(draw(seed, uint64_t{b} * k + j), rows);
        if (place >= left) break;
        const float q = static_cast<float>(static_cast<int8_t>(from[j]));
        out[place] = out[place] + ((q * times) * scale) * a.weight;
      }
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels
