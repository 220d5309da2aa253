// Reductions of several sources into one destination, in a fixed order (steps 3 and 5 of 7).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridcomm {

// The codes of both are the wire format's: tag.cpp and lower.py list the names in the same order.
enum class Dtype : uint8_t {
  float32 = 0,
  bfloat16 = 1,
  float16 = 2,
  int64 = 3,
  uint8 = 4,
  float64 = 5,
  int32 = 6,
  int8 = 7,
  int16 = 8,
  boolean = 9,
  float8_e4m3fn = 10,
  float8_e5m2 = 11,
  complex64 = 12,
  complex128 = 13
};
enum class Reduction : uint8_t {
  sum = 0,
  mean = 1,
  none = 2,  // a copy of the one source
  min = 3,
  max = 4,
  product = 5,
  band = 6,
  bor = 7,
  bxor = 8,
  premul_sum = 9  // a sum of inputs that each rank has scaled before
};
size_t itemsize(Dtype dtype);
constexpr bool is_sum(Reduction op) {
  return op == Reduction::sum || op == Reduction::mean || op == Reduction::premul_sum;
}

// out[i] = (sources[0][i] op sources[1][i] op ...) / divisor, for i < numel; `out` may be one of the sources.
// bfloat16 and float16 are accumulated in float32 and rounded once, to nearest even; integers wrap, and take
// no divisor but 1; min and max of a NaN are NaN; complex numbers take
// sums alone. Every instruction set gives the same bits.
void reduce(Dtype dtype, Reduction op, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor);

// data[i] *= factor, rounded once; an integer type takes a whole factor, a complex one a real factor.
void scale(Dtype dtype, void* data, size_t numel, double factor);

// The same by one instruction set, for tests: 0 scalar, 1 AVX2, 2 AVX-512, at most best_isa().
int best_isa();
void reduce_by(int isa, Dtype dtype, Reduction op, void* out, const void* const* sources, int count,
               size_t numel, uint32_t divisor);

}  // namespace hybridcomm
