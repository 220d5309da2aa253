// What all codecs share, in AVX2: is a compensated gradient finite (asked before a residual is overwritten in
// place), and the sum behind the checksum.
#if defined(__x86_64__)
#include <immintrin.h>

#include "bits.h"
#include "kernels.h"

namespace hybridcomm::kernels {
namespace {

bool finite(const EncodeArgs& a) {
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

// Products of even and of odd words separately, 64 bits each.
uint64_t weigh(const uint8_t* words, size_t count) {
  __m256i factor = _mm256_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15), even = _mm256_setzero_si256(), odd = even;
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 4 * i));
    even = _mm256_add_epi64(even, _mm256_mul_epu32(word, factor));
    odd = _mm256_add_epi64(odd, _mm256_mul_epu32(_mm256_srli_epi64(word, 32), _mm256_srli_epi64(factor, 32)));
    factor = _mm256_add_epi32(factor, _mm256_set1_epi32(16));
  }
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(even, odd));
  uint64_t sum = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  for (; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, words + 4 * i, 4);
    sum += uint64_t{word} * static_cast<uint32_t>(2 * i + 1);
  }
  return sum;
}

}  // namespace

const SharedKernels kSharedAvx2 = {finite, weigh};

}  // namespace hybridcomm::kernels
#endif
