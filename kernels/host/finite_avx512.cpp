// Is the compensated gradient finite? Asked before a residual is overwritten in place; 16 elements at a time.
#if defined(__x86_64__)
// GCC 12 calls _mm512_undefined_epi32 in its own header a use of an uninitialised value (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {

bool finite_avx512(const EncodeArgs& a) {
  const __m512 decay = _mm512_set1_ps(a.decay);
  const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(kMagnitude));
  __m512i top = _mm512_setzero_si512();
  for (size_t i = 0; i < a.numel; i += 16) {
    const size_t left = a.numel - i;
    const __mmask16 lanes = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : __mmask16{0xFFFF};
    __m512 acc = _mm512_maskz_loadu_ps(lanes, a.grad + i);
    if (a.e_in != nullptr) {
      const __m512 e_in = _mm512_maskz_loadu_ps(lanes, a.e_in + i);
      acc = _mm512_add_ps(acc, a.decay == 1.0f ? e_in : _mm512_mul_ps(e_in, decay));
    }
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(acc), magnitude));
  }
  return _mm512_reduce_max_epu32(top) < kInfKey;
}

}  // namespace hybridcomm::kernels
#endif
