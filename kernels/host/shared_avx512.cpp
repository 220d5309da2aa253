// What all codecs share, in AVX-512: is a compensated gradient finite (asked before a residual is overwritten in
// place), and the sum behind the checksum.
#if defined(__x86_64__)
// GCC 12 calls _mm512_undefined_epi32 in its own header a use of an uninitialised value (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {
namespace {

bool finite(const EncodeArgs& a) {
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

// Products of even and of odd words separately, 64 bits each.
uint64_t weigh(const uint8_t* words, size_t count) {
  __m512i factor = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  __m512i even = _mm512_setzero_si512(), odd = even;
  for (size_t i = 0; i < count; i += 16) {
    const size_t left = count - i;
    const __mmask16 lanes = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : __mmask16{0xFFFF};
    const __m512i word = _mm512_maskz_loadu_epi32(lanes, words + 4 * i);
    even = _mm512_add_epi64(even, _mm512_mul_epu32(word, factor));
    odd = _mm512_add_epi64(odd, _mm512_mul_epu32(_mm512_srli_epi64(word, 32), _mm512_srli_epi64(factor, 32)));
    factor = _mm512_add_epi32(factor, _mm512_set1_epi32(32));
  }
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(even, odd)));
}

}  // namespace

const SharedKernels kSharedAvx512 = {finite, weigh};

}  // namespace hybridcomm::kernels
#endif
