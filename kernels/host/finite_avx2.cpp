// Is the compensated gradient finite? Asked before a residual is overwritten in place; 8 elements at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {

bool finite_avx2(const EncodeArgs& a) {
  const __m256 decay = _mm256_set1_ps(a.decay);
  const __m256i magnitude = _mm256_set1_epi32(static_cast<int>(kMagnitude));
  __m256i top = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 8 <= a.numel; i += 8) {
    __m256 acc = _mm256_loadu_ps(a.grad + i);
    if (a.e_in != nullptr) {
      const __m256 e_in = _mm256_loadu_ps(a.e_in + i);
      acc = _mm256_add_ps(acc, a.decay == 1.0f ? e_in : _mm256_mul_ps(e_in, decay));
    }
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(acc), magnitude));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), top);
  uint32_t largest = 0;
  for (uint32_t l = 0; l < 8; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
  for (; i < a.numel; ++i) {
    const uint32_t key = bits_of(compensate(a.grad, a.e_in, a.decay, i)) & kMagnitude;
    largest = key > largest ? key : largest;
  }
  return largest < kInfKey;
}

}  // namespace hybridcomm::kernels
#endif
