#include "sum.h"

#include <cstring>

namespace hybridcomm {
namespace scalar {
#include "sum_impl.h"
}  // namespace scalar

#if defined(__x86_64__)
namespace avx2 {
void sum(Dtype dtype, void* out, const void* const* sources, int count, size_t numel, uint32_t divisor);
}
namespace avx512 {
void sum(Dtype dtype, void* out, const void* const* sources, int count, size_t numel, uint32_t divisor);
}
#endif

size_t itemsize(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    case Dtype::int64:
    case Dtype::float64:
      return 8;
    case Dtype::uint8:
      return 1;
  }
  return 0;
}

int best_isa() {
#if defined(__x86_64__)
  static const int best = [] {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    return wide && avx2 ? 2 : avx2 ? 1 : 0;
  }();
  return best;
#else
  return 0;
#endif
}

void sum_by([[maybe_unused]] int isa, Dtype dtype, void* out, const void* const* sources, int count,
            size_t numel, uint32_t divisor) {
#if defined(__x86_64__)
  if (isa == 2) return avx512::sum(dtype, out, sources, count, numel, divisor);
  if (isa == 1) return avx2::sum(dtype, out, sources, count, numel, divisor);
#endif
  scalar::sum_here(dtype, out, sources, count, numel, divisor);
}

void sum(Dtype dtype, void* out, const void* const* sources, int count, size_t numel, uint32_t divisor) {
  sum_by(best_isa(), dtype, out, sources, count, numel, divisor);
}

}  // namespace hybridcomm
