// What the CUDA C++ kernels share: the payload's header, fp32 as bits, elements of three types, the checksum.
//
// Arithmetic goes through __fadd_rn and its like, which the compiler never fuses: every operation is rounded once, as
// the oracle's. No approximate instructions, no atomics on floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace hybridcomm {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
constexpr int kInfKey = 0x7F800000;
constexpr uint32_t kQuietNan = 0x7FC00000u;
constexpr int kHeader = 64;            // bytes before the scales
constexpr int kFlags = 40;             // bytes before the flags word
constexpr int kChecksum = 48;          // bytes before the checksum
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 half to even

__device__ __forceinline__ uint32_t* flags_of(uint8_t* payload) {
  return reinterpret_cast<uint32_t*>(payload + kFlags);
}

__device__ __forceinline__ unsigned long long* checksum_of(uint8_t* payload) {
  return reinterpret_cast<unsigned long long*>(payload + kChecksum);
}

// A value's share of the checksum when it stands at `byte` of the payload.
__device__ __forceinline__ unsigned long long share_of(uint32_t value, long long byte) {
  const uint32_t factor = static_cast<uint32_t>(byte >> 2) * 2 + 1;
  return static_cast<unsigned long long>(value << (byte & 3) * 8) * factor;
}

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) value += __shfl_xor_sync(kAll, value, d);
  return value;
}

__device__ __forceinline__ int key_of(float x) { return static_cast<int>(__float_as_uint(x) & kMagnitude); }

// 2^(exponent - 127) for biased exponents in [1, 254].
__device__ __forceinline__ float power_of(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent) << 23);
}

// The code of acc at a scale, half to even and clamped; a whole number as fp32.
template <int kBits>
__device__ __forceinline__ float code_of(float acc, int exponent) {
  constexpr float kMax = (1 << (kBits - 1)) - 1;
  const float q = __fadd_rn(__fadd_rn(__fmul_rn(acc, power_of(254 - exponent)), kRound), -kRound);
  return fminf(fmaxf(q, -kMax), kMax);
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

// Half to even; nothing finite becomes infinite.
template <class T>
__device__ __forceinline__ T narrowed(float x);
template <>
__device__ __forceinline__ float narrowed<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  constexpr float kLargest = 0x1.FEp127f;
  return __float2bfloat16_rn(fminf(fmaxf(x, -kLargest), kLargest));
}

// kCount neighbours, in loads and stores of 16 bytes (of 8 where there are no more).
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T at[kCount];
};

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<__nv_bfloat16> = true;

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> narrowed(const Pack<float, kCount>& from) {
  Pack<T, kCount> to;
#if __CUDA_ARCH__ >= 1000
  // One instruction for two values and both limits. Its memory has outgrown its integer units, and minima are theirs;
  // ISA 8.0, which the other architectures are built for, does not know it.
  if constexpr (kIsBf16<T>) {
    static_assert(kCount % 2 == 0, "values go by pairs");
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
      asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;"
          : "=r"(reinterpret_cast<uint32_t*>(to.at)[i / 2])
          : "f"(from.at[i + 1]), "f"(from.at[i]));
    return to;
  }
#endif
#pragma unroll
  for (int i = 0; i < kCount; ++i) to.at[i] = narrowed<T>(from.at[i]);
  return to;
}

}  // namespace hybridcomm
