#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "sum.h"

namespace hybridcomm::avx2 {
#include "sum_impl.h"

void sum(Dtype dtype, void* out, const void* const* sources, int count, size_t numel, uint32_t divisor) {
  sum_here(dtype, out, sources, count, numel, divisor);
}
}  // namespace hybridcomm::avx2
#endif
