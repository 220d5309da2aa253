// Sixteen elements at a time in AVX-512 (F, BW, VL, DQ); lanes_scalar.h says what each operation means.
#pragma once

// GCC 12 calls _mm512_undefined_epi32 in its own header a use of an uninitialised value (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "bits.h"

namespace hybridcomm::kernels {
namespace {

struct Avx512Lanes {
  static constexpr uint32_t kWidth = 16;
  static constexpr uint32_t kAhead = 640;  // elements; keeps memory busy while a group is quantised
  using F = __m512;
  using I = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void stream(float* p, F x) { _mm512_stream_ps(p, x); }
  static bool streamable(const float* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
  static void fence() { _mm_sfence(); }
  static void prefetch(const float* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
  }

  static F set(float x) { return _mm512_set1_ps(x); }
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  template <uint32_t kBy>
  static I right(I a) {
    return _mm512_srli_epi32(a, kBy);
  }
  template <uint32_t kBy>
  static I left(I a) {
    return _mm512_slli_epi32(a, kBy);
  }
  static I where_less(I a, I b, I yes, I no) {
    return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(a, b), no, yes);
  }

  static I bits(F a) { return _mm512_castps_si512(a); }
  static F floats(I a) { return _mm512_castsi512_ps(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I truncate(F a) { return _mm512_cvttps_epi32(a); }
  static I round(F a) { return _mm512_cvtps_epi32(a); }

  static uint32_t largest(I a) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(a)); }
  static uint64_t sum(I a) {
    const __m512i even = _mm512_and_si512(a, _mm512_set1_epi64(0xFFFFFFFF));
    return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(even, _mm512_srli_epi64(a, 32))));
  }

  static void store_bytes(uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static void store_halves(uint8_t* p, I a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a));
  }
  static void store_nibbles(uint8_t* p, I a) {
    const __m128i nibbles = _mm_and_si128(_mm512_cvtepi32_epi8(a), _mm_set1_epi8(15));
    const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
  }
  static void store_signs(uint8_t* p, F a) {
    const uint16_t signs = _mm512_movepi32_mask(bits(a));
    std::memcpy(p, &signs, 2);
  }

  static __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(sixteen(p)); }
  static I load_signed_bytes(const uint8_t* p) { return _mm512_cvtepi8_epi32(sixteen(p)); }
  static I load_halves(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I load_signed_nibbles(const uint8_t* p) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i up = _mm512_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i words = _mm512_permutexvar_epi32(word, _mm512_zextsi128_si512(packed));
    return _mm512_srai_epi32(_mm512_sllv_epi32(words, up), 28);
  }
  static F negate_where(const uint8_t* p, F a) {
    uint16_t signs;
    std::memcpy(&signs, p, 2);
    return _mm512_mask_xor_ps(a, signs, a, _mm512_set1_ps(-0.0f));
  }
};

}  // namespace
}  // namespace hybridcomm::kernels
