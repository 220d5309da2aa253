// Steps 4 and 6 of 7 for powersgd, a region as a matrix of low rank: compress, decompress, and a sum compressed anew;
// the oracle's bytes, in passes over the region.
//
// Phases of encode, a kernel each
//   1  encode       acc = grad + decay * e_in to memory; the largest magnitude, which the header's flags hold meanwhile
//      reencode     likewise of a sum of payloads, which itself never reaches memory
//   2  left         P = M Q, M being acc over its scale, Q signs by the header's seed: four threads per row
//   3  orthonormal  each column of P against those before it, twice: one program; flags, scale, P's share of the
//                   checksum
//   4  right        Q = M^T P: a thread per column and rank, row after row
//   5  rest         acc - P Q^T times the scale, the new residual; where a value was not finite, the old one
// The order of every sum is the format's: 2 adds 32 numbers in a row, 3 a sixteenth of the rows in each dot product, 4
// all rows. So what 3 and 4 take grows with the rows, while little of a device is busy. All write what they have to,
// zeros included: only the header has to be there before.
#include "powersgd_sums.cuh"
#include "powersgd_tile.cuh"

namespace hybridcomm {
namespace {

// Ends phase 1: acc to memory, its largest magnitude to the flags, where NaN is the largest.
template <int kEach>
__device__ __forceinline__ void leave(const Tile<kEach>& tile, float* acc, uint8_t* payload) {
  int largest = 0;
#pragma unroll
  for (int k = 0; k < tile.kCount; ++k) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) largest = max(largest, key_of(tile.x[k][e]));
  }
  tile.store(acc);
  largest = __reduce_max_sync(kAll, largest);
  if (threadIdx.x % 32 == 0) atomicMax(flags_of(payload), static_cast<uint32_t>(largest));
}

template <class G, class R>
__device__ __forceinline__ void encode(const G* grad, const R* e_in, float* acc, uint8_t* payload,
                                       long long numel, float decay) {
  Tile<16 / (sizeof(G) < sizeof(R) ? sizeof(G) : sizeof(R))> tile(numel);
  tile.load(grad);
  if (e_in != nullptr) tile.add(e_in, decay);
  leave(tile, acc, payload);
}

// x = x + weight * each payload, in order; all NaN where one of them is flagged.
template <int kRank, int kEach>
__device__ __forceinline__ void add_payloads(Tile<kEach>& tile, const uint8_t* payloads, int count,
                                             long long stride, long long rows, float weight) {
  uint32_t flags = 0;
#pragma unroll 1
  for (int p = 0; p < count; ++p, payloads += stride) {
    flags |= *reinterpret_cast<const uint32_t*>(payloads + kFlags);
    if (payloads[kHeader] == 0) continue;  // nothing was sent: adding zeros would change those with a sign
    tile.template take<kRank>(payloads, rows,
                              [&](float x, float value) { return __fadd_rn(x, __fmul_rn(value, weight)); });
  }
  if (flags != 0) tile.fill(__uint_as_float(kQuietNan));
}

template <class R, int kRank>
__device__ __forceinline__ void reencode(const uint8_t* payloads, const R* e_in, float* acc, uint8_t* payload,
                                         int count, long long stride, long long numel, float weight,
                                         float decay) {
  Tile<16 / sizeof(R)> tile(numel);
  tile.fill(0.0f);
  add_payloads<kRank>(tile, payloads, count, stride, rows_of(numel), weight);
  if (e_in != nullptr) tile.add(e_in, decay);
  leave(tile, acc, payload);
}

template <class R, int kRank>
__device__ __forceinline__ void rest(const float* acc, const R* e_in, R* e_out, uint8_t* payload,
                                     long long numel, unsigned long long withdrawn) {
  Tile<16 / sizeof(R)> tile(numel);
  if (*flags_of(payload) != 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *checksum_of(payload) = withdrawn;
    tile.copy(e_in, e_out);
    return;
  }
  tile.load(acc);
  tile.template take<kRank>(payload, rows_of(numel),
                            [](float x, float value) { return __fsub_rn(x, value); });
  tile.store(e_out);
}

// out = out + sum of weight * payloads; with kClear, out begins as zero and need not be read.
template <bool kClear, int kRank>
__device__ __forceinline__ void decode(const uint8_t* payloads, float* out, int count, long long stride,
                                       long long numel, float weight) {
  Tile<4> tile(numel);
  if constexpr (kClear) {
    tile.fill(0.0f);
  } else {
    tile.load(out);
  }
  add_payloads<kRank>(tile, payloads, count, stride, rows_of(numel), weight);
  tile.store(out);
}

}  // namespace
}  // namespace hybridcomm

using namespace hybridcomm;

// Six blocks on an SM leave a thread the registers for all its loads at once, and keep enough of them under way.
#define KERNEL(THREADS, NAME) \
  extern "C" __global__ void __launch_bounds__(THREADS, THREADS == kThreads ? 6 : 1) NAME

#define ENCODE(NAME, G, R)                                                                     \
  KERNEL(kThreads, NAME)                                                                       \
  (const G* grad, const R* e_in, float* acc, uint8_t* payload, long long numel, float decay) { \
    encode<G, R>(grad, e_in, acc, payload, numel, decay);                                      \
  }

ENCODE(powersgd_encode_fp32_fp32, float, float)
ENCODE(powersgd_encode_bf16_fp32, __nv_bfloat16, float)
ENCODE(powersgd_encode_fp16_fp32, __half, float)
ENCODE(powersgd_encode_fp32_bf16, float, __nv_bfloat16)
ENCODE(powersgd_encode_bf16_bf16, __nv_bfloat16, __nv_bfloat16)
ENCODE(powersgd_encode_fp16_bf16, __half, __nv_bfloat16)

#define REENCODE(NAME, R, RANK)                                                                       \
  KERNEL(kThreads, NAME)                                                                              \
  (const uint8_t* payloads, const R* e_in, float* acc, uint8_t* payload, int count, long long stride, \
   long long numel, float weight, float decay) {                                                      \
    reencode<R, RANK>(payloads, e_in, acc, payload, count, stride, numel, weight, decay);             \
  }
#define REST(NAME, R, RANK)                                                      \
  KERNEL(kThreads, NAME)                                                         \
  (const float* acc, const R* e_in, R* e_out, uint8_t* payload, long long numel, \
   unsigned long long checksum) {                                                \
    rest<R, RANK>(acc, e_in, e_out, payload, numel, checksum);                   \
  }
#define DECODE(NAME, CLEAR, RANK)                                                                     \
  KERNEL(kThreads, NAME)                                                                              \
  (const uint8_t* payloads, float* out, int count, long long stride, long long numel, float weight) { \
    decode<CLEAR, RANK>(payloads, out, count, stride, numel, weight);                                 \
  }

// Entry points for one rank.
#define RANKED(RANK)                                                                             \
  KERNEL(kThreads, powersgd##RANK##_left)(const float* acc, uint8_t* payload, long long numel) { \
    left<RANK>(acc, payload, numel);                                                             \
  }                                                                                              \
  KERNEL(kWide, powersgd##RANK##_orthonormal)(uint8_t* payload, long long numel) {               \
    orthonormal<RANK>(payload, numel);                                                           \
  }                                                                                              \
  KERNEL(kWide, powersgd##RANK##_right)(const float* acc, uint8_t* payload, long long numel) {   \
    right<RANK>(acc, payload, numel);                                                            \
  }                                                                                              \
  REENCODE(powersgd##RANK##_reencode_fp32, float, RANK)                                          \
  REENCODE(powersgd##RANK##_reencode_bf16, __nv_bfloat16, RANK)                                  \
  REST(powersgd##RANK##_rest_fp32, float, RANK)                                                  \
  REST(powersgd##RANK##_rest_bf16, __nv_bfloat16, RANK)                                          \
  DECODE(powersgd##RANK##_decode_add, false, RANK)                                               \
  DECODE(powersgd##RANK##_decode, true, RANK)

RANKED(1)
RANKED(2)
RANKED(4)
