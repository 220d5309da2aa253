// A region block by block: what encoders that work so share. Included per instruction set, with its lanes V.
#pragma once

#include "bits.h"
#include "payload.h"

namespace hybridcomm::kernels {
namespace {

// acc = grad + decay * e_in for n elements, a multiple of the widest vector; returns the largest magnitude.
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

struct Block {
  const float* grad;
  const float* e_in;  // may be null
  uint32_t valid;     // elements of the region; the rest is zero
};

// The block at `begin`: in place, or a copy in `room` where the region ends within it.
struct Padding {
  alignas(64) float grad[kMaxBlock];
  alignas(64) float e_in[kMaxBlock];
};
[[maybe_unused]] inline Block block_at(const EncodeArgs& a, size_t begin, uint32_t block, Padding& room) {
  const float* grad = a.grad + begin;
  const float* e_in = a.e_in == nullptr ? nullptr : a.e_in + begin;
  const size_t left = a.numel - begin;
  if (left >= block) return {grad, e_in, block};
  std::memset(room.grad, 0, block * sizeof(float));
  std::memcpy(room.grad, grad, left * sizeof(float));
  if (e_in != nullptr) {
    std::memset(room.e_in, 0, block * sizeof(float));
    std::memcpy(room.e_in, e_in, left * sizeof(float));
    e_in = room.e_in;
  }
  return {room.grad, e_in, static_cast<uint32_t>(left)};
}

// The first n elements of acc to e_out; past the caches where that is asked for and e_out is aligned.
template <class V>
void write_block(const float* acc, float* e_out, uint32_t n, bool stream) {
  uint32_t i = 0;
  if (stream && V::streamable(e_out)) {
    for (; i + V::kWidth <= n; i += V::kWidth) V::stream(e_out + i, V::load(acc + i));
  }
  std::memcpy(e_out + i, acc + i, (n - i) * sizeof(float));
}

// value = q * 2^(exponent - 127): the power of two that value_bits leave the largest magnitude room in.
constexpr float kRoundHalfEven = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22
[[maybe_unused]] inline uint32_t scale_exponent(uint32_t largest, uint32_t value_bits) {
  const uint32_t raised = (largest >> 23) + 2;
  return raised > value_bits ? raised - value_bits : 1;
}
[[maybe_unused]] inline int32_t code_of(float acc, float inverse, int32_t qmax) {
  const int32_t q = static_cast<int32_t>((acc * inverse + kRoundHalfEven) - kRoundHalfEven);
  return q > qmax ? qmax : q < -qmax ? -qmax : q;
}

}  // namespace
}  // namespace hybridcomm::kernels
