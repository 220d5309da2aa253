// Step 4 of 7: compress, a whole region; and step 6 of 7: decompress. For gtopk: the exact top-k of the region.
//
// Phases
//   1  accumulate  acc = grad + e_in to e_out; a histogram of the magnitudes' highest 11 bits
//   2  narrow      twice: a histogram of the next 10 bits of those in the bin where the k-th largest lies
//   3  collect     what exceeds the k-th largest, and as many of its equals as are wanted, in index order;
//                  16 at a time: power-of-two scale, records, residual; counts per block in unary
// Nothing is allocated: between the passes acc is kept in e_out, or computed again where there is none.
#pragma once

#include "blocks.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kGtopkGroup = 16;  // records that share a scale
constexpr uint32_t kGtopkChunk = 1024;

[[maybe_unused]] inline size_t gtopk_kept(const CodecParams& params, size_t numel) {
  return numel / params.block * params.k +
         (numel % params.block * params.k + params.block - 1) / params.block;
}

struct GtopkScratch {
  alignas(64) float acc[kGtopkChunk];
  uint64_t bins[2048];
  Padding padding;
};

// acc of a chunk, n elements, after phase 1.
template <class V>
const float* acc_again(const EncodeArgs& a, size_t begin, uint32_t n, GtopkScratch& s) {
  if (a.e_out != nullptr) return a.e_out + begin;
  if (a.e_in == nullptr) return a.grad + begin;
  if (n == kGtopkChunk) {
    accumulate<V>(a.grad + begin, a.e_in + begin, a.decay, n, s.acc);
  } else {
    for (uint32_t i = 0; i < n; ++i) s.acc[i] = compensate(a.grad, a.e_in, a.decay, begin + i);
  }
  return s.acc;
}

// The bin, from the top, in which the wanted-th largest lies; `wanted` becomes its place in there.
[[maybe_unused]] inline uint32_t bin_of(const uint64_t* bins, uint32_t count, size_t& wanted) {
  uint32_t bin = count - 1;
  for (; bin > 0 && bins[bin] < wanted; --bin) wanted -= bins[bin];
  return bin;
}

// Phases 1 and 2: the key of the wanted-th largest, and in `ties` how many of its equals are wanted. False: not finite.
template <class V>
bool threshold_of(const EncodeArgs& a, size_t wanted, uint32_t& key, size_t& ties, GtopkScratch& s) {
  std::memset(s.bins, 0, sizeof s.bins);
  for (size_t begin = 0; begin < a.numel; begin += kGtopkChunk) {
    const Block in = block_at(a, begin, kGtopkChunk, s.padding);
    if (accumulate<V>(in.grad, in.e_in, a.decay, kGtopkChunk, s.acc) >= kInfKey) return false;
    for (uint32_t i = 0; i < in.valid; ++i) ++s.bins[(bits_of(s.acc[i]) & kMagnitude) >> 20];
    if (a.e_out != nullptr) write_block<V>(s.acc, a.e_out + begin, in.valid, a.stream);
  }
  V::fence();
  key = bin_of(s.bins, 2048, wanted);
  constexpr uint32_t kShifts[] = {10, 0};
  for (const uint32_t shift : kShifts) {
    std::memset(s.bins, 0, 1024 * sizeof(uint64_t));
    for (size_t begin = 0; begin < a.numel; begin += kGtopkChunk) {
      const uint32_t n = a.numel - begin < kGtopkChunk ? static_cast<uint32_t>(a.numel - begin) : kGtopkChunk;
      const float* acc = acc_again<V>(a, begin, n, s);
      for (uint32_t i = 0; i < n; ++i) {
        const uint32_t here = (bits_of(acc[i]) & kMagnitude) >> shift;
        if (here >> 10 == key) ++s.bins[here & 1023];
      }
    }
    key = key << 10 | bin_of(s.bins, 1024, wanted);
  }
  ties = wanted;
  return true;
}

// Phase 3's output: records in groups, and bits.
struct Collector {
  const EncodeArgs& a;
  uint8_t *scale, *record, *counts;
  float acc[kGtopkGroup];
  size_t index[kGtopkGroup];
  uint32_t held = 0;
  size_t bit = 0;

  void take(size_t i, float value) {
    counts[bit / 8] = static_cast<uint8_t>(counts[bit / 8] | 1u << bit % 8);
    ++bit;
    acc[held] = value;
    index[held] = i;
    if (++held == kGtopkGroup) flush();
  }

  void flush() {
    if (held == 0) return;
    const uint32_t value_bits = a.params.value_bits;
    uint32_t largest = 0;
    for (uint32_t j = 0; j < held; ++j) {
      const uint32_t key = bits_of(acc[j]) & kMagnitude;
      largest = key > largest ? key : largest;
    }
    const uint32_t exponent = scale_exponent(largest, value_bits);
    const float by = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
    const int32_t qmax = (1 << (value_bits - 1)) - 1;
    *scale++ = static_cast<uint8_t>(exponent);
    for (uint32_t j = 0; j < held; ++j, record += 2) {
      const int32_t q = code_of(acc[j], inverse, qmax);
      if (a.e_out != nullptr) a.e_out[index[j]] = acc[j] - static_cast<float>(q) * by;
      const uint32_t within = static_cast<uint32_t>(index[j]) & (a.params.block - 1);
      const uint16_t made = static_cast<uint16_t>((static_cast<uint32_t>(q) << (16 - value_bits)) | within);
      std::memcpy(record, &made, 2);
    }
    held = 0;
  }
};

template <class V>
bool encode_gtopk(const EncodeArgs& a) {
  GtopkScratch s;
  const size_t kept = gtopk_kept(a.params, a.numel);
  if (kept == 0) return true;
  uint32_t key = 0;
  size_t ties = 0;
  if (!threshold_of<V>(a, kept, key, ties, s)) return false;
  const Section* sections = a.layout.sections;
  std::memset(a.payload + sections[2].offset, 0, sections[2].used);
  Collector out{
      a, a.payload + sections[0].offset, a.payload + sections[1].offset, a.payload + sections[2].offset, {},
      {}};
  const uint32_t step = a.params.block < kGtopkChunk ? a.params.block : kGtopkChunk;
  for (size_t begin = 0; begin < a.numel; begin += step) {
    if (begin != 0 && begin % a.params.block == 0) ++out.bit;
    const uint32_t n = a.numel - begin < step ? static_cast<uint32_t>(a.numel - begin) : step;
    float* const acc = s.padding.grad;  // a copy: taking changes what is left
    if (a.e_out == nullptr && a.e_in != nullptr) {
      for (uint32_t i = 0; i < n; ++i) acc[i] = compensate(a.grad, a.e_in, a.decay, begin + i);
    } else {
      std::memcpy(acc, (a.e_out != nullptr ? a.e_out : a.grad) + begin, n * sizeof(float));
    }
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t here = bits_of(acc[i]) & kMagnitude;
      if (here < key || (here == key && ties == 0)) continue;
      ties -= here == key;
      out.take(begin + i, acc[i]);
    }
  }
  out.flush();
  return true;
}

[[maybe_unused]] inline void decode_gtopk(const DecodeArgs& a) {
  if (a.clear) std::memset(a.out, 0, a.numel * sizeof(float));
  const size_t kept = gtopk_kept(a.params, a.numel);
  const uint32_t shift = 16 - a.params.value_bits;
  for (size_t p = 0; p < a.count; ++p) {
    const uint8_t* scales = a.payloads[p] + a.layout.sections[0].offset;
    const uint8_t* records = a.payloads[p] + a.layout.sections[1].offset;
    const uint8_t* counts = a.payloads[p] + a.layout.sections[2].offset;
    float* block = a.out;
    size_t bit = 0;
    for (size_t r = 0; r < kept; ++r, ++bit) {
      for (; (counts[bit / 8] >> bit % 8 & 1) == 0; ++bit) block += a.params.block;
      uint16_t record;
      std::memcpy(&record, records + 2 * r, 2);
      const float scale = float_of(uint32_t{scales[r / kGtopkGroup]} << 23);
      float& target = block[record & (a.params.block - 1)];
      target = target + (static_cast<float>(static_cast<int16_t>(record) >> shift) * scale) * a.weight;
    }
  }
}

}  // namespace
}  // namespace hybridcomm::kernels
