// Sums of several sources into one destination, in a fixed order (steps 3 and 5 of 7).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridcomm {

enum class Dtype : uint8_t {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  int64 = 3,
  uint8 = 4,
  float64 = 5,
  int32 = 6
};
size_t itemsize(Dtype dtype);

// out[i] = (sources[0][i] + sources[1][i] + ...) / divisor, for i < numel; `out` may be one of the sources.
// bfloat16 and float16 are accumulated in float32 and rounded once, to nearest even; int64 wraps, and takes
// no divisor but 1. Every instruction set gives the same bits.
void sum(Dtype dtype, void* out, const void* const* sources, int count, size_t numel, uint32_t divisor);

// The same by one instruction set, for tests: 0 scalar, 1 AVX2, 2 AVX-512, at most best_isa().
int best_isa();
void sum_by(int isa, Dtype dtype, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor);

}  // namespace hybridcomm
