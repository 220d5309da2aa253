// The AVX2 kernels of block-wise top-k: 8 elements at a time. Keys have no sign bit, so the signed comparisons of AVX2 order
// them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "topk_block.h"

namespace hybridcomm::kernels {
namespace {

struct Avx2 {
  static constexpr uint32_t kGroups = 64;  // eight vectors of maxima
  static constexpr uint32_t kAhead = 640;  // elements; keeps memory busy while a block is selected (measured)

  static __m256i magnitude(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
  }

  // Eight bits: key >= t, as key > t - 1; t is at least 0.
  static uint32_t reached(__m256i key, __m256i below) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(key, below))));
  }

  template <bool kDecay>
  static __m256 residual(const float* e_in, float decay) {
    const __m256 value = _mm256_loadu_ps(e_in);
    return kDecay ? _mm256_mul_ps(value, _mm256_set1_ps(decay)) : value;
  }

  // Masks are put together in a register: a 64-bit load right after eight 8-bit stores would wait for all of
  // them.
  template <bool kResidual, bool kDecay>
  static uint32_t accumulate_words(const float* grad, const float* e_in, float decay, uint32_t block,
                                   __m256i below, Scratch& s) {
    __m256i top[8];
    for (__m256i& maximum : top) maximum = _mm256_setzero_si256();
    uint32_t count = 0;
    for (uint32_t w = 0; w * 64 < block; ++w) {
      uint64_t word = 0;
      for (uint32_t u = 0; u < 8 && w * 64 + u * 8 < block; ++u) {
        const uint32_t i = w * 64 + u * 8;
        if (u % 2 == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(grad + i + kAhead), _MM_HINT_T0);
          if (kResidual) _mm_prefetch(reinterpret_cast<const char*>(e_in + i + kAhead), _MM_HINT_T0);
        }
        __m256 acc = _mm256_loadu_ps(grad + i);
        if (kResidual) acc = _mm256_add_ps(acc, residual<kDecay>(e_in + i, decay));
        _mm256_store_ps(s.acc + i, acc);
        const __m256i key = magnitude(acc);
        top[u] = _mm256_max_epi32(top[u], key);
        word |= uint64_t{reached(key, below)} << (8 * u);
      }
      s.masks[w] = word;
      count += static_cast<uint32_t>(__builtin_popcountll(word));
    }
    for (uint32_t u = 0; u < 8; ++u) _mm256_store_si256(reinterpret_cast<__m256i*>(s.maxima) + u, top[u]);
    return count;
  }

  static uint32_t accumulate(const float* grad, const float* e_in, float decay, uint32_t block, uint32_t t,
                             Scratch& s) {
    const __m256i threshold = _mm256_set1_epi32(static_cast<int>(t) - 1);
    if (e_in == nullptr) return accumulate_words<false, false>(grad, e_in, decay, block, threshold, s);
    return decay == 1.0f ? accumulate_words<true, false>(grad, e_in, decay, block, threshold, s)
                         : accumulate_words<true, true>(grad, e_in, decay, block, threshold, s);
  }

  static uint32_t count_ge(const void* keys, uint32_t n, uint32_t t) {
    const __m256i below = _mm256_set1_epi32(static_cast<int>(t) - 1);
    const float* values = static_cast<const float*>(keys);
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i += 8) {
      count +=
          static_cast<uint32_t>(__builtin_popcount(reached(magnitude(_mm256_load_ps(values + i)), below)));
    }
    return count;
  }

  static uint32_t mask_ge(const float* acc, uint32_t block, uint32_t t, uint64_t* masks) {
    const __m256i below = _mm256_set1_epi32(static_cast<int>(t) - 1);
    uint32_t count = 0;
    for (uint32_t w = 0; w * 64 < block; ++w) {
      uint64_t word = 0;
      for (uint32_t u = 0; u < 8 && w * 64 + u * 8 < block; ++u) {
        word |= uint64_t{reached(magnitude(_mm256_load_ps(acc + w * 64 + u * 8)), below)} << (8 * u);
      }
      masks[w] = word;
      count += static_cast<uint32_t>(__builtin_popcountll(word));
    }
    return count;
  }

  static void write(const float* acc, float* e_out, uint32_t block, bool stream) {
    if (stream && reinterpret_cast<uintptr_t>(e_out) % 32 == 0) {
      for (uint32_t i = 0; i < block; i += 8) _mm256_stream_ps(e_out + i, _mm256_load_ps(acc + i));
    } else {
      for (uint32_t i = 0; i < block; i += 8) _mm256_storeu_ps(e_out + i, _mm256_load_ps(acc + i));
    }
  }
  static void fence() { _mm_sfence(); }

  static void add_records(const uint8_t* records, uint32_t k, uint32_t shift, uint32_t index_mask,
                          float scale, float weight, float* out) {
    alignas(32) float value[8];
    const __m128i by = _mm_cvtsi32_si128(static_cast<int>(shift));
    uint32_t j = 0;
    for (; j + 8 <= k; j += 8) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(records + 2 * j));
      const __m256i q = _mm256_sra_epi32(_mm256_cvtepi16_epi32(raw), by);
      _mm256_store_ps(value, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(scale)),
                                           _mm256_set1_ps(weight)));
      for (uint32_t l = 0; l < 8; ++l) {
        uint16_t record;
        std::memcpy(&record, records + 2 * (j + l), 2);
        float& target = out[record & index_mask];
        target = target + value[l];
      }
    }
    add_records_scalar(records + 2 * j, k - j, shift, index_mask, scale, weight, out);
  }
};

}  // namespace

extern const Kernels kTopkAvx2;
const Kernels kTopkAvx2 = {encode_region<Avx2>, decode_region<Avx2>};

}  // namespace hybridcomm::kernels
#endif
