// The AVX-512 kernels of block-wise top-k (F, BW, VL, DQ): 16 elements at a time, thresholds straight into mask registers.
#if defined(__x86_64__)
// GCC 12 calls _mm512_undefined_epi32 in its own header a use of an uninitialised value (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "topk_block.h"

namespace hybridcomm::kernels {
namespace {

struct Avx512 {
  static constexpr uint32_t kGroups = 64;  // four vectors of maxima
  static constexpr uint32_t kAhead = 640;  // elements; keeps memory busy while a block is selected (measured)

  static __m512i magnitude(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
  }

  template <bool kDecay>
  static __m512 residual(const float* e_in, float decay) {
    const __m512 value = _mm512_loadu_ps(e_in);
    return kDecay ? _mm512_mul_ps(value, _mm512_set1_ps(decay)) : value;
  }

  // Masks are put together in a register: a 64-bit load right after four 16-bit stores would wait for all of
  // them.
  template <bool kResidual, bool kDecay>
  static uint32_t accumulate_words(const float* grad, const float* e_in, float decay, uint32_t block,
                                   __m512i t, Scratch& s) {
    __m512i top[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                      _mm512_setzero_si512()};
    uint32_t count = 0;
    for (uint32_t w = 0; w * 64 < block; ++w) {
      uint64_t word = 0;
      for (uint32_t u = 0; u < 4 && w * 64 + u * 16 < block; ++u) {
        const uint32_t i = w * 64 + u * 16;
        _mm_prefetch(reinterpret_cast<const char*>(grad + i + kAhead), _MM_HINT_T0);
        if (kResidual) _mm_prefetch(reinterpret_cast<const char*>(e_in + i + kAhead), _MM_HINT_T0);
        __m512 acc = _mm512_loadu_ps(grad + i);
        if (kResidual) acc = _mm512_add_ps(acc, residual<kDecay>(e_in + i, decay));
        _mm512_store_ps(s.acc + i, acc);
        const __m512i key = magnitude(acc);
        top[u] = _mm512_max_epu32(top[u], key);
        word |= uint64_t{_mm512_cmpge_epu32_mask(key, t)} << (16 * u);
      }
      s.masks[w] = word;
      count += static_cast<uint32_t>(__builtin_popcountll(word));
    }
    for (uint32_t u = 0; u < 4; ++u) _mm512_store_si512(s.maxima + 16 * u, top[u]);
    return count;
  }

  static uint32_t accumulate(const float* grad, const float* e_in, float decay, uint32_t block, uint32_t t,
                             Scratch& s) {
    const __m512i threshold = _mm512_set1_epi32(static_cast<int>(t));
    if (e_in == nullptr) return accumulate_words<false, false>(grad, e_in, decay, block, threshold, s);
    return decay == 1.0f ? accumulate_words<true, false>(grad, e_in, decay, block, threshold, s)
                         : accumulate_words<true, true>(grad, e_in, decay, block, threshold, s);
  }

  static uint32_t count_ge(const void* keys, uint32_t n, uint32_t t) {
    const __m512i threshold = _mm512_set1_epi32(static_cast<int>(t));
    const float* values = static_cast<const float*>(keys);
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i += 16) {
      count += static_cast<uint32_t>(
          __builtin_popcount(_mm512_cmpge_epu32_mask(magnitude(_mm512_load_ps(values + i)), threshold)));
    }
    return count;
  }

  static uint32_t mask_ge(const float* acc, uint32_t block, uint32_t t, uint64_t* masks) {
    const __m512i threshold = _mm512_set1_epi32(static_cast<int>(t));
    uint32_t count = 0;
    for (uint32_t w = 0; w * 64 < block; ++w) {
      uint64_t word = 0;
      for (uint32_t u = 0; u < 4 && w * 64 + u * 16 < block; ++u) {
        const __m512i key = magnitude(_mm512_load_ps(acc + w * 64 + u * 16));
        word |= uint64_t{_mm512_cmpge_epu32_mask(key, threshold)} << (16 * u);
      }
      masks[w] = word;
      count += static_cast<uint32_t>(__builtin_popcountll(word));
    }
    return count;
  }

  static void write(const float* acc, float* e_out, uint32_t block, bool stream) {
    if (stream && reinterpret_cast<uintptr_t>(e_out) % 64 == 0) {
      for (uint32_t i = 0; i < block; i += 16) _mm512_stream_ps(e_out + i, _mm512_load_ps(acc + i));
    } else {
      for (uint32_t i = 0; i < block; i += 16) _mm512_storeu_ps(e_out + i, _mm512_load_ps(acc + i));
    }
  }
  static void fence() { _mm_sfence(); }

  static void add_records(const uint8_t* records, uint32_t k, uint32_t shift, uint32_t index_mask,
                          float scale, float weight, float* out) {
    alignas(64) float value[16];
    const __m128i by = _mm_cvtsi32_si128(static_cast<int>(shift));
    for (uint32_t j = 0; j < k; j += 16) {
      const uint32_t n = k - j < 16 ? k - j : 16;
      const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), records + 2 * j);
      const __m512i q = _mm512_sra_epi32(_mm512_cvtepi16_epi32(raw), by);
      _mm512_store_ps(value, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale)),
                                           _mm512_set1_ps(weight)));
      for (uint32_t l = 0; l < n; ++l) {
        uint16_t record;
        std::memcpy(&record, records + 2 * (j + l), 2);
        float& target = out[record & index_mask];
        target = target + value[l];
      }
    }
  }
};

}  // namespace

extern const Kernels kTopkAvx512;
const Kernels kTopkAvx512 = {encode_region<Avx512>, decode_region<Avx512>};

}  // namespace hybridcomm::kernels
#endif
