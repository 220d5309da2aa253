// Step 4 of 7: compress, a group at a time; and step 6 of 7: decompress. For all quantisers of quantisers.h.
//
// Phases of a group
//   1  accumulate  acc = grad + e_in into a buffer that stays in L1; its largest magnitude
//   2  quantise    scale, codes and what is left over, straight to their places
// A last group that is not whole is padded with zeros in buffers of our own.
#pragma once

#include "payload.h"
#include "quant.h"
#include "quantisers.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kCastChunk = 256;  // elements at a time where there are no groups

struct QuantScratch {
  alignas(64) float acc[kMaxBlock];
  alignas(64) float rest[kMaxBlock];
  alignas(64) float padded[2][kMaxBlock];
  alignas(64) uint8_t codes[2 * kMaxBlock];
};

// Phase 1; returns the largest magnitude.
template <class V, bool kResidual, bool kDecay>
uint32_t accumulate(const float* grad, const float* e_in, float decay, uint32_t n, float* acc) {
  const typename V::I magnitude = V::set(int32_t{kMagnitude});
  const typename V::F by = V::set(decay);
  typename V::I top = V::set(0);
  for (uint32_t i = 0; i < n; i += V::kWidth) {
    V::prefetch(grad + i);
    typename V::F x = V::load(grad + i);
    if constexpr (kResidual) {
      V::prefetch(e_in + i);
      const typename V::F e = V::load(e_in + i);
      x = V::add(x, kDecay ? V::mul(e, by) : e);
    }
    V::store(acc + i, x);
    top = V::max(top, V::both(V::bits(x), magnitude));
  }
  return V::largest(top);
}

template <class V>
uint32_t accumulate(const float* grad, const float* e_in, float decay, uint32_t n, float* acc) {
  if (e_in == nullptr) return accumulate<V, false, false>(grad, e_in, decay, n, acc);
  return decay == 1.0f ? accumulate<V, true, false>(grad, e_in, decay, n, acc)
                       : accumulate<V, true, true>(grad, e_in, decay, n, acc);
}

template <class V, class Q>
bool encode_quantised(const EncodeArgs& a) {
  QuantScratch s;
  const uint32_t group = Q::kScaleBytes > 0 ? a.params.block : kCastChunk;
  const size_t group_bytes = size_t{group} * Q::kBits / 8;
  uint8_t* scale = a.payload + a.layout.sections[0].offset;
  uint8_t* codes = a.payload + a.layout.sections[1].offset;
  const bool stream = a.stream && a.e_out != nullptr && V::streamable(a.e_out);
  for (size_t begin = 0; begin < a.numel; begin += group, scale += Q::kScaleBytes, codes += group_bytes) {
    const float* grad = a.grad + begin;
    const float* e_in = a.e_in == nullptr ? nullptr : a.e_in + begin;
    float* rest = a.e_out == nullptr ? s.rest : a.e_out + begin;
    if (a.numel - begin >= group) {
      const uint32_t largest = accumulate<V>(grad, e_in, a.decay, group, s.acc);
      if (largest >= kInfKey) return false;
      Q::template encode<V>(s.acc, group, group, largest, scale, codes, rest, stream);
      continue;
    }
    const uint32_t valid = static_cast<uint32_t>(a.numel - begin);
    for (float* padded : s.padded) std::memset(padded, 0, group * sizeof(float));
    std::memcpy(s.padded[0], grad, valid * sizeof(float));
    if (e_in != nullptr) e_in = static_cast<float*>(std::memcpy(s.padded[1], e_in, valid * sizeof(float)));
    const uint32_t largest = accumulate<V>(s.padded[0], e_in, a.decay, group, s.acc);
    if (largest >= kInfKey) return false;
    Q::template encode<V>(s.acc, group, valid, largest, scale, s.codes, s.rest, false);
    std::memcpy(codes, s.codes, (size_t{valid} * Q::kBits + 7) / 8);
    if (a.e_out != nullptr) std::memcpy(rest, s.rest, valid * sizeof(float));
  }
  V::fence();
  return true;
}

template <class V, class Q>
void decode_quantised(const DecodeArgs& a) {
  QuantScratch s;
  const uint32_t group = Q::kScaleBytes > 0 ? a.params.block : kCastChunk;
  const size_t group_bytes = size_t{group} * Q::kBits / 8;
  const size_t scales = a.layout.sections[0].offset, codes = a.layout.sections[1].offset;
  if (a.clear && a.count == 0) std::memset(a.out, 0, a.numel * sizeof(float));
  for (size_t begin = 0, b = 0; begin < a.numel; begin += group, ++b) {
    const size_t left = a.numel - begin;
    const bool whole = left >= group;
    float* out = whole ? a.out + begin : s.acc;
    if (!whole) {
      std::memset(s.codes, 0, group_bytes);
      std::memset(s.acc, 0, group * sizeof(float));
      if (!a.clear) std::memcpy(s.acc, a.out + begin, left * sizeof(float));
    }
    for (size_t p = 0; p < a.count; ++p) {
      const uint8_t* from = a.payloads[p] + codes + group_bytes * b;
      if (!whole) from = static_cast<uint8_t*>(std::memcpy(s.codes, from, (left * Q::kBits + 7) / 8));
      Q::template add<V>(a.payloads[p] + scales + Q::kScaleBytes * b, from, a.weight, out, group,
                         a.clear && p == 0);
    }
    if (!whole) std::memcpy(a.out + begin, s.acc, left * sizeof(float));
  }
}

template <class V>
bool encode_fp8(const EncodeArgs& a) {
  return a.params.variant == 0 ? encode_quantised<V, Scaled<E4m3>>(a) : encode_quantised<V, Scaled<E5m2>>(a);
}

template <class V>
void decode_fp8(const DecodeArgs& a) {
  a.params.variant == 0 ? decode_quantised<V, Scaled<E4m3>>(a) : decode_quantised<V, Scaled<E5m2>>(a);
}

template <class V, class Q>
constexpr Kernels quantiser() {
  return {encode_quantised<V, Q>, decode_quantised<V, Q>};
}

template <class V>
constexpr QuantKernels quant_kernels() {
  return {quantiser<V, Cast<Fp16>>(),   quantiser<V, Cast<Bf16>>(),   {encode_fp8<V>, decode_fp8<V>},
          quantiser<V, Scaled<Int8>>(), quantiser<V, Scaled<Int4>>(), quantiser<V, Signs>()};
}

}  // namespace
}  // namespace hybridcomm::kernels
