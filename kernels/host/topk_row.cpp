// Block-wise top-k: what holds on every instruction set. Sections: scales, records.
#include <cstring>

#include "payload.h"

namespace hybridcomm::kernels {

extern const Kernels kTopkScalar, kTopkAvx2, kTopkAvx512;

namespace {

bool valid(const CodecParams& params) {
  const bool signs = params.variant == 1;
  if (params.variant > 1) return false;
  const uint32_t block = params.block;
  if (block < 16 || block > kMaxBlock || (block & (block - 1)) != 0) return false;
  uint32_t index_bits = 0;
  while ((1u << index_bits) < block) ++index_bits;
  if (params.k < 1 || params.k > block) return false;
  return signs ? params.value_bits == 2 : params.value_bits >= 3 && params.value_bits <= 16 - index_bits;
}

bool check(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= 256 - params.value_bits;
  if (params.variant == 1) {
    const uint8_t* records = payload + layout.sections[1].offset;
    for (size_t j = 0; j < params.k * layout.nblocks; ++j) good &= records[2 * j + 1] >> 6 != 2;  // -2
  }
  const size_t tail = numel % params.block;
  if (tail == 0 || !good) return good;
  const uint8_t* last = payload + layout.sections[1].offset + 2 * params.k * (layout.nblocks - 1);
  for (uint32_t j = 0; j < params.k; ++j) {
    uint16_t record;
    std::memcpy(&record, last + 2 * j, 2);
    good &= (record & (params.block - 1)) < tail;
  }
  return good;
}

}  // namespace

extern const CodecRow kTopkRow;
const CodecRow kTopkRow = {valid, record_sections,
                           check, false,
                           false, {&kTopkScalar, X86_ONLY(&kTopkAvx2), X86_ONLY(&kTopkAvx512)}};

}  // namespace hybridcomm::kernels
