#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "reduce.h"

namespace hybridcomm::avx512 {
#include "reduce_impl.h"

void reduce(Dtype dtype, Reduction op, void* out, const void* const* sources, int count, size_t numel,
            uint32_t divisor) {
  reduce_here(dtype, op, {out, sources, count, numel, divisor});
}
void scale(Dtype dtype, void* data, size_t numel, double factor) { scale_here(dtype, data, numel, factor); }
}  // namespace hybridcomm::avx512
#endif
