// Steps 4 and 6 of 7 for block-wise top-k: compress, decompress, and both in one pass; the oracle's bytes.
//
// One warp per block, the block in registers; a region's size is a multiple of 16, as padded buckets' are. Phases of encode
//   1  compensate  acc = grad + decay * e_in; a non-finite value raises the payload's flag and the block sends nothing
//   2  bound       neighbours in a lane form a chunk; the k-th largest of the lanes' maxima is a threshold that at
//                  least k elements reach, and rarely many more: nothing is remembered between calls
//   3  gather      chunks that reach it, at most one per lane, go through shared memory in index order
//   4  select      bisect the few that are left to the exact k-th; ties to the lowest index
//   5  quantise    power-of-two scale, records, residual of the kept; a CTA's share of the checksum by one atomic
// A second, normally empty kernel withdraws a payload whose flag is up: it clears the body and restores the residual.
#include "topk_block.cuh"

namespace hybridcomm {
namespace {

constexpr int kWarps = 4;

// The warps' shares in one atomic addition.
__device__ __forceinline__ void add_shares(unsigned long long share, uint8_t* payload) {
  __shared__ unsigned long long shares[kWarps];
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(checksum_of(payload), shares[0] + shares[1] + shares[2] + shares[3]);
}

// Elements of the region that block number `block` has.
template <int kBlock>
__device__ __forceinline__ int left_in(long long block, long long numel) {
  const long long left = numel - block * kBlock;
  return left < kBlock ? static_cast<int>(left) : kBlock;
}

template <class G, class R, int kBlock, int kK, int kBits>
__device__ __forceinline__ void encode(const G* grad, const R* e_in, R* e_out, uint8_t* payload,
                                       long long numel, long long records_at, float decay) {
  using Codec = TopK<G, R, kBlock, kK, kBits>;
  __shared__ typename Codec::Shared shared[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long block = static_cast<long long>(blockIdx.x) * kWarps + warp, begin = block * kBlock;
  unsigned long long share = 0;
  if (begin < numel) {
    Codec codec;
    share = codec.encode(grad + begin, e_in == nullptr ? nullptr : e_in + begin,
                         e_out == nullptr ? nullptr : e_out + begin, payload, block,
                         left_in<kBlock>(block, numel), records_at, decay, lane, shared[warp]);
  }
  add_shares(share, payload);
}

template <class R, int kBlock, int kK>
__device__ __forceinline__ void withdraw(const R* e_in, R* e_out, uint8_t* payload, long long numel,
                                         long long records_at, unsigned long long checksum) {
  using Chunk = Pack<R, 16 / sizeof(R)>;
  if (*flags_of(payload) == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long block = static_cast<long long>(blockIdx.x) * kWarps + warp, begin = block * kBlock;
  if (blockIdx.x == 0 && threadIdx.x == 0) *checksum_of(payload) = checksum;
  if (begin >= numel) return;
  if (lane < kK) reinterpret_cast<uint16_t*>(payload + records_at)[block * kK + lane] = 0;
  if (lane == 0) payload[kHeader + block] = 0;
  if (e_out == nullptr) return;
  constexpr int kEach = 16 / sizeof(R);
  for (int i = lane * kEach; i < left_in<kBlock>(block, numel); i += 32 * kEach) {
    Chunk chunk = {};
    if (e_in != nullptr) chunk = *reinterpret_cast<const Chunk*>(e_in + begin + i);
    *reinterpret_cast<Chunk*>(e_out + begin + i) = chunk;
  }
}

__device__ __forceinline__ bool any_flag(const uint8_t* payloads, int count, long long stride, int lane) {
  uint32_t flags = 0;
  for (int p = lane; p < count; p += 32)
    flags |= *reinterpret_cast<const uint32_t*>(payloads + p * stride + kFlags);
  return __any_sync(kAll, flags != 0);
}

// Adds `weight` times block number `block` of each payload, in order, to `target` by a warp.
template <int kBlock, int kK, int kBits>
__device__ __forceinline__ void add_block(float* target, const uint8_t* payloads, int count, long long stride,
                                          long long block, long long records_at, float weight, int lane) {
  for (int p = 0; p < count; ++p, payloads += stride) {
    const float scale = power_of(payloads[kHeader + block]);
    if (lane < kK) {
      const uint32_t record = reinterpret_cast<const uint16_t*>(payloads + records_at)[block * kK + lane];
      if (record != 0 || lane == 0) {  // a record of zero that is not the first is padding
        const float q = static_cast<float>(static_cast<int16_t>(record) >> (16 - kBits));
        float& at = target[record & (kBlock - 1)];
        at = __fadd_rn(at, __fmul_rn(__fmul_rn(q, scale), weight));
      }
    }
    __syncwarp();
  }
}

// out = out + sum of weight * payloads; with kClear, out begins as zero and need not be read.
template <bool kClear, int kBlock, int kK, int kBits>
__device__ __forceinline__ void decode(const uint8_t* payloads, float* out, int count, long long stride,
                                       long long numel, long long records_at, float weight) {
  __shared__ float4 sums[kClear ? kWarps : 1][kBlock / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long block = static_cast<long long>(blockIdx.x) * kWarps + warp, begin = block * kBlock;
  if (begin >= numel) return;
  const int left = left_in<kBlock>(block, numel);
  out += begin;
  if (any_flag(payloads, count, stride, lane)) {
    const float nan = __uint_as_float(kQuietNan);
    for (int i = lane * 4; i < left; i += 128)
      *reinterpret_cast<float4*>(out + i) = make_float4(nan, nan, nan, nan);
    return;
  }
  if constexpr (!kClear) {
    add_block<kBlock, kK, kBits>(out, payloads, count, stride, block, records_at, weight, lane);
  } else {
    float4* const sum = sums[warp];
#pragma unroll
    for (int j = 0; j < kBlock / 128; ++j) sum[j * 32 + lane] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    __syncwarp();
    add_block<kBlock, kK, kBits>(reinterpret_cast<float*>(sum), payloads, count, stride, block, records_at,
                                 weight, lane);
#pragma unroll
    for (int j = 0; j < kBlock / 128; ++j) {
      const int i = j * 32 + lane;
      if (4 * i < left) reinterpret_cast<float4*>(out)[i] = sum[i];
    }
  }
}

// The second stage of a two-stage exchange: the sum of payloads, from zero, is the gradient; it never reaches memory.
template <class R, int kBlock, int kK, int kBits>
__device__ __forceinline__ void reencode(const uint8_t* payloads, const R* e_in, R* e_out, uint8_t* payload,
                                         int count, long long stride, long long numel, long long records_at,
                                         float weight, float decay) {
  using Codec = TopK<float, R, kBlock, kK, kBits>;
  __shared__ typename Codec::Shared shared[kWarps];
  __shared__ float4 sums[kWarps][kBlock / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long long block = static_cast<long long>(blockIdx.x) * kWarps + warp, begin = block * kBlock;
  unsigned long long share = 0;
  if (begin < numel) {
    float4* const sum = sums[warp];
    const float fill = any_flag(payloads, count, stride, lane) ? __uint_as_float(kQuietNan) : 0.0f;
#pragma unroll
    for (int j = 0; j < kBlock / 128; ++j) sum[j * 32 + lane] = make_float4(fill, fill, fill, fill);
    __syncwarp();
    add_block<kBlock, kK, kBits>(reinterpret_cast<float*>(sum), payloads, count, stride, block, records_at,
                                 weight, lane);
    Codec codec;
    share = codec.encode(reinterpret_cast<const float*>(sum), e_in == nullptr ? nullptr : e_in + begin,
                         e_out == nullptr ? nullptr : e_out + begin, payload, block,
                         left_in<kBlock>(block, numel), records_at, decay, lane, shared[warp]);
  }
  add_shares(share, payload);
}

}  // namespace
}  // namespace hybridcomm

using namespace hybridcomm;

// Entry points for topk:0.01, blocks of 1024, ten records, codes of six bits.
#define ENCODE(NAME, G, R)                                                                                  \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                                                 \
      NAME(const G* grad, const R* e_in, R* e_out, uint8_t* payload, long long numel, long long records_at, \
           float decay) {                                                                                   \
    encode<G, R, 1024, 10, 6>(grad, e_in, e_out, payload, numel, records_at, decay);                        \
  }
#define WITHDRAW(NAME, R)                                                                    \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                                  \
      NAME(const R* e_in, R* e_out, uint8_t* payload, long long numel, long long records_at, \
           unsigned long long checksum) {                                                    \
    withdraw<R, 1024, 10>(e_in, e_out, payload, numel, records_at, checksum);                \
  }
#define DECODE(NAME, CLEAR)                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                                   \
      NAME(const uint8_t* payloads, float* out, int count, long long stride, long long numel, \
           long long records_at, float weight) {                                              \
    decode<CLEAR, 1024, 10, 6>(payloads, out, count, stride, numel, records_at, weight);      \
  }
#define REENCODE(NAME, R)                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                                                 \
      NAME(const uint8_t* payloads, const R* e_in, R* e_out, uint8_t* payload, int count, long long stride, \
           long long numel, long long records_at, float weight, float decay) {                              \
    reencode<R, 1024, 10, 6>(payloads, e_in, e_out, payload, count, stride, numel, records_at, weight,      \
                             decay);                                                                        \
  }

ENCODE(topk_encode_fp32_fp32, float, float)
ENCODE(topk_encode_bf16_fp32, __nv_bfloat16, float)
ENCODE(topk_encode_fp16_fp32, __half, float)
ENCODE(topk_encode_fp32_bf16, float, __nv_bfloat16)
ENCODE(topk_encode_bf16_bf16, __nv_bfloat16, __nv_bfloat16)
ENCODE(topk_encode_fp16_bf16, __half, __nv_bfloat16)
WITHDRAW(topk_withdraw_fp32, float)
WITHDRAW(topk_withdraw_bf16, __nv_bfloat16)
DECODE(topk_decode_add, false)
DECODE(topk_decode, true)
REENCODE(topk_reencode_fp32, float)
REENCODE(topk_reencode_bf16, __nv_bfloat16)
