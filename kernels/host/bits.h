// fp32 as bits: what the kernels of all codecs share.
//
// Included by files compiled for different instruction sets, so everything is in an unnamed namespace: a
// function shared between them might be the one compiled for the wider set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr uint32_t kInfKey = 0x7F800000u;

[[maybe_unused]] inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] inline float compensate(const float* grad, const float* e_in, float decay, size_t i) {
  if (e_in == nullptr) return grad[i];
  return grad[i] + (decay == 1.0f ? e_in[i] : decay * e_in[i]);
}

}  // namespace
}  // namespace hybridcomm::kernels
