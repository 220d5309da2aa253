// 1 / sqrt(x) as IEEE 754 has it, the root rounded to nearest and then its reciprocal, in integers.
//
// The correctly rounded instructions begin with an approximation of the hardware's and mend it by fused operations, of
// which none may stand in a shipped kernel. This begins with a line and Newton's steps, which come close, and ends with
// exact remainders, which say how close. Plain C++, so that a test compiles it for the host and tries all mantissas.
#pragma once

#include <stdint.h>

namespace hybridcomm {

// Bits of 1 / sqrt(x) from those of x, which is positive and finite; denormals are numbers like others.
__device__ __forceinline__ uint32_t reciprocal_root(uint32_t bits) {
  constexpr uint32_t kOne = 1u << 23;
  int exponent = static_cast<int>(bits >> 23);
  uint32_t mantissa = bits & (kOne - 1);
  if (exponent != 0) {
    mantissa |= kOne;
  } else {
    for (exponent = 1; mantissa < kOne; mantissa <<= 1) --exponent;
  }
  exponent -= 150;  // x = mantissa * 2^exponent, the mantissa of 24 digits
  // The root has 24 digits where the radicand has 47 or 48: mantissa * 2^23 or 2^24, as leaves an even power of 2.
  const bool odd = (exponent & 1) != 0;
  const uint32_t v = mantissa << (odd ? 7 : 8);  // the radicand from 1 to 4, of 30 digits behind the point
  const int64_t radicand = static_cast<int64_t>(v) << 16;
  uint32_t y = 2369146094u - v / 3;  // about its reciprocal root, of 31 digits, by 1.1032 - v / 6
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // y = y * (3 - v * y * y) / 2
    const uint32_t square = static_cast<uint32_t>(static_cast<uint64_t>(y) * y >> 32);
    const uint32_t product = static_cast<uint32_t>(static_cast<uint64_t>(square) * v >> 32);
    y = static_cast<uint32_t>(static_cast<uint64_t>(y) * ((3u << 28) - product) >> 29);
  }
  // Nearest is what leaves no more than half a step, exactly computed; half way lies nothing.
  int64_t root = static_cast<int64_t>((static_cast<uint64_t>(v) * y >> 37) + 1) >> 1;
  int64_t rest = radicand - root * root;
  root += (rest > root) - (rest <= -root);
  // sqrt(x) = root * 2^half, so 1 / sqrt(x) = (2^47 / root) * 2^(-47 - half).
  const int half = (exponent - (odd ? 23 : 24)) / 2;
  int64_t quotient = ((y >> 6) + 1) >> 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // the root's own rounding may have moved it by another one
    rest = (int64_t{1} << 47) - quotient * root;
    quotient += (2 * rest > root) - (2 * rest < -root);
  }
  // A quotient of 2^24 carries into the exponent.
  return (static_cast<uint32_t>(149 - 47 - half) << 23) + static_cast<uint32_t>(quotient);
}

}  // namespace hybridcomm
