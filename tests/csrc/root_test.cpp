// kernels/cuda/root.cuh on the host: every mantissa under both parities of the exponent, and the ends of all binades,
// denormals among them, against the division and the square root of IEEE 754.
#define __device__
#define __forceinline__ inline
#include "root.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>

namespace {

uint32_t wanted(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  const float y = 1.0f / std::sqrt(x);
  std::memcpy(&bits, &y, 4);
  return bits;
}

bool right(uint32_t bits) {
  const uint32_t got = hybridcomm::reciprocal_root(bits), want = wanted(bits);
  if (got != want) std::printf("%08x: %08x instead of %08x\n", bits, got, want);
  return got == want;
}

bool all_right() {
  constexpr uint32_t kOne = 1u << 23, kInfinity = 255 * kOne;
  for (uint32_t first = 0; first < kInfinity; first += kOne) {
    for (uint32_t i = 0; i < 64; ++i) {
      if ((first | i) != 0 && !right(first | i)) return false;
      if (!right(first + kOne - 1 - i)) return false;
    }
  }
  for (uint32_t bits = 1; bits < kOne; bits += 89) {
    if (!right(bits)) return false;
  }
  for (uint32_t bits = 126 * kOne; bits < 128 * kOne; ++bits) {
    if (!right(bits)) return false;
  }
  return true;
}

}  // namespace

int main() { return all_right() ? 0 : 1; }
