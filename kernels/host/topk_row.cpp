// Block-wise top-k: what holds on every instruction set. Sections: scales, records.
#include <cstring>

#include "payload.h"

namespace hybridcomm::kernels {

extern const Kernels kTopkScalar, kTopkAvx2, kTopkAvx512;

namespace {

bool valid(const CodecParams& params) {
  if (params.variant != 0) return false;
  const uint32_t block = params.block;
  if (block < 16 || block > kMaxBlock || (block & (block - 1)) != 0) return false;
  uint32_t index_bits = 0;
  while ((1u << index_bits) < block) ++index_bits;
  return params.k >= 1 && params.k <= block && params.value_bits >= 3 && params.value_bits <= 16 - index_bits;
}

Layout layout_of(const CodecParams& params, size_t numel) {
  Layout layout{};
  layout.nblocks = numel / params.block + (numel % params.block != 0);
  layout.sections[0] = {sizeof(Header), layout.nblocks};
  layout.sections[1] = {sizeof(Header) + align16(layout.nblocks), 2 * size_t{params.k} * layout.nblocks};
  layout.nbytes = layout.sections[1].offset + align16(layout.sections[1].used);
  return layout;
}

bool check(const CodecParams& params, const Layout& layout, const uint8_t* payload, size_t numel) {
  const uint8_t* scales = payload + layout.sections[0].offset;
  bool good = true;
  for (size_t b = 0; b < layout.nblocks; ++b) good &= scales[b] >= 1 && scales[b] <= 256 - params.value_bits;
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
const CodecRow kTopkRow = {valid, layout_of, check,
                           false, false,     {&kTopkScalar, X86_ONLY(&kTopkAvx2), X86_ONLY(&kTopkAvx512)}};

}  // namespace hybridcomm::kernels
