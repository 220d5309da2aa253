// The portable kernels of block-wise top-k: plain C++, on every machine.
#include "topk_block.h"

namespace hybridcomm::kernels {
namespace {

struct Scalar {
  static constexpr uint32_t kGroups = 64;

  static uint32_t accumulate(const float* grad, const float* e_in, float decay, uint32_t block, uint32_t t,
                             Scratch& s) {
    for (uint32_t i = 0; i < block; ++i) s.acc[i] = compensate(grad, e_in, decay, i);
    for (uint32_t g = 0; g < kGroups; ++g) s.maxima[g] = 0;
    for (uint32_t i = 0; i < block; ++i) {
      const uint32_t key = bits_of(s.acc[i]) & kMagnitude;
      uint32_t& maximum = s.maxima[i % kGroups];
      maximum = key > maximum ? key : maximum;
    }
    return mask_ge(s.acc, block, t, s.masks);
  }

  static uint32_t count_ge(const void* keys, uint32_t n, uint32_t t) {
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; ++i) {
      uint32_t key;
      std::memcpy(&key, static_cast<const char*>(keys) + 4 * i, 4);
      count += (key & kMagnitude) >= t;
    }
    return count;
  }

  static uint32_t mask_ge(const float* acc, uint32_t block, uint32_t t, uint64_t* masks) {
    uint32_t count = 0;
    for (uint32_t w = 0; w * 64 < block; ++w) {
      const uint32_t end = block - w * 64 < 64 ? block - w * 64 : 64;
      uint64_t mask = 0;
      for (uint32_t i = 0; i < end; ++i) {
        const bool reached = (bits_of(acc[w * 64 + i]) & kMagnitude) >= t;
        mask |= uint64_t{reached} << i;
        count += reached;
      }
      masks[w] = mask;
    }
    return count;
  }

  static void write(const float* acc, float* e_out, uint32_t block, bool) {
    std::memcpy(e_out, acc, block * sizeof(float));
  }
  static void fence() {}

  static void add_records(const uint8_t* records, uint32_t k, uint32_t shift, uint32_t index_mask,
                          float scale, float weight, float* out) {
    add_records_scalar(records, k, shift, index_mask, scale, weight, out);
  }
};

}  // namespace

extern const Kernels kTopkScalar;
const Kernels kTopkScalar = {encode_region<Scalar>, decode_region<Scalar>};

}  // namespace hybridcomm::kernels
