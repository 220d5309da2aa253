#include "reduce.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstring>
#include <type_traits>

namespace hybridcomm {
namespace scalar {
#include "reduce_impl.h"
}  // namespace scalar

#if defined(__x86_64__)
namespace avx2 {
void reduce(Dtype dtype, Reduction op, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor);
void scale(Dtype dtype, void* data, size_t numel, double factor);
}  // namespace avx2
namespace avx512 {
void reduce(Dtype dtype, Reduction op, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor);
void scale(Dtype dtype, void* data, size_t numel, double factor);
}  // namespace avx512
#endif

size_t itemsize(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
    case Dtype::int32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
    case Dtype::int16:
      return 2;
    case Dtype::int64:
    case Dtype::float64:
    case Dtype::complex64:
      return 8;
    case Dtype::complex128:
      return 16;
    case Dtype::uint8:
    case Dtype::int8:
    case Dtype::boolean:
    case Dtype::float8_e4m3fn:
    case Dtype::float8_e5m2:
      return 1;
  }
  return 0;
}

#if defined(__x86_64__)
bool has_f16c() {  // not every clang knows it by name
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

int best_isa() {
#if defined(__x86_64__)
  static const int best = [] {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx2 = __builtin_cpu_supports("avx2") && has_f16c();
    return wide && avx2 ? 2 : avx2 ? 1 : 0;
  }();
  return best;
#else
  return 0;
#endif
}

void reduce_by([[maybe_unused]] int isa, Dtype dtype, Reduction op, void* out, const void* const* sources,
               int count, size_t numel, uint32_t divisor) {
  if (op == Reduction::none) {
    if (numel > 0 && out != sources[0]) std::memcpy(out, sources[0], numel * itemsize(dtype));
    return;
  }
#if defined(__x86_64__)
  if (isa == 2) return avx512::reduce(dtype, op, out, sources, count, numel, divisor);
  if (isa == 1) return avx2::reduce(dtype, op, out, sources, count, numel, divisor);
#endif
  scalar::reduce_here(dtype, op, {out, sources, count, numel, divisor});
}

void reduce(Dtype dtype, Reduction op, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor) {
  reduce_by(best_isa(), dtype, op, out, sources, count, numel, divisor);
}

void scale(Dtype dtype, void* data, size_t numel, double factor) {
#if defined(__x86_64__)
  if (best_isa() == 2) return avx512::scale(dtype, data, numel, factor);
  if (best_isa() == 1) return avx2::scale(dtype, data, numel, factor);
#endif
  scalar::scale_here(dtype, data, numel, factor);
}

}  // namespace hybridcomm
