// One group of elements to codes and back, for each quantiser; docs/payload.md has the formats.
//
// A quantiser Q has `encode` (acc, its largest magnitude -> scale, codes, rest), `add` (scale, codes -> out),
// kScaleBytes a group and kBits an element. Written once on the operations of lanes_*.h, for all instruction
// sets; sums are of integers, so the number of lanes changes nothing.
#pragma once

#include "bits.h"

namespace hybridcomm::kernels {
namespace {

constexpr uint32_t kFraction = 0x007FFFFFu;

template <class V>
void put(float* p, typename V::F x, bool stream) {
  if (stream) {
    V::stream(p, x);
  } else {
    V::store(p, x);
  }
}

// Integers of kBits, two's complement; the most negative one is reserved.
template <uint32_t kWide>
struct Integers {
  static constexpr uint32_t kBits = kWide;
  static constexpr int32_t kMax = (1 << (kBits - 1)) - 1;
  static constexpr uint32_t kTop = kBits - 2;  // the largest magnitude is 2^kTop to 2^(kTop + 1) scales

  template <class V>
  static typename V::I code(typename V::F x) {
    return V::min(V::max(V::round(x), V::set(-kMax)), V::set(kMax));
  }
  template <class V>
  static typename V::F value(typename V::I code) {
    return V::to_float(code);
  }
  template <class V>
  static void store(uint8_t* p, typename V::I code) {
    if constexpr (kBits == 8) {
      V::store_bytes(p, code);
    } else {
      V::store_nibbles(p, code);
    }
  }
  template <class V>
  static typename V::I load(const uint8_t* p) {
    if constexpr (kBits == 8) {
      return V::load_signed_bytes(p);
    } else {
      return V::load_signed_nibbles(p);
    }
  }
};

// Floating point of kBits with kMantissa bits after the point and normal numbers from 2^kEmin on: sign,
// exponent, mantissa. Codes above kMaxCode are not written: too large a value takes kMaxCode.
template <uint32_t kWide, int32_t kMantissa, int32_t kEmin, int32_t kMaxCode, uint32_t kLargest>
struct Floating {
  static constexpr uint32_t kBits = kWide;
  static constexpr uint32_t kTop = kLargest;
  static constexpr int32_t kShift = 23 - kMantissa;
  static constexpr int32_t kBias = 126 + kEmin;
  static constexpr int32_t kSign = 1 << (kBits - 1);

  template <class V>
  static typename V::I code(typename V::F x) {
    using I = typename V::I;
    const I bits = V::bits(x), size = V::both(bits, V::set(int32_t{kMagnitude}));
    const I odd = V::both(V::template right<kShift>(size), V::set(1));
    const I rounded = V::add(V::add(size, V::set((1 << (kShift - 1)) - 1)), odd);
    I code = V::sub(V::template right<kShift>(rounded), V::set(kBias * (1 << kMantissa)));
    if constexpr (kBias >
                  0) {  // below 2^kEmin: an addition that rounds to whole steps of 2^(kEmin - kMantissa)
      constexpr uint32_t kMagic = static_cast<uint32_t>(kEmin - kMantissa + 23 + 127) << 23;
      const I magic = V::set(static_cast<int32_t>(kMagic));
      const I small = V::sub(V::bits(V::add(V::floats(size), V::floats(magic))), magic);
      code = V::where_less(size, V::set((kEmin + 127) * (1 << 23)), small, code);
    }
    return V::either(V::min(code, V::set(kMaxCode)),
                     V::both(V::template right<32 - kBits>(bits), V::set(kSign)));
  }
  template <class V>
  static typename V::F value(typename V::I code) {
    using I = typename V::I;
    const I size = V::both(code, V::set(kSign - 1));
    const I sign = V::template left<32 - kBits>(V::both(code, V::set(kSign)));
    I bits = V::add(V::template left<kShift>(size), V::set(kBias * (1 << 23)));
    if constexpr (kBias > 0) {
      constexpr uint32_t kStep = static_cast<uint32_t>(kEmin - kMantissa + 127) << 23;
      const I small = V::bits(V::mul(V::to_float(size), V::floats(V::set(static_cast<int32_t>(kStep)))));
      bits = V::where_less(size, V::set(1 << kMantissa), small, bits);
    }
    return V::floats(V::either(bits, sign));
  }
  template <class V>
  static void store(uint8_t* p, typename V::I code) {
    if constexpr (kBits == 16) {
      V::store_halves(p, code);
    } else {
      V::store_bytes(p, code);
    }
  }
  template <class V>
  static typename V::I load(const uint8_t* p) {
    if constexpr (kBits == 16) {
      return V::load_halves(p);
    } else {
      return V::load_bytes(p);
    }
  }
};

using Int8 = Integers<8>;
using Int4 = Integers<4>;
using E4m3 = Floating<8, 3, -6, 0x77, 7>;
using E5m2 = Floating<8, 2, -14, 0x77, 14>;
using Fp16 = Floating<16, 10, -14, 0x7BFF, 0>;
using Bf16 = Floating<16, 7, -126, 0x7F7F, 0>;

// Codes as they are: fp16 and bf16.
template <class Code>
struct Cast {
  static constexpr uint32_t kScaleBytes = 0;
  static constexpr uint32_t kBits = Code::kBits;

  template <class V>
  static void encode(const float* acc, uint32_t n, uint32_t, uint32_t, uint8_t*, uint8_t* codes, float* rest,
                     bool stream) {
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::F x = V::load(acc + i);
      const typename V::I code = Code::template code<V>(x);
      Code::template store<V>(codes + i * kBits / 8, code);
      put<V>(rest + i, V::sub(x, Code::template value<V>(code)), stream);
    }
  }

  template <class V>
  static void add(const uint8_t*, const uint8_t* codes, float weight, float* out, uint32_t n, bool clear) {
    const typename V::F by = V::set(weight), zero = V::set(0.0f);
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::I code = Code::template load<V>(codes + i * kBits / 8);
      const typename V::F before = clear ? zero : V::load(out + i);
      V::store(out + i, V::add(before, V::mul(Code::template value<V>(code), by)));
    }
  }
};

// Codes in units of a power of two, one per group: fp8, int8, int4.
template <class Code>
struct Scaled {
  static constexpr uint32_t kScaleBytes = 1;
  static constexpr uint32_t kBits = Code::kBits;

  template <class V>
  static void encode(const float* acc, uint32_t n, uint32_t, uint32_t largest, uint8_t* scale, uint8_t* codes,
                     float* rest, bool stream) {
    const uint32_t raised = largest >> 23;
    const uint32_t exponent = raised > Code::kTop + 1 ? raised - Code::kTop : 1;
    *scale = static_cast<uint8_t>(exponent);
    const typename V::F unit = V::set(float_of(exponent << 23));
    const typename V::F inverse = V::set(float_of((254 - exponent) << 23));
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::F x = V::load(acc + i);
      const typename V::I code = Code::template code<V>(V::mul(x, inverse));
      Code::template store<V>(codes + i * kBits / 8, code);
      put<V>(rest + i, V::sub(x, V::mul(Code::template value<V>(code), unit)), stream);
    }
  }

  template <class V>
  static void add(const uint8_t* scale, const uint8_t* codes, float weight, float* out, uint32_t n,
                  bool clear) {
    const typename V::F unit = V::set(float_of(uint32_t{*scale} << 23)), by = V::set(weight);
    const typename V::F zero = V::set(0.0f);
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::I code = Code::template load<V>(codes + i * kBits / 8);
      const typename V::F value = V::mul(Code::template value<V>(code), unit);
      V::store(out + i, V::add(clear ? zero : V::load(out + i), V::mul(value, by)));
    }
  }
};

// One bit an element, and the group's mean magnitude.
struct Signs {
  static constexpr uint32_t kScaleBytes = 2;
  static constexpr uint32_t kBits = 1;
  static constexpr uint32_t kFixed = 22;  // the largest magnitude is below 2^22 units

  // The mean of `valid` magnitudes, as bf16, rounded towards zero: magnitudes in units of 2^(e - 148), e the
  // largest one's biased exponent, cut to integers, whose sum has no order.
  template <class V>
  static float mean(const float* acc, uint32_t n, uint32_t valid, uint32_t largest) {
    const uint32_t raised = largest >> 23;
    const uint32_t exponent = raised > kFixed ? raised : kFixed;
    const typename V::F units = V::set(float_of((253 + kFixed - exponent) << 23));
    const typename V::I magnitude = V::set(int32_t{kMagnitude});
    typename V::I sum = V::set(0);
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::F size = V::floats(V::both(V::bits(V::load(acc + i)), magnitude));
      sum = V::add(sum, V::truncate(V::mul(size, units)));
    }
    const float whole = static_cast<float>(static_cast<uint32_t>(V::sum(sum) / valid));
    return float_of(bits_of(whole) & 0xFFFF0000u) * float_of((exponent + 1 - kFixed) << 23);
  }

  template <class V>
  static void encode(const float* acc, uint32_t n, uint32_t valid, uint32_t largest, uint8_t* scale,
                     uint8_t* codes, float* rest, bool stream) {
    const float unit = mean<V>(acc, n, valid, largest);
    const uint16_t half = static_cast<uint16_t>(bits_of(unit) >> 16);
    std::memcpy(scale, &half, 2);
    const typename V::F value = V::set(unit);
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::F x = V::load(acc + i);
      V::store_signs(codes + i / 8, x);
      put<V>(rest + i, V::sub(x, V::negate_where(codes + i / 8, value)), stream);
    }
  }

  template <class V>
  static void add(const uint8_t* scale, const uint8_t* codes, float weight, float* out, uint32_t n,
                  bool clear) {
    uint16_t half;
    std::memcpy(&half, scale, 2);
    const typename V::F value = V::set(float_of(uint32_t{half} << 16) * weight), zero = V::set(0.0f);
    for (uint32_t i = 0; i < n; i += V::kWidth) {
      const typename V::F before = clear ? zero : V::load(out + i);
      V::store(out + i, V::add(before, V::negate_where(codes + i / 8, value)));
    }
  }
};

}  // namespace
}  // namespace hybridcomm::kernels
