// Step 4 of 7: compress, one block at a time; and step 6 of 7: decompress.
//
// Phases of a block
//   1  accumulate  acc = grad + e_in into a buffer that stays in L1; maxima of disjoint groups; which |acc|
//                  reach a threshold guessed from the block before
//   2  bracket     too few or too many reached it: the k-th largest group maximum is a lower bound that
//                  needs no guess
//   3  select      bisect the survivors' magnitudes, as integers, to the exact k-th; ties go to the lowest
//                  index
//   4  quantise    power-of-two scale, records, residual of the kept elements
//   5  write       buffer to e_out
// The guess and the grouping change how fast the threshold is found, never which elements are kept.
//
// Included by one file per instruction set, each with its own vector operations V. Everything is in an
// unnamed namespace: a function shared between those files might be the one compiled for the wider
// instruction set.
#pragma once

#include <cstring>

#include "bits.h"
#include "kernels.h"
#include "payload.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kMaxGroups = 64;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 half to even
constexpr uint32_t kMargin = 1u << 21;  // a quarter of an octave below the last block's k-th largest

struct Scratch {
  alignas(64) float acc[kMaxBlock];
  alignas(64) uint32_t keys[kMaxBlock + 16];  // survivors, in index order, zero after the last
  alignas(64) uint16_t index[kMaxBlock + 4];
  alignas(64) uint64_t masks[kMaxBlock / 64];
  alignas(64) uint32_t maxima[kMaxGroups];
  alignas(64) float padded[2][kMaxBlock];  // the last block, when it is not whole
};

// A threshold t in [lo, hi) with count(key >= t) == k if there is one, else the k-th largest key itself.
// Needs count(key >= lo) >= k > count(key >= hi). Keys are 4 bytes each, of which the sign bit is ignored; n
// of them, zero up to a whole vector.
template <class V>
uint32_t bisect(const void* keys, uint32_t n, uint32_t k, uint32_t lo, uint32_t hi) {
  while (hi - lo > 1) {
    const uint32_t mid = lo + (hi - lo) / 2;
    const uint32_t count = V::count_ge(keys, n, mid);
    if (count == k) return mid;
    (count > k ? lo : hi) = mid;
  }
  return lo;
}

// Indices and keys of the elements whose mask bit is set, ascending; returns how many. Few bits are set in
// most words: four are taken without asking (what is too many is overwritten), so that the processor has
// nothing to guess.
inline uint32_t extract(Scratch& s, uint32_t block) {
  constexpr uint64_t kSentinel = uint64_t{1} << 63;
  uint32_t n = 0;
  for (uint32_t w = 0; w * 64 < block; ++w) {
    uint64_t mask = s.masks[w];
    const uint32_t count = static_cast<uint32_t>(__builtin_popcountll(mask));
    uint16_t* index = s.index + n;
    for (uint32_t j = 0; j < 4; ++j, mask &= mask - 1) {
      index[j] = static_cast<uint16_t>(w * 64 + static_cast<uint32_t>(__builtin_ctzll(mask | kSentinel)));
    }
    for (uint32_t j = 4; j < count; ++j, mask &= mask - 1) {
      index[j] = static_cast<uint16_t>(w * 64 + static_cast<uint32_t>(__builtin_ctzll(mask)));
    }
    n += count;
  }
  for (uint32_t j = 0; j < n; ++j) s.keys[j] = bits_of(s.acc[s.index[j]]) & kMagnitude;
  for (uint32_t j = 0; j < 16; ++j) s.keys[n + j] = 0;
  return n;
}

// Phases 2 and 3: leaves the k kept indices in s.index, ascending; returns the k-th largest key (or one that
// splits the kept from the rest). `n` elements reached `t` in phase 1; `largest` is finite.
template <class V>
uint32_t select(Scratch& s, uint32_t block, uint32_t k, uint32_t t, uint32_t n, uint32_t largest) {
  const uint32_t many = 4 * k + 64;
  if (n < k || n > many) {
    if (n < k || k <= V::kGroups)
      t = k <= V::kGroups ? bisect<V>(s.maxima, V::kGroups, k, 0, largest + 1) : 0;
    n = V::mask_ge(s.acc, block, t, s.masks);
    if (n > many) {
      t = bisect<V>(s.acc, block, k, t, largest + 1);
      n = V::mask_ge(s.acc, block, t, s.masks);
    }
  }
  n = extract(s, block);
  if (n == k) return t;
  t = bisect<V>(s.keys, n, k, t, largest + 1);
  uint32_t kept = 0;
  if (V::count_ge(s.keys, n, t) == k) {
    for (uint32_t j = 0; j < n; ++j) {
      s.index[kept] = s.index[j];
      kept += s.keys[j] >= t;
    }
    return t;
  }
  uint32_t ties = k - V::count_ge(s.keys, n, t + 1);
  for (uint32_t j = 0; j < n; ++j) {
    const bool tie = s.keys[j] == t && ties > 0;
    ties -= tie;
    s.index[kept] = s.index[j];
    kept += s.keys[j] > t || tie;
  }
  return t;
}

// Phase 4. `valid` is the block's length: padding that was kept becomes an all-zero record.
inline void quantise(Scratch& s, const CodecParams& p, uint32_t largest, uint32_t valid, uint8_t* scale_out,
                     uint8_t* records) {
  const uint32_t raised = (largest >> 23) + 2;
  const uint32_t exponent = raised > p.value_bits ? raised - p.value_bits : 1;
  const float scale = float_of(exponent << 23), inverse = float_of((254 - exponent) << 23);
  const int32_t qmax = (1 << (p.value_bits - 1)) - 1;
  *scale_out = static_cast<uint8_t>(exponent);
  for (uint32_t j = 0; j < p.k; ++j) {
    const uint32_t i = s.index[j];
    const float acc = s.acc[i];
    int32_t q = static_cast<int32_t>((acc * inverse + kRound) - kRound);
    q = q > qmax ? qmax : q < -qmax ? -qmax : q;
    s.acc[i] = acc - static_cast<float>(q) * scale;
    const uint16_t record = static_cast<uint16_t>((static_cast<uint32_t>(q) << (16 - p.value_bits)) | i);
    const uint16_t stored = i < valid ? record : uint16_t{0};
    std::memcpy(records + 2 * j, &stored, 2);
  }
}

template <class V>
bool encode_region(const EncodeArgs& a) {
  Scratch s;
  const uint32_t block = a.params.block, k = a.params.k;
  uint8_t* const scales = a.payload + a.layout.sections[0].offset;
  uint8_t* const records = a.payload + a.layout.sections[1].offset;
  uint32_t guess = 1;
  for (size_t begin = 0, b = 0; begin < a.numel; begin += block, ++b) {
    const float* grad = a.grad + begin;
    const float* e_in = a.e_in == nullptr ? nullptr : a.e_in + begin;
    const size_t left = a.numel - begin;
    const uint32_t valid = left < block ? static_cast<uint32_t>(left) : block;
    if (valid < block) {
      std::memset(s.padded, 0, sizeof s.padded);
      std::memcpy(s.padded[0], grad, valid * sizeof(float));
      grad = s.padded[0];
      if (e_in != nullptr) e_in = static_cast<float*>(std::memcpy(s.padded[1], e_in, valid * sizeof(float)));
    }
    const uint32_t n = V::accumulate(grad, e_in, a.decay, block, guess, s);
    uint32_t largest = 0;
    for (uint32_t g = 0; g < V::kGroups; ++g) largest = s.maxima[g] > largest ? s.maxima[g] : largest;
    if (largest >= kInfKey) return false;
    const uint32_t t = select<V>(s, block, k, guess, n, largest);
    guess = t > kMargin ? t - kMargin : 1;
    quantise(s, a.params, largest, valid, scales + b, records + 2 * k * b);
    if (a.e_out == nullptr) continue;
    if (valid == block) {
      V::write(s.acc, a.e_out + begin, block, a.stream);
    } else {
      std::memcpy(a.e_out + begin, s.acc, valid * sizeof(float));
    }
  }
  V::fence();
  return true;
}

template <class V>
void decode_region(const DecodeArgs& a) {
  const uint32_t block = a.params.block, k = a.params.k, shift = 16 - a.params.value_bits;
  const size_t scales = a.layout.sections[0].offset, records = a.layout.sections[1].offset;
  for (size_t b = 0; b < a.layout.nblocks; ++b) {
    float* out = a.out + b * block;
    if (a.clear)
      std::memset(out, 0, (a.numel - b * block < block ? a.numel - b * block : block) * sizeof(float));
    for (size_t p = 0; p < a.count; ++p) {
      const float scale = float_of(uint32_t{a.payloads[p][scales + b]} << 23);
      V::add_records(a.payloads[p] + records + 2 * k * b, k, shift, block - 1, scale, a.weight, out);
    }
  }
}

// One record at a time: what every add_records must equal.
inline void add_records_scalar(const uint8_t* records, uint32_t k, uint32_t shift, uint32_t index_mask,
                               float scale, float weight, float* out) {
  for (uint32_t j = 0; j < k; ++j) {
    uint16_t record;
    std::memcpy(&record, records + 2 * j, 2);
    const int32_t q = static_cast<int16_t>(record) >> shift;
    float& target = out[record & index_mask];
    target = target + (static_cast<float>(q) * scale) * weight;
  }
}

}  // namespace
}  // namespace hybridcomm::kernels
