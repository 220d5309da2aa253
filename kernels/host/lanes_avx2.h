// Eight elements at a time in AVX2; lanes_scalar.h says what each operation means.
#pragma once

#include <immintrin.h>

#include "bits.h"

namespace hybridcomm::kernels {
namespace {

struct Avx2Lanes {
  static constexpr uint32_t kWidth = 8;
  static constexpr uint32_t kAhead = 640;  // elements; keeps memory busy while a group is quantised
  using F = __m256;
  using I = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void stream(float* p, F x) { _mm256_stream_ps(p, x); }
  static bool streamable(const float* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }
  static void fence() { _mm_sfence(); }
  static void prefetch(const float* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
  }

  static F set(float x) { return _mm256_set1_ps(x); }
  static I set(int32_t x) { return _mm256_set1_epi32(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  template <uint32_t kBy>
  static I right(I a) {
    return _mm256_srli_epi32(a, kBy);
  }
  template <uint32_t kBy>
  static I left(I a) {
    return _mm256_slli_epi32(a, kBy);
  }
  static I where_less(I a, I b, I yes, I no) { return _mm256_blendv_epi8(no, yes, _mm256_cmpgt_epi32(b, a)); }

  static I bits(F a) { return _mm256_castps_si256(a); }
  static F floats(I a) { return _mm256_castsi256_ps(a); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I truncate(F a) { return _mm256_cvttps_epi32(a); }
  static I round(F a) { return _mm256_cvtps_epi32(a); }

  static uint32_t largest(I a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }
  static uint64_t sum(I a) {
    const __m256i even = _mm256_and_si256(a, _mm256_set1_epi64x(0xFFFFFFFF));
    const __m256i both = _mm256_add_epi64(even, _mm256_srli_epi64(a, 32));
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(half)) + static_cast<uint64_t>(_mm_extract_epi64(half, 1));
  }

  static __m128i low_bytes(I a) {  // the low bytes of eight elements, in the low half
    const __m256i order = _mm256_set1_epi32(0x0C080400);
    const __m256i bytes = _mm256_shuffle_epi8(a, order);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  }
  static void store_bytes(uint8_t* p, I a) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low_bytes(a)); }
  static void store_halves(uint8_t* p, I a) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 0, 1, 4, 5, 8, 9, 12, 13));
    const __m256i halves = _mm256_shuffle_epi8(a, order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_unpacklo_epi64(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
  }
  static void store_nibbles(uint8_t* p, I a) {
    const __m128i nibbles = _mm_and_si128(low_bytes(a), _mm_set1_epi8(15));
    const __m128i pairs = _mm_maddubs_epi16(nibbles, _mm_set1_epi16(0x1001));
    const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
    std::memcpy(p, &packed, 4);
  }
  static void store_signs(uint8_t* p, F a) { *p = static_cast<uint8_t>(_mm256_movemask_ps(a)); }

  static __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(eight(p)); }
  static I load_signed_bytes(const uint8_t* p) { return _mm256_cvtepi8_epi32(eight(p)); }
  static I load_halves(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_signed_nibbles(const uint8_t* p) {
    int32_t packed;
    std::memcpy(&packed, p, 4);
    const __m256i up = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    return _mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(packed), up), 28);
  }
  static F negate_where(const uint8_t* p, F a) {
    const __m256i up = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const __m256i signs = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(*p), up),
                                           _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    return _mm256_xor_ps(a, _mm256_castsi256_ps(signs));
  }
};

}  // namespace
}  // namespace hybridcomm::kernels
