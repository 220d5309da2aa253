// Eight elements at a time in plain C++: what each operation of the vector versions must equal.
#pragma once

#include "bits.h"

namespace hybridcomm::kernels {
namespace {

struct ScalarLanes {
  static constexpr uint32_t kWidth = 8;
  struct F {
    float v[kWidth];
  };
  struct I {
    int32_t v[kWidth];
  };

  template <class To, class Operation>
  static To each(Operation operation) {
    To out;
    for (uint32_t i = 0; i < kWidth; ++i) out.v[i] = operation(i);
    return out;
  }

  static F load(const float* p) {
    F out;
    std::memcpy(&out, p, sizeof out);
    return out;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static void stream(float* p, F x) { store(p, x); }
  static bool streamable(const float*) { return false; }
  static void fence() {}
  static void prefetch(const float*) {}

  static F set(float x) {
    return each<F>([&](uint32_t) { return x; });
  }
  static I set(int32_t x) {
    return each<I>([&](uint32_t) { return x; });
  }
  static F add(F a, F b) {
    return each<F>([&](uint32_t i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each<F>([&](uint32_t i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each<F>([&](uint32_t i) { return a.v[i] * b.v[i]; });
  }
  static I add(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] + b.v[i]; });
  }
  static I sub(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] - b.v[i]; });
  }
  static I both(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] & b.v[i]; });
  }
  static I either(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] | b.v[i]; });
  }
  static I min(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static I max(I a, I b) {
    return each<I>([&](uint32_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  template <uint32_t kBy>
  static I right(I a) {
    return each<I>([&](uint32_t i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBy); });
  }
  template <uint32_t kBy>
  static I left(I a) {
    return each<I>([&](uint32_t i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBy); });
  }
  static I where_less(I a, I b, I yes, I no) {
    return each<I>([&](uint32_t i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }

  static I bits(F a) {
    I out;
    std::memcpy(&out, &a, sizeof out);
    return out;
  }
  static F floats(I a) {
    F out;
    std::memcpy(&out, &a, sizeof out);
    return out;
  }
  static F to_float(I a) {
    return each<F>([&](uint32_t i) { return static_cast<float>(a.v[i]); });
  }
  static I truncate(F a) {
    return each<I>([&](uint32_t i) { return static_cast<int32_t>(a.v[i]); });
  }
  // Half to even, for |a| < 2^22.
  static I round(F a) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
    return each<I>([&](uint32_t i) { return static_cast<int32_t>((a.v[i] + kRound) - kRound); });
  }

  static uint32_t largest(I a) {  // of values without a sign bit
    int32_t out = 0;
    for (int32_t x : a.v) out = x > out ? x : out;
    return static_cast<uint32_t>(out);
  }
  static uint64_t sum(I a) {  // of values taken as unsigned
    uint64_t out = 0;
    for (int32_t x : a.v) out += static_cast<uint32_t>(x);
    return out;
  }

  static void store_bytes(uint8_t* p, I a) {
    for (uint32_t i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
  }
  static void store_halves(uint8_t* p, I a) {
    for (uint32_t i = 0; i < kWidth; ++i) {
      const uint16_t half = static_cast<uint16_t>(a.v[i]);
      std::memcpy(p + 2 * i, &half, 2);
    }
  }
  static void store_nibbles(uint8_t* p, I a) {
    for (uint32_t i = 0; i < kWidth; i += 2) {
      p[i / 2] = static_cast<uint8_t>((a.v[i] & 15) | (a.v[i + 1] & 15) << 4);
    }
  }
  static void store_signs(uint8_t* p, F a) {
    uint32_t byte = 0;
    for (uint32_t i = 0; i < kWidth; ++i) byte |= bits_of(a.v[i]) >> 31 << i;
    *p = static_cast<uint8_t>(byte);
  }
  static I load_bytes(const uint8_t* p) {
    return each<I>([&](uint32_t i) { return int32_t{p[i]}; });
  }
  static I load_signed_bytes(const uint8_t* p) {
    return each<I>([&](uint32_t i) { return int32_t{static_cast<int8_t>(p[i])}; });
  }
  static I load_halves(const uint8_t* p) {
    return each<I>([&](uint32_t i) { return p[2 * i] | p[2 * i + 1] << 8; });
  }
  static I load_signed_nibbles(const uint8_t* p) {
    return each<I>([&](uint32_t i) { return ((p[i / 2] >> (i % 2 * 4) & 15) ^ 8) - 8; });
  }
  // a, negated where the bit is set.
  static F negate_where(const uint8_t* p, F a) {
    return each<F>([&](uint32_t i) { return float_of(bits_of(a.v[i]) ^ uint32_t{*p} >> i << 31); });
  }
};

}  // namespace
}  // namespace hybridcomm::kernels
